"""Is a policy better than its start? Answers before and after, their metrics, and the files that show them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import Message
from utils.data.processed import same_prompt
from utils.evaluation.plots import training_curves
from utils.evaluation.statistics import at_equal_length, comparison, mean_kl, share_right, wins
from utils.models.generation import Answer, generate, logps_of, repetition
from utils.models.guidance import Guidance
from utils.models.loading import PROOF_ROWS, load_causal, save_with_proof
from utils.models.policies import PolicyPairs
from utils.models.reward_model import RewardModel
from utils.models.shared_prompt import PairCollator, Prompt
from utils.runs import write_json, write_lines, write_text
from utils.training.losses import PolicyPairLoss

# Numbers of compared answers count from here, those of training from 0: a policy that met the random numbers of its
# training again would be pushed towards and away from just the tokens that they favour, and seem to have learned more
FIRST_NUMBER = 2**40
SHOWN = 2  # samples in the model card


@dataclass
class Answers:
    """What a policy answered to some prompts, in their order.

    kl [prompts]: log pi - log start of each answer; None where its mean would be no KL: for greedy answers, and for
    the best of several, of which only a bound of the KL is known (kl_bound, nats an answer).
    """

    answers: list[Answer]
    kl: np.ndarray | None
    kl_bound: float | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer [prompts]."""
        return np.array([len(answer.ids) for answer in self.answers], dtype=float)

    def figures(self) -> dict[str, float]:
        """Means over the answers.

        length: tokens. ended: share that came to an end of turn. repetition: share of the runs of three tokens that
        stood in the same answer before.
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
    seed: int  # the luck is another one than that of a training with this seed
    precision: str
    batch_size: int = 8

    def answers(
        self,
        policy: nn.Module,
        start: nn.Module,
        prompts: list[list[Message]],
        guidances: tuple[Guidance, Guidance] = (Guidance(), Guidance()),
        progress: str = "answers",
        seen: list[list[Message]] | None = None,
    ) -> Answers:
        """The policy's answers, and their log-probs against those of the start.

        guidances: of start and policy. seen: the prompts as the policy sees them, where the start sees others.
        """
        if policy is start and seen is None:
            written = self.write(start, prompts, guidances[0], progress)
            return Answers(written, np.zeros(len(prompts)) if self.temperature else None)
        written = self.write(policy, prompts if seen is None else seen, guidances[1], progress)
        if not self.temperature:
            return Answers(written, None)
        asked = guidances[0].prompts(self.tokenizer, prompts, self.max_length)
        sides = [
            logps_of(model, said, self.temperature, self.precision, guidance.vectors).double().numpy()
            for model, said, guidance in (
                (policy, written, guidances[1]),
                (start, with_prompts(written, asked), guidances[0]),
            )
        ]
        return Answers(written, sides[0] - sides[1])

    def write(
        self,
        policy: nn.Module,
        prompts: list[list[Message]],
        guidance: Guidance,
        progress: str,
        seed: int | None = None,
    ) -> list[Answer]:
        return generate(
            policy,
            self.tokenizer,
            guidance.prompts(self.tokenizer, prompts, self.max_length),
            self.max_new_tokens,
            self.temperature,
            self.seed if seed is None else seed,
            self.batch_size,
            self.precision,
            guidance.vectors,
            progress,
            range(FIRST_NUMBER, FIRST_NUMBER + len(prompts)),
        )

    def best_of(self, count: int, start: nn.Module, prompts: list[list[Message]], judge: RewardModel) -> Answers:
        """Of `count` answers of the start to each prompt that with the highest reward, with a bound of the KL.

        ln n - (n - 1) / n bounds the KL of best of n from above (https://arxiv.org/abs/2401.01879). The first answers
        are the start's own in this comparison, so that best of 1 is the start.
        """
        tries = [
            self.write(start, prompts, Guidance(), f"best of {count}: {i + 1}", self.seed + i) for i in range(count)
        ]
        scores = np.stack([rewards_of(judge, prompts, answers) for answers in tries])  # [count, prompts]
        best = [tries[i][place] for place, i in enumerate(scores.argmax(axis=0))]
        return Answers(best, None, math.log(count) - (count - 1) / count)


def with_prompts(answers: list[Answer], prompts: list[Prompt]) -> list[Answer]:
    """Return the answers behind other prompts."""
    return [replace(answer, prompt=prompt) for answer, prompt in zip(answers, prompts, strict=True)]


def rewards_of(judge: RewardModel, prompts: list[list[Message]], answers: list[Answer]) -> np.ndarray:
    """Rewards [prompts] of answers, on the prompts without guidance."""
    said = [[*prompt, {"role": "assistant", "content": a.text}] for prompt, a in zip(prompts, answers, strict=True)]
    return judge.score(said).double().numpy()


def comparison_of(before: Answers, after: Answers, rewards: tuple[np.ndarray, np.ndarray]) -> dict[str, object]:
    """Return the fields of a comparison in eval.json: `evaluation.comparison`, and the figures of both sides' answers.

    difference_at_equal_length: the difference of rewards that remains for two answers of equal length.
    """
    found = comparison(*rewards, after.kl)
    for side, which in (("before", before), ("after", after)):
        found |= {f"{name}_{side}": value for name, value in which.figures().items()}
    longer = np.log(after.lengths) - np.log(before.lengths)
    return found | {"difference_at_equal_length": at_equal_length(rewards[1] - rewards[0], longer)}


def pair_metrics(outputs: dict[str, np.ndarray], rows: Dataset, loss: PolicyPairLoss) -> dict[str, float]:
    """Exact figures on pairs: accuracy of the implicit reward with its interval, margin, loss, mean log-probs.

    outputs: of forward_pairs over `rows`, which carry the reference's log-probs where outputs do not.
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
    found = {
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
        found["logps_chosen_before"], found["logps_rejected_before"] = (float(mean) for mean in reference.mean(axis=0))
    return found


def compare_before_and_after(
    start: nn.Module,
    policy: nn.Module,
    rows: Dataset,
    sampler: Sampler,
    judges: dict[str, RewardModel],
    guidances: tuple[Guidance, Guidance] = (Guidance(), Guidance()),
) -> tuple[list[dict], dict]:
    """(a line for each prompt of `rows` with both answers, figures for eval.json): both policies answer them.

    judges: score both answers, on the prompt without guidance; the figures have a comparison under the name of each,
    and without any they are the KL alone. guidances: of the start and of the trained policy.
    """
    prompts = [messages[:-1] for messages in rows["chosen"]]
    before = sampler.answers(start, start, prompts, guidances, "answers before")
    after = sampler.answers(policy, start, prompts, guidances, "answers after")
    ratios = [None] * len(prompts) if after.kl is None else after.kl
    lines = [
        {"prompt": row["prompt"], "before": one.text, "after": other.text}
        | {"ended_before": one.ended, "ended_after": other.ended, "log_ratio": None if kl is None else float(kl)}
        for row, one, other, kl in zip(rows, before.answers, after.answers, ratios, strict=True)
    ]
    found = {}
    for name, judge in judges.items():
        scores = [rewards_of(judge, prompts, side.answers) for side in (before, after)]
        for line, *pair in zip(lines, *scores, strict=True):
            line |= {f"{name}_before": float(pair[0]), f"{name}_after": float(pair[1])}
        found[name] = comparison_of(before, after, tuple(scores))
    return lines, {**mean_kl(after.kl), **found}


def save_policy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Dataset, collator: PairCollator
) -> None:
    """The policy as a plain folder, proved by the mean log-prob of a token in each answer of the first rows.

    Means, not sums: a GPU adds in an order of its own, and the last digit of a sum of hundreds is over the limit.
    """
    few = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])
    plain = {name: value for name, value in few.items() if "reference" not in name}

    def score(model: nn.Module) -> torch.Tensor:
        found = PolicyPairs(model)(**{name: value.to(model.device) for name, value in plain.items()})
        return (found["logps"] / found["tokens"].clamp(min=1)).cpu()

    save_with_proof(model, tokenizer, folder, load_causal, score)


def format_summary(result: dict) -> str:
    """The result in a few lines."""
    lines = []
    if "accuracy" in result:
        lines.append(
            f"pair accuracy of the implicit reward {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, "
            f"{result['accuracy_high']:.3f}] on {result['pairs']} pairs, margin {result['margin']:.3f}, "
            f"loss {result['loss']:.3f}"
        )
    if result.get("kl") is not None:
        error = "" if result["kl_error"] is None else f" +- {result['kl_error']:.2f}"
        lines.append(f"KL to the start {result['kl']:.2f}{error} nats an answer")
    sides = {"reward": result.get("comparison", result), "a judge's reward": result.get("judge", {})}
    lines += [format_comparison(found, name) for name, found in sides.items() if "mean_reward_after" in found]
    if "length_after" in sides["reward"]:
        lines.append(format_answers(sides["reward"]))
    return "\n".join(lines)


def format_comparison(found: dict, name: str) -> str:
    """One line: the means before and after, how sure that is, and the verdict."""
    return (
        f"{name} on {found['prompts']} prompts: {found['mean_reward_before']:.3f} before, "
        f"{found['mean_reward_after']:.3f} after, difference {found['difference']:+.3f} "
        f"[{found['difference_low']:+.3f}, {found['difference_high']:+.3f}], p = {found['p_value']:.2g}: "
        f"{found['verdict']}"
    )


def format_answers(found: dict) -> str:
    """One line on the answers themselves: a reward can grow while they get worse."""
    figures = {"tokens": ("length", 1), "came to an end": ("ended", 2), "repetition": ("repetition", 3)}
    return "answers before and after: " + ", ".join(
        f"{name} {found[f'{key}_before']:.{digits}f} and {found[f'{key}_after']:.{digits}f}"
        for name, (key, digits) in figures.items()
    )


def write_results(folder: Path, result: dict, lines: list[dict], file: str, head: str) -> None:
    """eval.json, `file` with a line for each prompt, and the model card: `head`, the result, some answers."""
    write_json(folder / "eval.json", result)
    write_lines(folder / file, lines)
    card = f"{head}\n\n{format_summary(result)}\n"
    for line in lines[:SHOWN]:
        card += f"\n> {line['prompt'][:300]}\n\nbefore: {line['before'][:400]}\n\nafter: {line['after'][:400]}\n"
    write_text(folder / "README.md", card)


def write_pair_results(folder: Path, result: dict, samples: list[dict], record: dict) -> None:
    """The files of a policy that was trained on pairs."""
    settings = record["settings"]
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen")
    title = f"{settings['LOSS']}: {result['accuracy']:.1%} of {result['pairs']} validation pairs ranked right"
    training_curves(folder, names, {"rewards/accuracies": (0.5, "a coin:")}, title)
    head = (
        f"# {record['run_name']}\n\n`{settings['MODEL']}` trained on {record['train_pairs']} pairs of "
        f"`{record['dataset_name']}` with {settings['LOSS']} (beta {record['beta']:g}, guidance "
        f"{settings['GUIDANCE']}, learning rate {settings['LEARNING_RATE']}, window {record['max_length']} tokens)."
    )
    write_results(folder, result, samples, "samples.jsonl", head)


def write_reinforce_results(folder: Path, result: dict, lines: list[dict], record: dict) -> None:
    """The files of a policy that was trained with REINFORCE."""
    settings = record["settings"]
    names = ("reward", "kl", "entropy", "completions/mean_length")
    title = (
        f"Reward on {result['prompts']} held-out prompts: {result['verdict']} "
        f"({result['difference']:+.3f}, p = {result['p_value']:.2g})"
    )
    training_curves(folder, names, {}, title, "mean over the answers of a step")
    head = (
        f"# {folder.name}\n\n`{settings['MODEL']}` after {settings['MAX_STEPS']} steps of REINFORCE with "
        f"{settings['BATCH_SIZE'] * settings['ANSWERS_PER_PROMPT']} answers each against `{settings['REWARD_MODEL']}` "
        f"(baseline {settings['BASELINE']}, KL_BETA {settings['KL_BETA']}, learning rate {settings['LEARNING_RATE']})."
    )
    write_results(folder, result, lines, "predictions.jsonl", head)
