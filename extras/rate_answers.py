"""Let a person rate answers, blind, on one offline page; read back, the ratings show which answers are better.

Reads  : samples.jsonl of a run, or random prompts of processed rows, which POLICY answers; ratings of --import
Writes : outputs/ratings/ (items.jsonl, rate.html, ratings.jsonl, ratings.json, settings.json)

python -m extras.rate_answers --samples outputs/quickstart/dpo/samples.jsonl    # then open outputs/ratings/rate.html
python -m extras.rate_answers --policy outputs/sft --system_prompt "You are a patient teacher."
python -m extras.rate_answers --import ratings-Ann-2026-03-01.json,ratings-Ben-2026-03-02.json --to_rows rated.jsonl
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import time
from pathlib import Path

from extras.rating import items, ratings
from extras.rating.labels import LABELS as WORDS
from utils.config import override_constants
from utils.files import read_json, write_json, write_lines, write_text
from utils.processed import refuse_sft_rows, splits_of
from utils.rows import prompt_text, with_persona
from utils.runs import at_least, free_name, needs, pick, say, script, stop

# what is rated
SAMPLES = ""  # samples.jsonl of a run (prompt, before, after, perhaps human), "" = POLICY answers prompts of DATA_DIR
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
SPLIT = "validation"  # train | validation | test, of DATA_DIR
PROMPTS = 10  # random prompts of DATA_DIR
POLICY = "HuggingFaceTB/SmolLM2-135M-Instruct"  # answers them: hub name, run folder or folder with an adapter
POLICY_AGAINST = ""  # answers them too, as the second condition; "" = POLICY, if there is a SYSTEM_PROMPT
SYSTEM_PROMPT = ""  # persona of the second condition, "" = none
MAX_LENGTH = 1024  # tokens of a prompt, a longer one loses its oldest turns, then its start
MAX_NEW_TOKENS = 200  # of each answer
TEMPERATURE = 0.7  # of the answers, 0 = the likeliest token each time
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# how it is rated
LAYOUT = ""  # pairs = two answers side by side | single = one at a time, "" = pairs where there are two conditions
HUMAN = "show"  # the answer in the data: show (seen beside the others) | rate (as one of them) | hide (left out)
LABELS = "en"  # language of the page: en | ru
RATER = ""  # name of the person, "" = the page asks for it
SEED = 42  # of the prompts, the answers and both orders
# what is read back
IMPORT = ()  # downloads of the page, or a ratings.jsonl, made for the items of OUTPUT_DIR
REWARD_MODEL = ""  # is compared with the person: run folder or hub name, "" = the rewards in SAMPLES
TO_ROWS = ""  # a .jsonl file for the preferences as rows that load_helpsteer_dataset.py reads, "" = none
# output
OUTPUT_DIR = "outputs/ratings"  # the folder of these items and their ratings


def recipe(settings: dict) -> dict:
    """The settings that decide what the items are: another start with the same ones goes on with the same items."""
    names = ["SAMPLES"] if settings["SAMPLES"] else ["DATA_DIR", "SPLIT", "PROMPTS", "POLICY", "POLICY_AGAINST"]
    if not settings["SAMPLES"]:
        names += ["SYSTEM_PROMPT", "MAX_LENGTH", "MAX_NEW_TOKENS", "TEMPERATURE"]
    chosen = {name: settings[name] for name in [*names, "LAYOUT", "HUMAN", "SEED"]}
    if settings["SAMPLES"]:
        file = needs(settings["SAMPLES"], made_by="train_dpo.py")
        if file.is_dir():
            stop(f"SAMPLES = '{file}' is a folder: name the samples.jsonl in it")
        chosen["samples_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    else:  # a policy may have been trained again under its name
        names = (settings["POLICY"], settings["POLICY_AGAINST"])
        chosen["trained"] = [read_json(f"{name}/run.json").get("finished") for name in names]
    return chosen


def take_folder(folder: Path, chosen: dict) -> bool:
    """True where the folder holds the items of this recipe; items of another one are moved aside with their ratings."""
    before = read_json(folder / "settings.json")
    known = {name: value for name, value in chosen.items() if name != "trained" or name in before.get("recipe", {})}
    if before and before["recipe"] == known:  # "trained" is not in older ones
        return (folder / items.ITEMS_FILE).exists()
    if before:
        aside = free_name(f"{folder.resolve()}-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(folder.resolve(), aside)
        say(f"{folder} held other items and their ratings: moved aside to {aside}")
    elif folder.exists() and any(folder.iterdir()):
        stop(f"OUTPUT_DIR = '{folder}' holds files but no items of this script: choose another name")
    return False


def random_prompts(data_dir: str, split: str, count: int, seed: int) -> list[dict]:
    """What items.make_items takes, still without answers, for random rows; `human` is their chosen answer."""
    from datasets import load_from_disk

    needs(data_dir, made_by="load_helpsteer_dataset.py")
    rows = load_from_disk(str(pick(splits_of(data_dir), "SPLIT", split)))
    refuse_sft_rows(data_dir, read_json(Path(data_dir) / "metadata.json"))
    if not len(rows):
        stop(f"{data_dir}/{split} has no rows: choose another SPLIT")
    some = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    found = []
    for row in rows.select(some):
        *turns, human = row["chosen"]
        text = row["prompt"] or prompt_text(None, turns)
        found.append({"prompt": text, "turns": turns, "answers": {}, "human": human["content"], "rewards": {}})
    return found


def conditions_of(policy: str, against: str, persona: str) -> dict[str, tuple[str, str, str]]:
    """{name of a condition: (constant, policy, persona)}, the first the one that the second is compared with."""
    found = {policy: ("POLICY", policy, "")}
    if against or persona:
        name = (against or policy) + (" with persona" if persona else "")
        found[name] = ("POLICY_AGAINST" if against else "POLICY", against or policy, persona)
        if len(found) < 2:
            stop("POLICY_AGAINST is POLICY itself: name another one, or give the second condition a SYSTEM_PROMPT")
    return found


def answer_prompts(
    prompts: list[dict],
    conditions: dict[str, tuple[str, str, str]],
    template: str,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device_name: str,
    precision_name: str,
) -> None:
    """Put the answers of each condition into the prompts, all with the same luck."""
    from utils import guidance, models, sampling
    from utils.tokens import load_tokenizer

    device, precision = models.choose_machine(device_name, precision_name)
    for name, (constant, policy, persona) in conditions.items():
        tokenizer = load_tokenizer(policy, template, constant)
        model = models.load_causal(policy, constant).to(device)
        context = getattr(model.config, "max_position_embeddings", max_length + max_new_tokens)
        if max_length + max_new_tokens > context:
            stop(f"MAX_LENGTH + MAX_NEW_TOKENS = {max_length + max_new_tokens}: {policy} has a context of {context}")
        said = [with_persona(entry["turns"], persona) for entry in prompts]
        ids = sampling.prompt_ids_of(tokenizer, said, max_length, guidance.Guidance())
        how = {"precision": precision, "progress": f"answers of {name}"}
        answers = sampling.generate(model, tokenizer, ids, max_new_tokens, temperature, seed, **how)
        for entry, answer in zip(prompts, answers, strict=True):
            entry["answers"][name] = items.clean(answer.text)


def save_items(folder: Path, made: list[dict], conditions: list[str], chosen: dict) -> None:
    """Write settings.json, then items.jsonl, which makes the folder one to rate."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", {"recipe": chosen, "conditions": conditions, "made": time.strftime("%F %T")})
    write_lines(folder / items.ITEMS_FILE, made)


def source_hash(source: str) -> str:
    """What a Content-Security-Policy calls an inline script or style, so that no other one may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page(asked: list[dict], language: str, rater: str) -> str:
    """The rating page. It has texts only as JSON data, and no word on which condition an answer is of."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    seen = [
        {"id": item["id"], "human": items.shown(item["human"])}
        | {"turns": [{"role": turn["role"], "content": items.shown(turn["content"])} for turn in item["turns"]]}
        | {"answers": [items.shown(answer) for answer in item["answers"]]}
        for item in asked
    ]
    data = {"kind": ratings.PAGE_KIND, "file": items.fingerprint(asked), "rater": rater, "language": language}
    data |= {"criteria": ratings.CRITERIA, "words": WORDS[language], "items": seen}
    folder = FileSystemLoader(Path(__file__).parent / "rating")
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["source_hash"] = source_hash
    return environment.get_template("page.html.jinja").render(data=data)


def read_back(folder: Path, asked: list[dict], files: tuple[str, ...]) -> list[dict]:
    """All ratings of the folder after those of `files` were taken in: all of them, or where one is unusable none."""
    own, file = {item["id"]: item for item in asked}, folder / ratings.RATINGS_FILE
    given = [(name, ratings.read_ratings(Path(name), own, items.fingerprint(asked))) for name in files]
    known = ratings.read_own(file, own)
    for name, new in given:
        known, added, replaced = ratings.merged(known, new)
        say(f"{name}: {added} new ratings, {replaced} in place of earlier ones, {len(new) - added - replaced} known")
    write_lines(file, known)
    return known


def with_rewards(asked: list[dict], reward_model: str, device: str) -> list[dict]:
    """The items with the rewards of this model for their answers."""
    from utils.rewards import RewardModel

    judge = RewardModel.load(reward_model, device)
    said = [[*item["turns"], {"role": "assistant", "content": text}] for item in asked for text in item["answers"]]
    rewards = iter(judge.score(said).tolist())
    return [item | {"rewards": [next(rewards) for _ in item["answers"]]} for item in asked]


def report(folder: Path, asked: list[dict], known: list[dict], to_rows: str) -> None:
    """Print what the ratings say, write ratings.json, and the preference rows where a file is named for them."""
    from extras.rating import agreement

    own, conditions = {item["id"]: item for item in asked}, read_json(folder / "settings.json")["conditions"]
    if not known:
        stop(f"{folder} has no ratings yet: rate {folder / 'rate.html'} and --import its download")
    found = agreement.summary(own, known, conditions)
    write_json(folder / "ratings.json", found)
    say(agreement.told(found))
    say(f"written: {folder / 'ratings.json'}")
    if to_rows:
        duels = agreement.over_raters(agreement.duels_of(own, known, conditions))
        rows, left_out = ratings.preference_rows(duels)
        Path(to_rows).parent.mkdir(parents=True, exist_ok=True)
        write_lines(Path(to_rows), rows)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "nothing"
        say(f"written: {to_rows}, {len(rows)} preference rows; left out: {reasons}")
        say(f"next: python load_helpsteer_dataset.py --dataset {to_rows}")


@script
def main(settings: dict) -> None:
    # 1. check
    pick(WORDS, "LABELS", LABELS)
    pick(dict.fromkeys(items.HUMANS), "HUMAN", HUMAN)
    pick({"": 0, **items.LAYOUTS}, "LAYOUT", LAYOUT)
    at_least(1, PROMPTS=PROMPTS, MAX_LENGTH=MAX_LENGTH, MAX_NEW_TOKENS=MAX_NEW_TOKENS)
    at_least(0, TEMPERATURE=TEMPERATURE)
    if TO_ROWS and not TO_ROWS.endswith(".jsonl"):
        stop(f"TO_ROWS = {TO_ROWS!r}: expected a name that ends in .jsonl")
    folder = Path(OUTPUT_DIR)
    # 2. ratings that are there already
    if IMPORT or TO_ROWS:
        needs(folder / items.ITEMS_FILE, made_by="-m extras.rate_answers")
        asked = items.read_items(folder)
        known = read_back(folder, asked, IMPORT)
        report(folder, with_rewards(asked, REWARD_MODEL, DEVICE) if REWARD_MODEL else asked, known, TO_ROWS)
        return
    # 3. what is rated
    chosen = recipe(settings)
    if take_folder(folder, chosen):
        say(f"{folder} holds the answers of an earlier start with the same settings: going on with them")
    else:
        if SAMPLES:
            prompts, names = items.read_samples(Path(SAMPLES))
        else:
            conditions = conditions_of(POLICY, POLICY_AGAINST, SYSTEM_PROMPT)
            prompts, names = random_prompts(DATA_DIR, SPLIT, PROMPTS, SEED), list(conditions)
        layout = items.complete_layout(LAYOUT, names, HUMAN, any(entry["human"] for entry in prompts))
        if not SAMPLES:
            template = read_json(Path(DATA_DIR) / "metadata.json").get("chat_template", "")
            how = (template, MAX_LENGTH, MAX_NEW_TOKENS, TEMPERATURE, SEED, DEVICE, PRECISION)
            answer_prompts(prompts, conditions, *how)
        made = items.make_items(prompts, names, layout, HUMAN, SEED)
        save_items(folder, made, [*names, items.HUMAN], chosen)
        say(f"{len(prompts)} prompts, {len(made)} items ({layout}) in {folder}, answered by: {', '.join(names)}")
    asked = items.read_items(folder)
    # 4. make the page
    write_text(folder / "rate.html", page(asked, LABELS, RATER))
    # 5. say where it is
    say(f"written: {folder / 'rate.html'}: open it in a browser, or send it to a person; it needs nothing else")
    say(f"next: python -m extras.rate_answers --output_dir {OUTPUT_DIR} --import FILE, the download of the page")


if __name__ == "__main__":
    main(override_constants(globals()))
