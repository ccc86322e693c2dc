"""The drafted answers: which figures they quote, and how they find the reward model of a run."""

from pathlib import Path

from extras.lib.questions import improved, reward_model_of, why
from extras.make_report import find_runs
from utils.runs import write_json


def test_a_reward_model_with_equal_rewards_has_no_correlation_to_quote():
    models = {"scalar": {"result": {"verdict": "not shown to be better", "length_correlation": None}}}
    assert why([], models)[0] == "The scalar reward model is not shown to be better."
    models["scalar"]["result"]["length_correlation"] = 0.25
    assert "correlate at 0.25" in why([], models)[0]


def test_a_reward_model_is_found_under_another_spelling_of_its_folder():
    run = {"record": {"settings": {"REWARD_MODEL": "outputs/../outputs/reward_model"}}}
    other = {"name": str(Path("outputs/reward_model").resolve()), "kind": "reward"}
    assert reward_model_of([run], [run | {"name": "a", "kind": "reinforce"}, other]) is other
    assert reward_model_of([run], [other | {"kind": "policy"}]) is None


def test_a_recipe_is_quoted_with_the_verdict_of_each_of_its_runs():
    gains = {"a": {"runs": ["a", "b"], "values": [0.5, 0.1], "mean": 0.3, "std": 0.28}}
    pair = {"one": "a", "other": "c", "difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01}
    pairs = [pair | {"p_over_seeds": None}, pair | {"p_over_seeds": 0.3}]
    sampled = {"a": {"judge": {"verdict": "grew"}}, "b": {"judge": {"verdict": "not shown"}}}
    result = {"over_seeds": {"judge": {"gains": gains, "between": pairs}}, "policies": {"sampled": sampled}}
    first, unknown, known = improved(result)
    assert first == (
        "a, b: by the judge +0.300 +- 0.280 from seed to seed against the start; by themselves grew, not shown."
    )
    assert unknown == "a and c: difference +0.200 [+0.100, +0.300], p = 0.01 over prompts; over seeds not known."
    assert known.endswith("p = 0.01 over prompts; over seeds p = 0.3.")


def test_runs_that_were_moved_aside_are_not_in_the_report(tmp_path, capsys):
    for name in ("a", "a-20260101-101010", "a-20260101-101010-2", "b-20260101-101010"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {})
    found = find_runs((), (str(tmp_path),))
    assert [path.name for path in found] == ["a", "b-20260101-101010"], "one without a successor stays"
    assert "moved aside, so left out" in capsys.readouterr().out
