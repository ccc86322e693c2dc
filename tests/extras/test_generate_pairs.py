"""extras/generate_pairs.py: sampling with top_k and top_p, pairs of generated answers, resuming, user errors."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_from_disk

import train_dpo
from extras import generate_pairs, load_oasst_dataset
from extras.lib import generated
from extras.lib.generated import Answers, PromptRow, pairs_of, remove_end_of_cut_answers
from tests.conftest import error_of, run_script
from tests.source_rows import tree, write_lines
from utils.data.preferences import Ledger
from utils.data.processed import row_features
from utils.data.tokens import end_of_turn, tokenised
from utils.models import generation, reward_model
from utils.models.generation import Answer
from utils.runs import read_json as read
from utils.runs import read_lines

SMALL = {"MAX_ROWS": 12, "MAX_NEW_TOKENS": 8, "BATCH_SIZE": 4, "DEVICE": "cpu", "PRECISION": "fp32"}


def answers_in(folder):
    return {line["number"]: line for line in read_lines(folder / "answers.jsonl")}


@pytest.fixture
def options(model_folder, sample_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": "pairs"}


def one(number, human="A human.", split="train", text="Hi", length=1):
    return PromptRow(number, split, number, text, [{"role": "user", "content": text}], human, [0] * length)


def test_the_human_answer_is_chosen_against_the_generated_one():
    prompts, ledger = [one(i) for i in range(3)] + [one(3, split="validation")], Ledger()
    for each in prompts:
        ledger.read(each.text)
    texts = ["A model.", " ", "A human. ", "Other."]
    written = {i: Answers(i, [text], [i != 3], []) for i, text in enumerate(texts)}
    made = pairs_of(prompts, written, "self_align", ledger)
    assert ledger.counts() == {"empty_answer": 1, "equal_answers": 1} and ledger.totals()["rows_used"] == 2
    ((row,), ended) = made["train"]
    assert [row[side][-1]["content"] for side in ("chosen", "rejected")] == ["A human.", "A model."]
    assert row["chosen_rating"] is None and ended == [(True, True)]
    assert made["validation"][0][0]["rejected"][-1]["content"] == "Other." and made["validation"][1] == [(True, False)]


def test_the_best_of_n_is_chosen_against_the_worst_nonempty_answer():
    prompts, ledger = [one(i) for i in range(4)], Ledger()
    for each in prompts:
        ledger.read(each.text)
    written = {
        0: Answers(0, ["a", "b", "", "c"], [True, False, True, True], [0.5, 2.0, -9.0, -1.0]),
        1: Answers(1, ["a", "a "], [True] * 2, [1.0, 2.0]),
        2: Answers(2, ["", " "], [True] * 2, [1.0, 2.0]),
        3: Answers(3, ["a", "b"], [True] * 2, [1.0, 1.0]),
    }
    made = pairs_of(prompts, written, "ranked", ledger)
    ((row,), ended) = made["train"]
    assert [row[side][-1]["content"] for side in ("chosen", "rejected")] == ["b", "c"]
    assert (row["chosen_rating"], row["rejected_rating"]) == (2.0, -1.0) and ended == [(False, True)]
    assert ledger.counts() == {"empty_answer": 1, "equal_answers": 1, "tie": 1}


def test_a_cut_answer_has_no_end_of_turn(tokenizer):
    prompts = [one(0), one(1), one(2, human="A human. " * 99)]
    written = {i: Answers(i, ["Same words"], [i == 1], []) for i in range(3)}
    rows, ended = pairs_of(prompts, written, "self_align", Ledger())["train"]
    rows = tokenised(Dataset.from_list(rows, features=row_features()), tokenizer, 64)
    result = remove_end_of_cut_answers(rows, ended, tokenizer)
    closing = end_of_turn(tokenizer)
    assert result["rejected_cut"][:] == [True, False, True] and result["chosen_cut"][:] == [False, False, True]
    texts = [tokenizer.decode(ids) for ids in result["rejected_ids"]]
    assert texts == ["Same words", "Same words<|im_end|>\n", "Same words"]
    assert result["chosen_ids"][0][-len(closing) :] == closing and result["chosen_ids"][2] == rows["chosen_ids"][2]
    assert generated.whole_characters("мир и м\ufffd", False) == "мир и м"
    assert generated.whole_characters("what is \ufffd", True) == "what is \ufffd"


def test_a_prompt_is_used_once_with_its_best_human_answer(tokenizer_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [*tree("a", 1, 0, None), *tree("b", 0, 1)]
    source = write_lines(tmp_path / "trees.jsonl", rows)
    loading = {"TOKENIZER": tokenizer_folder, "ROWS": "sft", "SYSTEM_PROMPT": "Ты кот.", "VALIDATION_SHARE": 0}
    run_script(load_oasst_dataset, DATASET=source, OUTPUT_DIR="out", **loading)
    ledger = Ledger()
    prompts = generated.load_prompts("out", 0, tokenizer, 256, ledger)
    assert sorted(each.human for each in prompts) == [rows[2]["text"], rows[5]["text"]], "the answers of rank 0"
    assert all(each.turns[0] == {"role": "system", "content": "Ты кот."} for each in prompts)
    assert ledger.counts() == {"same_prompt": 3} and ledger.rows_read == 5
    assert len({entry["rows"][0] for entry in ledger.entries} | {each.row for each in prompts}) == 5


def test_pairs_stay_in_the_split_of_their_prompt_and_train_dpo_reads_them(options, sample_folder, tokenizer, tmp_path):
    run_script(generate_pairs, **options)
    metadata, answers = read(tmp_path / "pairs/metadata.json"), answers_in(tmp_path / "outputs/pairs")
    assert metadata["counts"]["rows_read"] == 24 == metadata["counts"]["pairs"] + metadata["counts"]["rows_dropped"]
    closing, texts = end_of_turn(tokenizer), {text for line in answers.values() for text in line["texts"]}
    for split in ("train", "validation"):
        before = {row["prompt"]: row for row in load_from_disk(f"{sample_folder}/{split}").select(range(12))}
        rows = load_from_disk(str(tmp_path / "pairs" / split))
        assert len(rows) >= 10
        for row in rows:
            assert row["chosen"] == before[row["prompt"]]["chosen"] and row["rejected"][:-1] == row["chosen"][:-1]
            assert row["rejected"][-1]["content"] in texts
            assert row["rejected_cut"] and row["rejected_ids"][-len(closing) :] != closing, "eight tokens are too few"
    small = {"DATA_DIR": tmp_path / "pairs", "MODEL": options["MODEL"], "OUTPUT_DIR": tmp_path / "dpo"}
    small |= {"MAX_STEPS": 3, "SAMPLE_PROMPTS": 0, "REFERENCE_CACHE": "", "DEVICE": "cpu", "PRECISION": "fp32"}
    run_script(train_dpo, **small, LOG_EVERY_STEPS=1)
    lines = read_lines(tmp_path / "dpo/metrics.jsonl")
    assert len(lines) == 3 and lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_killed_run_resumes_to_the_same_pairs(options, tmp_path, monkeypatch, capsys):
    options = options | {"TEMPERATURE": 1.5, "MAX_ROWS": 6}
    run_script(generate_pairs, **options | {"OUTPUT_DIR": "whole"})
    real, calls = generation.generate, []

    def until_the_third(*arguments, **named):
        calls.append(named["numbers"])
        if len(calls) == 3:
            raise RuntimeError("killed")
        return real(*arguments, **named)

    monkeypatch.setattr(generation, "generate", until_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        run_script(generate_pairs, **options)
    assert not (tmp_path / "pairs").exists() and len(answers_in(tmp_path / "outputs/pairs")) == 8
    with open(tmp_path / "outputs/pairs/answers.jsonl", "ab") as file:
        file.write('{"number": 11, "texts": ["поло'.encode()[:-1])  # an incomplete line that ends within a character
    run_script(generate_pairs, **options)
    assert "8 of 12 prompts are answered already" in capsys.readouterr().out
    assert calls[3:] == calls[2:3], "only the missing answers"
    resumed, whole = (read(tmp_path / name / "metadata.json") for name in ("pairs", "whole"))
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert answers_in(tmp_path / "outputs/pairs") == answers_in(tmp_path / "outputs/whole")
    run_script(generate_pairs, **options | {"OUTPUT_DIR": "other", "BATCH_SIZE": 5})
    assert answers_in(tmp_path / "outputs/other") == answers_in(tmp_path / "outputs/whole"), (
        "the batch size does not matter"
    )


def test_ranked_answers_have_their_rewards(options, tmp_path, monkeypatch):
    def score(talks):
        return torch.tensor([float(len(messages[-1]["content"])) for messages in talks])

    judge = SimpleNamespace(model=torch.nn.Linear(1, 1), score=score)
    monkeypatch.setattr(reward_model, "check_better_than_chance", lambda folder: None)
    monkeypatch.setattr(reward_model.RewardModel, "load", lambda *arguments: judge)
    run_script(generate_pairs, **options | {"MODE": "ranked", "ANSWERS_PER_PROMPT": 3, "MAX_ROWS": 6})
    metadata, answers = read(tmp_path / "pairs/metadata.json"), answers_in(tmp_path / "outputs/pairs")
    assert metadata["rating"] == "reward" and metadata["generated"]["answers"] == 36
    assert all(line["rewards"] == [len(text) for text in line["texts"]] for line in answers.values())
    result = [row for split in ("train", "validation") for row in load_from_disk(f"pairs/{split}")]
    assert len(result) == metadata["train_size"] + metadata["validation_size"] >= 10
    for row in result:
        (line,) = [line for line in answers.values() if row["chosen"][-1]["content"] in line["texts"]]
        assert row["chosen_rating"] == max(line["rewards"]) == len(row["chosen"][-1]["content"])
        assert row["rejected_rating"] == min(line["rewards"]) == len(row["rejected"][-1]["content"])


def test_ctrl_c_keeps_finished_answers(options, tmp_path, monkeypatch, capsys):
    real = generation.generate

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    monkeypatch.setattr(generation, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_script(generate_pairs, **options)
    assert stop.value.code == 130 and len(answers_in(tmp_path / "outputs/pairs")) == 4
    assert "stopped after 4 of 24 prompts: run the same command to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"MODE": "song"}, "MODE = 'song' is not known, choose one of: self_align, ranked"),
        ({"MODE": "ranked", "TEMPERATURE": 0.0}, "MODE = 'ranked' needs different answers"),
        ({"MODE": "ranked", "ANSWERS_PER_PROMPT": 1}, "set ANSWERS_PER_PROMPT to 2 or more"),
        ({"MODE": "ranked", "REWARD_MODEL": "nowhere"}, "REWARD_MODEL = 'nowhere' is not there"),
        ({"DATA_DIR": "nowhere"}, "nowhere is not there yet: run `python load_helpsteer_dataset.py` first"),
        ({"DATA_DIR": ".", "OUTPUT_DIR": "."}, "would overwrite DATA_DIR: choose another name"),
    ],
)
def test_user_errors_stop_with_one_message(options, tmp_path, constants, message):
    assert message in error_of(generate_pairs, **options | constants)
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "outputs").exists()


def test_a_run_without_any_pair_is_reported(options, tmp_path, monkeypatch):
    def silent(model, tokenizer, ids, **named):
        return [Answer(prompt, [2], "", True) for prompt in ids]

    monkeypatch.setattr(generation, "generate", silent)
    with pytest.raises(SystemExit, match="no training pair is left of 24 prompts, left out: {'empty_answer': 24}"):
        run_script(generate_pairs, **options)
    assert not (tmp_path / "pairs").exists()
