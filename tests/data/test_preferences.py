"""Rows become one pair for each prompt, and the ledger has every row that is left out."""

import json

import pytest

from tests.source_rows import dialogue
from utils.data.preferences import Ledger, checked_pairs, real_number, whole_number
from utils.data.sources import ATTRIBUTES

MISSING = object()  # in place of a value: the row has no such column


def answer(prompt, response, grades=(3, 3, 3, 3, 3), **cells):
    return {"prompt": prompt, "response": response, **dict(zip(ATTRIBUTES, grades, strict=True)), **cells}


def pair_up(rows, layout="attributes", rating="average", gap=0.0):
    """Return (pairs, [(reason, rows)], ledger) of some records."""
    ledger = Ledger()
    pairs = list(checked_pairs(lambda: iter(rows), layout, rating, "train", gap, ledger))
    ledger.totals()  # asserts that rows read = rows used + rows dropped
    return pairs, [(entry["reason"], entry["rows"]) for entry in ledger.entries], ledger


def test_the_best_answer_to_a_prompt_is_paired_with_the_worst():
    rows = [
        answer("Q", "middle", (2, 2, 2, 2, 2)),
        answer("Q", "best", (4, 4, 4, 0, 2)),
        answer("other", "low", (0, 0, 0, 0, 0)),
        answer("Q", "worst", (0, 1, 1, 1, 1)),
        answer("Q", "as good as the best", (2, 4, 4, 2, 2)),
        answer("other", "high", (1, 0, 0, 0, 0)),
    ]
    pairs, dropped, ledger = pair_up(rows)
    assert [(p["prompt"], p["answers"], p["ratings"], p["rows"]) for p in pairs] == [
        ("Q", ("best", "worst"), (2.8, 0.8), [1, 3]),
        ("other", ("high", "low"), (0.2, 0.0), [5, 2]),
    ]
    assert pairs[0]["attributes"] == ([4, 4, 4, 0, 2], [0, 1, 1, 1, 1])
    assert dropped == [("between_best_and_worst", [0]), ("between_best_and_worst", [4])]
    assert ledger.totals() == {"rows_read": 6, "rows_used": 4, "rows_dropped": 2, "prompts": 2}


@pytest.mark.parametrize(
    "rating, better, worse",
    [
        ("average", 11 / 5, 10 / 5),
        ("no_verbosity", 10 / 4, 6 / 4),
        ("no_verbosity_no_complexity", 9 / 3, 4 / 3),
        ("goodness", 0.65 * 4 + 0.8 * 3 + 0.45 * 2, 0.65 + 0.8 + 0.45 * 2),
        ("helpfulness", 4, 1),
        ("nvidia_70b", 2.6 + 2.4 + 0.9 + 0.55 - 0.4, 0.65 + 0.8 + 0.9 + 1.1 - 1.6),
        ("nvidia_340b", 1.2 + 2.22 + 0.92 + 0.47 - 0.33, 0.3 + 0.74 + 0.92 + 0.94 - 1.32),
    ],
)
def test_ratings_weight_the_five_attributes(rating, better, worse):
    rows = [answer("Q", "b", (1, 1, 2, 2, 4)), answer("Q", "a", (4, 3, 2, 1, 1))]
    ((pair,), _, _) = pair_up(rows, rating=rating)
    assert pair["answers"] == ("a", "b") and pair["ratings"] == pytest.approx((better, worse))


def test_ties_are_exact_and_count_once_per_prompt():
    rows = [answer("Q", "a", (4, 2, 3, 1, 2)), answer("Q", "b", (2, 4, 2, 2, 2)), answer("Q", "c", (4, 4, 4, 0, 0))]
    pairs, dropped, ledger = pair_up(rows)
    assert (pairs, dropped, ledger.counts()) == ([], [("tie", [0, 1, 2])], {"tie": 1})
    assert len(pair_up(rows, rating="helpfulness")[0]) == 1


@pytest.mark.parametrize(
    "cells, reason",
    [
        *(({"response": value}, "empty_answer") for value in ("", " \n\t", None, 7)),
        *(({"prompt": value}, "empty_prompt") for value in ("", None, "<extra_id_1>User\n")),
        ({"prompt": "<extra_id_1>Assistant\nHello"}, "empty_prompt"),
        *(({"helpfulness": value}, "bad_attribute") for value in (5, -1, 2.5, "high", "", None, True, [1], MISSING)),
        *(({"verbosity": value}, "bad_attribute") for value in (float("nan"), float("inf"), 10**400)),
    ],
)
def test_a_bad_row_is_dropped_and_its_partner_is_unpaired(cells, reason):
    bad = {**answer("Q", "b", [4] * 5), **cells}
    bad = {name: value for name, value in bad.items() if value is not MISSING}
    rows = [answer("Q", "a"), bad, answer("Q2", "a"), answer("Q2", "b", [4] * 5)]
    pairs, dropped, ledger = pair_up(rows)
    assert [p["rows"] for p in pairs] == [[3, 2]]
    assert sorted(dropped) == sorted([(reason, [1]), ("unpaired", [0])])
    assert all(entry["split"] == "train" for entry in ledger.entries)


def test_numbers_are_read_from_text_and_from_whole_floats():
    rows = [answer("Q", "a", ("3", 3.0, " 3 ", "3.0", 3)), answer("Q", "b", (4, 4, 4, 4, 4))]
    assert pair_up(rows)[0][0]["attributes"] == ([4] * 5, [3] * 5)
    assert whole_number("2.5") is None and real_number("2.5") == 2.5 and real_number("nan") is None


def test_duplicate_answers_do_not_pair_with_each_other():
    rows = [answer("Q", "a"), answer("Q", "a"), answer("Q2", "a"), answer("Q2", "a"), answer("Q2", "b", [4] * 5)]
    pairs, dropped, ledger = pair_up(rows)
    assert [p["rows"] for p in pairs] == [[4, 2]]
    assert dropped == [("duplicate", [1]), ("unpaired", [0]), ("duplicate", [3])]
    assert ledger.counts() == {"duplicate": 2, "unpaired": 1}


def test_equal_answers_with_other_grades_make_no_pair():
    assert pair_up([answer("Q", "a"), answer("Q", "a", [4] * 5)])[1] == [("equal_answers", [1, 0])]
    other_prompt = pair_up([answer("Q", "a"), answer("q", "b", [4] * 5)])[1]
    assert [reason for reason, _ in other_prompt] == ["unpaired"] * 2, "prompts that differ in one letter"


@pytest.mark.parametrize("gap, kept", [(0.2, 3), (0.4, 2), (0.41, 1), (0.6, 1), (1.0, 0)])
def test_small_gaps_are_compared_in_hundredths(gap, kept):
    """In floats, 4 - 3.6, 2.4 - 2.2, 2.6 - 2 and 100 * 2.4 - 100 * 2.2 are all inexact."""
    sums = [(20, 18), (12, 11), (13, 10)]
    rows = []
    for i, (better, worse) in enumerate(sums):
        for total in (better, worse):
            rows.append(answer(f"Q{i}", f"{total}", [total // 5 + (k < total % 5) for k in range(5)]))
    pairs, dropped, ledger = pair_up(rows, gap=gap)
    assert len(pairs) == kept and ledger.counts() == ({"small_gap": 3 - kept} if kept < 3 else {})
    assert all(len(numbers) == 2 for _, numbers in dropped)


def pair(prompt="Q", chosen="yes", rejected="no", **cells):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **cells}


def test_strings_and_messages_make_the_same_pair():
    forms = [
        pair(),
        pair(prompt=dialogue("Q")),
        pair(chosen=[{"role": "assistant", "content": "yes"}], rejected=[{"role": "assistant", "content": "no"}]),
        pair(chosen=dialogue("Q", "yes"), rejected=dialogue("Q", "no")),
        {"chosen": dialogue("Q", "yes"), "rejected": dialogue("Q", "no")},
        pair(prompt="", chosen=dialogue("Q", "yes"), rejected=dialogue("Q", "no")),
        pair(prompt=dialogue("Q"), chosen=dialogue("Q", "yes"), rejected=dialogue("Q", "no")),
    ]
    for form in forms:
        ((made,), dropped, ledger) = pair_up([form], "pairs")
        assert made["turns"] == dialogue("Q") and made["answers"] == ("yes", "no") and made["prompt"] == "Q", form
        assert made["ratings"] == (None, None) and dropped == [] and ledger.totals()["prompts"] == 1


def test_conversations_keep_all_turns_but_empty_ones():
    turns = dialogue("Q1", "A1", "Q2", system="Be brief.")
    empty = [{"role": "system", "content": ""}, *dialogue("Q1", "A1", "Q2")]
    for prompt, wanted in ((turns, turns), (empty, turns[1:])):
        sides = [[*prompt, {"role": "assistant", "content": text}] for text in ("yes", "no")]
        ((made,), _, _) = pair_up([{"chosen": sides[0], "rejected": sides[1]}], "pairs")
        assert made["turns"] == wanted
        assert made["prompt"] == "user: Q1\n\nassistant: A1\n\nuser: Q2", "a shared system turn would join all prompts"


def test_a_dialogue_in_one_turn_is_split_into_turns():
    """Binarised sets keep the markers of the source in the user's text."""
    prompt = "Q1\n<extra_id_1>Assistant\nA1\n<extra_id_1>User\nQ2"
    for form in (
        pair(prompt=prompt),
        pair(prompt=prompt, chosen=dialogue(prompt, "yes"), rejected=dialogue(prompt, "no")),
        {"chosen": dialogue(prompt, "yes"), "rejected": dialogue(prompt, "no")},
        pair(prompt=dialogue(prompt)),
    ):
        ((made,), _, _) = pair_up([form], "pairs")
        assert made["turns"] == dialogue("Q1", "A1", "Q2")
    sides = [dialogue(prompt, text, system="S") for text in ("yes", "no")]
    ((made,), _, _) = pair_up([pair(prompt=prompt, chosen=sides[0], rejected=sides[1])], "pairs")
    assert made["turns"] == dialogue("Q1", "A1", "Q2", system="S") and made["prompt"] == prompt


@pytest.mark.parametrize(
    "names", ["chosen_rating rejected_rating", "chosen_score rejected_score", "score_chosen score_rejected"]
)
def test_rating_columns_of_other_sources_are_read(names):
    better, worse = names.split()
    rows = [
        pair("1", **{better: 3.6, worse: 2.0}),
        pair("2", **{better: "4", worse: 1}),
        pair("3", **{better: 2.0, worse: 3.6}),
        pair("4", **{better: 3.4, worse: 3.4000000000000004}),
        pair("5", **{better: None, worse: 1}),
        pair("6", **{better: float("nan"), worse: 1}),
        pair("7", **{better: "good", worse: 1}),
        pair("8"),
    ]
    pairs, dropped, ledger = pair_up(rows, "pairs")
    assert [p["ratings"] for p in pairs] == [(3.6, 2.0), (4.0, 1.0)]
    assert dropped == [("chosen_rated_lower", [2]), ("tie", [3]), *[("bad_rating", [i]) for i in (4, 5, 6, 7)]]
    assert pair_up(rows[:2], "pairs", gap=2.0)[1] == [("small_gap", [0])]
    rows = [pair(str(i), chosen_rating=None, rejected_rating=None) for i in range(3)]
    assert [p["ratings"] for p in pair_up(rows, "pairs")[0]] == [(None, None)] * 3, "a column of nulls"


@pytest.mark.parametrize(
    "record, reason",
    [
        *((pair(chosen=text), "empty_answer") for text in ("", " \n", None, [])),
        *((pair(rejected=dialogue(*texts)), "empty_answer") for texts in (("Q", " "), ("Q",))),
        (pair(chosen=dialogue("", " ")[1:]), "empty_answer"),
        *((pair(chosen=turns), "bad_messages") for turns in ([{"from": "gpt", "value": "yes"}], ["yes"])),
        (pair(chosen=[{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]), "bad_messages"),
        (pair(prompt=" "), "empty_prompt"),
        (pair(prompt=None), "empty_prompt"),
        (pair(prompt=dialogue("Q", "A")), "empty_prompt"),
        (pair(prompt=[{"role": "system", "content": "S"}]), "empty_prompt"),
        (pair(chosen=dialogue("Q1", "yes"), rejected=dialogue("Q2", "no")), "prompts_differ"),
        (pair(chosen="same", rejected="same"), "equal_answers"),
        (pair(chosen="half an emoji \ud83d"), "broken_text"),
        (pair(prompt="half an emoji \ud83d"), "broken_text"),
    ],
)
def test_a_bad_pair_is_dropped_with_its_reason(record, reason, tmp_path):
    pairs, dropped, ledger = pair_up([pair("good"), record, pair("good too")], "pairs")
    assert [p["rows"] for p in pairs] == [[0], [2]] and dropped == [(reason, [1])]
    ledger.write(tmp_path / "dropped.jsonl")
    assert json.loads((tmp_path / "dropped.jsonl").read_text(encoding="utf-8"))["reason"] == reason


def test_a_repeated_pair_is_a_duplicate_unless_the_system_turn_differs():
    rows = [pair(), pair(), pair(chosen="no", rejected="yes"), pair(chosen="yes!")]
    pairs, dropped, _ = pair_up(rows, "pairs")
    assert [p["rows"] for p in pairs] == [[0], [2], [3]] and dropped == [("duplicate", [1])]
    rows = [pair(chosen=dialogue("Q", "yes", system=s), rejected=dialogue("Q", "no", system=s)) for s in ("S1", "S2")]
    assert len(pair_up(rows, "pairs")[0]) == 2


def strength(value, first="a", second="b", **cells):
    return {"prompt": "Q", "response_1": first, "response_2": second, "preference_strength": value, **cells}


@pytest.mark.parametrize("value, answers", [(3, ("b", "a")), (1, ("b", "a")), (-2, ("a", "b")), ("-1", ("a", "b"))])
def test_a_positive_strength_prefers_the_second_answer(value, answers):
    helpsteer3 = {"context": dialogue("Q"), "response1": "a", "response2": "b", "overall_preference": value}
    for record in (strength(value), helpsteer3):
        ((made,), _, _) = pair_up([record], "strength")
        assert made["answers"] == answers and made["ratings"] == (abs(int(value)), 0.0)
        assert made["turns"] == dialogue("Q") and made["prompt"] == "Q"


def test_bad_strengths_are_dropped_with_their_reasons():
    rows = [strength(0), strength(4), strength(None), strength(1.5), strength(2, second=" "), strength(2, first="b")]
    rows += [strength(1, prompt=""), strength(1, prompt=dialogue("Q", "A")), strength(-1)]
    pairs, dropped, _ = pair_up(rows, "strength")
    assert [p["rows"] for p in pairs] == [[8]]
    reasons = ["tie", "bad_rating", "bad_rating", "bad_rating", "empty_answer", "equal_answers"] + ["empty_prompt"] * 2
    assert dropped == [(reason, [i]) for i, reason in enumerate(reasons)]
