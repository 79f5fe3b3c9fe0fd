"""The figures, as PDF and PNG with the same bytes from the same metrics: no dates, bundled fonts, no user settings."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgalign.config import Profile
from fgalign.errors import ConfigError
from fgalign.io import atomic_file
from fgalign.report import inputs
from fgalign.report.cells import MINUS, Cell
from fgalign.report.config import SWEEPS, measured, reinforced_methods, report_config, variants
from fgalign.report.inputs import metrics_path
from fgalign.report.style import BLACK, BLUE, VERMILLION, MethodStyle, method_style, method_styles, variant_label
from fgalign.report.tables import credit, study_table, win_rate_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.5  # inches: the text width of the paper on A4, so that font sizes on paper are those given here
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "fgalign",
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class FigureSpec:
    """A figure: what draws it, and the files that it reads. ``core`` figures belong to every profile; of the others,
    those are shown that were built. ``judged``: of answers to test prompts, so that the judge is named below."""

    title: str
    draw: Callable[[Profile], Figure]
    files: Callable[[Profile], list[Path]]
    core: bool = True
    judged: bool = False


def learning_curves(profile: Profile) -> Figure:
    """Score and KL against response tokens: mean over seeds as a line, lowest to highest seed as a band."""
    config = report_config(profile)
    curves = inputs.read_curves(profile, config.ppo_methods, reinforced_methods(profile))
    figure = _figure(2.5 + 0.2 * -(-len(curves) // 3))
    panels = figure.subplots(1, 2)
    for method, by_seed in curves.items():
        style = method_style(profile, method)
        look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "label": style.label}
        for axis, column in zip(panels, ("score", "kl"), strict=True):
            x, mean, low, high = _band(list(by_seed.values()), column)
            axis.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
            axis.plot(x, mean, markevery=max(1, len(x) // 8), **look)
    panels[0].set(ylabel=f"{_sentence(config.judge_title)}\n(mean over validation prompts)")
    panels[1].set(ylabel="KL to SFT (nats per response)")
    for axis in panels:
        axis.set(xlabel="Response tokens in training (thousands)")
        axis.set_xlim(left=0)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)), frameon=False, handlelength=3)
    return figure


def win_rates(profile: Profile) -> Figure:
    """Win rate of every method against the reference answers, with 95% intervals; a tie counts half."""
    styles = method_styles(profile)
    cells = win_rate_cells(profile)
    figure = _figure(0.75 + 0.24 * len(cells))
    axis = figure.subplots()
    _points(axis, cells, [method_style(profile, cell.method) for cell in cells])
    axis.set_yticks(range(len(cells)), [styles[cell.method].label for cell in cells])
    axis.axvline(50, color="black", linestyle="--", linewidth=0.9)
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
    axis.annotate("as good as the reference", (50, 1), **above, ha="center", va="bottom", fontsize=7)
    axis.set_xlabel("Win rate against the reference answers (%), mean and 95% interval")
    return figure


def figa_signals(profile: Profile) -> Figure:
    """Win rate of FIGA under each signal, with 95% intervals; the dashed line is the first, FIGA's own."""
    cells = [cell for cell in study_table("figa_signals")(profile) if cell.metric == "win_rate"]
    own = method_style(profile, "figa")
    others = MethodStyle("", "#333333", "o", "-")
    figure = _figure(0.75 + 0.24 * len(cells))
    axis = figure.subplots()
    _points(axis, cells, [own, *[others] * (len(cells) - 1)])
    axis.set_yticks(range(len(cells)), [variant_label(profile, "figa_signals", cell.method) for cell in cells])
    axis.axvline(cells[0].mean, color=own.colour, linestyle="--", linewidth=0.9)
    axis.set_xlabel("Win rate against the reference answers (%), mean and 95% interval")
    return figure


def label_noise(profile: Profile) -> Figure:
    """Win rate against the noise level of the editor, a line a method, with 95% intervals.

    Raises:
        ConfigError: a variant of the study has no level.
    """
    cells = {cell.method: cell for cell in study_table("label_noise")(profile) if cell.metric == "win_rate"}
    lines: dict[str, list[tuple[float, Cell]]] = {}
    for name, variant in variants(profile, "label_noise").items():
        if variant.level is None:
            raise ConfigError(
                f"{profile.file}: studies.label_noise.variants.{name}: level is missing; give the noise level, a number"
            )
        lines.setdefault(str(variant.method), []).append((variant.level, cells[name]))
    levels = sorted({level for points in lines.values() for level, _ in points})
    shift = 0.012 * (
        levels[-1] - levels[0]
    )  # side by side, so that the intervals of two methods do not hide each other
    figure = _figure(2.8)
    axis = figure.subplots()
    for place, (method, points) in enumerate(lines.items()):
        style = method_style(profile, method)
        points.sort(key=lambda point: point[0])
        x = [level + shift * (place - (len(lines) - 1) / 2) for level, _ in points]
        axis.errorbar(
            x,
            [cell.mean for _, cell in points],
            yerr=_errors([cell for _, cell in points]),
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            label=style.label,
            capsize=2.5,
        )
    axis.set(xlabel="Noise level of the editor", ylabel="Win rate against the\nreference answers (%)", xticks=levels)
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    figure.legend(loc="outside upper center", ncols=len(lines), frameon=False, handlelength=3)
    return figure


def overoptimisation(profile: Profile) -> Figure:
    """Proxy reward and gold score against the square root of the KL: mean over seeds, lowest to highest as a band."""
    runs = inputs.read_overoptimisation(profile)
    figure = _figure(2.8)
    panels = figure.subplots(1, 2)
    for reward, by_seed in runs.items():
        style = method_style(profile, reward)
        look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "label": style.label}
        rows = list(zip(*by_seed.values(), strict=True))
        # KL is a mean of samples, so it can come out a little below 0 where the policies agree.
        roots = [sum(max(point["kl"], 0.0) ** 0.5 for point in row) / len(row) for row in rows]
        for axis, column in zip(panels, ("proxy", "gold"), strict=True):
            values = [[point[column] for point in row] for row in rows]
            order = sorted(range(len(roots)), key=roots.__getitem__)
            x = [roots[place] for place in order]
            low, high = [min(values[place]) for place in order], [max(values[place]) for place in order]
            axis.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
            mean = [sum(values[place]) / len(values[place]) for place in order]
            axis.plot(x, mean, markevery=max(1, len(x) // 8), **look)
            peak = max(range(len(mean)), key=mean.__getitem__)
            if column == "gold":
                axis.plot(x[peak], mean[peak], marker="o", markersize=11, markerfacecolor="none", color=style.colour)
    panels[0].set(title="Proxy: what is trained on", ylabel="Reward (SD before training)")
    panels[1].set(title="Gold: the judge (circle: best)", ylabel=_sentence(report_config(profile).judge_title))
    for axis in panels:
        axis.set(xlabel="√KL to SFT (√nats per response)")
        axis.set_xlim(left=0)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, handlelength=3)
    return figure


def credit_figure(profile: Profile) -> Figure:
    """Share of the policy-gradient weight on flawed tokens under each reward, with 95% intervals, beside chance."""
    rows: dict[str, dict[str, Cell]] = {}
    for cell in credit(profile):
        rows.setdefault(cell.method, {})[cell.metric] = cell
    cells = [row["weight_share"] for row in rows.values()]
    figure = _figure(1.0 + 0.32 * len(cells))
    axis = figure.subplots()
    _points(axis, cells, [method_style(profile, cell.method) for cell in cells])
    for place, row in enumerate(rows.values()):
        chance = row["share_tokens"].mean
        label = "chance: share of tokens that are flawed" if place == 0 else None
        axis.plot([chance] * 2, [place - 0.35, place + 0.35], color=BLACK, linestyle="--", linewidth=1.1, label=label)
    axis.set_yticks(range(len(cells)), [method_style(profile, cell.method).label for cell in cells])
    axis.set_xlabel("Policy-gradient weight on truly flawed tokens (%), mean and 95% interval over seeds")
    figure.legend(loc="outside upper center", frameon=False)
    return figure


def _points(axis: Any, cells: list[Cell], styles: list[MethodStyle]) -> None:
    """One row a cell, the first on top: mean with its interval, and the mean in figures at the right."""
    for place, (cell, style) in enumerate(zip(cells, styles, strict=True)):
        look = {"color": style.colour, "marker": style.marker, "markersize": 6}
        axis.errorbar(cell.mean, place, xerr=_errors([cell]), capsize=3, **look)
        text = f"{cell.mean:.1f}".replace("-", MINUS)
        axis.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center")
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _errors(cells: list[Cell]) -> list[list[float]]:
    """Distances from means to interval ends, as matplotlib wants them; none for a cell without an interval."""
    ends = [
        (cell.mean if cell.low is None else cell.low, cell.mean if cell.high is None else cell.high) for cell in cells
    ]
    return [
        [cell.mean - low for cell, (low, _) in zip(cells, ends, strict=True)],
        [high - cell.mean for cell, (_, high) in zip(cells, ends, strict=True)],
    ]


def token_labels(profile: Profile) -> Figure:
    """Minimal-edit labels beside token-model rewards on the same test answers; truly flawed tokens are underlined."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    examples = inputs.read_token_examples(profile)[: report_config(profile).examples]
    limit = max(abs(reward) for example in examples for reward in example["rewards"]) or 1.0
    palette = LinearSegmentedColormap.from_list("rewards", [VERMILLION, "#FFFFFF", BLUE])
    norm = Normalize(-limit, limit)
    pages = [_lines(example) for example in examples]
    heads = [
        textwrap.wrap(" ".join(example["prompt"].split()), 118, max_lines=3, placeholder=" […]") for example in examples
    ]
    height = 0.75 + sum(LINE * (len(lines) + 0.8 * len(head) + 1.1) for lines, head in zip(pages, heads, strict=True))
    figure = _figure(height, layout=None)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(0, height))
    axis.axis("off")
    columns = (0.05, WIDTH / 2 + 0.1)
    top = height - 0.2
    for left, title in zip(columns, ("Labels from minimal edits", "Rewards of the token-level model"), strict=True):
        axis.text(left, top, title, weight="bold", va="center")
    top -= 0.2
    for example, lines, head in zip(examples, pages, heads, strict=True):
        for line in head:
            axis.text(columns[0], top, _plain(line), color="#555555", size=6.5, va="center")
            top -= 0.8 * LINE
        top -= 0.2 * LINE
        for line in lines:
            for start, stop, text, index in line:
                for left, of_labels in zip(columns, (True, False), strict=True):
                    label, reward = example["labels"][index], example["rewards"][index]
                    if of_labels:
                        colour = {-1: palette(0.15), 0: None, 1: palette(0.85)}[label]
                    else:
                        colour = palette(norm(reward))
                    negative = label < 0 if of_labels else reward < -limit / 4
                    box = (left + start * CHAR, top - 0.42 * LINE, (stop - start) * CHAR, 0.84 * LINE)
                    _token(axis, box, text, colour, negative, bool(example["gold"][index]))
            top -= LINE
        top -= 0.9 * LINE
    legend = [
        Patch(
            facecolor=palette(0.15),
            edgecolor="black",
            linewidth=0.6,
            label="labelled bad: the edit deletes or replaces it",
        ),
        Line2D([], [], color="black", linewidth=1.1, label="truly flawed (both columns)"),
    ]
    axis.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 0), frameon=False, fontsize=7, handlelength=1.2)
    bar = figure.add_axes((columns[1] / WIDTH, 0.3 / height, 0.4, 0.09 / height))
    figure.colorbar(ScalarMappable(norm, palette), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6.5, length=2)
    bar.set_title(f"token reward (outlined: below −{limit / 4:.2f})", fontsize=6.5, pad=2)
    return figure


FONT_SIZE = 6.8
CHAR = 0.6021 * FONT_SIZE / 72  # inches: the advance of DejaVu Sans Mono
LINE = 0.165
LINE_CHARS = int((WIDTH / 2 - 0.15) / CHAR)


def _token(axis: Any, box: tuple, text: str, colour: Any, outlined: bool, flawed: bool) -> None:
    from matplotlib.patches import Rectangle

    left, bottom, width, height = box
    if colour is not None:
        edge = "black" if outlined else "none"
        axis.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=edge, linewidth=0.6))
    axis.text(left, bottom + height / 2, text, family="DejaVu Sans Mono", size=FONT_SIZE, va="center_baseline")
    if flawed:
        base = bottom + 0.12 * height
        axis.plot([left + 0.1 * CHAR, left + width - 0.1 * CHAR], [base, base], color="black", linewidth=1.1)


def _lines(example: dict) -> list[list[tuple[int, int, str, int]]]:
    """Break tokens into lines of at most LINE_CHARS: per token (start column, stop column, text, index).

    A leading space moves the token's box but is not part of it, as underlining a space says nothing.
    """
    lines: list[list[tuple[int, int, str, int]]] = [[]]
    column = 0
    for index, token in enumerate(example["response_tokens"]):
        text = _readable(token)
        gap = len(text) - len(text.lstrip(" "))
        text = _plain(text.strip(" ")) or "␣"
        gap = gap if column else 0
        if column and column + gap + len(text) > LINE_CHARS:
            lines.append([])
            column = gap = 0
        lines[-1].append((column + gap, column + gap + len(text), text, index))
        column += gap + len(text)
    return lines


def _readable(token: str) -> str:
    """A token as readers see it: byte-level and SentencePiece marks of a space resolved, the end token as [end]."""
    if re.fullmatch(r"<[|/]?[^<>]*>|\[[A-Z]+\]", token):
        return " [end]" if re.search(r"end|eos|/s", token, re.IGNORECASE) else f" {token}"
    return token.replace("Ġ", " ").replace("▁", " ").replace("\n", "↵").replace("Ċ", "↵")


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _band(runs: list[list[dict[str, float]]], column: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """x (thousand response tokens), mean, lowest and highest seed of a column at the updates that all seeds share.

    Seeds spend slightly different numbers of tokens up to the same update; x is their mean there.
    """
    shared = set.intersection(*({point["update"] for point in run} for run in runs))
    points = [[point for point in run if point["update"] in shared] for run in runs]
    rows = list(zip(*points, strict=True))
    values = [[point[column] for point in row] for row in rows]
    x = [sum(point["response_tokens"] for point in row) / len(row) / 1000 for row in rows]
    return x, [sum(row) / len(row) for row in values], [min(row) for row in values], [max(row) for row in values]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figure(height: float, layout: str | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout=layout)


def _one_file(name: str) -> Callable[[Profile], list[Path]]:
    return lambda profile: [metrics_path(profile, name)]


def _study_files(study: str) -> Callable[[Profile], list[Path]]:
    return lambda profile: [metrics_path(profile, f"studies/{study}/{name}.csv") for name in variants(profile, study)]


def _judged_files(profile: Profile) -> list[Path]:
    return [metrics_path(profile, f"judged/{method}.csv") for method in report_config(profile).judged_methods]


FIGURES: dict[str, FigureSpec] = {
    "learning_curves": FigureSpec("Learning curves of the PPO variants", learning_curves, _one_file("curves.csv")),
    "token_labels": FigureSpec("Token labels and token rewards", token_labels, _one_file("token_examples.json")),
    "win_rates": FigureSpec("Win rates", win_rates, _judged_files, judged=True),
    "figa_signals": FigureSpec("FIGA's signal", figa_signals, _study_files("figa_signals"), core=False, judged=True),
    "overoptimisation": FigureSpec(
        "Over-optimisation", overoptimisation, _one_file("overoptimisation.csv"), core=False
    ),
    "label_noise": FigureSpec("Label noise", label_noise, _study_files("label_noise"), core=False, judged=True),
    "credit": FigureSpec("Where the credit goes", credit_figure, _one_file("credit.csv"), core=False),
}


def figure_paths(profile: Profile, name: str) -> list[Path]:
    """The files that ``build_figure`` writes: PDF, then PNG."""
    folder = (profile.sweeps if name in SWEEPS else profile.results) / "figures"
    return [folder / f"{name}.pdf", folder / f"{name}.png"]


def build_figure(profile: Profile, name: str) -> list[Path]:
    """Draw one figure from the metrics of ``profile`` and write it as PDF and PNG; returns the paths.

    Raises:
        ConfigError: no such figure.
        InputError: a metrics file, a method or a seed is missing; nothing is written then.
    """
    if name not in FIGURES:
        raise ConfigError(f"unknown figure {name!r}; expected one of {', '.join(FIGURES)}")
    with _settings():
        figure = FIGURES[name].draw(profile)
        if FIGURES[name].judged:
            figure.supxlabel(measured(profile), fontsize=6, color="#555555")
        pictures = {}
        for path in figure_paths(profile, name):
            kind = path.suffix[1:]
            undated = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}[
                kind
            ]
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, metadata=undated)
            pictures[path] = picture.getvalue()
    for path, data in pictures.items():
        with atomic_file(path, "wb") as file:
            file.write(data)
    return list(pictures)


@contextmanager
def _settings():
    """Our settings on matplotlib's defaults: a reader's own matplotlibrc must not change our pictures."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield
