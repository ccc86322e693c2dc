"""How a script ends, and what its run leaves behind: run.json once, a line of metrics.jsonl per step.

Reports read these files only.
"""

import errno
import functools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from utils.config import missing_package
from utils.files import read_json, read_lines, write_json, write_lines
from utils.machine import commit, peak_memory_gb, processes, versions

if TYPE_CHECKING:
    from filelock import FileLock

MODELS = ("MODEL", "REWARD_MODEL", "JUDGE_MODEL", "POLICIES", "PROMPT_EMBEDDING_PATH")
INPUTS = (*MODELS, "DATA_DIR", "DATASET")  # constants that name what a run reads
READ = ("data_fingerprint", "reward_weights", "start", "rows_per_step")  # facts: whether the same was read under these
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # a GPU's words, a CPU's, Windows'
SAVE_MEMORY = ("GRADIENT_CHECKPOINTING", "USE_LORA")
TAKE_MEMORY = ("GENERATION_BATCH", "MAX_NEW_TOKENS", "MAX_LENGTH", "BATCH_SIZE")  # see TOKENS_AT_ONCE in utils/pairs.py
LOCKS: dict[Path, "FileLock"] = {}  # run folders that this process holds
ENVIRONMENT = {  # set before torch is imported; what the user has set wins
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # operations that Apple's GPU lacks run on the CPU
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0",  # an error instead of a machine that swaps to death
    "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # no warning when a data loader forks
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}


def first_process() -> bool:
    """True on the process that prints and writes (launchers set RANK; without one there is a single process)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line, once per run and not once per process."""
    if first_process():
        print(message, flush=True)


def bar_off(shown: bool = True) -> bool | None:
    """tqdm's `disable`: None shows a bar on terminals only; tqdm looks at TQDM_DISABLE only where none is given."""
    return True if not (shown and first_process()) or os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None


def stop(message: str) -> NoReturn:
    """End the script with one line on stderr and exit code 1: for mistakes that a user can mend."""
    raise SystemExit(message if first_process() else 1)


def needs(path: str | Path, made_by: str) -> Path:
    """The path, or an end to the script that says which earlier step makes it."""
    if not Path(path).exists():
        stop(f"{path} is not there yet: run `python {made_by}` first")
    return Path(path)


def explain_missing(constant: str, name: str, error: OSError) -> NoReturn:
    """End the script with the reason why a model or tokenizer of that name cannot be had."""
    if Path(name).is_dir():
        stop(f"{constant} = {name!r}: this folder holds no complete model ({str(error).splitlines()[0][:160]})")
    stop(
        f"{constant} = {name!r} cannot be had: no such folder here, not in the cache, and the hub did not give it; "
        "without a hub, `python -m extras.get_offline_model` makes models/SmolLM2-135M-Instruct"
    )


def pick(options: dict, name: str, value: str):
    """options[value], or an end to the script that lists what the constant may be."""
    if value not in options:
        stop(f"{name} = {value!r} is not known, choose one of: {', '.join(map(str, options))}")
    return options[value]


def at_least(least: float, **constants: float) -> None:
    """End the script where a constant is smaller than it can be."""
    for name, value in constants.items():
        if value < least:
            stop(f"{name} = {value}: expected {least} or more")


def shares(**constants: float) -> None:
    """End the script where a constant is no share of a whole."""
    for name, value in constants.items():
        if not 0 <= value <= 1:
            stop(f"{name} = {value}: expected a share from 0 to 1")


def script(main: Callable) -> Callable:
    """Decorate main(): set the environment before torch is imported, and end in one line what a user can cause.

    That is Ctrl-C (exit code 130), a full disk or memory, a folder without permission. Every other exception is a
    programmer's mistake and keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(settings: dict) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # question marks where it cannot write Cyrillic
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")  # of their own calls
        try:
            main(settings)
        except KeyboardInterrupt:
            again = "; the same command goes on from the last checkpoint" if settings.get("RESUME") else ""
            print(f"stopped by Ctrl-C: nothing half-written is left in place of older results{again}", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            line = user_line(error, settings)
            if not line:
                raise
            stop(line)
        finally:
            for folder in list(LOCKS):  # of a run that did not finish
                release(folder)

    return guarded


def user_line(error: Exception, settings: dict) -> str:
    """The line for an error of the machine that a user can mend, "" for every other error. settings: the constants."""
    text = str(error)
    if missing_package(error):
        return missing_package(error)
    if isinstance(error, MemoryError) or any(said in text for said in NO_MEMORY):
        return out_of_memory(settings)
    # arrow and safetensors report a full disk in words of their own
    if getattr(error, "errno", 0) == errno.ENOSPC or "No space left" in text or "StorageFull" in text:
        return f"the disk is full, nothing was replaced: free some space and run the command again ({text[:200]})"
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
        return f"cannot write {error.filename}: {error.strerror}, choose another OUTPUT_DIR or mend its permissions"
    if getattr(error, "errno", 0) == errno.EROFS:
        return f"cannot write {error.filename}: the file system is read-only, choose another OUTPUT_DIR"
    return ""


def out_of_memory(settings: dict) -> str:
    """The line for it, with the constants that this script has: what is off can be set, what is not small lowered."""
    off = " or ".join(name for name in SAVE_MEMORY if settings.get(name) is False)
    lower = " or ".join(name for name in TAKE_MEMORY if settings.get(name, 0) > 1)
    cures = [f"set {off} to true"] * bool(off) + [f"lower {lower}"] * bool(lower) + ["take a smaller model"]
    loaded = "MAX_LENGTH" not in settings and "DATA_DIR" in settings
    cures += ["load the data with a smaller MAX_LENGTH"] * loaded
    return f"out of memory: {', or '.join(cures)}"


class Interrupt:
    """Remembers the first Ctrl-C (or SIGTERM) so that a loop can finish its step and save; the second one ends it."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nstopping after this step and saving it; once more stops at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Run:
    """One run folder: created or taken up again at the start, filled with metrics, closed at the end.

    A folder that holds a finished run, or an unfinished one with other settings, is moved aside whole to
    NAME-<time>. An unfinished one with the same settings and READ facts is taken up when `resume` is true. Only the
    first process writes. began: time.monotonic() of the start of the work, where that was earlier.
    """

    def __init__(self, folder: str | Path, settings: dict, resume: bool = True, began: float = 0.0, **facts: object):
        self.folder = Path(folder)
        self.began = began or time.monotonic()
        self.record = {
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


def lock_folder(folder: Path) -> None:
    """Lock a run folder for this process; end the script where another process holds it.

    The system frees the lock of a killed process. A second run of the same process shares the lock.
    """
    from filelock import FileLock, Timeout

    path = folder.resolve()
    if path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        stop(f"{folder}: another process is writing there; wait for it or choose another OUTPUT_DIR")
    LOCKS[path] = lock


def release(folder: Path) -> None:
    """Unlock a run folder, if this process has locked it."""
    lock = LOCKS.pop(folder.resolve(), None)
    if lock:
        lock.release()


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
