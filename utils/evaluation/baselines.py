"""Baselines: what a reward model has to beat to show that it has learned more than form, such as 'longer wins'."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from utils.data.processed import answer_tokens
from utils.evaluation.statistics import wins

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•◦]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)  # "- a", "* a", "12. a", "3) a"
WORD = re.compile(r"\w+")
APOLOGY = re.compile(r"\b(?:sorry|apolog(?:i[sz]e|ies)|unfortunately|can(?:no|')t|unable to|as an ai)\b", re.IGNORECASE)
SURFACE = (  # the measures of `surface`, in this order
    "log_length", "line_breaks", "list_items", "code_fences", "bold_marks",
    "distinct_words", "words_of_the_prompt", "apology", "question_marks",
)  # fmt: skip
SHORTCUT_NAMES = {  # key in eval.json and summary.json: name in texts
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
    """Return the number of lines that start like a list item: a bullet or a number, a blank, and text."""
    return len(LIST_ITEM.findall(text))


SHORTCUTS = {  # key: measure of an answer's text; the shortcut prefers the answer with the larger value
    "longer": len,  # characters
    "more_list_items": list_items,
}


def shortcuts_right(rows: Dataset, weights: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return 1 (right), 0.5 (tie) or 0 for each pair [pairs], for each shortcut that needs no model.

    weights [9]: of `surface_weights`; None leaves the surface measures out.
    """
    prompts, chosen, rejected = texts_of(rows)
    right = {
        name: wins(*(np.array([measure(text) for text in side]) for side in (chosen, rejected)))
        for name, measure in SHORTCUTS.items()
    }
    right["longer_in_window"] = wins(*answer_tokens(rows).T)
    if weights is not None:
        scores = surface_differences(prompts, chosen, rejected) @ weights
        right["surface"] = wins(scores, np.zeros_like(scores))
    return right


def label_of(shortcut: str) -> str:
    """Return the name of a shortcut for a row of a table or a figure."""
    return SHORTCUT_NAMES[shortcut].strip("'")


def texts_of(rows: Dataset) -> tuple[list[str], list[str], list[str]]:
    """Return (prompts, chosen answers, rejected answers) of rows of a processed folder."""
    chosen, rejected = ([side[-1]["content"] for side in rows[name]] for name in ("chosen", "rejected"))
    return rows["prompt"], chosen, rejected


# nine surface measures


def surface(prompt: str, answer: str) -> list[float]:
    """Return the nine SURFACE measures of an answer: counts as log(1 + n), shares from 0 to 1."""
    words, prompt_words = WORD.findall(answer.lower()), set(WORD.findall(prompt.lower()))
    counts = (len(answer), answer.count("\n"), list_items(answer), answer.count("```"), answer.count("**"))
    shares = (
        len(set(words)) / max(len(words), 1),
        len(prompt_words & set(words)) / max(len(prompt_words), 1),
        float(bool(APOLOGY.search(answer))),
    )
    return [*np.log1p(counts).tolist(), *shares, float(np.log1p(answer.count("?")))]


def surface_differences(prompts: list[str], chosen: list[str], rejected: list[str]) -> np.ndarray:
    """Return surface(chosen) - surface(rejected) [pairs, 9]."""
    sides = [
        [surface(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for answers in (chosen, rejected)
    ]
    return np.array(sides[0]) - np.array(sides[1])


def surface_weights(rows: Dataset) -> np.ndarray:
    """Return the weights of the nine surface measures [9], fitted on these pairs."""
    return fit_logistic(surface_differences(*texts_of(rows)))


def fit_logistic(differences: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Return weights [n] that maximise the likelihood of sigma(differences . weights).

    differences [pairs, n]: chosen minus rejected. The penalty ridge / 2 * |weights|^2 applies to columns divided by
    their root mean square; the returned weights are for the columns as given. There is no constant term, since a pair
    has no first side. It equals sklearn's LogisticRegression with C = 1 / ridge.
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


# the same answers behind other prompts


def without_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an empty user turn as the prompt."""
    from utils.data.tokens import prompt_ids

    empty = prompt_ids(tokenizer, [{"role": "user", "content": ""}])
    padding = len(rows[0]["input_ids"]) - len(empty)
    ids, mask = empty + [tokenizer.pad_token_id] * padding, [1] * len(empty) + [0] * padding
    return replace_prompts(rows, [ids] * len(rows), [mask] * len(rows))


def shuffled_prompts(rows: Dataset, seed: int = 0) -> Dataset:
    """Return the rows, each with the prompt of another row; a single row keeps its own."""
    order = np.random.default_rng(seed).permutation(len(rows))
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)  # one cycle through all rows, so that no row keeps its own
    prompts = rows.select(donors).select_columns(["input_ids", "attention_mask"])
    return replace_prompts(rows, list(prompts["input_ids"]), list(prompts["attention_mask"]))


def replace_prompts(rows: Dataset, ids: list[list[int]], masks: list[list[int]]) -> Dataset:
    """Return the rows with other prompts, as padded ids and attention masks."""
    columns = {"input_ids": ids, "attention_mask": masks}
    features = {name: rows.features[name] for name in columns}
    rows = rows.remove_columns(list(columns))
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=features[name])
    return rows
