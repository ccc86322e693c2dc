"""Files of ours: written whole or not at all, and read as they were written."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its name and rename it when whole, so that a kill leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: str | Path, content: object) -> None:
    write_text(Path(path), json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: str | Path, lines: Iterable[dict]) -> None:
    """A .jsonl file: an object a line."""
    write_text(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_json(path: str | Path) -> dict:
    """The content of a JSON file, {} where there is none."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def read_lines(path: str | Path) -> list[dict]:
    """The objects of a .jsonl file of ours; a last line that a kill has cut off is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # splitlines() would also cut a text at U+2028
    return [json.loads(line) for line in lines]
