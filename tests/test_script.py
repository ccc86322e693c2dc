"""Scripts stop with one message on errors of the user and of the machine, and set up their environment."""

import errno
import os

import pytest

from utils.script import ENVIRONMENT, bar_off, needs, pick, script, user_line


def test_missing_steps_and_unknown_choices_are_reported(tmp_path):
    with pytest.raises(SystemExit, match="run `python load_helpsteer_dataset.py` first"):
        needs(tmp_path / "rows", made_by="load_helpsteer_dataset.py")
    assert needs(tmp_path, made_by="x.py") == tmp_path
    with pytest.raises(SystemExit, match="LOSS = 'hnge' is not known, choose one of: sigmoid, ipo"):
        pick({"sigmoid": 1, "ipo": 2}, "LOSS", "hnge")
    assert pick({"sigmoid": 1, "ipo": 2}, "LOSS", "ipo") == 2


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/folder/x"), "cannot write /folder/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "cannot write /x: Read-only file system"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory: use a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: use a smaller model"),
        (MemoryError(), "out of memory: use a smaller model"),
        (ModuleNotFoundError("No module named 'tqdm'", name="tqdm"), "No module named 'tqdm' in "),
        (ModuleNotFoundError("No module named 'utils.hedas'", name="utils.hedas"), ""),
        (ModuleNotFoundError("No module named 'extras'", name="extras"), ""),
        (ImportError("cannot import name 'x' from 'torch'", name="torch"), ""),
        (ValueError("a bug"), ""),
    ],
)
def test_errors_of_the_machine_have_a_message(error, line):
    assert user_line(error, {}).startswith(line) and bool(user_line(error, {})) == bool(line)


def test_the_message_on_memory_names_the_constants_of_the_script():
    reward = {"DATA_DIR": "rows", "GRADIENT_CHECKPOINTING": False, "USE_LORA": True, "BATCH_SIZE": 4, "ACCUMULATION": 1}
    assert user_line(MemoryError(), reward) == (
        "out of memory: set GRADIENT_CHECKPOINTING to true, or lower BATCH_SIZE, or use a smaller model, "
        "or load the data with a smaller MAX_LENGTH"
    )
    loader = {"MAX_LENGTH": 512, "BATCH_SIZE": 1}
    assert user_line(MemoryError(), loader) == "out of memory: lower MAX_LENGTH, or use a smaller model"


def test_a_script_ends_with_one_message_or_a_traceback(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)

    def failing(error):
        @script
        def main(settings):
            raise error

        return main

    with pytest.raises(SystemExit, match="the disk is full"):
        failing(OSError(errno.ENOSPC, "No space left on device"))({})
    with pytest.raises(SystemExit) as stop:
        failing(KeyboardInterrupt())({})
    assert stop.value.code == 130
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())({})


def test_telemetry_is_off_and_the_memory_of_apple_gpus_is_limited(monkeypatch):
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTORCH_ENABLE_MPS_FALLBACK": "1"}
    environment |= {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0", "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.9"}
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    seen = {}
    script(lambda settings: seen.update(os.environ))({})
    assert environment.items() <= seen.items()
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    script(lambda settings: seen.update(os.environ))({})
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == "0", "the user's value wins"


@pytest.mark.parametrize("value, off", [("1", True), ("0", None), ("", None), ("true", True)])
def test_progress_bars_can_be_turned_off(monkeypatch, value, off):
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert bar_off() is off and bar_off(shown=False) is True
    monkeypatch.setenv("RANK", "1")
    assert bar_off() is True
