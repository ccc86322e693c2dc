"""Reward models: scores equal plain transformers, new heads, the warm start, saved folders that are refused."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from utils.data.processed import closed_answers, load_pairs, ratings_of
from utils.data.tokens import render
from utils.models.reward_model import (
    HEADS,
    RewardHead,
    RewardModel,
    RewardPairs,
    check_better_than_chance,
    new_reward_head,
    start_model,
)
from utils.models.shared_prompt import PairCollator
from utils.runs import read_json as read
from utils.runs import read_lines, write_json
from utils.training.losses import RewardPairLoss

MEANS = [3.0, 3.0, 3.5, 2.0, 2.0]  # of the attributes


@pytest.fixture
def folders(reward_models):
    return reward_models


@pytest.mark.parametrize("head", HEADS)
def test_the_scorer_equals_plain_transformers(folders, sample_folder, head):
    """Our scores, AutoModel and the pipeline agree on short and long texts, alone and in a batch."""
    conversations = [row["chosen"] for row in load_pairs(sample_folder, "validation", 5)]
    conversations.append([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    ours = RewardModel.load(str(folders[head]), device="cpu")
    ours.max_length = 480  # nothing is cut, as in the pipeline
    scores = ours.score(conversations, batch_size=4)
    model = AutoModelForSequenceClassification.from_pretrained(folders[head])
    assert model.config.id2label == dict(enumerate(HEADS[head].names))
    weights = torch.tensor(ours.head.weights)
    texts = [render(ours.tokenizer, messages, ask=False) for messages in conversations]
    pipe = pipeline("text-classification", model=str(folders[head]), device="cpu", top_k=None)
    for text, score, result in zip(texts, scores, pipe(texts, batch_size=3), strict=True):
        batch = ours.tokenizer([text, text + " and more"], return_tensors="pt", padding=True, add_special_tokens=False)
        logits = model(**batch).logits[0]
        values = torch.softmax(logits, -1) if head == "distribution" else logits
        means = torch.tensor(ours.head.means or 0.0)  # a regression on attributes is about their means
        assert ((values + means) @ weights).item() == pytest.approx(score.item(), abs=1e-4)
        piped = {entry["label"]: entry["score"] for entry in result}
        assert [piped[name] for name in HEADS[head].names] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_folder_has_the_settings_of_the_head(folders):
    config = read(folders["distribution"] / "reward_config.json")
    assert config["head"] == "distribution" and config["grades"] == list(range(1, 11)) and config["max_length"] == 128
    assert (config["lowest_rating"], config["highest_rating"]) == (0.0, 4.0) and len(config["surface_weights"]) == 9
    lines = read_lines(folders["distribution"] / "predictions.jsonl")
    rewards = [line[side] for line in lines for side in ("chosen", "rejected")]
    figures = (config["reward_mean"], config["reward_std"])
    assert figures == pytest.approx((np.mean(rewards), np.std(rewards)))
    assert all(1 <= reward <= 10 for reward in rewards) and all(line["chosen_spread"] > 0 for line in lines)
    assert read(folders["attributes"] / "reward_config.json")["weights"] == pytest.approx([0.2] * 5)


def test_a_new_head_starts_at_equal_rewards_or_at_the_means_of_the_attributes(model_folder, sample_folder, tokenizer):
    rows, collator = load_pairs(sample_folder, "train", 16), PairCollator(0, 8)
    batch = collator(list(rows))
    for head in HEADS:
        model = start_model(model_folder, tokenizer, new_reward_head(head, "average", [], MEANS)).eval()
        outputs = RewardPairs(model)(**batch)["outputs"]
        assert not outputs.any() and outputs.shape[-1] == HEADS[head].outputs
    _, means = ratings_of(rows)
    given = np.array([row for side in ("chosen", "rejected") for row in rows[f"{side}_attributes"]])
    assert means == pytest.approx(given.mean(axis=0))
    head = new_reward_head("attributes", "average", [], means)
    assert head.rewards(outputs).mean().item() == pytest.approx(np.mean(means), abs=1e-5)
    variance = RewardPairLoss(head, "squared_error")({"outputs": outputs}, batch)[0].mean().item()
    assert variance == pytest.approx(given.var(axis=0).mean(), abs=1e-4), "the loss of knowing the means only"


def test_a_warm_start_from_attributes_keeps_their_ranking(folders, sample_folder, tokenizer):
    """Train by regression on the attributes, then continue with a scalar loss."""
    rows = load_pairs(sample_folder, "validation", 20)
    old = RewardModel.load(str(folders["attributes"]), device="cpu")
    expected = old.head.rewards(torch.tensor(old.pair_outputs(rows)))
    scalar = start_model(str(folders["attributes"]), old.tokenizer, new_reward_head("scalar", "", [], MEANS)).eval()
    batch = PairCollator(0, 8)(list(rows))
    with torch.no_grad():
        result = RewardPairs(scalar)(**batch)["outputs"][..., 0]
        torch.testing.assert_close(result - result.mean(), expected - expected.mean(), atol=1e-4, rtol=0)
        again = start_model(str(folders["scalar"]), old.tokenizer, new_reward_head("scalar", "", [], MEANS))
        assert again.score.weight.any(), "a trained head of the same kind goes on"
        other = start_model(str(folders["scalar"]), old.tokenizer, new_reward_head("distribution", "", [], MEANS))
        assert not other.score.weight.any() and other.score.weight.shape[0] == 10


def test_scores_of_conversations_equal_those_of_tokenised_pairs(folders, sample_folder, tokenizer):
    rows = closed_answers(load_pairs(sample_folder, "validation", 12), tokenizer)
    model = RewardModel.load(str(folders["distribution"]), device="cpu")
    prompts = [row["chosen"][:-1] for row in rows]
    answers = [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]
    outputs = model.read(prompts, answers, batch_size=5)
    np.testing.assert_allclose(outputs.numpy(), model.pair_outputs(rows), atol=1e-5)
    alone = model.read(prompts[:1], answers[:1])
    torch.testing.assert_close(alone, outputs[:1], atol=1e-5, rtol=0)


def test_any_model_with_one_output_can_score(folders, tmp_path, model_folder):
    shutil.copytree(folders["scalar"], tmp_path / "hub")
    (tmp_path / "hub/reward_config.json").unlink()
    conversation = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
    ours, foreign = (RewardModel.load(str(path), device="cpu") for path in (folders["scalar"], tmp_path / "hub"))
    assert foreign.score(conversation).item() == pytest.approx(ours.score(conversation).item(), abs=1e-6)
    (tmp_path / "hub/chat_template.jinja").unlink()
    plain = RewardModel.load(str(tmp_path / "hub"), device="cpu")
    assert render(plain.tokenizer, conversation[0], ask=False).startswith("User: Hi\nAssistant: Hello.")
    assert plain.score(conversation).item() != ours.score(conversation).item()
    for name in (model_folder, str(folders["scalar"] / "plots"), "outputs/not_there"):
        with pytest.raises(SystemExit) as stop:
            RewardModel.load(name)
        assert "REWARD_MODEL" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("head", HEADS)
def test_padding_with_the_end_of_turn_changes_no_score(folders, sample_folder, head):
    conversations = [row["chosen"] for row in load_pairs(sample_folder, "validation", 6)]
    model = RewardModel.load(str(folders[head]), device="cpu")
    alone = torch.cat([model.score([conversation]) for conversation in conversations])
    model.tokenizer.pad_token = model.tokenizer.eos_token
    torch.testing.assert_close(model.score(conversations, batch_size=6), alone, atol=1e-5, rtol=0)


def test_a_model_of_an_older_version_loads_if_its_scores_stay_the_same(folders, tmp_path):
    shutil.copytree(folders["scalar"], tmp_path / "run")
    config = read(tmp_path / "run/reward_config.json")
    write_json(tmp_path / "run/reward_config.json", config | {"length_penalty": 0.0, "answers_only": False})
    assert RewardModel.load(str(tmp_path / "run"), device="cpu").head == RewardHead.of_json(config)
    for option, value in {"LENGTH_PENALTY": -0.125, "ANSWERS_ONLY": True}.items():
        write_json(tmp_path / "run/reward_config.json", config | {option.lower(): value})
        with pytest.raises(SystemExit, match=f"needs {option}, which no longer exists: train it again"):
            RewardModel.load(str(tmp_path / "run"))


def test_a_model_with_another_chat_template_is_refused(folders, tmp_path):
    shutil.copytree(folders["scalar"], tmp_path / "run")
    template = tmp_path / "run/chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(SystemExit, match="its chat template is not the one it was trained with"):
        RewardModel.load(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "result, outcome",
    [
        ({"accuracy_high": 0.45, "pairs": 100, "verdict": "worse than x"}, "is worse than a coin"),
        ({"accuracy_high": 0.62, "pairs": 100, "verdict": "not shown to be better than x"}, "WARNING"),
        ({"accuracy_high": 0.8, "pairs": 100, "verdict": "better than x by 0.1"}, ""),
        ({"accuracy_high": 0.0, "pairs": 6, "verdict": "worse than x"}, "is worse than a coin"),
        ({"accuracy_high": 0.0, "pairs": 5, "verdict": "worse than x"}, "WARNING"),
        ({"accuracy_high": 0.0, "pairs": 60, "prompts": 5, "verdict": "worse than x"}, "WARNING"),
    ],
)
def test_a_reward_model_worse_than_a_coin_is_refused_for_policies(tmp_path, capsys, result, outcome):
    write_json(tmp_path / "eval.json", result | {"accuracy": result["accuracy_high"] / 2})
    if outcome.startswith("is"):
        with pytest.raises(SystemExit, match=outcome):
            check_better_than_chance(str(tmp_path))
    else:
        check_better_than_chance(str(tmp_path))
    assert ("WARNING" in capsys.readouterr().out) == (outcome == "WARNING")
