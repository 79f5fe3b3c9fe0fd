"""Sampling responses from a causal language model, one token at a time with a key-value cache.

A row's random numbers belong to the row: its response does not change with the other rows of the batch, the padding, or
how many rows are sampled at once (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgalign.core.compiled import OPTIONS, Bf16Copy
from fgalign.core.tensor_ops import entropy, pad, position_ids, tempered, token_logps
from fgalign.errors import ConfigError


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
    cumulative = tempered(logits.double(), temperature).softmax(-1).cumsum(-1)
    threshold = uniform.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


class Decoder:
    """Forward passes of sampling, one after the other on the same rows, with a key-value cache that grows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def start(self, rows: int, width: int) -> None:
        """Forget what came before; prompts and responses will be ``rows`` of at most ``width`` tokens together."""
        from fgalign.core.kv_cache import GrowingCache

        self.cache = GrowingCache(self.model.config, width)

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, seen: int, hidden: bool) -> tuple[Tensor, Any]:
        """Logits (B, V) after the new ``ids`` (B, S) at their ``positions``, and with ``hidden`` the last hidden state
        (B, H) that they come from, else None; ``mask`` (B, width) is True at the real ones of the first ``seen``
        tokens, these included."""
        return self._run(self.model, ids, mask[:, :seen], positions, hidden)

    def _run(self, model: Any, ids: Tensor, mask: Tensor, positions: Tensor, hidden: bool) -> tuple[Tensor, Any]:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **({"output_hidden_states": True} if hidden else {}),
        )
        self.cache = output.past_key_values
        return output.logits[:, -1], output.hidden_states[-1][:, -1] if hidden else None


class CompiledDecoder(Decoder):
    """A decoder whose passes over one token a row go through torch.compile, with a key-value cache of fixed size: a
    multiple of ``BLOCK``, and never smaller than one before, so that few shapes are compiled (torch compiles some ten
    seconds for each, and runs without compiling after eight). ``bf16`` is for sampling under bf16 autocast: from copies
    of the model's weights, which ``sync`` renews."""

    BLOCK = 64

    def __init__(self, model: Any, bf16: bool = False) -> None:
        self._copy = Bf16Copy(model) if bf16 else None
        super().__init__(self._copy.model if self._copy else model)
        self._compiled = torch.compile(self.model, dynamic=False, options=OPTIONS)
        self._caches: dict[int, Any] = {}
        self._length = 0
        self._padding = 0

    def sync(self) -> None:
        """Take over weights that have changed."""
        if self._copy is not None:
            self._copy.sync()

    def start(self, rows: int, width: int) -> None:
        """See ``Decoder``. A cache is kept for as many rows as it has, because what is compiled is bound to its memory,
        until a longer one is needed."""
        from fgalign.core.kv_cache import FixedCache

        if width > self._length:
            self._length = -(-width // self.BLOCK) * self.BLOCK
            self._caches.clear()
        self._padding = self._length - width
        if rows in self._caches:
            self._caches[rows].reset()
        else:
            self._caches[rows] = FixedCache(config=self.model.config, max_cache_len=self._length)
        self.cache = self._caches[rows]

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor, seen: int, hidden: bool) -> tuple[Tensor, Any]:
        """See ``Decoder``."""
        mask = torch.nn.functional.pad(mask, (0, self._padding))
        return self._run(self._compiled if ids.shape[1] == 1 else self.model, ids, mask, positions, hidden)


@torch.no_grad()
def check_fixed_cache(model: Any, pad_token_id: int) -> None:
    """Raise ConfigError where a model says something else with the fixed-size cache of ``CompiledDecoder`` than with
    one that grows, as those do that keep windows or states of their own (GPT-Neo, LFM2): three steps of two rows, one
    of them padded."""
    known = [token for token in range(5) if token != pad_token_id][:4]
    prompts = torch.tensor([known, [pad_token_id, pad_token_id, *known[:2]]], device=model.device)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], device=model.device)
    growing, fixed = Decoder(model), CompiledDecoder(model)
    fixed._compiled = model  # the cache is in question, not the compiler
    logits = []
    for decoder in (growing, fixed):
        decoder.start(2, mask.shape[1])
        ids, positions = prompts, position_ids(mask[:, :4])
        steps = []
        for seen in range(4, 7):
            now = mask.clone()
            now[:, seen:] = 0
            steps.append(decoder.step(ids, now, positions, seen, False)[0].float())
            ids, positions = prompts[:, seen - 4 : seen - 3], positions[:, -1:] + 1
        logits.append(torch.stack(steps).log_softmax(-1))
    difference = float((logits[0] - logits[1]).abs().max())
    if not difference < 0.05:
        raise ConfigError(
            f"compile: expected a model that works with a key-value cache of fixed size, found {type(model).__name__}, "
            f"whose log-probabilities differ by {difference:.2g} nats with it; use compile: false"
        )


class Recorder:
    """Keeps what a policy says of the tokens that it samples, so that no pass over the finished responses is needed:
    the same numbers up to rounding. ``value_head`` (None: values are 0) maps hidden states (B, H) to values (B,);
    ``compiled`` draws a token and says what there is to say of it in one go, through torch.compile."""

    def __init__(self, value_head: Callable[[Tensor], Tensor] | None = None, compiled: bool = False) -> None:
        self.value_head = value_head
        self._draw = torch.compile(_draw_at_once, options=OPTIONS) if compiled else _draw
        self._batches: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def start(self) -> None:
        """The tokens to come are those of further rows."""
        self._batches.append([])

    def draw(self, logits: Tensor, hidden: Tensor | None, uniform: Tensor, temperature: float) -> Tensor:
        """``sample_tokens``, whose arguments these are, keeping what is said of the tokens; ``hidden`` are the states
        (B, H) before the value head."""
        drawn, *said = self._draw(logits, hidden, uniform, temperature, self.value_head)
        self._batches[-1].append(tuple(said))
        return drawn

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies of all tokens noted so far, (B, T) each, any value outside the mask;
        then nothing is kept."""
        width = max(map(len, self._batches))
        parts = [
            [
                torch.nn.functional.pad(torch.stack(field, 1), (0, width - len(batch)))
                for field in zip(*batch, strict=True)
            ]
            for batch in self._batches
        ]
        self._batches = []
        logps, values, entropies = map(torch.cat, zip(*parts, strict=True))
        return logps, values, entropies


Drawn = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids, their log-probabilities, values of the states before them, entropies of their distributions: (B,) each."""


def _draw(
    logits: Tensor,
    hidden: Tensor | None,
    uniform: Tensor,
    temperature: float,
    value_head: Callable[[Tensor], Tensor] | None,
) -> Drawn:
    drawn = sample_tokens(logits, uniform, temperature)
    scaled = tempered(logits, temperature)
    logps = token_logps(scaled, drawn)
    return drawn, logps, _values(logps, hidden, value_head), entropy(scaled)


def _draw_at_once(
    logits: Tensor,
    hidden: Tensor | None,
    uniform: Tensor,
    temperature: float,
    value_head: Callable[[Tensor], Tensor] | None,
) -> Drawn:
    """``_draw`` with one exponential a logit in place of three, up to rounding: they are taken in float32 and added up
    in float64."""
    scaled = tempered(logits, temperature).float()
    above = scaled.amax(-1, keepdim=True)
    weights = (scaled - above).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniform.to(total.device).unsqueeze(-1) * total, right=True)
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    log_total = total.log().float()
    logps = (scaled.gather(-1, drawn) - above - log_total).squeeze(-1)
    expected = (weights * (scaled - above)).sum(-1, keepdim=True) / total.float()
    return drawn.squeeze(-1), logps, _values(logps, hidden, value_head), (log_total - expected).squeeze(-1)


def _values(logps: Tensor, hidden: Tensor | None, value_head: Callable[[Tensor], Tensor] | None) -> Tensor:
    return torch.zeros_like(logps) if value_head is None else value_head(hidden)


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
    decoder: Decoder | None = None,
    recorder: Recorder | None = None,
) -> Rollout:
    """Sample one response a prompt, of at most ``uniform.shape[1]`` tokens.

    Args:
        model: causal language model of transformers, on the device of the ids.
        prompt_ids, prompt_mask: (B, P), left-padded.
        uniform: (B, T) random numbers, see ``uniforms``.
        decoder: what runs the model (None: a new ``Decoder``).
        recorder: draws the tokens (None: ``sample_tokens`` does) and keeps what the model says of them.
    """
    rows, budget = uniform.shape
    width, device = prompt_ids.shape[1], prompt_ids.device
    was_training = model.training
    model.eval()
    decoder = decoder or Decoder(model)
    decoder.start(rows, width + budget)
    hidden = recorder is not None and recorder.value_head is not None
    if recorder is not None:
        recorder.start()
    mask = torch.nn.functional.pad(prompt_mask.long(), (0, budget))
    uniform = uniform.to(device)  # once, not a column a token
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    ids, positions = prompt_ids, position_ids(prompt_mask)
    tokens, masks = [], []
    for step in range(budget):
        logits, state = decoder.step(ids, mask, positions, width + step, hidden)
        if recorder is None:
            drawn = sample_tokens(logits, uniform[:, step], temperature)
        else:
            drawn = recorder.draw(logits, state, uniform[:, step], temperature)
        drawn = torch.where(finished, pad_token_id, drawn)
        tokens.append(drawn)
        masks.append(~finished)
        mask[:, width + step] = masks[-1]
        finished = finished | (drawn == eos_token_id)
        if bool(finished.all()):
            break
        ids = drawn.unsqueeze(-1)
        positions = positions[:, -1:] + 1
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
    return token_logps(tempered(response_logits(model, rollout), temperature), rollout.response_ids)


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
