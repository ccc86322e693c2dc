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

from utils.script import first_process, lock_folder, processes, release, say, stop

MODELS = ("MODEL", "REWARD_MODEL", "JUDGE_MODEL", "POLICIES", "PROMPT_EMBEDDING_PATH")
INPUTS = (*MODELS, "DATA_DIR", "DATASET")  # constants that name what a run reads
READ = ("data_fingerprint", "reward_weights", "start", "rows_per_step")  # facts: whether the same was read under these
PACKAGES = ("torch", "transformers", "datasets", "trl", "peft", "accelerate")
DATASETS = (("helpsteer", "HelpSteer"), ("ultrafeedback", "UFB"), ("oasst", "OASST"))  # in a dataset's name: short
MODES = {"none": "Plain", "text": "Text", "embedding": "Emb"}  # what GUIDANCE may name: what runs are called by it


class Run:
    """One run folder: created or taken up again at the start, filled with metrics, closed at the end.

    A folder that holds a finished run, or an unfinished one with other settings, is moved aside whole to
    NAME-<time>. An unfinished one with the same settings and READ facts is taken up when `resume` is true. Only the
    first process writes. began: time.monotonic() of the start of the work, where that was earlier.
    """

    def __init__(self, folder: str | Path, settings: dict, resume: bool = True, began: float = 0.0, **facts: object):
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
            self.take_folder(settings, resume)

    def take_folder(self, settings: dict, resume: bool) -> None:
        check_run_folder(self.folder, settings)
        lock_folder(self.folder)
        before = read_json(self.folder / "run.json")
        same = before and all(before.get(name, self.record.get(name)) == self.record.get(name) for name in READ)
        if same and not before["finished"] and resume and same_work(before["settings"], settings):
            say(f"{self.folder} holds an unfinished run with the same settings: going on from its last checkpoint")
            self.record["seconds_before"] = before.get("seconds", 0) + before.get("seconds_before", 0)
        elif before:
            aside = free_name(f"{self.folder.resolve()}-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.folder.resolve(), aside)
            say(f"{self.folder} held another run: moved aside to {aside}")
        self.folder.resolve().mkdir(parents=True, exist_ok=True)  # of a link: what it points to
        write_json(self.folder / "run.json", self.record)
        (self.folder / "metrics.jsonl").touch()

    def log(self, step: int, **metrics: float) -> None:
        """Append one line of metrics.jsonl, of six digits; null for what is not finite, which JSON has no word for."""
        metrics = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        self.append("metrics.jsonl", {"step": step, **metrics})

    def append(self, name: str, line: dict) -> None:
        """Append one line to a .jsonl file of the folder."""
        if first_process():
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget_after(self, step: int, name: str = "metrics.jsonl") -> None:
        """Drop the lines of steps that a resumed run will do again."""
        if first_process() and (self.folder / name).exists():
            kept = [line for line in read_lines(self.folder / name) if line["step"] <= step]
            write_lines(self.folder / name, kept)

    def note(self, **facts: object) -> None:
        """Put facts, the time so far and the peak memory into run.json."""
        self.record.update(facts, seconds=round(time.monotonic() - self.began, 2), peak_memory_gb=peak_memory_gb())
        if first_process():
            write_json(self.folder / "run.json", self.record)

    def finish(self, **facts: object) -> None:
        """Close the run: a later start with the same folder moves it aside instead of going on."""
        self.note(**facts, finished=time.strftime("%F %T"))
        release(self.folder)


def check_run_folder(folder: str | Path, settings: dict) -> None:
    """End the script where OUTPUT_DIR is what the run reads, or holds files of no run: nobody's to move aside."""
    folder = Path(folder)
    for name in INPUTS:
        given = settings.get(name) or ()
        for value in (given,) if isinstance(given, str) else given:
            path = Path(value).resolve()
            if (
                path.exists()
                and folder.exists()
                and any(it.exists() and it.samefile(folder) for it in (path, *path.parents))
            ):
                stop(f"the run folder '{folder}' is or holds {name}, which this run reads: choose another name")
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
        stop(f"OUTPUT_DIR = '{folder}' holds files but no run of a script here: choose another name")


def free_name(name: str) -> Path:
    """A path that is not there yet: two runs may be moved aside within a second."""
    tries = (Path(name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in tries if not path.exists())


def same_work(before: dict, now: dict) -> bool:
    """Whether two runs are one and the same work; RESUME and DEVICE say how it is done, not what."""
    how = {"RESUME", "DEVICE"}
    now = json.loads(json.dumps(now))  # tuples are lists in the record
    return {k: v for k, v in before.items() if k not in how} == {k: v for k, v in now.items() if k not in how}


def write_text(path: Path, text: str) -> None:
    """Write a file beside its name and rename it when whole, so that a kill leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: str | Path, content: object) -> None:
    write_text(Path(path), json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: str | Path, lines: Iterable[dict]) -> None:
    """A .jsonl file: an object a line."""
    write_text(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_json(path: str | Path) -> dict:
    """The content of a JSON file, {} where there is none."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def read_lines(path: str | Path) -> list[dict]:
    """The objects of a .jsonl file of ours; a last line that a kill has cut off is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # splitlines() would also cut a text at U+2028
    return [json.loads(line) for line in lines]


def commit() -> str:
    """The git commit that this code stands at, with -dirty where files differ from it."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    except FileNotFoundError:
        return "no git"
    return done.stdout.strip() or "no git"


def versions() -> dict[str, str]:
    """{"python" or a package: its version}, without importing any."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory_gb() -> float:
    """The most memory that this process held so far: of the GPU where one is used, else of the process (GB)."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 1e9, 3)
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def short_dataset(name: str) -> str:
    """HelpSteer, UFB, OASST or Custom, by the dataset_name of the metadata."""
    name = Path(name).name if Path(name).exists() else name  # of a local file not the folders above it
    return next((short for part, short in DATASETS if part in name.lower()), "Custom")


def short_model(name: str) -> str:
    """A model's name without owner and -Instruct; DeepSeek-R1-Distill-Qwen-1.5B becomes DeepSeek-R1-Qwen1.5B."""
    short = Path(name.rstrip("/")).name
    short = re.sub(r"-[Ii]nstruct\b", "", short)
    return re.sub(r"-Distill-([A-Za-z]+)-(\d)", r"-\1\2", short)


def run_names(dataset: str, mode: str, model: str, loss: str, beta: float, alpha: float) -> tuple[str, str]:
    """(project, run): HelpSteer_dpo_Text and HelpSteer-Text-Qwen2.5-1.5B-dpo-beta0.1-alpha0.1.

    dataset: dataset_name of the metadata. mode: Plain, Text or Emb. model: as it is to be called.
    """
    run = f"{short_dataset(dataset)}-{mode}-{model}-{loss}-beta{beta:g}-alpha{alpha:g}"
    return f"HelpSteer_{loss}_{mode}", run


def main(words: list[str]) -> None:
    """Print project and run for DATA_DIR, GUIDANCE, MODEL_SHORT_NAME, MODEL, LOSS, BETA, ALPHA: for shell scripts."""
    data_dir, guidance, short, model, loss, beta, alpha = words
    metadata = read_json(Path(data_dir) / "metadata.json")
    mode, name = MODES[guidance], short or short_model(model)
    print(*run_names(metadata["dataset_name"], mode, name, loss, float(beta), float(alpha)))


if __name__ == "__main__":
    main(sys.argv[1:])
