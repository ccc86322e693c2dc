"""What the loop of REINFORCE uses: samples, rewards, baselines, optimizer, checkpoints, metrics and alarms."""

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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_scheduler

from utils.data.preferences import Message
from utils.models.generation import Answer, batch_of, parts_of, prompts_of, repetition
from utils.models.reward_model import RewardHead, RewardModel
from utils.models.shared_prompt import TOKENS_AT_ONCE, Prompt, answer_logps, row_multiple
from utils.runs import Run
from utils.script import first_process, say, stop
from utils.training.trainer import COMPLETE, KEPT_CHECKPOINTS, SCHEDULES, last_checkpoint, release_memory, trained_state

BASELINES = {  # choices of BASELINE
    "moving_average": "exponential mean of earlier steps",
    "running_mean": "mean of all earlier rewards, as in https://arxiv.org/abs/2402.14740",
    "leave_one_out": "mean of the other answers to the same prompt",
    "none": "no baseline",
}
NORMS = {"none": "as they are", "std": "divided by their root mean square"}  # choices of ADVANTAGE_NORM
MAX_GRAD_NORM = 1.0  # gradients are clipped to it, as transformers.Trainer does
SAMPLE_EVERY_STEPS = 5  # steps between lines of samples.jsonl
MIN_MEAN_LENGTH = 2.0  # tokens per answer with the end of turn; below it a run stops
MIN_ENTROPY = 0.05  # nats per token; below it a run stops
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's names for PRECISION


@dataclass
class Sample:
    """One sampled answer with its scores. Log-probs are sums over its tokens, in nats."""

    number: int  # counts the answers of the run: step x answers per step + place
    prompt: list[Message]
    answer: Answer
    logp: float  # log pi(answer), of the policy that sampled it
    reference: float  # log ref(answer)
    entropy: float  # of the next token, summed over the answer's tokens
    reward: float = 0.0  # of the reward model, minus the penalty for a cut answer; without the KL

    @property
    def kl(self) -> float:
        """log pi - log ref; its mean over sampled answers estimates KL(policy || reference)."""
        return self.logp - self.reference


class Policy(nn.Module):
    """The causal model that accelerate wraps: batches of generation.batch_of in, log pi of each answer out."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return log pi(answer | prompt) [batch], float32, at the sampling temperature, with the end of turn."""
        return answer_logps(self.model, batch, None, self.temperature)[0][:, 0]


@dataclass
class Actor:
    """The policy that answers prompts, and its reference."""

    model: nn.Module
    reference: nn.Module | str  # a frozen copy, or "adapter" for the model with its adapters off
    tokenizer: PreTrainedTokenizerBase
    window: int  # tokens; longer prompts lose their start
    precision: str

    def __post_init__(self) -> None:
        if isinstance(self.reference, nn.Module):
            self.reference.to(next(self.model.parameters()).device)

    def prompts(self, conversations: list[list[Message]]) -> list[Prompt]:
        return prompts_of(self.tokenizer, conversations, self.window)

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Yield the reference: the frozen copy, or the model with its adapters off."""
        if isinstance(self.reference, nn.Module):
            yield self.reference
        else:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model


@lru_cache(maxsize=2)
def order_of(epoch: int, rows: int, seed: int) -> np.ndarray:
    """Return the row numbers of an epoch in order; it depends on seed and epoch only, so that runs can resume."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def prompt_of(number: int, answers_per_prompt: int, rows: int, seed: int) -> int:
    """Return the row of the prompt for the answer with this number; each row comes once per epoch."""
    place = number // answers_per_prompt
    return int(order_of(place // rows, rows, seed)[place % rows])


def check_risk(head: RewardHead, risk: float, model: str) -> None:
    """Stop the script if RISK is set and the reward model has no distribution to take a spread from."""
    if risk and head.kind != "distribution":
        stop(f"RISK = {risk} needs the spread of a distribution: {model!r} has a {head.kind} head")


@dataclass
class Scoring:
    """The reward of an answer: the expected grade - risk x spread, minus cut_penalty if it did not end."""

    model: RewardModel
    risk: float = 0.0
    cut_penalty: float = 0.0

    def __call__(self, prompts: list[list[Message]], answers: list[Answer]) -> torch.Tensor:
        """Return the rewards of the answers [answers], float32."""
        outputs = self.model.read(prompts, [(answer.text,) for answer in answers])
        rewards = self.model.head.rewards(outputs[:, 0])
        if self.risk:
            rewards = rewards - self.risk * self.model.head.spread(outputs[:, 0])
        cut = torch.tensor([not answer.ended for answer in answers], dtype=torch.float32)
        return rewards - self.cut_penalty * cut


@dataclass
class Baseline:
    """What is subtracted from the rewards; moving baselines are saved in the checkpoint.

    kind: a name in BASELINES. decay: share of the past in the moving average. seen: number of rewards so far.
    """

    kind: str
    decay: float = 0.9
    value: float = 0.0
    seen: int = 0
    used: float = 0.0  # mean baseline of the last step

    def advantages(self, rewards: torch.Tensor, answers_per_prompt: int = 1) -> torch.Tensor:
        """Return rewards [answers] minus the baseline; answers to the same prompt are neighbours.

        A moving baseline starts at the mean of the first step and is updated after use. From the second step on, the
        baseline of an answer never contains its own reward.
        """
        count = len(rewards)
        self.used = 0.0
        if self.kind == "none":
            return rewards
        if self.kind == "leave_one_out":
            assert answers_per_prompt > 1, "leave_one_out needs several answers per prompt"
            group = rewards.view(-1, answers_per_prompt)
            total = group.sum(1, keepdim=True)
            self.used = total.sum().item() / count  # the mean over their baselines too
            return (group - (total - group) / (answers_per_prompt - 1)).flatten()
        mean = rewards.sum().item() / count
        if not math.isfinite(mean):  # an alarm stops the run: keep a usable state
            return rewards - self.value
        if not self.seen:
            self.value = mean
        self.used = self.value
        advantages = rewards - self.value
        if self.kind == "moving_average":
            self.value = self.decay * self.value + (1 - self.decay) * mean
        else:
            self.value = (self.value * self.seen + mean * count) / (self.seen + count)
        self.seen += count
        return advantages


def normalised(advantages: torch.Tensor, norm: str) -> torch.Tensor:
    """Return the advantages [answers], divided by their root mean square for norm = std.

    With a baseline from earlier steps their mean is not 0. The standard deviation nears 0 if rewards are almost equal,
    and dividing by it would blow the advantages up.
    """
    if norm == "none" or len(advantages) < 2:
        return advantages
    return advantages / (advantages.square().mean().sqrt() + 1e-4)


def step_metrics(
    samples: list[Sample], advantages: torch.Tensor, baseline: Baseline, loss: float, norm: float, seconds: float
) -> dict[str, float]:
    """Return a line of metrics.jsonl: means over all answers of a step; kl per answer, entropy per token."""
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
    """Return a line of samples.jsonl."""
    texts = {"step": step, "prompt": sample.prompt[-1]["content"], "answer": sample.answer.text}
    scores = {"reward": sample.reward, "kl": sample.kl, "advantage": advantage}
    return texts | scores | {"tokens": len(sample.answer.ids), "ended": sample.answer.ended}


def divergence_alarm(metrics: dict[str, float], kl_limit: float) -> str:
    """Return why the run should stop after a step with these metrics, "" if it can continue."""
    kl, length, entropy = (metrics[name] for name in ("kl", "completions/mean_length", "entropy"))
    bad = [name for name in ("loss", "grad_norm", "reward", "kl") if not np.isfinite(metrics[name])]
    if bad:
        return f"{' and '.join(bad)} of this step is not finite: lower LEARNING_RATE"
    if kl_limit and kl > kl_limit:
        return f"KL {kl:.1f} is over KL_LIMIT = {kl_limit}: raise KL_BETA or lower LEARNING_RATE"
    if length < MIN_MEAN_LENGTH:
        return f"answers have collapsed to {length:.1f} tokens, the minimum is {MIN_MEAN_LENGTH}: raise KL_BETA"
    if entropy < MIN_ENTROPY:
        return f"entropy has collapsed to {entropy:.3f} nats a token, the minimum is {MIN_ENTROPY}: raise KL_BETA"
    return ""


@dataclass
class Engine:
    """The policy wrapped by accelerate, with its optimizer and learning rate schedule."""

    accelerator: Accelerator
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def own_share(self, answers: int) -> slice:
        """Return the places of this process among the answers of a step."""
        count = answers // self.accelerator.num_processes
        return slice(count * self.accelerator.process_index, count * (self.accelerator.process_index + 1))

    def batches(
        self, answers: list[Answer], weights: list[float]
    ) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Yield micro-batches, for one backward pass each: (weights [batch], batch), on the device.

        Memory does not grow with the number of answers. Processes exchange gradients in the last one only.
        """
        policy, device = self.policy.train(), self.accelerator.device
        parts = parts_of(answers, TOKENS_AT_ONCE[device.type])
        for places in parts:
            batch = batch_of([answers[i] for i in places], multiple=row_multiple(device))
            batch = {name: value.to(device) for name, value in batch.items()}
            with contextlib.nullcontext() if places is parts[-1] else self.accelerator.no_sync(policy):
                yield torch.tensor([weights[i] for i in places], device=device), batch

    def step(self) -> float:
        """Clip the gradients, take an optimizer step and clear them. Return the norm before clipping.

        If the gradient is not finite, the weights stay as they are. Under fp16 the GradScaler then lowers its scale,
        training continues, and the norm returned is 0.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM))
        if self.accelerator.scaler is not None:
            norm = norm if math.isfinite(norm) else 0.0
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        release_memory()
        return norm

    def log(self, run: Run, step: int, metrics: dict[str, float], sample: Sample, advantage: float) -> None:
        """Log the metrics of a step and, every SAMPLE_EVERY_STEPS, a sample. Advance the learning rate."""
        metrics = metrics | {"learning_rate": float(self.schedule.get_last_lr()[0])}
        self.schedule.step()
        run.log(step + 1, **metrics)
        self.accelerator.log(metrics, step=step + 1)
        if step % SAMPLE_EVERY_STEPS == 0:
            run.append("samples.jsonl", sample_line(sample, step + 1, advantage))

    def stateful(self) -> dict[str, Any]:
        """Return what a checkpoint saves besides the weights."""
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler is not None else {}
        return {"optimizer": self.optimizer, "schedule": self.schedule} | scaler

    def save(self, run: Run, step: int, baseline: Baseline) -> None:
        """Write checkpoints/checkpoint-{step}: trained weights, optimizer, schedule, baseline.

        It is renamed to this name once complete. Samples depend on seed and step only, so no random state is saved.
        """
        state: dict[str, Any] = {"step": step, "baseline": asdict(baseline)}
        state["weights"] = trained_state(self.accelerator.unwrap_model(self.policy))
        state |= {name: value.state_dict() for name, value in self.stateful().items()}
        folder = run.folder / "checkpoints" / f"checkpoint-{step}"
        part = folder.with_name(f"part-{step}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        torch.save(state, part / "state.pt")
        (part / COMPLETE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(part, folder)
        run.note()  # the time so far, in case the process is killed
        checkpoints = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in checkpoints[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def save_or_stop(self, run: Run, step: int, baseline: Baseline, due: bool, reason: str, interrupted: bool) -> None:
        """Save a checkpoint if it is due; save and stop after an alarm (`reason`) or Ctrl-C (`interrupted`)."""
        flag = torch.tensor(float(interrupted), device=self.accelerator.device)
        interrupted = self.accelerator.reduce(flag).item() > 0  # on any process
        if first_process() and (reason or interrupted or due):
            self.save(run, step, baseline)
        if reason or interrupted:
            self.accelerator.wait_for_everyone()  # if one process ended first, a launcher would kill the one that saves
        if reason:
            stop(f"stopped at step {step}, checkpoint saved: {reason}")
        if interrupted:
            say(f"stopped, checkpoint saved at step {step}: run the same command to resume")
            sys.exit(130)

    def resume(self, run: Run, baseline: Baseline) -> int:
        """Load the last complete checkpoint of a run. Return the number of steps taken."""
        self.accelerator.wait_for_everyone()  # the first process may move an older run aside
        checkpoint = last_checkpoint(run.folder)
        if not checkpoint:
            forget_steps_after(0, run)  # of a run killed before its first checkpoint
            return 0
        state = torch.load(Path(checkpoint) / "state.pt", weights_only=True, map_location="cpu")
        module = self.accelerator.unwrap_model(self.policy)
        assert set(state["weights"]) == set(trained_state(module)), "checkpoint from a different model"
        module.load_state_dict(state["weights"], strict=False)
        for name, value in self.stateful().items():
            if name in state:  # not every kind of GPU has a GradScaler
                value.load_state_dict(state[name])
        vars(baseline).update(state["baseline"])
        forget_steps_after(state["step"], run)
        return state["step"]


def forget_steps_after(step: int, run: Run) -> None:
    """Drop the lines of steps that are taken again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.forget_after(step, name)


def start_engine(policy: Policy, run: Run) -> Engine:
    """Return the policy on the device and in the precision of the run, with AdamW and a schedule."""
    settings, tracker = run.record["settings"], run.record["settings"]["REPORT_TO"]
    accelerator = Accelerator(
        mixed_precision=MIXED[run.record["precision"]],
        cpu=run.record["device"] == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=str(run.folder),
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)],  # with the default 2^16, the first steps are skipped
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
