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
    config = model.config.get_text_config()  # a part of the model's where it reads images too; elsewhere all of it
    width, pad = mask.shape[1], config.pad_token_id
    place = (torch.arange(width, device=mask.device) * mask).argmax(1, keepdim=True)
    # transformers pools at the last token that is not the pad token, so ids outside the mask must be the pad token, and
    # another one must take its part where a policy has sampled it last.
    last = set(rollout.input_ids.gather(1, place).flatten().tolist())
    filler = pad if pad not in last else next(token for token in range(len(last) + 1) if token not in last)
    ids = torch.where(mask.bool(), rollout.input_ids, filler)
    config.pad_token_id = filler
    try:
        return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, 0].float()
    finally:
        config.pad_token_id = pad


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
        ConfigError: the level is neither ``sequence`` nor ``token``; a sequence model with more than one output, or
            without a pad token; ``discrete`` of a model without token classes.
    """
    if level not in ("sequence", "token"):
        raise ConfigError(f"reward level: expected 'sequence' or 'token', found {level!r}")
    if level == "sequence" and model.config.num_labels != 1:
        raise ConfigError(
            f"reward model: expected one output a sequence (num_labels=1), found {model.config.num_labels}; a "
            "classifier's outputs are no score: pass a function of your own that says how to read them"
        )
    if level == "sequence" and model.config.get_text_config().pad_token_id is None:
        raise ConfigError(
            "reward model: expected a pad token in its configuration, found none; set "
            "config.get_text_config().pad_token_id"
        )
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


def load_reward(
    name: str, folder: Path, device: torch.device | str, discrete: bool = False, summed: bool = False
) -> RewardFunction:
    """Load a reward model as a reward function; ``discrete`` as in ``reward_function``. ``summed``: one score a
    response, the sum of what a token-level model gives its tokens; PPO pays it at the last one, so that nothing says
    which token earned it.

    Raises:
        InputError: no model is there; ``ConfigError``: it is no reward model, or not of the level that ``LEVELS``
            gives a model of this name, or ``summed`` of a sequence-level one.
    """
    from fgalign.core.modeling import load_sequence_reward_model, load_token_reward_model

    level = saved_level(folder)
    if level != LEVELS.get(name, level):
        raise ConfigError(f"{folder}: reward model {name}: expected one of level {LEVELS[name]}, found level {level}")
    if summed and level == "sequence":
        raise ConfigError(f"summed: expected a token-level reward model, found {name} with one score a response")
    load = load_sequence_reward_model if level == "sequence" else load_token_reward_model
    reward = reward_function(load(folder, device), level, discrete)
    if not summed:
        return reward

    def score(rollout: Rollout) -> Tensor:
        return response_scores(reward(rollout), rollout.response_mask)

    score.model = reward.model
    return score


def response_scores(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """One score a response, (B,): a sequence reward as it is, token rewards by their sum over the response."""
    return rewards if rewards.dim() == 1 else masked_sum(rewards, response_mask, dim=1)
