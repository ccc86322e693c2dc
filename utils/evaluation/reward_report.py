"""Is a reward model any good? The report on its predictions, and the files that show it."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.data.preferences import hundredths
from utils.evaluation.baselines import CONTROL_NAMES, SHORTCUT_NAMES, bands_of
from utils.evaluation.plots import BLUE, MUTED, ORANGE, band_label, in_style, new_figure, save, training_curves
from utils.evaluation.statistics import calibration, coverage, interval, paired_difference, share_right, verdict, wins
from utils.runs import write_json, write_lines, write_text

MATCHED = 0.1  # below this difference, as a share of the longer answer, two answers are of equal length
MUCH = 0.5  # from this difference on, one answer is much longer
WORST = 10  # mistakes in eval.json


def report(lines: list[dict]) -> dict[str, object]:
    """Return the content of eval.json, computed from the lines of predictions.jsonl alone."""
    both = {name: both_sides(lines, name) for name in ("", "_characters", "_tokens", "_rating")}
    right, prompts = wins(*both[""].T), prompt_groups(lines)
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
    best, said = overall_verdict(shortcuts, len(lines))
    found |= {"verdict": said, "best_shortcut": best, "shortcuts": shortcuts}
    if "without_prompt" in shortcuts:
        found["prompt_verdict"] = verdict(shortcuts["without_prompt"], SHORTCUT_NAMES["without_prompt"])
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
        found["coverage_by_spread"] = coverage(right, -both_sides(lines, "_spread").sum(axis=1))
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


def overall_verdict(shortcuts: dict[str, dict], pairs: int) -> tuple[str, str]:
    """Return (the most accurate shortcut, the verdict), from the shortcuts that were measured on all pairs.

    If the model is more accurate than every shortcut, the verdict quotes the largest p-value: it holds for all of them,
    so it needs no correction. Otherwise the verdict compares the model with the best shortcut, which chance has helped
    to be the best, and multiplies p by the number of shortcuts (Bonferroni).
    """
    found = {name: entry for name, entry in shortcuts.items() if name not in CONTROL_NAMES and entry["pairs"] == pairs}
    best = max(found, key=lambda name: found[name]["accuracy"])
    if found[best]["difference"] > 0:
        hardest = max(found, key=lambda name: found[name]["p_value"])
        return best, verdict(found[hardest], SHORTCUT_NAMES[hardest])
    corrected = found[best] | {"p_value": min(1.0, found[best]["p_value"] * len(found))}
    return best, f"{verdict(corrected, SHORTCUT_NAMES[best])}, corrected for {len(found)} shortcuts"


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


def both_sides(lines: list[dict], name: str) -> np.ndarray:
    """Return the values of both sides [pairs, 2], chosen first; NaN for null."""
    return np.array([[line[f"{side}{name}"] for side in ("chosen", "rejected")] for line in lines], dtype=float)


def prompt_groups(lines: list[dict]) -> np.ndarray:
    """Return a number for each pair [pairs], equal for pairs of one prompt; the bootstrap draws prompts, not pairs."""
    return np.array([line.get("same_prompt", i) for i, line in enumerate(lines)])


def against_shortcuts(lines: list[dict], right: np.ndarray, prompts: np.ndarray) -> dict[str, dict]:
    """Return for each shortcut: pairs, accuracy, and how much better the model is on the same pairs."""
    found = {}
    for name in SHORTCUT_NAMES:
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


def format_summary(result: dict) -> str:
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


@in_style
def plot_accuracies(result: dict, lines: list[dict]) -> Figure:
    """Plot pair accuracy with 95 % intervals: the model, the shortcuts, and the model by gap, length and subset."""
    model = {"accuracy": result["accuracy"], "low": result["accuracy_low"], "high": result["accuracy_high"]}
    rivals = {name: of_shortcut(lines, name) for name in result["shortcuts"]}
    groups = [
        [("the reward model", model | {"pairs": result["pairs"]}, BLUE)],
        [(SHORTCUT_NAMES[name].strip("'"), part, ORANGE) for name, part in rivals.items() if name not in CONTROL_NAMES],
        [(SHORTCUT_NAMES[name], part, BLUE) for name, part in rivals.items() if name in CONTROL_NAMES],
        [(f"gap {band_label(band)}", part, BLUE) for band, part in result["by_gap"].items()],
        [(band, part, BLUE) for band, part in result["by_length_difference"].items()],
        [(name or "no subset", part, BLUE) for name, part in list(result["by_subset"].items())[:30]],
    ]
    groups = [group for group in groups if group]
    figure, (axes,) = new_figure(
        f"The reward model is {result['verdict']}",
        "Pair accuracy with 95 % intervals; a tie counts half. Blue: the model, on all pairs and on parts of them.\n"
        "Orange: what needs no reading. Right: number of pairs.",
        height=2.1 + 0.29 * (sum(map(len, groups)) + 0.7 * len(groups)),
        left=0.36,
        right=0.88,
    )
    labels, y = {}, 0.0
    for group in groups:
        for text, part, color in group:
            axes.plot([part["low"], part["high"]], [y, y], color=color, linewidth=2.6, solid_capstyle="round")
            axes.plot(part["accuracy"], y, "o", color=color, markersize=7.5)
            for place, cell in ((1.07, f"{part['accuracy']:.2f}"), (1.15, f"{part['pairs']:,}")):
                axes.text(place, y, cell, transform=axes.get_yaxis_transform(), va="center_baseline", ha="right")
            labels[y] = text
            y += 1
        y += 0.7
    axes.axvline(0.5, color=MUTED, linewidth=1.2, zorder=0)
    axes.text(0.5, -0.9, "a coin", color=MUTED, va="center_baseline", ha="center")
    axes.axvline(result["accuracy"], color=BLUE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(y - 1.1, -0.6), xlabel="pair accuracy")
    return figure


def of_shortcut(lines: list[dict], name: str) -> dict:
    """Return share_right of a shortcut on the pairs where it was measured."""
    here = np.array([name in line["shortcuts"] for line in lines])
    right = np.array([line["shortcuts"][name] for line in lines if name in line["shortcuts"]])
    return share_right(right, prompt_groups(lines)[here])


@in_style
def plot_reliability(result: dict) -> Figure:
    """Plot accuracy (y) against confidence (x)."""
    curve = result["reliability"]
    x, y, n = (np.array([entry[name] for entry in curve]) for name in ("confidence", "accuracy", "pairs"))
    figure, (axes,) = new_figure(
        f"Its probabilities are off by {result['ece']:.2f} on average; chance alone can make "
        f"{result['ece_of_chance']:.2f}",
        "How often the answer that the model prefers is the chosen one, by how sure it is. Dots: groups of pairs,\n"
        f"their area is the number of pairs. Brier score {result['brier']:.3f}; a coin that says 0.5 has 0.25.",
        height=5.0,
    )
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1)
    axes.annotate("as sure as right", (0.97, 0.97), (0, 6), textcoords="offset points", color=MUTED, ha="right")
    axes.plot(x, y, color=BLUE, linewidth=1.2)
    axes.scatter(x, y, s=20 + 400 * n / n.sum(), color=BLUE, zorder=3)
    axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="P(the preferred answer wins)", ylabel="right")
    axes.grid(axis="y")
    return figure


@in_style
def plot_coverage(result: dict) -> Figure:
    """Plot accuracy on the surest share of the pairs, by margin and, for distributions, by spread."""
    names = {"coverage_by_margin": ("by margin of the rewards", BLUE), "coverage_by_spread": ("by spread", ORANGE)}
    shown = {name: look for name, look in names.items() if name in result}
    ends = result["coverage_by_margin"][0]["accuracy"], result["accuracy"]
    figure, (axes,) = new_figure(
        f"On the tenth of the pairs that it is surest of, it is right on {ends[0]:.0%}".replace("%", " %"),
        f"Pair accuracy if the model abstains on all but its surest pairs; on all {result['pairs']:,} it is "
        f"{ends[1]:.2f}.\nAt the left end there are {max(1, round(result['pairs'] / 10))} pairs.",
        height=4.6,
    )
    for name, (label, color) in shown.items():
        x, y = zip(*((100 * entry["coverage"], entry["accuracy"]) for entry in result[name]), strict=True)
        axes.plot(x, y, "o-", color=color, label=label)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
    axes.set(xlabel="share of the pairs that are judged (%)", ylabel="pair accuracy")
    axes.grid(axis="y")
    axes.legend(loc="best")
    return figure


@in_style
def plot_rewards(result: dict, lines: list[dict]) -> Figure:
    """Plot histograms of the rewards of chosen and rejected answers."""
    both = both_sides(lines, "")
    r = result["length_correlation"]
    figure, (axes,) = new_figure(
        f"Chosen answers get {result['margin']:.2f} more on average, at a standard deviation of {both.std():.2f}",
        f"Rewards of {len(lines):,} chosen and rejected answers. Correlation of reward and log length: "
        + (f"{r:.2f}" if r is not None else "none, one of them does not vary"),
        height=4.4,
    )
    edges = np.histogram_bin_edges(both, bins=min(40, max(8, len(lines) // 6)))
    for i, (side, color) in enumerate((("chosen", BLUE), ("rejected", ORANGE))):
        axes.hist(both[:, i], bins=edges, color=color, alpha=0.25)
        axes.hist(both[:, i], bins=edges, histtype="step", color=color, linewidth=1.8, label=side)
    axes.set(xlabel="reward", ylabel="answers")
    axes.legend(loc="best")
    return figure


def write_results(folder: Path, result: dict, lines: list[dict], record: dict | None = None) -> None:
    """Write eval.json, predictions.jsonl and the figures; after a training also its curves and the model card.

    record: run.json of the training, None for an evaluation.
    """
    write_json(folder / "eval.json", result)
    write_lines(folder / "predictions.jsonl", lines)
    save(plot_accuracies(result, lines), folder / "accuracy.png")
    save(plot_reliability(result), folder / "reliability.png")
    save(plot_coverage(result), folder / "coverage.png")
    save(plot_rewards(result, lines), folder / "rewards.png")
    if not record:
        return
    title = (
        f"Reward model: {result['accuracy']:.1%} of {result['pairs']} {result['measured_on']} pairs are ranked right"
    )
    start = {"bradley_terry": (0.6931, "a coin:"), "win_probability": (0.7985, "all grades alike:")}
    baselines = {"accuracy": (result["length_baseline"], f"the longer answer wins, {result['measured_on']}:")}
    if record["pair_loss"] in start and not record["settings"]["RATING_WEIGHT"]:
        baselines["loss"] = start[record["pair_loss"]]
    training_curves(folder, ("loss", "accuracy"), baselines, title)
    write_text(folder / "README.md", model_card(result, record))


def model_card(result: dict, record: dict) -> str:
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
