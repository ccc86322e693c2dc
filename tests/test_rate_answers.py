"""Rating by a person: blind items, the terminal, what is read back, and statistics that agree with a calculation."""

import builtins
import io
import json

import numpy as np
import pytest

from extras import rate_answers
from tests.conftest import run_script
from utils import agreement, items, ratings, sampling, terminal
from utils.labels import LABELS
from utils.pairing import checked_pairs
from utils.rewards import RewardModel
from utils.rows import Ledger
from utils.sources import open_source

EVIL = "</script><img src=x onerror=alert(1)>&\u2028\x1b[2J\x00\u202etxet"
TOPICS = ("rain", "bread", "a lost key", "the tram", "two cats", "an old map")


@pytest.fixture
def folder(tmp_path):
    """A folder with six pairs to rate; `after` has 'new' in it, and a higher reward on four of six prompts."""
    lines = [
        {"prompt": f"Write about {topic}.", "before": f"old {topic}", "after": f"new {topic}, longer"}
        | {"reward_before": 0.5, "reward_after": float(i > 1), "human": f"a person on {topic}"}
        for i, topic in enumerate(TOPICS)
    ]
    return made(tmp_path, lines)


def made(tmp_path, lines, **options):
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run_script(rate_answers, SAMPLES=samples, OUTPUT_DIR=tmp_path / "out", **options)
    return tmp_path / "out"


def preferring(item, name):
    return "ab"[item["conditions"].index(name)]


def rated(folder, rater, grade, names=None):
    """A page's download in which `rater` prefers names[i] on item i, and gives all criteria grade(condition)."""
    asked, entries = items.read_items(folder), []
    for i, item in enumerate(asked):
        grades = [dict.fromkeys(ratings.CRITERIA, grade(name)) for name in item["conditions"]]
        entry = {"item": item["id"], "rater": rater, "grades": grades, "at": "2026-03-01T10:00:00.000Z"}
        wanted = names[i] if names else None
        entries.append(entry | {"preference": preferring(item, wanted) if wanted in item["conditions"] else wanted})
    content = {"kind": ratings.PAGE_KIND, "file": items.fingerprint(asked), "rater": rater, "ratings": entries}
    path = folder.parent / f"ratings-{rater}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def island(folder):
    """The data that the page has in it."""
    page = (folder / "rate.html").read_text(encoding="utf-8")
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def read_back(folder, *files, **options):
    run_script(rate_answers, IMPORT=",".join(map(str, files)), OUTPUT_DIR=folder, **options)
    return json.loads((folder / "ratings.json").read_text(encoding="utf-8"))


# items


def test_items_are_blind_in_random_order_and_the_same_at_another_start(folder):
    asked = items.read_items(folder)
    assert len(asked) == 6 and {tuple(item["conditions"]) for item in asked} == {
        ("before", "after"),
        ("after", "before"),
    }
    assert [item["prompt"] for item in asked] != [f"Write about {topic}." for topic in TOPICS]
    for item in asked:
        words = {"before": "old", "after": "new"}
        assert [answer[:3] for answer in item["answers"]] == [words[name] for name in item["conditions"]]
        assert [reward is not None for reward in item["rewards"]] == [True, True] and item["human"]
    seen = island(folder)
    assert [set(item) for item in seen["items"]] == [{"id", "human", "turns", "answers"}] * 6, "nothing to tell them by"
    assert seen["words"] == LABELS["en"] and seen["file"] == items.fingerprint(asked)
    before = (folder / "items.jsonl").read_bytes()
    run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder, LABELS="ru")
    assert (folder / "items.jsonl").read_bytes() == before and island(folder)["words"] == LABELS["ru"]


def test_other_items_move_the_old_ones_and_their_ratings_aside(folder, capsys):
    (folder / "ratings.jsonl").write_text("", encoding="utf-8")
    run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder, SEED=7)
    (aside,) = folder.parent.glob("out-*")
    assert (aside / "ratings.jsonl").exists() and not (folder / "ratings.jsonl").exists()
    assert "moved aside" in capsys.readouterr().out
    assert items.fingerprint(items.read_items(aside)) != items.fingerprint(items.read_items(folder))
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit, match="holds files but no items of this script"):
        run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder.parent / "mine")


def test_single_answers_and_the_human_as_one_of_them(folder):
    options = {"SAMPLES": folder.parent / "samples.jsonl", "LAYOUT": "single", "HUMAN": "rate"}
    run_script(rate_answers, **options, OUTPUT_DIR=folder.parent / "single")
    asked = items.read_items(folder.parent / "single")
    assert sorted(item["conditions"][0] for item in asked) == sorted(["before", "after", "human"] * 6)
    assert not any(item["human"] for item in asked) and all(len(item["answers"]) == 1 for item in asked)
    grades = {"before": 2, "after": 3, "human": 5}
    found = read_back(folder.parent / "single", rated(folder.parent / "single", "Ann", grades.get))
    assert found["means"]["human"]["clarity"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "prompts": 6}
    wins = {(e["second"], e["first"]): (e["win_rate"], e["prompts"]) for e in found["win_rates"]}
    assert wins == {("after", "before"): (1, 6), ("human", "before"): (1, 6), ("human", "after"): (1, 6)}


def test_bad_samples_end_in_one_line(tmp_path):
    for lines, said in (
        ([{"prompt": "x", "text": "y"}], "has no answers"),
        ([], "has no answers"),
        ([{"prompt": "x", "after": "y"}, {"prompt": "x", "after": 3}], "entry 2 has no text under 'after'"),
    ):
        with pytest.raises(SystemExit, match=said) as end:
            made(tmp_path, lines)
        assert "\n" not in end.value.code and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="needs two conditions and there is one"):
        made(tmp_path, [{"prompt": "x", "after": "y"}], LAYOUT="pairs")
    with pytest.raises(SystemExit, match="MODE = 'paper' is not known"):
        run_script(rate_answers, MODE="paper")


def test_a_policy_answers_on_the_spot_with_and_without_a_persona(model_folder, sample_folder, tmp_path, monkeypatch):
    asked_of_it, real = [], sampling.generate

    def generate(model, tokenizer, ids, *rest, **options):
        asked_of_it.append([tokenizer.decode(prompt) for prompt in ids])
        return real(model, tokenizer, ids, *rest, **options)

    monkeypatch.setattr(sampling, "generate", generate)
    options = {"POLICY": model_folder, "DATA_DIR": sample_folder, "PROMPTS": 3, "MAX_LENGTH": 128, "DEVICE": "cpu"}
    options |= {"MAX_NEW_TOKENS": 6, "PRECISION": "fp32", "OUTPUT_DIR": tmp_path / "out"}
    run_script(rate_answers, **options, SYSTEM_PROMPT="You are a pirate.")
    assert [["You are a pirate." in prompt for prompt in prompts] for prompts in asked_of_it] == [
        [False] * 3,
        [True] * 3,
    ]
    asked = items.read_items(tmp_path / "out")
    assert len(asked) == 3 and all(item["human"] and item["turns"][-1]["role"] == "user" for item in asked)
    assert {name for item in asked for name in item["conditions"]} == {model_folder, f"{model_folder} with persona"}
    assert "pirate" not in (tmp_path / "out" / "rate.html").read_text(encoding="utf-8"), "blind"
    run_script(rate_answers, **options, SYSTEM_PROMPT="You are a pirate.")
    assert len(asked_of_it) == 2, "another start goes on with the answers that are there"
    with pytest.raises(SystemExit, match="POLICY_AGAINST is POLICY itself"):
        run_script(rate_answers, **options | {"OUTPUT_DIR": tmp_path / "x"}, POLICY_AGAINST=model_folder)
    with pytest.raises(SystemExit, match="has a context of 512"):
        run_script(rate_answers, **options | {"OUTPUT_DIR": tmp_path / "x", "MAX_LENGTH": 600})
    assert not (tmp_path / "x").exists()


def test_what_steers_a_terminal_is_spelled_out():
    assert items.shown("a\tb\r\nc\x1b[2J\x00\x9b\u202e") == "a\tb\nc[U+001B][2J[U+0000][U+009B][U+202E]"
    assert items.clean("half \ud800") == "half ?"


# the terminal


def typing(monkeypatch, *given):
    """Let input() return these one after the other; an exception among them is raised."""
    rest = iter(given)

    def answer(prompt=""):
        value = next(rest, EOFError)
        if value in (EOFError, KeyboardInterrupt):
            raise value
        return value

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True))


def in_terminal(folder, **options):
    run_script(
        rate_answers,
        SAMPLES=folder.parent / "samples.jsonl",
        OUTPUT_DIR=folder,
        MODE="terminal",
        RATER="Ann",
        **options,
    )


def test_terminal_asks_wrong_input_again_and_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    first, second = items.read_items(folder)[:2]
    typing(monkeypatch, "5", "6", "five", "", "4", "3", KeyboardInterrupt)
    with pytest.raises(SystemExit) as end:
        in_terminal(folder)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    kept = ratings.read_own(folder / "ratings.jsonl", {first["id"]: first})
    assert [rating["grades"] for rating in kept] == [[{"relevance": 5, "clarity": 4, "completeness": 3}, {}]]
    typing(monkeypatch, "2", "1", *"11111", "x", "7", "=", "3", "u", "4", "q")  # u: the 3 becomes a 4
    in_terminal(folder, LABELS="ru")
    own = {item["id"]: item for item in (first, second)}
    done, begun = ratings.read_own(folder / "ratings.jsonl", own)
    assert done["grades"][0] == dict(zip(ratings.CRITERIA, (5, 4, 3, 2, 1), strict=True))
    assert done["preference"] == "tie" and ratings.is_complete(done)
    assert begun["item"] == second["id"] and begun["grades"] == [{"relevance": 4}, {}]
    found = json.loads((folder / "ratings.json").read_text())
    assert (found["items_rated"], found["incomplete"], found["raters"]) == (2, 1, ["Ann"])
    typing(monkeypatch, *["3"] * 9, "a", *[*["3"] * 10, "b"] * 4)
    in_terminal(folder)
    assert json.loads((folder / "ratings.json").read_text())["incomplete"] == 0
    typing(monkeypatch)
    in_terminal(folder)  # nothing is left to be asked


def test_terminal_shows_evil_answers_harmlessly():
    turns = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]
    text = terminal.item_text({"turns": turns, "human": "", "answers": [EVIL, " "]}, LABELS["ru"])
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text and "[U+001B][2J" in text
    assert text.count("<img src=x") == 2 and "Ответ B" in text and "(пустой ответ)" in text


def test_both_languages_have_the_same_words():
    assert LABELS["en"].keys() == LABELS["ru"].keys()
    assert all(word.strip() for words in LABELS.values() for word in words.values())
    assert {*ratings.CRITERIA, *(f"about_{name}" for name in ratings.CRITERIA)} <= LABELS["en"].keys()


def test_a_line_that_a_kill_has_cut_is_left_out(folder, capsys):
    first, second = items.read_items(folder)[:2]
    path = folder / "ratings.jsonl"
    ratings.append(path, ratings.new_rating(first, "Ann", "f") | {"at": "1"})
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"item": "' + second["id"].encode())
    own = {first["id"]: first}
    assert [rating["item"] for rating in ratings.read_own(path, own)] == [first["id"]]
    assert path.read_bytes() == whole and "was cut off" in capsys.readouterr().out


# what is read back


def test_import_says_who_wins_and_whether_the_reward_model_agrees(folder, capsys):
    names = ["after", "after", "after", "after", "before", "tie"]
    found = read_back(folder, rated(folder, "Ann", {"before": 2, "after": 4}.get, names))
    (entry,) = found["win_rates"]
    assert (entry["first"], entry["second"], entry["prompts"]) == ("before", "after", 6)
    assert entry["win_rate"] == pytest.approx(4.5 / 6) and entry["low"] < 4.5 / 6 < entry["high"]
    assert entry["p_value"] == pytest.approx(12 / 32)  # 5 signs: 5 or more of +-4, and of +-5, on both sides
    assert found["means"]["after"]["style"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "prompts": 6}
    agree = 0.0
    for item, name in zip(items.read_items(folder), names, strict=True):
        model = item["conditions"][int(np.argmax(item["rewards"]))]
        agree += 0.5 if name == "tie" else float(name == model)
    assert found["reward_model"]["accuracy"] == pytest.approx(agree / 6)
    assert found["reward_model"]["length"] == pytest.approx(4.5 / 6), "after is always longer"
    out = capsys.readouterr().out
    assert "after is preferred to before on 0.75 of 6 prompts" in out and "6 new ratings" in out


def test_a_reward_model_is_compared_with_the_person(folder, tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    judge = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=2)
    )
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    names = ["after"] * 4 + ["before"] * 2
    path = rated(folder, "Ann", lambda name: 3, names)
    found = read_back(folder, path, REWARD_MODEL=tmp_path / "judge", DEVICE="cpu")
    model, agree = RewardModel.load(str(tmp_path / "judge"), "cpu"), 0
    for item, name in zip(items.read_items(folder), names, strict=True):
        sides = dict(zip(item["conditions"], item["answers"], strict=True))
        said = [[*item["turns"], {"role": "assistant", "content": sides[side]}] for side in ("before", "after")]
        before, after = model.score(said).tolist()
        agree += (after > before) == (name == "after")
    assert 0 < agree < 6 and found["reward_model"]["accuracy"] == pytest.approx(agree / 6)


def test_importing_again_changes_nothing_and_a_later_rating_counts(folder, capsys):
    path = rated(folder, "Ann", lambda name: 3, ["tie"] * 6)
    first = read_back(folder, path)
    before = (folder / "ratings.jsonl").read_bytes()
    assert read_back(folder, path) == first and (folder / "ratings.jsonl").read_bytes() == before
    assert "0 new ratings, 0 in place of earlier ones, 6 known" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["ratings"][0] |= {"at": "2026-03-02T10:00:00.000Z", "preference": "a"}
    content["ratings"][1] |= {"at": "2026-02-01T10:00:00.000Z", "preference": "a"}  # an older file
    path.write_text(json.dumps(content))
    read_back(folder, path)
    assert "0 new ratings, 1 in place of earlier ones, 5 known" in capsys.readouterr().out
    kept = [json.loads(line)["preference"] for line in (folder / "ratings.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["a", *["tie"] * 5]


def test_two_raters_and_the_terminal_file_of_another_machine(folder, tmp_path):
    ann = rated(folder, "Ann", {"before": 2, "after": 4}.get, ["after"] * 6)
    ben = rated(folder, "Ben", {"before": 3, "after": 4}.get, ["after"] * 3 + ["before"] * 3)
    file = items.fingerprint(items.read_items(folder))
    moved = tmp_path / "terminal.jsonl"
    items.write_lines(moved, [entry | {"file": file} for entry in json.loads(ben.read_text())["ratings"]])
    found = read_back(folder, ann, moved)
    (entry,) = found["agreement"]
    assert entry["raters"] == ["Ann", "Ben"] and (entry["items"], entry["equal_preferences"]) == (6, 0.5)
    assert entry["kappa"] == pytest.approx(1 - 0.5 / 1.5)  # differences 1, 0; all pairs 1, 4, 1, 0
    assert found["win_rates"][0]["win_rate"] == pytest.approx(0.75), "of each prompt the mean of its raters"


def test_ratings_of_other_items_and_broken_files_are_refused_whole(folder, tmp_path):
    good = rated(folder, "Ann", lambda name: 3, ["tie"] * 6)
    content = json.loads(good.read_text())
    bad = tmp_path / "bad.json"

    def refused(change, said, text=None):
        bad.write_text(text or json.dumps(content | change))
        with pytest.raises(SystemExit, match=said) as end:
            read_back(folder, good, bad)
        assert "\n" not in end.value.code and not (folder / "ratings.jsonl").exists()

    def with_entry(**change):
        return {"ratings": [content["ratings"][0] | change, *content["ratings"][1:]]}

    refused({"file": "0" * 16}, "ratings of other items")
    refused({"kind": "cake"}, "is not what a rating page lets you download")
    refused({}, "is not the JSON", "<html>")
    refused(with_entry(item="nothing"), "'nothing' is not among the items")
    refused(with_entry(grades=[{}]), "another number of answers")
    refused(with_entry(grades=[{"relevance": 6}, {}]), "not 1 to 5")
    refused(with_entry(grades=[{"relevance": True}, {}]), "not 1 to 5")
    refused(with_entry(grades=[{"beauty": 1}, {}]), "unknown criteria")
    refused(with_entry(preference=["a"]), "the preference")
    refused(with_entry(rater=None), "no rater")
    with pytest.raises(SystemExit, match="nothing.json' is not there"):
        read_back(folder, tmp_path / "nothing.json")
    with pytest.raises(SystemExit, match="has no ratings yet"):
        run_script(rate_answers, TO_ROWS=tmp_path / "x.jsonl", OUTPUT_DIR=folder)


def test_rows_of_the_ratings_load_as_pairs(folder, tmp_path, capsys):
    names = ["after", "before", "after", "after", "tie", "after"]
    path = tmp_path / "rows.jsonl"
    read_back(folder, rated(folder, "Ann", {"before": 2, "after": 4}.get, names), TO_ROWS=path)
    assert "4 preference rows; left out: 1 tie, 1 grades_disagree" in capsys.readouterr().out
    source, ledger = open_source(str(path), "average"), Ledger()
    assert source.layouts == {"train": "pairs"}
    pairs = list(checked_pairs(source.splits["train"], "pairs", "average", "train", 0.0, ledger))
    assert len(pairs) == 4 and not ledger.entries
    for pair in pairs:
        assert pair["answers"][0].startswith("new") and pair["ratings"] == (4.0, 2.0)
        assert pair["turns"] == [{"role": "user", "content": pair["prompt"]}]


# statistics


def test_kappa_equals_a_calculation_by_hand_and_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    assert agreement.quadratic_kappa(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(1 - 0.5 / 1.5)
    random = np.random.default_rng(0)
    one = random.integers(1, 6, 200)
    other = np.clip(one + random.integers(-1, 2, 200), 1, 5)
    expected = cohen_kappa_score(one, other, weights="quadratic")
    assert agreement.quadratic_kappa(one.astype(float), other.astype(float)) == pytest.approx(expected)
    assert agreement.quadratic_kappa(np.full(3, 2.0), np.full(3, 2.0)) is None


def test_preferences_without_grades_count_and_make_rows():
    item = {"id": "1", "prompt": "x", "turns": [{"role": "user", "content": "x"}], "answers": ["p", "q"]}
    item |= {"conditions": ["after", "before"], "rewards": [None, None]}
    given = [ratings.new_rating(item, name, "f") | {"preference": side} for name, side in (("A", "a"), ("B", "b"))]
    given.append(ratings.new_rating(item, "C", "f") | {"preference": "a"})
    duels = agreement.over_raters(agreement.duels_of({"1": item}, given, ["before", "after"]))
    assert [duel["outcome"] for duel in duels] == [pytest.approx(2 / 3)] and duels[0]["answers"] == ("q", "p")
    rows, left_out = ratings.preference_rows(duels)
    assert rows[0]["chosen"] == "p" and rows[0]["chosen_rating"] == pytest.approx(2 / 3) and left_out == {}
    assert agreement.reward_agreement(duels) == {}
