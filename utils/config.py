"""The constants at the top of a script are its options: read them, let the command line replace them."""

import argparse
import ast
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

TRUE_FALSE = {"true": True, "false": False}

BOUNDS = {  # constants that several scripts share: (smallest value, largest value)
    **dict.fromkeys(("BATCH_SIZE", "ACCUMULATION", "GENERATION_BATCH", "ANSWERS_PER_PROMPT"), (1, math.inf)),
    **dict.fromkeys(("MAX_NEW_TOKENS", "LORA_RANK", "LOG_EVERY_STEPS"), (1, math.inf)),
    **dict.fromkeys(("MAX_ROWS", "MAX_STEPS", "EPOCHS", "SEED", "EVAL_EVERY_STEPS", "SAVE_EVERY_STEPS"), (0, math.inf)),
    **dict.fromkeys(("LEARNING_RATE", "TEMPERATURE", "BETA", "KL_BETA"), (0, math.inf)),
    **dict.fromkeys(("HEAD_LEARNING_RATE", "PROMPT_LEARNING_RATE", "SFT_WEIGHT"), (0, math.inf)),
    **dict.fromkeys(("MIN_RATING_GAP", "KL_LIMIT", "PROMPTS", "EVAL_PROMPTS", "SAMPLE_PROMPTS"), (0, math.inf)),
    **dict.fromkeys(("CONTROL_PAIRS", "BEST_OF_N"), (0, math.inf)),
    **dict.fromkeys(("EXAMPLES",), (0, math.inf)),
    **dict.fromkeys(("WARMUP_SHARE", "LORA_DROPOUT", "BASELINE_DECAY", "RATING_WEIGHT"), (0, 1)),
    "LABEL_SMOOTHING": (0, 0.499),  # at a half nothing can be learned: the loss is lowest for equal rewards
}


def missing_package(error: BaseException) -> str:
    """The line for a package that is not installed, "" for every other error: a module of ours is no package."""
    name = getattr(error, "name", None) or ""
    ours = (Path(__file__).parent.parent / name).is_dir()
    if not isinstance(error, ModuleNotFoundError) or "." in name or ours:
        return ""
    return (
        f"No module named {name!r} in {sys.executable}: activate .venv (`source .venv/bin/activate`, "
        "on Windows `.venv\\Scripts\\activate`), or run `python -m pip install -r requirements.txt`"
    )


def name_the_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What sys.excepthook is here: one line where a package is missing, the traceback for everything else."""
    if missing_package(error):
        print(missing_package(error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = name_the_missing  # imports stand above main(), where utils.script.script cannot catch them


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line on stderr and exit code 2, without the usage in front of it."""

    def error(self, message: str):
        self.exit(2, message.removeprefix("argument ") + "\n")


def override_constants(script: dict, argv: list[str] | None = None) -> dict:
    """Replace the UPPER_CASE constants of a script by `--name value` options, and return them all.

    Call it as `main(override_constants(globals()))` under `if __name__ == "__main__"`. The script stays the
    only place where an option is declared: its name, its default, its type (that of the default) and
    its help (the comment on its line) are read from there.

    script: the namespace of a module with `__file__` and `__doc__`; changed in place.
    argv: the words after the script's name; None takes them from the command line.
    Raises SystemExit(2) after one line on stderr for an unknown or ill-typed option, TypeError for a constant
    that can be no option.
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


def parser_of(script: dict, comments: dict[str, str]) -> OneLineParser:
    """A parser with one option for each constant; comments: {name of the constant: its help}."""
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


def command(script: dict) -> str:
    """How a user starts this script: `python train_dpo.py`, or `python -m extras.evaluate` for one in a package."""
    spec = script.get("__spec__")
    if spec is not None and "." in spec.name:
        return f"python -m {spec.name}"
    return f"python {Path(script['__file__']).name}"


def top_constants(source: str) -> dict[str, str]:
    """The UPPER_CASE names set before the first function of a source text, each with the comment on its line."""
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Dict):  # a table is no option
            name = getattr(node.targets[0], "id", "")
            if name.isupper():
                rest_of_line = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
                constants[name] = rest_of_line.strip().lstrip("# ")
    return constants


def reader(name: str, default: object) -> Callable[[str], object]:
    """A function that turns the text of an option into a value of the default's type, or says why it cannot."""
    kind = type(default)
    if kind not in (str, bool, int, float, tuple):
        raise TypeError(f"{name} = {default!r}: an option is a str, bool, int, float or tuple (0 or '' for 'not set')")

    def read(text: str) -> object:
        try:
            if kind is bool:
                return TRUE_FALSE[text.lower()]
            if kind is tuple:
                part_kind = type(default[0]) if default else str
                return tuple(value_of(part_kind, part.strip()) for part in text.split(",") if part.strip())
            return value_of(kind, text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} such as {default!r}, got {text!r}") from None

    return read


def value_of(kind: type, text: str) -> object:
    """The text as a value of a type; ValueError for a number that is not finite: it would poison a run in silence."""
    if kind is float and not math.isfinite(float(text)):
        raise ValueError
    return kind(text)
