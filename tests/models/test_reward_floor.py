"""What policies refuse to be trained or judged by: a reward model that is worse than a coin."""

import json

import pytest

from utils.models.reward_model import check_better_than_chance


@pytest.mark.parametrize(
    "high, verdict, outcome",
    [
        (0.45, "worse than x", "stop"),
        (0.62, "not shown to be better than x", "WARNING"),
        (0.8, "better than x by 0.1", ""),
    ],
)
def test_the_floor_for_policies(tmp_path, capsys, high, verdict, outcome):
    result = {"accuracy": high - 0.05, "accuracy_high": high, "pairs": 100, "verdict": verdict}
    (tmp_path / "eval.json").write_text(json.dumps(result))
    if outcome == "stop":
        with pytest.raises(SystemExit, match="is worse than a coin"):
            check_better_than_chance(str(tmp_path))
    else:
        check_better_than_chance(str(tmp_path))
    assert ("WARNING" in capsys.readouterr().out) == (outcome == "WARNING")


def test_a_few_pairs_do_not_show_that_a_model_is_worse_than_a_coin(tmp_path):
    result = {"accuracy": 0.0, "accuracy_high": 0.0, "pairs": 5, "verdict": "not shown to be better than x"}
    (tmp_path / "eval.json").write_text(json.dumps(result))
    check_better_than_chance(str(tmp_path))
    (tmp_path / "eval.json").write_text(json.dumps(result | {"pairs": 60, "prompts": 5}))
    check_better_than_chance(str(tmp_path))
    (tmp_path / "eval.json").write_text(json.dumps(result | {"pairs": 6}))
    with pytest.raises(SystemExit, match="is worse than a coin"):
        check_better_than_chance(str(tmp_path))
