"""Key-value caches of transformers that hold keys in the type of the values.

Under bf16 autocast the rotary embedding turns keys into float32, and values stay bf16: a cache that grows would then
take half as much memory again, and one of fixed size, which has one type for both, would fail.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache


class _KeysLikeValues:
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """See ``transformers.Cache``; (B, heads, S, size) each."""
        return super().update(key_states.to(value_states.dtype), value_states, *args, **options)


class GrowingCache(_KeysLikeValues, DynamicCache):
    """A cache that grows by a copy in each step."""


class FixedCache(_KeysLikeValues, StaticCache):
    """A cache of fixed size."""
