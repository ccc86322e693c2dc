"""Answers are sampled from the whole distribution, and log-probs and entropies equal plain loops."""

import pytest
import torch

from utils.models.generation import (
    batch_of,
    float32_head,
    generate,
    logps_and_entropies_of,
    logps_of,
    prompts_of,
    sampling_processors,
    stop_ids,
)
from utils.models.guidance import vector_guidance
from utils.models.shared_prompt import Prompt, answer_logps_and_entropies, logits_of


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


def test_entropies_equal_a_plain_loop(model, tokenizer):
    answers = generate(model, tokenizer, [Prompt([1, 4, 5]), Prompt([1, 4, 5, 6, 7, 8])], 6, 0.8, seed=0)
    answers[0].ids = [5, 2, 2]
    logps, entropies = logps_and_entropies_of(model, answers, 0.8, "fp32")
    torch.testing.assert_close(logps, logps_of(model, answers, 0.8))
    for answer, result in zip(answers, entropies.tolist(), strict=True):
        with torch.no_grad():
            p = (model(torch.tensor([answer.prompt.ids + answer.ids])).logits[0] / 0.8).softmax(-1)
        start = len(answer.prompt.ids) - 1
        expected = -sum((row * row.log()).sum().item() for row in p[start : start + len(answer.ids)])
        assert result == pytest.approx(expected, rel=1e-4)
    sums, _ = answer_logps_and_entropies(model, batch_of(answers), 0.8)
    assert not sums.requires_grad


def test_the_generation_settings_of_a_model_are_ignored(model, tokenizer):
    """Qwen2.5 sets a penalty of 1.1, top_k 20 and top_p 0.8, with which samples and log-probs would not agree."""
    prompts = [Prompt(ids) for ids in ([1, 4, 5], [1, 6, 7, 8], [1, 9, 9, 9])]
    expected = [answer.ids for answer in generate(model, tokenizer, prompts, 12, 1.0, seed=3)]
    for name, value in {"repetition_penalty": 5.0, "top_k": 2, "top_p": 0.1, "temperature": 0.01}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = True
    assert [answer.ids for answer in generate(model, tokenizer, prompts, 12, 1.0, seed=3)] == expected


def allowed(logits, top_k, top_p):
    """Return the tokens that may be drawn: of the k likeliest, the fewest whose probabilities add up to top_p."""
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
def test_top_k_and_top_p_limit_the_tokens_and_keep_their_ratios(top_k, top_p):
    torch.manual_seed(0)
    logits, temperature, count = torch.randn(30) * 2, 0.7, 3000
    process = sampling_processors(temperature, [(3, i) for i in range(count)], top_k, top_p)
    drawn = process(None, logits.repeat(count, 1)).argmax(dim=1)
    kept = allowed((logits / temperature).tolist(), top_k, top_p)
    assert set(drawn.tolist()) <= set(kept) and len(kept) < 30
    p = (logits[kept] / temperature).softmax(0)
    result = torch.bincount(drawn, minlength=30)[kept] / count
    torch.testing.assert_close(result, p, atol=0.04, rtol=0)
