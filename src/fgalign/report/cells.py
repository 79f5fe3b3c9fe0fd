"""Table cells: the long CSV form that is tracked, the grid that readers see, and the LaTeX form of that grid.

The CSV has the columns ``method,metric,mean,ci_low,ci_high,seeds,reported``, one row a cell, numbers with four
decimals; an empty field means "none". ``ci_high`` empty beside a given ``ci_low`` means that the value is a lower
bound (see ``tables.xu_efficiency``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fgalign.errors import InputError
from fgalign.report.style import YES_NO, metric_style

MINUS = "−"
COLUMNS = ("method", "metric", "mean", "ci_low", "ci_high", "seeds", "reported")


@dataclass(frozen=True)
class Cell:
    """One number of a table: mean, 95% interval (None: none), the training seeds behind it, the published number."""

    method: str
    metric: str
    mean: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[int, ...] = ()
    reported: float | None = None

    @property
    def lower_bound(self) -> bool:
        """True where the mean is a lower bound, because some seed never reached the target."""
        return self.low is not None and self.high is None


@dataclass(frozen=True)
class Block:
    """A group of rows with the same columns: ``rows`` are (method, text of each column)."""

    title: str
    metrics: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[DisplayCell, ...]], ...]


@dataclass(frozen=True)
class DisplayCell:
    """What a reader sees of a cell: the value, its interval and the published value; empty where there is none."""

    value: str
    interval: str = ""
    reported: str = ""


def cells_to_csv(cells: Iterable[Cell]) -> str:
    """The tracked CSV form; the order of ``cells`` is kept."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in cells:
        numbers = [_fixed(value, 4) for value in (cell.mean, cell.low, cell.high)]
        seeds = " ".join(str(seed) for seed in cell.seeds)
        writer.writerow([cell.method, cell.metric, *numbers, seeds, _fixed(cell.reported, 4)])
    return out.getvalue()


def cells_from_csv(text: str, where: str | Path) -> list[Cell]:
    """Parse the CSV form; InputError names ``where`` and the line."""
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(f"{where}:1: expected the columns {','.join(COLUMNS)}, found {reader.fieldnames}")
    cells = []
    for row in reader:
        try:
            numbers = [float(row[key]) if row[key] else None for key in ("mean", "ci_low", "ci_high", "reported")]
            seeds = tuple(int(seed) for seed in row["seeds"].split())
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"{where}:{reader.line_num}: not a table row: {list(row.values())}") from None
        if numbers[0] is None:
            raise InputError(f"{where}:{reader.line_num}: mean is empty for {row['method']}, {row['metric']}")
        mean, low, high, reported = numbers
        cells.append(Cell(row["method"], row["metric"], mean, low, high, seeds, reported))
    return cells


def read_table(path: Path) -> list[Cell]:
    """Cells of a built table; InputError where it was not built."""
    if not path.exists():
        raise InputError(f"{path}: no such table; run `fgalign table {path.stem}` or `dvc repro`")
    return cells_from_csv(path.read_text(encoding="utf-8"), path)


def layout(cells: Iterable[Cell], block_of: Callable[[Cell], str] = lambda cell: "") -> list[Block]:
    """Turn long cells into blocks of rows (methods) and columns (metrics).

    Rows and columns have the order of the cells; a column that the first rows lack stands before the one that follows
    it in the first row that has it, or last.
    """
    cells = list(cells)
    order = dict.fromkeys(cell.method for cell in cells)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(block_of(cell), []).append(cell)
    blocks = []
    for title, members in groups.items():
        rows: dict[str, dict[str, Cell]] = {}
        for cell in members:
            rows.setdefault(cell.method, {})[cell.metric] = cell
        rows = {method: rows[method] for method in order if method in rows}
        metrics: list[str] = []
        for row in rows.values():
            place = len(metrics)
            for metric in reversed(row):
                if metric in metrics:
                    place = metrics.index(metric)
                else:
                    metrics.insert(place, metric)
        shown = tuple(
            (method, tuple(display(row[metric]) if metric in row else DisplayCell("–") for metric in metrics))
            for method, row in rows.items()
        )
        blocks.append(Block(title, tuple(metrics), tuple(metric_style(metric).title for metric in metrics), shown))
    return blocks


def display(cell: Cell) -> DisplayCell:
    """Rounded value, interval and published value of a cell; a lower bound is shown as ``≥`` without an interval.

    A number without a spread, or with one that rounds to nothing, is shown without an interval.
    """
    style = metric_style(cell.metric)
    if style.unit == YES_NO:
        return DisplayCell("yes" if cell.mean else "")
    scale = 1e-3 if style.unit == "thousands" else 1.0
    signed = cell.metric.startswith("difference_")

    def show(value: float) -> str:
        # On which side of zero a difference ends is to be seen.
        more = signed and value != 0 and float(_fixed(value * scale, style.decimals)) == 0
        text = _fixed(value * scale, style.decimals + more).replace("-", MINUS)
        return f"+{text}" if signed and value > 0 else text

    reported = "" if cell.reported is None else show(cell.reported)
    if cell.lower_bound:
        return DisplayCell(f"≥ {show(cell.mean)}", "", reported)
    if cell.low is None or cell.high is None or show(cell.low) == show(cell.high):
        return DisplayCell(show(cell.mean), "", reported)
    return DisplayCell(show(cell.mean), f"[{show(cell.low)}, {show(cell.high)}]", reported)


def blocks_to_tex(name: str, blocks: list[Block], label: Callable[[str], str], notes: Iterable[str] = ()) -> str:
    """A LaTeX tabular for ``\\input``; needs the package booktabs. ``label`` gives a row's label for readers,
    ``notes`` become comment lines above the table."""
    lines = [f"% Generated by `fgalign table {name}`; do not edit. Needs \\usepackage{{booktabs}}."]
    lines += [f"% {note}" for note in notes]
    width = max(len(block.header) for block in blocks)
    lines.append(f"\\begin{{tabular}}{{l{'r' * width}}}")
    lines.append("\\toprule")
    for index, block in enumerate(blocks):
        if index:
            lines.append("\\midrule")
        padding = [""] * (width - len(block.header))
        lines.append(" & ".join([_tex(block.title), *map(_tex, block.header), *padding]) + " \\\\")
        lines.append("\\midrule")
        for method, row in block.rows:
            lines.append(" & ".join([_tex(label(method)), *map(_tex_cell, row), *padding]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def _tex_cell(cell: DisplayCell) -> str:
    text = _tex(cell.value)
    if cell.interval:
        text += f" {{\\scriptsize {_tex(cell.interval)}}}"
    if cell.reported:
        text += f" {{\\scriptsize (reported {_tex(cell.reported)})}}"
    return text


def _tex(text: str) -> str:
    escapes = {"\\": "\\textbackslash{}", "−": "$-$", "≥": "$\\geq$", "–": "--", "~": "\\textasciitilde{}"}
    escapes |= {"^": "\\textasciicircum{}", **{char: f"\\{char}" for char in "&%$#_{}"}}
    return "".join(escapes.get(char, char) for char in text)


def _fixed(value: float | None, decimals: int) -> str:
    if value is None:
        return ""
    text = f"{value:.{decimals}f}"
    # A rounded -0.0 differs from 0.0 in bytes but not in meaning.
    return text.removeprefix("-") if float(text) == 0 else text
