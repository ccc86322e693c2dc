"""Losses and heads of reward models equal plain Python and have the right gradients."""

import math

import pytest
import torch

from utils.models.reward_model import GRADES, HEADS, log_tie, log_win, new_reward_head
from utils.training.losses import (
    PAIR_LOSSES,
    RewardPairLoss,
    bradley_terry,
    grade_cross_entropy,
    margin,
    masked_squared_error,
    scaled,
    scaled_win,
    soft_labels,
    win_probability,
)

MEANS = [3.0, 3.0, 3.5, 2.0, 2.0]  # of the attributes
CHOSEN, REJECTED, GAP = [1.5, -2.0, 0.0], [-0.5, 3.0, 0.0], [0.4, 1.0, 2.0]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "function, plain",
    [
        (bradley_terry, lambda d, gap, loss: loss(d)),
        (margin, lambda d, gap, loss: loss(d - gap)),
        (scaled, lambda d, gap, loss: gap * loss(d)),
    ],
)
def test_scalar_losses_equal_plain_python(function, plain, smoothing):
    def loss(d):
        return -(1 - smoothing) * math.log(sigma(d)) - smoothing * math.log(sigma(-d))

    expected = [plain(a - b, gap, loss) for a, b, gap in zip(CHOSEN, REJECTED, GAP, strict=True)]
    result = function(torch.tensor(CHOSEN), torch.tensor(REJECTED), torch.tensor(GAP), smoothing)
    assert result.tolist() == pytest.approx(expected, rel=1e-5)


def test_losses_have_known_values_at_equal_rewards():
    zero, gap = torch.zeros(1), torch.tensor([0.8])
    assert bradley_terry(zero, zero).item() == pytest.approx(math.log(2))
    assert margin(zero, zero, gap).item() == pytest.approx(math.log(1 + math.exp(0.8)))
    assert scaled(zero, zero, gap).item() == pytest.approx(0.8 * math.log(2))
    uniform = torch.zeros(1, GRADES)
    assert win_probability(uniform, uniform).item() == pytest.approx(-math.log(0.45)) == pytest.approx(0.7985, abs=1e-4)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 2 * torch.randn(4, GRADES), 2 * torch.randn(4, GRADES)


def test_win_and_tie_probability_equal_plain_loops(logits):
    for better, worse, win, tie in zip(*logits, log_win(*logits), log_tie(*logits), strict=True):
        p, q = softmax(better.tolist()), softmax(worse.tolist())
        assert win.exp().item() == pytest.approx(sum(p[i] * q[j] for i in range(10) for j in range(i)), rel=1e-5)
        assert tie.exp().item() == pytest.approx(sum(p[i] * q[i] for i in range(10)), rel=1e-5)
        scaled = scaled_win(better[None], worse[None], torch.tensor([0.6])).item()
        assert scaled == pytest.approx(-0.6 * math.log(sum(p[i] * q[j] for i in range(10) for j in range(i))), rel=1e-4)
    total = log_win(*logits).exp() + log_win(*reversed(logits)).exp() + log_tie(*logits).exp()
    torch.testing.assert_close(total, torch.ones(4))


def test_certain_grades_win_or_lose_for_sure():
    best, worst = torch.full((1, GRADES), -1e4), torch.full((1, GRADES), -1e4)
    best[0, 9], worst[0, 0] = 1e4, 1e4
    assert win_probability(best, worst).item() == 0.0
    wrong = win_probability(worst.requires_grad_(), best)
    assert wrong.item() > 1e4 and torch.isfinite(torch.autograd.grad(wrong.sum(), worst)[0]).all()


def test_gradients_of_the_distribution_losses_equal_numerical_ones(logits):
    double = [x[:2].double().requires_grad_() for x in logits]
    gap, grade = torch.tensor([0.4, 1.2]).double(), torch.tensor([3.3, 10.0]).double()
    for smoothing in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda a, b, e=smoothing: scaled_win(a, b, gap, e), double)
    assert torch.autograd.gradcheck(lambda a: grade_cross_entropy(a, grade), double[:1])


def test_smoothing_mixes_in_the_reversed_label(logits):
    expected = 0.9 * win_probability(*logits) + 0.1 * win_probability(*reversed(logits))
    torch.testing.assert_close(win_probability(*logits, smoothing=0.1), expected)


def test_soft_labels_have_the_grade_as_their_mean():
    grades = torch.tensor([1.0, 3.25, 7.0, 9.9, 10.0])
    labels = soft_labels(grades, GRADES)
    torch.testing.assert_close(labels.sum(-1), torch.ones(5))
    torch.testing.assert_close(labels @ torch.arange(1.0, 11.0), grades)
    assert (labels > 0).sum(-1).tolist() == [1, 2, 1, 2, 1]
    one_hot = grade_cross_entropy(torch.arange(10.0)[None], torch.tensor([4.0]))
    assert one_hot.item() == pytest.approx(-math.log(softmax(list(range(10)))[3]), rel=1e-5)


def test_the_squared_error_ignores_unknown_attributes():
    nan = float("nan")
    outputs = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = masked_squared_error(outputs, torch.tensor([[0.0, nan, 3.0, nan, 3.0], [nan] * 5]))
    assert loss.tolist() == pytest.approx([(1 + 0 + 4) / 3, 0.0])
    loss.sum().backward()
    assert outputs.grad[0, 1] == 0 and (outputs.grad[1] == 0).all() and torch.isfinite(outputs.grad).all()


def test_expected_grade_spread_and_entropy_equal_plain_loops(logits):
    head = new_reward_head("distribution", "average", [], MEANS)
    for x, reward, spread, entropy in zip(
        logits[0], head.rewards(logits[0]), head.spread(logits[0]), head.entropy(logits[0]), strict=True
    ):
        p = softmax(x.tolist())
        mean = sum(k * p[k - 1] for k in range(1, 11))
        assert reward.item() == pytest.approx(mean, rel=1e-5)
        variance = sum(p[k - 1] * (k - mean) ** 2 for k in range(1, 11))
        assert spread.item() == pytest.approx(math.sqrt(variance), rel=1e-4)
        assert entropy.item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-5)
    uniform = torch.zeros(1, 10)
    assert head.rewards(uniform).item() == pytest.approx(5.5) and head.entropy(uniform).item() == pytest.approx(
        math.log(10)
    )
    assert head.win(uniform, uniform).item() == pytest.approx(0.5), "a tie counts half"


def test_ratings_are_mapped_to_grades():
    average = new_reward_head("distribution", "average", [1.0, 2.0], MEANS)
    assert average.grade(torch.tensor([0.0, 2.0, 4.0])).tolist() == pytest.approx([1.0, 5.5, 10.0])
    goodness = new_reward_head("distribution", "goodness", [], MEANS)
    assert goodness.grade(torch.tensor([7.6])).item() == pytest.approx(10.0)
    ranks = new_reward_head("distribution", "", [-3.0, 0.0], None)
    assert ranks.grade(torch.tensor([-3.0, -1.5, 0.0, 9.0])).tolist() == pytest.approx([1.0, 5.5, 10.0, 10.0])
    negative = new_reward_head("attributes", "nvidia_70b", [], MEANS)
    assert (negative.lowest_rating, negative.highest_rating) == pytest.approx((-1.6, 9.8))
    outputs = torch.tensor([[1.0, 1.0, 0.5, 2.0, 2.0]])  # above the means: 4, 4, 4, 4, 4
    assert negative.rewards(outputs).item() == pytest.approx(4 * 2.05)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, losses in PAIR_LOSSES.items() for name in losses])
def test_the_gradient_of_every_loss_favours_the_chosen_answer(kind, name):
    head = new_reward_head(kind, "average", [], MEANS)
    outputs = torch.zeros(3, 2, HEADS[kind].outputs, requires_grad=True)
    attributes = torch.tensor([[[3.0] * 5, [1.0] * 5]] * 3)
    ratings = torch.tensor([[3.0, 1.0]] * 3)
    batch = {"gap": ratings[:, 0] - ratings[:, 1], "ratings": ratings, "attributes": attributes}
    losses, logged = RewardPairLoss(head, name)({"outputs": outputs}, batch)
    losses.sum().backward()
    assert losses.shape == (3,) and set(logged) == {"accuracy", "margin", "rewards/chosen", "rewards/rejected"}
    after = head.rewards(outputs - 0.1 * outputs.grad)
    assert (after[:, 0] > after[:, 1]).all() and logged["accuracy"].tolist() == [0.5] * 3


def test_rating_weight_mixes():
    torch.manual_seed(1)
    outputs = {"outputs": torch.randn(3, 2, 10)}
    ratings = torch.tensor([[3.0, 1.0], [4.0, 2.2], [2.6, 0.0]])
    batch = {"gap": ratings[:, 0] - ratings[:, 1], "ratings": ratings}
    head = new_reward_head("distribution", "average", [], MEANS)
    win, mixed = (RewardPairLoss(head, "win_probability", rating_weight=w)(outputs, batch)[0] for w in (0.0, 0.25))
    anchor = grade_cross_entropy(outputs["outputs"], head.grade(ratings)).mean(1)
    torch.testing.assert_close(mixed, 0.75 * win + 0.25 * anchor)
