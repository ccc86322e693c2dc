"""train_reward_model.py from end to end: its folder, the proof of the save, LoRA, resuming, user errors."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import train_reward_model
from benchmarks.stock_trl import reward_trainer
from tests.conftest import SAMPLE, error_of, run_script
from tests.toys import toy_run
from utils.data.processed import load_pairs
from utils.evaluation import reward_report
from utils.models.loading import add_lora, load_classifier, plain, save_with_proof
from utils.models.reward_model import RewardHead, RewardModel
from utils.runs import read_json, read_lines
from utils.training.trainer import training_arguments

SMALL = {"MAX_STEPS": 6, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 40, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3}


def test_the_run_folder_is_complete_and_its_metrics_agree(reward_models, sample_folder, model_folder):
    trained = reward_models["scalar"]
    result, lines = read_json(trained / "eval.json"), read_lines(trained / "predictions.jsonl")
    right = [1.0 if p["chosen"] > p["rejected"] else 0.5 if p["chosen"] == p["rejected"] else 0.0 for p in lines]
    longer = [(p["chosen_characters"] > p["rejected_characters"]) for p in lines]
    validation = load_pairs(sample_folder, "validation", 40)
    assert result["pairs"] == len(lines) == len(validation) and result["accuracy"] == pytest.approx(np.mean(right))
    assert result["length_baseline"] == pytest.approx(np.mean(longer), abs=0.02)
    assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] and result["verdict"]
    record = read_json(trained / "run.json")
    assert record["finished"] and record["seconds"] > 0 and record["peak_memory_gb"] > 0
    assert record["settings"]["LEARNING_RATE"] == 1e-2 and record["data_fingerprint"] and record["device"] == "cpu"
    assert f"{result['accuracy']:.3f}" in (trained / "README.md").read_text()
    assert (trained / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    config = read_json(trained / "config.json")
    assert config["pad_token_id"] not in (None, config["eos_token_id"]), "plain transformers pool by the pad token"
    before, after = load_file(f"{model_folder}/model.safetensors"), load_file(trained / "model.safetensors")
    body = [name for name in before if name in after]
    assert len(body) > 10 and not any(torch.equal(before[name], after[name]) for name in body), "every weight moved"


def test_scores_of_whole_pairs_equal_the_predictions(reward_models, sample_folder):
    """predictions.jsonl, from token ids, and RewardModel.score, from conversations, agree if the pair is not cut."""
    rows = load_pairs(sample_folder, "validation", 40)
    lines = read_lines(reward_models["scalar"] / "predictions.jsonl")
    model = RewardModel.load(str(reward_models["scalar"]), device="cpu")
    whole = [i for i, row in enumerate(rows) if not (row["prompt_cut"] or row["chosen_cut"] or row["rejected_cut"])]
    assert whole, "the sample has pairs that fit"
    for side in ("chosen", "rejected"):
        scores = model.score([rows[i][side] for i in whole])
        assert scores.tolist() == pytest.approx([lines[i][side] for i in whole], abs=1e-4)


def test_lora_saves_its_head_and_a_plain_folder(reward_models):
    folder = reward_models["distribution"]
    assert (folder / "adapter/adapter_config.json").exists() and not (folder / "adapter_config.json").exists()
    adapter, whole = load_file(folder / "adapter/adapter_model.safetensors"), load_file(folder / "model.safetensors")
    saved_head = [value for name, value in adapter.items() if "score" in name]
    assert len(saved_head) == 1 and torch.equal(saved_head[0], whole["score.weight"])
    assert not any("lora" in name for name in whole)


def test_trl_gets_every_row_whole_even_over_its_limit(model_folder, tokenizer, tmp_path):
    """trl.RewardTrainer silently drops rows over max_length, 1024 by default."""
    ids = list(range(3, 203))
    row = {"input_ids": ids, "attention_mask": [1] * 200, "chosen_ids": ids * 5, "rejected_ids": ids[:9]}
    rows = Dataset.from_list([row, row | {"chosen_ids": ids[:5]}])
    run = toy_run(tmp_path / "run", max_steps=1)
    model = load_classifier(model_folder, 1)
    trainer = reward_trainer(model, rows, tokenizer, run, partial(training_arguments, run))
    lengths = [(len(one["chosen_ids"]), len(one["rejected_ids"])) for one in trainer.train_dataset]
    assert lengths == [(1200, 209), (205, 209)]


def test_rewards_that_are_not_finite_are_reported(model_folder, tokenizer):
    model = load_classifier(model_folder, 1).eval()
    model.score.weight.data[:] = float("nan")
    with pytest.raises(SystemExit, match="rewards are not finite: set PRECISION = fp32"):
        RewardModel(model, tokenizer, RewardHead("scalar"), 64).outputs_of_ids([[3, 4]], 1)


@pytest.mark.parametrize(
    "steps, message",
    [(6, r"the loss of training rows \["), (1, "the model's outputs are not finite: set PRECISION")],
)
def test_a_loss_or_a_model_that_is_not_finite_ends_the_run(model_folder, sample_folder, tmp_path, steps, message):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}
    options |= {"MAX_STEPS": steps, "LEARNING_RATE": 1e38, "WARMUP_SHARE": 0, "SCHEDULE": "constant"}
    with pytest.raises(SystemExit, match=message):
        run_script(train_reward_model, **options)


@pytest.mark.parametrize("constants", [{}, {"EPOCHS": 2, "MAX_STEPS": 0, "SAVE_EVERY_STEPS": 10}])
def test_a_failure_after_training_does_not_lose_the_training(
    model_folder, sample_folder, tmp_path, monkeypatch, constants
):
    options = SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"} | constants
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the disk is full"):
        patch.setattr(reward_report, "write_report", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        run_script(train_reward_model, **options)
    steps_before = (tmp_path / "run/metrics.jsonl").read_text()
    weights = load_file(tmp_path / "run/model.safetensors")
    run_script(train_reward_model, **options)
    assert (tmp_path / "run/metrics.jsonl").read_text() == steps_before, "no step is trained again"
    again = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert read_json(tmp_path / "run/run.json")["finished"] and not (tmp_path / "run/checkpoints").exists()


def test_a_save_that_reloads_with_other_scores_is_an_error(model_folder, tokenizer, tmp_path):
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


def test_a_tokenizer_other_than_that_of_the_data_is_refused(sample_folder, model_folder, tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|>:")
    other.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"a different chat template from that of MODEL = ") as end:
        run_script(train_reward_model, DATA_DIR=sample_folder, MODEL=tmp_path)
    options = f"--dataset {SAMPLE} --tokenizer {tmp_path} --max_length 128 --output_dir {sample_folder} --max_rows 160"
    assert end.value.code.endswith(f"run `python load_helpsteer_dataset.py {options}` first"), "for the same rows"
    with pytest.raises(SystemExit, match=r"nowhere is not there yet: run `python load_helpsteer_dataset.py` first"):
        run_script(train_reward_model, DATA_DIR="nowhere", MODEL=model_folder)


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"PAIR_LOSS": "bradly"}, "PAIR_LOSS = 'bradly' is not known, choose one of: bradley_terry"),
        ({"MODEL": "no/such-model"}, "MODEL = 'no/such-model' cannot be loaded"),
        ({"DEVICE": "cuda:7"}, "DEVICE = 'cuda:7' is not known"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE = 0: expected 1 or more"),
        ({"MAX_STEPS": -1}, "MAX_STEPS = -1: expected 0 or more"),
        ({"REPORT_TO": "paper"}, "REPORT_TO = 'paper' is not known, choose one of: none, tensorboard, trackio, wandb"),
        ({"REPORT_TO": "wandb"}, "REPORT_TO = 'wandb' needs a package that is not installed: run `pip install wandb`"),
        ({"PRECISION": "fp16"}, "PRECISION = 'fp16' needs a GradScaler"),
        ({"SCHEDULE": "cosin"}, "SCHEDULE = 'cosin' is not known, choose one of: cosine, linear, constant"),
        ({"HEAD": "vector"}, "HEAD = 'vector' is not known, choose one of: scalar, distribution, attributes"),
        ({"HEAD": "distribution", "PAIR_LOSS": "margin"}, "choose one of: win_probability, scaled"),
        ({"RATING_WEIGHT": 0.5}, "RATING_WEIGHT = 0.5 needs HEAD = distribution"),
        ({"HEAD": "attributes", "LABEL_SMOOTHING": 0.1}, "LABEL_SMOOTHING = 0.1 has no effect with HEAD = attributes"),
        ({"RATING": "taste"}, "RATING = 'taste' is not known"),
        ({"RATING": "goodness", "HEAD": "distribution"}, "RATING = 'goodness' is for HEAD = attributes"),
    ],
)
def test_user_errors_stop_with_one_message(sample_folder, model_folder, tmp_path, constants, message):
    options = {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "DEVICE": "cpu"}
    assert message in error_of(train_reward_model, **options | constants) and not (tmp_path / "run").exists()


def test_a_folder_without_validation_pairs_is_reported(model_folder, tokenizer_folder, tmp_path):
    import load_helpsteer_dataset

    options = {"DATASET": SAMPLE, "TOKENIZER": tokenizer_folder, "MAX_ROWS": 20, "MAX_LENGTH": 128}
    run_script(load_helpsteer_dataset, **options, VALIDATION_SHARE=0, OUTPUT_DIR=tmp_path / "data")
    with pytest.raises(SystemExit, match="validation has no usable pair"):
        run_script(train_reward_model, DATA_DIR=tmp_path / "data", MODEL=model_folder, DEVICE="cpu")
