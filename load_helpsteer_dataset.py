"""Turn a preference dataset into checked, paired, split and tokenised rows.

Reads  : a dataset of the hub, a folder of files, or one .parquet, .jsonl(.gz), .json or .csv file
Writes : processed_helpsteer/ (train, validation, test if the source has one, metadata.json, dropped.jsonl)

python load_helpsteer_dataset.py                                            # nvidia/HelpSteer2 from the hub
python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl  # the sample, without a hub
python load_helpsteer_dataset.py --max_length 512 --rating goodness         # any constant below, in lower case
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants
from utils.data.preferences import RATINGS, Ledger, Message, checked_pairs, finished_row, rating_columns, with_persona
from utils.data.processed import (
    check_folder,
    describe,
    next_command,
    print_summary,
    replace_folder,
    row_features,
    save_parts,
    write_rows,
)
from utils.data.sources import Record, Source, first_of, head_of, open_source
from utils.data.split import near_duplicate_groups, split_indices
from utils.runs import write_json
from utils.script import check, pick, script, stop

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# data
DATASET = "nvidia/HelpSteer2"  # hub name owner/name[/folder or split], or a local file or folder
RATING = "average"  # weights of the five grades: average | goodness | helpfulness | ..., see docs/data.md
MIN_RATING_GAP = 0.0  # leave out pairs whose ratings differ by less
SYSTEM_PROMPT = ""  # system turn (a persona) of every row, "" = as the source has it
MAX_ROWS = 0  # read only the first rows of each split, 0 = all
# tokens
TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"  # hub name or folder
CHAT_TEMPLATE = ""  # "" = the tokenizer's own, "plain" = User: ... Assistant: ... for tokenizers without one
MAX_LENGTH = 256  # tokens of prompt and answer together
# split
VALIDATION_SHARE = 0.2  # of the pairs; a prompt is on one side only
SEED = 42  # of the split
# output
OUTPUT_DIR = "processed_helpsteer"  # replaced when the new rows are complete


def setup_tokenizer(name: str, chat_template: str = "") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a hub name or folder, with a pad token and a chat template."""
    from utils.data.tokens import load_tokenizer

    return load_tokenizer(name, chat_template)


def split_dataset(
    dataset: Dataset, test_size: float, seed: int, never_train: tuple[str, ...] = ()
) -> tuple[Dataset, Dataset]:
    """Return (train, validation) of a dataset with a `prompt` column; validation has ceil(test_size x rows) rows.

    Equal and near-duplicate prompts stay on one side. Prompts similar to one of `never_train` go to validation.
    """
    from tqdm import tqdm

    prompts = tqdm(chain(dataset["prompt"], never_train), "comparing prompts", len(dataset) + len(never_train))
    groups = near_duplicate_groups(prompts)
    banned = {int(group) for group in groups[len(dataset) :]}
    train, validation = split_indices(groups[: len(dataset)], test_size, seed, banned)
    return dataset.select(train), dataset.select(validation)


def process_dataset(
    train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset]:
    """Return (train, validation) with the columns of `tokens.token_columns`; both have chosen and rejected messages."""
    from utils.data.tokens import tokenised

    return tokenised(train, tokenizer, max_length), tokenised(validation, tokenizer, max_length)


def read_pairs(source: Source, tokenizer: PreTrainedTokenizerBase, work: str, ledger: Ledger) -> dict[str, Dataset]:
    """Return {"train": pairs, "test": pairs}: the checked pairs of each split of the source, stored under `work`."""
    from tqdm import tqdm

    from utils.data.tokens import unfit

    def reason(turns: list[Message], answers: tuple[str, str]) -> str:
        return unfit(with_persona(turns, SYSTEM_PROMPT), answers, tokenizer, MAX_LENGTH)

    splits = {}
    for role, open_records in source.splits.items():
        layout = source.layouts[role]
        if MIN_RATING_GAP and layout == "pairs" and not rating_columns(head_of(open_records())):
            stop(f"MIN_RATING_GAP = {MIN_RATING_GAP}: {source.name} has no ratings, set it to 0")

        def read(open_records: Callable = open_records) -> Iterator[Record]:
            return first_of(open_records(), MAX_ROWS)

        pairs = checked_pairs(read, layout, RATING, role, MIN_RATING_GAP, ledger, reason)
        rows = (finished_row(pair, SYSTEM_PROMPT) for pair in tqdm(pairs, f"pairing {role}", unit=" pairs"))
        splits[role] = write_rows(rows, row_features(), f"{work}/{role}.arrow")
    if not len(splits["train"]):
        stop(f"no pair is left of {ledger.totals()['rows_read']} rows of {DATASET}, left out: {ledger.counts()}")
    return splits


def split_and_tokenise(pairs: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Return the finished rows {"train", "validation", "test"}. Empties `pairs`, to free their memory early."""
    from utils.data.tokens import tokenised

    test = pairs.pop("test", None)
    train, validation = split_dataset(pairs.pop("train"), VALIDATION_SHARE, SEED, test["prompt"] if test else ())
    train, validation = process_dataset(train, validation, tokenizer, MAX_LENGTH)
    if not len(train):
        stop(f"no pair is left for training: all prompts of {DATASET} are similar to some in its test split")
    splits = {"train": train, "validation": validation}
    if test:
        splits["test"] = tokenised(test, tokenizer, MAX_LENGTH)
    return splits


@script
def main(settings: dict) -> None:
    # 1. check
    check(settings)
    pick(RATINGS, "RATING", RATING)
    if 0 < MIN_RATING_GAP < 0.01:
        stop(f"MIN_RATING_GAP = {MIN_RATING_GAP}: ratings are compared in hundredths, expected 0 or 0.01 and more")
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    from utils.data.tokens import check_window

    folder = Path(OUTPUT_DIR).expanduser().resolve()  # of a link, replace the target
    check_folder(folder, DATASET)
    source, ledger = open_source(DATASET, RATING), Ledger()
    tokenizer = setup_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    check_window(tokenizer, MAX_LENGTH, SYSTEM_PROMPT)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        # 2. read and pair
        pairs = read_pairs(source, tokenizer, work, ledger)
        # 3. split and tokenise
        splits = split_and_tokenise(pairs, tokenizer)
        # 4. save, then replace the old folder
        complete = Path(work) / "whole"
        save_parts(splits, complete)
        metadata = describe(splits, source, ledger, tokenizer, settings)
        write_json(complete / "metadata.json", metadata)
        ledger.write(complete / "dropped.jsonl")
        splits.clear()  # closes the files: Windows does not delete open ones
        replace_folder(folder, complete)
    # 5. print the counts and the next step
    print_summary(metadata, Path(OUTPUT_DIR), next_command("python dataset_summary.py", OUTPUT_DIR))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # use all cores; nothing here forks
    main(override_constants(globals()))
