"""Shortcuts: surface measures that tell the chosen answer on many pairs, without reading a word of it.

A reward model has learned more than a shortcut only where its pair accuracy is above the shortcut's.
"""

import re

import numpy as np

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•◦]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)  # "- a", "* a", "12. a", "3) a"
WORD = re.compile(r"\w+")
APOLOGY = re.compile(r"\b(?:sorry|apolog(?:i[sz]e|ies)|unfortunately|can(?:no|')t|unable to|as an ai)\b", re.IGNORECASE)

GAP_BANDS = {  # name: from, up to (not included), in hundredths of a rating point
    "<0.5": (0, 50),
    "0.5-1.0": (50, 100),
    ">=1.0": (100, float("inf")),
}


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


SURFACE = (  # the measures of `surface`, in this order
    "log_length", "line_breaks", "list_items", "code_fences", "bold_marks",
    "distinct_words", "words_of_the_prompt", "apology", "question_marks",
)  # fmt: skip


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
