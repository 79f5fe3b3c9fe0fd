"""How an aligned model is to be decoded: plainly, as the best of several responses, or behind a phrase.

A method that changes decoding writes ``decoding.json`` beside its model; without the file a model is decoded plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fgalign.config import Section, parse_section
from fgalign.core.rollout import Rollout, sample_all, uniforms
from fgalign.core.tensor_ops import pad
from fgalign.core.tokens import encode_prompt
from fgalign.io import read_json, write_json
from fgalign.rewards import RewardFunction, response_scores

FILE = "decoding.json"


class Decoding(Section):
    """Of ``best_of`` responses the one with the highest score under the reward model ``reward`` is the answer;
    ``prefix`` stands between the prompt and each response (see ``encode_prefixed``)."""

    best_of: int = Field(default=1, ge=1)
    reward: str | None = None
    prefix: str = ""

    @model_validator(mode="after")
    def _reward_of_the_best(self) -> Decoding:
        if self.best_of > 1 and self.reward is None:
            raise ValueError(f"best_of {self.best_of} needs `reward`, the reward model that chooses")
        return self


def read_decoding(folder: Path) -> Decoding:
    """How the model in ``folder`` is decoded.

    Raises:
        ConfigError: ``decoding.json`` has an unknown or ill-typed key.
    """
    path = folder / FILE
    return parse_section(read_json(path), Decoding, str(path)) if path.exists() else Decoding()


def write_decoding(folder: Path, decoding: Decoding) -> None:
    """Write ``decoding.json`` beside a model."""
    write_json(folder / FILE, decoding.model_dump())


def encode_prefixed(tokenizer: Any, prompt: str, prefix: str) -> list[int]:
    """Token ids of a prompt, and of a phrase with which the model's own turn begins; the response follows."""
    return encode_prompt(tokenizer, prompt) + tokenizer(prefix, add_special_tokens=False)["input_ids"]


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: an upper bound of the KL from the best of n responses to the policy that drew
    them (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


class Draws(NamedTuple):
    """Batches of responses, one a prompt, in the order of the prompts; ``scores`` (N,) of the reward function, empty
    where none was asked; ``sampled_tokens`` counts all responses, also those that were not kept."""

    batches: list[Rollout]
    scores: Tensor
    sampled_tokens: int


@torch.no_grad()
def draw_best(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    *,
    best_of: int,
    reward: RewardFunction | None,
    length: int,
    generator: torch.Generator,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
    prefix: Sequence[int] = (),
    complete: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Draws:
    """Sample ``best_of`` responses a prompt, of up to ``length`` tokens each, and keep the one that ``reward`` scores
    highest (the first of equals).

    The first draw of a prompt is the response that a single draw would give. The policy continues prompt and
    ``prefix``; the reward function, and the batches returned, have the prompts without it.

    Args:
        reward: scores responses; None only with ``best_of`` 1.
        complete: score responses that ``length`` cut off -inf, so that they are kept only where all are cut off.
        progress: told the number of responses drawn.
    """
    seen = [[*ids, *prefix] for ids in prompts] if prefix else prompts
    draws = [
        sample_all(
            policy,
            seen,
            uniforms(len(prompts), length, generator),
            batch_size=batch_size,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            temperature=temperature,
            progress=progress,
        )
        for _ in range(best_of)
    ]
    sampled = sum(int(rollout.response_mask.sum()) for batches in draws for rollout in batches)
    batches, scores = [], []
    for number, same_prompts in enumerate(zip(*draws, strict=True)):
        if prefix:
            plain = prompts[number * batch_size : (number + 1) * batch_size]
            same_prompts = [with_prompts(rollout, plain, pad_token_id) for rollout in same_prompts]
        if reward is None:
            batches += same_prompts
            continue
        found = torch.stack([response_scores(reward(rollout), rollout.response_mask) for rollout in same_prompts])
        if complete:
            found = found.masked_fill(torch.stack([rollout.truncated for rollout in same_prompts]), -math.inf)
        batches.append(keep_best(same_prompts, found, pad_token_id))
        scores.append(found.amax(0))
    return Draws(batches, torch.cat(scores) if scores else torch.empty(0), sampled)


def keep_best(draws: Sequence[Rollout], scores: Tensor, pad_token_id: int) -> Rollout:
    """Of several rollouts of the same prompts, each row's response with the highest score, the first of equals.

    Args:
        scores: (draws, B).
    """
    best = scores.argmax(0)
    width = max(rollout.response_ids.shape[1] for rollout in draws)
    rows = torch.arange(len(best), device=best.device)

    def choose(field: str, value: int) -> Tensor:
        every = [getattr(rollout, field) for rollout in draws]
        return torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in every])

    mask = choose("response_mask", 0)[best, rows]
    longest = int(mask.sum(1).max())
    return Rollout(
        draws[0].prompt_ids,
        draws[0].prompt_mask,
        choose("response_ids", pad_token_id)[best, rows][:, :longest],
        mask[:, :longest],
        torch.stack([rollout.truncated for rollout in draws])[best, rows],
    )


def with_prompts(rollout: Rollout, prompts: Sequence[Sequence[int]], pad_token_id: int) -> Rollout:
    """The responses of a rollout after other prompts, one a row."""
    device = rollout.prompt_ids.device
    return rollout._replace(
        prompt_ids=pad(prompts, pad_token_id, side="left").to(device),
        prompt_mask=pad([[1] * len(ids) for ids in prompts], 0, side="left").bool().to(device),
    )
