"""Scoring given responses with a reward function, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fgalign.core.rollout import Rollout, as_rollout
from fgalign.rewards import RewardFunction, response_scores


def raw_rewards(
    reward: RewardFunction,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[tuple[Tensor, Rollout]]:
    """What the reward function says of each batch, on the CPU, in the given order."""
    out = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        rollout = as_rollout(prompts[rows], responses[rows], pad_token_id, device)
        out.append((reward(rollout).cpu(), rollout))
    return out


def score_responses(
    reward: RewardFunction,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    tokenizer: object,
    batch_size: int,
    device: torch.device | str,
) -> Tensor:
    """One score a response, (N,), on the CPU; token rewards are summed (see ``response_scores``)."""
    batches = raw_rewards(reward, prompts, responses, tokenizer.pad_token_id, batch_size, device)
    return torch.cat([response_scores(rewards, rollout.response_mask.cpu()) for rewards, rollout in batches])
