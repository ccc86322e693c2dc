"""Loss functions of pairs, and the tables that name them. Each returns one value a pair; the trainer takes the mean.

Shapes: rewards and gaps [pairs], logits over grades [pairs, grades], lowest grade first; all float32.
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
PULL_SCALE = 2.0**12  # of a gradient on its way through fp16 activations, in which it would be rounded to 0
ROUNDING = {"fp32": 2e-3, "bf16": 0.1, "fp16": 0.05}  # by which the first loss may differ, as a share of it


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


def win_probability(
    chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """-log P(grade of chosen > grade of rejected) of logits over grades; 0.7985 at uniform over ten. No `gap` used."""
    return -(1 - smoothing) * log_win(chosen, rejected) - smoothing * log_win(rejected, chosen)


def scaled_win(chosen: torch.Tensor, rejected: torch.Tensor, gap: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """gap times the loss of `win_probability`: a clear preference counts more, as in `scaled`."""
    return gap * win_probability(chosen, rejected, gap, smoothing)


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


@dataclass(frozen=True)
class PairLoss:
    """The loss of a pair from the outputs of RewardPairs, as the trainer calls it.

    name: one of PAIR_LOSSES for the head. smoothing: assumed share of wrong labels. rating_weight: share of the
    cross-entropy to the ratings' soft labels in the loss of a distribution.
    """

    reading: RewardHead
    name: str
    smoothing: float = 0.0
    rating_weight: float = 0.0

    def __call__(self, outputs: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (loss [pairs], {metric: [pairs]}); outputs["outputs"] is [pairs, 2, n], chosen first."""
        both, reading = outputs["outputs"], self.reading
        function: Callable = PAIR_LOSSES[reading.head][self.name]
        chosen, rejected = reading.rewards(both).unbind(1)
        if reading.head == "attributes":
            targets = batch["attributes"] - torch.tensor(reading.means, device=both.device)
            losses = function(both, targets).mean(dim=1)
        elif reading.head == "distribution":
            losses = function(both[:, 0], both[:, 1], batch["gap"], self.smoothing)
            if self.rating_weight:
                anchor = grade_cross_entropy(both, reading.grade(batch["ratings"])).mean(dim=1)
                losses = (1 - self.rating_weight) * losses + self.rating_weight * anchor
        else:
            losses = function(chosen, rejected, batch["gap"], self.smoothing)
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        names = ("accuracy", "margin", "rewards/chosen", "rewards/rejected")
        return losses, dict(zip(names, (right, chosen - rejected, chosen, rejected), strict=True))


@dataclass
class PolicyPairLoss:
    """The loss of a pair from the outputs of PolicyPairs, as the trainer calls it.

    sft_weight: of the NLL of a chosen token, beside any loss. fresh: whether the first call is the first one of a run,
    which is then held against its value at the start.
    """

    module: PolicyPairs
    loss: PolicyLoss
    knobs: Knobs
    sft_weight: float
    precision: str
    fresh: bool

    def __call__(self, outputs: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss of each pair [pairs], what is logged of each)."""
        x = self.log_probs(outputs, batch)
        losses = self.loss.function(x, self.knobs) - self.sft_weight * x.chosen_mean
        if self.fresh and losses.requires_grad:
            self.fresh = False
            self.check_start(losses.detach(), outputs, batch)
        vectors = self.module.vectors
        if x.guided is not None and vectors is not None and vectors.requires_grad and losses.requires_grad:
            losses = losses + self.pull_of_vectors(x.guided) / len(losses)
        rewards = implicit_rewards(x, self.loss, self.knobs.beta)
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
        """Sums or means, as the loss wants them; the reference from the outputs or from the batch."""
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
        """End the script where the first loss is not that of a policy which equals its reference."""
        if self.loss.reference:
            names = ("reference", "guided_reference")
            start = {name: outputs.get(name, batch.get(name)) for name in names}
            start = {name.replace("reference", "logps"): value for name, value in start.items() if value is not None}
        else:
            was = self.module.training
            with torch.no_grad():
                start = self.module.eval()(**batch)
            self.module.train(was)
        x = self.log_probs(outputs | start, batch)
        expected = self.loss.function(x, self.knobs) - self.sft_weight * x.chosen_mean
        far = (losses - expected).abs() > ROUNDING[self.precision] * expected.abs().clamp(min=1.0)
        if far.any():  # of any pair: differences of either sign would cancel in the mean
            stop(
                f"the first loss is {losses.mean():.4f}, and a policy that equals its reference has "
                f"{expected.mean():.4f}: they are not the same model. Remove the folder REFERENCE_CACHE, or look at "
                "what was changed in the code"
            )

    def pull_of_vectors(self, guided: torch.Tensor) -> torch.Tensor:
        """Zero, with the gradient of sum(-log sigma(beta r_p)) for the vectors alone; the policy gets none of it."""
        wanted = -functional.logsigmoid(self.knobs.beta * (guided[:, 0] - guided[:, 1])).sum()
        (gradient,) = torch.autograd.grad(PULL_SCALE * wanted, self.module.vectors, retain_graph=True)
        pull = (self.module.vectors * gradient / PULL_SCALE).sum()
        return pull - pull.detach()


def implicit_rewards(x: LogProbs, loss: PolicyLoss, beta: float) -> torch.Tensor:
    """beta (log pi - log ref) [pairs, 2], sums or means as the loss takes them; without a reference beta log pi."""
    return beta * (x.policy - x.reference if loss.reference else x.policy).detach()
