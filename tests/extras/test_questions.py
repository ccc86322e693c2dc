"""The drafted answers quote the figures of the runs and find the reward model of a run."""

from pathlib import Path

from extras.lib.questions import improved, reward_model_of


def test_a_reward_model_is_found_by_another_path_of_its_folder():
    run = {"record": {"settings": {"REWARD_MODEL": "outputs/../outputs/reward_model"}}}
    other = {"name": str(Path("outputs/reward_model").resolve()), "kind": "reward"}
    assert reward_model_of([run], [run | {"name": "a", "kind": "reinforce"}, other]) is other
    assert reward_model_of([run], [other | {"kind": "policy"}]) is None


def test_a_recipe_is_quoted_with_the_verdict_of_each_run():
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
