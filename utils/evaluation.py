"""Exact metrics with intervals: each pair counts once, a tie counts half, and chance is excluded by tests."""

import numpy as np

RESAMPLES = 2000  # of the bootstrap and of the permutation test
LEVEL = 0.95


def wins(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 where better > worse, 0.5 at a tie, else 0 [pairs]."""
    return np.where(better > worse, 1.0, np.where(better == worse, 0.5, 0.0))


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values [n] (scipy.stats.bootstrap)."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=seed, batch=200
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_difference(one: np.ndarray, other: np.ndarray, seed: int = 0) -> dict[str, float]:
    """difference of the means of paired values [n], its 95 % interval (low, high), and p_value.

    p is two-sided, from a permutation test that flips the sign of each difference (scipy.stats.permutation_test).
    """
    from scipy.stats import permutation_test

    differences = one - other
    low, high = interval(differences, seed)
    p_value = 1.0
    if len(differences) > 1 and np.any(differences):
        p_value = permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=seed, batch=200
        ).pvalue
    return {"difference": float(differences.mean()), "low": low, "high": high, "p_value": float(p_value)}


def pair_report(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> dict[str, object]:
    """The figures of eval.json for rewards [pairs] of chosen and rejected answers.

    lengths [pairs, 2]: characters of both whole answers, before any window; "the longer one wins" is the baseline
    that a reward model must beat to have learned more than length.
    """
    right, longer = wins(chosen, rejected), wins(lengths[:, 0], lengths[:, 1])
    low, high = interval(right)
    against = paired_difference(right, longer)
    return {
        "pairs": len(right),
        "ties": int((chosen == rejected).sum()),
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline": float(longer.mean()),
        "against_length": against,
        "verdict": verdict(against, "'longer wins'"),
    }


def verdict(against: dict[str, float], name: str) -> str:
    """One sentence: better than the baseline, worse, or not shown to be either."""
    if against["p_value"] < 1 - LEVEL and against["difference"]:
        word, size = ("better" if against["difference"] > 0 else "worse"), abs(against["difference"])
        return f"{word} than {name} by {size:.3f}, p = {against['p_value']:.2g}"
    return f"not shown to be better than {name} (difference {against['difference']:+.3f}, p = {against['p_value']:.2g})"
