"""Ratings of answers by people: the items on the page, and the ratings that are read back."""

import hashlib
import json
import random
import re
from itertools import combinations
from pathlib import Path

from utils.data.preferences import is_unicode, prompt_turns, real_number
from utils.data.sources import read_json_lines
from utils.script import stop

LAYOUTS = {"pairs": 2, "single": 1}  # answers in an item
SAMPLED = ("before", "after")  # conditions in a samples.jsonl
ITEMS_FILE, RATINGS_FILE = "items.jsonl", "ratings.jsonl"
CRITERIA = ("relevance", "clarity", "completeness", "originality", "style")
GRADES = (1, 2, 3, 4, 5)
PREFERENCES = {"a": 0.0, "tie": 0.5, "b": 1.0}  # share of the second answer shown
PAGE_KIND = "ratings of answers"  # kind of a download of the page
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # control and direction characters


def visible(text: str) -> str:
    """Return the text with control and direction characters written as [U+...]."""
    return INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text.replace("\r\n", "\n"))


def replace_surrogates(text: str) -> str:
    """Return the text with a question mark for each lone surrogate, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def read_samples(path: Path) -> tuple[list[dict], list[str]]:
    """Return (prompts for `make_items`, names of the conditions) of a samples.jsonl.

    A line has prompt, before or after or both, and optionally human, reward_before and reward_after.
    """
    lines = list(read_json_lines(path))
    names = [name for name in SAMPLED if lines and name in lines[0]]
    if not names:
        stop(f"SAMPLES = '{path}' has no answers: each line needs prompt, and before, after or both")
    prompts = []
    for number, line in enumerate(lines, start=1):
        for name in ("prompt", *names):
            if not isinstance(line.get(name), str):
                stop(f"SAMPLES = '{path}': entry {number} has no text under {name!r}")
        text, human = replace_surrogates(line["prompt"]), replace_surrogates(str(line.get("human") or ""))
        answers = {name: replace_surrogates(line[name]) for name in names}
        rewards = {name: real_number(line.get(f"reward_{name}")) for name in names}
        entry = {"prompt": text, "turns": prompt_turns(text), "answers": answers, "human": human, "rewards": rewards}
        prompts.append(entry)
    return prompts, names


def choose_layout(layout: str, conditions: list[str]) -> str:
    """Return the layout, or for "" the one that fits the number of conditions."""
    if layout == "pairs" and len(conditions) < 2:
        stop(
            "LAYOUT = 'pairs' needs two conditions, this is one: name a second policy in POLICIES, or a SYSTEM_PROMPT, "
            "or set LAYOUT = 'single'"
        )
    return layout or ("pairs" if len(conditions) > 1 else "single")


def make_items(prompts: list[dict], conditions: list[str], layout: str, seed: int) -> list[dict]:
    """Return the items in the order of the page, without duplicates.

    prompts: {"prompt", "turns", "answers": {condition: text}, "human": text or "", "rewards": {condition: float}}.
    An item has id, prompt, turns, human (the answer in the data, or ""), and, in the order shown on the page: answers,
    conditions, rewards (None if missing). Both orders are random; they depend on `seed` and the content.
    """
    items = {}
    for entry in prompts:
        for names in combinations(conditions, LAYOUTS[layout]):
            content = {"prompt": entry["prompt"], "human": entry["human"], "turns": entry["turns"]}
            order, answers = list(names), [entry["answers"][name] for name in names]
            random.Random(f"{seed} {json.dumps([content, answers, names])}").shuffle(order)
            content |= {"conditions": order, "answers": [entry["answers"][name] for name in order]}
            item = {"id": short_hash(content), **content, "rewards": [entry["rewards"].get(name) for name in order]}
            items[item["id"]] = item
    return sorted(items.values(), key=lambda item: short_hash([seed, item["id"]]))


def short_hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def fingerprint(items: list[dict]) -> str:
    """Return a hash of the items and their order; each rating carries it."""
    return short_hash([item["id"] for item in items])


def read_items(folder: Path) -> list[dict]:
    """Return the items of a folder in the order of the page."""
    return list(read_json_lines(folder / ITEMS_FILE))


def is_complete(rating: dict) -> bool:
    """Return whether a rating has all grades and, for two answers, a preference."""
    compared = len(rating["grades"]) == 1 or rating["preference"] is not None
    return compared and all(len(grades) == len(CRITERIA) for grades in rating["grades"])


def is_valid(rating: object, items: dict[str, dict]) -> bool:
    """Return whether a rating is well-formed and belongs to one of the items. items: by id."""
    texts = [rating.get(name) for name in ("item", "rater", "at")] if isinstance(rating, dict) else [None]
    if not all(isinstance(text, str) and is_unicode(text) for text in texts):
        return False
    item, grades, preference = items.get(rating["item"]), rating.get("grades"), rating.get("preference")
    if item is None or not isinstance(grades, list) or len(grades) != len(item["answers"]):
        return False
    if not all(isinstance(side, dict) and set(side) <= set(CRITERIA) for side in grades):
        return False
    if not all(type(grade) is int and grade in GRADES for side in grades for grade in side.values()):
        return False
    return preference is None or (len(grades) == 2 and preference in list(PREFERENCES))


def check_ratings(path: Path, ratings: list, items: dict[str, dict]) -> list[dict]:
    """Return the ratings of a file if all of them belong to the items."""
    for number, rating in enumerate(ratings, start=1):
        if not is_valid(rating, items):
            stop(f"{path}: rating {number} does not fit the items of OUTPUT_DIR; the file was not imported")
    return ratings


def read_own(path: Path, items: dict[str, dict]) -> list[dict]:
    """Return the ratings of ratings.jsonl, the latest of each rater for each item; [] if the file does not exist."""
    return merge([], check_ratings(path, list(read_json_lines(path)), items))[0] if path.exists() else []


def read_ratings(path: Path, items: dict[str, dict], file: str) -> list[dict]:
    """Return the ratings of a download or a ratings.jsonl. file: fingerprint of the items."""
    if not path.is_file():
        stop(f"IMPORT = '{path}' does not exist")
    if path.suffix == ".jsonl":
        ratings = list(read_json_lines(path))
    else:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, ratings = content["kind"], [rating | {"file": content["file"]} for rating in content["ratings"]]
        except (ValueError, KeyError, TypeError):
            kind = ""
        if kind != PAGE_KIND:
            stop(f"{path} is not a download of a rating page")
    if any(rating.get("file") != file for rating in ratings):
        stop(f"{path} has ratings of other items than OUTPUT_DIR: set OUTPUT_DIR to the folder of its page")
    return check_ratings(path, ratings, items)


def merge(before: list[dict], new: list[dict]) -> tuple[list[dict], int, int]:
    """Return (all ratings, number added, number replaced). The later rating of a rater for an item counts.

    Of two ratings with the same time, the one in `new` counts.
    """
    merged = {(rating["rater"], rating["item"]): rating for rating in before}
    added = replaced = 0
    for rating in new:
        key = (rating["rater"], rating["item"])
        old = merged.get(key)
        if old is not None and (rating["at"] < old["at"] or rating == old):
            continue
        added, replaced = added + (old is None), replaced + (old is not None)
        merged[key] = rating
    return list(merged.values()), added, replaced
