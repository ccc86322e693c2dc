"""What occurs more than once in processed pairs: prompts within a split and across splits, answers."""

from collections import Counter
from itertools import combinations

import numpy as np


def repeats(measures: dict[str, dict[str, np.ndarray]], groups: dict[str, np.ndarray]) -> dict:
    """How often prompts and answers occur again, within a split and across splits.

    measures: for each split prompt_key, chosen_key and rejected_key [pairs], equal for equal texts.
    groups: for each split the near-duplicate group of each prompt [pairs], numbered across splits.
    Returns, for equal and for near-duplicate prompts, within {split: pairs beyond the first of each} and across
    {"train-validation": different prompts (groups) in both}; for answers, across and two counts of their own;
    leaks_into_training: groups of prompts that stand in train and in another split too.
    """
    prompts = {name: m["prompt_key"] for name, m in measures.items()}
    answers = {name: np.concatenate([m["chosen_key"], m["rejected_key"]]) for name, m in measures.items()}
    sides = [zip(m["chosen_key"].tolist(), m["rejected_key"].tolist(), strict=True) for m in measures.values()]
    pairs_of_answer = Counter(key for pairs in sides for pair in pairs for key in set(pair))
    return {
        "prompts": {"within": within(prompts), "across": across(prompts)},
        "near_duplicate_prompts": {"within": within(groups), "across": across(groups)},
        "answers": {
            "across": across(answers),
            "in_several_pairs": sum(count > 1 for count in pairs_of_answer.values()),
            "chosen_equals_rejected": sum(int((m["chosen_key"] == m["rejected_key"]).sum()) for m in measures.values()),
        },
        "leaks_into_training": len(leaking_groups(groups)),
    }


def within(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """For each split the entries that stood in it before."""
    return {name: len(values) - len(np.unique(values)) for name, values in keys.items()}


def across(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """For each two splits how many different entries stand in both."""
    return {f"{one}-{other}": len(np.intersect1d(keys[one], keys[other])) for one, other in combinations(keys, 2)}


def leaking_groups(groups: dict[str, np.ndarray]) -> list[int]:
    """The near-duplicate groups that stand in train and in another split too."""
    held_out = [values for name, values in groups.items() if name != "train"]
    if "train" not in groups or not held_out:
        return []
    return np.intersect1d(groups["train"], np.concatenate(held_out)).tolist()


def first_rows(groups: dict[str, np.ndarray], group: int) -> dict[str, int]:
    """{split: its first row of the group}, for the splits that have one."""
    found = {name: np.flatnonzero(values == group) for name, values in groups.items()}
    return {name: int(rows[0]) for name, rows in found.items() if len(rows)}
