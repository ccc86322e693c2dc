"""dataset_summary.py: the numbers are exact on small rows, leaks are found, every plot is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import concatenate_datasets, load_from_disk
from PIL import Image

import dataset_summary
import load_helpsteer_dataset
from tests.conftest import ROOT, error_of, run_script
from tests.source_rows import write_lines
from utils.data.preferences import hundredths
from utils.evaluation.baselines import list_items
from utils.evaluation.statistics import bands_of
from utils.runs import read_json, write_json

FIGURES = {"token_lengths.png", "rating_gaps.png", "shortcuts.png", "length_by_gap.png"}

LIST = "Pack these:\n- a tent\n- a lamp"
ROWS = [  # prompt, chosen, rejected, ratings: gaps of 1.0, 0.5, 0.4 and 3.0
    ("Name a river in France.", "The Loire, the longest.", "The Po.", 2.8, 1.8),  # 2.8 - 1.8 < 1 in floats
    ("What do owls eat?", "Mice, mostly.", "Seeds mostly.", 0.7, 0.2),  # equally long
    ("Is seven prime?", "Yes.", "No, since it is odd.", 3.0, 2.6),  # the shorter one is better
    ("Help me pack for camping.", LIST, "Take a tent.", 4.0, 1.0),
]


def write_rows(path, rows):
    names = ("prompt", "chosen", "rejected", "chosen_rating", "rejected_rating")
    return write_lines(path, [dict(zip(names, row, strict=False)) for row in rows])


def summarise(data, output, **constants):
    run_script(dataset_summary, DATA_DIR=data, OUTPUT_DIR=output, **constants)
    return read_json(Path(output) / "summary.json")


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_folder):
    """Return the folder of ROWS as processed data."""
    folder = tmp_path_factory.mktemp("small")
    source = write_rows(folder / "rows.jsonl", ROWS)
    options = {"DATASET": source, "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 64}
    run_script(load_helpsteer_dataset, **options, OUTPUT_DIR=folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def sample_summary(tmp_path_factory, sample_folder):
    """Return (summary of the sample rows, its folder)."""
    output = tmp_path_factory.mktemp("summary") / "deep" / "er"
    return summarise(sample_folder, output), output


def test_the_bins_have_the_limits_in_their_names():
    result = dataset_summary.describe_lengths(np.array([63, 64, 127, 128, 255, 256, 9000, 1]))
    assert result["bins"] == {"<64": 0.25, "64-127": 0.25, "128-255": 0.25, "256+": 0.25}
    assert (result["mean"], result["median"], result["max"]) == (1236.75, 127.5, 9000)


def test_gaps_of_exactly_half_and_one_are_in_the_upper_band():
    ratings = [(3.4, 2.4), (2.8, 1.8), (2.9, 2.4), (0.7, 0.2), (3.6, 3.2), (1.0, 0.01), (0.3, 0.1)]
    assert 2.8 - 1.8 < 1.0 and 0.7 - 0.2 < 0.5  # in floats; hundredths are exact
    gaps = np.array([hundredths(better) - hundredths(worse) for better, worse in ratings])
    members = {name: np.flatnonzero(mask).tolist() for name, mask in bands_of(gaps).items()}
    assert members == {">=1.0": [0, 1], "0.5-1.0": [2, 3, 5], "<0.5": [4, 6]}


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("- one\n- two", 2),
        ("Intro:\n\n  * a\n\t+ b\n• c\n◦ d", 4),
        ("1. a\n2) b\n10. c", 3),
        ("**bold** words\n---\n-5 degrees\n3.14 is pi\n1.5 l of milk", 0),
        ("In short - no list. 1. Not at the start of a line\n2024. is too many digits", 0),
        ("-\n- \n*", 0),
    ],
)
def test_list_items_are_counted(text, items):
    assert list_items(text) == items


def test_the_numbers_of_small_rows_are_exact(small, tokenizer_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dataset_summary.SHOWN, "gaps", (0.4, 0.5, 1.0, 3.0))
    result = summarise(small, tmp_path / "out")["all"]
    assert result["pairs"] == 4 and result["multi_turn_share"] == 0
    gap = result["rating_gap"]
    assert {name: band["pairs"] for name, band in gap["bands"].items()} == {"<0.5": 1, "0.5-1.0": 1, ">=1.0": 2}
    assert gap["pairs_kept_by_min_rating_gap"] == {"0.4": 4, "0.5": 3, "1.0": 2, "3.0": 1}
    assert (gap["mean"], gap["median"]) == (1.225, 0.75)
    longer, items = result["shortcuts"]["longer"], result["shortcuts"]["more_list_items"]
    assert (longer["accuracy"], longer["ties"]) == (0.625, 1)
    assert (items["accuracy"], items["ties"]) == (0.625, 3)
    by_gap = {name: part["accuracy"] for name, part in longer["by_gap"].items()}
    assert by_gap == {"<0.5": 0.0, "0.5-1.0": 0.5, ">=1.0": 1.0}
    assert longer["low"] <= longer["accuracy"] <= longer["high"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python train_reward_model.py --data_dir {small} --model {tokenizer_folder}"


def test_the_sample_is_summarised(sample_summary, sample_folder):
    summary, _ = sample_summary
    metadata = read_json(Path(sample_folder) / "metadata.json")
    assert summary["data"]["fingerprint"] == metadata["fingerprint"]
    for split in ("train", "validation"):
        assert summary[split]["pairs"] == metadata[f"{split}_size"]
    assert summary["all"]["pairs"] == metadata["counts"]["pairs"]
    assert "test" not in summary
    for side, share in metadata["cut_share"].items():
        assert summary["all"]["cut_share"][side] == pytest.approx(share, abs=1e-4)
    assert 0 < summary["all"]["multi_turn_share"] < 1
    assert summary["repeats"]["leaks_into_training"] == 0
    assert len(summary["examples"]) == 5
    for name, tokens in summary["all"]["tokens"].items():
        assert sum(tokens["bins"].values()) == pytest.approx(1, abs=1e-5), name
        assert tokens["p10"] <= tokens["median"] <= tokens["p90"] <= tokens["p99"] <= tokens["max"]
    for name in ("prompt_raw_cut", "prompt_in_window", "pair_in_window"):
        assert summary["all"]["tokens"][name]["max"] <= metadata["max_length"]


def test_the_intervals_do_not_depend_on_the_hash_seed(sample_folder, tmp_path):
    code = "import dataset_summary as script; script.draw = lambda *_: []; script.main(script.override_constants("
    code += "vars(script)))"  # without the plots, which take most of the time
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, f"--data_dir={sample_folder}", f"--output_dir={tmp_path / seed}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
    one, other = (read_json(tmp_path / seed / "summary.json") | {"settings": {}} for seed in ("1", "2"))
    assert one == other


def test_every_plot_is_a_picture_and_no_other_file_is_left(sample_summary):
    _, output = sample_summary
    assert {path.name for path in output.iterdir()} == FIGURES | {"summary.json", "summary.md"}
    for name in FIGURES:
        with Image.open(output / name) as picture:
            picture.load()
            assert picture.width == 1800 and picture.height > 800
            assert len(picture.convert("L").getcolors()) > 50, f"{name} is empty"


def test_a_planted_leak_is_reported(small, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(small, data)
    train, validation = (load_from_disk(str(small / name)) for name in ("train", "validation"))
    leak = train.select([1]).map(lambda row: {"prompt": row["prompt"].upper() + "!"})
    validation = concatenate_datasets([validation, leak, validation.select([0])])
    shutil.rmtree(data / "validation")
    validation.save_to_disk(data / "validation")
    write_json(data / "metadata.json", read_json(data / "metadata.json") | {"validation_size": len(validation)})
    result = summarise(data, tmp_path / "out")["repeats"]
    assert result["leaks_into_training"] == 1
    assert result["leaked_prompts"] == [{"rows": {"train": 1, "validation": 1}, "prompt": train[1]["prompt"]}]
    assert result["prompts"] == {"within": {"train": 0, "validation": 1}, "across": {"train-validation": 0}}
    assert result["near_duplicate_prompts"]["across"] == {"train-validation": 1}
    assert result["answers"]["across"] == {"train-validation": 2}  # both answers of the leaked row
    assert result["answers"]["in_several_pairs"] == 4  # and both of the row that validation holds twice
    assert "LEAK train row 1 and validation row 1: " in capsys.readouterr().out


def test_a_source_can_have_a_test_split_and_no_ratings(small, tmp_path, tokenizer_folder, capsys):
    source, data, output = tmp_path / "source", tmp_path / "data", tmp_path / "out"
    write_rows(source / "train.jsonl", [row[:3] for row in ROWS])
    write_rows(source / "test.jsonl", [("How tall is Everest?", "It is 8,849 metres tall.", "Tall.")])
    run_script(load_helpsteer_dataset, DATASET=source, TOKENIZER=tokenizer_folder, MAX_LENGTH=64, OUTPUT_DIR=data)
    summarise(small, output)
    result = summarise(data, output)
    assert result["test"]["pairs"] == 1 and result["all"]["pairs"] == 5
    assert result["all"]["rating_gap"] is None and result["all"]["shortcuts"]["longer"]["by_gap"] == {}
    assert result["examples"][0]["gap"] is None
    assert "the source has no ratings" in capsys.readouterr().out
    assert {path.name for path in output.glob("*.png")} == {"token_lengths.png", "shortcuts.png"}  # no old ones


def test_user_errors_stop_with_one_message(small, tmp_path, tokenizer, tokenizer_folder):
    def line(data=small, **constants):
        return error_of(dataset_summary, DATA_DIR=data, OUTPUT_DIR=tmp_path / "out", **constants)

    assert "run `python load_helpsteer_dataset.py` first" in line(data=tmp_path / "nothing")
    assert "metadata.json is not there yet" in line(data=tokenizer_folder)
    assert "EXAMPLES = -1" in line(EXAMPLES=-1) and "SEED = -1" in line(SEED=-1)
    assert "cannot be loaded" in line(TOKENIZER="nobody/nothing-of-this-name")
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("im_start", "im_begin"))
    assert "different chat template" in line(TOKENIZER=other)
    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    (damaged / "metadata.json").write_text((damaged / "metadata.json").read_text()[:100])
    assert "is damaged" in line(data=damaged)
    shutil.copy(small / "metadata.json", damaged)
    shutil.rmtree(damaged / "validation")
    assert "is damaged" in line(data=damaged)
    assert not (tmp_path / "out").exists()
