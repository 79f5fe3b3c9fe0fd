"""Parts of a stage, such as seeds, that were ready when it stopped, by an error, a signal or a machine that went away.

A stage writes its parts into ``data/<profile>/unfinished/<stage>`` and moves them to their place once all are ready.
What it finds there when it starts again it takes over, if nothing has changed that a part can depend on: the profile,
this package's code, the libraries, the processor, and the files that the part had read. Everything else there goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.hardware import PACKAGES, cpuinfo
from fgalign.io import put_dir, read_json, sha256, write_json
from fgalign.parallel import agreed, is_main_process, process_count, wait_for_everyone

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Parts:
    """The parts of a stage while it runs. ``folder`` takes one folder a part, its name being a path in there; those of
    ``ready`` are there already."""

    folder: Path
    ready: Sequence[str]
    marks: Path | None
    """Where each part that is ready leaves a file; None in launched processes that write nothing."""
    conditions: str

    def finish(self, name: str, inputs: Iterable[Path]) -> None:
        """Note that a part is ready, and which files or folders it has read."""
        if self.marks is not None:
            mark = {
                "conditions": self.conditions,
                "inputs": {str(path): stamps(path) for path in sorted(inputs)},
                "sizes": sizes(self.folder / name),
            }
            write_json(self.marks / f"{name}.json", mark)


@contextmanager
def stage_parts(profile: Profile, stage: str, names: Sequence[str], target: Path, device: str) -> Iterator[Parts]:
    """The parts of a stage, put in place together when the block ends well. When it does not, those that are ready
    stay. Of several launched processes the first one keeps and writes.

    Args:
        names: of the parts: paths relative to the folder that they are in.
        target: that folder's place.
        device: what they are made on.

    Raises:
        InputError: another process runs this stage.
    """
    conditions = digest({**conditions_of(profile), "device": device})
    if not is_main_process():
        with tempfile.TemporaryDirectory() as folder:
            yield Parts(Path(folder), agreed([]), None, conditions)
            wait_for_everyone()
        return
    aside = profile.data / "unfinished" / stage
    folder, marks = aside / "parts", aside / "ready"

    def keep(kept: Sequence[str]) -> None:
        remove_others(folder, {folder / name for name in kept})
        remove_others(marks, {marks / f"{name}.json" for name in kept})

    with alone(aside):
        ready = [name for name in names if is_ready(folder, marks, name, conditions)]
        keep(ready)
        try:
            yield Parts(folder, agreed(ready), marks, conditions)
            wait_for_everyone()
        except BaseException:
            keep([name for name in names if (marks / f"{name}.json").exists()])
            raise
        put_dir(folder, target)
        shutil.rmtree(aside)


def conditions_of(profile: Profile) -> dict[str, Any]:
    """What a part can depend on beside the files that it reads."""
    import torch

    code = {str(path.relative_to(PACKAGE)): sha256(path) for path in sorted(PACKAGE.rglob("*.py"))}
    processor = cpuinfo()
    return {
        "profile": {name: value for name, value in profile.params.items() if name != "report"},
        "code": code,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": [processor.get(name, "") for name in ("model name", "cpu family", "model")],
        "gpus": gpus(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
    }


def gpus() -> list[str]:
    """The models of this machine's GPUs. Asking torch would start CUDA, which forked processes could not use then."""
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    return sorted(line for file in files for line in file.read_text().splitlines() if line.startswith("Model:"))


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def is_ready(folder: Path, marks: Path, name: str, conditions: str) -> bool:
    """Whether a part's folder is there as it was when the part was ready, and under the same conditions."""
    try:
        mark = read_json(marks / f"{name}.json")
        return (
            mark["conditions"] == conditions
            and (folder / name).is_dir()
            and all(stamps(Path(path)) == stamp for path, stamp in mark["inputs"].items())
            and mark["sizes"] == sizes(folder / name)
        )
    except (InputError, KeyError, TypeError):
        return False


def stamps(path: Path) -> dict[str, list[int]]:
    """Size and time of change (ns) of a file, or of each file in a folder; a file that is written anew differs."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = {str(file.relative_to(path)): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder: less than were written, after a power failure."""
    return {name: size for name, (size, _) in stamps(folder).items()}


def remove_others(folder: Path, kept: set[Path]) -> None:
    """Leave only these of the files and folders within ``folder``, and the folders that lead to them; ``folder`` itself
    is there afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if any(path in each.parents for each in kept):
            remove_others(path, kept)
        elif path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while the block runs.

    Raises:
        InputError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process runs this stage; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
