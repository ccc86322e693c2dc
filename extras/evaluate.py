"""Judge a reward model on pairs: any split of processed rows, or pairs of another origin, with accuracy by subset.

Reads  : outputs/reward_model/ or a reward model of the hub; processed_helpsteer/ or a file of chosen and rejected
Writes : outputs/evaluation/ (eval.json, predictions.jsonl, run.json, plots)

python -m extras.evaluate --reward_model outputs/reward_model --data_dir processed_helpsteer --split test
python -m extras.evaluate --reward_model outputs/reward_model --dataset my_pairs.jsonl
python -m extras.evaluate --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import Run, at_least, needs, say, script, stop

if TYPE_CHECKING:
    from datasets import Dataset

    from utils.rewards import RewardModel

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
SPLIT = "validation"  # train | validation | test, of DATA_DIR
DATASET = ""  # in place of DATA_DIR: file, folder or hub name of pairs (prompt, chosen, rejected, perhaps subset)
MAX_ROWS = 0  # the first so many pairs only, 0 = all of them
# model
REWARD_MODEL = "outputs/reward_model"  # run folder of train_reward_model.py, or a hub reward model with one output
SHORTCUT_MODEL = ""  # folder of a reward model that was trained with ANSWERS_ONLY, to compare with
CONTROL_PAIRS = 500  # pairs on which it is also tried without the prompts and with wrong ones, 0 = none
BATCH_SIZE = 8  # answers in memory at once
SEED = 42  # of the untrained head that it is compared with
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
PRECISION = ""  # fp32 | bf16 | fp16, "" = what the device does natively
# output
OUTPUT_DIR = "outputs/evaluation"  # the run folder


def pairs_of_another_origin(dataset: str, max_rows: int) -> Dataset:
    """Rows of the checked pairs of a file, folder or hub dataset; what is left out is counted aloud."""
    from itertools import islice

    from datasets import Dataset

    from utils.pairing import checked_pairs
    from utils.rows import Ledger, finished_row
    from utils.sources import open_source

    source, ledger = open_source(dataset, "average"), Ledger()
    pairs = [
        finished_row(pair, "") | {"subset": pair.get("subset", "")}
        for role, read in source.splits.items()
        for pair in checked_pairs(read, source.layouts[role], "average", role, 0.0, ledger)
    ]
    if ledger.entries:
        say("left out: " + ", ".join(f"{count} {reason}" for reason, count in ledger.counts().items()))
    if not pairs:
        stop(f"DATASET = {dataset!r} has no pair to judge: it needs prompt, chosen and rejected")
    return Dataset.from_list(list(islice(pairs, max_rows or None)))


def in_its_window(rows: Dataset, model: RewardModel) -> Dataset:
    """The rows as the model reads them: with its tokenizer, its template and its window; equal pairs left out."""
    from utils.controls import closed_answers
    from utils.tokens import token_columns, tokenised

    known = [name for name in token_columns(rows[:1], model.tokenizer, model.max_length) if name in rows.column_names]
    rows = tokenised(rows.remove_columns(known), model.tokenizer, model.max_length)
    different = [i for i, equal in enumerate(rows["equal_after_cut"]) if not equal]
    if len(different) < len(rows):
        say(f"{len(rows) - len(different)} of {len(rows)} pairs are equal in its window and are left out")
    return closed_answers(rows.select(different), model.tokenizer)


@script
def main(settings: dict) -> None:
    # 1. check
    at_least(1, BATCH_SIZE=BATCH_SIZE)
    at_least(0, MAX_ROWS=MAX_ROWS, CONTROL_PAIRS=CONTROL_PAIRS)
    if not DATASET:
        needs(f"{DATA_DIR}/{SPLIT}", made_by="load_helpsteer_dataset.py")
    from functools import partial

    import numpy as np

    from utils import judging, models, pairs, quality, quality_plots, rewards
    from utils.runs import read_json

    device, precision = models.choose_machine(DEVICE, PRECISION)
    # 2. load
    model = rewards.RewardModel.load(REWARD_MODEL, DEVICE, precision)
    rows = pairs_of_another_origin(DATASET, MAX_ROWS) if DATASET else pairs.load_pairs(DATA_DIR, SPLIT, MAX_ROWS)
    rows = in_its_window(rows, model)
    say(f"{REWARD_MODEL}: {model.reading.head} head, window of {model.max_length} tokens, {len(rows)} pairs")
    # 3. judge
    weights = model.config.get("surface_weights")
    started_from = read_json(f"{REWARD_MODEL}/run.json").get("settings", {}).get("MODEL")

    def outputs_of(some: Dataset, other: object = None) -> np.ndarray:
        judge = rewards.RewardModel(other, model.tokenizer, model.reading, model.max_length) if other else model
        return judge.pair_outputs(some, BATCH_SIZE)

    lines = judging.judged(
        outputs_of,
        rows,
        model.tokenizer,
        model.reading,
        np.array(weights) if weights else None,
        CONTROL_PAIRS,
        partial(rewards.untrained, started_from, model.reading, device, SEED) if started_from else None,
        SHORTCUT_MODEL,
    )
    result = quality.report(lines) | {"measured_on": DATASET or f"{DATA_DIR}/{SPLIT}", "reward_model": REWARD_MODEL}
    # 4. save
    run = Run(OUTPUT_DIR, settings, resume=False, device=str(device), precision=precision)
    quality_plots.write_results(run.folder, result, lines)
    run.finish()
    # 5. say where it is
    say(quality.told(result))
    for name, part in result["by_subset"].items():
        say(f"{name}: {part['accuracy']:.3f} [{part['low']:.3f}, {part['high']:.3f}] on {part['pairs']}")
    say(f"written: {run.folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
