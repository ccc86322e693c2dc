"""Plots of a reward model's quality, its model card, and the other result files of its run folder."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.curves import training_curves
from utils.evaluation import share_right
from utils.plots import BLUE, MUTED, ORANGE, in_style, new_figure, save, told
from utils.quality import ITSELF, NAMES, pair_of, prompts_of
from utils.runs import write_json, write_lines, write_text


@in_style
def accuracies(result: dict, lines: list[dict]) -> Figure:
    """Plot pair accuracy with 95 % intervals: the model, the shortcuts, and the model by gap, length and subset."""
    model = {"accuracy": result["accuracy"], "low": result["accuracy_low"], "high": result["accuracy_high"]}
    rivals = {name: of_shortcut(lines, name) for name in result["shortcuts"]}
    groups = [
        [("the reward model", model | {"pairs": result["pairs"]}, BLUE)],
        [(NAMES[name].strip("'"), part, ORANGE) for name, part in rivals.items() if name not in ITSELF],
        [(NAMES[name], part, BLUE) for name, part in rivals.items() if name in ITSELF],
        [(f"gap {told(band)}", part, BLUE) for band, part in result["by_gap"].items()],
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
    return share_right(right, prompts_of(lines)[here])


@in_style
def reliability(result: dict) -> Figure:
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
def coverage(result: dict) -> Figure:
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
def rewards(result: dict, lines: list[dict]) -> Figure:
    """Plot histograms of the rewards of chosen and rejected answers."""
    both = pair_of(lines, "")
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
    save(accuracies(result, lines), folder / "accuracy.png")
    save(reliability(result), folder / "reliability.png")
    save(coverage(result), folder / "coverage.png")
    save(rewards(result, lines), folder / "rewards.png")
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
        f"wins' alone: {result['length_baseline']:.3f}; {NAMES[best]}, the best shortcut: "
        f"{result['shortcuts'][best]['accuracy']:.3f}. {result['verdict'].capitalize()}.\n\n"
        "![pair accuracy](accuracy.png)\n\n"
        "Load it with `AutoModelForSequenceClassification.from_pretrained` or `utils.models.reward_model.RewardModel.load`; what "
        "its outputs mean is in `reward_config.json`.\n"
    )
