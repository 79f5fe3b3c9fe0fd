"""Any preference data set in TRL's format, from the hub or from a local folder or file.

The format (TRL's documentation, *Dataset formats and types*): columns ``chosen`` and ``rejected``, and ``prompt``
unless the prompt is implicit, that is, the shared beginning of both. Each is a string, or a list of messages
``{"role": ..., "content": ...}``.

What becomes what: a row is a preference pair. A conversation becomes one prompt text (``hub.conversation_prompt``), and
``chosen`` and ``rejected`` have to end with one assistant's message each after what they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from fgalign.core.raw_data import RawData
from fgalign.core.schema import SPLITS, Preference, Split
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.sources.hub import (
    SUFFIXES,
    Columns,
    Count,
    HubSection,
    Row,
    conversation_prompt,
    fault,
    list_files,
    load,
    local_copy,
    preference_data,
    prompt_key,
    report,
    sample,
    split_prompts,
    stem,
)

_COLUMNS: Columns = {"chosen": (str, list), "rejected": (str, list)}

Turns = list[tuple[str, str]]


class PreferenceDatasetConfig(HubSection):
    """Which files are read and how they become splits.

    ``files`` and ``test_files`` are patterns such as ``data/train-*.parquet`` over the paths in the data set's
    repository (``*`` matches slashes, too). Without ``test_files`` the test split is drawn from ``files``. ``local``
    may also name one file, and then there are no patterns. Sizes count different prompts (null: all there are, for
    ``n_test`` only with ``test_files``).
    """

    files: list[str] = Field(default_factory=list)
    test_files: list[str] = Field(default_factory=list)
    seed: int = 0
    n_train: Count | None = None
    n_validation: Count = 500
    n_test: Count | None = 500


# --- one row ----------------------------------------------------------------------------------------------------------


def messages(value: Any, row: Row, column: str) -> Turns:
    """A list of messages as (role, content).

    Raises:
        RecordError: it is no list of messages with a role and a text.
    """
    turns: Turns = []
    for number, message in enumerate(value if isinstance(value, list) else [value]):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise RecordError(
                f"{row.where}: column `{column}`: message {number}: expected the texts `role` and `content`, found "
                f"{message!r:.60}"
            )
        turns.append((role, content))
    return turns


def shared_text(chosen: str, rejected: str) -> str:
    """The implicit prompt of two strings: their shared beginning up to the last white space in it, which is left to
    the responses. (TRL's ``extract_prompt`` may cut within a word.)"""
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if length is None:
        length = min(len(chosen), len(rejected))
    while length and not chosen[length - 1].isspace():
        length -= 1
    return chosen[:length].rstrip()


def pair(row: Row, prefix: str) -> Preference | str:
    """The pair of a row, or why it is left out.

    Raises:
        RecordError: a column has another type than the format allows, or a role is unknown.
    """
    prompt, chosen, rejected = (row.values.get(name) for name in ("prompt", "chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise RecordError(
            f"{row.where}: expected `chosen` and `rejected` both as texts or both as lists of messages, found "
            f"{type(chosen).__name__} and {type(rejected).__name__}"
        )
    if prompt is not None and not isinstance(prompt, str | list):
        raise RecordError(f"{row.where}: column `prompt`: expected a text or a list of messages, found {prompt!r:.60}")
    if chosen == rejected:
        return "with two identical texts"
    try:
        if isinstance(chosen, str):
            text, first, second = _strings(prompt, chosen, rejected, row)
        else:
            found = _conversation(prompt, chosen, rejected, row)
            if found is None:
                return "malformed (not one assistant's message each after what chosen and rejected share)"
            text, first, second = found
    except ValueError as error:
        raise RecordError(f"{row.where}: {error}") from None
    if not text.strip():
        return "without a prompt"
    reason = fault(first, second)
    return reason or Preference(id=f"{prefix}-{row.number:05d}", prompt=text, chosen=first, rejected=second)


def _strings(prompt: Any, chosen: str, rejected: str, row: Row) -> tuple[str, str, str]:
    if prompt is None:
        text = shared_text(chosen, rejected)
        return text, chosen[len(text) :], rejected[len(text) :]
    text = prompt if isinstance(prompt, str) else conversation_prompt(messages(prompt, row, "prompt"))
    return text, chosen, rejected


def _conversation(prompt: Any, chosen: Any, rejected: Any, row: Row) -> tuple[str, str, str] | None:
    first, second = messages(chosen, row, "chosen"), messages(rejected, row, "rejected")
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if length is None:
        return None  # one continues the other
    shared = first[:length]
    if [len(first), len(second)] != [length + 1] * 2 or {first[-1][0], second[-1][0]} != {"assistant"}:
        return None
    before: Turns = []
    if prompt is not None:
        before = [("user", prompt)] if isinstance(prompt, str) else messages(prompt, row, "prompt")
    turns = shared if shared[: len(before)] == before else before + shared  # some data sets give the prompt twice
    return (conversation_prompt(turns) if turns else ""), first[-1][1], second[-1][1]


# --- files and splits -------------------------------------------------------------------------------------------------


def resolve(config: PreferenceDatasetConfig, root: Path) -> tuple[PreferenceDatasetConfig, list[str], list[str]]:
    """The files to train on and those to test on; ``local`` that names a file becomes its folder.

    Raises:
        InputError: the local copy is not there.
        ConfigError: there is no pattern, a pattern matches no file, or a file is to train and to test on.
    """
    copy = local_copy(config, root)
    if copy and copy[0].is_file():
        if config.files or config.test_files:
            raise ConfigError(f"source.files: expected no pattern, as {copy[0]} is one file, found {config.files}")
        return config.model_copy(update={"repo": None, "local": str(copy[0].parent)}), [copy[0].name], []
    if copy and not copy[0].exists():
        raise InputError(f"{copy[0]}: no such file or folder, although {copy[1]}; correct it, or put the data there")
    if not config.files:
        raise ConfigError(
            "source.files: expected at least one pattern of the files to read, such as data/train-*.parquet, found none"
        )
    patterns = [*config.files, *config.test_files]
    # Without a wildcard nothing has to be asked of the hub, so that files in the library's cache do without network.
    names = list_files(config, patterns, root) if any(set(name) & set("*?[") for name in patterns) else patterns

    def matching(patterns: Sequence[str], key: str) -> list[str]:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"source.{key}: {pattern!r} matches no file that can be read ({', '.join(SUFFIXES)}); expected "
                    f"some of {', '.join(names[:8]) or 'none'}{' ...' if len(names) > 8 else ''}"
                )
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    train, test = matching(config.files, "files"), matching(config.test_files, "test_files")
    if set(train) & set(test):
        raise ConfigError(f"source.test_files: {min(set(train) & set(test))} is among source.files, too")
    return config, train, test


def build(config: PreferenceDatasetConfig, root: Path) -> RawData:
    """Read a preference data set and split it by prompt; prompts of the test files are left out of the others.

    See ``hub.preference_data`` for what each split holds. Rows that are no pair are left out, counted and reported.

    Raises:
        InputError: a file cannot be had, is not what it has to be, or has no usable row.
        ConfigError: no data set, revision or file is named, or the sizes do not suit the data.
    """
    place, train_files, test_files = resolve(config, root)
    names = [*test_files, *train_files]
    if len({stem(name) for name in names}) < len(names):
        raise ConfigError(f"source.files: {', '.join(names)}: two of them differ in their ending alone; read only one")
    rows = load(place, dict.fromkeys(names, _COLUMNS), root)
    dropped: Counter[str] = Counter()

    def pairs_of(names: Sequence[str], taken: set[str]) -> list[Preference]:
        pairs: list[Preference] = []
        for name in names:
            for row in rows[name]:
                found = pair(row, stem(name))
                if isinstance(found, str):
                    dropped[found] += 1
                elif prompt_key(found.prompt) in taken:
                    dropped["whose prompt is in another split"] += 1
                else:
                    pairs.append(found)
        return pairs

    tested = pairs_of(test_files, set())
    trained = pairs_of(train_files, {prompt_key(found.prompt) for found in tested})
    report("preference_dataset", sum(len(part) for part in rows.values()), dropped)
    for part, found in ((train_files, trained), (test_files, tested)):
        if part and not found:
            raise InputError(f"preference_dataset: {', '.join(part)}: expected preference pairs, found none")
    sizes: dict[Split, int | None] = {"train": config.n_train, "validation": config.n_validation}
    if not test_files:
        if config.n_test is None:
            raise ConfigError("source.n_test: expected a number, as there are no source.test_files, found null")
        sizes["test"] = config.n_test
    home = split_prompts((found.prompt for found in trained), sizes, config.seed)
    pairs = {split: [found for found in trained if home.get(prompt_key(found.prompt)) == split] for split in SPLITS}
    if test_files:
        prompts = [found.prompt for found in tested]
        pairs["test"] = sample(tested, prompts, config.n_test, config.seed, "source.n_test")
    return preference_data(pairs)
