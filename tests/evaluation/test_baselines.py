"""The shortcuts that a reward model must beat: surface measures of answers, changed prompts."""

import numpy as np
import pytest

from utils.data.processed import load_pairs
from utils.evaluation.baselines import SURFACE, fit_logistic, shuffled_prompts, surface, without_prompts


def test_surface_measures_count_marks_and_words():
    answer = "I'm sorry, **no**.\n\n- one\n- two\n\n```\ncode\n```\nWhy? Why?"
    result = dict(zip(SURFACE, surface("Why is the code red?", answer), strict=True))
    assert result["log_length"] == pytest.approx(np.log1p(len(answer))) and result["apology"] == 1.0
    counts = {"line_breaks": 8, "list_items": 2, "code_fences": 2, "bold_marks": 2, "question_marks": 2}
    assert {name: result[name] for name in counts} == pytest.approx({n: np.log1p(c) for n, c in counts.items()})
    assert result["words_of_the_prompt"] == pytest.approx(2 / 5) and 0.5 < result["distinct_words"] < 1
    assert surface("", "") == [0.0] * 9
    assert surface("x", "I cannot say, can't I?")[7] == 1.0 and surface("x", "A candid can of paint")[7] == 0.0


def test_logistic_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    x = random.normal(size=(200, 3)) * np.array([1.0, 5.0, 0.0])
    x = np.where((random.random(200) < 1 / (1 + np.exp(-x @ [1.0, -0.3, 0.0])))[:, None], x, -x)
    scale = np.where(x.any(0), np.sqrt((x**2).mean(0)), 1.0)
    both, label = np.concatenate([x, -x]) / scale, np.repeat([1, 0], 200)
    theirs = LogisticRegression(fit_intercept=False, C=0.5, tol=1e-8).fit(both, label).coef_[0] / scale  # rows twice
    assert fit_logistic(x, ridge=1.0) == pytest.approx(theirs, abs=1e-4)
    assert fit_logistic(x)[0] > 0.5 and fit_logistic(x)[1] < -0.1 and fit_logistic(x)[2] == 0.0


def test_prompts_are_removed_or_shuffled_and_answers_stay(sample_folder, tokenizer):
    rows = load_pairs(sample_folder, "train", 30)
    empty, shuffled = without_prompts(rows, tokenizer), shuffled_prompts(rows)
    prompts = [row["input_ids"][: sum(row["attention_mask"])] for row in empty]
    assert tokenizer.decode(prompts[0]) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert all(prompt == prompts[0] for prompt in prompts)
    assert all(ids != other for ids, other in zip(rows["input_ids"], shuffled["input_ids"], strict=True))
    assert sorted(map(tuple, rows["input_ids"])) == sorted(map(tuple, shuffled["input_ids"]))
    for changed in (empty, shuffled):
        assert list(changed["chosen_ids"]) == list(rows["chosen_ids"]) and list(changed["row"]) == list(rows["row"])
