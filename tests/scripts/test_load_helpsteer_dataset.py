"""load_helpsteer_dataset.py from end to end: columns, metadata, window, test split and the three public functions."""

from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

import load_helpsteer_dataset
from tests.conftest import ROOT, SAMPLE
from tests.data.test_tokens import STRICT
from tests.source_rows import load_rows, rows_of, write_lines
from utils.data.tokens import chat_template_sha256, tokenizer_sha256

REAL = ROOT.parent / "shared" / "data"  # rows of nvidia/HelpSteer2, which are not part of this project
COLUMNS = [
    *("prompt", "chosen", "rejected", "chosen_rating", "rejected_rating", "chosen_attributes", "rejected_attributes"),
    *("input_ids", "attention_mask", "chosen_ids", "rejected_ids"),
    *("prompt_cut", "chosen_cut", "rejected_cut", "equal_after_cut"),
]
METADATA = {
    *("dataset_name", "revision", "split_used", "rating", "train_size", "validation_size", "test_size", "max_length"),
    *("tokenizer", "chat_template", "tokenizer_sha256", "chat_template_sha256", "columns", "split_ratio", "seed"),
    *("counts", "cut_share", "equal_after_cut", "settings", "versions", "fingerprint"),
}


@pytest.fixture
def load(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(load_rows, tokenizer_folder)


def check_books(metadata, splits, ledger):
    """Check that rows read = rows used + rows in the ledger, and that the metadata describes the folder."""
    counts = metadata["counts"]
    assert counts["rows_read"] == counts["rows_used"] + sum(len(entry["rows"]) for entry in ledger)
    assert sum(counts["dropped"].values()) == len(ledger)
    assert counts["pairs"] == sum(map(len, splits.values()))
    for name in ("train", "validation", "test"):
        assert metadata[f"{name}_size"] == len(splits.get(name, ()))


def pair_of(*turns, answers=("good", "bad")):
    sides = [[*turns, {"role": "assistant", "content": answer}] for answer in answers]
    return {"chosen": sides[0], "rejected": sides[1]}


def test_rows_that_never_fit_the_window_are_dropped_with_their_reason(load, tokenizer, tmp_path):
    """One such row must not stop the load of a large source. A long system turn that fits stays."""
    ask = [{"role": "user", "content": f"Question{i} asks{i} about{i}?"} for i in range(8)]
    long = {"role": "system", "content": "Be brief. " * (60 // len(tokenizer("Be brief. ")["input_ids"]) + 2)}
    rows = [pair_of(turn) for turn in ask[:5]]
    rows += [pair_of(long, ask[5]), pair_of(long, ask[6], answers=("good " * 200, "bad"))]
    metadata, splits, ledger = load(rows)
    check_books(metadata, splits, ledger)
    assert [(entry["reason"], entry["rows"]) for entry in ledger] == [("long_system_turn", [6])]
    assert metadata["counts"]["pairs"] == 6
    strict = deepcopy(tokenizer)
    strict.chat_template = STRICT
    strict.save_pretrained(tmp_path / "strict")
    metadata, splits, ledger = load([*rows, pair_of(ask[0], ask[7])], TOKENIZER=tmp_path / "strict")
    check_books(metadata, splits, ledger)
    assert [(entry["reason"], entry["rows"]) for entry in ledger] == [("refused_by_template", [i]) for i in (5, 6, 7)]


def test_the_metadata_describe_the_sample(load, tokenizer, tokenizer_folder, capsys):
    metadata, splits, ledger = load(SAMPLE, MAX_ROWS=160)
    check_books(metadata, splits, ledger)
    assert set(metadata) == METADATA
    assert {"dataset_name": str(SAMPLE), "revision": "", "split_used": {"train": "train"}}.items() <= metadata.items()
    assert metadata["rating"] == "average" and metadata["seed"] == 42 and metadata["split_ratio"] == 0.2
    assert metadata["tokenizer"] == tokenizer_folder and metadata["max_length"] == 128
    assert metadata["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    assert metadata["chat_template_sha256"] == chat_template_sha256(tokenizer)
    assert metadata["settings"]["MAX_ROWS"] == 160 and "datasets" in metadata["versions"]
    assert metadata["columns"] == splits["train"].column_names == splits["validation"].column_names == COLUMNS
    assert metadata["counts"]["rows_read"] == 160 and metadata["counts"]["prompts"] == 80
    for side in ("prompt", "chosen", "rejected"):
        flags = [flag for part in splits.values() for flag in part[f"{side}_cut"]]
        assert metadata["cut_share"][side] == pytest.approx(sum(flags) / len(flags), abs=1e-4)
    shown = capsys.readouterr().out
    assert "read 160 rows of 80 prompts" in shown and shown.endswith("next: python dataset_summary.py --data_dir out\n")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(["dropped.jsonl", "metadata.json", *splits])
    assert [path.name for path in Path().glob(".*")] == [], "no temporary folder is left"


def test_a_row_has_the_pair_and_its_ids(load, tokenizer):
    metadata, splits, _ = load(rows_of(10), MAX_LENGTH=64)
    assert (metadata["train_size"], metadata["validation_size"]) == (8, 2)
    for row in [*splits["train"], *splits["validation"]]:
        number = row["prompt"].split()[0].removeprefix("Question")
        assert row["chosen"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"Answer 0 to {number}."},
        ]
        assert row["rejected"][-1]["content"] == f"Answer 1 to {number}."
        assert (row["chosen_rating"], row["rejected_rating"]) == (2.2, 2.0)
        assert (row["chosen_attributes"], row["rejected_attributes"]) == ([3, 2, 2, 2, 2], [2] * 5)
        length = sum(row["attention_mask"])
        whole = tokenizer.apply_chat_template(row["chosen"], tokenize=True, return_dict=False)
        assert row["input_ids"][:length] + row["chosen_ids"] == whole


def test_the_mask_separates_padding_from_end_tokens(load, tokenizer):
    import torch

    _, splits, _ = load(SAMPLE, MAX_ROWS=80)
    ids, mask = torch.tensor(splits["train"]["input_ids"][:]), torch.tensor(splits["train"]["attention_mask"][:])
    assert ids.shape == mask.shape == (len(splits["train"]), 128)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row, row_ids, row_mask in zip(splits["train"], ids, mask, strict=True):
        length = int(row_mask.sum())
        assert row_mask.tolist() == [1] * length + [0] * (128 - length)
        assert set(row_ids[length:].tolist()) <= {tokenizer.pad_token_id}
        assert tokenizer.eos_token_id in row_ids[:length].tolist(), "a turn of the prompt ends in it"
        if not row["prompt_cut"]:
            rendered = tokenizer.apply_chat_template(row["chosen"][:-1], tokenize=False, add_generation_prompt=True)
            assert length == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        assert length + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 128


def test_answers_that_are_equal_after_the_cut_stay_and_are_counted(load, capsys):
    rows = list(rows_of(4))
    for row in rows[:2]:
        row["response"] = "word " * 200 + row["response"]
    metadata, splits, _ = load(rows, MAX_LENGTH=64)
    equal = [row["prompt"] for part in splits.values() for row in part if row["equal_after_cut"]]
    assert equal == [rows[0]["prompt"]] and metadata["equal_after_cut"] == 1 and metadata["counts"]["pairs"] == 4
    assert "1 pairs are equal" in capsys.readouterr().out


def test_the_broken_rows_are_loaded_with_complete_books(load):
    metadata, splits, ledger = load(ROOT / "sample_data" / "broken_rows.jsonl")
    check_books(metadata, splits, ledger)
    counts = metadata["counts"]
    assert counts["dropped"] == Counter(entry["reason"] for entry in ledger) and len(counts["dropped"]) == 9
    assert counts["pairs"] == 8 and counts["rows_read"] == 38


def test_the_test_split_is_separate_and_nothing_like_it_is_in_training(load, tmp_path):
    write_lines(tmp_path / "rows" / "train.jsonl", rows_of(20))
    held_out = [*rows_of(3, start=18), *rows_of(2, start=50, gap=0)]
    held_out += [{**row, "prompt": row["prompt"].upper() + " !"} for row in rows_of(1, start=5)]
    write_lines(tmp_path / "rows" / "validation.jsonl", held_out)
    metadata, splits, ledger = load("rows")
    check_books(metadata, splits, ledger)
    assert metadata["split_used"] == {"train": "train", "test": "validation"}
    assert [metadata[f"{name}_size"] for name in ("train", "validation", "test")] == [16, 4, 4]
    assert [(entry["split"], entry["reason"]) for entry in ledger] == [("test", "tie")] * 2
    assert [entry["rows"] for entry in ledger] == [[6, 7], [8, 9]]
    prompts = {name: [prompt.upper().rstrip(" !?") for prompt in part["prompt"]] for name, part in splits.items()}
    assert not set(prompts["train"]) & set(prompts["test"])
    assert {f"QUESTION{i} ASKS{i} ABOUT{i}" for i in (18, 19, 5)} <= set(prompts["validation"])
    assert splits["test"].features == splits["train"].features


def test_settings_change_the_rows(load):
    rows = [*rows_of(10), *rows_of(10, start=10, gap=2)]
    metadata, splits, _ = load(rows, MIN_RATING_GAP=0.4, VALIDATION_SHARE=0.0, SYSTEM_PROMPT="Be a pirate.")
    assert metadata["counts"]["dropped"] == {"small_gap": 10}
    assert (len(splits["train"]), len(splits["validation"])) == (10, 0)
    assert splits["validation"].column_names == COLUMNS, "an empty split has the columns too"
    assert all(row["chosen"][0] == {"role": "system", "content": "Be a pirate."} for row in splits["train"])
    metadata, splits, _ = load(rows, RATING="goodness", MAX_ROWS=6)
    assert metadata["counts"]["rows_read"] == 6 and metadata["rating"] == "goodness"
    assert splits["train"]["chosen_rating"][0] == pytest.approx(0.65 * 3 + 0.8 * 2 + 0.45 * 2)
    assert load(rows, MAX_ROWS=10**20)[0]["counts"]["rows_read"] == 40, "more than 64 bits"
    assert [len(load(list(rows_of(1)))[1][name]) for name in ("train", "validation")] == [1, 0]


def test_the_fingerprint_depends_on_the_rows_alone(load):
    rows = list(rows_of(12))
    first = load(rows)[0]["fingerprint"]
    assert first == load(rows, OUTPUT_DIR="elsewhere")[0]["fingerprint"]
    others = [
        load(rows, **change)[0]["fingerprint"] for change in ({"SEED": 1}, {"MAX_LENGTH": 64}, {"RATING": "goodness"})
    ]
    rows[0]["response"] += "!"
    assert len({first, *others, load(rows)[0]["fingerprint"]}) == 5


def test_a_source_without_ratings_has_nulls_and_its_folder_can_be_loaded(load):
    rows = [{"prompt": f"Question{i} asks{i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
    metadata, splits, _ = load(rows)
    assert metadata["rating"] == "" and splits["train"]["chosen_rating"][:] == [None] * 4
    assert splits["train"]["chosen_attributes"][:] == [None] * 4
    again, _, _ = load("out", OUTPUT_DIR="again", MAX_LENGTH=64)
    assert (again["train_size"] + again["validation_size"], again["test_size"]) == (4, 1), "validation is held out"


def test_the_public_functions_take_a_plain_dataset(tokenizer_folder):
    """A notebook may call the three functions on rows that this script did not make."""
    sides = [
        [[{"role": "user", "content": f"Q{i} is{i}?"}, {"role": "assistant", "content": text}] for i in range(10)]
        for text in ("yes", "no")
    ]
    plain = Dataset.from_dict({"prompt": [f"Q{i} is{i}?" for i in range(10)], "chosen": sides[0], "rejected": sides[1]})
    tokenizer = load_helpsteer_dataset.setup_tokenizer(tokenizer_folder)
    train, validation = load_helpsteer_dataset.split_dataset(plain, test_size=0.2, seed=42)
    train, validation = load_helpsteer_dataset.process_dataset(train, validation, tokenizer, 64)
    assert (len(train), len(validation)) == (8, 2)
    assert train.column_names == [name for name in COLUMNS if "rating" not in name and "attributes" not in name]
    assert tokenizer.decode(train[0]["chosen_ids"]) == "yes<|im_end|>\n" and len(train[0]["input_ids"]) == 64
