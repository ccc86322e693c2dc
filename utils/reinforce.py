"""What REINFORCE is made of, beside its loop: samples, their rewards, baselines, figures and alarms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.comparing import repetition
from utils.data.preferences import Message
from utils.guidance import Guidance
from utils.heads import Reading
from utils.logps import answer_logps
from utils.rewards import RewardModel
from utils.sampling import Answer, prompt_ids_of
from utils.script import stop

BASELINES = {  # what BASELINE may name
    "moving_average": "exponential mean of earlier steps",
    "running_mean": "mean of all earlier rewards, as in https://arxiv.org/abs/2402.14740",
    "leave_one_out": "mean of the other answers to the same prompt",
    "none": "nothing is taken off",
}
NORMS = {"none": "as they are", "std": "divided by their root mean square"}  # what ADVANTAGE_NORM may name
MIN_MEAN_LENGTH = 2.0  # tokens an answer, end of turn included; a run stops below it
MIN_ENTROPY = 0.05  # nats a token; a run stops below it


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


def check_risk(reading: Reading, risk: float, model: str) -> None:
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


def figures_of(
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


def line_of(sample: Sample, step: int, advantage: float) -> dict[str, object]:
    """A line of samples.jsonl."""
    said = {"step": step, "prompt": sample.prompt[-1]["content"], "answer": sample.answer.text}
    numbers = {"reward": sample.reward, "kl": sample.kl, "advantage": advantage}
    return said | numbers | {"tokens": len(sample.answer.ids), "ended": sample.answer.ended}


def alarm(figures: dict[str, float], kl_limit: float) -> str:
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
