"""Single answers for SFT: chosen answers of pairs, sft rows, or a source with completions or messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from utils.data.preferences import (
    Ledger,
    Message,
    asks,
    hundredths,
    is_text,
    is_unicode,
    messages_of,
    prompt_text,
    prompt_turns,
    real_number,
)
from utils.data.processed import row_features
from utils.data.sources import ANSWER_LAYOUTS, Record, open_source
from utils.data.split import near_duplicate_groups, split_indices
from utils.data.tokens import tokenised, unfit
from utils.evaluation.plots import training_curves
from utils.evaluation.statistics import change
from utils.runs import Run, write_json, write_text
from utils.script import needs, say, stop
from utils.training import trainer as training
from utils.training.trainer import LengthSampler

ROLES = ("system", "user", "assistant")
VALIDATION_SHARE = 0.2  # of the rows of a source without a held-out split


def load_answers(data_dir: str, split: str, max_rows: int = 0) -> Dataset:
    """Return the answers of one split of a processed folder, at most max_rows (0 = all); see as_answers."""
    rows = load_from_disk(str(needs(Path(data_dir) / split, made_by="load_helpsteer_dataset.py")))
    return as_answers(rows.select(range(min(max_rows, len(rows)))) if max_rows else rows)


def as_answers(rows: Dataset) -> Dataset:
    """Return rows with one answer each, in memory: the chosen answers of pairs, or sft rows.

    Columns: prompt, messages, rating, answer_cut, and those of a pair for PairCollator: input_ids and attention_mask
    (the prompt without padding), chosen_ids (the answer) and empty rejected_ids.
    """
    ids, flags, number = List(Value("int32")), List(Value("int8")), Value("float64")
    features = row_features("sft") | {"input_ids": ids, "attention_mask": flags, "chosen_ids": ids}
    features |= {"rejected_ids": ids, "chosen_rating": number, "rejected_rating": number}
    features |= {"answer_cut": Value("bool"), "row": Value("int64")}
    if not len(rows):  # map() would make no columns
        return Dataset.from_dict({name: [] for name in features}, features=Features(features))
    return rows.map(
        answer_columns,
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        features=Features(features),
        keep_in_memory=True,  # no cache files in the processed folder
        desc="reading answers",
    )


def answer_columns(batch: dict, numbers: list[int]) -> dict:
    """Return the columns of as_answers for a batch of pairs or sft rows."""
    of_pairs = "chosen" in batch
    count = len(batch["prompt"])
    if of_pairs:
        prompts = [ids[: sum(mask)] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        answers = batch["chosen_ids"]
    else:
        starts = [mask.index(1) if 1 in mask else len(mask) for mask in batch["completion_mask"]]
        prompts = [ids[:start] for ids, start in zip(batch["input_ids"], starts, strict=True)]
        answers = [ids[start:] for ids, start in zip(batch["input_ids"], starts, strict=True)]
    return {
        "prompt": batch["prompt"],
        "messages": batch["chosen" if of_pairs else "messages"],
        "rating": batch["chosen_rating" if of_pairs else "rating"],
        "input_ids": prompts,
        "attention_mask": [[1] * len(prompt) for prompt in prompts],
        "chosen_ids": answers,
        "rejected_ids": [[]] * count,
        "chosen_rating": [None] * count,
        "rejected_rating": [None] * count,
        "answer_cut": batch["chosen_cut" if of_pairs else "answer_cut"],
        "row": numbers,
    }


def least_rating(text: str) -> float | None:
    """Return MIN_RATING as a number, None if it is empty."""
    number = real_number(text)
    if text and number is None:
        stop(f"MIN_RATING = {text!r}: expected a number such as 3.5, or ''")
    return number


def learnable(rows: Dataset, least: float | None, where: str) -> tuple[Dataset, dict[str, int]]:
    """Return (the rows with an answer that is rated `least` or more, {reason: rows left out}).

    Rows without a rating are left out, unless `least` is None. where: name of the rows, for messages.
    """
    reasons = []
    for rating, answer in zip(rows["rating"], rows["chosen_ids"], strict=True):
        if not answer:
            reasons.append("empty_answer")
        elif least is not None and rating is None:
            reasons.append("no_rating")
        else:
            reasons.append("low_rating" if least is not None and hundredths(rating) < hundredths(least) else "")
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons)) if reason}
    if counts:
        say(f"{where}: left out of {len(rows)} rows: {', '.join(f'{n} {reason}' for reason, n in counts.items())}")
    if not len(rows) or all(reasons):
        stop(f"{where} has no answer to use{': lower MIN_RATING' if counts else ', make it with more rows'}")
    return rows.select([i for i, reason in enumerate(reasons) if not reason]), counts


def answers_of_source(
    dataset: str, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, max_rows: int = 0
) -> tuple[dict[str, Dataset], Ledger]:
    """Return ({"train", "validation"}: answers, the ledger of rows left out) of a file or hub dataset.

    Validation is its own held-out split or, without one, VALIDATION_SHARE of the rows, by prompt.
    """
    fits = partial(unfit, tokenizer=tokenizer, max_length=max_length)
    source, ledger = open_source(dataset, "", ANSWER_LAYOUTS), Ledger()
    rows = {
        role: list(checked_answers(read, source.layouts[role], role, ledger, fits))
        for role, read in source.splits.items()
    }

    def leave_out(row: dict) -> None:
        ledger.drop("like_validation", "train", [row["number"]], row["prompt"])
        ledger.rows_used -= 1

    parts = divide(rows["train"], rows.get("test", []), "prompt", VALIDATION_SHARE, seed, leave_out)
    if not all(parts.values()):
        left_out = ledger.counts() or "nothing"
        counts = ", ".join(f"{len(part)} for {name}" for name, part in parts.items())
        stop(f"DATASET = {dataset!r} gives too few answers: {counts}; left out: {left_out}")
    for name, part in parts.items():
        stored = [{key: row[key] for key in ("prompt", "messages", "rating")} for row in part[: max_rows or None]]
        answers = Dataset.from_list(stored, features=row_features("sft"))
        parts[name] = as_answers(tokenised(answers, tokenizer, max_length))
    if ledger.entries:
        say("left out: " + ", ".join(f"{count} {reason}" for reason, count in ledger.counts().items()))
    return parts, ledger


def checked_answers(
    read: Callable[[], Iterator[Record]], layout: str, split: str, ledger: Ledger, fits: Callable[..., str]
) -> Iterator[dict]:
    """Yield the rows of a split that pass every check; the ledger records the others. fits: see tokens.unfit."""
    seen = set()
    for number, record in enumerate(read()):
        turns, answer = conversation_of(record, layout)
        text = prompt_text(record.get("prompt"), turns)
        ledger.read(text)
        content = hash((str(turns), answer))
        reason = check_answer(turns, answer) or ("duplicate" if content in seen else fits(turns, (answer,)))
        if reason:
            ledger.drop(reason, split, [number], text)
            continue
        seen.add(content)
        ledger.rows_used += 1
        messages = [*turns, {"role": "assistant", "content": answer}]
        yield {"prompt": text, "messages": messages, "rating": real_number(record.get("rating")), "number": number}


def conversation_of(record: Record, layout: str) -> tuple[list[Message], str]:
    """Return (the turns before the answer, the answer); of a conversation, the last answer."""
    if layout == "completion":
        answer = messages_of(record.get("completion"))
        return prompt_turns(record.get("prompt")), answer[-1]["content"] if answer else ""
    messages = messages_of(record.get("messages"))
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        return messages, ""
    return messages[:-1], messages[-1]["content"]


def check_answer(turns: list[Message], answer: str) -> str:
    """Return the reason to leave out an answer, "" to keep it."""
    if not all(is_unicode(text) for text in [answer, *(turn["content"] for turn in turns)]):
        return "broken_text"
    if not is_text(answer):
        return "empty_answer"
    if not asks(turns):
        return "empty_prompt"
    return "" if all(turn["role"] in ROLES for turn in turns) else "bad_turn"


def divide(
    train: list[dict], held_out: list[dict], key: str, share: float, seed: int, leave_out: Callable[[dict], None]
) -> dict[str, list[dict]]:
    """Return {"train", "validation"}: rows, with near-duplicate texts row[key] on the same side.

    Held-out rows are the validation rows; leave_out(row) gets training rows that resemble them. Without held-out rows,
    `share` of the training rows becomes validation.
    """
    texts = [row[key] for row in [*train, *held_out]]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    of_text = near_duplicate_groups(tqdm(numbers, "comparing prompts"))
    groups = [int(of_text[numbers[text]]) for text in texts]
    if not held_out:
        chosen = split_indices(groups, share, seed)
        return {name: [train[i] for i in rows] for name, rows in zip(("train", "validation"), chosen, strict=True)}
    known = set(groups[len(train) :])
    kept = [row for row, group in zip(train, groups, strict=False) if group not in known]
    for row, group in zip(train, groups, strict=False):
        if group in known:
            leave_out(row)
    return {"train": kept, "validation": held_out}


class AnswerTrainer(training.PortableTrainer, SFTTrainer):
    """trl.SFTTrainer with batches of similar length, which stops at a loss that is not finite.

    evaluation: () -> metrics on validation; called every EVAL_EVERY_STEPS on all processes.
    """

    def __init__(self, evaluation: Callable[[], dict[str, float]], **named: Any):
        super().__init__(**named)
        self.evaluation = evaluation
        lengths = np.array([len(ids) for ids in self.train_dataset["input_ids"]])
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = LengthSampler(lengths, rows_per_step, self.args.seed)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthSampler:
        return self.sampler

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        if not torch.isfinite(loss):  # Trainer would continue
            sys.exit(
                f"the loss is not finite at step {self.state.global_step + 1}: lower LEARNING_RATE or look at the "
                "rows; the last checkpoint is kept"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" not in logs:
            super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return the metrics of `evaluation` as eval_*."""
        metrics = {f"eval_{name}": value for name, value in self.evaluation().items()}
        Trainer.log(self, dict(metrics))  # TRL's log would add and reset the means of training
        return metrics


def answer_trainer(
    model: nn.Module,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    evaluation: Callable[[], dict[str, float]],
) -> AnswerTrainer:
    """Return the trainer for rows of load_answers."""
    args = training.training_arguments(
        run,
        SFTConfig,
        completion_only_loss=True,  # by default TRL also learns the prompts of tokenised rows
        max_length=None,  # the rows fit already
        gradient_checkpointing=False,  # prepare_model has turned it on
    )
    trainer = AnswerTrainer(
        evaluation,
        model=model,
        args=args,
        train_dataset=trl_rows(rows),
        eval_dataset=trl_rows(rows.select([0])),  # Trainer insists on some
        processing_class=tokenizer,
    )
    training.add_step_callback(trainer, run)
    return trainer


def trl_rows(rows: Dataset) -> Dataset:
    """Return the rows as TRL expects tokens: input_ids, and completion_mask with 1 on the answer."""

    def whole(row: dict) -> dict:
        prompt, answer = row["input_ids"], row["chosen_ids"]
        return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}

    return rows.map(whole, remove_columns=rows.column_names, keep_in_memory=True, desc="rows for TRL")


def mean_nll(outputs: dict[str, np.ndarray]) -> float:
    """Return the NLL per answer token in nats, over all tokens. outputs: of forward_pairs."""
    return float(-outputs["logps"][:, 0].sum(dtype=float) / outputs["tokens"][:, 0].sum(dtype=float))


def perplexity_figures(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, object]:
    """Return the content of eval.json.

    perplexity: e^NLL per token, over all tokens. difference: mean over the rows of their NLL per token, after - before,
    with its 95 % interval and two-sided p; verdict: fell (better) | grew | not shown. The two can disagree, since long
    answers weigh more in the perplexity.
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
        f"NLL per token, mean over the answers: {result['difference']:+.4f} {interval}, "
        f"p = {result['p_value']:.2g}: {result['verdict']}"
    )


def write_results(folder: Path, result: dict, record: dict) -> None:
    """Write eval.json, the training curves and the model card."""
    settings = record["settings"]
    write_json(folder / "eval.json", result)
    title = f"NLL per token on {result['rows']} held-out answers: {result['verdict']}"
    names = ("loss", "mean_token_accuracy")
    training_curves(folder, names, {}, title, "mean over the steps since the last log")
    head = (
        f"# {folder.name}\n\n`{settings['MODEL']}` trained on {record['train_rows']} answers of "
        f"`{record['dataset_name']}` (loss on the answers only, learning rate {settings['LEARNING_RATE']}, window "
        f"{record['max_length']} tokens)."
    )
    write_text(folder / "README.md", f"{head}\n\n{format_result(result)}\n")
