"""Pure loss functions and the tables that name them. One value a pair; the mean over pairs is the trainer's.

Shapes: rewards and gaps [pairs], logits over grades [pairs, grades], lowest grade first; all float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class LogProbs:
    """What a policy loss looks at: log-probabilities of both answers [pairs, 2], chosen first, float32.

    policy, reference: sums over the answer's tokens, or their means, as PolicyLoss.reduction says; reference is None
    where a loss needs none. chosen_mean [pairs]: mean log-prob of a token of the chosen answer under the policy.
    guided, guided_reference: the same on the prompt with the preference, for new_pref_po.
    """

    policy: torch.Tensor
    chosen_mean: torch.Tensor
    reference: torch.Tensor | None = None
    guided: torch.Tensor | None = None
    guided_reference: torch.Tensor | None = None

    def difference(self) -> torch.Tensor:
        """(s_w - ref_w) - (s_l - ref_l) [pairs]."""
        ratio = self.policy - self.reference
        return ratio[:, 0] - ratio[:, 1]


@dataclass(frozen=True)
class Knobs:
    """The constants of the policy losses; each loss says which of them it uses."""

    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0
    alpha: float = 0.0
    lambda_kl: float = 0.0


SIPA_SFT_WEIGHT = 0.05


def dpo(x: LogProbs, k: Knobs) -> torch.Tensor:
    """-log sigma(beta d), d = (s_w - ref_w) - (s_l - ref_l) of sums; ln 2 at the start.

    With smoothing e: -(1-e) log sigma(beta d) - e log sigma(-beta d). https://arxiv.org/abs/2305.18290 (equation 7)
    """
    return smoothed(k.beta * x.difference(), k.smoothing)


def ipo(x: LogProbs, k: Knobs) -> torch.Tensor:
    """(d - 1 / (2 beta))^2 with d of token means; (1 / (2 beta))^2 at the start.

    https://arxiv.org/abs/2310.12036 (equation 17); means, as its authors do it in TRL.
    """
    return (x.difference() - 1 / (2 * k.beta)) ** 2


def hinge(x: LogProbs, k: Knobs) -> torch.Tensor:
    """relu(1 - beta d) of sums; 1 at the start. https://arxiv.org/abs/2305.10425 (SLiC), with DPO's d."""
    return functional.relu(1 - k.beta * x.difference())


def sipa(x: LogProbs, k: Knobs) -> torch.Tensor:
    """-log sigma(beta d) with d of token means, plus 0.05 times the NLL of a chosen token; ln 2 + 0.05 NLL at first."""
    return smoothed(k.beta * x.difference(), k.smoothing) - SIPA_SFT_WEIGHT * x.chosen_mean


def orpo(x: LogProbs, k: Knobs) -> torch.Tensor:
    """NLL(chosen) - beta log sigma(lo), lo = log odds of the token means; no reference.

    lo = (m_w - m_l) - [log(1 - e^m_w) - log(1 - e^m_l)]. https://arxiv.org/abs/2403.07691 (equations 6 and 7)
    """
    mean = x.policy.clamp(max=-1e-6)  # the odds of an answer that is certain have no end
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -x.chosen_mean - k.beta * functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def simpo(x: LogProbs, k: Knobs) -> torch.Tensor:
    """-log sigma(beta (m_w - m_l) - gamma) of token means; no reference.

    https://arxiv.org/abs/2405.14734 (equation 6)
    """
    return smoothed(k.beta * (x.policy[:, 0] - x.policy[:, 1]) - k.gamma, k.smoothing)


def new_pref_po(x: LogProbs, k: Knobs) -> torch.Tensor:
    """-log sigma(beta r) + alpha relu(r_p - r) + lambda / 2 (KL_plain + KL_pref): learn to prefer without being told.

    r = m_w - m_l of token means on the plain prompt, r_p the same on the prompt with the preference, which has no
    gradient in the second term. Each KL(ref || pi) is between two-way softmaxes over (m_w, m_l).
    """
    plain, guided = (mean[:, 0] - mean[:, 1] for mean in (x.policy, x.guided))
    kl = two_way_kl(x.reference, x.policy) + two_way_kl(x.guided_reference, x.guided)
    return (
        -functional.logsigmoid(k.beta * plain)
        + k.alpha * functional.relu(guided.detach() - plain)
        + k.lambda_kl / 2 * kl
    )


def two_way_kl(reference: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy) [pairs] of softmaxes over the two answers of each pair [pairs, 2]."""
    reference, policy = functional.log_softmax(reference, dim=-1), functional.log_softmax(policy, dim=-1)
    return (reference.exp() * (reference - policy)).sum(dim=-1)


@dataclass(frozen=True)
class PolicyLoss:
    """A loss that LOSS may name: its function, what it looks at, and what BETA is to it."""

    function: Callable[[LogProbs, Knobs], torch.Tensor]
    reduction: str  # sum | mean, of the log-probs of an answer's tokens
    reference: bool  # whether it needs the log-probs of the starting policy
    beta: float  # where BETA = 0
    beta_is: str
    uses: tuple[str, ...] = ()  # constants beside BETA


POLICY_LOSSES = {
    "dpo": PolicyLoss(dpo, "sum", True, 0.1, "strength of the pull to the reference", ("LABEL_SMOOTHING",)),
    "ipo": PolicyLoss(ipo, "mean", True, 0.1, "1 / (2 beta) is the margin that it aims at"),
    "hinge": PolicyLoss(hinge, "sum", True, 0.1, "1 / beta is the margin from which a pair is done"),
    "sipa": PolicyLoss(sipa, "mean", True, 0.1, "strength of the pull to the reference", ("LABEL_SMOOTHING",)),
    "orpo": PolicyLoss(orpo, "mean", False, 0.1, "weight of the odds ratio beside the NLL"),
    "simpo": PolicyLoss(simpo, "mean", False, 2.0, "scale of the rewards", ("LABEL_SMOOTHING", "GAMMA")),
    "new_pref_po": PolicyLoss(new_pref_po, "mean", True, 0.05, "scale of the plain margin", ("ALPHA", "LAMBDA_KL")),
}
