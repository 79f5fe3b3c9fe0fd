"""The tables, in the papers' order: each reads metrics files of a profile and returns cells, and says what it read.

A table is one entry in ``TABLES``. Values are means over test prompts and seeds with 95% intervals: two-way random
effects (``statistics.crossed_interval``) where there is a value per (seed, prompt), Student's t over seeds
(``statistics.seed_interval``) where there is one per seed. Rates are in percent, differences of rates in points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgalign.config import Profile
from fgalign.errors import ConfigError, InputError
from fgalign.io import write_text
from fgalign.report import inputs
from fgalign.report.cells import Cell, blocks_to_tex, cells_to_csv, layout
from fgalign.report.config import PLAIN_PPO, SFT, report_config
from fgalign.report.inputs import Grid, metrics_path
from fgalign.report.reported import REPORTED, reported_value

PERCENT = 100.0
UNIT_RANGE = (0.0, 1.0)
# Metrics of reward_models.csv that are shares (0 to 1) and are shown in percent.
SHARES = ("accuracy_preference", "accuracy_edit", "token_precision", "token_recall")


@dataclass(frozen=True)
class Table:
    """A table: its title, its cells, and the metrics files behind the row of a method (for errors and the index)."""

    title: str
    cells: Callable[[Profile], list[Cell]]
    files: Callable[[Profile, str], list[Path]]
    block_of: Callable[[Cell], str] = lambda cell: ""


def figa_data(profile: Profile) -> list[Cell]:
    """FIGA's training pairs: reward, length and edit distance of initial, revised and reference responses."""
    cells = []
    for side, grid in inputs.read_figa_data(profile).items():
        for metric in ("reward", "tokens", "edit_distance"):
            cells.append(_crossed("figa_data", side, metric, grid, metric))
    return cells


def figa_main(profile: Profile) -> list[Cell]:
    """Each method against the reference answers: win rate, its paired difference to SFT, score, reward, KL, length."""
    grids = _judged(profile, report_config(profile).methods)
    cells = []
    for method, grid in grids.items():
        cells.append(_crossed("figa_main", method, "win_rate", grid, "win", PERCENT, UNIT_RANGE))
        if method != SFT:
            cells.append(_difference("figa_main", method, SFT, grids))
        for metric, column in (
            ("score", "score"),
            ("reward", "reward_rm_preference"),
            ("kl", "kl"),
            ("tokens", "tokens"),
        ):
            cells.append(_crossed("figa_main", method, metric, grid, column))
    return cells


def xu_win_rate(profile: Profile) -> list[Cell]:
    """SFT and the PPO variants: win rate, paired difference to plain PPO, KL and length."""
    grids = _judged(profile, _win_rate_rows(profile))
    cells = []
    for method, grid in grids.items():
        cells.append(_crossed("xu_win_rate", method, "win_rate", grid, "win", PERCENT, UNIT_RANGE))
        if method != PLAIN_PPO:
            cells.append(_difference("xu_win_rate", method, PLAIN_PPO, grids))
        for metric in ("score", "kl", "tokens"):
            cells.append(_crossed("xu_win_rate", method, metric, grid, metric))
    return cells


def xu_reward_models(profile: Profile) -> list[Cell]:
    """Accuracy of each reward model on held-out pairs, and of the token models on single tokens."""
    models = inputs.read_reward_models(profile, report_config(profile).reward_models)
    cells = []
    for model, metrics in models.items():
        for metric, values in metrics.items():
            share = metric in SHARES
            bounds = UNIT_RANGE if share or metric == "token_auroc" else None
            scale = PERCENT if share else 1.0
            cells.append(_over_seeds("xu_reward_models", model, metric, values, profile.seeds, scale, bounds))
    return cells


def xu_efficiency(profile: Profile) -> list[Cell]:
    """What each PPO variant spends until it first reaches the best score of plain PPO.

    The target of a seed is the highest score that plain PPO of the same seed has at any evaluation, update 0 included;
    a method reaches it at its first evaluation with a score at or above the target. The maximum of noisy evaluations
    is a demanding target, the same for every method. A seed that never reaches it is *censored*: it counts with all
    that it spent. The mean is then a lower bound, which the cell says by having ``ci_low`` (a valid lower limit, since
    censoring only lowers values) but no ``ci_high``. ``seeds_reached`` gives the share of seeds that reach the target,
    with the exact binomial (Clopper-Pearson) interval.
    """
    curves = inputs.read_curves(profile, report_config(profile).ppo_methods)
    targets = [max(point["score"] for point in curves[PLAIN_PPO][seed]) for seed in profile.seeds]
    name, seeds = "xu_efficiency", profile.seeds
    cells = [_over_seeds(name, PLAIN_PPO, "target_score", targets, seeds)]
    for method, by_seed in curves.items():
        stops, reached = [], 0
        for seed, target in zip(seeds, targets, strict=True):
            hit = next((point for point in by_seed[seed] if point["score"] >= target), None)
            reached += hit is not None
            stops.append(hit or by_seed[seed][-1])
        cells.append(_share_of_seeds(name, method, "seeds_reached", reached, seeds))
        for metric, column in (
            ("updates", "update"),
            ("response_tokens", "response_tokens"),
            ("gradient_updates", "gradient_updates"),
        ):
            cell = _over_seeds(name, method, metric, [stop[column] for stop in stops], seeds)
            if reached < len(seeds):
                low = cell.mean if cell.low is None else max(cell.low, 0.0)
                cell = Cell(cell.method, cell.metric, cell.mean, low, None, cell.seeds, cell.reported)
            cells.append(cell)
    return cells


def labels(profile: Profile) -> list[Cell]:
    """Statistics of the minimal-edit labels by split, and their agreement with the truth; no training, so no seeds."""
    cells = []
    for split, values in inputs.read_label_statistics(profile).items():
        for metric, value in values.items():
            scale = PERCENT if metric.startswith("share_") else 1.0
            cells.append(Cell(f"split:{split}", metric, scale * value))
    for kind, values in inputs.read_label_quality(profile).items():
        for metric, value in values.items():
            scale = PERCENT if metric in ("precision", "recall", "f1") else 1.0
            # `tokens` counts flawed tokens here; elsewhere it is the length of a response.
            cells.append(Cell(f"flaws:{kind}", "flawed_tokens" if metric == "tokens" else metric, scale * value))
    return cells


def _judged_file(profile: Profile, method: str) -> list[Path]:
    return [metrics_path(profile, f"judged/{method}.csv")]


def _one_file(name: str) -> Callable[[Profile, str], list[Path]]:
    return lambda profile, method: [metrics_path(profile, name)]


def _label_file(profile: Profile, method: str) -> list[Path]:
    return [metrics_path(profile, "label_statistics.json" if method.startswith("split:") else "label_quality.json")]


TABLES: dict[str, Table] = {
    "labels": Table(
        "Minimal-edit labels",
        labels,
        _label_file,
        lambda cell: "Split" if cell.method.startswith("split:") else "Kind of flaw",
    ),
    "figa_data": Table("FIGA's data", figa_data, _one_file("figa_data.csv")),
    "figa_main": Table("FIGA's main comparison", figa_main, _judged_file),
    "xu_reward_models": Table("Reward models", xu_reward_models, _one_file("reward_models.csv")),
    "xu_win_rate": Table("Win rate of PPO three ways", xu_win_rate, _judged_file),
    "xu_efficiency": Table("Training efficiency of PPO three ways", xu_efficiency, _one_file("curves.csv")),
}


def table_spec(name: str) -> Table:
    """The table of that name; ConfigError lists the known ones."""
    if name not in TABLES:
        raise ConfigError(f"unknown table {name!r}; expected one of {', '.join(TABLES)}")
    return TABLES[name]


def table_paths(profile: Profile, name: str) -> list[Path]:
    """The files that ``build_table`` writes: CSV, then LaTeX."""
    folder = profile.results / "tables"
    return [folder / f"{name}.csv", folder / f"{name}.tex"]


def build_table(profile: Profile, name: str) -> list[Path]:
    """Build one table from the metrics of ``profile`` and write it as CSV and LaTeX; returns the paths.

    Raises:
        ConfigError: no such table.
        InputError: a metrics file, a method, a seed or a prompt is missing; nothing is written then.
    """
    spec = table_spec(name)
    cells = spec.cells(profile)
    csv_path, tex_path = table_paths(profile, name)
    write_text(csv_path, cells_to_csv(cells))
    notes = [
        f"Reported {reported.value:g} ({method}, {metric}): {reported.source}: {reported.note}."
        for (table, method, metric), reported in REPORTED.items()
        if table == name
    ]
    write_text(tex_path, blocks_to_tex(name, layout(cells, spec.block_of), notes))
    return [csv_path, tex_path]


def _win_rate_rows(profile: Profile) -> list[str]:
    return list(dict.fromkeys([SFT, *report_config(profile).ppo_methods]))


def _judged(profile: Profile, methods: list[str]) -> dict[str, Grid]:
    grids = {method: inputs.read_judged(profile, method) for method in methods}
    first = methods[0]
    for method, grid in grids.items():
        if set(grid.items) != set(grids[first].items):
            odd = sorted(set(grid.items) ^ set(grids[first].items))[0]
            raise InputError(
                f"{_judged_file(profile, method)[0]}: not the prompts of `{first}` (for example {odd!r}); "
                "judge both on the same test split (`dvc repro`)"
            )
    return grids


def _crossed(
    table: str,
    method: str,
    metric: str,
    grid: Grid,
    column: str,
    scale: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> Cell:
    from fgalign.evaluation.statistics import crossed_interval

    if column not in grid.values:
        raise InputError(
            f"{table}: column {column!r} is missing in the metrics of `{method}`; found {', '.join(grid.values)}; "
            "judge its samples again"
        )
    interval = crossed_interval(grid.values[column], bounds=bounds)
    return _cell(table, method, metric, [scale * value for value in interval], grid.seeds)


def _difference(table: str, method: str, other: str, grids: dict[str, Grid]) -> Cell:
    """Win rate of ``method`` minus that of ``other`` in points, paired by seed and prompt."""
    from fgalign.evaluation.statistics import paired_interval

    ours, theirs = grids[method], grids[other]
    # The files may list the prompts in different orders; a pair is the same seed and the same prompt.
    order = [theirs.items.index(item) for item in ours.items]
    interval = paired_interval(ours.values["win"], theirs.values["win"][:, order])
    bounds = [PERCENT * value for value in interval[:3]]
    return _cell(table, method, f"difference_to_{other}", bounds, ours.seeds)


def _over_seeds(
    table: str,
    method: str,
    metric: str,
    values: Sequence[float],
    seeds: list[int],
    scale: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> Cell:
    from fgalign.evaluation.statistics import seed_interval

    if len(values) == 1:  # one seed says nothing about the spread: no interval rather than a false one
        return _cell(table, method, metric, [scale * values[0], None, None], seeds)
    return _cell(table, method, metric, [scale * value for value in seed_interval(values, bounds=bounds)], seeds)


def _share_of_seeds(table: str, method: str, metric: str, count: int, seeds: list[int]) -> Cell:
    from scipy.stats import binomtest

    interval = binomtest(count, len(seeds)).proportion_ci(0.95, method="exact")
    bounds = [PERCENT * count / len(seeds), PERCENT * float(interval.low), PERCENT * float(interval.high)]
    return _cell(table, method, metric, bounds, seeds)


def _cell(table: str, method: str, metric: str, interval: Sequence[float | None], seeds: Sequence[int]) -> Cell:
    mean, low, high = interval
    return Cell(method, metric, mean, low, high, tuple(seeds), reported_value(table, method, metric))
