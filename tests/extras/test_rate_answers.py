"""extras/rate_answers.py makes blind items in random order, from samples or from policies."""

import json

import pytest

from extras import rate_answers
from extras.lib import ratings
from extras.lib.labels import LABELS
from tests.conftest import run_script
from tests.extras.rating_toys import TOPICS, made, rated, read_back, six_pairs
from utils.models import generation


@pytest.fixture
def folder(tmp_path):
    return six_pairs(tmp_path)


def island(folder):
    """Return the data in the page."""
    page = (folder / "rate.html").read_text(encoding="utf-8")
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_items_are_blind_and_in_a_fixed_random_order(folder):
    items = ratings.read_items(folder)
    orders = {tuple(item["conditions"]) for item in items}
    assert len(items) == 6 and orders == {("before", "after"), ("after", "before")}
    assert [item["prompt"] for item in items] != [f"Write about {topic}." for topic in TOPICS]
    for item in items:
        words = {"before": "old", "after": "new"}
        assert [answer[:3] for answer in item["answers"]] == [words[name] for name in item["conditions"]]
        assert [reward is not None for reward in item["rewards"]] == [True, True] and item["human"]
    seen = island(folder)
    assert [set(item) for item in seen["items"]] == [{"id", "human", "turns", "answers"}] * 6, "no conditions"
    assert seen["words"] == LABELS["en"] and seen["file"] == ratings.fingerprint(items)
    before = (folder / "items.jsonl").read_bytes()
    run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder, LABELS="ru")
    assert (folder / "items.jsonl").read_bytes() == before and island(folder)["words"] == LABELS["ru"]


def test_old_items_and_their_ratings_are_moved_aside(folder, capsys):
    (folder / "ratings.jsonl").write_text("", encoding="utf-8")
    run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder, SEED=7)
    (aside,) = folder.parent.glob("out-*")
    assert (aside / "ratings.jsonl").exists() and not (folder / "ratings.jsonl").exists()
    assert "moved aside" in capsys.readouterr().out
    assert ratings.fingerprint(ratings.read_items(aside)) != ratings.fingerprint(ratings.read_items(folder))
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit, match="contains files that this script did not write"):
        run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", OUTPUT_DIR=folder.parent / "mine")


def test_single_answers_to_a_prompt_are_compared_by_their_grades(folder):
    single = folder.parent / "single"
    run_script(rate_answers, SAMPLES=folder.parent / "samples.jsonl", LAYOUT="single", OUTPUT_DIR=single)
    items = ratings.read_items(single)
    assert sorted(item["conditions"][0] for item in items) == sorted(["before", "after"] * 6)
    assert all(item["human"] and len(item["answers"]) == 1 for item in items)
    result = read_back(single, rated(single, "Ann", {"before": 2, "after": 3}.get))
    assert result["means"]["after"]["clarity"] == {"mean": 3.0, "low": 3.0, "high": 3.0, "prompts": 6}
    (rate,) = result["win_rates"]
    assert (rate["first"], rate["second"], rate["win_rate"], rate["prompts"]) == ("before", "after", 1, 6)


def test_policies_and_the_system_prompt_are_compared_in_pairs(monkeypatch):
    monkeypatch.setattr(rate_answers, "POLICIES", ("one", "two"))
    monkeypatch.setattr(rate_answers, "SYSTEM_PROMPT", "A pirate.")
    conditions = rate_answers.conditions()
    assert conditions == {"one": ("one", ""), "two": ("two", ""), "two with persona": ("two", "A pirate.")}
    prompt = {"prompt": "Hi", "turns": [], "answers": {name: name for name in conditions}, "human": "", "rewards": {}}
    items = ratings.make_items([prompt], list(conditions), "pairs", 42)
    pairs = [["one", "two"], ["one", "two with persona"], ["two", "two with persona"]]
    assert sorted(sorted(item["conditions"]) for item in items) == pairs


def test_bad_samples_are_reported(tmp_path):
    for lines, message in (
        ([{"prompt": "x", "text": "y"}], "has no answers"),
        ([], "has no answers"),
        ([{"prompt": "x", "after": "y"}, {"prompt": "x", "after": 3}], "entry 2 has no text under 'after'"),
    ):
        with pytest.raises(SystemExit, match=message) as end:
            made(tmp_path, lines)
        assert "\n" not in end.value.code and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="needs two conditions, this is one"):
        made(tmp_path, [{"prompt": "x", "after": "y"}], LAYOUT="pairs")
    with pytest.raises(SystemExit, match="LABELS = 'de' is not known"):
        run_script(rate_answers, LABELS="de")


def test_a_policy_answers_with_and_without_a_system_prompt(model_folder, sample_folder, tmp_path, monkeypatch):
    prompts_seen, real = [], generation.generate

    def generate(model, tokenizer, prompts, *rest, **options):
        prompts_seen.append([tokenizer.decode(prompt.ids) for prompt in prompts])
        return real(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(generation, "generate", generate)
    options = {"POLICIES": model_folder, "DATA_DIR": sample_folder, "PROMPTS": 3, "MAX_LENGTH": 128, "DEVICE": "cpu"}
    options |= {"MAX_NEW_TOKENS": 6, "PRECISION": "fp32", "OUTPUT_DIR": tmp_path / "out"}
    run_script(rate_answers, **options, SYSTEM_PROMPT="You are a pirate.")
    assert [["You are a pirate." in prompt for prompt in prompts] for prompts in prompts_seen] == [
        [False] * 3,
        [True] * 3,
    ]
    asked = ratings.read_items(tmp_path / "out")
    assert len(asked) == 3 and all(item["human"] and item["turns"][-1]["role"] == "user" for item in asked)
    assert {name for item in asked for name in item["conditions"]} == {model_folder, f"{model_folder} with persona"}
    assert "pirate" not in (tmp_path / "out" / "rate.html").read_text(encoding="utf-8"), "blind"
    run_script(rate_answers, **options, SYSTEM_PROMPT="You are a pirate.")
    assert len(prompts_seen) == 2, "another start goes on with the answers that are there"
    with pytest.raises(SystemExit, match="has a context of 512"):
        run_script(rate_answers, **options | {"OUTPUT_DIR": tmp_path / "x", "MAX_LENGTH": 600})
    assert not (tmp_path / "x").exists()


def test_control_characters_are_made_visible():
    assert ratings.visible("a\tb\r\nc\x1b[2J\x00\x9b\u202e") == "a\tb\nc[U+001B][2J[U+0000][U+009B][U+202E]"
    assert ratings.replace_surrogates("half \ud800") == "half ?"


def test_both_languages_have_the_same_labels():
    assert LABELS["en"].keys() == LABELS["ru"].keys()
    assert all(word.strip() for words in LABELS.values() for word in words.values())
    assert {*ratings.CRITERIA, *(f"about_{name}" for name in ratings.CRITERIA)} <= LABELS["en"].keys()
