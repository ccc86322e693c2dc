"""From the records of a source to checked pairs: one a prompt, best against worst, and a reason for all the rest."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from utils.rows import (
    RATINGS,
    Ledger,
    Message,
    asks,
    dialogue,
    hundredths,
    is_text,
    is_unicode,
    messages_of,
    prompt_text,
    prompt_turns,
    real_number,
    whole_number,
)
from utils.sources import ATTRIBUTES, HIGHEST_ATTRIBUTE, Record, head_of

PAIR_RATINGS = (  # names of the two rating columns in sources that have pairs
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
)


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

    read: opens the records anew at each call. layout: a key of utils.sources.LAYOUTS. A pair is a dict of prompt,
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
