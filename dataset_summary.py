"""Summarise the processed pairs: sizes, lengths, cuts, rating gaps, shortcuts and leaks, in a table and figures.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py) and the tokenizer named in it
Writes : outputs/summary/ (summary.json, summary.md and the figures as PNG), replaced each time

python dataset_summary.py
python dataset_summary.py --data_dir processed_512 --output_dir outputs/summary_512
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import override_constants  # first: it explains a package that is missing below

# isort: split
import numpy as np

from utils.data.preferences import hundredths
from utils.data.processed import next_command, refuse_sft_rows
from utils.data.split import first_rows, leaking_groups, repeats
from utils.evaluation.data_report import (
    LENGTHS,
    describe_lengths,
    describe_shortcuts,
    example_text,
    format_summary,
    measure,
    near_duplicates,
    share,
)
from utils.evaluation.statistics import bands_of
from utils.runs import read_json, write_json, write_text
from utils.script import check, needs, say, script, stop

if TYPE_CHECKING:
    from datasets import Dataset

# data
DATA_DIR = "processed_helpsteer"  # folder that load_helpsteer_dataset.py wrote
TOKENIZER = ""  # hub name or folder of the tokenizer of the data, "" = as in their metadata
# output
EXAMPLES = 5  # pairs to show
SEED = 42  # of the examples
OUTPUT_DIR = "outputs/summary"  # folder of the summary

SHOWN = {  # how many pairs would be left with these values of MAX_LENGTH (whole pairs) and MIN_RATING_GAP
    "windows": (256, 512, 1024, 2048),
    "gaps": (0.2, 0.5, 1.0, 1.5, 2.0),
}


def load_data(folder: Path) -> tuple[dict[str, Any], dict[str, Dataset]]:
    """Return (metadata, the splits that have rows) of a processed folder."""
    from datasets import load_from_disk

    needs(folder / "metadata.json", made_by="load_helpsteer_dataset.py")
    try:
        metadata = read_json(folder / "metadata.json")
        names = [name for name in ("train", "validation", "test") if metadata[f"{name}_size"]]
        splits = {name: load_from_disk(str(folder / name)) for name in names}
    except (ValueError, KeyError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        stop(f"{folder} is damaged ({reason}): run `python load_helpsteer_dataset.py` again")
    refuse_sft_rows(folder, metadata)
    return metadata, splits


def describe(m: dict[str, np.ndarray], window: int) -> dict[str, Any]:
    """Return the part of summary.json for one split or for all. m: the result of `measure`; shares are 0 to 1."""
    lengths = m | {"prompt_raw_cut": np.minimum(m["prompt_raw"], window)}
    cut = {side: share(m[f"{side}_cut"]) for side in ("prompt", "chosen", "rejected")}
    return {
        "pairs": len(m["prompt"]),
        "multi_turn_share": share(m["multi_turn"]),
        "tokens": {name: describe_lengths(lengths[name]) for name in LENGTHS},
        "fit_whole_share": {str(size): share(m["pair"] <= size) for size in SHOWN["windows"]},
        "cut_share": cut | {"both_answers": share(m["chosen_cut"] & m["rejected_cut"])},
        "equal_after_cut": int(m["equal_after_cut"].sum()),
        "rating_gap": describe_gaps(m["gap"]),
        "shortcuts": describe_shortcuts(m),
    }


def describe_gaps(gap: np.ndarray) -> dict[str, Any] | None:
    """Return mean, median, bands and the pairs that MIN_RATING_GAP would keep; None without ratings.

    gap: hundredths [pairs], NaN for a pair without ratings.
    """
    gap = gap[~np.isnan(gap)]
    if not len(gap):
        return None
    kept = {str(limit): int((gap >= hundredths(limit)).sum()) for limit in SHOWN["gaps"]}
    bands = {name: {"pairs": int(mask.sum()), "share": share(mask)} for name, mask in bands_of(gap).items()}
    mean, median = round(float(gap.mean()) / 100, 4), float(np.median(gap)) / 100
    return {"mean": mean, "median": median, "bands": bands, "pairs_kept_by_min_rating_gap": kept}


def find_repeats(splits: dict[str, Dataset], measures: dict, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return duplicates and leaks (see `split.repeats`), and EXAMPLES prompts that leak into training."""
    rows = [first_rows(groups, group) for group in leaking_groups(groups)[:EXAMPLES]]
    leaked = [{"rows": row, "prompt": splits["train"][row["train"]]["prompt"][:200]} for row in rows]
    return repeats(measures, groups) | {"leaked_prompts": leaked}


def examples_of(splits: dict[str, Dataset]) -> list[dict[str, Any]]:
    """Return EXAMPLES random pairs of all splits, with texts cut to 600 characters."""
    places = [(name, number) for name, rows in splits.items() for number in range(len(rows))]
    examples = []
    for name, number in random.Random(SEED).sample(places, min(EXAMPLES, len(places))):
        pair = splits[name][number]
        ratings = {f"{side}_rating": pair[f"{side}_rating"] for side in ("chosen", "rejected")}
        gap = None
        if None not in ratings.values():
            gap = (hundredths(pair["chosen_rating"]) - hundredths(pair["rejected_rating"])) / 100
        texts = {"prompt": pair["prompt"], **{side: pair[side][-1]["content"] for side in ("chosen", "rejected")}}
        texts = {side: text if len(text) <= 600 else text[:600] + " [...]" for side, text in texts.items()}
        examples.append({"split": name, "row": number, "gap": gap, **ratings, **texts})
    return examples


def draw(m: dict[str, np.ndarray], section: dict, window: int, folder: Path) -> list[str]:
    """Write the figures and return their file names; without ratings, remove old figures of ratings."""
    from utils.evaluation import plots

    has = ~np.isnan(m["gap"])
    rated, of_rated = {name: values[has] for name, values in m.items()}, section | {"pairs": int(has.sum())}
    figures = {
        "token_lengths.png": lambda: plots.plot_token_lengths(m, section, window),
        "shortcuts.png": lambda: plots.plot_shortcuts(section),
        "rating_gaps.png": lambda: plots.plot_rating_gaps(rated["gap"], of_rated),
        "length_by_gap.png": lambda: plots.plot_length_by_gap(rated, of_rated),
    }
    drawn = list(figures) if section["rating_gap"] else ["token_lengths.png", "shortcuts.png"]
    for name, figure in figures.items():
        if name in drawn:
            plots.save(figure(), folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return drawn


def markdown(text: str, figures: list[str], examples: list[dict[str, Any]]) -> str:
    """Return the summary as a page: the table, links to the figures, the examples."""
    blocks = ["# What is in the pairs", f"```\n{text}\n```", *(f"![{name}]({name})" for name in figures)]
    blocks += ["## Examples", *(f"```\n{example_text(example)}\n```" for example in examples)]
    return "\n\n".join(blocks) + "\n"


@script
def main(settings: dict) -> None:
    from tqdm import tqdm

    from utils.data.processed import matching_tokenizer

    # 1. check
    check(settings)
    output = Path(OUTPUT_DIR)
    metadata, splits = load_data(needs(DATA_DIR, made_by="load_helpsteer_dataset.py"))
    tokenizer, _ = matching_tokenizer(DATA_DIR, "TOKENIZER", TOKENIZER or metadata["tokenizer"])
    output.mkdir(parents=True, exist_ok=True)
    # 2. measure every pair
    with tqdm(desc="measuring", total=sum(map(len, splits.values())), unit=" pairs") as progress:
        measures = {name: measure(rows, tokenizer, progress) for name, rows in splits.items()}
    columns = next(iter(measures.values()))
    everything = {name: np.concatenate([m[name] for m in measures.values()]) for name in columns}
    # 3. describe
    about = ("dataset_name", "revision", "split_used", "rating", "tokenizer", "max_length", "fingerprint")
    summary = {"data": {name: metadata[name] for name in about}, "settings": settings}
    for name, m in {"all": everything, **measures}.items():
        summary[name] = describe(m, metadata["max_length"])
    summary["repeats"] = find_repeats(splits, measures, near_duplicates(splits))
    summary["examples"] = examples_of(splits)
    # 4. save
    text = format_summary(summary, list(splits))
    figures = draw(everything, summary["all"], metadata["max_length"], output)
    write_json(output / "summary.json", summary)
    write_text(output / "summary.md", markdown(text, figures, summary["examples"]))
    # 5. print the summary and the next step
    say("\n\n".join(["", text, *(example_text(example) for example in summary["examples"]), ""]))
    say(f"written: {output}/summary.json, summary.md, {', '.join(figures)}")
    say(f"next: {next_command('python train_reward_model.py', DATA_DIR, TOKENIZER or metadata['tokenizer'])}")


if __name__ == "__main__":
    main(override_constants(globals()))
