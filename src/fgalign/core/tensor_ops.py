"""Masked statistics, whitening, generalised advantage estimation, token log-probabilities, padding: torch only.

Legend of dimensions: B rows of a batch, T positions of a response, L positions of prompt and response together,
V tokens of the vocabulary. A ``mask`` is True where a position counts. Log-probabilities and KL are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the positions where ``mask`` is True; positions that do not count may hold anything, even NaN."""
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the positions where ``mask`` is True; 0 where none is."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(
    values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and population variance (divided by n, not n - 1) where ``mask`` is True; 0 where nothing is.

    ``reduce`` sums a tensor over the processes of a distributed run, so that all share one mean and variance.
    """
    reduce = reduce or (lambda tensor: tensor)
    count = reduce(mask.sum()).clamp(min=1)
    mean = reduce(masked_sum(values, mask)) / count
    return mean, reduce(masked_sum((values - mean).square(), mask)) / count


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale to unit variance over the masked positions of the whole batch, and to zero mean if ``shift_mean``.

    ``(x - mean) / sqrt(var + epsilon)`` with the population variance; without ``shift_mean`` it is
    ``x / sqrt(var + epsilon)``: the mean is scaled with the values, and not added back unscaled as in TRL and torchtune
    (where ``shift_mean=False`` gives ``(x - mean) / sqrt(var + epsilon) + mean``). Positions outside the mask become 0.
    ``reduce`` as in ``masked_moments``.
    """
    mean, variance = masked_moments(values, mask, reduce)
    scaled = (values - mean if shift_mean else values) * torch.rsqrt(variance + epsilon)
    return torch.where(mask, scaled, torch.zeros_like(scaled))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) over one response a row.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}; the value after a row's last masked
    position is 0 (the episode ends there, by the end-of-sequence token or by the length budget).

    Args:
        rewards: (B, T) reward of each token.
        values: (B, T) value of the state before each token.
        mask: (B, T) True at the response's tokens, without gaps from the left.

    Returns:
        advantages and returns (advantages + values), both (B, T), 0 outside the mask.
    """
    zero = torch.zeros_like(rewards)
    rewards, values = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
        next_value = values[:, t]
    advantages = torch.where(mask, advantages, zero)
    return advantages, advantages + values


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id under the logits at its place, in float32: (..., V) and (...) to (...)."""
    return _TokenLogps.apply(logits.float(), ids)


class _TokenLogps(torch.autograd.Function):
    """``token_logps`` of float32 logits. The gradient is written in one tensor of the logits' shape, bit by bit the one
    of autograd, which makes four of them: they are what a small model with a large vocabulary spends its time on."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        """See ``token_logps``."""
        ids = ids.unsqueeze(-1)
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, ids, total)
        return (logits.gather(-1, ids) - total).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """gradient * (one at the id - softmax)."""
        logits, ids, total = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        if torch.compiler.is_compiling():
            # One loop from logits to gradient, which scattering would end. With the gradient in the exponent, torch
            # cannot compute the exponentials in the forward pass and keep them, as it did.
            probabilities = (logits - (total - gradient.abs().log())).exp() * gradient.sign()
            at_id = torch.arange(logits.shape[-1], dtype=torch.int32, device=ids.device) == ids.int()
            return torch.where(at_id, gradient, 0.0) - probabilities, None
        probabilities = (logits - total).exp_()
        return probabilities.mul_(-gradient).scatter_add_(-1, ids, gradient), None


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits at a sampling temperature; at 1 they are their own (a division by 1 would copy them)."""
    return logits if temperature == 1 else logits / temperature


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distributions, in nats: (..., V) to (...)."""
    logps = logits.float().log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def pad(
    rows: Sequence[Sequence[int | float]], value: int | float, *, side: str, dtype: torch.dtype = torch.long
) -> Tensor:
    """Pad lists to one (B, longest) tensor on the ``left`` or ``right``.

    Raises:
        ValueError: the side is neither.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', found {side!r}")
    width = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        if len(row):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            out[index, where] = torch.tensor(row, dtype=dtype)
    return out


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count from 0 at each row's first real token, wherever the padding is: (B, L) to (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
