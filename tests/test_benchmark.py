"""The benchmark runs both methods on a tiny model and writes its table."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_both_sides_are_measured_on_the_same_pairs(sample_folder, model_folder, tmp_path, method):
    options = {"METHOD": method, "DATA_DIR": sample_folder, "MODEL": model_folder, "MAX_ROWS": 8, "DEVICE": "cpu"}
    options["LEARNING_RATE"] = 1e-6
    words = [f"--{name.lower()}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.compare_training", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "outputs/compare_training.json").read_text())["figures"]
    assert set(figures) == {"ours", "trl", "trl_best"} and "trl_best" in done.stdout
    assert figures["ours"]["loss"] == pytest.approx(figures["trl"]["loss"], abs=0.01), "the same pairs and start"
    assert all(result["seconds_per_pair"] > 0 and result["peak_memory_gb"] > 0 for result in figures.values())
