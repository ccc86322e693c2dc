"""Items that a person rates: one answer, or two side by side, in random order, the names of their conditions apart."""

import hashlib
import json
import random
import re
from itertools import combinations
from pathlib import Path

from utils.data.preferences import prompt_turns, real_number
from utils.data.sources import read_json_lines
from utils.script import stop

LAYOUTS = {"pairs": 2, "single": 1}  # answers in an item
HUMAN = "human"  # the condition of the answer that the data has
HUMANS = ("show", "rate", "hide")  # what is done with it: seen beside the others, rated like one of them, or nothing
SAMPLED = ("before", "after")  # conditions in a samples.jsonl
ITEMS_FILE = "items.jsonl"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # control and direction characters


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
