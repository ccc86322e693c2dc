"""The drafted answers: what they say where a figure is missing, and how they find the reward model of a run."""

from pathlib import Path

from utils.questions import improved, reward_model_of, why

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
