"""Train the same pairs with this toolkit and with TRL, each in a process of its own, and compare time and memory.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : outputs/compare_training.json, and prints a table

python -m benchmarks.compare_training
python -m benchmarks.compare_training --method dpo --max_rows 32 --model models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import peak_memory_gb, versions, write_json
from utils.script import needs, pick, say, script, stop

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import Trainer

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 24  # training pairs that each variant trains on, once
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
# training
METHOD = "reward"  # reward = a scalar reward model | dpo
VARIANTS = ("ours", "trl", "trl_best")  # what is compared, see FLAGS
BATCH_SIZE = 4  # pairs at once
LEARNING_RATE = 1e-5  # learning rate at its highest
SEED = 42  # of the order of rows
DEVICE = ""  # cuda | mps | cpu, "" = the best one here
# output
OUTPUT = "outputs/compare_training.json"  # the figures
CHILD = ""  # set by this script itself: the variant that this process measures

METHODS = {"reward": "trl.RewardTrainer", "dpo": "trl.DPOTrainer"}
FLAGS = {  # what each variant asks of its trainer
    "ours": {},
    "ours_fp32": {"precision": "fp32"},
    "trl": {},  # TRL's defaults
    "trl_best": {"bf16": True, "gradient_checkpointing": False},
}


def build(
    method: str, variant: str, data_dir: str, max_rows: int, model: str, same: dict, place: torch.device
) -> tuple[Trainer, float]:
    """(the trainer of a variant over the first max_rows training pairs, seconds that the reference took before).

    same: training arguments that all variants share.
    """
    from transformers import TrainingArguments, set_seed

    from utils.data import processed
    from utils.models import loading, shared_prompt
    from utils.runs import Run
    from utils.training import trainer as training

    flags, work = FLAGS[variant], Path(tempfile.mkdtemp())
    tokenizer, _ = processed.matching_tokenizer(data_dir, "MODEL", model)
    rows = processed.load_pairs(data_dir, "train", max_rows)
    set_seed(same["seed"])
    if variant.startswith("trl"):
        return trl_trainer(method, model, rows, tokenizer, work, place, same | flags), 0.0
    precision, _ = loading.choose_precision(flags.get("precision", ""), place)
    args = training.training_arguments(TrainingArguments, work, place, precision, save_steps=0, eval_steps=0, **same)
    collator = shared_prompt.PairCollator(tokenizer.pad_token_id, shared_prompt.row_multiple(place))
    module, loss = ours(method, model, tokenizer)
    trainer = training.PairTrainer(module, args, rows, collator, loss, Run(work, {}), dict)
    began = time.perf_counter()
    if method == "dpo":
        from utils.models.policies import add_reference_logps

        trainer.train_dataset = add_reference_logps(
            rows, module.to(place), collator, 2 * same["per_device_train_batch_size"], trainer.accelerator, work, "key"
        )
    return trainer, time.perf_counter() - began


def ours(method: str, model: str, tokenizer: object) -> tuple[torch.nn.Module, Callable]:
    """(module, loss of a pair) of this toolkit."""
    from utils.models import loading, policies, reward_model
    from utils.training import losses

    if method == "reward":
        reading = reward_model.RewardHead("scalar")
        module = reward_model.RewardPairs(reward_model.start_model(model, tokenizer, reading))
        return module, losses.PairLoss(reading, "bradley_terry")
    module = policies.PolicyPairs(loading.load_causal(model))
    return module, losses.PolicyPairLoss(module, losses.POLICY_LOSSES["dpo"], losses.Knobs(0.1), 0.0, "bf16", True)


def trl_trainer(
    method: str, model: str, rows: object, tokenizer: object, work: Path, place: torch.device, options: dict
) -> Trainer:
    """Stock TRL with its own precision and checkpointing where `options` does not say otherwise."""
    from benchmarks import stock_trl
    from utils.models import loading, reward_model
    from utils.runs import Run

    def arguments(kind: type, **more: object) -> object:
        more.pop("gradient_checkpointing", None)
        named = {"use_cpu": place.type == "cpu", "save_strategy": "no", "disable_tqdm": True} | more | options
        return kind(str(work), **named)

    if method == "reward":
        network = reward_model.start_model(model, tokenizer, reward_model.RewardHead("scalar"))
        return stock_trl.reward_trainer(network, rows, tokenizer, Run(work, {}), arguments)
    network = loading.load_causal(model)
    return stock_trl.dpo_trainer(network, rows, tokenizer, Run(work, {}), arguments, "dpo", 0.1)


def measure(trainer: Trainer, before: float) -> dict[str, float]:
    """Seconds a pair of the second pass over all rows, peak memory, mean loss of the first pass.

    Kernels are built in the first pass. A pass without its first step would not do: ours takes the longest rows first.
    before: seconds spent on all pairs ahead of the training; they are counted.
    """
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_epoch_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    pairs = len(trainer.train_dataset)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line and line["epoch"] <= 1]
    return {
        "seconds_per_pair": round((ends[1] - ends[0] + before) / pairs, 3),
        "peak_memory_gb": peak_memory_gb(),
        "loss": round(sum(losses) / len(losses), 4),
    }


def run_child(variant: str, argv: list[str]) -> dict[str, float]:
    """The figures of a variant, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.compare_training", *argv, f"--child={variant}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        stop(f"{variant} failed: {(done.stderr.strip().splitlines() or ['killed, perhaps for its memory'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """One line a variant, with its ratios to the first one."""
    first = next(iter(figures.values()))
    say(f"{'':10} {'s / pair':>9} {'ratio':>6} {'peak GB':>8} {'ratio':>6} {'loss':>7}")
    for variant, found in figures.items():
        slower = found["seconds_per_pair"] / first["seconds_per_pair"]
        larger = found["peak_memory_gb"] / first["peak_memory_gb"]
        say(
            f"{variant:10} {found['seconds_per_pair']:9.2f} {slower:6.2f} {found['peak_memory_gb']:8.2f} {larger:6.2f} "
            f"{found['loss']:7.4f}"
        )


@script
def main(settings: dict) -> None:
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    pick(METHODS, "METHOD", METHOD)
    for variant in (CHILD,) if CHILD else VARIANTS:
        pick(FLAGS, "VARIANTS", variant)
    if CHILD:
        from utils.models.loading import choose_device

        same = {"per_device_train_batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seed": SEED}
        same |= {"report_to": "none", "logging_steps": 1, "num_train_epochs": 2}
        trainer, before = build(METHOD, CHILD, DATA_DIR, MAX_ROWS, MODEL, same, choose_device(DEVICE))
        print(json.dumps(measure(trainer, before)))
        return
    figures = {}
    for variant in VARIANTS:
        say(f"{METHOD}, {variant}: training on {MAX_ROWS} pairs in batches of {BATCH_SIZE}")
        figures[variant] = run_child(variant, sys.argv[1:])
    print_table(figures)
    Path(OUTPUT).parent.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT, {"settings": settings, "versions": versions(), "figures": figures})
    say(f"written: {OUTPUT}")


if __name__ == "__main__":
    main(override_constants(globals()))
