"""extras/train_sft.py from end to end: labels, perplexity, resuming, sources, user errors."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_dpo
from extras import load_oasst_dataset, train_sft
from extras.lib import sft
from extras.lib.sft import answers_of_source, learnable, least_rating, load_answers
from tests.conftest import ROOT, error_of, run_script
from tests.source_rows import tree, write_lines
from tests.toys import toy_run
from utils.models.loading import add_lora, load_causal
from utils.runs import read_json as read
from utils.runs import read_lines as lines_of
from utils.training.trainer import last_checkpoint, train, trained_state

SMALL = {"MAX_STEPS": 4, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 24, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3}
SAVED = {"EVAL_EVERY_STEPS": 2, "SAVE_EVERY_STEPS": 2}
END = "<|im_end|>\n"


def plain_nll(folder, rows):
    """Return (sum of -log pi, number of tokens) of the answers, row by row, from the model's own logits."""
    model, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total -= logps[len(row["input_ids"]) - 1 :].sum().item()
        count += len(row["chosen_ids"])
    return total, count


@pytest.fixture
def options(model_folder, sample_folder, tmp_path):
    return SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run"}


@pytest.fixture(scope="module")
def finished(model_folder, sample_folder, tmp_path_factory):
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    run_script(train_sft, **SMALL | SAVED, DATA_DIR=sample_folder, MODEL=model_folder, OUTPUT_DIR=folder)
    return folder


def test_only_answers_have_labels_and_a_cut_one_has_no_end_of_turn(model_folder, sample_folder, tokenizer, tmp_path):
    rows = load_answers(sample_folder, "train")
    whole = [i for i, cut in enumerate(rows["answer_cut"]) if not cut][:3]
    cut = [i for i, cut in enumerate(rows["answer_cut"]) if cut][:3]
    rows = rows.select(whole + cut)
    trainer = sft.answer_trainer(load_causal(model_folder), rows, tokenizer, toy_run(tmp_path / "run"), dict)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    for i, row in enumerate(rows):
        learned = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert learned == row["chosen_ids"]
        assert batch["input_ids"][i].tolist()[: len(row["input_ids"])] == row["input_ids"], "the prompt is unchanged"
        text, answer = tokenizer.decode(learned), row["messages"][-1]["content"]
        assert text == answer + END if i < 3 else (answer.startswith(text) and "<|im_end|>" not in text)


def test_sft_rows_of_trees_keep_their_system_prompt(model_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_lines(tmp_path / "trees.jsonl", [m for i in range(8) for m in tree(f"t{i}", 0, 1)])
    loading = {"TOKENIZER": tokenizer.name_or_path, "ROWS": "sft", "SYSTEM_PROMPT": "Ты кот.", "MAX_LENGTH": 128}
    run_script(load_oasst_dataset, DATASET=source, OUTPUT_DIR="out", **loading)
    rows = load_answers("out", "train")
    for row in rows:
        assert tokenizer.decode(row["chosen_ids"]) == row["messages"][-1]["content"] + END
        assert "Ты кот." in tokenizer.decode(row["input_ids"])
        assert tokenizer.decode(row["input_ids"]).endswith("assistant\n")
    run_script(train_sft, **SMALL | {"DATA_DIR": "out", "MODEL": model_folder, "MIN_RATING": "0", "OUTPUT_DIR": "run"})
    record = read(tmp_path / "run/run.json")
    assert record["left_out"] == {"low_rating": len(rows) // 2} and record["train_rows"] == len(rows) // 2


def test_answers_below_the_minimum_rating_are_left_out(sample_folder, capsys):
    rows = load_answers(sample_folder, "train")
    ratings = sorted(rows["rating"])
    middle = ratings[len(ratings) // 2]
    kept, left_out = learnable(rows, middle, "here")
    low = sum(rating < middle for rating in ratings)
    assert min(kept["rating"]) == middle and left_out == {"low_rating": low}
    assert f"here: left out of {len(rows)} rows: {low} low_rating" in capsys.readouterr().out
    unrated = rows.map(lambda row: {"rating": None if row["row"] < 3 else row["rating"]}, keep_in_memory=True)
    assert learnable(unrated, 0.0, "here")[1] == {"no_rating": 3} and learnable(unrated, None, "here")[1] == {}
    assert least_rating("") is None and least_rating("-1") == -1.0


def test_the_perplexity_equals_a_plain_loop(finished, model_folder, sample_folder):
    result, rows = read(finished / "eval.json"), load_answers(sample_folder, "validation", 24)
    for side, folder in (("before", model_folder), ("after", finished)):
        total, count = plain_nll(folder, rows)
        assert result["tokens"] == count and result["rows"] == len(rows)
        assert result[f"nll_{side}"] == pytest.approx(total / count, abs=1e-5)
        assert result[f"perplexity_{side}"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["verdict"] == "fell" and result["difference_high"] < 0 and result["p_value"] < 0.05
    logged = lines_of(finished / "metrics.jsonl")
    assert [line["step"] for line in logged if "loss" in line] == [2, 4]
    assert logged[-1]["eval_loss"] == pytest.approx(result["nll_after"], abs=1e-5)
    card = (finished / "README.md").read_text()
    assert f"{result['perplexity_after']:.3f} after" in card and (finished / "training_curves.png").exists()
    assert read(finished / "run.json")["finished"] and not (finished / "checkpoints").exists()


def test_train_dpo_takes_the_folder_as_start_and_reference(finished, options, tmp_path):
    small = {"MODEL": finished, "MAX_STEPS": 1, "REFERENCE_CACHE": "", "SAMPLE_PROMPTS": 0}
    run_script(train_dpo, **options | small)
    measured, result = read(tmp_path / "run/eval.json"), read(finished / "eval.json")
    assert measured["pairs"] == result["rows"]
    mean = -result["nll_after"] * result["tokens"] / result["rows"]
    assert measured["logps_chosen_before"] == pytest.approx(mean, rel=1e-4)
    assert result["nll_after"] < result["nll_before"] - 1e-3, "far enough from the base model"


def test_a_resumed_run_ends_with_the_same_weights(finished, options, tmp_path, monkeypatch):
    real = sft.AnswerTrainer.training_step

    def killed(trainer, *arguments, **named):
        if trainer.state.global_step == 3:
            raise RuntimeError("killed")
        return real(trainer, *arguments, **named)

    monkeypatch.setattr(sft.AnswerTrainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run_script(train_sft, **options | SAVED)
    monkeypatch.setattr(sft.AnswerTrainer, "training_step", real)
    run_script(train_sft, **options | SAVED)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], atol=1e-6, rtol=1e-5)
    results = [read(folder / "eval.json") for folder in (finished, tmp_path / "run")]
    assert results[0]["nll_before"] == results[1]["nll_before"], "of the base model, not of the checkpoint"
    logged = [lines_of(folder / "metrics.jsonl") for folder in (finished, tmp_path / "run")]
    whole, resumed = ([(line["step"], line.get("loss")) for line in lines] for lines in logged)
    assert whole == resumed


def test_adapters_resume_and_a_batch_of_four_equals_four_accumulated_rows(
    model_folder, sample_folder, tokenizer, tmp_path
):
    rows, result = load_answers(sample_folder, "train", 12), {}
    for name, batch, accumulation in (("wide", 4, 1), ("long", 1, 4), ("again", 4, 1)):
        torch.manual_seed(0)
        model = add_lora(load_causal(model_folder), "CAUSAL_LM", 4, 8, 0.0, ("q_proj", "down_proj"))
        folder = tmp_path / name.replace("again", "wide")
        options = {"batch_size": batch, "accumulation": accumulation, "max_steps": 3, "save_every_steps": 1}
        run = toy_run(folder, **options, learning_rate=0.01)
        trainer = sft.answer_trainer(model, rows, tokenizer, run, dict)
        if name == "again":
            shutil.rmtree(folder / "checkpoints/checkpoint-3")
            assert last_checkpoint(folder).endswith("checkpoint-2")
        train(trainer, run)
        result[name] = trained_state(model)
    assert any(value.abs().max() > 1e-3 for name, value in result["wide"].items() if "lora_B" in name)
    for name, value in result["wide"].items():
        torch.testing.assert_close(result["long"][name], value, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(result["again"][name], value, atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(options):
    with pytest.raises(SystemExit, match="the loss is not finite at step 3: lower LEARNING_RATE"):
        run_script(train_sft, **options | {"LEARNING_RATE": 1e30, "WARMUP_SHARE": 0, "SCHEDULE": "constant"})


def test_adapters_learn_with_gradient_checkpointing(options, tmp_path):
    adapted = {"USE_LORA": "true", "GRADIENT_CHECKPOINTING": "true", "LEARNING_RATE": 0.03}
    run_script(train_sft, **options | adapted)
    assert read(tmp_path / "run/eval.json")["verdict"] == "fell"
    assert (tmp_path / "run/adapter/adapter_config.json").exists()


def test_prompts_with_completions_are_checked_and_split(tokenizer, tmp_path):
    good = [{"prompt": f"What{i} about{i} this{i}?", "completion": f"That {i}.", "rating": i % 3} for i in range(10)]
    bad = [good[0], {"prompt": " ", "completion": "x"}, {"prompt": "p", "completion": " "}]
    bad += [{"prompt": "p", "completion": "\ud800"}, {"prompt": "p"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    splits, ledger = answers_of_source(str(path), tokenizer, 128, 42)
    assert (len(splits["train"]), len(splits["validation"])) == (8, 2)
    assert ledger.counts() == {"broken_text": 1, "duplicate": 1, "empty_answer": 2, "empty_prompt": 1}
    assert ledger.totals()["rows_used"] == 10
    for row in [*splits["train"], *splits["validation"]]:
        number = int(row["messages"][-1]["content"].split()[1].rstrip("."))
        assert row["messages"][0] == {"role": "user", "content": good[number]["prompt"]}
        assert tokenizer.decode(row["chosen_ids"]) == f"That {number}.{END}" and row["rating"] == number % 3


def test_too_few_answers_are_reported(tokenizer, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": text} for text in ("x", " ")])
    message = "too few answers: 1 for train, 0 for validation; left out: {'empty_answer': 1"
    with pytest.raises(SystemExit, match=message):
        answers_of_source(str(path), tokenizer, 128, 42)


def test_the_last_answer_of_a_conversation_is_learned(tokenizer, tmp_path):
    def talk(name, *roles):
        return {"messages": [{"role": role, "content": f"{name} {i} {role}{name}"} for i, role in enumerate(roles)]}

    turns = ("system", "user", "assistant", "user", "assistant")
    rows = [talk("a", *turns), talk("b", "user", "assistant", "user"), talk("c", "user"), talk("d", "assistant")]
    rows += [talk("e", "user", "assistant"), talk("f", "user", "tool", "user", "assistant"), {"messages": "no"}]
    (tmp_path / "rows").mkdir()
    write_lines(tmp_path / "rows/train.jsonl", rows)
    write_lines(tmp_path / "rows/test.jsonl", [talk("e", "user", "assistant"), talk("h", "user", "assistant")])
    splits, ledger = answers_of_source(str(tmp_path / "rows"), tokenizer, 128, 42)
    texts = {name: [row["messages"][-1]["content"] for row in part] for name, part in splits.items()}
    assert texts == {"train": ["a 4 assistanta", "b 1 assistantb"], "validation": ["e 1 assistante", "h 1 assistanth"]}
    assert [len(row["messages"]) for row in splits["train"]] == [5, 2]
    assert ledger.counts() == {"bad_turn": 1, "empty_answer": 1, "empty_prompt": 2, "like_validation": 1}
    assert ledger.totals()["rows_read"] == 9


def test_a_file_can_replace_the_data_folder(model_folder, tmp_path):
    rows = [{"prompt": f"What{i} about{i} this{i}?", "completion": f"That {i}."} for i in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    where = {"DATASET": path, "MODEL": model_folder, "OUTPUT_DIR": tmp_path / "run", "CHAT_TEMPLATE": "plain"}
    run_script(train_sft, **SMALL | where | {"MAX_STEPS": 1})
    assert read(tmp_path / "run/eval.json")["rows"] == 4
    assert "User: " in (tmp_path / "run/chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"MIN_RATING": "good"}, "MIN_RATING = 'good': expected a number such as 3.5"),
        ({"MIN_RATING": "9"}, "train has no answer to use: lower MIN_RATING"),
        ({"DATASET": "nowhere.jsonl"}, "DATASET = 'nowhere.jsonl' is not there"),
        ({"DATASET": ROOT / "sample_data/helpsteer_sample.jsonl"}, "needed is one of: messages; completion prompt"),
        ({"DATA_DIR": "nowhere"}, "nowhere is not there yet: run `python load_helpsteer_dataset.py` first"),
        ({"USE_LORA": "true", "LORA_TARGETS": "wings"}, "LORA_TARGETS: no layer is called wings"),
        ({"SCHEDULE": "wild"}, "SCHEDULE = 'wild' is not known"),
    ],
)
def test_user_errors_stop_with_one_message(options, tmp_path, constants, message):
    assert message in error_of(train_sft, **options | constants) and not (tmp_path / "run").exists()
