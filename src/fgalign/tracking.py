"""MLflow, and the only file that knows it: one run a stage and seed; a failure to track never stops the work.

Runs go to ``MLFLOW_TRACKING_URI``, or to a SQLite store ``mlflow/mlflow.db`` at the repository's root. A run is named
``<profile>/<stage>/seed-<s>`` in the experiment ``fgalign-<profile>``; a name comes again when a stage runs again, and
the newest run of a name belongs to the results on disk. ``FGALIGN_TRACKING=off`` turns tracking off.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fgalign.config import Profile
from fgalign.parallel import is_main_process

_BATCH = 500


def tracking_uri(root: Path) -> str:
    """Where runs go: the environment's ``MLFLOW_TRACKING_URI``, else the local SQLite store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"


class Run:
    """One tracked run. Every method is safe to call whatever becomes of the store."""

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        self._client = client
        self._run_id = run_id
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
        if self._client is not None:
            _safely(lambda: self._client.set_terminated(self._run_id, status))

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if self._client is None or not pending:
            return

        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            batch = [Metric(name, value, now, step) for name, value, step in pending]
            for start in range(0, len(batch), _BATCH):
                self._client.log_batch(self._run_id, metrics=batch[start : start + _BATCH])

        _safely(send)


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


def _open(profile: Profile, stage: str, seed: int | None, params: Mapping[str, Any]) -> Run:
    if os.environ.get("FGALIGN_TRACKING") == "off" or not is_main_process():
        return Run()
    # MLflow tries a server that does not answer for minutes, and each stage would wait for it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    from filelock import FileLock
    from mlflow.entities import Param, RunTag
    from mlflow.tracking import MlflowClient

    # After the import, which sets MLflow's own level.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(profile.root)
    with ExitStack() as stack:
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            # Seeds run side by side, and the first of them makes the store and the experiment.
            stack.enter_context(FileLock(f"{path}.lock", timeout=60))
            _check_sqlite(path)
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, profile, uri)
    run = client.create_run(experiment_id, run_name=run_name(profile.name, stage, seed))
    tags = _tags(profile, stage, seed)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, str(value)[:500]) for key, value in flatten(params).items()],
        tags=[RunTag(key, str(value)[:4000]) for key, value in tags.items()],
    )
    return Run(client, run.info.run_id)


def _experiment(client: Any, profile: Profile, uri: str) -> str:
    name = f"fgalign-{profile.name}"
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    where = profile.root / "mlflow" / "artifacts" if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=where and where.as_uri())


def _check_sqlite(path: Path) -> None:
    """Raise at once if the store cannot be written; MLflow would try again for minutes."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _tags(profile: Profile, stage: str, seed: int | None) -> dict[str, Any]:
    return {
        "profile": profile.name,
        "dvc_stage": os.environ.get("DVC_STAGE", stage),
        "seed": seed,
        "git_commit": _git(profile.root, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(profile.root, "status", "--porcelain", "--untracked-files=no")),
        "dvc_lock": lock_hashes(profile),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "gpu": _gpu(),
    }


def lock_hashes(profile: Profile) -> str:
    """What ``dvc.lock`` says of the profile's data and models as a stage begins, ``path=md5`` a line: DVC writes a
    stage's hashes there when it ends, so all that the stage reads is in it."""
    import yaml

    lock = profile.file.parent / "dvc.lock"
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
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"tracking: MLflow failed ({reason}); the work goes on untracked", file=sys.stderr)
        return None
