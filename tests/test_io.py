"""Files are written aside and renamed: a failure leaves what was there, and nothing beside it."""

from __future__ import annotations

import hashlib
import os
import stat
from types import SimpleNamespace

import pytest

from fgalign import io
from fgalign.errors import InputError


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_replaced(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    io.write_text(path, "one\n")
    io.write_text(path, "two\r\nü\n")
    assert path.read_bytes() == b"two\r\n\xc3\xbc\n"
    assert names(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_binary_file(tmp_path):
    with io.atomic_file(tmp_path / "a.bin", "wb") as file:
        file.write(b"\x00\r\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\r\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_file_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    io.write_text(path, "old")
    with pytest.raises(error), io.atomic_file(path) as file:
        file.write("half of the new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with io.atomic_file(path) as file:
        file.write("text")
        assert not path.exists()
    assert path.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite(tmp_path, value):
    path = tmp_path / "a.json"
    io.write_json(path, {"b": 1, "a": 2})
    with pytest.raises(ValueError):
        io.write_json(path, {"b": value})
    assert path.read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'
    assert names(tmp_path) == ["a.json"]


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"a\.json: no such file; run the stage"):
        io.read_json(path)
    path.write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(InputError, match=r"a\.json:2: not JSON: Expecting value \(column 7\)"):
        io.read_json(path)
    path.write_text('{"a": 1}')
    assert io.read_json(path) == {"a": 1}


def test_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "sub" / "model"
    for name in ("old", "new"):
        with io.atomic_dir(path) as folder:
            assert names(folder) == []
            (folder / name).write_text(name)
    assert names(path) == ["new"]
    assert names(path.parent) == ["model"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_failed_directory_leaves_the_old_one(tmp_path, error, before):
    path = tmp_path / "model"
    if before:
        with io.atomic_dir(path) as folder:
            (folder / "old").write_text("old")
    with pytest.raises(error), io.atomic_dir(path) as folder:
        (folder / "new").write_text("half")
        raise error
    assert names(tmp_path) == (["model"] if before else [])
    if before:
        assert names(path) == ["old"]


def test_directory_whose_renaming_fails_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with io.atomic_dir(path) as folder:
        (folder / "old").write_text("old")
    replace = os.replace

    def failing(source, target):
        if (source / "new").exists():
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(io.os, "replace", failing)
    with pytest.raises(OSError, match="the disk is full"), io.atomic_dir(path) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(path) == ["old"]


def test_directory_on_another_disk(tmp_path, monkeypatch):
    source, path = tmp_path / "aside" / "model", tmp_path / "models" / "model"
    for folder, name in ((source, "new"), (path, "old")):
        (folder / "seed-1").mkdir(parents=True)
        (folder / "seed-1" / name).write_text(name)
    real, asked = os.stat, []

    def far(name, **options):
        asked.extend([name] if name == source else [])
        return SimpleNamespace(st_dev=-1) if name == source and len(asked) == 1 else real(name, **options)

    monkeypatch.setattr(io.os, "stat", far)
    io.put_dir(source, path)
    monkeypatch.undo()
    assert names(path) == ["seed-1"] and names(path / "seed-1") == ["new"]
    assert names(path.parent) == ["model"] and not source.exists()


def test_checksum(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    # The SHA-256 of "abc", from FIPS 180-2, appendix B.1.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert io.sha256(path) == known
    io.check_sha256(path, known)
    wrong = hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(InputError, match=rf"checksum mismatch: expected sha256 {wrong}, found {known}; .*again"):
        io.check_sha256(path, wrong)
