"""Datasets are read from every kind of file and folder, recognised by their columns, and refused if unreadable."""

import gzip
import json

import pytest

from tests.source_rows import write_lines, write_rows
from utils.data.preferences import Ledger, checked_pairs
from utils.data.sources import open_source

GRADES = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
ROWS = [{"prompt": f"Question {i}?", "response": f'Answer\n{i}, "yes" ☕', **GRADES} for i in range(5)]
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
MESSAGES = [{"role": "user", "content": "It's “why”?"}, {"role": "assistant", "content": 'Because "x",\nsee.'}]


def read(source, role="train"):
    return list(source.splits[role]())


def fails(dataset, match, rating="average"):
    """Check that opening and reading the dataset stops with one line that matches."""
    with pytest.raises(SystemExit, match=match) as stop:
        source = open_source(str(dataset), rating)
        for records in source.splits.values():
            list(records())
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_every_format_has_the_same_rows(tmp_path, name):
    write_rows(tmp_path / name, ROWS)
    source = open_source(str(tmp_path / name), "average")
    assert [{key: str(value) for key, value in row.items()} for row in read(source)] == [
        {key: str(value) for key, value in row.items()} for row in ROWS
    ]
    assert source.layouts == {"train": "attributes"} and source.revision == ""
    assert source.name == str(tmp_path / name) and source.rating == "average"


def test_json_lines_are_read_under_the_suffix_json_and_with_empty_lines(tmp_path):
    write_lines(tmp_path / "rows.json", ROWS)
    assert read(open_source(str(tmp_path / "rows.json"), "average")) == ROWS
    path = tmp_path / "rows.jsonl"  # with a byte order mark
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert read(open_source(str(path), "average")) == [PAIR, PAIR]


@pytest.mark.parametrize("as_text", [json.dumps, repr])
def test_messages_in_csv_cells_are_read_unless_numpy_printed_them(tmp_path, as_text):
    write_rows(tmp_path / "rows.csv", [{"chosen": as_text(MESSAGES), "rejected": "[{see} the list]"}])
    (row,) = read(open_source(str(tmp_path / "rows.csv"), "average"))
    assert row == {"chosen": MESSAGES, "rejected": "[{see} the list]"}
    # text that only begins like messages stays text
    answers = ["[{'role': 'user'}] is how a list of messages begins.", '[{"content": ' + "[" * 99999]
    write_rows(tmp_path / "rows.csv", [{"chosen": answer, "rejected": "x"} for answer in answers])
    assert [row["chosen"] for row in read(open_source(str(tmp_path / "rows.csv"), "average"))] == answers
    cell = "[{'role': 'user', 'content': 'Why?'}\n {'role': 'assistant', 'content': 'So.'}]"
    write_rows(tmp_path / "rows.csv", [{"chosen": cell, "rejected": "x"}])
    fails(tmp_path / "rows.csv", "line 3: chosen holds messages that are neither JSON nor Python")


def test_a_folder_has_splits_in_shards(tmp_path, capsys):
    write_lines(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[2:4])
    write_lines(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:2])
    write_lines(tmp_path / "data" / "validation-00000-of-00001-a09b74b3ef9c3b56.jsonl.gz", ROWS[4:])
    write_lines(tmp_path / "data" / "extra.jsonl", ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# rows")
    source = open_source(str(tmp_path), "average")
    assert read(source) == ROWS[:4] and read(source, "test") == ROWS[4:]
    assert source.split_used == {"train": "train", "test": "validation"}
    assert "not read: extra" in capsys.readouterr().out


def test_a_split_in_two_formats_is_refused(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "train.parquet", ROWS)
    fails(tmp_path, "has its split 'train' twice: use .*train.jsonl or .*train.parquet")


def test_the_only_file_of_a_folder_is_the_training_split(tmp_path):
    write_lines(tmp_path / "rows.jsonl", ROWS)
    source = open_source(str(tmp_path), "average")
    assert read(source) == ROWS and source.split_used == {"train": "rows"} and list(source.splits) == ["train"]


@pytest.mark.parametrize("suffix", ["", "_split"])
@pytest.mark.parametrize("rating, split", [("average", "average_rating"), ("goodness", "goodness_score")])
def test_the_rating_selects_the_split(tmp_path, rating, split, suffix):
    for name in ("average_rating", "goodness_score", "helpfulness"):
        row = {**PAIR, "chosen": name}
        write_lines(tmp_path / "data" / f"{name}{suffix}-00000-of-00001.jsonl", [row])
    source = open_source(str(tmp_path), rating)
    assert read(source) == [{**PAIR, "chosen": split}]
    assert source.split_used == {"train": split + suffix} and source.rating == rating


def test_a_rating_without_a_split_is_refused(tmp_path):
    for name in ("average_rating_split", "goodness_split"):
        write_lines(tmp_path / f"{name}.jsonl", [PAIR])
    first = tmp_path / "average_rating_split.jsonl"
    match = f"no split for RATING = 'nvidia_70b', it has: average_rating_split, goodness_split; choose one: {first}$"
    fails(tmp_path, match, "nvidia_70b")
    assert open_source(str(first), "nvidia_70b").split_used == {"train": "train"}, "the remedy works"


def test_a_rating_without_effect_is_reported_and_not_recorded(tmp_path, capsys):
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", [PAIR])), "goodness")
    assert source.rating == "" and "RATING = 'goodness' has no effect" in capsys.readouterr().out


def test_folders_of_save_to_disk_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([PAIR, {**PAIR, "prompt": "When?"}])
    DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    for folder in (tmp_path / "both" / "train", tmp_path / "one"):
        (folder / "cache-1234.arrow").write_bytes(b"left by a later map()")
    both, one = open_source(str(tmp_path / "both"), "average"), open_source(str(tmp_path / "one"), "average")
    assert read(both) == read(one) == list(rows) and read(both, "test") == list(rows)[1:]


def test_one_file_can_have_training_and_held_out_rows(tmp_path):
    """The preference/ folder of HelpSteer2 has one file, with the split in a column."""
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": 2}
    rows = [{**row, "split": "train" if i % 3 else "val", "prompt": f"{i}?"} for i in range(9)]
    source = open_source(str(write_lines(tmp_path / "preference.jsonl.gz", rows)), "average")
    assert source.layouts == {"train": "strength", "test": "strength"}
    assert [r["prompt"] for r in read(source, "test")] == ["0?", "3?", "6?"] and len(read(source)) == 6


def test_saved_splits_without_a_train_split_are_listed(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([PAIR])
    DatasetDict(one=rows, two=rows).save_to_disk(tmp_path / "both")
    fails(tmp_path / "both", f"it has: one, two; choose one: {tmp_path / 'both' / 'one'}$")
    assert read(open_source(str(tmp_path / "both" / "one"), "average")) == [PAIR]


@pytest.mark.parametrize(
    "row, layout",
    [
        (ROWS[0], "attributes"),
        ({**ROWS[0], "chosen": "x"}, "attributes"),
        (PAIR, "pairs"),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "pairs"),
        ({**PAIR, "chosen_score": 1, "rejected_score": 0}, "pairs"),
        ({"prompt": "", "response_1": "", "response_2": "", "preference_strength": 0}, "strength"),
        ({"context": [], "response1": "", "response2": "", "overall_preference": 0, "domain": ""}, "strength"),
    ],
)
def test_the_columns_decide_the_layout(tmp_path, row, layout):
    path = write_lines(tmp_path / "named_anything.jsonl", [row])
    assert open_source(str(path), "average").layouts == {"train": layout}


def test_wrong_columns_are_listed_with_the_known_ones(tmp_path):
    first = {name: value for name, value in ROWS[0].items() if name != "verbosity"}
    path = write_lines(tmp_path / "rows.jsonl", [first, *ROWS])
    assert open_source(str(path), "average").layouts == {"train": "attributes"}, "a later row has the column"
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "x", "answer": "y"}])
    fails(path, "has columns answer question, needed is one of: .*coherence.*; chosen rejected; .*overall_preference")


def test_a_missing_file_is_not_searched_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.data.sources.download", lambda dataset: pytest.fail("asked the hub"))
    for name in ("rows.jsonl", "data/rows.parquet", "./data/rows", "/data/rows", "~/no_rows_here", "rows", "a/b/c/d"):
        fails(name, f"DATASET = '{name}' is not there")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_file_is_reported(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    if name.endswith("parquet"):
        write_rows(tmp_path / name, {"chosen": [], "rejected": []})
    fails(tmp_path / name, "has no rows in its split 'train'")


def test_a_folder_without_rows_is_reported(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    fails(tmp_path, "contains no file that can be read, known: .jsonl.gz, .jsonl, .json, .csv, .parquet")
    fails(tmp_path / "README.md", "cannot read this kind of file")
    write_lines(tmp_path / "base" / "rows.jsonl", ROWS)
    write_lines(tmp_path / "online" / "rows.jsonl.gz", ROWS)
    fails(tmp_path, f"has its files in folders, choose one: {tmp_path}/base, {tmp_path}/online$")


GOOD = json.dumps(PAIR).encode() + b"\n"


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("rows.jsonl", GOOD * 2 + b'{"prompt": "x"\n' + GOOD, "line 3 is not JSON .*at column"),
        ("rows.jsonl.gz", gzip.compress(GOOD + b"\n{]\n"), "line 3 is not JSON"),
        ("rows.jsonl", GOOD + b'{"prompt": "\xff\xfe"}\n', "line 2 is not JSON .*utf-8"),
        ("rows.jsonl", GOOD + b'{"n": ' + b"9" * 5000 + b"}\n", "line 2 is not JSON .*digits"),
        ("rows.jsonl", GOOD + b"[1, 2]\n", "line 2 is not a JSON object"),
        ("rows.json", b'[{"prompt": 1},\n{"prompt" 2}]', "rows.json cannot be read: JSONDecodeError .*line 2"),
        ("rows.json", b"[1, 2]", "expected an array of objects"),
        ("rows.json", b'["\xff"]', "rows.json cannot be read: UnicodeDecodeError"),
        ("rows.csv", b"chosen,rejected\na,b\na,b,c\n", "line 3 has more cells than the header"),
        ("rows.csv", b"chosen,rejected\n\xff,b\n", "rows.csv cannot be read: UnicodeDecodeError"),
        ("rows.parquet", b"PAR1 this is none", "rows.parquet cannot be read: ArrowInvalid"),
        ("rows.parquet", b"", "rows.parquet cannot be read: ArrowInvalid"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "rows.parquet cannot be read"),
        ("rows.jsonl.gz", b"version https://git-lfs", "rows.jsonl.gz cannot be read: BadGzipFile"),
        ("rows.jsonl.gz", gzip.compress(GOOD * 500)[:-20], "rows.jsonl.gz cannot be read: EOFError"),
    ],
)
def test_unreadable_content_is_reported(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    fails(tmp_path / name, match)


def test_rows_of_all_formats_make_the_same_pair(tmp_path):
    """Text cells of CSV and values of parquet make the same pair as JSON."""
    rows = [{**ROWS[0], "prompt": "Q?"}, {**ROWS[1], "prompt": "Q?", "helpfulness": 2}]
    for name in ("rows.csv", "rows.parquet", "rows.jsonl"):
        write_rows(tmp_path / name, rows)
        source = open_source(str(tmp_path / name), "average")
        (pair,) = checked_pairs(source.splits["train"], "attributes", "average", "train", 0.0, Ledger())
        assert pair["ratings"] == (2.8, 2.4) and pair["attributes"] == ([4, 4, 4, 1, 1], [2, 4, 4, 1, 1])
