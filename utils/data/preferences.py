"""Turn the records of a source into checked pairs, with a reason for every row that is left out."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.data.sources import ATTRIBUTES, HIGHEST_ATTRIBUTE, Record, head_of
from utils.runs import write_lines

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Pair = dict[str, Any]  # prompt, turns (messages before the answer), answers, ratings, rows (in the source)
RATINGS = {  # integer weights of the five attributes and their divisor, since sums of 0.2 are inexact in floats
    "average": ((1, 1, 1, 1, 1), 5),
    "no_verbosity": ((1, 1, 1, 1, 0), 4),
    "no_verbosity_no_complexity": ((1, 1, 1, 0, 0), 3),
    "goodness": ((65, 80, 45, 0, 0), 100),
    "helpfulness": ((1, 0, 0, 0, 0), 1),
    "nvidia_70b": ((65, 80, 45, 55, -40), 100),  # the scores of NVIDIA's 70B and 340B reward models
    "nvidia_340b": ((30, 74, 46, 47, -33), 100),
}
SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \t\r]*")
TURN_MARKER = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)[ \t\r]*(?:\n|$)")
RATING_COLUMNS = (  # of sources that have pairs
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
)


class Ledger:
    """The rows and pairs that are left out, with reasons: rows read = rows used + rows in the ledger."""

    def __init__(self, count_rows: bool = False) -> None:
        self.count_rows = count_rows  # counts() counts rows, for sources with many rows per entry
        self.entries: list[dict[str, Any]] = []
        self.rows_read = 0
        self.rows_used = 0
        self.prompts: set[int] = set()  # hashes

    def read(self, prompt: object) -> None:
        """Count a row of the source."""
        self.rows_read += 1
        self.prompts.add(hash(str(prompt)))

    def drop(self, reason: str, split: str, rows: Sequence[int], prompt: object) -> None:
        """Record that `rows` of a split (numbers from 0) are left out."""
        start = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
        start = start[:80].encode(errors="replace").decode()  # a lone surrogate cannot be written as UTF-8
        self.entries.append({"reason": reason, "split": split, "rows": list(rows), "prompt": start})

    def counts(self) -> dict[str, int]:
        """Return {reason: entries}; an entry is a pair for ties and equal answers, otherwise a row."""
        numbers: Counter[str] = Counter()
        for entry in self.entries:
            numbers[entry["reason"]] += len(entry["rows"]) if self.count_rows else 1
        return dict(sorted(numbers.items()))

    def totals(self) -> dict[str, int]:
        """Return the numbers of rows read, used and dropped, and of prompts; assert read = used + dropped."""
        dropped = sum(len(entry["rows"]) for entry in self.entries)
        assert self.rows_read == self.rows_used + dropped, (self.rows_read, self.rows_used, dropped)
        counts = {"rows_read": self.rows_read, "rows_used": self.rows_used, "rows_dropped": dropped}
        return {**counts, "prompts": len(self.prompts)}

    def write(self, path: Path) -> None:
        write_lines(path, self.entries)


def chat_turns(prompt: str) -> list[Message]:
    """Return a HelpSteer prompt as chat turns, split at `<extra_id_1>User` and `<extra_id_1>Assistant`.

    To a tokenizer the markers are ordinary text. Empty turns are dropped, and so are assistant turns at the end. A
    prompt without markers stays unchanged.
    """
    first, *rest = TURN_MARKER.split(prompt)
    if not rest:
        return [{"role": "user", "content": prompt}] if prompt.strip() else []
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    messages = [{"role": who.lower(), "content": text.strip("\r\n")} for who, text in turns if text.strip()]
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def asks(turns: list[Message]) -> bool:
    """Return True if the last turn is the user's, so that an answer can follow."""
    return bool(turns) and turns[-1]["role"] == "user"


def dialogue(text: object) -> list[Message]:
    """Return the messages of a conversation in one text (Anthropic/hh-rlhf), [] for any other text."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    _, *pieces = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": roles[who], "content": content.strip()} for who, content in turns]


def whole_number(value: object) -> int | None:
    """Return a cell such as 3, 3.0 or "3" as an integer, None for anything else."""
    number = real_number(value)
    return int(number) if number is not None and number == int(number) else None


def real_number(value: object) -> float | None:
    """Return a cell as a finite number, None for text, NaN, booleans and missing values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def hundredths(rating: float) -> int:
    """Return a rating in hundredths, in which gaps are compared."""
    return round(rating * 100)


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_unicode(text: str) -> bool:
    """Return False for a lone surrogate (JSON allows "\\ud800"), which cannot be stored or tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(side: object) -> list[Message]:
    """Return the messages of a cell that holds a text (one answer) or a list of messages, [] for any other cell.

    Empty messages are dropped, except the last one, which may be the answer.
    """
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    if not isinstance(side, (list, tuple)):
        return []
    if not all(isinstance(m, dict) and is_text(m.get("role")) and isinstance(m.get("content"), str) for m in side):
        return []
    return [{"role": m["role"], "content": m["content"]} for m in side if is_text(m["content"]) or m is side[-1]]


def prompt_turns(prompt: object) -> list[Message]:
    """Return the turns before the answer, from a text or a list of messages; markers in user messages split them."""
    if isinstance(prompt, str):
        return chat_turns(prompt)
    messages = [message for message in messages_of(prompt) if is_text(message["content"])]
    turns = [chat_turns(message["content"]) if message["role"] == "user" else [message] for message in messages]
    return [turn for group in turns for turn in group]


def prompt_text(prompt: object, turns: list[Message]) -> str:
    """Return the prompt as one text: the text of the source, or else its turns.

    The system turn is left out: if all rows share one, all prompts would be near duplicates.
    """
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    turns = [message for message in turns if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in turns)


def with_persona(turns: list[Message], system_prompt: str) -> list[Message]:
    """Return the turns with system_prompt as their system turn, unless it is empty."""
    if not system_prompt:
        return turns
    return [{"role": "system", "content": system_prompt}, *(m for m in turns if m["role"] != "system")]


def finished_row(pair: Pair, system_prompt: str) -> Record:
    """Return the row to store: two complete conversations, with system_prompt as their system turn."""
    turns = with_persona(pair["turns"], system_prompt)
    attributes = pair.get("attributes", (None, None))
    chosen, rejected = ([*turns, {"role": "assistant", "content": answer}] for answer in pair["answers"])
    return {
        "prompt": pair["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "chosen_rating": pair["ratings"][0],
        "rejected_rating": pair["ratings"][1],
        "chosen_attributes": attributes[0],
        "rejected_attributes": attributes[1],
    }


def checked_pairs(
    read: Callable[[], Iterator[Record]],
    layout: str,
    rating: str,
    split: str,
    min_rating_gap: float,
    ledger: Ledger,
    unfit: Callable[[list[Message], tuple[str, str]], str] | None = None,
) -> Iterator[Pair]:
    """Yield the pairs of one split that pass every check; the rest goes to the ledger.

    read: opens the records again at each call. layout: a key of utils.data.sources.LAYOUTS. unfit: returns why
    turns and answers cannot be tokenised, "" if they can. A pair has the chosen answer first.
    """
    if layout == "attributes":
        pairs = pairs_of_attributes(read, rating, split, ledger)
    else:
        pairs = pairs_of_records(read, layout, split, ledger)
    seen = set()
    for pair in pairs:
        content = hash((str(pair["turns"]), *pair["answers"]))
        reason = check_pair(pair, min_rating_gap) or ("duplicate" if content in seen else "")
        reason = reason or (unfit(pair["turns"], pair["answers"]) if unfit else "")
        if reason:
            ledger.drop(reason, split, pair["rows"], pair["prompt"])
        else:
            seen.add(content)
            ledger.rows_used += len(pair["rows"])
            yield pair


def pairs_of_attributes(
    read: Callable[[], Iterator[Record]], rating: str, split: str, ledger: Ledger
) -> Iterator[Pair]:
    """Yield one pair per prompt, from a source with one answer per record.

    The first pass counts the answers of each prompt, so that the second needs to hold unfinished prompts only.
    """
    sizes = Counter(hash(record["prompt"]) for record in read() if not check_attribute_row(record))
    waiting: dict[int, list[dict[str, Any]]] = {}
    for row, record in enumerate(read()):
        ledger.read(record.get("prompt"))
        reason = check_attribute_row(record)
        if reason:
            ledger.drop(reason, split, [row], record.get("prompt", ""))
            continue
        key = hash(record["prompt"])
        grades = [whole_number(record[name]) for name in ATTRIBUTES]
        group = waiting.setdefault(key, [])
        group.append({"row": row, "prompt": record["prompt"], "response": record["response"], "attributes": grades})
        if len(group) == sizes[key]:
            pair = best_against_worst(waiting.pop(key), rating, split, ledger)
            if pair:
                yield pair


def check_attribute_row(record: Record) -> str:
    """Return why a row of the attribute layout cannot be used, "" if it can."""
    if not is_text(record.get("prompt")) or not asks(prompt_turns(record["prompt"])):
        return "empty_prompt"
    if not is_text(record.get("response")):
        return "empty_answer"
    grades = [whole_number(record.get(name)) for name in ATTRIBUTES]
    return "" if all(grade is not None and 0 <= grade <= HIGHEST_ATTRIBUTE for grade in grades) else "bad_attribute"


def best_against_worst(group: list[dict[str, Any]], rating: str, split: str, ledger: Ledger) -> Pair | None:
    """Return the pair of best and worst answer to one prompt, or None with an entry in the ledger.

    group: row, prompt, response and attributes of each answer, in the source's order; the first of equals counts.
    """
    weights, divisor = RATINGS[rating]
    seen, answers = set(), []
    for answer in group:
        content = (answer["response"], *answer["attributes"])
        if content in seen:
            ledger.drop("duplicate", split, [answer["row"]], answer["prompt"])
        else:
            seen.add(content)
            answers.append(answer)
    scores = [sum(w * grade for w, grade in zip(weights, answer["attributes"], strict=True)) for answer in answers]
    if max(scores) == min(scores):
        reason = "unpaired" if len(answers) == 1 else "tie"
        ledger.drop(reason, split, [answer["row"] for answer in answers], group[0]["prompt"])
        return None
    best, worst = answers[scores.index(max(scores))], answers[scores.index(min(scores))]
    for answer in answers:
        if answer is not best and answer is not worst:
            ledger.drop("between_best_and_worst", split, [answer["row"]], answer["prompt"])
    return {
        "prompt": best["prompt"],
        "turns": prompt_turns(best["prompt"]),
        "answers": (best["response"], worst["response"]),
        "ratings": (max(scores) / divisor, min(scores) / divisor),
        "attributes": (best["attributes"], worst["attributes"]),
        "rows": [best["row"], worst["row"]],
    }


def pairs_of_records(read: Callable[[], Iterator[Record]], layout: str, split: str, ledger: Ledger) -> Iterator[Pair]:
    """Yield the pairs of a source with one pair per record."""
    rated = rating_columns(head_of(read())) if layout == "pairs" else ()
    for row, record in enumerate(read()):
        pair = pair_of_strength(record) if layout == "strength" else pair_of_record(record, rated)
        if isinstance(pair, str):
            prompt = record.get("prompt") or record.get("context") or record.get("chosen")
            ledger.read(prompt)
            ledger.drop(pair, split, [row], prompt)
        else:
            ledger.read(pair["prompt"])
            yield {**pair, "rows": [row], "subset": str(record.get("subset") or "")}


def pair_of_record(record: Record, rated: tuple[str, ...]) -> Pair | str:
    """Return the pair in a record of the `pairs` layout, or why there is none. rated: see rating_columns."""
    prompt, sides = record.get("prompt"), [record.get("chosen"), record.get("rejected")]
    if not prompt and all(map(dialogue, sides)):
        sides = [dialogue(side) for side in sides]
    conversations = [messages_of(side) for side in sides]
    for side, messages in zip(sides, conversations, strict=True):
        if side and not messages:
            return "bad_messages"
        if not messages or messages[-1]["role"] != "assistant" or not is_text(messages[-1]["content"]):
            return "empty_answer"
    turns, rejected_turns = (prompt_turns(messages[:-1]) for messages in conversations)
    if turns != rejected_turns:
        return "prompts_differ"
    turns = turns or prompt_turns(prompt)  # both sides may be answers only
    if not asks(turns):
        return "empty_prompt"
    ratings = tuple(real_number(record.get(name)) for name in rated) or (None, None)
    if rated and None in ratings:
        return "bad_rating"
    answers = tuple(messages[-1]["content"] for messages in conversations)
    return {"prompt": prompt_text(prompt, turns), "turns": turns, "answers": answers, "ratings": ratings}


def rating_columns(head: Iterable[Record]) -> tuple[str, ...]:
    """Return the names of the two rating columns of the first records, () if there are none.

    Columns without a number do not count: processed rows without ratings have nulls there.
    """
    head = list(head)
    for names in RATING_COLUMNS:
        if all(any(real_number(record.get(name)) is not None for record in head) for name in names):
            return names
    return ()


def pair_of_strength(record: Record) -> Pair | str:
    """Return the pair in a record with a signed strength (positive: the second answer is better), or why not."""
    prompt = record.get("prompt", record.get("context"))
    turns = prompt_turns(prompt)
    first, second = (record.get(f"response_{i}", record.get(f"response{i}")) for i in (1, 2))
    strength = whole_number(record.get("preference_strength", record.get("overall_preference")))
    if not asks(turns):
        return "empty_prompt"
    if not is_text(first) or not is_text(second):
        return "empty_answer"
    if strength is None or abs(strength) > 3:
        return "bad_rating"
    answers = (second, first) if strength > 0 else (first, second)
    ratings = (float(abs(strength)), 0.0)
    return {"prompt": prompt_text(prompt, turns), "turns": turns, "answers": answers, "ratings": ratings}


def check_pair(pair: Pair, min_rating_gap: float) -> str:
    """Return why a pair cannot be used, "" if it can."""
    chosen, rejected = pair["answers"]
    better, worse = pair["ratings"]
    if not all(map(is_unicode, [pair["prompt"], chosen, rejected, *(turn["content"] for turn in pair["turns"])])):
        return "broken_text"
    if better is not None and math.isclose(better, worse, rel_tol=1e-9, abs_tol=1e-9):  # 3.4 is not 17 / 5 in floats
        return "tie"
    if chosen == rejected:
        return "equal_answers"
    if better is not None and better < worse:
        return "chosen_rated_lower"
    if min_rating_gap and hundredths(better) - hundredths(worse) < hundredths(min_rating_gap):
        return "small_gap"
    return ""
