"""The same run with several seeds: an interval over test pairs says nothing about the chance in the training."""

import statistics
import subprocess
import sys
from pathlib import Path

from utils.files import read_json, write_json
from utils.machine import processes
from utils.runs import same_work, say, stop


def run_seeds(settings: dict, seeds: tuple, output_dir: str, figures: tuple[str, ...]) -> dict:
    """Start this script once for each of SEEDS, and write mean and spread of some figures of eval.json.

    Each run is a process of its own, in OUTPUT_DIR-seeds/SEED, and goes on where it was stopped; one that is there is
    taken, unless the rows are others now or MODEL has been made again since. Returns what is written to
    OUTPUT_DIR-seeds/seeds.json: seeds, and for each figure values, mean, and std (of a sample, None for one). Ends the
    script with the exit code of a run that fails.
    """
    folder, seeds = Path(f"{Path(output_dir)}-seeds"), checked(seeds)
    rows = read_json(Path(settings["DATA_DIR"]) / "metadata.json").get("fingerprint")
    made = read_json(Path(settings.get("MODEL", "")) / "run.json").get("finished", "")
    for seed in seeds:
        mine = settings | {"SEED": seed, "SEEDS": (), "OUTPUT_DIR": str(folder / str(seed))}
        before = read_json(folder / str(seed) / "run.json")
        same = before.get("data_fingerprint") == rows and before.get("started", "") >= made
        if same and before.get("finished") and same_work(before["settings"], mine):
            say(f"seed {seed}: {folder / str(seed)} is there")
            continue
        say(f"seed {seed}:")
        options = [f"--{name.lower()}={as_option(value)}" for name, value in mine.items()]
        code = subprocess.run([sys.executable, sys.argv[0], *options]).returncode
        if code:
            sys.exit(code)
    summary = over_seeds(seeds, [read_json(folder / str(seed) / "eval.json") for seed in seeds], figures)
    write_json(folder / "seeds.json", summary)
    say(f"written: {folder}/seeds.json")
    return summary


def as_option(value: object) -> str:
    """Return a setting as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def checked(seeds: tuple) -> list[int]:
    """SEEDS as numbers; ends the script where one is none or comes twice, or a launcher has started several of us."""
    if not all(str(seed).isdigit() for seed in seeds):
        stop(f"SEEDS = {','.join(map(str, seeds))}: expected whole numbers such as 1,2,3")
    numbers = [int(seed) for seed in seeds]
    if len(set(numbers)) < len(numbers):
        stop(f"SEEDS = {','.join(map(str, seeds))}: each once, a second run of a seed is no second draw")
    if processes() > 1:
        stop("SEEDS starts a run for each seed, which cannot share a launcher's processes: launch each one with --seed")
    return numbers


def over_seeds(seeds: list[int], results: list[dict], figures: tuple[str, ...]) -> dict:
    """The content of seeds.json, told aloud. results: the eval.json of each seed."""
    summary = {"seeds": seeds}
    for name in figures:
        values = [result[name] for result in results]
        if None not in values:  # a figure of pairs that these rows do not have
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[name] = {"values": values, "mean": statistics.fmean(values), "std": std}
            spread = f"+- {std:.3f} over {len(seeds)} seeds" if std is not None else "with one seed"
            say(f"{name}: {summary[name]['mean']:.3f} {spread}")
    return summary
