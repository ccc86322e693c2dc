"""A toy problem for every trainer of pairs: one token decides, and it is learned in a minute; a sampled answer."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments

from utils.models.generation import Answer
from utils.models.shared_prompt import PairCollator
from utils.runs import Run
from utils.training.reinforce import Sample
from utils.training.trainer import PairTrainer, training_arguments

MARKS = [0, 0, 0]  # ids whose embeddings vectors take the place of


def toy_rows(count: int, seed: int = 0, guidance: str = "none", both: bool = False) -> Dataset:
    """Pairs that one token decides: 99 stands somewhere in the chosen answer, 98 in the rejected one.

    guidance: none, text (three tokens behind the prompt) or embedding (marks behind it). both: in a second prompt.
    """
    random = np.random.default_rng(seed)
    said = {"none": [], "text": [91, 92, 93], "embedding": MARKS}[guidance]
    rows = []
    for i in range(count):
        prompt = random.integers(10, 90, size=random.integers(3, 9)).tolist()
        answers = [random.integers(10, 90, size=random.integers(2, 9)).tolist() for _ in range(2)]
        for answer, token in zip(answers, (99, 98), strict=True):
            answer[random.integers(len(answer))] = token
        row = {"row": i, "chosen_ids": answers[0], "rejected_ids": answers[1]}
        row |= {"chosen_rating": None, "rejected_rating": None}
        at = len(prompt) if guidance == "embedding" else -1
        if both:
            row |= {"guided_ids": prompt + said, "guided_at": at}
        else:
            prompt, row["vectors_at"] = prompt + said, at
        row |= {"input_ids": prompt + [2] * (16 - len(prompt))}
        row |= {"attention_mask": [1] * len(prompt) + [0] * (16 - len(prompt))}
        rows.append(row)
    return Dataset.from_list(rows)


def toy_arguments(
    folder: Path, kind: type = TrainingArguments, batch: int = 4, accumulation: int = 1, **options: object
):
    """Training arguments for a few steps on the CPU in float32."""
    options = {"max_steps": 5, "learning_rate": 3e-3, "save_steps": 0, "eval_steps": 0, "logging_steps": 1} | options
    return training_arguments(
        kind, Path(folder), torch.device("cpu"), "fp32", per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, report_to="none", seed=0, **options,
    )  # fmt: skip


def toy_trainer(module, losses, rows, folder, rates=None, **options) -> PairTrainer:
    """PairTrainer over toy rows."""
    args, run = toy_arguments(folder, **options), Run(folder, {"SEED": 0})
    return PairTrainer(module, args, rows, PairCollator(2, 8), losses, run, dict, rates)


def sample_of(ids: list[int], number: int = 0, ended: bool = True, **more: float) -> Sample:
    """A sampled answer of these tokens to `Hi`."""
    answer = Answer([1, 4, 5], ids, "text", ended)
    return Sample(number, [{"role": "user", "content": "Hi"}], answer, 0.0, 0.0, 0.0, **more)
