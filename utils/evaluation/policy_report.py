"""Is a policy better than its start? Answers before and after, their metrics, and the files that show them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.data.processed import same_prompt
from utils.evaluation.plots import training_curves
from utils.evaluation.statistics import at_equal_length, comparison, mean_kl, percent, share_right, wins
from utils.models.generation import Answer, generate, logps_of, repetition
from utils.models.guidance import Guidance
from utils.models.reward_model import RewardModel
from utils.models.shared_prompt import Prompt
from utils.runs import write_json, write_lines, write_text
from utils.training.losses import PolicyPairLoss

# Compared answers take random numbers from here on, those of training count from 0. A policy that met the numbers of
# its training again would seem to have learned more: it was trained on just the tokens that they favour.
FIRST_NUMBER = 2**40
CARD_SAMPLES = 2  # in the model card


@dataclass
class Answers:
    """The answers of a policy to some prompts, in their order.

    kl [prompts]: log pi - log start of each answer. None if its mean is not the KL: for greedy answers, and for the
    best of several answers, where only a bound is known (kl_bound, nats per answer).
    """

    answers: list[Answer]
    kl: np.ndarray | None
    kl_bound: float | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each answer [prompts]."""
        return np.array([len(answer.ids) for answer in self.answers], dtype=float)

    def metrics(self) -> dict[str, float]:
        """Return means over the answers.

        length: tokens. ended: share that came to an end of turn. repetition: share of the runs of three tokens that
        the same answer had before.
        """
        return {
            "length": float(self.lengths.mean()),
            "ended": float(np.mean([answer.ended for answer in self.answers])),
            "repetition": float(np.mean([repetition(answer.ids) for answer in self.answers])),
        }


@dataclass
class Sampler:
    """How policies answer, the same for all of them."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens of a prompt; a longer one loses its start
    max_new_tokens: int
    temperature: float  # 0 = greedy, without log-probs
    seed: int  # gives other random numbers than a training with this seed
    precision: str
    batch_size: int = 8

    def answers(
        self,
        policy: nn.Module,
        start: nn.Module,
        prompts: list[list[Message]],
        guidances: tuple[Guidance, Guidance] = (Guidance(), Guidance()),
        progress: str = "answers",
    ) -> Answers:
        """Return the policy's answers, and their log-probs against those of the start.

        guidances: of start and policy.
        """
        if policy is start:
            written = self.write(start, prompts, guidances[0], progress)
            return Answers(written, np.zeros(len(prompts)) if self.temperature else None)
        written = self.write(policy, prompts, guidances[1], progress)
        if not self.temperature:
            return Answers(written, None)
        start_prompts = guidances[0].prompts(self.tokenizer, prompts, self.max_length)
        policy_logps = self.logps(policy, written, guidances[1])
        start_logps = self.logps(start, with_prompts(written, start_prompts), guidances[0])
        return Answers(written, policy_logps - start_logps)

    def logps(self, model: nn.Module, answers: list[Answer], guidance: Guidance) -> np.ndarray:
        """Return log pi(answer | prompt) [prompts] under a model."""
        return logps_of(model, answers, self.temperature, self.precision, guidance.vectors).double().numpy()

    def write(self, policy: nn.Module, prompts: list[list[Message]], guidance: Guidance, progress: str) -> list[Answer]:
        """Return an answer to each prompt."""
        return generate(
            policy,
            self.tokenizer,
            guidance.prompts(self.tokenizer, prompts, self.max_length),
            self.max_new_tokens,
            self.temperature,
            self.seed,
            self.batch_size,
            self.precision,
            guidance.vectors,
            progress,
            range(FIRST_NUMBER, FIRST_NUMBER + len(prompts)),
        )

    def best_of(self, count: int, start: nn.Module, prompts: list[list[Message]], judge: RewardModel) -> Answers:
        """Return the answer with the highest reward out of `count` answers of the start, with a bound of the KL.

        ln n - (n - 1) / n bounds the KL of best of n from above (https://arxiv.org/abs/2401.01879). The first of the
        answers is the start's own answer in this comparison, so that best of 1 is the start.
        """
        tries = [
            replace(self, seed=self.seed + i).write(start, prompts, Guidance(), f"best of {count}: {i + 1}")
            for i in range(count)
        ]
        scores = np.stack([rewards_of(judge, prompts, answers) for answers in tries])  # [count, prompts]
        best = [tries[i][prompt] for prompt, i in enumerate(scores.argmax(axis=0))]
        return Answers(best, None, math.log(count) - (count - 1) / count)


def with_prompts(answers: list[Answer], prompts: list[Prompt]) -> list[Answer]:
    """Return the answers behind other prompts."""
    return [replace(answer, prompt=prompt) for answer, prompt in zip(answers, prompts, strict=True)]


def rewards_of(judge: RewardModel, prompts: list[list[Message]], answers: list[Answer]) -> np.ndarray:
    """Return the rewards [prompts] of answers, on the prompts without guidance."""
    replies = ([{"role": "assistant", "content": answer.text}] for answer in answers)
    conversations = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    return judge.score(conversations).double().numpy()


def compare_before_and_after(
    start: nn.Module,
    policy: nn.Module,
    rows: Dataset,
    sampler: Sampler,
    judges: dict[str, RewardModel],
    guidances: tuple[Guidance, Guidance] = (Guidance(), Guidance()),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let both policies answer the prompts of `rows`. Return (a line for each prompt, metrics for eval.json).

    judges: score both answers, on the prompt without guidance. The metrics are the KL and a comparison under the name
    of each judge. guidances: of the start and of the trained policy.
    """
    prompts = [messages[:-1] for messages in rows["chosen"]]
    before = sampler.answers(start, start, prompts, guidances, "answers before")
    after = sampler.answers(policy, start, prompts, guidances, "answers after")
    log_ratios = [None] * len(prompts) if after.kl is None else after.kl.tolist()
    lines = [
        {"prompt": row["prompt"], "before": one.text, "after": other.text}
        | {"ended_before": one.ended, "ended_after": other.ended, "log_ratio": log_ratio}
        for row, one, other, log_ratio in zip(rows, before.answers, after.answers, log_ratios, strict=True)
    ]
    metrics: dict[str, Any] = mean_kl(after.kl)
    for name, judge in judges.items():
        rewards = rewards_of(judge, prompts, before.answers), rewards_of(judge, prompts, after.answers)
        for line, *pair in zip(lines, *rewards, strict=True):
            line |= {f"{name}_before": float(pair[0]), f"{name}_after": float(pair[1])}
        metrics[name] = comparison_of(before, after, rewards)
    return lines, metrics


def comparison_of(before: Answers, after: Answers, rewards: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Return the fields of a comparison in eval.json: `statistics.comparison`, and the metrics of both sides' answers.

    difference_at_equal_length: the difference of rewards that remains for two answers of equal length.
    """
    result = comparison(*rewards, after.kl)
    for side, answers in (("before", before), ("after", after)):
        result |= {f"{name}_{side}": value for name, value in answers.metrics().items()}
    longer = np.log(after.lengths) - np.log(before.lengths)
    return result | {"difference_at_equal_length": at_equal_length(rewards[1] - rewards[0], longer)}


def pair_metrics(outputs: dict[str, np.ndarray], rows: Dataset, loss: PolicyPairLoss) -> dict[str, float]:
    """Return exact metrics on pairs: accuracy of the implicit reward with its interval, margin, loss, mean log-probs.

    outputs: of forward_pairs over `rows`, which carry the reference's log-probs if the outputs do not.
    """
    columns = {
        name: np.array(rows[name], np.float32)
        for name in ("reference", "guided_reference")
        if name in rows.column_names
    }
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    with torch.no_grad():
        losses, logged = loss({name: torch.tensor(values) for name, values in outputs.items()}, batch)
    rewards = {side: logged[f"rewards/{side}"].numpy() for side in ("chosen", "rejected")}
    accuracy = share_right(wins(rewards["chosen"], rewards["rejected"]), same_prompt(rows))
    metrics = {
        "pairs": accuracy["pairs"],
        "accuracy": accuracy["accuracy"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "margin": float((rewards["chosen"] - rewards["rejected"]).mean()),
        "loss": float(losses.mean()),
        "logps_chosen": float(logged["logps/chosen"].mean()),
        "logps_rejected": float(logged["logps/rejected"].mean()),
    }
    reference = outputs.get("reference", columns.get("reference"))
    if reference is not None:
        chosen, rejected = reference.mean(axis=0)
        metrics |= {"logps_chosen_before": float(chosen), "logps_rejected_before": float(rejected)}
    return metrics


def format_summary(result: dict[str, Any]) -> str:
    """Return the result in a few lines. result: eval.json of a policy."""
    lines = []
    if "accuracy" in result:
        lines.append(
            f"pair accuracy of the implicit reward {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, "
            f"{result['accuracy_high']:.3f}] on {result['pairs']} pairs, margin {result['margin']:.3f}, "
            f"loss {result['loss']:.3f}"
        )
    if result.get("kl") is not None:
        error = "" if result["kl_error"] is None else f" +- {result['kl_error']:.2f}"
        lines.append(f"KL to the start {result['kl']:.2f}{error} nats per answer")
    reward = result.get("comparison", result)
    for name, side in (("reward", reward), ("a judge's reward", result.get("judge", {}))):
        if "mean_reward_after" in side:
            lines.append(
                f"{name} on {side['prompts']} prompts: {side['mean_reward_before']:.3f} before, "
                f"{side['mean_reward_after']:.3f} after, difference {side['difference']:+.3f} "
                f"[{side['difference_low']:+.3f}, {side['difference_high']:+.3f}], p = {side['p_value']:.2g}: "
                f"{side['verdict']}"
            )
    if "length_after" in reward:  # a reward can grow while the answers get worse
        metrics = (("tokens", "length", 1), ("came to an end", "ended", 2), ("repetition", "repetition", 3))
        lines.append(
            "answers before and after: "
            + ", ".join(
                f"{name} {reward[f'{key}_before']:.{digits}f} and {reward[f'{key}_after']:.{digits}f}"
                for name, key, digits in metrics
            )
        )
    return "\n".join(lines)


def write_dpo_report(
    folder: Path, result: dict[str, Any], samples: list[dict[str, Any]], record: dict[str, Any]
) -> None:
    """Write eval.json, samples.jsonl, the curves and the model card of a policy that was trained on pairs."""
    settings = record["settings"]
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen")
    title = f"{settings['LOSS']}: {percent(result['accuracy'], 1)} of {result['pairs']} validation pairs ranked right"
    training_curves(folder, names, {"rewards/accuracies": (0.5, "a coin:")}, title)
    write_lines(folder / "samples.jsonl", samples)
    head = (
        f"# {record['run_name']}\n\n`{settings['MODEL']}` trained on {record['train_pairs']} pairs of "
        f"`{record['dataset_name']}` with {settings['LOSS']} (beta {record['beta']:g}, guidance "
        f"{settings['GUIDANCE']}, learning rate {settings['LEARNING_RATE']}, window {record['max_length']} tokens)."
    )
    write_result(folder, result, samples, head)


def write_reinforce_report(
    folder: Path, result: dict[str, Any], lines: list[dict[str, Any]], record: dict[str, Any]
) -> None:
    """Write eval.json, predictions.jsonl, the curves and the model card of a policy trained with REINFORCE."""
    settings = record["settings"]
    names = ("reward", "kl", "entropy", "completions/mean_length")
    title = (
        f"Reward on {result['prompts']} held-out prompts: {result['verdict']} "
        f"({result['difference']:+.3f}, p = {result['p_value']:.2g})"
    )
    training_curves(folder, names, {}, title, "mean over the answers of a step")
    write_lines(folder / "predictions.jsonl", lines)
    head = (
        f"# {folder.name}\n\n`{settings['MODEL']}` after {settings['MAX_STEPS']} steps of REINFORCE with "
        f"{settings['BATCH_SIZE'] * settings['ANSWERS_PER_PROMPT']} answers each against `{settings['REWARD_MODEL']}` "
        f"(baseline {settings['BASELINE']}, KL_BETA {settings['KL_BETA']}, learning rate {settings['LEARNING_RATE']})."
    )
    write_result(folder, result, lines, head)


def write_result(folder: Path, result: dict[str, Any], lines: list[dict[str, Any]], head: str) -> None:
    """Write eval.json, and the model card: `head`, the result, some answers. lines: of compare_before_and_after."""
    write_json(folder / "eval.json", result)
    card = f"{head}\n\n{format_summary(result)}\n"
    for line in lines[:CARD_SAMPLES]:
        card += f"\n> {line['prompt'][:300]}\n\nbefore: {line['before'][:400]}\n\nafter: {line['after'][:400]}\n"
    write_text(folder / "README.md", card)
