"""extras/load_oasst_dataset.py makes pairs or answers of message trees, and the ledger has every dropped message."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import dataset_summary
import train_dpo
from extras import load_oasst_dataset
from tests.conftest import ROOT, run_script
from tests.scripts.test_load_helpsteer_dataset import COLUMNS, METADATA, check_books
from tests.source_rows import load_rows, message, nested, tree, write_lines, write_rows
from utils.data.processed import load_pairs

SAMPLE = ROOT / "sample_data" / "oasst_sample.jsonl"


@pytest.fixture
def load(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(load_rows, tokenizer_folder, script=load_oasst_dataset)


def reasons(ledger):
    """Return {row number: reason}."""
    return {row: entry["reason"] for entry in ledger for row in entry["rows"]}


def rows_in(splits):
    return [row for part in splits.values() for row in part]


def test_the_sample_becomes_a_processed_folder_of_pairs(load, tokenizer, capsys):
    metadata, splits, ledger = load(SAMPLE, MAX_LENGTH=512)
    counts = metadata["counts"]
    assert counts["rows_read"] == 84 == counts["rows_used"] + len(reasons(ledger)) and counts["pairs"] == 16
    assert counts["dropped"] == dict(sorted(Counter(reasons(ledger).values()).items()))
    assert {"deleted": 1, "synthetic": 1, "orphan": 2, "spam": 1}.items() <= counts["dropped"].items()
    assert set(metadata) == METADATA | {"rows", "made_by"} and metadata["rating"] == "rank"
    assert metadata["columns"] == splits["train"].column_names == COLUMNS
    assert (metadata["train_size"], metadata["validation_size"], metadata["split_ratio"]) == (12, 4, 0.2)
    source = {m["text"]: m for m in map(json.loads, SAMPLE.read_text(encoding="utf-8").splitlines())}
    for row in rows_in(splits):
        best, worst = source[row["chosen"][-1]["content"]], source[row["rejected"][-1]["content"]]
        assert best["parent_id"] == worst["parent_id"] == source[row["prompt"]]["message_id"]
        siblings = [m["rank"] for m in source.values() if m["parent_id"] == best["parent_id"] and m["rank"] is not None]
        assert (best["rank"], worst["rank"]) == (0, max(siblings))
        assert (row["chosen_rating"], row["rejected_rating"]) == (0.0, -worst["rank"])
        assert row["chosen_attributes"] is row["rejected_attributes"] is None
        whole = tokenizer.apply_chat_template(row["chosen"], tokenize=True, return_dict=False)
        assert row["input_ids"][: sum(row["attention_mask"])] + row["chosen_ids"] == whole
    assert capsys.readouterr().out.endswith("next: python dataset_summary.py --data_dir out\n")


def test_later_turns_keep_the_conversation_before_them(load):
    rows = [*tree("a", 1, 0, None), message("a.3.1"), message("a.3.1.1", rank=2), message("a.3.1.2", rank=1)]
    rows += [message("a.3.1.3", rank=4), message("a.3.1.2.1"), message("a.3.1.2.1.1")]
    metadata, splits, ledger = load(rows, TURNS="all")
    result = {len(row["chosen"]): row for row in rows_in(splits)}
    assert sorted(result) == [2, 4]
    texts = [turn["content"].split()[0].removeprefix("Текст") for turn in result[4]["chosen"]]
    assert texts == ["a", "a.3", "a.3.1", "a.3.1.2"], "the unranked answer that the conversation continues"
    assert [turn["role"] for turn in result[4]["rejected"]] == ["user", "assistant"] * 2
    assert result[4]["prompt"].startswith("user: Текстa про") and "assistant: Текстa.3 " in result[4]["prompt"]
    assert (result[4]["chosen_rating"], result[4]["rejected_rating"]) == (-1.0, -4.0)
    assert reasons(ledger) == {5: "between_best_and_worst", 8: "unpaired", 9: "unranked"}
    assert metadata["counts"]["rows_used"] == 7, "messages of the context are used"
    _, splits, ledger = load(rows)
    assert len(rows_in(splits)) == 1 and reasons(ledger) == {3: "unranked", **dict.fromkeys(range(4, 10), "later_turn")}


def test_every_dropped_message_has_its_reason(load):
    expected = [
        *((m, "used") for m in tree("good", 1, 0)),
        *((m, "other_language") for m in tree("en", 0, 1, lang="en")),
        *((m, "tie") for m in tree("tie", 1, 1)),
        *((m, "bad_tree") for m in tree("halted", 0, 1, tree_state="halted_by_moderator")),
        (message("one"), "unpaired"),
        (message("one.1", rank=0), "unpaired"),
        (message("one.2"), "unranked"),
        (message("one.3", rank=1, deleted=True), "deleted"),
        (message("one.4", rank=2, synthetic=True), "synthetic"),
        (message("one.5", rank=3, review_result=False), "spam"),
        (message("one.6", text=" ", rank=4), "empty_answer"),
        (message("one.7", text="\ud800", rank=5), "broken_text"),
        (message("one.8", rank=6, role="prompter"), "bad_turn"),
        (message("one.9", rank=7, lang="en"), "other_language"),
        (message("one.3.1"), "lost_context"),
        (message("one.3.1.1"), "lost_context"),
        (message("quiet"), "unanswered"),
        (message("empty", text=None) | {"text": None}, "empty_prompt"),
        (message("empty.1", rank=0), "lost_context"),
        (message("same"), "equal_answers"),
        (message("same.1", text="одно", rank=0), "equal_answers"),
        (message("same.2", text="одно", rank=1), "equal_answers"),
        (message("first", role="assistant"), "bad_turn"),
        (message("gone.1"), "orphan"),
        (message("gone.1.1"), "orphan"),
        (message("x", parent_id="y"), "orphan"),
        (message("y", parent_id="x"), "orphan"),
        (message("self", parent_id="self"), "orphan"),
        (message("good.1", rank=1), "duplicate"),
        (message(""), "bad_message"),
        (message("odd", role="narrator"), "bad_message"),
        (message("again", text="Текстgood проgood этоgood"), "duplicate"),
        (message("again.1", text="Текстgood.1 проgood.1 этоgood.1", rank=1), "duplicate"),
        (message("again.2", text="Текстgood.2 проgood.2 этоgood.2", rank=0), "duplicate"),
    ]
    path = Path("source.jsonl").absolute()
    path.write_text("".join(json.dumps(m) + "\n" for m, _ in expected))
    metadata, splits, ledger = load(path)
    result = reasons(ledger)
    assert [(m["message_id"], result.get(i, "used")) for i, (m, _) in enumerate(expected)] == [
        (m["message_id"], reason) for m, reason in expected
    ]
    assert metadata["counts"]["rows_used"] == 3 and len(rows_in(splits)) == 1
    per_tree = [entry["rows"] for entry in ledger if entry["prompt"].startswith("Текстen ")]
    assert per_tree == [[3, 4, 5]], "one entry for each tree and reason"


def test_nested_trees_and_tables_make_the_same_rows_as_flat_messages(load, tmp_path):
    flat = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    flat = [m for m in flat if not m["message_id"].startswith("ru19")]
    metadata, _, ledger = load(flat, TURNS="all")
    for name, rows in (("trees.jsonl.gz", nested(flat)), ("flat.parquet", flat), ("flat.csv", flat)):
        write_rows(tmp_path / name, rows)
        other, _, its_ledger = load(tmp_path / name, TURNS="all", OUTPUT_DIR=name.partition(".")[0])
        assert other["fingerprint"] == metadata["fingerprint"] and its_ledger == ledger, name
    assert len(rows_in(load(flat[::-1], TURNS="all")[1])) == metadata["counts"]["pairs"], "answers before prompts"


def test_sft_rows_have_all_human_answers_and_the_ids_that_trl_expects(load, tokenizer):
    rows = [*tree("a", 1, None, 0), message("a.4", synthetic=True), message("a.2.1"), message("a.2.1.1", rank=0)]
    rows.append(message("a.5", text=rows[1]["text"], rank=3))
    metadata, splits, ledger = load(rows, ROWS="sft", TURNS="all", SYSTEM_PROMPT="Ты пират.", MAX_LENGTH=512)
    result = sorted(rows_in(splits), key=lambda row: row["messages"][-1]["content"])
    assert [row["rating"] for row in result] == [-1.0, None, 0.0, 0.0]
    assert reasons(ledger) == {4: "synthetic", 7: "duplicate"} and metadata["counts"]["rows"] == 4
    assert {"rows": "sft", "cut_share": {"prompt": 0.0, "answer": 0.0}}.items() <= metadata.items()
    for row in result:
        assert row["messages"][0] == {"role": "system", "content": "Ты пират."} and "пират" not in row["prompt"]
        assert row["input_ids"] == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        learned = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        assert tokenizer.decode(learned) == row["messages"][-1]["content"] + "<|im_end|>\n"
    _, splits, _ = load([message("a"), message("a.1", text="слово " * 99)], ROWS="sft", MAX_LENGTH=64)
    for row in rows_in(splits):
        assert row["answer_cut"] and len(row["input_ids"]) <= 64 and row["input_ids"][-1] != tokenizer.eos_token_id


def test_a_tree_is_never_split(load):
    rows = []
    for i in range(10):
        rows += [*tree(f"t{i}", 0, 1), message(f"t{i}.1.1"), message(f"t{i}.1.1.1", rank=0)]
        rows += [message(f"t{i}.1.1.2", rank=1)]
    rows += tree("copy", 0, 1)
    rows[-3]["text"] = rows[0]["text"].upper() + "!"
    metadata, splits, _ = load(rows, TURNS="all", VALIDATION_SHARE=0.4)
    assert (metadata["train_size"], metadata["validation_size"]) == (12, 9)
    tops = {name: {row["chosen"][0]["content"].lower().strip("!") for row in part} for name, part in splits.items()}
    assert not tops["train"] & tops["validation"] and len(tops["train"] | tops["validation"]) == 10


def test_the_validation_split_of_the_source_is_kept_and_nothing_like_it_is_in_training(load, tmp_path):
    own = tree("own", 0, 1)
    alike = [*tree("alike", 0, 1), message("alike.1.1"), message("alike.1.1.1", rank=0), message("alike.1.1.2", rank=1)]
    alike[0]["text"] = own[0]["text"].upper() + " ?"
    write_lines(tmp_path / "rows" / "train.jsonl", [*tree("a", 0, 1), *alike, *tree("b", 1, 0)])
    write_lines(tmp_path / "rows" / "validation.jsonl", own)
    metadata, splits, ledger = load("rows", TURNS="all")
    assert metadata["split_used"] == {"train": "train", "validation": "validation"}
    assert (metadata["train_size"], metadata["validation_size"], metadata["test_size"]) == (2, 1, 0)
    assert splits["validation"]["prompt"][:] == [own[0]["text"]] and metadata["split_ratio"] is None
    (entry,) = ledger
    assert (entry["reason"], entry["split"], entry["rows"]) == ("like_validation", "train", [3, 4, 5, 6, 7, 8])
    check_books(metadata | {"counts": metadata["counts"] | {"dropped": {"one": 1}}}, splits, ledger)
    write_lines(tmp_path / "rows" / "validation.jsonl", tree("en", 0, 1, lang="en"))
    metadata, _, ledger = load("rows")
    assert (metadata["train_size"], metadata["validation_size"]) == (2, 1) and metadata["split_ratio"] == 0.2
    assert [entry["rows"] for entry in ledger if entry["split"] == "validation"] == [[0, 1, 2]]


def test_train_dpo_reads_the_pairs_with_their_system_prompt(load, model_folder, tmp_path):
    load(SAMPLE, TURNS="all", SYSTEM_PROMPT="Отвечай как старый моряк.", MAX_LENGTH=256)
    for name, count in (("train", 16), ("validation", 5)):
        rows = load_pairs("out", name)
        assert len(rows) == count and all(row["chosen"][0]["content"] == "Отвечай как старый моряк." for row in rows)
    small = {"MODEL": model_folder, "MAX_STEPS": 1, "MAX_ROWS": 4, "SAMPLE_PROMPTS": 0, "REFERENCE_CACHE": "cache"}
    run_script(train_dpo, DATA_DIR="out", OUTPUT_DIR=tmp_path / "run", DEVICE="cpu", PRECISION="fp32", **small)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["pairs"] == 4


def test_readers_of_pairs_refuse_sft_rows(load):
    load(tree("a", 0, 1), ROWS="sft")
    for read in (lambda: load_pairs("out", "train"), lambda: run_script(dataset_summary, DATA_DIR="out")):
        with pytest.raises(SystemExit, match="^out contains sft rows, not pairs: use them in .*extras.train_sft"):
            read()


def test_a_folder_of_another_tokenizer_is_reported_with_the_command_of_this_loader(load):
    load(tree("a", 0, 1), CHAT_TEMPLATE="plain")
    metadata = json.loads(Path("out/metadata.json").read_text())
    Path("out/metadata.json").write_text(json.dumps(metadata | {"tokenizer_sha256": "of another"}))
    command = "python -m extras.load_oasst_dataset --dataset .* --output_dir out --chat_template plain"
    with pytest.raises(SystemExit, match=f"run `{command}` first"):
        run_script(dataset_summary, DATA_DIR="out")


def test_a_tree_without_a_root_is_counted(load):
    rows = [*nested(tree("a", 0, 1)), {"message_tree_id": "b", "prompt": None}, {"message_tree_id": "c"}]
    rows += [{"message_tree_id": "d", "prompt": {**message("d"), "replies": ["no message", message("d.1", rank=0)]}}]
    metadata, _, ledger = load(rows)
    assert metadata["counts"]["rows_read"] == 8
    assert reasons(ledger) == {3: "no_root", 4: "no_root", 5: "unpaired", 6: "bad_message", 7: "unpaired"}


@pytest.mark.parametrize(
    "rows, settings, match",
    [
        (
            tree("a", 0, 1),
            {"LANGUAGE": "fi"},
            r"LANGUAGE = 'fi': no message of .* has it; languages \(with messages\): ru 3",
        ),
        (tree("a", 0), {}, "no training row is left of 2 messages, left out: {'unpaired': 2}"),
        (tree("a", 0, 1), {"ROWS": "triples"}, "ROWS = 'triples' is not known, choose one of: pairs, sft"),
        (tree("a", 0, 1), {"TURNS": "last"}, "TURNS = 'last' is not known, choose one of: first, all"),
        (tree("a", 0, 1), {"VALIDATION_SHARE": 1}, "VALIDATION_SHARE = 1.0: expected 0 or more, and less than 1"),
        (tree("a", 0, 1), {"MAX_ROWS": -1}, "MAX_ROWS = -1: expected 0"),
        ([{"prompt": "x", "chosen": "y", "rejected": "z"}], {}, "needed is one of: .*message_id parent_id role text"),
    ],
)
def test_user_errors_stop_with_one_message_and_the_old_rows_stay(load, rows, settings, match):
    before = load(tree("old", 0, 1))[0]
    with pytest.raises(SystemExit, match=match) as stop:
        load(rows, **settings)
    assert "\n" not in str(stop.value)
    assert json.loads(Path("out/metadata.json").read_text()) == before and not list(Path().glob(".out*"))


def test_the_loader_of_pairs_names_the_loader_of_trees(tokenizer_folder):
    with pytest.raises(SystemExit, match=r"message trees: use `python -m extras.load_oasst_dataset --dataset .*`"):
        load_rows(tokenizer_folder, SAMPLE)
