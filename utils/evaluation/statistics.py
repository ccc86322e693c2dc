"""Exact metrics with 95 % intervals and tests: each pair counts once, a tie counts half."""

from typing import Any

import numpy as np

RESAMPLES = 2000  # of the bootstrap and of the permutation test
LEVEL = 0.95
BOOTSTRAP: dict[str, Any] = {  # options of scipy.stats.bootstrap
    **{"paired": True, "n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "rng": 0}
}
BINS = 10  # of a reliability curve
DRAWS = 400  # simulated sets of labels, for the calibration error of a perfect model
GAP_BANDS = {  # name: from, up to (not included), in hundredths of a rating point
    "<0.5": (0, 50),
    "0.5-1.0": (50, 100),
    ">=1.0": (100, float("inf")),
}


def wins(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Return 1 where better > worse, 0.5 at a tie, else 0 [pairs]."""
    return np.where(better > worse, 1.0, np.where(better == worse, 0.5, 0.0))


def bands_of(gaps: np.ndarray) -> dict[str, np.ndarray]:
    """Return a mask [pairs] for each of GAP_BANDS.

    gaps [pairs]: rating differences in whole hundredths; NaN falls into no band.
    """
    return {name: (low <= gaps) & (gaps < high) for name, (low, high) in GAP_BANDS.items()}


def percent(share: float, digits: int = 0) -> str:
    """Return a share from 0 to 1 as text, such as "12 %"."""
    return f"{share:.{digits}%}".replace("%", " %")


def grouped(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return (sums, counts) of values [n] in each group; without groups each value is its own group.

    Pairs that share a prompt are not independent, so intervals and tests resample prompts with all their pairs.
    """
    if groups is None:
        return values.astype(float), np.ones(len(values))
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def interval(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of values [n], resampled by group [n]."""
    from scipy.stats import bootstrap

    sums, counts = grouped(values, groups)
    if len(sums) < 2:
        return float(values.mean()), float(values.mean())

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    low, high = bootstrap((sums, counts), mean, batch=200, **BOOTSTRAP).confidence_interval
    return float(low), float(high)


def share_right(right: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Return pairs, accuracy and its interval (low, high). right [pairs]: 1, 0.5 at a tie, or 0."""
    low, high = interval(right, groups)
    return {"pairs": len(right), "accuracy": float(right.mean()), "low": low, "high": high}


def paired_difference(one: np.ndarray, other: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """Return the difference of the means of paired values [n], its 95 % interval (low, high), and p_value.

    The p-value is two-sided, from a permutation test that flips the sign of each difference, or of all differences of
    a group [n] together.
    """
    from scipy.stats import permutation_test

    differences = one - other
    low, high = interval(differences, groups)
    sums, _ = grouped(differences, groups)
    p_value = 1.0
    if len(sums) > 1 and np.any(sums):
        p_value = permutation_test(
            (sums,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0, batch=200
        ).pvalue
    return {"difference": float(differences.mean()), "low": low, "high": high, "p_value": float(p_value)}


def verdict(result: dict[str, float], baseline: str) -> str:
    """Return one phrase: better than the baseline, worse, or not shown to be better. result: of paired_difference."""
    difference, p = result["difference"], f"p = {result['p_value']:.2g}"
    if result["p_value"] < 1 - LEVEL and difference:
        return f"{'better' if difference > 0 else 'worse'} than {baseline} by {abs(difference):.3f}, {p}"
    return f"not shown to be better than {baseline} (difference {difference:+.3f}, {p})"


# how sure a reward model is


def calibration(win: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Return ece, ece_of_chance, brier and the reliability curve of P(chosen wins) [pairs].

    The confidence in the preferred answer is max(win, 1 - win); a calibrated model is right with that probability.
    The curve has an entry for each of BINS equal bins of confidence from 0.5 to 1 that has pairs: mean confidence,
    accuracy (a win of 0.5 is half right) and pairs.
    ece: mean distance between confidence and accuracy over the bins, weighted by pairs.
    brier: mean of (1 - win)^2; 0.25 for a coin.
    ece_of_chance: the 95 % quantile of the ece of a perfectly calibrated model with these confidences, which is not
    small for a hundred pairs. The pairs of a group [pairs] share their random number.
    """
    confidence, right = np.maximum(win, 1 - win), wins(win, 1 - win)
    curve = reliability(confidence, right)
    index = np.arange(len(win)) if groups is None else np.unique(groups, return_inverse=True)[1]
    draws = np.random.default_rng(0).random((DRAWS, len(win)))[:, index] < confidence
    return {
        "ece": calibration_error(curve, len(win)),
        "ece_of_chance": float(
            np.quantile([calibration_error(reliability(confidence, draw), len(win)) for draw in draws], LEVEL)
        ),
        "brier": float(((1 - win) ** 2).mean()),
        "reliability": curve,
    }


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Return the reliability curve of `calibration` for a confidence and an outcome of each pair [pairs]."""
    index = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    masks = [index == i for i in range(BINS)]
    return [
        {"confidence": float(confidence[mask].mean()), "accuracy": float(right[mask].mean()), "pairs": int(mask.sum())}
        for mask in masks
        if mask.any()
    ]


def calibration_error(curve: list[dict[str, Any]], pairs: int) -> float:
    """Return the mean distance between confidence and accuracy, weighted by pairs."""
    return sum(entry["pairs"] * abs(entry["confidence"] - entry["accuracy"]) for entry in curve) / pairs


def coverage(right: np.ndarray, sure: np.ndarray) -> list[dict[str, float]]:
    """Return the accuracy on the surest 10 %, 20 %, ... 100 % of the pairs, as if the model abstained on the others.

    right [pairs]: as in share_right. sure [pairs]: larger is surer, such as the margin or minus the spread.
    """
    ordered = right[np.argsort(-sure, kind="stable")]
    counts = {share: max(1, round(share * len(right) / 100)) for share in range(10, 101, 10)}
    return [{"coverage": share / 100, "accuracy": float(ordered[:n].mean())} for share, n in counts.items()]


# a policy before and after


def comparison(before: np.ndarray, after: np.ndarray, kl: np.ndarray | None) -> dict[str, Any]:
    """Return the comparison of two policies by the rewards of their answers to the same prompts [prompts].

    kl [prompts]: log pi(answer) - log ref(answer) of the answers after; None for greedy answers.
    """
    win = wins(after, before)
    low, high = interval(win)
    return {
        "prompts": len(before),
        "mean_reward_before": float(before.mean()),
        "mean_reward_after": float(after.mean()),
        **change(before, after),
        "win_rate": float(win.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        **mean_kl(kl),
    }


def change(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return difference (after - before), its interval, p_value, and the verdict: grew, fell or not shown."""
    result = paired_difference(after, before)
    shown = result["p_value"] < 1 - LEVEL and result["difference"] != 0
    return {
        "difference": result["difference"],
        "difference_low": result["low"],
        "difference_high": result["high"],
        "p_value": result["p_value"],
        "verdict": ("grew" if result["difference"] > 0 else "fell") if shown else "not shown",
    }


def at_equal_length(differences: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
    """Return the difference that length does not explain, with its 95 % interval (low, high).

    differences [n]: after minus before. longer [n]: log length after minus before. The difference is the intercept of
    a least-squares line of differences over longer: the value for two answers of equal length. None if `longer` does
    not vary.
    """
    from scipy.stats import bootstrap

    if len(differences) < 3 or np.ptp(longer) < 1e-9:
        return None

    def intercept(differences: np.ndarray, longer: np.ndarray) -> float:
        centred = longer - longer.mean()
        slope = centred @ differences / max(centred @ centred, 1e-12)
        return float(differences.mean() - slope * longer.mean())

    low, high = bootstrap((differences, longer), intercept, vectorized=False, **BOOTSTRAP).confidence_interval
    return {"difference": intercept(differences, longer), "low": float(low), "high": float(high)}


def mean_kl(kl: np.ndarray | None) -> dict[str, float | None]:
    """Return kl, the mean [nats per answer], and kl_error, its standard error (None for one answer).

    Both are None for answers that were not sampled.
    """
    if kl is None:
        return {"kl": None, "kl_error": None}
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None
    return {"kl": float(kl.mean()), "kl_error": error}
