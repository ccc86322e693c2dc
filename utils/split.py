"""Split by prompt: near-duplicate prompts stay together, the share is exact, nothing leaks into training."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

SHINGLE_WORDS = 3  # prompts are compared by their runs of three words
SIMILAR = 0.8  # Jaccard similarity of these runs from which two prompts count as near duplicates
HASHES, BANDS = 64, 16  # a pair of similarity 0.8 shares one of 16 bands of 4 with probability 0.9998
PRIME = (1 << 61) - 1


def words_of(prompt: str) -> list[str]:
    """The words of a prompt without case, punctuation and typographic variants."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold())


def shingles(words: list[str]) -> set[int]:
    """Hashes of all runs of SHINGLE_WORDS words; the whole prompt is one run where it is shorter."""
    runs = [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    return {int.from_bytes(blake2b(run.encode(), digest_size=4).digest()) for run in runs}


def near_duplicate_groups(prompts: Iterable[str]) -> np.ndarray:
    """Group numbers [prompts]: prompts with equal words, or similar by SIMILAR, have the same number.

    Candidates come from MinHash bands (Broder 1997), and each is checked by its true similarity.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    random = np.random.default_rng(0)  # the hash functions, not the split: the same in every run
    factors = random.integers(1, 1 << 29, size=(HASHES, 1))
    offsets = random.integers(0, PRIME >> 1, size=(HASHES, 1))
    first_of_band, sets, edges = {}, [], []
    for i, prompt in enumerate(prompts):
        grams = shingles(words_of(prompt))
        sets.append(np.fromiter(grams, dtype=np.uint32))
        signature = ((factors * sets[-1].astype(np.int64)[None] + offsets) % PRIME).min(axis=1)
        for band, values in enumerate(signature.reshape(BANDS, -1)):
            other = first_of_band.setdefault((band, values.tobytes()), i)
            if other != i and similarity(grams, set(sets[other].tolist())) >= SIMILAR:
                edges.append((other, i))
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (ends[0], ends[1])), shape=(len(sets), len(sets)))
    return connected_components(graph, directed=False)[1]


def similarity(one: set[int], other: set[int]) -> float:
    """Jaccard similarity of two sets, 0 to 1."""
    return len(one & other) / len(one | other)


def split_indices(
    groups: Sequence[int], share: float, seed: int, never_train: Iterable[int] = ()
) -> tuple[list[int], list[int]]:
    """(train rows, validation rows) in random order, whole groups on one side, ceil(share x rows) in validation.

    groups: the group number of each row. never_train: groups that must not be trained on, since held-out rows of
    the source belong to them too; they come into validation first. Train keeps at least one group. The
    validation count is exact wherever groups allow it, as they do when some hold a single row.
    """
    rows_of = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[int(group)].append(row)
    order = [list(rows_of)[i] for i in np.random.default_rng(seed).permutation(len(rows_of))]
    banned = set(never_train)
    order.sort(key=lambda group: group not in banned)  # stable: the random order stays within each half
    wanted = math.ceil(len(groups) * share - 1e-9)
    train, validation = [], []
    for group in order:
        fits = len(validation) + len(rows_of[group]) <= wanted
        last = not train and group == order[-1]
        (validation if (fits or group in banned) and not last else train).extend(rows_of[group])
    random = np.random.default_rng(seed + 1)
    return random.permutation(train).tolist(), random.permutation(validation).tolist()
