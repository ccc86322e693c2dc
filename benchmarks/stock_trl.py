"""Stock TRL on the rows of a processed folder: the other side of the benchmark, and the oracle of the tests."""

import copy
from collections.abc import Callable

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from utils.data.processed import prompt_of
from utils.runs import Run
from utils.training import trainer as training

DPO_LOSSES = {  # LOSS: loss_type and loss_weights of trl.DPOConfig
    "dpo": (["sigmoid"], None),
    "ipo": (["ipo"], None),
    "hinge": (["hinge"], None),
    "sipa": (["sigmoid_norm", "sft"], [1.0, 0.05]),
}


def reward_trainer(
    model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run, arguments: Callable
) -> Trainer:
    """Return a trl.RewardTrainer; its max_length would drop long pairs, so its rows fit the window already."""
    from trl import RewardConfig, RewardTrainer

    args = arguments(RewardConfig, max_length=None, disable_dropout=False, gradient_checkpointing=False)
    trainer = RewardTrainer(model=model, args=args, train_dataset=whole_rows(rows), processing_class=tokenizer)
    training.add_step_callback(trainer, run)
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
    """Return a trl.DPOTrainer; the reference is a copy of the model in memory, where TRL would load one from disk."""
    from trl import DPOConfig, DPOTrainer

    kinds, weights = DPO_LOSSES[loss]
    args = arguments(
        DPOConfig, loss_type=kinds, loss_weights=weights, beta=beta, max_length=None, gradient_checkpointing=False,
        disable_dropout=False,
    )  # fmt: skip
    adapted = hasattr(model, "disable_adapter")
    trainer = DPOTrainer(
        model=model,
        ref_model=None if adapted else copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it insists on tokenising
        processing_class=tokenizer,
    )
    trainer.train_dataset = prompt_rows(rows)
    training.add_step_callback(trainer, run)
    return trainer


def whole_rows(rows: Dataset) -> Dataset:
    """Return the rows as trl.RewardTrainer expects them: chosen_ids and rejected_ids, each with the prompt in front."""

    def whole(row: dict) -> dict:
        prompt = prompt_of(row)
        return {"chosen_ids": prompt + row["chosen_ids"], "rejected_ids": prompt + row["rejected_ids"]}

    return rows.map(whole, remove_columns=rows.column_names, desc="rows for TRL")


def prompt_rows(rows: Dataset) -> Dataset:
    """Return the rows as trl.DPOTrainer's collator expects them: prompt_ids, chosen_ids, rejected_ids."""

    def only(row: dict) -> dict:
        return {"prompt_ids": prompt_of(row)}

    kept = ("chosen_ids", "rejected_ids")
    return rows.map(only, remove_columns=[name for name in rows.column_names if name not in kept], desc="rows for TRL")
