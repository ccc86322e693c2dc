"""Several policies against their start: reward, a judge's reward, KL and length of each, and the chance of the seed."""

import json
import statistics
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from torch import nn

from utils.data.preferences import Message, with_persona
from utils.evaluation.plots import BLUE, INK, MUTED, ORANGE, in_style, new_figure, save
from utils.evaluation.policy_report import Answers, Sampler, comparison_of, rewards_of
from utils.evaluation.statistics import interval, mean_kl, paired_difference
from utils.models.reward_model import RewardModel
from utils.runs import READ, read_json, write_json, write_lines
from utils.script import stop

START = "start"
NOT_THE_WORK = {
    "SEED",
    "OUTPUT_DIR",
    "MODEL_SHORT_NAME",
    "RESUME",
    "DEVICE",
    "REPORT_TO",
    "EVAL_PROMPTS",
    "JUDGE_MODEL",
}  # in which runs of one recipe may differ
Prompts = list[list[Message]]


def names_of(folders: tuple[str, ...]) -> dict[str, str]:
    """{short name: folder or hub name}: the last part where it tells them apart, else all of it."""
    folders = [folder.rstrip("/") for folder in folders]
    short = [Path(folder).name for folder in folders]
    names = short if len({*short, START}) == len(short) + 1 else folders
    if len(set(names)) < len(names) or START in names:
        stop(f"POLICIES = {','.join(folders)}: each once, and none called {START!r}")
    return dict(zip(names, folders, strict=True))


def check_judge(policies: dict[str, str], judge: str) -> None:
    """End the script where a policy was trained on the judge."""
    for folder in policies.values():
        if judge and Path(judge).resolve() in trained_on(folder):
            stop(f"JUDGE_MODEL = {judge!r} is what {folder} was trained on: name one that no policy was trained on")


def trained_on(folder: str, deep: int = 9) -> set[Path]:
    """The reward models whose judgement is in a policy: by REINFORCE, by pairs that they ranked, or before, in MODEL.

    deep: so many trainings back.
    """
    record = read_json(Path(folder) / "run.json")
    settings = record.get("settings", {})
    found = {settings["REWARD_MODEL"]} if record.get("script") == "train_reinforce.py" else set()
    made = read_json(Path(settings.get("DATA_DIR") or ".") / "metadata.json").get("settings", {})
    if made.get("MODE") == "ranked" and record.get("script") != "train_reinforce.py":  # which takes the prompts only
        found.add(made["REWARD_MODEL"])
    earlier = trained_on(settings["MODEL"], deep - 1) if settings.get("MODEL") and deep else set()
    return {Path(name).resolve() for name in found if name} | earlier


def answers_of(
    policies: dict[str, str],
    start: nn.Module,
    load: Callable[[str], nn.Module],
    prompts: Prompts,
    samplers: dict[str, Sampler],
    best_of: int,
    judge: RewardModel,
    persona: str = "",
) -> dict[str, dict[str, Answers]]:
    """{way of sampling: {name: answers}} of the start, best of n of it, and every policy, loaded one at a time.

    persona: a system turn, with which the start and every policy also answer, as `NAME with persona`.
    """
    played = [with_persona(said, persona) for said in prompts]
    found = {way: {START: sampler.answers(start, start, prompts)} for way, sampler in samplers.items()}
    if best_of > 1:
        first = next(iter(samplers))  # greedy answers would all be the same
        found[first][f"best of {best_of}"] = samplers[first].best_of(best_of, start, prompts, judge)
    for name, folder in {START: "", **policies}.items():
        model = load(folder) if folder else start
        for way, sampler in samplers.items():
            if folder:
                found[way][name] = sampler.answers(model, start, prompts, progress=f"{name}, {way}")
            if persona:
                said = f"{name} with persona"
                found[way][said] = sampler.answers(model, start, prompts, progress=said, seen=played)
    return found


def side_by_side(
    answers: dict[str, Answers], prompts: Prompts, judges: dict[str, RewardModel]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict]]:
    """({judge: {name: rewards [prompts]}}, {name: figures}) of one way of sampling.

    Figures: those of a comparison with the start by each judge, and `mean` of the reward with its interval.
    """
    scores = {
        judge: {name: rewards_of(model, prompts, side.answers) for name, side in answers.items()}
        for judge, model in judges.items()
    }
    figures = {}
    for name, side in answers.items():
        figures[name] = {**side.metrics(), **mean_kl(side.kl)}
        if side.kl_bound is not None:
            figures[name]["kl_bound"] = side.kl_bound
        for judge, all_scores in scores.items():
            mine = all_scores[name]
            low, high = interval(mine)
            figures[name][judge] = {"mean": float(mine.mean()), "low": low, "high": high}
            if name != START:
                figures[name][judge] |= comparison_of(answers[START], side, (all_scores[START], mine))
    return scores, figures


def recipes(policies: dict[str, str]) -> dict[str, list[str]]:
    """Group runs, {name: folder}, that differ in their seed only. Return {name of the first run: names}.

    A second run with the same seed is no second draw and forms its own group.
    """
    found: dict[str, dict[int, str]] = {}
    for name, folder in policies.items():
        record = read_json(Path(folder) / "run.json")
        settings = record.get("settings", {"folder": folder})
        work = {k: v for k, v in settings.items() if k not in NOT_THE_WORK}
        work |= {f"read {k}": record.get(k) for k in READ if not (k == "start" and settings.get("USE_LORA"))}
        key = json.dumps(work, sort_keys=True)  # the start of a run with adapters depends on its seed
        seed = settings.get("SEED", 0)
        key = key if seed not in found.get(key, {}) else name
        found.setdefault(key, {})[seed] = name
    return {names[0]: names for names in (list(runs.values()) for runs in found.values())}


def over_seeds(groups: dict[str, list[str]], scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """For each judge: what every recipe gains over the start, from seed to seed, and the recipes against each other.

    gains: {recipe: values (one a run), mean, std (of a sample; None for one run)}. between: the paired difference of
    the means over runs of two recipes, on the same prompts; its interval and p cover the prompts. p_over_seeds covers
    the training's chance (Welch's test of the runs' values; None where a recipe has one run, or no runs differ).
    """
    found = {}
    for judge, by_name in scores.items():
        means = {group: np.mean([by_name[name] for name in names], axis=0) for group, names in groups.items()}
        gains = {}
        for group, names in groups.items():
            gains[group] = {"runs": names, **spread([float((by_name[n] - by_name[START]).mean()) for n in names])}
        between = [
            {"one": a, "other": b, **paired_difference(means[a], means[b])}
            | {"p_over_seeds": p_over_seeds(gains[a]["values"], gains[b]["values"])}
            for a, b in combinations(groups, 2)
        ]
        found[judge] = {"gains": gains, "between": between}
    return found


def spread(values: list[float]) -> dict:
    """Return the values of several runs, one each, with their mean and std (of a sample; None for one run)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "std": std}


def p_over_seeds(one: list[float], other: list[float]) -> float | None:
    """Two-sided p of Welch's test of two recipes' gains, a value a run; None where no spread is known."""
    from scipy.stats import ttest_ind

    if min(len(one), len(other)) < 2 or len({*one}) == len({*other}) == 1:
        return None
    return float(ttest_ind(one, other, equal_var=False).pvalue)


@in_style
def frontier(figures: dict[str, dict], judge: str, prompts: int) -> Figure:
    """Reward (y, with its interval over prompts) against KL and against length, a dot for each policy."""
    best = max(figures, key=lambda name: figures[name][judge]["mean"])
    by = "by the judge" if judge == "judge" else "by the reward model"
    figure, panels = new_figure(
        f"The highest mean reward {by} is that of {best}",
        f"Mean reward {by} on the same {prompts} prompts, with 95 % intervals over prompts. Above, by its cost: the\n"
        "KL to the start (for best of n a bound); below, by the length of the answers.",
        height=8.0, rows=2, gap=0.32, one_x=False,
    )  # fmt: skip
    costs = {
        name: {"kl": found.get("kl_bound", found["kl"]), "length": found["length"]} for name, found in figures.items()
    }
    for axes, key, label in zip(panels, ("kl", "length"), ("KL to the start (nats an answer)", "tokens"), strict=True):
        for name, found in figures.items():
            color = MUTED if name == START else ORANGE if "kl_bound" in found else BLUE
            x, y = costs[name][key], found[judge]["mean"]
            axes.plot([x, x], [found[judge]["low"], found[judge]["high"]], color=color, linewidth=1.5, alpha=0.6)
            axes.plot(x, y, "o", color=color, markersize=7)
        axes.set(xlabel=label, ylabel="mean reward")
        axes.margins(x=0.18)
        axes.grid(axis="y")
        name_dots(axes, {name: (costs[name][key], found[judge]["mean"]) for name, found in figures.items()})
    return figure


def name_dots(axes: Axes, dots: dict[str, tuple[float, float]]) -> None:
    """Write names beside dots (x, y), the lowest first; one that would lie on another goes up until it does not."""
    axes.autoscale_view()
    placed: list[Bbox] = []
    points = 72 / axes.figure.dpi
    for name, dot in sorted(dots.items(), key=lambda item: item[1][1]):
        left, middle = axes.transData.transform(dot) * points + (7, 5)
        box = Bbox.from_bounds(left, middle, 6 * len(name), 11)  # about what it takes at this size
        while any(box.overlaps(other) for other in placed):
            box = box.translated(0, 1)
        placed.append(box)
        up = box.y0 - middle
        axes.annotate(name, dot, (7, 5 + up), textcoords="offset points", color=INK, fontsize=9.5)


def format_table(figures: dict[str, dict], judges: tuple[str, ...]) -> str:
    """The figures of one way of sampling as a table, and a verdict for each policy."""
    width = max(map(len, figures))
    lines = [f"{'':{width}}  " + "  ".join(f"{judge:>7}" for judge in judges) + "       kl  tokens  ended  repetition"]
    for name, found in figures.items():
        means = "  ".join(f"{found[judge]['mean']:7.3f}" for judge in judges)
        kl = "-" if found["kl"] is None else f"{found['kl']:.2f}"
        kl = f"<={found['kl_bound']:.2f}" if "kl_bound" in found else kl
        rest = f"{kl:>7}  {found['length']:6.1f}  {found['ended']:5.2f}  {found['repetition']:10.3f}"
        lines.append(f"{name:{width}}  {means}  {rest}")
    for name, found in figures.items():
        for judge in judges:
            if "verdict" in found[judge]:
                it = found[judge]
                lines.append(
                    f"{name}, {judge}: {it['difference']:+.3f} [{it['difference_low']:+.3f}, "
                    f"{it['difference_high']:+.3f}], p = {it['p_value']:.2g}, wins {it['win_rate']:.2f} of "
                    f"{it['prompts']}: {it['verdict']}"
                )
    return "\n".join(lines)


def write_results(
    folder: Path, result: dict, prompts: list[str], answers: dict[str, dict], scores: dict[str, dict]
) -> None:
    """eval.json, predictions.jsonl (a line for each prompt and way of sampling), and a frontier for each judge."""
    write_json(folder / "eval.json", result)
    lines = [
        {
            "prompt": prompt,
            "way": way,
            "answers": {name: side.answers[i].text for name, side in sides.items()},
            "log_ratios": {name: float(side.kl[i]) for name, side in sides.items() if side.kl is not None},
        }
        | {judge: {name: float(values[i]) for name, values in one.items()} for judge, one in scores[way].items()}
        for way, sides in answers.items()
        for i, prompt in enumerate(prompts)
    ]
    write_lines(folder / "predictions.jsonl", lines)
    way = next(iter(answers))
    for judge in scores[way]:
        save(frontier(result["policies"][way], judge, len(prompts)), folder / f"frontier_{judge}.png")
