"""extras/make_report.py writes a page that needs nothing else, and leaves out runs that were moved aside."""

import shutil

import pytest

from extras import make_report
from extras.make_report import find_runs
from tests.conftest import run_script
from utils.runs import read_json, write_json


def test_the_page_is_complete_and_escapes_texts(reward_models, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reward_models["scalar"], folder)
    result = read_json(folder / "eval.json")
    assert result["worst_mistakes"], "a tiny model makes some"
    result["worst_mistakes"][0]["chosen_text"] = "<script>alert(1)</script>"
    write_json(folder / "eval.json", result)
    runs = f"{folder},{reward_models['distribution']}"
    run_script(make_report, RUNS=runs, OUTPUT=tmp_path / "page.html", LOOK_IN=tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result["verdict"].replace("'", "&#39;") in text and text.count("data:image/png;base64,") == 10
    assert "<script" not in text and "&lt;script&gt;" in text and "http://" not in text and "https://" not in text
    assert "Not here:" not in text, "only these two runs were asked for"
    with pytest.raises(SystemExit, match=r"nothing/run.json is not there yet"):
        run_script(make_report, RUNS=tmp_path / "nothing", OUTPUT=tmp_path / "page.html")


def test_runs_that_were_moved_aside_are_left_out(tmp_path, capsys):
    for name in ("a", "a-20260101-101010", "a-20260101-101010-2", "b-20260101-101010"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {})
    result = find_runs((), (str(tmp_path),))
    assert [path.name for path in result] == ["a", "b-20260101-101010"], "a run without a successor stays"
    assert "moved aside, so left out" in capsys.readouterr().out
