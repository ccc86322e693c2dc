"""Exact pair accuracy: ties count half, intervals and p-values agree with known cases."""

import numpy as np
import pytest

from utils.evaluation import interval, pair_report, paired_difference, wins


def test_a_tie_is_half_a_win():
    assert wins(np.array([2.0, 1.0, 1.0]), np.array([1.0, 1.0, 2.0])).tolist() == [1.0, 0.5, 0.0]
    report = pair_report(np.zeros(10), np.zeros(10), np.ones((10, 2)))
    assert report["accuracy"] == 0.5 and report["ties"] == 10 and report["length_baseline"] == 0.5


def test_interval_covers_the_binomial_one():
    values = np.array([1.0] * 62 + [0.0] * 38)
    low, high = interval(values)
    assert low == pytest.approx(0.62 - 1.96 * np.sqrt(0.62 * 0.38 / 100), abs=0.015)
    assert high == pytest.approx(0.62 + 1.96 * np.sqrt(0.62 * 0.38 / 100), abs=0.015)
    assert interval(np.array([1.0])) == (1.0, 1.0) and interval(np.ones(5)) == (1.0, 1.0)


def test_a_reward_of_length_is_not_shown_to_be_better_than_length():
    lengths = np.random.default_rng(0).integers(10, 2000, size=(200, 2)).astype(float)
    report = pair_report(lengths[:, 0], lengths[:, 1], lengths)
    assert report["accuracy"] == report["length_baseline"] and "not shown" in report["verdict"]
    assert report["against_length"]["p_value"] == 1.0


def test_a_true_signal_is_found_and_a_worse_one_named():
    random = np.random.default_rng(0)
    lengths = random.integers(10, 2000, size=(200, 2)).astype(float)
    good = np.where(random.random(200) < 0.85, 1.0, -1.0)
    report = pair_report(good, np.zeros(200), lengths)
    assert report["verdict"].startswith("better than 'longer wins' by") and report["against_length"]["p_value"] < 0.01
    assert report["accuracy_low"] < report["accuracy"] < report["accuracy_high"]
    assert pair_report(-good, np.zeros(200), lengths)["verdict"].startswith("worse than")


def test_p_value_of_a_fair_coin_is_not_small():
    random = np.random.default_rng(3)
    one, other = random.random(100), random.random(100)
    found = paired_difference(one, other)
    assert found["low"] < found["difference"] < found["high"] and 0.05 < found["p_value"] <= 1
