"""Scripts have literal, commented constants and a short main(), and no module imports from a floor above it."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.config import top_constants

SCRIPTS = [
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]
    if "override_constants" in path.read_text(encoding="utf-8")
]
MODULES = sorted([*ROOT.glob("utils/**/*.py"), *ROOT.glob("extras/lib/*.py")])
PACKAGES = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES} | {"extras"}
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "matplotlib", "scipy", "pandas"}
MAIN_LINES = 60  # at most
HELP_SECONDS = 1.0  # of processor time; half of it in practice
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def names_read_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def imported_by(tree: ast.AST) -> set[str]:
    """Return the full names of all modules that `tree` imports, for both ways to write an import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in PACKAGES}
    return names


@each_script
def test_constants_are_literals_with_a_comment(script):
    source = script.read_text(encoding="utf-8")
    for name, comment in top_constants(source).items():
        assert comment, f"{name} needs a comment on its line: it is the text of --help"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in top_constants(source):
            value = ast.literal_eval(node.value)  # nothing derived: an option would not reach it
            assert isinstance(value, (str, bool, int, float, tuple)), f"{node.targets[0].id} = {value!r}"


@each_script
def test_every_constant_is_read(script):
    constants = set(top_constants(script.read_text(encoding="utf-8")))
    shared = {node.value for path in MODULES for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant)}
    unused = constants - names_read_in(parsed(script)) - shared  # shared modules read settings["NAME"]
    assert not unused, f"never read: {unused}"


@each_script
def test_main_is_short(script):
    (main,) = (node for node in parsed(script).body if getattr(node, "name", "") == "main")
    lines = main.end_lineno - main.lineno + 1
    assert lines <= MAIN_LINES, f"main() has {lines} lines: move work into functions of the script"


@each_script
def test_nothing_happens_at_import(script):
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in parsed(script).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, quiet), f"line {node.lineno}: {ast.unparse(node)[:80]}"
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"), f"line {node.lineno}"


@each_script
def test_help_is_quick_and_imports_no_heavy_package(script):
    name = module_name(script)
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({name!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {HEAVY!r} & set(sys.modules), 'import heavy packages inside functions, for a quick --help'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    constants = top_constants(script.read_text(encoding="utf-8"))
    assert all(f"--{constant.lower()}" in done.stdout for constant in constants)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < HELP_SECONDS, f"{seconds:.2f} s of processor time for --help"


@each_script
def test_a_missing_package_is_reported_in_one_line(script):
    name = module_name(script)
    command = [sys.executable, "-ES", "-m", name, "--help"]  # -S: without the installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        assert done.stderr.startswith("No module named ") and "activate .venv" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 == done.returncode


def test_scripts_never_import_scripts():
    scripts = {module_name(path) for path in SCRIPTS}
    for path in [*SCRIPTS, *MODULES]:
        assert not imported_by(parsed(path)) & scripts, path


FLOORS = ("config", "script", "runs", "data", "models", "training", "evaluation")  # each imports only those before it


def floor_of(name: str) -> int:
    """Return the floor of a module: its index in FLOORS, then extras.lib, then scripts."""
    first, *rest = name.split(".")
    if first == "utils":
        return FLOORS.index(rest[0]) if rest else 0
    return len(FLOORS) + (not name.startswith("extras.lib"))


def test_no_module_imports_from_a_floor_above():
    """A module imports from its own floor and from those below, also inside functions."""
    assert {path.stem for path in ROOT.glob("utils/*") if path.stem[0] not in "_."} == set(FLOORS), "seven rooms"
    for path in [*MODULES, *SCRIPTS]:
        name = module_name(path)
        for needed in imported_by(parsed(path)):
            if needed.startswith(("utils.", "extras.")):
                assert floor_of(needed) <= floor_of(name), f"{name} imports {needed}, which is above it"


def test_modules_that_only_extras_need_are_in_extras():
    """Each module of utils is needed by a script at the top level."""
    needed, new = set(), {name for path in ROOT.glob("*.py") for name in imported_by(parsed(path))}
    while new:
        needed |= new
        paths = [ROOT / f"{name.replace('.', '/')}.py" for name in new if name.startswith("utils.")]
        new = {name for path in paths if path.exists() for name in imported_by(parsed(path))} - needed
    modules = {module_name(path) for path in ROOT.glob("utils/**/*.py")}
    assert not {name for name in modules if not name.endswith("__init__")} - needed


def test_imports_have_no_circle():
    """No module imports itself through others, also inside functions."""
    names = {module_name(path): path for path in MODULES}
    below = {name: imported_by(parsed(path)) & set(names) for name, path in names.items()}
    while below:
        free = [name for name, needed in below.items() if not needed & set(below)]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]
