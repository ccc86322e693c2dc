"""One page that needs nothing else: every run's verdict, figures, mistakes, settings, from the files of its folder.

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

RUNS = ()  # run folders such as outputs/reward_model, () = all that lie under LOOK_IN
LOOK_IN = ("outputs", "model_output")  # where run folders are looked for
SAMPLES = 8  # answers before and after that are shown of a run
OUTPUT = "outputs/report.html"  # the page

FIGURES = {  # file in a run folder: what it shows
    "accuracy.png": "Pair accuracy of the model, of shortcuts, and on parts of the pairs",
    "rewards.png": "Rewards of chosen and rejected answers",
    "reliability.png": "How sure it is against how often it is right",
    "coverage.png": "Accuracy when it abstains",
    "frontier_reward.png": "Reward against KL and length",
    "frontier_judge.png": "The judge's reward against KL and length",
    "training_curves.png": "Curves of the training",
}
DATA = {  # the same of a summary of the data
    "token_lengths.png": "Lengths, and what the window leaves of them",
    "rating_gaps.png": "How far the ratings of a pair lie apart",
    "length_by_gap.png": "The longer answer, by rating gap",
    "shortcuts.png": "What counting alone gets right",
}
OVER_SEEDS = {  # script: figures of eval.json with mean and standard deviation over runs that differ in SEED only
    "train_reward_model.py": ("accuracy", "length_matched_accuracy", "length_correlation"),
    "train_dpo.py": ("accuracy",),
}
KINDS = {  # kind of run: a key of its eval.json, looked for in this order, and what makes such a run
    "reward": ("shortcuts", "train_reward_model.py"),
    "comparison": ("policies", "-m extras.evaluate with POLICIES"),
    "policy": ("margin", "train_dpo.py"),
    "sft": ("perplexity_after", "-m extras.train_sft"),
    "reinforce": ("mean_reward_after", "train_reinforce.py"),
}


def find_runs(named: tuple[str, ...], places: tuple[str, ...]) -> list[Path]:
    """The folders named, or all with a run.json under the places; an end to the script where a named one is missing.

    Runs that were moved aside, beside the one that took their place, are left out.
    """
    if named:
        return [needs(Path(name) / "run.json", made_by="train_reward_model.py").parent for name in named]
    found = sorted(path.parent for place in places for path in Path(place).glob("**/run.json"))
    aside = re.compile(r"-\d{8}-\d{6}(-\d+)?$")  # what utils.runs.Run puts behind a name
    older = [path for path in found if aside.search(path.name) and path.with_name(aside.sub("", path.name)) in found]
    if older:
        say(f"moved aside, so left out: {', '.join(map(str, older))}")
    return [path for path in found if path not in older]


def picture(path: Path) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def read_run(folder: Path, shown: int) -> dict:
    """What the template needs of a run folder: name, record (run.json), result (eval.json), figures, some samples."""
    figures = [(text, picture(folder / name)) for name, text in FIGURES.items() if (folder / name).exists()]
    record, result = read_json(folder / "run.json"), read_json(folder / "eval.json")
    kind = next((kind for kind, (key, _) in KINDS.items() if key in result), "other")
    file = folder / ("samples.jsonl" if kind == "policy" else "predictions.jsonl")
    lines = read_lines(file)[:shown] if kind != "reward" and file.exists() else []
    found = {"name": str(folder), "record": record, "result": result, "figures": figures, "kind": kind}
    return found | {"samples": lines}


def read_summaries(places: tuple[str, ...]) -> list[dict]:
    """What dataset_summary.py left under the places: name, its table as text, its figures."""
    from utils.evaluation.data_report import format_summary

    found = []
    for path in sorted(path for place in places for path in Path(place).glob("**/summary.json")):
        summary = read_json(path)
        splits = [name for name in ("train", "validation", "test") if name in summary]
        figures = [
            (text, picture(path.with_name(name))) for name, text in DATA.items() if path.with_name(name).exists()
        ]
        found.append({"name": str(path.parent), "text": format_summary(summary, splits), "figures": figures})
    return found


def over_seeds(runs: list[dict]) -> list[dict]:
    """Return one entry for each group of runs that differ in SEED only.

    Entries: runs (their names), seeds, figures ({name: values, mean, std}).
    """
    found = []
    for made_by, figures in OVER_SEEDS.items():
        mine = {run["name"]: run for run in runs if run["record"].get("script") == made_by and run["result"]}
        if len(mine) < 2:
            continue  # saves the import, which takes seconds
        from extras.lib.frontier import recipes, spread

        for names in recipes({name: name for name in mine}).values():
            values = {figure: [mine[name]["result"].get(figure) for name in names] for figure in figures}
            known = {figure: spread(each) for figure, each in values.items() if None not in each}
            if len(names) > 1:
                found.append({"runs": names, "seeds": [mine[n]["record"]["seed"] for n in names], "figures": known})
    return found


def missing(runs: list[dict], data: list[dict]) -> list[str]:
    """The commands of which there is no run in the report."""
    made = {run["kind"] for run in runs}
    absent = [command for kind, (_, command) in KINDS.items() if kind not in made]
    return [f"python {command}" for command in absent + ([] if data else ["dataset_summary.py"])]


def page(runs: list[dict], seeds: list[dict], data: list[dict], absent: list[str]) -> str:
    """Return the report as HTML; the template engine escapes texts of the rows.

    seeds: see `over_seeds`. absent: commands that were not run.
    """
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
    runs, data = [read_run(folder, SAMPLES) for folder in folders], read_summaries(places)
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
