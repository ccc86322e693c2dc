"""Train on the same pairs with this toolkit and with TRL, in separate processes, and compare time and memory.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py)
Writes : outputs/compare_training.json, and prints a table

python -m benchmarks.compare_training
python -m benchmarks.compare_training --method dpo --max_rows 32 --model models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import os
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

    from utils.runs import Run

# data
DATA_DIR = "processed_helpsteer"  # rows made by load_helpsteer_dataset.py
MAX_ROWS = 24  # training pairs for each variant
# model
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
# training
METHOD = "reward"  # reward = a scalar reward model | dpo
BATCH_SIZE = 4  # pairs per batch
LEARNING_RATE = 1e-5  # peak learning rate
SEED = 42  # of the order of rows
DEVICE = ""  # cuda | mps | cpu, "" = best available
METHODS = {"reward": "trl.RewardTrainer", "dpo": "trl.DPOTrainer"}
VARIANTS = {  # what is compared: arguments of its trainer
    "ours": {},
    "trl": {},  # TRL's defaults
    "trl_best": {"bf16": True, "gradient_checkpointing": False},
}
SHARED = {  # constants that all variants train with
    **{"EPOCHS": 2, "MAX_STEPS": 0, "ACCUMULATION": 1, "SCHEDULE": "linear", "WARMUP_SHARE": 0.0},
    **{"LOG_EVERY_STEPS": 1, "EVAL_EVERY_STEPS": 0, "SAVE_EVERY_STEPS": 0, "REPORT_TO": "none"},
}


def build(variant: str, settings: dict, device: torch.device) -> tuple[Trainer, float]:
    """Return (the trainer of a variant on MAX_ROWS pairs, seconds that its reference took)."""
    from transformers import set_seed

    from utils.data.processed import load_pairs, matching_tokenizer
    from utils.models import loading, shared_prompt
    from utils.runs import Run
    from utils.training import trainer as training

    tokenizer, _ = matching_tokenizer(DATA_DIR, "MODEL", MODEL)
    rows = load_pairs(DATA_DIR, "train", MAX_ROWS)
    set_seed(SEED)
    precision, _ = loading.choose_precision("", device)
    folder = Path(tempfile.mkdtemp()) / variant
    run = Run(folder, SHARED | settings, device=str(device), precision=precision)
    if variant.startswith("trl"):
        return trl_trainer(variant, rows, tokenizer, run), 0.0
    module, loss = ours(tokenizer, precision)
    collator = shared_prompt.collator_for(tokenizer, device)
    parts = {"train": rows, "validation": rows.select([0])}  # an empty one would have no reference
    trainer = training.PairTrainer(module.to(device), parts, collator, loss, run, lambda *_: {})
    began = time.perf_counter()
    if METHOD == "dpo":
        training.cache_reference(trainer, str(run.folder), "weights")
    return trainer, time.perf_counter() - began


def ours(tokenizer: object, precision: str) -> tuple[torch.nn.Module, Callable]:
    """Return (module, loss of a pair) of this toolkit."""
    from utils.models import loading, policies, reward_model
    from utils.training import losses

    if METHOD == "reward":
        head = reward_model.RewardHead("scalar")
        module = reward_model.RewardPairs(reward_model.start_model(MODEL, tokenizer, head))
        return module, losses.RewardPairLoss(head, "bradley_terry")
    module = policies.PolicyPairs(loading.load_causal(MODEL))
    return module, losses.PolicyPairLoss(
        module, losses.POLICY_LOSSES["dpo"], losses.LossConstants(0.1), 0.0, precision, True
    )


def trl_trainer(variant: str, rows: object, tokenizer: object, run: Run) -> Trainer:
    """Return stock TRL with its own precision and checkpointing, unless VARIANTS says otherwise."""
    from benchmarks import stock_trl
    from utils.models import loading, reward_model

    settings = run.record["settings"]

    def arguments(kind: type, **more: object) -> object:
        more.pop("gradient_checkpointing", None)
        named = {"per_device_train_batch_size": settings["BATCH_SIZE"], "learning_rate": settings["LEARNING_RATE"]}
        named |= {"num_train_epochs": settings["EPOCHS"], "seed": settings["SEED"], "logging_steps": 1}
        named |= {"use_cpu": run.record["device"] == "cpu", "save_strategy": "no", "report_to": "none"}
        return kind(str(run.folder), disable_tqdm=True, **named | more | VARIANTS[variant])

    if METHOD == "reward":
        model = reward_model.start_model(MODEL, tokenizer, reward_model.RewardHead("scalar"))
        return stock_trl.reward_trainer(model, rows, tokenizer, run, arguments)
    return stock_trl.dpo_trainer(loading.load_causal(MODEL), rows, tokenizer, run, arguments, "dpo", 0.1)


def measure(trainer: Trainer, before: float) -> dict[str, float]:
    """Return seconds per pair in the second epoch, peak memory, and the mean loss of the first epoch.

    Kernels are built in the first epoch. before: seconds spent before training; they count.
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
    """Measure a variant in a new process."""
    command = [sys.executable, "-m", "benchmarks.compare_training", *argv]
    environment = os.environ | {"COMPARE_VARIANT": variant}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        stop(f"{variant} failed: {(done.stderr.strip().splitlines() or ['killed, perhaps for its memory'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """Print one line per variant, with ratios to the first."""
    first = next(iter(figures.values()))
    say(f"{'':10} {'s / pair':>9} {'ratio':>6} {'peak GB':>8} {'ratio':>6} {'loss':>7}")
    for variant, result in figures.items():
        slower = result["seconds_per_pair"] / first["seconds_per_pair"]
        larger = result["peak_memory_gb"] / first["peak_memory_gb"]
        seconds, memory, loss = (result[name] for name in ("seconds_per_pair", "peak_memory_gb", "loss"))
        say(f"{variant:10} {seconds:9.2f} {slower:6.2f} {memory:8.2f} {larger:6.2f} {loss:7.4f}")


@script
def main(settings: dict) -> None:
    needs(DATA_DIR, made_by="load_helpsteer_dataset.py")
    pick(METHODS, "METHOD", METHOD)
    if variant := os.environ.get("COMPARE_VARIANT"):  # set by run_child
        from utils.models.loading import choose_device

        trainer, before = build(variant, settings, choose_device(DEVICE))
        print(json.dumps(measure(trainer, before)))
        return
    figures = {}
    for variant in VARIANTS:
        say(f"{METHOD}, {variant}: training on {MAX_ROWS} pairs in batches of {BATCH_SIZE}")
        figures[variant] = run_child(variant, sys.argv[1:])
    print_table(figures)
    output = Path("outputs/compare_training.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"settings": settings, "versions": versions(), "figures": figures})
    say(f"written: {output}")


if __name__ == "__main__":
    main(override_constants(globals()))
