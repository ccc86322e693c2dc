"""The processed folder: write it, describe it, load its pairs and find the tokenizer that it was made with."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils.data.preferences import Ledger
from utils.data.sources import Record, Source
from utils.runs import read_json, versions
from utils.script import needs, say, stop

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

HASHED = (  # what the fingerprint is of, as far as rows have it
    *("prompt", "chosen_rating", "rejected_rating", "rating"),
    *("input_ids", "completion_mask", "chosen_ids", "rejected_ids"),
)
OURS = {"train", "validation", "test", "metadata.json", "dropped.jsonl"}  # what a processed folder holds
CLUTTER = {".DS_Store", ".ipynb_checkpoints", "Thumbs.db", "desktop.ini"}  # what others put into every folder
READ_BY_DEFAULT = "processed_helpsteer"  # DATA_DIR of the scripts
MAKE_AGAIN = (
    "DATASET",
    "TOKENIZER",
    "MAX_LENGTH",
    "LANGUAGE",
    "ROWS",
    "TURNS",
)  # options of the loaders
LEFT_OUT = {  # more of them, left out where they have this value
    **{"RATING": "average", "SYSTEM_PROMPT": "", "MIN_RATING_GAP": 0.0, "MAX_ROWS": 0, "CHAT_TEMPLATE": ""},
    **{"VALIDATION_SHARE": 0.2, "SEED": 42},
}
STARTED_FROM = "HuggingFaceTB/SmolLM2-135M-Instruct"  # MODEL of the scripts
HALVES = {"even": 0, "odd": 1}  # value of HALF: its first prompt


def row_features(rows: str = "pairs") -> Features:
    """The columns that a row has before it is tokenised, and their types. rows: pairs | sft (one answer each)."""
    from datasets import Features, List, Value

    conversation = List({"role": Value("string"), "content": Value("string")})
    if rows == "sft":
        return Features({"prompt": Value("string"), "messages": conversation, "rating": Value("float64")})
    columns = {"prompt": Value("string"), "chosen": conversation, "rejected": conversation}
    columns |= {f"{side}_rating": Value("float64") for side in ("chosen", "rejected")}
    columns |= {f"{side}_attributes": List(Value("int8")) for side in ("chosen", "rejected")}
    return Features(columns)


def write_rows(rows: Iterable[Record], features: Features, path: str) -> Dataset:
    """The rows, none included, in an Arrow file at `path`: they are read from there and not held in memory."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=path, features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()  # from_generator() would fail where there is no row
    return Dataset.from_file(path)


def save_parts(parts: dict[str, Dataset], folder: Path) -> None:
    """Write each split into a folder of its own name."""
    for name, part in parts.items():
        part.save_to_disk(folder / name, num_shards=None if len(part) else 1)  # without a file it cannot be loaded


def fingerprint(parts: dict[str, Dataset]) -> str:
    """A hash of all prompts, ratings and ids in their order: two folders with the same one hold the same rows."""
    digest = hashlib.sha256()
    columns = [name for name in HASHED if name in parts["train"].column_names]
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {len(part)}".encode())
        batches = part.select_columns(columns).iter(1000)  # so many rows in memory at once
        for batch in tqdm(batches, f"hashing {name}", -(-len(part) // 1000), unit=" thousand"):
            digest.update(repr(batch).encode())
    return digest.hexdigest()


def describe(
    parts: dict[str, Dataset], source: Source, ledger: Ledger, tokenizer: PreTrainedTokenizerBase, settings: dict
) -> dict:
    """The content of metadata.json."""
    from utils.data.tokens import chat_template_sha256, tokenizer_sha256

    sizes = {f"{name}_size": len(parts.get(name, ())) for name in ("train", "validation", "test")}
    rows, columns = sum(sizes.values()), parts["train"].column_names
    cut = {
        name.removesuffix("_cut"): round(sum(sum(part[name]) for part in parts.values()) / rows, 4)
        for name in ("prompt_cut", "chosen_cut", "rejected_cut", "answer_cut")
        if name in columns
    }
    of_pairs = "equal_after_cut" in columns
    equal = {"equal_after_cut": sum(sum(part["equal_after_cut"]) for part in parts.values())} if of_pairs else {}
    return {
        "dataset_name": source.name,
        "revision": source.revision,
        "split_used": source.split_used,
        "rating": source.rating,
        **sizes,
        "max_length": settings["MAX_LENGTH"],
        "tokenizer": settings["TOKENIZER"],
        "chat_template": settings["CHAT_TEMPLATE"],
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "columns": columns,
        "split_ratio": settings["VALIDATION_SHARE"],
        "seed": settings["SEED"],
        "counts": {**ledger.totals(), "pairs" if of_pairs else "rows": rows, "dropped": ledger.counts()},
        "cut_share": cut,
        **equal,
        "settings": settings,
        "versions": versions(),
        "fingerprint": fingerprint(parts),
    }


def check_folder(folder: Path, dataset: str, constant: str = "DATASET") -> None:
    """End the script where writing to the output folder would lose what is not of an earlier run, or is `dataset`.

    If an earlier run was killed in the moment between its two renamings, the old rows are put back first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}")  # as tempfile names it
    for left in sorted(path for path in folder.parent.iterdir() if work.fullmatch(path.name)):
        if is_ours(left / "old") and not folder.exists():
            os.replace(left / "old", folder)
        say(f"{left} is left of a run that was killed (or is still at work): delete it when none is running")
    if folder.is_file() or os.path.ismount(folder):
        stop(f"OUTPUT_DIR = '{folder}' is a {'file' if folder.is_file() else 'mount point'}: choose another name")
    read = Path(dataset).expanduser().resolve()
    inside = folder.exists() and read.exists() and any(map(folder.samefile, (read, *read.parents)))
    if inside:  # samefile(): macOS does not tell Rows from rows
        stop(f"OUTPUT_DIR = '{folder}' is or holds {constant}, whose rows would be lost: choose another name")
    held = {path.name for path in folder.iterdir()} - CLUTTER if folder.exists() else set()
    held = {name for name in held if not name.startswith(("._", ".nfs"))}  # of macOS and NFS beside files of ours
    if held - OURS:
        stop(f"OUTPUT_DIR = '{folder}' holds {', '.join(sorted(held - OURS)[:5])}, not made here: choose another name")
    if held and not is_ours(folder):
        stop(
            f"OUTPUT_DIR = '{folder}' holds {', '.join(sorted(held))}, of no run of a script here: choose another name"
        )


def splits_of(folder: str | Path) -> dict[str, Path]:
    """{name: path} of the splits that a processed folder has."""
    return {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/state.json"))}


def is_ours(folder: Path) -> bool:
    """Whether a script here has made the folder: it is renamed when whole, so its metadata are there."""
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and "fingerprint" in metadata


def replace_folder(folder: Path, whole: Path) -> None:
    """Put the folder `whole` in the place of `folder`: the old one is there until the new one is complete."""
    old = whole.with_name("old")
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(whole, folder)
    except BaseException:  # Ctrl-C too: what is left beside `whole` is deleted on the way out
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise


def next_command(command: str, folder: str, *models: str) -> str:
    """The command with the folder that it is to read and the model it is to start from, where these are not its own.

    models: the first of them that is a language model is named; a reward model starts no policy.
    """
    folder = str(Path(folder).expanduser())
    if folder != READ_BY_DEFAULT:
        command += f" --data_dir {shlex.quote(folder)}"
    model = next((name for name in models if not (Path(name) / "reward_config.json").exists()), STARTED_FROM)
    return command if model == STARTED_FROM else f"{command} --model {shlex.quote(model)}"


def reload_command(metadata: dict, folder: str, name: str) -> str:
    """Return the command that makes a processed folder again with the tokenizer of `name`."""
    script = metadata.get("made_by", "load_helpsteer_dataset.py")
    settings = metadata["settings"] | {"TOKENIZER": name, "MODEL": name, "OUTPUT_DIR": str(folder)}
    named = (*MAKE_AGAIN, "OUTPUT_DIR")
    if "generated" in metadata:
        script, named = "-m extras.generate_pairs", ("DATA_DIR", "MODEL", "MODE", "REWARD_MODEL", "OUTPUT_DIR")
    given = {key: settings[key] for key in named if key in settings}
    given |= {key: settings[key] for key, default in LEFT_OUT.items() if settings.get(key, default) != default}
    return f"python {script}" + "".join(f" --{key.lower()} {shlex.quote(str(value))}" for key, value in given.items())


def print_summary(metadata: dict, folder: Path, next_step: str = "python dataset_summary.py") -> None:
    """Tell what was read, used and left out."""
    counts, cut = metadata["counts"], metadata["cut_share"]
    made = f"{counts['pairs']} pairs" if "pairs" in counts else f"{counts['rows']} answers"
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "nothing"
    say(f"read {counts['rows_read']} rows of {counts['prompts']} prompts: {made}")
    say(f"left out: {dropped} ({counts['rows_dropped']} rows, each listed in {folder / 'dropped.jsonl'})")
    say(
        f"split: {metadata['train_size']} train, {metadata['validation_size']} validation, {metadata['test_size']} test"
    )
    window = f"window of {metadata['max_length']} tokens cuts {cut['prompt']:.0%} of the prompts"
    if "pairs" in counts:
        say(
            f"{window}, {cut['chosen']:.0%} of the chosen and {cut['rejected']:.0%} of the rejected answers; "
            f"{metadata['equal_after_cut']} pairs are equal then"
        )
    else:
        say(f"{window} and {cut['answer']:.0%} of the answers")
    say(f"written: {folder}\nnext: {next_step}")


def refuse_sft_rows(folder: str | Path, metadata: dict) -> None:
    """End the script where pairs are needed and the folder holds single answers."""
    if metadata.get("rows") == "sft":
        stop(f"{folder} holds sft rows, not pairs: `python -m extras.train_sft` reads these, or load with ROWS = pairs")


def load_pairs(data_dir: str, split: str, max_rows: int = 0) -> Dataset:
    """The rows of one split with ids that a trainer can use: at most max_rows (0 = all), numbered by `row`.

    Pairs that are equal in the window teach nothing and are left out; how many is printed.
    """
    from datasets import disable_caching, load_from_disk

    disable_caching()  # else each change of rows leaves a file in the processed folder, which is not ours to write in
    rows = load_from_disk(str(needs(Path(data_dir) / split, made_by="load_helpsteer_dataset.py")))
    refuse_sft_rows(data_dir, read_json(Path(data_dir) / "metadata.json"))
    rows = rows.add_column("row", np.arange(len(rows)))
    if max_rows:
        rows = rows.select(range(min(max_rows, len(rows))))
    different = [i for i, equal in enumerate(rows["equal_after_cut"]) if not equal]
    if len(different) < len(rows):
        say(f"{split}: {len(rows) - len(different)} of {len(rows)} pairs are equal in the window and are left out")
        rows = rows.select(different)
    if not len(rows):
        stop(f"{data_dir}/{split} has no pair to use: run load_helpsteer_dataset.py with a larger share or more rows")
    return rows


def matching_tokenizer(data_dir: str, constant: str, name: str) -> tuple[PreTrainedTokenizerBase, dict]:
    """(tokenizer of `name`, metadata.json of data_dir), or an end to the script where the ids are another one's.

    Compared by what tokenizer and template do, not by their names: hub, offline copy and SFT folder are the same.
    """
    from utils.data.tokens import chat_template_sha256, load_tokenizer, tokenizer_sha256

    metadata = read_json(needs(Path(data_dir) / "metadata.json", made_by="load_helpsteer_dataset.py"))
    tokenizer = load_tokenizer(name, metadata["settings"].get("CHAT_TEMPLATE", ""), constant)
    now = {"tokenizer": tokenizer_sha256(tokenizer), "chat_template": chat_template_sha256(tokenizer)}
    for what, value in now.items():
        if metadata[f"{what}_sha256"] != value:
            stop(
                f"{data_dir} was made with another {what.replace('_', ' ')} than that of {constant} = {name!r}: "
                f"run `{reload_command(metadata, data_dir, name)}` first"
            )
    return tokenizer, metadata


def ratings_of(rows: Dataset) -> tuple[list[float], list[float] | None]:
    """(all ratings of the answers that there are, means of the five attributes or None where no answer has any)."""
    sides = ("chosen", "rejected")
    ratings = [rating for side in sides for rating in rows[f"{side}_rating"] if rating is not None]
    attributes = [given for side in sides for given in rows[f"{side}_attributes"] if given]
    return ratings, np.mean(attributes, axis=0).tolist() if attributes else None


def answer_tokens(rows: Dataset) -> np.ndarray:
    """Tokens of the chosen and the rejected answer in the window [rows, 2]."""
    return np.array([[len(ids) for ids in rows[f"{side}_ids"]] for side in ("chosen", "rejected")], dtype=float).T


def prompt_of(row: dict) -> list[int]:
    """The ids of a row's prompt, without its padding."""
    return row["input_ids"][: sum(row["attention_mask"])]


def closed_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an end of turn behind cut answers too, as reward models need (see `tokens.closed`)."""
    from utils.data.tokens import closed, end_of_turn

    closing = end_of_turn(tokenizer)
    for side in ("chosen", "rejected"):
        both = zip(rows[f"{side}_ids"], rows[f"{side}_cut"], strict=True)
        ids = [closed(answer, closing) if cut else answer for answer, cut in both]
        kind = rows.features[f"{side}_ids"]
        rows = rows.remove_columns(f"{side}_ids").add_column(f"{side}_ids", ids, feature=kind)
    return rows


def same_prompt(rows: Dataset) -> np.ndarray:
    """Return for each row [rows] the index of the first row with the same prompt (all turns before the answer)."""
    first = {}
    return np.array([first.setdefault(str(messages[:-1]), i) for i, messages in enumerate(rows["chosen"])], dtype=int)


def unique_prompts(rows: Dataset, count: int = 0) -> Dataset:
    """Return the first row of each prompt, at most `count` rows (0 = all); rows of one prompt are not independent."""
    return rows.select(np.unique(same_prompt(rows))[: count or None])


def half(rows: Dataset, name: str) -> Dataset:
    """Return the pairs of every second prompt. The two HALVES share no prompt."""
    number = np.unique(same_prompt(rows), return_inverse=True)[1]
    found = rows.select(np.flatnonzero(number % 2 == HALVES[name]))
    if not len(found):
        stop(f"HALF = {name!r} holds no pair: the {len(rows)} rows have {number.max() + 1} prompt(s)")
    return found
