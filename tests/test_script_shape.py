"""Every script keeps one shape: literal, explained constants on top, and only main() reads them."""

import ast
from pathlib import Path

import pytest

from utils.config import top_constants

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")] if "override_constants" in path.read_text()]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def names_read_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


@each_script
def test_constants_are_literals_with_a_comment(script):
    source = script.read_text()
    for name, comment in top_constants(source).items():
        assert comment, f"{name} needs a comment on its line: it is the text of --help"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in top_constants(source):
            ast.literal_eval(node.value)  # nothing derived: an option would not reach it


@each_script
def test_only_main_reads_the_constants_and_reads_them_all(script):
    source = script.read_text()
    constants = set(top_constants(source))
    for node in ast.parse(source).body:
        if getattr(node, "name", "") == "main":
            assert constants <= names_read_in(node), f"never used: {constants - names_read_in(node)}"
        else:
            assert not constants & names_read_in(node), (
                f"line {node.lineno}: take these as arguments: {constants & names_read_in(node)}"
            )
