"""Judge a reward model on pairs, or, with POLICIES, policies by a reward model on the same held-out prompts.

Reads  : outputs/reward_model/ or a reward model of the hub; processed_helpsteer/ or a file of chosen and rejected
Writes : outputs/evaluation/ (eval.json, predictions.jsonl, run.json, plots)

python -m extras.evaluate --reward_model outputs/reward_model --data_dir processed_helpsteer --split test
python -m extras.evaluate --reward_model outputs/reward_model --dataset my_pairs.jsonl
python -m extras.evaluate --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B
python -m extras.evaluate --policies outputs/reinforce --judge_model outputs/judge --output_dir outputs/comparison
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.data.processed import splits_of
from utils.runs import Run, check_run_folder, read_json
from utils.script import check, needs, pick, say, script, stop

if TYPE_CHECKING:
    from datasets import Dataset

    from utils.models.reward_model import RewardModel

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
SPLIT = "validation"  # train | validation | test, of DATA_DIR
DATASET = ""  # in place of DATA_DIR: file, folder or hub name of pairs (prompt, chosen, rejected, perhaps subset)
MAX_ROWS = 0  # the first so many pairs only, 0 = all of them
# model
REWARD_MODEL = "outputs/reward_model"  # run folder of train_reward_model.py, or a hub reward model with one output
CONTROL_PAIRS = 500  # pairs on which it is also tried without the prompts and with wrong ones, 0 = none
# policies
POLICIES = ()  # in place of judging pairs: folders or hub names of policies to compare with their start
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # that start, a hub name or a folder
JUDGE_MODEL = ""  # a second reward model, which no policy was trained on, "" = none
BEST_OF_N = 4  # also the best of so many answers of the start by REWARD_MODEL, 0 = not
PROMPTS = 64  # of SPLIT, answered by each policy with the same random numbers, 0 = all
MAX_NEW_TOKENS = 50  # of an answer
TEMPERATURE = 1.0  # of the sampled answers; each policy also answers greedily
SYSTEM_PROMPT = ""  # a persona, with which each policy also answers, "" = none
# running
BATCH_SIZE = 16  # answers or pairs in memory at once
SEED = 42  # of the untrained head that a reward model is compared with, and of the samples
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "outputs/evaluation"  # the run folder


def pairs_of_another_origin(dataset: str, max_rows: int, model: RewardModel) -> Dataset:
    """Rows of the checked pairs of a file, folder or hub dataset; what is left out is counted aloud."""
    from itertools import islice

    from datasets import Dataset

    from utils.data.preferences import Ledger, checked_pairs, finished_row
    from utils.data.sources import open_source
    from utils.data.tokens import unfit

    fits = partial(unfit, tokenizer=model.tokenizer, max_length=model.max_length)
    source, ledger = open_source(dataset, ""), Ledger()
    role = list(source.splits)[-1]  # what the source holds out, where it does: the model may have learned the rest
    say(f"judged on the pairs of {dataset}, split {source.split_used[role]}")
    pairs = [
        finished_row(pair, "") | {"subset": pair.get("subset", "")}
        for pair in checked_pairs(source.splits[role], source.layouts[role], "average", role, 0.0, ledger, fits)
    ]
    if ledger.entries:
        say("left out: " + ", ".join(f"{count} {reason}" for reason, count in ledger.counts().items()))
    if not pairs:
        stop(f"DATASET = {dataset!r} has no pair to judge: it needs prompt, chosen and rejected")
    return Dataset.from_list(list(islice(pairs, max_rows or None)))


def in_its_window(rows: Dataset, model: RewardModel) -> Dataset:
    """The rows as the model reads them: with its tokenizer, its template and its window; equal pairs left out."""
    from utils.data.processed import closed_answers
    from utils.data.tokens import token_columns, tokenised

    known = [name for name in token_columns(rows[:1], model.tokenizer, model.max_length) if name in rows.column_names]
    rows = tokenised(rows.remove_columns(known), model.tokenizer, model.max_length)
    different = [i for i, equal in enumerate(rows["equal_after_cut"]) if not equal]
    if len(different) < len(rows):
        say(f"{len(rows) - len(different)} of {len(rows)} pairs are equal in its window and are left out")
    if not different:
        stop(f"no pair differs in the window of {model.max_length} tokens: other pairs are needed")
    return closed_answers(rows.select(different), model.tokenizer)


def judge_pairs(
    model: RewardModel, name: str, rows: Dataset, batch_size: int, controls: int, seed: int
) -> tuple[dict, list[dict]]:
    """(eval.json, lines of predictions.jsonl): the report on a reward model."""
    import numpy as np

    from utils.evaluation import predictions, reward_report
    from utils.models import loading, reward_model

    rows = in_its_window(rows, model)
    say(f"{name}: {model.head.kind} head, window of {model.max_length} tokens, {len(rows)} pairs")
    weights = model.config.get("surface_weights")
    started_from = read_json(f"{name}/run.json").get("settings", {}).get("MODEL")
    if started_from and controls and not loading.is_there(started_from):
        say(f"not compared with an untrained head: {started_from}, which {name} was trained from, cannot be had here")
        started_from = ""
    device = model.model.device

    def outputs_of(some: Dataset, other: object = None) -> np.ndarray:
        judge = reward_model.RewardModel(other, model.tokenizer, model.head, model.max_length) if other else model
        return judge.pair_outputs(some, batch_size)

    lines = predictions.predict_pairs(
        outputs_of,
        rows,
        model.tokenizer,
        model.head,
        np.array(weights) if weights else None,
        controls,
        partial(reward_model.random_head_model, started_from, model.head, device, seed) if started_from else None,
    )
    return reward_report.report(lines), lines


def compare_policies(
    policies: dict[str, str], model: str, data_dir: str, split: str, count: int, best_of: int, persona: str,
    judges: dict[str, RewardModel], sampling: dict,
) -> tuple[dict, list[str], dict, dict]:  # fmt: skip
    """(eval.json, prompts, answers, scores) of the start and the policies on `count` prompts of a split.

    sampling: what Sampler takes beside the tokenizer and the window.
    """
    from dataclasses import replace

    from extras.lib import frontier
    from utils.data import processed
    from utils.data.processed import unique_prompts
    from utils.evaluation import policy_report
    from utils.models import loading

    tokenizer, metadata = processed.matching_tokenizer(data_dir, "MODEL", model)
    for folder in policies.values():  # all of them before the first one answers: the ids are read by each
        processed.matching_tokenizer(data_dir, "POLICIES", folder)
    rows = unique_prompts(processed.load_pairs(data_dir, split), count)
    prompts = [messages[:-1] for messages in rows["chosen"]]
    device = judges["reward"].model.device

    def load(name: str) -> object:
        return loading.load_causal(name, "POLICIES").to(device).eval()

    sampler = policy_report.Sampler(tokenizer, metadata["max_length"], **sampling)
    samplers = {"sampled": sampler, "greedy": replace(sampler, temperature=0.0)}
    start = loading.load_causal(model).to(device).eval()
    say(f"{len(prompts)} prompts of {data_dir}/{split}, answered by {model} and {', '.join(policies)}")
    answers = frontier.answers_of(policies, start, load, prompts, samplers, best_of, judges["reward"], persona)
    scores, figures = {}, {}
    for way, sides in answers.items():
        scores[way], figures[way] = frontier.side_by_side(sides, prompts, judges)
    result = {"prompts": len(prompts), "start": model, "folders": policies, "policies": figures}
    result["over_seeds"] = frontier.over_seeds(frontier.recipes(policies), scores["sampled"])
    return result, rows["prompt"], answers, scores


@script
def main(settings: dict) -> None:
    began = time.monotonic()
    # 1. check
    check(settings)
    if TEMPERATURE <= 0:
        stop(f"TEMPERATURE = {TEMPERATURE}: expected more than 0; greedy answers are compared anyway")
    check_run_folder(OUTPUT_DIR, settings)
    if not DATASET:
        needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
        pick(splits_of(DATA_DIR), "SPLIT", SPLIT)
    from extras.lib import frontier
    from utils.data import processed
    from utils.evaluation import predictions, reward_report
    from utils.models import loading, reward_model

    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    if POLICIES and DATASET:
        stop("POLICIES answer the prompts of DATA_DIR, and DATASET has pairs to judge: set one of them")
    facts = {"device": str(device), "precision": precision, "began": began}  # an older run stays until this one is done
    facts["data_fingerprint"] = None if DATASET else read_json(f"{DATA_DIR}/metadata.json").get("fingerprint")
    # 2. compare policies
    if POLICIES:
        policies = frontier.names_of(POLICIES)
        frontier.check_judge(policies, JUDGE_MODEL)
        judges = reward_model.load_judges(REWARD_MODEL, JUDGE_MODEL, DEVICE, precision)
        how = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, "seed": SEED, "precision": precision}
        result, *found = compare_policies(
            policies, MODEL, DATA_DIR, SPLIT, PROMPTS, BEST_OF_N, SYSTEM_PROMPT, judges,
            how | {"batch_size": BATCH_SIZE},
        )  # fmt: skip
        run = Run(OUTPUT_DIR, settings, resume=False, **facts)
        frontier.write_results(run.folder, result, *found)
        for way, figures in result["policies"].items():
            say(f"\n{way}:\n{frontier.format_table(figures, tuple(judges))}")
    # 3. or judge a reward model
    else:
        model = reward_model.RewardModel.load(REWARD_MODEL, DEVICE, precision)
        if DATASET:
            rows = pairs_of_another_origin(DATASET, MAX_ROWS, model)
        else:
            rows = processed.load_pairs(DATA_DIR, SPLIT, MAX_ROWS)
        result, lines = judge_pairs(model, REWARD_MODEL, rows, BATCH_SIZE, CONTROL_PAIRS, SEED)
        result |= {"measured_on": DATASET or f"{DATA_DIR}/{SPLIT}", "reward_model": REWARD_MODEL}
        result["pairs_trained_on"] = predictions.trained_on(REWARD_MODEL, rows)
        if result["pairs_trained_on"]:
            say(f"WARNING: {REWARD_MODEL} was trained on the prompts of {result['pairs_trained_on']} of these pairs")
        chosen = read_json(f"{REWARD_MODEL}/eval.json").get("epochs")  # on validation, which then flatters
        result["selection_shares_rows"] = bool(chosen) and not DATASET and SPLIT == "validation"
        run = Run(OUTPUT_DIR, settings, resume=False, **facts)
        reward_report.write_results(run.folder, result, lines)
        say(reward_report.format_summary(result))
        for name, part in result["by_subset"].items():
            say(f"{name}: {part['accuracy']:.3f} [{part['low']:.3f}, {part['high']:.3f}] on {part['pairs']}")
    # 4. say where it is
    run.finish()
    say(f"written: {run.folder}\nnext: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
