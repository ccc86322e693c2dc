"""Where preference rows come from: the hub, a folder or one local file; records are read one by one."""

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

from utils.script import say, stop

MESSAGES_AS_TEXT = re.compile(r"""\[\s*\{\s*['"](role|content)['"]\s*:""")  # in a CSV cell
NUMPYS = re.compile(r"\}\s+\{|\barray\(")  # numpy's way to write a list: no commas
Record = dict  # one row as the source has it
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of HelpSteer
HIGHEST_ATTRIBUTE = 4  # people gave whole numbers from 0 to this
LAYOUTS = {  # name: sets of columns, each enough to recognise the layout
    "attributes": [{"prompt", "response", *ATTRIBUTES}],
    "pairs": [{"chosen", "rejected"}],
    "strength": [
        {"prompt", "response_1", "response_2", "preference_strength"},  # HelpSteer2, folder preference/
        {"context", "response1", "response2", "overall_preference"},  # HelpSteer3
    ],
}
TREE_LAYOUTS = {  # messages of OpenAssistant: a record is a tree of them, or one
    "trees": [{"message_tree_id", "prompt"}, {"role", "text", "replies"}],
    "messages": [{"message_id", "parent_id", "role", "text"}],
}
ANSWER_LAYOUTS = {"messages": [{"messages"}], "completion": [{"prompt", "completion"}]}  # single answers, for SFT
EXPORTS = ("*.messages.jsonl.gz", "*.trees.jsonl.gz")  # beside the tables of oasst1 and oasst2: the same rows again
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # names of a split that is not for training
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # train-00000-of-00002, older ones with a hash after it
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
HEAD = 100  # the first so many records show what columns there are: a single one may lack some
REASONS = {  # errors of the hub's library in a user's words
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "HFValidationError": "neither a folder here nor a hub name",
    "RepositoryNotFoundError": "the hub has no such name (or it is private: set HF_TOKEN)",
}


def read_csv(path: Path) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # the largest that fits a C long everywhere; the default is 131,072 letters
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for record in reader:
            if None in record:
                stop(f"{path}: line {reader.line_num} has more cells than the header")
            for name, cell in record.items():
                if cell and MESSAGES_AS_TEXT.match(cell):
                    record[name] = messages_in_cell(cell, f"{path}: line {reader.line_num}: {name}")
            yield record


def messages_in_cell(cell: str, place: str) -> list | str:
    """The message list that a cell holds as JSON or, as pandas writes it, as Python; a text that only begins so."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(cell)
    if NUMPYS.search(cell):
        stop(f"{place} holds messages that are neither JSON nor Python (numpy's?): write .parquet or .jsonl instead")
    return cell


def read_parquet(path: Path) -> Iterator[dict]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
        yield from batch.to_pylist()


def read_arrow(path: Path) -> Iterator[dict]:
    from datasets import Dataset

    yield from Dataset.from_file(str(path))


@dataclass
class Source:
    """What a dataset offers. `splits` maps "train" and, where there is one, "test" to a reader of its records."""

    name: str
    revision: str  # commit of the hub's repository, "" for local files
    splits: dict[str, Callable[[], Iterator[Record]]]
    split_used: dict[str, str] = field(default_factory=dict)  # train -> average_rating_split
    layouts: dict[str, str] = field(default_factory=dict)  # train -> a key of LAYOUTS
    rating: str = ""  # what the ratings are if RATING has decided it: by weights, or by the split


def open_source(dataset: str, rating: str, layouts: dict = LAYOUTS) -> Source:
    """The source called `dataset`: a local file or folder, or owner/name[/part] on the hub.

    part is a folder of the repository (`nvidia/HelpSteer2/preference`) or a split. rating picks the split of a
    source that has one split a rating, "" for sources without such. layouts: those that the caller can read.
    Ends the script where the dataset cannot be had; there is no second choice.
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
    """(local copy of a hub repository, the part asked for); the copy's folder is called like its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    owner, name, *part = dataset.split("/")
    wanted = [f"*{suffix}" for suffix in READERS]
    if part:
        wanted = [pattern for suffix in READERS for pattern in (f"{part[0]}/*{suffix}", f"*{part[0]}*{suffix}")]
    try:
        folder = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            allow_patterns=wanted,
            ignore_patterns=None if part else list(EXPORTS),
        )
    except GatedRepoError:
        stop(f"DATASET = {dataset!r} is gated: accept its terms on the hub and set HF_TOKEN in the environment")
    except (RepositoryNotFoundError, HFValidationError):
        stop(f"DATASET = {dataset!r} is not on the hub (or private, then set HF_TOKEN): check the spelling")
    except Exception as error:  # what the network raises depends on the HTTP library below the hub's
        if getattr(error, "errno", None) is not None:  # the disk, not the hub
            raise
        stop(
            f"DATASET = {dataset!r}: the hub cannot be reached and the cache has no whole copy "
            f"({type(error).__name__}): give a local file or folder instead"
        )
    return Path(folder), "".join(part)


def files_of(path: Path, dataset: str) -> dict[str, list[Path]]:
    """{split: files} of one file or of a folder, where shards train-00000-of-00002.parquet belong to one split.

    path: where the dataset is, which messages call by its name.
    """
    if path.is_file():
        if not suffix_of(path):
            stop(f"DATASET = '{path}': cannot read this kind of file, known: {', '.join(READERS)}")
        return {"train": [path]}
    if (path / "state.json").exists():  # a Dataset.save_to_disk
        return {"train": sorted(path.glob("data-*.arrow"))}
    saved = [folder for folder in sorted(path.iterdir()) if (folder / "state.json").exists()]
    if saved:  # not *.arrow: a later map() leaves its cache-*.arrow there
        return {folder.name: sorted(folder.glob("data-*.arrow")) for folder in saved}
    files = {}
    for file in (file for folder in (path, path / "data") for file in sorted(folder.glob("*"))):
        if is_of_rows(file):
            name = SHARD.sub("", file.name.removesuffix(suffix_of(file)))
            shards = files.setdefault(name, [])
            if shards and (file.parent, suffix_of(file)) != (shards[0].parent, suffix_of(shards[0])):
                stop(f"DATASET = '{path}' has its split {name!r} twice: give {shards[0]} or {file}")
            shards.append(file)
    if not files:
        parts = [
            f"{dataset}/{folder.name}" for folder in sorted(path.iterdir()) if any(map(is_of_rows, folder.glob("*")))
        ]
        if parts:
            stop(f"DATASET = {dataset!r} has its files in folders, name one: {', '.join(parts[:9])}")
        stop(f"DATASET = '{path}': no file in it that can be read, known: {', '.join(READERS)}")
    return files


def is_of_rows(file: Path) -> bool:
    return file.is_file() and suffix_of(file) != "" and file.name not in NOT_ROWS


def from_files(dataset: str, revision: str, files: dict[str, list[Path]], rating: str, layouts: dict) -> Source:
    train = choose_split(dataset, files, rating)
    held_out = next((name for name in HELD_OUT if name in files and train == "train"), "")
    unread = [name for name in files if name not in (train, held_out)]
    if unread:
        say(f"splits of {dataset} that are not read: {', '.join(unread)}")
    used = {"train": train} | ({"test": held_out} if held_out else {})
    splits = {role: reader_of(files[name]) for role, name in used.items()}
    by_column = not held_out and "split" in next(splits["train"](), {})
    if by_column and any(held_out_by_column(record) for record in splits["train"]()):
        used = {"train": f"{train}, rows for training", "test": f"{train}, rows held out"}
        splits = by_split_column(splits["train"])
    heads = {role: head_of(read()) for role, read in splits.items()}
    for role, head in heads.items():
        if not head:
            stop(f"DATASET = {dataset!r} has no rows in its split {used[role]!r}")
    found = {role: recognise(dataset, head, layouts) for role, head in heads.items()}
    decided = found["train"] == "attributes" or named_after(rating, train)
    if not decided and rating not in ("", "average"):
        say(f"RATING = {rating!r} decides nothing here: {dataset} has its pairs already, and one split for training")
    return Source(dataset, revision, splits, used, found, rating if decided else "")


def held_out_by_column(record: Record) -> bool:
    """Whether a record says by its own column `split` that it is not for training (HelpSteer2, folder preference/)."""
    return str(record.get("split")).lower() in HELD_OUT


def by_split_column(read: Callable[[], Iterator[Record]]) -> dict[str, Callable[[], Iterator[Record]]]:
    return {
        "train": lambda: (record for record in read() if not held_out_by_column(record)),
        "test": lambda: (record for record in read() if held_out_by_column(record)),
    }


def choose_split(dataset: str, files: dict[str, list[Path]], rating: str) -> str:
    """The split to train on: train, or the one named after the rating, with or without `_split`, or the only one."""
    names = list(files)
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else names[0]
    for name in names:
        if named_after(rating, name):
            return name
    wanted = f"for RATING = {rating!r}" if rating else "called train"
    file = files[names[0]][0]
    place = file.parent if file.suffix == ".arrow" else file  # a folder of save_to_disk
    if dataset.count("/") == 1 and not Path(dataset).expanduser().exists():
        place = f"{dataset}/{names[0]}"
    stop(f"DATASET = {dataset!r} has no split {wanted}, it has: {', '.join(names)}; name one: {place}")


def named_after(rating: str, split: str) -> bool:
    return rating != "" and split.removesuffix("_split") in (rating, f"{rating}_rating", f"{rating}_score")


def reader_of(files: list[Path]) -> Callable[[], Iterator[Record]]:
    """A function that reads the records of all files, one after the other."""

    def read() -> Iterator[Record]:
        for file in files:
            try:
                yield from READERS[suffix_of(file)](file)
            except (OSError, EOFError, ValueError, zlib.error) as error:  # cut off, not UTF-8, of another format
                stop(f"{file} cannot be read: {type(error).__name__} {str(error).partition(chr(10))[0][:160]}")

    return read


def read_json_lines(path: Path) -> Iterator[Record]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:  # bytes: a line that is not UTF-8 is named by its number too
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
                    place = f"{error.msg} at column {error.colno}" if hasattr(error, "colno") else str(error)
                    stop(f"{path}: line {number} is not JSON ({place[:160]})")
                if not isinstance(record, dict):
                    stop(f"{path}: line {number} is not a JSON object")
                yield record


def read_json(path: Path) -> Iterator[Record]:
    """A JSON array of objects; a file of JSON lines with this ending is read as such."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        stop(f"{path}: line {error.lineno} is not JSON ({error.msg})")
    except RecursionError as error:
        stop(f"{path} is not JSON that can be read ({error})")
    if not all(isinstance(record, dict) for record in records):
        stop(f"{path}: expected an array of objects")
    yield from records


READERS = {
    ".jsonl.gz": read_json_lines,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def suffix_of(path: Path) -> str:
    """The ending of a file that can be read, "" for others."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def first_of(records: Iterator[Record], count: int) -> Iterator[Record]:
    """The first `count` records, 0 = all of them."""
    return islice(records, min(count, sys.maxsize) or None)


def head_of(records: Iterator[Record]) -> list[Record]:
    """The first records, HEAD at most."""
    return list(islice(records, HEAD))


def recognise(name: str, head: list[Record], layouts: dict) -> str:
    """The layout of records that begin like `head`, or an end to the script that lists what is known."""
    layout, other = layout_of(head, layouts), layout_of(head, TREE_LAYOUTS)
    if layout:
        return layout
    columns = f"DATASET = {name!r} has columns {' '.join(sorted(set().union(*head)))}"
    if other:
        stop(f"{columns}, these are message trees: `python -m extras.load_oasst_dataset --dataset {name}` reads them")
    known = "; ".join(" ".join(sorted(needed)) for alternatives in layouts.values() for needed in alternatives)
    stop(f"{columns}, needed is one of: {known}")


def layout_of(head: list[Record], layouts: dict) -> str:
    """The first of the layouts whose columns the records have, "" if none fits."""
    columns = set().union(*head)
    fits = (name for name, alternatives in layouts.items() if any(needed <= columns for needed in alternatives))
    return next(fits, "")


def in_cache(name: str, kind: str) -> bool:
    """Whether the hub's cache on this disk holds weights (kind "model") or rows ("dataset") of that name."""
    from huggingface_hub import constants

    repository = "--".join([f"{kind}s", *name.split("/")[:2]])  # a dataset's name may go on: owner/name/folder
    wanted = ("*.safetensors", "*.bin") if kind == "model" else ("*.parquet", "*.jsonl*", "*.csv")
    snapshots = Path(constants.HF_HUB_CACHE) / repository / "snapshots"
    return any(file.exists() for pattern in wanted for file in snapshots.rglob(pattern))  # not a link to nowhere


def ask_hub(names: dict[str, str], timeout: float) -> dict[str, str]:
    """{kind: "" or why the hub does not give it, without addresses and tokens}, in `timeout` seconds in all."""
    from huggingface_hub import HfApi

    found = {kind: f"the hub did not answer within {timeout:g} s" for kind in names}

    def ask(kind: str) -> None:
        try:
            HfApi().repo_info("/".join(names[kind].split("/")[:2]), repo_type=kind, timeout=timeout)
            found[kind] = ""
        except Exception as error:  # whatever the network throws, the answer is that it cannot be had
            found[kind] = REASONS.get(type(error).__name__, f"the hub is not reachable ({type(error).__name__})")

    # a thread for each, since no timeout of the library covers the name look-up
    threads = [threading.Thread(target=ask, args=(kind,), daemon=True) for kind in names]
    until = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)
