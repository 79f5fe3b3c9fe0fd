"""Masked statistics, whitening, GAE, log-probabilities and padding against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.core.tensor_ops import (
    entropy,
    gae,
    masked_mean,
    masked_moments,
    masked_sum,
    pad,
    position_ids,
    tempered,
    token_logps,
    whiten,
)

NAN = math.nan


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


VALUES = tensor([[1.0, 2.0, NAN], [3.0, 6.0, math.inf]])
MASK = tensor([[True, True, False], [True, True, False]])


def test_masked_statistics_ignore_what_is_outside():
    close(masked_sum(VALUES, MASK), 12.0)
    close(masked_sum(VALUES, MASK, 1), [3.0, 9.0])
    close(masked_sum(VALUES, MASK, 0), [4.0, 8.0, 0.0])
    close(masked_mean(VALUES, MASK), 3.0)
    close(masked_mean(VALUES, MASK, 1), [1.5, 4.5])
    close(masked_mean(VALUES, MASK, 0), [2.0, 4.0, 0.0])  # nothing counts in the last column: 0
    mean, variance = masked_moments(VALUES, MASK)
    close(mean, 3.0)
    close(variance, 3.5)  # (4 + 1 + 0 + 9) / 4, divided by n and not n - 1


def test_masked_statistics_of_nothing_are_zero():
    none = torch.zeros_like(MASK)
    for found in (masked_sum(VALUES, none), masked_mean(VALUES, none), *masked_moments(VALUES, none)):
        close(found, 0.0)
    close(whiten(VALUES, none), torch.zeros(2, 3))


def test_masked_mean_has_no_gradient_outside():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    close(values.grad, [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]])


def test_moments_over_two_processes():
    # This process holds 1 and 2, the other 3 and 6. The other adds to what is summed: its count 2, its sum 9, and with
    # the common mean 3 its squares 0 + 9. Together they are the four values above: mean 3, variance 3.5.
    other = iter([2, 9, 9])
    mean, variance = masked_moments(VALUES[:1], MASK[:1], lambda summed: summed + next(other))
    close(mean, 3.0)
    close(variance, 3.5)
    other = iter([2, 9, 9])
    whitened = whiten(VALUES[:1], MASK[:1], reduce=lambda summed: summed + next(other))
    close(whitened, whiten(VALUES, MASK)[:1])


def test_whiten():
    # sqrt(3.5) = 1.870829: (1 - 3) / 1.870829 = -1.069045, (2 - 3) / ... = -0.534522, 0, (6 - 3) / ... = 1.603567.
    whitened = whiten(VALUES, MASK)
    close(whitened, [[-1.069045, -0.534522, 0.0], [0.0, 1.603567, 0.0]])
    close(masked_mean(whitened, MASK), 0.0)
    close(masked_moments(whitened, MASK)[1], 1.0)


def test_whiten_without_shift():
    # 1 / 1.870829 = 0.534522, twice, thrice and six times that; TRL and torchtune would give -1.069045 + 3 and so on.
    close(whiten(VALUES, MASK, shift_mean=False), [[0.534522, 1.069045, 0.0], [1.603567, 3.207135, 0.0]])


def test_whiten_epsilon():
    # A variance of 0 gives 0, not NaN; with epsilon 0.5 the divisor of the values above is sqrt(3.5 + 0.5) = 2.
    close(whiten(torch.full((1, 3), 7.0), MASK[:1]), [[0.0, 0.0, 0.0]])
    close(whiten(VALUES, MASK, epsilon=0.5), [[-1.0, -0.5, 0.0], [0.0, 1.5, 0.0]])
    close(whiten(VALUES, MASK, epsilon=0.5, shift_mean=False), [[0.5, 1.0, 0.0], [1.5, 3.0, 0.0]])


def test_gae():
    # gamma 0.9, lambda 0.5: gamma * lambda = 0.45.
    # Row 1, from its end: A2 = 2 + 0 - (-1) = 3
    #                      A1 = 0 + 0.9 * (-1) - 1 + 0.45 * 3 = -0.55
    #                      A0 = 1 + 0.9 * 1 - 0.5 + 0.45 * (-0.55) = 1.1525
    # Row 2 ends a token earlier: A1 = 1 - 0 = 1; A0 = 0 + 0.9 * 0 - 2 + 0.45 * 1 = -1.55
    rewards = tensor([[1.0, 0.0, 2.0], [0.0, 1.0, NAN]])
    values = tensor([[0.5, 1.0, -1.0], [2.0, 0.0, NAN]])
    mask = tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    close(advantages, [[1.1525, -0.55, 3.0], [-1.55, 1.0, 0.0]])
    close(returns, [[1.6525, 0.45, 2.0], [0.45, 1.0, 0.0]])  # advantages + values


def test_gae_limits():
    rewards, values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6, dtype=torch.bool)
    # lambda 1: returns are the discounted sums of rewards, whatever the values.
    _, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    sums = torch.stack([sum(0.5 ** (k - t) * rewards[:, k] for k in range(t, 6)) for t in range(6)], 1)
    close(returns, sums)
    # lambda 0: one-step errors.
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    close(advantages, rewards + 0.5 * following - values)


def test_gae_does_not_depend_on_padding():
    rewards, values = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = tensor([[True] * 4, [True, True, False, False]])
    short = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    padded = [torch.cat([x, torch.full((2, 3), NAN)], 1) for x in (rewards, values)]
    long = gae(*padded, torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1), gamma=0.9, lam=0.8)
    for a, b in zip(short, long, strict=True):
        close(b[:, :4], a, 0)
        close(b[:, 4:], torch.zeros(2, 3), 0)


def test_token_logps_and_entropy():
    # Logits 0 and ln 3 are probabilities 1/4 and 3/4, whatever is added to both.
    logits = tensor([[[0.0, math.log(3)], [100.0, 100.0 + math.log(3)]]])
    close(token_logps(logits, tensor([[0, 1]])), [[-math.log(4), math.log(3 / 4)]], 1e-5)
    # 1/4 ln 4 + 3/4 ln (4/3) = 0.346574 + 0.215762
    close(entropy(logits), [[0.562335, 0.562335]], 1e-5)
    assert token_logps(logits.bfloat16(), tensor([[0, 1]])).dtype == torch.float32
    assert entropy(logits.bfloat16()).dtype == torch.float32


def test_gradient_of_token_logps():
    # With probabilities 1/4 and 3/4: 1 - 1/4 and -3/4 for the first token, -1/4 and 1 - 3/4 for the second; times 2.
    logits = tensor([[0.0, math.log(3)], [0.0, math.log(3)]], requires_grad=True)
    (2 * token_logps(logits, tensor([0, 1]))).sum().backward()
    close(logits.grad, [[1.5, -1.5], [-0.5, 0.5]])


def plain_logps(logits, ids):
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_is_bit_by_bit_what_autograd_gives(dtype):
    generator = torch.Generator().manual_seed(0)
    start = (3 * torch.randn(4, 5, 300, generator=generator)).to(dtype)
    ids, weights = torch.randint(300, (4, 5), generator=generator), torch.randn(4, 5, generator=generator)
    found = []
    for function in (token_logps, plain_logps):
        logits = start.clone().requires_grad_()
        logps = function(logits, ids)
        (weights * logps).sum().backward()
        found.append((logps.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_gradient_of_token_logps_when_compiled():
    # As above, times 2, -3 and 0; written for the compiler otherwise than for autograd.
    logits = tensor([[0.0, math.log(3)]] * 3, requires_grad=True)
    compiled = torch.compile(token_logps, backend="aot_eager")
    (tensor([2.0, -3.0, 0.0]) * compiled(logits, tensor([0, 1, 0]))).sum().backward()
    close(logits.grad, [[1.5, -1.5], [0.75, -0.75], [0.0, 0.0]])


def test_tempered():
    logits = tensor([[1.0, 3.0]])
    close(tempered(logits, 0.5), [[2.0, 6.0]])
    assert tempered(logits, 1.0) is logits


def test_pad():
    rows = [[1, 2, 3], [4], []]
    assert pad(rows, 0, side="right").tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert pad(rows, 9, side="left").tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert pad([[0.5], []], -1.0, side="left", dtype=torch.float32).tolist() == [[0.5], [-1.0]]
    assert pad([], 0, side="left").shape == (0, 0)
    with pytest.raises(ValueError, match="side: expected 'left' or 'right', found 'middle'"):
        pad(rows, 0, side="middle")


def test_position_ids():
    mask = tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]
    assert position_ids(mask.bool()).tolist() == position_ids(mask).tolist()
