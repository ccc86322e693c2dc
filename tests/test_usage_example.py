"""The example runs on what the steps leave behind, and talks as long as something is said."""

import builtins

import pytest

from extras import usage_example
from tests.conftest import run_script


def test_the_example_filters_scores_and_talks(sample_folder, model_folder, judges, capsys, monkeypatch):
    lines = iter(["And of Spain?", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    run_script(
        usage_example,
        DATA_DIR=sample_folder,
        POLICY=model_folder,
        REWARD_MODEL=judges["scalar"],
        MAX_NEW_TOKENS=4,
        CHAT="true",
        DEVICE="cpu",
    )
    said = capsys.readouterr().out
    assert "pairs of" in said and "a batch: prompts (4, 128)" in said and said.count("policy: ") == 1
    scores = [line.split()[0] for line in said.splitlines() if line.endswith(")") and "   (" in line]
    assert len(scores) == 3 and len({float(score) for score in scores}) == 3


def test_a_missing_folder_is_named(judges):
    with pytest.raises(SystemExit, match="nowhere is not there yet: run `python load_helpsteer_dataset.py` first"):
        run_script(usage_example, DATA_DIR="nowhere", REWARD_MODEL=judges["scalar"])
