"""Prompts with markers become chat turns, and the ledger of the broken rows is complete."""

import json

import pytest

from tests.conftest import ROOT
from tests.source_rows import dialogue
from utils.data.preferences import Ledger, chat_turns, checked_pairs, finished_row
from utils.data.sources import open_source


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("Q", ["Q"]),
        ("  Q\n\n", ["  Q\n\n"]),
        ("Q1\n<extra_id_1>Assistant\nA1\n<extra_id_1>User\nQ2", ["Q1", "A1", "Q2"]),
        ("Q1\n\n<extra_id_1>Assistant\nA1\n\nmore\n<extra_id_1>User\nQ2\n", ["Q1", "A1\n\nmore", "Q2"]),
        ("<extra_id_1>User\nQ1\n<extra_id_1>Assistant\nA1\n<extra_id_1>User\nQ2", ["Q1", "A1", "Q2"]),
        ("Q1\n<extra_id_1>Assistant\n", ["Q1"]),
        ("Q1\n<extra_id_1>Assistant", ["Q1"]),
        ("Q1\n<extra_id_1>Assistant \r\nA1\n<extra_id_1>User\nQ2\n<extra_id_1>Assistant\nA2", ["Q1", "A1", "Q2"]),
        ("Q1\r\n<extra_id_1>Assistant\r\nA1\r\n<extra_id_1>User\r\nQ2\r\n", ["Q1", "A1", "Q2"]),
        ("Q1 <extra_id_1>Assistant\nstays", ["Q1 <extra_id_1>Assistant\nstays"]),
        ("Q1\n<extra_id_1>System\nstays", ["Q1\n<extra_id_1>System\nstays"]),
        ("Q1\n<extra_id_1>User stays", ["Q1\n<extra_id_1>User stays"]),
        (" \n", []),
    ],
)
def test_markers_become_turns_without_the_empty_ones(prompt, turns):
    assert chat_turns(prompt) == dialogue(*turns)
    assert chat_turns("Q1\n<extra_id_1>Assistant\n\n<extra_id_1>User\nQ2") == [*dialogue("Q1"), *dialogue("Q2")]


def test_a_stored_row_has_whole_conversations_and_the_system_prompt():
    turns = dialogue("Q", system="source")
    pair = {"prompt": "Q", "turns": turns, "answers": ("yes", "no"), "ratings": (2.0, 1.0)}
    row = finished_row(pair, "pirate")
    assert [row["chosen"], row["rejected"]] == [dialogue("Q", text, system="pirate") for text in ("yes", "no")]
    row = finished_row(pair, "")
    assert row["chosen"] == dialogue("Q", "yes", system="source") and row["chosen_attributes"] is None


def test_the_ledger_has_every_broken_row():
    source = open_source(str(ROOT / "sample_data" / "broken_rows.jsonl"), "average")
    ledger = Ledger()
    pairs = list(checked_pairs(source.splits["train"], "attributes", "average", "train", 0.0, ledger))
    starts = (22, 25, 27, 29, 31, 33)
    assert sorted(p["rows"] for p in pairs) == [[0, 37], [3, 4], *([start, start + 1] for start in starts)]
    assert sorted((entry["rows"], entry["reason"]) for entry in ledger.entries) == [
        ([1, 2], "tie"),
        ([5], "duplicate"),
        ([6], "empty_answer"),
        ([7], "unpaired"),
        ([8], "empty_prompt"),
        ([9], "empty_prompt"),
        ([10, 11], "equal_answers"),
        *[([row], "bad_attribute") for row in range(12, 20)],
        ([20], "unpaired"),
        ([21], "between_best_and_worst"),
        ([24], "between_best_and_worst"),
        ([35, 36], "broken_text"),
    ]
    assert ledger.totals() == {"rows_read": 38, "rows_used": 16, "rows_dropped": 22, "prompts": 18}
    turns = {p["rows"][0]: p["turns"] for p in pairs}
    last = "Double it. (I wrote <extra_id_1>User in my notes.)"
    assert turns[25] == dialogue("Pick a number between one and ten.", "Seven.", last)
    assert "\u0000" in turns[29][0]["content"] and turns[29][0]["content"].endswith("\r\nend\u2028of line")
    assert len(turns[31][0]["content"]) > 3000 and turns[33] == dialogue("Почему небо голубое?")
    assert "<script>" in turns[27][0]["content"], "text is text, HTML too"


def test_the_ledger_shows_the_start_of_the_prompt(tmp_path):
    ledger = Ledger()
    ledger.drop("tie", "train", [3, 4], "я" * 200)
    ledger.drop("empty_prompt", "test", [5], None)
    ledger.drop("bad_messages", "test", [6], dialogue("ж"))
    ledger.write(tmp_path / "dropped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"reason": "tie", "split": "train", "rows": [3, 4], "prompt": "я" * 80}
    assert lines[1]["prompt"] == "null" and "ж" in lines[2]["prompt"]


def test_conversations_in_one_text_are_split_into_turns():
    """Anthropic/hh-rlhf has no prompt column. The prompt is what both texts share before the last answer."""
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\nYes?\n\nHuman: Tea or coffee?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} Tea, Human: with milk.", "rejected": f"{start} Coffee.\n"},
        {"chosen": f"{start} Tea.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        {"chosen": f"{start} ", "rejected": f"{start} Coffee."},
        {"chosen": f"{start} Tea.\n\nHuman: Thanks", "rejected": f"{start} Coffee."},
        {"chosen": "\n\nAssistant: Tea.", "rejected": "\n\nAssistant: Coffee."},
        {"prompt": "Q", "chosen": "\n\nHuman: yes", "rejected": "\n\nHuman: no"},
    ]
    ledger = Ledger()
    pair, plain = checked_pairs(lambda: iter(rows), "pairs", "average", "train", 0.0, ledger)
    assert pair["turns"] == dialogue("Hi", "Hello!\nYes?", "Tea or coffee?")
    assert pair["answers"] == ("Tea, Human: with milk.", "Coffee.") and pair["rows"] == [0]
    assert plain["turns"] == dialogue("Q") and plain["answers"] == ("\n\nHuman: yes", "\n\nHuman: no")
    reasons = [(entry["rows"], entry["reason"]) for entry in ledger.entries]
    assert reasons == [([1], "prompts_differ"), ([2], "empty_answer"), ([3], "empty_answer"), ([4], "empty_prompt")]
    assert ledger.totals() == {"rows_read": 6, "rows_used": 2, "rows_dropped": 4, "prompts": 6}
