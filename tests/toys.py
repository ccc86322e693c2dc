"""A toy problem for every trainer of pairs: one token decides, and it is learned in a minute; a sampled answer."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from utils.models.generation import Answer
from utils.models.shared_prompt import PairCollator, Prompt
from utils.runs import Run
from utils.training.reinforce import Sample
from utils.training.trainer import PairTrainer

MARKS = [0, 0, 0]  # ids whose embeddings vectors take the place of


def toy_rows(count: int, seed: int = 0, guidance: str = "none", both: bool = False) -> Dataset:
    """Pairs that one token decides: 99 stands somewhere in the chosen answer, 98 in the rejected one.

    guidance: none, text (three tokens behind the prompt) or embedding (marks behind it). both: in a second prompt.
    """
    random = np.random.default_rng(seed)
    extra = {"none": [], "text": [91, 92, 93], "embedding": MARKS}[guidance]
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
            row |= {"guided_ids": prompt + extra, "guided_at": at}
        else:
            prompt, row["vectors_at"] = prompt + extra, at
        row |= {"input_ids": prompt + [2] * (16 - len(prompt))}
        row |= {"attention_mask": [1] * len(prompt) + [0] * (16 - len(prompt))}
        rows.append(row)
    return Dataset.from_list(rows)


TRAINING = {  # the constants that every training shares: a few steps
    **{"EPOCHS": 3, "MAX_STEPS": 5, "BATCH_SIZE": 4, "ACCUMULATION": 1, "LEARNING_RATE": 3e-3},
    **{"SCHEDULE": "linear", "WARMUP_SHARE": 0.0, "SEED": 0, "REPORT_TO": "none"},
    **{"LOG_EVERY_STEPS": 1, "EVAL_EVERY_STEPS": 0, "SAVE_EVERY_STEPS": 0},
}


def toy_run(folder: Path, **settings: object) -> Run:
    """Open a run on the CPU in float32; settings: constants of TRAINING in lower case, with other values."""
    settings = {name.upper(): value for name, value in settings.items()}
    return Run(folder, TRAINING | settings, device="cpu", precision="fp32")


def toy_trainer(module, losses, rows, folder, rates=None, **settings) -> PairTrainer:
    """Return a PairTrainer on toy rows."""
    splits = {"train": rows, "validation": rows}
    return PairTrainer(module, splits, PairCollator(2, 8), losses, toy_run(folder, **settings), lambda *_: {}, rates)


def sample_of(ids: list[int], number: int = 0, ended: bool = True, **more: float) -> Sample:
    """A sampled answer of these tokens to `Hi`."""
    answer = Answer(Prompt([1, 4, 5]), ids, "text", ended)
    return Sample(number, [{"role": "user", "content": "Hi"}], answer, 0.0, 0.0, 0.0, **more)
