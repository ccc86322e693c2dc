"""Is a reward model any good? The report on its predictions, and the files that show it."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.data.preferences import hundredths
from utils.evaluation import plots
from utils.evaluation.baselines import CONTROL_NAMES, SHORTCUT_NAMES, label_of
from utils.evaluation.plots import BLUE, MUTED, ORANGE, in_style, new_figure, save
from utils.evaluation.statistics import (
    bands_of,
    calibration,
    coverage,
    interval,
    paired_difference,
    percent,
    share_right,
    verdict,
    wins,
)
from utils.runs import write_json, write_lines, write_text

EQUAL_LENGTH, MUCH_LONGER = 0.1, 0.5  # below and from this difference, as a share of the longer answer
WORST = 10  # mistakes in eval.json
SUBSETS = 30  # in the figure, at most
START_LOSS = {"bradley_terry": (0.6931, "a coin:"), "win_probability": (0.7985, "all grades alike:")}


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of eval.json, computed from the lines of predictions.jsonl alone."""
    rewards, prompts = both_sides(lines, ""), prompt_groups(lines)
    right, margin = wins(*rewards.T), rewards[:, 0] - rewards[:, 1]
    accuracy = share_right(right, prompts)
    shortcuts = against_shortcuts(lines, right, prompts)
    best, sentence = overall_verdict(shortcuts, len(lines))
    result: dict[str, Any] = {
        "pairs": len(lines),
        "prompts": len(set(prompts.tolist())),
        "ties": int((right == 0.5).sum()),
        "accuracy": accuracy["accuracy"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "length_baseline": shortcuts["longer"]["accuracy"],
        "verdict": sentence,
        "best_shortcut": best,
        "shortcuts": shortcuts,
    }
    if "without_prompt" in shortcuts:
        result["prompt_verdict"] = verdict(shortcuts["without_prompt"], SHORTCUT_NAMES["without_prompt"])
    result |= {
        **by_length(lines, right, prompts),
        "by_gap": shares(right, gap_bands(lines), prompts),
        **calibration(np.array([line["win"] for line in lines]), prompts),
        "coverage_by_margin": coverage(right, np.abs(margin)),
        "margin": float(margin.mean()),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
    }
    if "chosen_spread" in lines[0]:
        result["coverage_by_spread"] = coverage(right, -both_sides(lines, "_spread").sum(axis=1))
    subset = np.array([line["subset"] for line in lines])
    names = sorted(set(subset.tolist()) - {""})
    result["by_subset"] = shares(right, {name: subset == name for name in names}, prompts)
    result["worst_mistakes"] = [lines[i] for i in np.argsort(margin)[:WORST] if margin[i] < 0]
    return result


def overall_verdict(shortcuts: dict[str, dict], pairs: int) -> tuple[str, str]:
    """Return (the most accurate shortcut, the verdict), from the shortcuts that were measured on all pairs.

    If the model is more accurate than every shortcut, the verdict quotes the largest p-value: it holds for all of them,
    so it needs no correction. Otherwise the verdict compares the model with the best shortcut. That one is the best of
    several partly by chance, so p is multiplied by the number of shortcuts (Bonferroni).
    """
    rivals = {
        name: result for name, result in shortcuts.items() if name not in CONTROL_NAMES and result["pairs"] == pairs
    }
    best = max(rivals, key=lambda name: rivals[name]["accuracy"])
    if rivals[best]["difference"] > 0:
        hardest = max(rivals, key=lambda name: rivals[name]["p_value"])
        return best, verdict(rivals[hardest], SHORTCUT_NAMES[hardest])
    corrected = rivals[best] | {"p_value": min(1.0, rivals[best]["p_value"] * len(rivals))}
    return best, f"{verdict(corrected, SHORTCUT_NAMES[best])}, corrected for {len(rivals)} shortcuts"


def against_shortcuts(lines: list[dict], right: np.ndarray, prompts: np.ndarray) -> dict[str, dict]:
    """Return for each shortcut: pairs, accuracy, and how much better the model is on the same pairs."""
    results = {}
    for name in SHORTCUT_NAMES:
        mask, shortcut_right = shortcut_outcomes(lines, name)
        if mask.any():
            accuracy = {"pairs": int(mask.sum()), "accuracy": float(shortcut_right.mean())}
            results[name] = accuracy | paired_difference(right[mask], shortcut_right, prompts[mask])
    return results


def shortcut_outcomes(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (mask of the pairs where a shortcut was measured [pairs], its 1, 0.5 or 0 on these)."""
    mask = np.array([name in line["shortcuts"] for line in lines])
    return mask, np.array([line["shortcuts"][name] for line in lines if name in line["shortcuts"]])


def by_length(lines: list[dict], right: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Return how accuracy and reward depend on length. right, prompts: [pairs]."""
    rewards, characters, tokens = (both_sides(lines, name) for name in ("", "_characters", "_tokens"))
    bands = length_bands((characters[:, 0] - characters[:, 1]) / np.maximum(characters.max(axis=1), 1))
    matched = bands["equal within 10 %"]
    return {
        "by_length_difference": shares(right, bands, prompts),
        "length_matched_accuracy": float(right[matched].mean()) if matched.any() else None,
        "length_matched_interval": interval(right[matched], prompts[matched]) if matched.any() else None,
        "length_matched_pairs": int(matched.sum()),
        "length_correlation": correlation(rewards, np.log(np.maximum(characters, 1))),
        "length_correlation_in_window": correlation(rewards, np.log(np.maximum(tokens, 1))),
    }


def length_bands(difference: np.ndarray) -> dict[str, np.ndarray]:
    """Return {band: mask [pairs]} for (chosen - rejected) / longer length in characters [pairs]."""
    size = np.abs(difference)
    much, equal = size >= MUCH_LONGER, size < EQUAL_LENGTH
    return {
        "rejected much longer": much & (difference < 0),
        "rejected longer": ~much & ~equal & (difference < 0),
        "equal within 10 %": equal,
        "chosen longer": ~much & ~equal & (difference > 0),
        "chosen much longer": much & (difference > 0),
    }


def gap_bands(lines: list[dict]) -> dict[str, np.ndarray]:
    """Return {band of rating gaps: mask [pairs]}, {} unless all answers have ratings."""
    ratings = both_sides(lines, "_rating")
    if np.isnan(ratings).any():
        return {}
    chosen, rejected = np.vectorize(hundredths)(ratings).T
    return bands_of(chosen - rejected)


def both_sides(lines: list[dict], name: str) -> np.ndarray:
    """Return the values of both sides [pairs, 2], chosen first; NaN for null."""
    return np.array([[line[f"{side}{name}"] for side in ("chosen", "rejected")] for line in lines], dtype=float)


def prompt_groups(lines: list[dict]) -> np.ndarray:
    """Return a number for each pair [pairs], equal for pairs of one prompt; the bootstrap draws prompts, not pairs."""
    return np.array([line.get("same_prompt", i) for i, line in enumerate(lines)])


def shares(right: np.ndarray, masks: dict[str, np.ndarray], prompts: np.ndarray) -> dict[str, dict]:
    """Return pairs, accuracy and interval within each mask that has pairs."""
    return {name: share_right(right[mask], prompts[mask]) for name, mask in masks.items() if mask.any()}


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's r, or None if one side does not vary."""
    if not one.std() or not other.std():
        return None
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


# the files


def write_report(
    folder: Path, result: dict[str, Any], lines: list[dict[str, Any]], record: dict[str, Any] | None = None
) -> None:
    """Write eval.json, predictions.jsonl and the figures; after training also its curves and the model card.

    record: run.json of the training, None for an evaluation.
    """
    write_json(folder / "eval.json", result)
    write_lines(folder / "predictions.jsonl", lines)
    save(plot_accuracies(result, lines), folder / "accuracy.png")
    save(plot_reliability(result), folder / "reliability.png")
    save(plot_coverage(result), folder / "coverage.png")
    save(plot_rewards(result, lines), folder / "rewards.png")
    if record:
        measured_on = f"{result['pairs']} {result['measured_on']} pairs"
        title = f"Reward model: {percent(result['accuracy'], 1)} of {measured_on} are ranked right"
        baselines = {"accuracy": (result["length_baseline"], f"the longer answer wins, {result['measured_on']}:")}
        if record["pair_loss"] in START_LOSS and not record["settings"]["RATING_WEIGHT"]:
            baselines["loss"] = START_LOSS[record["pair_loss"]]
        plots.training_curves(folder, ("loss", "accuracy"), baselines, title)
        write_text(folder / "README.md", model_card(result, record))


def format_summary(result: dict[str, Any]) -> str:
    """Return the report in a few lines, the verdict last."""
    best, matched = result["best_shortcut"], result["length_matched_accuracy"]
    lines = [
        f"pair accuracy {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}] on "
        f"{result['pairs']} pairs; 'the longer answer wins' alone: {result['length_baseline']:.3f}; "
        f"best shortcut, {SHORTCUT_NAMES[best]}: {result['shortcuts'][best]['accuracy']:.3f}"
    ]
    if matched is not None:
        lines.append(f"on {result['length_matched_pairs']} pairs of equal length (within 10 %): {matched:.3f}")
    return "\n".join([*lines, result["verdict"]])


def model_card(result: dict[str, Any], record: dict[str, Any]) -> str:
    """Return README.md of the run folder: what the model is, how good it is, how to load it."""
    settings = record["settings"]
    best = result["best_shortcut"]
    shared = " The epoch was chosen on the same rows." if result["selection_shares_rows"] else ""
    return (
        f"# Reward model\n\n`{settings['MODEL']}` with a {settings['HEAD']} head, trained on "
        f"{record['train_pairs']} pairs of `{record['dataset_name']}` ({record['pair_loss']} loss, learning rate "
        f"{settings['LEARNING_RATE']}, window {record['max_length']} tokens).\n\n"
        f"Pair accuracy on {result['pairs']} {result['measured_on']} pairs: **{result['accuracy']:.3f}** "
        f"(95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}).{shared} 'The longer answer "
        f"wins' alone: {result['length_baseline']:.3f}; {SHORTCUT_NAMES[best]}, the best shortcut: "
        f"{result['shortcuts'][best]['accuracy']:.3f}. {result['verdict'].capitalize()}.\n\n"
        "![pair accuracy](accuracy.png)\n\n"
        "Load it with `AutoModelForSequenceClassification.from_pretrained` or `utils.models.reward_model."
        "RewardModel.load`; what its outputs mean is in `reward_config.json`.\n"
    )


@in_style
def plot_accuracies(result: dict[str, Any], lines: list[dict]) -> Figure:
    """Plot pair accuracy with 95 % intervals: the model, the shortcuts, and the model by gap, length and subset."""
    prompts, shortcuts = prompt_groups(lines), {}
    for name in result["shortcuts"]:
        mask, right = shortcut_outcomes(lines, name)
        shortcuts[name] = share_right(right, prompts[mask])
    model = {key: result[f"accuracy{end}"] for key, end in (("accuracy", ""), ("low", "_low"), ("high", "_high"))}
    groups = [
        [("the reward model", model | {"pairs": result["pairs"]}, BLUE)],
        [(label_of(name), part, ORANGE) for name, part in shortcuts.items() if name not in CONTROL_NAMES],
        [(label_of(name), part, BLUE) for name, part in shortcuts.items() if name in CONTROL_NAMES],
        [(f"gap {plots.band_label(band)}", part, BLUE) for band, part in result["by_gap"].items()],
        [(band, part, BLUE) for band, part in result["by_length_difference"].items()],
        [(name, part, BLUE) for name, part in list(result["by_subset"].items())[:SUBSETS]],
    ]
    groups = [group for group in groups if group]
    figure, (axes,) = new_figure(
        f"The reward model is {result['verdict']}",
        "Pair accuracy with 95 % intervals; a tie counts half. Blue: the model, on all pairs and on some of them.\n"
        "Orange: baselines that need no reading. Right: number of pairs.",
        height=2.1 + 0.29 * (sum(map(len, groups)) + 0.7 * len(groups)),
        left=0.36,
        right=0.88,
    )
    columns = {1.07: lambda part: f"{part['accuracy']:.2f}", 1.15: lambda part: f"{part['pairs']:,}"}
    plots.draw_accuracies(axes, groups, columns)
    axes.axvline(result["accuracy"], color=BLUE, linewidth=0.8, linestyle=":", zorder=0)
    return figure


@in_style
def plot_reliability(result: dict[str, Any]) -> Figure:
    """Plot accuracy (y) against confidence (x)."""
    curve = result["reliability"]
    x, y, n = (np.array([entry[name] for entry in curve]) for name in ("confidence", "accuracy", "pairs"))
    figure, (axes,) = new_figure(
        f"Its probabilities are off by {result['ece']:.2f} on average; chance alone allows "
        f"{result['ece_of_chance']:.2f}",
        "How often the answer that the model prefers is the chosen one, by how sure it is. Dots: groups of pairs,\n"
        f"their area is the number of pairs. Brier score {result['brier']:.3f}; a constant 0.5 has 0.25.",
        height=5.0,
    )
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1)
    axes.annotate("calibrated", (0.97, 0.97), (0, 6), textcoords="offset points", color=MUTED, ha="right")
    axes.plot(x, y, color=BLUE, linewidth=1.2)
    axes.scatter(x, y, s=20 + 400 * n / n.sum(), color=BLUE, zorder=3)
    axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="P(the preferred answer wins)", ylabel="pair accuracy")
    axes.grid(axis="y")
    return figure


@in_style
def plot_coverage(result: dict[str, Any]) -> Figure:
    """Plot accuracy on the surest share of the pairs, by margin and, for distributions, by spread."""
    tenth = result["coverage_by_margin"][0]["accuracy"]
    figure, (axes,) = new_figure(
        f"It ranks {percent(tenth)} of its most confident tenth of the pairs correctly",
        f"Pair accuracy if the model abstains on all but its surest pairs; on all {result['pairs']:,} it is "
        f"{result['accuracy']:.2f}.\nAt the left end there are {max(1, round(result['pairs'] / 10))} pairs.",
        height=4.6,
    )
    for key, label, color in (("margin", "by margin of the rewards", BLUE), ("spread", "by spread", ORANGE)):
        if curve := result.get(f"coverage_by_{key}"):
            x, y = zip(*((100 * entry["coverage"], entry["accuracy"]) for entry in curve), strict=True)
            axes.plot(x, y, "o-", color=color, label=label)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
    axes.set(xlabel="share of the pairs that are judged (%)", ylabel="pair accuracy")
    axes.grid(axis="y")
    axes.legend(loc="best")
    return figure


@in_style
def plot_rewards(result: dict[str, Any], lines: list[dict]) -> Figure:
    """Plot histograms of the rewards of chosen and rejected answers."""
    rewards, r = both_sides(lines, ""), result["length_correlation"]
    figure, (axes,) = new_figure(
        f"Chosen answers get {result['margin']:.2f} more on average, at a standard deviation of {rewards.std():.2f}",
        f"Rewards of {len(lines):,} chosen and rejected answers. Correlation of reward and log length: "
        + (f"{r:.2f}" if r is not None else "none, one of them does not vary"),
        height=4.4,
    )
    edges = np.histogram_bin_edges(rewards, bins=min(40, max(8, len(lines) // 6))).tolist()
    for i, (side, color) in enumerate((("chosen", BLUE), ("rejected", ORANGE))):
        axes.hist(rewards[:, i], bins=edges, color=color, alpha=0.25)
        axes.hist(rewards[:, i], bins=edges, histtype="step", color=color, linewidth=1.8, label=side)
    axes.set(xlabel="reward", ylabel="answers")
    axes.legend(loc="best")
    return figure
