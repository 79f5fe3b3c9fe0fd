"""Minimal-edit labels against the truth: gold marks of the simulator, or human error spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fgalign.core.schema import BAD, Edit, GoldMarks, LabelledPair
from fgalign.core.tokens import token_offsets
from fgalign.errors import InputError
from fgalign.evaluation.statistics import Parts, auroc_parts, parts_interval, ratio_parts


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


def gold_types_of(tokenizer: Any, edits: Sequence[Edit], marks: Mapping[str, GoldMarks]) -> list[list[set[str]]]:
    """``gold_types`` of the initial response of each edit; ``marks`` by the edits' ids.

    Raises:
        InputError: an edit has no marks, or they are about another text.
    """
    for edit in edits:
        if edit.id not in marks:
            raise InputError(f"edit {edit.id!r} has no gold marks of its initial response; make the raw data again")
    return [gold_types(tokenizer, edit.initial, marks[edit.id]) for edit in edits]


def label_quality(
    tokenizer: Any, edits: Sequence[Edit], pairs: Sequence[LabelledPair], marks: Mapping[str, GoldMarks]
) -> dict[str, Any]:
    """Precision, recall and F1 of the label bad on initial responses over all tokens (without end tokens). For each
    type of flaw: its tokens, the share of them labelled bad (recall), and its share of all tokens labelled bad
    (``share_of_labels``; these add up to the precision, more where spans of two types overlap). ``position_auroc`` is
    how well a token's place in its response, later being worse, tells flawed tokens from others: what a token-level
    model has to beat that has learned no more than where flaws stand. ``intervals`` are 95% intervals over responses,
    of those that rest on more than one.

    Raises:
        InputError: an edit has no marks.
    """
    labels: list[bool] = []
    kinds: list[set[str]] = []
    own: list[int] = []
    places: list[int] = []
    for number, (types, pair) in enumerate(zip(gold_types_of(tokenizer, edits, marks), pairs, strict=True)):
        found = [label == BAD for label in pair.initial_labels[:-1]]
        labels += found
        kinds += types[:-1]
        own += [number] * len(found)
        places += range(len(found))
    label, truth = np.array(labels, dtype=bool), np.array([bool(kind) for kind in kinds], dtype=bool)
    every = np.ones(label.size)

    def ratios(**shares: tuple[np.ndarray, np.ndarray]) -> dict[str, Parts | None]:
        """Each ratio, part over whole; None without a whole."""
        return {name: ratio_parts(part, whole, own, len(pairs)) for name, (part, whole) in shares.items()}

    def values(parts: dict[str, Parts | None]) -> dict[str, Any]:
        intervals = {name: parts_interval([part]) for name, part in parts.items() if part is not None}
        return {
            **{name: None if part is None else part.value for name, part in parts.items()},
            "intervals": {
                name: [interval.low, interval.high] for name, interval in intervals.items() if interval is not None
            },
        }

    def of_type(name: str) -> dict[str, Any]:
        flawed = np.array([name in kind for kind in kinds], dtype=bool)
        hits = flawed & label
        parts = ratios(recall=(hits, flawed), share_of_labels=(hits, label))
        return {**values(parts), "tokens": int(flawed.sum())}

    parts = ratios(
        precision=(label & truth, label),
        recall=(label & truth, truth),
        f1=(2 * (label & truth), label.astype(int) + truth),
        share_bad_labelled=(label, every),
        share_bad_truth=(truth, every),
    )
    return {
        "pairs": len(pairs),
        **values(parts | {"position_auroc": auroc_parts(places, truth, own, len(pairs))}),
        "by_type": {name: of_type(name) for name in sorted(set().union(*kinds))},
    }
