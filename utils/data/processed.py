"""Write, describe and read the processed folder."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils.data.preferences import Ledger
from utils.data.sources import Record, Source
from utils.runs import read_json, versions
from utils.script import needs, say, stop

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

HASHED = (  # columns of the fingerprint, if the rows have them
    *("prompt", "chosen_rating", "rejected_rating", "rating"),
    *("input_ids", "completion_mask", "chosen_ids", "rejected_ids"),
)
CONTENT = {"train", "validation", "test", "metadata.json", "dropped.jsonl"}  # of a processed folder
CLUTTER = {".DS_Store", ".ipynb_checkpoints", "Thumbs.db", "desktop.ini"}  # files of other programs, in any folder
READ_BY_DEFAULT = "processed_helpsteer"  # DATA_DIR of the scripts
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # MODEL of the scripts
ALWAYS_SHOWN: tuple[str, ...] = ("DATASET", "TOKENIZER", "MAX_LENGTH", "LANGUAGE", "ROWS", "TURNS", "OUTPUT_DIR")
SHOWN_IF_CHANGED = {  # option of the loaders: default; reload_command shows these and ALWAYS_SHOWN
    **{"RATING": "average", "SYSTEM_PROMPT": "", "MIN_RATING_GAP": 0.0, "MAX_ROWS": 0, "CHAT_TEMPLATE": ""},
    **{"VALIDATION_SHARE": 0.2, "SEED": 42},
}
HALVES = {"even": 0, "odd": 1}  # value of HALF: its first prompt


def row_features(rows: str = "pairs") -> Features:
    """Return the columns of a row before tokenising, with their types. rows: pairs | sft (one answer per row)."""
    from datasets import Features, List, Value

    conversation = List({"role": Value("string"), "content": Value("string")})
    if rows == "sft":
        return Features({"prompt": Value("string"), "messages": conversation, "rating": Value("float64")})
    columns = {"prompt": Value("string"), "chosen": conversation, "rejected": conversation}
    columns |= {f"{side}_rating": Value("float64") for side in ("chosen", "rejected")}
    columns |= {f"{side}_attributes": List(Value("int8")) for side in ("chosen", "rejected")}
    return Features(columns)


def write_rows(rows: Iterable[Record], features: Features, path: str) -> Dataset:
    """Write the rows to an Arrow file at `path`, and return a dataset that reads them from disk."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=path, features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()  # Dataset.from_generator() fails without rows
    return Dataset.from_file(path)


def save_parts(splits: dict[str, Dataset], folder: Path) -> None:
    """Write each split to a folder of its own name."""
    for name, rows in splits.items():
        rows.save_to_disk(folder / name, num_shards=None if len(rows) else 1)  # load_from_disk needs at least one file


def fingerprint(splits: dict[str, Dataset]) -> str:
    """Return a hash of all prompts, ratings and ids in order: folders with equal fingerprints hold the same rows."""
    digest = hashlib.sha256()
    columns = [name for name in HASHED if name in splits["train"].column_names]
    for name, rows in sorted(splits.items()):
        digest.update(f"{name} {len(rows)}".encode())
        batches = rows.select_columns(columns).iter(1000)
        for batch in tqdm(batches, f"hashing {name}", -(-len(rows) // 1000), unit=" thousand"):
            digest.update(repr(batch).encode())
    return digest.hexdigest()


def describe(
    splits: dict[str, Dataset],
    source: Source,
    ledger: Ledger,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of metadata.json."""
    from utils.data.tokens import chat_template_sha256, tokenizer_sha256

    sizes = {f"{name}_size": len(splits.get(name, ())) for name in ("train", "validation", "test")}
    total, columns = sum(sizes.values()), splits["train"].column_names
    flags = [name for name in columns if name.endswith("_cut")]
    cut = {name: sum(sum(rows[name]) for rows in splits.values()) for name in flags}
    equal = {"equal_after_cut": cut.pop("equal_after_cut")} if "equal_after_cut" in cut else {}
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
        "counts": {**ledger.totals(), "pairs" if equal else "rows": total, "dropped": ledger.counts()},
        "cut_share": {name.removesuffix("_cut"): round(count / total, 4) for name, count in cut.items()},
        **equal,
        "settings": settings,
        "versions": versions(),
        "fingerprint": fingerprint(splits),
    }


def check_folder(folder: Path, dataset: str, constant: str = "DATASET") -> None:
    """Stop if replacing the output folder would lose `dataset` or files that are not from an earlier run.

    First restore the rows of a run that was killed between its two renames.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work_name = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}")  # as tempfile names it
    for work in sorted(path for path in folder.parent.iterdir() if work_name.fullmatch(path.name)):
        if is_processed(work / "old") and not folder.exists():
            os.replace(work / "old", folder)
        say(f"{work} belongs to a run that was killed, or is still running; if none is running, delete it")
    if folder.is_file() or os.path.ismount(folder):
        stop(f"OUTPUT_DIR = '{folder}' is a {'file' if folder.is_file() else 'mount point'}: choose another name")
    if not folder.exists():
        return
    source = Path(dataset).expanduser().resolve()
    if source.exists() and any(map(folder.samefile, (source, *source.parents))):  # on macOS Rows and rows are one
        stop(f"OUTPUT_DIR = '{folder}' would overwrite {constant}: choose another name")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(("._", ".nfs"))}  # of macOS and NFS
    names -= CLUTTER
    foreign = names if not is_processed(folder) else names - CONTENT
    if foreign:
        stop(f"OUTPUT_DIR = '{folder}' contains {', '.join(sorted(foreign)[:5])}, not made here: choose another folder")


def splits_of(folder: str | Path) -> dict[str, Path]:
    """Return {name: path} of the splits of a processed folder."""
    return {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/state.json"))}


def is_processed(folder: Path) -> bool:
    """Return True if a script here wrote the folder: a folder is renamed when complete, so its metadata is there."""
    try:
        metadata = read_json(folder / "metadata.json")
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and "fingerprint" in metadata


def replace_folder(folder: Path, complete: Path) -> None:
    """Replace `folder` by the folder `complete`; if that fails, the old one stays."""
    old = complete.with_name("old")
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(complete, folder)
    except BaseException:  # Ctrl-C too
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise


def next_command(command: str, folder: str, *models: str) -> str:
    """Return the command with --data_dir and --model where these are not its defaults.

    models: candidates for --model. The first that is not a reward model counts.
    """
    folder = str(Path(folder).expanduser())
    if folder != READ_BY_DEFAULT:
        command += f" --data_dir {shlex.quote(folder)}"
    model = next((name for name in models if not (Path(name) / "reward_config.json").exists()), DEFAULT_MODEL)
    return command if model == DEFAULT_MODEL else f"{command} --model {shlex.quote(model)}"


def reload_command(metadata: dict[str, Any], folder: str, name: str) -> str:
    """Return the command that makes a processed folder again with the tokenizer of `name`."""
    script, shown = metadata.get("made_by", "load_helpsteer_dataset.py"), ALWAYS_SHOWN
    settings = metadata["settings"] | {"TOKENIZER": name, "MODEL": name, "OUTPUT_DIR": str(folder)}
    if "generated" in metadata:
        script, shown = "-m extras.generate_pairs", ("DATA_DIR", "MODEL", "MODE", "REWARD_MODEL", "OUTPUT_DIR")
    options = {key: settings[key] for key in shown if key in settings}
    options |= {key: settings[key] for key, value in SHOWN_IF_CHANGED.items() if settings.get(key, value) != value}
    return f"python {script}" + "".join(f" --{key.lower()} {shlex.quote(str(value))}" for key, value in options.items())


def print_summary(metadata: dict[str, Any], folder: Path, next_step: str) -> None:
    """Print the numbers of rows read, used and left out."""
    counts, cut = metadata["counts"], metadata["cut_share"]
    made = f"{counts['pairs']} pairs" if "pairs" in counts else f"{counts['rows']} answers"
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "nothing"
    sizes = ", ".join(f"{metadata[f'{name}_size']} {name}" for name in ("train", "validation", "test"))
    say(f"read {counts['rows_read']} rows of {counts['prompts']} prompts: {made}")
    say(f"left out: {dropped} ({counts['rows_dropped']} rows, listed in {folder / 'dropped.jsonl'})")
    say(f"split: {sizes}")
    window = f"a window of {metadata['max_length']} tokens cuts {cut['prompt']:.0%} of the prompts"
    if "pairs" in counts:
        say(
            f"{window}, {cut['chosen']:.0%} of the chosen and {cut['rejected']:.0%} of the rejected answers; "
            f"{metadata['equal_after_cut']} pairs are equal after the cut"
        )
    else:
        say(f"{window} and {cut['answer']:.0%} of the answers")
    say(f"written: {folder}\nnext: {next_step}")


def refuse_sft_rows(folder: str | Path, metadata: dict[str, Any]) -> None:
    """Stop if the folder contains single answers instead of pairs."""
    if metadata.get("rows") == "sft":
        stop(f"{folder} contains sft rows, not pairs: use them in `python -m extras.train_sft`, or set ROWS = pairs")


def load_pairs(data_dir: str, split: str, max_rows: int = 0) -> Dataset:
    """Return at most max_rows rows of one split (0 = all), with a column `row` of row numbers.

    Pairs whose answers are equal in the window are left out and counted in a message: they teach nothing.
    """
    from datasets import disable_caching, load_from_disk

    disable_caching()  # otherwise each change of the rows writes a cache file to the processed folder
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
        stop(f"{data_dir}/{split} has no usable pair: load it again with a larger VALIDATION_SHARE or more rows")
    return rows


def matching_tokenizer(data_dir: str, constant: str, name: str) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return (tokenizer of `name`, metadata.json of data_dir). Stop if the data have ids of another tokenizer.

    Hashes decide, not names: the hub, an offline copy and an SFT folder have the same tokenizer.
    """
    from utils.data.tokens import chat_template_sha256, load_tokenizer, tokenizer_sha256

    metadata = read_json(needs(Path(data_dir) / "metadata.json", made_by="load_helpsteer_dataset.py"))
    tokenizer = load_tokenizer(name, metadata["settings"].get("CHAT_TEMPLATE", ""), constant)
    hashes = {"tokenizer": tokenizer_sha256(tokenizer), "chat_template": chat_template_sha256(tokenizer)}
    for kind, value in hashes.items():
        if metadata[f"{kind}_sha256"] != value:
            stop(
                f"{data_dir} was made with a different {kind.replace('_', ' ')} from that of {constant} = {name!r}: "
                f"run `{reload_command(metadata, data_dir, name)}` first"
            )
    return tokenizer, metadata


def ratings_of(rows: Dataset) -> tuple[list[float], list[float] | None]:
    """Return (ratings of all rated answers, means of the five attributes or None without attributes)."""
    sides = ("chosen", "rejected")
    ratings = [rating for side in sides for rating in rows[f"{side}_rating"] if rating is not None]
    attributes = [grades for side in sides for grades in rows[f"{side}_attributes"] if grades]
    return ratings, np.mean(attributes, axis=0).tolist() if attributes else None


def answer_tokens(rows: Dataset) -> np.ndarray:
    """Return the lengths of the chosen and the rejected answer in the window (tokens) [rows, 2]."""
    return np.array([[len(ids) for ids in rows[f"{side}_ids"]] for side in ("chosen", "rejected")], dtype=float).T


def prompt_of(row: dict[str, Any]) -> list[int]:
    """Return the ids of a row's prompt without padding."""
    return row["input_ids"][: sum(row["attention_mask"])]


def closed_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows with an end of turn in cut answers too, as reward models need it (see `tokens.closed`)."""
    from utils.data.tokens import closed, end_of_turn

    closing = end_of_turn(tokenizer)
    for side in ("chosen", "rejected"):
        answers = zip(rows[f"{side}_ids"], rows[f"{side}_cut"], strict=True)
        ids = [closed(answer, closing) if cut else answer for answer, cut in answers]
        feature = rows.features[f"{side}_ids"]
        rows = rows.remove_columns(f"{side}_ids").add_column(f"{side}_ids", ids, feature=feature)
    return rows


def same_prompt(rows: Dataset) -> np.ndarray:
    """Return for each row [rows] the index of the first row with the same prompt (all turns before the answer)."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(str(messages[:-1]), i) for i, messages in enumerate(rows["chosen"])], dtype=int)


def unique_prompts(rows: Dataset, count: int = 0) -> Dataset:
    """Return the first row of each prompt, at most `count` rows (0 = all); rows of one prompt are not independent."""
    return rows.select(np.unique(same_prompt(rows))[: count or None])


def half(rows: Dataset, name: str) -> Dataset:
    """Return the pairs of every second prompt. The two HALVES share no prompt."""
    number = np.unique(same_prompt(rows), return_inverse=True)[1]
    pairs = rows.select(np.flatnonzero(number % 2 == HALVES[name]))
    if not len(pairs):
        stop(f"HALF = {name!r} has no pair: the {len(rows)} rows have {number.max() + 1} prompt(s)")
    return pairs
