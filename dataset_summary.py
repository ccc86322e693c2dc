"""Summarise the processed pairs: sizes, lengths, cuts, rating gaps, shortcuts and leaks, in a table and figures.

Reads  : processed_helpsteer/ (made by load_helpsteer_dataset.py) and the tokenizer named in it
Writes : outputs/summary/ (summary.json, summary.md and the figures as PNG), afresh each time

python dataset_summary.py
python dataset_summary.py --data_dir processed_512 --output_dir outputs/summary_512
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import override_constants  # first: it says what to do where a package below is missing

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
from utils.runs import write_json, write_text
from utils.script import check, needs, say, script, stop

if TYPE_CHECKING:
    from datasets import Dataset

# data
DATA_DIR = "processed_helpsteer"  # folder that load_helpsteer_dataset.py wrote
TOKENIZER = ""  # hub name or folder, "" = the one that the data were made with; another place of the same one only
# what to show
WINDOWS = (256, 512, 1024, 2048)  # values of MAX_LENGTH (tokens): how many pairs would fit whole
GAPS = (0.2, 0.5, 1.0, 1.5, 2.0)  # values of MIN_RATING_GAP: how many pairs each would keep
EXAMPLES = 5  # pairs to show
SEED = 42  # of the examples
# output
OUTPUT_DIR = "outputs/summary"  # folder of the summary


def load_data(folder: Path) -> tuple[dict, dict[str, Dataset]]:
    """Return (metadata, the splits that have rows) of a processed folder; end the script where it is damaged."""
    from datasets import load_from_disk

    again = "run `python load_helpsteer_dataset.py` again"
    if not (folder / "metadata.json").is_file():
        stop(f"{folder} holds no metadata.json, so it is no folder of processed pairs: {again}")
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        sizes = {name: metadata[f"{name}_size"] for name in ("train", "validation", "test")}
        parts = {name: load_from_disk(str(folder / name)) for name, size in sizes.items() if size}
    except (ValueError, KeyError, TypeError, OSError) as error:
        stop(f"{folder} is damaged ({type(error).__name__}: {str(error)[:120]}): {again}")
    refuse_sft_rows(folder, metadata)
    if not parts:
        stop(f"{folder} holds no pairs: {again}")
    return metadata, parts


def describe(m: dict[str, np.ndarray], window: int) -> dict:
    """The content of summary.json for one split or for all. m: the measures of `measure`; shares are 0 to 1."""
    lengths = m | {"prompt_raw_cut": np.minimum(m["prompt_raw"], window)}
    cut = {side: share(m[f"{side}_cut"]) for side in ("prompt", "chosen", "rejected")}
    return {
        "pairs": len(m["prompt"]),
        "multi_turn_share": share(m["multi_turn"]),
        "tokens": {name: describe_lengths(lengths[name]) for name in LENGTHS},
        "fit_whole_share": {str(size): share(m["pair"] <= size) for size in WINDOWS},
        "cut_share": cut | {"both_answers": share(m["chosen_cut"] & m["rejected_cut"])},
        "equal_after_cut": int(m["equal_after_cut"].sum()),
        "rating_gap": describe_gaps(m["gap"]),
        "shortcuts": describe_shortcuts(m),
    }


def describe_gaps(gap: np.ndarray) -> dict | None:
    """Mean, median, bands and what MIN_RATING_GAP would keep, of the pairs with ratings; None where there are none.

    gap: hundredths, NaN for a pair without ratings.
    """
    gap = gap[~np.isnan(gap)]
    if not len(gap):
        return None
    kept = {str(limit): int((gap >= hundredths(limit)).sum()) for limit in GAPS}
    bands = {name: {"pairs": int(mask.sum()), "share": share(mask)} for name, mask in bands_of(gap).items()}
    mean, median = round(float(gap.mean()) / 100, 4), float(np.median(gap)) / 100
    return {"mean": mean, "median": median, "bands": bands, "pairs_kept_by_min_rating_gap": kept}


def find_repeats(parts: dict[str, Dataset], measures: dict, groups: dict[str, np.ndarray]) -> dict:
    """Return duplicates and leaks (see `split.repeats`), and EXAMPLES prompts that leak into training."""
    found = [first_rows(groups, group) for group in leaking_groups(groups)[:EXAMPLES]]
    leaked = [{"rows": rows, "prompt": parts["train"][rows["train"]]["prompt"][:200]} for rows in found]
    return repeats(measures, groups) | {"leaked_prompts": leaked}


def examples_of(parts: dict[str, Dataset]) -> list[dict]:
    """Return EXAMPLES pairs at random from all splits; texts of more than 600 characters are cut there."""
    rows = [(name, row) for name, part in parts.items() for row in range(len(part))]
    found = []
    for name, row in random.Random(SEED).sample(rows, min(EXAMPLES, len(rows))):
        pair = parts[name][row]
        ratings = {f"{side}_rating": pair[f"{side}_rating"] for side in ("chosen", "rejected")}
        gap = None
        if None not in ratings.values():
            gap = (hundredths(pair["chosen_rating"]) - hundredths(pair["rejected_rating"])) / 100
        texts = {"prompt": pair["prompt"], **{side: pair[side][-1]["content"] for side in ("chosen", "rejected")}}
        texts = {side: text if len(text) <= 600 else text[:600] + " [...]" for side, text in texts.items()}
        found.append({"split": name, "row": row, "gap": gap, **ratings, **texts})
    return found


def draw(m: dict[str, np.ndarray], section: dict, window: int, folder: Path) -> list[str]:
    """Write the figures, and remove those of an earlier summary that these data do not allow; their file names."""
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


def markdown(text: str, figures: list[str], examples: list[dict]) -> str:
    """Return the summary as a page: the table, links to the figures, the examples."""
    parts = ["# What is in the pairs", f"```\n{text}\n```", *(f"![{name}]({name})" for name in figures)]
    parts += ["## Examples", *(f"```\n{example_text(example)}\n```" for example in examples)]
    return "\n\n".join(parts) + "\n"


@script
def main(settings: dict) -> None:
    from tqdm import tqdm

    from utils.data.processed import matching_tokenizer

    # 1. check
    folder, output = needs(DATA_DIR, made_by="load_helpsteer_dataset.py"), Path(OUTPUT_DIR)
    metadata, parts = load_data(folder)
    tokenizer, _ = matching_tokenizer(DATA_DIR, "TOKENIZER", TOKENIZER or metadata["tokenizer"])
    check(settings)
    output.mkdir(parents=True, exist_ok=True)
    # 2. measure every pair
    with tqdm(desc="measuring", total=sum(map(len, parts.values())), unit=" pairs") as progress:
        measures = {name: measure(part, tokenizer, progress) for name, part in parts.items()}
    columns = next(iter(measures.values()))
    everything = {name: np.concatenate([m[name] for m in measures.values()]) for name in columns}
    # 3. describe
    about = ("dataset_name", "revision", "split_used", "rating", "tokenizer", "max_length", "fingerprint")
    summary = {"data": {name: metadata[name] for name in about}, "settings": settings}
    for name, m in {"all": everything, **measures}.items():
        summary[name] = describe(m, metadata["max_length"])
    summary["repeats"] = find_repeats(parts, measures, near_duplicates(parts))
    summary["examples"] = examples_of(parts)
    # 4. save
    text = format_summary(summary, list(parts))
    figures = draw(everything, summary["all"], metadata["max_length"], output)
    write_json(output / "summary.json", summary)
    write_text(output / "summary.md", markdown(text, figures, summary["examples"]))
    # 5. print it, where it is and what to run next
    say("\n\n".join(["", text, *(example_text(example) for example in summary["examples"]), ""]))
    say(f"written: {output}/summary.json, summary.md, {', '.join(figures)}")
    say(f"next: {next_command('python train_reward_model.py', DATA_DIR, TOKENIZER or metadata['tokenizer'])}")


if __name__ == "__main__":
    main(override_constants(globals()))
