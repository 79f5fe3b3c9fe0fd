"""Tracking: what reaches a real SQLite store, and that a broken store stops nothing."""

from __future__ import annotations

import math
import socket
import sys
import time

import pytest

from fgalign import tracking
from fgalign.config import Profile
from fgalign.tracking import Run, flatten, lock_hashes, run_name, track, tracking_uri

PARAMS = {"optim": {"learning_rate": 0.1, "lora": None}, "epochs": 2, "long": "x" * 600}


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.delenv("FGALIGN_TRACKING", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_warned", False)
    return Profile("mini", tmp_path, {}, tmp_path / "params.yaml")


def test_names(profile, monkeypatch, tmp_path):
    assert run_name("mini", "sft", 2) == "mini/sft/seed-2"
    assert run_name("mini", "base", None) == "mini/base"
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": []}) == {"a.b.c": 1, "a.d": 2, "e": []}
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert tracking_uri(tmp_path) == "http://elsewhere"


def test_lock_hashes(profile, tmp_path):
    assert lock_hashes(profile) == ""
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  raw:\n    cmd: x\n    outs:\n    - {path: data/t/raw, md5: 22.dir}\n"
        "  judge:\n    cmd: y\n    deps:\n    - {path: a.py, md5: '11'}\n    outs:\n"
        "    - {path: results/t/a.csv, md5: '33'}\n    - {path: data/t/b.jsonl, md5: '44'}\n"
    )
    assert lock_hashes(profile) == "data/t/raw=22.dir\ndata/t/b.jsonl=44"


def test_runs_in_a_real_store(profile, tmp_path, capfd):
    from mlflow.tracking import MlflowClient

    with track(profile, "sft", 2, PARAMS) as run:
        for step in range(3):
            run.log({"loss": 3.0 - step, "text": "not a number", "nan": math.nan}, step)
    with pytest.raises(KeyError), track(profile, "sft", 3, {}) as run:
        run.log({"loss": 9.0}, 1)
        raise KeyError("the stage broke")
    assert capfd.readouterr().err == ""

    client = MlflowClient(tracking_uri=tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("fgalign-mini")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"mini/sft/seed-2", "mini/sft/seed-3"}
    good, failed = runs["mini/sft/seed-2"], runs["mini/sft/seed-3"]
    assert (good.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert good.data.params == {
        "optim.learning_rate": "0.1", "optim.lora": "None", "epochs": "2", "long": "x" * 500,
    }  # fmt: skip
    history = client.get_metric_history(good.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert set(good.data.metrics) == {"loss", "seconds"}
    assert failed.data.metrics["loss"] == 9.0  # what was logged before the error is there
    tags = good.data.tags
    assert (tags["profile"], tags["dvc_stage"], tags["seed"]) == ("mini", "sft", "2")
    assert {"git_commit", "git_dirty", "dvc_lock", "machine", "python", "torch", "transformers", "gpu"} <= set(tags)
    assert tags["python"] == sys.version.split()[0]
    # Nothing of ours lies outside the store's folder.
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow"]


def test_off_creates_nothing(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("FGALIGN_TRACKING", "off")
    with track(profile, "sft", 1, PARAMS) as run:
        run.log({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "store",
    [
        "sqlite:///{root}/file/mlflow.db",  # its folder is a file
        "sqlite:///{root}/folder",  # the store is a folder
        "sqlite:///{root}/file",  # not a database
        "nonsense://store",
        "http://127.0.0.1:{port}",  # no server
    ],
)
def test_a_broken_store_stops_nothing(profile, tmp_path, monkeypatch, capfd, store):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    (tmp_path / "file").write_text("no database")
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(root=tmp_path, port=closed_port()))
    started = time.monotonic()
    for seed in (1, 2):
        with track(profile, "sft", seed, PARAMS) as run:
            run.log({"loss": 1.0}, 1)
    assert time.monotonic() - started < 20  # MLflow by itself tries again for minutes
    error = capfd.readouterr().err
    assert error.startswith("tracking: MLflow failed (")
    assert error.endswith("; the work goes on untracked\n")
    assert error.count("\n") == 1
    assert len(error) < 450


class Client:
    """A client that works until it does not."""

    def __init__(self, broken=False):
        self.broken, self.batches, self.ended = broken, [], []

    def log_batch(self, run_id, metrics):
        if self.broken:
            raise ConnectionError("gone")
        self.batches.append([(metric.key, metric.value, metric.step) for metric in metrics])

    def set_terminated(self, run_id, status):
        if self.broken:
            raise ConnectionError("gone")
        self.ended.append(status)


def test_a_store_that_breaks_on_the_way_stops_nothing(profile, capfd):
    client = Client()
    run = Run(client, "id")
    client.broken = True
    run.log({"loss": 1.0}, 1)
    run.finish()
    error = capfd.readouterr().err
    assert error == "tracking: MLflow failed (ConnectionError: gone); the work goes on untracked\n"


def test_metrics_go_in_batches(profile):
    client = Client()
    run = Run(client, "id")
    for step in range(1101):
        run.log({"loss": float(step)}, step)
    run.finish()
    assert [len(batch) for batch in client.batches] == [500, 500, 102]  # the last with the seconds
    logged = [entry for batch in client.batches for entry in batch]
    assert logged[:-1] == [("loss", float(step), step) for step in range(1101)]
    assert logged[-1][0] == "seconds"
    assert client.ended == ["FINISHED"]


def test_a_run_without_store_takes_everything():
    run = Run()
    run.log({"a": 1})
    run.finish("FAILED")
