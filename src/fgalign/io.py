"""Files: written aside and renamed, so that a failure never damages what was there before."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgalign.errors import InputError


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside ``path`` and rename it onto ``path`` when the block ends without an error.

    Text is UTF-8 with ``\\n`` line ends on every platform. On an error the temporary file is removed and ``path``
    is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` and put it in the place of ``path`` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        put_dir(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_dir(source: Path, path: Path) -> None:
    """Move the directory ``source`` into the place of ``path``; if that fails, what was there is there again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.stat(source).st_dev != os.stat(path.parent).st_dev:  # another disk, which is copied to, and not renamed
        with atomic_dir(path) as copy:
            shutil.copytree(source, copy, dirs_exist_ok=True)
        shutil.rmtree(source)
        return
    if not path.exists():
        os.replace(source, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.replace(path, old / path.name)
    try:
        os.replace(source, path)
    except BaseException:
        os.replace(old / path.name, path)
        os.rmdir(old)
        raise
    shutil.rmtree(old)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, keys in their given order; NaN and infinities are refused (``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON document.

    Raises:
        InputError: the file is missing, cannot be read or is not JSON (the message gives the line).
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; run the stage that writes it (`dvc dag` shows which)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a file of JSON in UTF-8, found another ({error})") from None


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: str | Path, expected: str) -> None:
    """Raise InputError unless the file's SHA-256 is ``expected``."""
    found = sha256(path)
    if found != expected:
        raise InputError(
            f"{path}: checksum mismatch: expected sha256 {expected}, found {found}; "
            "fetch the published file again, or correct the checksum in the profile if the data is meant to differ"
        )


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows, atomically, with the given columns, or with those of the first of at least one row."""
    rows = list(rows)
    with atomic_file(path) as file:
        writer = csv.DictWriter(file, fieldnames=columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
