"""What is in the pairs? The report on a dataset: measures of its pairs, what they add up to, and tables of that."""

from __future__ import annotations

import hashlib
import textwrap
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.data.preferences import hundredths
from utils.data.split import near_duplicate_groups
from utils.evaluation.baselines import SHORTCUTS, label_of
from utils.evaluation.statistics import bands_of, interval, percent, wins

if TYPE_CHECKING:
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

WIDTH = 100  # columns of the text
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
LENGTH_BINS = {"<64": 0, "64-127": 64, "128-255": 128, "256+": 256}  # name: first length in it (tokens)
DECIMALS = {"mean": 1, "median": 0, "p90": 0, "max": 0}  # of lengths in the table
CUTS = {
    "prompt": "prompts cut",
    "chosen": "chosen answers cut",
    "rejected": "rejected answers cut",
    "both_answers": "both answers of a pair cut",
}
REPEATS = {  # (what, where): its name in the table
    ("prompts", "within"): "repeated prompts in the same split",
    ("prompts", "across"): "prompts in two splits",
    ("near_duplicate_prompts", "within"): "near duplicates in the same split",
    ("near_duplicate_prompts", "across"): "near duplicates in two splits",
    ("answers", "across"): "answers in two splits",
}
MEASURED_AT_ONCE, COMPARED_AT_ONCE = 256, 1000  # rows in memory


def measure(split: Dataset, tokenizer: PreTrainedTokenizerBase, progress: tqdm) -> dict[str, np.ndarray]:
    """Return the measures of each pair [pairs]; see `measure_batch`."""
    columns = defaultdict(list)
    for batch in split.remove_columns("input_ids").iter(MEASURED_AT_ONCE):
        for name, values in measure_batch(batch, tokenizer).items():
            columns[name].extend(values)
        progress.update(len(batch["prompt"]))
    m = {name: np.array(values) for name, values in columns.items()}
    for end in ("", "_in_window"):
        m[f"pair{end}"] = m[f"prompt{end}"] + np.maximum(m[f"chosen{end}"], m[f"rejected{end}"])
    return m


def measure_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Return lengths before and in the window (tokens), cut flags, gap (hundredths, or NaN), and shortcut measures.

    *_key are hashes of texts. The length of an answer before the window counts all tokens that the template writes
    for it, end of turn included, so that it equals the length in the window if nothing is cut.
    """
    from utils.data.tokens import answer_texts, ids_of, written_ids

    prompts = [messages[:-1] for messages in batch["chosen"]]
    answers = {side: [messages[-1]["content"] for messages in batch[side]] for side in ("chosen", "rejected")}
    texts = [
        answer_texts(tokenizer, prompt, list(pair))
        for prompt, *pair in zip(prompts, answers["chosen"], answers["rejected"], strict=True)
    ]
    ids = written_ids(tokenizer, texts)
    measures = {
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
    for i, (side, contents) in enumerate(answers.items()):
        measures[side] = [len(pair[i]) for _, pair in ids]
        in_window = [len(answer) for answer in batch[f"{side}_ids"]]
        measures[f"{side}_in_window"] = measures[f"{side}_longer_in_window"] = in_window
        measures[f"{side}_key"] = [text_key(text) for text in contents]
        measures |= {f"{side}_{name}": [count(text) for text in contents] for name, count in SHORTCUTS.items()}
    return measures


def text_key(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process: hash() changes with PYTHONHASHSEED."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def near_duplicates(splits: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """Return the near-duplicate group of each prompt [pairs] of each split, numbered across splits."""
    from tqdm import tqdm

    prompts = (
        prompt
        for split in splits.values()
        for batch in split.select_columns("prompt").iter(COMPARED_AT_ONCE)
        for prompt in batch["prompt"]
    )
    total = sum(map(len, splits.values()))
    groups = near_duplicate_groups(tqdm(prompts, "comparing prompts", total=total, unit=" pairs"))
    ends = np.cumsum([len(split) for split in splits.values()])[:-1]
    return dict(zip(splits, np.split(groups, ends), strict=True))


# entries of summary.json


def share(flags: np.ndarray) -> float:
    """Return the share of pairs that have a flag."""
    return round(float(np.mean(flags)), 6)


def describe_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Return mean, percentiles and the shares of LENGTH_BINS of lengths in tokens."""
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


def describe_shortcuts(m: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return the pair accuracy of each shortcut, over all pairs and within each band of rating gaps that has pairs."""
    result, prompts, bands = {}, m["prompt_key"], bands_of(m["gap"])
    for name in (*SHORTCUTS, "longer_in_window"):
        right = wins(m[f"chosen_{name}"], m[f"rejected_{name}"])
        by_gap = {band: pair_accuracy(right[mask], prompts[mask]) for band, mask in bands.items() if mask.any()}
        result[name] = pair_accuracy(right, prompts) | {"by_gap": by_gap}
    return result


def pair_accuracy(right: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """Return accuracy, its 95 % interval over prompts, pairs and ties. right [pairs]: 1, 0.5 at a tie, or 0."""
    low, high = interval(right, prompts)
    shares = {"accuracy": float(right.mean()), "low": low, "high": high}
    counts = {"pairs": len(right), "ties": int((right == 0.5).sum())}
    return {name: round(value, 6) for name, value in shares.items()} | counts


# summary.json as text


def format_summary(summary: dict[str, Any], splits: list[str]) -> str:
    """Return the tables of summary.json. splits: the columns after "all", such as train and validation."""
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


def counts_table(sections: dict[str, dict]) -> list[str]:
    """Return sizes, the multi-turn share and what the window cuts, by split."""
    rows = [
        ["sizes", *sections],
        ["pairs", *(f"{section['pairs']:,}" for section in sections.values())],
        ["prompts of more than one turn", *(percent(s["multi_turn_share"], 1) for s in sections.values())],
        *([name, *(percent(s["cut_share"][key], 1) for s in sections.values())] for key, name in CUTS.items()),
        ["pairs with equal answers after it", *(f"{s['equal_after_cut']:,}" for s in sections.values())],
    ]
    return aligned(rows)


def lengths_table(section: dict[str, Any]) -> list[str]:
    """Return token lengths before and in the window."""
    tokens = section["tokens"]
    bins = list(tokens["prompt"]["bins"])
    rows = [["tokens", "mean", "median", "90 %", "max", *bins]]
    for key, name in LENGTHS.items():
        numbers = [f"{tokens[key][statistic]:.{digits}f}" for statistic, digits in DECIMALS.items()]
        rows.append([name, *numbers, *(percent(tokens[key]["bins"][bin_name], 1) for bin_name in bins)])
    fit = [f"{percent(part, 1)} in {size}" for size, part in section["fit_whole_share"].items()]
    return [*aligned(rows, 30), *listed("pairs that fit whole, by window:", fit)]


def gaps_table(sections: dict[str, dict]) -> list[str]:
    """Return the rating gaps of the splits with ratings, and the number of pairs that MIN_RATING_GAP would keep."""
    gaps = {name: section["rating_gap"] for name, section in sections.items() if section["rating_gap"]}
    if not gaps:
        return ["rating gap                            none: the source has no ratings"]
    rows = [["rating gap, chosen - rejected", *gaps]]
    rows += [[statistic, *(f"{gap[statistic]:.2f}" for gap in gaps.values())] for statistic in ("mean", "median")]
    for band in gaps["all"]["bands"]:
        cells = [gap["bands"][band] for gap in gaps.values()]
        rows.append([f"gap {band}", *(f"{cell['pairs']:,} {percent(cell['share'], 1):>7}" for cell in cells)])
    pairs = sum(band["pairs"] for band in gaps["all"]["bands"].values())
    counts = gaps["all"]["pairs_kept_by_min_rating_gap"]
    kept = [f"{limit}: {count:,} ({percent(count / pairs, 1)})" for limit, count in counts.items()]
    without = [name for name in sections if name not in gaps]
    lines = [*aligned(rows), *listed("pairs kept by MIN_RATING_GAP", kept)]
    return lines + ([f"no ratings in {', '.join(without)}"] if without else [])


def shortcuts_table(sections: dict[str, dict]) -> list[str]:
    """Return the pair accuracies of the shortcuts by split."""
    rows = [["shortcuts, pair accuracy", "all", "95 % interval", "ties", *list(sections)[1:]]]
    for key in sections["all"]["shortcuts"]:
        first, *others = (section["shortcuts"][key] for section in sections.values())
        cells = [f"{first['accuracy']:.3f}", f"{first['low']:.3f} to {first['high']:.3f}", f"{first['ties']:,}"]
        rows.append([label_of(key), *cells, *(f"{other['accuracy']:.3f}" for other in others)])
    return [*aligned(rows), "a tie counts half; a reward model has learned more than these only if it beats them"]


def repeats_lines(repeats: dict[str, Any]) -> list[str]:
    """Return duplicates and leaks, with the rows of some prompts that leak into training."""
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


def example_text(example: dict[str, Any]) -> str:
    """Return an example pair in four lines."""
    lines = [f"{example['split']} row {example['row']}" + ("" if example["gap"] is None else f", gap {example['gap']}")]
    for side in ("prompt", "chosen", "rejected"):
        rating = example.get(f"{side}_rating")
        head = f"  {side:9}" + ("" if rating is None else f"{rating:<5.3g}")
        lines.append(head + clip(example[side], WIDTH - len(head)))
    return "\n".join(lines)


def aligned(rows: list[list[str]], first: int = 36) -> list[str]:
    """Return rows of cells as lines: the first column left-aligned and `first` wide, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(rows[0]))]
    return [
        row[0].ljust(first) + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    ]


def listed(head: str, items: list[str]) -> list[str]:
    """Return head and items as lines of at most WIDTH, broken between items only."""
    unbroken = ", ".join(item.replace(" ", "\u00a0") for item in items)
    lines = textwrap.wrap(f"{head} {unbroken}", WIDTH, subsequent_indent=" " * 4)
    return [line.replace("\u00a0", " ") for line in lines]


def clip(text: str, length: int) -> str:
    """Return a text on one line of at most `length` characters; a longer one ends in dots."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3].rstrip() + "..."
