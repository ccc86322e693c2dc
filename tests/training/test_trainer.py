"""The trainer learns, equals TRL, resumes after a kill, and stops at a loss that is not finite."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import set_seed

import train_reward_model
from benchmarks.stock_trl import whole_rows
from tests import toys
from tests.conftest import ROOT, run_script
from tests.toys import toy_rows
from utils.evaluation.plots import plot_curves
from utils.models.loading import load_classifier
from utils.models.reward_model import RewardHead, RewardPairs
from utils.models.shared_prompt import TOKENS_AT_ONCE, PairCollator, forward_pairs
from utils.runs import read_lines
from utils.training import trainer as training
from utils.training.losses import RewardPairLoss, bradley_terry
from utils.training.trainer import last_checkpoint

LOSSES = RewardPairLoss(RewardHead("scalar"), "bradley_terry")


def toy_trainer(model_folder, folder, rows, batch=4, accumulation=1, losses=LOSSES, lora=False, **options):
    set_seed(0)
    model = load_classifier(model_folder, 1)
    if lora:
        from utils.models.loading import add_lora

        model = add_lora(model, "SEQ_CLS", 4, 8, 0.0, ("q_proj", "v_proj"), head="score")
    return toys.toy_trainer(
        RewardPairs(model), losses, rows, folder, batch_size=batch, accumulation=accumulation, **options
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_toy_problem_is_learned_and_the_weights_move(model_folder, tmp_path, lora):
    rows = toy_rows(96)
    trainer = toy_trainer(model_folder, tmp_path / "run", rows, batch=8, max_steps=60, lora=lora, learning_rate=1e-2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert moved == trained and (len(moved) < len(before) if lora else len(moved) == len(before))
    rewards = forward_pairs(trainer.model, toy_rows(64, seed=1), PairCollator(2, 8), 16, trainer.accelerator)["outputs"]
    assert (rewards[:, 0] > rewards[:, 1]).mean() > 0.95, "held-out toy pairs"
    logged = read_lines(tmp_path / "run/metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=0.1) and logged[-1]["loss"] < 0.2


def test_batches_accumulated_or_in_parts_give_equal_weights(model_folder, tmp_path, monkeypatch):
    results = []
    for batch, accumulation, tokens in ((4, 1, 1000), (1, 4, 1000), (4, 1, 20)):  # the last step has two rows
        monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", tokens)
        folder = tmp_path / f"{batch}-{tokens}"
        trainer = toy_trainer(
            model_folder, folder, toy_rows(22), batch, accumulation, max_steps=6
        )  # a short last batch
        trainer.train()
        results.append({name: value.clone() for name, value in trainer.model.named_parameters()})
        lines = read_lines(folder / "metrics.jsonl")
        results[-1]["logged"] = torch.tensor([[line["loss"], line["accuracy"]] for line in lines])
    for name in results[0]:
        for other in results[1:]:
            torch.testing.assert_close(results[0][name], other[name], atol=2e-5, rtol=1e-4)


def test_loss_equals_trl_on_equal_batches(model_folder, tokenizer, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = toy_rows(8)
    set_seed(0)
    model = load_classifier(model_folder, 1)
    model.config.pad_token_id = 0
    whole = list(whole_rows(rows))
    args = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, pad_token="<|endoftext|>"
    )
    trl = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(whole), processing_class=tokenizer)
    model.eval()
    with torch.no_grad():
        theirs = trl.compute_loss(model, trl.data_collator(whole))
        ours = bradley_terry(*RewardPairs(model)(**PairCollator(0, 8)(list(rows)))["outputs"][..., 0].unbind(1)).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)


def test_a_loss_that_is_not_finite_names_its_rows_and_stops_before_the_step(model_folder, tmp_path):
    def broken(outputs, batch):
        loss, logged = LOSSES(outputs, batch)
        return torch.where(batch["row"] == 5, math.nan, loss), logged

    trainer = toy_trainer(model_folder, tmp_path / "run", toy_rows(8), batch=8, losses=broken)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(SystemExit, match=r"training rows \[5\] is not finite at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_trackers_get_the_run_names_and_keep_their_files(tmp_path, monkeypatch):
    """transformers writes tensorboard files into the checkpoints, which are removed at the end."""
    for name in ("WANDB_PROJECT", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    names = {"project": "HelpSteer_dpo_Plain", "run_name": "HelpSteer-Plain-x"}
    run = toys.toy_run(tmp_path / "run")
    run.record |= names
    args = training.training_arguments(run)
    assert (args.project, args.run_name) == tuple(names.values()) and os.environ["WANDB_PROJECT"] == names["project"]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "run/tensorboard")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    training.training_arguments(run)
    assert os.environ["WANDB_PROJECT"] == "mine", "the user's value wins"


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    for step, complete in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        if complete:
            (tmp_path / f"checkpoints/checkpoint-{step}/complete").touch()
    assert last_checkpoint(tmp_path).endswith("checkpoint-10")
    assert last_checkpoint(tmp_path / "nothing") is None


OPTIONS = {
    "PRECISION": "fp32", "DEVICE": "cpu", "MAX_STEPS": 60, "SAVE_EVERY_STEPS": 15, "LOG_EVERY_STEPS": 10,
    "USE_LORA": "true", "LORA_RANK": 4, "LORA_DROPOUT": 0.1, "LEARNING_RATE": 1e-3, "EVAL_EVERY_STEPS": 25,
}  # fmt: skip


def command(**options):
    return [sys.executable, "train_reward_model.py", *(f"--{name.lower()}={value}" for name, value in options.items())]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(model_folder, sample_folder, tmp_path):
    options = OPTIONS | {"DATA_DIR": sample_folder, "MODEL": model_folder, "MAX_ROWS": 40}
    run_script(train_reward_model, **options, OUTPUT_DIR=tmp_path / "whole")
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(**options, OUTPUT_DIR=killed), cwd=ROOT, stdout=subprocess.PIPE)
    while process.poll() is None and not list(killed.glob("checkpoints/checkpoint-*/complete")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists(), "it was killed too late"
    again = subprocess.run(command(**options, OUTPUT_DIR=killed), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming from its last checkpoint" in again.stdout, again.stderr
    one, other = load_file(tmp_path / "whole/model.safetensors"), load_file(killed / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)
    steps = [line["step"] for line in read_lines(killed / "metrics.jsonl")]
    assert steps == sorted(steps) and steps[-1] == 60
    assert not (killed / "checkpoints").exists()


def test_ctrl_c_saves_and_prints_how_to_resume(model_folder, sample_folder, tmp_path):
    options = OPTIONS | {"DATA_DIR": sample_folder, "MODEL": model_folder, "SAVE_EVERY_STEPS": 0, "MAX_STEPS": 5000}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(**options, OUTPUT_DIR=tmp_path / "run"), cwd=ROOT, **pipes)
    while process.poll() is None and not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and not (tmp_path / "run/metrics.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to resume" in out and "Traceback" not in err
    assert last_checkpoint(tmp_path / "run")


def test_curves_show_the_validation_values():
    lines = [{"step": step, "loss": 0.7, "rewards/accuracies": 0.5} for step in (2, 4)]
    lines += [{"step": 4, "eval_loss": 0.6, "eval_accuracy": 0.75}]
    figure = plot_curves(lines, ("loss", "rewards/accuracies"), {}, "A run", "a step")
    curves = [line for axis in figure.axes for line in axis.lines if line.get_label() == "on validation"]
    assert [curve.get_ydata().tolist() for curve in curves] == [[0.6], [0.75]]
