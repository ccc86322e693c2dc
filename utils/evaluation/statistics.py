"""Exact metrics with intervals and tests: each pair counts once, a tie counts half."""

import numpy as np

RESAMPLES = 2000  # of the bootstrap and of the permutation test
LEVEL = 0.95
BINS = 10  # of a reliability curve
DRAWS = 400  # of labels that a calibrated model would meet


def wins(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 where better > worse, 0.5 at a tie, else 0 [pairs]."""
    return np.where(better > worse, 1.0, np.where(better == worse, 0.5, 0.0))


def grouped(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of values [n] in each group; without groups each value is one of its own.

    Pairs that share a prompt are not independent: chance draws prompts, with all of their pairs.
    """
    if groups is None:
        return values.astype(float), np.ones(len(values))
    _, place = np.unique(groups, return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place).astype(float)


def interval(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values [n] over their groups [n] (scipy.stats.bootstrap)."""
    from scipy.stats import bootstrap

    sums, counts = grouped(values, groups)
    if len(sums) < 2:
        return float(values.mean()), float(values.mean())

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    found = bootstrap(
        (sums, counts), mean, paired=True, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0,
        batch=200,
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def paired_difference(one: np.ndarray, other: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """difference of the means of paired values [n], its 95 % interval (low, high), and p_value.

    p is two-sided, from a permutation test that flips the sign of each difference, or of all those of a group [n]
    together (scipy.stats.permutation_test).
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


def share_right(right: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """pairs, accuracy and its interval (low, high) of right [pairs]: 1, at a tie 0.5, else 0."""
    low, high = interval(right, groups)
    return {"pairs": len(right), "accuracy": float(right.mean()), "low": low, "high": high}


def verdict(against: dict[str, float], name: str) -> str:
    """One sentence: better than the baseline, worse, or not shown to be either."""
    if against["p_value"] < 1 - LEVEL and against["difference"]:
        word, size = ("better" if against["difference"] > 0 else "worse"), abs(against["difference"])
        return f"{word} than {name} by {size:.3f}, p = {against['p_value']:.2g}"
    return f"not shown to be better than {name} (difference {against['difference']:+.3f}, p = {against['p_value']:.2g})"


def calibration(win: np.ndarray, groups: np.ndarray | None = None) -> dict[str, object]:
    """How far to trust P(chosen wins) [pairs]: ece, ece_of_chance, brier, and the reliability curve.

    The winner that the model names is right with probability max(win, 1 - win), if it knows itself. The curve has one
    entry a bin of that confidence, BINS equally wide from 0.5 to 1, with pairs in it: confidence (its mean), accuracy
    (of those pairs; a tie of 0.5 is half right) and pairs. ece: their mean distance, weighted by pairs. brier: mean of
    (1 - win)^2; 0.25 for a coin. ece_of_chance: what 95 % of the draws stay below if the model knew itself exactly,
    which on a hundred pairs is no small number; pairs of a group [pairs] have the same luck.
    """
    confidence, right = np.maximum(win, 1 - win), wins(win, 1 - win)
    curve = reliability(confidence, right)
    place = np.arange(len(win)) if groups is None else np.unique(groups, return_inverse=True)[1]
    drawn = np.random.default_rng(0).random((DRAWS, len(win)))[:, place] < confidence
    by_chance = [calibration_error(reliability(confidence, draw), len(win)) for draw in drawn]
    return {
        "ece": calibration_error(curve, len(win)),
        "ece_of_chance": float(np.quantile(by_chance, LEVEL)),
        "brier": float(((1 - win) ** 2).mean()),
        "reliability": curve,
    }


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """The curve of `calibration`, from the confidence in each pair and whether it was right [pairs]."""
    place = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    return [
        {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean()), "pairs": int(here.sum())}
        for here in (place == i for i in range(BINS))
        if here.any()
    ]


def calibration_error(curve: list[dict[str, float]], pairs: int) -> float:
    """Mean distance of confidence and accuracy, weighted by pairs."""
    return sum(entry["pairs"] * abs(entry["confidence"] - entry["accuracy"]) for entry in curve) / pairs


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
    won = wins(after, before)
    low, high = interval(won)
    return {
        "prompts": len(before),
        "mean_reward_before": float(before.mean()),
        "mean_reward_after": float(after.mean()),
        **change(before, after),
        "win_rate": float(won.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        **mean_kl(kl),
    }


def change(before: np.ndarray, after: np.ndarray) -> dict[str, object]:
    """difference of the means after - before [n], difference_low, difference_high, p_value, and the verdict."""
    against = paired_difference(after, before)
    shown = against["p_value"] < 1 - LEVEL and against["difference"] != 0
    return {
        "difference": against["difference"],
        "difference_low": against["low"],
        "difference_high": against["high"],
        "p_value": against["p_value"],
        "verdict": ("grew" if against["difference"] > 0 else "fell") if shown else "not shown",
    }


def at_equal_length(differences: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
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
        confidence_level=LEVEL, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    return {"difference": intercept(differences, longer), "low": float(found.low), "high": float(found.high)}


def mean_kl(kl: np.ndarray | None) -> dict[str, float | None]:
    """kl, its mean [nats an answer], and kl_error, the standard error of it (None of one answer).

    Both are None for answers that are no samples.
    """
    if kl is None:
        return {"kl": None, "kl_error": None}
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None
    return {"kl": float(kl.mean()), "kl_error": error}
