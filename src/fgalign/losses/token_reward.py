"""Losses that turn token labels into a token-level reward model; Xu et al. leave their form open."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fgalign.schema import BAD, GOOD, NEUTRAL

CLASSES = (BAD, NEUTRAL, GOOD)
"""The label of each class index: 0 bad, 1 neutral, 2 good."""
IGNORE = -100


def three_class_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy over (bad, neutral, good), weighted by class, averaged as torch's ``cross_entropy`` does: the sum
    of weighted terms divided by the sum of weights.

    Args:
        logits: (B, T, 3).
        labels: (B, T) with -1, 0 or 1, and IGNORE where there is no token to judge.
        class_weights: (3,) or None.
    """
    targets = torch.where(labels == IGNORE, IGNORE, labels + 1)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), class_weights, ignore_index=IGNORE)


def three_class_rewards(logits: Tensor) -> Tensor:
    """Reward of each token, P(good) - P(bad), between -1 and 1: (B, T, 3) to (B, T)."""
    probabilities = logits.float().softmax(-1)
    return probabilities[..., 2] - probabilities[..., 0]


def inverse_frequency_weights(counts: Tensor, power: float = 0.5) -> Tensor:
    """Class weights (mean over tokens 1) proportional to frequency ** -power: 0 is none, 1 balances the classes. (3,).

    Raises:
        ValueError: a class has no token.
    """
    if bool((counts <= 0).any()):
        raise ValueError(f"class counts (bad, neutral, good): expected all above 0, found {counts.tolist()}")
    frequency = counts.double() / counts.sum()
    weights = frequency**-power
    return (weights / (weights * frequency).sum()).float()
