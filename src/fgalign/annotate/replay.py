"""The annotator that hands on edits which come with the data set (people's corrections, in QA-Feedback)."""

from __future__ import annotations

from fgalign.config import Section
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Edit, Split
from fgalign.errors import InputError


class ReplayConfig(Section):
    """Nothing to choose: the edits are the data set's own."""


def annotate(split: RawSplit, config: ReplayConfig, split_name: Split) -> list[Edit]:
    """The corrections of a split, unchanged and in their order.

    Raises:
        InputError: the split has none.
    """
    if not split.corrections:
        raise InputError(
            f"annotator replay: split {split_name}: expected corrections that come with the data set, found none among "
            f"{len(split.prompts)} prompts; use a source with human edits (qa_feedback) or another annotator"
        )
    return list(split.corrections)
