"""extras/generate_pairs.py: sampling with top_k and top_p, pairs from a policy's answers, going on after a kill."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file

import train_dpo
from extras import generate_pairs, load_oasst_dataset
from extras.lib import generated
from extras.lib.generated import Answers, PromptRow, make_batches, pairs_of, read_answers, remove_end_of_cut_answers
from tests.conftest import run_script
from tests.source_rows import tree, write_lines
from utils.data.preferences import Ledger
from utils.data.processed import row_features
from utils.data.tokens import end_of_turn, tokenised
from utils.models import generation, reward_model
from utils.models.generation import Answer, SeededGumbel, sampling_processors

SMALL = {"MAX_ROWS": 12, "MAX_NEW_TOKENS": 8, "BATCH_SIZE": 4, "DEVICE": "cpu", "PRECISION": "fp32"}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def answers_in(folder):
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    return {line["number"]: line for line in map(json.loads, filter(None, lines))}


@pytest.fixture
def options(model_folder, sample_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SMALL | {"DATA_DIR": sample_folder, "MODEL": model_folder, "OUTPUT_DIR": "pairs"}


# sampling


def allowed(logits, top_k, top_p):
    """The tokens that may be drawn, by the definition: k likeliest, of them the fewest that make up top_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    p = torch.tensor([logits[i] for i in order]).double().softmax(0).tolist()
    kept, mass = [], 0.0
    for i, share in zip(order, p, strict=True):
        if mass >= top_p:
            break
        kept.append(i)
        mass += share
    return kept


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.6), (8, 0.7), (1, 1.0), (3, 0.01)])
def test_only_what_top_k_and_top_p_keep_is_drawn_and_as_often_as_it_should(top_k, top_p):
    torch.manual_seed(0)
    logits, temperature, count = torch.randn(30) * 2, 0.7, 3000
    process = sampling_processors(temperature, [(3, i) for i in range(count)], top_k, top_p)
    drawn = process(None, logits.repeat(count, 1)).argmax(dim=1)
    kept = allowed((logits / temperature).tolist(), top_k, top_p)
    assert set(drawn.tolist()) <= set(kept) and len(kept) < 30
    p = (logits[kept] / temperature).softmax(0)
    found = torch.bincount(drawn, minlength=30)[kept] / count
    torch.testing.assert_close(found, p, atol=0.04, rtol=0)


def test_without_top_k_and_top_p_nothing_changes():
    seeds, logits = [(1, 2), (1, 3)], torch.randn(2, 50)
    assert torch.equal(sampling_processors(0.7, seeds)(None, logits), SeededGumbel(0.7, seeds)(None, logits))
    assert len(sampling_processors(0.0, seeds, 5, 0.5)) == 0, "greedy"


# pairs of answers


def one(number, human="A human.", split="train", text="Hi", length=1):
    return PromptRow(number, split, number, text, [{"role": "user", "content": text}], human, [0] * length)


def test_the_human_answer_is_chosen_and_empty_or_equal_answers_are_counted():
    asked, ledger = [one(i) for i in range(3)] + [one(3, split="validation")], Ledger()
    for each in asked:
        ledger.read(each.text)
    texts = ["A model.", " ", "A human. ", "Other."]
    written = {i: Answers(i, [text], [i != 3], []) for i, text in enumerate(texts)}
    made = pairs_of(asked, written, "self_align", ledger)
    assert ledger.counts() == {"empty_answer": 1, "equal_answers": 1} and ledger.totals()["rows_used"] == 2
    ((row,), ended) = made["train"]
    assert [row[side][-1]["content"] for side in ("chosen", "rejected")] == ["A human.", "A model."]
    assert row["chosen_rating"] is None and ended == [(True, True)]
    assert made["validation"][0][0]["rejected"][-1]["content"] == "Other." and made["validation"][1] == [(True, False)]


def test_the_best_of_n_stands_against_the_worst_that_is_not_empty():
    asked, ledger = [one(i) for i in range(4)], Ledger()
    for each in asked:
        ledger.read(each.text)
    written = {
        0: Answers(0, ["a", "b", "", "c"], [True, False, True, True], [0.5, 2.0, -9.0, -1.0]),
        1: Answers(1, ["a", "a "], [True] * 2, [1.0, 2.0]),
        2: Answers(2, ["", " "], [True] * 2, [1.0, 2.0]),
        3: Answers(3, ["a", "b"], [True] * 2, [1.0, 1.0]),
    }
    made = pairs_of(asked, written, "ranked", ledger)
    ((row,), ended) = made["train"]
    assert [row[side][-1]["content"] for side in ("chosen", "rejected")] == ["b", "c"]
    assert (row["chosen_rating"], row["rejected_rating"]) == (2.0, -1.0) and ended == [(False, True)]
    assert ledger.counts() == {"empty_answer": 1, "equal_answers": 1, "tie": 1}


def test_an_answer_that_was_cut_has_no_end_of_turn(tokenizer):
    asked = [one(0), one(1), one(2, human="A human. " * 99)]
    written = {i: Answers(i, ["Same words"], [i == 1], []) for i in range(3)}
    rows, ended = pairs_of(asked, written, "self_align", Ledger())["train"]
    rows = tokenised(Dataset.from_list(rows, features=row_features()), tokenizer, 64)
    found = remove_end_of_cut_answers(rows, ended, tokenizer)
    closing = end_of_turn(tokenizer)
    assert found["rejected_cut"][:] == [True, False, True] and found["chosen_cut"][:] == [False, False, True]
    assert [tokenizer.decode(ids) for ids in found["rejected_ids"]] == [
        "Same words",
        "Same words<|im_end|>\n",
        "Same words",
    ]
    assert found["chosen_ids"][0][-len(closing) :] == closing and found["chosen_ids"][2] == rows["chosen_ids"][2]


def test_half_a_letter_at_the_end_of_a_cut_answer_goes():
    assert generated.whole_characters("мир и м\ufffd", False) == "мир и м"
    assert generated.whole_characters("what is \ufffd", True) == "what is \ufffd"


def test_a_prompt_is_asked_once_with_its_best_rated_answer(tokenizer_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [*tree("a", 1, 0, None), *tree("b", 0, 1)]
    source = write_lines(tmp_path / "trees.jsonl", rows)
    loading = {"TOKENIZER": tokenizer_folder, "ROWS": "sft", "SYSTEM_PROMPT": "Ты кот.", "VALIDATION_SHARE": 0}
    run_script(load_oasst_dataset, DATASET=source, OUTPUT_DIR="out", **loading)
    ledger = Ledger()
    asked = generated.load_prompts("out", 0, tokenizer, 256, ledger)
    assert sorted(each.human for each in asked) == [rows[2]["text"], rows[5]["text"]], "those of rank 0"
    assert all(each.turns[0] == {"role": "system", "content": "Ты кот."} for each in asked)
    assert ledger.counts() == {"same_prompt": 3} and ledger.rows_read == 5
    assert len({entry["rows"][0] for entry in ledger.entries} | {each.row for each in asked}) == 5


# the script


def test_the_folder_keeps_the_split_and_train_dpo_takes_it(options, sample_folder, tokenizer, tmp_path):
    run_script(generate_pairs, **options)
    metadata, said = read(tmp_path / "pairs/metadata.json"), answers_in(tmp_path / "outputs/pairs")
    assert metadata["counts"]["rows_read"] == 24 == metadata["counts"]["pairs"] + metadata["counts"]["rows_dropped"]
    closing, texts = end_of_turn(tokenizer), {text for line in said.values() for text in line["texts"]}
    for split in ("train", "validation"):
        before = {row["prompt"]: row for row in load_from_disk(f"{sample_folder}/{split}").select(range(12))}
        rows = load_from_disk(str(tmp_path / "pairs" / split))
        assert len(rows) >= 10
        for row in rows:
            assert row["chosen"] == before[row["prompt"]]["chosen"] and row["rejected"][:-1] == row["chosen"][:-1]
            assert row["rejected"][-1]["content"] in texts
            assert row["rejected_cut"] and row["rejected_ids"][-len(closing) :] != closing, "eight tokens are no answer"
    small = {"DATA_DIR": tmp_path / "pairs", "MODEL": options["MODEL"], "OUTPUT_DIR": tmp_path / "dpo"}
    small |= {"MAX_STEPS": 3, "SAMPLE_PROMPTS": 0, "REFERENCE_CACHE": "", "DEVICE": "cpu", "PRECISION": "fp32"}
    run_script(train_dpo, **small, LOG_EVERY_STEPS=1)
    lines = (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_killed_run_goes_on_to_the_same_pairs(options, tmp_path, monkeypatch, capsys):
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
        file.write('{"number": 11, "texts": ["поло'.encode()[:-1])  # half a line that ends in half a letter
    run_script(generate_pairs, **options)
    assert "8 of 12 prompts are answered already" in capsys.readouterr().out
    assert calls[3:] == calls[2:3], "only what was missing"
    assert (
        read(tmp_path / "pairs/metadata.json")["fingerprint"] == read(tmp_path / "whole/metadata.json")["fingerprint"]
    )
    assert answers_in(tmp_path / "outputs/pairs") == answers_in(tmp_path / "outputs/whole")
    run_script(generate_pairs, **options | {"OUTPUT_DIR": "other", "BATCH_SIZE": 5})
    assert answers_in(tmp_path / "outputs/other") == answers_in(tmp_path / "outputs/whole"), "not by batch"


def test_lines_of_a_batch_that_was_not_finished_are_made_again(tmp_path):
    batches = make_batches([one(i, length=n) for i, n in enumerate((3, 9, 9, 1, 5))], 2)
    assert [[each.number for each in batch] for batch in batches] == [[1, 2], [4, 0], [3]], "the longest first"
    path = tmp_path / "answers.jsonl"
    lines = [Answers(number, ["line\u2028break\x85"], [True], [0.5]) for number in (1, 2, 4)]
    generated.append_answers(path, lines)
    found = read_answers(path, batches)
    assert found == {line.number: line for line in lines[:2]} and set(answers_in(tmp_path)) == {1, 2}


def test_another_policy_does_not_go_on_with_the_answers_of_the_first(options, tmp_path, monkeypatch, model_folder):
    def killed(*arguments, **named):
        raise RuntimeError("killed")

    monkeypatch.setattr(generation, "generate", killed)
    shutil.copytree(model_folder, tmp_path / "policy")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            run_script(generate_pairs, **options | {"MODEL": tmp_path / "policy"})
    assert len(list(tmp_path.glob("outputs/pairs*"))) == 1, "the same run"
    state = load_file(tmp_path / "policy/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, tmp_path / "policy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="killed"):
        run_script(generate_pairs, **options | {"MODEL": tmp_path / "policy"})
    assert len(list(tmp_path.glob("outputs/pairs*"))) == 2, "moved aside"


def test_ranked_answers_carry_their_rewards(options, tmp_path, monkeypatch):
    judge = SimpleNamespace(
        model=torch.nn.Linear(1, 1), score=lambda talks: torch.tensor([len(t[-1]["content"]) for t in talks]).float()
    )
    monkeypatch.setattr(reward_model, "check_better_than_chance", lambda folder: None)
    monkeypatch.setattr(reward_model.RewardModel, "load", lambda *arguments: judge)
    run_script(generate_pairs, **options | {"MODE": "ranked", "ANSWERS_PER_PROMPT": 3, "MAX_ROWS": 6})
    metadata, said = read(tmp_path / "pairs/metadata.json"), answers_in(tmp_path / "outputs/pairs")
    assert metadata["rating"] == "reward" and metadata["generated"]["answers"] == 36
    assert all(line["rewards"] == [len(text) for text in line["texts"]] for line in said.values())
    found = [row for split in ("train", "validation") for row in load_from_disk(f"pairs/{split}")]
    assert len(found) == metadata["train_size"] + metadata["validation_size"] >= 10
    for row in found:
        (line,) = [line for line in said.values() if row["chosen"][-1]["content"] in line["texts"]]
        assert row["chosen_rating"] == max(line["rewards"]) == len(row["chosen"][-1]["content"])
        assert row["rejected_rating"] == min(line["rewards"]) == len(row["rejected"][-1]["content"])


def test_ctrl_c_keeps_what_is_answered(options, tmp_path, monkeypatch, capsys):
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
def test_mistakes_end_in_one_line(options, tmp_path, constants, message):
    with pytest.raises(SystemExit) as stop:
        run_script(generate_pairs, **options | constants)
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "outputs").exists()


def test_no_pair_at_all_is_said_and_nothing_is_written(options, tmp_path, monkeypatch):
    def silent(model, tokenizer, ids, **named):
        return [Answer(prompt, [2], "", True) for prompt in ids]

    monkeypatch.setattr(generation, "generate", silent)
    with pytest.raises(SystemExit, match="no training pair is left of 24 prompts, left out: {'empty_answer': 24}"):
        run_script(generate_pairs, **options)
    assert not (tmp_path / "pairs").exists()
