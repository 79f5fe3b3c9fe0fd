"""From measured values to the table: medians, paired ratios, targets, CSV and Markdown. Nothing is measured here."""

from __future__ import annotations

import csv
import operator
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Target:
    """What a ratio should reach: ``sign`` is ``>=`` or ``<=``."""

    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"

    def met(self, ratio: float) -> bool:
        """Whether the ratio reaches the target."""
        return COMPARE[self.sign](ratio, self.value)


@dataclass(frozen=True)
class Row:
    """One quantity of one comparison. ``ours`` and ``other`` are medians over the rounds, in ``unit``; ``ratio`` is the
    median of ours / other of the same round, which need not be the ratio of the medians; ``ratio_low`` and
    ``ratio_high`` are its smallest and largest value. ``target`` and ``met`` are empty where there is no target."""

    comparison: str
    other_side: str
    quantity: str
    unit: str
    ours: float
    other: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    target: str = ""
    met: str = ""
    note: str = ""


def row(
    comparison: str,
    other_side: str,
    quantity: str,
    unit: str,
    ours: Sequence[float],
    other: Sequence[float],
    target: Target | None = None,
    note: str = "",
) -> Row:
    """Summarise the rounds of two sides; ``ours[i]`` and ``other[i]`` are of the same round.

    Raises:
        ValueError: no round, or a round without its counterpart.
    """
    if not ours or len(ours) != len(other):
        raise ValueError(f"{comparison}: expected as many rounds of both sides, found {len(ours)} and {len(other)}")
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    ratio = statistics.median(ratios)
    return Row(
        comparison,
        other_side,
        quantity,
        unit,
        statistics.median(ours),
        statistics.median(other),
        ratio,
        min(ratios),
        max(ratios),
        len(ratios),
        str(target or ""),
        ("yes" if target.met(ratio) else "no") if target else "",
        note,
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, numbers with four significant digits."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for entry in rows:
            values = asdict(entry).items()
            writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values})


def read_rows(path: Path) -> list[Row]:
    """The rows that ``write_rows`` wrote."""
    kinds = {"float": float, "int": int, "str": str}
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Row(**{field.name: kinds[field.type](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``old`` with all rows of the comparisons in ``new`` replaced, where the first of them stood; what ``old`` does
    not have comes at its end."""
    rows = list(old)
    for comparison in dict.fromkeys(entry.comparison for entry in new):
        places = [place for place, entry in enumerate(rows) if entry.comparison == comparison]
        first = places[0] if places else len(rows)
        kept = [entry for entry in rows[first:] if entry.comparison != comparison]
        rows = [*rows[:first], *(entry for entry in new if entry.comparison == comparison), *kept]
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, for the page and the terminal."""
    lines = [
        "| comparison | quantity | ours | other side | ratio (range) | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        lines.append(
            f"| {entry.comparison} | {entry.quantity}, {entry.unit} | {number(entry.ours)} "
            f"| {number(entry.other)} ({entry.other_side}) "
            f"| {entry.ratio:.2f} ({entry.ratio_low:.2f}–{entry.ratio_high:.2f}) "
            f"| {entry.target.replace('>=', '≥').replace('<=', '≤') or '—'} | {entry.met or '—'} |"
        )
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three significant digits, without an exponent; whole numbers from 1000 up with a comma."""
    if value >= 1000:
        return f"{round(value):,}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
