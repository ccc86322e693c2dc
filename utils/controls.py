"""The same pairs with other prompts: none, or each other's; and pairs grouped by their prompt."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.data.tokens import prompt_ids


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
