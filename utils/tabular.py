"""Records of CSV, Parquet and Arrow files, one by one."""

import ast
import csv
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from utils.script import stop

MESSAGES_AS_TEXT = re.compile(r"""\[\s*\{\s*['"](role|content)['"]\s*:""")  # in a CSV cell
NUMPYS = re.compile(r"\}\s+\{|\barray\(")  # numpy's way to write a list: no commas


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
