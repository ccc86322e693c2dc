"""train_dpo.py from end to end: run names, folders, the reference cache, guidance, two processes, user errors."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from tests.conftest import SAMPLE, error_of, run_process, run_script
from utils.models import policies
from utils.runs import read_json as read
from utils.runs import read_lines as lines_of

SMALL = {"MAX_STEPS": 4, "LOG_EVERY_STEPS": 2, "MAX_ROWS": 30, "PRECISION": "fp32", "DEVICE": "cpu"}
SMALL |= {"LEARNING_RATE": 1e-3, "SAMPLE_PROMPTS": 3, "MAX_NEW_TOKENS": 8}


@pytest.fixture
def options(model_folder, sample_folder, tmp_path):
    where = {"DATA_DIR": sample_folder, "MODEL": model_folder, "REFERENCE_CACHE": tmp_path / "cache"}
    return SMALL | where | {"OUTPUT_DIR": tmp_path / "run"}


def test_the_run_folder_is_complete_and_loads_in_plain_transformers(options, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_script(train_dpo, **options | {"OUTPUT_DIR": "", "MODEL_SHORT_NAME": "Tiny"})
    folder = tmp_path / "model_output/HelpSteer_dpo_Plain/HelpSteer-Plain-Tiny-dpo-beta0.1-alpha0.1"
    result = read(folder / "eval.json")
    assert result["pairs"] > 5 and result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]
    assert {"margin", "loss", "kl", "kl_error", "logps_chosen", "logps_chosen_before"} <= set(result)
    samples = lines_of(folder / "samples.jsonl")
    assert len(samples) == 3 and all({"prompt", "before", "after"} <= set(sample) for sample in samples)
    first = lines_of(folder / "metrics.jsonl")[0]
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names <= set(first) and first["loss"] == pytest.approx(0.693, abs=0.05)
    assert (folder / "training_curves.png").exists() and "Tiny" in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[1] > 2
    before, after = load_file(f"{model_folder}/model.safetensors"), load_file(folder / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_second_run_reads_the_reference_from_the_cache(options, tmp_path, monkeypatch):
    forwards = []
    real = policies.forward_pairs
    monkeypatch.setattr(policies, "forward_pairs", lambda *a: forwards.append(1) or real(*a))
    run_script(train_dpo, **options)
    assert len(forwards) == 2, "train and validation"
    run_script(train_dpo, **options | {"OUTPUT_DIR": tmp_path / "again"})
    assert len(forwards) == 2, "nothing is computed again"
    run_script(train_dpo, **options | {"OUTPUT_DIR": tmp_path / "fly", "REFERENCE_CACHE": ""})
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "again", "fly")]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], weights[2][name], atol=1e-4, rtol=1e-3)
    results = [read(tmp_path / name / "eval.json") for name in ("run", "fly")]
    assert results[0]["margin"] == pytest.approx(results[1]["margin"], abs=1e-3)


def test_the_cache_is_never_stale(options, model_folder, tokenizer_folder, tmp_path, monkeypatch):
    """Another window, precision, guidance or other weights need new log-probs. Another loss does not."""
    import load_helpsteer_dataset

    forwards = []
    real = policies.forward_pairs
    monkeypatch.setattr(policies, "forward_pairs", lambda *a: forwards.append(1) or real(*a))
    options = options | {"SAMPLE_PROMPTS": 0, "MAX_STEPS": 2}

    def computed(**changes):
        forwards.clear()
        run_script(train_dpo, **options | changes | {"OUTPUT_DIR": tmp_path / f"run{len(list(tmp_path.iterdir()))}"})
        return len(forwards)

    assert computed() == 2 and computed() == 0
    source = {"DATASET": SAMPLE, "TOKENIZER": tokenizer_folder, "MAX_LENGTH": 96, "MAX_ROWS": 160}
    run_script(load_helpsteer_dataset, **source, OUTPUT_DIR=tmp_path / "narrow")
    assert computed(DATA_DIR=tmp_path / "narrow") == 2
    shutil.copytree(model_folder, tmp_path / "other")
    state = load_file(tmp_path / "other/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.01
    save_file(state, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    assert computed(MODEL=tmp_path / "other") == 2
    assert computed(PRECISION="bf16") == 2
    assert computed(GUIDANCE="text") == 2
    assert computed(GUIDANCE="embedding") == 2 and computed(GUIDANCE="embedding", PREFERENCE_TEXT="Be brief.") == 2
    assert computed(LOSS="ipo") == 0, "sums and numbers of tokens give the means"
    reference = read(sorted(tmp_path.glob("run*"), key=os.path.getmtime)[-1] / "eval.json")
    assert reference["logps_chosen_before"] < -20, "sums, whatever the loss divides them by"


@pytest.mark.parametrize("loss", ["dpo", "new_pref_po"])
def test_another_run_can_use_trained_vectors(options, tmp_path, loss):
    guided = {"LOSS": loss, "GUIDANCE": "embedding", "PREFERENCE_TEXT": "~~~~", "TRAIN_POLICY": "false"}
    run_script(train_dpo, **options | guided | {"PROMPT_LEARNING_RATE": 1.0})
    moved = abs(read(tmp_path / "run/eval.json")["kl"]) > 1e-4
    assert moved == (loss == "dpo"), "only the answers of dpo are generated with the vectors"
    vectors = load_file(tmp_path / "run/prompt_embedding.safetensors")["prompt_embeddings"]
    assert vectors.shape == (4, 32)
    path = tmp_path / "run/prompt_embedding.safetensors"
    again = {"LOSS": loss, "GUIDANCE": "embedding", "PROMPT_EMBEDDING_PATH": path, "OUTPUT_DIR": tmp_path / "again"}
    run_script(train_dpo, **options | again)
    assert not (tmp_path / "again/prompt_embedding.safetensors").exists(), "loaded vectors are not trained"
    before = load_file(f"{options['MODEL']}/model.safetensors")
    frozen, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(before[name], frozen[name]) for name in before)
    assert not torch.equal(before["model.norm.weight"], trained["model.norm.weight"])


def test_a_reward_model_is_refused_as_a_policy(options, judges):
    with pytest.raises(SystemExit, match=r"MODEL = .* is a reward model: name a language model"):
        run_script(train_dpo, **options | {"MODEL": judges["scalar"]})


@pytest.mark.parametrize("variable", [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")])
def test_launchers_that_shard_the_weights_are_refused(options, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    with pytest.raises(SystemExit, match="the scripts here need them whole: use configs/multi_gpu.yaml"):
        run_script(train_dpo, **options)
    assert not (tmp_path / "run").exists()


def test_training_can_start_from_an_adapter_which_is_also_the_reference(options, tmp_path):
    run_script(train_dpo, **options | {"USE_LORA": "true", "LORA_RANK": 4, "LOSS": "sipa"})
    adapter, merged = tmp_path / "run/adapter", tmp_path / "run"
    logps = []
    for name, start in (("a", adapter), ("b", merged)):
        run_script(train_dpo, **options | {"MODEL": start, "OUTPUT_DIR": tmp_path / name, "SAMPLE_PROMPTS": 0})
        logps.append(read(tmp_path / name / "eval.json")["logps_chosen_before"])
    assert logps[0] == pytest.approx(logps[1], rel=1e-4)
    assert logps[0] == pytest.approx(read(tmp_path / "run/eval.json")["logps_chosen"], rel=1e-3)
    assert logps[0] != pytest.approx(read(tmp_path / "run/eval.json")["logps_chosen_before"], rel=1e-6)


def test_a_reward_model_compares_before_and_after(options, judges, tmp_path):
    run_script(train_dpo, **options | {"REWARD_MODEL": judges["scalar"]})
    result = read(tmp_path / "run/eval.json")["comparison"]
    samples = lines_of(tmp_path / "run/samples.jsonl")
    assert result["prompts"] == 3 and result["verdict"] in ("grew", "fell", "not shown")
    assert result["mean_reward_after"] == pytest.approx(np.mean([s["reward_after"] for s in samples]))
    assert result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(options, tmp_path):
    options = options | {"SAMPLE_PROMPTS": 0, "BATCH_SIZE": 2, "LOSS": "ipo"}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29561")
    runs = {"two": (launcher, 1), "one": ((), 2)}
    for name, (how, accumulation) in runs.items():
        mine = options | {"OUTPUT_DIR": tmp_path / name, "ACCUMULATION": accumulation}
        run_process("train_dpo.py", mine, *how)
    assert read(tmp_path / "two/run.json")["processes"] == 2
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4)
    logged = [[line["loss"] for line in lines_of(tmp_path / name / "metrics.jsonl")] for name in runs]
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)
    results = [read(tmp_path / name / "eval.json") for name in runs]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["margin"] == pytest.approx(results[1]["margin"], abs=1e-5)


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"LOSS": "kto"}, "LOSS = 'kto' is not known, choose one of: dpo, ipo, hinge, sipa, orpo, simpo, new_pref_po"),
        ({"GUIDANCE": "song"}, "GUIDANCE = 'song' is not known, choose one of: none, text, embedding"),
        ({"LOSS": "new_pref_po"}, "LOSS = 'new_pref_po' needs a preference in the prompt: set GUIDANCE"),
        ({"GUIDANCE": "text", "PREFERENCE_TEXT": " "}, "PREFERENCE_TEXT is empty"),
        ({"GUIDANCE": "embedding", "PROMPT_EMBEDDING_PATH": "no.pt"}, "PROMPT_EMBEDDING_PATH = 'no.pt' is not a file"),
        ({"TRAIN_POLICY": "false"}, "TRAIN_POLICY = False trains the vectors only"),
        ({"LABEL_SMOOTHING": 0.1, "LOSS": "ipo"}, "LABEL_SMOOTHING = 0.1 has no effect with LOSS = 'ipo'"),
        ({"PROMPT_EMBEDDING_PATH": "x.pt"}, "PROMPT_EMBEDDING_PATH needs GUIDANCE = embedding"),
        ({"SEED": -1}, "SEED = -1: expected 0 or more"),
        ({"WARMUP_SHARE": 2.0}, "WARMUP_SHARE = 2.0: expected a number from 0 to 1"),
        ({"BETA": -1.0}, "BETA = -1.0: expected 0 or more"),
        ({"REWARD_MODEL": "nowhere"}, "REWARD_MODEL = 'nowhere' is not there"),
        ({"GUIDANCE": "embedding", "PREFERENCE_TEXT": "word " * 200}, "vectors does not fit"),
        ({"GUIDANCE": "text", "PREFERENCE_TEXT": "word " * 200}, "PREFERENCE_TEXT does not fit"),
    ],
)
def test_user_errors_stop_with_one_message(options, tmp_path, constants, message):
    assert message in error_of(train_dpo, **options | constants) and not (tmp_path / "run").exists()
