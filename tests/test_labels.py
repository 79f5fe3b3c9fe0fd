"""Token labels from edits: cases by hand, and the documented tie-break against a plain implementation of it."""

from __future__ import annotations

import random

import pytest

from fgalign.core.schema import Edit, LabelledPair
from fgalign.errors import InputError, RecordError
from fgalign.labels import (
    EditLabels,
    LabelConfig,
    label_edit,
    label_edits,
    label_statistics,
    label_words,
    with_tokens_changed,
    word_numbers,
)


@pytest.mark.parametrize(
    ("initial", "revised", "initial_labels", "revised_labels", "distance"),
    [
        ("abcd", "axcd", [0, -1, 0, 0], [0, 1, 0, 0], 1),  # b replaced by x
        ("abcd", "abxcd", [0, 0, 0, 0], [0, 0, 1, 0, 0], 1),  # x inserted
        ("abcd", "ad", [0, -1, -1, 0], [0, 0], 2),  # b and c deleted
        ("abcd", "xbcd", [-1, 0, 0, 0], [1, 0, 0, 0], 1),  # at the start
        ("abcd", "abcx", [0, 0, 0, -1], [0, 0, 0, 1], 1),  # at the end
        ("abcd", "", [-1, -1, -1, -1], [], 4),
        ("", "ab", [], [1, 1], 2),
        ("abc", "abc", [0, 0, 0], [0, 0, 0], 0),
        ("abcdef", "xbcyef", [-1, 0, 0, -1, 0, 0], [1, 0, 0, 1, 0, 0], 2),  # two places
        # One deleted (b), one kept, one replaced (d by y), one inserted (z): distance 3.
        ("abcde", "acyez", [0, -1, 0, -1, 0], [0, 0, 1, 0, 1], 3),
    ],
)
def test_by_hand(initial, revised, initial_labels, revised_labels, distance):
    assert label_edit(initial, revised) == EditLabels(initial_labels, revised_labels, distance)


@pytest.mark.parametrize(
    ("initial", "revised", "initial_labels", "revised_labels"),
    [
        # Distance 1 whichever of the equal tokens goes; the common prefix is matched first, so the last one goes.
        ("aab", "ab", [0, -1, 0], [0, 0]),
        # Deletion before substitution. At the end (b against a) all three cost 2; deletion of b comes first, then a
        # matches a, then b is inserted. Substitution first would label all four tokens.
        ("ab", "ba", [0, -1], [1, 0]),
        # Substitution before insertion. At the end (b against c) substitution costs d(a, b) + 1 = 2 and insertion
        # d(ab, b) + 1 = 2. Insertion first would keep b: [-1, 0] and [0, 1].
        ("ab", "bc", [-1, -1], [1, 1]),
        # Insertion before match. b inserted at the end, then a against a at (1, 3): insertion costs d(a, ba) + 1 = 2
        # and the match d("", ba) = 2. The match first would give [1, 1, 0, 1].
        ("a", "baab", [0], [1, 0, 1, 1]),
    ],
)
def test_ties_by_hand(initial, revised, initial_labels, revised_labels):
    labels = label_edit(initial, revised)
    assert (labels.initial, labels.revised) == (initial_labels, revised_labels)


def plain_labels(initial: list[int], revised: list[int]) -> EditLabels:
    """The module's text, word for word: prefix, then suffix, then a backtrace from the end that takes the first optimal
    one of deletion, substitution, insertion, match."""
    shorter = min(len(initial), len(revised))
    prefix = 0
    while prefix < shorter and initial[prefix] == revised[prefix]:
        prefix += 1
    suffix = 0
    while suffix < shorter - prefix and initial[-1 - suffix] == revised[-1 - suffix]:
        suffix += 1
    a, b = initial[prefix : len(initial) - suffix], revised[prefix : len(revised) - suffix]
    cost = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            diagonal = cost[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            cost[i][j] = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, diagonal)
    initial_labels, revised_labels = [0] * len(initial), [0] * len(revised)
    i, j = len(a), len(b)
    while i or j:
        if i and cost[i][j] == cost[i - 1][j] + 1:  # deletion
            i -= 1
            initial_labels[prefix + i] = -1
        elif i and j and a[i - 1] != b[j - 1] and cost[i][j] == cost[i - 1][j - 1] + 1:  # substitution
            i, j = i - 1, j - 1
            initial_labels[prefix + i], revised_labels[prefix + j] = -1, 1
        elif j and cost[i][j] == cost[i][j - 1] + 1:  # insertion
            j -= 1
            revised_labels[prefix + j] = 1
        else:  # match
            assert a[i - 1] == b[j - 1]
            i, j = i - 1, j - 1
    return EditLabels(initial_labels, revised_labels, cost[-1][-1])


@pytest.mark.parametrize(("longest", "count"), [(6, 3000), (16, 2000), (80, 20)])
def test_documented_tie_break(longest, count):
    # Three letters make ties the rule: another order of preference differs in a tenth to a half of the cases. 80 tokens
    # are more than one 64-bit word of the library's bit-parallel matrix.
    generator = random.Random(longest)
    for _ in range(count):
        a, b = ([generator.randrange(3) for _ in range(generator.randint(0, longest))] for _ in range(2))
        assert label_edit(a, b) == plain_labels(a, b), (a, b)


def test_only_labels_of_changed_tokens(tokenizer):
    # What is neutral on both sides is the same sequence of tokens: undoing the labels gives the same text.
    generator = random.Random(0)
    for _ in range(300):
        a, b = ([generator.randrange(4) for _ in range(generator.randint(0, 12))] for _ in range(2))
        labels = label_edit(a, b)
        kept = [[x for x, label in zip(*side, strict=True) if not label] for side in ((a, labels[0]), (b, labels[1]))]
        assert kept[0] == kept[1]
        bad, good = -sum(labels.initial), sum(labels.revised)
        assert max(bad, good) <= labels.distance <= bad + good


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["the", " c", "at", " sat"], [0, 1, 1, 2]),  # " c" + "at" is one word
        (["no", ",", " we"], [0, 1, 2]),  # the comma stands alone
        (["don", "'", "t"], [0, 1, 2]),
        (["a", "1", "2"], [0, 0, 0]),  # letters and digits join
        (["end", "<|end|>"], [0, 1]),
        ([" ", "a"], [0, 1]),
        (["x.", "y"], [0, 1]),  # a full stop at the seam
        (["", "a"], [0, 1]),
        (["caf", "\ufffd", "\ufffd", " is"], [0, 0, 0, 1]),  # two bytes of one letter belong to its word
        (["\ufffd", "\ufffd", "\ufffd", "."], [0, 0, 0, 1]),
        ([], []),
    ],
)
def test_word_numbers(texts, numbers):
    assert word_numbers(texts) == numbers


def test_words_project_onto_their_tokens():
    # Initial words: (1 2) (3) (4 5); revised words: (1 6) (3) (7) (4 5). Word (1 2) is replaced by (1 6), (7) inserted:
    # 2 edits. Token by token only 2 -> 6 and 7 would carry labels.
    labels = label_words([1, 2, 3, 4, 5], [1, 6, 3, 7, 4, 5], [0, 0, 1, 2, 2], [0, 0, 1, 2, 3, 3])
    assert labels == EditLabels([-1, -1, 0, 0, 0], [1, 1, 0, 1, 0, 0], 2)
    assert label_edit([1, 2, 3, 4, 5], [1, 6, 3, 7, 4, 5]) == EditLabels([0, -1, 0, 0, 0], [0, 1, 0, 1, 0, 0], 2)


def test_words_deleted():
    assert label_words([1, 2, 3], [3], [0, 0, 1], [0]) == EditLabels([-1, -1, 0], [0], 1)


def test_word_numbers_of_the_wrong_length():
    with pytest.raises(ValueError, match="found 1 for 2 initial and 1 for 1 revised tokens"):
        label_words([1, 2], [3], [0], [0])


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_to_pairs(tokenizer):
    edit = Edit(id="e", prompt="where?", initial="the cat sat", revised="the dog sat")
    (pair,) = label_edits(tokenizer, [edit], LabelConfig(unit="token"))
    (words,) = label_edits(tokenizer, [edit], LabelConfig(unit="word"))
    assert pair.id == "e"
    assert tokenizer.decode(pair.prompt_ids) == "<|user|>where?<|assistant|>"
    for side, text in (("initial", "the cat sat"), ("revised", "the dog sat")):
        ids = getattr(pair, f"{side}_ids")
        assert tokenizer.decode(ids) == text + "<|end|>"
        assert ids[-1] == tokenizer.eos_token_id and getattr(pair, f"{side}_labels")[-1] == 0
        # Labels by token lie within the changed word; labels by word cover exactly it.
        assert getattr(words, f"{side}_ids") == ids
        marked = [token for token, label in zip(ids, getattr(words, f"{side}_labels"), strict=True) if label]
        assert tokenizer.decode(marked) == text[3:7]
        assert all(
            word for token, word in zip(getattr(pair, f"{side}_labels"), getattr(words, f"{side}_labels"), strict=True)
            if token
        )  # fmt: skip
        assert any(getattr(pair, f"{side}_labels"))


def test_edits_may_be_dicts(tokenizer):
    edit = {"id": "e", "prompt": "where?", "initial": "the cat sat", "revised": "the dog sat"}
    assert label_edits(tokenizer, [edit], LabelConfig()) == label_edits(tokenizer, [Edit(**edit)], LabelConfig())
    with pytest.raises(RecordError, match=r"edits\[1\]: field `prompt` of a Edit record: Field required; expected the"):
        label_edits(tokenizer, [Edit(**edit), {"id": "f"}], LabelConfig())
    with pytest.raises(RecordError, match=r"edits\[0\]: field `record` of a Edit record: .*, found 'the cat sat'"):
        label_edits(tokenizer, ["the cat sat"], LabelConfig())


def test_different_texts_with_the_same_tokens(tokenizer, capsys):
    class Lower:
        """A tokenizer that ignores case, as uncased ones do."""

        def __call__(self, text, **options):
            return tokenizer(text.lower(), **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    edit = Edit(id="e7", prompt="p", initial="The cat", revised="the cat")
    with pytest.raises(InputError, match="edit 'e7': initial and revised are different texts but the same tokens"):
        label_edits(Lower(), [edit], LabelConfig())
    # The stages leave such edits out and say how many.
    other = edit.model_copy(update={"id": "e8", "revised": "a cat"})
    assert with_tokens_changed(Lower(), [edit, other], "train") == [other]
    assert "train: 1 of 2 edits left out: other texts, but the same tokens" in capsys.readouterr().out
    assert with_tokens_changed(tokenizer, [edit, other]) == [edit, other] and not capsys.readouterr().out


def test_statistics():
    pairs = [
        # Distance 2: 6 replaced by 8, 9 inserted.
        LabelledPair(
            id="a", prompt_ids=[5], initial_ids=[6, 7, 1], initial_labels=[-1, 0, 0],
            revised_ids=[8, 7, 9, 1], revised_labels=[1, 0, 1, 0],
        ),
        # Distance 1, though labels by words cover two tokens.
        LabelledPair(
            id="b", prompt_ids=[5], initial_ids=[2, 3, 4, 4, 1], initial_labels=[-1, -1, 0, 0, 0],
            revised_ids=[2, 6, 4, 4, 1], revised_labels=[1, 1, 0, 0, 0],
        ),
    ]  # fmt: skip
    assert label_statistics(iter(pairs)) == {
        "pairs": 2,
        "initial_tokens_mean": 4.0,  # (3 + 5) / 2
        "revised_tokens_mean": 4.5,  # (4 + 5) / 2
        "edit_distance_mean": 1.5,  # (2 + 1) / 2
        "share_bad": 3 / 8,  # (1 + 2) of 8 initial tokens
        "share_good": 4 / 9,  # (2 + 2) of 9 revised tokens
    }


def test_labels_against_the_truth_by_hand(tokenizer):
    from fgalign.core.schema import GoldMarks, Span
    from fgalign.core.tokens import token_offsets
    from fgalign.evaluation.labels import label_quality

    edits = [
        Edit(id="a", prompt="p", initial="xqzj", revised="xqj"),
        Edit(id="b", prompt="p", initial="qx", revised="zx"),
    ]
    assert token_offsets(tokenizer, "xqzj") == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 4),
    ]  # a token a letter, then the end
    pairs = label_edits(tokenizer, edits, LabelConfig())
    assert [pair.initial_labels for pair in pairs] == [[0, 0, -1, 0, 0], [-1, 0, 0]]
    marks = {
        "a": GoldMarks(
            id="a", side="initial", text="xqzj", spans=[Span(start=s, end=s + 1, type="rude") for s in (0, 2)]
        ),
        "b": GoldMarks(id="b", side="initial", text="qx", spans=[]),
    }
    quality = label_quality(tokenizer, edits, pairs, marks)
    # Of the 2 tokens labelled bad, z is flawed; of the 2 flawed ones, x and z, z is labelled bad.
    assert (quality["precision"], quality["recall"], quality["f1"]) == (0.5, 0.5, 0.5)
    assert quality["share_bad_labelled"] == quality["share_bad_truth"] == pytest.approx(2 / 6)
    assert quality["by_type"]["rude"]["recall"] == quality["by_type"]["rude"]["share_of_labels"] == 0.5
    assert quality["by_type"]["rude"]["tokens"] == 2
    # Flawed tokens stand at 0 and 2, the others at 1 and 3 and at 0 and 1: of 8 comparisons 3 are won and one is a tie.
    assert quality["position_auroc"] == 3.5 / 8
    assert "position_auroc" not in quality["intervals"]  # a single response has flaws
    assert "precision" in quality["intervals"]
