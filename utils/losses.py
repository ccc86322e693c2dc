"""Pure loss functions and the tables that name them. One value a pair; the mean over pairs is the trainer's.

Shapes: rewards and gaps [pairs], logits over grades [pairs, grades], lowest grade first; all float32.
"""

import torch
from torch.nn import functional


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigma(r_w - r_l) of two rewards [pairs]; ln 2 where both are equal. `gap` is not used.

    Bradley and Terry 1952, as used for reward models in https://arxiv.org/abs/2203.02155 (section 3.5).
    """
    return smoothed(chosen - rejected, smoothing)


def margin(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """-log sigma(r_w - r_l - gap): the rewards are to lie at least the rating gap [pairs] apart.

    softplus(gap) at equal rewards. https://arxiv.org/abs/2307.09288 (section 3.2.2).
    """
    return smoothed(chosen - rejected - gap, smoothing)


def scaled(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """gap * -log sigma(r_w - r_l): a clear preference counts more; gap * ln 2 at equal rewards.

    https://arxiv.org/abs/2410.01257 (section 4.1).
    """
    return gap * smoothed(chosen - rejected, smoothing)


def smoothed(difference: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-log sigma(d), where the share `smoothing` of the labels is taken for turned round."""
    right, wrong = -functional.logsigmoid(difference), -functional.logsigmoid(-difference)
    return (1 - smoothing) * right + smoothing * wrong


def centring(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(r_w + r_l)^2: holds rewards near 0, which their differences leave open (https://arxiv.org/abs/2312.09244)."""
    return (chosen + rejected) ** 2


def win_probability(
    chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log P(grade of chosen > grade of rejected) of logits over grades; 0.7985 at uniform over ten. No `gap` used."""
    return -(1 - smoothing) * log_win(chosen, rejected) - smoothing * log_win(rejected, chosen)


def scaled_win(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """gap times the loss of `win_probability`: a clear preference counts more, as in `scaled`."""
    return gap * win_probability(chosen, rejected, gap, smoothing)


def log_win(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """log P(grade of `better` > grade of `worse`) [...] of logits over grades [..., grades].

    P = sum over i of p_better(i) * sum over j < i of p_worse(j), in log space: sharp distributions neither
    underflow nor lose their gradient.
    """
    better, worse = functional.log_softmax(better, dim=-1), functional.log_softmax(worse, dim=-1)
    below = worse.logcumsumexp(dim=-1)[..., :-1]  # log P(worse <= i) for i = 1 .. grades - 1, which is below i + 1
    return (better[..., 1:] + below).logsumexp(dim=-1)


def log_tie(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """log P(both have the same grade) [...] of logits over grades [..., grades]."""
    return (functional.log_softmax(one, dim=-1) + functional.log_softmax(other, dim=-1)).logsumexp(dim=-1)


def soft_labels(grade: torch.Tensor, grades: int) -> torch.Tensor:
    """Probabilities [..., grades] whose mean is `grade` [...] (1 to grades), split between the two nearest grades."""
    places = torch.arange(1, grades + 1, device=grade.device, dtype=grade.dtype)
    return (1 - (grade[..., None] - places).abs()).clamp(min=0.0)


def grade_cross_entropy(logits: torch.Tensor, grade: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [...] of logits [..., grades] against the soft labels of a grade [...]."""
    return -(soft_labels(grade, logits.shape[-1]) * functional.log_softmax(logits, dim=-1)).sum(dim=-1)


def masked_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of (output - target)^2 over the last axis where the target is known (not NaN); 0 where none is."""
    known = ~targets.isnan()
    squares = torch.where(known, (outputs - targets.nan_to_num()) ** 2, 0.0)
    return squares.sum(dim=-1) / known.sum(dim=-1).clamp(min=1)


PAIR_LOSSES = {  # HEAD: {what PAIR_LOSS may name: the function}; the first one is taken where PAIR_LOSS = ""
    "scalar": {"bradley_terry": bradley_terry, "margin": margin, "scaled": scaled},
    "distribution": {"win_probability": win_probability, "scaled": scaled_win},
    "attributes": {"squared_error": masked_squared_error},
}
NEED_RATINGS = ("margin", "scaled")  # losses that use the gap between the ratings
