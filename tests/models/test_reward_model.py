"""Every head from end to end: what is saved, how others load it, the warm start, seeds, epochs, the page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

import train_reward_model
from extras import evaluate, make_report
from tests.conftest import run_script
from utils.data.processed import closed_answers, load_pairs, ratings_of
from utils.data.tokens import render
from utils.evaluation.predictions import trained_on
from utils.models.reward_model import HEADS, RewardHead, RewardModel, RewardPairs, new_reward_head, start_model
from utils.models.shared_prompt import PairCollator
from utils.runs import write_json
from utils.training.losses import PairLoss

MEANS = [3.0, 3.0, 3.5, 2.0, 2.0]  # of the attributes
SMALL = {"MAX_STEPS": 6, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3, "CONTROL_PAIRS": 6}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folders(model_folder, sample_folder, tmp_path_factory):
    """{head: its run folder}; the distribution is trained with LoRA."""
    root = tmp_path_factory.mktemp("heads")
    for head in HEADS:
        options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": root / head, "HEAD": head}
        options |= {"USE_LORA": "true", "RATING_WEIGHT": 0.3} if head == "distribution" else {}
        run_script(train_reward_model, **options)
    return {head: root / head for head in HEADS}


@pytest.mark.parametrize("head", HEADS)
def test_the_scorer_equals_plain_transformers(folders, sample_folder, head):
    """On short and long, alone and in a batch: our scores, AutoModel and the pipeline come from the same numbers."""
    conversations = [row["chosen"] for row in load_pairs(sample_folder, "validation", 5)]
    conversations.append([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    ours = RewardModel.load(str(folders[head]), device="cpu")
    ours.max_length = 480  # nothing is cut, as in the pipeline
    scores = ours.score(conversations, batch_size=4)
    model = AutoModelForSequenceClassification.from_pretrained(folders[head])
    assert model.config.id2label == dict(enumerate(HEADS[head].names))
    weights = torch.tensor(ours.reading.weights)
    texts = [render(ours.tokenizer, messages, ask=False) for messages in conversations]
    pipe = pipeline("text-classification", model=str(folders[head]), device="cpu", top_k=None)
    for text, score, found in zip(texts, scores, pipe(texts, batch_size=3), strict=True):
        batch = ours.tokenizer([text, text + " and more"], return_tensors="pt", padding=True, add_special_tokens=False)
        logits = model(**batch).logits[0]
        values = torch.softmax(logits, -1) if head == "distribution" else logits
        means = torch.tensor(ours.reading.means or 0.0)  # a regression on attributes is about their means
        assert ((values + means) @ weights).item() == pytest.approx(score.item(), abs=1e-4)
        piped = {entry["label"]: entry["score"] for entry in found}
        assert [piped[name] for name in HEADS[head].names] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_folder_says_how_it_is_read(folders):
    config = read(folders["distribution"] / "reward_config.json")
    assert config["head"] == "distribution" and config["grades"] == list(range(1, 11)) and config["max_length"] == 128
    assert (config["lowest_rating"], config["highest_rating"]) == (0.0, 4.0) and len(config["surface_weights"]) == 9
    lines = lines_of(folders["distribution"])
    rewards = [line[side] for line in lines for side in ("chosen", "rejected")]
    assert config["reward_mean"] == pytest.approx(np.mean(rewards)) and config["reward_std"] == pytest.approx(
        np.std(rewards)
    )
    assert all(1 <= reward <= 10 for reward in rewards) and all(line["chosen_spread"] > 0 for line in lines)
    assert read(folders["attributes"] / "reward_config.json")["weights"] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("head", HEADS)
def test_evaluate_gives_the_figures_of_the_training_again(folders, sample_folder, tmp_path, head):
    options = {"DATA_DIR": sample_folder, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu", "CONTROL_PAIRS": 6}
    run_script(evaluate, **options, REWARD_MODEL=folders[head], OUTPUT_DIR=tmp_path / "out")
    before, after = read(folders[head] / "eval.json"), read(tmp_path / "out/eval.json")
    assert set(after["shortcuts"]) == set(before["shortcuts"]) >= {"surface", "without_prompt", "untrained_head"}
    for name, part in before["shortcuts"].items():
        assert after["shortcuts"][name]["accuracy"] == pytest.approx(part["accuracy"], abs=0.06), name
    if head != "distribution":  # merged adapters are rounded once more, which can turn a near tie round
        for name in ("pairs", "accuracy", "accuracy_low", "ece", "brier", "length_correlation"):
            assert after[name] == pytest.approx(before[name], abs=1e-4), name
        assert after["verdict"] == before["verdict"] and after["best_shortcut"] == before["best_shortcut"]
    for one, other in zip(lines_of(folders[head]), lines_of(tmp_path / "out"), strict=True):
        assert one["win"] == pytest.approx(other["win"], abs=1e-4)
        assert one["chosen"] == pytest.approx(other["chosen"], abs=1e-4)


def test_evaluate_takes_pairs_of_another_origin_with_subsets(folders, tmp_path, capsys):
    rows = [
        {"prompt": f"Say {i}", "chosen": f"{i} {i}", "rejected": "no <b>" * (i + 1), "subset": "ab"[i % 2]}
        for i in range(9)
    ]
    rows.append({"prompt": "Say x", "chosen": "same", "rejected": "same", "subset": "a"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"DATASET": tmp_path / "pairs.jsonl", "REWARD_MODEL": folders["scalar"], "OUTPUT_DIR": tmp_path / "out"}
    run_script(evaluate, **options, DEVICE="cpu")
    result, out = read(tmp_path / "out/eval.json"), capsys.readouterr().out
    assert result["pairs"] == 9 and {name: part["pairs"] for name, part in result["by_subset"].items()} == {
        "a": 5,
        "b": 4,
    }
    assert "left out: 1 equal_answers" in out and "a: " in out


def test_evaluate_judges_what_a_source_holds_out(folders, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name, count in (("train", 7), ("test", 3)):
        rows = [{"prompt": f"{name} {i}", "chosen": f"{i} {i}", "rejected": "no"} for i in range(count)]
        (tmp_path / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"DATASET": tmp_path / "data", "REWARD_MODEL": folders["scalar"], "DEVICE": "cpu"}
    run_script(evaluate, **options, OUTPUT_DIR=tmp_path / "out")
    assert read(tmp_path / "out/eval.json")["pairs"] == 3 and "split test" in capsys.readouterr().out
    alike = {"prompt": "Q", "chosen": "word " * 400 + "good", "rejected": "word " * 400 + "bad"}
    (tmp_path / "one.jsonl").write_text(json.dumps(alike) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no pair differs in the window of 128 tokens"):
        run_script(evaluate, **options | {"DATASET": tmp_path / "one.jsonl"}, OUTPUT_DIR=tmp_path / "other")


def test_evaluate_says_what_the_model_was_trained_on(folders, sample_folder, tmp_path, capsys):
    options = {"DATA_DIR": sample_folder, "REWARD_MODEL": folders["scalar"], "DEVICE": "cpu", "CONTROL_PAIRS": 0}
    for split, expected in (("train", 20), ("validation", 0)):
        run_script(evaluate, **options, SPLIT=split, MAX_ROWS=20, OUTPUT_DIR=tmp_path / split)
        assert read(tmp_path / split / "eval.json")["pairs_trained_on"] == expected
        fingerprint = read(tmp_path / split / "run.json")["data_fingerprint"]
        assert fingerprint == read(Path(sample_folder) / "metadata.json")["fingerprint"]
        assert ("was trained on the prompts of 20 of these pairs" in capsys.readouterr().out) == (split == "train")
    record = read(folders["scalar"] / "run.json")
    shutil.copytree(folders["scalar"], tmp_path / "half")
    half = record | {"settings": record["settings"] | {"HALF": "even", "MAX_ROWS": 10}}
    (tmp_path / "half/run.json").write_text(json.dumps(half))
    assert trained_on(tmp_path / "half", load_pairs(sample_folder, "train", 20)) == 5
    with pytest.raises(SystemExit, match="SPLIT = 'test' is not known, choose one of: train, validation"):
        run_script(evaluate, **options, SPLIT="test", OUTPUT_DIR=tmp_path / "none")


def test_evaluate_goes_on_without_the_model_that_it_was_trained_from(folders, sample_folder, tmp_path, capsys):
    shutil.copytree(folders["scalar"], tmp_path / "run")
    record = read(tmp_path / "run/run.json")
    record["settings"]["MODEL"] = "of/another-machine"
    (tmp_path / "run/run.json").write_text(json.dumps(record), encoding="utf-8")
    options = {"DATA_DIR": sample_folder, "MAX_ROWS": 20, "DEVICE": "cpu", "CONTROL_PAIRS": 4}
    run_script(evaluate, **options, REWARD_MODEL=tmp_path / "run", OUTPUT_DIR=tmp_path / "out")
    found = read(tmp_path / "out/eval.json")["shortcuts"]
    assert "untrained_head" not in found and "without_prompt" in found
    assert "not compared with an untrained head: of/another-machine" in capsys.readouterr().out


def test_the_page_needs_nothing_else_and_escapes_what_rows_say(folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["scalar"], folder)
    result = read(folder / "eval.json")
    assert result["worst_mistakes"], "a tiny model makes some"
    result["worst_mistakes"][0]["chosen_text"] = "<script>alert(1)</script>"
    (folder / "eval.json").write_text(json.dumps(result), encoding="utf-8")
    run_script(make_report, RUNS=f"{folder},{folders['distribution']}", OUTPUT=tmp_path / "page.html", LOOK_IN=tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert result["verdict"].replace("'", "&#39;") in text and text.count("data:image/png;base64,") == 10
    assert "<script" not in text and "&lt;script&gt;" in text and "Not here:" not in text, "these two were asked for"
    assert "http://" not in text and "https://" not in text
    with pytest.raises(SystemExit, match=r"nothing/run.json is not there yet"):
        run_script(make_report, RUNS=tmp_path / "nothing", OUTPUT=tmp_path / "page.html")


# where a head starts


def test_a_new_head_starts_at_equal_rewards_and_attributes_at_their_means(model_folder, sample_folder, tokenizer):
    rows, collator = load_pairs(sample_folder, "train", 16), PairCollator(0, 8)
    batch = collator(list(rows))
    for head in HEADS:
        model = start_model(model_folder, tokenizer, new_reward_head(head, "average", [], MEANS)).eval()
        outputs = RewardPairs(model)(**batch)["outputs"]
        assert not outputs.any() and outputs.shape[-1] == HEADS[head].outputs
    _, means = ratings_of(rows)
    given = np.array([row for side in ("chosen", "rejected") for row in rows[f"{side}_attributes"]])
    assert means == pytest.approx(given.mean(axis=0))
    reading = new_reward_head("attributes", "average", [], means)
    assert reading.rewards(outputs).mean().item() == pytest.approx(np.mean(means), abs=1e-5)
    variance = PairLoss(reading, "squared_error")({"outputs": outputs}, batch)[0].mean().item()
    assert variance == pytest.approx(given.var(axis=0).mean(), abs=1e-4), "the loss of knowing the means only"


def test_the_warm_start_from_attributes_ranks_as_they_did(folders, sample_folder, tokenizer):
    """Two commands: regression on the attributes, then a scalar loss from there."""
    rows = load_pairs(sample_folder, "validation", 20)
    old = RewardModel.load(str(folders["attributes"]), device="cpu")
    expected = old.reading.rewards(torch.tensor(old.pair_outputs(rows)))
    scalar = start_model(str(folders["attributes"]), old.tokenizer, new_reward_head("scalar", "", [], MEANS)).eval()
    batch = PairCollator(0, 8)(list(rows))
    with torch.no_grad():
        found = RewardPairs(scalar)(**batch)["outputs"][..., 0]
        torch.testing.assert_close(found - found.mean(), expected - expected.mean(), atol=1e-4, rtol=0)
        again = start_model(str(folders["scalar"]), old.tokenizer, new_reward_head("scalar", "", [], MEANS))
        assert again.score.weight.any(), "a trained head of the same kind goes on"
        other = start_model(str(folders["scalar"]), old.tokenizer, new_reward_head("distribution", "", [], MEANS))
        assert not other.score.weight.any() and other.score.weight.shape[0] == 10


# the scorer


def test_answers_to_one_prompt_share_a_window_and_neighbours_change_nothing(folders, sample_folder, tokenizer):
    rows = closed_answers(load_pairs(sample_folder, "validation", 12), tokenizer)
    model = RewardModel.load(str(folders["distribution"]), device="cpu")
    prompts = [row["chosen"][:-1] for row in rows]
    answers = [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]
    outputs = model.read(prompts, answers, batch_size=5)
    np.testing.assert_allclose(outputs.numpy(), model.pair_outputs(rows), atol=1e-5)
    alone = model.read(prompts[:1], answers[:1])
    torch.testing.assert_close(alone, outputs[:1], atol=1e-5, rtol=0)


def test_any_model_with_one_output_is_a_reward_model(folders, tmp_path, model_folder):
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
def test_padding_and_batch_mates_change_no_score_where_pad_is_the_end_of_turn(folders, sample_folder, head):
    conversations = [row["chosen"] for row in load_pairs(sample_folder, "validation", 6)]
    model = RewardModel.load(str(folders[head]), device="cpu")
    alone = torch.cat([model.score([conversation]) for conversation in conversations])
    model.tokenizer.pad_token = model.tokenizer.eos_token
    torch.testing.assert_close(model.score(conversations, batch_size=6), alone, atol=1e-5, rtol=0)


def test_a_model_of_an_older_version_loads_where_its_scores_stay_the_same(folders, tmp_path):
    shutil.copytree(folders["scalar"], tmp_path / "run")
    config = read(tmp_path / "run/reward_config.json")
    write_json(tmp_path / "run/reward_config.json", config | {"length_penalty": 0.0, "answers_only": False})
    assert RewardModel.load(str(tmp_path / "run"), device="cpu").reading == RewardHead.of_json(config)
    for option, value in {"LENGTH_PENALTY": -0.125, "ANSWERS_ONLY": True}.items():
        write_json(tmp_path / "run/reward_config.json", config | {option.lower(): value})
        with pytest.raises(SystemExit, match=f"needs {option}, which no longer exists: train it again"):
            RewardModel.load(str(tmp_path / "run"))


def test_another_template_than_that_of_the_training_is_refused(folders, tmp_path):
    shutil.copytree(folders["scalar"], tmp_path / "run")
    template = tmp_path / "run/chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(SystemExit, match="its chat template is not the one it was trained with"):
        RewardModel.load(str(tmp_path / "run"))
