"""Turn OpenAssistant's message trees into pairs or sft rows in one language: checked, split and tokenised.

Reads  : OpenAssistant/oasst1 or oasst2, or a file of such messages (flat, or nested trees)
Writes : processed_oasst/ (train, validation, metadata.json, dropped.jsonl), as load_helpsteer_dataset.py does

python -m extras.load_oasst_dataset                                            # Russian pairs of oasst1 from the hub
python -m extras.load_oasst_dataset --dataset sample_data/oasst_sample.jsonl   # the sample, without a hub
python -m extras.load_oasst_dataset --rows sft --turns all --max_length 512    # every answer, for train_sft
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from extras.lib.oasst import Node, answer_rows, check_language, enter, finished_answer, mark, pair_rows, read_nodes
from utils.config import override_constants
from utils.data.preferences import Ledger, finished_row
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
from utils.data.sources import TREE_LAYOUTS, Source, first_of, open_source
from utils.runs import write_json
from utils.script import check, pick, script, stop

# data
DATASET = "OpenAssistant/oasst1"  # hub name owner/name[/file], or a local file or folder of flat or nested messages
LANGUAGE = "ru"  # as the source writes it (ru, en, pt-BR, ...), "" = all; one with no message: the others are listed
ROWS = "pairs"  # pairs: best against worst of the ranked answers | sft: every answer, whoever ranked it
TURNS = "first"  # first: top-level prompts | all: later ones too, with the conversation before them
SYSTEM_PROMPT = ""  # system turn (a persona) that every row begins with, "" = none
MAX_ROWS = 0  # read the first so many records of each split only, 0 = all of them
# tokens
TOKENIZER = "Qwen/Qwen2.5-0.5B-Instruct"  # hub name or folder, of a model that reads LANGUAGE; SmolLM2 has no Russian
CHAT_TEMPLATE = ""  # "" = the tokenizer's own, "plain" = User: ... Assistant: ... for one that has none
MAX_LENGTH = 256  # tokens of prompt and answer together
# split
VALIDATION_SHARE = 0.2  # of the rows, whole trees on one side; for sources without a validation split of their own
SEED = 42  # of the split
# output
OUTPUT_DIR = "processed_oasst"  # written beside its name and renamed when whole

ROW_MAKERS = {"pairs": (pair_rows, finished_row), "sft": (answer_rows, finished_answer)}
NEXT = {"pairs": "python dataset_summary.py", "sft": "python -m extras.train_sft"}
ALL_TURNS = {"first": False, "all": True}


def open_trees(dataset: str) -> Source:
    """The source, with its held-out split called validation: it is used as such."""
    source = open_source(dataset, "", TREE_LAYOUTS)
    for part in (source.splits, source.split_used, source.layouts):
        if "test" in part:
            part["validation"] = part.pop("test")
    source.rating = "rank"
    return source


def read_trees(source: Source) -> dict[str, list[Node]]:
    """The messages of each split of the source; ends the script where none is in the language."""
    from tqdm import tqdm

    trees = {}
    for name, open_records in source.splits.items():
        records = tqdm(first_of(open_records(), MAX_ROWS), f"reading {source.split_used[name]}", unit=" records")
        trees[name] = read_nodes(records, source.layouts[name], LANGUAGE)
    check_language(trees.values(), source.name, LANGUAGE)
    return trees


@script
def main(settings: dict) -> None:
    # 1. check
    make_rows, finish = pick(ROW_MAKERS, "ROWS", ROWS)
    all_turns = pick(ALL_TURNS, "TURNS", TURNS)
    check(settings)
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    from extras.lib.sft import divide
    from utils.data.tokens import check_window, load_tokenizer, tokenised

    folder = Path(OUTPUT_DIR).expanduser().resolve()  # of a link the folder that it names is replaced, not the link
    check_folder(folder, DATASET)
    source, ledger = open_trees(DATASET), Ledger(count_rows=True)
    tokenizer = load_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    check_window(tokenizer, MAX_LENGTH, SYSTEM_PROMPT)
    # 2. read the trees, make rows of them, split
    trees = read_trees(source)
    made = {name: make_rows(nodes, all_turns) for name, nodes in trees.items()}
    held_out = made.get("validation", [])
    rows = divide(
        made["train"], held_out, "root", VALIDATION_SHARE, SEED, lambda row: mark(row["nodes"], "like_validation")
    )
    enter(trees, rows.values(), ledger)
    if not rows["train"]:
        stop(f"no row is left for training of {ledger.totals()['rows_read']} messages, left out: {ledger.counts()}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        # 3. tokenise
        parts = {}
        for name, some in rows.items():
            plain = write_rows((finish(row, SYSTEM_PROMPT) for row in some), row_features(ROWS), f"{work}/{name}.arrow")
            parts[name] = tokenised(plain, tokenizer, MAX_LENGTH)
        # 4. save beside the old folder, then take its place
        whole = Path(work) / "whole"
        save_parts(parts, whole)
        metadata = describe(parts, source, ledger, tokenizer, settings) | {"rows": ROWS}
        metadata["made_by"] = "-m extras.load_oasst_dataset"
        metadata["split_ratio"] = None if held_out else VALIDATION_SHARE
        write_json(whole / "metadata.json", metadata)
        ledger.write(whole / "dropped.jsonl")
        del parts, plain  # closes their files: Windows deletes none that is open
        replace_folder(folder, whole)
    # 5. print where it is
    print_summary(metadata, Path(OUTPUT_DIR), next_command(NEXT[ROWS], OUTPUT_DIR))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores: nothing here forks
    main(override_constants(globals()))
