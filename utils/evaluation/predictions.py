"""Predictions of a reward model and of the shortcuts on the same pairs: the lines of predictions.jsonl."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.data.processed import answer_tokens, half, load_pairs, same_prompt
from utils.evaluation.baselines import SHORTCUTS, fit_logistic, shuffled_prompts, surface_differences, without_prompts
from utils.evaluation.statistics import wins
from utils.models.reward_model import RewardHead
from utils.runs import read_json
from utils.script import say

SHOWN_PROMPT, SHOWN_ANSWER = 400, 800  # characters kept in predictions.jsonl
FITTED_ON = 500  # pairs that fit_win_scale uses, at most
Outputs = Callable[..., np.ndarray]  # from rows (and a model, by default the trained one) to [pairs, 2, n]


def predict_pairs(
    outputs_of: Outputs,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead,
    surface_weights: np.ndarray | None,
    control_pairs: int,
    untrained: Callable | None,
) -> list[dict]:
    """Return the lines of predictions.jsonl for rows with token columns.

    surface_weights [9]: see `surface_weights`; None leaves that shortcut out. control_pairs: the number of pairs to
    judge again without prompts, with the prompts of other pairs, and with a random head. untrained: a function that
    returns the model with that head, or None.
    """
    right = shortcuts_right(rows, surface_weights)
    right |= controls_right(outputs_of, untrained, rows, tokenizer, head, control_pairs)
    return prediction_lines(rows, outputs_of(rows), head, right)


def trained_on(folder: str, rows: Dataset) -> int | None:
    """Return the number of rows whose prompt the model of a run folder was trained on.

    Return None if the training rows, which run.json names with their fingerprint, are gone or have changed.
    """
    record = read_json(Path(folder) / "run.json")
    settings, fingerprint = record.get("settings", {}), record.get("data_fingerprint")
    data = settings.get("DATA_DIR", "")
    same = fingerprint and read_json(Path(data) / "metadata.json").get("fingerprint") == fingerprint
    if not (same and (Path(data) / "train").is_dir()):
        return None
    trained = load_pairs(data, "train", settings.get("MAX_ROWS", 0))
    trained = half(trained, settings["HALF"]) if settings.get("HALF") else trained
    known = set(trained["prompt"])
    return sum(prompt in known for prompt in rows["prompt"])


def pairs_right(outputs: np.ndarray, head: RewardHead) -> np.ndarray:
    """Return 1 (chosen has the higher reward), 0.5 (tie) or 0 for each pair [pairs]; outputs [pairs, 2, n]."""
    return wins(*head.rewards(torch.tensor(outputs)).numpy().T)


def texts_of(rows: Dataset) -> tuple[list[str], list[str], list[str]]:
    """Return (prompts, chosen answers, rejected answers) of rows of a processed folder."""
    return rows["prompt"], *([side[-1]["content"] for side in rows[name]] for name in ("chosen", "rejected"))


def shortcuts_right(rows: Dataset, surface_weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return for each shortcut that needs no model 1 (right), 0.5 (tie) or 0 for each pair [pairs]."""
    prompts, chosen, rejected = texts_of(rows)
    found = {
        name: wins(*(np.array([measure(text) for text in side]) for side in (chosen, rejected)))
        for name, measure in SHORTCUTS.items()
    }
    found["longer_in_window"] = wins(*answer_tokens(rows).T)
    if surface_weights is not None:
        scores = surface_differences(prompts, chosen, rejected) @ surface_weights
        found["surface"] = wins(scores, np.zeros_like(scores))
    return found


def controls_right(
    outputs_of: Outputs,
    untrained: Callable | None,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead,
    count: int,
) -> dict[str, np.ndarray]:
    """Return for each control 1 (right), 0.5 (tie) or 0 for each pair [pairs], NaN where it was not measured.

    The controls are the model with other prompts and the untrained one, on at most `count` pairs spread over the rows.
    """
    some = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    if not len(some):
        return {}
    few = rows.select(some)
    outputs = {
        "without_prompt": lambda: outputs_of(without_prompts(few, tokenizer)),
        "shuffled_prompt": lambda: outputs_of(shuffled_prompts(few)),
    }
    if untrained:
        outputs["untrained_head"] = lambda: outputs_of(few, untrained())
    found = {}
    for name, compute in outputs.items():
        found[name] = np.full(len(rows), np.nan)
        found[name][some] = pairs_right(compute(), head)
    return found


def prediction_lines(rows: Dataset, outputs: np.ndarray, head: RewardHead, right: dict[str, np.ndarray]) -> list[dict]:
    """Return one line of predictions.jsonl for each pair.

    outputs [pairs, 2, n], chosen first; right: {shortcut: [pairs]}, NaN where it was not measured.
    """
    both, tokens = torch.tensor(outputs), answer_tokens(rows)
    rewards, win = head.rewards(both).tolist(), head.win(both[:, 0], both[:, 1]).tolist()
    spread = head.spread(both).tolist() if head.kind == "distribution" else None
    lines, first = [], same_prompt(rows).tolist()
    for i, row in enumerate(rows):
        line = {
            "row": row.get("row", i),
            "same_prompt": first[i],
            "subset": row.get("subset", ""),
            "prompt": row["prompt"][:SHOWN_PROMPT],
        }
        line["win"] = win[i]
        for j, side in enumerate(("chosen", "rejected")):
            text = row[side][-1]["content"]
            line |= {side: rewards[i][j], f"{side}_rating": row[f"{side}_rating"], f"{side}_characters": len(text)}
            line |= {f"{side}_tokens": int(tokens[i, j]), f"{side}_text": text[:SHOWN_ANSWER]}
            if spread:
                line[f"{side}_spread"] = spread[i][j]
        line["shortcuts"] = {name: float(values[i]) for name, values in right.items() if not np.isnan(values[i])}
        lines.append(line)
    return lines


def surface_weights(rows: Dataset) -> np.ndarray:
    """Return the weights of the nine surface measures [9], fitted on these pairs."""
    return fit_logistic(surface_differences(*texts_of(rows)))


def fit_win_scale(head: RewardHead, rows: Dataset, outputs_of: Outputs) -> None:
    """Set win_scale for a head that was not trained on pairs, by logistic regression on the first FITTED_ON rows.

    Take rows that nothing is measured on.
    """
    few = rows.select(range(min(FITTED_ON, len(rows))))
    rewards = head.rewards(torch.tensor(outputs_of(few))).numpy()
    (scale,) = fit_logistic((rewards[:, 0] - rewards[:, 1])[:, None])
    if scale > 0:
        head.win_scale = float(scale)
    else:
        say(f"win_scale stays {head.win_scale}: on {len(few)} pairs the reward does not prefer the chosen answers")
