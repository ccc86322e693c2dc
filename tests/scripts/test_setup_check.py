"""setup_check.py: it says what is wrong in one line, and its proof sees a model or a device that computes wrongly."""

import platform
import subprocess
import sys
import time

import pytest
import torch

import setup_check
from setup_check import ask_hub, check_versions, in_cache, next_command, read_requirements
from tests.conftest import ROOT, run_script
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


def test_impossible_bound_ends_in_one_line(requirements):
    requirements.write_text("torch>=99\nno-such-package-of-ours\n")
    with pytest.raises(SystemExit, match=r"torch is .*\(needed: >=99\)") as end:
        run_script(setup_check)
    assert "no-such-package-of-ours is not installed" in end.value.code and "\n" not in end.value.code


def test_help_does_not_wait_for_torch():
    code = "import sys, setup_check; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_versions_in_and_out_of_their_bounds(requirements, capsys):
    wanted = read_requirements(requirements)
    assert [package.name for package in wanted] == ["torch"]  # no comment, no option, no other platform
    assert check_versions(wanted) == []
    requirements.write_text("torch<1")
    (fault,) = check_versions(read_requirements(requirements))
    assert "torch" in fault and "<1" in fault
    assert "NO" in capsys.readouterr().out.splitlines()[-1]


def test_requirements_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="is not there"):
        read_requirements(tmp_path / "requirements.txt")


def test_old_python_is_named(requirements, monkeypatch):
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "10", "4"))
    with pytest.raises(SystemExit, match="is too old: make an environment with 3.11"):
        run_script(setup_check)


def test_a_python_that_nobody_has_tried_is_not_called_ok(requirements, monkeypatch, capsys):
    for version, verdict in ((("3", "13", "1"), "ok"), (("3", "14", "0"), "not tested")):
        monkeypatch.setattr(platform, "python_version_tuple", lambda version=version: version)
        check_versions(read_requirements(requirements))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
        assert line.split(maxsplit=3)[-1] == verdict


@pytest.mark.parametrize(
    "constants, message",
    [({"DEVICE": "tpu"}, "DEVICE = 'tpu' is not known"), ({"PRECISION": "int8"}, "PRECISION = 'int8' is not known")],
)
def test_unknown_device_and_precision(requirements, constants, message):
    with pytest.raises(SystemExit, match=message):
        run_script(setup_check, **constants)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_proof_holds_on_a_sound_model(tiny, precision):
    assert prove(tiny, CPU, precision, seed=0) == []


def test_step_equals_plain_autograd(tiny, ids):
    tiny.zero_grad()
    tiny(input_ids=ids, labels=ids).loss.backward()
    _, gradients = one_step(tiny, ids, CPU, "fp32")
    assert gradients.keys() == {name for name, _ in tiny.named_parameters()}
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    tiny.zero_grad()


def test_proof_sees_a_zero_gradient(tiny):
    dead = device_check.tiny_model(seed=0)
    with torch.no_grad():
        dead.model.layers[1].mlp.down_proj.weight.zero_()  # nothing flows back to the layer's other projections
    (fault, *_) = prove(dead, CPU, "fp32", seed=0)
    assert fault == "the gradient of model.layers.1.mlp.gate_proj.weight is zero"


def test_proof_sees_a_loss_without_gradient(tiny, ids):
    frozen = device_check.tiny_model(seed=0)
    frozen.lm_head.weight.requires_grad_(False)  # tied to the embedding
    step = one_step(frozen, ids, CPU, "fp32")
    assert compare(step, step, 1e-3)[1] == ["the gradient of model.embed_tokens.weight is zero"]


def test_proof_sees_wrong_numbers(tiny, ids):
    loss, gradients = one_step(tiny, ids, CPU, "fp32")
    name = "model.layers.0.mlp.up_proj.weight"
    assert compare((loss, gradients), (loss, gradients), 0.0)[1] == []
    for wrong in [
        (loss * 1.01, gradients),
        (float("nan"), gradients),
        (loss, gradients | {name: gradients[name] * float("inf")}),
        (loss, {key: value.roll(1) for key, value in gradients.items()}),  # equal norms, other directions
    ]:
        assert compare(wrong, (loss, gradients), device_check.LIMITS["fp32"])[1], wrong[0]


def test_mismatch_ends_in_one_line_and_exit_code_1(requirements, monkeypatch, capsys):
    real = device_check.one_step

    def wrong_in_bf16(model, ids, device, precision):
        loss, gradients = real(model, ids, device, precision)
        return (loss * 1.2, gradients) if precision == "bf16" else (loss, gradients)

    monkeypatch.setattr(device_check, "one_step", wrong_in_bf16)
    with pytest.raises(SystemExit, match="cpu in bf16 gives wrong results: the loss is off by 2.0e-01") as end:
        run_script(setup_check, DEVICE="cpu", PRECISION="bf16")
    assert "\n" not in end.value.code and "MISMATCH" in capsys.readouterr().out


def test_driver_error_is_no_traceback(requirements, monkeypatch):
    def no_kernel(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(device_check, "one_step", no_kernel)
    with pytest.raises(SystemExit, match="no kernel image is available; try another DEVICE"):
        run_script(setup_check, DEVICE="cpu")


@pytest.mark.parametrize("place", ["check_machine", "one_step"])
def test_a_full_device_is_not_said_to_compute_wrongly(requirements, monkeypatch, place):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nmore lines")

    monkeypatch.setattr(setup_check if place == "check_machine" else device_check, place, full)
    with pytest.raises(
        SystemExit, match="cpu in .* cannot be used: CUDA out of memory.*, or stop other programs that use it"
    ) as end:
        run_script(setup_check, DEVICE="cpu")
    assert "\n" not in end.value.code


def test_hub_that_never_answers_costs_the_timeout_and_no_more(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    found = ask_hub({"model": "owner/name", "dataset": "owner/rows/folder"}, timeout=0.2)
    assert time.monotonic() - began < 1
    assert found == dict.fromkeys(["model", "dataset"], "the hub did not answer within 0.2 s")


def test_what_the_hub_says_is_told_without_addresses_and_tokens(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse(self, name, **_):
        asked.append(name)
        if name == "owner/there":
            return
        raise ConnectionError("https://user:hf_secret@example.org refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    found = ask_hub({"model": "owner/there", "dataset": "owner/rows/folder"}, timeout=5)
    assert found == {"model": "", "dataset": "the hub is not reachable (ConnectionError)"}
    assert sorted(asked) == ["owner/rows", "owner/there"]


def test_cache_counts_files_and_not_links_to_nowhere(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, data = tmp_path / "models--owner--name/snapshots/c0", tmp_path / "datasets--owner--rows/snapshots/c0/data"
    model.mkdir(parents=True), data.mkdir(parents=True)
    (model / "config.json").touch()
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    assert not in_cache("owner/name", "model")
    (tmp_path / "blob").touch()
    assert in_cache("owner/name", "model")
    assert not in_cache("owner/rows", "dataset")
    (data / "train.jsonl.gz").touch()
    assert in_cache("owner/rows/data", "dataset") and not in_cache("owner/other", "dataset")


@pytest.fixture
def old_torchao(tmp_path, monkeypatch):
    """A torchao of the age of Colab's, as far as PEFT looks at it."""
    from peft.import_utils import is_torchao_available

    for name, text in {"torchao/__init__.py": "", "torchao-0.10.0.dist-info/METADATA": "Version: 0.10.0\n"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()
    yield
    is_torchao_available.cache_clear()


def test_an_old_torchao_is_named(old_torchao, requirements, capsys):
    run_script(setup_check, DEVICE="cpu")
    assert "  torchao 0.10.0   WARNING: USE_LORA does not work with it" in capsys.readouterr().out


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, warned in (("/usr/bin/nvidia-smi", True), (None, False)):
        monkeypatch.setattr(setup_check.shutil, "which", lambda name, found=found: found)
        setup_check.check_machine(CPU, "fp32", "why")
        assert ("WARNING: nvidia-smi is here, but this torch" in capsys.readouterr().out) == warned


def test_estimate_grows_with_what_is_trained(capsys):
    setup_check.what_fits(6.0, "fp32", tokens=2048)
    lines = capsys.readouterr().out.splitlines()
    small, large = lines[2].split(), lines[-1].split()
    lora, full, reference = (float(small[place]) for place in (1, 4, 7))
    assert lora < full < reference
    assert full == pytest.approx(1 + 0.135 * 16 + 2048 * 30 * 2112 * 36e-9, abs=0.06)
    assert small[3] == "no" or lora < 0.9 * 6.0
    assert large[3::3] == ["no", "no", "no"]


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
def test_next_command(requirements, had, expected):
    had = {kind: kind.replace(" ", "_") in had.split() for kind in ("model", "dataset", "offline copy")}
    names = {"model": setup_check.MODEL, "dataset": setup_check.DATASET}
    assert next_command(had, names).split("    #")[0].endswith(expected)


def test_next_command_has_what_was_looked_for(requirements):
    names, had = {"model": "my model", "dataset": "owner/rows"}, {"model": True, "dataset": True, "offline copy": True}
    assert next_command(had, names).endswith("dataset.py --dataset owner/rows --tokenizer 'my model'")
    had |= {"model": False, "dataset": False}
    sample = "sample_data/helpsteer_sample.jsonl"
    assert next_command(had, names).endswith(f"--dataset {sample} --tokenizer no/such")
