"""A policy's answers to the prompts of a processed folder, saved as they come, and the pairs made from them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from extras.lib.sft import load_answers
from utils.data.preferences import Ledger, Message, finished_row, is_text
from utils.data.sources import Record
from utils.data.tokens import end_of_turn, fitted_prompt
from utils.models.shared_prompt import batches_by_length
from utils.runs import write_text


@dataclass
class PromptRow:
    """A prompt for the policy."""

    number: int  # over all splits; seeds its answers
    split: str
    row: int  # in its split
    text: str
    turns: list[Message]
    human: str  # the answer in the data
    ids: list[int]


@dataclass
class Answers:
    """The policy's answers to one prompt: texts, whether each one ended, and rewards if ranked."""

    number: int  # of the prompt
    texts: list[str]
    ended: list[bool]
    rewards: list[float]


def load_prompts(
    data_dir: str, max_rows: int, tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger
) -> list[PromptRow]:
    """Return each conversation of train and validation once, with its best rated answer (the first of equal ones)."""
    prompts: list[PromptRow] = []
    for split in ("train", "validation"):
        best: dict[str, tuple[float, dict]] = {}
        rows = load_answers(data_dir, split, max_rows)
        for row in rows.select_columns(["row", "prompt", "messages", "rating"]):
            ledger.read(row["prompt"])
            key, rating = str(row["messages"][:-1]), -np.inf if row["rating"] is None else row["rating"]
            if key not in best:
                best[key] = (rating, row)
                continue
            worse = row
            if rating > best[key][0]:
                worse, best[key] = best[key][1], (rating, row)
            ledger.drop("same_prompt", split, [worse["row"]], worse["prompt"])
        for _, row in best.values():
            *turns, human = row["messages"]
            ids = fitted_prompt(tokenizer, turns, max_length)
            prompts.append(PromptRow(len(prompts), split, row["row"], row["prompt"], turns, human["content"], ids))
    return prompts


def make_batches(prompts: list[PromptRow], size: int) -> list[list[PromptRow]]:
    """Return batches of prompts with similar lengths, longest first, so that a lack of memory shows at once.

    They depend on the prompts only: a resumed run has the same batches, and so the same rounding.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    return [[prompts[i] for i in batch] for batch in batches_by_length(lengths, math.inf, size)]


def read_answers(path: Path, batches: list[list[PromptRow]]) -> dict[int, Answers]:
    """Return {number: answers} of the complete batches in the file, and remove all other lines from it."""
    if not path.exists():
        return {}
    lines = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines() also splits at U+2028
        try:
            answers = Answers(**json.loads(line))
        except ValueError:
            break  # the end, or a line cut off by a kill
        lines[answers.number] = answers
    complete = [batch for batch in batches if all(prompt.number in lines for prompt in batch)]
    kept = {prompt.number: lines[prompt.number] for batch in complete for prompt in batch}
    write_text(path, as_lines(list(kept.values())))
    return kept


def append_answers(path: Path, batch: list[Answers]) -> None:
    """Append the answers of a batch to the file in a single write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(as_lines(batch))


def as_lines(batch: list[Answers]) -> str:
    return "".join(json.dumps(vars(answers), ensure_ascii=False) + "\n" for answers in batch)


def whole_characters(text: str, ended: bool) -> str:
    """Return an answer; if it was cut, without an incomplete UTF-8 character at its end, which decodes to U+FFFD."""
    return text if ended else text.rstrip("\ufffd").rstrip()


def self_aligned(prompt: PromptRow, answers: Answers) -> dict[str, Any] | str:
    """Return the pair of the human answer and the model's, or the reason for none; see `pairs_of`."""
    (text,), (ended,) = answers.texts, answers.ended
    if not is_text(text):
        return "empty_answer"
    if text.strip() == prompt.human.strip():
        return "equal_answers"
    return {"answers": (prompt.human, text), "ratings": (None, None), "ended": (True, ended)}


def ranked(prompt: PromptRow, answers: Answers) -> dict[str, Any] | str:
    """Return the pair with the highest and the lowest reward, or the reason for none; see `pairs_of`."""
    texts, rewards, ended = answers.texts, answers.rewards, answers.ended
    places = [i for i, text in enumerate(texts) if is_text(text)]
    if not places:
        return "empty_answer"
    if len({texts[i].strip() for i in places}) < 2:
        return "equal_answers"
    best, worst = max(places, key=lambda i: rewards[i]), min(places, key=lambda i: rewards[i])
    if rewards[best] == rewards[worst]:
        return "tie"
    columns = {"answers": texts, "ratings": rewards, "ended": ended}
    return {name: (values[best], values[worst]) for name, values in columns.items()}


MODES: dict[str, Callable[[PromptRow, Answers], dict[str, Any] | str]] = {"self_align": self_aligned, "ranked": ranked}


def pairs_of(
    prompts: list[PromptRow], answers: dict[int, Answers], mode: str, ledger: Ledger
) -> dict[str, tuple[list[Record], list[tuple[bool, bool]]]]:
    """Return {split: (rows, whether chosen and rejected ended in each)}; prompts without a pair go to the ledger."""
    pairs: dict[str, tuple[list, list]] = {prompt.split: ([], []) for prompt in prompts}
    for prompt in prompts:
        pair = MODES[mode](prompt, answers[prompt.number])
        if isinstance(pair, str):
            ledger.drop(pair, prompt.split, [prompt.row], prompt.text)
            continue
        ledger.rows_used += 1
        rows, ended = pairs[prompt.split]
        rows.append(finished_row({**pair, "prompt": prompt.text, "turns": prompt.turns}, ""))
        ended.append(pair["ended"])
    return pairs


def remove_end_of_cut_answers(
    rows: Dataset, ended: list[tuple[bool, bool]], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return tokenised pairs without an end of turn after answers that generation cut, and mark these as cut.

    The chat template adds one to every answer. Learned there, it teaches the model to stop in mid-sentence.
    """
    closing = len(end_of_turn(tokenizer))

    def open_cut(row: dict, place: int) -> dict:
        for side, complete in zip(("chosen", "rejected"), ended[place], strict=True):
            if not complete and not row[f"{side}_cut"]:
                row[f"{side}_ids"] = row[f"{side}_ids"][: len(row[f"{side}_ids"]) - closing]
                row[f"{side}_cut"] = True
        row["equal_after_cut"] = row["chosen_ids"] == row["rejected_ids"]
        return row

    options = {"with_indices": True, "features": rows.features, "keep_in_memory": True}
    return rows.map(open_cut, desc="opening cut answers", **options) if len(rows) else rows


def figures_of(answers: dict[int, Answers]) -> dict[str, float]:
    """Return the number of answers, the shares of empty and cut ones, and the mean rewards if ranked.

    reward_best and reward_worst are means over the prompts.
    """
    texts = [text for entry in answers.values() for text in entry.texts]
    ended = [value for entry in answers.values() for value in entry.ended]
    empty_share = float(np.mean([not is_text(text) for text in texts]))
    figures = {"answers": len(texts), "empty_share": empty_share, "cut_share": float(1 - np.mean(ended))}
    rewards = np.array([entry.rewards for entry in answers.values() if entry.rewards])  # [prompts, answers]
    if len(rewards):
        figures |= {"reward_mean": float(rewards.mean())}
        figures |= {"reward_best": float(rewards.max(axis=1).mean())}
        figures |= {"reward_worst": float(rewards.min(axis=1).mean())}
    return figures
