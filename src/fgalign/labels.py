"""Token labels from minimal edits: Levenshtein alignment of two token-id sequences (FIGA, section 3; Xu et al.).

In the revised response, tokens inserted or replaced are good; in the initial response, tokens deleted or replaced are
bad; the rest is neutral. Costs are 1 for insertion, deletion and substitution.

Several optimal edit scripts can exist. Ours is the one of ``rapidfuzz.distance.Levenshtein.editops``: the common prefix
is matched first, then the common suffix; in what remains the backtrace runs from the end and, at each cell, takes the
first of these that is optimal: deletion, substitution, insertion, match. ``tests/test_labels.py`` checks it against a
plain implementation of that sentence.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rapidfuzz.distance import Levenshtein

from fgalign.config import Section
from fgalign.core.schema import BAD, GOOD, NEUTRAL, Edit, LabelledPair, parse_record
from fgalign.core.tokens import encode_prompt, encode_response, token_texts
from fgalign.errors import InputError

Unit = Literal["token", "word"]
"""What is aligned: token ids, or words projected onto their tokens."""


class LabelConfig(Section):
    """How edits become labels."""

    unit: Unit = "token"


class EditLabels(NamedTuple):
    """Labels of both sides and the number of edit operations between them (in units of the alignment)."""

    initial: list[int]
    revised: list[int]
    distance: int


def label_edit(initial: Sequence[Hashable], revised: Sequence[Hashable]) -> EditLabels:
    """Label two sequences by their Levenshtein alignment: -1 or 0 on the initial side, 0 or 1 on the revised side.

    >>> label_edit(["the", "food", "is", "bad"], ["the", "Thai", "food", "is", "good"])
    EditLabels(initial=[0, 0, 0, -1], revised=[0, 1, 0, 0, 1], distance=2)
    """
    initial_labels = [NEUTRAL] * len(initial)
    revised_labels = [NEUTRAL] * len(revised)
    operations = Levenshtein.editops(initial, revised)
    for operation, source, target in operations.as_list():
        if operation != "insert":
            initial_labels[source] = BAD
        if operation != "delete":
            revised_labels[target] = GOOD
    return EditLabels(initial_labels, revised_labels, len(operations))


def label_words(
    initial: Sequence[int], revised: Sequence[int], initial_words: Sequence[int], revised_words: Sequence[int]
) -> EditLabels:
    """Align whole words and give each token its word's label; ``*_words`` hold each token's word number, from 0 up.

    Raises:
        ValueError: word numbers and tokens differ in number.
    """
    if len(initial) != len(initial_words) or len(revised) != len(revised_words):
        raise ValueError(
            f"expected one word number a token, found {len(initial_words)} for {len(initial)} initial "
            f"and {len(revised_words)} for {len(revised)} revised tokens"
        )
    labels = label_edit(_words(initial, initial_words), _words(revised, revised_words))
    return EditLabels(
        [labels.initial[word] for word in initial_words],
        [labels.revised[word] for word in revised_words],
        labels.distance,
    )


def word_numbers(token_texts: Sequence[str]) -> list[int]:
    """Word number of each token: a token starts a new word when its text starts with white space or when it or its
    predecessor has no letter or digit at the seam (punctuation and special tokens stand alone)."""
    numbers: list[int] = []
    for position, text in enumerate(token_texts):
        previous = token_texts[position - 1] if position else ""
        # Part of a character is text that no one token has; its neighbours are in its word.
        joins = all(edge.isalnum() or edge == "\ufffd" for edge in (previous[-1:], text[:1]))
        numbers.append(numbers[-1] + (not joins) if numbers else 0)
    return numbers


def label_by_unit(tokenizer: Any, initial: Sequence[int], revised: Sequence[int], unit: Unit) -> EditLabels:
    """Label two sequences of token ids (those of ``encode_response``), aligned by ``unit``."""
    if unit == "token":
        return label_edit(initial, revised)
    words = [word_numbers(token_texts(tokenizer, ids)) for ids in (initial, revised)]
    return label_words(initial, revised, *words)


def label_bag_of_words(initial: Sequence[int], revised: Sequence[int]) -> tuple[list[int], list[int]]:
    """Label without alignment: a token is bad, or good, if its id does not occur on the other side at all.

    Sets, not multisets: a token that both sides hold is neutral wherever and however often it stands.

    >>> label_bag_of_words(["the", "bad", "the"], ["the", "good"])
    ([0, -1, 0], [0, 1])
    """
    in_initial, in_revised = set(initial), set(revised)
    return (
        [NEUTRAL if token in in_revised else BAD for token in initial],
        [NEUTRAL if token in in_initial else GOOD for token in revised],
    )


def with_tokens_changed(tokenizer: Any, edits: Sequence[Edit], where: str = "edits") -> list[Edit]:
    """The edits that change a token; how many do not, because the tokenizer normalises the change away (accents written
    in two ways, say), is printed under the name ``where``."""
    kept = [
        edit for edit in edits if encode_response(tokenizer, edit.initial) != encode_response(tokenizer, edit.revised)
    ]
    if len(kept) < len(edits):
        print(f"{where}: {len(edits) - len(kept)} of {len(edits)} edits left out: other texts, but the same tokens")
    return kept


def label_edits(tokenizer: Any, edits: Iterable[Edit | Mapping[str, str]], config: LabelConfig) -> list[LabelledPair]:
    """Edits, or dicts with the fields of one, as labelled pairs of token ids.

    Raises:
        RecordError: something among them is no edit.
        InputError: two different texts have the same tokens, so that nothing is left to label
            (``with_tokens_changed`` leaves such edits out).
    """
    pairs = []
    for number, edit in enumerate(edits):
        edit = parse_record(Edit, edit, f"edits[{number}]")
        initial, revised = encode_response(tokenizer, edit.initial), encode_response(tokenizer, edit.revised)
        if initial == revised:
            raise InputError(f"edit {edit.id!r}: initial and revised are different texts but the same tokens")
        labels = label_by_unit(tokenizer, initial, revised, config.unit)
        pairs.append(
            LabelledPair(
                id=edit.id,
                prompt_ids=encode_prompt(tokenizer, edit.prompt),
                initial_ids=initial,
                initial_labels=labels.initial,
                revised_ids=revised,
                revised_labels=labels.revised,
            )
        )
    return pairs


def label_statistics(pairs: Iterable[LabelledPair]) -> dict[str, float]:
    """Statistics of labelled pairs: mean lengths and edit distance in tokens, shares of tokens labelled.

    The edit distance is that between the token-id sequences, whatever unit made the labels. The end-of-sequence token
    counts as a token.
    """
    pairs = list(pairs)
    initial = sum(len(pair.initial_ids) for pair in pairs)
    revised = sum(len(pair.revised_ids) for pair in pairs)
    distance = sum(Levenshtein.distance(pair.initial_ids, pair.revised_ids) for pair in pairs)
    return {
        "pairs": len(pairs),
        "initial_tokens_mean": initial / len(pairs),
        "revised_tokens_mean": revised / len(pairs),
        "edit_distance_mean": distance / len(pairs),
        "share_bad": -sum(sum(pair.initial_labels) for pair in pairs) / initial,
        "share_good": sum(sum(pair.revised_labels) for pair in pairs) / revised,
    }


def _words(ids: Sequence[int], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    words: list[list[int]] = []
    for token, number in zip(ids, numbers, strict=True):
        if number == len(words):
            words.append([])
        words[number].append(token)
    return [tuple(word) for word in words]
