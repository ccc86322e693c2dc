"""Figures: the common style, the curves of a training, and the pictures of a dataset.

Each function returns a matplotlib Figure and `save` writes it, without pyplot's global state. Colours are those of
Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart. The bands of rating gaps
are three shades of one blue, so they keep their order in grey.
"""

import functools
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from utils.evaluation.baselines import label_of
from utils.evaluation.statistics import GAP_BANDS, bands_of, percent
from utils.runs import read_lines

INK, MUTED, PALE = "#222222", "#5F6368", "#CBCFD4"
BLUE, ORANGE = "#0072B2", "#D55E00"
BAND_COLORS = dict(zip(GAP_BANDS, ("#8CC4E8", "#2F8AC4", "#00456F"), strict=True))
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
WIDTH, DPI = 9.0, 200  # inches, dots per inch: 1,800 pixels, to be read at 900
GROUP_GAP = 0.7  # between two groups of rows, in rows
Row = tuple[str, dict[str, Any], str]  # label, result with accuracy, low and high, colour
VALIDATION_NAMES = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}  # training metric: validation metric
SMOOTHED = 10  # logged lines that the smooth line averages
MIN_PAIRS, MAX_POINTS = 10, 1000  # pairs that a median needs; single pairs that are drawn


def in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that draws a figure: draw in STYLE and restore the settings."""

    @functools.wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Figure:
        with rc_context(STYLE):
            return draw(*arguments, **options)

    return styled


def new_figure(
    title: str,
    subtitle: str,
    height: float,
    rows: int = 1,
    left: float = 0.1,
    right: float = 0.97,
    gap: float = 0.0,
    one_x: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with its finding as the title, and `rows` axes below it.

    height: of the figure in inches. left, right: the ends of the axes, as shares of the width. gap: between the axes,
    as a share of their height. one_x: all axes share one x axis.
    """
    title = textwrap.fill(title, 68)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, 1, sharex=one_x, squeeze=False)[:, 0]
    below_title = 0.22 + 0.26 * (title.count("\n") + 1)  # inches from the top
    below_subtitle = below_title + 0.3 + 0.2 * (subtitle.count("\n") + 1)
    figure.text(0.02, 1 - 0.15 / height, title, fontsize=14.5, fontweight="bold", va="top", linespacing=1.2)
    figure.text(0.02, 1 - below_title / height, subtitle, color=MUTED, va="top", linespacing=1.3)
    figure.subplots_adjust(left=left, right=right, top=1 - below_subtitle / height, bottom=0.62 / height, hspace=gap)
    return figure, list(axes)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=DPI, facecolor="white")
    os.replace(part, path)


def draw_accuracies(axes: Axes, groups: list[list[Row]], columns: dict[float, Callable[[dict], str]]) -> None:
    """Draw rows of pair accuracies with their intervals, in groups, against a coin.

    columns: x of the right end of a column beside the axes, as a share of their width, and its text for a result.
    """
    labels, y = {}, 0.0
    for group in groups:
        for label, result, color in group:
            axes.plot([result["low"], result["high"]], [y, y], color=color, linewidth=2.6, solid_capstyle="round")
            axes.plot(result["accuracy"], y, "o", color=color, markersize=7.5)
            for x, text in columns.items():
                write_beside(axes, x, y, text(result))
            labels[y] = label
            y += 1
        y += GROUP_GAP
    axes.axvline(0.5, color=MUTED, linewidth=1.2, zorder=0)
    axes.text(0.5, -0.9, "a coin", color=MUTED, va="center_baseline", ha="center")
    axes.set_yticks(list(labels), list(labels.values()))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(y - GROUP_GAP - 0.4, -0.6), xlabel="pair accuracy")


def write_beside(axes: Axes, x: float, y: float, text: str, color: str = INK) -> None:
    """Write a text that ends at x, a share of the width of the axes, in row y."""
    axes.text(x, y, text, color=color, transform=axes.get_yaxis_transform(), va="center_baseline", ha="right")


def band_label(band: str) -> str:
    """Return a band of rating gaps in words."""
    return f"{band[2:]} or more" if ">=" in band else band.replace("<", "below ").replace("-", " to ")


# curves of a training


def training_curves(
    folder: Path,
    names: tuple[str, ...],
    baselines: dict[str, tuple[float, str]],
    title: str,
    dots: str = "mean over the pairs since the last log",
) -> None:
    """Write training_curves.png beside metrics.jsonl, unless nothing was logged. Arguments: of `plot_curves`."""
    metrics = read_lines(folder / "metrics.jsonl")
    logged = tuple(name for name in names if any(line.get(name) is not None for line in metrics))
    if logged:
        save(plot_curves(metrics, logged, baselines, title, dots), folder / "training_curves.png")


@in_style
def plot_curves(
    metrics: list[dict], names: tuple[str, ...], baselines: dict[str, tuple[float, str]], title: str, dots: str
) -> Figure:
    """Plot each metric over the steps: logged values, their moving mean, validation values, and a baseline.

    baselines: metric -> (value, its name). dots: what a logged value is.
    """
    subtitle = f"dots: {dots}; line: mean of the last {SMOOTHED} of them"
    figure, axes = new_figure(title, subtitle, height=1.6 + 2.2 * len(names), rows=len(names), gap=0.15, left=0.14)
    for axis, name in zip(axes, names, strict=True):
        steps, values = np.array([(line["step"], line[name]) for line in metrics if line.get(name) is not None]).T
        axis.plot(steps, values, ".", color=BLUE, alpha=0.35, markersize=5)
        axis.plot(steps, smooth(values), color=BLUE, linewidth=2)
        key = f"eval_{VALIDATION_NAMES.get(name, name)}"
        validation = [(line["step"], line[key]) for line in metrics if key in line]
        if validation:
            axis.plot(*zip(*validation, strict=True), "o-", color=ORANGE, markersize=5, label="on validation")
            axis.legend(loc="best")
        if name in baselines:
            value, label = baselines[name]
            axis.axhline(value, color=MUTED, linestyle="--", linewidth=1)
            axis.annotate(
                f"{label} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", color=INK, fontsize=9.5,
            )  # fmt: skip
        axis.set_ylabel(name.replace("/", "/\n"))
        axis.grid(axis="y")
    axes[-1].set_xlabel("optimizer steps")
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of each value and those before it, SMOOTHED at most."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTHED)
    return (sums[ends] - sums[starts]) / (ends - starts)


# pictures of a dataset


@in_style
def plot_token_lengths(m: dict[str, np.ndarray], section: dict[str, Any], window: int) -> Figure:
    """Plot lengths before and in the window: prompt, chosen, rejected, and the prompt with the longer answer.

    m: token lengths [pairs]; section: their part of summary.json. One bar is a quarter of an octave.
    """
    whole = float(np.mean(m["pair"] <= window))
    cut = {**section["cut_share"], "pair": 1 - whole}
    names = {"prompt": "prompt", "chosen": "chosen answer", "rejected": "rejected answer"}
    names["pair"] = "prompt + longer answer"
    figure, panels = new_figure(
        f"A window of {window} tokens holds {percent(whole)} of the pairs whole",
        f"Token lengths of {section['pairs']:,} pairs as the source has them (grey) and as training sees them (blue).\n"
        "The prompt is cut first, down to half of the window; then the ends of the answers.",
        height=7.8,
        rows=len(names),
        gap=0.42,
    )
    ends = [min(m[f"{name}_in_window"].min() for name in names), max(m["pair"].max(), 2 * window)]
    first, last = np.log2(np.array(ends) / (window + 0.5)) * 4
    edges = (window + 0.5) * 2 ** (np.arange(np.floor(first), np.ceil(last) + 1) / 4)  # the window is one of them
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        draw_before_and_after(axes, m[name], m[f"{name}_in_window"], edges)
        axes.axvline(window + 0.5, color=ORANGE, linewidth=1.4)
        axes.set_title(f"{label}: {percent(cut[name])} cut", loc="left", fontsize=11)
    panels[0].annotate(
        f"window of {window}", (window + 0.5, 1), (5, 0), panels[0].get_xaxis_transform(), "offset points",
        color=ORANGE, va="top",
    )  # fmt: skip
    ticks = [2**power for power in range(1, 20) if edges[0] <= 2**power <= edges[-1]]
    panels[-1].set_xscale("log", base=2)
    panels[-1].xaxis.set(major_locator=FixedLocator(ticks), major_formatter=FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panels[-1].set(xlim=(edges[0], edges[-1]), xlabel="length (tokens, logarithmic)")
    figure.supylabel("share of the pairs", x=0.015, fontsize=11)
    return figure


def draw_before_and_after(axes: Axes, before: np.ndarray, after: np.ndarray, edges: np.ndarray) -> None:
    """Draw two histograms over each other, as shares: `before` grey, `after` blue."""
    bins, weights = edges.tolist(), np.full(len(before), 1 / len(before))
    axes.hist(before, bins, weights=weights, color=PALE)
    shares, _ = np.histogram(after, bins, weights=weights)
    axes.hist(after, bins, weights=weights, color=BLUE, alpha=0.25)
    filled = np.flatnonzero(shares)
    axes.stairs(shares[filled[0] : filled[-1] + 1], edges[filled[0] : filled[-1] + 2], color=BLUE, linewidth=1.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.locator_params(axis="y", nbins=3)


@in_style
def plot_rating_gaps(gap: np.ndarray, section: dict[str, Any]) -> Figure:
    """Plot the number of pairs by rating gap, with the bands. gap [pairs]: hundredths of a point, no NaN."""
    gaps, bands = section["rating_gap"], section["rating_gap"]["bands"]
    close = percent(bands["<0.5"]["share"]) + " of the pairs differ" if bands["<0.5"]["pairs"] else "No pair differs"
    figure, (axes,) = new_figure(
        f"{close} by less than half a rating point",
        f"Rating of the chosen minus rating of the rejected answer, {section['pairs']:,} pairs: "
        f"mean {gaps['mean']:.2f}, median {gaps['median']:.2f}.",
        height=4.6,
    )
    step, starts, centres = bars_of(gap)
    counts = np.histogram(gap, [*starts, np.inf])[0]
    for band, inside in bands_of(starts).items():
        label = f"gap {band_label(band)}: {bands[band]['pairs']:,} pairs, {percent(bands[band]['share'])}"
        if inside.any():
            axes.bar(centres[inside], counts[inside], width=0.86 * step / 100, color=BAND_COLORS[band], label=label)
    axes.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="white", framealpha=1)
    axes.grid(axis="y")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="rating gap (points)", ylabel="pairs", xlim=(0, None))
    return figure


def bars_of(gap: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return (step, starts, centres) of the bars for gaps [pairs]; step and starts in hundredths, centres in points.

    If ratings move in steps of a tenth or more, each gap has its own bar. Finer gaps share bars of 0.1, or of 0.25 if
    they reach beyond 4 points. No bar crosses a band.
    """
    values = gap.astype(int)
    step, shift = int(np.gcd.reduce(values)), 0.0
    if step < 10:
        step = 10 if values.max() <= 400 else 25
        shift = step / 2
    starts = np.unique(values // step * step)
    return step, starts, (starts + shift) / 100


@in_style
def plot_shortcuts(section: dict[str, Any]) -> Figure:
    """Plot the pair accuracy of each shortcut with its 95 % interval, over all pairs and by rating gap."""
    shortcuts = section["shortcuts"]
    groups = [
        [
            (label_of(name), result, INK),
            *((f"gap {band_label(band)}", part, BAND_COLORS[band]) for band, part in result["by_gap"].items()),
        ]
        for name, result in shortcuts.items()
    ]
    figure, (axes,) = new_figure(
        f"Taking the longer answer is right on {percent(shortcuts['longer']['accuracy'])} of the pairs",
        f"Pair accuracy of shortcuts that read no word, with 95 % intervals; {section['pairs']:,} pairs, a tie counts\n"
        "half. A reward model has learned more than a shortcut only if it beats it.",
        height=1.9 + 0.29 * (sum(map(len, groups)) + GROUP_GAP * len(groups)),
        left=0.32,
        right=0.83,
    )
    columns = {1.11: lambda part: f"{part['accuracy']:.2f}", 1.28: lambda part: percent(part["ties"] / part["pairs"])}
    draw_accuracies(axes, groups, columns)
    for x, head in zip(columns, ("right", "ties"), strict=True):
        write_beside(axes, x, -0.9, head, MUTED)
    for label in axes.get_yticklabels():
        label.set_fontweight("normal" if label.get_text().startswith("gap ") else "bold")
    return figure


@in_style
def plot_length_by_gap(m: dict[str, np.ndarray], section: dict[str, Any]) -> Figure:
    """Plot how much longer the chosen answer is, by rating gap: single pairs, and medians with quartiles.

    m: gap (hundredths, no NaN), chosen_longer and rejected_longer (characters), all [pairs].
    """
    gap, ratio = m["gap"], m["chosen_longer"] / m["rejected_longer"]
    medians = [(np.median(ratio[inside]), band_label(band)) for band, inside in bands_of(gap).items() if inside.any()]
    title = "The chosen answer is {:.1f} times as long as the rejected one where the gap is {}".format(*medians[-1])
    if len(medians) > 1:
        title += ", and {:.1f} times where it is {}".format(*medians[0])
    figure, (axes,) = new_figure(
        title,
        f"Characters of the chosen divided by those of the rejected answer, {section['pairs']:,} pairs. Dots, bars:\n"
        f"medians and quartiles of gaps with {MIN_PAIRS} pairs or more. Grey: single pairs, {MAX_POINTS:,} at most.",
        height=5.2,
    )
    step, starts, centres = bars_of(gap)
    random = np.random.default_rng(0)
    sample = random.permutation(len(ratio))[:MAX_POINTS]
    shift = random.uniform(-0.3, 0.3, len(sample)) * step
    axes.scatter((gap[sample] + shift) / 100, ratio[sample], s=9, color=MUTED, linewidths=0, alpha=0.3, zorder=1)
    limits = np.percentile(ratio, (1, 99)).tolist()
    for start, centre in zip(starts, centres, strict=True):
        ratios = ratio[(gap >= start) & (gap < start + step)]
        if len(ratios) >= MIN_PAIRS:
            color = next(BAND_COLORS[band] for band, inside in bands_of(np.array([start])).items() if inside[0])
            quartiles = np.percentile(ratios, (25, 75))
            limits += quartiles.tolist()
            axes.plot([centre, centre], quartiles, color=color, linewidth=3, solid_capstyle="round")
            axes.plot(centre, np.median(ratios), "o", color=color, markersize=9, markeredgecolor="white")
    axes.axhline(1, color=ORANGE, linewidth=1.4, zorder=1.5)
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.8 * min(limits), 1.25 * max(limits))
    powers = np.arange(-12, 13) * (1 if max(limits) / min(limits) < 2**7 else 2)
    axes.yaxis.set(major_locator=FixedLocator((2.0**powers).tolist()), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(times))
    axes.set(xlabel="rating gap (points)", ylabel="length, chosen / rejected", xlim=(0, None))
    return figure


def times(ratio: float, _: int) -> str:
    """Return a power of two as a label: 2 x, equal, 1/2."""
    if ratio == 1:
        return "equal"
    return f"{ratio:g} x" if ratio > 1 else f"1/{1 / ratio:g}"
