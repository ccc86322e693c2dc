"""Reward model runs: the best epoch, losses that need ratings, resuming, what the report finds in planted data."""

import shutil

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file

import train_reward_model
from tests.conftest import run_process, run_script
from tests.source_rows import write_lines
from utils.data.processed import load_pairs, ratings_of
from utils.evaluation import predictions
from utils.models.reward_model import new_reward_head
from utils.models.shared_prompt import PairCollator
from utils.runs import read_json as read
from utils.runs import write_json
from utils.training import trainer as training
from utils.training.losses import RewardPairLoss
from utils.training.trainer import last_checkpoint

SMALL = {"MAX_STEPS": 6, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3, "CONTROL_PAIRS": 6}


def data_with_test(sample_folder, folder):
    """Copy the sample rows and give them a test split."""
    shutil.copytree(sample_folder, folder)
    load_from_disk(str(folder / "train")).select(range(12)).save_to_disk(folder / "test")
    write_json(folder / "metadata.json", read(folder / "metadata.json") | {"test_size": 12})
    return folder


def test_the_best_epoch_is_kept_and_measured_on_test_rows(model_folder, sample_folder, tmp_path, monkeypatch):
    accuracies = iter([0.4, 0.9, 0.6])
    real = predictions.pairs_right

    def planned(outputs, head):
        right = real(outputs, head)
        return right * 0 + next(accuracies, 0.0)

    monkeypatch.setattr(predictions, "pairs_right", planned)
    monkeypatch.setattr(training.shutil, "rmtree", lambda folder, **_: None)
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


def test_an_epoch_chosen_on_the_measured_rows_is_reported(model_folder, sample_folder, tmp_path):
    options = SMALL | {"MAX_STEPS": 0, "EPOCHS": 2, "DATA_DIR": sample_folder, "MODEL": model_folder}
    run_script(train_reward_model, **options, OUTPUT_DIR=tmp_path / "run")
    result = read(tmp_path / "run/eval.json")
    assert result["measured_on"] == "validation" and result["selection_shares_rows"]
    assert max(result["epochs"]["accuracies"].values()) == pytest.approx(result["accuracy"])
    assert "The epoch was chosen on the same rows" in (tmp_path / "run/README.md").read_text()


def test_losses_that_use_ratings_need_ratings(model_folder, tokenizer_folder, tmp_path):
    import load_helpsteer_dataset

    rows = [{"prompt": f"Say {i}", "chosen": f"{i} " * (i + 1), "rejected": "no"} for i in range(20)]
    source = {"DATASET": write_lines(tmp_path / "pairs.jsonl", rows), "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 64}
    run_script(load_helpsteer_dataset, **source, OUTPUT_DIR=tmp_path / "data")
    options = SMALL | {"DATA_DIR": tmp_path / "data", "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    for constants in ({"PAIR_LOSS": "scaled"}, {"HEAD": "distribution", "RATING_WEIGHT": 0.5}):
        with pytest.raises(SystemExit, match="some rows have no ratings"):
            run_script(train_reward_model, **options | constants)
    with pytest.raises(SystemExit, match="the rows have no attributes"):
        run_script(train_reward_model, **options, HEAD="attributes")
    run_script(train_reward_model, **options, HEAD="distribution")
    assert read(tmp_path / "run/eval.json")["by_gap"] == {}


def test_a_run_is_not_resumed_if_the_weights_of_its_model_changed(model_folder, sample_folder, tmp_path, monkeypatch):
    start = tmp_path / "start"
    shutil.copytree(model_folder, start)
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": start, "OUTPUT_DIR": tmp_path / "run", "USE_LORA": "true"}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(predictions, "predict_pairs", lambda *_: 1 / 0)
        run_script(train_reward_model, **options)
    assert last_checkpoint(tmp_path / "run")
    weights = load_file(start / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, start / "model.safetensors", {"format": "pt"})
    run_script(train_reward_model, **options)
    (aside,) = tmp_path.glob("run-*")
    assert not read(aside / "run.json")["finished"] and read(tmp_path / "run/run.json")["finished"]


@pytest.mark.slow
def test_two_processes_choose_the_epoch_that_one_chooses(model_folder, sample_folder, tmp_path):
    options = SMALL | {"MAX_STEPS": 0, "EPOCHS": 3, "DATA_DIR": sample_folder, "MODEL": model_folder}
    launchers = {"two": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"], "one": []}
    for name, launcher in launchers.items():
        mine = options | {"OUTPUT_DIR": tmp_path / name, "BATCH_SIZE": 2 if launcher else 4}
        run_process("train_reward_model.py", mine, *launcher)
    two, one = (read(tmp_path / name / "eval.json")["epochs"] for name in launchers)
    assert two == one and len(one["accuracies"]) == 3
    weights = [load_file(tmp_path / name / "model.safetensors") for name in launchers]
    for name in weights[1]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-5, rtol=1e-3)


def planted_pairs(kind, count=800):
    """Yield pairs that are decided by length, mostly in favour of the longer answer, or by a good and a bad word."""
    random = np.random.default_rng(0)
    words = ["the", "of", "and", "to", "in", "is", "it", "for", "on", "as", "with", "by", "at", "from"]
    for i in range(count):
        sizes = random.permutation(np.arange(4, 40))[:2]
        texts = [list(random.choice(words, size)) for size in sizes]
        if kind == "length":
            texts.sort(key=len, reverse=bool(random.random() < 0.8))
        else:
            for text, word in zip(texts, ("good", "bad"), strict=True):
                text[random.integers(len(text))] = word
        yield {"prompt": f"Question {i}?", **dict(zip(("chosen", "rejected"), map(" ".join, texts), strict=True))}


@pytest.mark.parametrize("kind", ["length", "content"])
def test_the_report_finds_what_was_planted_in_the_rows(kind, model_folder, tokenizer_folder, tmp_path):
    import load_helpsteer_dataset

    pairs = write_lines(tmp_path / "pairs.jsonl", planted_pairs(kind))
    source = {"DATASET": pairs, "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 128}
    run_script(load_helpsteer_dataset, **source, OUTPUT_DIR=tmp_path / "data")
    options = {"DATA_DIR": tmp_path / "data", "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "DEVICE": "cpu"}
    run_script(train_reward_model, **options, EPOCHS=1, MAX_STEPS=120, LEARNING_RATE=3e-3, CONTROL_PAIRS=8)
    result = read(tmp_path / "run/eval.json")
    assert result["accuracy"] > 0.7, "the planted difference is learned"
    if kind == "length":
        assert result["verdict"].startswith("not shown") and result["length_correlation_in_window"] > 0.8
    else:
        assert result["verdict"].startswith("better than") and abs(result["length_correlation_in_window"]) < 0.3


def test_attributes_are_learned_from_rows_that_have_them(sample_folder, tokenizer):
    rows = load_pairs(sample_folder, "train", 8)
    gaps = [None if i % 2 else given for i, given in enumerate(rows["chosen_attributes"])]
    kind = rows.features["chosen_attributes"]
    rows = rows.remove_columns("chosen_attributes").add_column("chosen_attributes", gaps, feature=kind)
    _, means = ratings_of(rows)
    given = [row for side in ("chosen", "rejected") for row in rows[f"{side}_attributes"] if row]
    assert len(given) == 12 and means == pytest.approx(np.mean(given, axis=0))
    batch = PairCollator(0, 8)(list(rows))
    loss = RewardPairLoss(new_reward_head("attributes", "average", [], means), "squared_error")
    losses, _ = loss({"outputs": torch.zeros(8, 2, 5)}, batch)
    rejected = (torch.tensor(rows["rejected_attributes"]) - torch.tensor(means)).square().mean(1) / 2
    torch.testing.assert_close(losses[1::2], rejected[1::2])
    assert (losses[::2] > rejected[::2]).all()
