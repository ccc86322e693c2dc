"""The curves of a run, drawn from its metrics.jsonl."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.plots import BLUE, INK, MUTED, ORANGE, in_style, new_figure, save
from utils.runs import read_lines

ON_VALIDATION = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}  # the same under another name there
WINDOW = 10  # logged lines that the smooth line averages


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and those before it, WINDOW at most."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - WINDOW)
    return (sums[ends] - sums[starts]) / (ends - starts)


@in_style
def curves(
    metrics: list[dict], names: tuple[str, ...], baselines: dict[str, tuple[float, str]], title: str, dots: str
) -> Figure:
    """One axes a metric over the steps: values, their moving mean, values on validation, and a line to compare with.

    baselines: metric -> (value, what it is). dots: what a value is.
    """
    subtitle = f"dots: {dots}; line: mean of the last {WINDOW} of them"
    figure, axes = new_figure(title, subtitle, height=1.6 + 2.2 * len(names), rows=len(names), gap=0.15, left=0.14)
    for axis, name in zip(axes, names, strict=True):
        steps, values = np.array([(line["step"], line[name]) for line in metrics if line.get(name) is not None]).T
        axis.plot(steps, values, ".", color=BLUE, alpha=0.35, markersize=5)
        axis.plot(steps, smooth(values), color=BLUE, linewidth=2)
        key = f"eval_{ON_VALIDATION.get(name, name)}"
        checked = [(line["step"], line[key]) for line in metrics if key in line]
        if checked:
            axis.plot(*zip(*checked, strict=True), "o-", color=ORANGE, markersize=5, label="on validation")
            axis.legend(loc="best")
        if name in baselines:
            value, what = baselines[name]
            axis.axhline(value, color=MUTED, linestyle="--", linewidth=1)
            axis.annotate(
                f"{what} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", color=INK, fontsize=9.5,
            )  # fmt: skip
        axis.set_ylabel(name.replace("/", "/\n"))
        axis.grid(axis="y")
    axes[-1].set_xlabel("optimizer steps")
    return figure


def training_curves(
    folder: Path,
    names: tuple[str, ...],
    baselines: dict[str, tuple[float, str]],
    title: str,
    dots: str = "mean over the pairs since the last log",
) -> None:
    """Write training_curves.png beside metrics.jsonl; no picture where nothing was logged."""
    metrics = read_lines(folder / "metrics.jsonl")
    logged = tuple(name for name in names if any(line.get(name) is not None for line in metrics))
    if logged:
        save(curves(metrics, logged, baselines, title, dots), folder / "training_curves.png")
