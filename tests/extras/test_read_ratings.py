"""Ratings are imported or refused as a whole, become preference rows, and their statistics are right."""

import json

import numpy as np
import pytest

from extras.lib import agreement, ratings
from tests.extras.rating_toys import rated, read_back, six_pairs
from utils.data.preferences import Ledger, checked_pairs
from utils.data.sources import open_source
from utils.models.reward_model import RewardModel
from utils.runs import write_lines


@pytest.fixture
def folder(tmp_path):
    return six_pairs(tmp_path)


def test_imported_ratings_show_the_winner_and_the_agreement_of_the_reward_model(folder, capsys):
    names = ["after", "after", "after", "after", "before", "tie"]
    result = read_back(folder, rated(folder, "Ann", {"before": 2, "after": 4}.get, names))
    (entry,) = result["win_rates"]
    assert (entry["first"], entry["second"], entry["prompts"]) == ("before", "after", 6)
    assert entry["win_rate"] == pytest.approx(4.5 / 6) and entry["low"] < 4.5 / 6 < entry["high"]
    assert entry["p_value"] == pytest.approx(12 / 32)  # both tails of 5 signs: 4 or 5 equal
    assert result["means"]["after"]["style"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "prompts": 6}
    agree = 0.0
    for item, name in zip(ratings.read_items(folder), names, strict=True):
        model = item["conditions"][int(np.argmax(item["rewards"]))]
        agree += 0.5 if name == "tie" else float(name == model)
    assert result["reward_model"]["accuracy"] == pytest.approx(agree / 6)
    assert result["reward_model"]["length"] == pytest.approx(4.5 / 6), "after is always longer"
    out = capsys.readouterr().out
    assert "after is preferred to before on 0.75 of 6 prompts" in out and "6 new ratings" in out


def test_a_reward_model_is_compared_with_the_raters(folder, tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=2)
    judge = LlamaForSequenceClassification(config)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    names = ["after"] * 4 + ["before"] * 2
    path = rated(folder, "Ann", lambda name: 3, names)
    result = read_back(folder, path, REWARD_MODEL=tmp_path / "judge", DEVICE="cpu")
    model, agree = RewardModel.load(str(tmp_path / "judge"), "cpu"), 0
    for item, name in zip(ratings.read_items(folder), names, strict=True):
        sides = dict(zip(item["conditions"], item["answers"], strict=True))
        talks = [[*item["turns"], {"role": "assistant", "content": sides[side]}] for side in ("before", "after")]
        before, after = model.score(talks).tolist()
        agree += (after > before) == (name == "after")
    assert 0 < agree < 6 and result["reward_model"]["accuracy"] == pytest.approx(agree / 6)


def test_a_second_import_changes_nothing_and_later_ratings_count(folder, capsys):
    path = rated(folder, "Ann", lambda name: 3, ["tie"] * 6)
    first = read_back(folder, path)
    before = (folder / "ratings.jsonl").read_bytes()
    assert read_back(folder, path) == first and (folder / "ratings.jsonl").read_bytes() == before
    assert "0 new ratings, 0 replace earlier ones, 6 known" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["ratings"][0] |= {"at": "2026-03-02T10:00:00.000Z", "preference": "a"}
    content["ratings"][1] |= {"at": "2026-02-01T10:00:00.000Z", "preference": "a"}  # an older file
    path.write_text(json.dumps(content))
    read_back(folder, path)
    assert "0 new ratings, 1 replace earlier ones, 5 known" in capsys.readouterr().out
    kept = [json.loads(line)["preference"] for line in (folder / "ratings.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["a", *["tie"] * 5]


def test_the_agreement_of_two_raters_is_measured(folder, tmp_path):
    ann = rated(folder, "Ann", {"before": 2, "after": 4}.get, ["after"] * 6)
    ben = rated(folder, "Ben", {"before": 3, "after": 4}.get, ["after"] * 3 + ["before"] * 3)
    file = ratings.fingerprint(ratings.read_items(folder))
    moved = tmp_path / "moved.jsonl"
    write_lines(moved, [entry | {"file": file} for entry in json.loads(ben.read_text())["ratings"]])
    result = read_back(folder, ann, moved)
    (entry,) = result["agreement"]
    assert entry["raters"] == ["Ann", "Ben"] and (entry["items"], entry["equal_preferences"]) == (6, 0.5)
    assert entry["kappa"] == pytest.approx(1 - 0.5 / 1.5)  # differences 1, 0; all pairs 1, 4, 1, 0
    assert result["win_rates"][0]["win_rate"] == pytest.approx(0.75), "the mean over raters of each prompt"


def test_wrong_and_broken_files_are_refused_as_a_whole(folder, tmp_path):
    good = rated(folder, "Ann", lambda name: 3, ["tie"] * 6)
    content = json.loads(good.read_text())
    bad = tmp_path / "bad.json"

    def refused(change, message, text=None):
        bad.write_text(text or json.dumps(content | change))
        with pytest.raises(SystemExit, match=message) as end:
            read_back(folder, good, bad)
        assert "\n" not in end.value.code and not (folder / "ratings.jsonl").exists()

    def with_entry(**change):
        return {"ratings": [content["ratings"][0] | change, *content["ratings"][1:]]}

    refused({"file": "0" * 16}, "ratings of other items")
    refused({"kind": "cake"}, "is not a download of a rating page")
    refused({"ratings": None}, "is not a download of a rating page")
    refused({}, "is not a download of a rating page", "<html>")
    unfit = [{"item": "nothing"}, {"grades": [{}]}, {"preference": ["a"]}, {"rater": None}]
    unfit += [{"grades": [given, {}]} for given in ({"relevance": 6}, {"relevance": True}, {"beauty": 1})]
    for change in unfit:
        refused(with_entry(**change), "bad.json: rating 1 does not fit the items of OUTPUT_DIR")
    with pytest.raises(SystemExit, match="nothing.json' does not exist"):
        read_back(folder, tmp_path / "nothing.json")
    bad.write_text(json.dumps(content | {"ratings": []}))
    with pytest.raises(SystemExit, match="has no ratings yet"):
        read_back(folder, bad)


def test_ratings_become_rows_of_pairs(folder, capsys):
    names = ["after", "before", "after", "after", "tie", "after"]
    path = folder / "preferences.jsonl"
    read_back(folder, rated(folder, "Ann", {"before": 2, "after": 4}.get, names))
    assert "4 preference rows; left out: 1 tie, 1 grades_disagree" in capsys.readouterr().out
    source, ledger = open_source(str(path), "average"), Ledger()
    assert source.layouts == {"train": "pairs"}
    pairs = list(checked_pairs(source.splits["train"], "pairs", "average", "train", 0.0, ledger))
    assert len(pairs) == 4 and not ledger.entries
    for pair in pairs:
        assert pair["answers"][0].startswith("new") and pair["ratings"] == (4.0, 2.0)
        assert pair["turns"] == [{"role": "user", "content": pair["prompt"]}]


def test_preferences_between_equal_grades_become_rows(folder, capsys):
    path = folder / "preferences.jsonl"
    names = ["after", "before", "after", "after", "tie", "after"]
    read_back(folder, rated(folder, "Ann", lambda name: 3, names))
    assert "5 preference rows; left out: 1 tie" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["chosen_rating"], row["rejected_rating"]) for row in rows] == [(1.0, 0.0)] * 5, "shares of raters"


def test_kappa_equals_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    assert agreement.quadratic_kappa(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(1 - 0.5 / 1.5)
    random = np.random.default_rng(0)
    one = random.integers(1, 6, 200)
    other = np.clip(one + random.integers(-1, 2, 200), 1, 5)
    expected = cohen_kappa_score(one, other, weights="quadratic")
    assert agreement.quadratic_kappa(one.astype(float), other.astype(float)) == pytest.approx(expected)
    assert agreement.quadratic_kappa(np.full(3, 2.0), np.full(3, 2.0)) is None
