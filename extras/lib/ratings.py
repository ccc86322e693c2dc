"""Items that a person rates: one answer, or two side by side, in random order, the names of their conditions apart."""

import hashlib
import json
import random
import re
from itertools import combinations
from pathlib import Path

from utils.data.preferences import is_unicode, prompt_turns, real_number
from utils.data.sources import Record, read_json_lines
from utils.script import stop

LAYOUTS = {"pairs": 2, "single": 1}  # answers in an item
HUMAN = "human"  # the condition of the answer that the data has
HUMANS = ("show", "rate", "hide")  # what is done with it: seen beside the others, rated like one of them, or nothing
SAMPLED = ("before", "after")  # conditions in a samples.jsonl
ITEMS_FILE = "items.jsonl"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # control and direction characters
CRITERIA = ("relevance", "clarity", "completeness", "originality", "style")
GRADES = (1, 2, 3, 4, 5)
PREFERENCES = {"a": 0.0, "tie": 0.5, "b": 1.0}  # how much the second answer shown is preferred
RATINGS_FILE = "ratings.jsonl"
PAGE_KIND = "ratings of answers"  # kind of a download of the page


def shown(text: str) -> str:
    """The text as a person may see it: what would steer a terminal or turn the writing direction is spelled out."""
    return UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


def clean(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which could not be written as UTF-8."""
    return text.encode(errors="replace").decode()


def read_samples(path: Path) -> tuple[list[dict], list[str]]:
    """Return (what make_items() takes, names of the conditions) of a samples.jsonl; end the script at an unusable line.

    A line has prompt, before and after (or one of them), perhaps human, reward_before and reward_after.
    """
    lines = list(read_json_lines(path))
    names = [name for name in SAMPLED if lines and name in lines[0]]
    if not names:
        stop(f"SAMPLES = '{path}' has no answers: each line needs prompt, and before, after or both")
    found = []
    for number, line in enumerate(lines, start=1):
        for name in ("prompt", *names):
            if not isinstance(line.get(name), str):
                stop(f"SAMPLES = '{path}': entry {number} has no text under {name!r}")
        entry = {"prompt": clean(line["prompt"]), "turns": prompt_turns(clean(line["prompt"]))}
        entry |= {"answers": {name: clean(line[name]) for name in names}}
        entry |= {"human": clean(str(line.get(HUMAN) or ""))}
        entry |= {"rewards": {name: real_number(line.get(f"reward_{name}")) for name in names}}
        found.append(entry)
    return found, names


def make_items(prompts: list[dict], conditions: list[str], layout: str, human: str, seed: int) -> list[dict]:
    """The items in the order in which they are asked, an item that is there twice once.

    prompts: {"prompt", "turns", "answers": {condition: text}, "human": text or "", "rewards": {condition: float}}.
    An item has id, prompt, turns, human (text to be seen beside, or ""), and, in the order in which they are shown:
    answers, conditions, rewards (None where there is none). Both orders are random, by `seed` and the content.
    """
    items = {}
    for entry in prompts:
        answers, rated = dict(entry["answers"]), list(conditions)
        if human == "rate" and entry["human"]:
            answers[HUMAN], rated = entry["human"], [*conditions, HUMAN]
        beside = entry["human"] if human == "show" else ""
        for names in combinations(rated, LAYOUTS[layout]):
            content = {"prompt": entry["prompt"], "human": beside, "turns": entry["turns"]}
            order = list(names)
            random.Random(f"{seed} {json.dumps([content, [answers[name] for name in names], names])}").shuffle(order)
            content |= {"conditions": order, "answers": [answers[name] for name in order]}
            item = {"id": short_hash(content), **content, "rewards": [entry["rewards"].get(name) for name in order]}
            items[item["id"]] = item
    return sorted(items.values(), key=lambda item: short_hash([seed, item["id"]]))


def short_hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def fingerprint(items: list[dict]) -> str:
    """Return a hash of the items and of the orders in them; ratings carry it."""
    return short_hash([item["id"] for item in items])


def complete_layout(layout: str, conditions: list[str], human: str, has_human: bool) -> str:
    """Return the layout, or the one that fits where it is ""; end the script where there is nothing to pair."""
    count = len(conditions) + (human == "rate" and has_human)
    if layout == "pairs" and count < 2:
        stop(
            "LAYOUT = 'pairs' needs two conditions and there is one: name POLICY_AGAINST or a SYSTEM_PROMPT, rate the "
            "human answer too (HUMAN = 'rate'), or set LAYOUT = 'single'"
        )
    return layout or ("pairs" if count > 1 else "single")


def read_items(folder: Path) -> list[dict]:
    """The items of a folder in the order in which they are asked."""
    return list(read_json_lines(folder / ITEMS_FILE))


def is_complete(rating: dict) -> bool:
    """Whether nothing is left to be asked."""
    compared = len(rating["grades"]) == 1 or rating["preference"] is not None
    return compared and all(len(grades) == len(CRITERIA) for grades in rating["grades"])


def fits(rating: object, items: dict[str, dict]) -> bool:
    """Return whether a rating is of one of the items and complete in itself. items: by id."""
    texts = [rating.get(name) for name in ("item", "rater", "at")] if isinstance(rating, dict) else [None]
    if not all(isinstance(text, str) and is_unicode(text) for text in texts):
        return False
    item, grades, preference = items.get(rating["item"]), rating.get("grades"), rating.get("preference")
    if item is None or not isinstance(grades, list) or len(grades) != len(item["answers"]):
        return False
    if not all(isinstance(given, dict) and set(given) <= set(CRITERIA) for given in grades):
        return False
    if not all(type(grade) is int and grade in GRADES for given in grades for grade in given.values()):
        return False
    return preference is None or (len(grades) == 2 and preference in list(PREFERENCES))


def read_own(path: Path, items: dict[str, dict]) -> list[dict]:
    """Return the ratings of ratings.jsonl, the latest of each rater on each item; [] where there is no file."""
    return merged([], read_checked(path, list(read_json_lines(path)), items))[0] if path.exists() else []


def read_checked(path: Path, ratings: list, items: dict[str, dict]) -> list[dict]:
    for number, rating in enumerate(ratings, start=1):
        if not fits(rating, items):
            stop(f"{path}: rating {number} does not fit the items of OUTPUT_DIR; nothing of it was taken")
    return ratings


def read_ratings(path: Path, items: dict[str, dict], file: str) -> list[dict]:
    """Return the ratings of a page's download or of a ratings.jsonl; end the script where they are of other items."""
    if not path.is_file():
        stop(f"IMPORT = '{path}' is not there")
    if path.suffix == ".jsonl":
        ratings = list(read_json_lines(path))
    else:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, ratings = content["kind"], [it | {"file": content["file"]} for it in content["ratings"]]
        except (ValueError, KeyError, TypeError):
            kind = ""
        if kind != PAGE_KIND:
            stop(f"{path} is not what a rating page lets you download")
    if any(rating.get("file") != file for rating in ratings):
        stop(f"{path} holds ratings of other items than OUTPUT_DIR does: name the folder that its page was made in")
    return read_checked(path, ratings, items)


def merged(before: list[dict], new: list[dict]) -> tuple[list[dict], int, int]:
    """(ratings, how many are new, how many took the place of another): of one item by one rater the later counts.

    Later by `at`, and where that is equal the one that comes later here.
    """
    found = {(rating["rater"], rating["item"]): rating for rating in before}
    added = replaced = 0
    for rating in new:
        key = (rating["rater"], rating["item"])
        old = found.get(key)
        if old is not None and (rating["at"] < old["at"] or rating == old):
            continue
        added, replaced = added + (old is None), replaced + (old is not None)
        found[key] = rating
    return list(found.values()), added, replaced


def preference_rows(duels: list[dict]) -> tuple[list[Record], dict[str, int]]:
    """(rows: prompt, chosen, rejected, chosen_rating, rejected_rating; how many pairs are left out, by reason).

    duels: one each pair of answers, over all raters (agreement.over_raters). The ratings are means of all grades
    where each pair has all of them and they differ within each pair, else the shares of the raters. A pair that grades
    and preference rank in different ways is left out.
    """
    decided = [duel for duel in duels if duel["outcome"] != 0.5 and len(set(duel["answers"])) > 1]
    graded = all(None not in duel["grades"] and len(set(duel["grades"])) > 1 for duel in decided)
    plain = all(prompt_turns(duel["prompt"]) == duel["turns"] for duel in duels)
    rows, left_out = [], {"tie": 0, "grades_disagree": 0, "equal_answers": 0}
    for duel in duels:
        ratings = duel["grades"] if graded else (1 - duel["outcome"], duel["outcome"])
        better = int(duel["outcome"] > 0.5)
        against = None not in duel["grades"] and duel["grades"][better] < duel["grades"][1 - better]
        if duel["answers"][0] == duel["answers"][1]:
            left_out["equal_answers"] += 1
        elif duel["outcome"] == 0.5:
            left_out["tie"] += 1
        elif against:
            left_out["grades_disagree"] += 1
        else:
            row = {"prompt": duel["prompt"] if plain else duel["turns"]}
            row |= {"chosen": duel["answers"][better], "rejected": duel["answers"][1 - better]}
            rows.append(row | {"chosen_rating": ratings[better], "rejected_rating": ratings[1 - better]})
    return rows, {reason: count for reason, count in left_out.items() if count}
