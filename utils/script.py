"""How a script checks its constants, prints, holds its run folder and ends."""

from __future__ import annotations

import errno
import functools
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from utils.config import BOUNDS, missing_package

if TYPE_CHECKING:
    from filelock import FileLock

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # a GPU's words, a CPU's, Windows'
SAVE_MEMORY = ("GRADIENT_CHECKPOINTING", "USE_LORA")
TAKE_MEMORY = (
    "GENERATION_BATCH",
    "MAX_NEW_TOKENS",
    "MAX_LENGTH",
    "BATCH_SIZE",
)
LOCKS: dict[Path, FileLock] = {}  # run folders that this process holds
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


def check(settings: dict) -> None:
    """Stop where a shared constant is out of its BOUNDS. settings: what `override_constants` returns."""
    for name, value in settings.items():
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        if name in BOUNDS and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
            stop(f"{name} = {value}: expected {expected}")


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

    def __enter__(self) -> Interrupt:
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


def processes() -> int:
    """How many processes a launcher has started for this run, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
