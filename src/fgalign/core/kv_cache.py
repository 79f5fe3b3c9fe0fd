"""Key-value caches of transformers for sampling, one of growing length and one of fixed size.

Both hold keys and values in one type. Under bf16 autocast the rotary embedding turns keys into float32, and values stay
bf16: the first cache would take half as much memory again; the second, which has one type for both, would fail. The
type is that of the values, or float32 where attention computes in it (``modeling.attend_in_float32``), which would turn
all of a bf16 cache into float32 at each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from fgalign.core.modeling import attends_in_float32


class _OneType:
    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config=config, **options)
        self._type = torch.float32 if attends_in_float32(config) else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """See ``transformers.Cache``; (B, heads, S, size) each."""
        dtype = self._type or value_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **options)


class GrowingCache(_OneType, DynamicCache):
    """A cache whose layers write new tokens into room for ``length`` tokens, of which attention sees those that are
    there; transformers' own copies all of it in each step. Layers of other kinds (sliding windows, states) are
    transformers'."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config)
        self.layers = [_Layer(length) if type(layer) is DynamicLayer else layer for layer in self.layers]


class _Layer(DynamicLayer):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._rooms: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, the new ones included: views of the room, (B, heads, seen, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = tuple(
                new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in (key_states, value_states)
            )
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values


class FixedCache(_OneType, StaticCache):
    """A cache of fixed size, all of which attention sees through a mask, also in layers with a sliding window:
    transformers' own for those counts tokens in Python, so that torch would compile anew at each."""

    def __init__(self, config: Any, max_cache_len: int) -> None:
        super().__init__(config, max_cache_len=max_cache_len)
        self.layers = [
            StaticLayer(max_cache_len) if type(layer) is StaticSlidingWindowLayer else layer for layer in self.layers
        ]
