"""The truth of a split, which only evaluation opens."""

from __future__ import annotations

from pathlib import Path

from fgalign.raw_data import TRUTH_FILES, Truth
from fgalign.schema import GoldMarks, read_records


def read_truth(folder: Path) -> Truth:
    """Read one split's truth that ``write_raw`` wrote."""
    return Truth(
        **{name: read_records(folder / f"{name}.jsonl", kind, empty_ok=True) for name, kind in TRUTH_FILES.items()}
    )


def initial_marks(folder: Path) -> dict[str, GoldMarks]:
    """The truth about the initial responses of one split's edits, by id."""
    return {mark.id: mark for mark in read_truth(folder).marks if mark.side == "initial"}
