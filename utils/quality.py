"""Is a reward model any good? The report, computed from the lines of predictions.jsonl alone."""

import numpy as np

from utils.data.preferences import hundredths
from utils.evaluation import calibration, coverage, interval, paired_difference, share_right, verdict, wins
from utils.shortcuts import bands_of

MATCHED = 0.1  # below this difference, as a share of the longer answer, two answers are of equal length
MUCH = 0.5  # from this difference on, one answer is much longer
WORST = 10  # mistakes in eval.json
NAMES = {  # key in eval.json: its name on plots and pages
    "longer": "'longer wins'",
    "longer_in_window": "'longer inside the window wins'",
    "more_list_items": "'more list items win'",
    "surface": "nine surface measures",
    "untrained_head": "an untrained head",
    "without_prompt": "itself without the prompts",
    "shuffled_prompt": "itself with the prompts of other pairs",
}
ITSELF = ("without_prompt", "shuffled_prompt")  # show whether the model reads the prompt; they are no rivals


def report(lines: list[dict]) -> dict[str, object]:
    """Return the content of eval.json, computed from the lines of predictions.jsonl alone."""
    both = {name: pair_of(lines, name) for name in ("", "_characters", "_tokens", "_rating")}
    right, prompts = wins(*both[""].T), prompts_of(lines)
    accuracy = share_right(right, prompts)
    found = {
        "pairs": accuracy["pairs"],
        "prompts": len(set(prompts.tolist())),
        "ties": int((right == 0.5).sum()),
        "accuracy": accuracy["accuracy"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "length_baseline": float(wins(*both["_characters"].T).mean()),
    }
    shortcuts = against_shortcuts(lines, right, prompts)
    best, said = held_against(shortcuts, len(lines))
    found |= {"verdict": said, "best_shortcut": best, "shortcuts": shortcuts}
    if "without_prompt" in shortcuts:
        found["prompt_verdict"] = verdict(shortcuts["without_prompt"], NAMES["without_prompt"])
    gaps = np.vectorize(hundredths)(both["_rating"]) if not np.isnan(both["_rating"]).any() else None
    margin = both[""][:, 0] - both[""][:, 1]
    found |= by_length(right, both, prompts)
    found |= {
        "by_gap": shares(right, bands_of(gaps[:, 0] - gaps[:, 1]), prompts) if gaps is not None else {},
        **calibration(np.array([line["win"] for line in lines]), prompts),
        "coverage_by_margin": coverage(right, np.abs(margin)),
        "margin": float(margin.mean()),
        "reward_mean": float(both[""].mean()),
        "reward_std": float(both[""].std()),
    }
    if "chosen_spread" in lines[0]:
        found["coverage_by_spread"] = coverage(right, -pair_of(lines, "_spread").sum(axis=1))
    subsets = {line["subset"] for line in lines} - {""}
    of = np.array([line["subset"] for line in lines])
    found["by_subset"] = shares(right, {name: of == name for name in sorted(subsets)}, prompts)
    found["worst_mistakes"] = [lines[i] for i in np.argsort(margin)[:WORST] if margin[i] < 0]
    return found


def by_length(right: np.ndarray, both: dict[str, np.ndarray], prompts: np.ndarray) -> dict[str, object]:
    """Return how accuracy and reward depend on length.

    right [pairs]; both: rewards (""), _characters and _tokens [pairs, 2] each; prompts: see `prompts_of`.
    """
    size = both["_characters"]
    bands = length_bands((size[:, 0] - size[:, 1]) / np.maximum(size.max(axis=1), 1))
    matched = bands["equal within 10 %"]
    return {
        "by_length_difference": shares(right, bands, prompts),
        "length_matched_accuracy": float(right[matched].mean()) if matched.any() else None,
        "length_matched_interval": interval(right[matched], prompts[matched]) if matched.any() else None,
        "length_matched_pairs": int(matched.sum()),
        "length_correlation": correlation(both[""], np.log(np.maximum(size, 1))),
        "length_correlation_in_window": correlation(both[""], np.log(np.maximum(both["_tokens"], 1))),
    }


def held_against(shortcuts: dict[str, dict], pairs: int) -> tuple[str, str]:
    """Return (the most accurate shortcut, the verdict), from the shortcuts that were measured on all pairs.

    If the model is more accurate than every shortcut, the verdict quotes the largest p-value: it holds for all of them,
    so it needs no correction. Otherwise the verdict compares the model with the best shortcut, which chance has helped
    to be the best, and multiplies p by the number of shortcuts (Bonferroni).
    """
    found = {name: entry for name, entry in shortcuts.items() if name not in ITSELF and entry["pairs"] == pairs}
    best = max(found, key=lambda name: found[name]["accuracy"])
    if found[best]["difference"] > 0:
        hardest = max(found, key=lambda name: found[name]["p_value"])
        return best, verdict(found[hardest], NAMES[hardest])
    corrected = found[best] | {"p_value": min(1.0, found[best]["p_value"] * len(found))}
    return best, f"{verdict(corrected, NAMES[best])}, corrected for {len(found)} shortcuts"


def length_bands(difference: np.ndarray) -> dict[str, np.ndarray]:
    """Return {band: mask [pairs]} for (chosen - rejected) / longer length in characters [pairs]."""
    size = np.abs(difference)
    much, equal = size >= MUCH, size < MATCHED
    return {
        "rejected much longer": much & (difference < 0),
        "rejected longer": ~much & ~equal & (difference < 0),
        "equal within 10 %": equal,
        "chosen longer": ~much & ~equal & (difference > 0),
        "chosen much longer": much & (difference > 0),
    }


def pair_of(lines: list[dict], name: str) -> np.ndarray:
    """Return the values of both sides [pairs, 2], chosen first; NaN for null."""
    return np.array([[line[f"{side}{name}"] for side in ("chosen", "rejected")] for line in lines], dtype=float)


def prompts_of(lines: list[dict]) -> np.ndarray:
    """Return a number for each pair [pairs], equal for pairs of one prompt; the bootstrap draws prompts, not pairs."""
    return np.array([line.get("same_prompt", i) for i, line in enumerate(lines)])


def against_shortcuts(lines: list[dict], right: np.ndarray, prompts: np.ndarray) -> dict[str, dict]:
    """Return for each shortcut: pairs, accuracy, and how much better the model is on the same pairs."""
    found = {}
    for name in NAMES:
        here = np.array([name in line["shortcuts"] for line in lines])
        if here.any():
            theirs = np.array([line["shortcuts"][name] for line in lines if name in line["shortcuts"]])
            share = {"pairs": int(here.sum()), "accuracy": float(theirs.mean())}
            found[name] = share | paired_difference(right[here], theirs, prompts[here])
    return found


def shares(right: np.ndarray, masks: dict[str, np.ndarray], prompts: np.ndarray) -> dict[str, dict]:
    """Return pairs, accuracy and interval within each mask that has pairs."""
    return {name: share_right(right[mask], prompts[mask]) for name, mask in masks.items() if mask.any()}


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's r, or None if one side does not vary."""
    if not one.std() or not other.std():
        return None
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def told(result: dict) -> str:
    """Return the report in a few lines, the verdict last."""
    best, matched = result["best_shortcut"], result["length_matched_accuracy"]
    lines = [
        f"pair accuracy {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}] on "
        f"{result['pairs']} pairs; 'the longer answer wins' alone: {result['length_baseline']:.3f}; "
        f"best shortcut, {NAMES[best]}: {result['shortcuts'][best]['accuracy']:.3f}"
    ]
    if matched is not None:
        lines.append(f"on {result['length_matched_pairs']} pairs of equal length (within 10 %): {matched:.3f}")
    return "\n".join([*lines, result["verdict"]])
