"""Accuracies, intervals, p-values and calibration agree with known cases and with scikit-learn."""

import numpy as np
import pytest

from utils.evaluation.statistics import (
    at_equal_length,
    calibration,
    comparison,
    coverage,
    interval,
    paired_difference,
    share_right,
    verdict,
    wins,
)


def test_a_tie_counts_half_and_the_interval_covers_the_binomial_one():
    assert wins(np.array([2.0, 1.0, 1.0]), np.array([1.0, 1.0, 2.0])).tolist() == [1.0, 0.5, 0.0]
    assert share_right(wins(np.zeros(10), np.zeros(10)))["accuracy"] == 0.5
    values = np.array([1.0] * 62 + [0.0] * 38)
    low, high = interval(values)
    assert low == pytest.approx(0.62 - 1.96 * np.sqrt(0.62 * 0.38 / 100), abs=0.015)
    assert high == pytest.approx(0.62 + 1.96 * np.sqrt(0.62 * 0.38 / 100), abs=0.015)
    assert interval(np.array([1.0])) == (1.0, 1.0) and interval(np.ones(5)) == (1.0, 1.0)


def test_pairs_of_one_prompt_count_as_one_draw():
    """With each prompt repeated four times, interval and p-value are those of the prompts."""
    random = np.random.default_rng(1)
    right = (random.random(40) < 0.62).astype(float)
    repeated, groups = np.repeat(right, 4), np.repeat(np.arange(40), 4)
    assert interval(repeated, groups) == pytest.approx(interval(right))
    narrow = interval(repeated)
    assert narrow[1] - narrow[0] < 0.6 * (interval(right)[1] - interval(right)[0])
    once, four = paired_difference(right, 1 - right), paired_difference(repeated, 1 - repeated, groups)
    assert four == pytest.approx(once) and paired_difference(repeated, 1 - repeated)["p_value"] < once["p_value"]
    unequal = share_right(np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 8]))
    assert unequal["accuracy"] == 0.75 and unequal["pairs"] == 4 and (unequal["low"], unequal["high"]) == (0.0, 1.0)


def test_the_verdict_needs_a_small_p_value():
    true = {"difference": 0.04, "p_value": 0.01}
    assert verdict(true, "'longer wins'") == "better than 'longer wins' by 0.040, p = 0.01"
    assert verdict(true | {"difference": -0.04}, "x") == "worse than x by 0.040, p = 0.01"
    assert verdict(true | {"p_value": 0.2}, "x").startswith("not shown to be better than x (difference +0.040")


def test_calibration_equals_scikit_learn():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    random = np.random.default_rng(0)
    sure = random.uniform(0.5, 1.0, size=500)
    win = np.where(random.random(500) < sure**2, sure, 1 - sure)  # overconfident
    result = calibration(win)
    assert result["brier"] == pytest.approx(brier_score_loss(np.ones(500), win, pos_label=1))
    confidence, right = np.maximum(win, 1 - win), win > 0.5
    accuracies, confidences = calibration_curve(right, 2 * confidence - 1, n_bins=10)
    assert [e["accuracy"] for e in result["reliability"]] == pytest.approx(accuracies)
    assert [2 * e["confidence"] - 1 for e in result["reliability"]] == pytest.approx(confidences)
    counts = np.histogram(confidence, bins=10, range=(0.5, 1.0))[0]
    expected = (counts * np.abs(accuracies - (confidences + 1) / 2)).sum() / 500
    assert result["ece"] == pytest.approx(expected) and result["ece"] > 0.05


def test_the_calibration_error_of_chance_covers_a_calibrated_model():
    random = np.random.default_rng(0)

    def of(pairs):
        win = 1 / (1 + np.exp(-random.normal(0, 0.8, size=pairs)))
        win = np.where(random.random(pairs) < win, win, 1 - win)  # P(chosen wins) of a calibrated model
        return calibration(win)

    result = [of(60) for _ in range(40)]
    assert 0.8 < np.mean([one["ece"] <= one["ece_of_chance"] for one in result]) <= 1.0
    assert result[0]["ece_of_chance"] > 0.12 and of(2000)["ece_of_chance"] < 0.05
    sure = calibration(np.full(500, 0.99) * (np.arange(500) % 2))
    assert sure["ece"] > 0.4 and sure["ece_of_chance"] < 0.05, "confident, and wrong half of the time"
    coin = calibration(np.full(10, 0.5))
    assert coin["ece"] == 0.0 and coin["brier"] == 0.25
    assert coin["reliability"] == [{"confidence": 0.5, "accuracy": 0.5, "pairs": 10}]


def test_coverage_keeps_the_most_confident_pairs():
    right, sure = np.array([1.0, 0.0] * 10), np.array([2.0, 1.0] * 10)
    curve = coverage(right, sure)
    assert [entry["coverage"] for entry in curve] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert curve[4]["accuracy"] == 1.0 and curve[9]["accuracy"] == 0.5
    assert coverage(np.array([1.0]), np.array([0.0]))[0]["accuracy"] == 1.0


def test_equal_policies_do_not_differ_and_a_better_one_is_found():
    random = np.random.default_rng(0)
    before = random.normal(size=60)
    same = comparison(before, before.copy(), np.zeros(60))
    assert same["verdict"] == "not shown" and same["win_rate"] == 0.5 and same["p_value"] == 1.0
    assert same["difference"] == 0.0 and same["kl"] == 0.0
    kl = random.normal(3.0, 1.0, size=60)
    better = comparison(before, before + 0.5 + 0.3 * random.normal(size=60), kl)
    assert better["mean_reward_before"] == pytest.approx(before.mean())
    assert better["mean_reward_after"] - better["mean_reward_before"] == pytest.approx(better["difference"])
    assert better["verdict"] == "grew" and better["difference_low"] > 0 and better["win_rate_low"] > 0.5
    assert better["kl"] == pytest.approx(kl.mean()) and better["kl_error"] == pytest.approx(kl.std(ddof=1) / 60**0.5)
    assert comparison(before, before - 0.5, kl)["verdict"] == "fell"
    assert comparison(before[:1], before[:1], kl[:1])["kl_error"] is None, "one answer has no spread"


def test_the_gain_at_equal_length_is_the_intercept():
    random = np.random.default_rng(0)
    longer = random.normal(0.4, 0.3, size=200)
    bought = at_equal_length(0.5 * longer + 0.05 * random.normal(size=200), longer)
    assert bought["low"] < 0 < bought["high"] and abs(bought["difference"]) < 0.02, "all of it is length"
    real = at_equal_length(0.3 + 0.5 * longer + 0.05 * random.normal(size=200), longer)
    assert real["difference"] == pytest.approx(0.3, abs=0.03) and real["low"] > 0.2
    assert at_equal_length(random.normal(size=9), np.zeros(9)) is None
