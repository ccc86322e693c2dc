"""Supervised fine-tuning: trl.SFTTrainer on our token ids, perplexity before and after, and the files of a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from utils.evaluation.plots import training_curves
from utils.evaluation.statistics import change
from utils.runs import Run, write_json, write_text
from utils.training import trainer as training
from utils.training.trainer import LengthSampler


class AnswerTrainer(training.StopsAtBadLoss, SFTTrainer):
    """trl.SFTTrainer over rows of like length, which stops at a loss that is not finite.

    figures: () -> metrics on validation, exact; called every EVAL_EVERY_STEPS on all processes.
    """

    def __init__(self, figures: Callable[[], dict[str, float]], **named: object):
        super().__init__(**named)
        self.figures = figures
        lengths = np.array([len(ids) for ids in self.train_dataset["input_ids"]])
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = LengthSampler(lengths, rows_per_step, self.args.seed)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthSampler:
        return self.sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" not in logs:
            super().log(logs, start_time)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Metrics of `figures` under eval_*, logged."""
        metrics = {f"eval_{name}": value for name, value in self.figures().items()}
        Trainer.log(self, dict(metrics))  # TRL's would put the means of the training on this line and forget them
        return metrics


def answer_trainer(
    model: nn.Module,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    arguments: Callable,
    figures: Callable[[], dict[str, float]],
) -> AnswerTrainer:
    """Return the trainer for rows of extras.parts.answers."""
    args = arguments(
        SFTConfig,
        completion_only_loss=True,  # without it TRL learns the prompts of rows that are tokenised already
        max_length=None,  # the rows fit
        gradient_checkpointing=False,  # where it is wanted, the model has it
    )
    trainer = AnswerTrainer(
        figures,
        model=model,
        args=args,
        train_dataset=trl_rows(rows),
        eval_dataset=trl_rows(rows.select([0])),  # Trainer asks for some; ours knows its own
        processing_class=tokenizer,
    )
    training.add_step_callback(trainer, run)
    return trainer


def trl_rows(rows: Dataset) -> Dataset:
    """The rows as TRL takes tokens as they are: input_ids, and completion_mask, 1 on the answer."""

    def whole(row: dict) -> dict:
        prompt, answer = row["input_ids"], row["chosen_ids"]
        return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}

    return rows.map(whole, remove_columns=rows.column_names, keep_in_memory=True, desc="rows for TRL")


def mean_nll(outputs: dict[str, np.ndarray]) -> float:
    """NLL of an answer token in nats: the sum over all answers by the number of their tokens.

    outputs: of forward_pairs over answers.
    """
    return float(-outputs["logps"][:, 0].sum(dtype=float) / outputs["tokens"][:, 0].sum(dtype=float))


def perplexity_figures(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, object]:
    """The content of eval.json.

    perplexity: e^NLL of an answer token, over all tokens. difference: mean over the rows of (NLL of a row's token after
    - before), with its 95 % interval and two-sided p; verdict, on this difference: fell (better) | grew | not shown.
    The two can part: long answers have more tokens, and no more weight in the difference.
    """
    sides = [-outputs["logps"][:, 0] / outputs["tokens"][:, 0] for outputs in (before, after)]
    nll = [mean_nll(outputs) for outputs in (before, after)]
    return {
        "rows": len(sides[0]),
        "tokens": int(after["tokens"][:, 0].sum(dtype=float)),
        "nll_before": nll[0],
        "nll_after": nll[1],
        "perplexity_before": float(np.exp(nll[0])),
        "perplexity_after": float(np.exp(nll[1])),
        **change(*(side.astype(float) for side in sides)),
    }


def format_result(result: dict) -> str:
    """Return the result in two lines."""
    perplexity = f"{result['perplexity_before']:.3f} before, {result['perplexity_after']:.3f} after"
    interval = f"[{result['difference_low']:+.4f}, {result['difference_high']:+.4f}]"
    return (
        f"perplexity on {result['rows']} answers ({result['tokens']} tokens): {perplexity}\n"
        f"NLL of an answer's token, mean over the answers: {result['difference']:+.4f} {interval}, "
        f"p = {result['p_value']:.2g}: {result['verdict']}"
    )


def write_results(folder: Path, result: dict, record: dict) -> None:
    """eval.json, the curves and the model card."""
    settings = record["settings"]
    write_json(folder / "eval.json", result)
    title = f"NLL of a token in {result['rows']} held-out answers, mean over the answers: {result['verdict']}"
    names = ("loss", "mean_token_accuracy")
    training_curves(folder, names, {}, title, "mean over the steps since the last log")
    head = (
        f"# {folder.name}\n\n`{settings['MODEL']}` trained on {record['train_rows']} answers of "
        f"`{record['dataset_name']}` (loss on the answers only, learning rate {settings['LEARNING_RATE']}, window "
        f"{record['max_length']} tokens)."
    )
    write_text(folder / "README.md", f"{head}\n\n{format_result(result)}\n")
