"""Six pairs to rate, and ratings of them as the page lets you download them."""

import json

from extras import rate_answers
from extras.lib import ratings
from tests.conftest import run_script

TOPICS = ("rain", "bread", "a lost key", "the tram", "two cats", "an old map")


def six_pairs(tmp_path):
    """Return a folder with six pairs to rate. `after` has a higher reward on four of six prompts."""
    lines = [
        {"prompt": f"Write about {topic}.", "before": f"old {topic}", "after": f"new {topic}, longer"}
        | {"reward_before": 0.5, "reward_after": float(i > 1), "human": f"a person on {topic}"}
        for i, topic in enumerate(TOPICS)
    ]
    return made(tmp_path, lines)


def made(tmp_path, lines, **options):
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run_script(rate_answers, SAMPLES=samples, OUTPUT_DIR=tmp_path / "out", **options)
    return tmp_path / "out"


def rated(folder, rater, grade, names=None):
    """Write a download of the page in which `rater` prefers names[i] on item i and gives grade(condition)."""
    items, entries = ratings.read_items(folder), []
    for i, item in enumerate(items):
        grades = [dict.fromkeys(ratings.CRITERIA, grade(name)) for name in item["conditions"]]
        entry = {"item": item["id"], "rater": rater, "grades": grades, "at": "2026-03-01T10:00:00.000Z"}
        wanted = names[i] if names else None
        entries.append(
            entry | {"preference": "ab"[item["conditions"].index(wanted)] if wanted in item["conditions"] else wanted}
        )
    content = {"kind": ratings.PAGE_KIND, "file": ratings.fingerprint(items), "rater": rater, "ratings": entries}
    path = folder.parent / f"ratings-{rater}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_back(folder, *files, **options):
    run_script(rate_answers, IMPORT=",".join(map(str, files)), OUTPUT_DIR=folder, **options)
    return json.loads((folder / "ratings.json").read_text(encoding="utf-8"))
