"""Pure loss functions and the tables that name them. One value a pair; the mean over pairs is the trainer's."""

import torch
from torch.nn import functional


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigma(r_w - r_l) of rewards [pairs] each, float32; ln 2 where both are equal.

    Bradley and Terry 1952, as used for reward models in https://arxiv.org/abs/2203.02155 (section 3.5).
    """
    return -functional.logsigmoid(chosen - rejected)


PAIR_LOSSES = {"bradley_terry": bradley_terry}  # what PAIR_LOSS may name
