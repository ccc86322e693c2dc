"""Let people rate answers on one offline page, blind; read the ratings back to see which answers they prefer.

Reads  : samples.jsonl of a run, or random prompts of processed rows, which POLICIES answer; downloads of the page
Writes : outputs/ratings/ (items.jsonl, rate.html, settings.json; ratings.jsonl, ratings.json, preferences.jsonl)

python -m extras.rate_answers --samples outputs/quickstart/dpo/samples.jsonl    # then open outputs/ratings/rate.html
python -m extras.rate_answers --policies outputs/sft --system_prompt "You are a patient teacher."
python -m extras.rate_answers --import ratings-Ann-2026-03-01.json,ratings-Ben-2026-03-02.json
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

from extras.lib import labels, ratings
from utils.config import override_constants
from utils.data.preferences import prompt_text, with_persona
from utils.data.processed import refuse_sft_rows
from utils.runs import free_name, read_json, write_json, write_lines, write_text
from utils.script import check, needs, pick, say, script, stop

# answers to rate
SAMPLES = ""  # samples.jsonl of a run, "" = POLICIES answer prompts of DATA_DIR
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py; its validation split is used
PROMPTS = 10  # number of random prompts of DATA_DIR
POLICIES = ("HuggingFaceTB/SmolLM2-135M-Instruct",)  # models to compare: hub names, run folders or adapter folders
SYSTEM_PROMPT = ""  # persona; compares the last policy with itself under this persona, "" = none
MAX_LENGTH = 1024  # tokens of a prompt; a longer one loses its oldest turns, then its start
MAX_NEW_TOKENS = 200  # tokens of an answer
TEMPERATURE = 0.7  # of the sampling, 0 = greedy
DEVICE = ""  # cuda | mps | cpu, "" = best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = native precision of the device
# page
LAYOUT = ""  # pairs = two answers side by side | single = one at a time, "" = pairs if there are two conditions
LABELS = "en"  # language of the page: en | ru
RATER = ""  # name of the person, "" = the page asks for it
SEED = 42  # of the prompts, the answers and the order of both
# ratings
IMPORT = ()  # downloads of the page to read back, or a ratings.jsonl of the same items
REWARD_MODEL = ""  # reward model to compare with the people: run folder or hub name, "" = the rewards in SAMPLES
# output
OUTPUT_DIR = "outputs/ratings"  # folder of the items and their ratings


def recipe_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the items; a later start with equal ones keeps the items."""
    recipe = {name: settings[name] for name in ("LAYOUT", "SEED")}
    if SAMPLES:
        digest = hashlib.sha256(needs(SAMPLES, made_by="train_dpo.py").read_bytes()).hexdigest()
        return recipe | {"SAMPLES": SAMPLES, "samples_sha256": digest}
    names = ("DATA_DIR", "PROMPTS", "SYSTEM_PROMPT", "MAX_LENGTH", "MAX_NEW_TOKENS", "TEMPERATURE")
    trained = {policy: read_json(f"{policy}/run.json").get("finished") for policy in POLICIES}
    return recipe | {name: settings[name] for name in names} | {"trained": trained}


def has_items(folder: Path, recipe: dict[str, Any]) -> bool:
    """Return True if the folder holds the items of this recipe. Move other items aside with their ratings."""
    before = read_json(folder / "settings.json").get("recipe")
    if before is None:
        if folder.exists() and any(folder.iterdir()):
            stop(f"OUTPUT_DIR = '{folder}' contains files that this script did not write: choose another folder")
        return False
    if {name: before.get(name) for name in recipe} == recipe:
        return (folder / ratings.ITEMS_FILE).exists()
    aside = free_name(f"{folder.resolve()}-{time.strftime('%Y%m%d-%H%M%S')}")
    os.rename(folder.resolve(), aside)
    say(f"{folder} held other items and their ratings: moved aside to {aside}")
    return False


def random_prompts() -> list[dict]:
    """Return random prompts of DATA_DIR in the form of `ratings.make_items`, still without answers."""
    from datasets import load_from_disk

    rows = load_from_disk(str(needs(f"{DATA_DIR}/validation", made_by="load_helpsteer_dataset.py")))
    refuse_sft_rows(DATA_DIR, read_json(Path(DATA_DIR) / "metadata.json"))
    if not len(rows):
        stop(f"{DATA_DIR}/validation has no rows: load the data with a larger VALIDATION_SHARE")
    prompts = []
    for row in rows.select(random.Random(SEED).sample(range(len(rows)), min(PROMPTS, len(rows)))):
        *turns, human = row["chosen"]
        text = row["prompt"] or prompt_text(None, turns)
        prompts.append({"prompt": text, "turns": turns, "answers": {}, "human": human["content"], "rewards": {}})
    return prompts


def conditions() -> dict[str, tuple[str, str]]:
    """Return {name of a condition: (policy, persona)} in the order of the comparison."""
    pairs = {policy: (policy, "") for policy in POLICIES}
    return pairs | ({f"{POLICIES[-1]} with persona": (POLICIES[-1], SYSTEM_PROMPT)} if SYSTEM_PROMPT else {})


def answer_prompts(prompts: list[dict]) -> None:
    """Add the answers of each condition to the prompts, all with the same random numbers."""
    from utils.data.tokens import load_tokenizer
    from utils.models import generation, loading

    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    template = read_json(Path(DATA_DIR) / "metadata.json").get("chat_template", "")
    for name, (policy, persona) in conditions().items():
        tokenizer = load_tokenizer(policy, template, "POLICIES")
        model = loading.load_causal(policy, "POLICIES").to(device)
        context = getattr(model.config, "max_position_embeddings", MAX_LENGTH + MAX_NEW_TOKENS)
        if context < MAX_LENGTH + MAX_NEW_TOKENS:
            stop(f"MAX_LENGTH + MAX_NEW_TOKENS = {MAX_LENGTH + MAX_NEW_TOKENS}: {policy} has a context of {context}")
        talks = [with_persona(entry["turns"], persona) for entry in prompts]
        ids = generation.prompts_of(tokenizer, talks, MAX_LENGTH)
        options = {"precision": precision, "progress": f"answers of {name}"}
        answers = generation.generate(model, tokenizer, ids, MAX_NEW_TOKENS, TEMPERATURE, SEED, **options)
        for entry, answer in zip(prompts, answers, strict=True):
            entry["answers"][name] = ratings.replace_surrogates(answer.text)


def write_items(folder: Path, recipe: dict[str, Any]) -> None:
    """Write settings.json and items.jsonl."""
    prompts, names = ratings.read_samples(Path(SAMPLES)) if SAMPLES else (random_prompts(), list(conditions()))
    layout = ratings.choose_layout(LAYOUT, names)
    if not SAMPLES:
        answer_prompts(prompts)
    items = ratings.make_items(prompts, names, layout, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"recipe": recipe, "conditions": names, "made": time.strftime("%F %T")}
    write_json(folder / "settings.json", about)
    write_lines(folder / ratings.ITEMS_FILE, items)
    say(f"{len(prompts)} prompts, {len(items)} items ({layout}) in {folder}, answered by: {', '.join(names)}")


def source_hash(source: str) -> str:
    """Return the name of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page_of(items: list[dict]) -> str:
    """Return the HTML of the rating page. It names no condition, and its texts are JSON data only."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    visible = [
        {"id": item["id"], "human": ratings.visible(item["human"])}
        | {"turns": [turn | {"content": ratings.visible(turn["content"])} for turn in item["turns"]]}
        | {"answers": [ratings.visible(answer) for answer in item["answers"]]}
        for item in items
    ]
    data = {"kind": ratings.PAGE_KIND, "file": ratings.fingerprint(items), "rater": RATER, "language": LABELS}
    data |= {"criteria": ratings.CRITERIA, "words": labels.LABELS[LABELS], "items": visible}
    loader, options = FileSystemLoader(Path(__file__).parent / "lib"), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **options)
    environment.filters["source_hash"] = source_hash
    return environment.get_template("page.html.jinja").render(data=data)


def import_ratings(folder: Path, items: list[dict]) -> list[dict]:
    """Add the ratings of IMPORT to the folder, or none of them if one is unusable. Return all ratings."""
    by_id, file = {item["id"]: item for item in items}, folder / ratings.RATINGS_FILE
    imports = [(name, ratings.read_ratings(Path(name), by_id, ratings.fingerprint(items))) for name in IMPORT]
    merged = ratings.read_own(file, by_id)
    for name, new in imports:
        merged, added, replaced = ratings.merge(merged, new)
        say(f"{name}: {added} new ratings, {replaced} replace earlier ones, {len(new) - added - replaced} known")
    write_lines(file, merged)
    if not merged:
        stop(f"{folder} has no ratings yet: rate the answers in {folder / 'rate.html'} and --import the download")
    return merged


def with_rewards(items: list[dict]) -> list[dict]:
    """Return the items with the rewards of REWARD_MODEL for their answers."""
    from utils.models.reward_model import RewardModel

    judge = RewardModel.load(REWARD_MODEL, DEVICE)
    talks = [[*item["turns"], {"role": "assistant", "content": text}] for item in items for text in item["answers"]]
    rewards = iter(judge.score(talks).tolist())
    return [item | {"rewards": [next(rewards) for _ in item["answers"]]} for item in items]


def report(folder: Path, items: list[dict], merged: list[dict]) -> None:
    """Print the results of the ratings, and write ratings.json and preferences.jsonl."""
    from extras.lib import agreement

    by_id = {item["id"]: item for item in items}
    conditions = read_json(folder / "settings.json")["conditions"]
    duels = agreement.over_raters(agreement.duels_of(by_id, merged, conditions))
    summary = agreement.summary(by_id, merged, conditions, duels)
    write_json(folder / "ratings.json", summary)
    say(agreement.format_summary(summary))
    say(f"written: {folder / 'ratings.json'}")
    if duels:
        rows, dropped = agreement.preference_rows(duels)
        write_lines(folder / "preferences.jsonl", rows)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing"
        say(f"written: {folder / 'preferences.jsonl'}, {len(rows)} preference rows; left out: {reasons}")
        if rows:
            say(f"next: python load_helpsteer_dataset.py --dataset {folder / 'preferences.jsonl'}")


@script
def main(settings: dict) -> None:
    # 1. check
    pick(labels.LABELS, "LABELS", LABELS)
    pick({"": 0, **ratings.LAYOUTS}, "LAYOUT", LAYOUT)
    check(settings)
    folder = Path(OUTPUT_DIR)
    # 2. read ratings back
    if IMPORT:
        needs(folder / ratings.ITEMS_FILE, made_by="-m extras.rate_answers")
        items = ratings.read_items(folder)
        merged = import_ratings(folder, items)
        report(folder, with_rewards(items) if REWARD_MODEL else items, merged)
        return
    # 3. or make the items and their page
    recipe = recipe_of(settings)
    if has_items(folder, recipe):
        say(f"{folder} contains the items of an earlier start with the same settings: they are kept")
    else:
        write_items(folder, recipe)
    write_text(folder / "rate.html", page_of(ratings.read_items(folder)))
    # 4. print where it is
    say(f"written: {folder / 'rate.html'}: open it in a browser or send it to someone; it works without a network")
    say(f"next: python -m extras.rate_answers --output_dir {OUTPUT_DIR} --import FILE, the download of the page")


if __name__ == "__main__":
    main(override_constants(globals()))
