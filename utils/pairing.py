"""From the records of a source to checked pairs: one a prompt, best against worst, and a reason for all the rest."""

from collections import Counter
from collections.abc import Callable, Iterator

from utils.rows import (
    RATINGS,
    TURN_MARKER,
    Ledger,
    chat_turns,
    hundredths,
    is_text,
    messages_of,
    prompt_text,
    real_number,
    whole_number,
)
from utils.sources import ATTRIBUTES, Record

PAIR_RATINGS = (  # names of the two rating columns in sources that have pairs
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
)


def checked_pairs(
    read: Callable[[], Iterator[Record]], layout: str, rating: str, split: str, min_rating_gap: float, ledger: Ledger
) -> Iterator[dict]:
    """The pairs of one split of a source that pass every check; the ledger takes all the rest.

    read: opens the records anew at each call. layout: a key of utils.sources.LAYOUTS. A pair is a dict of prompt,
    turns (messages before the answer), answers, ratings and rows (numbers in the source), chosen first.
    """
    if layout == "attributes":
        pairs = pairs_of_attributes(read, rating, split, ledger)
    else:
        pairs = pairs_of_records(read, layout, split, ledger)
    seen = set()
    for pair in pairs:
        content = hash((pair["prompt"], *pair["answers"]))
        reason = check_pair(pair, min_rating_gap) or ("duplicate" if content in seen else "")
        seen.add(content)
        if reason:
            ledger.drop(reason, split, pair["rows"], pair["prompt"])
        else:
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
    if not is_text(record.get("prompt")):
        return "empty_prompt"
    if not is_text(record.get("response")):
        return "empty_answer"
    grades = [whole_number(record.get(name)) for name in ATTRIBUTES]
    return "" if all(grade is not None and 0 <= grade <= 4 for grade in grades) else "bad_attribute"


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
        return ledger.drop("unpaired", split, rows, group[0]["prompt"])
    if max(scores) == min(scores):
        return ledger.drop("tie", split, rows, group[0]["prompt"])
    best, worst = answers[scores.index(max(scores))], answers[scores.index(min(scores))]
    for answer in answers:
        if answer is not best and answer is not worst:
            ledger.drop("between_best_and_worst", split, [answer["row"]], answer["prompt"])
    return {
        "prompt": best["prompt"],
        "turns": chat_turns(best["prompt"]),
        "answers": (best["response"], worst["response"]),
        "ratings": (max(scores) / divisor, min(scores) / divisor),
        "attributes": (best["attributes"], worst["attributes"]),
        "rows": [best["row"], worst["row"]],
    }


def pairs_of_records(read: Callable[[], Iterator[Record]], layout: str, split: str, ledger: Ledger) -> Iterator[dict]:
    """Pairs of a source that has one pair a record."""
    pair_of = {"pairs": pair_of_record, "strength": pair_of_strength}[layout]
    for row, record in enumerate(read()):
        prompt = record.get("prompt") or record.get("context") or record.get("chosen")
        ledger.read(prompt)
        pair = pair_of(record)
        if isinstance(pair, str):
            ledger.drop(pair, split, [row], prompt)
        else:
            yield {**pair, "rows": [row]}


def pair_of_record(record: Record) -> dict | str:
    """The pair in a record of the `pairs` layout, or the reason why there is none."""
    turns, answers = [], []
    for side in (record.get("chosen"), record.get("rejected")):
        messages = messages_of(side)
        if not messages or messages[-1]["role"] != "assistant":
            return "empty_answer"
        turns.append(messages[:-1])
        answers.append(messages[-1]["content"])
    prompt = record.get("prompt")
    if not turns[0]:  # the sides are answers only
        turns = [chat_turns(prompt) if isinstance(prompt, str) else messages_of(prompt)] * 2
    elif is_text(prompt) and TURN_MARKER.search(prompt):  # a dialogue that was squeezed into one user turn
        turns = [[m for m in side if m["role"] == "system"] + chat_turns(prompt) for side in turns]
    if not turns[0] or turns[0][-1]["role"] != "user":
        return "empty_prompt"
    if turns[0] != turns[1]:
        return "prompts_differ"
    ratings = (None, None)
    if rating_columns(record):
        ratings = tuple(real_number(record[name]) for name in rating_columns(record))
        if None in ratings:
            return "bad_rating"
    return {"prompt": prompt_text(prompt, turns[0]), "turns": turns[0], "answers": tuple(answers), "ratings": ratings}


def rating_columns(record: Record) -> tuple[str, ...]:
    """The names of the two rating columns of a record with a pair, () where it has none."""
    return next((names for names in PAIR_RATINGS if set(names) <= set(record)), ())


def pair_of_strength(record: Record) -> dict | str:
    """The pair in a record with a signed strength (positive: the second answer is better), or the reason for none."""
    prompt = record.get("prompt", record.get("context"))
    turns = chat_turns(prompt) if isinstance(prompt, str) else messages_of(prompt)
    first, second = (record.get(f"response_{i}", record.get(f"response{i}")) for i in (1, 2))
    strength = whole_number(record.get("preference_strength", record.get("overall_preference")))
    if not turns or turns[-1]["role"] != "user":
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
    if not is_text(chosen) or not is_text(rejected):
        return "empty_answer"
    better, worse = pair["ratings"]
    if better is not None and better == worse:
        return "tie"
    if chosen == rejected:
        return "equal_answers"
    if better is not None and better < worse:
        return "chosen_rated_lower"
    if min_rating_gap and hundredths(better) - hundredths(worse) < hundredths(min_rating_gap):
        return "small_gap"
    return ""
