"""Several policies against their start: reward, a judge's reward, KL and length of each, and the spread over seeds."""

import json
import statistics
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from torch import nn

from utils.data.preferences import Message
from utils.evaluation.plots import BLUE, INK, MUTED, ORANGE, in_style, new_figure, save
from utils.evaluation.policy_report import Answers, Sampler, comparison_of, rewards_of
from utils.evaluation.statistics import interval, mean_kl, paired_difference
from utils.models.reward_model import RewardModel
from utils.runs import READ, read_json, write_json, write_lines
from utils.script import stop

START = "start"
MAX_ANCESTORS = 9  # trainings that trained_on follows back
MAY_DIFFER = {  # settings in which runs of one recipe may differ
    *("SEED", "OUTPUT_DIR", "MODEL_SHORT_NAME", "RESUME", "DEVICE", "REPORT_TO", "EVAL_PROMPTS", "JUDGE_MODEL")
}
Prompts = list[list[Message]]


def names_of(folders: tuple[str, ...]) -> dict[str, str]:
    """Return {short name: folder or hub name}: the last component of the path if these differ, else the whole path."""
    folders = tuple(folder.rstrip("/") for folder in folders)
    short = tuple(Path(folder).name for folder in folders)
    names = short if len({*short, START}) == len(short) + 1 else folders
    if len(set(names)) < len(names) or START in names:
        stop(f"POLICIES = {','.join(folders)}: list each policy once, and call none of them {START!r}")
    return dict(zip(names, folders, strict=True))


def check_judge(policies: dict[str, str], judge: str) -> None:
    """Stop if a policy was trained on the judge."""
    for folder in policies.values():
        if judge and Path(judge).resolve() in trained_on(folder):
            stop(f"JUDGE_MODEL = {judge!r} is what {folder} was trained on: name one that no policy was trained on")


def trained_on(folder: str, ancestors: int = MAX_ANCESTORS) -> set[Path]:
    """Return the reward models that a policy was trained on: by REINFORCE, by pairs that they ranked, or in its MODEL.

    ancestors: the number of earlier trainings to follow.
    """
    record = read_json(Path(folder) / "run.json")
    settings = record.get("settings", {})
    if record.get("script") == "train_reinforce.py":  # takes only prompts from the data
        names = {settings["REWARD_MODEL"]}
    else:
        data = read_json(Path(settings.get("DATA_DIR") or ".") / "metadata.json").get("settings", {})
        names = {data["REWARD_MODEL"]} if data.get("MODE") == "ranked" else set()
    earlier = trained_on(settings["MODEL"], ancestors - 1) if settings.get("MODEL") and ancestors else set()
    return {Path(name).resolve() for name in names if name} | earlier


def answers_of(
    policies: dict[str, str],
    start: nn.Module,
    load: Callable[[str], nn.Module],
    prompts: Prompts,
    samplers: dict[str, Sampler],
    best_of: int,
    judge: RewardModel,
) -> dict[str, dict[str, Answers]]:
    """Return {way of sampling: {name: answers}} of the start, its best of n, and every policy, loaded one at a time."""
    answers = {way: {START: sampler.answers(start, start, prompts)} for way, sampler in samplers.items()}
    if best_of > 1:
        sampled = next(iter(samplers))  # greedy answers would all be equal
        answers[sampled][f"best of {best_of}"] = samplers[sampled].best_of(best_of, start, prompts, judge)
    for name, folder in policies.items():
        policy = load(folder)
        for way, sampler in samplers.items():
            answers[way][name] = sampler.answers(policy, start, prompts, progress=f"{name}, {way}")
    return answers


def side_by_side(
    answers: dict[str, Answers], prompts: Prompts, judges: dict[str, RewardModel]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict]]:
    """Return ({judge: {name: rewards [prompts]}}, {name: metrics}) of one way of sampling.

    The metrics hold, for each judge, the mean reward with its interval and a comparison with the start.
    """
    scores = {
        judge: {name: rewards_of(model, prompts, side.answers) for name, side in answers.items()}
        for judge, model in judges.items()
    }
    metrics: dict[str, dict[str, Any]] = {}
    for name, side in answers.items():
        metrics[name] = {**side.metrics(), **mean_kl(side.kl)}
        if side.kl_bound is not None:
            metrics[name]["kl_bound"] = side.kl_bound
        for judge, rewards in scores.items():
            low, high = interval(rewards[name])
            metrics[name][judge] = {"mean": float(rewards[name].mean()), "low": low, "high": high}
            if name != START:
                metrics[name][judge] |= comparison_of(answers[START], side, (rewards[START], rewards[name]))
    return scores, metrics


def recipes(policies: dict[str, str]) -> dict[str, list[str]]:
    """Group runs, {name: folder}, that differ in their seed only. Return {name of the first run: names}.

    A second run with the same seed is not another draw and forms its own group.
    """
    groups: dict[str, dict[int, str]] = {}
    for name, folder in policies.items():
        record = read_json(Path(folder) / "run.json")
        settings = record.get("settings", {"folder": folder})
        recipe = {key: value for key, value in settings.items() if key not in MAY_DIFFER}
        # the weights at the start of a run with adapters depend on its seed
        recipe |= {f"read {k}": record.get(k) for k in READ if not (k == "start" and settings.get("USE_LORA"))}
        key, seed = json.dumps(recipe, sort_keys=True), settings.get("SEED", 0)
        key = key if seed not in groups.get(key, {}) else name
        groups.setdefault(key, {})[seed] = name
    return {names[0]: names for names in (list(runs.values()) for runs in groups.values())}


def over_seeds(groups: dict[str, list[str]], scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """Return for each judge the gain of every recipe over the start, by seed, and the recipes against each other.

    gains: {recipe: values (one a run), mean, std (of a sample; None for one run)}. between: the paired difference of
    the means over runs of two recipes, on the same prompts; its interval and p cover the prompts. p_over_seeds covers
    the seeds (Welch's test of the runs' values; None if a recipe has one run, or no runs differ).
    """
    result = {}
    for judge, rewards in scores.items():
        means = {recipe: np.mean([rewards[name] for name in names], axis=0) for recipe, names in groups.items()}
        gains = {
            recipe: {"runs": names, **spread([float((rewards[name] - rewards[START]).mean()) for name in names])}
            for recipe, names in groups.items()
        }
        between = [
            {"one": a, "other": b, **paired_difference(means[a], means[b])}
            | {"p_over_seeds": p_over_seeds(gains[a]["values"], gains[b]["values"])}
            for a, b in combinations(groups, 2)
        ]
        result[judge] = {"gains": gains, "between": between}
    return result


def spread(values: list[float]) -> dict[str, Any]:
    """Return the values of several runs, one each, with their mean and std (of a sample; None for one run)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "std": std}


def p_over_seeds(one: list[float], other: list[float]) -> float | None:
    """Return the two-sided p of Welch's test of two recipes' gains, one value per run; None if no spread is known."""
    from scipy.stats import ttest_ind

    if min(len(one), len(other)) < 2 or len({*one}) == len({*other}) == 1:
        return None
    return float(ttest_ind(one, other, equal_var=False).pvalue)


# the files


def write_comparison(
    folder: Path, result: dict[str, Any], prompts: list[str], answers: dict[str, dict], scores: dict[str, dict]
) -> None:
    """Write eval.json, predictions.jsonl (a line for each prompt and way of sampling) and a figure for each judge."""
    write_json(folder / "eval.json", result)
    lines = [
        {
            "prompt": prompt,
            "way": way,
            "answers": {name: side.answers[i].text for name, side in sides.items()},
            "log_ratios": {name: float(side.kl[i]) for name, side in sides.items() if side.kl is not None},
        }
        | {
            judge: {name: float(values[i]) for name, values in rewards.items()}
            for judge, rewards in scores[way].items()
        }
        for way, sides in answers.items()
        for i, prompt in enumerate(prompts)
    ]
    write_lines(folder / "predictions.jsonl", lines)
    way = next(iter(answers))
    for judge in scores[way]:
        save(plot_frontier(result["policies"][way], judge, len(prompts)), folder / f"frontier_{judge}.png")


def format_table(metrics: dict[str, dict], judges: tuple[str, ...]) -> str:
    """Return the metrics of one way of sampling as a table, and a verdict for each policy."""
    width = max(map(len, metrics))
    lines = [f"{'':{width}}  " + "  ".join(f"{judge:>7}" for judge in judges) + "       kl  tokens  ended  repetition"]
    verdicts = []
    for name, row in metrics.items():
        means = "  ".join(f"{row[judge]['mean']:7.3f}" for judge in judges)
        kl = "-" if row["kl"] is None else f"{row['kl']:.2f}"
        kl = f"<={row['kl_bound']:.2f}" if "kl_bound" in row else kl
        lines.append(
            f"{name:{width}}  {means}  {kl:>7}  {row['length']:6.1f}  {row['ended']:5.2f}  {row['repetition']:10.3f}"
        )
        for judge in judges if name != START else ():
            result = row[judge]
            verdicts.append(
                f"{name}, {judge}: {result['difference']:+.3f} [{result['difference_low']:+.3f}, "
                f"{result['difference_high']:+.3f}], p = {result['p_value']:.2g}, wins {result['win_rate']:.2f} of "
                f"{result['prompts']}: {result['verdict']}"
            )
    return "\n".join(lines + verdicts)


@in_style
def plot_frontier(metrics: dict[str, dict], judge: str, prompts: int) -> Figure:
    """Plot the reward, with its interval over prompts, against KL and against length: a dot for each policy."""
    best = max(metrics, key=lambda name: metrics[name][judge]["mean"])
    by = "by the judge" if judge == "judge" else "by the reward model"
    figure, panels = new_figure(
        f"The highest mean reward {by} is that of {best}",
        f"Mean reward {by} on the same {prompts} prompts, with 95 % intervals over prompts.\n"
        "Above: against the KL to the start (for best of n, a bound). Below: against the length of the answers.",
        height=8.0, rows=2, left=0.13, gap=0.32, one_x=False,
    )  # fmt: skip
    for axes, key, label in zip(panels, ("kl", "length"), ("KL to the start (nats per answer)", "tokens"), strict=True):
        dots = {}
        for name, row in metrics.items():
            color = MUTED if name == START else ORANGE if "kl_bound" in row else BLUE
            x, reward = row.get("kl_bound", row["kl"]) if key == "kl" else row["length"], row[judge]
            axes.plot([x, x], [reward["low"], reward["high"]], color=color, linewidth=1.5, alpha=0.6)
            axes.plot(x, reward["mean"], "o", color=color, markersize=7)
            dots[name] = (x, reward["mean"])
        axes.set(xlabel=label, ylabel="mean reward")
        axes.margins(x=0.18)
        axes.grid(axis="y")
        name_dots(axes, dots)
    return figure


def name_dots(axes: Axes, dots: dict[str, tuple[float, float]]) -> None:
    """Write a name beside each dot (x, y), the lowest first; raise a name until it overlaps no other."""
    axes.autoscale_view()
    boxes: list[Bbox] = []
    points = 72 / axes.figure.dpi
    for name, dot in sorted(dots.items(), key=lambda item: item[1][1]):
        left, bottom = axes.transData.transform(dot) * points + (7, 5)
        box = Bbox.from_bounds(left, bottom, 6 * len(name), 11)  # about the size of the text
        while any(box.overlaps(other) for other in boxes):
            box = box.translated(0, 1)
        boxes.append(box)
        axes.annotate(name, dot, (7, 5 + box.y0 - bottom), textcoords="offset points", color=INK, fontsize=9.5)
