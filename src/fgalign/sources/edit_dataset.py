"""Edits of one's own: responses and an editor's revisions of them, from a local file or a folder with a file a split.

A row is one edit, with the texts ``prompt``, ``initial`` and ``revised`` and, where there are any,

- ``id``: its name, unique in the data set (otherwise made of the file's name and the row's number),
- ``reference``: a good answer written afresh, the gold answer of the judge ``rouge_l``,
- ``preferred``: a response that people like better than ``initial``, where that is not ``revised``.

What becomes what: every row is a correction, which the annotator ``replay`` hands on, and a preference,
``preferred`` ≻ ``initial`` or, without it, ``revised`` ≻ ``initial``. What a model answers is compared with
``initial``, as with FIGA's data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fgalign.config import Section
from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import (
    SPLITS,
    Demonstration,
    Edit,
    Preference,
    Prompt,
    Reference,
    Split,
    Text,
    parse_record,
)
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.sources.hub import (
    SUFFIXES,
    Count,
    HubSection,
    Sha256,
    locate,
    prompt_key,
    read_rows,
    sample,
    split_prompts,
    stem,
)


class EditDatasetConfig(Section):
    """Which files are read and how they become splits.

    ``local`` is a file, or a folder with a file for each split (``train.jsonl``, ``validation.jsonl``, ``test.jsonl``),
    absolute or relative to the repository's root. One file is split by prompt, and needs ``n_validation`` and
    ``n_test``; of a folder's files sizes draw a part. Sizes count different prompts (null: all there are). ``sha256``
    gives, by file, the checksum that it must have. ``demonstrations`` names the answer to imitate.
    """

    local: str
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    seed: int = 0
    n_train: Count | None = None
    n_validation: Count | None = None
    n_test: Count | None = None
    demonstrations: Literal["revised", "reference"] = "revised"


class EditRow(Edit):
    """One row: an edit, with what else there is about its prompt."""

    reference: Text | None = None
    preferred: Text | None = None

    @model_validator(mode="after")
    def _preferred(self) -> EditRow:
        if self.preferred == self.initial:
            raise ValueError("preferred is identical to initial: leave it out where no other response is preferred")
        return self


def resolve(config: EditDatasetConfig, root: Path) -> tuple[Path, dict[Split | None, str]]:
    """The folder and its files by split; by None where one file holds all splits.

    Raises:
        InputError: there is no such file or folder, or the folder does not have one file for each split.
    """
    place = root / config.local
    if place.is_file():
        return place.parent, {None: place.name}
    if not place.is_dir():
        raise InputError(
            f"{place}: no such file or folder, although source.local names it; correct it, or put the edits there"
        )
    files: dict[Split | None, str] = {}
    for split in SPLITS:
        there = [name for suffix in SUFFIXES if (place / (name := f"{split}{suffix}")).is_file()]
        if len(there) != 1:
            raise InputError(
                f"{place}: expected one file for the {split} split, such as {split}.jsonl, found "
                f"{' and '.join(there) or 'none'}; name one file in source.local to have it split by prompt"
            )
        files[split] = there[0]
    return place, files


def read_edits(path: Path, name: str, where: dict[str, str]) -> list[EditRow]:
    """The rows of a file; ``where`` has, by id, the place of every row read so far, and gets those of this file.

    Raises:
        RecordError: the file or a row is not what it has to be, or an id comes twice; names ``file:line``.
        InputError: the file has no row.
    """
    edits = []
    for row in read_rows(path):
        given = {key: value for key, value in row.values.items() if value is not None}
        edit = parse_record(EditRow, {"id": f"{stem(name)}-{row.number:05d}", **given}, row.where)
        if edit.id in where:
            raise RecordError(f"{row.where}: id {edit.id!r} was used before, at {where[edit.id]}; ids must be unique")
        where[edit.id] = row.where
        edits.append(edit)
    if not edits:
        raise InputError(f"{path}: expected at least one edit, found none")
    return edits


def build(config: EditDatasetConfig, root: Path) -> RawData:
    """Read edits and split them by prompt.

    Every split gets prompts, corrections, preferences and, where rows have one, references; train and validation get
    demonstrations. References for evaluation are given for validation and test, one a prompt: the initial response,
    with ``reference`` as the gold answer.

    Raises:
        InputError: a file is missing or is not what it has to be, two splits share a prompt, or a reference is missing.
        ConfigError: the sizes do not suit the data, or a checksum is given for a file that is not read.
    """
    folder, names = resolve(config, root)
    paths = locate(HubSection(local=str(folder), sha256=config.sha256), list(names.values()), root)
    where: dict[str, str] = {}
    read = {split: read_edits(paths[name], name, where) for split, name in names.items()}
    sizes: dict[Split, int | None] = {
        "train": config.n_train,
        "validation": config.n_validation,
        "test": config.n_test,
    }
    edits: dict[Split, list[EditRow]] = {}
    if None in read:
        for split in ("validation", "test"):
            if sizes[split] is None:
                raise ConfigError(f"source.n_{split}: expected a number, as source.local is one file, found null")
        home = split_prompts((edit.prompt for edit in read[None]), sizes, config.seed)
        edits = {split: [edit for edit in read[None] if home.get(prompt_key(edit.prompt)) == split] for split in SPLITS}
    else:
        _check_disjoint(read, where)
        for split in SPLITS:
            prompts = [edit.prompt for edit in read[split]]
            edits[split] = sample(read[split], prompts, sizes[split], config.seed, f"source.n_{split}")
    _check_references(edits, config, where)
    data = RawData(splits={}, truth={})
    for split in SPLITS:
        raw, truth = RawSplit(), Truth()
        first: dict[str, EditRow] = {}
        for edit in edits[split]:
            first.setdefault(edit.prompt, edit)
            id_, prompt = edit.id, edit.prompt
            raw.corrections.append(Edit(id=id_, prompt=prompt, initial=edit.initial, revised=edit.revised))
            chosen = edit.preferred or edit.revised
            raw.preferences.append(Preference(id=id_, prompt=prompt, chosen=chosen, rejected=edit.initial))
            if edit.reference is not None:
                raw.references.append(Demonstration(id=id_, prompt=prompt, completion=edit.reference))
        raw.prompts = [Prompt(id=edit.id, prompt=prompt) for prompt, edit in first.items()]
        if split != "test":
            imitated: dict[tuple[str, str], EditRow] = {}
            for edit in edits[split]:
                imitated.setdefault((edit.prompt, getattr(edit, config.demonstrations)), edit)
            raw.demonstrations = [
                Demonstration(id=edit.id, prompt=prompt, completion=answer)
                for (prompt, answer), edit in imitated.items()
            ]
        if split != "train":
            gold = _gold(edits[split])
            truth.references = [
                Reference(id=edit.id, prompt=prompt, reference=edit.initial, gold=gold.get(prompt))
                for prompt, edit in first.items()
            ]
        data.splits[split], data.truth[split] = raw, truth
    return data


def _gold(edits: Iterable[EditRow]) -> dict[str, str]:
    """The reference of each prompt that has one, the first of several."""
    gold: dict[str, str] = {}
    for edit in edits:
        if edit.reference is not None:
            gold.setdefault(edit.prompt, edit.reference)
    return gold


def _check_disjoint(read: dict[Split | None, list[EditRow]], where: dict[str, str]) -> None:
    """Raise InputError where two splits have the same prompt (but for case, white space and punctuation)."""
    home: dict[str, tuple[Split | None, str]] = {}
    for split, edits in read.items():
        for edit in edits:
            other, id_ = home.setdefault(prompt_key(edit.prompt), (split, edit.id))
            if other != split:
                raise InputError(
                    f"{where[edit.id]}: field `prompt`: expected a prompt that no other split has, found that of "
                    f"{where[id_]}, of the {other} split; leave it out of one of them"
                )


def _check_references(edits: dict[Split, list[EditRow]], config: EditDatasetConfig, where: dict[str, str]) -> None:
    """Raise InputError where a row lacks the reference to imitate, or some evaluated prompts have one and others not,
    which the judge would only find after training."""
    if config.demonstrations == "reference":
        for edit in (*edits["train"], *edits["validation"]):
            if edit.reference is None:
                raise InputError(
                    f"{where[edit.id]}: field `reference`: expected an answer to imitate, as source.demonstrations is "
                    "'reference', found none; add it, or imitate 'revised'"
                )
    evaluated = [*edits["validation"], *edits["test"]]
    gold = _gold(evaluated)
    lacking = [edit for edit in evaluated if edit.prompt not in gold]
    if gold and lacking:
        raise InputError(
            f"{where[lacking[0].id]}: field `reference`: expected one for every prompt of the validation and the test "
            "split, or for none, found none here; add it, or take all out"
        )
