"""Turn OpenAssistant's message trees into pairs or sft rows in one language: checked, split and tokenised.

Reads  : OpenAssistant/oasst1 or oasst2, or a file of such messages (flat, or nested trees)
Writes : processed_oasst/ (train, validation, metadata.json, dropped.jsonl), as load_helpsteer_dataset.py does

python -m extras.load_oasst_dataset                                            # Russian pairs of oasst1 from the hub
python -m extras.load_oasst_dataset --dataset sample_data/oasst_sample.jsonl   # the sample, without the hub
python -m extras.load_oasst_dataset --rows sft --turns all --max_length 512    # every answer, for train_sft
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from extras.lib import oasst
from utils.config import override_constants
from utils.data import processed
from utils.data.preferences import Ledger, finished_row
from utils.data.sources import TREE_LAYOUTS, Source, first_of, open_source
from utils.runs import write_json
from utils.script import check, pick, script, stop

# data
DATASET = "OpenAssistant/oasst1"  # hub name owner/name[/file], or a local file or folder of flat or nested messages
LANGUAGE = "ru"  # language code of the source (ru, en, pt-BR, ...), "" = all; an unknown one lists the others
ROWS = "pairs"  # pairs: best against worst ranked answer | sft: every answer, ranked or not
TURNS = "first"  # first: top-level prompts | all: later ones too, with the conversation before them
SYSTEM_PROMPT = ""  # persona, stored as the system turn of every row, "" = none
MAX_ROWS = 0  # read only the first records of each split, 0 = all
# tokens
TOKENIZER = "Qwen/Qwen2.5-0.5B-Instruct"  # hub name or folder; SmolLM2 knows no Russian
CHAT_TEMPLATE = ""  # "" = the tokenizer's own, "plain" = User: ... Assistant: ... for one that has none
MAX_LENGTH = 256  # tokens of prompt and answer together
# split
VALIDATION_SHARE = 0.2  # of the rows, split by whole trees; used if the source has no validation split
SEED = 42  # of the split
# output
OUTPUT_DIR = "processed_oasst"  # replaced only once the new rows are complete

ROW_MAKERS = {"pairs": (oasst.pair_rows, finished_row), "sft": (oasst.answer_rows, oasst.finished_answer)}
NEXT = {"pairs": "python dataset_summary.py", "sft": "python -m extras.train_sft"}
ALL_TURNS = {"first": False, "all": True}


def open_trees(dataset: str) -> Source:
    """Return the source, with its held-out split called validation."""
    source = open_source(dataset, "", TREE_LAYOUTS)
    for names in (source.splits, source.split_used, source.layouts):
        if "test" in names:
            names["validation"] = names.pop("test")
    source.rating = "rank"
    return source


def read_trees(source: Source) -> dict[str, list[oasst.Node]]:
    """Return {split: its messages}; stop if none is in the language."""
    from tqdm import tqdm

    trees = {}
    for name, open_records in source.splits.items():
        records = tqdm(first_of(open_records(), MAX_ROWS), f"reading {source.split_used[name]}", unit=" records")
        trees[name] = oasst.read_nodes(records, source.layouts[name], LANGUAGE)
    oasst.check_language(trees.values(), source.name, LANGUAGE)
    return trees


def split_rows(made: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return {"train", "validation"}: rows, whole trees on one side."""
    from extras.lib.sft import divide

    def leave_out(row: dict) -> None:
        oasst.mark(row["nodes"], "like_validation")

    return divide(made["train"], made.get("validation", []), "root", VALIDATION_SHARE, SEED, leave_out)


@script
def main(settings: dict) -> None:
    # 1. check
    make_rows, finish = pick(ROW_MAKERS, "ROWS", ROWS)
    all_turns = pick(ALL_TURNS, "TURNS", TURNS)
    check(settings)
    if not 0 <= VALIDATION_SHARE < 1:
        stop(f"VALIDATION_SHARE = {VALIDATION_SHARE}: expected 0 or more, and less than 1")
    from utils.data.tokens import check_window, load_tokenizer, tokenised

    folder = Path(OUTPUT_DIR).expanduser().resolve()  # replaces the target of a link, not the link
    processed.check_folder(folder, DATASET)
    source, ledger = open_trees(DATASET), Ledger(count_rows=True)
    tokenizer = load_tokenizer(TOKENIZER, CHAT_TEMPLATE)
    check_window(tokenizer, MAX_LENGTH, SYSTEM_PROMPT)
    # 2. read the trees, make rows, split them
    trees = read_trees(source)
    made = {name: make_rows(nodes, all_turns) for name, nodes in trees.items()}
    rows = split_rows(made)
    oasst.fill_ledger(trees, rows.values(), ledger)
    if not rows["train"]:
        stop(f"no training row is left of {ledger.totals()['rows_read']} messages, left out: {ledger.counts()}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        # 3. tokenise
        splits = {}
        for name in rows:
            finished = (finish(row, SYSTEM_PROMPT) for row in rows[name])
            plain = processed.write_rows(finished, processed.row_features(ROWS), f"{work}/{name}.arrow")
            splits[name] = tokenised(plain, tokenizer, MAX_LENGTH)
        # 4. save, then replace the old folder
        new = Path(work) / "new"
        processed.save_parts(splits, new)
        metadata = processed.describe(splits, source, ledger, tokenizer, settings) | {"rows": ROWS}
        metadata["made_by"] = "-m extras.load_oasst_dataset"
        metadata["split_ratio"] = None if made.get("validation") else VALIDATION_SHARE
        write_json(new / "metadata.json", metadata)
        ledger.write(new / "dropped.jsonl")
        del splits, plain  # closes their files: Windows cannot delete an open file
        processed.replace_folder(folder, new)
    # 5. print where it is
    processed.print_summary(metadata, Path(OUTPUT_DIR), processed.next_command(NEXT[ROWS], OUTPUT_DIR))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores: nothing here forks
    main(override_constants(globals()))
