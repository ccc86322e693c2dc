"""Stock TRL on the rows of a processed folder: the other engine, and the oracle of the tests."""

import copy
import sys
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from utils import training
from utils.models import with_rates
from utils.pairs import prompt_of, whole_rows
from utils.runs import Run

DPO_LOSSES = {  # LOSS: loss_type and loss_weights of trl.DPOConfig
    "dpo": (["sigmoid"], None),
    "ipo": (["ipo"], None),
    "hinge": (["hinge"], None),
    "sipa": (["sigmoid_norm", "sft"], [1.0, 0.05]),
}


class StopsAtBadLoss(training.ResumesAnywhere):
    """Before a Trainer among the bases: a loss that is not finite ends the run, which Trainer would go on with."""

    def training_step(self, *arguments: object, **named: object) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        if not torch.isfinite(loss):
            sys.exit(
                f"the loss is not finite at step {self.state.global_step + 1}: lower LEARNING_RATE or look at the "
                "rows; the last checkpoint is kept"
            )
        return loss


def reward_trainer(
    model: nn.Module,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    arguments: Callable,
    rates: dict[str, float],
) -> Trainer:
    """trl.RewardTrainer; its max_length would filter out long pairs, so it gets ids that fit already.

    rates: see models.with_rates.
    """
    from trl import RewardConfig, RewardTrainer

    class Stopping(StopsAtBadLoss, RewardTrainer):
        def create_optimizer(self, *arguments: object) -> torch.optim.Optimizer:
            return with_rates(super().create_optimizer(*arguments), self.model, rates)

    args = arguments(RewardConfig, max_length=None, disable_dropout=False, gradient_checkpointing=False)
    trainer = Stopping(model=model, args=args, train_dataset=whole_rows(rows), processing_class=tokenizer)
    training.attach(trainer, run)
    return trainer


def dpo_trainer(
    model: nn.Module,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    arguments: Callable,
    loss: str,
    beta: float,
) -> Trainer:
    """trl.DPOTrainer; the reference is a copy of the model as it is, where TRL would read one from the disk."""
    from trl import DPOConfig, DPOTrainer

    class Stopping(StopsAtBadLoss, DPOTrainer):
        pass

    kinds, weights = DPO_LOSSES[loss]
    args = arguments(
        DPOConfig, loss_type=kinds, loss_weights=weights, beta=beta, max_length=None, gradient_checkpointing=False,
        disable_dropout=False,
    )  # fmt: skip
    adapted = hasattr(model, "disable_adapter")
    trainer = Stopping(
        model=model,
        ref_model=None if adapted else copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it insists on tokenising
        processing_class=tokenizer,
    )
    trainer.train_dataset = prompt_rows(rows)
    training.attach(trainer, run)
    return trainer


def prompt_rows(rows: Dataset) -> Dataset:
    """The rows as TRL's DPO collator takes them: prompt_ids, chosen_ids, rejected_ids."""

    def only(row: dict) -> dict:
        return {"prompt_ids": prompt_of(row)}

    kept = ("chosen_ids", "rejected_ids")
    return rows.map(only, remove_columns=[name for name in rows.column_names if name not in kept], desc="rows for TRL")
