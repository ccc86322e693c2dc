"""Log-probs of the reference, computed once for all rows and kept on disk under a key of all that they depend on."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from utils.pairs import PairCollator, forward_pairs
from utils.script import first_process, say

COLUMNS = {"logps": "reference", "guided_logps": "guided_reference"}  # output of PolicyPairs: column of the rows
IDS = ("input_ids", "attention_mask", "chosen_ids", "rejected_ids", "guided_ids", "vectors_at", "guided_at")


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights of a model, by value."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def key_of(rows: Dataset, vectors: torch.Tensor | None, weights: str, precision: str) -> str:
    """The name of a cache: changes with any token of any row, the vectors, the weights and the precision.

    What is kept are sums and the loss divides them by the number of tokens, so that a loss of means and one of sums
    can share a cache.
    """
    found = hashlib.blake2b(f"{weights} {precision} sum".encode(), digest_size=16)
    if vectors is not None:
        found.update(vectors.float().cpu().contiguous().numpy())
    for batch in rows.select_columns([name for name in IDS if name in rows.column_names]).iter(1000):
        for name, values in batch.items():
            found.update(f"{name} {values!r}".encode())
    return found.hexdigest()


def with_reference(
    rows: Dataset,
    module: nn.Module,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    cache: str,
    key: str,
) -> Dataset:
    """The rows with `reference` [2] (and `guided_reference`) each: sums of log-probs under the module as it is now.

    module: PolicyPairs before its first step. cache: folder of the files, key: see key_of.
    """
    path = Path(cache) / f"{key}.npz"
    accelerator.wait_for_everyone()
    if all(gather_object([path.exists()])):  # decided once for all: another run may just be writing it
        say(f"log-probs of the reference: {len(rows)} pairs from {path}")
        found = dict(np.load(path))
    else:
        outputs = forward_pairs(module, rows, collator, batch_size, accelerator, "reference log-probs")
        found = {name: outputs[name] for name in COLUMNS if name in outputs}
        if first_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{key}.{os.getpid()}.part.npz")
            np.savez(part, **found)
            os.replace(part, path)
    for name, values in found.items():
        rows = rows.add_column(COLUMNS[name], values.tolist())
    return rows
