"""Seeds that were ready when their stage stopped: taken over while nothing has changed that they depend on."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest
import torch

import fgalign.core.modeling as modeling
import fgalign.stages.train as stages
from fgalign import unfinished
from fgalign.config import Profile, Section
from fgalign.core.schema import Edit, write_records
from fgalign.errors import InputError, TrainingError
from fgalign.stages.train import train_seeds

RUNTIME = {"device": "cpu", "threads": 1, "workers": 1}


@pytest.fixture
def profile(tmp_path):
    made = Profile("tiny", tmp_path, {"seeds": [1, 2, 3], "runtime": RUNTIME}, tmp_path / "params.yaml")
    write_records(made.data / "edits" / "train.jsonl", [Edit(id="1", prompt="a", initial="b", revised="c")])
    made.model_folder("base").mkdir(parents=True)
    return made


def train(profile, tried, failing=(), leave=None):
    """A stage that writes the number of the attempt, and fails at some seeds."""

    def one(context):
        tried.append(context.seed)
        assert context.edits("train")[0].revised == "c" and context.model("base").is_dir()
        (context.out / "model").write_text(f"attempt {len(tried)}")
        if context.seed in failing:
            raise TrainingError("no memory")
        if leave is not None and context.seed == 2:
            leave()

    train_seeds(profile, "sft", Section(), one)


def models(profile):
    return {path.parent.name: path.read_text() for path in sorted(profile.models("sft").glob("*/model"))}


def test_only_what_was_not_ready_is_trained_again(profile, capsys):
    tried = []
    with pytest.raises(TrainingError):
        train(profile, tried, failing=[2])
    assert tried == [1, 2] and not profile.models("sft").exists()
    with pytest.raises(TrainingError):
        train(profile, tried, failing=[3])
    assert tried == [1, 2, 2, 3]
    capsys.readouterr()
    train(profile, tried)
    assert tried == [1, 2, 2, 3, 3]
    assert "sft: ready since the run that stopped: seed-1, seed-2\n" in capsys.readouterr().out
    assert models(profile) == {"seed-1": "attempt 1", "seed-2": "attempt 3", "seed-3": "attempt 5"}
    assert [path.name for path in (profile.data / "unfinished").iterdir()] == []
    assert sorted(path.name for path in profile.models("sft").iterdir()) == ["seed-1", "seed-2", "seed-3"]
    # What is in place is of no use to the next run: the stage runs because something has changed.
    train(profile, tried)
    assert tried[5:] == [1, 2, 3]


def changed_profile(profile):
    profile.params["sft"] = {"max_length": 5}


def changed_input(profile):
    path = profile.data / "edits" / "train.jsonl"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def new_input(profile):
    (profile.model_folder("base") / "adapter.json").write_text("")


def truncated_model(profile):
    (profile.data / "unfinished" / "sft" / "parts" / "seed-1" / "model").write_text("")


def broken_mark(profile):
    (profile.data / "unfinished" / "sft" / "ready" / "seed-1.json").write_text("{")


@pytest.mark.parametrize("change", [changed_profile, changed_input, new_input, truncated_model, broken_mark])
def test_a_change_trains_all_again(profile, change):
    tried = []
    with pytest.raises(TrainingError):
        train(profile, tried, failing=[2])
    change(profile)
    train(profile, tried)
    assert tried == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("name", ["PACKAGE", "version", "cpuinfo"])
def test_other_code_libraries_or_processors_train_all_again(profile, monkeypatch, tmp_path, name):
    tried = []
    with pytest.raises(TrainingError):
        train(profile, tried, failing=[2])
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("")
    others = {"PACKAGE": tmp_path / "code", "version": lambda name: "0.1", "cpuinfo": lambda: {"model": "1"}}
    monkeypatch.setattr(unfinished, name, others[name])
    train(profile, tried)
    assert tried == [1, 2, 1, 2, 3]


def test_settings_of_the_report_change_nothing(profile):
    tried = []
    with pytest.raises(TrainingError):
        train(profile, tried, failing=[2])
    profile.params["report"] = {"title": "another"}
    train(profile, tried)
    assert tried == [1, 2, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_seeds_side_by_side(profile):
    profile.params["runtime"] = {**RUNTIME, "workers": 3}
    with pytest.raises(TrainingError):
        train(profile, [], failing=[2])
    tried = []
    profile.params["runtime"] = {**RUNTIME, "workers": 3}
    train(profile, tried)  # forked for one seed left: in this process
    assert tried == [2] and list(models(profile)) == ["seed-1", "seed-2", "seed-3"]


def test_cuda_starts_in_no_process_that_forks(profile, monkeypatch):
    """The forked ones could not use it."""

    def started(*_):
        raise AssertionError("CUDA was started before the seeds were forked")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # set_up leaves it and the next as they should be on a GPU
    for name in ("leave_out_cudnn_attention", "keep_freed_memory"):
        monkeypatch.setattr(modeling, name, lambda: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_lazy_init", "device_count", "get_device_name", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, started)
    forked = []
    monkeypatch.setattr(stages, "each_seed", lambda names, work, workers: forked.append((names, workers)))
    profile.params["runtime"] = {"device": "cuda", "workers": 3}
    train(profile, [])
    assert forked == [(["seed-1", "seed-2", "seed-3"], 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_process_that_is_killed_leaves_what_was_ready(profile):
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(profile, []), kwargs={"leave": lambda: os._exit(9)}
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (profile.data / "unfinished" / "sft" / "parts" / "seed-2" / "model").exists()  # nobody could remove it
    tried = []
    train(profile, tried)
    assert tried == [2, 3] and list(models(profile)) == ["seed-1", "seed-2", "seed-3"]


def test_two_processes_cannot_run_one_stage(profile):
    def again():
        with pytest.raises(InputError, match=r"unfinished/sft: another process runs this stage; wait for it"):
            train(profile, [])

    train(profile, [], leave=again)
    assert list(models(profile)) == ["seed-1", "seed-2", "seed-3"]


def test_launched_processes_that_write_nothing_skip_what_the_first_one_has(profile, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(unfinished, "agreed", lambda value: ["seed-2"])
    monkeypatch.setattr(unfinished, "wait_for_everyone", lambda: None)
    names = ["seed-1", "seed-2"]
    with unfinished.stage_parts(profile, "sft", names, profile.models("sft"), "cpu") as parts:
        assert parts.ready == ["seed-2"]
        (parts.folder / "seed-1").mkdir()
        parts.finish("seed-1", [])
    assert not parts.folder.exists() and not profile.models("sft").exists()
    assert not (profile.data / "unfinished").exists()


def test_a_search_goes_on_where_it_stopped(profile, monkeypatch):
    from fgalign.stages import studies

    tried = []

    def align(context, method, changes):
        assert context.edits("train") and context.out.is_dir()
        tried.append((method, changes["rate"]))
        (context.out / "model").write_text(f"attempt {len(tried)}")
        if len(tried) == 2:
            raise TrainingError("no memory")

    monkeypatch.setattr(studies, "align", align)
    monkeypatch.setattr(studies, "method_config", lambda *_: None)
    profile.params["methods"] = {name: {"kind": name, "search": {"rate": [1, 2]}} for name in ("a", "b")}
    profile.params["search"] = {"seed": 1}
    with pytest.raises(TrainingError):
        studies.run_search(profile)
    assert tried == [("a", 1), ("a", 2)] and not (profile.data / "search").exists()
    studies.run_search(profile)
    assert tried[2:] == [("a", 2), ("b", 1), ("b", 2)]
    found = {path.parent.relative_to(profile.data).as_posix(): path.read_text() for path in profile.data.rglob("model")}
    attempts = {"search/a/0": 1, "search/a/1": 3, "search/b/0": 4, "search/b/1": 5}
    assert found == {place: f"attempt {number}" for place, number in attempts.items()}
    assert list((profile.data / "unfinished").iterdir()) == []
