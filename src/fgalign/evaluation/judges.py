"""Judges: how good one response is, as a number (higher is better), and who wins a comparison.

A judge sees prompt, response and, where the data has one, the gold answer; it never sees which method wrote the
response. Win rates are means of ``outcome`` over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from fgalign.errors import ConfigError, InputError

Score = Callable[[str, str, str | None], float]


@dataclass(frozen=True)
class Judge:
    """A named judge.

    ``score(prompt, response, gold)`` returns a finite number, higher is better; ``title`` is how captions call it.
    """

    name: str
    title: str
    score: Score


def simulator_score(prompt: str, response: str, gold: str | None) -> float:
    """The simulator's own gold score; ``gold`` is not read, because the simulator derives the truth from the prompt."""
    from fgalign.sources.simulator.gold import gold_score

    return float(gold_score(prompt, response))


def rouge_l_score(prompt: str, response: str, gold: str | None) -> float:
    """ROUGE-L F1 (Lin 2004) of the response and the gold answer, from 0 to 1, by the ``rouge-score`` package.

    Words are lower-cased and stemmed (Porter), as in the evaluation of FineGrainedRLHF; the whole text is one sequence
    (ROUGE-L, not the per-sentence ROUGE-Lsum). A response without a word scores 0.

    Raises:
        InputError: there is no gold answer.
    """
    if gold is None:
        raise InputError(
            f"judge rouge_l: expected a gold answer for the prompt {_short(prompt)}, found none; "
            "use a source whose references have gold answers (qa_feedback), or another judge"
        )
    return float(_rouge_scorer().score(gold, response)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


_JUDGES = {
    judge.name: judge
    for judge in (
        Judge("simulator_gold", "gold score of the simulator", simulator_score),
        Judge("rouge_l", "ROUGE-L F1 with the gold long answer (rouge-score)", rouge_l_score),
    )
}


def get_judge(name: str) -> Judge:
    """The judge of that name.

    Raises:
        ConfigError: no judge has that name.
    """
    if name not in _JUDGES:
        raise ConfigError(f"judge: unknown judge {name!r}; expected one of {', '.join(_JUDGES)}")
    return _JUDGES[name]


def outcome(score: float, reference_score: float) -> float:
    """1.0 for a win over the reference, 0.5 for a tie (equal scores), 0.0 for a loss.

    Raises:
        ValueError: a score is NaN, which would silently count as a loss.
    """
    if math.isnan(score) or math.isnan(reference_score):
        raise ValueError(f"outcome: expected two numbers, found score {score} and reference_score {reference_score}")
    if score == reference_score:
        return 0.5
    return 1.0 if score > reference_score else 0.0


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
