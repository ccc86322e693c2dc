"""Losses over pairs: the formulas, the tables of names for PAIR_LOSS and LOSS, and the callables for the trainer.

Every formula returns one value per pair; the trainer takes the mean. Shapes: rewards and gaps [pairs], logits over
grades [pairs, grades], lowest grade first; all float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from utils.models.policies import PolicyPairs
from utils.models.reward_model import RewardHead, log_win
from utils.script import stop

NEED_RATINGS = ("margin", "scaled")  # losses that use the gap between the ratings
SIPA_SFT_WEIGHT = 0.05
GRADIENT_SCALE = 2.0**12  # keeps small gradients from rounding to 0 in fp16 activations
ROUNDING = {"fp32": 2e-3, "bf16": 0.1, "fp16": 0.05}  # relative error allowed in the first loss

# reward models


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigma(r_w - r_l) of two rewards [pairs]; ln 2 if both are equal. Ignores `gap`.

    Bradley and Terry 1952, as used for reward models in https://arxiv.org/abs/2203.02155 (section 3.5).
    """
    return smoothed(chosen - rejected, smoothing)


def margin(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """-log sigma(r_w - r_l - gap): ask the rewards to differ by at least the rating gap [pairs].

    softplus(gap) at equal rewards. https://arxiv.org/abs/2307.09288 (section 3.2.2).
    """
    return smoothed(chosen - rejected - gap, smoothing)


def scaled(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """gap * -log sigma(r_w - r_l): a clear preference counts more; gap * ln 2 at equal rewards.

    https://arxiv.org/abs/2410.01257 (section 4.1).
    """
    return gap * smoothed(chosen - rejected, smoothing)


def smoothed(difference: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-log sigma(d), assuming that a share `smoothing` of the labels is flipped."""
    right, wrong = -functional.logsigmoid(difference), -functional.logsigmoid(-difference)
    return (1 - smoothing) * right + smoothing * wrong


def win_probability(
    chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log P(grade of chosen > grade of rejected) of logits over grades; 0.7985 for uniform over ten."""
    return -(1 - smoothing) * log_win(chosen, rejected) - smoothing * log_win(rejected, chosen)


def scaled_win(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """gap * win_probability: a clear preference counts more, as in `scaled`."""
    return gap * win_probability(chosen, rejected, gap, smoothing)


def soft_labels(grade: torch.Tensor, grades: int) -> torch.Tensor:
    """Split `grade` [...] (1 to grades) between its two nearest grades: probabilities [..., grades] with that mean."""
    values = torch.arange(1, grades + 1, device=grade.device, dtype=grade.dtype)
    return (1 - (grade[..., None] - values).abs()).clamp(min=0.0)


def grade_cross_entropy(logits: torch.Tensor, grade: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [...] between logits [..., grades] and the soft labels of a grade [...]."""
    return -(soft_labels(grade, logits.shape[-1]) * functional.log_softmax(logits, dim=-1)).sum(dim=-1)


def masked_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of (output - target)^2 over the last axis, skipping NaN targets; 0 if all are NaN."""
    known = ~targets.isnan()
    squares = torch.where(known, (outputs - targets.nan_to_num()) ** 2, 0.0)
    return squares.sum(dim=-1) / known.sum(dim=-1).clamp(min=1)


# policies


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of both answers [pairs, 2], chosen first, float32: the input of a policy loss.

    policy, reference: sums or means over the tokens of an answer, by PolicyLoss.reduction; reference is None if the
    loss has none. chosen_mean [pairs]: mean log-prob per token of the chosen answer under the policy.
    guided, guided_reference: the same on the prompt with the preference, for new_pref_po.
    """

    policy: torch.Tensor
    chosen_mean: torch.Tensor
    reference: torch.Tensor | None = None
    guided: torch.Tensor | None = None
    guided_reference: torch.Tensor | None = None

    def difference(self) -> torch.Tensor:
        """Return (s_w - ref_w) - (s_l - ref_l) [pairs]."""
        assert self.reference is not None, "this loss needs a reference"
        ratio = self.policy - self.reference
        return ratio[:, 0] - ratio[:, 1]


@dataclass(frozen=True)
class LossConstants:
    """The constants of the policy losses; PolicyLoss.uses lists those of each loss."""

    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0
    alpha: float = 0.0
    lambda_kl: float = 0.0


def dpo(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """-log sigma(beta d), d = (s_w - ref_w) - (s_l - ref_l) of sums; ln 2 at the start.

    With smoothing e: -(1-e) log sigma(beta d) - e log sigma(-beta d). https://arxiv.org/abs/2305.18290 (equation 7)
    """
    return smoothed(c.beta * x.difference(), c.smoothing)


def ipo(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """(d - 1 / (2 beta))^2 with d of token means; (1 / (2 beta))^2 at the start.

    https://arxiv.org/abs/2310.12036 (equation 17), with means as its authors do in TRL.
    """
    return (x.difference() - 1 / (2 * c.beta)) ** 2


def hinge(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """relu(1 - beta d) of sums; 1 at the start. https://arxiv.org/abs/2305.10425 (SLiC), with DPO's d."""
    return functional.relu(1 - c.beta * x.difference())


def sipa(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """-log sigma(beta d) of token means + 0.05 NLL(chosen); ln 2 + 0.05 NLL at the start."""
    return smoothed(c.beta * x.difference(), c.smoothing) - SIPA_SFT_WEIGHT * x.chosen_mean


def orpo(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """NLL(chosen) - beta log sigma(lo), lo = log odds of the token means; no reference.

    lo = (m_w - m_l) - [log(1 - e^m_w) - log(1 - e^m_l)]. https://arxiv.org/abs/2403.07691 (equations 6 and 7)
    """
    mean = x.policy.clamp(max=-1e-6)  # the odds of a certain answer are infinite
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -x.chosen_mean - c.beta * functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def simpo(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """-log sigma(beta (m_w - m_l) - gamma) of token means; no reference.

    https://arxiv.org/abs/2405.14734 (equation 6)
    """
    return smoothed(c.beta * (x.policy[:, 0] - x.policy[:, 1]) - c.gamma, c.smoothing)


def new_pref_po(x: LogProbs, c: LossConstants) -> torch.Tensor:
    """-log sigma(beta r) + alpha relu(r_p - r) + lambda / 2 (KL_plain + KL_pref).

    The policy learns to prefer on the plain prompt what it prefers on the prompt with the preference.
    r = m_w - m_l of token means on the plain prompt, r_p the same on the guided prompt, without gradient in the second
    term. Each KL(ref || pi) is between two-way softmaxes over (m_w, m_l).
    """
    assert x.guided is not None and x.reference is not None and x.guided_reference is not None
    plain, guided = (mean[:, 0] - mean[:, 1] for mean in (x.policy, x.guided))
    kl = two_way_kl(x.reference, x.policy) + two_way_kl(x.guided_reference, x.guided)
    return (
        -functional.logsigmoid(c.beta * plain)
        + c.alpha * functional.relu(guided.detach() - plain)
        + c.lambda_kl / 2 * kl
    )


def two_way_kl(reference: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy) [pairs] between softmaxes over the two answers of a pair [pairs, 2]."""
    reference, policy = functional.log_softmax(reference, dim=-1), functional.log_softmax(policy, dim=-1)
    return (reference.exp() * (reference - policy)).sum(dim=-1)


PAIR_LOSSES: dict[str, dict[str, Callable[..., torch.Tensor]]] = {  # HEAD: {PAIR_LOSS: function}, the default first
    "scalar": {"bradley_terry": bradley_terry, "margin": margin, "scaled": scaled},
    "distribution": {"win_probability": win_probability, "scaled": scaled_win},
    "attributes": {"squared_error": masked_squared_error},
}


@dataclass(frozen=True)
class PolicyLoss:
    """An entry of POLICY_LOSSES: the function of a loss, its inputs, and the meaning of BETA."""

    function: Callable[[LogProbs, LossConstants], torch.Tensor]
    reduction: str  # sum | mean over the tokens of an answer
    reference: bool  # needs the log-probs of the starting policy
    beta: float  # default, for BETA = 0
    beta_is: str
    uses: tuple[str, ...] = ()  # constants beside BETA


POLICY_LOSSES = {  # choices of LOSS
    "dpo": PolicyLoss(dpo, "sum", True, 0.1, "strength of the pull to the reference", ("LABEL_SMOOTHING",)),
    "ipo": PolicyLoss(ipo, "mean", True, 0.1, "1 / (2 beta) is the target margin"),
    "hinge": PolicyLoss(hinge, "sum", True, 0.1, "pairs with a margin over 1 / beta add nothing"),
    "sipa": PolicyLoss(sipa, "mean", True, 0.1, "strength of the pull to the reference", ("LABEL_SMOOTHING",)),
    "orpo": PolicyLoss(orpo, "mean", False, 0.1, "weight of the odds ratio next to the NLL"),
    "simpo": PolicyLoss(simpo, "mean", False, 2.0, "scale of the rewards", ("LABEL_SMOOTHING", "GAMMA")),
    "new_pref_po": PolicyLoss(new_pref_po, "mean", True, 0.05, "scale of the plain margin", ("ALPHA", "LAMBDA_KL")),
}


@dataclass(frozen=True)
class RewardPairLoss:
    """The loss of a reward model: called by the trainer with the outputs of RewardPairs.

    name: a loss in PAIR_LOSSES of the head. smoothing: assumed share of wrong labels. rating_weight: share of the
    cross-entropy to the soft labels of the ratings, for a distribution.
    """

    head: RewardHead
    name: str
    smoothing: float = 0.0
    rating_weight: float = 0.0

    def __call__(self, outputs: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (loss [pairs], {metric: [pairs]}); outputs["outputs"] is [pairs, 2, n], chosen first."""
        both, head = outputs["outputs"], self.head
        function: Callable = PAIR_LOSSES[head.kind][self.name]
        chosen, rejected = head.rewards(both).unbind(1)
        if head.kind == "attributes":
            targets = batch["attributes"] - torch.tensor(head.means, device=both.device)
            losses = function(both, targets).mean(dim=1)
        elif head.kind == "distribution":
            losses = function(both[:, 0], both[:, 1], batch["gap"], self.smoothing)
            if self.rating_weight:
                anchor = grade_cross_entropy(both, head.grade(batch["ratings"])).mean(dim=1)
                losses = (1 - self.rating_weight) * losses + self.rating_weight * anchor
        else:
            losses = function(chosen, rejected, batch["gap"], self.smoothing)
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        names = ("accuracy", "margin", "rewards/chosen", "rewards/rejected")
        return losses, dict(zip(names, (right, chosen - rejected, chosen, rejected), strict=True))


@dataclass
class PolicyPairLoss:
    """The loss of a policy (DPO and its kin): called by the trainer with the outputs of PolicyPairs.

    sft_weight: weight of the NLL per token of the chosen answer, added to any loss. fresh: the run starts from step 0,
    so the first loss must be that of a policy which equals its reference.
    """

    module: PolicyPairs
    loss: PolicyLoss
    constants: LossConstants
    sft_weight: float
    precision: str
    fresh: bool

    def __call__(self, outputs: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (loss [pairs], {metric: [pairs]})."""
        x = self.log_probs(outputs, batch)
        losses = self.loss.function(x, self.constants) - self.sft_weight * x.chosen_mean
        if self.fresh and losses.requires_grad:
            self.fresh = False
            self.check_start(losses.detach(), outputs, batch)
        vectors = self.module.vectors
        if x.guided is not None and vectors is not None and vectors.requires_grad and losses.requires_grad:
            losses = losses + self.vector_term(x.guided, vectors) / len(losses)
        rewards = implicit_rewards(x, self.loss, self.constants.beta)
        margins = rewards[:, 0] - rewards[:, 1]
        return losses, {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "logps/chosen": outputs["logps"][:, 0],
            "logps/rejected": outputs["logps"][:, 1],
        }

    def log_probs(self, outputs: dict, batch: dict) -> LogProbs:
        """Return sums or means, as the loss needs; the reference comes from the outputs or from the batch."""
        tokens = outputs["tokens"] if self.loss.reduction == "mean" else 1.0
        reference = {name: outputs.get(name, batch.get(name)) for name in ("reference", "guided_reference")}
        return LogProbs(
            policy=outputs["logps"] / tokens,
            chosen_mean=outputs["logps"][:, 0] / outputs["tokens"][:, 0],
            reference=None if reference["reference"] is None else reference["reference"] / tokens,
            guided=outputs["guided_logps"] / tokens if "guided_logps" in outputs else None,
            guided_reference=None if reference["guided_reference"] is None else reference["guided_reference"] / tokens,
        )

    def check_start(self, losses: torch.Tensor, outputs: dict, batch: dict) -> None:
        """Stop unless the first loss is that of a policy which equals its reference."""
        if self.loss.reference:
            names = ("reference", "guided_reference")
            start = {name: outputs.get(name, batch.get(name)) for name in names}
            start = {name.replace("reference", "logps"): value for name, value in start.items() if value is not None}
        else:
            training = self.module.training
            with torch.no_grad():
                start = self.module.eval()(**batch)
            self.module.train(training)
        x = self.log_probs(outputs | start, batch)
        expected = self.loss.function(x, self.constants) - self.sft_weight * x.chosen_mean
        far = (losses - expected).abs() > ROUNDING[self.precision] * expected.abs().clamp(min=1.0)
        if far.any():  # per pair: in the mean, differences could cancel
            stop(
                f"the first loss is {losses.mean():.4f}, but a policy that equals its reference has "
                f"{expected.mean():.4f}: they are not the same model. Remove the folder REFERENCE_CACHE and try again"
            )

    def vector_term(self, guided: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return zero, with the gradient of sum(-log sigma(beta r_p)) for the vectors only, not for the policy."""
        loss = -functional.logsigmoid(self.constants.beta * (guided[:, 0] - guided[:, 1])).sum()
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * loss, vectors, retain_graph=True)
        term = (vectors * gradient / GRADIENT_SCALE).sum()
        return term - term.detach()


def implicit_rewards(x: LogProbs, loss: PolicyLoss, beta: float) -> torch.Tensor:
    """Return beta (log pi - log ref) [pairs, 2], or beta log pi for a loss without reference."""
    if not loss.reference:
        return beta * x.policy.detach()
    assert x.reference is not None
    return beta * (x.policy - x.reference).detach()
