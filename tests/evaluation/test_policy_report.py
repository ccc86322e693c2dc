"""Comparisons of policies: equal ones do not differ, a planted better one is found, best of n is the best."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from utils.evaluation.policy_report import Answers, Sampler, comparison_of
from utils.models.generation import Answer, generate, logps_of, prompts_of, repetition
from utils.models.shared_prompt import Prompt

PROMPTS = [
    [{"role": "user", "content": text}] for text in ("Hi", "Why?", "Say yes.", "One", "Two", "Three", "Go", "On")
]


class Judge:
    """Reward the number of letters e in an answer."""

    def score(self, conversations):
        return torch.tensor([float(messages[-1]["content"].count("e")) for messages in conversations])


@pytest.fixture
def sampler(tokenizer):
    return Sampler(tokenizer, max_length=64, max_new_tokens=16, temperature=1.0, seed=5, precision="fp32")


@pytest.fixture
def start(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture
def better(model_folder, tokenizer):
    """Return the start with a bias towards the letter e."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head = torch.nn.Linear(32, len(tokenizer), bias=True)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.lm_head.bias.data.zero_()[tokenizer.convert_tokens_to_ids("e")] = 8.0
    return model


def rewards_of(answers):
    return np.array([answer.text.count("e") for answer in answers.answers], dtype=float)


def test_equal_policies_do_not_differ(sampler, start, model_folder):
    before = sampler.answers(start, start, PROMPTS)
    after = sampler.answers(AutoModelForCausalLM.from_pretrained(model_folder), start, PROMPTS)
    assert [answer.ids for answer in before.answers] == [answer.ids for answer in after.answers]
    result = comparison_of(before, after, (rewards_of(before), rewards_of(after)))
    assert result["verdict"] == "not shown" and result["win_rate"] == 0.5 and result["difference"] == 0.0
    assert result["kl"] == pytest.approx(0.0, abs=1e-4) and result["p_value"] == 1.0
    assert result["length_before"] == result["length_after"] and result["ended_before"] == result["ended_after"]


def test_a_planted_better_policy_is_found(sampler, start, better):
    before, after = sampler.answers(start, start, PROMPTS), sampler.answers(better, start, PROMPTS)
    result = comparison_of(before, after, (rewards_of(before), rewards_of(after)))
    assert result["verdict"] == "grew" and result["difference_low"] > 0 and result["win_rate"] > 0.8
    expected = (logps_of(better, after.answers) - logps_of(start, after.answers)).numpy()
    assert after.kl == pytest.approx(expected, abs=1e-3) and result["kl"] == pytest.approx(expected.mean(), abs=1e-3)
    assert result["kl_error"] == pytest.approx(expected.std(ddof=1) / len(expected) ** 0.5, abs=1e-3)
    assert result["kl"] > 1 and (before.kl == 0).all()
    assert result["repetition_after"] > result["repetition_before"], "it repeats the letter e"


def test_best_of_n_is_the_best_of_n_answers_of_the_start(sampler, start):
    before, best = sampler.answers(start, start, PROMPTS), sampler.best_of(4, start, PROMPTS, Judge())
    one = sampler.best_of(1, start, PROMPTS, Judge())
    assert [answer.ids for answer in one.answers] == [answer.ids for answer in before.answers]
    assert one.kl_bound == 0 and best.kl_bound == pytest.approx(math.log(4) - 3 / 4)
    assert best.kl is None, "there is only a bound"
    tries = [Sampler(**vars(sampler) | {"seed": 5 + i}).answers(start, start, PROMPTS) for i in range(4)]
    assert rewards_of(best).tolist() == np.max([rewards_of(one) for one in tries], axis=0).tolist()
    assert rewards_of(best).sum() > rewards_of(before).sum()


def test_compared_answers_differ_from_those_of_a_training_with_the_same_seed(sampler, start):
    prompts = prompts_of(sampler.tokenizer, PROMPTS, 64)
    compared_with = [answer.ids for answer in sampler.answers(start, start, PROMPTS).answers]
    trained_on = generate(start, sampler.tokenizer, prompts, 16, 1.0, sampler.seed, numbers=range(len(prompts)))
    assert not any(one == other.ids for one, other in zip(compared_with, trained_on, strict=True))


def test_answers_are_measured_by_length_end_and_repetition():
    assert repetition([1, 2, 3, 4]) == 0.0 and repetition([1, 2]) == 0.0 and repetition([1] * 12) == 0.9
    prompt = Prompt([9])
    answers = Answers([Answer(prompt, [1, 2, 1, 2], "", True), Answer(prompt, [1, 2], "", False)], np.zeros(2))
    assert answers.metrics() == {"length": 3.0, "ended": 0.5, "repetition": 0.0}
    again = Answers([Answer(prompt, [1] * 12, "", True), Answer(prompt, [1, 2, 3], "", True)], np.zeros(2))
    assert again.metrics()["repetition"] == pytest.approx(0.9 / 2)


def test_the_gain_at_equal_length_is_after_minus_before():
    random = np.random.default_rng(0)
    sizes = random.integers(2, 30, size=(2, 60))
    sides = [Answers([Answer(Prompt([9]), [1] * size, "", True) for size in some], np.zeros(60)) for some in sizes]
    before = random.normal(size=60)
    after = before + 0.7 * (np.log(sizes[1]) - np.log(sizes[0])) - 0.4 + 0.01 * random.normal(size=60)
    result = comparison_of(*sides, (before, after))["difference_at_equal_length"]
    assert result["difference"] == pytest.approx(-0.4, abs=0.01) and result["low"] < -0.39 and result["high"] > -0.41
