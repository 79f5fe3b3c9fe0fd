"""PPO's losses, KL estimators and controllers against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.losses.ppo import (
    AdaptiveKLController,
    FixedKLController,
    kl_per_token,
    policy_loss,
    rewards_at_last_token,
    shaped_rewards,
    value_loss,
)

NAN = math.nan
LN2 = math.log(2)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


MASK = tensor([[True, True, True, True, False]])


def test_policy_loss_clips_on_both_sides():
    # ratio  advantage  plain  clipped to 0.8..1.2  larger
    #  1.5      +1       -1.5        -1.2            -1.2   clipped
    #  0.5      +1       -0.5        -0.8            -0.5
    #  1.5      -1       +1.5        +1.2            +1.5
    #  0.5      -1       +0.5        +0.8            +0.8   clipped
    # Mean of -1.2, -0.5, 1.5, 0.8: 0.6 / 4 = 0.15. k3: 1.5 - 1 - ln 1.5 = 0.094535, 0.5 - 1 - ln 0.5 = 0.193147.
    ratios = tensor([[1.5, 0.5, 1.5, 0.5, 1.0]])
    old = torch.full((1, 5), -1.0)
    logps = (old + ratios.log()).where(MASK, tensor(NAN)).requires_grad_()
    result = policy_loss(logps, old, tensor([[1.0, 1.0, -1.0, -1.0, 0.0]]), MASK, 0.2)
    close(result.loss, 0.15)
    close(result.clip_fraction, 0.5)
    close(result.approximate_kl, (0.094535 + 0.193147) / 2)
    result.loss.backward()
    # d(-A ratio) / d logp = -A ratio, a quarter each; nothing through a clipped token, nothing outside the mask.
    close(logps.grad, [[0.0, -0.125, 0.375, 0.0, 0.0]])


def test_policy_loss_at_the_old_policy_is_the_mean_advantage():
    logps = tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]])
    result = policy_loss(logps, logps, tensor([[1.0, 2.0, -3.0, 4.0, 100.0]]), MASK, 0.2)
    close(result.loss, -1.0)  # -(1 + 2 - 3 + 4) / 4
    assert (result.clip_fraction, result.approximate_kl) == (0, 0)


def test_policy_loss_averages_over_tokens_not_rows():
    mask = tensor([[True, False, False], [True, True, True]])
    logps, advantages = torch.zeros(2, 3), tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    close(policy_loss(logps, logps, advantages, mask, 0.2).loss, -1.0)  # 4 / 4 tokens, not (4 / 1 + 0) / 2 rows


def test_value_loss_clips_on_both_sides():
    # value  old  return  (v - R)^2  bounded to -0.2..0.2  (b - R)^2  larger
    #  0.5    0      1       0.25            0.2               0.64     0.64  clipped
    #  0.5    0      0       0.25            0.2               0.04     0.25
    # -0.5    0     -1       0.25           -0.2               0.64     0.64  clipped
    #  0.1    0      1       0.81            0.1               0.81     0.81
    # Half the mean: 0.5 * 2.34 / 4 = 0.2925; without clipping 0.5 * 1.56 / 4 = 0.195.
    values = tensor([[0.5, 0.5, -0.5, 0.1, 9.0]], requires_grad=True)
    old, returns = torch.zeros(1, 5), tensor([[1.0, 0.0, -1.0, 1.0, 0.0]])
    result = value_loss(values, old, returns, MASK, 0.2)
    close(result.loss, 0.2925)
    close(result.clip_fraction, 0.5)
    result.loss.backward()
    close(values.grad, [[0.0, 0.125, 0.0, -0.225, 0.0]])  # (v - R) / 4 where not clipped
    plain = value_loss(values, old, returns, MASK, None)
    close(plain.loss, 0.195)
    assert plain.clip_fraction == 0


def test_kl_estimators():
    # d = ln 2: k1 0.693147, k2 0.480453 / 2, k3 1/2 - 1 + 0.693147.  d = -ln 2: k3 2 - 1 - 0.693147.
    logps, reference = tensor([[-1.0, -1.0]]), tensor([[-1.0 - LN2, -1.0 + LN2]])
    close(kl_per_token(logps, reference, "k1"), [[0.693147, -0.693147]])
    close(kl_per_token(logps, reference, "k2"), [[0.240227, 0.240227]])
    close(kl_per_token(logps, reference, "k3"), [[0.193147, 0.306853]])
    with pytest.raises(ValueError, match="kl_estimator: expected 'k1', 'k2' or 'k3', found 'k4'"):
        kl_per_token(logps, reference, "k4")


def test_k1_and_k3_are_unbiased():
    # KL((1/2, 1/2), (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 0.143841, the mean of the estimates over the first.
    p, q = tensor([0.5, 0.5]), tensor([0.25, 0.75])
    for estimator in ("k1", "k3"):
        close((p * kl_per_token(p.log(), q.log(), estimator)).sum(), 0.143841)


def test_shaped_rewards():
    rewards, kl = tensor([[1.0, 0.0, NAN]]), tensor([[0.5, -2.0, NAN]])
    mask = tensor([[True, True, False]])
    close(shaped_rewards(rewards, kl, 0.1, mask), [[0.95, 0.2, 0.0]])  # 1 - 0.05, 0 + 0.2


def test_rewards_at_last_token():
    mask = tensor([[True, True, True], [True, False, False], [False, False, False]])
    placed = rewards_at_last_token(tensor([2.0, -3.0, 5.0]), mask)
    close(placed, [[0.0, 0.0, 2.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_fixed_controller():
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05


def test_adaptive_controller():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100.0)
    controller.update(12.0, 10)  # 12 / 6 - 1 = 1, clipped to 0.2: * (1 + 0.2 * 10 / 100) = * 1.02
    assert controller.value == pytest.approx(0.102, rel=1e-12)
    controller.update(0.0, 10)  # -1, clipped to -0.2: * 0.98
    assert controller.value == pytest.approx(0.09996, rel=1e-12)
    controller.update(6.6, 50)  # 0.1: * (1 + 0.1 * 50 / 100) = * 1.05
    assert controller.value == pytest.approx(0.104958, rel=1e-12)
    controller.update(6.0, 50)  # on target
    assert controller.value == pytest.approx(0.104958, rel=1e-12)
