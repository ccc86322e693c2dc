"""Guided prompts keep the preference, and log-probs and samples with vectors equal plain loops."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils.data.processed import load_pairs
from utils.models import shared_prompt
from utils.models.generation import float32_head, generate, logps_of, prompts_of, stop_ids
from utils.models.guidance import (
    Guidance,
    guided_rows,
    load_vectors,
    save_vectors,
    start_vectors,
    text_guidance,
    vector_guidance,
)
from utils.models.loading import load_causal
from utils.models.policies import PolicyPairs
from utils.models.shared_prompt import PairCollator, Prompt, answer_logps, check_head, logits_of, token_logps

TEXT = "Please be brief."


@pytest.fixture
def model(model_folder):
    return load_causal(model_folder).eval()


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


def test_log_probs_in_chunks_equal_those_of_the_model(model, monkeypatch):
    ids = torch.randint(3, 600, (1, 40))
    assert check_head(model, ids) < 1e-4
    monkeypatch.setattr(shared_prompt, "ROWS_AT_ONCE", 7)
    assert check_head(model, ids) < 1e-4
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.randint(0, 600, (20,))
    gradients = []
    for temperature in (1.0, 0.7):
        chunked = token_logps(model, hidden, targets, temperature)
        whole = (model.lm_head(hidden) / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
        gradients.append([torch.autograd.grad(x.sum(), [hidden, model.lm_head.weight]) for x in (chunked, whole)])
    for ours, theirs in gradients:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_model_that_scales_its_logits_is_refused(model, sample_folder):
    from utils.models.policies import check_architecture

    rows = load_pairs(sample_folder, "train", 2)
    check_architecture(model, rows)
    forward = model.forward

    def scaled(*arguments, **options):
        result = forward(*arguments, **options)
        result.logits = 3 * result.logits
        return result

    model.forward = scaled
    with pytest.raises(SystemExit, match="changes its logits after the head"):
        check_architecture(model, rows)


def test_greedy_answers_equal_a_plain_loop(model, tokenizer):
    turns = [[{"role": "user", "content": text}] for text in ("Hi", "Why is the sky blue at noon?", "Say yes or no.")]
    prompts = prompts_of(tokenizer, turns, 64)
    together = generate(model, tokenizer, prompts, 12, 0.0, seed=0, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate(model, tokenizer, [prompt], 12, 0.0, seed=1)
        assert answer.ids == alone.ids and answer.prompt == prompt
        ids = list(prompt.ids)
        for token in answer.ids:  # a plain loop
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_answers_are_sampled_from_float32_logits(model, tokenizer):
    (prompt,) = prompts_of(tokenizer, [[{"role": "user", "content": "Hi"}]], 64)
    ids, seen = torch.tensor([prompt.ids]), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state[0, -1:]
        rounded = model(ids).logits[0, -1:]
        with float32_head(model):
            seen.append(model(ids).logits[0, -1:])
    torch.testing.assert_close(seen[0], logits_of(model, hidden, 1.0), atol=1e-6, rtol=0)
    assert rounded.dtype == torch.bfloat16 and "forward" not in vars(model.get_output_embeddings())


def test_sampling_uses_the_whole_distribution_and_depends_only_on_the_seed(model, tokenizer):
    prompts = prompts_of(tokenizer, [[{"role": "user", "content": "Hi"}]], 64) * 2000
    first, again = (generate(model, tokenizer, prompts, 1, 2.0, seed=3, batch_size=size) for size in (2000, 700))
    assert [answer.ids for answer in first] == [answer.ids for answer in again], "whatever the batches are"
    with torch.no_grad():
        p = (model(torch.tensor([prompts[0].ids])).logits[0, -1] / 2.0).softmax(-1)
    drawn = torch.bincount(torch.tensor([answer.ids[0] for answer in first]), minlength=len(p))
    expected = (1 - (1 - p) ** 2000).sum().item()  # different tokens among the draws; top_k would leave 50 at most
    assert (drawn > 0).sum().item() == pytest.approx(expected, rel=0.05) and expected > 100
    likely = p > p.mean()
    assert drawn[likely].sum().item() / 2000 == pytest.approx(p[likely].sum().item(), abs=0.04)


def test_log_probs_of_samples_equal_a_plain_loop(model, tokenizer):
    turns = [[{"role": "user", "content": text}] for text in ("Hi", "Why is the sky blue at noon?")]
    prompts = prompts_of(tokenizer, turns, 64)
    answers = generate(model, tokenizer, prompts, 8, 0.9, seed=0)
    answers[0].ids = [5, 2, 2]  # the end of turn, which is also the padding, counts as often as it was sampled
    for temperature in (1.0, 0.9):
        result = logps_of(model, answers, temperature)
        for answer, logp in zip(answers, result.tolist(), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([answer.prompt.ids + answer.ids])).logits[0] / temperature
            start = len(answer.prompt.ids) - 1
            rows = logits.log_softmax(-1)[start : start + len(answer.ids)]
            expected = sum(rows[i, token].item() for i, token in enumerate(answer.ids))
            assert logp == pytest.approx(expected, abs=1e-3)


def test_answers_stop_at_the_end_of_turn(model, tokenizer):
    assert stop_ids(tokenizer) == [2]
    (prompt,) = prompts_of(tokenizer, [[{"role": "user", "content": "Hi"}]], 64)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt.ids])).last_hidden_state[0, -1]
    model.lm_head.weight.data[2] = hidden * 10
    (answer,) = generate(model, tokenizer, [prompt], 8, 0.0, seed=0)
    assert answer.ids == [2] and answer.ended and answer.text == ""


def test_answers_with_vectors_equal_a_plain_loop(model, tokenizer):
    vectors = torch.randn(4, 32) * 3
    guidance = vector_guidance(tokenizer, vectors)
    turns = [[{"role": "user", "content": text}] for text in ("Hi", "Why is the sky blue at noon?")]
    prompts = guidance.prompts(tokenizer, turns, 64)
    answers = generate(model, tokenizer, prompts, 6, 0.0, seed=0, vectors=vectors)
    result = logps_of(model, answers, vectors=vectors)
    for prompt, answer, logp in zip(prompts, answers, result.tolist(), strict=True):
        ids, total = prompt.ids + answer.ids, 0.0
        embedded = model.get_input_embeddings()(torch.tensor([ids])).detach()
        at = prompt.vectors_at
        assert at == guidance.find(prompt.ids)
        embedded[0, at : at + 4] = vectors
        with torch.no_grad():
            logits = model(inputs_embeds=embedded).logits[0].log_softmax(-1)
        for i, token in enumerate(answer.ids):
            assert logits[len(prompt.ids) - 1 + i].argmax().item() == token
            total += logits[len(prompt.ids) - 1 + i, token].item()
        assert logp == pytest.approx(total, abs=1e-3)


def test_the_reference_uses_the_first_vectors(model):
    vectors = torch.randn(3, 32)
    module = PolicyPairs(model, vectors, True, reference=model)
    batch = PairCollator(2, 8).shared_rows([Prompt([4, 0, 0, 0, 9], vectors_at=1)], [([5, 6], [7])])
    before = module(**batch)
    torch.testing.assert_close(before["logps"], before["reference"])
    module.vectors.data += 1.0
    after = module(**batch)
    torch.testing.assert_close(after["reference"], before["reference"])
    assert not np.allclose(after["logps"].detach(), before["logps"].detach(), atol=1e-4)
