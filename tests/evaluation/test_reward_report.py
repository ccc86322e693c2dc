"""The report of a reward model separates length from content and needs predictions.jsonl alone."""

import json

import numpy as np
import pytest
from datasets import Dataset

from utils.evaluation.baselines import SHORTCUT_NAMES, fit_logistic, shortcuts_right, surface_weights
from utils.evaluation.predictions import fit_win_scale, prediction_lines
from utils.evaluation.reward_report import format_summary, length_bands, report
from utils.models.reward_model import RewardHead


def planted_rows(count: int, longer_wins: float, seed: int = 0) -> Dataset:
    """Return pairs with answers of random length. The longer one is chosen with probability `longer_wins`."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        sizes = sorted(random.integers(20, 400, size=2) + np.array([0, 1]))
        texts = ["word " * int(size) for size in sizes]  # shorter, longer
        row = {"row": i, "prompt": f"Question {i}?", "input_ids": [5, 6, 2, 2], "attention_mask": [1, 1, 0, 0]}
        row |= {"chosen_rating": 3.0, "rejected_rating": 2.0 + 0.2 * (i % 3)}
        order = reversed(texts) if random.random() < longer_wins else texts
        for side, text in zip(("chosen", "rejected"), order, strict=True):
            row[side] = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            row[f"{side}_ids"] = [7] * len(text.split())
        rows.append(row)
    return Dataset.from_list(rows)


def outputs_for(rows: Dataset, content: float, length: float, seed: int = 1) -> np.ndarray:
    """Return rewards [pairs, 2, 1]: content * (1 for chosen) + length * log tokens + noise."""
    random = np.random.default_rng(seed)
    sizes = np.log([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    good = np.array([1.0, 0.0])
    return (content * good + length * sizes + 0.3 * random.normal(size=sizes.shape))[..., None].astype(np.float32)


def report_of(rows: Dataset, outputs: np.ndarray) -> tuple[dict, list[dict]]:
    lines = prediction_lines(rows, outputs, RewardHead("scalar"), shortcuts_right(rows, surface_weights(rows)))
    return report(lines), lines


def report_with(rows: Dataset, outputs: np.ndarray, rivals: dict[str, np.ndarray]) -> dict:
    right = {name: values.astype(float) for name, values in rivals.items()}
    return report(prediction_lines(rows, outputs, RewardHead("scalar"), right))


def test_a_reward_of_length_is_exposed():
    rows = planted_rows(400, longer_wins=0.7)
    result, _ = report_of(rows, outputs_for(rows, content=0.0, length=5.0))
    assert result["accuracy"] > 0.65, "the accuracy alone looks good"
    assert not result["verdict"].startswith("better")
    assert result["length_correlation"] > 0.9
    assert abs(result["accuracy"] - result["length_baseline"]) < 0.05
    bands = result["by_length_difference"]
    assert bands["chosen much longer"]["accuracy"] > 0.95 and bands["rejected much longer"]["accuracy"] < 0.05


def test_a_reward_of_content_is_found_with_and_without_length_in_the_data():
    for longer_wins in (0.5, 0.6):
        rows = planted_rows(400, longer_wins)
        result, _ = report_of(rows, outputs_for(rows, content=1.0, length=0.0))
        assert result["verdict"].startswith("better than") and result["length_matched_accuracy"] > 0.9
        assert abs(result["length_correlation"]) < 0.25 and result["accuracy_low"] > 0.9
        assert result["shortcuts"][result["best_shortcut"]]["p_value"] < 0.01


def test_a_model_must_be_better_than_every_shortcut():
    """A shortcut that is right on other pairs is harder to beat than one that is right on the same pairs."""
    rows, right = planted_rows(200, 0.5), np.arange(200) < 120
    outputs = np.stack([right, ~right], axis=1)[..., None].astype(np.float32)  # right on the first 120
    nested, other = np.arange(200) < 112, np.arange(200) >= 95
    few = np.where(np.arange(200) < 9, 1.0, np.nan)
    rivals = {"longer": nested, "surface": other & (np.arange(200) % 21 > 0), "untrained_head": few}
    result = report_with(rows, outputs, rivals)
    shortcuts = result["shortcuts"]
    assert result["best_shortcut"] == "longer" and shortcuts["longer"]["p_value"] < 0.05
    assert shortcuts["surface"]["difference"] > 0.08
    assert result["verdict"].startswith(f"not shown to be better than {SHORTCUT_NAMES['surface']}")
    untrained = shortcuts["untrained_head"]
    assert (untrained["pairs"], untrained["accuracy"]) == (9, 1.0), "measured on too few pairs to compete"


def test_p_values_are_corrected_for_the_number_of_shortcuts():
    """A model is worse than the best of three shortcuts only if p holds after correction for three tests."""
    rows, right = planted_rows(200, 0.5), np.arange(200) % 2 < 1
    outputs = np.stack([right, ~right], axis=1)[..., None].astype(np.float32)
    better = right | (np.arange(200) % 40 == 1)  # right where the model is, and on 5 pairs more: p = 0.06
    more = right | (np.arange(200) % 20 == 1)  # on 10 more: p = 0.002
    for ahead, verdict in ((better, "not shown to be better than 'longer wins'"), (more, "worse than 'longer wins'")):
        rivals = {"longer": ahead, "surface": right, "more_list_items": ~right}
        result = report_with(rows, outputs, rivals)
        assert result["verdict"].startswith(verdict) and result["verdict"].endswith("corrected for 3 shortcuts")
        p = result["shortcuts"]["longer"]["p_value"]
        assert f"p = {min(1, 3 * p):.2g}" in result["verdict"]


def test_the_report_needs_only_the_lines_of_the_predictions(tmp_path):
    rows = planted_rows(60, 0.5)
    result, lines = report_of(rows, outputs_for(rows, 1.0, 0.0))
    again = report([json.loads(json.dumps(line)) for line in lines])
    assert again == result
    right = [1.0 if line["chosen"] > line["rejected"] else 0.0 for line in lines]
    assert result["accuracy"] == pytest.approx(np.mean(right)) and result["pairs"] == 60
    gaps = {name: part["pairs"] for name, part in result["by_gap"].items()}
    assert gaps == {"0.5-1.0": 40, ">=1.0": 20}
    sizes = [(line["chosen_characters"], line["rejected_characters"]) for line in lines]
    bands = length_bands(np.array([(one - other) / max(one, other) for one, other in sizes]))
    counts = {name: int(mask.sum()) for name, mask in bands.items() if mask.any()}
    assert {name: part["pairs"] for name, part in result["by_length_difference"].items()} == counts and len(counts) > 2
    matched = np.array(right)[bands["equal within 10 %"]]
    assert result["length_matched_accuracy"] == pytest.approx(matched.mean()) and len(matched) > 1
    rewards = [line[side] for line in lines for side in ("chosen", "rejected")]
    assert result["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert result["reward_std"] == pytest.approx(np.std(rewards))
    margins = [line["chosen"] - line["rejected"] for line in result["worst_mistakes"]]
    assert margins == sorted(margins) and all(margin < 0 for margin in margins)
    assert format_summary(result).splitlines()[-1] == result["verdict"]
    assert set(result["shortcuts"]) == {"longer", "longer_in_window", "more_list_items", "surface"}


def test_equal_rewards_and_missing_ratings_can_be_reported():
    rows = planted_rows(6, 0.5).remove_columns(["chosen_rating", "rejected_rating"])
    rows = rows.add_column("chosen_rating", [None] * 6).add_column("rejected_rating", [None] * 6)
    result, _ = report_of(rows, np.zeros((6, 2, 1), np.float32))
    assert result["accuracy"] == 0.5 and result["ties"] == 6 and result["by_gap"] == {}
    assert result["length_correlation"] is None and result["brier"] == 0.25 and result["worst_mistakes"] == []
    json.dumps(result, allow_nan=False)


def test_pairs_that_share_a_prompt_count_as_one_draw():
    """Sixty pairs of ten prompts are fewer draws than sixty prompts."""
    rows = planted_rows(60, 0.5)
    chosen = [[{"role": "user", "content": str(i % 10)}, messages[-1]] for i, messages in enumerate(rows["chosen"])]
    shared = rows.remove_columns("chosen").add_column("chosen", chosen)
    apart, together = (report_of(data, outputs_for(data, 0.3, 0.0))[0] for data in (rows, shared))
    assert apart["accuracy"] == together["accuracy"] and (apart["prompts"], together["prompts"]) == (60, 10)
    assert together["ece_of_chance"] > apart["ece_of_chance"]


def test_the_scale_of_attributes_is_fitted_to_pairs():
    rows = planted_rows(300, longer_wins=0.5)
    outputs, head = outputs_for(rows, content=0.5, length=0.0), RewardHead("attributes")
    fit_win_scale(head, rows, lambda pairs: outputs[: len(pairs)])
    difference = outputs[:, 0, 0] - outputs[:, 1, 0]
    assert head.win_scale == pytest.approx(fit_logistic(difference[:, None])[0], rel=1e-5) and head.win_scale > 0
    backwards = RewardHead("attributes")
    fit_win_scale(backwards, rows, lambda pairs: -outputs[: len(pairs)])
    assert backwards.win_scale == 1.0, "a reward that prefers the rejected answers has no scale"
