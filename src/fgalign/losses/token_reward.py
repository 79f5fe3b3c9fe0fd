"""Losses that turn token labels into a token-level reward model; Xu et al. leave their form open.

A model has as many outputs a token as its loss needs, and that number says how its rewards are read:

| loss | outputs | reward of a token |
|---|---|---|
| ``three_class`` | bad, neutral, good | P(good) - P(bad) |
| ``binary`` (TLCR's discriminator, Yoon et al. 2024) | bad, good | 2 P(good) - 1 |
| ``bradley_terry``, ``regression`` | one | the output |
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fgalign.core.schema import BAD, GOOD, NEUTRAL

CLASSES = (BAD, NEUTRAL, GOOD)
"""The label of each class index: 0 bad, 1 neutral, 2 good."""
IGNORE = -100

TokenLoss = Literal["three_class", "bradley_terry", "regression", "binary"]
OUTPUTS: dict[TokenLoss, int] = {"three_class": 3, "bradley_terry": 1, "regression": 1, "binary": 2}
"""Outputs a token of a model trained with each loss."""


def token_loss(loss: TokenLoss, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The loss by name; arguments as in the functions below, ``class_weights`` (3,) whatever the loss.

    Raises:
        ValueError: unknown loss.
    """
    if loss == "three_class":
        return three_class_loss(logits, labels, class_weights)
    if loss == "bradley_terry":
        return bradley_terry_loss(logits, labels)
    if loss == "regression":
        return regression_loss(logits, labels, class_weights)
    if loss == "binary":
        return binary_loss(logits, labels, class_weights)
    raise ValueError(f"token loss: expected one of {', '.join(OUTPUTS)}, found {loss!r}")


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


def binary_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of bad against good tokens; neutral ones take no part. Averaged as ``three_class_loss``.

    Args:
        logits: (B, T, 2), bad and good.
        labels: (B, T) as in ``three_class_loss``; 0 where none is bad or good.
        class_weights: (3,) of bad, neutral and good, or None.
    """
    marked = (labels == BAD) | (labels == GOOD)
    if not bool(marked.any()):
        return (logits * 0).sum().float()
    targets = torch.where(marked, (labels == GOOD).long(), IGNORE)
    weights = None if class_weights is None else class_weights[[0, 2]]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), weights, ignore_index=IGNORE)


def regression_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Squared error of the output to the label -1, 0 or 1, weighted by class: the sum of weighted terms divided by the
    sum of weights.

    Args:
        logits: (B, T, 1).
        labels, class_weights: as in ``three_class_loss``.
    """
    counted = labels != IGNORE
    weights = torch.ones(3, device=logits.device) if class_weights is None else class_weights
    weights = torch.where(counted, weights[torch.where(counted, labels + 1, 0)], 0.0)
    errors = (logits.float().squeeze(-1) - labels).square()
    return (weights * torch.where(counted, errors, 0.0)).sum() / weights.sum()


def bradley_terry_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log sigmoid(sum of rewards of the revised response - that of the initial one), averaged over pairs. The sums run
    over the response's tokens, not their mean: PPO pays sums, too.

    Args:
        logits: (2B, T, 1), B revised responses first, then the initial ones in the same order.
        labels: (2B, T), read only for IGNORE, which marks what is no response token.
    """
    counted = labels != IGNORE
    rewards = logits.float().squeeze(-1)
    revised, initial = torch.where(counted, rewards, torch.zeros_like(rewards)).sum(-1).chunk(2)
    return -F.logsigmoid(revised - initial).mean()


def token_rewards_of(logits: Tensor, discrete: bool = False) -> Tensor:
    """Reward of each token by the number of outputs, see the module's table: (B, T, K) to (B, T).

    ``discrete`` reads the likeliest class instead: -1, 0 or 1 (-1 or 1 of two classes).

    Raises:
        ValueError: K is none of 1, 2 and 3, or ``discrete`` with one output, which has no classes.
    """
    outputs = logits.shape[-1]
    if outputs not in (1, 2, 3):
        raise ValueError(f"token-level reward model: expected 1, 2 or 3 outputs a token, found {outputs}")
    if discrete:
        if outputs == 1:
            raise ValueError("discrete rewards: expected a model with classes, found one output a token")
        classes = torch.tensor(CLASSES if outputs == 3 else (BAD, GOOD), device=logits.device)
        return classes[logits.argmax(-1)].float()
    if outputs == 3:
        return three_class_rewards(logits)
    return logits.float()[..., 0] if outputs == 1 else 2 * logits.float().softmax(-1)[..., 1] - 1


def three_class_rewards(logits: Tensor) -> Tensor:
    """Reward of each token, P(good) - P(bad), between -1 and 1: (B, T, 3) to (B, T)."""
    probabilities = logits.float().softmax(-1)
    return probabilities[..., 2] - probabilities[..., 0]


def inverse_frequency_weights(counts: Tensor, power: float = 0.5) -> Tensor:
    """Class weights (mean over tokens 1) proportional to frequency ** -power: 0 is none, 1 balances the classes. (C,).

    Raises:
        ValueError: a class has no token.
    """
    if bool((counts <= 0).any()):
        raise ValueError(f"class counts: expected all above 0, found {counts.tolist()}")
    frequency = counts.double() / counts.sum()
    weights = frequency**-power
    return (weights / (weights * frequency).sum()).float()
