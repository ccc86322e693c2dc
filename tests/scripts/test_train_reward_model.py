"""train_reward_model.py from end to end: what it writes, that the save is proved, that others can load it."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

import train_reward_model
from benchmarks.stock_trl import reward_trainer
from tests.conftest import SAMPLE, run_script
from tests.toys import toy_run
from utils.data.processed import load_pairs
from utils.data.tokens import render
from utils.evaluation import reward_report
from utils.models.loading import add_lora, load_classifier, plain, save_with_proof
from utils.models.reward_model import RewardHead, RewardModel
from utils.training.trainer import training_arguments

SMALL = {
    "MAX_STEPS": 6,
    "LOG_EVERY_STEPS": 2,
    "MAX_ROWS": 40,
    "PRECISION": "fp32",
    "LEARNING_RATE": 1e-3,
    "DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def trained(model_folder, sample_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "reward_model"
    run_script(train_reward_model, **SMALL, DATA_DIR=sample_folder, MODEL=model_folder, OUTPUT_DIR=folder)
    return folder


def test_the_run_folder_is_complete_and_its_figures_agree(trained, sample_folder):
    result = json.loads((trained / "eval.json").read_text())
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    right = [1.0 if p["chosen"] > p["rejected"] else 0.5 if p["chosen"] == p["rejected"] else 0.0 for p in lines]
    longer = [(p["chosen_characters"] > p["rejected_characters"]) for p in lines]
    validation = load_pairs(sample_folder, "validation", 40)
    assert result["pairs"] == len(lines) == len(validation) and result["accuracy"] == pytest.approx(np.mean(right))
    assert result["length_baseline"] == pytest.approx(np.mean(longer), abs=0.02)
    assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] and result["verdict"]
    record = json.loads((trained / "run.json").read_text())
    assert record["finished"] and record["seconds"] > 0 and record["peak_memory_gb"] > 0
    assert record["settings"]["LEARNING_RATE"] == 1e-3 and record["data_fingerprint"] and record["device"] == "cpu"
    assert f"{result['accuracy']:.3f}" in (trained / "README.md").read_text()
    assert (trained / "training_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_trained_weights_differ_from_the_start(trained, model_folder):
    before, after = load_file(f"{model_folder}/model.safetensors"), load_file(trained / "model.safetensors")
    body = [name for name in before if name in after]
    assert len(body) > 10 and all(not torch.equal(before[name], after[name]) for name in body)


def test_scores_are_those_of_plain_transformers(trained, sample_folder):
    """Ours, AutoModel and the pipeline agree, on short and long, alone and in a batch; pad is not the end of turn."""
    conversations = [row["chosen"] for row in load_pairs(sample_folder, "validation", 5)]
    conversations.append([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    ours = RewardModel.load(str(trained), device="cpu")
    ours.max_length = 480  # nothing is cut, as in the pipeline
    scores = ours.score(conversations, batch_size=4)
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert model.config.pad_token_id not in (None, model.config.eos_token_id)
    texts = [render(ours.tokenizer, messages, ask=False) for messages in conversations]
    theirs = pipeline("text-classification", model=str(trained), device="cpu")(texts, batch_size=3)
    assert [found["score"] for found in theirs] == pytest.approx(scores.tolist(), abs=1e-4)
    for text, score in zip(texts, scores.tolist(), strict=True):
        batch = ours.tokenizer([text, text + " and more"], return_tensors="pt", padding=True, add_special_tokens=False)
        assert model(**batch).logits[0, 0].item() == pytest.approx(score, abs=1e-4)


def test_scores_at_the_window_equal_those_of_training(trained, sample_folder):
    """predictions.jsonl (ids of the window) and RewardModel.score (conversations) agree where no pair is cut."""
    rows = load_pairs(sample_folder, "validation", 40)
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    model = RewardModel.load(str(trained), device="cpu")
    whole = [i for i, row in enumerate(rows) if not (row["prompt_cut"] or row["chosen_cut"] or row["rejected_cut"])]
    assert whole, "the sample has pairs that fit"
    for side in ("chosen", "rejected"):
        scores = model.score([rows[i][side] for i in whole])
        assert scores.tolist() == pytest.approx([lines[i][side] for i in whole], abs=1e-4)


def test_lora_keeps_its_head_and_leaves_a_plain_folder(model_folder, sample_folder, tmp_path):
    folder = tmp_path / "lora"
    options = SMALL | {"USE_LORA": "true", "LORA_RANK": 4}
    run_script(train_reward_model, **options, DATA_DIR=sample_folder, MODEL=model_folder, OUTPUT_DIR=folder)
    assert (folder / "adapter/adapter_config.json").exists() and not (folder / "adapter_config.json").exists()
    adapter, whole = load_file(folder / "adapter/adapter_model.safetensors"), load_file(folder / "model.safetensors")
    saved_head = [value for name, value in adapter.items() if "score" in name]
    assert len(saved_head) == 1 and torch.equal(saved_head[0], whole["score.weight"])
    assert not any("lora" in name for name in whole)


def test_trl_gets_every_row_whole_also_those_over_its_own_limit(model_folder, tokenizer, tmp_path):
    """trl.RewardTrainer filters rows over max_length, 1024 by default, out of the data behind a progress bar."""
    ids = list(range(3, 203))
    row = {"input_ids": ids, "attention_mask": [1] * 200, "chosen_ids": ids * 5, "rejected_ids": ids[:9]}
    rows = Dataset.from_list([row, row | {"chosen_ids": ids[:5]}])
    run = toy_run(tmp_path / "run", max_steps=1)
    model = load_classifier(model_folder, 1)
    trainer = reward_trainer(model, rows, tokenizer, run, partial(training_arguments, run))
    lengths = [(len(one["chosen_ids"]), len(one["rejected_ids"])) for one in trainer.train_dataset]
    assert lengths == [(1200, 209), (205, 209)]


def test_rewards_that_are_not_finite_end_in_one_line(model_folder, tokenizer):
    model = load_classifier(model_folder, 1).eval()
    model.score.weight.data[:] = float("nan")
    with pytest.raises(SystemExit, match="rewards are not finite: set PRECISION = fp32"):
        RewardModel(model, tokenizer, RewardHead("scalar"), 64).outputs_of_ids([[3, 4]], 1)


def test_a_finished_run_is_moved_aside_and_nothing_is_lost(model_folder, sample_folder, tmp_path, capsys):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "MAX_STEPS": 1}
    run_script(train_reward_model, **options)
    first = (tmp_path / "run/run.json").read_text()
    run_script(train_reward_model, **options)
    (aside,) = tmp_path.glob("run-*")
    assert (aside / "run.json").read_text() == first and f"moved aside to {aside}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(model_folder, sample_folder, tmp_path):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    options |= {"LEARNING_RATE": 1e38, "WARMUP_SHARE": 0, "SCHEDULE": "constant"}
    with pytest.raises(SystemExit, match=r"the loss of training rows \["):
        run_script(train_reward_model, **options)


def test_a_model_that_is_not_finite_after_the_last_step_ends_in_one_line(model_folder, sample_folder, tmp_path):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    options |= {"MAX_STEPS": 1, "LEARNING_RATE": 1e38, "WARMUP_SHARE": 0, "SCHEDULE": "constant"}
    with pytest.raises(SystemExit, match="the model's outputs are not finite: set PRECISION"):
        run_script(train_reward_model, **options)


@pytest.mark.parametrize("constants", [{}, {"EPOCHS": 2, "MAX_STEPS": 0, "SAVE_EVERY_STEPS": 10}])
def test_what_fails_after_training_does_not_cost_the_training(
    model_folder, sample_folder, tmp_path, monkeypatch, constants
):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"} | constants
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the disk is full"):
        patch.setattr(reward_report, "write_results", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        run_script(train_reward_model, **options)
    steps_before = (tmp_path / "run/metrics.jsonl").read_text()
    weights = load_file(tmp_path / "run/model.safetensors")
    run_script(train_reward_model, **options)
    assert (tmp_path / "run/metrics.jsonl").read_text() == steps_before, "no step is trained again"
    again = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (
        json.loads((tmp_path / "run/run.json").read_text())["finished"] and not (tmp_path / "run/checkpoints").exists()
    )


def test_a_save_that_does_not_reload_equal_is_an_error(model_folder, tokenizer, tmp_path):
    model = load_classifier(model_folder, 1)

    def other(folder):
        reloaded = load_classifier(folder, 1)
        reloaded.score.weight.data += shift
        return reloaded

    def head(model):
        return plain(model).score.weight.detach().clone()

    shift = 3e-5
    with pytest.raises(RuntimeError, match="differ by"):
        save_with_proof(model, tokenizer, tmp_path, other, head)
    shift = 3e-6
    save_with_proof(model, tokenizer, tmp_path, other, head)
    model.score.weight.data *= 100  # merged adapters are held to a share of the largest score
    largest = head(model).abs().max().item()
    for shift, equal in ((5e-4 * largest, True), (2e-3 * largest, False)):  # noqa: B007, `other` reads it
        adapted = add_lora(load_classifier(model_folder, 1), "SEQ_CLS", 4, 8, 0.0, ("q_proj",), "score")
        adapted.get_base_model().score.modules_to_save["default"].weight.data = head(model)
        with contextlib.nullcontext() if equal else pytest.raises(RuntimeError, match="differ by"):
            save_with_proof(adapted, tokenizer, tmp_path / str(equal), other, head)


def test_a_save_is_proved_on_the_device_of_the_training(model_folder, tokenizer, tmp_path):
    """Scores come back on the CPU, so they do not tell where they were made; two devices round in two ways."""
    model = load_classifier(model_folder, 1).to("meta")
    model.save_pretrained = model.cpu = model.to = lambda *_: None
    places = []

    def score(model):
        places.append(next(model.parameters()).device.type)
        return torch.zeros(2)

    save_with_proof(model, tokenizer, tmp_path, lambda folder: load_classifier(model_folder, 1), score)
    assert places == ["meta", "meta"]


def test_another_tokenizer_than_that_of_the_data_is_refused(sample_folder, model_folder, tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|>:")
    other.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"another chat template than that of MODEL = ") as end:
        run_script(train_reward_model, DATA_DIR=sample_folder, MODEL=tmp_path)
    mended = f"--dataset {SAMPLE} --tokenizer {tmp_path} --max_length 128 --output_dir {sample_folder} --max_rows 160"
    assert end.value.code.endswith(f"run `python load_helpsteer_dataset.py {mended}` first"), "the same rows again"
    with pytest.raises(SystemExit, match=r"nowhere is not there yet: run `python load_helpsteer_dataset.py` first"):
        run_script(train_reward_model, DATA_DIR="nowhere", MODEL=model_folder)


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("PAIR_LOSS", "bradly", "PAIR_LOSS = 'bradly' is not known, choose one of: bradley_terry"),
        ("HEAD", "vector", "HEAD = 'vector' is not known, choose one of: scalar"),
        ("MODEL", "no/such-model", "MODEL = 'no/such-model' cannot be had"),
        ("DEVICE", "cuda:7", "DEVICE = 'cuda:7' is not known"),
        ("BATCH_SIZE", 0, "BATCH_SIZE = 0: expected 1 or more"),
        ("MAX_STEPS", -1, "MAX_STEPS = -1: expected 0 or more"),
        ("REPORT_TO", "paper", "REPORT_TO = 'paper' is not known, choose one of: none, tensorboard, trackio, wandb"),
        ("REPORT_TO", "wandb", "REPORT_TO = 'wandb' needs a package that is not installed: run `pip install wandb`"),
        ("PRECISION", "fp16", "PRECISION = 'fp16' needs a GradScaler"),
        ("SCHEDULE", "cosin", "SCHEDULE = 'cosin' is not known, choose one of: cosine, linear, constant"),
    ],
)
def test_mistakes_end_in_one_line(sample_folder, model_folder, tmp_path, constant, value, message):
    options = {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "DEVICE": "cpu"}
    with pytest.raises(SystemExit) as stop:
        run_script(train_reward_model, **options | {constant: value})
    assert message in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "run").exists()


def test_a_folder_without_validation_pairs_is_named(model_folder, tokenizer_folder, tmp_path):
    import load_helpsteer_dataset

    options = {
        "DATASET": SAMPLE,
        "TOKENIZER": tokenizer_folder,
        "MAX_ROWS": 20,
        "VALIDATION_SHARE": 0,
        "MAX_LENGTH": 128,
    }
    run_script(load_helpsteer_dataset, **options, OUTPUT_DIR=tmp_path / "data")
    with pytest.raises(SystemExit, match="validation has no pair to use"):
        run_script(train_reward_model, DATA_DIR=tmp_path / "data", MODEL=model_folder, DEVICE="cpu")
