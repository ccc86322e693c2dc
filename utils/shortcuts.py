"""Shortcuts: surface measures that tell the chosen answer on many pairs, without reading a word of it.

A reward model has learned more than a shortcut only where its pair accuracy is above the shortcut's.
"""

import re

import numpy as np

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•◦]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)  # "- a", "* a", "12. a", "3) a"

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
