"""The policy of REINFORCE as accelerate runs it: its optimizer, one step, and a state to go on from."""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from utils.models import release_memory, trained_state
from utils.pairs import TOKENS_AT_ONCE, row_multiple
from utils.reinforce import Baseline, Policy
from utils.runs import Run
from utils.sampling import Answer, batch_of, parts_of
from utils.script import first_process, say, stop
from utils.training import COMPLETE, KEPT, last_checkpoint

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's names for PRECISION


@dataclass
class Engine:
    """The policy as accelerate runs it, with its optimizer and the schedule of its rate."""

    accelerator: Accelerator
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def batches(self, answers: list[Answer]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield (places in `answers`, their batch on the device) in parts, for one backward pass each.

        Memory does not grow with the number of answers. Processes exchange gradients in the last part only.
        """
        policy, device = self.policy.train(), self.accelerator.device
        parts = parts_of(answers, TOKENS_AT_ONCE[device.type])
        for part in parts:
            batch = batch_of([answers[i] for i in part], multiple=row_multiple(device))
            batch = {name: value.to(device) for name, value in batch.items()}
            with contextlib.nullcontext() if part is parts[-1] else self.accelerator.no_sync(policy):
                yield part, batch

    def step(self, longest: float) -> float:
        """Move along the gradients, cut to the length `longest` (0: not cut), and forget them; their length before.

        A gradient that is not finite moves nothing. Under fp16 a GradScaler takes that for too large a scale, lowers
        it and goes on: the length is then 0.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), longest or math.inf))
        if self.accelerator.scaler is not None:
            norm = norm if math.isfinite(norm) else 0.0
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        release_memory()
        return norm

    def next_rate(self) -> float:
        """The learning rate of the step just taken; moves on to the next one."""
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        return rate

    def parts(self) -> dict[str, object]:
        """What has a state of its own beside the weights."""
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler is not None else {}
        return {"optimizer": self.optimizer, "schedule": self.schedule} | scaler

    def save(self, run: Run, step: int, baseline: Baseline) -> None:
        """checkpoints/checkpoint-{step}: trained weights, optimizer, schedule, baseline.

        Written beside its name and renamed when whole. What is sampled is a function of seed and step, so no state of
        a random generator is needed to go on with the same answers.
        """
        state = {"step": step, "baseline": asdict(baseline)}
        state["weights"] = trained_state(self.accelerator.unwrap_model(self.policy))
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        place = run.folder / "checkpoints" / f"checkpoint-{step}"
        part = place.with_name(f"part-{step}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        torch.save(state, part / "state.pt")
        (part / COMPLETE).touch()
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        run.note()  # the time so far, should this process be killed
        kept = sorted(place.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for older in kept[:-KEPT]:
            shutil.rmtree(older)

    def save_or_stop(self, run: Run, step: int, baseline: Baseline, due: bool, reason: str, asked: bool) -> None:
        """Save a checkpoint if it is due; save and stop the script after an alarm (`reason`) or Ctrl-C (`asked`)."""
        asked = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)).item() > 0
        if first_process() and (reason or asked or due):
            self.save(run, step, baseline)
        if reason or asked:
            self.accelerator.wait_for_everyone()  # a launcher kills the process that saves once another one has ended
        if reason:
            stop(f"stopped at step {step}, checkpoint saved: {reason}")
        if asked:
            say(f"stopped and saved at step {step}: start the same command again to go on")
            sys.exit(130)

    def resume(self, run: Run, baseline: Baseline) -> int:
        """Put all back as the last complete checkpoint of a run has it; the number of steps taken by then."""
        checkpoint = last_checkpoint(run.folder)
        if not checkpoint:
            forget_steps_after(0, run)  # of a start that was killed before its first checkpoint
            return 0
        state = torch.load(Path(checkpoint) / "state.pt", weights_only=True, map_location="cpu")
        module = self.accelerator.unwrap_model(self.policy)
        assert set(state["weights"]) == set(trained_state(module)), "checkpoint of another model"
        module.load_state_dict(state["weights"], strict=False)
        for name, part in self.parts().items():
            if name in state:  # a GradScaler is there on one kind of GPU and not on another
                part.load_state_dict(state[name])
        vars(baseline).update(state["baseline"])
        forget_steps_after(state["step"], run)
        return state["step"]


def forget_steps_after(step: int, run: Run) -> None:
    """Drop the lines of steps that will be done again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.forget_after(step, name)


def start_engine(
    policy: Policy,
    device: torch.device,
    precision: str,
    run: Run,
    *,
    rate: float,
    decay: float,
    schedule: str,
    warmup_share: float,
    steps: int,
    tracker: str = "none",
) -> Engine:
    """The policy on its device, in its precision, with AdamW.

    rate: at its highest. decay: of the weights. schedule: transformers' name. warmup_share: of the steps, in which the
    rate grows from 0. tracker: none, or what accelerate logs to.
    """
    accelerator = Accelerator(
        mixed_precision=MIXED[precision],
        cpu=device.type == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=str(run.folder),
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**10)],  # from 2^16 on, the first steps would be skipped
    )
    if tracker != "none":
        accelerator.init_trackers("reinforce", {k: str(v) for k, v in run.record["settings"].items()})
    trained = [value for value in policy.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    scheduler = get_scheduler(schedule, optimizer, int(warmup_share * steps), steps)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    return Engine(accelerator, policy, optimizer, scheduler)
