"""How the two sides of a comparison take turns: each runs in a process of its own and stops at a gate after each unit
of work (a PPO update, some training steps), until the comparison lets it go on.

The standard library alone: the side that runs in TRL's own environment imports this file too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Stop(Exception):
    """The comparison is over; ends a side's own loop wherever it stands."""


class Next(Exception):
    """This workload is done; ends a side's own loop wherever it stands, and the side starts on its next options."""


class Gate:
    """The side's end. ``receive`` blocks until the next command, ``send`` answers."""

    def __init__(self, receive: Callable[[], str], send: Callable[[Mapping[str, Any]], None]) -> None:
        self._receive, self._send = receive, send
        self._wall = self._cpu = 0.0

    def ready(self) -> None:
        """Say that models and data are loaded; wait for the first unit."""
        self._send({"peak_memory": peak_memory()})
        self._wait()

    def done(self, **counts: float) -> None:
        """End a unit with what it counted (``tokens``, ...); wait for the next one.

        Sent with it: ``seconds`` of wall time, ``cpu_seconds`` of this process, ``peak_memory`` in bytes so far.

        Raises:
            Stop, Next: there is no next one.
        """
        finish_gpu()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._send({"seconds": wall, "cpu_seconds": cpu, "peak_memory": peak_memory(), **counts})
        self._wait()

    def _wait(self) -> None:
        command = self._receive()
        if command != "go":
            raise Next if command == "next" else Stop
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def cuda() -> Any | None:
    """``torch.cuda`` where this process uses a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def finish_gpu() -> None:
    """Wait for what a GPU has been told to do: a unit is not over before."""
    if (gpu := cuda()) is not None:
        gpu.synchronize()


def peak_memory() -> int:
    """Most memory that this process has held so far, in bytes; of the GPU where torch uses one, else resident."""
    if (gpu := cuda()) is not None:
        return int(gpu.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Side = Callable[[dict[str, Any], Gate], None]
"""Prepares what its options say, then calls the gate's ``ready``, and ``done`` after each unit until that raises."""


def one_after_the_other(side: Side, every: Sequence[dict[str, Any]], gate: Gate) -> None:
    """Run a side with each of some options in turn.

    Raises:
        Stop: the comparison is over.
    """
    for options in every:
        with contextlib.suppress(Next):
            side(options, gate)
        gc.collect()
        forget_peak()


def forget_peak() -> None:
    """Count peak memory from here on, on the CPU, without what the C library keeps for the next tensors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(side: Side) -> None:
    """Run a side as this process: a list of options is the first argument (JSON), commands come in on standard input,
    answers go out on standard output, and whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        one_after_the_other(side, json.loads(sys.argv[1]), Gate(lambda: sys.stdin.readline().strip(), send))
    except Stop:
        # Nothing is left to save, and tearing a trainer down takes seconds.
        os._exit(0)


class Runner:
    """The comparison's end of a side."""

    def _command(self, command: str) -> None:
        raise NotImplementedError

    def _answer(self) -> dict[str, float]:
        raise NotImplementedError

    def unit(self) -> dict[str, float]:
        """Let the side do one unit; what ``Gate.done`` sent."""
        self._command("go")
        return self._answer()

    def next(self) -> dict[str, float]:
        """Let the side start on its next options; what ``Gate.ready`` sent."""
        self._command("next")
        return self._answer()


class Process(Runner):
    """A side in a process of its own.

    Args:
        python: interpreter of the side's environment.
        module: module that calls ``serve``, importable from the folder ``benchmarks``.
        every: what the side is told, one mapping a workload; ``threads`` and ``device`` are those of the first.
        log: file for what the side prints.

    Raises:
        RuntimeError: the side ended; the message has the end of its log.
    """

    def __init__(self, python: str | Path, module: str, every: Sequence[Mapping[str, Any]], log: Path) -> None:
        self.log = log
        folders = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "TOKENIZERS_PARALLELISM": "false"}
        env |= {"OMP_NUM_THREADS": str(every[0]["threads"]), "HF_HUB_OFFLINE": "1", "FGALIGN_TRACKING": "off"}
        if every[0]["device"] == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""  # TRL's trainer would take a GPU that is there
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(every)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        self.start = self._answer()

    def close(self) -> None:
        """End the side."""
        self._process.stdin.close()
        self._process.wait(timeout=600)

    def _command(self, command: str) -> None:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"a side of the comparison ended with code {self._process.wait()}:\n{end}")
        return json.loads(line)


class Thread(Runner):
    """A side in a thread of this process: for quick runs, as memory and imports are shared. Arguments as in
    ``Process``; an error of the side is raised here."""

    def __init__(self, side: Side, every: Sequence[dict[str, Any]]) -> None:
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            try:
                one_after_the_other(side, every, Gate(self._commands.get, self._answers.put))
            except Stop:
                pass
            except BaseException as error:
                self._answers.put(error)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        self.start = self._answer()

    def close(self) -> None:
        """End the side."""
        self._commands.put("stop")
        self._thread.join()

    def _command(self, command: str) -> None:
        self._commands.put(command)

    def _answer(self) -> dict[str, float]:
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def alternate(sides: Mapping[str, Any], rounds: int, warmup: int) -> dict[str, list[dict[str, float]]]:
    """Let the sides take turns, in the opposite order in every second round, and keep the answers of ``rounds`` rounds
    after ``warmup`` that do not count. Name of a side to its answers, in the order of the rounds."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        for name in turn(list(sides), number):
            answer = sides[name].unit()
            if number >= 0:
                answers[name].append(answer)
    return answers


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: as given in even rounds, reversed in odd ones."""
    return list(names) if number % 2 == 0 else list(reversed(names))
