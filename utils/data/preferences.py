"""Turn the records of a source into checked pairs, with a reason for every row that is left out."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from utils.data.sources import ATTRIBUTES, HIGHEST_ATTRIBUTE, Record, head_of
from utils.runs import write_lines

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}
RATINGS = {  # whole weights of the five attributes and their divisor: sums of 0.2 steps do not compare in floats
    "average": ((1, 1, 1, 1, 1), 5),
    "no_verbosity": ((1, 1, 1, 1, 0), 4),
    "no_verbosity_no_complexity": ((1, 1, 1, 0, 0), 3),
    "goodness": ((65, 80, 45, 0, 0), 100),
    "helpfulness": ((1, 0, 0, 0, 0), 1),
    "nvidia_70b": ((65, 80, 45, 55, -40), 100),  # the scalar scores of NVIDIA's 70B and 340B reward models
    "nvidia_340b": ((30, 74, 46, 47, -33), 100),
}
SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \t\r]*")
TURN_MARKER = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)[ \t\r]*(?:\n|$)")
PAIR_RATINGS = (  # names of the two rating columns in sources that have pairs
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
)


class Ledger:
    """Every row or pair that is left out, with its reason, so that rows read = rows used + rows in here."""

    def __init__(self, count_rows: bool = False):
        self.count_rows = count_rows  # for sources in which an entry has many rows: counts() counts these
        self.entries = []
        self.rows_read = 0
        self.rows_used = 0
        self.prompts = set()  # hashes of the prompts read

    def read(self, prompt: object) -> None:
        """Count a row of the source."""
        self.rows_read += 1
        self.prompts.add(hash(str(prompt)))

    def drop(self, reason: str, split: str, rows: Sequence[int], prompt: object) -> None:
        """Note that the source's `rows` (numbers from 0, within `split`) are left out."""
        start = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
        start = start[:80].encode(errors="replace").decode()  # half a surrogate pair cannot be written as UTF-8
        self.entries.append({"reason": reason, "split": split, "rows": list(rows), "prompt": start})

    def counts(self) -> dict[str, int]:
        """Entries by reason: pairs for ties and equal answers, rows for what was left out by itself."""
        found = Counter()
        for entry in self.entries:
            found[entry["reason"]] += len(entry["rows"]) if self.count_rows else 1
        return dict(sorted(found.items()))

    def totals(self) -> dict[str, int]:
        """Rows read, used and left out; an assertion holds the books: read = used + left out."""
        dropped = sum(len(entry["rows"]) for entry in self.entries)
        assert self.rows_read == self.rows_used + dropped, (self.rows_read, self.rows_used, dropped)
        counts = {"rows_read": self.rows_read, "rows_used": self.rows_used, "rows_dropped": dropped}
        return {**counts, "prompts": len(self.prompts)}

    def write(self, path: Path) -> None:
        write_lines(path, self.entries)


def chat_turns(prompt: str) -> list[Message]:
    """HelpSteer's prompt as chat turns: the markers `<extra_id_1>User` and `<extra_id_1>Assistant` begin one each.

    They are ordinary text to a tokenizer. A turn without text is left out; the list ends with a user turn
    wherever there is one. A prompt without markers stays as it is to the letter.
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
    """Whether turns end in one of the user, which an answer can follow."""
    return bool(turns) and turns[-1]["role"] == "user"


def dialogue(text: object) -> list[Message]:
    """The messages of a whole conversation in one text, as in Anthropic/hh-rlhf; [] for any other text."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    _, *parts = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def whole_number(value: object) -> int | None:
    """The integer that a cell means (3, 3.0, "3"), None for anything else."""
    number = real_number(value)
    return int(number) if number is not None and number == int(number) else None


def real_number(value: object) -> float | None:
    """The finite number that a cell means, None for text, NaN, true and missing values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # OverflowError: an integer of 400 digits
        return None
    return number if math.isfinite(number) else None


def hundredths(rating: float) -> int:
    """A rating in whole hundredths: gaps are compared in these."""
    return round(rating * 100)


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair (JSON allows "\\ud800"): it can be neither stored nor tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(side: object) -> list[Message]:
    """Chat messages of a cell that is a text (one answer) or a list of messages; [] where it is neither.

    Messages without text are left out, except the last one, which may be the answer.
    """
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    if not isinstance(side, (list, tuple)):
        return []
    if not all(isinstance(m, dict) and is_text(m.get("role")) and isinstance(m.get("content"), str) for m in side):
        return []
    return [{"role": m["role"], "content": m["content"]} for m in side if is_text(m["content"]) or m is side[-1]]


def prompt_turns(prompt: object) -> list[Message]:
    """The turns before the answer, of a text or a list of messages; markers in a user's text begin turns too."""
    if isinstance(prompt, str):
        return chat_turns(prompt)
    messages = [message for message in messages_of(prompt) if is_text(message["content"])]
    turns = [chat_turns(m["content"]) if m["role"] == "user" else [m] for m in messages]
    return [turn for part in turns for turn in part]


def prompt_text(prompt: object, turns: list[Message]) -> str:
    """The prompt as one text: as the source has it, or its turns written out where the source has messages.

    The system turn is not in it: one that all rows share would make all of them near duplicates.
    """
    if is_text(prompt):
        return prompt
    turns = [message for message in turns if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in turns)


def with_persona(turns: list[Message], system_prompt: str) -> list[Message]:
    """The turns with the persona as their system turn; without a persona the turns as they are."""
    if not system_prompt:
        return turns
    return [{"role": "system", "content": system_prompt}, *(m for m in turns if m["role"] != "system")]


def finished_row(pair: dict, system_prompt: str) -> Record:
    """The row that is stored: whole conversations, the persona in the system turn of both sides."""
    turns = with_persona(pair["turns"], system_prompt)
    attributes = pair.get("attributes", (None, None))
    sides = [[*turns, {"role": "assistant", "content": answer}] for answer in pair["answers"]]
    return {
        "prompt": pair["prompt"],
        "chosen": sides[0],
        "rejected": sides[1],
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
) -> Iterator[dict]:
    """The pairs of one split of a source that pass every check; the ledger takes all the rest.

    read: opens the records anew at each call. layout: a key of utils.data.sources.LAYOUTS. A pair is a dict of prompt,
    turns (messages before the answer), answers, ratings and rows (numbers in the source), chosen first.
    unfit: why turns and answers cannot be tokenised, "" where they can.
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
) -> Iterator[dict]:
    """Pairs of a source with one answer a record, one pair a prompt.

    Reads the source twice: once to learn how many answers each prompt has, and again to pair them, so that only
    prompts whose answers are not all there yet wait in memory.
    """
    sizes = Counter(hash(record["prompt"]) for record in read() if not check_attribute_row(record))
    waiting = {}
    for row, record in enumerate(read()):
        ledger.read(record.get("prompt"))
        reason = check_attribute_row(record)
        if reason:
            ledger.drop(reason, split, [row], record.get("prompt", ""))
            continue
        key = hash(record["prompt"])
        grades = [whole_number(record[name]) for name in ATTRIBUTES]
        answer = {"row": row, "prompt": record["prompt"], "response": record["response"], "attributes": grades}
        group = waiting.setdefault(key, [])
        group.append(answer)
        if len(group) == sizes[key]:
            pair = best_against_worst(waiting.pop(key), rating, split, ledger)
            if pair:
                yield pair


def check_attribute_row(record: Record) -> str:
    """The reason why a row of the attribute layout cannot be used, "" if it can."""
    if not is_text(record.get("prompt")) or not asks(prompt_turns(record["prompt"])):
        return "empty_prompt"
    if not is_text(record.get("response")):
        return "empty_answer"
    grades = [whole_number(record.get(name)) for name in ATTRIBUTES]
    return "" if all(grade is not None and 0 <= grade <= HIGHEST_ATTRIBUTE for grade in grades) else "bad_attribute"


def best_against_worst(group: list[dict], rating: str, split: str, ledger: Ledger) -> dict | None:
    """One pair of the answers to one prompt, or None with an entry in the ledger.

    group: {"row", "prompt", "response", "attributes"} each, in the source's order; of equal ones the first counts.
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
    rows = [answer["row"] for answer in answers]
    if len(answers) == 1:
        ledger.drop("unpaired", split, rows, group[0]["prompt"])
        return None
    if max(scores) == min(scores):
        ledger.drop("tie", split, rows, group[0]["prompt"])
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


def pairs_of_records(read: Callable[[], Iterator[Record]], layout: str, split: str, ledger: Ledger) -> Iterator[dict]:
    """Pairs of a source that has one pair a record."""
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


def pair_of_record(record: Record, rated: tuple[str, ...]) -> dict | str:
    """The pair in a record of the `pairs` layout, or the reason why there is none. rated: see rating_columns."""
    prompt, turns, answers = record.get("prompt"), [], []
    sides = [record.get("chosen"), record.get("rejected")]
    if not prompt and all(map(dialogue, sides)):
        sides = [dialogue(side) for side in sides]
    for side in sides:
        messages = messages_of(side)
        if not messages:
            return "bad_messages" if side else "empty_answer"
        if messages[-1]["role"] != "assistant" or not is_text(messages[-1]["content"]):
            return "empty_answer"
        turns.append(prompt_turns(messages[:-1]))
        answers.append(messages[-1]["content"])
    if turns[0] != turns[1]:
        return "prompts_differ"
    turns = turns[0] or prompt_turns(prompt)  # no turns: the sides are answers only
    if not asks(turns):
        return "empty_prompt"
    ratings = tuple(real_number(record.get(name)) for name in rated) or (None, None)
    if rated and None in ratings:
        return "bad_rating"
    return {"prompt": prompt_text(prompt, turns), "turns": turns, "answers": tuple(answers), "ratings": ratings}


def rating_columns(head: Iterable[Record]) -> tuple[str, ...]:
    """The names of the two rating columns of a source with pairs, by its first records; () where it has none.

    Columns without a number count as none: processed rows of a source without ratings have nulls there.
    """
    head = list(head)
    for names in PAIR_RATINGS:
        if all(any(real_number(record.get(name)) is not None for record in head) for name in names):
            return names
    return ()


def pair_of_strength(record: Record) -> dict | str:
    """The pair in a record with a signed strength (positive: the second answer is better), or the reason for none."""
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


def check_pair(pair: dict, min_rating_gap: float) -> str:
    """The reason why a pair cannot be used, "" if it can."""
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
