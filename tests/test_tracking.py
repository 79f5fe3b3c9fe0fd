"""Tracking: what reaches a real SQLite store, and that a broken store stops nothing."""

from __future__ import annotations

import json
import math
import multiprocessing
import socket
import sys
import time
from types import SimpleNamespace

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
    monkeypatch.setattr(tracking, "_writer", None)
    yield Profile("mini", tmp_path, {}, tmp_path / "params.yaml")
    tracking.stop()


def stored(root):
    """The runs in the default store, by name."""
    from mlflow.tracking import MlflowClient

    tracking.stop()
    client = MlflowClient(tracking_uri=tracking_uri(root))
    experiment = client.get_experiment_by_name("fgalign-mini")
    return client, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_names(profile, monkeypatch, tmp_path):
    assert run_name("mini", "sft", 2) == "mini/sft/seed-2"
    assert run_name("mini", "base", None) == "mini/base"
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": []}) == {"a.b.c": 1, "a.d": 2, "e": []}
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert tracking_uri(tmp_path) == "http://elsewhere"


def test_lock_hashes(profile, tmp_path):
    lock = tmp_path / "dvc.lock"
    assert lock_hashes(lock) == ""
    lock.write_text(
        "schema: '2.0'\nstages:\n  raw:\n    cmd: x\n    outs:\n    - {path: data/t/raw, md5: 22.dir}\n"
        "  judge:\n    cmd: y\n    deps:\n    - {path: a.py, md5: '11'}\n    outs:\n"
        "    - {path: results/t/a.csv, md5: '33'}\n    - {path: data/t/b.jsonl, md5: '44'}\n"
    )
    assert lock_hashes(lock) == "data/t/raw=22.dir\ndata/t/b.jsonl=44"


def test_runs_in_a_real_store(profile, tmp_path, capfd):
    with track(profile, "sft", 2, PARAMS) as run:
        for step in range(3):
            run.log({"loss": 3.0 - step, "text": "not a number", "nan": math.nan}, step)
    with pytest.raises(KeyError), track(profile, "sft", 3, {}) as run:
        run.log({"loss": 9.0}, 1)
        raise KeyError("the stage broke")
    client, runs = stored(tmp_path)
    assert capfd.readouterr().err == ""
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
    (tmp_path / "file").write_text("no database")
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(root=tmp_path, port=closed_port()))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # as the writing process sets them: MLflow by itself
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # tries again for minutes
    sent = []
    monkeypatch.setattr(tracking, "_writer", SimpleNamespace(send=sent.append, close=lambda: None))
    for seed in (1, 2):
        with track(profile, "sft", seed, PARAMS) as run:
            run.log({"loss": 1.0}, 1)
    started = time.monotonic()
    tracking.write(map(json.dumps, sent))
    assert time.monotonic() - started < 20
    one_line(capfd.readouterr().err)


def test_a_password_in_the_address_of_the_store_is_not_shown(monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_warned", False)

    def fails():
        raise OSError("API request to http://bob:TOP@SECRET@127.0.0.1:9/api/2.0 and https://a@b/ failed")

    tracking._safely(fails)
    error = capfd.readouterr().err
    assert "API request to http://127.0.0.1:9/api/2.0 and https://b/ failed" in error
    one_line(error)


def one_line(error):
    assert error.startswith("tracking: MLflow failed (")
    assert error.endswith("; the work goes on, not all of it tracked\n")
    assert error.count("\n") == 1
    assert len(error) < 450


def test_a_broken_store_holds_up_nothing(profile, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    for seed in (1, 2):
        with track(profile, "sft", seed, PARAMS) as run:
            run.log({"loss": 1.0}, 1)
    assert time.monotonic() - started < 2  # less than the writing process takes to import MLflow
    tracking.stop()
    assert time.monotonic() - started < 60
    one_line(capfd.readouterr().err)


def test_a_stage_never_waits_for_a_store_that_is_gone(profile, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.2)
    tracking.start()
    tracking._writer.process.kill()
    tracking._writer.process.wait()
    with track(profile, "sft", 1, {}) as run:
        run.log({"loss": 1.0}, 1)
    error = capfd.readouterr().err
    one_line(error)
    assert "(BrokenPipeError: [Errno 32] Broken pipe)" in error


def test_a_stage_does_not_wait_long_for_a_store_that_hangs(profile, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.2)
    monkeypatch.setattr(tracking, "COMMAND", [sys.executable, "-c", "import time; time.sleep(600)"])
    started = time.monotonic()
    with track(profile, "sft", 1, {}) as run:
        process = tracking._writer.process
        for step in range(10_000):  # more than a pipe holds
            run.log({"loss": 1.0}, step)
    assert time.monotonic() - started < 10
    process.kill()
    error = capfd.readouterr().err
    one_line(error)
    assert "(TimeoutError: the store took nothing for 0 seconds)" in error


def test_forked_processes_share_the_writing_one(profile, tmp_path):
    def work(seed):
        with track(profile, "sft", seed, {}) as run:
            for step in range(1000):
                run.log({"loss": float(seed)}, step)

    tracking.start()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    client, runs = stored(tmp_path)
    assert set(runs) == {"mini/sft/seed-1", "mini/sft/seed-2", "mini/sft/seed-3"}
    for name, run in runs.items():
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [metric.value for metric in history] == [float(name[-1])] * 1000


def test_a_run_that_nobody_ends_was_killed(profile, tmp_path):
    manager = track(profile, "sft", 1, {})
    manager.__enter__().log({"loss": 1.0})
    _, runs = stored(tmp_path)
    assert runs["mini/sft/seed-1"].info.status == "KILLED"


def test_messages_go_in_batches():
    sent = []
    run = Run(sent.append)
    for step in range(1101):
        run.log({"loss": float(step)}, step)
    run.finish()
    assert [message["do"] for message in sent] == ["log", "log", "log", "end"]
    assert [len(message["metrics"]) for message in sent[:3]] == [500, 500, 102]  # the last with the seconds
    logged = [tuple(entry) for message in sent[:3] for entry in message["metrics"]]
    assert logged[:-1] == [("loss", float(step), step) for step in range(1101)]
    assert logged[-1][0] == "seconds"
    assert sent[3]["status"] == "FINISHED"


def test_writing_goes_on_reading_after_an_error(monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_warned", False)
    read = []

    def lines():
        for line in ("no JSON", json.dumps({"do": "end", "run": "none", "status": "FINISHED"}), "more"):
            read.append(line)
            yield line

    tracking.write(lines())
    assert len(read) == 3
    assert capfd.readouterr().err.count("tracking: MLflow failed (JSONDecodeError") == 1


def test_one_failed_write_loses_no_more_than_itself(profile, tmp_path, monkeypatch, capfd):
    sent = []
    monkeypatch.setattr(tracking, "_warned", False)
    monkeypatch.setattr(tracking, "_writer", SimpleNamespace(send=sent.append, close=lambda: None))
    with track(profile, "sft", 1, PARAMS) as run:
        for step in (1, 2, 3):
            run.log({"loss": float(step)}, step)
            run._flush()
    sent[2]["metrics"] = [["loss", "no number", 2]]
    tracking.write(map(json.dumps, sent))
    client, runs = stored(tmp_path)
    (run,) = runs.values()
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 3.0]
    assert run.info.status == "FINISHED"
    one_line("".join(line for line in capfd.readouterr().err.splitlines(True) if " INFO mlflow" not in line))


def test_a_store_that_fails_again_and_again_gets_nothing_more(profile, monkeypatch, capfd):
    tried = []

    def fails(message):
        tried.append(message["run"])
        raise OSError("gone")

    monkeypatch.setattr(tracking, "_warned", False)
    monkeypatch.setattr(tracking, "_create", fails)
    tracking.write(json.dumps({"do": "open", "run": str(number)}) for number in range(9))
    assert tried == ["0", "1", "2"]
    one_line(capfd.readouterr().err)


def test_a_run_without_store_takes_everything():
    run = Run()
    run.log({"a": 1})
    run.finish("FAILED")
