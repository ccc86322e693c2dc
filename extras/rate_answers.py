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

from extras.lib import ratings
from extras.lib.labels import LABELS as WORDS
from utils.config import override_constants
from utils.data.preferences import prompt_text, with_persona
from utils.data.processed import refuse_sft_rows, splits_of
from utils.runs import free_name, read_json, write_json, write_lines, write_text
from utils.script import check, needs, pick, say, script, stop

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
    """Return the settings that decide what the items are: another start with the same ones keeps the items."""
    names = ["LAYOUT", "HUMAN", "SEED"]
    if SAMPLES:
        digest = hashlib.sha256(needs(SAMPLES, made_by="train_dpo.py").read_bytes()).hexdigest()
        return {name: settings[name] for name in ["SAMPLES", *names]} | {"samples_sha256": digest}
    names += ["DATA_DIR", "SPLIT", "PROMPTS", "POLICY", "POLICY_AGAINST"]
    names += ["SYSTEM_PROMPT", "MAX_LENGTH", "MAX_NEW_TOKENS", "TEMPERATURE"]
    trained = [read_json(f"{name}/run.json").get("finished") for name in (POLICY, POLICY_AGAINST)]  # perhaps again
    return {name: settings[name] for name in names} | {"trained": trained}


def take_folder(folder: Path, chosen: dict) -> bool:
    """Return True where the folder holds the items of this recipe; move others aside with their ratings."""
    before = read_json(folder / "settings.json")
    if before and before["recipe"] == chosen:
        return (folder / ratings.ITEMS_FILE).exists()
    if before:
        aside = free_name(f"{folder.resolve()}-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(folder.resolve(), aside)
        say(f"{folder} held other items and their ratings: moved aside to {aside}")
    elif folder.exists() and any(folder.iterdir()):
        stop(f"OUTPUT_DIR = '{folder}' holds files but no items of this script: choose another name")
    return False


def random_prompts() -> list[dict]:
    """Return what items.make_items takes, still without answers, for random rows; `human` is their chosen answer."""
    from datasets import load_from_disk

    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    rows = load_from_disk(str(pick(splits_of(DATA_DIR), "SPLIT", SPLIT)))
    refuse_sft_rows(DATA_DIR, read_json(Path(DATA_DIR) / "metadata.json"))
    if not len(rows):
        stop(f"{DATA_DIR}/{SPLIT} has no rows: choose another SPLIT")
    found = []
    for row in rows.select(random.Random(SEED).sample(range(len(rows)), min(PROMPTS, len(rows)))):
        *turns, human = row["chosen"]
        text = row["prompt"] or prompt_text(None, turns)
        found.append({"prompt": text, "turns": turns, "answers": {}, "human": human["content"], "rewards": {}})
    return found


def conditions() -> dict[str, tuple[str, str, str]]:
    """Return {name of a condition: (constant, policy, persona)}, the first the one that the second is compared with."""
    found = {POLICY: ("POLICY", POLICY, "")}
    if POLICY_AGAINST or SYSTEM_PROMPT:
        constant, policy = ("POLICY_AGAINST", POLICY_AGAINST) if POLICY_AGAINST else ("POLICY", POLICY)
        found[policy + (" with persona" if SYSTEM_PROMPT else "")] = (constant, policy, SYSTEM_PROMPT)
        if len(found) < 2:
            stop("POLICY_AGAINST is POLICY itself: name another one, or give the second condition a SYSTEM_PROMPT")
    return found


def answer_prompts(prompts: list[dict]) -> None:
    """Put the answers of each condition into the prompts, all with the same random numbers."""
    from utils.data.tokens import load_tokenizer
    from utils.models import generation, loading

    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    template = read_json(Path(DATA_DIR) / "metadata.json").get("chat_template", "")
    for name, (constant, policy, persona) in conditions().items():
        tokenizer = load_tokenizer(policy, template, constant)
        model = loading.load_causal(policy, constant).to(device)
        context = getattr(model.config, "max_position_embeddings", MAX_LENGTH + MAX_NEW_TOKENS)
        if context < MAX_LENGTH + MAX_NEW_TOKENS:
            stop(f"MAX_LENGTH + MAX_NEW_TOKENS = {MAX_LENGTH + MAX_NEW_TOKENS}: {policy} has a context of {context}")
        talks = [with_persona(entry["turns"], persona) for entry in prompts]
        asked = generation.prompts_of(tokenizer, talks, MAX_LENGTH)
        how = {"precision": precision, "progress": f"answers of {name}"}
        answers = generation.generate(model, tokenizer, asked, MAX_NEW_TOKENS, TEMPERATURE, SEED, **how)
        for entry, answer in zip(prompts, answers, strict=True):
            entry["answers"][name] = ratings.clean(answer.text)


def make_items(folder: Path, chosen: dict) -> None:
    """Write settings.json, then items.jsonl, which makes the folder one to rate."""
    prompts, names = ratings.read_samples(Path(SAMPLES)) if SAMPLES else (random_prompts(), list(conditions()))
    layout = ratings.complete_layout(LAYOUT, names, HUMAN, any(entry["human"] for entry in prompts))
    if not SAMPLES:
        answer_prompts(prompts)
    made = ratings.make_items(prompts, names, layout, HUMAN, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"recipe": chosen, "conditions": [*names, ratings.HUMAN], "made": time.strftime("%F %T")}
    write_json(folder / "settings.json", about)
    write_lines(folder / ratings.ITEMS_FILE, made)
    say(f"{len(prompts)} prompts, {len(made)} items ({layout}) in {folder}, answered by: {', '.join(names)}")


def source_hash(source: str) -> str:
    """What a Content-Security-Policy calls an inline script or style, so that no other one may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page(asked: list[dict]) -> str:
    """Return the rating page. Its texts are JSON data only, and nothing in it names the condition of an answer."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    seen = [
        {"id": item["id"], "human": ratings.shown(item["human"])}
        | {"turns": [{"role": turn["role"], "content": ratings.shown(turn["content"])} for turn in item["turns"]]}
        | {"answers": [ratings.shown(answer) for answer in item["answers"]]}
        for item in asked
    ]
    data = {"kind": ratings.PAGE_KIND, "file": ratings.fingerprint(asked), "rater": RATER, "language": LABELS}
    data |= {"criteria": ratings.CRITERIA, "words": WORDS[LABELS], "items": seen}
    folder = FileSystemLoader(Path(__file__).parent / "lib")
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["source_hash"] = source_hash
    return environment.get_template("page.html.jinja").render(data=data)


def read_back(folder: Path, asked: list[dict]) -> list[dict]:
    """Take in the ratings of IMPORT, all of them or, where one is unusable, none; return all ratings of the folder."""
    own, file = {item["id"]: item for item in asked}, folder / ratings.RATINGS_FILE
    given = [(name, ratings.read_ratings(Path(name), own, ratings.fingerprint(asked))) for name in IMPORT]
    known = ratings.read_own(file, own)
    for name, new in given:
        known, added, replaced = ratings.merged(known, new)
        say(f"{name}: {added} new ratings, {replaced} in place of earlier ones, {len(new) - added - replaced} known")
    write_lines(file, known)
    return known


def with_rewards(asked: list[dict]) -> list[dict]:
    """Return the items with the rewards of REWARD_MODEL for their answers."""
    from utils.models.reward_model import RewardModel

    judge = RewardModel.load(REWARD_MODEL, DEVICE)
    talks = [[*item["turns"], {"role": "assistant", "content": text}] for item in asked for text in item["answers"]]
    rewards = iter(judge.score(talks).tolist())
    return [item | {"rewards": [next(rewards) for _ in item["answers"]]} for item in asked]


def report(folder: Path, asked: list[dict], known: list[dict]) -> None:
    """Print what the ratings show, write ratings.json and, where TO_ROWS names a file, the preference rows."""
    from extras.lib import agreement

    own, conditions = {item["id"]: item for item in asked}, read_json(folder / "settings.json")["conditions"]
    if not known:
        stop(f"{folder} has no ratings yet: rate {folder / 'rate.html'} and --import its download")
    found = agreement.summary(own, known, conditions)
    write_json(folder / "ratings.json", found)
    say(agreement.format_summary(found))
    say(f"written: {folder / 'ratings.json'}")
    if TO_ROWS:
        duels = agreement.over_raters(agreement.duels_of(own, known, conditions))
        rows, left_out = ratings.preference_rows(duels)
        Path(TO_ROWS).parent.mkdir(parents=True, exist_ok=True)
        write_lines(Path(TO_ROWS), rows)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "nothing"
        say(f"written: {TO_ROWS}, {len(rows)} preference rows; left out: {reasons}")
        say(f"next: python load_helpsteer_dataset.py --dataset {TO_ROWS}")


@script
def main(settings: dict) -> None:
    # 1. check
    pick(WORDS, "LABELS", LABELS)
    pick(dict.fromkeys(ratings.HUMANS), "HUMAN", HUMAN)
    pick({"": 0, **ratings.LAYOUTS}, "LAYOUT", LAYOUT)
    check(settings)
    folder = Path(OUTPUT_DIR)
    # 2. read ratings back
    if IMPORT or TO_ROWS:
        asked = ratings.read_items(needs(folder / ratings.ITEMS_FILE, made_by="-m extras.rate_answers").parent)
        known = read_back(folder, asked)
        report(folder, with_rewards(asked) if REWARD_MODEL else asked, known)
        return
    # 3. or make what is to be rated
    chosen = recipe(settings)
    if take_folder(folder, chosen):
        say(f"{folder} holds the answers of an earlier start with the same settings: they are kept")
    else:
        make_items(folder, chosen)
    write_text(folder / "rate.html", page(ratings.read_items(folder)))
    # 4. print where it is
    say(f"written: {folder / 'rate.html'}: open it in a browser, or send it to a person; it needs nothing else")
    say(f"next: python -m extras.rate_answers --output_dir {OUTPUT_DIR} --import FILE, the download of the page")


if __name__ == "__main__":
    main(override_constants(globals()))
