"""train_helpsteer.sh starts preference-guided DPO, and accelerate reads the files in configs/."""

import json
import os
import subprocess
import sys

import pytest

import train_dpo
from tests.conftest import ROOT
from utils.training.losses import POLICY_LOSSES

SMALL = {"MAX_STEPS": 4, "MAX_ROWS": 30, "PRECISION": "fp32", "DEVICE": "cpu", "SAMPLE_PROMPTS": 3, "MAX_NEW_TOKENS": 8}


def shell(*words, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["./train_helpsteer.sh", *words], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_the_shell_script_prints_the_command_and_the_run_name(sample_folder):
    settings = {"GPUS": 2, "CONFIG": "configs/deepspeed_zero2.yaml", "BETA": 0.2, "PRECISION": "fp32"}
    done = shell(DRY_RUN=1, DATA_DIR=sample_folder, **settings)
    assert done.returncode == 0, done.stderr
    assert "HelpSteer_new_pref_po_Text/HelpSteer-Text-Qwen2.5-1.5B-new_pref_po-beta0.2-alpha0.1" in done.stdout
    assert "accelerate launch --config_file configs/deepspeed_zero2.yaml --num_processes 2 train_dpo.py" in done.stdout
    assert "--precision fp32" in done.stdout
    options = {word[2:].upper() for word in done.stdout.split() if word.startswith("--")}
    assert options - {"CONFIG_FILE", "NUM_PROCESSES"} <= set(train_dpo.__dict__)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"TRAINING_MODE": "song"}, "TRAINING_MODE = 'song' is not known, choose one of: none, text, embedding"),
        ({"TRAINING_MODE": "none"}, "LOSS = 'new_pref_po' needs a preference in the prompt"),
        ({"GPUS": "2", "CONFIG": "no.yaml"}, "CONFIG = 'no.yaml' is not there, here: configs/deepspeed_zero2.yaml"),
        ({"DATA_DIR": "nowhere"}, "nowhere/metadata.json is not there yet: run `python load_helpsteer_dataset.py"),
    ],
)
def test_the_shell_script_checks_its_variables(sample_folder, variables, message):
    done = shell(**{"DATA_DIR": sample_folder} | variables)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_the_shell_script_takes_the_beta_of_the_loss(sample_folder, loss):
    done = shell(DRY_RUN=1, DATA_DIR=sample_folder, LOSS_NAME=loss, MODEL_SHORT_NAME="My-Instruct")
    assert done.returncode == 0, done.stderr
    beta = float(done.stdout.partition("--beta ")[2].split()[0])
    assert beta == POLICY_LOSSES[loss].beta
    assert f"HelpSteer-Text-My-Instruct-{loss}-beta{beta:g}-alpha0.1" in done.stdout


def test_the_shell_script_trains(sample_folder, model_folder, tmp_path):
    options = SMALL | {"OUTPUT_DIR": tmp_path / "run", "REFERENCE_CACHE": tmp_path / "cache"}
    words = [f"--{name.lower()}={value}" for name, value in options.items()]
    done = shell(*words, DATA_DIR=sample_folder, POLICY_MODEL_PATH=model_folder, MODEL_SHORT_NAME="Tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["LOSS"] == "new_pref_po"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    result = load_config_from_file(str(path))
    kinds = {"multi_gpu": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert result.distributed_type.value == kinds[path.stem] and result.num_processes == 2
    if "zero" in path.stem:
        assert result.deepspeed_config["zero_stage"] == int(path.stem[-1])
