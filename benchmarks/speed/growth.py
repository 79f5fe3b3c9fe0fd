"""How the time of a PPO update grows with response length, batch and model size: measuring, and drawing."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from speed.comparisons import PPO_SIDES, TRL_PPO, Session
from speed.workload import PPOWorkload

SIDES = (TRL_PPO, "separate", "head")
LABELS = {
    TRL_PPO: ("TRL PPOTrainer", "#000000", "s", ":"),
    "separate": ("fgalign, separate value model", "#0072B2", "o", "-"),
    "head": ("fgalign, shared trunk", "#D55E00", "^", "--"),
}


@dataclass(frozen=True)
class Point:
    """Median of a side at one size: ``axis`` says what grows, ``value`` is its size. Times in seconds an update, memory
    in MiB. The parts of the time are empty for TRL."""

    axis: str
    value: int
    side: str
    seconds: float
    tokens_per_second: float
    peak_memory: float
    rollout: float | None
    scoring: float | None
    update: float | None


def sizes(base: PPOWorkload, quick: bool) -> dict[str, list[tuple[int, PPOWorkload]]]:
    """What grows, and from which size to which; everything else as in ``base``, but smaller batches where responses or
    models are large."""
    small = replace(base, batch=8, minibatch=4)
    lengths = (2, 4) if quick else (64, 128, 256, 512, 1024)
    batches = (4, 8) if quick else (16, 32, 64, 128)
    widths = (16, 32) if quick else (64, 128, 256, 512)
    return {
        "response length": [(length, replace(small, response_length=length)) for length in lengths],
        "batch": [(batch, replace(base, batch=batch, minibatch=min(base.minibatch, batch))) for batch in batches],
        "model width": [
            (
                width,
                replace(small, hidden_size=width, heads=max(2, width // 32), intermediate_size=8 * width // 3),
            )
            for width in widths
        ],
    }


def measure(session: Session, rounds: int = 2) -> Iterator[Point]:
    """All points, one after the other. A side stays in one process, and the sides take turns at each size."""
    places = [(axis, *place) for axis, every in sizes(session.ppo, session.quick).items() for place in every]
    folders = [session.work(f"{axis}-{value}", workload) for axis, value, workload in places]
    with session.started(folders, {name: PPO_SIDES[name] for name in SIDES}) as runners:
        for number, (axis, value, _) in enumerate(places):
            if number:
                for runner in runners.values():
                    runner.next()
            for side, answers in session.turns(runners, rounds).items():
                found = point(axis, value, side, answers)
                print(f"  {axis} {value}, {side}: {found.seconds:.2f} s/update", flush=True)
                yield found


def point(axis: str, value: int, side: str, answers: Sequence[Mapping[str, float]]) -> Point:
    """The medians of a side's rounds."""

    def median(name: str) -> float | None:
        return statistics.median(answer[name] for answer in answers) if name in answers[0] else None

    rate = statistics.median(answer["tokens"] / answer["seconds"] for answer in answers)
    memory = max(answer["peak_memory"] for answer in answers) / 2**20
    return Point(axis, value, side, median("seconds"), rate, memory, *map(median, ("rollout", "scoring", "update")))


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write the points as CSV, numbers with four significant digits."""
    names = [entry.name for entry in fields(Point)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for found in points:
            cells = (getattr(found, name) for name in names)
            writer.writerow(["" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in cells])


def read_points(path: Path) -> list[Point]:
    """The points that ``write_points`` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    text = ("axis", "value", "side")
    return [
        Point(
            line["axis"],
            int(line["value"]),
            line["side"],
            **{name: float(cell) if cell else None for name, cell in line.items() if name not in text},
        )
        for line in lines
    ]


def draw(points: Sequence[Point], folder: Path) -> None:
    """Write ``growth.png`` and ``growth.pdf``: seconds of an update against size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    axes = list(dict.fromkeys(found.axis for found in points))
    titles = {"response length": "Response length (tokens)", "batch": "Batch (responses)", "model width": "Model width"}
    settings: dict[str, Any] = {"font.size": 8, "axes.grid": True, "grid.color": "#DDDDDD", "savefig.dpi": 200}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
    with pyplot.rc_context(settings):
        figure, panels = pyplot.subplots(1, len(axes), figsize=(6.5, 2.6), layout="constrained", squeeze=False)
        for axis, panel in zip(axes, panels[0], strict=True):
            for side, (label, colour, marker, line) in LABELS.items():
                chosen = [found for found in points if found.axis == axis and found.side == side]
                if chosen:
                    x, y = [found.value for found in chosen], [found.seconds for found in chosen]
                    panel.plot(x, y, color=colour, marker=marker, linestyle=line, label=label, markersize=4)
                    panel.set_xscale("log", base=2)
                    panel.set_yscale("log")
                    panel.set_xticks(x, [str(value) for value in x])
                    panel.minorticks_off()
            panel.set_xlabel(titles[axis])
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        panels[0][0].set_ylabel("Seconds an update")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=3)
        figure.savefig(folder / "growth.png", metadata={"Software": None})
        figure.savefig(folder / "growth.pdf", metadata={"CreationDate": None})
        pyplot.close(figure)
