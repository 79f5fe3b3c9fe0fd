"""Data sets of the Hugging Face hub: files at a pinned commit, or a local copy in the same layout; no code of theirs.

A source names the files of a data set that it reads. They come, in this order, from the folder that the environment
variable ``FGALIGN_HUB_<NAME>`` names, from the folder ``local``, from ``data/downloads/<owner>--<name>/<revision>``
where that exists, or from the hub (``huggingface_hub`` keeps them in its cache). JSON (a list, or one object a line),
either of them gzipped, and Parquet are read as data, so a loading script in the repository is never run.

Splits are made by prompt: prompts that are the same but for case, white space and punctuation share a split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import socket
import time
import unicodedata
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field

from fgalign.config import Section
from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import SPLITS, Demonstration, Preference, Prompt, Reference, Split
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.io import check_sha256

DOWNLOADS = Path("data") / "downloads"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
RepoName = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
Columns = Mapping[str, tuple[type, ...]]


# --- configuration ----------------------------------------------------------------------------------------------------


class HubSection(Section):
    """Where a data set comes from and what is checked when it is read.

    ``repo`` is the data set's name on the hub, ``revision`` a commit of it (40 hexadecimal digits; a branch or tag can
    move, so neither is taken). ``local`` is a folder with the data set's files in the layout of its repository,
    absolute or relative to this repository's root; nothing is fetched then, and ``revision`` may be null.
    ``sha256`` and ``rows`` give, by file, the checksum and the number of rows that a file must have.
    """

    repo: RepoName | None = None
    revision: Commit | None = None
    local: str | None = None
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    rows: dict[str, Count] = Field(default_factory=dict)
    known_commit: ClassVar[str] = ""
    """What is known of the commit to take where there is no default, for the message that asks for one."""


class Row(NamedTuple):
    """One row of a file: where it stands (``file:line`` or ``file: row N``, N from 0), its position and its values."""

    where: str
    number: int
    values: dict[str, Any]


def variable(repo: str) -> str:
    """Name of the environment variable that names a local copy: ``FGALIGN_HUB_HH_RLHF`` for ``Anthropic/hh-rlhf``."""
    return "FGALIGN_HUB_" + re.sub(r"\W", "_", repo.split("/")[-1]).upper()


# --- files ------------------------------------------------------------------------------------------------------------


def local_copy(config: HubSection, root: Path) -> tuple[Path, str] | None:
    """Folder of the local copy and why it is one, or None when the files are to come from the hub.

    Raises:
        ConfigError: there is neither a local copy nor a data set and a commit to fetch.
    """
    if config.repo and os.environ.get(variable(config.repo)):
        return root / os.environ[variable(config.repo)], f"{variable(config.repo)} names its folder"
    if config.local:
        return root / config.local, "source.local names its folder"
    if config.repo is None:
        raise ConfigError(
            "source.repo: expected the name of a data set on the hub, or a local copy named by source.local, found "
            "neither; give one of them"
        )
    if config.revision is None:
        known = f"; {config.known_commit}" if config.known_commit else ""
        raise ConfigError(
            f"source.revision: expected the 40 hexadecimal digits of a commit of {config.repo}, found null; give the "
            f"commit to read (the data set's page lists them under Files and versions{known}), or name a folder with a "
            f"copy of the data set by source.local or {variable(config.repo)}"
        )
    folder = downloads_folder(config, root)
    return (folder, "the folder of this commit is there") if folder.is_dir() else None


def downloads_folder(config: HubSection, root: Path) -> Path:
    """Where a copy of the pinned commit is found without being named."""
    return root / DOWNLOADS / str(config.repo).replace("/", "--") / str(config.revision)


def locate(config: HubSection, names: Sequence[str], root: Path) -> dict[str, Path]:
    """Path of each file of the data set, fetched unless there is a local copy; checksums are checked.

    Raises:
        InputError: a file is not in the local copy, cannot be fetched, or has another checksum.
        ConfigError: see ``local_copy``; or the profile gives a checksum or a number of rows for another file.
    """
    for key, given in (("sha256", config.sha256), ("rows", config.rows)):
        unread = set(given) - set(names)
        if unread and key in config.model_fields_set:
            raise ConfigError(
                f"source.{key}: expected files that are read ({', '.join(names)}), found {min(unread)!r}; "
                "correct its name or leave it out"
            )
    copy = local_copy(config, root)
    if copy is None:
        paths = {name: _fetch(config, name, names, root) for name in names}
    else:
        folder, reason = copy
        paths = {name: folder / name for name in names}
        missing = [name for name in names if not paths[name].is_file()]
        if missing:
            hint = f"; {_command(config, missing, folder)} puts it there" if config.repo else ""
            raise InputError(
                f"{paths[missing[0]]}: no such file, although {reason}; expected {', '.join(missing)} in {folder}{hint}"
            )
    for name, path in paths.items():
        if name in config.sha256:
            check_sha256(path, config.sha256[name])
    return paths


def list_files(config: HubSection, patterns: Sequence[str], root: Path) -> list[str]:
    """Names of all files of the data set that can be read (see ``SUFFIXES``), sorted.

    ``patterns`` says which of them are wanted, for the message when the hub cannot be reached.

    Raises:
        InputError: the local copy is no folder, or the hub cannot be asked.
        ConfigError: see ``local_copy``.
    """
    copy = local_copy(config, root)
    if copy is not None:
        folder, reason = copy
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, although {reason}; put a copy of the data set there")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    else:
        from huggingface_hub import HfApi

        with _from_hub(config, patterns, root):
            _connect()
            names = HfApi().list_repo_files(str(config.repo), revision=config.revision, repo_type="dataset")
    return sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


def _fetch(config: HubSection, name: str, names: Sequence[str], root: Path) -> Path:
    """A file at the pinned commit, from the library's cache or from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    place = {"repo_type": "dataset", "revision": config.revision}
    with _from_hub(config, names, root):
        if not isinstance(try_to_load_from_cache(str(config.repo), name, **place), str):
            _connect()
        return Path(hf_hub_download(str(config.repo), name, **place))


def _connect() -> None:
    """Raise OSError where nothing can be connected to at the hub's address, three times in two seconds; the library
    would try for some 23 seconds. What it connects through (a proxy), or slowly, is left to it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or {"http", "https", "all"} & set(urllib.request.getproxies()):
        return
    hub = urlsplit(constants.ENDPOINT)
    for wait in (1, 1, 0):
        try:
            socket.create_connection((hub.hostname, hub.port or {"http": 80}.get(hub.scheme, 443)), timeout=10).close()
            return
        except TimeoutError:
            return
        except OSError:
            if not wait:
                raise
            time.sleep(wait)


@contextmanager
def _from_hub(config: HubSection, names: Sequence[str], root: Path) -> Iterator[None]:
    """Make one InputError of whatever goes wrong with the hub."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise the library prints a line for each of its attempts
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        raise _unreachable(config, names, root, error) from None
    finally:
        logging.set_verbosity(verbosity)


def _unreachable(config: HubSection, names: Sequence[str], root: Path, error: Exception) -> InputError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wrong = {
        GatedRepoError: "its terms have to be accepted on its page, by the account whose token `hf auth login` stores",
        RepositoryNotFoundError: "expected a data set of that name, found none; correct source.repo",
        RevisionNotFoundError: "expected a commit of the data set, found none; correct source.revision",
        RemoteEntryNotFoundError: "the data set has no such file at that commit; correct source.revision",
    }
    where = f"{config.repo} at {config.revision}"
    for kind, advice in wrong.items():
        if isinstance(error, kind):
            return InputError(f"{where}: {', '.join(names) or 'list of files'}: {advice}")
    folder = downloads_folder(config, root)
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    return InputError(
        f"{where}: cannot be fetched ({type(error).__name__}: {reason}); on a machine with network access run "
        f"{_command(config, names, folder)} and copy that folder to the same place here, or anywhere if source.local "
        f"or {variable(str(config.repo))} names it"
    )


def _command(config: HubSection, names: Sequence[str], folder: Path) -> str:
    # The command takes names or patterns, not both.
    patterns = any(set(name) & set("*?[") for name in names)
    wanted = [f"--include {shlex.quote(name)}" if patterns else shlex.quote(name) for name in names]
    words = ["hf download", str(config.repo), *wanted, "--repo-type dataset"]
    words += [f"--revision {config.revision}"] if config.revision else []
    return f"`{' '.join([*words, f'--local-dir {shlex.quote(str(folder))}'])}`"


# --- rows -------------------------------------------------------------------------------------------------------------


def load(config: HubSection, files: Mapping[str, Columns], root: Path) -> dict[str, list[Row]]:
    """The rows of each file, checked: ``files`` gives the columns that each must have, with the types they may have.

    Columns beyond those are allowed and left alone.

    Raises:
        InputError: see ``locate``; a file is empty or has another number of rows than ``rows`` says.
        RecordError: a file is not what its name says, or a row lacks a column or has another type in it.
    """
    found = {}
    for name, path in locate(config, list(files), root).items():
        rows = read_rows(path)
        if not rows:
            raise InputError(f"{path}: expected at least one row, found none; fetch the published file again")
        if len(rows) != config.rows.get(name, len(rows)):
            raise InputError(
                f"{path}: expected {config.rows[name]} rows, found {len(rows)}; fetch the published file again, or "
                "correct source.rows if the data is meant to differ"
            )
        for row in rows:
            check_columns(row, files[name])
        found[name] = rows
    return found


def check_columns(row: Row, columns: Columns) -> None:
    """Raise RecordError unless the row has the columns, with values of the types given."""
    for column, types in columns.items():
        if column not in row.values:
            raise RecordError(
                f"{row.where}: expected the columns {', '.join(columns)}, found no `{column}` among "
                f"{', '.join(row.values) or 'none'}; check that this is the published file"
            )
        value = row.values[column]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
            raise RecordError(f"{row.where}: column `{column}`: expected {expected}, found {_short(value)}")


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON, JSON Lines (each perhaps gzipped) or Parquet file, in its order.

    Raises:
        RecordError: the content is not what the name says, or a row is no object.
    """
    if not path.name.endswith(SUFFIXES):
        raise RecordError(f"{path}: expected a file that ends with {', '.join(SUFFIXES)}, found another kind")
    if path.suffix == ".parquet":
        values = _read_parquet(path)
        rows = [Row(f"{path}: row {number}", number, value) for number, value in enumerate(values)]
    else:
        rows = _read_json(path)
    for row in rows:
        if not isinstance(row.values, dict):
            raise RecordError(f"{row.where}: expected an object with a value a column, found {_short(row.values)}")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{path}: not Parquet: {reason}; fetch the published file again") from None


def _read_json(path: Path) -> list[Row]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RecordError(f"{path}: cannot be read: {error}; fetch the published file again") from None
    if text.startswith("version https://git-lfs"):
        raise RecordError(f"{path}: a pointer of Git LFS instead of the file; run `git lfs pull` where it was cloned")
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}:{error.lineno}: not JSON: {error.msg}; fetch the published file again") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}: cannot be read: {error}; fetch the published file again") from None
        rows = [Row(f"{path}: row {number}", number, value) for number, value in enumerate(values)]
        if _HALF.search(text):
            for row in rows:
                _in_utf8(row.where, row.values)
        return rows
    rows = []
    for line, part in enumerate(text.split("\n"), start=1):
        if part.strip():
            try:
                rows.append(Row(f"{path}:{line}", len(rows), json.loads(part)))
            except json.JSONDecodeError as error:
                message = f"not JSON: {error.msg}; expected a list, or one object a line"
                raise RecordError(f"{path}:{line}: {message}") from None
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{path}:{line}: cannot be read: {error}") from None
            if _HALF.search(part):
                _in_utf8(rows[-1].where, rows[-1].values)
    return rows


# Half of a character outside the basic plane, as JSON escapes it.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _in_utf8(where: str, value: Any) -> None:
    """Raise RecordError where a text in the value cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: expected texts of whole characters, found half a one ({error.object[error.start]!a}); leave the "
            "row out or mend it"
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- prompts ----------------------------------------------------------------------------------------------------------

PromptStyle = Literal["alpaca", "plain"]

INSTRUCTION_COLUMNS: Columns = {"instruction": (str,), "input": (str, NoneType)}

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)
_ALPACA_MORE = ", paired with an input that provides further context"
_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


def instruction_prompt(instruction: str, context: str | None, style: PromptStyle) -> str:
    """The prompt of an instruction with its optional input.

    ``alpaca``: the text of Stanford Alpaca, which AlpacaFarm (``v0_inputs_noinputs.json``) and the released code of
    FIGA use. ``plain``: the instruction, an empty line and the input.
    """
    instruction, context = instruction.strip(), (context or "").strip()
    if style == "plain":
        return f"{instruction}\n\n{context}" if context else instruction
    blocks = [_ALPACA.format(more=_ALPACA_MORE if context else ""), f"### Instruction:\n{instruction}"]
    blocks += [f"### Input:\n{context}"] if context else []
    return "\n\n".join([*blocks, "### Response:"])


def conversation_prompt(turns: Sequence[tuple[str, str]]) -> str:
    """The prompt of a conversation of (role, content): the content alone when one user turn is all there is.

    Otherwise a transcript with ``System:``, ``Human:`` and ``Assistant:``, an empty line between turns and
    ``Assistant:`` at the end, as in ``Anthropic/hh-rlhf``. ``Prompt`` records hold one text, which the tokenizer's
    chat template renders as one user turn.

    Raises:
        ValueError: a role is not system, user or assistant.
    """
    unknown = [role for role, _ in turns if role not in _SPEAKERS]
    if unknown:
        raise ValueError(f"expected the roles {', '.join(_SPEAKERS)}, found {unknown[0]!r}")
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join([*(f"{_SPEAKERS[role]}: {content}" for role, content in turns), "Assistant:"])


# --- splits -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 18)
def prompt_key(prompt: str) -> str:
    """What two prompts have in common that must share a split: letters and digits, case aside (the text, if it has
    none)."""
    return "".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).casefold())) or prompt.strip()


def ranked(prompts: Iterable[str], seed: int) -> list[str]:
    """The different keys of some prompts in an order that depends on each key and the seed alone (SHA-256)."""
    keys = {prompt_key(prompt) for prompt in prompts}
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())


def split_prompts(
    prompts: Iterable[str], sizes: Mapping[Split, int | None], seed: int, where: str = "source"
) -> dict[str, Split]:
    """The split of each prompt's key: test first, then validation, then train; ``None`` takes all that are left.

    Keys beyond the sizes are in no split. A size counts different prompts (see ``prompt_key``), not rows.

    Raises:
        ConfigError: there are fewer prompts than the sizes ask for, or none is left for training.
    """
    order = ranked(prompts, seed)
    wanted = sum(sizes[split] or 0 for split in SPLITS if split in sizes)
    least = wanted + (1 if "train" in sizes and sizes["train"] is None else 0)
    if least > len(order):
        asked = ", ".join(f"{split} {sizes[split] or 'at least 1'}" for split in SPLITS if split in sizes)
        raise ConfigError(
            f"{where}: expected sizes of splits that {len(order)} different prompts can fill, found {asked}; "
            "lower n_train, n_validation or n_test"
        )
    home: dict[str, Split] = {}
    for split in reversed(SPLITS):
        if split in sizes:
            take = len(order) if sizes[split] is None else sizes[split]
            home.update(dict.fromkeys(order[:take], split))
            order = order[take:]
    return home


def sample(items: Sequence[Any], prompts: Sequence[str], size: int | None, seed: int, where: str) -> list[Any]:
    """The items of ``size`` prompts, drawn as in ``split_prompts``, in their order; all of them for None.

    Raises:
        ConfigError: there are fewer different prompts.
    """
    if size is None:
        return list(items)
    order = ranked(prompts, seed)
    if size > len(order):
        raise ConfigError(f"{where}: expected at most the {len(order)} different prompts of the data, found {size}")
    chosen = set(order[:size])
    return [item for item, prompt in zip(items, prompts, strict=True) if prompt_key(prompt) in chosen]


# --- what is left out, and data of preference pairs -------------------------------------------------------------------


def report(name: str, read: int, dropped: Counter[str]) -> None:
    """Print how many rows were read and, by reason, how many were left out."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())) or "none"
    print(f"{name}: {read:,} rows read; left out: {left_out}")


def fault(first: str, second: str) -> str | None:
    """Why two responses are no pair to learn from, or None: one is blank, or they are the same text."""
    if not first.strip() or not second.strip():
        return "with a blank text"
    return "with two identical texts" if first == second else None


def preference_data(pairs: Mapping[Split, Sequence[Preference]]) -> RawData:
    """Raw data of preference pairs alone.

    Every split gets its prompts (once each, under the id of their first pair) and preferences; train and validation
    get the chosen responses as demonstrations. The reference of a validation or test prompt is its first chosen
    response. There is no gold answer.
    """
    data = RawData(splits={}, truth={})
    for split in SPLITS:
        raw, truth = RawSplit(preferences=list(pairs[split])), Truth()
        first: dict[str, Preference] = {}
        shown: dict[tuple[str, str], Preference] = {}
        for pair in raw.preferences:
            first.setdefault(pair.prompt, pair)
            shown.setdefault((pair.prompt, pair.chosen), pair)
        raw.prompts = [Prompt(id=pair.id, prompt=pair.prompt) for pair in first.values()]
        if split != "test":
            raw.demonstrations = [
                Demonstration(id=pair.id, prompt=pair.prompt, completion=pair.chosen) for pair in shown.values()
            ]
        if split != "train":
            truth.references = [
                Reference(id=pair.id, prompt=pair.prompt, reference=pair.chosen) for pair in first.values()
            ]
        data.splits[split], data.truth[split] = raw, truth
    return data


def stem(name: str) -> str:
    """What the ids of a file's rows start with: ``helpful-base/train`` for ``helpful-base/train.jsonl.gz``."""
    return name.removesuffix(".gz").rsplit(".", 1)[0]
