"""The truth of a split, which only evaluation opens."""

from __future__ import annotations

from pathlib import Path

from fgalign.config import Profile
from fgalign.core.raw_data import TRUTH_FILES, Truth
from fgalign.core.schema import GoldMarks, Prompt, Reference, read_records
from fgalign.errors import InputError


def read_truth(folder: Path) -> Truth:
    """Read one split's truth that ``write_raw`` wrote."""
    return Truth(
        **{name: read_records(folder / f"{name}.jsonl", kind, empty_ok=True) for name, kind in TRUTH_FILES.items()}
    )


def initial_marks(folder: Path) -> dict[str, GoldMarks]:
    """The truth about the initial responses of one split's edits, by id."""
    return {mark.id: mark for mark in read_truth(folder).marks if mark.side == "initial"}


def split_references(profile: Profile, split: str) -> list[Reference]:
    """The reference of each prompt of the ``validation`` or ``test`` split, in the order of the prompts.

    Raises:
        InputError: a prompt has none.
    """
    by_id = {record.id: record for record in read_truth(profile.data / "gold" / split).references}
    prompts = read_records(profile.data / "raw" / split / "prompts.jsonl", Prompt)
    missing = [record.id for record in prompts if record.id not in by_id]
    if missing:
        where = f"gold/{split}/references.jsonl"
        raise InputError(f"{where}: prompt {missing[0]!r} has no reference; make the raw data again")
    return [by_id[record.id] for record in prompts]
