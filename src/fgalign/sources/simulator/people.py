"""Simulated people: which of two answers a person prefers (AlpacaFarm's idea: noise is part of the annotator)."""

from __future__ import annotations

import math
import random

from fgalign.sources.simulator.gold import gold_score


def prefers_first(prompt: str, first: str, second: str, temperature: float, noise: float, rng: random.Random) -> bool:
    """Whether a person prefers ``first``.

    Bradley-Terry on the gold scores, P(first) = sigmoid((s_first - s_second) / temperature), so that near ties flip
    more often and equal scores are a coin's toss; then, with probability ``noise``, the opposite is reported.
    """
    gap = (gold_score(prompt, first) - gold_score(prompt, second)) / temperature
    opinion = rng.random() < 0.5 * (1.0 + math.tanh(gap / 2.0))
    return opinion != (rng.random() < noise)
