"""Split by prompt: near-duplicate prompts stay together, the share is exact, nothing leaks into training."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

import numpy as np

SHINGLE_WORDS = 3  # prompts are compared by their runs of three words
SIMILAR = 0.8  # Jaccard similarity of these runs from which two prompts count as near duplicates
HASHES, BANDS = 64, 16  # a pair of similarity 0.8 shares one of 16 bands of 4 with probability 0.9998

# Chinese and Japanese letters are a word each: no spaces part words there
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

# factors of the hash functions x -> factor * x modulo 2^64, the same in every run
ODD = np.random.default_rng(0).integers(1 << 63, size=HASHES, dtype=np.uint64) * 2 + 1


def words_of(prompt: str) -> list[str]:
    """The words of a prompt without case, punctuation and typographic variants."""
    return WORD.findall(unicodedata.normalize("NFKC", prompt).casefold())


def shingles(words: list[str]) -> np.ndarray:
    """Sorted 32-bit hashes of all runs of SHINGLE_WORDS words; the whole prompt is one run where it is shorter."""
    hashes = np.zeros(max(SHINGLE_WORDS, len(words)), dtype=np.uint64)
    hashes[: len(words)] = [crc32(word.encode()) for word in words]
    runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS) @ ODD[:SHINGLE_WORDS]  # modulo 2^64
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def near_duplicate_groups(prompts: Iterable[str]) -> np.ndarray:
    """Group numbers [prompts]: prompts with equal words, or similar by SIMILAR, have the same number.

    Candidates come from MinHash bands (Broder 1997), and each is checked by its true similarity.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    sets, bands = [], []
    for prompt in prompts:
        sets.append(shingles(words_of(prompt)))
        signature = (ODD[:, None] * sets[-1].astype(np.uint64)).min(axis=1).reshape(BANDS, -1)
        bands.append(signature @ ODD[: HASHES // BANDS])
    edges = [edge for band in np.array(bands).reshape(-1, BANDS).T for edge in similar_in(band, sets)]
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (ends[0], ends[1])), shape=(len(sets), len(sets)))
    return connected_components(graph, directed=False)[1]


def similar_in(band: np.ndarray, sets: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Pairs of prompts that share a value in `band` [prompts] and are similar by their sets of shingles.

    Each prompt of a bucket is compared with those before it that resembled no other: not with all, since a
    template that thousands of prompts share would make that quadratic.
    """
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] - 1))
    sizes = np.diff(starts, append=len(order))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        first_of_kind = []
        for i in order[start : start + size].tolist():
            like = next((other for other in first_of_kind if similarity(sets[i], sets[other]) >= SIMILAR), None)
            if like is None:
                first_of_kind.append(i)
            else:
                yield like, i


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets, 0 to 1."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
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
    wanted = math.ceil(len(groups) * share - 1e-9)
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
