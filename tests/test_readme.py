"""What the README says can be done: its commands exist with their options, and its quickstart really runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.config import top_constants
from utils.data.sources import ANSWER_LAYOUTS, LAYOUTS, layout_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( \w+)?\n(.*?)^```", README, re.S | re.M)
MARKS = {"", " hub", " gpu", " hour"}  # what a block needs that a test has not: its script and options are checked
LINES = [line.split("#")[0].strip() for kind, _, text in BLOCKS if kind == "bash" for line in text.splitlines()]
MADE_IN = Path(sys.prefix)  # the environment that the tests run in


def test_blocks_are_marked_as_known():
    assert len(LINES) > 10 and {mark for _, mark, _ in BLOCKS} <= MARKS
    assert {"make quickstart", "make test"} <= set(LINES), "the two commands"


@pytest.mark.parametrize("line", sorted(set(filter(None, LINES))))
def test_command_exists_with_its_options(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[:3] == ["python", "-m", "pip"]:
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        return
    if words[0].startswith("./"):
        assert os.access(ROOT / words[0], os.X_OK)
        return
    words = words[1:] if words[0] == "python" else words[2:]  # accelerate launch
    assert "python" in line or line.startswith("accelerate launch ")
    if words[0] == "--config_file":
        assert (ROOT / words[1]).exists()
        words = words[2:]
    path = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    options = {word[2:].split("=")[0].upper() for word in words if word.startswith("--")}
    assert path.exists() and options <= set(top_constants(path.read_text())), options


def test_rows_that_are_shown_have_a_known_layout():
    rows = [json.loads(line) for kind, _, text in BLOCKS if kind == "json" for line in text.splitlines()]
    assert [layout_of([row], LAYOUTS | ANSWER_LAYOUTS) for row in rows] == ["pairs", "completion"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b[\w/-]+\.(?:py|txt)\b", README))))
def test_files_that_are_named_exist(name):
    assert any((ROOT / folder / name).exists() for folder in ("", "utils", "extras", "benchmarks", "tests"))


def test_make_without_an_environment_of_its_own_makes_and_installs_none():
    shown = {}
    for venv in ("no/such", ""):
        command = ["make", "-n", "assignment", f"VENV={venv}", "PYTHON=the_python"]
        shown[venv] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "the_python -m venv no/such" in shown["no/such"] and "no/such/bin/python -m pip" in shown["no/such"]
    assert "the_python -m extras.evaluate" in shown[""] and "pip" not in shown[""] and "venv" not in shown[""]


@pytest.mark.slow
def test_quickstart_runs_and_its_python_examples_work(tmp_path):
    """On a fresh clone, with the packages of this environment: make quickstart, then what else needs no hub."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        ["make", "quickstart", f"VENV={MADE_IN}"], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"pair accuracy 0\.\d+ \[0\.\d+, [01]\.\d+\] on \d+ pairs; 'the longer answer wins'", done.stdout)
    verdict = r"^(better|worse|not shown to be better) than .* p = [\d.e-]+\)?(, corrected for \d+ shortcuts)?$"
    assert re.search(verdict, done.stdout, re.M)
    assert re.search(r"reward on 32 prompts: .* p = [\d.e-]+: (grew|fell|not shown)", done.stdout), (
        "REINFORCE's verdict"
    )
    for kind, mark, text in BLOCKS:
        lines = [shlex.split(line, comments=True) for line in text.splitlines()]
        commands = []
        if kind == "python":
            commands = [["-c", text]]
        elif kind == "bash" and not mark and not any("make" in line or "pip" in line for line in lines):
            commands = [line[1:] for line in lines]
        for command in commands:
            done = subprocess.run([sys.executable, *command], cwd=clone, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert (clone / "outputs/quickstart/russian/metadata.json").exists(), "the block without a mark was run"
