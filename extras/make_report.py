"""Write one self-contained page with the verdict, figures, mistakes and settings of every run, from its files.

Reads  : run folders (run.json, eval.json, predictions.jsonl, samples.jsonl, PNG files), summaries of the data
Writes : outputs/report.html

python -m extras.make_report
python -m extras.make_report --runs outputs/reward_model,outputs/evaluation --output outputs/reward.html
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from utils.config import override_constants
from utils.runs import read_json, read_lines, write_text
from utils.script import needs, say, script, stop

RUNS = ()  # run folders such as outputs/reward_model, () = all under LOOK_IN
LOOK_IN = ("outputs", "model_output")  # folders to search for runs and summaries
OUTPUT = "outputs/report.html"  # the page

FIGURES = {  # file in a run folder: what it shows
    "accuracy.png": "Pair accuracy of the model, of shortcuts, and by group of pairs",
    "rewards.png": "Rewards of chosen and rejected answers",
    "reliability.png": "Calibration: accuracy by confidence",
    "coverage.png": "Accuracy if it abstains on unsure pairs",
    "frontier_reward.png": "Reward against KL and length",
    "frontier_judge.png": "The judge's reward against KL and length",
    "training_curves.png": "Training curves",
}
DATA_FIGURES = {  # the same for a summary of the data
    "token_lengths.png": "Lengths before and in the window",
    "rating_gaps.png": "Rating gaps",
    "length_by_gap.png": "Length of the chosen answer, by rating gap",
    "shortcuts.png": "Pair accuracy of shortcuts that only count",
}
OVER_SEEDS = {  # script: metrics of eval.json to average over runs that differ in SEED only
    "train_reward_model.py": ("accuracy", "length_matched_accuracy", "length_correlation"),
    "train_dpo.py": ("accuracy",),
}
KINDS = {  # kind of run: (a key of its eval.json, the command that makes it); the first match wins
    "reward": ("shortcuts", "train_reward_model.py"),
    "comparison": ("policies", "-m extras.evaluate with POLICIES"),
    "policy": ("margin", "train_dpo.py"),
    "sft": ("perplexity_after", "-m extras.train_sft"),
    "reinforce": ("mean_reward_after", "train_reinforce.py"),
}


def find_runs(names: tuple[str, ...], places: tuple[str, ...]) -> list[Path]:
    """Return the folders named, or all with a run.json under the places, except runs that were moved aside."""
    if names:
        return [needs(Path(name) / "run.json", made_by="train_reward_model.py").parent for name in names]
    folders = sorted(path.parent for place in places for path in Path(place).glob("**/run.json"))
    suffix = re.compile(r"-\d{8}-\d{6}(-\d+)?$")  # utils.runs.Run appends it to a run that it moves aside
    aside = [
        path for path in folders if suffix.search(path.name) and path.with_name(suffix.sub("", path.name)) in folders
    ]
    if aside:
        say(f"moved aside, so left out: {', '.join(map(str, aside))}")
    return [path for path in folders if path not in aside]


def pictures(folder: Path, captions: dict[str, str]) -> list[tuple[str, str]]:
    """Return [(caption, data URL)] of the PNG files that a folder has."""
    return [
        (caption, "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode())
        for name, caption in captions.items()
        if (folder / name).exists()
    ]


def read_run(folder: Path) -> dict:
    """Return what the template needs of a run: name, record (run.json), result (eval.json), kind, figures, samples."""
    record, result = read_json(folder / "run.json"), read_json(folder / "eval.json")
    kind = next((kind for kind, (key, _) in KINDS.items() if key in result), "other")
    path = folder / ("samples.jsonl" if kind == "policy" else "predictions.jsonl")
    samples = read_lines(path)[:8] if kind != "reward" and path.exists() else []  # as many as people read
    run = {"name": str(folder), "record": record, "result": result, "kind": kind, "samples": samples}
    return run | {"figures": pictures(folder, FIGURES)}


def read_summaries(places: tuple[str, ...]) -> list[dict]:
    """Return the summaries of dataset_summary.py under the places: name, table as text, figures."""
    from utils.evaluation.data_report import format_summary

    summaries = []
    for path in sorted(path for place in places for path in Path(place).glob("**/summary.json")):
        summary = read_json(path)
        text = format_summary(summary, [name for name in ("train", "validation", "test") if name in summary])
        summaries.append({"name": str(path.parent), "text": text, "figures": pictures(path.parent, DATA_FIGURES)})
    return summaries


def over_seeds(runs: list[dict]) -> list[dict]:
    """Return one entry for each group of runs that differ in SEED only.

    Entries: runs (their names), seeds, metrics ({name: values, mean, std}).
    """
    groups = []
    for made_by, metrics in OVER_SEEDS.items():
        by_name = {run["name"]: run for run in runs if run["record"].get("script") == made_by and run["result"]}
        if len(by_name) < 2:
            continue  # saves the import, which takes seconds
        from extras.lib.frontier import recipes, spread

        for names in recipes({name: name for name in by_name}).values():
            values = {metric: [by_name[name]["result"].get(metric) for name in names] for metric in metrics}
            spreads = {metric: spread(each) for metric, each in values.items() if None not in each}
            seeds = [by_name[name]["record"]["seed"] for name in names]
            if len(names) > 1:
                groups.append({"runs": names, "seeds": seeds, "metrics": spreads})
    return groups


def missing(runs: list[dict], data: list[dict]) -> list[str]:
    """Return the commands that made no run of the report."""
    kinds = {run["kind"] for run in runs}
    commands = [command for kind, (_, command) in KINDS.items() if kind not in kinds]
    return [f"python {command}" for command in commands + ([] if data else ["dataset_summary.py"])]


def page(runs: list[dict], seeds: list[dict], data: list[dict], absent: list[str]) -> str:
    """Return the report as HTML, with all texts escaped. seeds: of `over_seeds`. absent: of `missing`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from extras.lib.questions import questions
    from utils.evaluation.baselines import SHORTCUT_NAMES

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "lib"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        runs=runs, seeds=seeds, data=data, missing=absent, names=SHORTCUT_NAMES, questions=questions(runs)
    )


@script
def main(settings: dict) -> None:
    folders, places = find_runs(RUNS, LOOK_IN), () if RUNS else LOOK_IN
    runs, data = [read_run(folder) for folder in folders], read_summaries(places)
    if not runs and not data:
        stop(f"no run.json under {' or '.join(LOOK_IN)}: run `python train_reward_model.py` first, or name RUNS")
    Path(OUTPUT).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(OUTPUT), page(runs, over_seeds(runs), data, [] if RUNS else missing(runs, data)))
    unfinished = [run["name"] for run in runs if not run["result"]]
    if unfinished:
        say(f"not finished yet, so without figures: {', '.join(unfinished)}")
    say(f"written: {OUTPUT}, {len(runs)} runs, {Path(OUTPUT).stat().st_size / 1e6:.1f} MB: open it in a browser")


if __name__ == "__main__":
    main(override_constants(globals()))
