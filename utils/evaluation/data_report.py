"""The summary of a dataset: measures of its pairs, duplicates, and the summary as text."""

from __future__ import annotations

import hashlib
import textwrap
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from utils.data.preferences import hundredths
from utils.data.split import near_duplicate_groups
from utils.evaluation.baselines import SHORTCUTS, bands_of
from utils.evaluation.statistics import interval, wins

if TYPE_CHECKING:
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

WIDTH = 100  # columns
LENGTHS = {  # measure: its name in the table
    "prompt_raw": "prompt, raw text",
    "prompt_raw_cut": "  raw text, cut at the window",
    "prompt": "prompt, in the chat template",
    "prompt_in_window": "  in the window",
    "chosen": "chosen answer",
    "chosen_in_window": "  in the window",
    "rejected": "rejected answer",
    "rejected_in_window": "  in the window",
    "pair": "prompt + longer answer",
    "pair_in_window": "  in the window",
}
DECIMALS = {"mean": 1, "median": 0, "p90": 0, "max": 0}  # of lengths in the table
CUTS = {
    "prompt": "prompts cut",
    "chosen": "chosen answers cut",
    "rejected": "rejected answers cut",
    "both_answers": "both answers of a pair cut",
}
SHORTCUT_LABELS = {
    "longer": "longer answer wins",
    "more_list_items": "more list items win",
    "longer_in_window": "longer inside the window wins",
}
REPEATS = {  # (what, where): its name in the table
    ("prompts", "within"): "prompts again in the same split",
    ("prompts", "across"): "prompts in two splits",
    ("near_duplicate_prompts", "within"): "near duplicates in the same split",
    ("near_duplicate_prompts", "across"): "near duplicates in two splits",
    ("answers", "across"): "answers in two splits",
}
LENGTH_BINS = {"<64": 0, "64-127": 64, "128-255": 128, "256+": 256}  # name: first length in it (tokens)
BATCH_OF_ROWS = {"measure": 256, "prompts": 1000}  # rows held in memory at once


def summary_text(summary: dict, splits: list[str]) -> str:
    """The whole summary as text. splits: the columns, such as train and validation; "all" comes before them."""
    data = summary["data"]
    sections = {name: summary[name] for name in ("all", *splits)}
    blocks = [
        [
            f"data       {clip(data['dataset_name'], WIDTH - 11)}",
            f"tokenizer  {clip(data['tokenizer'], WIDTH - 11)}",
            f"rating     {data['rating']}",
            f"window     {data['max_length']} tokens for prompt and answer",
        ],
        counts_table(sections),
        lengths_table(sections["all"]),
        gaps_table(sections),
        shortcuts_table(sections),
        repeats_lines(summary["repeats"]),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def aligned(rows: list[list[str]], first: int = 36) -> list[str]:
    """Rows of cells as lines: the first column `first` wide and to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(rows[0]))]
    return [
        row[0].ljust(first) + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    ]


def listed(head: str, items: list[str]) -> list[str]:
    """Head and items in one line, or in several that begin with whole items."""
    glued = ", ".join(item.replace(" ", "\u00a0") for item in items)  # a line is not broken there
    lines = textwrap.wrap(f"{head} {glued}", WIDTH, subsequent_indent=" " * 4)
    return [line.replace("\u00a0", " ") for line in lines]


def percent_1(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def clip(text: str, length: int) -> str:
    """One line of text of at most `length` characters, with dots where it was longer."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3].rstrip() + "..."


def counts_table(sections: dict[str, dict]) -> list[str]:
    """Sizes, multi-turn share and what the window cuts, by split."""
    rows = [
        ["sizes", *sections],
        ["pairs", *(f"{section['pairs']:,}" for section in sections.values())],
        ["prompts of more than one turn", *(percent_1(s["multi_turn_share"]) for s in sections.values())],
        *([name, *(percent_1(s["cut_share"][key]) for s in sections.values())] for key, name in CUTS.items()),
        ["pairs whose answers are equal then", *(f"{s['equal_after_cut']:,}" for s in sections.values())],
    ]
    return aligned(rows)


def lengths_table(section: dict) -> list[str]:
    """Token lengths before and in the window, all splits together."""
    tokens = section["tokens"]
    bins = list(tokens["prompt"]["bins"])
    rows = [["tokens", "mean", "median", "90 %", "max", *bins]]
    for key, name in LENGTHS.items():
        numbers = [f"{tokens[key][what]:.{places}f}" for what, places in DECIMALS.items()]
        rows.append([name, *numbers, *(percent_1(tokens[key]["bins"][part]) for part in bins)])
    fit = [f"{percent_1(part)} in {size}" for size, part in section["fit_whole_share"].items()]
    return [*aligned(rows, 30), *listed("pairs that fit whole, by window:", fit)]


def gaps_table(sections: dict[str, dict]) -> list[str]:
    """Rating gaps of the splits that have ratings, and what MIN_RATING_GAP would keep of all pairs with ratings."""
    gaps = {name: section["rating_gap"] for name, section in sections.items() if section["rating_gap"]}
    if not gaps:
        return ["rating gap                            none: the source has no ratings"]
    rows = [["rating gap, chosen - rejected", *gaps]]
    rows += [[what, *(f"{gap[what]:.2f}" for gap in gaps.values())] for what in ("mean", "median")]
    for band in gaps["all"]["bands"]:
        cells = [gap["bands"][band] for gap in gaps.values()]
        rows.append([f"gap {band}", *(f"{cell['pairs']:,} {percent_1(cell['share']):>7}" for cell in cells)])
    pairs = sum(band["pairs"] for band in gaps["all"]["bands"].values())
    kept = gaps["all"]["pairs_kept_by_min_rating_gap"]
    kept = [f"{limit}: {count:,} ({percent_1(count / pairs)})" for limit, count in kept.items()]
    without = [name for name in sections if name not in gaps]
    lines = [*aligned(rows), *listed("pairs kept by MIN_RATING_GAP", kept)]
    return lines + ([f"no ratings in {', '.join(without)}"] if without else [])


def shortcuts_table(sections: dict[str, dict]) -> list[str]:
    """Pair accuracies of the shortcuts by split."""
    rows = [["shortcuts, pair accuracy", "all", "95 % interval", "ties", *list(sections)[1:]]]
    for key, name in SHORTCUT_LABELS.items():
        first, *others = (section["shortcuts"][key] for section in sections.values())
        cells = [f"{first['accuracy']:.3f}", f"{first['low']:.3f} to {first['high']:.3f}", f"{first['ties']:,}"]
        rows.append([name, *cells, *(f"{other['accuracy']:.3f}" for other in others)])
    return [*aligned(rows), "a tie counts half; a reward model has learned more than these only where it beats them"]


def repeats_lines(repeats: dict) -> list[str]:
    """Duplicates and leaks; a prompt that leaks into training is shown with its rows."""
    lines = ["duplicates and leaks"]
    for (what, where), name in REPEATS.items():
        counts = ", ".join(f"{count:,} {split}" for split, count in repeats[what][where].items())
        lines.append(f"{name:36}  {counts or 'there is one split'}")
    answers = repeats["answers"]
    lines.append(f"{'answers in more than one pair':36}  {answers['in_several_pairs']:,}")
    lines.append(f"{'pairs with one answer on both sides':36}  {answers['chosen_equals_rejected']:,}")
    lines.append(f"{'prompts that leak into training':36}  {repeats['leaks_into_training'] or 'none'}")
    for leak in repeats["leaked_prompts"]:
        rows = " and ".join(f"{split} row {row}" for split, row in leak["rows"].items())
        lines.append(clip(f"  LEAK {rows}: {leak['prompt']}", WIDTH))
    return lines


def example_text(example: dict) -> str:
    """An example in four lines."""
    lines = [f"{example['split']} row {example['row']}" + ("" if example["gap"] is None else f", gap {example['gap']}")]
    for side in ("prompt", "chosen", "rejected"):
        rating = example.get(f"{side}_rating")
        head = f"  {side:9}" + ("" if rating is None else f"{rating:<5.3g}")
        lines.append(head + clip(example[side], WIDTH - len(head)))
    return "\n".join(lines)


def measure(part: Dataset, tokenizer: PreTrainedTokenizerBase, progress: tqdm) -> dict[str, np.ndarray]:
    """One number per pair for each measure [pairs]: see `measure_batch`."""
    columns = defaultdict(list)
    for batch in part.remove_columns("input_ids").iter(BATCH_OF_ROWS["measure"]):
        for name, values in measure_batch(batch, tokenizer).items():
            columns[name].extend(values)
        progress.update(len(batch["prompt"]))
    m = {name: np.array(values) for name, values in columns.items()}
    for end in ("", "_in_window"):
        m[f"pair{end}"] = m[f"prompt{end}"] + np.maximum(m[f"chosen{end}"], m[f"rejected{end}"])
    return m


def measure_batch(batch: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Lengths before and in the window (tokens), cut flags, gap (hundredths, NaN without ratings), shortcut measures.

    *_key are hashes of texts, equal for equal texts. Before the window an answer's length is
    that of all the template writes for it, end of turn included, as it is in the window where nothing is cut.
    """
    from utils.data.tokens import answer_texts, ids_of, written_ids

    prompts = [messages[:-1] for messages in batch["chosen"]]
    answers = {side: [messages[-1]["content"] for messages in batch[side]] for side in ("chosen", "rejected")}
    written = [
        answer_texts(tokenizer, prompt, list(pair))
        for prompt, *pair in zip(prompts, answers["chosen"], answers["rejected"], strict=True)
    ]
    ids = written_ids(tokenizer, written)
    found = {
        "prompt_raw": [len(raw) for raw in ids_of(tokenizer, batch["prompt"])],
        "prompt": [len(prompt) for prompt, _ in ids],
        "prompt_in_window": [sum(mask) for mask in batch["attention_mask"]],
        "multi_turn": [sum(message["role"] != "system" for message in prompt) > 1 for prompt in prompts],
        "prompt_key": [text_key(prompt) for prompt in batch["prompt"]],
        "gap": [
            float("nan") if None in ratings else hundredths(ratings[0]) - hundredths(ratings[1])
            for ratings in zip(batch["chosen_rating"], batch["rejected_rating"], strict=True)
        ],
        **{name: batch[name] for name in ("prompt_cut", "chosen_cut", "rejected_cut", "equal_after_cut")},
    }
    for i, (side, texts) in enumerate(answers.items()):
        found[side] = [len(both[i]) for _, both in ids]
        found[f"{side}_in_window"] = found[f"{side}_longer_in_window"] = [len(cut) for cut in batch[f"{side}_ids"]]
        found[f"{side}_key"] = [text_key(text) for text in texts]
        found |= {f"{side}_{name}": [count(text) for text in texts] for name, count in SHORTCUTS.items()}
    return found


def text_key(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process: hash() changes with PYTHONHASHSEED."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def share(flags: np.ndarray) -> float:
    return round(float(np.mean(flags)), 6)


def describe_lengths(lengths: np.ndarray) -> dict:
    """Mean, percentiles and the shares of LENGTH_BINS of lengths in tokens."""
    percentiles = {f"p{p}": round(float(np.percentile(lengths, p)), 2) for p in (10, 25, 75, 90, 95, 99)}
    edges = [*LENGTH_BINS.values(), float("inf")]
    bins = [share((low <= lengths) & (lengths < high)) for low, high in pairwise(edges)]
    return {
        "mean": round(float(lengths.mean()), 2),
        "median": float(np.median(lengths)),
        **percentiles,
        "max": int(lengths.max()),
        "bins": dict(zip(LENGTH_BINS, bins, strict=True)),
    }


def describe_shortcut(m: dict[str, np.ndarray], name: str) -> dict:
    """Pair accuracy of a shortcut, over all pairs and within each band of rating gaps that has pairs."""
    right = wins(m[f"chosen_{name}"], m[f"rejected_{name}"])
    prompts, bands = m["prompt_key"], bands_of(m["gap"])
    by_gap = {band: pair_accuracy(right[mask], prompts[mask]) for band, mask in bands.items() if mask.any()}
    return pair_accuracy(right, prompts) | {"by_gap": by_gap}


def pair_accuracy(right: np.ndarray, prompts: np.ndarray) -> dict:
    """Accuracy and its 95 % interval over prompts. right: 1 for a pair that is right, 0.5 for a tie, else 0 [pairs]."""
    low, high = interval(right, prompts)
    found = {"accuracy": float(right.mean()), "low": low, "high": high}
    counts = {"pairs": len(right), "ties": int((right == 0.5).sum())}
    return {name: round(value, 6) for name, value in found.items()} | counts


def near_duplicates(parts: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """For each split the group number of each prompt [pairs]; groups run across splits."""
    from tqdm import tqdm

    pairs = sum(len(part) for part in parts.values())
    batches = (
        batch for part in parts.values() for batch in part.select_columns("prompt").iter(BATCH_OF_ROWS["prompts"])
    )
    prompts = (prompt for batch in batches for prompt in batch["prompt"])
    groups = near_duplicate_groups(tqdm(prompts, "comparing prompts", total=pairs, unit=" pairs"))
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    return dict(zip(parts, np.split(groups, ends), strict=True))
