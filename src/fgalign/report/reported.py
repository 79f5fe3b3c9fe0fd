"""The numbers that the papers report, and only those that were checked (abstracts, public summaries), with sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fgalign.report.cells import Cell

Verdict = Literal["agrees", "does not agree", "cannot tell", "not comparable"]

FIGA_SOURCE = "Guo et al. 2024 (FIGA), main table, as a public summary quotes it"
XU_SOURCE = "Xu et al. 2024, abstract"


@dataclass(frozen=True)
class Reported:
    """One published number. ``comparable`` is False where ours is on another scale; ``note`` says what to know."""

    value: float
    source: str
    note: str
    comparable: bool = True


# (table, method, metric) -> the published number.
REPORTED: dict[tuple[str, str, str], Reported] = {
    ("xu_win_rate", "ppo_token", "difference_to_ppo_preference"): Reported(
        5.1, XU_SOURCE, "up to +5.1 points of win rate against the reference model over traditional PPO"
    ),
    ("figa_main", "figa", "reward"): Reported(
        4.62, FIGA_SOURCE, "score of another reward model, so on another scale than ours", comparable=False
    ),
}

# The published FIGA row in full; its benchmark columns have no counterpart in a world without downloads.
FIGA_ROW: dict[str, str] = {
    "Reward": "4.62",
    "MMLU": "40.8",
    "TruthfulQA": "42.0",
    "CrowS-Pairs": "61.2",
    "WinoGender": "59.6",
    "Vicuna": "8.6",
    "WizardLM": "8.3",
    "Average": "34.9",
}


def reported_value(table: str, method: str, metric: str) -> float | None:
    """The published number for a cell, or None."""
    found = REPORTED.get((table, method, metric))
    return found.value if found else None


def verdict(reported: Reported, cell: Cell) -> Verdict:
    """Whether our 95% interval of a difference bears out the sign of the published difference.

    The papers' models and data differ from ours by orders of magnitude, so the size of an effect is not expected to
    carry over; its sign is. The interval wholly on the published side of zero: *agrees*; wholly on the other side:
    *does not agree*; around zero: *cannot tell*; another scale: *not comparable*.
    """
    if not reported.comparable or cell.low is None or cell.high is None:
        return "not comparable"
    low, high = (cell.low, cell.high) if reported.value > 0 else (-cell.high, -cell.low)
    if low > 0:
        return "agrees"
    return "does not agree" if high < 0 else "cannot tell"
