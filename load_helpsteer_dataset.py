"""Turn a preference dataset into checked, paired, split and tokenised rows.

Reads  : a dataset of the hub, a mirror folder of one, or a local .parquet, .jsonl(.gz), .json or .csv file
Writes : processed_helpsteer/ (train, validation and perhaps test, metadata.json, dropped.jsonl)

python load_helpsteer_dataset.py                                            # nvidia/HelpSteer2 from the hub
python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl  # the sample, without a hub
python load_helpsteer_dataset.py --max_length 512 --rating goodness         # any constant below, in lower case
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.pairing import checked_pairs, rating_columns
from utils.rows import RATINGS, Ledger, finished_row
from utils.runs import pick, say, script, stop, versions, write_json
from utils.sources import Source, open_source, recognise
from utils.split import near_duplicate_groups, split_indices

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# data
DATASET = "nvidia/HelpSteer2"  # hub name owner/name[/folder or split], or a local file or folder
RATING = (
    "average"  # average | goodness | helpfulness | no_verbosity | no_verbosity_no_complexity | nvidia_70b | nvidia_340b
)
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

BATCH_OF_ROWS = {"tokenise": 256, "hash": 2000}  # rows held in memory at once


def setup_tokenizer(name: str, chat_template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder, with a pad token and a chat template (see utils.tokens)."""
    from utils.tokens import load_tokenizer

    return load_tokenizer(name, chat_template)


def split_dataset(dataset: Dataset, test_size: float, seed: int, never_train: tuple[str, ...] = ()) -> tuple:
    """(train, validation) of a dataset with a `prompt` column: ceil(test_size x rows) rows in validation.

    Equal and near-duplicate prompts come on the same side; prompts like one of `never_train` are not trained on.
    """
    prompts = dataset["prompt"]
    groups = near_duplicate_groups([*prompts, *never_train])
    banned = {int(group) for group in groups[len(prompts) :]}
    train, validation = split_indices(groups[: len(prompts)], test_size, seed, banned)
    return dataset.select(train), dataset.select(validation)


def process_dataset(train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple:
    """(train, validation) with token columns: see `token_columns`. Chosen and rejected must be message lists."""
    return tuple(
        part.map(
            partial(token_columns, tokenizer=tokenizer, max_length=max_length),
            batched=True,
            batch_size=BATCH_OF_ROWS["tokenise"],
            features=row_features(tokenised=True) if set(part.column_names) == set(row_features()) else None,
            desc=f"tokenising {name}",
        )
        for name, part in (("train", train), ("validation", validation))
    )


def token_columns(batch: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    """input_ids and attention_mask (the prompt, padded to max_length), chosen_ids, rejected_ids and the *_cut flags."""
    from utils.tokens import encode_pairs

    answers = [
        (chosen[-1]["content"], rejected[-1]["content"])
        for chosen, rejected in zip(batch["chosen"], batch["rejected"], strict=True)
    ]
    encoded = encode_pairs(tokenizer, [chosen[:-1] for chosen in batch["chosen"]], answers, max_length)
    padding = [max_length - len(pair.prompt_ids) for pair in encoded]
    return {
        "input_ids": [
            pair.prompt_ids + [tokenizer.pad_token_id] * pad for pair, pad in zip(encoded, padding, strict=True)
        ],
        "attention_mask": [[1] * (max_length - pad) + [0] * pad for pad in padding],
        "chosen_ids": [pair.chosen_ids for pair in encoded],
        "rejected_ids": [pair.rejected_ids for pair in encoded],
        "prompt_cut": [pair.prompt_cut for pair in encoded],
        "chosen_cut": [pair.chosen_cut for pair in encoded],
        "rejected_cut": [pair.rejected_cut for pair in encoded],
        "equal_after_cut": [pair.chosen_ids == pair.rejected_ids for pair in encoded],
    }


def row_features(tokenised: bool = False) -> dict:
    """The columns and their types; a small integer type each, since token ids are most of the file."""
    from datasets import Features, List, Value

    conversation = List({"role": Value("string"), "content": Value("string")})
    columns = {"prompt": Value("string"), "chosen": conversation, "rejected": conversation}
    columns |= {f"{side}_rating": Value("float64") for side in ("chosen", "rejected")}
    columns |= {f"{side}_attributes": List(Value("int8")) for side in ("chosen", "rejected")}
    if tokenised:
        columns |= {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
        columns |= {"chosen_ids": List(Value("int32")), "rejected_ids": List(Value("int32"))}
        columns |= {name: Value("bool") for name in ("prompt_cut", "chosen_cut", "rejected_cut", "equal_after_cut")}
    return Features(columns)


def read_pairs(source: Source, rating: str, gap: float, system: str, max_rows: int, work: str, ledger: Ledger) -> dict:
    """{"train": pairs, "test": pairs}: the checked pairs of each split of the source, on disk under `work`."""
    from datasets import Dataset

    parts = {}
    for role, open_records in source.splits.items():

        def read(open_records: Callable[[], Iterator] = open_records) -> Iterator[dict]:
            return islice(open_records(), max_rows or None)

        first = next(read(), None)
        if first is None:
            stop(f"DATASET = {source.name!r} has no rows in its split {source.split_used[role]!r}")
        layout = recognise(source.name, set(first))
        if gap and layout == "pairs" and not rating_columns(first):
            stop(f"MIN_RATING_GAP = {gap}: {source.name} has no ratings, set it to 0")

        def rows(read: Callable = read, layout: str = layout, role: str = role) -> Iterator[dict]:
            for pair in checked_pairs(read, layout, rating, role, gap, ledger):
                yield finished_row(pair, system)

        parts[role] = Dataset.from_generator(rows, features=row_features(), cache_dir=work, split=role)
    return parts


def fingerprint(parts: dict[str, Dataset]) -> str:
    """A hash of all prompts, ratings and ids in their order: two folders with the same one hold the same rows."""
    digest = hashlib.sha256()
    columns = ["prompt", "chosen_rating", "rejected_rating", "input_ids", "chosen_ids", "rejected_ids"]
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {len(part)}".encode())
        for batch in part.select_columns(columns).iter(BATCH_OF_ROWS["hash"]):
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
        "rating": settings["RATING"],
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


def write_folder(folder: Path, whole: Path) -> None:
    """Put the folder `whole` in the place of `folder`: the old one is there until the new one is complete."""
    old = whole.with_name("old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(whole, folder)
    shutil.rmtree(old, ignore_errors=True)


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
        f"window of {metadata['max_length']} tokens cuts {cut['prompt']:.0%} of the prompts, {cut['chosen']:.0%} of the "
        f"chosen and {cut['rejected']:.0%} of the rejected answers; {metadata['equal_after_cut']} pairs are equal then"
    )
    say(f"written: {folder}\nnext: python dataset_summary.py")


@script
def main(settings: dict) -> None:
    # 1. check
    pick(RATINGS, "RATING", RATING)
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    tokenizer = setup_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    folder = Path(OUTPUT_DIR)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as work:
        # 2. read and pair
        source, ledger = open_source(DATASET, RATING), Ledger()
        pairs = read_pairs(source, RATING, MIN_RATING_GAP, SYSTEM_PROMPT, MAX_ROWS, work, ledger)
        if not len(pairs["train"]):
            stop(f"no pair is left of {ledger.totals()['rows_read']} rows of {DATASET}, left out: {ledger.counts()}")
        # 3. split and tokenise
        test = pairs.get("test")
        held_out = tuple(test["prompt"]) if test else ()
        train, validation = split_dataset(pairs["train"], VALIDATION_SHARE, SEED, held_out)
        train, validation = process_dataset(train, validation, tokenizer, MAX_LENGTH)
        parts = {"train": train, "validation": validation}
        if test:
            parts["test"] = process_dataset(test, test.select([]), tokenizer, MAX_LENGTH)[0]
        # 4. save beside the old folder, then take its place
        whole = Path(work) / "whole"
        for name, part in parts.items():
            part.save_to_disk(whole / name)
        metadata = describe(parts, source, ledger, tokenizer, settings)
        write_json(whole / "metadata.json", metadata)
        ledger.write(whole / "dropped.jsonl")
        write_folder(folder, whole)
    # 5. say where it is
    report(metadata, folder)


if __name__ == "__main__":
    main(override_constants(globals()))
