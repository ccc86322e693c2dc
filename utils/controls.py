"""The same pairs with other prompts: none, or each other's; and pairs grouped by their prompt."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.script import stop
from utils.templates import end_of_turn, prompt_ids
from utils.tokens import closed

HALVES = {"even": 0, "odd": 1}  # value of HALF: its first prompt


def closed_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an end of turn behind cut answers too, as reward models need (see utils.tokens.closed)."""
    closing = end_of_turn(tokenizer)
    for side in ("chosen", "rejected"):
        both = zip(rows[f"{side}_ids"], rows[f"{side}_cut"], strict=True)
        ids = [closed(answer, closing) if cut else answer for answer, cut in both]
        kind = rows.features[f"{side}_ids"]
        rows = rows.remove_columns(f"{side}_ids").add_column(f"{side}_ids", ids, feature=kind)
    return rows


def without_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an empty user turn as the prompt."""
    window = len(rows[0]["input_ids"])
    empty = prompt_ids(tokenizer, [{"role": "user", "content": ""}])
    padding = window - len(empty)
    ids, mask = empty + [tokenizer.pad_token_id] * padding, [1] * len(empty) + [0] * padding
    return with_prompts(rows, [ids] * len(rows), [mask] * len(rows))


def shuffled_prompts(rows: Dataset, seed: int = 0) -> Dataset:
    """Return the rows, each with the prompt of another row; a single row keeps its own."""
    order = np.random.default_rng(seed).permutation(len(rows))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one cycle through all rows, so that no row keeps its own
    prompts = rows.select(other).select_columns(["input_ids", "attention_mask"])
    return with_prompts(rows, list(prompts["input_ids"]), list(prompts["attention_mask"]))


def with_prompts(rows: Dataset, ids: list[list[int]], masks: list[list[int]]) -> Dataset:
    """Return the rows with other prompts, as padded ids and attention masks."""
    columns = {"input_ids": ids, "attention_mask": masks}
    kinds = {name: rows.features[name] for name in columns}
    rows = rows.remove_columns(list(columns))
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=kinds[name])
    return rows


def same_prompt(rows: Dataset) -> np.ndarray:
    """Return for each row [rows] the index of the first row with the same prompt (all turns before the answer)."""
    first = {}
    return np.array([first.setdefault(str(messages[:-1]), i) for i, messages in enumerate(rows["chosen"])], dtype=int)


def different_prompts(rows: Dataset, count: int = 0) -> Dataset:
    """Return the first row of each prompt, at most `count` rows (0 = all); rows of one prompt are not independent."""
    return rows.select(np.unique(same_prompt(rows))[: count or None])


def half(rows: Dataset, name: str) -> Dataset:
    """Return the pairs of every second prompt. The two HALVES share no prompt."""
    number = np.unique(same_prompt(rows), return_inverse=True)[1]
    found = rows.select(np.flatnonzero(number % 2 == HALVES[name]))
    if not len(found):
        stop(f"HALF = {name!r} holds no pair: the {len(rows)} rows have {number.max() + 1} prompt(s)")
    return found
