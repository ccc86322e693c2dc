"""Commands, options, files and links in README.md, CONTRIBUTING.md and docs/ exist, and the quickstart runs."""

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

MADE_IN = Path(sys.prefix)  # the environment that the tests run in
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
BLOCK = re.compile(r"^```(\w*)( \w+)?\n(.*?)^```", re.S | re.M)
BLOCKS = [(page, *found) for page, text in PAGES.items() for found in BLOCK.findall(text)]
PROSE = {page: BLOCK.sub("", text) for page, text in PAGES.items()}
CODE = [(page, code) for page, text in PROSE.items() for code in re.findall(r"`([^`\n]+)`", text)]
MARKS = {"", " hub", " gpu", " hour"}  # why a test does not run a block; its commands and options are checked
LINES = [line.split("  #")[0].strip() for _, kind, _, text in BLOCKS if kind == "bash" for line in text.splitlines()]
COMMAND = re.compile(r"([A-Z_]+=\S* )*(python|make|accelerate launch|\./\w+\.sh)\b.*")
LINES += [code for _, code in CODE if COMMAND.fullmatch(code) and not code.endswith("make")]

SCRIPTS = [path for folder in ("", "extras", "benchmarks") for path in (ROOT / folder).glob("*.py")]
CONSTANTS = {name for path in SCRIPTS for name in top_constants(path.read_text(encoding="utf-8"))}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SHELL = (ROOT / "train_helpsteer.sh").read_text(encoding="utf-8")
VARIABLES = {"make": set(re.findall(r"^(\w+) \?=", MAKEFILE, re.M)), "sh": set(re.findall(r"^(\w+)=\$\{", SHELL, re.M))}
MODULES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "utils").rglob("*.py"))
TABLES = set(re.findall(r"^([A-Z_]+)\b.*=", MODULES, re.M))  # CONTRIBUTING.md names these as well
PLACEHOLDERS = {"ADDRESS", "BASE", "NAME"}
REMOVED = {"CENTRING", "FREEZE_LAYERS", "LENGTH_BALANCED", "LENGTH_PENALTY"}  # only docs/results.md may name them
TOOLS = {"pip", "pytest", "ruff", "venv"}  # modules of other packages


def test_readme_has_at_most_200_lines():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_blocks_have_known_marks():
    assert len(set(LINES)) > 40 and {mark for _, _, mark, _ in BLOCKS} <= MARKS
    assert {kind for _, kind, _, _ in BLOCKS} <= {"", "bash", "json", "python"}
    assert all(text.count("```") % 2 == 0 for text in PAGES.values()), "every block is closed"
    first = "\n".join(text for page, _, _, text in BLOCKS if page == "README.md")
    readme = {line.split("#")[0].strip() for line in first.splitlines()}
    assert {"make quickstart", "make test"} <= readme, "the two commands"


@pytest.mark.parametrize("line", sorted(set(filter(None, LINES))))
def test_commands_exist_with_their_options(line):
    words = shlex.split(line, comments=True)
    given = {word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        targets = [word for word in words[1:] if not word.startswith("-")]
        assert targets and all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets)
        assert given <= VARIABLES["make"] | {"PYTHON", "VENV"}
        return
    if words[0].startswith("./"):
        assert os.access(ROOT / words[0], os.X_OK) and given <= VARIABLES["sh"]
        return
    if words[:2] == ["python", "-m"] and words[2] in TOOLS:
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        return
    assert words[0] == "python" or line.startswith("accelerate launch ")
    words = words[1:] if words[0] == "python" else words[2:]
    if words[0] == "--config_file":
        assert (ROOT / words[1]).exists()
        words = words[2:]
    path = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    options = {word[2:].split("=")[0].upper() for word in words if word.startswith("--")}
    assert path.exists() and options - {"HELP"} <= set(top_constants(path.read_text())), options


@pytest.mark.parametrize(("page", "code"), sorted({(page, code) for page, code in CODE}))
def test_constants_and_options_exist(page, code):
    options = re.findall(r"(?:^| )--([a-z_]+)", code) if code.startswith("--") else []
    assert {name.upper() for name in options} <= CONSTANTS | {"HELP"}, code
    if constant := re.fullmatch(r"([A-Z][A-Z0-9_]+)( = .*|=\S*)?", code):
        more = {"docs/results.md": REMOVED, "CONTRIBUTING.md": TABLES}.get(page, set())
        known = CONSTANTS | VARIABLES["make"] | VARIABLES["sh"] | PLACEHOLDERS | more
        assert constant[1] in known, f"{page}: {code}"


def test_example_rows_have_a_known_layout():
    shown = {}
    for page, kind, _, text in BLOCKS:
        if kind == "json":
            rows = [json.loads(line) for line in text.splitlines()]
            shown.setdefault(page, []).extend(layout_of([row], LAYOUTS | ANSWER_LAYOUTS) for row in rows)
    assert shown == {
        "README.md": ["pairs"],
        "docs/data.md": ["pairs", "pairs", "attributes"],
        "docs/sft_and_pairs.md": ["completion", "messages"],
    }


def names_in(text: str) -> set[str]:
    """Return the files of this repository that the text names; links and addresses are left out."""
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", text)
    return set(re.findall(r"(?<![\w./-])[\w./-]*\w\.(?:py|txt|sh|ya?ml|toml|jinja)\b|\bsample_data/[\w.]+\w", text))


TREE = next(text for page, _, _, text in BLOCKS if page == "README.md" and text.startswith("setup_check.py"))
NAMED = [(page, name) for page, text in PAGES.items() for name in sorted(names_in(text.replace(TREE, "")))]


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_files_exist(page, name):
    assert (ROOT / name).exists(), f"{page} names {name}"


def test_file_tree_is_exact():
    """Every path in the tree exists, and the tree has every module, script and template."""
    shown, folder = set(), ""
    for line in TREE.splitlines():
        names = line.split(" # ")[0].split()
        if not line.startswith(" "):
            folder = names[0] if len(names) == 1 and names[0].endswith("/") else ""
        shown |= {folder + name if line.startswith(" ") else name for name in names}
    assert [name for name in sorted(shown) if not (ROOT / name).exists()] == []
    places = [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]
    places += [path for top in ("utils", "extras", "benchmarks") for path in (ROOT / top).rglob("*.*")]
    suffixes = {".py", ".sh", ".jinja"}
    files = {path.relative_to(ROOT).as_posix() for path in places if path.suffix in suffixes}
    assert {name for name in files if not name.endswith("__init__.py")} == {n for n in shown if not n.endswith("/")}


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [(page, to) for page, text in PROSE.items() for to in re.findall(r"\]\(([^)\s]+)\)", text)]


@pytest.mark.parametrize(("page", "to"), sorted({(page, to) for page, to in LINKS if "://" not in to}))
def test_links_and_anchors_resolve(page, to):
    path, _, anchor = to.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), f"{page} links to {to}"
    assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), f"{page} links to {to}"


def test_readme_links_every_page():
    linked = {to.partition("#")[0] for page, to in LINKS if page == "README.md"}
    assert set(PAGES) - {"README.md"} <= linked


def test_the_commands_without_make_equal_those_of_the_quickstart():
    shown = next(text for page, kind, _, text in BLOCKS if page == "docs/install.md" and "-m pip" in text)
    command = ["make", "--no-print-directory", "-n", "quickstart", "VENV=", "PYTHON=python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.splitlines()[1:] == done.stdout.splitlines()


def test_make_with_an_empty_VENV_installs_nothing():
    shown = {}
    for venv in ("no/such", ""):
        command = ["make", "-n", "assignment", f"VENV={venv}", "PYTHON=the_python"]
        shown[venv] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "the_python -m venv no/such" in shown["no/such"] and "no/such/bin/python -m pip" in shown["no/such"]
    assert "the_python -m extras.evaluate" in shown[""] and "pip" not in shown[""] and "venv" not in shown[""]


@pytest.mark.slow
def test_the_quickstart_and_every_unmarked_block_run(tmp_path):
    """Run make quickstart on a fresh clone with this environment, then all blocks that need nothing else."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
    command = ["make", "quickstart", f"VENV={MADE_IN}"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"pair accuracy 0\.\d+ \[0\.\d+, [01]\.\d+\] on \d+ pairs; 'the longer answer wins'", done.stdout)
    verdict = r"^(better|worse|not shown to be better) than .* p = [\d.e-]+\)?(, corrected for \d+ shortcuts)?$"
    assert re.search(verdict, done.stdout, re.M)
    assert re.search(r"reward on 32 prompts: .* p = [\d.e-]+: (grew|fell|not shown)", done.stdout), "REINFORCE"
    commands = []
    for _, kind, mark, text in BLOCKS:
        if kind == "python" and not mark:
            commands.append(["-c", text])
        elif kind == "bash" and not mark:
            lines = [shlex.split(line, comments=True) for line in text.splitlines()]
            commands += [line[1:] for line in lines if line and line[0] == "python"]
    assert len(commands) > 5
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), f"{command}: {done.stderr}"
    assert (clone / "outputs/quickstart/russian/metadata.json").exists(), "the block without a mark was run"
