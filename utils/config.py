"""The constants at the top of a script are its options: the command line can override them."""

import argparse
import ast
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

TRUE_FALSE = {"true": True, "false": False}
_NAMES = {  # (smallest value, largest value): the constants that they hold for
    (1, math.inf): (
        *("BATCH_SIZE", "ACCUMULATION", "GENERATION_BATCH", "ANSWERS_PER_PROMPT", "MAX_NEW_TOKENS", "LORA_RANK"),
        "LOG_EVERY_STEPS",
    ),
    (0, math.inf): (
        *("MAX_ROWS", "MAX_STEPS", "EPOCHS", "SEED", "EVAL_EVERY_STEPS", "SAVE_EVERY_STEPS"),
        *("LEARNING_RATE", "HEAD_LEARNING_RATE", "PROMPT_LEARNING_RATE"),
        *("BETA", "KL_BETA", "KL_LIMIT", "SFT_WEIGHT", "MIN_RATING_GAP", "TEMPERATURE", "BEST_OF_N"),
        *("PROMPTS", "EVAL_PROMPTS", "SAMPLE_PROMPTS", "CONTROL_PAIRS", "EXAMPLES"),
    ),
    (0, 1): ("WARMUP_SHARE", "LORA_DROPOUT", "BASELINE_DECAY", "RATING_WEIGHT"),
    (0, 0.499): ("LABEL_SMOOTHING",),  # at 0.5 the loss is lowest for equal rewards
}
BOUNDS = {name: limits for limits, names in _NAMES.items() for name in names}  # of the constants that scripts share


def missing_package(error: BaseException) -> str:
    """Return the message for a package that is not installed, "" for any other error (our own modules included)."""
    name = getattr(error, "name", None) or ""
    ours = (Path(__file__).parent.parent / name).is_dir()
    if not isinstance(error, ModuleNotFoundError) or "." in name or ours:
        return ""
    return (
        f"No module named {name!r} in {sys.executable}: activate .venv (`source .venv/bin/activate`, "
        "on Windows `.venv\\Scripts\\activate`), or run `python -m pip install -r requirements.txt`"
    )


def explain_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for a missing package and the traceback for any other error (a sys.excepthook)."""
    if missing_package(error):
        print(missing_package(error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain_missing_package  # scripts import packages above main(), out of reach of utils.script.script


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints one line on stderr, without the usage, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, message.removeprefix("argument ") + "\n")


def override_constants(script: dict[str, Any], argv: list[str] | None = None) -> dict[str, Any]:
    """Replace the UPPER_CASE constants of a script by `--name value` options, and return them all.

    Call it as `main(override_constants(globals()))` under `if __name__ == "__main__"`. The line of the constant
    declares the option: its name, its default, its type (that of the default) and its help (the comment).

    script: the namespace of a module with `__file__` and `__doc__`; changed in place.
    argv: the words after the script's name; None reads the command line.
    Raises SystemExit(2) for an unknown or ill-typed option, TypeError for a constant of another type than
    str, bool, int, float or tuple.
    """
    comments = top_constants(Path(script["__file__"]).read_text(encoding="utf-8-sig"))
    parser = parser_of(script, comments)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known, wrong = [f"--{name.lower()}" for name in comments], unknown[0].split("=")[0]
        guess = difflib.get_close_matches("--" + wrong.lower().strip("-"), known, n=1)
        parser.error(f"unknown option {wrong}" + (f", did you mean {guess[0]}?" if guess else ""))
    changed = {name: value for name, value in vars(values).items() if value != script[name]}
    if changed and os.environ.get("RANK", "0") == "0":
        print("changed for this run: " + ", ".join(f"{name} = {value!r}" for name, value in changed.items()))
    script.update(vars(values))
    return vars(values)


def parser_of(script: dict[str, Any], comments: dict[str, str]) -> OneLineParser:
    """Return a parser with one option per constant. comments: {name of the constant: its help}."""
    parser = OneLineParser(
        prog=command(script),
        description=script["__doc__"],
        usage="%(prog)s [--name value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, comment in comments.items():
        default = script[name]
        parser.add_argument(
            f"--{name.lower()}",
            dest=name,
            default=default,
            type=reader(name, default),
            nargs="?" if isinstance(default, bool) else None,
            const=True if isinstance(default, bool) else None,
            metavar=type(default).__name__,
            help=f"{comment} (now {default!r})".replace("%", "%%"),
        )
    return parser


def command(script: dict[str, Any]) -> str:
    """Return how to start a script: `python train_dpo.py`, or `python -m extras.evaluate` inside a package."""
    spec = script.get("__spec__")
    if spec is not None and "." in spec.name:
        return f"python -m {spec.name}"
    return f"python {Path(script['__file__']).name}"


def top_constants(source: str) -> dict[str, str]:
    """Return {name: comment on its line} of the UPPER_CASE names set before the first function of a source text."""
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Dict):  # a table is not an option
            name = getattr(node.targets[0], "id", "")
            if name.isupper() and not name.startswith("_"):
                assert node.end_lineno is not None
                rest_of_line = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
                constants[name] = rest_of_line.strip().lstrip("# ")
    return constants


def reader(name: str, default: Any) -> Callable[[str], object]:
    """Return a function that converts the text of an option to the type of its default."""
    kind = type(default)
    if kind not in (str, bool, int, float, tuple):
        raise TypeError(f"{name} = {default!r}: use a str, bool, int, float or tuple (0 or '' for 'not set')")

    def read(text: str) -> object:
        try:
            if kind is tuple:
                item_kind = type(default[0]) if default else str
                return tuple(convert(item_kind, item.strip()) for item in text.split(",") if item.strip())
            return convert(kind, text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} such as {default!r}, got {text!r}") from None

    return read


def convert(kind: type, text: str) -> object:
    """Return the text as a value of a type; ValueError for nan and inf, which would spoil a run unnoticed."""
    if kind is bool:
        return TRUE_FALSE[text.lower()]
    if kind is float and not math.isfinite(float(text)):
        raise ValueError
    return kind(text)
