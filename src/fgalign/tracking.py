"""MLflow, and the only file that knows it: one run a stage and seed; a failure to track never stops the work.

Runs go to ``MLFLOW_TRACKING_URI``, or to a SQLite store ``mlflow/mlflow.db`` at the repository's root. A run is named
``<profile>/<stage>/seed-<s>`` in the experiment ``fgalign-<profile>``; a name comes again when a stage runs again, and
the newest run of a name belongs to the results on disk. ``FGALIGN_TRACKING=off`` turns tracking off.

The store is written by a second process, ``python -m fgalign.tracking``, that takes one JSON object a line on its
standard input: importing MLflow takes seconds, which pass there while a stage imports torch, and a store that hangs
holds up nothing. Processes forked for the seeds share it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fgalign.config import Profile
from fgalign.parallel import is_main_process

COMMAND = [sys.executable, "-m", "fgalign.tracking"]
"""Starts the writing process."""
_BATCH = 500
_PATIENCE = 60.0
"""Seconds to wait for the writing process before the work goes on without it."""
_GIVE_UP = 3
"""Errors in a row after which the store gets nothing more."""


def tracking_uri(root: Path) -> str:
    """Where runs go: the environment's ``MLFLOW_TRACKING_URI``, else the local SQLite store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"


class Run:
    """One tracked run. Every method is safe to call whatever becomes of the store."""

    def __init__(self, send: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._send = send or (lambda message: None)
        self._pending: list[tuple[str, float, int]] = []
        self.started = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Note metrics at a step; they reach the store in batches."""
        self._pending += [(name, float(value), step) for name, value in metrics.items() if _is_number(value)]
        if len(self._pending) >= _BATCH:
            self._flush()

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is pending and close the run with ``FINISHED`` or ``FAILED``."""
        self.log({"seconds": time.monotonic() - self.started})
        self._flush()
        self._send({"do": "end", "status": status})

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), _BATCH):
            self._send({"do": "log", "time": _now(), "metrics": pending[start : start + _BATCH]})


@contextmanager
def track(
    profile: Profile, stage: str, seed: int | None, params: Mapping[str, Any], started: float | None = None
) -> Iterator[Run]:
    """A run around a block: parameters, commit, stage, lock hashes and machine as tags; closed also on an error.

    The stage's tag is the name that DVC gives it (``DVC_STAGE``), outside DVC the one passed here. ``started``
    (``time.monotonic()``) says when the work began, for a run that opens late.
    """
    run = _safely(lambda: _open(profile, stage, seed, params)) or Run()
    run.started = started or run.started
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def run_name(profile: str, stage: str, seed: int | None) -> str:
    """Name of a stage's run."""
    return f"{profile}/{stage}" + ("" if seed is None else f"/seed-{seed}")


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def start() -> None:
    """Start the writing process, if tracking is on and none runs: the earlier, the more of its imports are done when a
    run opens, which starts it otherwise."""
    global _writer
    if _writer is None and os.environ.get("FGALIGN_TRACKING") != "off" and is_main_process():
        _writer = _safely(_Writer)


def stop() -> None:
    """Wait until all that was sent is in the store, and end the writing process."""
    global _writer
    writer, _writer = _writer, None
    if writer is not None:
        _safely(writer.close)


class _Writer:
    """The writing process, from the side of those that send to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.lock = multiprocessing.get_context("fork" if sys.platform != "win32" else None).Lock()
        self.process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)
        self.broken = False

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; TimeoutError if the process takes none for a minute, BrokenPipeError if it is gone. After an
        error it sends nothing."""
        if self.broken:
            return
        data = memoryview(json.dumps(message).encode() + b"\n")
        self.broken = True
        if not self.lock.acquire(timeout=_PATIENCE):
            raise TimeoutError("another process did not let go of the tracking process")
        try:
            while data:
                if not select.select([], [self.pipe], [], _PATIENCE)[1]:
                    raise TimeoutError(f"the store took nothing for {_PATIENCE:.0f} seconds")
                data = data[os.write(self.pipe, data[: select.PIPE_BUF]) :]
            self.broken = False
        finally:
            self.lock.release()

    def close(self) -> None:
        """End it; only the process that started it can, a forked one leaves it alone."""
        if os.getpid() != self.owner:
            return
        self.process.stdin.close()
        self.process.wait(_PATIENCE)


_writer: _Writer | None = None
_numbers = itertools.count()
atexit.register(stop)


def _open(profile: Profile, stage: str, seed: int | None, params: Mapping[str, Any]) -> Run:
    start()
    writer = _writer
    if writer is None:
        return Run()
    name = f"{os.getpid()}-{next(_numbers)}"

    def send(message: dict[str, Any]) -> None:
        if _writer is writer:
            _safely(lambda: writer.send({"run": name, **message}))

    send(
        {
            "do": "open",
            "time": _now(),
            "profile": profile.name,
            "root": str(profile.root.resolve()),
            "file": str(profile.file.resolve()),
            "stage": stage,
            "seed": seed,
            "params": {key: str(value)[:500] for key, value in flatten(params).items()},
            "gpu": _gpu(),
        }
    )
    return Run(send)


# --- the writing process ----------------------------------------------------------------------------------------------


def write(lines: Iterable[str]) -> None:
    """Write what the lines say to the store; a run that none of them ends is ended as killed. The first error is
    printed, what failed is left out, and some errors in a row end the writing, not the reading: the sender must never
    wait."""
    runs: dict[str, tuple[Any, str]] = {}
    failures = 0

    def attempt(action: Callable[[], None]) -> None:
        nonlocal failures
        if failures < _GIVE_UP:
            failures = 0 if _safely(lambda: (action(), "done")) else failures + 1

    def carry_out(message: dict[str, Any]) -> None:
        if message["do"] == "open":
            runs[message["run"]] = _create(message)
        elif message["run"] not in runs:  # it could not be opened
            return
        elif message["do"] == "log":
            from mlflow.entities import Metric

            client, run_id = runs[message["run"]]
            metrics = [Metric(name, value, message["time"], step) for name, value, step in message["metrics"]]
            client.log_batch(run_id, metrics=metrics)
        else:
            client, run_id = runs.pop(message["run"])
            client.set_terminated(run_id, message["status"])

    for line in lines:
        attempt(lambda line=line: carry_out(json.loads(line)))
    for name in list(runs):
        attempt(lambda name=name: carry_out({"do": "end", "run": name, "status": "KILLED"}))


def _create(message: dict[str, Any]) -> tuple[Any, str]:
    """A client and the id of a new run."""
    from mlflow.entities import Param, RunTag

    root, lock = Path(message["root"]), Path(message["file"]).with_name("dvc.lock")
    client, experiment_id = _store(message["profile"], root)
    name = run_name(message["profile"], message["stage"], message["seed"])
    run = client.create_run(experiment_id, start_time=message["time"], run_name=name)
    tags = {
        "profile": message["profile"],
        "dvc_stage": os.environ.get("DVC_STAGE", message["stage"]),
        "seed": message["seed"],
        "gpu": message["gpu"],
        **_surroundings(root, lock),
    }
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in message["params"].items()],
        tags=[RunTag(key, str(value)[:4000]) for key, value in tags.items()],
    )
    return client, run.info.run_id


@cache
def _store(profile: str, root: Path) -> tuple[Any, str]:
    """A client and the id of the profile's experiment, made if need be."""
    from filelock import FileLock
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(root)
    with ExitStack() as stack:
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of stages that run side by side the first makes the store and the experiment.
            stack.enter_context(FileLock(f"{path}.lock", timeout=60))
            _check_sqlite(path)
        client = MlflowClient(tracking_uri=uri)
        return client, _experiment(client, profile, root, uri)


def _experiment(client: Any, profile: str, root: Path, uri: str) -> str:
    name = f"fgalign-{profile}"
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    where = root / "mlflow" / "artifacts" if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=where and where.as_uri())


def _check_sqlite(path: Path) -> None:
    """Raise at once if the store cannot be written; MLflow would try again for minutes."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


@cache
def _surroundings(root: Path, lock: Path) -> dict[str, Any]:
    """Tags that all runs of a stage share: commit, hashes of its inputs, machine, versions."""
    return {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "dvc_lock": lock_hashes(lock),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "transformers": _version("transformers"),
    }


def lock_hashes(lock: Path) -> str:
    """What ``dvc.lock`` says of the profile's data and models as a stage begins, ``path=md5`` a line: DVC writes a
    stage's hashes there when it ends, so all that the stage reads is in it."""
    import yaml

    if not lock.exists():
        return ""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stages = (yaml.load(lock.read_text(encoding="utf-8"), loader) or {}).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return "\n".join(f"{out['path']}={out.get('md5', '')}" for out in outs if out["path"].startswith("data/"))


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpu() -> str:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "none"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


_warned = False


def _safely(action: Callable[[], Any]) -> Any:
    """Run an action of tracking; on any error say so once and go on."""
    global _warned
    try:
        return action()
    except Exception as error:
        if not _warned:
            _warned = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            reason = re.sub(r"(?<=://)[^/\s]+@", "", reason)[:300]  # a server's address may hold a password
            print(f"tracking: MLflow failed ({reason}); the work goes on, not all of it tracked", file=sys.stderr)
        return None


def _now() -> int:
    return int(time.time() * 1000)


def _main() -> None:
    # Of an interrupted stage the end of its input is the sign to end; what it sent is written first. Ctrl-C and Slurm's
    # time limit go to all processes of a stage.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # MLflow tries a server that does not answer for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    _safely(_import)
    write(sys.stdin)


def _import() -> None:
    """Import what writing needs, that of the default store among it."""
    import logging

    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401

    # After the import, which sets MLflow's own level.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    _main()
