"""A processed folder replaces an older one and nothing else, also if the run is killed; commands to make it again."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from tests.conftest import ROOT
from tests.source_rows import content_of, dialogue, load_rows, rows_of, write_lines
from utils.data.processed import HALVES, closed_answers, half, load_pairs, next_command, reload_command, unique_prompts
from utils.data.tokens import end_of_turn


@pytest.fixture
def load(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(load_rows, tokenizer_folder)


def test_an_output_folder_may_be_a_link_and_hold_hidden_files(load, tmp_path):
    (tmp_path / "big_disk" / "rows").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big_disk" / "rows")
    load(rows_of(5))
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big_disk" / "rows" / "metadata.json").exists()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    (tmp_path / "out" / "._metadata.json").write_bytes(b"")
    assert load(rows_of(7))[0]["counts"]["pairs"] == 7 and not list(tmp_path.glob(".out-*"))


def test_the_home_folder_is_expanded(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match="dropped.jsonl"):  # load() looks for "~" to the letter
        load(rows_of(3), OUTPUT_DIR="~/rows")
    assert (tmp_path / "home" / "rows" / "metadata.json").exists() and not (tmp_path / "~").exists()
    assert capsys.readouterr().out.endswith(f"python dataset_summary.py --data_dir {tmp_path}/home/rows\n")


def test_leftovers_of_another_folder_are_not_restored(load, tmp_path):
    """`.out-a-abc12345` belongs to a killed run that wrote out-a, not to out."""
    load(rows_of(5), OUTPUT_DIR="out-a")
    (tmp_path / ".out-a-abc12345").mkdir()
    os.rename(tmp_path / "out-a", tmp_path / ".out-a-abc12345" / "old")
    with pytest.raises(SystemExit, match="is not there"):
        load("none.jsonl")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out-a-abc12345" / "old").exists()
    with pytest.raises(SystemExit, match="is not there"):
        load("none.jsonl", OUTPUT_DIR="out-a")
    assert (tmp_path / "out-a" / "metadata.json").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are open")
def test_no_file_is_open_when_the_temporary_folder_is_deleted(load, monkeypatch):
    """Windows does not delete open files."""
    seen = []
    monkeypatch.setattr(
        "load_helpsteer_dataset.replace_folder", lambda *_: seen.append(Path("/proc/self/maps").read_text())
    )
    with pytest.raises(FileNotFoundError):
        load(rows_of(5), OUTPUT_DIR="closed")
    assert seen[0] and ".closed-" not in seen[0]


KILLED = """
import os, signal, sys
import load_helpsteer_dataset as script
from utils.config import override_constants

rename = os.replace
def die(*names):
    if names and os.path.basename(names[0]) != {name!r}:
        return rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
if {name!r} == "saving":
    script.describe = lambda *_: die()
else:
    script.os.replace = die
script.main(override_constants(vars(script), sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["saving", "whole"])
def test_a_killed_run_leaves_the_old_rows(load, tmp_path, tokenizer_folder, capsys, name):
    """The worst moment is "whole": the old folder is moved away and the new one is not in its place yet."""
    load(rows_of(5))
    before = content_of(tmp_path / "out")
    rows = write_lines(tmp_path / "more.jsonl", rows_of(9))
    options = [f"--dataset={rows}", f"--tokenizer={tokenizer_folder}", f"--output_dir={tmp_path / 'out'}"]
    command = [sys.executable, "-c", KILLED.format(name=name), *options, "--max_length=64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = tmp_path.glob(".out-*")
    if name == "saving":
        assert content_of(tmp_path / "out") == before
    capsys.readouterr()
    with pytest.raises(SystemExit, match="is not there"):
        load("none.jsonl")
    assert content_of(tmp_path / "out") == before, "the next run puts them back before anything else"
    assert f"{left} belongs to a run that was killed" in capsys.readouterr().out


def test_the_reload_command_names_the_source_and_the_changed_settings():
    settings = {"DATASET": "my rows", "RATING": "goodness", "MAX_ROWS": 0, "MAX_LENGTH": 512, "OUTPUT_DIR": "moved"}
    metadata = {"settings": settings | {"TOKENIZER": "old", "SEED": 42}}
    assert reload_command(metadata, "here", "new") == (
        "python load_helpsteer_dataset.py --dataset 'my rows' --tokenizer new --max_length 512 --output_dir here "
        "--rating goodness"
    )
    trees = {"settings": settings | {"LANGUAGE": "", "RATING": "average"}, "made_by": "-m extras.load_oasst_dataset"}
    assert reload_command(trees, "here", "new") == (
        "python -m extras.load_oasst_dataset --dataset 'my rows' --tokenizer new --max_length 512 --language '' "
        "--output_dir here"
    )
    made = {"settings": {"DATA_DIR": "rows", "MODE": "ranked", "REWARD_MODEL": "judge"}, "generated": {}}
    assert reload_command(made | {"made_by": "load_helpsteer_dataset.py"}, "here", "new") == (
        "python -m extras.generate_pairs --data_dir rows --model new --mode ranked --reward_model judge "
        "--output_dir here"
    )


def test_the_next_command_names_the_folder_and_the_model_if_they_are_not_the_defaults(tmp_path):
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert next_command("python x.py", "processed_helpsteer", hub) == "python x.py"
    other = next_command("python x.py", "my rows", "models/copy")
    assert other == "python x.py --data_dir 'my rows' --model models/copy"
    (tmp_path / "reward_config.json").write_text("{}")
    assert next_command("python x.py", "processed_helpsteer", str(tmp_path), "owner/y") == "python x.py --model owner/y"


def pairs_of(*prompts):
    return Dataset.from_list([{"row": i, "chosen": dialogue(text, str(i))} for i, text in enumerate(prompts)])


def test_pairs_of_a_prompt_stay_in_one_half():
    rows = pairs_of("a", "b", "a", "c", "b", "d")
    halves = [half(rows, name)["row"] for name in HALVES]
    assert [list(one) for one in halves] == [[0, 2, 3], [1, 4, 5]]
    assert list(unique_prompts(rows)["row"]) == [0, 1, 3, 5] and list(unique_prompts(rows, 2)["row"]) == [0, 1]
    alone = pairs_of(*"abcdef")
    assert list(half(alone, "odd")["row"]) == [1, 3, 5], "with one pair for each prompt, every second pair"
    with pytest.raises(SystemExit, match="HALF = 'odd' has no pair"):
        half(pairs_of("a", "a"), "odd")


def test_cut_answers_get_an_end_of_turn_for_reward_models(sample_folder, tokenizer):
    """Otherwise the last token shows whether an answer was cut, and a reward model learns that."""
    rows, closing = load_pairs(sample_folder, "train", 60), end_of_turn(tokenizer)
    closed = closed_answers(rows, tokenizer)
    assert any(rows["chosen_cut"]) and not all(rows["chosen_cut"])
    for before, after in zip(rows, closed, strict=True):
        for side in ("chosen", "rejected"):
            old, new = before[f"{side}_ids"], after[f"{side}_ids"]
            assert new[-len(closing) :] == closing and len(new) == len(old)
            assert new == old if not before[f"{side}_cut"] else new[:-2] == old[:-2] != old
