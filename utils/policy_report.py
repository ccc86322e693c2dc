"""What a trained policy is worth: figures on pairs, answers before and after, and the files that show them."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.comparing import Sampler, compared, rewards_of
from utils.curves import training_curves
from utils.data.processed import same_prompt
from utils.evaluation import mean_kl, share_right, wins
from utils.models.guidance import Guidance
from utils.models.loading import PROOF_ROWS, load_causal, save_with_proof
from utils.models.policies import PolicyPairs
from utils.models.reward_model import RewardModel
from utils.models.shared_prompt import PairCollator
from utils.runs import write_json, write_lines, write_text
from utils.training.losses import PolicyPairLoss

SHOWN = 2  # samples in the model card


def pair_figures(outputs: dict[str, np.ndarray], rows: Dataset, loss: PolicyPairLoss) -> dict[str, float]:
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


def before_and_after(
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
        found[name] = compared(before, after, tuple(scores))
    return lines, {**mean_kl(after.kl), **found}


def save(
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


def told(result: dict) -> str:
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
    lines += [told_comparison(found, name) for name, found in sides.items() if "mean_reward_after" in found]
    if "length_after" in sides["reward"]:
        lines.append(told_answers(sides["reward"]))
    return "\n".join(lines)


def told_comparison(found: dict, name: str) -> str:
    """One line: the means before and after, how sure that is, and the verdict."""
    return (
        f"{name} on {found['prompts']} prompts: {found['mean_reward_before']:.3f} before, "
        f"{found['mean_reward_after']:.3f} after, difference {found['difference']:+.3f} "
        f"[{found['difference_low']:+.3f}, {found['difference_high']:+.3f}], p = {found['p_value']:.2g}: "
        f"{found['verdict']}"
    )


def told_answers(found: dict) -> str:
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
    card = f"{head}\n\n{told(result)}\n"
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
