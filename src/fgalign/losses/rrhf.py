"""The RRHF loss (Yuan et al. 2023, arXiv 2304.05302, section 3): rank candidates by length-normalised
log-probability, imitate the best.

p_i = mean_t log pi(y_i,t | x, y_i,<t);  L = w * sum over s_i > s_j of max(0, p_j - p_i)  -  p_best
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fgalign.core.tensor_ops import masked_mean


class RrhfLoss(NamedTuple):
    """The loss and its two parts (scalars, nats a token, means over prompts), and the share of candidate pairs that
    the policy ranks against their scores (0 where no scores differ)."""

    loss: Tensor
    rank: Tensor
    sft: Tensor
    misranked: Tensor


def rrhf_loss(token_logps: Tensor, mask: Tensor, scores: Tensor, *, rank_weight: float = 1.0) -> RrhfLoss:
    """RRHF's loss over K candidate responses to each of B prompts.

    Candidates of equal scores are not ranked against each other; the first of the best ones is imitated.

    Args:
        token_logps: (B, K, T) log-probabilities of the response tokens, in nats.
        mask: (B, K, T) True at response tokens.
        scores: (B, K) higher is better, on any scale.
        rank_weight: w above.
    """
    logps = masked_mean(token_logps, mask, dim=-1)
    better = scores.unsqueeze(2) > scores.unsqueeze(1)
    gaps = torch.where(better, logps.unsqueeze(1) - logps.unsqueeze(2), 0.0)
    rank = gaps.clamp(min=0).sum((1, 2)).mean()
    sft = -logps.gather(1, scores.argmax(1, keepdim=True)).mean()
    misranked = (gaps > 0).sum() / better.sum().clamp(min=1)
    return RrhfLoss(rank_weight * rank + sft, rank, sft, misranked)
