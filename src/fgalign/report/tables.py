"""The tables, in the papers' order: each reads metrics files of a profile and returns cells, and says what it read.

A table is one entry in ``TABLES``. Values are means over test prompts and seeds with 95% intervals: two-way random
effects (``statistics.crossed_interval``) where there is a value per (seed, prompt), Student's t over seeds
(``statistics.seed_interval``) where there is one per seed. Rates are in percent, differences of rates in points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fgalign.config import Profile
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.config import policies_with_weights
from fgalign.io import write_text
from fgalign.report import inputs
from fgalign.report.cells import Block, Cell, blocks_to_tex, cells_to_csv, layout
from fgalign.report.config import (
    ACROSS_METHODS,
    CORE_METHODS,
    PLAIN_PPO,
    REWARD_MODELS,
    SFT,
    SWEEPS,
    measured,
    other_judges,
    reinforced_methods,
    report_config,
    variants,
)
from fgalign.report.inputs import Grid, metrics_path
from fgalign.report.reported import REPORTED, reported_value
from fgalign.report.style import BENCHMARK, BENCHMARK_RATES, TOKEN_AUROC, labeller, method_style
from fgalign.study import searched_keys

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from fgalign.evaluation.statistics import Parts

PERCENT = 100.0
UNIT_RANGE = (0.0, 1.0)
# Metrics of reward_models.csv that are shares (0 to 1) and are shown in percent.
PAIR_SHARES = ("accuracy_preference", "accuracy_edit")
SHARES = (*PAIR_SHARES, "token_precision", "token_recall")
# Those of label_quality.json.
LABEL_SHARES = ("precision", "recall", "f1", "share_of_labels", "share_bad_labelled", "share_bad_truth")


QUALITY, BUDGETS = "Quality", "Further"
BY_KIND = "AUROC by kind of flaw"
OTHER_JUDGES = "Other judges"
OF_TOKENS, OF_EDITS = "A token", "An edit"
MARGINS = ("difference_margin", "difference_margin_shorter", "difference_margin_longer", "towards_revised")
BEST, LAST = "At the best gold score", "At the last update"
JUDGE = "judge:"
"""Start of the row of another judge in ``judges``."""


@dataclass(frozen=True)
class Table:
    """A table: its title, its cells, and where a row's numbers come from (for errors and the index).

    ``files`` are the metrics files behind a row. ``parts`` are the names by which the stages that made a row are known
    (a method, a reward model, a study). ``block`` gives the block of a cell: blocks are shown one below the other.
    ``notes`` are further lines for the caption. ``core`` tables belong to every profile; of the others, those are shown
    that were built.
    """

    title: str
    cells: Callable[[Profile], list[Cell]]
    files: Callable[[Profile, str], list[Path]]
    parts: Callable[[str], list[str]] = lambda row: [row]
    block: Callable[[Profile, Cell], str] = lambda profile, cell: ""
    core: bool = True
    notes: Callable[[Profile], list[str]] = lambda profile: []


def figa_data(profile: Profile) -> list[Cell]:
    """Pairs of the kind that FIGA trains on: reward, its paired difference to the initial response, length and edit
    distance of initial, revised and reference responses."""
    from fgalign.evaluation.statistics import paired_interval

    cells = []
    grids = inputs.read_figa_data(profile)
    initial = grids["initial"]
    for side, grid in grids.items():
        if side != "initial" and len(grid.seeds) * len(grid.items) > 1:
            place = {item: index for index, item in enumerate(initial.items)}
            other = initial.values["reward"][:, [place[item] for item in grid.items]]
            interval = paired_interval(grid.values["reward"], other)
            cells.append(_cell("figa_data", side, "difference_to_initial", interval[:3], grid.seeds))
        for metric in ("reward", "tokens", "edit_distance"):
            cells.append(_crossed("figa_data", side, metric, grid, metric))
    return cells


def text_quality(profile: Profile) -> list[Cell]:
    """The texts that methods learn from or are compared with, under the judge: how many, their mean score, the share
    with the score 0, which has no flaw, and how often the judge likes the better side of a pair better; intervals over
    texts."""
    from fgalign.evaluation.statistics import crossed_interval

    name, cells = "text_quality", []
    for row, values in inputs.read_text_quality(profile).items():
        scores = values["score"]
        cells.append(Cell(row, "texts", float(len(scores))))
        flawless = [float(score == 0) for score in scores]
        for metric, found, scale, bounds in (
            ("score", scores, 1.0, None),
            ("flawless", flawless, PERCENT, UNIT_RANGE),
            ("better", values["better"], PERCENT, UNIT_RANGE),
        ):
            if len(found) > 1:
                interval = crossed_interval([found], bounds=bounds)
                cells.append(_cell(name, row, metric, [scale * value for value in interval], []))
            elif found:  # one text says nothing about others
                cells.append(_cell(name, row, metric, [scale * found[0], None, None], []))
    return cells


def figa_main(profile: Profile) -> list[Cell]:
    """Each method against the reference answers: win rate, its paired difference to SFT, score, reward, KL, length; the
    share of answers that the budget of tokens cut off.

    With ``budgets/`` the tokens that each method of the profile trained on and sampled and its optimiser steps follow
    (per seed), with ``benchmarks/`` the rates of the harness's tasks (in percent).
    """
    methods = report_config(profile).methods
    grids = _judged(profile, methods)
    cells = _against_sft("figa_main", grids)
    cells += [
        _share("figa_main", method, "truncated", grid.values["truncated"], grid.seeds) for method, grid in grids.items()
    ]
    if metrics_path(profile, "budgets").is_dir():
        trained = [method for method in methods if method in profile.params.get("methods", {})]
        budgets = inputs.read_budgets(profile, trained)
        for method in methods:
            for metric, values in budgets.get(method, {}).items():
                cells.append(_over_seeds("figa_main", method, metric, values, profile.seeds))
    if metrics_path(profile, "benchmarks").is_dir():
        cells += _benchmarks("figa_main", profile, methods, rates_only=True)
    return cells


def benchmarks(profile: Profile) -> list[Cell]:
    """Every measure of every method on each task of the evaluation harness; intervals over training seeds alone, as the
    items of a task are the same for all methods."""
    return _benchmarks("benchmarks", profile, report_config(profile).judged_methods, rates_only=False)


def figa_core(profile: Profile) -> list[Cell]:
    """The initial model, SFT, FIGA and PPO under the judge: what ``figa_main`` says of them without the other rows."""
    return _against_sft("figa_core", _judged(profile, CORE_METHODS))


def _against_sft(table: str, grids: dict[str, Grid]) -> list[Cell]:
    cells = []
    for method, grid in grids.items():
        cells.append(_win_rate(table, method, grid))
        if method != SFT:
            cells.append(_difference(table, method, SFT, grids))
        for metric, column in (
            ("score", "score"),
            ("reward", "reward_rm_preference"),
            ("kl", "kl"),
            ("tokens", "tokens"),
        ):
            cells.append(_crossed(table, method, metric, grid, column))
    return cells


def xu_win_rate(profile: Profile) -> list[Cell]:
    """SFT and PPO three ways: win rate, paired difference to plain PPO, KL and length."""
    return _against_ppo("xu_win_rate", profile, [SFT, *report_config(profile).ppo_methods])


def xu_extensions(profile: Profile) -> list[Cell]:
    """The columns of ``xu_win_rate`` for plain PPO and all others of the profile that learn by reinforcement."""
    return _against_ppo("xu_extensions", profile, [PLAIN_PPO, *reinforced_methods(profile)])


def _against_ppo(table: str, profile: Profile, methods: list[str]) -> list[Cell]:
    grids = _judged(profile, list(dict.fromkeys(methods)))
    cells = []
    for method, grid in grids.items():
        cells.append(_win_rate(table, method, grid))
        if method != PLAIN_PPO:
            cells.append(_difference(table, method, PLAIN_PPO, grids))
        for metric in ("score", "kl", "tokens"):
            cells.append(_crossed(table, method, metric, grid, metric))
    return cells


def win_rate_cells(profile: Profile) -> list[Cell]:
    """Win rate of every judged method in percent, as ``figa_main`` and ``xu_win_rate`` have it (for the figure)."""
    grids = _judged(profile, report_config(profile).judged_methods)
    return [_win_rate("figa_main", method, grid) for method, grid in grids.items()]


def judges(profile: Profile) -> list[Cell]:
    """Every method under the profile's judge and under each other one: win rate, its paired difference to SFT, and the
    share of comparisons with the reference that both judges decide alike (win, tie or loss).

    A row ``judge:<name>`` says of another judge how often it likes the side of a held-out preference that people chose,
    beside the profile's judge on the same pairs, and that share over all methods.
    """
    name, methods = "judges", report_config(profile).judged_methods
    names = list(other_judges(profile))
    if not names:
        raise ConfigError(f"{profile.file}: other_judges: expected at least one judge, found none; add it")
    main = _judged(profile, methods)
    items = main[SFT].items
    cells = _wins_against_sft(name, main)
    summaries: list[Cell] = []
    for judge in names:
        grids = {method: inputs.read_rejudged(profile, judge, method) for method in methods}
        file = metrics_path(profile, f"judges/{judge}.csv")
        inputs.same_items({"main judge": main[SFT], **grids}, lambda method, file=file: file)
        alike = {method: agreement(main[method], grids[method], items) for method in methods}
        cells += _wins_against_sft(name, grids, f":{judge}")
        cells += [_share(name, method, f"agreement:{judge}", alike[method], profile.seeds) for method in methods]
        row = f"{JUDGE}{judge}"
        summaries += _accuracies(name, row, inputs.read_preferred(profile, judge))
        summaries.append(_share(name, row, "agreement", sum(alike.values()) / len(methods), profile.seeds))
    return cells + summaries


def agreement(ours: Grid, theirs: Grid, items: list[str]) -> np.ndarray:
    """1 where two judges decide a comparison alike (both a win, a tie or a loss of the response), else 0: shape [seeds,
    items], in the order of ``items``. A judge that is asked twice wins with more than half."""
    import numpy as np

    def outcomes(grid: Grid) -> np.ndarray:
        place = {item: index for index, item in enumerate(grid.items)}
        return np.sign(grid.values["win"][:, [place[item] for item in items]] - 0.5)

    return (outcomes(ours) == outcomes(theirs)).astype(float)


def _wins_against_sft(table: str, grids: dict[str, Grid], suffix: str = "") -> list[Cell]:
    cells = []
    for method, grid in grids.items():
        cells.append(_crossed(table, method, f"win_rate{suffix}", grid, "win", PERCENT, UNIT_RANGE))
        if method != SFT:
            cells.append(_difference(table, method, SFT, grids, f"difference_to_{SFT}{suffix}"))
    return cells


def _accuracies(table: str, row: str, preferred: dict[str, list[float]]) -> list[Cell]:
    """Accuracy on held-out preferences, one a prompt, of another judge, of the profile's, and the paired difference;
    intervals over the prompts."""
    from fgalign.evaluation.statistics import paired_interval

    titles = {"correct": "accuracy_preference", "main_correct": "accuracy_main"}
    cells = [_share(table, row, titles[column], [values], []) for column, values in preferred.items()]
    if len(preferred) == len(titles):
        ours, theirs = ([[PERCENT * value for value in preferred[column]]] for column in titles)
        interval = paired_interval(ours, theirs, bounds=(0.0, PERCENT))
        cells.append(_cell(table, row, "difference_accuracy", interval[:3], []))
    return cells


def judge_notes(profile: Profile) -> list[str]:
    """Which judges the table ``judges`` shows, and what each was trained on."""
    notes = [f"Main judge: {report_config(profile).judge_title}."]
    for judge in other_judges(profile).values():
        trained = f", trained on {judge.trained_on}" if judge.trained_on else ""
        notes.append(f"Other judge: {judge.title}{trained}.")
    return notes


def _judge_block(profile: Profile, cell: Cell) -> str:
    """The judge that a cell of ``judges`` is under; those about the judges themselves are apart."""
    if cell.method.startswith(JUDGE):
        return OTHER_JUDGES
    name = cell.metric.partition(":")[2]
    return other_judges(profile)[name].title if name else report_config(profile).judge_title


def _judge_files(profile: Profile, row: str) -> list[Path]:
    if row.startswith(JUDGE):
        name = row.removeprefix(JUDGE)
        return [metrics_path(profile, f"judges/{file}.csv") for file in (name, f"{name}_preferences")]
    others = [metrics_path(profile, f"judges/{name}.csv") for name in other_judges(profile)]
    return [*_judged_file(profile, row), *others]


def study_table(study: str) -> Callable[[Profile], list[Cell]]:
    """The table of a study: win rate, its paired difference to the study's first variant, score, KL, length.

    Where a study varies several methods, the difference is to the first variant of the same method, unless it is one of
    ``ACROSS_METHODS``.
    """

    def cells(profile: Profile) -> list[Cell]:
        grids = read_study(profile, study)
        first: dict[str | None, str] = {}
        found = []
        for name, variant in variants(profile, study).items():
            other = first.setdefault(None if study in ACROSS_METHODS else variant.method, name)
            found.append(_win_rate(study, name, grids[name]))
            if other != name:
                found.append(_difference(study, name, other, grids, "difference_to_first"))
            for metric in ("score", "kl", "tokens"):
                found.append(_crossed(study, name, metric, grids[name], metric))
        return found

    return cells


def read_study(profile: Profile, study: str) -> dict[str, Grid]:
    """Judged samples of every variant of a study, all on the same prompts.

    Raises:
        ConfigError: the profile has no such study.
        InputError: a variant was not judged, or on other prompts than the first.
    """
    names = list(variants(profile, study))
    if not names:
        raise ConfigError(f"{profile.file}: studies: no section {study!r}; add it, or ask for another table")
    grids = {name: inputs.read_variant(profile, study, name) for name in names}
    inputs.same_items(grids, lambda name: metrics_path(profile, f"studies/{study}/{name}.csv"))
    return grids


def edit_likelihood(profile: Profile) -> list[Cell]:
    """How training changed the log-probabilities of held-out edits, from those of the SFT policy of the same seed: of a
    token put in, taken out and kept, and the first less the second; of the margin, log p(revised) less log p(initial),
    and the share of edits whose margin grew (DPO's implicit reward likes the revised response better; no change counts
    half); of the margin also where the revised response is shorter than the initial one, and where it is longer.
    Intervals over seeds and prompts (``statistics.Parts``)."""
    import numpy as np

    from fgalign.evaluation.statistics import Parts, ratio_parts

    name = "edit_likelihood"
    models = policies_with_weights(profile)
    grids, prompts = inputs.read_edit_likelihood(profile, models)

    def ratios(part: np.ndarray, whole: np.ndarray) -> list[Parts | None]:
        """The ratio of sums over edits, one a seed; (seeds, edits) each."""
        return [ratio_parts(*row, prompts, len(set(prompts))) for row in zip(part, whole, strict=True)]

    cells = []
    for model in models:
        if model == SFT:
            continue
        values = grids[model].values
        change = {column: now - grids[SFT].values[column] for column, now in values.items()}
        found = {f"difference_{kind}": ratios(change[kind], values[f"{kind}_tokens"]) for kind in inputs.EDITED}
        found["difference_good_bad"] = [
            good and bad and Parts(good.value - bad.value, good.values - bad.values, min(good.responses, bad.responses))
            for good, bad in zip(found["difference_good"], found["difference_bad"], strict=True)
        ]
        margin, longer = change["revised"] - change["initial"], values["good_tokens"] - values["bad_tokens"]
        every = np.ones_like(margin)
        for ending, counted in (("", every), ("_shorter", longer < 0), ("_longer", longer > 0)):
            found[f"difference_margin{ending}"] = ratios(margin * counted, counted)
        for metric, parts in found.items():
            cells += _of_parts(name, model, metric, parts, profile.seeds)
        grown = ratios((1 + np.sign(margin)) / 2, every)
        cells += _of_parts(name, model, "towards_revised", grown, profile.seeds, PERCENT, UNIT_RANGE)
    return cells


def _of_parts(
    table: str,
    row: str,
    metric: str,
    by_seed: Sequence[Parts | None],
    seeds: Sequence[int],
    scale: float = 1.0,
    bounds: tuple[float, float] | None = None,
) -> list[Cell]:
    """A cell with the mean over seeds of a statistic in parts, where every seed has it; without an interval where it
    rests on one response."""
    from fgalign.evaluation.statistics import parts_interval

    if None in by_seed:
        return []
    interval = parts_interval(by_seed, bounds=bounds)
    found = interval or (fmean(parts.value for parts in by_seed), None, None)
    return [_cell(table, row, metric, [value if value is None else scale * value for value in found], seeds)]


def xu_token_models(profile: Profile) -> list[Cell]:
    """The token-level reward model and its alternatives (losses, labels): the columns of ``xu_reward_models``."""
    required = list(dict.fromkeys(["rm_token", *profile.params.get("token_models", {})]))
    models = inputs.read_reward_models(profile, required, "token_models.csv")
    cells = []
    for model, metrics in models.items():
        kind = (profile.params.get("token_models") or {}).get(model, {}).get("loss")
        for metric, values in metrics.items():
            # A Bradley-Terry model has no zero, below which a token would count as bad.
            if kind == "bradley_terry" and metric in ("token_precision", "token_recall"):
                continue
            share = metric in SHARES
            bounds = UNIT_RANGE if share or metric.partition(":")[0] == TOKEN_AUROC else None
            scale = PERCENT if share else 1.0
            cells.append(_over_seeds("xu_token_models", model, metric, values, profile.seeds, scale, bounds))
    return cells


def search(profile: Profile) -> list[Cell]:
    """Every candidate of the hyperparameter search: win rate on the validation split, of a reward model what it was
    measured by there, and whether it was chosen.

    One training seed, so the interval is over prompts alone; reward models have none. A row is
    ``<method or model>/<number>: <parameters>``.
    """
    of_rewards = profile.params.get("search", {}).get("reward_models")
    of_methods = not of_rewards or any(map(searched_keys, profile.params.get("methods", {}).values()))
    cells = []
    for model in inputs.read_reward_search(profile) if of_rewards else []:
        row = f"{model.model}/{model.number}: {model.parameters}"
        cells.append(Cell(row, model.metric, (PERCENT if model.metric in SHARES else 1.0) * model.value))
        cells.append(Cell(row, "chosen", float(model.chosen)))
    for candidate in inputs.read_search(profile) if of_methods else []:
        row = f"{candidate.method}/{candidate.number}: {candidate.parameters}"
        interval = [PERCENT * value for value in (candidate.win, candidate.low, candidate.high)]
        cells.append(_cell("search", row, "search_win_rate", interval, []))
        cells.append(Cell(row, "chosen", float(candidate.chosen)))
    return cells


def overoptimisation(profile: Profile) -> list[Cell]:
    """Proxy reward, gold score and KL of each reward at the best and at the last update.

    The best update is the one with the highest gold score on average over the seeds, the same for all of them; choosing
    it for each seed would pick that seed's noise. Proxy in standard deviations of the reward before training.
    """
    cells = []
    for reward, by_seed in inputs.read_overoptimisation(profile).items():
        runs = list(by_seed.values())
        length = len(runs[0])
        best = max(range(length), key=lambda place: sum(run[place]["gold"] for run in runs))
        for name, place in (("best", best), ("last", length - 1)):
            cells.append(Cell(reward, f"{name}_update", runs[0][place]["update"], seeds=tuple(profile.seeds)))
            for column in ("kl", "proxy", "gold"):
                values = [run[place][column] for run in runs]
                cells.append(_over_seeds("overoptimisation", reward, f"{name}_{column}", values, profile.seeds))
        change = [run[length - 1]["gold"] - run[best]["gold"] for run in runs]
        cells.append(_over_seeds("overoptimisation", reward, "difference_last_best", change, profile.seeds))
    return cells


def credit(profile: Profile) -> list[Cell]:
    """Share of the policy-gradient weight on truly flawed tokens, beside the share of tokens that are flawed."""
    cells = []
    for reward, shares in inputs.read_credit(profile).items():
        for metric, values in shares.items():
            cells.append(_over_seeds("credit", reward, metric, values, profile.seeds, PERCENT, UNIT_RANGE))
        gain = [weight - chance for weight, chance in zip(*shares.values(), strict=True)]
        cells.append(_over_seeds("credit", reward, "difference_to_chance", gain, profile.seeds, PERCENT))
    return cells


def xu_reward_models(profile: Profile) -> list[Cell]:
    """Accuracy of each reward model on held-out pairs, and of the token models on single tokens; intervals over seeds
    and pairs (prompts, where they have several pairs), or seeds and responses (``statistics.Parts``)."""
    name = "xu_reward_models"
    models = inputs.read_reward_models(profile, report_config(profile).reward_models)
    intervals = inputs.read_token_intervals(profile)
    cells = []
    for model, metrics in models.items():
        for metric, values in metrics.items():
            if metric in PAIR_SHARES:
                cells.append(_accuracy(name, model, metric, inputs.read_reward_pairs(profile, model, metric)))
                continue
            scale = PERCENT if metric in SHARES else 1.0
            bounds = [scale * value for value in intervals.get((model, metric), ())] or [None, None]
            cells.append(_cell(name, model, metric, [scale * fmean(values), *bounds], profile.seeds))
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
    curves = inputs.read_curves(profile, report_config(profile).ppo_methods, reinforced_methods(profile))
    targets = [best_score(curves[PLAIN_PPO][seed]) for seed in profile.seeds]
    name, seeds = "xu_efficiency", profile.seeds
    cells = [_over_seeds(name, PLAIN_PPO, "target_score", targets, seeds)]
    for method, by_seed in curves.items():
        stops, reached = [], 0
        for seed, target in zip(seeds, targets, strict=True):
            hit = first_reaching(by_seed[seed], target)
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


def best_score(points: list[dict[str, float]]) -> float:
    """The highest score of a run's evaluations, update 0 included."""
    return max(point["score"] for point in points)


def first_reaching(points: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first evaluation of a run with a score at or above ``target``; None when there is none."""
    return next((point for point in points if point["score"] >= target), None)


def labels(profile: Profile) -> list[Cell]:
    """Statistics of the minimal-edit labels by split, and their agreement with the truth, with intervals over
    responses; no training, so no seeds."""
    cells = []
    for split, values in inputs.read_label_statistics(profile).items():
        for metric, value in values.items():
            scale = PERCENT if metric.startswith("share_") else 1.0
            cells.append(Cell(f"split:{split}", metric, scale * value))
    for kind, values in inputs.read_label_quality(profile).items():
        for metric, found in values.items():
            scale = PERCENT if metric in LABEL_SHARES else 1.0
            # `tokens` counts flawed tokens here; elsewhere it is the length of a response.
            name = "flawed_tokens" if metric == "tokens" else metric
            cells.append(Cell(f"flaws:{kind}", name, *[scale * value for value in found]))
    return cells


def _judged_file(profile: Profile, method: str) -> list[Path]:
    return [metrics_path(profile, f"judged/{method}.csv")]


def _main_files(profile: Profile, method: str) -> list[Path]:
    found = _judged_file(profile, method)
    if method in profile.params.get("methods", {}):
        found.append(metrics_path(profile, f"budgets/{method}.csv"))
    found.append(metrics_path(profile, f"benchmarks/{method}.csv"))
    return [found[0], *(path for path in found[1:] if path.exists())]


def _one_file(name: str) -> Callable[[Profile, str], list[Path]]:
    return lambda profile, row: [metrics_path(profile, name)]


def _search_file(profile: Profile, row: str) -> list[Path]:
    return [metrics_path(profile, f"{_search_stage(row)}.csv")]


def _search_stage(row: str) -> str:
    """The stage that trained a candidate; its results are in a file of that name."""
    return "search_rewards" if row.partition("/")[0] in REWARD_MODELS else "search"


def _search_block(profile: Profile, cell: Cell) -> str:
    """Where reward models are searched too, they are apart from methods."""
    if not profile.params.get("search", {}).get("reward_models"):
        return ""
    return "Reward models" if _search_stage(cell.method) == "search_rewards" else "Methods"


def _row_file(folder: str) -> Callable[[Profile, str], list[Path]]:
    return lambda profile, row: [metrics_path(profile, f"{folder}/{row}.csv")]


def _label_file(profile: Profile, method: str) -> list[Path]:
    return [metrics_path(profile, "label_statistics.json" if method.startswith("split:") else "label_quality.json")]


def _by_kind(profile: Profile, cell: Cell) -> str:
    return BY_KIND if cell.metric.startswith(f"{TOKEN_AUROC}:") else ""


def _study(study: str, title: str) -> Table:
    def block(profile: Profile, cell: Cell) -> str:
        methods = list(dict.fromkeys(variant.method for variant in variants(profile, study).values()))
        if study in ACROSS_METHODS:
            return ""
        return method_style(profile, variants(profile, study)[cell.method].method).label if len(methods) > 1 else ""

    return Table(title, study_table(study), _row_file(f"studies/{study}"), lambda row: [study], block, core=False)


TABLES: dict[str, Table] = {
    "labels": Table(
        "Minimal-edit labels",
        labels,
        _label_file,
        block=lambda profile, cell: "Split" if cell.method.startswith("split:") else "Kind of flaw",
    ),
    "text_quality": Table(
        "What the texts are worth",
        text_quality,
        _one_file("text_quality.csv"),
        lambda row: ["text_quality"],
        lambda profile, cell: cell.method.partition(":")[0].capitalize(),
        core=False,
    ),
    "figa_data": Table("FIGA's data", figa_data, _one_file("figa_data.csv")),
    "figa_core": Table("FIGA and PPO", figa_core, _judged_file, core=False),
    "figa_main": Table(
        "FIGA's main comparison",
        figa_main,
        _main_files,
        block=lambda profile, cell: (
            BUDGETS
            if cell.metric in (*inputs.BUDGET_COLUMNS, "truncated") or cell.metric.startswith(BENCHMARK)
            else QUALITY
        ),
    ),
    "benchmarks": Table("Tasks of the evaluation harness", benchmarks, _row_file("benchmarks"), core=False),
    "figa_signals": _study("figa_signals", "FIGA's signal"),
    "figa_data_ablation": _study("figa_data_ablation", "FIGA's data ablation"),
    "figa_sweeps": _study("figa_sweeps", "FIGA's weights and threshold"),
    "figa_filter": _study("figa_filter", "FIGA's filter and data size"),
    "xu_reward_models": Table(
        "Reward models",
        xu_reward_models,
        lambda profile, row: [
            metrics_path(profile, f"{name}.csv") for name in ("reward_models", "reward_pairs", "token_intervals")
        ],
        block=_by_kind,
    ),
    "xu_token_models": Table(
        "Token-level reward models", xu_token_models, _one_file("token_models.csv"), block=_by_kind, core=False
    ),
    "xu_win_rate": Table("Win rate of PPO three ways", xu_win_rate, _judged_file),
    "xu_extensions": Table("Other rewards and advantages", xu_extensions, _judged_file),
    "xu_efficiency": Table("Training efficiency of PPO three ways", xu_efficiency, _one_file("curves.csv")),
    "overoptimisation": Table(
        "Over-optimisation",
        overoptimisation,
        _one_file("overoptimisation.csv"),
        lambda row: [row, "overoptimisation"],
        lambda profile, cell: BEST if cell.metric.startswith("best_") else LAST,
        core=False,
    ),
    "label_noise": _study("label_noise", "Label noise"),
    "ppo_rates": _study("ppo_rates", "Each PPO with its own learning rate"),
    "judges": Table(
        "Judges beside each other",
        judges,
        _judge_files,
        # Of another judge the stages that trained it and judged with it.
        lambda row: [row.removeprefix(JUDGE), "judge_model"] if row.startswith(JUDGE) else [row],
        _judge_block,
        core=False,
        notes=judge_notes,
    ),
    "edit_likelihood": Table(
        "Held-out edits under the policies",
        edit_likelihood,
        _one_file("edit_likelihood.csv"),
        block=lambda profile, cell: OF_EDITS if cell.metric in MARGINS else OF_TOKENS,
        core=False,
    ),
    "credit": Table("Where the credit goes", credit, _one_file("credit.csv"), core=False),
    "search": Table(
        "Hyperparameter search",
        search,
        _search_file,
        lambda row: [row.partition("/")[0], _search_stage(row)],
        _search_block,
        core=False,
    ),
}


def table_spec(name: str) -> Table:
    """The table of that name; ConfigError lists the known ones."""
    if name not in TABLES:
        raise ConfigError(f"unknown table {name!r}; expected one of {', '.join(TABLES)}")
    return TABLES[name]


def table_paths(profile: Profile, name: str) -> list[Path]:
    """The files that ``build_table`` writes: CSV, then LaTeX."""
    folder = (profile.sweeps if name in SWEEPS else profile.results) / "tables"
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
    notes += spec.notes(profile)
    if any(cell.metric.partition(":")[0] == "win_rate" for cell in cells):
        notes.append(f"Measured with: {measured(profile)}. {report_config(profile).budget_note}")
    write_text(tex_path, blocks_to_tex(name, blocks(profile, name, cells), labeller(profile, name), notes))
    return [csv_path, tex_path]


def blocks(profile: Profile, name: str, cells: list[Cell]) -> list[Block]:
    """The cells of a table as readers see them, in its blocks."""
    return layout(cells, lambda cell: table_spec(name).block(profile, cell))


def _judged(profile: Profile, methods: list[str]) -> dict[str, Grid]:
    grids = {method: inputs.read_judged(profile, method) for method in methods}
    inputs.same_items(grids, lambda method: _judged_file(profile, method)[0])
    return grids


def _benchmarks(table: str, profile: Profile, methods: list[str], rates_only: bool) -> list[Cell]:
    found = {method: inputs.read_benchmark(profile, method) for method in methods}
    tasks = list(found[methods[0]])
    cells = []
    for method, values in found.items():
        if set(values) != set(tasks):
            odd = sorted(set(values) ^ set(tasks))[0]
            raise InputError(
                f"{metrics_path(profile, f'benchmarks/{method}.csv')}: not the tasks of `{methods[0]}` (for example "
                f"{odd[0]}, {odd[1]}); run both on the same tasks (`dvc repro`)"
            )
        for task, measure in tasks:
            rate = measure in BENCHMARK_RATES
            if rate or not rates_only:
                metric, scale = f"{BENCHMARK}{task}__{measure}", PERCENT if rate else 1.0
                bounds = UNIT_RANGE if rate else None
                cells.append(_over_seeds(table, method, metric, values[task, measure], profile.seeds, scale, bounds))
    return cells


def _win_rate(table: str, row: str, grid: Grid) -> Cell:
    return _crossed(table, row, "win_rate", grid, "win", PERCENT, UNIT_RANGE)


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


def _accuracy(table: str, model: str, metric: str, grid: Grid) -> Cell:
    """The accuracy of a reward model, of ``inputs.read_reward_pairs``."""
    from fgalign.evaluation.statistics import crossed_interval

    values = grid.values["correct"]
    inside = values.min() >= UNIT_RANGE[0] and values.max() <= UNIT_RANGE[1]
    interval = crossed_interval(values, bounds=UNIT_RANGE if inside else None)
    low, high = max(interval.low, UNIT_RANGE[0]), min(interval.high, UNIT_RANGE[1])
    return _cell(table, model, metric, [PERCENT * value for value in (interval.mean, low, high)], grid.seeds)


def _share(table: str, row: str, metric: str, values: ArrayLike, seeds: Sequence[int]) -> Cell:
    """The mean of shares, shape [seeds, items], in percent."""
    from fgalign.evaluation.statistics import crossed_interval

    interval = crossed_interval(values, bounds=UNIT_RANGE)
    return _cell(table, row, metric, [PERCENT * value for value in interval], seeds)


def _difference(table: str, method: str, other: str, grids: dict[str, Grid], metric: str | None = None) -> Cell:
    """Win rate of ``method`` minus that of ``other`` in points, paired by seed and prompt."""
    from fgalign.evaluation.statistics import paired_interval

    interval = paired_interval(*paired_wins(grids[method], grids[other]), bounds=(0.0, PERCENT))
    return _cell(table, method, metric or f"difference_to_{other}", interval[:3], grids[method].seeds)


def paired_wins(ours: Grid, theirs: Grid, column: str = "win") -> tuple[np.ndarray, np.ndarray]:
    """Wins (or another share) of two methods in percent, shape [seeds, prompts] each, with the same seed and prompt in
    the same place."""
    # The files may list the prompts in different orders.
    place = {item: index for index, item in enumerate(theirs.items)}
    return PERCENT * ours.values[column], PERCENT * theirs.values[column][:, [place[item] for item in ours.items]]


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
