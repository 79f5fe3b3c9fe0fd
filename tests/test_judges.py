"""Judges and outcomes, with scores worked out by hand."""

from __future__ import annotations

import math
import sys
import types

import pytest

from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.judges import get_judge, outcome


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # Longest common subsequence "the cat mat" = 3; P = 3/4, R = 3/6; F1 = 2 * 3 / (4 + 6) = 0.6.
        ("the cat red mat", "the cat sat on the mat", 0.6),
        # Order counts: both words are there, but only one in sequence; P = R = 1/2.
        ("dog cat", "cat dog", 0.5),
        # Case and punctuation do not count, and stemming makes "cats" and "cat" one word; P = R = 1.
        ("The CATS.", "the cat", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("?!", "cat", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(response, gold, expected):
    assert get_judge("rouge_l").score("any prompt", response, gold) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_needs_a_gold_answer():
    with pytest.raises(
        InputError, match=r"judge rouge_l: expected a gold answer for the prompt 'why\?', found none; use"
    ):
        get_judge("rouge_l").score("why?", "because", None)


def test_the_simulators_judge_hands_prompt_and_response_to_the_simulator(monkeypatch):
    """The simulator itself is tested elsewhere; here, that its score arrives unchanged and gold is not read."""
    calls = []
    module = types.ModuleType("fgalign.sources.simulator.gold")
    module.gold_score = lambda prompt, response: calls.append((prompt, response)) or -3
    monkeypatch.setitem(sys.modules, "fgalign.sources.simulator.gold", module)
    score = get_judge("simulator_gold").score("p", "r", None)
    assert score == -3.0
    assert isinstance(score, float)
    assert calls == [("p", "r")]


def test_judges_have_titles_for_captions():
    assert get_judge("simulator_gold").title == "gold score of the simulator"
    assert get_judge("rouge_l").title == "ROUGE-L F1 with the gold long answer (rouge-score)"
    assert get_judge("rouge_l").name == "rouge_l"


def test_an_unknown_judge_is_refused():
    with pytest.raises(ConfigError, match=r"unknown judge 'gpt'; expected one of simulator_gold, rouge_l"):
        get_judge("gpt")


@pytest.mark.parametrize(
    ("score", "reference", "expected"),
    [(2.0, 1.0, 1.0), (1.0, 1.0, 0.5), (0.5, 1.0, 0.0), (-1.0, -2.0, 1.0), (-math.inf, 0.0, 0.0)],
)
def test_outcome_is_win_tie_or_loss(score, reference, expected):
    assert outcome(score, reference) == expected


@pytest.mark.parametrize(("score", "reference"), [(math.nan, 0.0), (0.0, math.nan)])
def test_outcome_refuses_nan(score, reference):
    with pytest.raises(
        ValueError, match=r"expected two numbers, found score (nan|0\.0) and reference_score (nan|0\.0)"
    ):
        outcome(score, reference)
