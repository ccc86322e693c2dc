"""The split is exact and by prompt, near duplicates share a side, and no training prompt resembles a test prompt."""

import time

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse.csgraph import connected_components

import load_helpsteer_dataset
from utils.data.preferences import Ledger, checked_pairs
from utils.data.sources import ATTRIBUTES
from utils.data.split import SIMILAR, near_duplicate_groups, shingles, similarity, split_indices, words_of

LONG = "Please write a short story about a lighthouse keeper who finds a letter in a bottle on the shore one morning"
CHINESE = "请写一个关于灯塔看守人在海边发现瓶中信的短篇故事"


def split(prompts, share, seed=42, never_train=()):
    """Split a plain dataset with the function that users call, and return its (train, validation) prompts."""
    dataset = Dataset.from_dict({"prompt": prompts})
    train, validation = load_helpsteer_dataset.split_dataset(dataset, share, seed, never_train)
    return train["prompt"][:], validation["prompt"][:]


def shingle_sets(prompts):
    return [set(shingles(words_of(prompt)).tolist()) for prompt in prompts]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("How do I boil an egg?", "how do i boil an EGG", True),
        ("ﬁnd the “ﬁle” — now!", 'find the "file" - now', True),
        (LONG + ".", LONG + ", please", True),
        (LONG, LONG.replace("lighthouse", "train"), False),
        ("What is 2 + 2?", "What is 2 + 3?", False),
        ("Translate: cat", "Translate: dog", False),
        ("Как сварить яйцо?", "как сварить яйцо", True),
        (CHINESE, CHINESE + "吧", True),
        ("请写一个关于灯塔的故事", "请写一个关于火车的诗歌", False),
    ],
)
def test_near_duplicates_differ_in_case_punctuation_or_a_few_words(one, other, same):
    groups = near_duplicate_groups([one, "Something else entirely, about tax law", other])
    assert (groups[0] == groups[2]) == same and groups[1] not in (groups[0], groups[2])


def test_near_duplicates_are_found_among_prompts_that_share_a_template():
    """All prompts of a template resemble each other a little, and each must still find its own duplicate."""
    random = np.random.default_rng(1)
    words = [f"word{i}" for i in range(3000)]
    template = " ".join(random.choice(words, 60))
    prompts = []
    for _ in range(40):
        own = random.choice(words, 25).tolist()
        prompts += [f"{template} {' '.join(own)}", f"{template} {' '.join([*own[:-1], 'changed'])}"]
    groups, sets = near_duplicate_groups(prompts), shingle_sets(prompts)
    for i in range(len(prompts)):
        for j in range(i):
            if similarity(sets[i], sets[j]) >= SIMILAR:
                assert groups[i] == groups[j], (i, j)
    assert len(set(groups.tolist())) == 40


@pytest.mark.parametrize("vocabulary", [3, 8, 40])
def test_groups_equal_those_of_comparing_all_with_all(vocabulary):
    random = np.random.default_rng(vocabulary)
    words = [f"word{i}" for i in range(vocabulary)]
    for _ in range(20):
        prompts = [" ".join(random.choice(words, random.integers(1, 25))) for _ in range(5)]
        for _ in range(25):  # a copy with one word changed and perhaps one word more
            changed = prompts[random.integers(len(prompts))].split()
            changed[random.integers(len(changed))] = random.choice(words)
            prompts.append(" ".join([*changed, *random.choice(words, random.integers(2))]))
        sets = shingle_sets(prompts)
        like = np.array([[similarity(one, other) >= SIMILAR for other in sets] for one in sets])
        assert near_duplicate_groups(prompts).tolist() == connected_components(like, directed=False)[1].tolist()


def test_many_prompts_of_one_template_are_grouped_quickly():
    """1,500 prompts share 60 words and have 10 of their own. They are not compared all with all."""
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(5000)]
    template = " ".join(random.choice(words, 60))
    prompts = [f"{template} {' '.join(random.choice(words, 10))}" for _ in range(1500)]
    began = time.monotonic()
    assert len(set(near_duplicate_groups(prompts).tolist())) == 1500
    assert time.monotonic() - began < 20, "0.2 s on two cores"


def test_groups_are_never_split():
    groups = [0] * 7 + [1] * 5 + [2] * 3 + list(range(3, 30))
    for seed in range(20):
        train, validation = split_indices(groups, 0.25, seed)
        assert sorted([*train, *validation]) == list(range(len(groups)))
        assert not {groups[i] for i in train} & {groups[i] for i in validation}
        assert len(validation) == 11, "ceil of 42 / 4: single rows fill the gap that groups leave"
        train, validation = split_indices([0] * 5 + [1] * 3 + [2] * 5, 0.1, seed)
        assert sorted(validation) == [5, 6, 7] and len(train) == 10, "neither side is empty"
        assert split_indices([0] * 5 + [1] * 3, 0.0, seed)[1] == [], "no share, no validation"


@pytest.mark.parametrize(
    "rows, share, wanted",
    [(8678, 0.2, 1736), (8678, 0.1, 868), (100, 0.07, 7), (10, 0.25, 3), (7, 0.0, 0), (1, 0.5, 0)],
)
def test_the_validation_share_is_exact(rows, share, wanted):
    """In floats, 0.07 of 100 is 7.000000000000001. A single row goes to training."""
    train, validation = split_indices(list(range(rows)), share, 42)
    assert (len(train), len(validation)) == (rows - wanted, wanted)


def test_only_the_seed_decides_the_split():
    prompts = [f"Question number {i} about subject {i * 7}" for i in range(100)]
    first = split(prompts, 0.2)
    assert first == split(prompts, 0.2) != split(prompts, 0.2, seed=43)
    assert set(first[1]) != set(split(prompts, 0.2, seed=43)[1]), "the seed picks the rows, not only their order"
    assert first[0] != sorted(first[0], key=prompts.index), "rows come in random order"


def test_equal_and_near_equal_prompts_share_a_side():
    prompts = [f"Question number {i} about subject {i * 7}" for i in range(60)]
    copies = [prompt.upper() + "!" for prompt in prompts[:20]] + prompts[5:10]
    for seed in range(5):
        train, validation = split(prompts + copies, 0.3, seed)
        assert not {p.upper().strip("!") for p in train} & {p.upper().strip("!") for p in validation}
        assert len(validation) == 26


def test_no_training_prompt_resembles_a_test_prompt():
    prompts = [LONG, *(f"Question number {i} about subject {i * 7}" for i in range(9))]
    held_out = (LONG.upper() + " ?", prompts[4])
    for seed in range(8):
        train, validation = split(prompts, 0.2, seed, held_out)
        assert {LONG, prompts[4]} == set(validation) and len(train) == 8
    assert len(split(prompts, 0.0, 0, held_out)[1]) == 2, "held out even if no validation share was asked for"
    assert len(split(prompts, 0.5, 0, held_out)[1]) == 5, "they count as part of the share"
    assert split(prompts[:2], 0.5, 0, tuple(prompts))[0] == [], "no training rows are better than leaked ones"


def full_size_source():
    """Yield 20,324 rows in 10,161 prompts as in nvidia/HelpSteer2: 1,483 ties, and one prompt with four answers."""
    for i in range(10_161):
        answers = 4 if i == 5000 else 2
        for k in range(answers):
            better = k == 0 and i >= 1_483
            grades = dict.fromkeys(ATTRIBUTES, 3) | {"helpfulness": 4 if better else 3 - (k > 1)}
            yield {"prompt": f"prompt{i} asks{i} this{i}", "response": f"answer {k}", **grades}


def test_the_full_data_gives_the_published_counts():
    """10,161 - 1,483 = 8,678 pairs, of them 6,942 / 1,736 at 0.2 and 7,810 / 868 at 0.1."""
    ledger = Ledger()
    pairs = list(checked_pairs(full_size_source, "attributes", "average", "train", 0.0, ledger))
    assert len(pairs) == 8_678
    assert ledger.counts() == {"between_best_and_worst": 2, "tie": 1_483}
    totals = {"rows_read": 20_324, "rows_used": 2 * 8_678, "rows_dropped": 2 * 1_483 + 2, "prompts": 10_161}
    assert ledger.totals() == totals
    groups = near_duplicate_groups(pair["prompt"] for pair in pairs)
    assert [len(part) for part in split_indices(groups, 0.2, 42)] == [6_942, 1_736]
    assert [len(part) for part in split_indices(groups, 0.1, 42)] == [7_810, 868]
