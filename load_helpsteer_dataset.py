"""Turn a preference dataset into checked, paired, split and tokenised rows.

Reads  : a dataset of the hub, a folder of files, or one .parquet, .jsonl(.gz), .json or .csv file
Writes : processed_helpsteer/ (train, validation and perhaps test, metadata.json, dropped.jsonl)

python load_helpsteer_dataset.py                                            # nvidia/HelpSteer2 from the hub
python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl  # the sample, without a hub
python load_helpsteer_dataset.py --max_length 512 --rating goodness         # any constant below, in lower case
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.config import override_constants
from utils.pairing import checked_pairs, rating_columns
from utils.rows import RATINGS, Ledger, finished_row
from utils.runs import at_least, pick, say, script, stop, versions, write_json
from utils.sources import Source, head_of, open_source
from utils.split import near_duplicate_groups, split_indices

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

# data
DATASET = "nvidia/HelpSteer2"  # hub name owner/name[/folder or split], or a local file or folder
RATING = "average"  # what the five grades are weighed into: average | goodness | helpfulness | ... (utils/rows.py)
MIN_RATING_GAP = 0.0  # leave out pairs whose ratings differ by less
SYSTEM_PROMPT = ""  # system turn (a persona) that every row begins with, "" = as the source has it
MAX_ROWS = 0  # read the first so many rows of each split only, 0 = all of them
# tokens
TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
CHAT_TEMPLATE = ""  # "" = the tokenizer's own, "plain" = User: ... Assistant: ... for one that has none
MAX_LENGTH = 256  # tokens of prompt and answer together
# split
VALIDATION_SHARE = 0.2  # of the pairs, whole prompts on one side
SEED = 42  # of the split
# output
OUTPUT_DIR = "processed_helpsteer"  # written beside its name and renamed when whole


def setup_tokenizer(name: str, chat_template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder, with a pad token and a chat template (see utils.tokens)."""
    from utils.tokens import load_tokenizer

    return load_tokenizer(name, chat_template)


def split_dataset(dataset: Dataset, test_size: float, seed: int, never_train: tuple[str, ...] = ()) -> tuple:
    """(train, validation) of a dataset with a `prompt` column: ceil(test_size x rows) rows in validation.

    Equal and near-duplicate prompts come on the same side; prompts like one of `never_train` are not trained on.
    """
    prompts = tqdm(chain(dataset["prompt"], never_train), "comparing prompts", len(dataset) + len(never_train))
    groups = near_duplicate_groups(prompts)
    banned = {int(group) for group in groups[len(dataset) :]}
    train, validation = split_indices(groups[: len(dataset)], test_size, seed, banned)
    return dataset.select(train), dataset.select(validation)


def process_dataset(train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple:
    """(train, validation) with token columns, see utils.tokens.token_columns; chosen and rejected are message lists."""
    from utils.tokens import tokenised

    return tokenised(train, tokenizer, max_length), tokenised(validation, tokenizer, max_length)


def row_features() -> Features:
    """The columns that a row has before it is tokenised, and their types."""
    from datasets import Features, List, Value

    conversation = List({"role": Value("string"), "content": Value("string")})
    columns = {"prompt": Value("string"), "chosen": conversation, "rejected": conversation}
    columns |= {f"{side}_rating": Value("float64") for side in ("chosen", "rejected")}
    columns |= {f"{side}_attributes": List(Value("int8")) for side in ("chosen", "rejected")}
    return Features(columns)


def read_pairs(source: Source, rating: str, gap: float, system: str, max_rows: int, work: str, ledger: Ledger) -> dict:
    """{"train": pairs, "test": pairs}: the checked pairs of each split of the source, on disk under `work`."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    parts = {}
    for role, open_records in source.splits.items():
        layout = source.layouts[role]
        if gap and layout == "pairs" and not rating_columns(head_of(open_records())):
            stop(f"MIN_RATING_GAP = {gap}: {source.name} has no ratings, set it to 0")

        def read(open_records: Callable = open_records) -> Iterator[dict]:
            return islice(open_records(), max_rows or None)

        pairs = checked_pairs(read, layout, rating, role, gap, ledger)
        with ArrowWriter(path=f"{work}/{role}.arrow", features=row_features()) as writer:
            for pair in tqdm(pairs, f"pairing {role}", unit=" pairs"):
                writer.write(finished_row(pair, system))
            writer.finalize()  # from_generator() would fail where no pair is left
        parts[role] = Dataset.from_file(f"{work}/{role}.arrow")
    return parts


def split_and_tokenise(
    pairs: dict, share: float, seed: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Dataset]:
    """{"train", "validation", "test"}: the finished rows. Empties `pairs`: their file is not held in memory then."""
    test = pairs.pop("test", ())
    train, validation = split_dataset(pairs.pop("train"), share, seed, test["prompt"] if len(test) else ())
    train, validation = process_dataset(train, validation, tokenizer, max_length)
    parts = {"train": train, "validation": validation}
    if len(test):
        parts["test"] = process_dataset(test, test.select([]), tokenizer, max_length)[0]
    return parts


def fingerprint(parts: dict[str, Dataset]) -> str:
    """A hash of all prompts, ratings and ids in their order: two folders with the same one hold the same rows."""
    digest = hashlib.sha256()
    columns = ["prompt", "chosen_rating", "rejected_rating", "input_ids", "chosen_ids", "rejected_ids"]
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
    from utils.tokens import chat_template_sha256, tokenizer_sha256

    sizes = {f"{name}_size": len(parts.get(name, ())) for name in ("train", "validation", "test")}
    pairs = sum(sizes.values())
    cut = {
        side: round(sum(sum(part[f"{side}_cut"]) for part in parts.values()) / pairs, 4)
        for side in ("prompt", "chosen", "rejected")
    }
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
        "columns": parts["train"].column_names,
        "split_ratio": settings["VALIDATION_SHARE"],
        "seed": settings["SEED"],
        "counts": {**ledger.totals(), "pairs": pairs, "dropped": ledger.counts()},
        "cut_share": cut,
        "equal_after_cut": sum(sum(part["equal_after_cut"]) for part in parts.values()),
        "settings": settings,
        "versions": versions(),
        "fingerprint": fingerprint(parts),
    }


def check_folder(folder: Path) -> None:
    """End the script where the output folder holds what is not of this script: it would be lost.

    If an earlier run was killed in the moment between its two renamings, the old rows are put back first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(folder.parent.glob(f".{folder.name}-*")):
        if (left / "old").exists() and not folder.exists():
            os.replace(left / "old", folder)
        say(f"{left} is left of a run that was killed (or is still at work): delete it when none is running")
    if folder.is_file() or os.path.ismount(folder):
        stop(f"OUTPUT_DIR = '{folder}' is a {'file' if folder.is_file() else 'mount point'}: choose another name")
    ours = {"train", "validation", "test", "metadata.json", "dropped.jsonl"}
    others = {path.name for path in folder.glob("[!.]*")} - ours if folder.exists() else ()
    if others:
        stop(f"OUTPUT_DIR = '{folder}' holds {', '.join(sorted(others)[:5])}, not made here: choose another name")


def replace_folder(folder: Path, whole: Path) -> None:
    """Put the folder `whole` in the place of `folder`: the old one is there until the new one is complete."""
    old = whole.with_name("old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(whole, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise


def report(metadata: dict, folder: Path) -> None:
    """Tell what was read, used and left out."""
    counts, cut = metadata["counts"], metadata["cut_share"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "nothing"
    say(f"read {counts['rows_read']} rows of {counts['prompts']} prompts: {counts['pairs']} pairs")
    say(f"left out: {dropped} ({counts['rows_dropped']} rows, each listed in {folder / 'dropped.jsonl'})")
    say(
        f"split: {metadata['train_size']} train, {metadata['validation_size']} validation, {metadata['test_size']} test"
    )
    say(
        f"window of {metadata['max_length']} tokens cuts {cut['prompt']:.0%} of the prompts, {cut['chosen']:.0%} of "
        f"the chosen and {cut['rejected']:.0%} of the rejected answers; {metadata['equal_after_cut']} pairs are equal "
        "then"
    )
    say(f"written: {folder}\nnext: python dataset_summary.py")


@script
def main(settings: dict) -> None:
    # 1. check
    pick(RATINGS, "RATING", RATING)
    at_least(0, MIN_RATING_GAP=MIN_RATING_GAP, MAX_ROWS=MAX_ROWS)
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    from utils.tokens import check_window

    folder = Path(OUTPUT_DIR).resolve()  # through a link: the folder that it names is replaced, not the link
    check_folder(folder)
    source, ledger = open_source(DATASET, RATING), Ledger()
    tokenizer = setup_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    check_window(tokenizer, MAX_LENGTH, SYSTEM_PROMPT)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        # 2. read and pair
        pairs = read_pairs(source, RATING, MIN_RATING_GAP, SYSTEM_PROMPT, MAX_ROWS, work, ledger)
        if not len(pairs["train"]):
            stop(f"no pair is left of {ledger.totals()['rows_read']} rows of {DATASET}, left out: {ledger.counts()}")
        # 3. split and tokenise
        parts = split_and_tokenise(pairs, VALIDATION_SHARE, SEED, tokenizer, MAX_LENGTH)
        if not len(parts["train"]):
            stop(f"no pair is left for training: all prompts of {DATASET} are like some in its test split")
        # 4. save beside the old folder, then take its place
        whole = Path(work) / "whole"
        for name, part in parts.items():
            part.save_to_disk(whole / name, num_shards=None if len(part) else 1)  # without a file it cannot be loaded
        metadata = describe(parts, source, ledger, tokenizer, settings)
        write_json(whole / "metadata.json", metadata)
        ledger.write(whole / "dropped.jsonl")
        replace_folder(folder, whole)
    # 5. say where it is
    report(metadata, Path(OUTPUT_DIR))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores: nothing here forks
    main(override_constants(globals()))
