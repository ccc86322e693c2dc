"""Make rows of every kind of source, run a loader on them and read its output."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from datasets import Dataset, load_from_disk

import load_helpsteer_dataset
from tests.conftest import run_script
from utils.data.sources import ATTRIBUTES


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    """Write rows as JSON lines, compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the file's suffix."""
    import pandas as pd

    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path, row_group_size=2)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False, encoding="utf-8-sig")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_lines(path, rows)
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    """Return {path: bytes} of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(count: int, start: int = 0, gap: int = 1) -> Iterator[dict]:
    """Yield rows of `count` prompts with two answers each. The first answer is better by `gap` in one attribute."""
    for i in range(start, start + count):
        for k in range(2):
            grades = dict.fromkeys(ATTRIBUTES, 2) | {"helpfulness": 2 + gap * (1 - k)}
            yield {"prompt": f"Question{i} asks{i} about{i}?", "response": f"Answer {k} to {i}.", **grades}


def dialogue(*texts: str, system: str = "") -> list[dict]:
    """Return messages with these texts, by user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def message(name: str, text: str | None = None, rank: int | None = None, lang: str = "ru", **others: object) -> dict:
    """Return a message of a tree. Its name is its place: `a` is a prompt, `a.1` an answer, `a.1.1` the next prompt."""
    parent = name.rpartition(".")[0] or None
    role = "assistant" if name.count(".") % 2 else "prompter"
    plain = {"deleted": False, "synthetic": False, "review_result": True, "tree_state": "ready_for_export"}
    text = f"Текст{name} про{name} это{name}" if text is None else text
    fields = {"message_id": name, "parent_id": parent, "text": text, "role": role, "lang": lang, "rank": rank}
    return {**fields, **plain, **others}


def tree(name: str, *ranks: int | None, **others: object) -> list[dict]:
    """Return a prompt and one answer for each rank."""
    return [message(name, **others), *(message(f"{name}.{i}", rank=r, **others) for i, r in enumerate(ranks, 1))]


def nested(messages: list[dict]) -> list[dict]:
    """Return the same messages as nested trees. Messages without a root are left out."""
    replies = defaultdict(list)
    for each in messages:
        replies[each["parent_id"]].append(each)

    def grown(each: dict) -> dict:
        return {**each, "replies": [grown(reply) for reply in replies[each["message_id"]]]}

    return [{"message_tree_id": m["message_id"], "tree_state": "x", "prompt": grown(m)} for m in replies[None]]


def load_rows(
    tokenizer_folder: str,
    dataset: str | Path | Iterable[dict],
    script: ModuleType = load_helpsteer_dataset,
    **constants: object,
) -> tuple[dict, dict[str, Dataset], list[dict]]:
    """Run a loader on a path or on rows, and return (metadata, {split: rows}, ledger) of its folder, out/."""
    if not isinstance(dataset, (str, Path)):
        dataset = write_lines(Path("source.jsonl").absolute(), dataset)
    defaults = {"DATASET": dataset, "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 128, "OUTPUT_DIR": "out"}
    run_script(script, **{**defaults, **constants})
    folder = Path(constants.get("OUTPUT_DIR", "out"))
    splits = {path.parent.name: load_from_disk(str(path.parent)) for path in folder.glob("*/state.json")}
    ledger = [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "metadata.json").read_text(encoding="utf-8")), splits, ledger
