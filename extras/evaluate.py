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
    import numpy as np
    from datasets import Dataset
    from torch import nn

    from utils.models.reward_model import RewardModel

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
SPLIT = "validation"  # train | validation | test, of DATA_DIR
DATASET = ""  # instead of DATA_DIR: file, folder or hub name of pairs (prompt, chosen, rejected, perhaps subset)
MAX_ROWS = 0  # at most this many pairs, 0 = all
# model
REWARD_MODEL = "outputs/reward_model"  # run folder of train_reward_model.py, or a hub reward model with one output
CONTROL_PAIRS = 500  # pairs to judge again without prompts and with wrong prompts, 0 = none
# policies
POLICIES = ()  # instead of judging pairs: folders or hub names of policies to compare with their start
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the start of the policies: hub name or folder
JUDGE_MODEL = ""  # a second reward model that no policy was trained on, "" = none
BEST_OF_N = 4  # compare also the best of this many answers of the start by REWARD_MODEL, 0 = off
PROMPTS = 64  # prompts of SPLIT that each policy answers, with the same random numbers, 0 = all
MAX_NEW_TOKENS = 50  # length of an answer
TEMPERATURE = 1.0  # of the sampled answers; each policy also answers greedily
# running
BATCH_SIZE = 16  # answers or pairs in memory at once
SEED = 42  # of the sampled answers, and of the untrained head that a reward model is compared with
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "outputs/evaluation"  # the run folder


def load_pairs(model: RewardModel) -> Dataset:
    """Return the pairs of DATASET or DATA_DIR, tokenised for the model; pairs that are equal in its window left out."""
    from utils.data import processed
    from utils.data.tokens import token_columns, tokenised

    rows = checked_rows(model) if DATASET else processed.load_pairs(DATA_DIR, SPLIT, MAX_ROWS)
    columns = [name for name in token_columns(rows[:1], model.tokenizer, model.max_length) if name in rows.column_names]
    rows = tokenised(rows.remove_columns(columns), model.tokenizer, model.max_length)
    different = [i for i, equal in enumerate(rows["equal_after_cut"]) if not equal]
    if len(different) < len(rows):
        say(f"{len(rows) - len(different)} of {len(rows)} pairs are equal in its window and are left out")
    if not different:
        stop(f"no pair differs in the window of {model.max_length} tokens: choose other pairs")
    return processed.closed_answers(rows.select(different), model.tokenizer)


def checked_rows(model: RewardModel) -> Dataset:
    """Return the valid pairs of DATASET as rows; print how many were left out."""
    from itertools import islice

    from datasets import Dataset

    from utils.data.preferences import Ledger, checked_pairs, finished_row
    from utils.data.sources import open_source
    from utils.data.tokens import unfit

    fits = partial(unfit, tokenizer=model.tokenizer, max_length=model.max_length)
    source, ledger = open_source(DATASET, ""), Ledger()
    role = list(source.splits)[-1]  # the split that the source holds out, if any: the model may have learned the rest
    say(f"judged on the pairs of {DATASET}, split {source.split_used[role]}")
    pairs = [
        finished_row(pair, "") | {"subset": pair.get("subset", "")}
        for pair in checked_pairs(source.splits[role], source.layouts[role], "average", role, 0.0, ledger, fits)
    ]
    if ledger.entries:
        say("left out: " + ", ".join(f"{count} {reason}" for reason, count in ledger.counts().items()))
    if not pairs:
        stop(f"DATASET = {DATASET!r} has no pair to judge: it needs prompt, chosen and rejected")
    return Dataset.from_list(list(islice(pairs, MAX_ROWS or None)))


def judge_pairs(model: RewardModel) -> tuple[dict, list[dict]]:
    """Return (eval.json, lines of predictions.jsonl) of a reward model."""
    import numpy as np

    from utils.evaluation import predictions, reward_report
    from utils.models import loading, reward_model

    rows = load_pairs(model)
    say(f"{REWARD_MODEL}: {model.head.kind} head, window of {model.max_length} tokens, {len(rows)} pairs")
    base = read_json(f"{REWARD_MODEL}/run.json").get("settings", {}).get("MODEL", "")
    if base and CONTROL_PAIRS and not loading.is_there(base):
        say(f"not compared with an untrained head: {base}, the base model of {REWARD_MODEL}, is not available")
        base = ""
    untrained = partial(reward_model.random_head_model, base, model.head, model.model.device, SEED) if base else None

    def outputs_of(pairs: Dataset, other: nn.Module | None = None) -> np.ndarray:
        judge = reward_model.RewardModel(other, model.tokenizer, model.head, model.max_length) if other else model
        return judge.pair_outputs(pairs, BATCH_SIZE)

    weights = model.config.get("surface_weights")
    weights = np.array(weights) if weights else None
    lines = predictions.predict_pairs(outputs_of, rows, model.tokenizer, model.head, weights, CONTROL_PAIRS, untrained)
    result = reward_report.report(lines)
    result |= {"measured_on": DATASET or f"{DATA_DIR}/{SPLIT}", "reward_model": REWARD_MODEL}
    result["pairs_trained_on"] = predictions.trained_on(REWARD_MODEL, rows)
    if result["pairs_trained_on"]:
        say(f"WARNING: {REWARD_MODEL} was trained on the prompts of {result['pairs_trained_on']} of these pairs")
    epochs = read_json(f"{REWARD_MODEL}/eval.json").get("epochs")  # the best of them was chosen on validation rows
    result["selection_shares_rows"] = bool(epochs) and not DATASET and SPLIT == "validation"
    return result, lines


def compare_policies(
    policies: dict[str, str], judges: dict[str, RewardModel], precision: str
) -> tuple[dict, list[str], dict, dict]:
    """Return (eval.json, prompts, answers, scores) of the start and the policies on PROMPTS prompts of SPLIT."""
    from dataclasses import replace

    from extras.lib import frontier
    from utils.data.processed import load_pairs, matching_tokenizer, unique_prompts
    from utils.evaluation.policy_report import Sampler
    from utils.models.loading import load_causal

    tokenizer, metadata = matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    for folder in policies.values():  # check all of them before the first one answers
        matching_tokenizer(DATA_DIR, "POLICIES", folder)
    rows = unique_prompts(load_pairs(DATA_DIR, SPLIT), PROMPTS)
    prompts = [messages[:-1] for messages in rows["chosen"]]
    device = judges["reward"].model.device

    def load(name: str, constant: str = "POLICIES") -> nn.Module:
        return load_causal(name, constant).to(device).eval()

    window = metadata["max_length"]
    sampler = Sampler(tokenizer, window, MAX_NEW_TOKENS, TEMPERATURE, SEED, precision, BATCH_SIZE)
    samplers = {"sampled": sampler, "greedy": replace(sampler, temperature=0.0)}
    say(f"{len(prompts)} prompts of {DATA_DIR}/{SPLIT}, answered by {MODEL} and {', '.join(policies)}")
    answers = frontier.answers_of(policies, load(MODEL, "MODEL"), load, prompts, samplers, BEST_OF_N, judges["reward"])
    scores, metrics = {}, {}
    for way, sides in answers.items():
        scores[way], metrics[way] = frontier.side_by_side(sides, prompts, judges)
    result = {"prompts": len(prompts), "start": MODEL, "folders": policies, "policies": metrics}
    result["over_seeds"] = frontier.over_seeds(frontier.recipes(policies), scores["sampled"])
    return result, rows["prompt"], answers, scores


@script
def main(settings: dict) -> None:
    began = time.monotonic()
    # 1. check
    check(settings)
    if TEMPERATURE <= 0:
        stop(f"TEMPERATURE = {TEMPERATURE}: expected more than 0; greedy answers are compared anyway")
    if POLICIES and DATASET:
        stop("POLICIES answer the prompts of DATA_DIR, and DATASET has pairs to judge: set one of them")
    check_run_folder(OUTPUT_DIR, settings)
    if not DATASET:
        needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
        pick(splits_of(DATA_DIR), "SPLIT", SPLIT)
    from extras.lib import frontier
    from utils.evaluation import reward_report
    from utils.models import loading, reward_model

    device, precision = loading.choose_device_and_precision(DEVICE, PRECISION)
    facts = {"device": str(device), "precision": precision, "began": began}
    facts["data_fingerprint"] = None if DATASET else read_json(f"{DATA_DIR}/metadata.json").get("fingerprint")
    # the run folder is made at the end: an earlier run stays in place until this one has its results
    # 2. compare policies
    if POLICIES:
        policies = frontier.names_of(POLICIES)
        frontier.check_judge(policies, JUDGE_MODEL)
        judges = reward_model.load_judges(REWARD_MODEL, JUDGE_MODEL, DEVICE, precision)
        result, *answers = compare_policies(policies, judges, precision)
        run = Run(OUTPUT_DIR, settings, resume=False, **facts)
        frontier.write_comparison(run.folder, result, *answers)
        for way, metrics in result["policies"].items():
            say(f"\n{way}:\n{frontier.format_table(metrics, tuple(judges))}")
    # 3. or judge a reward model
    else:
        result, lines = judge_pairs(reward_model.RewardModel.load(REWARD_MODEL, DEVICE, precision))
        run = Run(OUTPUT_DIR, settings, resume=False, **facts)
        reward_report.write_report(run.folder, result, lines)
        say(reward_report.format_summary(result))
        for name, part in result["by_subset"].items():
            say(f"{name}: {part['accuracy']:.3f} [{part['low']:.3f}, {part['high']:.3f}] on {part['pairs']}")
    # 4. say where it is
    run.finish()
    say(f"written: {run.folder}\nnext: python -m extras.make_report --runs {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
