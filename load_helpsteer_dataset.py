"""Turn a preference dataset into checked, paired, split and tokenised rows.

Reads  : a dataset of the hub, a folder of files, or one .parquet, .jsonl(.gz), .json or .csv file
Writes : processed_helpsteer/ (train, validation and perhaps test, metadata.json, dropped.jsonl)

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
from utils.data.sources import Source, first_of, head_of, open_source
from utils.data.split import near_duplicate_groups, split_indices
from utils.runs import write_json
from utils.script import check, pick, script, stop

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# data
DATASET = "nvidia/HelpSteer2"  # hub name owner/name[/folder or split], or a local file or folder
RATING = "average"  # how to weigh the five grades: average | goodness | helpfulness | ..., see docs/data.md
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
    """The tokenizer of a hub name or folder, with a pad token and a chat template (see utils/data/tokens.py)."""
    from utils.data.tokens import load_tokenizer

    return load_tokenizer(name, chat_template)


def split_dataset(dataset: Dataset, test_size: float, seed: int, never_train: tuple[str, ...] = ()) -> tuple:
    """(train, validation) of a dataset with a `prompt` column: ceil(test_size x rows) rows in validation.

    Equal and near-duplicate prompts come on the same side; prompts like one of `never_train` are not trained on.
    """
    from tqdm import tqdm

    prompts = tqdm(chain(dataset["prompt"], never_train), "comparing prompts", len(dataset) + len(never_train))
    groups = near_duplicate_groups(prompts)
    banned = {int(group) for group in groups[len(dataset) :]}
    train, validation = split_indices(groups[: len(dataset)], test_size, seed, banned)
    return dataset.select(train), dataset.select(validation)


def process_dataset(train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple:
    """(train, validation) with token columns, see `tokens.token_columns`; chosen and rejected are message lists."""
    from utils.data.tokens import tokenised

    return tokenised(train, tokenizer, max_length), tokenised(validation, tokenizer, max_length)


def read_pairs(
    source: Source, rating: str, gap: float, system: str, max_rows: int, work: str, ledger: Ledger, fits: dict
) -> dict:
    """{"train": pairs, "test": pairs}: the checked pairs of each split of the source, on disk under `work`.

    fits: tokenizer and max_length, for pairs that no cut brings into the window.
    """
    from tqdm import tqdm

    from utils.data.tokens import unfit

    def reason(turns: list[Message], answers: tuple[str, str]) -> str:
        return unfit(with_persona(turns, system), answers, **fits)

    parts = {}
    for role, open_records in source.splits.items():
        layout = source.layouts[role]
        if gap and layout == "pairs" and not rating_columns(head_of(open_records())):
            stop(f"MIN_RATING_GAP = {gap}: {source.name} has no ratings, set it to 0")

        def read(open_records: Callable = open_records) -> Iterator[dict]:
            return first_of(open_records(), max_rows)

        pairs = checked_pairs(read, layout, rating, role, gap, ledger, reason)
        rows = (finished_row(pair, system) for pair in tqdm(pairs, f"pairing {role}", unit=" pairs"))
        parts[role] = write_rows(rows, row_features(), f"{work}/{role}.arrow")
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


@script
def main(settings: dict) -> None:
    # 1. check
    pick(RATINGS, "RATING", RATING)
    check(settings)
    if 0 < MIN_RATING_GAP < 0.01:
        stop(f"MIN_RATING_GAP = {MIN_RATING_GAP}: ratings are compared in hundredths, expected 0 or 0.01 and more")
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    from utils.data.tokens import check_window

    folder = Path(OUTPUT_DIR).expanduser().resolve()  # of a link the folder that it names is replaced, not the link
    check_folder(folder, DATASET)
    source, ledger = open_source(DATASET, RATING), Ledger()
    tokenizer = setup_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    check_window(tokenizer, MAX_LENGTH, SYSTEM_PROMPT)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        # 2. read and pair
        fits = {"tokenizer": tokenizer, "max_length": MAX_LENGTH}
        pairs = read_pairs(source, RATING, MIN_RATING_GAP, SYSTEM_PROMPT, MAX_ROWS, work, ledger, fits)
        if not len(pairs["train"]):
            stop(f"no pair is left of {ledger.totals()['rows_read']} rows of {DATASET}, left out: {ledger.counts()}")
        # 3. split and tokenise
        parts = split_and_tokenise(pairs, VALIDATION_SHARE, SEED, tokenizer, MAX_LENGTH)
        if not len(parts["train"]):
            stop(f"no pair is left for training: all prompts of {DATASET} are like some in its test split")
        # 4. save beside the old folder, then take its place
        whole = Path(work) / "whole"
        save_parts(parts, whole)
        metadata = describe(parts, source, ledger, tokenizer, settings)
        write_json(whole / "metadata.json", metadata)
        ledger.write(whole / "dropped.jsonl")
        parts.clear()  # closes their files: Windows deletes none that is open
        replace_folder(folder, whole)
    # 5. say where it is
    print_summary(metadata, Path(OUTPUT_DIR), next_command("python dataset_summary.py", OUTPUT_DIR))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores: nothing here forks
    main(override_constants(globals()))
