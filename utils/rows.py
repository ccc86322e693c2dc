"""The preference row: ratings, chat turns, the cells of a source, and a ledger of all that is left out."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.runs import write_lines
from utils.sources import Record

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
