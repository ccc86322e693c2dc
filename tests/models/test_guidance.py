"""Guided prompts keep the preference, and log-probs and samples with vectors equal plain loops."""

import math

import pytest
import torch
from safetensors.torch import save_file

from utils.data.processed import load_pairs
from utils.models.guidance import (
    Guidance,
    guided_rows,
    load_vectors,
    save_vectors,
    start_vectors,
    text_guidance,
    vector_guidance,
)
from utils.models.shared_prompt import PairCollator, answer_logps

TEXT = "Please be brief."


def prompt_of(row):
    return row["input_ids"][: sum(row["attention_mask"])]


def test_a_preference_follows_the_last_user_turn_and_is_never_cut(sample_folder, tokenizer):
    rows = load_pairs(sample_folder, "train", 60)
    guided = guided_rows(rows, tokenizer, 128, text_guidance(TEXT), both=False)
    assert any(rows["prompt_cut"]), "some prompts are cut"
    tail = f"\n\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    for row in guided:
        assert tokenizer.decode(prompt_of(row)).endswith(tail)
        assert len(prompt_of(row)) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 128
        assert row["vectors_at"] == -1


def test_plain_and_guided_prompts_have_the_same_answers(sample_folder, tokenizer):
    rows = load_pairs(sample_folder, "train", 60)
    guided = guided_rows(rows, tokenizer, 128, text_guidance(TEXT), both=True)
    before = {row["row"]: row for row in rows}
    for row in guided:
        old = before[row["row"]]
        assert prompt_of(row) == prompt_of(old) and TEXT in tokenizer.decode(row["guided_ids"])
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert max(len(prompt_of(row)), len(row["guided_ids"])) + longest <= 128
        assert old["chosen_ids"][: len(row["chosen_ids"])] == row["chosen_ids"]


def test_vectors_replace_the_embeddings_of_their_marks_only(sample_folder, tokenizer, model):
    vectors = torch.randn(5, 32)
    guidance = vector_guidance(tokenizer, vectors)
    rows = guided_rows(load_pairs(sample_folder, "train", 20), tokenizer, 128, guidance, both=False)
    for row in rows:
        at, ids = row["vectors_at"], prompt_of(row)
        assert ids[at : at + 5] == [guidance.mark] * 5
        assert tokenizer.decode(ids[at + 5 :]) == "<|im_end|>\n<|im_start|>assistant\n"
    batch = PairCollator(2, 8)(list(rows)[:3])
    with torch.no_grad():
        ours, tokens = answer_logps(model, batch, vectors)
        for i, row in enumerate(list(rows)[:3]):
            ids, at = prompt_of(row), row["vectors_at"]
            for side, answer in enumerate((row["chosen_ids"], row["rejected_ids"])):
                whole = torch.tensor([ids + answer])
                embedded = model.get_input_embeddings()(whole)
                embedded[0, at : at + 5] = vectors
                logps = model(inputs_embeds=embedded).logits[0].log_softmax(-1)
                places = range(len(ids) - 1, len(ids) + len(answer) - 1)
                expected = sum(logps[p, token].item() for p, token in zip(places, answer, strict=True))
                assert ours[i, side].item() == pytest.approx(expected, abs=2e-3) and tokens[i, side] == len(answer)


def test_vectors_start_as_the_embeddings_of_the_text(tokenizer, model):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    weight = model.get_input_embeddings().weight
    assert torch.equal(start_vectors(model, tokenizer, TEXT), weight[ids])


@pytest.mark.parametrize("form", ["tensor", "flat", "prompt_embeddings", "embeddings", "safetensors", "half"])
def test_vectors_are_read_from_every_kind_of_file(tmp_path, form):
    vectors = torch.randn(3, 8)
    contents = {"tensor": vectors, "flat": vectors[0], "half": vectors.half()}
    if form == "safetensors":
        save_vectors(vectors, tmp_path)
        path = tmp_path / "prompt_embedding.safetensors"
    else:
        path = tmp_path / "v.pt"
        torch.save(contents.get(form, {form: vectors}), path)
    result = load_vectors(str(path), 8)
    expected = vectors[:1] if form == "flat" else vectors
    torch.testing.assert_close(result, expected, atol=1e-2 if form == "half" else 0, rtol=0)


def test_files_without_vectors_of_the_right_shape_are_reported(tmp_path):
    cases = {"width.pt": torch.zeros(3, 9), "cube.pt": torch.zeros(2, 2, 8), "list.pt": [1, 2], "none.pt": {"x": 1}}
    cases |= {"empty.pt": torch.zeros(0, 8), "nan.pt": torch.full((1, 8), math.nan), "code.pt": Guidance()}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    save_file({"other": torch.zeros(2, 8)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pt").write_text("no tensor")
    for name in (*cases, "other.safetensors", "text.pt", "missing.pt"):
        with pytest.raises(SystemExit) as stop:
            load_vectors(str(tmp_path / name), 8)
        assert "PROMPT_EMBEDDING_PATH" in str(stop.value) and "\n" not in str(stop.value), name


def test_a_preference_must_fit_beside_the_system_turn(tokenizer, capsys):
    from datasets import Dataset

    from utils.data.tokens import prompt_ids
    from utils.models import guidance

    preference = guidance.text_guidance("Please be brief and kind.")
    system = {"role": "system", "content": "You are a teacher. " * 8}
    whole = {"chosen_ids": [5] * 9, "rejected_ids": [5], "chosen_cut": False, "rejected_cut": False}
    hi = {"role": "user", "content": "Hi"}
    needed = len(prompt_ids(tokenizer, preference.add([system, hi])))
    personas = [system, system, system, {"role": "user", "content": "So"}]
    rows = [{"chosen": [persona, hi], **whole} for persona in personas]
    rows[1] |= {"chosen_ids": [5] * 10}  # one token too many beside this persona
    rows[2] |= {"rejected_cut": True}
    window = needed + 9
    kept = guidance.with_room(tokenizer, preference, window, Dataset.from_list(rows))
    assert [row["chosen"][0]["role"] for row in kept] == ["system", "user"]
    assert "2 of 4 pairs have no room for the preference beside their system turn" in capsys.readouterr().out
    assert len(guidance.with_room(tokenizer, preference, 2 * needed, Dataset.from_list(rows))) == 4
    with pytest.raises(SystemExit, match="PREFERENCE_TEXT does not fit: a short prompt with it takes"):
        guidance.with_room(tokenizer, preference, 40, Dataset.from_list(rows))
    with pytest.raises(SystemExit, match="PREFERENCE_TEXT does not fit beside the system turn of any row"):
        guidance.with_room(tokenizer, preference, window, Dataset.from_list(rows[1:3]))
