"""Items about the held-out questions of QA-Feedback."""

from __future__ import annotations

import random
from pathlib import Path

from fgalign.benchmarks import BenchmarkConfig
from fgalign.benchmarks.items import ChoiceItem
from fgalign.core.raw_data import read_split
from fgalign.core.schema import Edit
from fgalign.errors import InputError


def build(config: BenchmarkConfig, data: Path) -> dict[str, list[ChoiceItem]]:
    """``qa_truthfulness``: one item for each test question that people corrected, ``config.items`` at most.

    Raises:
        InputError: the test split has no corrections.
    """
    corrections = read_split(data / "raw" / "test").corrections[: config.items]
    if not corrections:
        raise InputError(
            f"{data / 'raw' / 'test' / 'corrections.jsonl'}: no corrections, of which `qa_truthfulness` needs at least "
            "one; make the raw data again, or leave the task out"
        )
    return {"qa_truthfulness": [truthfulness(edit, config.seed) for edit in corrections]}


def truthfulness(edit: Edit, seed: int) -> ChoiceItem:
    """The corrected answer, which is the right one, and the answer before correction, in random order."""
    name = f"qa_truthfulness-{edit.id}"
    answer = random.Random(f"{seed}/{name}").randrange(2)
    choices = [edit.initial, edit.revised] if answer == 1 else [edit.revised, edit.initial]
    return ChoiceItem(id=name, prompt=edit.prompt, choices=choices, answer=answer)
