"""Seeds side by side: independent work of the same stage in forked processes, where there are cores for it.

A stage that `accelerate launch` started as several processes trains its seeds one after another, each on all of them;
what those processes need to know of each other before accelerate is set up is here too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fgalign.errors import TrainingError
from fgalign.io import atomic_dir

T = TypeVar("T")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1

_work: Callable[[Any], Any] | None = None
_stopped: Any = None
_row = 0


def each_seed(seeds: Sequence[T], work: Callable[[T], R], workers: int) -> list[R]:
    """``work(seed)`` for every seed (or other item), in at most ``workers`` processes at a time; results in their
    order.

    With one worker, or in one of several launched processes, everything runs in this process. Otherwise processes are
    forked, so ``work`` may be a closure; what it returns must be picklable. After an error of one seed none is started
    any more, and the error is raised here once those that run have come to their end; when this process is told to
    stop, or goes away, they are stopped as well.

    Raises:
        TrainingError: a process was killed from outside, as Linux does when memory runs out.
    """
    if workers <= 1 or len(seeds) <= 1 or process_count() > 1:
        return [work(seed) for seed in seeds]
    global _work, _stopped
    context = multiprocessing.get_context("fork")
    _work, _stopped = work, context.Event()
    rows = context.SimpleQueue()
    workers = min(workers, len(seeds))
    for row in range(workers):
        rows.put(row)
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(rows, os.getpid())) as pool:
            futures = [pool.submit(_call, seed) for seed in seeds]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:  # told to stop
                _stopped.set()
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
            failed = [future for future in futures if future.done() and future.exception()]
            if failed:
                _stopped.set()
                pool.shutdown(cancel_futures=True)
                raise failed[0].exception()
            return [future.result() for future in futures]
    except BrokenProcessPool:
        raise TrainingError(
            f"a process that worked on one of the seeds {', '.join(map(str, seeds))} was killed, most often because "
            "memory ran out: set `runtime.workers: 1`"
        ) from None
    finally:
        _work = _stopped = None


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


def agreed(value: T) -> T:
    """The first launched process's ``value``, in all of them; it has to be picklable."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


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


def _start(rows: Any, parent: int) -> None:
    global _row
    _row = rows.get()
    # The handler of the main process would raise inside the pool, which goes on with the next seed.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # a process whose parent was killed would wait for work for good, and hold its memory
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def _call(seed: Any) -> Any:
    assert _work is not None
    if _stopped.is_set():
        return None
    try:
        return _work(seed)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it could not be read in the main process, which would take this one for killed
            raise TrainingError(f"{type(error).__name__}: {error}") from error
        raise
