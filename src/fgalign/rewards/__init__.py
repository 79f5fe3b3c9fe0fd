"""Reward models behind one contract: ``reward(rollout) -> Tensor``.

A reward function takes a ``Rollout`` and returns one score a sequence, shape (B,), or one a response token, shape
(B, T); PPO places a sequence score at the response's last token and uses token scores as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgalign.errors import ConfigError
from fgalign.losses.token_reward import three_class_rewards
from fgalign.rollout import Rollout
from fgalign.tensor_ops import masked_sum, position_ids

RewardFunction = Callable[[Rollout], Tensor]

LEVELS = {"rm_preference": "sequence", "rm_edit": "sequence", "rm_token": "token"}
"""The reward models of the pipeline and the level at which each scores."""


def sequence_rewards(model: Any, rollout: Rollout) -> Tensor:
    """Scores of a sequence-classification model, read at the last real token: (B,)."""
    mask = rollout.attention_mask.long()
    # transformers pools at the last token that is not the pad token, so ids outside the mask must be the pad token.
    ids = torch.where(mask.bool(), rollout.input_ids, model.config.pad_token_id)
    return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, 0].float()


def token_rewards(model: Any, rollout: Rollout) -> Tensor:
    """P(good) - P(bad) of each response token, in the light of the prompt and the tokens up to it: (B, T), 0 outside
    the mask."""
    mask = rollout.attention_mask.long()
    output = model(input_ids=rollout.input_ids, attention_mask=mask, position_ids=position_ids(mask))
    rewards = three_class_rewards(output.logits[:, rollout.prompt_ids.shape[1] :])
    return torch.where(rollout.response_mask, rewards, torch.zeros_like(rewards))


def reward_function(model: Any, level: str) -> RewardFunction:
    """A reward function without gradients from a loaded reward model.

    Raises:
        ConfigError: the level is neither ``sequence`` nor ``token``.
    """
    if level not in ("sequence", "token"):
        raise ConfigError(f"reward level: expected 'sequence' or 'token', found {level!r}")
    score = sequence_rewards if level == "sequence" else token_rewards
    model.eval()

    @torch.no_grad()
    def reward(rollout: Rollout) -> Tensor:
        return score(model, rollout)

    return reward


def load_reward(name: str, folder: Path, device: torch.device | str) -> RewardFunction:
    """Load one of the pipeline's reward models as a reward function.

    Raises:
        ConfigError: unknown name.
    """
    from fgalign.modeling import load_sequence_reward_model, load_token_reward_model

    if name not in LEVELS:
        raise ConfigError(f"reward model: expected one of {', '.join(LEVELS)}, found {name!r}")
    load = load_sequence_reward_model if LEVELS[name] == "sequence" else load_token_reward_model
    return reward_function(load(folder, device), LEVELS[name])


def response_scores(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """One score a response, (B,): a sequence reward as it is, token rewards by their sum over the response."""
    return rewards if rewards.dim() == 1 else masked_sum(rewards, response_mask, dim=1)
