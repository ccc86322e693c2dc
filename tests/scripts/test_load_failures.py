"""load_helpsteer_dataset.py under bad input, accidents and kills: one line, and the old rows stay as they are."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import SAMPLE
from tests.source_rows import content_of, load_rows, rows_of, write_lines, write_rows
from utils.data.tokens import load_tokenizer


@pytest.fixture
def load(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(load_rows, tokenizer_folder)


@pytest.fixture
def old_folder(load, tmp_path):
    """Rows of an earlier run in out/, and a check that they are still the same with nothing lying beside them."""
    load(rows_of(5))
    (tmp_path / "source.jsonl").unlink()
    before = content_of(tmp_path / "out")
    yield tmp_path / "out"
    assert content_of(tmp_path / "out") == before and not list(tmp_path.glob(".out-*"))


def missing(tmp_path):
    return {"DATASET": tmp_path / "none.jsonl"}, "none.jsonl' is not there"


def empty(tmp_path):
    return {"DATASET": write_lines(tmp_path / "empty.jsonl", [])}, "has no rows"


def wrong_columns(tmp_path):
    return {"DATASET": write_lines(tmp_path / "x.jsonl", [{"a": 1}])}, "has columns a, needed is one of"


def unreadable_line(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", rows_of(80))
    path.write_text(path.read_text() + "{]\n")
    return {"DATASET": path}, "line 161 is not JSON"


def half_a_table(tmp_path):
    write_rows(tmp_path / "x.parquet", list(rows_of(2000)))
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:300] + bytes(len(whole) - 600) + whole[-300:])
    return {"DATASET": tmp_path / "x.parquet"}, "x.parquet cannot be read"


def no_pair_left(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", rows_of(3, gap=0))
    return {"DATASET": path}, "no pair is left of 6 rows of .*x.jsonl, left out: {'tie': 3}"


def all_held_out(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / "rows" / f"{name}.jsonl", rows_of(3))
    return {"DATASET": tmp_path / "rows"}, "no pair is left for training"


def no_ratings(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    return {"DATASET": path, "MIN_RATING_GAP": 0.5}, "MIN_RATING_GAP = 0.5: .*x.jsonl has no ratings, set it to 0"


def misspelt_rating(tmp_path):
    return {"RATING": "averge"}, "RATING = 'averge' is not known, choose one of: average"


def no_tokenizer(tmp_path):
    return {"TOKENIZER": "nobody/no_such_tokenizer"}, "TOKENIZER = 'nobody/no_such_tokenizer'"


def small_window(tmp_path):
    return {"MAX_LENGTH": 8}, "MAX_LENGTH = 8 is too small"


def no_window(tmp_path):
    return {"MAX_LENGTH": -5}, "MAX_LENGTH = -5 is too small"


def whole_share(tmp_path):
    return {"VALIDATION_SHARE": 1}, "VALIDATION_SHARE = 1.0: expected 0 or more, and less than 1"


def negative_rows(tmp_path):
    return {"MAX_ROWS": -1}, "MAX_ROWS = -1: expected 0"


def negative_gap(tmp_path):
    return {"MIN_RATING_GAP": -0.1}, "MIN_RATING_GAP = -0.1: expected 0 or more"


def gap_below_a_hundredth(tmp_path):
    return {"MIN_RATING_GAP": 0.005}, "MIN_RATING_GAP = 0.005: ratings are compared in hundredths, expected 0 or 0.01"


def negative_seed(tmp_path):
    return {"SEED": -1}, "SEED = -1: expected 0 or more"


def under_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    return {"OUTPUT_DIR": tmp_path / "file" / "out"}, "cannot write .*file"


def on_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    return {"OUTPUT_DIR": tmp_path / "file"}, "file' is a file: choose another name"


def on_foreign_files(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    return {"OUTPUT_DIR": tmp_path / "home"}, "holds thesis.tex, not made here: choose another name"


def on_folders_with_our_names(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / "mine" / name / "photos.jsonl", [{"a": 1}])
    return {"OUTPUT_DIR": tmp_path / "mine"}, "mine' holds test, train, of no run of a script here: choose another name"


def on_metadata_of_others(tmp_path):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "metadata.json").write_text('{"title": "my photos"}')
    return {"OUTPUT_DIR": tmp_path / "mine"}, "holds metadata.json, train, of no run of a script here"


def on_a_repository(tmp_path):
    (tmp_path / "mine" / ".git").mkdir(parents=True)
    (tmp_path / "mine" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    return {"OUTPUT_DIR": tmp_path / "mine"}, "mine' holds .git, not made here: choose another name"


def on_what_it_reads(tmp_path):
    return {"DATASET": tmp_path / "out", "OUTPUT_DIR": "./out"}, "out' is or holds DATASET, whose rows would be lost"


def on_what_holds_what_it_reads(tmp_path):
    return {"DATASET": "out/train"}, "out' is or holds DATASET, whose rows would be lost: choose another name"


@pytest.mark.parametrize(
    "case",
    [
        *(missing, empty, wrong_columns, unreadable_line, half_a_table, no_pair_left, all_held_out, no_ratings),
        *(misspelt_rating, no_tokenizer, small_window, no_window, whole_share, negative_rows, negative_gap),
        *(gap_below_a_hundredth, negative_seed),
        *(under_a_file, on_a_file, on_foreign_files, on_folders_with_our_names, on_metadata_of_others),
        *(on_a_repository, on_what_it_reads, on_what_holds_what_it_reads),
    ],
    ids=lambda case: case.__name__,
)
def test_bad_input_ends_in_one_line_and_the_old_rows_stay(load, old_folder, tmp_path, case):
    constants, match = case(tmp_path)
    theirs = content_of(tmp_path)
    with pytest.raises(SystemExit, match=match) as stop:
        load(constants.pop("DATASET", SAMPLE), **constants)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, "one line on stderr, exit code 1"
    assert content_of(tmp_path) == theirs


def test_a_tokenizer_without_template_names_the_cure(load, old_folder, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match='CHAT_TEMPLATE = "plain"'):
        load(rows_of(3), TOKENIZER=tmp_path / "bare")
    metadata, parts, _ = load(rows_of(3), TOKENIZER=tmp_path / "bare", CHAT_TEMPLATE="plain", OUTPUT_DIR="plain")
    length = sum(parts["train"][0]["attention_mask"])
    assert tokenizer.decode(parts["train"][0]["input_ids"][:length]).endswith("?\nAssistant:")
    assert metadata["chat_template"] == "plain"


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def fill_disk_in_pairing(monkeypatch):
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", raising(DISK_FULL))


def fill_disk_in_tokenising(monkeypatch):
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_batch", raising(DISK_FULL))
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", raising(DISK_FULL))


def fill_disk_in_saving(monkeypatch):
    monkeypatch.setattr("datasets.Dataset.save_to_disk", raising(DISK_FULL))


def fill_disk_in_metadata(monkeypatch):
    monkeypatch.setattr("load_helpsteer_dataset.write_json", raising(DISK_FULL))


def fail_in_renaming(monkeypatch):
    rename = os.replace

    def second_fails(*names):
        if Path(names[0]).name == "whole":
            raise PermissionError(errno.EACCES, "Permission denied", str(names[1]))
        rename(*names)

    monkeypatch.setattr("os.replace", second_fails)


def interrupt_between_the_renamings(monkeypatch):
    rename = os.replace

    def first_is_the_last(*names):
        rename(*names)
        if Path(names[1]).name == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", first_is_the_last)


def interrupt(monkeypatch):
    monkeypatch.setattr("load_helpsteer_dataset.describe", raising(KeyboardInterrupt()))


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "accident, code",
    [
        (fill_disk_in_pairing, "the disk is full, nothing was replaced"),
        (fill_disk_in_tokenising, "the disk is full, nothing was replaced"),
        (fill_disk_in_saving, "the disk is full, nothing was replaced"),
        (fill_disk_in_metadata, "the disk is full, nothing was replaced"),
        (fail_in_renaming, "cannot write "),
        (interrupt, 130),
        (interrupt_between_the_renamings, 130),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_accident_leaves_the_old_rows(load, old_folder, monkeypatch, accident, code):
    with monkeypatch.context() as patched:
        accident(patched)
        with pytest.raises(SystemExit) as stop:
            load(rows_of(9))
    assert str(stop.value.code).startswith(str(code)) and "\n" not in str(stop.value.code)


def test_an_unwritable_place_is_named(load, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(SystemExit, match="cannot write .*locked.*: Permission denied"):
        load(rows_of(3), OUTPUT_DIR=tmp_path / "locked" / "out")
