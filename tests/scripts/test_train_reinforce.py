"""train_reinforce.py from end to end: its folder, held-out prompts, resuming, alarms, two processes, user errors."""

import shutil

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_reinforce
from extras.lib.frontier import check_judge
from tests.conftest import error_of, run_process, run_script
from utils.runs import read_json as read
from utils.runs import read_lines as lines_of
from utils.runs import write_json
from utils.training import reinforce

SMALL = {"MAX_STEPS": 4, "BATCH_SIZE": 2, "MAX_NEW_TOKENS": 8, "EVAL_PROMPTS": 6, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3, "SAVE_EVERY_STEPS": 2}


@pytest.fixture
def options(model_folder, sample_folder, judges, tmp_path):
    where = {"DATA_DIR": sample_folder, "MODEL": model_folder, "REWARD_MODEL": judges["scalar"]}
    return SMALL | where | {"OUTPUT_DIR": tmp_path / "run"}


def test_the_run_folder_is_complete_and_loads_in_plain_transformers(options, judges, model_folder, tmp_path):
    run_script(train_reinforce, **options | {"JUDGE_MODEL": judges["distribution"]})
    folder = tmp_path / "run"
    result, metrics = read(folder / "eval.json"), lines_of(folder / "metrics.jsonl")
    fields = "prompts mean_reward_before mean_reward_after difference difference_low difference_high p_value win_rate"
    fields += " win_rate_low win_rate_high kl kl_error length_before length_after ended_after repetition_after verdict"
    for measured in (result, result["judge"]):
        assert set(fields.split()) <= set(measured) and measured["prompts"] == 6
        assert measured["verdict"] in ("grew", "fell", "not shown")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    names = "loss reward reward_std baseline advantage kl entropy grad_norm learning_rate tokens_per_second"
    assert all(set(names.split()) <= set(line) for line in metrics) and metrics[0]["kl"] == 0.0
    assert metrics[0]["baseline"] == pytest.approx(metrics[0]["reward"], abs=1e-5), "the first step initialises it"
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (model_folder, folder))
    assert all(not torch.equal(before[name], after[name]) for name in before), "every weight moved"
    predictions = lines_of(folder / "predictions.jsonl")
    for name in ("before", "after"):
        mean = sum(line[f"reward_{name}"] for line in predictions) / 6
        assert result[f"mean_reward_{name}"] == pytest.approx(mean)
    assert result["kl"] == pytest.approx(sum(line["log_ratio"] for line in predictions) / 6, abs=1e-6)
    assert (folder / "training_curves.png").exists() and "REINFORCE" in (folder / "README.md").read_text()
    assert not (folder / "checkpoints").exists() and read(folder / "run.json")["finished"]


def test_no_prompt_of_the_evaluation_is_trained_on(options, sample_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforce, "SAMPLE_EVERY_STEPS", 1)
    run_script(train_reinforce, **options | {"MAX_NEW_TOKENS": 2})
    train = {messages[-2]["content"] for messages in load_from_disk(f"{sample_folder}/train")["chosen"]}
    sampled = {line["prompt"] for line in lines_of(tmp_path / "run/samples.jsonl")}
    assert len(sampled) == 4 and sampled <= train
    held_out = {line["prompt"] for line in lines_of(tmp_path / "run/predictions.jsonl")}
    assert held_out <= set(load_from_disk(f"{sample_folder}/validation")["prompt"]) and not held_out & train


@pytest.mark.parametrize(
    "constants",
    [
        {"BASELINE": "leave_one_out", "ANSWERS_PER_PROMPT": 2, "ADVANTAGE_NORM": "std"},
        {"USE_LORA": "true", "BASELINE": "running_mean"},
        {"CUT_PENALTY": 1.0, "BASELINE_DECAY": 0.5},
        {"RISK": 0.5, "REWARD_MODEL": "distribution", "BASELINE": "none"},
        {"REWARD_MODEL": "distribution", "TEMPERATURE": 0.7, "GRADIENT_CHECKPOINTING": "true"},
    ],
)
def test_constants_can_be_combined(options, judges, tmp_path, constants):
    named = {"REWARD_MODEL": judges[constants.get("REWARD_MODEL", "scalar")]}
    run_script(train_reinforce, **options | constants | named | {"MAX_STEPS": 2})
    assert len(lines_of(tmp_path / "run/metrics.jsonl")) == 2 and read(tmp_path / "run/eval.json")["prompts"] == 6


def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path, monkeypatch):
    run_script(train_reinforce, **options | {"OUTPUT_DIR": tmp_path / "whole"})
    alarm, calls = reinforce.divergence_alarm, []

    def killed_in_the_fourth_step(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt  # step 4 is done and logged, but in no checkpoint
        return alarm(*arguments)

    monkeypatch.setattr(reinforce, "divergence_alarm", killed_in_the_fourth_step)
    with pytest.raises(SystemExit) as stop:
        run_script(train_reinforce, **options | {"MAX_STEPS": 6})
    assert stop.value.code == 130 and not (tmp_path / "run/eval.json").exists()
    cut_off = tmp_path / "run/checkpoints/checkpoint-4"
    cut_off.mkdir()  # killed while saving: not marked as complete
    (cut_off / "state.pt").write_bytes(b"half")
    monkeypatch.setattr(reinforce, "divergence_alarm", alarm)
    run_script(train_reinforce, **options | {"MAX_STEPS": 6})
    run_script(train_reinforce, **options | {"MAX_STEPS": 6, "OUTPUT_DIR": tmp_path / "whole"})
    one, other = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(one, other, strict=True):
        assert mine | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert lines_of(tmp_path / "run/samples.jsonl") == lines_of(tmp_path / "whole/samples.jsonl")


def test_an_alarm_saves_the_state_and_ends_the_run(options, tmp_path, monkeypatch):
    from accelerate import Accelerator

    from utils.training.reinforce import Engine

    order, save, wait = [], Engine.save, Accelerator.wait_for_everyone
    monkeypatch.setattr(Engine, "save", lambda *args: (save(*args), order.append("saved")))
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: (wait(self), order.append("waited")))
    with pytest.raises(SystemExit, match="stopped at step 2, checkpoint saved: KL .* is over KL_LIMIT = 1e-06"):
        run_script(train_reinforce, **options | {"KL_LIMIT": 1e-6, "LEARNING_RATE": 1e-2, "SAVE_EVERY_STEPS": 0})
    assert order == ["waited", "saved", "waited"], "other processes wait for the one that saves"
    assert (tmp_path / "run/checkpoints/checkpoint-2/state.pt").exists()


def test_a_run_is_not_resumed_with_another_reward_model(options, judges, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(judges["scalar"], judge)
    with pytest.raises(SystemExit, match="KL_LIMIT"):
        run_script(train_reinforce, **options | {"REWARD_MODEL": judge, "KL_LIMIT": 1e-9, "LEARNING_RATE": 0.1})
    assert lines_of(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(judge)
    shutil.copytree(judges["distribution"], judge)
    with pytest.raises(SystemExit, match="KL_LIMIT"):
        run_script(train_reinforce, **options | {"REWARD_MODEL": judge, "KL_LIMIT": 1e-9, "LEARNING_RATE": 0.1})
    assert len(list(tmp_path.glob("run-*"))) == 1, "moved aside, begun anew"


@pytest.mark.slow
def test_two_processes_equal_one(options, tmp_path):
    options = options | {"GENERATION_BATCH": 2, "BATCH_SIZE": 4}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29562")
    for name, how in {"two": launcher, "one": ()}.items():
        run_process("train_reinforce.py", options | {"OUTPUT_DIR": tmp_path / name}, *how)
    assert read(tmp_path / "two/run.json")["processes"] == 2
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    start = load_file(f"{options['MODEL']}/model.safetensors")
    for name in one:  # norms, not entries: Adam takes a full step even if a gradient is mostly rounding
        moved, apart = (one[name] - start[name]).norm(), (two[name] - one[name]).norm()
        assert moved > 0 and apart <= 1e-3 * moved, f"{name}: {apart:.2e} apart after moving {moved:.2e}"
    logged = [lines_of(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    for mine, theirs in zip(*logged, strict=True):
        for key in ("loss", "reward", "baseline", "kl", "completions/mean_length", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-4), key


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"BASELINE": "median"}, "BASELINE = 'median' is not known, choose one of: moving_average, running_mean"),
        ({"BASELINE": "leave_one_out"}, "BASELINE = 'leave_one_out' compares the answers to one prompt"),
        ({"ADVANTAGE_NORM": "max"}, "ADVANTAGE_NORM = 'max' is not known"),
        ({"TEMPERATURE": 0.0}, "TEMPERATURE = 0.0: expected more than 0"),
        ({"RISK": 1.0}, "RISK = 1.0 needs the spread of a distribution"),
        ({"REWARD_MODEL": "nowhere"}, "REWARD_MODEL = 'nowhere' is not there"),
        ({"JUDGE_MODEL": "nowhere"}, "JUDGE_MODEL = 'nowhere' is not there"),
        ({"DATA_DIR": "nowhere"}, "nowhere is not there yet: run `python load_helpsteer_dataset.py` first"),
        ({"MAX_STEPS": 0}, "MAX_STEPS = 0, MAX_NEW_TOKENS = 8: expected at least 1 step"),
        ({"SEED": -1}, "SEED = -1: expected 0 or more"),
        ({"BASELINE_DECAY": 1.5}, "BASELINE_DECAY = 1.5: expected a number from 0 to 1"),
        ({"MAX_NEW_TOKENS": 1}, "MAX_NEW_TOKENS = 1: expected at least 1 step and 2 tokens"),
    ],
)
def test_user_errors_stop_with_one_message(options, tmp_path, constants, message):
    assert message in error_of(train_reinforce, **options | constants) and not (tmp_path / "run").exists()


def test_a_judge_that_a_policy_was_trained_on_is_refused(options, judges, tmp_path):
    same = f"{judges['scalar']}/../scalar"
    with pytest.raises(SystemExit, match="is REWARD_MODEL itself"):
        run_script(train_reinforce, **options | {"JUDGE_MODEL": same})
    settings = {"REWARD_MODEL": judges["scalar"], "MODEL": str(tmp_path / "start"), "DATA_DIR": str(tmp_path / "rows")}
    write_json(tmp_path / "run.json", {"script": "train_dpo.py", "settings": settings})
    check_judge({"a": str(tmp_path)}, same)  # DPO does not learn from its reward model
    for name, kind, content in (
        ("start", "run.json", {"script": "train_reinforce.py", "settings": settings | {"MODEL": ""}}),
        ("rows", "metadata.json", {"settings": {"MODE": "ranked", "REWARD_MODEL": judges["scalar"]}}),
    ):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / kind, content)
        with pytest.raises(SystemExit, match="was trained on: name one that no policy was trained on"):
            check_judge({"a": str(tmp_path)}, same)
        shutil.rmtree(tmp_path / name)
    (tmp_path / "rows").mkdir()
    metadata = {"settings": {"MODE": "ranked", "REWARD_MODEL": judges["distribution"]}}
    write_json(tmp_path / "rows/metadata.json", metadata)
    write_json(tmp_path / "run.json", {"script": "train_reinforce.py", "settings": settings})
    check_judge({"a": str(tmp_path), "b": "nowhere"}, judges["distribution"])
    with pytest.raises(SystemExit, match="was trained on: name one that no policy was trained on"):
        check_judge({"a": str(tmp_path)}, same)


def test_a_reward_model_worse_than_a_coin_is_refused(options, judges, tmp_path):
    result = {"accuracy": 0.3, "accuracy_high": 0.4, "pairs": 100, "verdict": "worse than longer wins"}
    folder = tmp_path / "bad"
    shutil.copytree(judges["scalar"], folder)
    write_json(folder / "eval.json", result)
    with pytest.raises(SystemExit, match="is worse than a coin"):
        run_script(train_reinforce, **options | {"REWARD_MODEL": folder})
    policy = tmp_path / "policy"
    shutil.copytree(options["MODEL"], policy)
    write_json(policy / "eval.json", {"difference": 0.1, "verdict": "grew"})
    with pytest.raises(SystemExit, match="is not a reward model with one output"):
        run_script(train_reinforce, **options | {"REWARD_MODEL": policy})
