"""Training runs of reward models: the best epoch, several seeds, constants that do not go together."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

import train_reward_model
from tests.conftest import ROOT, run_script
from utils import judging, training
from utils.training import last_checkpoint

SMALL = {"MAX_STEPS": 6, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3, "CONTROL_PAIRS": 6}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def data_with_test(sample_folder, folder):
    """The sample rows with a split that the source itself holds out."""
    shutil.copytree(sample_folder, folder)
    load_from_disk(str(folder / "train")).select(range(12)).save_to_disk(folder / "test")
    (folder / "metadata.json").write_text(json.dumps(read(folder / "metadata.json") | {"test_size": 12}))
    return folder


def test_the_best_epoch_is_kept_and_measured_on_test_rows(model_folder, sample_folder, tmp_path, monkeypatch):
    accuracies = iter([0.4, 0.9, 0.6])
    real = judging.pairs_right

    def planned(outputs, rows, reading):
        right = real(outputs, rows, reading)
        return right * 0 + next(accuracies, 0.0)

    monkeypatch.setattr(judging, "pairs_right", planned)
    monkeypatch.setattr(training, "remove_checkpoints", lambda folder: None)
    options = SMALL | {"MAX_STEPS": 0, "EPOCHS": 3, "MODEL": model_folder, "CONTROL_PAIRS": 0, "SAVE_EVERY_STEPS": 10}
    data, run = data_with_test(sample_folder, tmp_path / "data"), tmp_path / "run"
    run_script(train_reward_model, **options, DATA_DIR=data, OUTPUT_DIR=run)
    result = read(run / "eval.json")
    assert result["epochs"] == {"accuracies": {"1": 0.4, "2": 0.9, "3": 0.6}, "best": "2"}
    assert result["measured_on"] == "test" and result["pairs"] == 12 and not result["selection_shares_rows"]
    best, saved = torch.load(run / "checkpoints/best.pt", weights_only=True), load_file(run / "model.safetensors")
    last = torch.load(last_checkpoint(run) + "/trained_weights.pt", weights_only=True)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(saved[name], best[f"model.{name}"]) and not torch.equal(saved[name], last[f"model.{name}"])


def test_an_epoch_chosen_on_the_measured_rows_is_said(model_folder, sample_folder, tmp_path):
    options = SMALL | {"MAX_STEPS": 0, "EPOCHS": 2, "DATA_DIR": sample_folder, "MODEL": model_folder}
    run_script(train_reward_model, **options, OUTPUT_DIR=tmp_path / "run")
    result = read(tmp_path / "run/eval.json")
    assert result["measured_on"] == "validation" and result["selection_shares_rows"]
    assert max(result["epochs"]["accuracies"].values()) == pytest.approx(result["accuracy"])
    assert "The epoch was chosen on the same rows" in (tmp_path / "run/README.md").read_text()


@pytest.mark.slow
def test_several_seeds_give_mean_and_spread(model_folder, sample_folder, tmp_path):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "SEEDS": "3,4"}
    words = [f"--{name.lower()}={value}" for name, value in options.items()]
    command = [sys.executable, "train_reward_model.py", *words]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    found = read(tmp_path / "run-seeds/seeds.json")
    values = [read(tmp_path / f"run-seeds/{seed}/eval.json")["accuracy"] for seed in (3, 4)]
    assert found["accuracy"]["values"] == values and found["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert found["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    orders = [read(tmp_path / f"run-seeds/{seed}/run.json")["settings"]["SEED"] for seed in (3, 4)]
    assert orders == [3, 4] and not (tmp_path / "run").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "seed 3: " in again.stdout and "is there" in again.stdout and "training" not in again.stdout


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"HEAD": "vector"}, "HEAD = 'vector' is not known, choose one of: scalar, distribution, attributes"),
        ({"HEAD": "distribution", "PAIR_LOSS": "margin"}, "choose one of: win_probability, scaled"),
        ({"RATING_WEIGHT": 0.5}, "RATING_WEIGHT = 0.5 is for HEAD = distribution, not for scalar"),
        ({"HEAD": "distribution", "CENTRING": 0.1}, "CENTRING = 0.1 is for HEAD = scalar"),
        ({"LABEL_SMOOTHING": 0.7}, "LABEL_SMOOTHING = 0.7: expected a share from 0 to 0.5"),
        ({"ENGINE": "trl", "PAIR_LOSS": "scaled"}, "ENGINE = 'trl' knows HEAD = scalar with PAIR_LOSS"),
        ({"ENGINE": "trl", "HEAD": "distribution"}, "ENGINE = 'trl' knows HEAD = scalar with PAIR_LOSS"),
        ({"LENGTH_PENALTY": "much"}, "LENGTH_PENALTY = 'much': expected a number such as 0.1, or fit"),
        ({"FREEZE_LAYERS": 3}, "FREEZE_LAYERS = 3: this model has 2"),
        ({"RATING": "taste"}, "RATING = 'taste' is not known"),
        ({"SEEDS": "one,two"}, "SEEDS = one,two: expected whole numbers such as 1,2,3"),
        ({"SHORTCUT_MODEL": "nowhere"}, "SHORTCUT_MODEL = 'nowhere' is not there"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_training(
    sample_folder, model_folder, tmp_path, constants, message
):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    with pytest.raises(SystemExit) as stop:
        run_script(train_reward_model, **options | constants)
    assert message in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "run").exists()


def test_losses_of_ratings_need_ratings(model_folder, tokenizer_folder, tmp_path):
    import load_helpsteer_dataset

    rows = [{"prompt": f"Say {i}", "chosen": f"{i} " * (i + 1), "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"DATASET": tmp_path / "pairs.jsonl", "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 64}
    run_script(load_helpsteer_dataset, **source, OUTPUT_DIR=tmp_path / "data")
    options = SMALL | {"DATA_DIR": tmp_path / "data", "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    for constants in ({"PAIR_LOSS": "scaled"}, {"HEAD": "distribution", "RATING_WEIGHT": 0.5}):
        with pytest.raises(SystemExit, match="these rows have no ratings"):
            run_script(train_reward_model, **options | constants)
    with pytest.raises(SystemExit, match="these rows have no attributes"):
        run_script(train_reward_model, **options, HEAD="attributes")
    run_script(train_reward_model, **options, HEAD="distribution")
    assert read(tmp_path / "run/eval.json")["by_gap"] == {}
