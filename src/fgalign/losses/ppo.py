"""Proximal policy optimisation (Schulman et al. 2017) on response tokens: clipped objective, clipped value loss,
KL penalty per token, and the two controllers of its coefficient (Ziegler et al. 2019, section 2.2). Leave-one-out
advantages (RLOO, Ahmadian et al. 2024), with one reward a token, for training without a value model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fgalign.core.tensor_ops import gae, masked_mean

KLEstimator = Literal["k1", "k2", "k3"]

KL_ERROR = 0.2
"""Largest relative error of the KL, either way, that the adaptive controller takes in."""


class PolicyLoss(NamedTuple):
    """Scalars: the loss, the share of tokens whose ratio was clipped, the approximate KL (k3) to the old policy."""

    loss: Tensor
    clip_fraction: Tensor
    approximate_kl: Tensor


class ValueLoss(NamedTuple):
    """Scalars: the loss and the share of tokens whose value was clipped."""

    loss: Tensor
    clip_fraction: Tensor


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float) -> PolicyLoss:
    """Clipped surrogate, a mean over the batch's masked tokens (equation 7 of the paper, negated). Shapes (B, T)."""
    log_ratio = torch.where(mask, logps - old_logps, torch.zeros_like(logps))
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        masked_mean(torch.maximum(plain, clipped), mask),
        masked_mean((clipped > plain).float(), mask).detach(),
        masked_mean(ratio - 1 - log_ratio, mask).detach(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float | None
) -> ValueLoss:
    """Half the squared error, the larger of clipped and plain, averaged over the masked tokens. Shapes (B, T).

    ``clip_range`` None turns the clipping off.
    """
    plain = (values - returns).square()
    if clip_range is None:
        return ValueLoss(0.5 * masked_mean(plain, mask), torch.zeros((), device=values.device))
    bounded = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    clipped = (bounded - returns).square()
    return ValueLoss(
        0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask).detach()
    )


def kl_per_token(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(policy, reference) from one sampled token a place, in nats (Schulman 2020). Shapes (B, T).

    With d = log pi - log pi_ref: ``k1`` is d (unbiased, may be negative), ``k2`` is d^2 / 2, ``k3`` is
    exp(-d) - 1 + d (unbiased, never negative).

    Raises:
        ValueError: unknown estimator.
    """
    difference = logps - ref_logps
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.exp(-difference) - 1 + difference
    raise ValueError(f"kl_estimator: expected 'k1', 'k2' or 'k3', found {estimator!r}")


def shaped_rewards(token_rewards: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """What the policy is paid for each token: its reward minus ``kl_coef`` times its KL; 0 outside the mask. (B, T)."""
    return torch.where(mask, token_rewards - kl_coef * kl, torch.zeros_like(kl))


def group_advantages(rewards: Tensor, mask: Tensor, group_size: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Reward-to-go of each token minus a baseline from the other responses to the same prompt.

    The reward-to-go of token t is G_t = r_t + gamma * G_{t+1}, 0 after a response's end; the baseline is the mean of
    the other responses' G_t at the same t (leave one out), ended ones counting 0. A response's baseline does not depend
    on the response itself, so it leaves the policy gradient unbiased. With gamma 1, one reward at the last token and
    responses of the same length this is RLOO; where lengths differ, RLOO's baseline keeps the scores of responses that
    ended before t.

    Args:
        rewards: (B, T) reward of each token.
        mask: (B, T) True at the response's tokens, without gaps from the left.
        group_size: rows that answer the same prompt; they follow one another.

    Returns:
        advantages and rewards-to-go, both (B, T), 0 outside the mask.

    Raises:
        ValueError: B is no multiple of ``group_size``, or that is below 2.
    """
    rows, width = rewards.shape
    if group_size < 2 or rows % group_size:
        raise ValueError(f"group_size: expected 2 or more and a divisor of the {rows} rows, found {group_size}")
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    groups = to_go.view(-1, group_size, width)
    baseline = ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).view(rows, width)
    return torch.where(mask, to_go - baseline, torch.zeros_like(to_go)), to_go


def rewards_at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Put one score a sequence, (B,), at the last masked token of its row: (B, T). A row without tokens stays 0."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    lengths = mask.sum(-1)
    rows = torch.nonzero(lengths > 0).squeeze(-1)
    rewards[rows, lengths[rows] - 1] = scores[rows]
    return rewards


@dataclass
class FixedKLController:
    """A KL coefficient that stays as it is."""

    value: float

    def update(self, kl: float, responses: int) -> None:
        """Nothing to do."""


@dataclass
class AdaptiveKLController:
    """A KL coefficient steered so that the KL of a response approaches ``target`` nats (Ziegler et al. 2019).

    After n responses: coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon, which keeps it above 0 while
    horizon > 0.2 * n.
    """

    value: float
    target: float
    horizon: float

    def update(self, kl: float, responses: int) -> None:
        """Take in the mean KL of a response, in nats, over ``responses`` responses."""
        error = min(max(kl / self.target - 1, -KL_ERROR), KL_ERROR)
        self.value *= 1 + error * responses / self.horizon
