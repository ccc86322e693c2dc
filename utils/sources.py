"""Where preference rows come from: the hub, a hub mirror folder, or one local file; records are read one by one."""

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.runs import say, stop

Record = dict  # one row as the source has it
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # of HelpSteer, 0 to 4 each

LAYOUTS = {  # name: sets of columns, each enough to recognise the layout
    "attributes": [{"prompt", "response", *ATTRIBUTES}],
    "pairs": [{"chosen", "rejected"}],
    "strength": [
        {"prompt", "response_1", "response_2", "preference_strength"},  # HelpSteer2, folder preference/
        {"context", "response1", "response2", "overall_preference"},  # HelpSteer3
    ],
}
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")  # names of a split that is not for training
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass
class Source:
    """What a dataset offers. `splits` maps "train" and, where there is one, "test" to a reader of its records."""

    name: str
    revision: str  # commit of the hub's repository, "" for local files
    splits: dict[str, Callable[[], Iterator[Record]]]
    split_used: dict[str, str] = field(default_factory=dict)  # train -> average_rating_split


def open_source(dataset: str, rating: str) -> Source:
    """The source called `dataset`: a local file or folder, or owner/name[/part] on the hub.

    part is a folder of the repository (`nvidia/HelpSteer2/preference`) or a split. rating picks the split of a
    source that has one split a rating. Ends the script where the dataset cannot be had; there is no second choice.
    """
    path = Path(dataset)
    if path.exists():
        return from_files(dataset, "", files_of(path), rating)
    if path.suffix or dataset.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(dataset):
        stop(f"DATASET = {dataset!r} is not there: neither a file nor a folder, and not a hub name such as owner/name")
    folder, part = download(dataset)
    files = files_of(folder / part) if part and (folder / part).is_dir() else files_of(folder)
    if part in files:
        files = {part: files[part]}
    elif part and not (folder / part).is_dir():
        stop(f"DATASET = {dataset!r}: no folder or split {part!r} there, splits: {', '.join(files)}")
    return from_files(dataset, folder.name, files, rating)


def download(dataset: str) -> tuple[Path, str]:
    """(local copy of a hub repository, the part asked for); the copy's folder is called like its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    owner, name, *part = dataset.split("/")
    wanted = [f"*{suffix}" for suffix in READERS]
    if part:
        wanted = [pattern for suffix in READERS for pattern in (f"{part[0]}/*{suffix}", f"*{part[0]}*{suffix}")]
    try:
        folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=wanted)
    except GatedRepoError:
        stop(f"DATASET = {dataset!r} is gated: accept its terms on the hub and set HF_TOKEN in the environment")
    except (RepositoryNotFoundError, HFValidationError):
        stop(f"DATASET = {dataset!r} is not on the hub (or private, then set HF_TOKEN): check the spelling")
    except (LocalEntryNotFoundError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk, not the hub
            raise
        stop(f"DATASET = {dataset!r}: the hub cannot be reached and the cache has no copy: give a local file instead")
    return Path(folder), "".join(part)


def files_of(path: Path) -> dict[str, list[Path]]:
    """{split: files} of one file or of a folder, where shards train-00000-of-00002.parquet belong to one split."""
    if path.is_file():
        if not suffix_of(path):
            stop(f"DATASET = '{path}': cannot read this kind of file, known: {', '.join(READERS)}")
        return {"train": [path]}
    files = {}
    for folder in (path, path / "data"):
        for file in sorted(folder.glob("*")) if not files else ():
            if suffix_of(file) and file.name not in ("dataset_info.json", "state.json", "dataset_dict.json"):
                stem = file.name.removesuffix(suffix_of(file))
                files.setdefault(re.sub(r"-\d+-of-\d+$", "", stem), []).append(file)
    if not files:
        files = {folder.name: sorted(folder.glob("*.arrow")) for folder in (path, *path.iterdir()) if folder.is_dir()}
        files = {name: arrows for name, arrows in files.items() if arrows}  # what save_to_disk has written
    if not files:
        stop(f"DATASET = '{path}': no file in it that can be read, known: {', '.join(READERS)}")
    return files


def from_files(dataset: str, revision: str, files: dict[str, list[Path]], rating: str) -> Source:
    train = choose_split(dataset, list(files), rating)
    used = {"train": train}
    if train == "train":
        used |= {"test": next(name for name in HELD_OUT if name in files)} if set(HELD_OUT) & set(files) else {}
    unread = [name for name in files if name not in used.values()]
    if unread:
        say(f"splits of {dataset} that are not read: {', '.join(unread)}")
    return Source(dataset, revision, {role: reader_of(files[name]) for role, name in used.items()}, used)


def choose_split(dataset: str, names: list[str], rating: str) -> str:
    """The split to train on: train, or the one named after the rating, with or without `_split`, or the only one."""
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else names[0]
    for wanted in (rating, f"{rating}_rating", f"{rating}_score"):
        for name in names:
            if name.removesuffix("_split") == wanted:
                return name
    stop(f"DATASET = {dataset!r} has no split for RATING = {rating!r}, it has: {', '.join(names)}")


def reader_of(files: list[Path]) -> Callable[[], Iterator[Record]]:
    """A function that reads the records of all files, one after the other."""

    def read() -> Iterator[Record]:
        for file in files:
            yield from READERS[suffix_of(file)](file)

    return read


def read_json_lines(path: Path) -> Iterator[Record]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    stop(f"{path}: line {number} is not JSON ({error.msg} at column {error.colno})")
                if not isinstance(record, dict):
                    stop(f"{path}: line {number} is not a JSON object")
                yield record


def read_json(path: Path) -> Iterator[Record]:
    """A JSON array of objects; a file of JSON lines with this ending is read as such."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        stop(f"{path}: line {error.lineno} is not JSON ({error.msg})")
    if not all(isinstance(record, dict) for record in records):
        stop(f"{path}: expected an array of objects")
    yield from records


def read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        stop(f"{path}: not a parquet file ({str(error).splitlines()[0][:120]})")


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
    """The ending of a file that can be read, "" for others."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def recognise(name: str, columns: set[str]) -> str:
    """The layout that these columns are, or an end to the script that lists what is known."""
    for layout, alternatives in LAYOUTS.items():
        if any(needed <= columns for needed in alternatives):
            return layout
    known = "; ".join(" ".join(sorted(needed)) for alternatives in LAYOUTS.values() for needed in alternatives)
    stop(f"DATASET = {name!r} has columns {' '.join(sorted(columns))}, needed is one of: {known}")
