"""Rating in the terminal: one question after the other, each answer on the disk before the next question."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from extras.rating.items import shown
from extras.rating.ratings import CRITERIA, append, is_complete, new_rating
from utils.runs import say

BACK, STOP = "back", "stop"
COMMANDS = {"u": BACK, "г": BACK, "q": STOP, "й": STOP}  # the Cyrillic letters lie on the same keys
GRADE_WORDS = {str(grade): grade for grade in range(1, 6)}
PREFERENCE_WORDS = {"a": "a", "а": "a", "ф": "a", "b": "b", "в": "b", "и": "b", "=": "tie", "0": "tie"}
NAMES = "AB"  # of the answers shown


def rate(items: list[dict], ratings: list[dict], rater: str, file: str, words: dict[str, str], path: Path) -> None:
    """Ask for all that `rater` has not answered yet; each answer is appended to `path`.

    Ends when all is answered, at q, at the end of the input; Ctrl-C goes through as KeyboardInterrupt.
    """
    own = {rating["item"]: rating for rating in ratings if rating["rater"] == rater}
    own |= {item["id"]: new_rating(item, rater, file) for item in items if item["id"] not in own}
    questions = [(item, side, what) for item in items for side, what in questions_of(item)]
    place, seen = first_open(questions, own, 0), None
    say(f"{words['hint']} {words['how_stop']}")
    while place is not None:
        item, side, what = questions[place]
        if item is not seen:
            done = sum(is_complete(rating) for rating in own.values())
            say(f"\n===== {done} / {len(items)} {words['rated']} =====\n{item_text(item, words)}\n")
            seen = item
        answer = ask(side, what, len(item["answers"]), words)
        if answer == STOP:
            return
        if answer == BACK:
            place = max(0, place - 1)
            continue
        rating = own[item["id"]]
        if side is None:
            rating["preference"] = answer
        else:
            rating["grades"][side][what] = answer
        rating["at"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        append(path, rating)
        place = first_open(questions, own, place + 1)


def questions_of(item: dict) -> list[tuple[int | None, str]]:
    """(number of the answer, criterion) for each grade, and (None, "preference") where there are two answers."""
    asked = [(side, criterion) for side in range(len(item["answers"])) for criterion in CRITERIA]
    return asked + ([(None, "preference")] if len(item["answers"]) > 1 else [])


def first_open(questions: list[tuple], own: dict[str, dict], start: int) -> int | None:
    """The first question from `start` on that has no answer yet, then from the beginning; None where all have one."""
    for place in [*range(start, len(questions)), *range(start)]:
        item, side, what = questions[place]
        rating = own[item["id"]]
        answered = rating["preference"] is not None if side is None else what in rating["grades"][side]
        if not answered:
            return place
    return None


def item_text(item: dict, words: dict[str, str]) -> str:
    """What is to be rated, harmless to a terminal."""
    named = len(item["turns"]) > 1
    said = [f"{words.get(m['role'], m['role'])}: {m['content']}" if named else m["content"] for m in item["turns"]]
    parts = [f"--- {words['prompt']} ---", *said]
    if item["human"]:
        parts += [f"--- {words['human']} ---", item["human"]]
    for name, answer in zip(NAMES, item["answers"], strict=False):
        title = f"{words['answer']} {name}" if len(item["answers"]) > 1 else words["answer"]
        parts += [f"--- {title} ---", answer if answer.strip() else words["empty"]]
    return shown("\n".join(parts))


def ask(side: int | None, what: str, answers: int, words: dict[str, str]) -> str | int:
    """A grade, a preference (a, b, tie), BACK or STOP; anything else is asked again."""
    known = PREFERENCE_WORDS if side is None else GRADE_WORDS
    how = words["how_preference"] if side is None else words["how_grade"]
    name = f"{NAMES[side]}: " if side is not None and answers > 1 else ""
    hint = f", {words['about_' + what]}" if side is not None else ""
    while True:
        try:
            given = input(f"{name}{words[what]}{hint} ({how}): ").strip().lower()
        except EOFError:
            return STOP
        if given in COMMANDS or given in known:
            return COMMANDS.get(given) or known[given]
        print(f"{words['wrong']}: {shown(given)[:40]!r}. {how}; {words['how_stop']}", file=sys.stdout)
