"""Seeds side by side: independent work of the same stage in forked processes, where there are cores for it.

A stage that `accelerate launch` started as several processes trains its seeds one after another, each on all of them;
what those processes need to know of each other before accelerate is set up is here too.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fgalign.errors import TrainingError
from fgalign.io import atomic_dir

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None
_row = 0


def each_seed(seeds: Sequence[T], work: Callable[[T], R], workers: int) -> list[R]:
    """``work(seed)`` for every seed (or other item), in at most ``workers`` processes at a time; results in their
    order.

    With one worker, or in one of several launched processes, everything runs in this process. Otherwise processes are
    forked, so ``work`` may be a closure; what it returns must be picklable. An error of one seed is raised here once
    the others have stopped.

    Raises:
        TrainingError: a process was killed from outside, as Linux does when memory runs out.
    """
    if workers <= 1 or len(seeds) <= 1 or process_count() > 1:
        return [work(seed) for seed in seeds]
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    rows = context.SimpleQueue()
    workers = min(workers, len(seeds))
    for row in range(workers):
        rows.put(row)
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(rows,)) as pool:
            futures = [pool.submit(_call, seed) for seed in seeds]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise TrainingError(
            f"a process that worked on one of the seeds {', '.join(map(str, seeds))} was killed, most often because "
            "memory ran out: set `runtime.workers: 1`"
        ) from None
    finally:
        _work = None


def progress(total: int, title: str, unit: str) -> Any:
    """A tqdm bar, on a line of its own when several processes show one; of launched processes the first shows it."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, mininterval=1.0, position=_row, disable=not is_main_process())


def process_count() -> int:
    """Number of processes that `accelerate launch` (or torchrun) started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the only one or the first of those launched: the one that writes and prints."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def wait_for_everyone() -> None:
    """Wait for the other launched processes; nothing to do without them."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def output_dir(path: str | Path) -> Iterator[Path]:
    """The folder that a stage writes into: ``io.atomic_dir``. Of several launched processes only the first one's is
    put in place, once all have come to the end; each other gets an empty folder that is thrown away."""
    with atomic_dir(path) if is_main_process() else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        wait_for_everyone()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def can_fork() -> bool:
    """Whether processes can be forked safely (Linux)."""
    return sys.platform == "linux"


def _start(rows: Any) -> None:
    global _row
    _row = rows.get()


def _call(seed: Any) -> Any:
    assert _work is not None
    return _work(seed)
