"""Split rows by prompt, with near-duplicate prompts on one side, and count leaks between splits."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from scipy.cluster.hierarchy import DisjointSet

SHINGLE_WORDS = 3  # prompts are compared by their runs of three words
SIMILAR = 0.8  # near duplicates have at least this Jaccard similarity

# Chinese and Japanese have no spaces between words, so each letter counts as a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

# factors of the hash of a run of words, modulo 2^64; fixed, so that splits can be repeated
ODD = np.random.default_rng(0).integers(1 << 63, size=SHINGLE_WORDS, dtype=np.uint64) * 2 + 1


def words_of(prompt: str) -> list[str]:
    """Return the words of a prompt without case, punctuation and typographic variants."""
    return WORD.findall(unicodedata.normalize("NFKC", prompt).casefold())


def shingles(words: list[str]) -> np.ndarray:
    """Return sorted 32-bit hashes of all runs of SHINGLE_WORDS words; a shorter prompt is one run."""
    hashes = np.zeros(max(SHINGLE_WORDS, len(words)), dtype=np.uint64)
    hashes[: len(words)] = [crc32(word.encode()) for word in words]
    runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS) @ ODD  # modulo 2^64
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def near_duplicate_groups(prompts: Iterable[str]) -> np.ndarray:
    """Return group numbers [prompts]; prompts with equal words or a similarity of SIMILAR share a number.

    So do two prompts that are similar to a third one. The result does not depend on the order of the prompts.
    """
    from scipy.cluster.hierarchy import DisjointSet  # takes half a second, too long for --help

    kinds: dict[bytes, int] = {}  # distinct sets of shingles, by first appearance
    kind_of = [kinds.setdefault(shingles(words_of(prompt)).tobytes(), len(kinds)) for prompt in prompts]
    if not kinds:
        return np.zeros(0, dtype=np.int64)
    groups = DisjointSet(range(len(kinds)))
    join_similar(*rarest_first([np.frombuffer(kind, dtype=np.uint32) for kind in kinds]), groups)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(groups[kind], len(numbers)) for kind in kind_of])


def rarest_first(sets: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Return (the sets as sorted ranks of their elements, rarest lowest; the number of elements in a single set)."""
    _, places, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(elements) for elements in sets])[:-1]
    return [np.sort(elements) for elements in np.split(ranks[places], ends)], int((counts == 1).sum())


def join_similar(sets: list[np.ndarray], unshared: int, groups: DisjointSet) -> None:
    """Merge the groups of all sets with a similarity of SIMILAR. sets, unshared: see rarest_first.

    Similar sets share one of their few rarest elements, so only those sets are compared, once per pair: PPJoin
    (Xiao et al. 2008, https://doi.org/10.1145/1367497.1367516). A template in thousands of prompts is not rare.
    """
    elements_of = cache(lambda i: frozenset(sets[i].tolist()))
    # element: {(group, size, position of the element): sets}
    index: dict[int, dict[tuple[int, int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in tqdm(sorted(range(len(sets)), key=lambda i: len(sets[i])), "near duplicates", unit=" prompts", delay=2):
        size, compared = len(sets[i]), set()
        rare = sets[i][: size - ceil(SIMILAR * size) + 1].tolist()
        for position, element in enumerate(rare):
            for (group, earlier_size, earlier_position), earlier in index.get(element, {}).items():
                # at best, the two share this element and all later ones
                shared = min(size - position, earlier_size - earlier_position)
                needed = ceil(SIMILAR / (1 + SIMILAR) * (size + earlier_size))
                if earlier_size < SIMILAR * size or shared < needed:
                    continue
                for j in earlier:
                    if groups[group] == groups[i]:
                        break
                    if j not in compared and similarity(elements_of(i), elements_of(j)) >= SIMILAR:
                        groups.merge(i, j)
                    compared.add(j)
        # later sets are at least as large, so they share one of even fewer elements
        for position, element in enumerate(rare[: size - ceil(2 * SIMILAR / (1 + SIMILAR) * size) + 1]):
            if element >= unshared:
                index[element][groups[i], size, position].append(i)


def ceil(number: float) -> int:
    """Return the number rounded up, except for rounding errors."""
    return math.ceil(number - 1e-9)


def similarity(one: Set[int], two: Set[int]) -> float:
    """Return the Jaccard similarity of two sets, 0 to 1."""
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)


def split_indices(
    groups: Sequence[int], share: float, seed: int, never_train: Iterable[int] = ()
) -> tuple[list[int], list[int]]:
    """Return (train rows, validation rows) in random order, with ceil(share x rows) in validation.

    groups: the group number of each row; a group is never divided. never_train: groups with prompts of the test
    split, which all go to validation. Train always gets at least one of the other groups. Validation gets one too
    if there are several: the smallest if none fits. Its size is exact if every row is a group of its own.
    """
    rows_of = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[int(group)].append(row)
    order = np.random.default_rng(seed).permutation(list(rows_of)).tolist()
    never_train = set(never_train)
    free = [group for group in order if group not in never_train]
    wanted = ceil(len(groups) * share)
    validation = [row for group in order if group in never_train for row in rows_of[group]]
    train: list[int] = []
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


def repeats(measures: dict[str, dict[str, np.ndarray]], groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Count prompts and answers that occur more than once, within a split and across splits.

    measures: for each split prompt_key, chosen_key and rejected_key [pairs], equal for equal texts.
    groups: for each split the near-duplicate group of each prompt [pairs], numbered across splits.
    Returns, for equal and near-duplicate prompts, within {split: repeated pairs} and across {"train-validation":
    distinct prompts (groups) in both}; for answers, across and two counts of their own; and leaks_into_training, the
    groups of prompts that train shares with another split.
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
    """Return for each split the number of repeated entries."""
    return {name: len(values) - len(np.unique(values)) for name, values in keys.items()}


def count_across(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """Return the number of distinct entries that each pair of splits shares."""
    return {f"{one}-{two}": len(np.intersect1d(keys[one], keys[two])) for one, two in combinations(keys, 2)}


def leaking_groups(groups: dict[str, np.ndarray]) -> list[int]:
    """Return the near-duplicate groups that train shares with another split."""
    held_out = [values for name, values in groups.items() if name != "train"]
    if "train" not in groups or not held_out:
        return []
    return np.intersect1d(groups["train"], np.concatenate(held_out)).tolist()


def first_rows(groups: dict[str, np.ndarray], group: int) -> dict[str, int]:
    """Return {split: its first row of the group}, without splits that have none."""
    rows = {name: np.flatnonzero(values == group) for name, values in groups.items()}
    return {name: int(indices[0]) for name, indices in rows.items() if len(indices)}
