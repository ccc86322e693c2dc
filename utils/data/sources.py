"""Open a dataset from the hub, a folder or a file, and read its records one by one."""

import ast
import csv
import gzip
import json
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from utils.script import say, stop

Record = dict[str, Any]  # one row as the source has it
Layouts = dict[str, list[set[str]]]
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of HelpSteer
HIGHEST_ATTRIBUTE = 4  # annotators gave integers from 0 to this
LAYOUTS: Layouts = {  # name: sets of columns, each sufficient to recognise the layout
    "attributes": [{"prompt", "response", *ATTRIBUTES}],
    "pairs": [{"chosen", "rejected"}],
    "strength": [
        {"prompt", "response_1", "response_2", "preference_strength"},  # HelpSteer2, folder preference/
        {"context", "response1", "response2", "overall_preference"},  # HelpSteer3
    ],
}
TREE_LAYOUTS: Layouts = {  # OpenAssistant: a record is a tree of messages, or one message
    "trees": [{"message_tree_id", "prompt"}, {"role", "text", "replies"}],
    "messages": [{"message_id", "parent_id", "role", "text"}],
}
ANSWER_LAYOUTS: Layouts = {"messages": [{"messages"}], "completion": [{"prompt", "completion"}]}  # for SFT
EXPORTS = ["*.messages.jsonl.gz", "*.trees.jsonl.gz"]  # of oasst1 and oasst2: the rows of the tables once more
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # names of splits that are not for training
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # train-00000-of-00002; older names end with a hash
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
MESSAGES_AS_TEXT = re.compile(r"""\[\s*\{\s*['"](role|content)['"]\s*:""")  # in a CSV cell
NUMPY_LIST = re.compile(r"\}\s+\{|\barray\(")  # numpy writes lists without commas
HEAD = 100  # records that show the columns of a source: a single record may lack some
HUB_ERRORS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "HFValidationError": "neither a local folder nor a hub name",
    "RepositoryNotFoundError": "the hub has no such name (or it is private: set HF_TOKEN)",
}


@dataclass
class Source:
    """A dataset. `splits` maps "train", and "test" if the dataset has one, to a function that reads its records."""

    name: str
    revision: str  # commit of the hub repository, "" for local files
    splits: dict[str, Callable[[], Iterator[Record]]]
    split_used: dict[str, str] = field(default_factory=dict)  # train -> average_rating_split
    layouts: dict[str, str] = field(default_factory=dict)  # train -> a key of LAYOUTS
    rating: str = ""  # RATING, if it determines the ratings (by its weights or its split)


def open_source(dataset: str, rating: str, layouts: Layouts = LAYOUTS) -> Source:
    """Return the source called `dataset`: a local file or folder, or owner/name[/part] on the hub.

    part is a folder of the repository (`nvidia/HelpSteer2/preference`) or a split. rating chooses the split if the
    source has one split per rating. layouts: the layouts that the caller can read. Stops if the dataset is not
    available.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return from_files(dataset, "", files_of(path, dataset), rating, layouts)
    if suffix_of(path) or dataset.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(dataset):
        stop(f"DATASET = {dataset!r} is not there: neither a file nor a folder, and not a hub name such as owner/name")
    folder, part = download(dataset)
    if part and (folder / part).is_dir():
        return from_files(dataset, folder.name, files_of(folder / part, dataset), rating, layouts)
    files = files_of(folder, dataset)
    if part and part not in files:
        stop(f"DATASET = {dataset!r}: no folder or split {part!r} there, splits: {', '.join(files)}")
    return from_files(dataset, folder.name, {part: files[part]} if part else files, rating, layouts)


def download(dataset: str) -> tuple[Path, str]:
    """Return (local copy of a hub repository, requested part). The folder's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    owner, name, *rest = dataset.split("/")
    part = "".join(rest)
    patterns = [f"{part}/*{suffix}" for suffix in READERS] + [f"*{part}*{suffix}" for suffix in READERS]
    try:
        folder = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            allow_patterns=patterns if part else [f"*{suffix}" for suffix in READERS],
            ignore_patterns=None if part else EXPORTS,
        )
    except GatedRepoError:
        stop(f"DATASET = {dataset!r} is gated: accept its terms on the hub and set HF_TOKEN in the environment")
    except (RepositoryNotFoundError, HFValidationError):
        stop(f"DATASET = {dataset!r} is not on the hub (or private, then set HF_TOKEN): check the spelling")
    except Exception as error:  # network errors depend on the HTTP library of huggingface_hub
        if getattr(error, "errno", None) is not None:  # a disk error
            raise
        stop(
            f"DATASET = {dataset!r}: the hub cannot be reached and the cache has no complete copy "
            f"({type(error).__name__}): use a local file or folder instead"
        )
    return Path(folder), part


def files_of(path: Path, dataset: str) -> dict[str, list[Path]]:
    """Return {split: files} of a file or folder; shards such as train-00000-of-00002.parquet form one split.

    dataset: the name of the source in messages.
    """
    if path.is_file():
        if not suffix_of(path):
            stop(f"DATASET = '{path}': cannot read this kind of file, known: {', '.join(READERS)}")
        return {"train": [path]}
    if (path / "state.json").exists():  # written by Dataset.save_to_disk
        return {"train": sorted(path.glob("data-*.arrow"))}  # not cache-*.arrow, which map() leaves there
    saved = [folder for folder in sorted(path.iterdir()) if (folder / "state.json").exists()]
    if saved:
        return {folder.name: sorted(folder.glob("data-*.arrow")) for folder in saved}
    files: dict[str, list[Path]] = {}
    for file in (file for folder in (path, path / "data") for file in sorted(folder.glob("*"))):
        if has_rows(file):
            name = SHARD.sub("", file.name.removesuffix(suffix_of(file)))
            shards = files.setdefault(name, [])
            if shards and (file.parent, suffix_of(file)) != (shards[0].parent, suffix_of(shards[0])):
                stop(f"DATASET = '{path}' has its split {name!r} twice: use {shards[0]} or {file}")
            shards.append(file)
    if not files:
        folders = [folder.name for folder in sorted(path.iterdir()) if any(map(has_rows, folder.glob("*")))]
        if folders:
            choices = ", ".join(f"{dataset}/{name}" for name in folders[:9])
            stop(f"DATASET = {dataset!r} has its files in folders, choose one: {choices}")
        stop(f"DATASET = '{path}' contains no file that can be read, known: {', '.join(READERS)}")
    return files


def has_rows(file: Path) -> bool:
    return file.is_file() and suffix_of(file) != "" and file.name not in NOT_ROWS


def from_files(dataset: str, revision: str, files: dict[str, list[Path]], rating: str, layouts: Layouts) -> Source:
    train = choose_split(dataset, files, rating)
    held_out = next((name for name in HELD_OUT if name in files and train == "train"), "")
    unread = [name for name in files if name not in (train, held_out)]
    if unread:
        say(f"splits of {dataset} that are not read: {', '.join(unread)}")
    used = {"train": train} | ({"test": held_out} if held_out else {})
    splits = {role: reader_of(files[name]) for role, name in used.items()}
    has_column = not held_out and "split" in next(splits["train"](), {})
    if has_column and any(map(is_held_out, splits["train"]())):
        used = {"train": f"{train}, rows for training", "test": f"{train}, rows held out"}
        splits = {role: part_of(splits["train"], role == "test") for role in used}
    heads = {role: head_of(read()) for role, read in splits.items()}
    for role, head in heads.items():
        if not head:
            stop(f"DATASET = {dataset!r} has no rows in its split {used[role]!r}")
    recognised = {role: recognise(dataset, head, layouts) for role, head in heads.items()}
    rated = recognised["train"] == "attributes" or matches(rating, train)
    if not rated and rating not in ("", "average"):
        say(f"RATING = {rating!r} has no effect: {dataset} already has pairs, and one split for training")
    return Source(dataset, revision, splits, used, recognised, rating if rated else "")


def is_held_out(record: Record) -> bool:
    """Return True if the record's own column `split` excludes it from training (HelpSteer2, folder preference/)."""
    return str(record.get("split")).lower() in HELD_OUT


def part_of(read: Callable[[], Iterator[Record]], held_out: bool) -> Callable[[], Iterator[Record]]:
    return lambda: (record for record in read() if is_held_out(record) == held_out)


def choose_split(dataset: str, files: dict[str, list[Path]], rating: str) -> str:
    """Return the split to train on: train, the only one, or the one with the name of the rating."""
    names = list(files)
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else names[0]
    for name in names:
        if matches(rating, name):
            return name
    local, first = Path(dataset).expanduser().exists(), files[names[0]][0]
    example = first if local and first.suffix != ".arrow" else f"{dataset}/{names[0]}"
    wanted = f"for RATING = {rating!r}" if rating else "called train"
    stop(f"DATASET = {dataset!r} has no split {wanted}, it has: {', '.join(names)}; choose one: {example}")


def matches(rating: str, split: str) -> bool:
    return rating != "" and split.removesuffix("_split") in (rating, f"{rating}_rating", f"{rating}_score")


def reader_of(files: list[Path]) -> Callable[[], Iterator[Record]]:
    """Return a function that reads the records of all files, in order."""

    def read() -> Iterator[Record]:
        for file in files:
            try:
                yield from READERS[suffix_of(file)](file)
            except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:  # truncated, or another format
                stop(f"{file} cannot be read: {type(error).__name__} {str(error).partition(chr(10))[0][:160]}")

    return read


def read_json_lines(path: Path) -> Iterator[Record]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:  # bytes, so that a line that is not UTF-8 gets a line number too
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line.rstrip())
                except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
                    stop(f"{path}: line {number} is not JSON ({str(error).replace('line 1 column', 'at column')})")
                if not isinstance(record, dict):
                    stop(f"{path}: line {number} is not a JSON object")
                yield record


def read_json(path: Path) -> Iterator[Record]:
    """Read a JSON array of objects, or JSON lines in a file with this suffix."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    records = json.loads(text)
    if not all(isinstance(record, dict) for record in records):
        stop(f"{path}: expected an array of objects")
    yield from records


def read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the largest C long on every platform; the default is 131,072 characters
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for record in reader:
            if None in record:
                stop(f"{path}: line {reader.line_num} has more cells than the header")
            for name, cell in record.items():
                if cell and MESSAGES_AS_TEXT.match(cell):
                    record[name] = messages_in_cell(cell, f"{path}: line {reader.line_num}: {name}")
            yield record


def messages_in_cell(cell: str, place: str) -> Any:
    """Return the messages that a cell holds as JSON or (from pandas) Python, else its text."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(cell)
    if NUMPY_LIST.search(cell):
        stop(f"{place} holds messages that are neither JSON nor Python (numpy's?): write .parquet or .jsonl instead")
    return cell


def read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def read_arrow(path: Path) -> Iterator[Record]:
    from datasets import Dataset

    yield from Dataset.from_file(str(path))


READERS = {
    ".jsonl.gz": read_json_lines,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def suffix_of(path: Path) -> str:
    """Return the key of READERS for a file, "" if there is no reader."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def first_of(records: Iterator[Record], count: int) -> Iterator[Record]:
    """Return the first `count` records, 0 = all."""
    return islice(records, min(count, sys.maxsize) or None)


def head_of(records: Iterator[Record]) -> list[Record]:
    """Return the first HEAD records."""
    return list(islice(records, HEAD))


def recognise(name: str, head: list[Record], layouts: Layouts) -> str:
    """Return the layout of the records. Stop if it is unknown, and list the known columns."""
    layout = layout_of(head, layouts)
    if layout:
        return layout
    columns = f"DATASET = {name!r} has columns {' '.join(sorted(set().union(*head)))}"
    if layout_of(head, TREE_LAYOUTS):
        stop(f"{columns}, these are message trees: use `python -m extras.load_oasst_dataset --dataset {name}`")
    known = "; ".join(" ".join(sorted(columns)) for alternatives in layouts.values() for columns in alternatives)
    stop(f"{columns}, needed is one of: {known}")


def layout_of(head: list[Record], layouts: Layouts) -> str:
    """Return the first of the layouts whose columns the records have, "" if none matches."""
    columns: set[str] = set().union(*head)
    fits = (name for name, alternatives in layouts.items() if any(needed <= columns for needed in alternatives))
    return next(fits, "")


def in_cache(name: str, kind: str) -> bool:
    """Return True if the hub cache holds weights (kind "model") or rows ("dataset") of that name."""
    from huggingface_hub import constants

    repository = "--".join([f"{kind}s", *name.split("/")[:2]])  # the name of a dataset may have a third part
    patterns = ("*.safetensors", "*.bin") if kind == "model" else ("*.parquet", "*.jsonl*", "*.csv")
    snapshots = Path(constants.HF_HUB_CACHE) / repository / "snapshots"
    return any(file.exists() for pattern in patterns for file in snapshots.rglob(pattern))  # False for a broken link


def ask_hub(names: dict[str, str], timeout: float = 2.0) -> dict[str, str]:
    """Return {kind: "" or why the hub cannot provide it} within `timeout` seconds, without URLs and tokens.

    names: {"model" or "dataset": its name}.
    """
    from huggingface_hub import HfApi

    answers = {kind: f"the hub did not answer within {timeout:g} s" for kind in names}

    def ask(kind: str) -> None:
        try:
            HfApi().repo_info("/".join(names[kind].split("/")[:2]), repo_type=kind, timeout=timeout)
            answers[kind] = ""
        except Exception as error:  # any error of the network
            answers[kind] = HUB_ERRORS.get(type(error).__name__, f"the hub is not reachable ({type(error).__name__})")

    # threads, because the library's timeout does not cover the DNS look-up
    threads = [threading.Thread(target=ask, args=(kind,), daemon=True) for kind in names]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)
