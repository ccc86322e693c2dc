"""Answers of a policy to the prompts of a processed folder, kept as they come, and the pairs that are made of them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from extras.lib.sft import load_answers
from utils.data.preferences import Ledger, Message, finished_row, is_text
from utils.data.sources import Record
from utils.data.tokens import end_of_turn
from utils.models.shared_prompt import batches_by_length
from utils.runs import write_text

CUT_LETTER = "\ufffd"  # what the bytes of half a letter are decoded to


@dataclass
class Asked:
    """A prompt that the policy is to answer, and where it comes from."""

    number: int  # among all that are asked: decides the answer's random numbers
    split: str
    row: int  # in its split
    prompt: str
    turns: list[Message]
    human: str  # the answer in the data


@dataclass
class Written:
    """What the policy answered to one prompt: texts, which of them came to an end of turn, and rewards where ranked."""

    number: int
    texts: list[str]
    ended: list[bool]
    rewards: list[float]


def asked_of(data_dir: str, splits: tuple[str, ...], max_rows: int, ledger: Ledger) -> list[Asked]:
    """The prompts of the splits, each conversation once, with the best rated answer to it (the first of equal ones)."""
    found = []
    for split in splits:
        best = {}
        rows = load_answers(data_dir, split, max_rows)
        for row in rows.select_columns(["row", "prompt", "messages", "rating"]):
            ledger.read(row["prompt"])
            key, rating = str(row["messages"][:-1]), -np.inf if row["rating"] is None else row["rating"]
            if key not in best:
                best[key] = (rating, row)
                continue
            left = row
            if rating > best[key][0]:
                left, best[key] = best[key][1], (rating, row)
            ledger.drop("same_prompt", split, [left["row"]], left["prompt"])
        for _, row in best.values():
            *turns, human = row["messages"]
            found.append(Asked(len(found), split, row["row"], row["prompt"], turns, human["content"]))
    return found


def in_batches(asked: list[Asked], lengths: list[int], size: int) -> list[list[Asked]]:
    """The prompts in batches of like length, the longest first: what does not fit in memory shows at once.

    Depends on the prompts alone, so a resumed run makes the same batches; batches decide the last digits.
    """
    return [[asked[i] for i in batch] for batch in batches_by_length(lengths, math.inf, size)]


def read_written(path: Path, batches: list[list[Asked]]) -> dict[int, Written]:
    """{number: answers} of the batches that an earlier start has finished; the lines of others are dropped.

    A line that was cut off while it was written, and its batch, are made again.
    """
    if not path.exists():
        return {}
    lines = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines() knows nine other ends
        try:
            written = Written(**json.loads(line))
        except ValueError:
            break  # the end, or half a line: nothing was written behind it
        lines[written.number] = written
    done = [one.number for batch in batches if all(one.number in lines for one in batch) for one in batch]
    write_text(path, "".join(as_line(lines[number]) for number in done))
    return {number: lines[number] for number in done}


def append_written(path: Path, batch: list[Written]) -> None:
    """Add the answers of a batch to the file, in one piece."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(as_line(written) for written in batch))


def as_line(written: Written) -> str:
    return json.dumps(vars(written), ensure_ascii=False) + "\n"


def whole_letters(text: str, ended: bool) -> str:
    """The text of an answer; one that was cut within a letter loses that half."""
    return text if ended else text.rstrip(CUT_LETTER).rstrip()


def self_aligned(asked: Asked, written: Written) -> dict | str:
    """The pair of the human answer, chosen, and the model's, or the reason for none; see `pairs_of`."""
    if not is_text(written.texts[0]):
        return "empty_answer"
    if written.texts[0].strip() == asked.human.strip():
        return "equal_answers"
    return {"answers": (asked.human, written.texts[0]), "ratings": (None, None), "ended": (True, written.ended[0])}


def ranked(asked: Asked, written: Written) -> dict | str:
    """The pair of the answers with the highest and the lowest reward, or the reason for none; see `pairs_of`."""
    places = [i for i, text in enumerate(written.texts) if is_text(text)]
    if not places:
        return "empty_answer"
    best = max(places, key=lambda i: written.rewards[i])
    worst = min(places, key=lambda i: written.rewards[i])
    if len({written.texts[i].strip() for i in places}) < 2:
        return "equal_answers"
    if written.rewards[best] == written.rewards[worst]:
        return "tie"
    return {
        "answers": (written.texts[best], written.texts[worst]),
        "ratings": (written.rewards[best], written.rewards[worst]),
        "ended": (written.ended[best], written.ended[worst]),
    }


MODES: dict[str, Callable[[Asked, Written], dict | str]] = {"self_align": self_aligned, "ranked": ranked}


def pairs_of(
    asked: list[Asked], written: dict[int, Written], mode: str, ledger: Ledger
) -> dict[str, tuple[list[Record], list[tuple[bool, bool]]]]:
    """{split: (rows as they are stored, for each whether chosen and rejected came to their end)}.

    Prompts without a pair are in the ledger.
    """
    found = {one.split: ([], []) for one in asked}
    for one in asked:
        pair = MODES[mode](one, written[one.number])
        if isinstance(pair, str):
            ledger.drop(pair, one.split, [one.row], one.prompt)
            continue
        ledger.rows_used += 1
        rows, ended = found[one.split]
        rows.append(finished_row({**pair, "prompt": one.prompt, "turns": one.turns}, ""))
        ended.append(pair["ended"])
    return found


def left_open(rows: Dataset, ended: list[tuple[bool, bool]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return tokenised pairs whose answers have no end of turn, and are marked, where generation cut them.

    The chat template gives one to every text, and to learn it there is to learn to stop in mid-sentence.
    """
    closing, sides = len(end_of_turn(tokenizer)), ("chosen", "rejected")

    def open_cut(row: dict, place: int) -> dict:
        for side, whole in zip(sides, ended[place], strict=True):
            if not whole and not row[f"{side}_cut"]:
                row[f"{side}_ids"] = row[f"{side}_ids"][: len(row[f"{side}_ids"]) - closing]
                row[f"{side}_cut"] = True
        row["equal_after_cut"] = row["chosen_ids"] == row["rejected_ids"]
        return row

    if not len(rows):
        return rows
    return rows.map(
        open_cut, with_indices=True, features=rows.features, keep_in_memory=True, desc="opening cut answers"
    )


def figures_of(written: dict[int, Written]) -> dict[str, float]:
    """What was written: number of answers, shares of empty and of cut ones, mean rewards where there are some.

    reward_best and reward_worst are means over the prompts.
    """
    texts = [text for one in written.values() for text in one.texts]
    ended = [value for one in written.values() for value in one.ended]
    found = {
        "answers": len(texts),
        "empty_share": float(np.mean([not is_text(text) for text in texts])),
        "cut_share": float(1 - np.mean(ended)),
    }
    rewards = [one.rewards for one in written.values() if one.rewards]
    if rewards:
        array = np.array(rewards)  # [prompts, answers]
        found |= {"reward_mean": float(array.mean())}
        found |= {"reward_best": float(array.max(axis=1).mean()), "reward_worst": float(array.min(axis=1).mean())}
    return found
