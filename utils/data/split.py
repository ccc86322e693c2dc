"""Split by prompt: near-duplicate prompts stay on one side, the share is exact, and leaks are counted."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from scipy.cluster.hierarchy import DisjointSet

SHINGLE_WORDS = 3  # prompts are compared by their runs of three words
SIMILAR = 0.8  # Jaccard similarity of these runs from which two prompts count as near duplicates

# Chinese and Japanese letters are a word each: no spaces part words there
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

# factors of the hash of a run of words, modulo 2^64 and the same every time
ODD = np.random.default_rng(0).integers(1 << 63, size=SHINGLE_WORDS, dtype=np.uint64) * 2 + 1


def words_of(prompt: str) -> list[str]:
    """The words of a prompt without case, punctuation and typographic variants."""
    return WORD.findall(unicodedata.normalize("NFKC", prompt).casefold())


def shingles(words: list[str]) -> np.ndarray:
    """Sorted 32-bit hashes of all runs of SHINGLE_WORDS words; the whole prompt is one run where it is shorter."""
    hashes = np.zeros(max(SHINGLE_WORDS, len(words)), dtype=np.uint64)
    hashes[: len(words)] = [crc32(word.encode()) for word in words]
    runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS) @ ODD  # modulo 2^64
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def near_duplicate_groups(prompts: Iterable[str]) -> np.ndarray:
    """Group numbers [prompts]: prompts with equal words, or similar by SIMILAR, have the same number.

    So have two that a third one is similar to: every pair that is similar is found, in whatever order they come.
    """
    from scipy.cluster.hierarchy import DisjointSet  # half a second, which --help has not

    kinds = {}  # distinct sets of shingles, numbered as they come
    kind_of = [kinds.setdefault(shingles(words_of(prompt)).tobytes(), len(kinds)) for prompt in prompts]
    if not kinds:
        return np.zeros(0, dtype=np.int64)
    groups = DisjointSet(range(len(kinds)))
    join_similar(*rarest_first([np.frombuffer(kind, dtype=np.uint32) for kind in kinds]), groups)
    numbers = {}
    return np.array([numbers.setdefault(groups[kind], len(numbers)) for kind in kind_of])


def rarest_first(sets: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """(the sets with numbers for elements, sorted, rarer ones lower; how many elements are in one set only)."""
    _, places, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(one) for one in sets])[:-1]
    return [np.sort(part) for part in np.split(ranks[places], ends)], int((counts == 1).sum())


def join_similar(sets: list[np.ndarray], lonely: int, groups: DisjointSet) -> None:
    """Join the groups of all sets that are similar by SIMILAR. sets, lonely: see rarest_first.

    Two similar sets share one of their few rarest elements, so only those that do are compared, each two once: PPJoin
    (Xiao et al. 2008, https://doi.org/10.1145/1367497.1367516). A template that thousands of prompts share is none.
    """
    held = cache(lambda i: frozenset(sets[i].tolist()))
    found = defaultdict(lambda: defaultdict(list))  # element: {(group, size, place of the element): sets}
    for i in tqdm(sorted(range(len(sets)), key=lambda i: len(sets[i])), "near duplicates", unit=" prompts", delay=2):
        size, compared = len(sets[i]), set()
        rare = sets[i][: size - least(SIMILAR * size) + 1].tolist()
        for place, element in enumerate(rare):
            for (group, other_size, other_place), others in found.get(element, {}).items():
                # these two share the element and some of what comes after it at best
                shared = min(size - place, other_size - other_place)
                if other_size < SIMILAR * size or shared < least(SIMILAR / (1 + SIMILAR) * (size + other_size)):
                    continue
                for other in others:
                    if groups[group] == groups[i]:
                        break
                    if other not in compared and similarity(held(i), held(other)) >= SIMILAR:
                        groups.merge(i, other)
                    compared.add(other)
        # the sets to come are as large or larger: they share one of even fewer
        for place, element in enumerate(rare[: size - least(2 * SIMILAR / (1 + SIMILAR) * size) + 1]):
            if element >= lonely:
                found[element][groups[i], size, place].append(i)


def least(count: float) -> int:
    """The smallest whole number that is not below, but for rounding errors."""
    return math.ceil(count - 1e-9)


def similarity(one: Set[int], other: Set[int]) -> float:
    """Jaccard similarity of two sets, 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def split_indices(
    groups: Sequence[int], share: float, seed: int, never_train: Iterable[int] = ()
) -> tuple[list[int], list[int]]:
    """(train rows, validation rows) in random order, whole groups on one side, ceil(share x rows) in validation.

    groups: the group number of each row. never_train: groups that must not be trained on, since held-out rows of
    the source belong to them too; they come into validation first, all of them. Train keeps at least one of the
    other groups, and where all of several groups are too large, validation has the smallest of them. The validation
    count is exact wherever groups allow it, as they do when some hold a single row.
    """
    rows_of = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[int(group)].append(row)
    order = np.random.default_rng(seed).permutation(list(rows_of)).tolist()
    never_train = set(never_train)
    free = [group for group in order if group not in never_train]
    wanted = least(len(groups) * share)
    validation = [row for group in order if group in never_train for row in rows_of[group]]
    train = []
    for group in free:
        fits = len(validation) + len(rows_of[group]) <= wanted
        keep_one = not train and group == free[-1]
        (validation if fits and not keep_one else train).extend(rows_of[group])
    if wanted and not validation and len(free) > 1:
        smallest = min(free, key=lambda group: len(rows_of[group]))
        validation = rows_of[smallest]
        train = [row for group in free if group != smallest for row in rows_of[group]]
    random = np.random.default_rng(seed + 1)
    return random.permutation(train).astype(int).tolist(), random.permutation(validation).astype(int).tolist()


def repeats(measures: dict[str, dict[str, np.ndarray]], groups: dict[str, np.ndarray]) -> dict:
    """How often prompts and answers occur again, within a split and across splits.

    measures: for each split prompt_key, chosen_key and rejected_key [pairs], equal for equal texts.
    groups: for each split the near-duplicate group of each prompt [pairs], numbered across splits.
    Returns, for equal and for near-duplicate prompts, within {split: pairs beyond the first of each} and across
    {"train-validation": different prompts (groups) in both}; for answers, across and two counts of their own;
    leaks_into_training: groups of prompts that stand in train and in another split too.
    """
    prompts = {name: m["prompt_key"] for name, m in measures.items()}
    answers = {name: np.concatenate([m["chosen_key"], m["rejected_key"]]) for name, m in measures.items()}
    sides = [zip(m["chosen_key"].tolist(), m["rejected_key"].tolist(), strict=True) for m in measures.values()]
    pairs_of_answer = Counter(key for pairs in sides for pair in pairs for key in set(pair))
    return {
        "prompts": {"within": count_within(prompts), "across": count_across(prompts)},
        "near_duplicate_prompts": {"within": count_within(groups), "across": count_across(groups)},
        "answers": {
            "across": count_across(answers),
            "in_several_pairs": sum(count > 1 for count in pairs_of_answer.values()),
            "chosen_equals_rejected": sum(int((m["chosen_key"] == m["rejected_key"]).sum()) for m in measures.values()),
        },
        "leaks_into_training": len(leaking_groups(groups)),
    }


def count_within(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """For each split the entries that stood in it before."""
    return {name: len(values) - len(np.unique(values)) for name, values in keys.items()}


def count_across(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """For each two splits how many different entries stand in both."""
    return {f"{one}-{other}": len(np.intersect1d(keys[one], keys[other])) for one, other in combinations(keys, 2)}


def leaking_groups(groups: dict[str, np.ndarray]) -> list[int]:
    """The near-duplicate groups that stand in train and in another split too."""
    held_out = [values for name, values in groups.items() if name != "train"]
    if "train" not in groups or not held_out:
        return []
    return np.intersect1d(groups["train"], np.concatenate(held_out)).tolist()


def first_rows(groups: dict[str, np.ndarray], group: int) -> dict[str, int]:
    """{split: its first row of the group}, for the splits that have one."""
    found = {name: np.flatnonzero(values == group) for name, values in groups.items()}
    return {name: int(rows[0]) for name, rows in found.items() if len(rows)}
