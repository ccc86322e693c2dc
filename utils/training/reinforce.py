"""The parts of REINFORCE around its loop: samples, rewards, baselines, optimizer, metrics and alarms."""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_scheduler

from utils.data.preferences import Message
from utils.models.generation import Answer, batch_of, parts_of, prompt_ids_of, repetition
from utils.models.guidance import Guidance
from utils.models.reward_model import RewardHead, RewardModel
from utils.models.shared_prompt import TOKENS_AT_ONCE, answer_logps, row_multiple
from utils.runs import Run
from utils.script import first_process, say, stop
from utils.training.trainer import COMPLETE, KEPT_CHECKPOINTS, SCHEDULES, last_checkpoint, release_memory, trained_state

BASELINES = {  # what BASELINE may name
    "moving_average": "exponential mean of earlier steps",
    "running_mean": "mean of all earlier rewards, as in https://arxiv.org/abs/2402.14740",
    "leave_one_out": "mean of the other answers to the same prompt",
    "none": "nothing is taken off",
}
NORMS = {"none": "as they are", "std": "divided by their root mean square"}  # what ADVANTAGE_NORM may name
MAX_GRAD_NORM = 1.0  # gradients are clipped to it, as transformers.Trainer does
SAMPLE_EVERY_STEPS = 5  # a line of samples.jsonl
MIN_MEAN_LENGTH = 2.0  # tokens an answer, end of turn included; a run stops below it
MIN_ENTROPY = 0.05  # nats a token; a run stops below it
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's names for PRECISION


@dataclass
class Sample:
    """One sampled answer and all that is known of it; log-probs are sums over its tokens, in nats."""

    number: int  # of all answers of the run: step x answers a step + place
    prompt: list[Message]
    answer: Answer
    logp: float  # log pi(answer), of the policy that wrote it
    reference: float  # log ref(answer)
    entropy: float  # of the next token, summed over the answer's tokens
    reward: float = 0.0  # by the reward model, minus the penalty for a cut, without the KL

    @property
    def kl(self) -> float:
        """log pi - log ref: its mean over sampled answers is the KL of policy and reference."""
        return self.logp - self.reference


class Policy(nn.Module):
    """A causal model as accelerate wraps it: sampled answers in (see `sampling.batch_of`), log pi of each out."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """log pi(answer | prompt) [batch], float32, at the temperature of the sampling, end of turn included."""
        return answer_logps(self.model, batch, None, self.temperature)[0][:, 0]


@dataclass
class Actor:
    """The policy that answers prompts, its reference, and how both read and compute."""

    model: nn.Module
    reference: nn.Module | str  # of policies.reference_of: a frozen copy, or "adapter" for the model without its own
    tokenizer: PreTrainedTokenizerBase
    window: int  # tokens; a longer prompt loses its start
    precision: str

    def __post_init__(self):
        if self.reference != "adapter":
            self.reference.to(self.model.device)

    def prompt_ids(self, prompts: list[list[Message]]) -> list[list[int]]:
        return prompt_ids_of(self.tokenizer, prompts, self.window, Guidance())

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Yield the reference ready for use: the frozen copy, or the model with its adapters off."""
        if self.reference == "adapter":
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.reference


@lru_cache(maxsize=2)
def order_of(epoch: int, rows: int, seed: int) -> np.ndarray:
    """Row numbers in the order of an epoch: a function of seed and epoch, so that a resumed run goes on in it."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def prompt_of(number: int, answers_per_prompt: int, rows: int, seed: int) -> int:
    """The row whose prompt the answer with this number is to; each row comes once an epoch."""
    place = number // answers_per_prompt
    return int(order_of(place // rows, rows, seed)[place % rows])


def check_risk(reading: RewardHead, risk: float, model: str) -> None:
    """Stop the script if RISK is set and the reward model has no distribution to take a spread from."""
    if risk and reading.head != "distribution":
        stop(f"RISK = {risk} needs the spread of a distribution: {model!r} has a {reading.head} head")


@dataclass
class Scoring:
    """How an answer is rewarded: the expected grade minus risk x spread, minus cut_penalty if it did not end."""

    model: RewardModel
    risk: float = 0.0
    cut_penalty: float = 0.0

    def __call__(self, prompts: list[list[Message]], answers: list[Answer]) -> torch.Tensor:
        """Return the rewards of the answers [answers], float32."""
        outputs = self.model.read(prompts, [(answer.text,) for answer in answers])
        rewards = self.model.reading.rewards(outputs[:, 0])
        if self.risk:
            rewards = rewards - self.risk * self.model.reading.spread(outputs[:, 0])
        cut = torch.tensor([not answer.ended for answer in answers], dtype=torch.float32)
        return rewards - self.cut_penalty * cut


@dataclass
class Baseline:
    """What is taken off a reward before it weighs its answer; moving ones are saved with the checkpoint.

    kind: a name of BASELINES. decay: share of the past in the moving average. seen: rewards so far.
    """

    kind: str
    decay: float = 0.9
    value: float = 0.0
    seen: int = 0
    used: float = 0.0  # what was taken off in the last step, on average

    def advantages(self, rewards: torch.Tensor, answers_per_prompt: int = 1) -> torch.Tensor:
        """Return rewards [answers] minus the baseline; the answers to one prompt are neighbours.

        A moving baseline starts at the mean of the first step and is updated after use: from the second step on, no
        answer has its own reward in its baseline.
        """
        count = len(rewards)
        self.used = 0.0
        if self.kind == "none":
            return rewards
        if self.kind == "leave_one_out":
            assert answers_per_prompt > 1, "an answer alone has no others to compare with"
            group = rewards.view(-1, answers_per_prompt)
            total = group.sum(1, keepdim=True)
            self.used = total.sum().item() / count  # each reward is in the baselines of the others
            return (group - (total - group) / (answers_per_prompt - 1)).flatten()
        mean = rewards.sum().item() / count
        if not math.isfinite(mean):  # an alarm will stop the run; keep its state usable
            return rewards - self.value
        if not self.seen:
            self.value = mean
        self.used = self.value
        found = rewards - self.value
        if self.kind == "moving_average":
            self.value = self.decay * self.value + (1 - self.decay) * mean
        else:
            self.value = (self.value * self.seen + mean * count) / (self.seen + count)
        self.seen += count
        return found


def normalised(advantages: torch.Tensor, norm: str) -> torch.Tensor:
    """Return the advantages [answers], divided by their root mean square if norm = std.

    A baseline of earlier steps leaves a mean that is not 0. Divided by the deviation from that mean, answers with
    nearly equal rewards would be pushed without limit.
    """
    if norm == "none" or len(advantages) < 2:
        return advantages
    return advantages / (advantages.square().mean().sqrt() + 1e-4)


def step_metrics(
    samples: list[Sample], advantages: torch.Tensor, baseline: Baseline, loss: float, norm: float, seconds: float
) -> dict[str, float]:
    """A line of metrics.jsonl: means over all answers of a step; kl and reward in full, entropy for each token."""
    rewards = torch.tensor([sample.reward for sample in samples])
    lengths = [len(sample.answer.ids) for sample in samples]
    ended = sum(sample.answer.ended for sample in samples) / len(samples)
    kl = np.array([sample.kl for sample in samples])
    return {
        "loss": loss,
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "baseline": baseline.used,
        "advantage": advantages.mean().item(),
        "advantage_std": advantages.std(correction=0).item(),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else math.nan,
        "entropy": sum(sample.entropy for sample in samples) / sum(lengths),
        "completions/mean_length": sum(lengths) / len(samples),
        "completions/ended": ended,
        "completions/clipped_ratio": 1 - ended,
        "completions/repetition": sum(repetition(sample.answer.ids) for sample in samples) / len(samples),
        "grad_norm": norm,
        "tokens_per_second": sum(lengths) / seconds,
    }


def sample_line(sample: Sample, step: int, advantage: float) -> dict[str, object]:
    """A line of samples.jsonl."""
    said = {"step": step, "prompt": sample.prompt[-1]["content"], "answer": sample.answer.text}
    numbers = {"reward": sample.reward, "kl": sample.kl, "advantage": advantage}
    return said | numbers | {"tokens": len(sample.answer.ids), "ended": sample.answer.ended}


def divergence_alarm(figures: dict[str, float], kl_limit: float) -> str:
    """Return why a run should stop after a step with these figures of metrics.jsonl, "" if it may continue."""
    bad = [name for name in ("loss", "grad_norm", "reward", "kl") if not np.isfinite(figures[name])]
    if bad:
        return f"{' and '.join(bad)} of this step is not finite: lower LEARNING_RATE"
    if kl_limit and figures["kl"] > kl_limit:
        return f"KL {figures['kl']:.1f} is over KL_LIMIT = {kl_limit}: raise KL_BETA or lower LEARNING_RATE"
    if figures["completions/mean_length"] < MIN_MEAN_LENGTH:
        length = figures["completions/mean_length"]
        return f"answers have collapsed to {length:.1f} tokens, the minimum is {MIN_MEAN_LENGTH}: raise KL_BETA"
    if figures["entropy"] < MIN_ENTROPY:
        entropy = figures["entropy"]
        return f"entropy has collapsed to {entropy:.3f} nats a token, the minimum is {MIN_ENTROPY}: raise KL_BETA"
    return ""


@dataclass
class Engine:
    """The policy as accelerate runs it, with its optimizer and the schedule of its rate."""

    accelerator: Accelerator
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def batches(self, answers: list[Answer]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield (places in `answers`, their batch on the device) in parts, for one backward pass each.

        Memory does not grow with the number of answers. Processes exchange gradients in the last part only.
        """
        policy, device = self.policy.train(), self.accelerator.device
        parts = parts_of(answers, TOKENS_AT_ONCE[device.type])
        for part in parts:
            batch = batch_of([answers[i] for i in part], multiple=row_multiple(device))
            batch = {name: value.to(device) for name, value in batch.items()}
            with contextlib.nullcontext() if part is parts[-1] else self.accelerator.no_sync(policy):
                yield part, batch

    def step(self) -> float:
        """Clip the gradients, take an optimizer step and clear them. Return the norm before clipping.

        A gradient that is not finite moves nothing. Under fp16 the GradScaler then lowers its scale and training
        continues; the norm returned is 0.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM))
        if self.accelerator.scaler is not None:
            norm = norm if math.isfinite(norm) else 0.0
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        release_memory()
        return norm

    def next_rate(self) -> float:
        """The learning rate of the step just taken; moves on to the next one."""
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        return rate

    def parts(self) -> dict[str, object]:
        """What has a state of its own beside the weights."""
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler is not None else {}
        return {"optimizer": self.optimizer, "schedule": self.schedule} | scaler

    def save(self, run: Run, step: int, baseline: Baseline) -> None:
        """checkpoints/checkpoint-{step}: trained weights, optimizer, schedule, baseline.

        Written beside its name and renamed when whole. What is sampled is a function of seed and step, so no state of
        a random generator is needed to go on with the same answers.
        """
        state = {"step": step, "baseline": asdict(baseline)}
        state["weights"] = trained_state(self.accelerator.unwrap_model(self.policy))
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        place = run.folder / "checkpoints" / f"checkpoint-{step}"
        part = place.with_name(f"part-{step}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        torch.save(state, part / "state.pt")
        (part / COMPLETE).touch()
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        run.note()  # the time so far, should this process be killed
        kept = sorted(place.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for older in kept[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(older)

    def save_or_stop(self, run: Run, step: int, baseline: Baseline, due: bool, reason: str, asked: bool) -> None:
        """Save a checkpoint if it is due; save and stop the script after an alarm (`reason`) or Ctrl-C (`asked`)."""
        asked = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)).item() > 0
        if first_process() and (reason or asked or due):
            self.save(run, step, baseline)
        if reason or asked:
            self.accelerator.wait_for_everyone()  # a launcher kills the process that saves once another one has ended
        if reason:
            stop(f"stopped at step {step}, checkpoint saved: {reason}")
        if asked:
            say(f"stopped and saved at step {step}: start the same command again to go on")
            sys.exit(130)

    def resume(self, run: Run, baseline: Baseline) -> int:
        """Put all back as the last complete checkpoint of a run has it; the number of steps taken by then."""
        checkpoint = last_checkpoint(run.folder)
        if not checkpoint:
            forget_steps_after(0, run)  # of a start that was killed before its first checkpoint
            return 0
        state = torch.load(Path(checkpoint) / "state.pt", weights_only=True, map_location="cpu")
        module = self.accelerator.unwrap_model(self.policy)
        assert set(state["weights"]) == set(trained_state(module)), "checkpoint of another model"
        module.load_state_dict(state["weights"], strict=False)
        for name, part in self.parts().items():
            if name in state:  # a GradScaler is there on one kind of GPU and not on another
                part.load_state_dict(state[name])
        vars(baseline).update(state["baseline"])
        forget_steps_after(state["step"], run)
        return state["step"]


def forget_steps_after(step: int, run: Run) -> None:
    """Drop the lines of steps that will be done again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.forget_after(step, name)


def start_engine(policy: Policy, run: Run) -> Engine:
    """Return the policy on its device, in its precision, with AdamW, all as the record of the run has it."""
    settings, tracker = run.record["settings"], run.record["settings"]["REPORT_TO"]
    accelerator = Accelerator(
        mixed_precision=MIXED[run.record["precision"]],
        cpu=run.record["device"] == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=str(run.folder),
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)],  # from 2^16 on, the first steps would be skipped
    )
    if tracker != "none":
        accelerator.init_trackers("reinforce", {name: str(value) for name, value in settings.items()})
    trained = [value for value in policy.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["LEARNING_RATE"], weight_decay=0.0)
    steps = settings["MAX_STEPS"]
    warmup = int(settings["WARMUP_SHARE"] * steps)
    schedule = get_scheduler(SCHEDULES[settings["SCHEDULE"]], optimizer, warmup, steps)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return Engine(accelerator, policy, optimizer, schedule)
