"""Shortcuts and controls: what a reward model has to beat to have learned more than form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•◦]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)  # "- a", "* a", "12. a", "3) a"
WORD = re.compile(r"\w+")
APOLOGY = re.compile(r"\b(?:sorry|apolog(?:i[sz]e|ies)|unfortunately|can(?:no|')t|unable to|as an ai)\b", re.IGNORECASE)
GAP_BANDS = {  # name: from, up to (not included), in hundredths of a rating point
    "<0.5": (0, 50),
    "0.5-1.0": (50, 100),
    ">=1.0": (100, float("inf")),
}
SURFACE = (  # the measures of `surface`, in this order
    "log_length", "line_breaks", "list_items", "code_fences", "bold_marks",
    "distinct_words", "words_of_the_prompt", "apology", "question_marks",
)  # fmt: skip
SHORTCUT_NAMES = {  # key in eval.json: its name on plots and pages
    "longer": "'longer wins'",
    "longer_in_window": "'longer inside the window wins'",
    "more_list_items": "'more list items win'",
    "surface": "nine surface measures",
    "untrained_head": "an untrained head",
    "without_prompt": "itself without the prompts",
    "shuffled_prompt": "itself with the prompts of other pairs",
}
CONTROL_NAMES = ("without_prompt", "shuffled_prompt")  # show whether the model reads the prompt; they are no rivals


def list_items(text: str) -> int:
    """Lines that begin like an item of a list: a bullet or a number, a blank, and text."""
    return len(LIST_ITEM.findall(text))


SHORTCUTS = {  # name: measure of an answer's text; the answer with the larger one is taken as the chosen one
    "longer": len,  # characters
    "more_list_items": list_items,
}


def bands_of(gaps: np.ndarray) -> dict[str, np.ndarray]:
    """For each of GAP_BANDS a mask [pairs]. gaps: rating differences in whole hundredths [pairs], NaN is in none."""
    return {name: (low <= gaps) & (gaps < high) for name, (low, high) in GAP_BANDS.items()}


def surface(prompt: str, answer: str) -> list[float]:
    """Nine numbers that describe the outside of an answer, see SURFACE; counts as log(1 + n), shares from 0 to 1."""
    words, asked = WORD.findall(answer.lower()), set(WORD.findall(prompt.lower()))
    counts = (len(answer), answer.count("\n"), list_items(answer), answer.count("```"), answer.count("**"))
    shares = (
        len(set(words)) / max(len(words), 1),
        len(asked & set(words)) / max(len(asked), 1),
        float(bool(APOLOGY.search(answer))),
    )
    return [*np.log1p(counts).tolist(), *shares, float(np.log1p(answer.count("?")))]


def surface_differences(prompts: list[str], chosen: list[str], rejected: list[str]) -> np.ndarray:
    """surface(chosen) - surface(rejected) [pairs, 9]."""
    sides = [[surface(*both) for both in zip(prompts, answers, strict=True)] for answers in (chosen, rejected)]
    return np.array(sides[0]) - np.array(sides[1])


def fit_logistic(differences: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Weights [n] that maximise the likelihood of sigma(differences . weights) for chosen minus rejected [pairs, n].

    The columns are divided by their root mean square for the penalty ridge / 2 * |weights|^2, and the weights are for
    the columns as given. No constant term: a pair has no first side. (sklearn's LogisticRegression with C = 1 / ridge)
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    scale = np.sqrt((differences**2).mean(axis=0))
    scale[scale == 0] = 1.0
    x = differences / scale

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ weights
        return np.logaddexp(0, -z).sum() + ridge / 2 * weights @ weights, -x.T @ expit(-z) + ridge * weights

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x / scale


def without_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an empty user turn as the prompt."""
    from utils.data.tokens import prompt_ids

    window = len(rows[0]["input_ids"])
    empty = prompt_ids(tokenizer, [{"role": "user", "content": ""}])
    padding = window - len(empty)
    ids, mask = empty + [tokenizer.pad_token_id] * padding, [1] * len(empty) + [0] * padding
    return replace_prompts(rows, [ids] * len(rows), [mask] * len(rows))


def shuffled_prompts(rows: Dataset, seed: int = 0) -> Dataset:
    """Return the rows, each with the prompt of another row; a single row keeps its own."""
    order = np.random.default_rng(seed).permutation(len(rows))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one cycle through all rows, so that no row keeps its own
    prompts = rows.select(other).select_columns(["input_ids", "attention_mask"])
    return replace_prompts(rows, list(prompts["input_ids"]), list(prompts["attention_mask"]))


def replace_prompts(rows: Dataset, ids: list[list[int]], masks: list[list[int]]) -> Dataset:
    """Return the rows with other prompts, as padded ids and attention masks."""
    columns = {"input_ids": ids, "attention_mask": masks}
    kinds = {name: rows.features[name] for name in columns}
    rows = rows.remove_columns(list(columns))
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=kinds[name])
    return rows
