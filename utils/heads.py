"""Heads of a reward model: from their outputs to rewards, and the loss of a pair.

A head has one output (a scalar), ten (logits over the grades 1 to 10) or five (the attributes of HelpSteer2). The
reward is always outputs . weights. For a distribution, a softmax comes first and the weights are the grades, so the
reward is the expected grade.
"""

from dataclasses import asdict, dataclass, field, fields

import torch
from torch.nn import functional

from utils.data.preferences import RATINGS
from utils.data.sources import ATTRIBUTES, HIGHEST_ATTRIBUTE
from utils.training.losses import log_tie, log_win

GRADES = 10


@dataclass(frozen=True)
class Head:
    """A kind of head: the names of its outputs in the model's config, and what transformers' pipeline does to them."""

    names: tuple[str, ...]
    problem_type: str  # "regression": the pipeline leaves the outputs alone; "single_label_classification": softmax

    @property
    def outputs(self) -> int:
        return len(self.names)


HEADS = {  # values of HEAD
    "scalar": Head(("reward",), "regression"),
    "distribution": Head(tuple(str(grade) for grade in range(1, GRADES + 1)), "single_label_classification"),
    "attributes": Head(ATTRIBUTES, "regression"),
}


@dataclass
class Reading:
    """How to read the outputs of one model; saved with it in reward_config.json.

    weights: of the outputs in the reward (of the grades' probabilities, for a distribution).
    means: of the attributes in the training rows; the head predicts the difference to them.
    lowest_rating, highest_rating: the ratings of grade 1 and grade 10; the map between them is linear.
    win_scale: P(a beats b) = sigma(win_scale * (reward a - reward b)), for heads that are no distribution.
    """

    head: str
    weights: list[float] = field(default_factory=lambda: [1.0])
    means: list[float] | None = None
    lowest_rating: float = 0.0
    highest_rating: float = 1.0
    win_scale: float = 1.0

    def as_json(self) -> dict:
        """Return the fields for reward_config.json; `grades` repeats the weights of a distribution."""
        return asdict(self) | {"grades": [int(w) for w in self.weights] if self.head == "distribution" else None}

    @classmethod
    def of_json(cls, config: dict) -> "Reading":
        """Return the reading in a reward_config.json; other entries are ignored."""
        return cls(**{entry.name: config[entry.name] for entry in fields(cls) if entry.name in config})

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return P(grade) [..., 10] for outputs of a distribution head."""
        assert self.head == "distribution", self.head
        return functional.softmax(outputs.float(), dim=-1)

    def rewards(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the rewards [...] of outputs [..., n]."""
        read = self.probabilities(outputs) if self.head == "distribution" else outputs.float()
        read = read + torch.tensor(self.means, device=outputs.device) if self.means else read
        return read @ torch.tensor(self.weights, device=outputs.device)

    def spread(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the grade [...] under a distribution."""
        p, grades = self.probabilities(outputs), torch.tensor(self.weights, device=outputs.device)
        expected = (p @ grades)[..., None]
        return (p * (grades - expected) ** 2).sum(dim=-1).sqrt()

    def entropy(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the entropy of the grade [...] in nats; ln 10 at uniform."""
        return torch.special.entr(self.probabilities(outputs)).sum(dim=-1)

    def win(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return P(one beats other) [...] for two outputs [..., n]; a tie of grades counts half to each."""
        if self.head == "distribution":
            one, other = one.float(), other.float()
            return log_win(one, other).exp() + 0.5 * log_tie(one, other).exp()
        return torch.sigmoid(self.win_scale * (self.rewards(one) - self.rewards(other)))

    def grade(self, rating: torch.Tensor) -> torch.Tensor:
        """Return the grade from 1 to 10 for a rating; the only place with this map."""
        share = (rating - self.lowest_rating) / (self.highest_rating - self.lowest_rating)
        return 1 + (GRADES - 1) * share.clamp(0, 1)


def reading_of(head: str, rating: str, ratings: list[float], means: list[float] | None) -> Reading:
    """Return the reading of a new head.

    rating: a key of RATINGS, for the weights of the attributes. ratings: of the training rows, [] if they have none.
    means: of the attributes in the training rows, None if they have none. With attributes, grades 1 to 10 cover the
    possible range of the rating, without them the range of `ratings`.
    """
    weights, divisor = RATINGS.get(rating, RATINGS["average"])
    shares = [weight / divisor for weight in weights]
    lowest = HIGHEST_ATTRIBUTE * sum(min(weight, 0) for weight in shares)
    highest = HIGHEST_ATTRIBUTE * sum(max(weight, 0) for weight in shares)
    if means is None:
        lowest, highest = min(ratings, default=0.0), max(ratings, default=1.0)
    highest = max(highest, lowest + 1e-6)  # all ratings are equal: any line will do
    read = {"scalar": [1.0], "distribution": [float(g) for g in range(1, GRADES + 1)], "attributes": shares}[head]
    return Reading(head, read, means if head == "attributes" else None, lowest, highest)
