"""Every package that the code imports is in a requirements file, and has its version in constraints.txt."""

import ast
import sys
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
SHIPPED = [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("extras/**/*.py")]
FOR_DEVELOPERS = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/**/*.py")]


def normal(name):
    return name.lower().replace("_", "-")


def required(*files):
    """Return the names of the packages in these requirements files."""
    lines = [line for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return {normal(Requirement(line.split(" #")[0]).name) for line in lines if line and line[0] not in "#-"}


def imported(paths):
    """Return the packages that these files import, inside functions too, by the names that pip knows."""
    names = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    distributions = packages_distributions()
    return {normal(distributions.get(name, [name])[0]) for name in names - OWN - sys.stdlib_module_names}


@pytest.mark.parametrize(
    "paths, files",
    [(SHIPPED, ["requirements.txt"]), (FOR_DEVELOPERS, ["requirements.txt", "requirements-dev.txt"])],
    ids=["scripts", "tests and benchmarks"],
)
def test_every_imported_package_is_required(paths, files):
    assert imported(paths) - required(*files) == set()


def test_every_required_package_has_an_exact_version():
    assert required("requirements.txt", "requirements-dev.txt") - required("constraints.txt") == set()
