"""extras/evaluate.py measures a reward model again, on held-out pairs of the data or of another source."""

import shutil
from pathlib import Path

import pytest

from extras import evaluate
from tests.conftest import run_script
from tests.source_rows import write_lines
from utils.data.processed import load_pairs
from utils.evaluation.predictions import trained_on
from utils.models.reward_model import HEADS
from utils.runs import read_json as read
from utils.runs import read_lines, write_json


@pytest.mark.parametrize("head", HEADS)
def test_the_results_equal_those_of_the_training(reward_models, sample_folder, tmp_path, head):
    options = {"DATA_DIR": sample_folder, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu", "CONTROL_PAIRS": 6}
    run_script(evaluate, **options, REWARD_MODEL=reward_models[head], OUTPUT_DIR=tmp_path / "out")
    before, after = read(reward_models[head] / "eval.json"), read(tmp_path / "out/eval.json")
    assert set(after["shortcuts"]) == set(before["shortcuts"]) >= {"surface", "without_prompt", "untrained_head"}
    for name, part in before["shortcuts"].items():
        assert after["shortcuts"][name]["accuracy"] == pytest.approx(part["accuracy"], abs=0.06), name
    if head != "distribution":  # merging adapters rounds, which can reverse a near tie
        for name in ("pairs", "accuracy", "accuracy_low", "ece", "brier", "length_correlation"):
            assert after[name] == pytest.approx(before[name], abs=1e-4), name
        assert after["verdict"] == before["verdict"] and after["best_shortcut"] == before["best_shortcut"]
    lines = [read_lines(folder / "predictions.jsonl") for folder in (reward_models[head], tmp_path / "out")]
    for one, other in zip(*lines, strict=True):
        assert one["win"] == pytest.approx(other["win"], abs=1e-4)
        assert one["chosen"] == pytest.approx(other["chosen"], abs=1e-4)


def test_pairs_of_another_source_are_measured_by_subset(reward_models, tmp_path, capsys):
    rows = [{"prompt": f"Say {i}", "chosen": f"{i} {i}", "rejected": "no <b>" * (i + 1)} for i in range(9)]
    rows = [row | {"subset": "ab"[i % 2]} for i, row in enumerate(rows)]
    rows.append({"prompt": "Say x", "chosen": "same", "rejected": "same", "subset": "a"})
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    options = {"REWARD_MODEL": reward_models["scalar"], "OUTPUT_DIR": tmp_path / "out", "DEVICE": "cpu"}
    run_script(evaluate, **options, DATASET=path)
    result, out = read(tmp_path / "out/eval.json"), capsys.readouterr().out
    assert result["pairs"] == 9
    assert {name: part["pairs"] for name, part in result["by_subset"].items()} == {"a": 5, "b": 4}
    assert "left out: 1 equal_answers" in out and "a: " in out


def test_the_held_out_split_of_a_source_is_measured(reward_models, tmp_path, capsys):
    for name, count in (("train", 7), ("test", 3)):
        rows = [{"prompt": f"{name} {i}", "chosen": f"{i} {i}", "rejected": "no"} for i in range(count)]
        write_lines(tmp_path / f"data/{name}.jsonl", rows)
    options = {"DATASET": tmp_path / "data", "REWARD_MODEL": reward_models["scalar"], "DEVICE": "cpu"}
    run_script(evaluate, **options, OUTPUT_DIR=tmp_path / "out")
    assert read(tmp_path / "out/eval.json")["pairs"] == 3 and "split test" in capsys.readouterr().out
    alike = {"prompt": "Q", "chosen": "word " * 400 + "good", "rejected": "word " * 400 + "bad"}
    options["DATASET"] = write_lines(tmp_path / "one.jsonl", [alike])
    with pytest.raises(SystemExit, match="no pair differs in the window of 128 tokens"):
        run_script(evaluate, **options, OUTPUT_DIR=tmp_path / "other")


def test_pairs_that_the_model_was_trained_on_are_reported(reward_models, sample_folder, tmp_path, capsys):
    options = {"DATA_DIR": sample_folder, "REWARD_MODEL": reward_models["scalar"], "DEVICE": "cpu", "CONTROL_PAIRS": 0}
    for split, expected in (("train", 20), ("validation", 0)):
        run_script(evaluate, **options, SPLIT=split, MAX_ROWS=20, OUTPUT_DIR=tmp_path / split)
        assert read(tmp_path / split / "eval.json")["pairs_trained_on"] == expected
        fingerprint = read(tmp_path / split / "run.json")["data_fingerprint"]
        assert fingerprint == read(Path(sample_folder) / "metadata.json")["fingerprint"]
        assert ("was trained on the prompts of 20 of these pairs" in capsys.readouterr().out) == (split == "train")
    record = read(reward_models["scalar"] / "run.json")
    shutil.copytree(reward_models["scalar"], tmp_path / "half")
    half = record | {"settings": record["settings"] | {"HALF": "even", "MAX_ROWS": 10}}
    write_json(tmp_path / "half/run.json", half)
    assert trained_on(tmp_path / "half", load_pairs(sample_folder, "train", 20)) == 5
    with pytest.raises(SystemExit, match="SPLIT = 'test' is not known, choose one of: train, validation"):
        run_script(evaluate, **options, SPLIT="test", OUTPUT_DIR=tmp_path / "none")


def test_a_missing_base_model_is_reported_and_not_compared_with(reward_models, sample_folder, tmp_path, capsys):
    shutil.copytree(reward_models["scalar"], tmp_path / "run")
    record = read(tmp_path / "run/run.json")
    record["settings"]["MODEL"] = "of/another-machine"
    write_json(tmp_path / "run/run.json", record)
    options = {"DATA_DIR": sample_folder, "MAX_ROWS": 20, "DEVICE": "cpu", "CONTROL_PAIRS": 4}
    run_script(evaluate, **options, REWARD_MODEL=tmp_path / "run", OUTPUT_DIR=tmp_path / "out")
    result = read(tmp_path / "out/eval.json")["shortcuts"]
    assert "untrained_head" not in result and "without_prompt" in result
    assert "not compared with an untrained head: of/another-machine" in capsys.readouterr().out
