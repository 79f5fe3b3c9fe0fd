"""Key-value caches of transformers for sampling, one of growing length and one of fixed size.

Both hold keys in the type of the values. Under bf16 autocast the rotary embedding turns keys into float32, and values
stay bf16: the first cache would take half as much memory again; the second, which has one type for both, would fail.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer


class _KeysLikeValues:
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """See ``transformers.Cache``; (B, heads, S, size) each."""
        return super().update(key_states.to(value_states.dtype), value_states, *args, **options)


class GrowingCache(_KeysLikeValues, DynamicCache):
    """A cache whose layers write new tokens into room for ``length`` tokens, of which attention sees those that are
    there; transformers' own copies all of it in each step. Layers of other kinds (sliding windows, states) are
    transformers'."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config)
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


class FixedCache(_KeysLikeValues, StaticCache):
    """A cache of fixed size, all of which attention sees through a mask."""
