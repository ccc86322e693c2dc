"""Predictions of a reward model and of the baselines on the same pairs: the lines of predictions.jsonl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.data.processed import answer_tokens, half, load_pairs, same_prompt
from utils.evaluation.baselines import fit_logistic, shortcuts_right, shuffled_prompts, without_prompts
from utils.evaluation.statistics import wins
from utils.models.reward_model import RewardHead
from utils.runs import read_json
from utils.script import say

SHOWN_PROMPT, SHOWN_ANSWER = 400, 800  # characters kept in predictions.jsonl
FIT_PAIRS = 500  # pairs that fit_win_scale uses, at most
Outputs = Callable[..., np.ndarray]  # from rows (and a model, by default the trained one) to [pairs, 2, n]


def predict_pairs(
    outputs_of: Outputs,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead,
    surface_weights: np.ndarray | None,
    control_pairs: int,
    untrained: Callable | None,
) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl for rows with token columns.

    surface_weights [9]: of `baselines.surface_weights`; None leaves that shortcut out. control_pairs: the number of
    pairs to judge again without prompts, with the prompts of other pairs, and with a random head. untrained: a
    function that returns the model with that head, or None.
    """
    right = shortcuts_right(rows, surface_weights)
    right |= controls_right(outputs_of, untrained, rows, tokenizer, head, control_pairs)
    return prediction_lines(rows, outputs_of(rows), head, right)


def trained_on(folder: str, rows: Dataset) -> int | None:
    """Return the number of rows whose prompt the model of a run folder was trained on.

    Return None if the training rows that run.json names are gone or have another fingerprint.
    """
    record = read_json(Path(folder) / "run.json")
    settings, fingerprint = record.get("settings", {}), record.get("data_fingerprint")
    data = settings.get("DATA_DIR", "")
    same = fingerprint and read_json(Path(data) / "metadata.json").get("fingerprint") == fingerprint
    if not (same and (Path(data) / "train").is_dir()):
        return None
    train_rows = load_pairs(data, "train", settings.get("MAX_ROWS", 0))
    train_rows = half(train_rows, settings["HALF"]) if settings.get("HALF") else train_rows
    prompts = set(train_rows["prompt"])
    return sum(prompt in prompts for prompt in rows["prompt"])


def pairs_right(outputs: np.ndarray, head: RewardHead) -> np.ndarray:
    """Return 1 (chosen has the higher reward), 0.5 (tie) or 0 for each pair [pairs]; outputs [pairs, 2, n]."""
    return wins(*head.rewards(torch.tensor(outputs)).numpy().T)


def controls_right(
    outputs_of: Outputs,
    untrained: Callable | None,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead,
    count: int,
) -> dict[str, np.ndarray]:
    """Return 1 (right), 0.5 (tie) or 0 for each pair [pairs], for each control; NaN if it was not measured.

    The controls are the model with other prompts and the untrained one, on at most `count` pairs spread over the rows.
    """
    indices = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    if not len(indices):
        return {}
    few = rows.select(indices)
    outputs = {
        "without_prompt": lambda: outputs_of(without_prompts(few, tokenizer)),
        "shuffled_prompt": lambda: outputs_of(shuffled_prompts(few)),
    }
    if untrained:
        outputs["untrained_head"] = lambda: outputs_of(few, untrained())
    right = {}
    for name, compute in outputs.items():
        right[name] = np.full(len(rows), np.nan)
        right[name][indices] = pairs_right(compute(), head)
    return right


def prediction_lines(
    rows: Dataset, outputs: np.ndarray, head: RewardHead, right: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return one line of predictions.jsonl for each pair.

    outputs [pairs, 2, n], chosen first; right: {shortcut: [pairs]}, NaN where it was not measured.
    """
    pairs, tokens, prompts = torch.tensor(outputs), answer_tokens(rows), same_prompt(rows).tolist()
    rewards, win = head.rewards(pairs).tolist(), head.win(pairs[:, 0], pairs[:, 1]).tolist()
    spread = head.spread(pairs).tolist() if head.kind == "distribution" else None
    lines = []
    for i, row in enumerate(rows):
        line = {"row": row.get("row", i), "same_prompt": prompts[i], "subset": row.get("subset", "")}
        line |= {"prompt": row["prompt"][:SHOWN_PROMPT], "win": win[i]}
        for j, side in enumerate(("chosen", "rejected")):
            text = row[side][-1]["content"]
            line |= {side: rewards[i][j], f"{side}_rating": row[f"{side}_rating"], f"{side}_characters": len(text)}
            line |= {f"{side}_tokens": int(tokens[i, j]), f"{side}_text": text[:SHOWN_ANSWER]}
            if spread:
                line[f"{side}_spread"] = spread[i][j]
        line["shortcuts"] = {name: float(values[i]) for name, values in right.items() if not np.isnan(values[i])}
        lines.append(line)
    return lines


def fit_win_scale(head: RewardHead, rows: Dataset, outputs_of: Outputs) -> None:
    """Set win_scale of a head that was not trained on pairs, by logistic regression on the first FIT_PAIRS rows.

    rows: must not be those on which the model is evaluated.
    """
    few = rows.select(range(min(FIT_PAIRS, len(rows))))
    rewards = head.rewards(torch.tensor(outputs_of(few))).numpy()
    (scale,) = fit_logistic((rewards[:, 0] - rewards[:, 1])[:, None])
    if scale > 0:
        head.win_scale = float(scale)
    else:
        say(f"win_scale stays {head.win_scale}: on {len(few)} pairs the reward does not prefer the chosen answers")
