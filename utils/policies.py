"""A policy over pairs: what the trainer calls, and the loss of a pair with what is logged of it."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

from utils.logps import answer_logps, check_head
from utils.losses import Knobs, LogProbs, PolicyLoss
from utils.script import stop

SHARED = ("input_ids", "segments", "position_ids")  # tensors of a batch that have a length
PULL_SCALE = 2.0**12  # of a gradient on its way through fp16 activations, in which it would be rounded to 0
ROUNDING = {"fp32": 2e-3, "bf16": 0.1, "fp16": 0.05}  # by which the first loss may differ, as a share of it


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


@dataclass
class PolicyPairLoss:
    """The loss of a pair from the outputs of PolicyPairs, as the trainer calls it.

    sft_weight: of the NLL of a chosen token, beside any loss. fresh: whether the first call is the first one of a run,
    which is then held against its value at the start.
    """

    module: PolicyPairs
    loss: PolicyLoss
    knobs: Knobs
    sft_weight: float
    precision: str
    fresh: bool

    def __call__(self, outputs: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss of each pair [pairs], what is logged of each)."""
        x = self.log_probs(outputs, batch)
        losses = self.loss.function(x, self.knobs) - self.sft_weight * x.chosen_mean
        if self.fresh and losses.requires_grad:
            self.fresh = False
            self.check_start(losses.detach(), outputs, batch)
        vectors = self.module.vectors
        if x.guided is not None and vectors is not None and vectors.requires_grad and losses.requires_grad:
            losses = losses + self.pull_of_vectors(x.guided) / len(losses)
        rewards = implicit_rewards(x, self.loss, self.knobs.beta)
        margins = rewards[:, 0] - rewards[:, 1]
        return losses, {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "logps/chosen": outputs["logps"][:, 0],
            "logps/rejected": outputs["logps"][:, 1],
        }

    def log_probs(self, outputs: dict, batch: dict) -> LogProbs:
        """Sums or means, as the loss wants them; the reference from the outputs or from the batch."""
        tokens = outputs["tokens"] if self.loss.reduction == "mean" else 1.0
        reference = {name: outputs.get(name, batch.get(name)) for name in ("reference", "guided_reference")}
        return LogProbs(
            policy=outputs["logps"] / tokens,
            chosen_mean=outputs["logps"][:, 0] / outputs["tokens"][:, 0],
            reference=None if reference["reference"] is None else reference["reference"] / tokens,
            guided=outputs["guided_logps"] / tokens if "guided_logps" in outputs else None,
            guided_reference=None if reference["guided_reference"] is None else reference["guided_reference"] / tokens,
        )

    def check_start(self, losses: torch.Tensor, outputs: dict, batch: dict) -> None:
        """End the script where the first loss is not that of a policy which equals its reference."""
        if self.loss.reference:
            names = ("reference", "guided_reference")
            start = {name: outputs.get(name, batch.get(name)) for name in names}
            start = {name.replace("reference", "logps"): value for name, value in start.items() if value is not None}
        else:
            was = self.module.training
            with torch.no_grad():
                start = self.module.eval()(**batch)
            self.module.train(was)
        x = self.log_probs(outputs | start, batch)
        expected = self.loss.function(x, self.knobs) - self.sft_weight * x.chosen_mean
        far = (losses - expected).abs() > ROUNDING[self.precision] * expected.abs().clamp(min=1.0)
        if far.any():  # of any pair: differences of either sign would cancel in the mean
            stop(
                f"the first loss is {losses.mean():.4f}, and a policy that equals its reference has "
                f"{expected.mean():.4f}: they are not the same model. Remove the folder REFERENCE_CACHE, or look at "
                "what was changed in the code"
            )

    def pull_of_vectors(self, guided: torch.Tensor) -> torch.Tensor:
        """Zero, with the gradient of sum(-log sigma(beta r_p)) for the vectors alone; the policy gets none of it."""
        wanted = -functional.logsigmoid(self.knobs.beta * (guided[:, 0] - guided[:, 1])).sum()
        (gradient,) = torch.autograd.grad(PULL_SCALE * wanted, self.module.vectors, retain_graph=True)
        pull = (self.module.vectors * gradient / PULL_SCALE).sum()
        return pull - pull.detach()


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


def implicit_rewards(x: LogProbs, loss: PolicyLoss, beta: float) -> torch.Tensor:
    """beta (log pi - log ref) [pairs, 2], sums or means as the loss takes them; without a reference beta log pi."""
    return beta * (x.policy - x.reference if loss.reference else x.policy).detach()
