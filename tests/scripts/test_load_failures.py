"""load_helpsteer_dataset.py leaves the old rows as they are on bad input, a full disk and Ctrl-C."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import SAMPLE
from tests.source_rows import content_of, load_rows, rows_of, write_lines, write_rows


@pytest.fixture
def load(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(load_rows, tokenizer_folder)


@pytest.fixture
def old_folder(load, tmp_path):
    """Write rows to out/, and check after the test that they are unchanged and that no temporary folder is left."""
    load(rows_of(5))
    (tmp_path / "source.jsonl").unlink()
    before = content_of(tmp_path / "out")
    yield tmp_path / "out"
    assert content_of(tmp_path / "out") == before and not list(tmp_path.glob(".out-*"))


@pytest.fixture
def bad_inputs(tmp_path):
    """Write the files that BAD_INPUT names."""
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "columns.jsonl", [{"a": 1}])
    path = write_lines(tmp_path / "line.jsonl", rows_of(80))
    path.write_text(path.read_text() + "{]\n")
    table = write_rows(tmp_path / "table.parquet", list(rows_of(2000))).read_bytes()
    (tmp_path / "table.parquet").write_bytes(table[:300] + bytes(len(table) - 600) + table[-300:])
    write_lines(tmp_path / "ties.jsonl", rows_of(3, gap=0))
    write_lines(tmp_path / "unrated.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    for name in ("train", "test"):
        write_lines(tmp_path / "held_out" / f"{name}.jsonl", rows_of(3))
        write_lines(tmp_path / "photos" / name / "photos.jsonl", [{"a": 1}])
    texts = {"file": "mine", "home/thesis.tex": "mine", "mine/train/x": "", "mine/metadata.json": '{"title": "photos"}'}
    for name, text in (texts | {"repository/.git/HEAD": "ref: refs/heads/main"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)


BAD_INPUT = [
    ({"DATASET": "none.jsonl"}, "none.jsonl' is not there"),
    ({"DATASET": "empty.jsonl"}, "has no rows"),
    ({"DATASET": "columns.jsonl"}, "has columns a, needed is one of"),
    ({"DATASET": "line.jsonl"}, "line 161 is not JSON"),
    ({"DATASET": "table.parquet"}, "table.parquet cannot be read"),
    ({"DATASET": "ties.jsonl"}, "no pair is left of 6 rows of .*ties.jsonl, left out: {'tie': 3}"),
    ({"DATASET": "held_out"}, "no pair is left for training"),
    ({"DATASET": "unrated.jsonl", "MIN_RATING_GAP": 0.5}, "MIN_RATING_GAP = 0.5: .* has no ratings, set it to 0"),
    ({"RATING": "averge"}, "RATING = 'averge' is not known, choose one of: average"),
    ({"TOKENIZER": "nobody/no_such_tokenizer"}, "TOKENIZER = 'nobody/no_such_tokenizer'"),
    ({"MAX_LENGTH": 8}, "MAX_LENGTH = 8 is too small"),
    ({"MAX_LENGTH": -5}, "MAX_LENGTH = -5 is too small"),
    ({"VALIDATION_SHARE": 1}, "VALIDATION_SHARE = 1.0: expected 0 or more, and less than 1"),
    ({"MAX_ROWS": -1}, "MAX_ROWS = -1: expected 0"),
    ({"MIN_RATING_GAP": -0.1}, "MIN_RATING_GAP = -0.1: expected 0 or more"),
    ({"MIN_RATING_GAP": 0.005}, "MIN_RATING_GAP = 0.005: ratings are compared in hundredths, expected 0 or 0.01"),
    ({"SEED": -1}, "SEED = -1: expected 0 or more"),
    ({"OUTPUT_DIR": "file/out"}, "cannot write .*file"),
    ({"OUTPUT_DIR": "file"}, "file' is a file: choose another name"),
    ({"OUTPUT_DIR": "home"}, "contains thesis.tex, not made here: choose another folder"),
    ({"OUTPUT_DIR": "photos"}, "photos' contains test, train, not made here: choose another folder"),
    ({"OUTPUT_DIR": "mine"}, "contains metadata.json, train, not made here: choose another folder"),
    ({"OUTPUT_DIR": "repository"}, "repository' contains .git, not made here: choose another folder"),
    ({"DATASET": "out", "OUTPUT_DIR": "./out"}, "out' would overwrite DATASET"),
    ({"DATASET": "out/train"}, "out' would overwrite DATASET: choose another name"),
]


@pytest.mark.parametrize("constants, message", BAD_INPUT, ids=lambda value: str(value)[:40])
def test_bad_input_stops_with_one_message_and_the_old_rows_stay(
    load, old_folder, bad_inputs, tmp_path, constants, message
):
    before = content_of(tmp_path)
    with pytest.raises(SystemExit, match=message) as stop:
        load(SAMPLE, **constants)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, "one line on stderr, exit code 1"
    assert content_of(tmp_path) == before


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_on_the_second_rename(old, new, rename=os.replace):
    if Path(old).name == "whole":
        raise PermissionError(errno.EACCES, "Permission denied", str(new))
    rename(old, new)


def interrupt_after_the_first_rename(old, new, rename=os.replace):
    rename(old, new)
    if Path(new).name == "old":
        raise KeyboardInterrupt


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "function, replacement, code",
    [
        ("datasets.arrow_writer.ArrowWriter.finalize", raising(DISK_FULL), "the disk is full, nothing was replaced"),
        ("datasets.arrow_writer.ArrowWriter.write_batch", raising(DISK_FULL), "the disk is full, nothing was replaced"),
        ("datasets.Dataset.save_to_disk", raising(DISK_FULL), "the disk is full, nothing was replaced"),
        ("load_helpsteer_dataset.write_json", raising(DISK_FULL), "the disk is full, nothing was replaced"),
        ("load_helpsteer_dataset.describe", raising(KeyboardInterrupt()), 130),
        ("os.replace", fail_on_the_second_rename, "cannot write "),
        ("os.replace", interrupt_after_the_first_rename, 130),
    ],
)
def test_an_accident_leaves_the_old_rows_unchanged(load, old_folder, monkeypatch, function, replacement, code):
    with monkeypatch.context() as patched:
        patched.setattr(function, replacement)
        with pytest.raises(SystemExit) as stop:
            load(rows_of(9))
    assert str(stop.value.code).startswith(str(code)) and "\n" not in str(stop.value.code)
