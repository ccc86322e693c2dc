"""transformers.Trainer on shared-prompt batches: exact metrics, whole checkpoints, a stop at a bad loss."""

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

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from utils.models.policies import add_reference_logps, cache_key
from utils.models.shared_prompt import TOKENS_AT_ONCE, PairCollator, forward_pairs, pair_lengths
from utils.runs import Run, read_json, write_json
from utils.script import Interrupt, bar_off, first_process, pick, say, stop

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # what SCHEDULE may name
TRACKERS = {"none": "", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}  # REPORT_TO: package
KEPT_CHECKPOINTS = 2  # checkpoints that are kept
COMPLETE = "complete"  # a file written last: a checkpoint without it was cut off while it was saved
Losses = Callable[[dict, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def split_batch(batch: dict[str, torch.Tensor], tokens: int, multiple: int) -> list[dict[str, torch.Tensor]]:
    """The batch in parts of at most `tokens` positions (one row at least), padded to `multiple` as far as it needs.

    The gradient of the whole is the sum over the parts, in the memory of one of them.
    """
    ends = [name for name in ("ends", "guided_ends") if name in batch]
    found = torch.stack([batch[name].amax(dim=1) + 1 for name in ends]).tolist()  # a device is asked once, not a row
    lengths = dict(zip(ends, found, strict=True))
    parts, first = [], 0
    count = len(batch["row"])
    for i in range(1, count + 1):
        if i < count and (i + 1 - first) * sum(max(part[first : i + 1]) for part in lengths.values()) <= tokens:
            continue
        part = {name: value[first:i] for name, value in batch.items()}
        for name, those in lengths.items():
            longest = -(-max(those[first:i]) // multiple) * multiple
            for column in ("input_ids", "segments", "position_ids"):
                column = name.replace("ends", column)
                part[column] = part[column][:, :longest]
        parts.append(part)
        first = i
    return parts


class LengthSampler(Sampler[int]):
    """All rows once an epoch in random order, the rows of one optimizer step of like length and the longest first.

    The order is a function of seed, epoch and rows a step: a resumed run sees the same rows, and 4 rows at once the
    same as 1 row 4 times or 2 rows on 2 processes. The longest step comes first: what does not fit shows at once.
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
        short = [step for step in steps if len(step) < self.rows_per_step]  # at most one, and it comes last
        full = [step for step in steps if len(step) == self.rows_per_step]
        full = [full[i] for i in random.permutation(len(full))]
        if full:
            longest = max(range(len(full)), key=lambda i: self.lengths[full[i]].sum())
            full[0], full[longest] = full[longest], full[0]
        for step in full + short:
            yield from step.tolist()


def release_memory() -> None:
    """Give memory that tensors have left back to the system, where the C library would keep it (glibc).

    Batches of many lengths leave holes in its heap that the next ones do not fit, so a training on the CPU would grow
    from step to step.
    """
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float]
) -> torch.optim.Optimizer:
    """The optimizer, in which the parameters whose names hold a name of `rates` are groups of their own."""
    for name, rate in rates.items():
        found = [value for other, value in model.named_parameters() if name in other and value.requires_grad]
        for group in optimizer.param_groups:
            group["params"] = [value for value in group["params"] if not any(value is one for one in found)]
        optimizer.add_param_group({"params": found, "lr": rate, "weight_decay": 0.0})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def trained_state(model: nn.Module, state: dict | None = None) -> dict[str, torch.Tensor]:
    """The part of a model's state that is trained."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in (state or model.state_dict()).items() if name in trained}


class ResumesAnywhere:
    """Before a Trainer among the bases: a run goes on on another kind of GPU, which may need no GradScaler."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)


class StopsAtBadLoss(ResumesAnywhere):
    """Mixin to put before a Trainer: stop the run at a loss that is not finite, where Trainer would continue."""

    def training_step(self, *arguments: object, **named: object) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        if not torch.isfinite(loss):
            sys.exit(
                f"the loss is not finite at step {self.state.global_step + 1}: lower LEARNING_RATE or look at the "
                "rows; the last checkpoint is kept"
            )
        return loss


class PairTrainer(ResumesAnywhere, Trainer):
    """Train a module that takes batches of PairCollator with any loss over its outputs.

    rows: {"train": ..., "validation": ...}. losses: (outputs of the module, batch) -> (loss of each pair [pairs],
    {metric: value of each pair [pairs]}). evaluation: (outputs on all validation rows, these rows) -> metrics, called
    every EVAL_EVERY_STEPS on all processes. rates: {part of a parameter's name: its own learning rate}.
    """

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
        # Trainer asks for evaluation rows before it lets `evaluate` be called; ours knows its own
        shared = {"train_dataset": rows["train"], "eval_dataset": rows["train"], "data_collator": collator}
        super().__init__(model=model, args=args, **shared)
        add_step_callback(self, run)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthSampler:
        return self.sampler

    def create_optimizer(self, *arguments: object) -> torch.optim.Optimizer:
        return set_learning_rates(super().create_optimizer(*arguments), self.model, self.rates)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: object = None) -> torch.Tensor:
        """Forward and backward of a batch in parts: the same gradient in the memory of a part."""
        self.rows_in_batch = len(inputs["row"])
        parts = split_batch(inputs, TOKENS_AT_ONCE[self.accelerator.device.type], self.data_collator.multiple)
        parts = [inputs] if self.is_deepspeed_enabled else parts  # its engine takes a step at each backward
        losses = []
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> torch.Tensor:
        """The part of these rows in the mean loss of their batch; what is logged stays on the device until it is."""
        losses, metrics = self.losses(model(**inputs), inputs)
        self.recent.append((inputs["row"], losses.detach()))
        for name, value in {"loss": losses, **metrics, "pairs": torch.ones_like(losses)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float().sum()
        return losses.sum() / self.rows_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Exact means over all pairs since the last log, on all processes, in place of means of batch means."""
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
        """Return the outputs {name: [rows, ...]} of the trained module, or of another one, computed on all processes.

        See `forward_pairs`.
        """
        size = 2 * self.args.per_device_train_batch_size
        return forward_pairs(module or self.model_wrapped, rows, self.data_collator, size, self.accelerator)

    def validate(self) -> dict[str, float]:
        """Return the metrics of `evaluation` on the validation rows."""
        return self.evaluation(self.outputs_on(self.validation), self.validation)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Log and return the metrics of `validate` under eval_*."""
        metrics = {f"eval_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Only what is trained goes into a checkpoint: adapters alone are a hundredth of the model."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(trained_state(self.model, state_dict), Path(output_dir) / "trained_weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = torch.load(Path(resume_from_checkpoint) / "trained_weights.pt", weights_only=True, map_location="cpu")
        assert set(state) == set(trained_state(self.model)), "checkpoint of another model"
        self.model.load_state_dict(state, strict=False)


def add_step_callback(trainer: Trainer, run: Run) -> None:
    """Our step callback in place of the printing ones; works for any Trainer, TRL's too."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepCallback(trainer, run))


class StepCallback(TrainerCallback):
    """What happens around each step: a progress bar, the check of the loss, the answer to Ctrl-C."""

    def __init__(self, trainer: Trainer, run: Run):
        self.trainer, self.run, self.interrupt = trainer, run, Interrupt()
        self.bar = tqdm(disable=True)  # until steps are taken: all of them may have been in an earlier start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.interrupt.__enter__()
        self.bar = tqdm(None, "training", state.max_steps, initial=state.global_step, unit="step", disable=bar_off())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        sampler = getattr(self.trainer, "sampler", None)  # TRL's trainer has none
        if sampler is not None:
            # accelerate does not reach a sampler behind skipped batches, so a resumed epoch would differ
            sampler.set_epoch(int(state.epoch + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        recent = getattr(self.trainer, "recent", [])
        if not recent:
            return
        rows, losses = (torch.cat(part) for part in zip(*recent, strict=True))
        recent.clear()
        bad = rows[~torch.isfinite(losses)].tolist()
        if bad:
            sys.exit(
                f"the loss of training rows {bad} is not finite at step {state.global_step + 1}: lower LEARNING_RATE "
                "or look at these rows; the last checkpoint is kept"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.update()
        release_memory()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps too, where LOG_EVERY_STEPS does not divide their number
        asked = torch.tensor(float(self.interrupt.asked), device=self.trainer.accelerator.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum").item():
            control.should_save = control.should_training_stop = self.interrupt.asked = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            self.run.note()  # the time so far, should this process be killed

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: object
    ) -> None:
        if any(name == "loss" or name.startswith("eval_") for name in logs):  # not the summary of times at the end
            self.run.log(state.global_step, **{name: float(value) for name, value in logs.items()})
        self.bar.set_postfix(
            {name: f"{logs[name]:.3f}" for name in ("loss", "accuracy", "eval_accuracy") if name in logs}
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.close()
        self.interrupt.__exit__()
        if self.interrupt.asked and state.global_step < state.max_steps:
            say(f"stopped and saved at step {state.global_step}: start the same command again to go on")
            sys.exit(130)


class BestEpoch(TrainerCallback):
    """Keeps the weights of the epoch with the best accuracy on validation, in the folder of the checkpoints."""

    def __init__(self, trainer: PairTrainer, folder: Path):
        self.trainer = trainer
        self.file = folder / "checkpoints" / "best.json"
        trainer.add_callback(self)

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: object) -> None:
        if state.global_step and abs(state.epoch - round(state.epoch)) < 1e-6:  # a kill may have come between epochs
            self.on_epoch_end(self.trainer.args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        found = read_json(self.file) or {"accuracies": {}, "best": ""}
        epoch = str(math.ceil(state.epoch - 1e-6))
        stopped = control.should_training_stop and state.global_step < state.max_steps  # by Ctrl-C
        if stopped or epoch in found["accuracies"]:
            return
        accuracy = self.trainer.validate()["accuracy"]
        self.trainer.log({"eval_accuracy": accuracy})
        if first_process():
            if accuracy > max(found["accuracies"].values(), default=-1.0):
                found["best"] = epoch
                torch.save(trained_state(self.trainer.model), self.file.with_suffix(".pt"))
            found["accuracies"][epoch] = accuracy
            write_json(self.file, found)
        self.trainer.accelerator.wait_for_everyone()  # all read the file at the next step

    def restore(self) -> dict:
        """Put the best epoch's weights into the model; {"best": epoch, "accuracies": {epoch: on validation}}."""
        self.on_epoch_end(self.trainer.args, self.trainer.state, self.trainer.control)  # if it was killed before that
        state = torch.load(self.file.with_suffix(".pt"), weights_only=True, map_location="cpu")
        self.trainer.model.load_state_dict(state, strict=False)
        return read_json(self.file)


def cache_reference(trainer: PairTrainer, folder: str, weights: str) -> None:
    """Give the trainer's rows the log-probs of the reference, which is its policy as it is now.

    folder: where they are kept. weights: the digest of the policy's weights, see `policies.weights_digest`.
    """
    size, policy = 2 * trainer.args.per_device_train_batch_size, trainer.model
    for name in ("validation", "train_dataset"):
        rows = getattr(trainer, name)
        key = cache_key(rows, policy.start, weights, trainer.run.record["precision"])
        with_logps = add_reference_logps(rows, policy, trainer.data_collator, size, trainer.accelerator, folder, key)
        setattr(trainer, name, with_logps)


def training_arguments(
    run: Run, kind: type[TrainingArguments] = TrainingArguments, **named: object
) -> TrainingArguments:
    """Return the arguments of a Trainer for the constants in the record of a run; a step count of 0 means never.

    kind: TrainingArguments or a configuration class of TRL; named: arguments that only this class has.
    """
    record, settings = run.record, run.record["settings"]
    on_cpu, on_cuda = (record["device"].startswith(kind) for kind in ("cpu", "cuda"))
    if "project" in record:  # trackio takes it from the arguments, wandb from here
        os.environ.setdefault("WANDB_PROJECT", record["project"])
        named["project"] = record["project"]
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))  # else among the checkpoints
    arguments = kind(
        output_dir=str(run.folder / "checkpoints"),
        run_name=record.get("run_name", run.folder.name),
        num_train_epochs=settings["EPOCHS"],
        max_steps=settings["MAX_STEPS"] or -1,
        per_device_train_batch_size=settings["BATCH_SIZE"],
        gradient_accumulation_steps=settings["ACCUMULATION"],
        learning_rate=settings["LEARNING_RATE"],
        lr_scheduler_type=SCHEDULES[settings["SCHEDULE"]],
        warmup_steps=min(settings["WARMUP_SHARE"], 1 - 1e-9),  # a share: 1 would mean one step
        logging_steps=settings["LOG_EVERY_STEPS"],
        eval_strategy="steps" if settings["EVAL_EVERY_STEPS"] else "no",
        eval_steps=settings["EVAL_EVERY_STEPS"] or None,
        save_strategy="steps" if settings["SAVE_EVERY_STEPS"] else "no",
        save_steps=settings["SAVE_EVERY_STEPS"] or 500,  # Trainer takes no 0 here
        save_total_limit=KEPT_CHECKPOINTS,
        report_to=settings["REPORT_TO"],
        seed=settings["SEED"],
        use_cpu=on_cpu,
        bf16=record["precision"] == "bf16",
        fp16=record["precision"] == "fp16",
        logging_nan_inf_filter=False,  # by default a NaN loss is logged as 0.0
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **named,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with more, Trainer would wrap the model in DataParallel
    return arguments


def check_training(settings: dict) -> None:
    """Stop where SCHEDULE or REPORT_TO names something unknown, or a tracker that is not installed."""
    pick(SCHEDULES, "SCHEDULE", settings["SCHEDULE"])
    name = settings["REPORT_TO"]
    package = pick(TRACKERS, "REPORT_TO", name)
    if package and importlib.util.find_spec(package) is None:
        stop(f"REPORT_TO = {name!r} needs a package that is not installed: run `pip install {package}`")


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a run folder, None without one; a half-written one is not taken."""
    complete = [path for path in (folder / "checkpoints").glob("checkpoint-*") if (path / COMPLETE).exists()]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train(trainer: Trainer, run: Run) -> None:
    """Train from the last complete checkpoint, or from the start where there is none; the time is noted."""
    began = time.monotonic()
    trainer.accelerator.wait_for_everyone()  # the first process may just have moved an older run aside
    checkpoint = last_checkpoint(run.folder)
    state = read_json(Path(checkpoint) / "trainer_state.json") if checkpoint else {}
    if checkpoint and state["global_step"] >= state["max_steps"]:
        trainer._load_from_checkpoint(checkpoint)  # Trainer would take one step more than it was asked for
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    else:
        run.forget_after(state["global_step"] if checkpoint else 0)  # also of a start killed before its first one
        trainer.train(resume_from_checkpoint=checkpoint)
    run.note(train_seconds=round(time.monotonic() - began, 2))


def close(run: Run, accelerator: Accelerator) -> None:
    """End the run, and remove its checkpoints: three times the model, and of no more use."""
    accelerator.wait_for_everyone()
    run.finish()
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
