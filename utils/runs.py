"""The run folder: run.json, metrics.jsonl, whole-file writes, versions, and the names of runs."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils.script import first_process, lock_folder, needs, pick, processes, release, say, stop

MODELS = ("MODEL", "REWARD_MODEL", "JUDGE_MODEL", "POLICIES", "PROMPT_EMBEDDING_PATH")
INPUTS = (*MODELS, "DATA_DIR", "DATASET")  # constants that name what a run reads
READ = ("data_fingerprint", "reward_weights", "start", "rows_per_step")  # facts that differ if the inputs changed
PACKAGES = ("torch", "transformers", "datasets", "trl", "peft", "accelerate")
DATASETS = {"helpsteer": "HelpSteer", "ultrafeedback": "UFB", "oasst": "OASST"}  # part of the full name: short name
MODES = {"none": "Plain", "text": "Text", "embedding": "Emb"}  # GUIDANCE: its part of a run's name


class Run:
    """One run folder: create or resume it, add metrics, close it.

    A folder with a finished run, or an unfinished one with other settings, is moved aside to NAME-<time>. With
    `resume`, an unfinished run with the same settings and READ facts continues. Only the first process writes.
    began: time.monotonic() when the work started; 0 means now.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], resume: bool = True, began: float = 0.0, **facts: Any
    ) -> None:
        self.folder = Path(folder)
        self.began = began or time.monotonic()
        self.record: dict[str, Any] = {
            "script": Path(sys.argv[0]).name,
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "settings": settings,
            "seed": settings.get("SEED"),
            "commit": commit(),
            "versions": versions(),
            "processes": processes(),
            "started": time.strftime("%F %T", time.localtime(time.time() - time.monotonic() + self.began)),
            "finished": "",
            **facts,
        }
        if first_process():
            self.open_folder(settings, resume)

    def open_folder(self, settings: dict[str, Any], resume: bool) -> None:
        check_run_folder(self.folder, settings)
        lock_folder(self.folder)
        before = read_json(self.folder / "run.json")
        same = before and all(before.get(name, self.record.get(name)) == self.record.get(name) for name in READ)
        if same and not before["finished"] and resume and same_work(before["settings"], settings):
            say(f"{self.folder} contains an unfinished run with the same settings: resuming from its last checkpoint")
            self.record["seconds_before"] = before.get("seconds", 0) + before.get("seconds_before", 0)
        elif before:
            aside = free_name(f"{self.folder.resolve()}-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.folder.resolve(), aside)
            say(f"{self.folder} held another run: moved aside to {aside}")
        self.folder.resolve().mkdir(parents=True, exist_ok=True)  # resolve(): the target of a link
        write_json(self.folder / "run.json", self.record)
        (self.folder / "metrics.jsonl").touch()

    def log(self, step: int, **metrics: float) -> None:
        """Append a line to metrics.jsonl, with six digits; JSON has no nan or inf, so they become null."""
        values = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        self.append("metrics.jsonl", {"step": step, **values})

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to a .jsonl file of the folder."""
        if first_process():
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget_after(self, step: int, name: str = "metrics.jsonl") -> None:
        """Drop the lines of later steps, which a resumed run repeats."""
        if first_process() and (self.folder / name).exists():
            write_lines(self.folder / name, [line for line in read_lines(self.folder / name) if line["step"] <= step])

    def note(self, **facts: Any) -> None:
        """Add facts, the time so far and the peak memory to run.json."""
        self.record.update(facts, seconds=round(time.monotonic() - self.began, 2), peak_memory_gb=peak_memory_gb())
        if first_process():
            write_json(self.folder / "run.json", self.record)

    def finish(self, **facts: Any) -> None:
        """Close the run: the next run in this folder moves it aside."""
        self.note(**facts, finished=time.strftime("%F %T"))
        release(self.folder)


def check_run_folder(folder: str | Path, settings: dict[str, Any]) -> None:
    """Stop if OUTPUT_DIR is or contains an input of the run, or contains files that do not belong to a run."""
    folder = Path(folder)
    for name in INPUTS:
        value = settings.get(name) or ()
        for item in (value,) if isinstance(value, str) else value:
            path = Path(item).resolve()
            if folder.exists() and path.exists() and any(map(folder.samefile, (path, *path.parents))):
                stop(f"the run folder '{folder}' is or contains {name}, which this run reads: choose another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
        stop(f"OUTPUT_DIR = '{folder}' contains files that do not belong to a run: choose another folder")


def free_name(name: str) -> Path:
    """Return an unused path: two runs may be moved aside within one second."""
    candidates = (Path(name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in candidates if not path.exists())


def same_work(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return True if two runs have the same settings; RESUME and DEVICE do not count."""
    ignored = {"RESUME": None, "DEVICE": None}
    return {**before, **ignored} == {**json.loads(json.dumps(now)), **ignored}  # JSON turns tuples into lists


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a killed process leaves the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: str | Path, content: object) -> None:
    write_text(Path(path), json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: str | Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a .jsonl file, one object per line."""
    write_text(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file, {} if the file is missing."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, except a last line left incomplete by a killed process."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # splitlines() would also split at U+2028
    return [json.loads(line) for line in lines]


def commit() -> str:
    """Return the git commit of this code, with -dirty if files were changed."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    except FileNotFoundError:
        return "no git"
    return output.strip() or "no git"


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES, without importing them."""
    numbers = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GB: GPU memory if a GPU is used, else RAM."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e9, 3)
    import resource  # missing on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def short_dataset(name: str) -> str:
    """Return HelpSteer, UFB, OASST or Custom for the dataset_name of the metadata."""
    name = Path(name).name if Path(name).exists() else name  # of a local file, without its folders
    return next((short for part, short in DATASETS.items() if part in name.lower()), "Custom")


def short_model(name: str) -> str:
    """Return a model's name without owner and -Instruct; DeepSeek-R1-Distill-Qwen-1.5B: DeepSeek-R1-Qwen1.5B."""
    short = Path(name.rstrip("/")).name
    short = re.sub(r"-[Ii]nstruct\b", "", short)
    return re.sub(r"-Distill-([A-Za-z]+)-(\d)", r"-\1\2", short)


def run_names(dataset: str, mode: str, model: str, loss: str, beta: float, alpha: float) -> tuple[str, str]:
    """Return (project, run): HelpSteer_dpo_Text and HelpSteer-Text-Qwen2.5-1.5B-dpo-beta0.1-alpha0.1.

    dataset: dataset_name of the metadata. mode: Plain, Text or Emb. model: its short name.
    """
    run = f"{short_dataset(dataset)}-{mode}-{model}-{loss}-beta{beta:g}-alpha{alpha:g}"
    return f"HelpSteer_{loss}_{mode}", run


def main(words: list[str]) -> None:
    """Print project and run for train_helpsteer.sh."""
    data_dir, guidance, short, model, loss, beta, alpha = words
    mode = pick(MODES, "TRAINING_MODE", guidance)
    metadata = read_json(needs(Path(data_dir) / "metadata.json", made_by="load_helpsteer_dataset.py"))
    print(*run_names(metadata["dataset_name"], mode, short or short_model(model), loss, float(beta), float(alpha)))


if __name__ == "__main__":
    main(sys.argv[1:])
