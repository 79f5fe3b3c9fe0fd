"""Reward models behind one contract: ``reward(rollout) -> Tensor``.

A reward function takes a ``Rollout`` and returns one score a sequence, shape (B,), or one a response token, shape
(B, T); PPO places a sequence score at the response's last token and uses token scores as they are.

How a saved model scores follows from its ``config.json``: the class of the model gives the level, and the number of
outputs a token how they are read (``losses.token_reward``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgalign.core.rollout import Rollout
from fgalign.core.tensor_ops import masked_sum, position_ids
from fgalign.errors import ConfigError
from fgalign.io import read_json
from fgalign.losses.token_reward import token_rewards_of

RewardFunction = Callable[[Rollout], Tensor]

LEVELS = {"rm_preference": "sequence", "rm_edit": "sequence", "rm_token": "token"}
"""The reward models of the pipeline and the level at which each scores."""


def sequence_rewards(model: Any, rollout: Rollout) -> Tensor:
    """Scores of a sequence-classification model, read at the last real token: (B,)."""
    mask = rollout.attention_mask.long()
    # transformers pools at the last token that is not the pad token, so ids outside the mask must be the pad token.
    ids = torch.where(mask.bool(), rollout.input_ids, model.config.pad_token_id)
    return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, 0].float()


def token_rewards(model: Any, rollout: Rollout, discrete: bool = False) -> Tensor:
    """Reward of each response token, in the light of the prompt and the tokens up to it: (B, T), 0 outside the mask.
    How a model's outputs are read, see ``losses.token_reward.token_rewards_of``."""
    mask = rollout.attention_mask.long()
    output = model(input_ids=rollout.input_ids, attention_mask=mask, position_ids=position_ids(mask))
    rewards = token_rewards_of(output.logits[:, rollout.prompt_ids.shape[1] :], discrete)
    return torch.where(rollout.response_mask, rewards, torch.zeros_like(rewards))


def reward_function(model: Any, level: str, discrete: bool = False) -> RewardFunction:
    """A reward function without gradients from a loaded reward model; ``discrete`` pays a token -1, 0 or 1, its
    likeliest class.

    Raises:
        ConfigError: the level is neither ``sequence`` nor ``token``, or ``discrete`` of a model without token classes.
    """
    if level not in ("sequence", "token"):
        raise ConfigError(f"reward level: expected 'sequence' or 'token', found {level!r}")
    if discrete and (level == "sequence" or model.config.num_labels == 1):
        found = "one score a response" if level == "sequence" else "one output a token"
        raise ConfigError(f"discrete: expected a reward model with classes of tokens, found one with {found}")
    model.eval()
    model.config.use_cache = False  # nothing is sampled from it, and a cache of keys and values takes memory

    @torch.no_grad()
    def reward(rollout: Rollout) -> Tensor:
        return sequence_rewards(model, rollout) if level == "sequence" else token_rewards(model, rollout, discrete)

    reward.model = model  # for a trainer that moves or shards it
    return reward


def saved_level(folder: Path) -> str:
    """The level of a saved reward model, ``sequence`` or ``token``, from the class of model in its ``config.json``.

    Raises:
        InputError: no model is there; ``ConfigError``: it is no reward model.
    """
    kinds = read_json(folder / "config.json").get("architectures") or ["none"]
    for suffix, level in (("ForSequenceClassification", "sequence"), ("ForTokenClassification", "token")):
        if kinds[0].endswith(suffix):
            return level
    raise ConfigError(
        f"{folder}: expected a reward model (a model for sequence or token classification), found {kinds[0]}"
    )


def load_reward(name: str, folder: Path, device: torch.device | str, discrete: bool = False) -> RewardFunction:
    """Load a reward model as a reward function; ``discrete`` as in ``reward_function``.

    Raises:
        InputError: no model is there; ``ConfigError``: it is no reward model, or not of the level that ``LEVELS``
            gives a model of this name.
    """
    from fgalign.core.modeling import load_sequence_reward_model, load_token_reward_model

    level = saved_level(folder)
    if level != LEVELS.get(name, level):
        raise ConfigError(f"{folder}: reward model {name}: expected one of level {LEVELS[name]}, found level {level}")
    load = load_sequence_reward_model if level == "sequence" else load_token_reward_model
    return reward_function(load(folder, device), level, discrete)


def response_scores(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """One score a response, (B,): a sequence reward as it is, token rewards by their sum over the response."""
    return rewards if rewards.dim() == 1 else masked_sum(rewards, response_mask, dim=1)
