"""REINFORCE: baselines, rewards with penalties, the metrics of a step, alarms."""

import pytest
import torch

from tests.toys import sample_of
from utils.models.generation import Answer
from utils.models.reward_model import RewardHead
from utils.models.shared_prompt import Prompt
from utils.training.reinforce import Baseline, Scoring, divergence_alarm, normalised, prompt_of, step_metrics


def test_a_moving_average_starts_at_the_first_batch_and_is_updated_after_use():
    baseline = Baseline("moving_average", decay=0.9)
    first = baseline.advantages(torch.tensor([1.0, 3.0]))
    assert first.tolist() == [-1.0, 1.0] and baseline.value == baseline.used == 2.0
    second = baseline.advantages(torch.tensor([10.0, 12.0]))
    assert second.tolist() == [8.0, 10.0], "updated after use"
    assert baseline.value == pytest.approx(0.9 * 2.0 + 0.1 * 11.0) and baseline.seen == 4 and baseline.used == 2.0
    baseline.advantages(torch.tensor([float("nan"), 1.0]))
    assert baseline.value == pytest.approx(2.9), "a step with NaN does not change it"


def test_a_running_mean_covers_all_earlier_rewards():
    baseline, past = Baseline("running_mean"), []
    for step, values in enumerate(([1.0, 3.0], [10.0], [4.0, 4.0, 7.0])):
        result = baseline.advantages(torch.tensor(values))
        mean = sum(past) / len(past) if step else sum(values) / len(values)
        assert result.tolist() == pytest.approx([value - mean for value in values])
        past += values
    assert baseline.value == pytest.approx(sum(past) / len(past))


def test_leave_one_out_equals_its_formula():
    values = [1.0, 2.0, 6.0, 4.0, 4.0, 5.0]
    result = Baseline("leave_one_out").advantages(torch.tensor(values), 3).tolist()
    for i, value in enumerate(values):
        group = values[i // 3 * 3 : i // 3 * 3 + 3]
        assert result[i] == pytest.approx(value - (sum(group) - value) / 2)
    assert Baseline("none").advantages(torch.tensor(values)).tolist() == values


def test_leave_one_out_equals_trl(model_folder, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    def lengths(completions, **_):
        return [float(len(text) % 7) for text in completions]

    args = RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        max_steps=1, beta=0.0, normalize_advantages=False, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in ("Hi", "Why?")])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = RLOOTrainer(model_folder, lengths, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    scores = torch.tensor(list(trainer._logs["rewards"]["lengths"]))
    theirs = list(trainer._logs["advantages"])
    ours = Baseline("leave_one_out").advantages(scores, 4)
    assert len(theirs) == 8 and scores.std() > 0 and ours.tolist() == pytest.approx(theirs, abs=1e-5)


def test_normalised_advantages_have_unit_size_unless_they_are_equal():
    values = torch.tensor([1.0, -1.0, 3.0])
    result = normalised(values, "std")
    assert result.square().mean().item() == pytest.approx(1.0, abs=1e-3)
    off_the_baseline = normalised(torch.tensor([0.5, 0.5, 0.5, 0.51]), "std")
    assert off_the_baseline.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.02], abs=0.02)
    assert torch.equal(normalised(values, "none"), values)
    assert normalised(torch.zeros(4), "std").tolist() == [0.0] * 4


class Judge:
    """Reward the number of characters, as a scalar or as a certain grade."""

    def __init__(self, kind="scalar"):
        self.head = RewardHead(kind, [1.0] if kind == "scalar" else [float(grade) for grade in range(1, 11)])

    def read(self, prompts, answers):
        lengths = torch.tensor([[float(len(text)) for text in side] for side in answers])
        if self.head.kind == "scalar":
            return lengths[:, :, None]
        grades = torch.nn.functional.one_hot(lengths.long().clamp(1, 10) - 1, 10).float()
        return 50 * grades


def answered(*texts, ended=True):
    return [Answer(Prompt([1]), [5] * 10, text, ended) for text in texts]


def test_the_cut_penalty_applies_to_cut_answers_only():
    prompts = [[{"role": "user", "content": "Hi"}]] * 2
    cut = [*answered("abc"), *answered("a" * 9, ended=False)]
    assert Scoring(Judge())(prompts, cut).tolist() == [3.0, 9.0]
    result = Scoring(Judge(), cut_penalty=0.25)(prompts, cut)
    assert result.tolist() == pytest.approx([3.0, 9.0 - 0.25])


def test_risk_subtracts_the_spread():
    prompts = [[{"role": "user", "content": "Hi"}]] * 2
    texts = answered("abc", "abcdef")
    assert Scoring(Judge("distribution"))(prompts, texts).tolist() == pytest.approx([3.0, 6.0], abs=1e-3)

    class Unsure(Judge):
        def read(self, prompts, answers):
            return torch.zeros(len(prompts), 1, 10)

    spread = sum((grade - 5.5) ** 2 / 10 for grade in range(1, 11)) ** 0.5
    result = Scoring(Unsure("distribution"), risk=0.5)(prompts, texts)
    assert result.tolist() == pytest.approx([5.5 - 0.5 * spread] * 2, abs=1e-4)


def test_each_prompt_comes_once_per_epoch_in_random_order():
    epochs = [[prompt_of(number, 2, 7, seed=3) for number in range(14 * e, 14 * e + 14, 2)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert prompt_of(0, 2, 7, 3) == prompt_of(1, 2, 7, 3), "two answers of one prompt"
    assert [prompt_of(number, 1, 7, 4) for number in range(7)] != epochs[0], "the seed changes the order"


def test_the_metrics_of_a_step_are_means_over_answers():
    samples = [sample_of([5, 6], reward=1.0), sample_of([5] * 6, ended=False, reward=3.0)]
    samples[0].logp, samples[0].reference, samples[0].entropy, samples[1].entropy = -3.0, -5.0, 4.0, 12.0
    metrics = step_metrics(samples, torch.tensor([-1.0, 1.0]), Baseline("none"), 0.5, 2.0, seconds=2.0)
    assert (
        metrics["reward"] == 2.0 and metrics["reward_std"] == 1.0 and metrics["kl"] == 1.0 and metrics["entropy"] == 2.0
    )
    assert metrics["kl_error"] == pytest.approx(1.0), "of 2 and 0"
    assert (
        metrics["completions/mean_length"] == 4.0
        and metrics["completions/ended"] == metrics["completions/clipped_ratio"]
    )
    assert metrics["completions/repetition"] == pytest.approx((0 + 3 / 4) / 2) and metrics["tokens_per_second"] == 4.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, ""),
        ({"kl": 51.0}, "KL 51.0 is over KL_LIMIT = 50.0"),
        ({"loss": float("nan")}, "loss of this step is not finite"),
        ({"completions/mean_length": 1.0}, "collapsed to 1.0 tokens"),
        ({"entropy": 0.01}, "entropy has collapsed to 0.010 nats"),
    ],
)
def test_alarms_name_their_reason(change, message):
    healthy = {"loss": 1.0, "grad_norm": 1.0, "reward": 1.0, "kl": 3.0, "entropy": 1.0, "completions/mean_length": 30.0}
    reason = divergence_alarm(healthy | change, 50.0)
    assert message in reason and bool(reason) == bool(message)
    assert divergence_alarm(healthy | {"kl": 1e9}, 0.0) == "", "0 = no limit"
