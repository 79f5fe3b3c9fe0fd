"""Sampling responses from a causal language model, one token at a time with a key-value cache.

A row's random numbers belong to the row: its response does not change with the other rows of the batch, the padding, or
how many rows are sampled at once (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgalign.core.tensor_ops import pad, position_ids


class Rollout(NamedTuple):
    """Prompts and their sampled responses.

    Shapes: prompt_ids and prompt_mask (B, P), left-padded; response_ids and response_mask (B, T), right-padded, the
    end-of-sequence token being part of the response; truncated (B,) True where the budget ran out before that token.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    truncated: Tensor

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T) prompt and response."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) True at real tokens."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def rows(self, index: Tensor) -> Rollout:
        """The rows at ``index``, without the columns that are padding in all of them."""
        taken = Rollout(*(field[index] for field in self))
        start = int(taken.prompt_mask.long().argmax(dim=1).min())
        end = int(taken.response_mask.sum(dim=1).max())
        return Rollout(
            taken.prompt_ids[:, start:],
            taken.prompt_mask[:, start:],
            taken.response_ids[:, :end],
            taken.response_mask[:, :end],
            taken.truncated,
        )

    def response_lists(self) -> list[list[int]]:
        """Response ids of each row without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.response_ids, self.response_mask, strict=True)]


def as_rollout(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> Rollout:
    """Given prompts and responses as a ``Rollout`` (not truncated)."""

    def mask(rows: Sequence[Sequence[int]], side: str) -> Tensor:
        return pad([[1] * len(row) for row in rows], 0, side=side).bool().to(device)

    return Rollout(
        pad(prompts, pad_token_id, side="left").to(device),
        mask(prompts, "left"),
        pad(responses, pad_token_id, side="right").to(device),
        mask(responses, "right"),
        torch.zeros(len(prompts), dtype=torch.bool, device=device),
    )


def concatenate(parts: Sequence[Rollout], pad_token_id: int) -> Rollout:
    """Rollouts one below the other, padded to the widest prompt and the longest response of all."""
    if len(parts) == 1:
        return parts[0]
    prompt, response = (max(getattr(part, name).shape[1] for part in parts) for name in ("prompt_ids", "response_ids"))

    def widened(part: Rollout) -> Rollout:
        left, right = (prompt - part.prompt_ids.shape[1], 0), (0, response - part.response_ids.shape[1])
        pad_with = torch.nn.functional.pad
        return Rollout(
            pad_with(part.prompt_ids, left, value=pad_token_id),
            pad_with(part.prompt_mask, left, value=False),
            pad_with(part.response_ids, right, value=pad_token_id),
            pad_with(part.response_mask, right, value=False),
            part.truncated,
        )

    return Rollout(*map(torch.cat, zip(*map(widened, parts), strict=True)))


def uniforms(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Random numbers for ``rows`` responses of up to ``length`` tokens: (rows, length) in [0, 1)."""
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) to ids (B,).

    Temperature 0 is greedy. Far cheaper than ``torch.multinomial`` on the CPU, and a row's draw depends on its own
    random number alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    threshold = uniform.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_responses(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    *,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> Rollout:
    """Sample one response a prompt, of at most ``uniform.shape[1]`` tokens.

    Args:
        model: causal language model of transformers, on the device of the ids.
        prompt_ids, prompt_mask: (B, P), left-padded.
        uniform: (B, T) random numbers, see ``uniforms``.
    """
    rows, budget = uniform.shape
    device = prompt_ids.device
    was_training = model.training
    model.eval()
    mask = prompt_mask.long()
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    ids, positions = prompt_ids, position_ids(mask)
    cache = None
    tokens, masks = [], []
    for step in range(budget):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        drawn = sample_tokens(output.logits[:, -1], uniform[:, step], temperature)
        drawn = torch.where(finished, pad_token_id, drawn)
        tokens.append(drawn)
        masks.append(~finished)
        finished = finished | (drawn == eos_token_id)
        if bool(finished.all()):
            break
        ids = drawn.unsqueeze(-1)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, masks[-1].long().unsqueeze(-1)], dim=1)
    model.train(was_training)
    return Rollout(prompt_ids, prompt_mask.bool(), torch.stack(tokens, 1), torch.stack(masks, 1), ~finished)


def sample_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor,
    *,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> list[Rollout]:
    """Sample a response for each prompt, in batches; ``progress`` is told the number of prompts done in each."""
    device = next(model.parameters()).device
    batches = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        rollout = sample_responses(
            model,
            pad(chosen, pad_token_id, side="left").to(device),
            pad([[1] * len(ids) for ids in chosen], 0, side="left").bool().to(device),
            uniform[start : start + batch_size],
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            temperature=temperature,
        )
        batches.append(rollout)
        if progress is not None:
            progress(len(chosen))
    return batches


def response_logps(model: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the response tokens under ``model`` at a sampling temperature: (B, T), any value outside
    the mask. Gradients flow."""
    from fgalign.core.tensor_ops import token_logps

    logits = response_logits(model, rollout)
    return token_logps(logits / temperature, rollout.response_ids)


def response_logits(model: Any, rollout: Rollout) -> Tensor:
    """Logits that predict each response token: (B, T, V). Only those positions go through the output layer."""
    mask = rollout.attention_mask.long()
    output = model(
        input_ids=rollout.input_ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=rollout.response_ids.shape[1] + 1,
    )
    return output.logits[:, :-1]
