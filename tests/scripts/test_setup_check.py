"""setup_check.py reports versions, the hub, the device and wrong results, and prints the next command."""

import platform
import time

import pytest
import torch

import setup_check
from setup_check import ask_hub, check_versions, next_command, read_requirements
from tests.conftest import error_of, run_script
from utils.models import device_check
from utils.models.device_check import compare, one_step, prove

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return device_check.tiny_model(seed=0)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 49152, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def requirements(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    monkeypatch.setitem(setup_check.FILES, "requirements", str(file))
    monkeypatch.setitem(setup_check.FILES, "offline copy", "no/such")
    file.write_text('# bounds\ntorch>=2.0  # a comment\n-c constraints.txt\n\npywin32>=1; sys_platform == "no_such"\n')
    return file


def test_a_whole_check_ends_with_the_next_command(requirements, capsys):
    run_script(setup_check, DEVICE="cpu", PRECISION="fp32")
    out = capsys.readouterr().out
    assert "HF_HUB_OFFLINE is set" in out and "verdict          ok" in out and "torchao" not in out
    assert "fp32, 1024 tokens at once" in out, "a batch of 4 x 2 x 256 tokens is computed in parts on a CPU"
    assert out.splitlines()[-1].startswith("next: python -m extras.get_offline_model")


@pytest.mark.parametrize(
    "constants, text, message",
    [
        ({"DEVICE": "tpu"}, "torch", "DEVICE = 'tpu' is not known"),
        ({"PRECISION": "int8"}, "torch", "PRECISION = 'int8' is not known"),
        ({}, "torch>=99\nno-such-package-of-ours\n", "(needed: >=99)"),
        ({}, "torch>=99\nno-such-package-of-ours\n", "no-such-package-of-ours is not installed"),
    ],
)
def test_user_errors_stop_with_one_message(requirements, constants, text, message):
    requirements.write_text(text)
    assert message in error_of(setup_check, **constants)


def test_an_old_python_and_missing_requirements_are_reported(requirements, monkeypatch):
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "10", "4"))
    assert "is too old: make an environment with 3.11" in error_of(setup_check)
    requirements.unlink()
    with pytest.raises(SystemExit, match="is not there"):
        read_requirements(requirements)


def test_versions_are_compared_with_their_bounds(requirements, capsys):
    wanted = read_requirements(requirements)
    assert [package.name for package in wanted] == ["torch"]  # no comment, no option, no other platform
    assert check_versions(wanted) == []
    requirements.write_text("torch<1")
    (fault,) = check_versions(read_requirements(requirements))
    assert "torch" in fault and "<1" in fault
    assert "NO" in capsys.readouterr().out.splitlines()[-1]


def test_an_untested_python_is_marked(requirements, monkeypatch, capsys):
    for version, verdict in ((("3", "13", "1"), "ok"), (("3", "14", "0"), "not tested")):
        monkeypatch.setattr(platform, "python_version_tuple", lambda version=version: version)
        check_versions(read_requirements(requirements))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
        assert line.split(maxsplit=3)[-1] == verdict


@pytest.mark.parametrize(
    "place, error, message",
    [
        ("one_step", RuntimeError("CUDA error: no kernel image\nmore"), "no kernel image; try another DEVICE"),
        ("one_step", torch.OutOfMemoryError("CUDA out of memory.\nmore"), "or stop other programs that use it"),
        ("check_machine", torch.OutOfMemoryError("CUDA out of memory.\nmore"), "or stop other programs that use it"),
    ],
)
def test_errors_of_the_device_are_reported_in_one_line(requirements, monkeypatch, place, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(setup_check if place == "check_machine" else device_check, place, fail)
    assert message in error_of(setup_check, DEVICE="cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_passes_on_a_correct_model(tiny, precision):
    assert prove(tiny, CPU, precision, seed=0) == []


def test_the_check_finds_a_zero_gradient(tiny):
    dead = device_check.tiny_model(seed=0)
    with torch.no_grad():
        dead.model.layers[1].mlp.down_proj.weight.zero_()  # the other projections of the layer get no gradient
    (fault, *_) = prove(dead, CPU, "fp32", seed=0)
    assert fault == "the gradient of model.layers.1.mlp.gate_proj.weight is zero"


def test_the_check_finds_wrong_numbers(tiny, ids):
    loss, gradients = one_step(tiny, ids, CPU, "fp32")
    name = "model.layers.0.mlp.up_proj.weight"
    assert compare((loss, gradients), (loss, gradients), 0.0)[1] == []
    for wrong in [
        (loss * 1.01, gradients),
        (float("nan"), gradients),
        (loss, gradients | {name: gradients[name] * float("inf")}),
        (loss, {key: value.roll(1) for key, value in gradients.items()}),  # the same norms in other directions
    ]:
        assert compare(wrong, (loss, gradients), device_check.LIMITS["fp32"])[1], wrong[0]


def test_a_mismatch_is_reported_in_one_line(requirements, monkeypatch, capsys):
    real = device_check.one_step

    def wrong_in_bf16(model, ids, device, precision):
        loss, gradients = real(model, ids, device, precision)
        return (loss * 1.2, gradients) if precision == "bf16" else (loss, gradients)

    monkeypatch.setattr(device_check, "one_step", wrong_in_bf16)
    message = error_of(setup_check, DEVICE="cpu", PRECISION="bf16")
    assert message.startswith("cpu in bf16 gives wrong results: the loss is off by 2.0e-01")
    assert "MISMATCH" in capsys.readouterr().out


def test_a_silent_hub_costs_only_the_timeout(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    result = ask_hub({"model": "owner/name", "dataset": "owner/rows/folder"}, timeout=0.2)
    assert time.monotonic() - began < 1
    assert result == dict.fromkeys(["model", "dataset"], "the hub did not answer within 0.2 s")


def test_errors_of_the_hub_are_reported_without_addresses_and_tokens(monkeypatch):
    import huggingface_hub

    rendered = []

    def refuse(self, name, **_):
        rendered.append(name)
        if name == "owner/there":
            return
        raise ConnectionError("https://user:hf_secret@example.org refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    result = ask_hub({"model": "owner/there", "dataset": "owner/rows/folder"}, timeout=5)
    assert result == {"model": "", "dataset": "the hub is not reachable (ConnectionError)"}
    assert sorted(rendered) == ["owner/rows", "owner/there"]


@pytest.fixture
def old_torchao(tmp_path, monkeypatch):
    """Fake the old torchao of Colab, as far as PEFT checks it."""
    from peft.import_utils import is_torchao_available

    for name, text in {"torchao/__init__.py": "", "torchao-0.10.0.dist-info/METADATA": "Version: 0.10.0\n"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()
    yield
    is_torchao_available.cache_clear()


def test_an_old_torchao_is_reported(old_torchao, requirements, capsys):
    run_script(setup_check, DEVICE="cpu")
    assert "  torchao 0.10.0   WARNING: USE_LORA does not work with it" in capsys.readouterr().out


def test_a_gpu_without_support_in_torch_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for result, warned in (("/usr/bin/nvidia-smi", True), (None, False)):
        monkeypatch.setattr(setup_check.shutil, "which", lambda name, result=result: result)
        setup_check.check_machine(CPU, "fp32", "why")
        assert ("WARNING: nvidia-smi is here, but this torch" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    "had, expected",
    [
        ("", "python -m extras.get_offline_model"),
        ("dataset", "python -m extras.get_offline_model"),
        ("offline_copy", "load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer no/such"),
        ("offline_copy dataset", "load_helpsteer_dataset.py --tokenizer no/such"),
        ("model", "load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl"),
        ("model dataset offline_copy", "python load_helpsteer_dataset.py"),
    ],
)
def test_the_next_command_uses_what_is_available(requirements, had, expected):
    had = {kind: kind.replace(" ", "_") in had.split() for kind in ("model", "dataset", "offline copy")}
    names = {"model": setup_check.MODEL, "dataset": setup_check.DATASET}
    assert next_command(had, names).split("    #")[0].endswith(expected)
    names, had = {"model": "my model", "dataset": "owner/rows"}, dict.fromkeys(had, True)
    assert next_command(had, names).endswith("dataset.py --dataset owner/rows --tokenizer 'my model'")
