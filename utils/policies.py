"""A policy over pairs: what the trainer calls, and the loss of a pair with what is logged of it."""

import copy
from contextlib import nullcontext

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

from utils.logps import answer_logps, check_head
from utils.script import stop

SHARED = ("input_ids", "segments", "position_ids")  # tensors of a batch that have a length


class PolicyPairs(nn.Module):
    """A causal model as the trainer calls it: shared rows in, log-probs of both answers out.

    vectors [n, hidden]: a preference that stands in the prompts, trained where `train_vectors`. reference: a frozen
    copy of the model at its start, "adapter" to take the model without its adapters, or None where the rows carry the
    reference's log-probs or the loss needs none. The reference sees the vectors as they were at the start.
    """

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
        self.frozen = [reference.eval().requires_grad_(False)] if isinstance(reference, nn.Module) else []  # no part

    @property
    def config(self) -> object:
        return self.model.config

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """logps (sums over the tokens of an answer) and tokens, [batch, 2] float32, chosen first.

        Rows with a guided prompt also give guided_logps; a reference in here gives reference and guided_reference.
        """
        found = self.read(self.model, batch, self.vectors)
        if self.frozen or self.without_adapter:
            model = self.frozen[0].to(batch["input_ids"].device) if self.frozen else self.model
            with torch.no_grad(), self.model.disable_adapter() if self.without_adapter else nullcontext():
                reference = self.read(model, batch, self.start)
            found |= {
                name.replace("logps", "reference"): value for name, value in reference.items() if name != "tokens"
            }
        return found

    def read(
        self, model: nn.Module, batch: dict[str, torch.Tensor], vectors: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """logps and tokens under a model, of the plain and the guided side in one pass."""
        if "guided_input_ids" not in batch:
            sums, tokens = answer_logps(model, batch, vectors)
            return {"logps": sums, "tokens": tokens}
        sums, tokens = answer_logps(model, stacked(batch), vectors)
        plain, guided = sums.chunk(2)
        return {"logps": plain, "guided_logps": guided, "tokens": tokens.chunk(2)[0]}


def stacked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain rows and below them the guided ones, padded to one length [2 batch, length]."""
    length = max(batch["input_ids"].shape[1], batch["guided_input_ids"].shape[1])
    rows = {"vectors_at": torch.cat([batch["vectors_at"], batch["guided_vectors_at"]])}
    for name in SHARED:
        sides = (batch[name], batch[f"guided_{name}"])
        rows[name] = torch.cat([functional.pad(side, (0, length - side.shape[1])) for side in sides])
    return rows


def reference_of(model: nn.Module, trained: bool) -> nn.Module | str:
    """The policy as it is now: its adapters taken off, a frozen copy, or itself where it is not trained."""
    if hasattr(model, "disable_adapter"):
        return "adapter"
    return copy.deepcopy(model) if trained else model


def check_architecture(model: nn.Module, rows: Dataset) -> None:
    """End the script where a model changes its logits after the head, which the chunked log-probs would miss."""
    mask = torch.tensor(rows[0]["attention_mask"], dtype=torch.bool)
    ids = torch.tensor(rows[0]["input_ids"])[mask][None].to(model.device)
    difference = check_head(model, ids)
    if difference > 1e-2:
        stop(f"this architecture changes its logits after the head (by {difference:.2g}): it is not supported")
