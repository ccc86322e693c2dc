"""Check this machine: versions, device, memory, disk, hub or cache, and one forward and backward pass.

Reads  : requirements.txt, the hub's cache, models/SmolLM2-135M-Instruct if it exists
Writes : nothing

python setup_check.py
python setup_check.py --device cpu --precision fp32    # any constant below, in lower case
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.data.sources import ask_hub, in_cache
from utils.models.device_check import prove, row, tiny_model
from utils.script import ENVIRONMENT, check, say, script, stop

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

# what the next scripts will use
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder to look for
DATASET = "nvidia/HelpSteer2"  # hub name, or a local file or folder, to look for
MAX_LENGTH = 256  # tokens of prompt and answer together, for the estimate of what fits
BATCH_SIZE = 4  # pairs in memory at once, for the same estimate
# the check
DEVICE = ""  # cuda | mps | cpu, "" = the best available
PRECISION = ""  # fp32 | bf16 | fp16, "" = by device
SEED = 42  # of the tiny model

FILES = {"requirements": "requirements.txt", "offline copy": "models/SmolLM2-135M-Instruct"}
LOADER_DEFAULTS = {"dataset": "nvidia/HelpSteer2", "tokenizer": "HuggingFaceTB/SmolLM2-135M-Instruct"}
SIZES = {  # name: million parameters, layers, hidden + intermediate size
    "SmolLM2-135M": (135, 30, 576 + 1536),
    "SmolLM2-360M": (362, 32, 960 + 2560),
    "Qwen2.5-0.5B": (494, 24, 896 + 4864),
    "Qwen2.5-1.5B": (1544, 28, 1536 + 8960),
    "SmolLM2-1.7B": (1711, 24, 2048 + 8192),
}
# Bytes per parameter: float32 weight 4, gradient 4, two AdamW moments 8; a frozen one 4. LoRA trains about 1 in 30
# (rank 16, all layers). Autocast adds a half-precision copy of each weight. Bytes per token, layer and unit of
# (hidden + intermediate), kept for the backward pass; 1 GB more for the libraries. The sum for SmolLM2-135M in bf16 on
# a CPU is 4.9 GB; measured peaks were 4.4 GB in a window of 256 and 5.0 GB in one of 512.
BYTES = {"trained": 16, "frozen": 4, "cast": 2, "activation fp32": 36, "activation cast": 22}


def read_requirements(file: Path) -> list[Requirement]:
    """Return the packages of a requirements file that this platform needs."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        stop(f"nothing is installed in this Python yet: activate .venv, or run `python -m pip install -r {file.name}`")
    if not file.is_file():
        stop(f"{file} is not there: it belongs beside setup_check.py")
    lines = [line.split(" #")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    packages = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return [package for package in packages if package.marker is None or package.marker.evaluate()]


def check_versions(packages: list[Requirement]) -> list[str]:
    """Print each package with its bounds, without importing it, and return a description of those out of bounds."""
    say("versions")
    tested = int(platform.python_version_tuple()[1]) <= 13  # newer ones may work
    row("python", platform.python_version(), ">=3.11,<3.14", "ok" if tested else "not tested")
    faults = []
    for package in packages:
        try:
            version = importlib.metadata.version(package.name)
            fits = package.specifier.contains(version, prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            version, fits = "not installed", False
        row(package.name, version, str(package.specifier), "ok" if fits else "NO")
        faults += [] if fits else [f"{package.name} is {version} (needed: {package.specifier or 'any version'})"]
    return faults


def check_torchao() -> None:
    """Print a warning if PEFT refuses the installed torchao, as it refuses the old one of Colab."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        cure = "run `python -m pip uninstall -y torchao`"
        row(f"torchao {importlib.metadata.version('torchao')}", f"WARNING: USE_LORA does not work with it: {cure}")


def memory_gb(device: torch.device) -> tuple[float, float]:
    """Return (free, total) memory for models on this device in GB: GPU memory, or RAM."""
    import psutil
    import torch

    ram = psutil.virtual_memory()
    free, total = ram.available, ram.total
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    elif device.type == "mps":  # part of the RAM; beyond this size, Metal is slow or fails
        total = torch.mps.recommended_max_memory()
        free = min(total, ram.available)
    return free / 1e9, total / 1e9


def check_machine(device: torch.device, precision: str, reason: str) -> None:
    """Print device, precision, memory and disk."""
    import psutil
    import torch

    say("machine")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    row("device", f"{device.type} ({name}), {torch.get_num_threads()} CPU threads")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():  # on Windows pip installs torch for CPUs
        cure = "install the torch that https://pytorch.org/get-started/locally recommends"
        row("GPU", f"WARNING: nvidia-smi is here, but this torch ({torch.__version__}) sees no GPU: {cure}")
    row("precision", f"{precision}: {reason}")
    free, total = memory_gb(device)
    row(f"{device.type} memory", f"{free:.1f} of {total:.1f} GB free")
    if device.type != "cpu":
        row("RAM", f"{psutil.virtual_memory().available / 1e9:.1f} GB free")
    disk = shutil.disk_usage(".").free / 1e9
    row("disk", f"{disk:.1f} GB free here", "WARNING: a model and its checkpoints need about 5" if disk < 5 else "")
    if device.type == "mps":
        row("settings", ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name.startswith("PYTORCH")))


def check_sources(names: dict[str, str]) -> dict[str, bool]:
    """Print where model and dataset are available; return {"model", "dataset", "offline copy": available}."""
    say("model and data")
    here = {kind: "on this disk" if Path(name).exists() else "in the cache" for kind, name in names.items()}
    missing = {kind: name for kind, name in names.items() if not Path(name).exists() and not in_cache(name, kind)}
    reasons = ask_hub(missing) if missing else {}
    for kind, name in names.items():
        where = "not in the cache; " + (reasons[kind] or "the hub has it") if kind in missing else here[kind]
        row(kind, f"{name}: {where}")
    available = {kind: not reasons.get(kind) for kind in names}
    available["offline copy"] = (Path(FILES["offline copy"]) / "model.safetensors").is_file()
    row("offline copy", f"{FILES['offline copy']}: {'here' if available['offline copy'] else 'not here'}")
    return available


def what_fits(free_gb: float, precision: str, tokens: int) -> None:
    """Print the memory (GB) for training each of SIZES on `tokens` tokens at once, and whether it is available."""
    say(f"what fits in {free_gb:.1f} GB (estimate, {precision}, {tokens} tokens at once, no gradient checkpointing)")
    row("", "LoRA", "full", "full, with a frozen reference")
    kind = "fp32" if precision == "fp32" else "cast"
    for name, (millions, layers, width) in SIZES.items():
        copy_gb = 0 if kind == "fp32" else millions * BYTES["cast"] / 1e3
        shared = 1 + copy_gb + tokens * layers * width * BYTES[f"activation {kind}"] / 1e9
        full = shared + millions * BYTES["trained"] / 1e3
        lora = shared + millions * (BYTES["frozen"] + BYTES["trained"] / 30) / 1e3
        needed = (lora, full, full + millions * BYTES["frozen"] / 1e3)
        row(name, *(f"{gb:5.1f} GB {'yes' if gb < 0.9 * free_gb else 'no'}" for gb in needed))


def next_command(available: dict[str, bool], names: dict[str, str]) -> str:
    """Return the command to run next. names: the model and the dataset of check_sources."""
    if not (available["model"] or available["offline copy"]):
        return "python -m extras.get_offline_model    # a copy of SmolLM2-135M-Instruct without the hub"
    dataset = names["dataset"] if available["dataset"] else "sample_data/helpsteer_sample.jsonl"
    options = {"dataset": dataset, "tokenizer": names["model"] if available["model"] else FILES["offline copy"]}
    changed = [f" --{name} {shlex.quote(value)}" for name, value in options.items() if value != LOADER_DEFAULTS[name]]
    return "python load_helpsteer_dataset.py" + "".join(changed)


@script
def main(settings: dict) -> None:
    # 1. versions
    check(settings)
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11):
        stop(f"Python {platform.python_version()} is too old: make an environment with 3.11, 3.12 or 3.13")
    faults = check_versions(read_requirements(Path(__file__).parent / FILES["requirements"]))
    if faults:
        stop(f"{'; '.join(faults)}: run `python -m pip install -r {FILES['requirements']}`")
    from utils.models.loading import choose_device, choose_precision
    from utils.models.shared_prompt import TOKENS_AT_ONCE

    check_torchao()
    # 2. machine
    device = choose_device(DEVICE)
    precision, reason = choose_precision(PRECISION, device)
    names = {"model": MODEL, "dataset": DATASET}
    try:
        check_machine(device, precision, reason)
        at_once = max(TOKENS_AT_ONCE[device.type], 2 * MAX_LENGTH)  # the trainers compute larger batches in pieces
        what_fits(memory_gb(device)[0], precision, min(2 * BATCH_SIZE * MAX_LENGTH, at_once))
        # 3. model and data
        available = check_sources(names)
        # 4. proof
        faults = prove(tiny_model(SEED), device, precision, SEED)
    except RuntimeError as error:  # the driver does not match torch, or the device lacks an operation
        cure = "try another DEVICE or PRECISION"
        if "out of memory" in str(error):
            cure += ", or stop other programs that use it"
        stop(f"{device.type} in {precision} cannot be used: {str(error).splitlines()[0][:200]}; {cure}")
    if faults:
        stop(f"{device.type} in {precision} gives wrong results: {faults[0]}; try another DEVICE or PRECISION")
    # 5. next step
    say(f"next: {next_command(available, names)}")


if __name__ == "__main__":
    main(override_constants(globals()))
