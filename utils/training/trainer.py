"""transformers.Trainer on shared-prompt batches: exact metrics, complete checkpoints, a stop at a bad loss."""

import contextlib
import ctypes
import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from utils.models.policies import PolicyPairs, add_reference_logps, cache_key
from utils.models.shared_prompt import TOKENS_AT_ONCE, PairCollator, forward_pairs, pair_lengths, split_batch
from utils.runs import Run, read_json, write_json
from utils.script import Interrupt, bar_off, first_process, pick, say, stop

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # the C library
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}  # SCHEDULE: its name in transformers
TRACKERS = {"none": "", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}  # REPORT_TO: package
KEPT_CHECKPOINTS = 2
COMPLETE = "complete"  # the file that is written last: a checkpoint without it is half-written
Losses = Callable[[dict, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class LengthSampler(Sampler[int]):
    """Yield each row once per epoch, in random order, with rows of similar length in each optimizer step.

    The order depends only on seed, epoch and rows per step: a resumed run sees the same rows, and batches of 4x1 see
    those of 1x4. The longest step comes first, so that running out of memory shows at once.
    """

    def __init__(self, lengths: np.ndarray, rows_per_step: int, seed: int, steps_sorted_together: int = 32):
        self.lengths, self.rows_per_step, self.seed = lengths, rows_per_step, seed
        self.pool = rows_per_step * steps_sorted_together
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        steps = []
        for start in range(0, len(order), self.pool):
            pool = order[start : start + self.pool]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            steps += [pool[i : i + self.rows_per_step] for i in range(0, len(pool), self.rows_per_step)]
        short = [step for step in steps if len(step) < self.rows_per_step]  # one at most; it comes last
        full = [step for step in steps if len(step) == self.rows_per_step]
        full = [full[i] for i in random.permutation(len(full))]
        if full:
            longest = max(range(len(full)), key=lambda i: self.lengths[full[i]].sum())
            full[0], full[longest] = full[longest], full[0]
        for step in full + short:
            yield from step.tolist()


def release_memory() -> None:
    """Return freed memory to the system: glibc would keep it, and training on the CPU would grow from step to step."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def trained_state(model: nn.Module, state: dict | None = None) -> dict[str, torch.Tensor]:
    """Return the trained entries of a model's state."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in (state or model.state_dict()).items() if name in trained}


class PortableTrainer(Trainer):
    """A Trainer that resumes on another kind of GPU, which may need no GradScaler."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)


class PairTrainer(PortableTrainer):
    """Train a module on batches of PairCollator, with any loss over its outputs.

    rows: {"train": ..., "validation": ...}. losses: (outputs, batch) -> (loss [pairs], {metric: [pairs]}).
    evaluation: (outputs on all validation rows, the rows) -> metrics; called every EVAL_EVERY_STEPS on all processes.
    rates: {substring of parameter names: learning rate}.
    """

    model: nn.Module
    data_collator: PairCollator

    def __init__(
        self,
        model: nn.Module,
        rows: dict[str, Dataset],
        collator: PairCollator,
        losses: Losses,
        run: Run,
        evaluation: Callable[[dict[str, np.ndarray], Dataset], dict[str, float]],
        rates: dict[str, float] | None = None,
    ):
        self.run, args = run, training_arguments(run)
        self.validation, self.losses, self.evaluation, self.rates = rows["validation"], losses, evaluation, rates or {}
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = LengthSampler(pair_lengths(rows["train"]), rows_per_step, args.seed)
        self.sums: dict[str, torch.Tensor] = {}
        self.recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # (row numbers, losses) since the last step
        shared = {"train_dataset": rows["train"], "eval_dataset": rows["train"], "data_collator": collator}
        super().__init__(model=model, args=args, **shared)  # evaluation rows only because Trainer insists
        add_step_callback(self, run)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthSampler:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        for substring, rate in self.rates.items():
            named = self.model.named_parameters()
            own = dict.fromkeys(value for name, value in named if substring in name and value.requires_grad)
            for group in optimizer.param_groups:
                group["params"] = [value for value in group["params"] if value not in own]
            optimizer.add_param_group({"params": list(own), "lr": rate, "weight_decay": 0.0})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward in micro-batches: the same gradient in less memory."""
        self.rows_in_batch = len(inputs["row"])
        tokens = TOKENS_AT_ONCE[self.accelerator.device.type]
        micro_batches = split_batch(inputs, tokens, self.data_collator.multiple)
        if self.is_deepspeed_enabled:  # its engine takes a step at each backward
            micro_batches = [inputs]
        losses = []
        for i, micro_batch in enumerate(micro_batches, start=1):
            with contextlib.nullcontext() if i == len(micro_batches) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the share of these rows in the mean loss of the batch. Metrics stay on the device until logged."""
        losses, metrics = self.losses(model(**inputs), inputs)
        self.recent.append((inputs["row"], losses.detach()))
        for name, value in {"loss": losses, **metrics, "pairs": torch.ones_like(losses)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float().sum()
        return losses.sum() / self.rows_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log exact means over all pairs since the last log, on all processes, instead of means of batch means."""
        if "train_runtime" in logs:
            return
        if self.sums and "loss" in logs:
            names = sorted(self.sums)
            values = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
            sums = dict(zip(names, values.tolist(), strict=True))
            logs.update({name: sums[name] / sums["pairs"] for name in names if name != "pairs"})
            self.sums = {}
        super().log(logs, start_time)

    def outputs_on(self, rows: Dataset, module: nn.Module | None = None) -> dict[str, np.ndarray]:
        """Return the outputs {name: [rows, ...]} of the trained module or of another one; see forward_pairs."""
        size = 2 * self.args.per_device_train_batch_size
        return forward_pairs(module or self.model_wrapped, rows, self.data_collator, size, self.accelerator)

    def validate(self) -> dict[str, float]:
        """Return the metrics on the validation rows."""
        return self.evaluation(self.outputs_on(self.validation), self.validation)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return the metrics of `validate` as eval_*."""
        metrics = {f"eval_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save only the trained weights: adapters are a hundredth of the model."""
        if self.args.should_save:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(trained_state(self.model, state_dict), Path(output_dir) / "trained_weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = torch.load(Path(resume_from_checkpoint) / "trained_weights.pt", weights_only=True, map_location="cpu")
        assert set(state) == set(trained_state(self.model)), "checkpoint from a different model"
        self.model.load_state_dict(state, strict=False)


def add_step_callback(trainer: Trainer, run: Run) -> None:
    """Replace the printing callbacks of any Trainer by a StepCallback."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepCallback(trainer, run))


class StepCallback(TrainerCallback):
    """Show progress, log to the run folder, stop at a bad loss, and save at Ctrl-C."""

    def __init__(self, trainer: Trainer, run: Run):
        self.trainer, self.run, self.interrupt = trainer, run, Interrupt()
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interrupt.__enter__()
        self.bar = tqdm(None, "training", state.max_steps, initial=state.global_step, unit="step", disable=bar_off())

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        sampler = getattr(self.trainer, "sampler", None)  # TRL's trainer has none
        if sampler is not None:
            # accelerate does not set the epoch of a resumed run, whose first batches it skips
            sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        recent = getattr(self.trainer, "recent", [])
        if not recent:
            return
        rows, losses = (torch.cat(tensors) for tensors in zip(*recent, strict=True))
        recent.clear()
        bad = rows[~torch.isfinite(losses)].tolist()
        if bad:
            sys.exit(
                f"the loss of training rows {bad} is not finite at step {state.global_step + 1}: lower LEARNING_RATE "
                "or look at these rows; the last checkpoint is kept"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()
        release_memory()
        if state.global_step >= state.max_steps:
            control.should_log = True  # also if LOG_EVERY_STEPS does not divide the steps
        asked = torch.tensor(float(self.interrupt.asked), device=self.trainer.accelerator.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum").item():
            control.should_save = control.should_training_stop = self.interrupt.asked = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            self.run.note()  # the time so far, in case the process is killed

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        logs = named["logs"]
        if any(name == "loss" or name.startswith("eval_") for name in logs):  # not the timings at the end
            self.run.log(state.global_step, **{name: float(value) for name, value in logs.items()})
        names = ("loss", "accuracy", "eval_accuracy")
        self.bar.set_postfix({name: f"{logs[name]:.3f}" for name in names if name in logs})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()
        self.interrupt.__exit__()
        if self.interrupt.asked and state.global_step < state.max_steps:
            say(f"stopped, checkpoint saved at step {state.global_step}: run the same command to resume")
            sys.exit(130)


class BestEpoch(TrainerCallback):
    """Keep the weights of the epoch with the best accuracy on validation, next to the checkpoints."""

    def __init__(self, trainer: PairTrainer, folder: Path):
        self.trainer = trainer
        self.file = folder / "checkpoints" / "best.json"
        trainer.add_callback(self)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = state.epoch or 0.0
        if state.global_step and abs(epoch - round(epoch)) < 1e-6:  # a run killed after the checkpoint of an epoch
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        record = read_json(self.file) or {"accuracies": {}, "best": ""}
        epoch = str(math.ceil((state.epoch or 0.0) - 1e-6))
        stopped = control.should_training_stop and state.global_step < state.max_steps  # by Ctrl-C
        if stopped or epoch in record["accuracies"]:
            return
        accuracy = self.trainer.validate()["accuracy"]
        self.trainer.log({"eval_accuracy": accuracy})
        if first_process():
            if accuracy > max(record["accuracies"].values(), default=-1.0):
                record["best"] = epoch
                torch.save(trained_state(self.trainer.model), self.file.with_suffix(".pt"))
            record["accuracies"][epoch] = accuracy
            write_json(self.file, record)
        self.trainer.accelerator.wait_for_everyone()  # all processes read the file at the next step

    def restore(self) -> dict:
        """Load the weights of the best epoch. Return {"best": epoch, "accuracies": {epoch: on validation}}."""
        self.on_epoch_end(self.trainer.args, self.trainer.state, self.trainer.control)  # if killed before it
        state = torch.load(self.file.with_suffix(".pt"), weights_only=True, map_location="cpu")
        self.trainer.model.load_state_dict(state, strict=False)
        return read_json(self.file)


def cache_reference(trainer: PairTrainer, folder: str, weights: str) -> None:
    """Add the log-probs of the reference, the policy before its first step, to the rows of the trainer.

    folder: of the cache. weights: digest of the policy, see policies.weights_digest.
    """
    size, policy = 2 * trainer.args.per_device_train_batch_size, trainer.model
    assert isinstance(policy, PolicyPairs)
    for name in ("validation", "train_dataset"):
        rows = getattr(trainer, name)
        key = cache_key(rows, policy.start, weights, trainer.run.record["precision"])  # type: ignore[arg-type]
        with_logps = add_reference_logps(rows, policy, trainer.data_collator, size, trainer.accelerator, folder, key)
        setattr(trainer, name, with_logps)


def training_arguments(run: Run, kind: type[TrainingArguments] = TrainingArguments, **named: Any) -> TrainingArguments:
    """Return the arguments of a Trainer for the settings of a run. named: what only `kind`, a class of TRL, takes."""
    record, settings = run.record, run.record["settings"]
    if "project" in record:  # trackio reads the argument, wandb the variable
        os.environ.setdefault("WANDB_PROJECT", record["project"])
        named["project"] = record["project"]
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))  # not among the checkpoints
    arguments = kind(
        output_dir=str(run.folder / "checkpoints"),
        run_name=record.get("run_name", run.folder.name),
        num_train_epochs=settings["EPOCHS"],
        max_steps=settings["MAX_STEPS"] or -1,
        per_device_train_batch_size=settings["BATCH_SIZE"],
        gradient_accumulation_steps=settings["ACCUMULATION"],
        learning_rate=settings["LEARNING_RATE"],
        lr_scheduler_type=SCHEDULES[settings["SCHEDULE"]],
        warmup_steps=min(settings["WARMUP_SHARE"], 1 - 1e-9),  # 1 would mean one step
        logging_steps=settings["LOG_EVERY_STEPS"],
        eval_strategy="steps" if settings["EVAL_EVERY_STEPS"] else "no",
        eval_steps=settings["EVAL_EVERY_STEPS"] or None,
        save_strategy="steps" if settings["SAVE_EVERY_STEPS"] else "no",
        save_steps=settings["SAVE_EVERY_STEPS"] or 500,
        save_total_limit=KEPT_CHECKPOINTS,
        report_to=settings["REPORT_TO"],
        seed=settings["SEED"],
        use_cpu=record["device"].startswith("cpu"),
        bf16=record["precision"] == "bf16",
        fp16=record["precision"] == "fp16",
        logging_nan_inf_filter=False,  # by default a NaN loss is logged as 0.0
        remove_unused_columns=False,
        dataloader_pin_memory=record["device"].startswith("cuda"),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **named,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel
    return arguments


def check_training(settings: dict) -> None:
    """Stop at an unknown SCHEDULE or REPORT_TO, or at a tracker that is not installed."""
    pick(SCHEDULES, "SCHEDULE", settings["SCHEDULE"])
    name = settings["REPORT_TO"]
    package = pick(TRACKERS, "REPORT_TO", name)
    if package and importlib.util.find_spec(package) is None:
        stop(f"REPORT_TO = {name!r} needs a package that is not installed: run `pip install {package}`")


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    complete = [path for path in (folder / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).exists()]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train(trainer: Trainer, run: Run) -> None:
    """Train from the last complete checkpoint, or from the start; record the time."""
    began = time.monotonic()
    trainer.accelerator.wait_for_everyone()  # the first process may move an older run aside
    checkpoint = last_checkpoint(run.folder)
    state = read_json(Path(checkpoint) / "trainer_state.json") if checkpoint else {}
    if checkpoint and state["global_step"] >= state["max_steps"]:
        trainer._load_from_checkpoint(checkpoint)  # train() would take one more step
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    else:
        run.forget_after(state.get("global_step", 0))  # of steps that are taken again
        trainer.train(resume_from_checkpoint=checkpoint)
    run.note(train_seconds=round(time.monotonic() - began, 2))


def close(run: Run, accelerator: Accelerator) -> None:
    """End the run and remove its checkpoints, which are three times as large as the model."""
    accelerator.wait_for_everyone()
    run.finish()
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
