"""Pairs as batches: the prompt once, both answers behind it, one forward pass, one trainer for all pair losses.

A row is `prompt + chosen + rejected`. The rejected answer does not see the chosen one, and its positions start
again behind the prompt, so that both answers are computed as if they stood alone (equal to two rows to 1e-6),
while the prompt is paid for once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, disable_caching
from torch import nn
from tqdm import tqdm

from utils.data.processed import prompt_of
from utils.hidden import CHOSEN, PADDING, PROMPT, REJECTED
from utils.script import bar_off, stop

disable_caching()  # else each change of rows leaves a file in the processed folder, which is not ours to write in

TOKENS_AT_ONCE = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # positions in one pass: what keeps the device busy


def row_multiple(device: torch.device) -> int:
    """Rows are padded to a multiple of this: GPUs want few shapes and round ones, a CPU pays for each token."""
    return 1 if device.type == "cpu" else 64


def pair_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each shared row [rows]: prompt + chosen + rejected."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for start, batch in zip(range(0, len(rows), 1000), rows.iter(1000), strict=True):
        for column in ("chosen_ids", "rejected_ids"):
            lengths[start : start + 1000] += [len(ids) for ids in batch[column]]
        lengths[start : start + 1000] += [sum(mask) for mask in batch["attention_mask"]]
    return lengths


class PairCollator:
    """Rows of a processed folder to one batch of shared rows, right-padded to a multiple of `multiple`.

    Returns int64 tensors: input_ids, segments (PADDING, PROMPT, CHOSEN or REJECTED) and position_ids [batch, length],
    ends [batch, 2] (index of the last token of chosen and rejected), vectors_at [batch] (where vectors take the place
    of embeddings, -1 = nowhere), row [batch]; float32 ratings [batch, 2] and attributes [batch, 2, 5], NaN where the
    source has none, and gap [batch], the difference of the ratings or 0. Rows with a second prompt (`guided_ids`) also
    give the first five under guided_*, rows with `reference` columns those. A bounded set of shapes keeps kernels
    cached.
    """

    def __init__(self, pad_id: int, multiple: int = 64):
        self.pad_id, self.multiple = pad_id, multiple

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [prompt_of(row) for row in rows]
        batch = self.shared_rows(prompts, rows, "vectors_at")
        if "guided_ids" in rows[0]:
            guided = self.shared_rows([row["guided_ids"] for row in rows], rows, "guided_at")
            batch |= {f"guided_{name}": value for name, value in guided.items()}
        for name in ("reference", "guided_reference"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        sides = ("chosen", "rejected")
        ratings = torch.tensor([[missing(row[f"{side}_rating"]) for side in sides] for row in rows])
        attributes = [[row.get(f"{side}_attributes") or [None] * 5 for side in sides] for row in rows]
        attributes = [[[missing(value) for value in side] for side in both] for both in attributes]
        return batch | {
            "row": torch.tensor([row["row"] for row in rows]),
            "ratings": ratings.float(),
            "gap": (ratings[:, 0].nan_to_num() - ratings[:, 1].nan_to_num()).float(),
            "attributes": torch.tensor(attributes, dtype=torch.float32),
        }

    def shared_rows(self, prompts: list[list[int]], rows: list[dict], at: str) -> dict[str, torch.Tensor]:
        """The tensors of one prompt a row with both of its answers; at: the column for vectors_at."""
        parts = [(prompt, row["chosen_ids"], row["rejected_ids"]) for prompt, row in zip(prompts, rows, strict=True)]
        longest = max(sum(map(len, part)) for part in parts)
        length = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), length), self.pad_id)
        segments = torch.full((len(rows), length), PADDING)
        position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
        ends = torch.zeros((len(rows), 2), dtype=torch.int64)
        for i, (prompt, chosen, rejected) in enumerate(parts):
            p, c, r = len(prompt), len(prompt) + len(chosen), len(prompt) + len(chosen) + len(rejected)
            input_ids[i, :r] = torch.tensor([*prompt, *chosen, *rejected])
            segments[i, :p], segments[i, p:c], segments[i, c:r] = PROMPT, CHOSEN, REJECTED
            position_ids[i, :c] = torch.arange(c)
            position_ids[i, c:r] = torch.arange(p, p + len(rejected))
            ends[i] = torch.tensor([c - 1, r - 1])
        named = {"input_ids": input_ids, "segments": segments, "position_ids": position_ids, "ends": ends}
        return named | {"vectors_at": torch.tensor([row.get(at, -1) for row in rows])}


def missing(value: float | None) -> float:
    """NaN in place of None."""
    return float("nan") if value is None else value


@torch.no_grad()
def forward_pairs(
    model: nn.Module,
    rows: Dataset,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    progress: str = "scoring pairs",
) -> dict[str, np.ndarray]:
    """What the model says of every row, in the order of the rows, each exactly once on any number of processes.

    model: a module whose forward takes a batch of PairCollator and returns {name: tensor [batch, ...]}.
    accelerator: its autocast is used. Returns float32 arrays [rows, ...].
    """
    batches = like_length(pair_lengths(rows), 2 * TOKENS_AT_ONCE[accelerator.device.type], batch_size)
    world, me = accelerator.num_processes, accelerator.process_index
    found = []
    was_training = model.training
    model.eval()
    for first in tqdm(range(0, len(batches), world), desc=progress, disable=bar_off(), leave=False):
        mine = min(first + me, len(batches) - 1)  # all processes take part in each round: sharded models need it
        batch = collator([rows[int(i)] for i in batches[mine]])
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            output = model(**batch)
        if first + me < len(batches):
            found.append((batches[mine], {name: value.float().cpu().numpy() for name, value in output.items()}))
    model.train(was_training)
    return in_order(gather_object(found), len(rows))


def like_length(lengths: Sequence[int], tokens: float, count: int = 0) -> list[list[int]]:
    """Places in `lengths`, in parts of like length, the longest first: at most `tokens` positions with the padding.

    count: at most so many in a part, 0 = any number. What is longer than `tokens` is a part of its own.
    """
    parts: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        room = parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens
        if room and (not count or len(parts[-1]) < count):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def in_order(found: list[tuple[np.ndarray, dict]], count: int) -> dict[str, np.ndarray]:
    """Arrays [count, ...] from batches of (row numbers, values); an end to the script where a value is not finite."""
    arrays = {name: np.full((count, *value.shape[1:]), np.nan, np.float32) for name, value in found[0][1].items()}
    seen = np.zeros(count, bool)
    for numbers, values in found:
        seen[numbers] = True
        for name, value in values.items():
            arrays[name][numbers] = value
    assert seen.all(), "rows lost"
    if not all(np.isfinite(array).all() for array in arrays.values()):
        stop("the model's outputs are not finite: set PRECISION = fp32, or LEARNING_RATE lower where it was trained")
    return arrays
