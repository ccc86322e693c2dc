"""A policy on pairs and its reference, whose log-probs are computed once and cached on disk."""

import copy
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from utils.models.loading import PROOF_ROWS, load_causal, save_with_proof
from utils.models.shared_prompt import Batch, PairCollator, answer_logps, check_head, forward_pairs
from utils.script import first_process, say, stop

REFERENCE_COLUMNS = {"logps": "reference", "guided_logps": "guided_reference"}  # output of PolicyPairs: column of rows
ID_COLUMNS = ("input_ids", "attention_mask", "chosen_ids", "rejected_ids", "guided_ids", "vectors_at", "guided_at")


class PolicyPairs(nn.Module):
    """A causal model as the trainer calls it: from shared rows to the log-probs of both answers.

    vectors [n, hidden]: a preference in the prompts, trained if `train_vectors`. reference: a frozen copy of the model
    at its start; "adapter" for the model without its adapters; None if the rows carry the reference's log-probs or the
    loss needs none. The reference sees the vectors as they were at the start.
    """

    start: torch.Tensor | None

    def __init__(
        self,
        model: nn.Module,
        vectors: torch.Tensor | None = None,
        train_vectors: bool = False,
        reference: nn.Module | str | None = None,
    ):
        super().__init__()
        self.model = model
        self.vectors = nn.Parameter(vectors.clone(), requires_grad=train_vectors) if vectors is not None else None
        self.register_buffer("start", vectors.clone() if vectors is not None else None, persistent=False)
        self.without_adapter = reference == "adapter"
        # in a list, so that it is no submodule: neither trained nor saved
        self.frozen = [reference.eval().requires_grad_(False)] if isinstance(reference, nn.Module) else []

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def trains_vectors(self) -> bool:
        return self.vectors is not None and self.vectors.requires_grad

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logps (sums over the tokens of an answer) and tokens, [batch, 2] float32, chosen first.

        Rows with a guided prompt add guided_logps. A reference in here adds reference and guided_reference.
        """
        outputs = log_probs(self.model, batch, self.vectors)
        if self.frozen or self.without_adapter:
            model: Any = self.frozen[0].to(batch["input_ids"].device) if self.frozen else self.model
            with torch.no_grad(), model.disable_adapter() if self.without_adapter else nullcontext():
                reference = log_probs(model, batch, self.start)
            outputs |= {REFERENCE_COLUMNS[name]: reference[name] for name in REFERENCE_COLUMNS if name in reference}
        return outputs


def log_probs(model: nn.Module, batch: Batch, vectors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return logps, tokens and, in rows with a guided prompt, guided_logps under a model, in one pass."""
    if "guided_input_ids" not in batch:
        sums, tokens = answer_logps(model, batch, vectors)
        return {"logps": sums, "tokens": tokens}
    sums, tokens = answer_logps(model, stacked(batch), vectors)
    plain, guided = sums.chunk(2)
    return {"logps": plain, "guided_logps": guided, "tokens": tokens.chunk(2)[0]}


def stacked(batch: Batch) -> Batch:
    """Return the plain rows and below them the guided rows, padded to one length [2 batch, length]."""
    length = max(batch["input_ids"].shape[1], batch["guided_input_ids"].shape[1])
    rows = {"vectors_at": torch.cat([batch["vectors_at"], batch["guided_vectors_at"]])}
    for name in ("input_ids", "segments", "position_ids"):
        sides = (batch[name], batch[f"guided_{name}"])
        rows[name] = torch.cat([functional.pad(side, (0, length - side.shape[1])) for side in sides])
    return rows


def reference_of(model: nn.Module, trained: bool) -> nn.Module | str:
    """Return the policy as it is now: "adapter" (off), a frozen copy, or the model itself if it is not trained."""
    if hasattr(model, "disable_adapter"):
        return "adapter"
    return copy.deepcopy(model) if trained else model


def check_architecture(model: Any, rows: Dataset) -> None:
    """Stop if a model changes its logits after the head, which the chunked log-probs would miss."""
    mask = torch.tensor(rows[0]["attention_mask"], dtype=torch.bool)
    difference = check_head(model, torch.tensor(rows[0]["input_ids"])[mask][None].to(model.device))
    if difference > 1e-2:
        stop(f"this architecture changes its logits after the head (by {difference:.2g}): it is not supported")


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all weights of a model, by value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_key(rows: Dataset, vectors: torch.Tensor | None, weights: str, precision: str) -> str:
    """Return the name of a cache, which depends on every token of the rows, the vectors, weights and precision.

    The cache holds sums, so that losses of means (which divide by the number of tokens) and of sums can share it.
    """
    digest = hashlib.blake2b(f"{weights} {precision} sum".encode(), digest_size=16)
    if vectors is not None:
        digest.update(vectors.float().cpu().contiguous().numpy().data)
    for batch in rows.select_columns([name for name in ID_COLUMNS if name in rows.column_names]).iter(1000):
        for name, values in batch.items():
            digest.update(f"{name} {values!r}".encode())
    return digest.hexdigest()


def add_reference_logps(
    rows: Dataset,
    module: nn.Module,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    cache: str,
    key: str,
) -> Dataset:
    """Return the rows with `reference` [2] (and `guided_reference`): sums of log-probs under the module as it is now.

    module: PolicyPairs before its first step. cache: folder of the files. key: see `cache_key`.
    """
    path = Path(cache) / f"{key}.npz"
    accelerator.wait_for_everyone()
    if all(gather_object([path.exists()])):  # the same decision on all processes: another run may be writing it
        say(f"log-probs of the reference: {len(rows)} pairs from {path}")
        logps = dict(np.load(path))
    else:
        outputs = forward_pairs(module, rows, collator, batch_size, accelerator, "reference log-probs")
        logps = {name: outputs[name] for name in REFERENCE_COLUMNS if name in outputs}
        if first_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{key}.{os.getpid()}.part.npz")
            np.savez(part, **logps)
            os.replace(part, path)
    for name, values in logps.items():
        rows = rows.add_column(REFERENCE_COLUMNS[name], values.tolist())
    return rows


def save_policy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Dataset, collator: PairCollator
) -> None:
    """Save the policy as a plain folder, proved by the mean log-prob of a token in each answer of the first rows.

    The proof compares means, not sums: a GPU adds in its own order, and the last digit of a sum of hundreds exceeds
    the limit.
    """
    batch = collator([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])
    inputs = {name: value for name, value in batch.items() if "reference" not in name}

    def score(model: nn.Module) -> torch.Tensor:
        device = next(model.parameters()).device
        outputs = PolicyPairs(model)(**{name: value.to(device) for name, value in inputs.items()})
        return (outputs["logps"] / outputs["tokens"].clamp(min=1)).cpu()

    save_with_proof(model, tokenizer, folder, load_causal, score)
