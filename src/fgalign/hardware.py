"""The machine that results come from, and how long the stages took on it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.io import write_json

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def write_hardware(profile: Profile) -> dict[str, Any]:
    """Write ``results/<profile>/hardware.json``: the machine, the versions of what computes, and the seconds of each
    stage's last run.

    Raises:
        InputError: see ``stage_seconds``.
    """
    import torch

    from fgalign.core.modeling import RuntimeConfig

    stages = stage_seconds(timings_file(profile))
    found = {
        **describe(profile.section("runtime", RuntimeConfig).threads or torch.get_num_threads()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "minutes": round(sum(stages.values()) / 60, 1),
        "seconds": stages,
    }
    write_json(profile.results / "hardware.json", found)
    return found


def timings_file(profile: Profile) -> Path:
    """Where each stage of a profile leaves a line when it ends: ``{"stage": ..., "seconds": ...}``."""
    return profile.root / "timings" / f"{profile.name}.jsonl"


def stage_seconds(log: Path) -> dict[str, float]:
    """Seconds of each stage, the newest entry of each, in the order of the file's last entries.

    Raises:
        InputError: no such file, or a line that is not ``{"stage": ..., "seconds": ...}``.
    """
    if not log.exists():
        raise InputError(f"{log}: no timings yet; run the pipeline first (`make reproduce`)")
    seconds: dict[str, float] = {}
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            stage, value = str(entry["stage"]), float(entry["seconds"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{log}:{number}: expected {{"stage": ..., "seconds": ...}}, found {line!r}') from None
        seconds.pop(stage, None)
        seconds[stage] = value
    return seconds


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, threads used, memory (GiB) and GPU (None without one); no name of the machine."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    cpu = cpuinfo()
    return {
        "processor": cpu.get("model name", platform.processor()),
        "family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "instructions": [name for name in INSTRUCTIONS if name in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
