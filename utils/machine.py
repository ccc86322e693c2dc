"""What a process runs on: the commit of this code, versions of packages, the most memory that it held."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "datasets", "trl", "peft", "accelerate")


def processes() -> int:
    """How many processes a launcher has started for this run, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
