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


def share_right(right: np.ndarray) -> dict[str, float]:
    """pairs, accuracy and its interval (low, high) of right [pairs]: 1, at a tie 0.5, else 0."""
    low, high = interval(right)
    return {"pairs": len(right), "accuracy": float(right.mean()), "low": low, "high": high}


def verdict(against: dict[str, float], name: str) -> str:
    """One sentence: better than the baseline, worse, or not shown to be either."""
    if against["p_value"] < 1 - LEVEL and against["difference"]:
        word, size = ("better" if against["difference"] > 0 else "worse"), abs(against["difference"])
        return f"{word} than {name} by {size:.3f}, p = {against['p_value']:.2g}"
    return f"not shown to be better than {name} (difference {against['difference']:+.3f}, p = {against['p_value']:.2g})"


def calibration(win: np.ndarray, bins: int = 10) -> dict[str, object]:
    """How far to trust P(chosen wins) [pairs]: ece, brier, and the reliability curve.

    The winner that the model names is right with probability max(win, 1 - win), if it knows itself. The curve has one
    entry a bin of that confidence, equally wide from 0.5 to 1, with pairs in it: confidence (its mean), accuracy (of
    those pairs; a tie of 0.5 is half right) and pairs. ece: their mean distance, weighted by pairs. brier: mean of
    (1 - win)^2; 0.25 for a coin.
    """
    confidence, right = np.maximum(win, 1 - win), wins(win, 1 - win)
    place = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)
    curve = [
        {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean()), "pairs": int(here.sum())}
        for here in (place == i for i in range(bins))
        if here.any()
    ]
    ece = sum(entry["pairs"] * abs(entry["confidence"] - entry["accuracy"]) for entry in curve) / len(win)
    return {"ece": ece, "brier": float(((1 - win) ** 2).mean()), "reliability": curve}


def coverage(right: np.ndarray, sure: np.ndarray) -> list[dict[str, float]]:
    """Accuracy on the surest 10 %, 20 %, ... 100 % of the pairs: what abstaining on the others would bring.

    right [pairs] as in share_right; sure [pairs], larger is surer, such as the margin or minus the spread.
    """
    ordered = right[np.argsort(-sure, kind="stable")]
    counts = {share: max(1, round(share * len(right) / 100)) for share in range(10, 101, 10)}
    return [{"coverage": share / 100, "accuracy": float(ordered[:n].mean())} for share, n in counts.items()]


def comparison(before: np.ndarray, after: np.ndarray, kl: np.ndarray | None) -> dict[str, object]:
    """Did the reward grow? Two policies on the same prompts.

    before, after [prompts]: rewards of their answers. kl [prompts]: log pi(answer) - log ref(answer) of the answers
    after, whose mean is the KL to the policy before in nats an answer; None for greedy answers. verdict is grew, fell
    or not shown.
    """
    against, won = paired_difference(after, before), wins(after, before)
    low, high = interval(won)
    shown = against["p_value"] < 1 - LEVEL and against["difference"] != 0
    return {
        "prompts": len(before),
        "mean_reward_before": float(before.mean()),
        "mean_reward_after": float(after.mean()),
        "difference": against["difference"],
        "difference_low": against["low"],
        "difference_high": against["high"],
        "p_value": against["p_value"],
        "win_rate": float(won.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        **mean_kl(kl),
        "verdict": ("grew" if against["difference"] > 0 else "fell") if shown else "not shown",
    }


def at_equal_length(differences: np.ndarray, longer: np.ndarray, seed: int = 0) -> dict[str, float] | None:
    """The part of paired differences [n] that length does not explain, with its 95 % interval (low, high).

    longer [n]: log length after minus before. It is the intercept of a least-squares line of differences over longer,
    that is the difference where both are equally long; None where all pairs differ in length alike.
    """
    from scipy.stats import bootstrap

    if len(differences) < 3 or np.ptp(longer) < 1e-9:
        return None

    def intercept(differences: np.ndarray, longer: np.ndarray) -> float:
        centred = longer - longer.mean()
        slope = centred @ differences / max(centred @ centred, 1e-12)
        return float(differences.mean() - slope * longer.mean())

    found = bootstrap(
        (differences, longer), intercept, paired=True, vectorized=False, n_resamples=RESAMPLES,
        confidence_level=LEVEL, method="percentile", rng=seed,
    ).confidence_interval  # fmt: skip
    return {"difference": intercept(differences, longer), "low": float(found.low), "high": float(found.high)}


def mean_kl(kl: np.ndarray | None) -> dict[str, float | None]:
    """kl, its mean [nats an answer], and kl_error, the standard error of it; None for answers that are no samples."""
    if kl is None:
        return {"kl": None, "kl_error": None}
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else 0.0
    return {"kl": float(kl.mean()), "kl_error": error}
