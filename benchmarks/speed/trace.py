"""What a part of a PPO update spends a device's time on, by torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

# Parts of the names of kernels (GPU) and operators (CPU); the first kind that fits counts.
KINDS = (
    ("attention", ("attention", "flash", "fmha", "sdpa")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn_linear")),
)
BUSY = 0.8
"""Share of the time from which on the device itself counts as the limit."""


def kind(name: str) -> str:
    """``attention``, ``products`` or ``other``."""
    return next((found for found, parts in KINDS if any(part in name.lower() for part in parts)), "other")


def seconds_by_kind(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Names of kernels or operators and their own microseconds, to seconds of each kind."""
    seconds = {"attention": 0.0, "products": 0.0, "other": 0.0}
    for name, microseconds in events:
        seconds[kind(name)] += microseconds * 1e-6
    return seconds


def traced(function: Callable[..., Any], device: str, name: str, into: dict[str, float]) -> Callable[..., Any]:
    """``function``, which also writes into ``into`` its seconds under the profiler (``<name>/wall``) and the device's
    of each kind (``<name>/<kind>``)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from speed.gate import finish_gpu

    gpu = device == "cuda"

    def run(*args: Any, **options: Any) -> Any:
        finish_gpu()
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            result = function(*args, **options)
            finish_gpu()
            into[f"{name}/wall"] = time.perf_counter() - started
        where = DeviceType.CUDA if gpu else DeviceType.CPU
        events = [
            (event.key, event.self_device_time_total if gpu else event.self_cpu_time_total)
            for event in profiler.key_averages()
            if event.device_type == where
        ]
        into.update({f"{name}/{found}": seconds for found, seconds in seconds_by_kind(events).items()})
        return result

    return run


def limits(found: dict[str, float], name: str) -> str:
    """What limits a part that ``traced`` has seen: the device, with what it is busy most, or the processor."""
    shares = {each: found[f"{name}/{each}"] / found[f"{name}/wall"] for each in ("products", "attention", "other")}
    busy = sum(shares.values())
    parts = ", ".join(f"{each} {share:.0%}" for each, share in shares.items())
    largest = max(shares, key=shares.__getitem__)
    by = f"limited by {largest}" if busy >= BUSY else "limited by what the processor does between kernels"
    return f"busy {busy:.0%} of a profiled run ({parts}): {by}"
