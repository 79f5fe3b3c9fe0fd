"""Models of transformers under torch.compile: what it would compute more often than needed, computed once."""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fgalign.errors import ConfigError

OPTIONS = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
"""Of torch.compile: leave out what inductor has its own code check at every call, a thirtieth of a small model's
update."""


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile cannot work: on the CPU it needs a C++ compiler, on a GPU one for C, with
    which Triton builds what launches its kernels."""
    cpu = device.type == "cpu"
    where, language, variable, known = (
        ("the CPU", "C++", "CXX", ("g++", "clang++")) if cpu else ("a GPU", "C", "CC", ("gcc", "clang"))
    )
    if not any(map(shutil.which, (os.environ.get(variable, known[0]), *known))):
        raise ConfigError(
            f"compile: torch.compile needs a {language} compiler on {where}, found none; install {known[0]}, or turn "
            "it off"
        )


def compile_layers(model: Any) -> None:
    """Run each layer of a model of transformers through torch.compile, in place and for sequences of any length: one
    layer is compiled, the others are like it.

    Raises:
        ConfigError: torch.compile needs a compiler that is not there.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    check_compiler(model.device)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, options=OPTIONS)


@torch.library.custom_op("fgalign::computed", mutates_args=())
def _computed(tables: Sequence[Tensor]) -> list[Tensor]:
    return [table.clone() for table in tables]


@_computed.register_fake
def _(tables: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(table) for table in tables]


def compute_positions_once(model: Any) -> None:
    """Have a model that torch.compile takes as a whole compute the cosines and sines of its rotary positions once a
    pass on the CPU: torch would put them into each loop that reads them, forwards and backwards, a tenth of a small
    model's update. Nothing changes of None, of a model without such positions, and where a row has one token."""

    def computed(_: nn.Module, __: Any, tables: Any) -> Any:
        worth = isinstance(tables, tuple) and tables[0].shape[-2] > 1
        return tuple(_computed(tables)) if worth else tables

    for module in [] if model is None else model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(computed)


class _Joined:
    """Linear layers that read the same tensor, in the order in which they are called. ``left`` holds the outputs of
    those that have not been called yet."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.left: list[Tensor] = []
        self.together: dict[str, Tensor] = {}

    def parameter(self, name: str, device: str) -> Tensor | None:
        """``weight`` or ``bias`` of all, one below the other, in the type in which they multiply."""
        if name in self.together:
            return self.together[name]
        parts = [getattr(layer, name) for layer in self.layers]
        if parts[0] is None:
            return None
        if torch.is_autocast_enabled(device):
            # Before they are joined, or torch would write them down twice.
            parts = [part.to(torch.get_autocast_dtype(device)) for part in parts]
        return torch.cat(parts)

    def join(self) -> None:
        """Hold the parameters one below the other, the layers' own being parts of that: of layers without gradients."""
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in self.layers]
            if parts[0] is not None:
                self.together[name] = torch.cat(parts)
                for layer, part in zip(self.layers, self.together[name].split(self.sizes), strict=True):
                    setattr(layer, name, nn.Parameter(part, requires_grad=False))


class _FirstOfJoined(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out); leaves the outputs of the others."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        joined, device = self._joined, input.device.type
        outputs = nn.functional.linear(input, joined.parameter("weight", device), joined.parameter("bias", device))
        first, *joined.left = outputs.split(joined.sizes, -1)
        return first


class _LaterOfJoined(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), which the first has computed."""
        return self._joined.left.pop(0) if torch.compiler.is_compiling() else super().forward(input)


@torch.no_grad()
def join_products(model: Any) -> None:
    """Have linear layers that read the same tensor (of queries, keys and values; both of a gated layer) computed in one
    matrix product where torch.compile takes a model as a whole, forwards and backwards. Each keeps its own weights, and
    nothing changes of None, of layers with an adapter, and without torch.compile."""
    if model is None:
        return
    parents = {id(child): id(module) for module in model.modules() for child in module.children()}
    calls: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0])))
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(id(layer) for layer, _ in calls)

    def alike(call: tuple[nn.Linear, Tensor]) -> tuple[Any, ...]:
        layer, read = call
        return parents[id(layer)], id(read), layer.bias is None, layer.weight.dtype, times[id(layer)]

    for key, group in groupby(calls, alike):
        layers = [layer for layer, _ in group]
        if len(layers) == 1 or key[-1] > 1:
            continue
        joined = _Joined(layers)
        for layer in layers:
            layer.__class__ = _FirstOfJoined if layer is layers[0] else _LaterOfJoined
            layer._joined = joined


class Bf16Copy:
    """A model for sampling under bf16 autocast whose linear layers hold bf16 copies of a trained model's weights, which
    torch.compile would otherwise turn into bf16 anew for each token. All else is shared with the trained model.

    Args:
        model: causal LM of transformers, without an adapter.
    """

    def __init__(self, model: Any) -> None:
        shared = {id(tensor): tensor for part in (model.parameters(), model.buffers()) for tensor in part}
        self.model = copy.deepcopy(model, shared)
        pairs = zip(model.modules(), self.model.modules(), strict=True)
        self._layers = [(each, copied) for each, copied in pairs if type(each) in _LINEAR]
        groups = {}
        for _, copied in self._layers:
            for name in ("weight", "bias"):
                value = getattr(copied, name)
                if value is not None:
                    setattr(copied, name, nn.Parameter(value.detach().to(torch.bfloat16), requires_grad=False))
            if hasattr(copied, "_joined"):
                groups[id(copied._joined)] = copied._joined
        for joined in groups.values():
            joined.join()

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the trained weights."""
        for each, copied in self._layers:
            for name in ("weight", "bias"):
                if getattr(each, name) is not None:
                    getattr(copied, name).copy_(getattr(each, name))


_LINEAR = (nn.Linear, _FirstOfJoined, _LaterOfJoined)
