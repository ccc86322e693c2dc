"""What a trained policy is worth: figures on pairs, answers before and after, and the files that show them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.curves import training_curves
from utils.evaluation import comparison, mean_kl, share_right, wins
from utils.guidance import Guidance
from utils.models import PROOF_ROWS, load_causal, save_with_proof
from utils.pairs import PairCollator
from utils.policies import PolicyPairLoss, PolicyPairs
from utils.rewards import RewardModel
from utils.runs import write_json, write_text
from utils.sampling import Answer, generate, logps_of, prompt_ids_of

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
    accuracy = share_right(wins(rewards["chosen"], rewards["rejected"]))
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
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    precision: str,
    guidances: tuple[Guidance, Guidance],
    judge: RewardModel | None,
) -> tuple[list[dict], dict]:
    """(lines of samples.jsonl, kl or comparison for eval.json): both policies answer the prompts of rows.

    guidances: of the start and of the trained policy. judge: scores both answers, on the prompt without guidance.
    """
    prompts = [messages[:-1] for messages in rows["chosen"]]
    answers: list[list[Answer]] = []
    for model, guidance in zip((start, policy), guidances, strict=True):
        ids = prompt_ids_of(tokenizer, prompts, max_length, guidance)
        write = partial(generate, model, tokenizer, ids, max_new_tokens, temperature, seed)
        answers.append(write(precision=precision, guidance=guidance, progress=f"answers {len(answers) + 1} of 2"))
    at = temperature or 1.0
    kl = logps_of(policy, answers[1], at, precision=precision, guidance=guidances[1])
    kl = (kl - logps_of(start, answers[1], at, precision=precision, guidance=guidances[0])).numpy()
    lines = [
        {"prompt": row["prompt"]}
        | {"before": one.text, "after": other.text, "ended_before": one.ended, "ended_after": other.ended}
        for row, one, other in zip(rows, *answers, strict=True)
    ]
    if judge is None:
        return lines, mean_kl(kl)
    scores = []
    for side, name in zip(answers, ("before", "after"), strict=True):
        said = [
            [*prompt, {"role": "assistant", "content": answer.text}]
            for prompt, answer in zip(prompts, side, strict=True)
        ]
        scores.append(judge.score(said).numpy())
        for line, score in zip(lines, scores[-1].tolist(), strict=True):
            line[f"reward_{name}"] = score
    lengths = tuple(np.array([len(answer.ids) for answer in side], dtype=float) for side in answers)
    return lines, {**mean_kl(kl), "comparison": comparison(*scores, lengths, kl)}


def save(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Dataset, collator: PairCollator
) -> None:
    """The policy as a plain folder, proved by the log-probs of the first rows."""
    few = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])
    plain = {name: value for name, value in few.items() if "reference" not in name}

    def score(model: nn.Module) -> torch.Tensor:
        return PolicyPairs(model)(**{name: value.to(model.device) for name, value in plain.items()})["logps"].cpu()

    save_with_proof(model, tokenizer, folder, load_causal, score)


def told(result: dict) -> str:
    """The result in a few lines."""
    lines = [
        f"pair accuracy of the implicit reward {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, "
        f"{result['accuracy_high']:.3f}] on {result['pairs']} pairs, margin {result['margin']:.3f}, "
        f"loss {result['loss']:.3f}"
    ]
    if "kl" in result:
        lines.append(f"KL to the start {result['kl']:.2f} +- {result['kl_error']:.2f} nats an answer")
    if "comparison" in result:
        found = result["comparison"]
        lines.append(
            f"reward on {found['prompts']} prompts: {found['mean_reward_before']:.3f} before, "
            f"{found['mean_reward_after']:.3f} after, p = {found['p_value']:.2g}: {found['verdict']}"
        )
    return "\n".join(lines)


def write_results(folder: Path, result: dict, samples: list[dict], record: dict) -> None:
    """eval.json, samples.jsonl, the curves and the model card."""
    write_json(folder / "eval.json", result)
    write_text(folder / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))
    settings = record["settings"]
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen")
    title = f"{settings['LOSS']}: {result['accuracy']:.1%} of {result['pairs']} validation pairs ranked right"
    training_curves(folder, names, {"rewards/accuracies": (0.5, "a coin:")}, title)
    card = (
        f"# {record['run_name']}\n\n`{settings['MODEL']}` trained on {record['train_pairs']} pairs of "
        f"`{record['dataset_name']}` with {settings['LOSS']} (beta {record['beta']:g}, guidance "
        f"{settings['GUIDANCE']}, learning rate {settings['LEARNING_RATE']}, window {record['max_length']} tokens).\n\n"
        f"{told(result)}\n"
    )
    for sample in samples[:SHOWN]:
        card += f"\n> {sample['prompt'][:300]}\n\nbefore: {sample['before'][:400]}\n\nafter: {sample['after'][:400]}\n"
    write_text(folder / "README.md", card)
