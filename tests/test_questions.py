"""The drafted answers: what they say where a figure is missing, and how they find the reward model of a run."""

from pathlib import Path

from extras.make_report import find_runs
from extras.parts.questions import improved, latest_comparison, reward_model_of, why
from utils.files import write_json

REPORT = {"accuracy": 0.5, "pairs": 9, "verdict": "not shown to be better than 'longer wins'"}


def test_a_reward_model_with_equal_rewards_has_no_correlation_to_quote():
    models = {"scalar": {"result": REPORT | {"reward_std": 0.4, "length_correlation": None}}, "distribution": None}
    first, _ = why({"scalar": [], "distribution": []}, models)
    assert "0.500 of 9 held-out pairs" in first and "correlate" not in first
    models["scalar"] = {"result": REPORT | {"reward_std": 0.4, "length_correlation": 0.25}}
    assert "correlate at 0.25" in why({"scalar": [], "distribution": []}, models)[0]


def test_a_reward_model_is_found_under_another_spelling_of_its_folder():
    run = {"record": {"settings": {"REWARD_MODEL": "outputs/../outputs/reward_model"}}}
    other = {"name": str(Path("outputs/reward_model").resolve()), "kind": "reward"}
    assert reward_model_of([run], [run | {"name": "a", "kind": "reinforce"}, other]) is other
    assert reward_model_of([run], [other | {"kind": "policy"}]) is None


def test_a_recipe_is_told_with_the_verdict_of_each_of_its_runs():
    gains = {"a": {"runs": ["a", "b"], "values": [0.5, 0.1], "mean": 0.3, "std": 0.28}}
    sampled = {"a": {"judge": {"verdict": "grew"}}, "b": {"judge": {"verdict": "not shown"}}}
    result = {"over_seeds": {"judge": {"gains": gains, "between": []}}, "policies": {"sampled": sampled}, "prompts": 9}
    (line,) = improved({"scalar": [], "distribution": [{}]}, {"result": result})
    assert line.startswith("a, b: by the judge a mean difference to the start of +0.300 +- 0.280")
    assert line.endswith("on 9 prompts; each run by itself: grew, not shown.")


def test_runs_that_were_moved_aside_are_not_in_the_report(tmp_path, capsys):
    for name in ("a", "a-20260101-101010", "a-20260101-101010-2", "b-20260101-101010"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {})
    found = find_runs((), (str(tmp_path),))
    assert [path.name for path in found] == ["a", "b-20260101-101010"], "one without a successor stays"
    assert "moved aside, so left out" in capsys.readouterr().out


def test_of_two_comparisons_the_later_one_is_told():
    def run(started, mean):
        result = {"prompts": 4, "policies": {"sampled": {}}, "over_seeds": [], "start": mean}
        return {"kind": "comparison", "name": started, "record": {"started": started}, "result": result}

    assert latest_comparison([run("2026-01-02", 2), run("2026-01-03", 3), run("2026-01-01", 1)])["result"]["start"] == 3
    assert latest_comparison([]) is None
