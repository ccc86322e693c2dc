"""Prove that a change moves no number: run the same short commands at a git commit and here, and compare the files.

Reads  : sample_data/, the git commit BASE, and the present files, committed or not
Prints : one line per case: same, differs or failed

python -m benchmarks.compare_commits --base main
python -m benchmarks.compare_commits --base HEAD~3 --cases dpo,sft
python -m benchmarks.compare_commits --ignore old_key,new_key    # keys that this very change removes or adds
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.config import override_constants, top_constants
from utils.script import pick, say, script, stop

BASE = "HEAD~1"  # git commit to compare the present files with
CASES = ()  # names in COMMANDS; cases that these read from run as well; () = all
IGNORE = ()  # more keys, or names of files, to leave out of the comparison

# Each case runs in a folder with tiny/ and sample_data/ and writes to NAME/out. Words that end in /out name an earlier
# case. `two` starts two processes; `kill` kills the run after its first checkpoint and starts it again.
STARTS = {
    "REWARD": "train_reward_model.py --data_dir load/out --control_pairs 8",
    "DPO": "train_dpo.py --data_dir load/out --sample_prompts 3",
    "REINFORCE": "train_reinforce.py --data_dir load/out --eval_prompts 6",
    "EVALUATE": "extras.evaluate --data_dir load/out --reward_model reward/out",
}
COMMANDS = {
    "load": "load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --max_rows 160 --max_length 128",
    "load_oasst": "extras.load_oasst_dataset --dataset sample_data/oasst_sample.jsonl --max_rows 0 --max_length 128",
    "summary": "dataset_summary.py --data_dir load/out",
    "reward": "REWARD --eval_every_steps 2",
    "reward_distribution": "REWARD --head distribution --rating_weight 0.2",
    "reward_attributes": "REWARD --head attributes",
    "reward_lora": "REWARD --use_lora true",
    "reward_epochs": "REWARD --max_rows 12 --max_steps 0 --epochs 2",
    "reward_resumed": "kill REWARD --max_steps 40 --save_every_steps 4",
    "reward_two": "two REWARD --batch_size 2",
    "dpo": "DPO --reward_model reward/out",
    "dpo_lora": "DPO --use_lora true",
    "dpo_ipo": "DPO --loss ipo",
    "dpo_sipa": "DPO --loss sipa",
    "dpo_orpo": "DPO --loss orpo",
    "dpo_text": "DPO --loss new_pref_po --guidance text",
    "dpo_embedding": "DPO --loss new_pref_po --guidance embedding",
    "dpo_no_cache": "DPO --reference_cache=",
    "dpo_two": "two DPO --batch_size 2 --reference_cache dpo_two/cache",
    "reinforce": "REINFORCE --reward_model reward/out",
    "reinforce_lora": "REINFORCE --reward_model reward/out --use_lora true",
    "reinforce_leave_one_out": "REINFORCE --reward_model reward/out --baseline leave_one_out --answers_per_prompt 2",
    "reinforce_risk": "REINFORCE --reward_model reward_distribution/out --baseline running_mean --risk 0.5",
    "sft": "extras.train_sft --data_dir load/out",
    "generate_pairs": "extras.generate_pairs --data_dir load/out --max_rows 8 --mode ranked --reward_model reward/out",
    "evaluate": "EVALUATE --control_pairs 8",
    "evaluate_policies": "EVALUATE --policies dpo/out --judge_model reward_distribution/out --prompts 6",
}
COMMON = {  # for every script that has the option, unless the case gives it
    **{"DEVICE": "cpu", "PRECISION": "fp32", "MODEL": "tiny", "TOKENIZER": "tiny", "REFERENCE_CACHE": "cache"},
    **{"LOG_EVERY_STEPS": "1", "MAX_ROWS": "24", "MAX_STEPS": "4", "MAX_NEW_TOKENS": "8", "LEARNING_RATE": "1e-3"},
}
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    "PYTHONHASHSEED": "0",  # peft writes target_modules as a set
}
VARY = {
    "files": ("state.json", "cache", "checkpoints"),
    "keys": (
        *("started", "finished", "seconds", "seconds_before", "train_seconds", "tokens_per_second", "peak_memory_gb"),
        *("settings", "command", "commit", "versions", "process"),
    ),
}


def make_inputs(folder: Path) -> None:
    """Write sample_data/ and tiny/, a random 2-layer Llama with a tokenizer of 600 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shutil.copytree("sample_data", folder / "sample_data")
    lines = (folder / "sample_data/helpsteer_sample.jsonl").read_text(encoding="utf-8").splitlines()
    bpe, special = Tokenizer(models.BPE()), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([json.loads(line)[key] for line in lines for key in ("prompt", "response")], trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True)) | {"pad_token": special[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")


def words_of(name: str) -> list[str]:
    """The words of a case, with its STARTS written out."""
    return " ".join(STARTS.get(word, word) for word in COMMANDS[name].split()).split()


def read_command(name: str, checkouts: list[Path]) -> tuple[str, str, dict[str, str], list[str]]:
    """(two, kill or '', script, {option: value}, options left out because one of the checkouts lacks them)."""
    how, words = "", words_of(name)
    if words[0] in ("two", "kill"):
        how, *words = words
    given, options = iter(words[1:]), {"OUTPUT_DIR": f"{name}/out"} | COMMON
    for word in given:
        key, has_value, value = word.removeprefix("--").upper().partition("=")
        options[key] = value if has_value else next(given)
    file = words[0].removesuffix(".py").replace(".", "/") + ".py"
    constants = [
        set(top_constants((checkout / file).read_text(encoding="utf-8")))
        for checkout in checkouts
        if (checkout / file).exists()
    ]
    known = set.intersection(*constants) if constants else set()
    lacking = [key for key in options if key not in known and f"--{key.lower()}" in " ".join(words)]
    return how, words[0], {key: value for key, value in options.items() if key in known}, lacking


def run_case(side: Path, checkout: Path, how: str, name: str, options: dict[str, str]) -> str:
    """Run a script of a checkout in the folder of its side. Return the last line of stderr if it fails, else ''."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if how == "two" else []
    file = ["-m", name] if name.startswith("extras.") else [str(checkout / name)]
    command = [sys.executable, *launcher, *file, *(f"--{key.lower()}={value}" for key, value in options.items())]
    setting = {"cwd": side, "env": os.environ | {"PYTHONPATH": str(checkout)}}
    if how == "kill":
        with subprocess.Popen(command, **setting, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not any(side.glob(f"{options['OUTPUT_DIR']}/checkpoints/*/complete")):
                time.sleep(0.01)
            process.kill()
        if process.returncode >= 0:
            return "ended before it could be killed"
    try:
        done = subprocess.run(command, **setting, capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired:
        return "took more than ten minutes"
    lines = [line for line in done.stderr.splitlines() if line.strip(" =")]
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else ""


def compare_folders(before: Path, after: Path, ignore: set[str]) -> str:
    """The first difference between the files of two folders, '' if there is none."""
    names = {
        path.relative_to(folder)
        for folder in (before, after)
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl", ".safetensors", ".arrow")
        and not ignore & set(path.relative_to(folder).parts)
    }
    for name in sorted(names):
        if missing := [side for side in (before, after) if not (side / name).exists()]:
            return f"{name}: missing in {'BASE' if missing[0] == before else 'the present files'}"
        if (before / name).read_bytes() != (after / name).read_bytes():
            pair = [read_values(folder / name) for folder in (before, after)]
            found = first_difference(*pair, ignore)
            if found or name.suffix == ".safetensors":
                return f"{name}: {found or 'another header'}"
    return "" if names else "no files to compare"


def read_values(path: Path) -> object:
    """What a file holds, as dicts, lists and plain values."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    if path.suffix == ".arrow":
        import pyarrow

        return pyarrow.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def first_difference(before: object, after: object, ignore: set[str], key: str = "") -> str:
    """The first key whose values differ, with both values or the size of the difference; '' if there is none."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [name for name in before | after if name not in ignore]
        if lone := [name for name in keys if name not in before or name not in after]:
            return f"{key}/{lone[0]} only in {'BASE' if lone[0] in before else 'the present files'}"
        parts = ((name, before[name], after[name]) for name in keys)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return f"{key or '/'} has {len(before)} and {len(after)} entries"
        parts = zip(range(len(before)), before, after, strict=True)
    elif repr(before) == repr(after):
        return ""
    else:
        numbers = {type(before), type(after)} <= {int, float}
        by = f" (by {after - before:.3g})" if numbers else ""
        return f"{key}: {str(before)[:60]!r} and {str(after)[:60]!r}{by}"
    return next(filter(None, (first_difference(a, b, ignore, f"{key}/{name}") for name, a, b in parts)), "")


def with_needs(cases: tuple[str, ...]) -> list[str]:
    """The cases and those that they read from, in the order of COMMANDS."""
    needed = set(cases)
    for name in reversed(COMMANDS):
        if name in needed:
            needed |= {word.split("/")[0] for word in words_of(name) if word.endswith("/out")}
    return [name for name in COMMANDS if name in needed]


def compare_case(name: str, sides: list[Path], checkouts: list[Path], ignore: set[str]) -> str:
    """Run a case on both sides at once. Return 'same', or how it differs or failed."""
    how, file, options, lacking = read_command(name, checkouts)
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda *where: run_case(*where, how, file, options), sides, checkouts))
    without = f" (without {', '.join(lacking)})" if lacking else ""
    for side, error in zip(("BASE", "the present files"), errors, strict=True):
        if error:
            return f"failed with {side}{without}: {error[:200]}"
    found = compare_folders(sides[0] / name, sides[1] / name, ignore)
    return f"differs{without}: {found}" if found else f"same{without}"


@script
def main(settings: dict) -> None:
    for name in CASES:
        pick(COMMANDS, "CASES", name)
    began, results, ignore = time.monotonic(), {}, {*VARY["files"], *VARY["keys"], *IGNORE}
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as work:
        sides = [Path(work).resolve() / side for side in ("before", "after")]
        checkouts = [Path(work).resolve() / "checkout", Path.cwd()]
        git = ["git", "worktree"]
        added = subprocess.run([*git, "add", "--detach", checkouts[0], BASE], capture_output=True, text=True)
        if added.returncode:
            stop(f"BASE = {BASE!r} cannot be checked out: {added.stderr.strip().splitlines()[-1]}")
        try:
            make_inputs(sides[0])
            shutil.copytree(*sides)
            for name in with_needs(CASES or tuple(COMMANDS)):
                start = time.monotonic()
                results[name] = compare_case(name, sides, checkouts, ignore)
                say(f"{name:24} {time.monotonic() - start:5.1f} s  {results[name]}")
        finally:
            subprocess.run([*git, "remove", "--force", checkouts[0]], capture_output=True)
    faults = sum(not result.startswith("same") for result in results.values())
    say(f"{len(results)} cases, {faults} differ or failed, {time.monotonic() - began:.0f} seconds")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main(override_constants(globals()))
