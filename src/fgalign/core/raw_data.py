"""What a source yields, by split: what training may read (``raw``) and, kept apart, the truth (``gold``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fgalign.core.schema import (
    SPLITS,
    Demonstration,
    Edit,
    GoldMarks,
    Preference,
    Prompt,
    Reference,
    Split,
    read_records,
    write_records,
)


@dataclass
class RawSplit:
    """What training may read of one split.

    ``corpus`` is text to pretrain a base model on, for worlds that have no pretrained model. ``corrections`` are edits
    that come with the data set and that the ``replay`` annotator hands on. ``references`` are good answers written
    afresh, with the ids of the edits whose prompts they answer (``output`` in FIGA's data set). Each list may be empty
    except ``prompts``.
    """

    prompts: list[Prompt] = field(default_factory=list)
    corpus: list[Demonstration] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    corrections: list[Edit] = field(default_factory=list)
    references: list[Demonstration] = field(default_factory=list)


@dataclass
class Truth:
    """What only evaluation may read of one split."""

    references: list[Reference] = field(default_factory=list)
    marks: list[GoldMarks] = field(default_factory=list)


@dataclass
class RawData:
    """Everything a source yields, by split."""

    splits: dict[Split, RawSplit]
    truth: dict[Split, Truth]


_RAW_FILES = {
    "prompts": Prompt,
    "corpus": Demonstration,
    "demonstrations": Demonstration,
    "preferences": Preference,
    "corrections": Edit,
    "references": Demonstration,
}
# Kinds without a file where there is no record: added after data sets had been made, which stay readable as they are.
_MAY_LACK_FILE = {"references"}
TRUTH_FILES = {"references": Reference, "marks": GoldMarks}


def write_raw(data: RawData, raw: Path, gold: Path) -> None:
    """Write ``raw/<split>/<kind>.jsonl`` and ``gold/<split>/<kind>.jsonl`` into existing folders; ``references`` only
    where there are some."""
    for split in SPLITS:
        for name in _RAW_FILES:
            records = getattr(data.splits[split], name)
            if records or name not in _MAY_LACK_FILE:
                write_records(raw / split / f"{name}.jsonl", records)
        for name in TRUTH_FILES:
            write_records(gold / split / f"{name}.jsonl", getattr(data.truth[split], name))


def read_split(folder: Path) -> RawSplit:
    """Read one split that ``write_raw`` wrote; only ``prompts`` must not be empty."""
    return RawSplit(
        **{
            name: read_records(folder / f"{name}.jsonl", kind, empty_ok=name != "prompts")
            for name, kind in _RAW_FILES.items()
            if name not in _MAY_LACK_FILE or (folder / f"{name}.jsonl").exists()
        }
    )
