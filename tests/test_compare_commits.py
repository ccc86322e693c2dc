"""What benchmarks.compare_commits calls equal, and what it reports."""

import json

import pytest

from benchmarks.compare_commits import compare_folders

RESULT = {"accuracy": 0.612345, "intervals": [0.5, 0.7], "seconds": 3.1}


@pytest.mark.parametrize(
    "after, reported",
    [
        (RESULT, ""),
        (RESULT | {"seconds": 9.9}, ""),
        (RESULT | {"accuracy": 0.612346}, "eval.json: /accuracy: '0.612345' and '0.612346' (by 1e-06)"),
        (RESULT | {"intervals": [0.5, 0.8]}, "eval.json: /intervals/1: '0.7' and '0.8' (by 0.1)"),
        (RESULT | {"new": 1}, "eval.json: /new only in the present files"),
        (None, "eval.json: missing in the present files"),
    ],
)
def test_the_first_difference_is_reported(tmp_path, after, reported):
    for side, result in (("before", RESULT), ("after", after)):
        (tmp_path / side).mkdir()
        if result:
            (tmp_path / side / "eval.json").write_text(json.dumps(result))
    assert compare_folders(tmp_path / "before", tmp_path / "after", {"seconds"}) == reported
    if "new" in (after or {}):
        assert not compare_folders(tmp_path / "before", tmp_path / "after", {"seconds", "new"})
