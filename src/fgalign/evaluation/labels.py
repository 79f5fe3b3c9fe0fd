"""Minimal-edit labels against the truth: gold marks of the simulator, or human error spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fgalign.core.schema import BAD, Edit, GoldMarks, LabelledPair
from fgalign.core.tokens import token_offsets
from fgalign.errors import InputError
from fgalign.evaluation.statistics import precision_recall


def gold_types(tokenizer: Any, text: str, marks: GoldMarks) -> list[set[str]]:
    """The flaw types of each token of a response, its end token (never flawed) last: those of the marked spans that it
    overlaps in more than white space.

    Raises:
        InputError: the marks are about another text.
    """
    if marks.text != text:
        raise InputError(f"gold marks {marks.id!r} are about another text than the response; make both again")
    kinds: list[set[str]] = []
    for start, end in token_offsets(tokenizer, text):
        covered = range(start, end)
        kinds.append(
            {
                span.type
                for span in marks.spans
                if any(span.start <= place < span.end and not text[place].isspace() for place in covered)
            }
        )
    return kinds


def label_quality(
    tokenizer: Any, edits: Sequence[Edit], pairs: Sequence[LabelledPair], marks: Mapping[str, GoldMarks]
) -> dict[str, Any]:
    """Precision, recall and F1 of the label bad on initial responses over all tokens (without end tokens), and, for
    each type of flaw, its tokens and the share of them labelled bad.

    Raises:
        InputError: an edit has no marks.
    """
    predicted: list[bool] = []
    truth: list[bool] = []
    by_type: dict[str, list[bool]] = {}
    for edit, pair in zip(edits, pairs, strict=True):
        if edit.id not in marks:
            raise InputError(f"edit {edit.id!r} has no gold marks of its initial response; make the raw data again")
        kinds = gold_types(tokenizer, edit.initial, marks[edit.id])[:-1]
        labels = [label == BAD for label in pair.initial_labels[:-1]]
        predicted += labels
        truth += [bool(kind) for kind in kinds]
        for label, kind in zip(labels, kinds, strict=True):
            for name in kind:
                by_type.setdefault(name, []).append(label)
    quality = precision_recall(predicted, truth)
    return {
        "pairs": len(pairs),
        "precision": quality.precision,
        "recall": quality.recall,
        "f1": quality.f1,
        "share_bad_labelled": sum(predicted) / len(predicted),
        "share_bad_truth": sum(truth) / len(truth),
        "by_type": {
            name: {"recall": sum(labels) / len(labels), "tokens": len(labels)}
            for name, labels in sorted(by_type.items())
        },
    }
