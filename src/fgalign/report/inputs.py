"""Reading metrics files for the report: every gap is an error that says which stage has to run.

A report never averages over what happens to be there. Each reader knows which seeds, prompts and columns must be in a
file and raises InputError otherwise, so that a table cannot silently lose a seed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.io import read_json

if TYPE_CHECKING:
    import numpy as np

JUDGED_COLUMNS = ("id", "seed", "score", "reference_score", "win", "kl", "tokens", "truncated")
CURVE_COLUMNS = ("update", "response_tokens", "gradient_updates", "score", "win", "kl", "reward")
SWEEP_METRICS = ("search.csv", "search_rewards.csv", "overoptimisation.csv", "token_models.csv")
SIDES = ("initial", "revised", "reference")
BUDGET_COLUMNS = ("training_tokens", "sampled_tokens", "gradient_updates")
OVEROPTIMISATION_COLUMNS = ("kl", "proxy", "gold", "win")
EDITED = ("good", "bad", "kept")
"""Tokens that an edit puts in, takes out and leaves."""
LIKELIHOOD_COLUMNS = ("initial", "revised", *(f"{kind}{end}" for kind in EDITED for end in ("", "_tokens")))
CREDIT_COLUMNS = ("flawed_tokens", "tokens", "weight_flawed", "weight_total")

PerSeed = dict[str, dict[str, list[float]]]
"""``row -> metric -> one value a seed``, in the order of the profile's seeds."""


@dataclass(frozen=True)
class Candidate:
    """One point of a method's hyperparameter search; win rates are shares (0 to 1) on the validation split."""

    method: str
    number: int
    parameters: str
    win: float
    low: float
    high: float
    chosen: bool


@dataclass(frozen=True)
class RewardCandidate:
    """One point of a reward model's hyperparameter search, and what it was measured by on the validation split."""

    model: str
    number: int
    parameters: str
    metric: str
    value: float
    chosen: bool


def metrics_path(profile: Profile, name: str) -> Path:
    """Path of a metrics file of the profile, for example ``judged/figa.csv``; the second pipeline's are apart."""
    first, *rest = name.split("/")
    of_sweeps = name in SWEEP_METRICS or (first == "studies" and rest and rest[0] in profile.params.get("sweeps", {}))
    return (profile.sweeps if of_sweeps else profile.results) / "metrics" / name


@dataclass(frozen=True)
class Grid:
    """One value per (seed, item) for each column of a metrics file; ``values[column]`` has shape [seeds, items]."""

    seeds: list[int]
    items: list[str]
    values: dict[str, np.ndarray]


def read_rows(path: Path, columns: tuple[str, ...], writer: str, empty_ok: bool = False) -> list[dict[str, str]]:
    """Rows of a CSV file that must have ``columns`` (others are kept) and, without ``empty_ok``, at least one row.

    ``writer`` says in errors what to run, for example "the stage that judges `figa`".
    """
    if not path.exists():
        raise InputError(f"{path}: no such metrics file; run {writer} (`dvc repro`)")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise InputError(
                f"{path}:1: column {missing[0]!r} is missing; expected {', '.join(columns)}, "
                f"found {', '.join(reader.fieldnames or ['nothing'])}; run {writer} again"
            )
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} fields; run {writer} again"
                )
            rows.append(row)
    if not rows and not empty_ok:
        raise InputError(f"{path}: no rows below the header; run {writer} again")
    return rows


def number(text: str, path: Path, line: int, column: str) -> float:
    """Parse one finite number of a metrics file."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}:{line}: {column}: expected a finite number, found {text!r}; run the stage again")
    return value


def check_seeds(found: set[int], wanted: list[int], what: str, writer: str) -> None:
    """Raise InputError unless exactly the profile's seeds were found."""
    missing = [seed for seed in wanted if seed not in found]
    extra = sorted(found - set(wanted))
    if missing or extra:
        fault = f"seed {missing[0]} is missing" if missing else f"seed {extra[0]} is not one of the profile's seeds"
        raise InputError(
            f"{what}: {fault}; expected seeds {_join(wanted)}, found {_join(sorted(found))}; run {writer} (`dvc repro`)"
        )


def read_grid(
    path: Path,
    seeds: list[int],
    columns: tuple[str, ...],
    writer: str,
    prefix: str | None = None,
    where: Mapping[str, str] | None = None,
) -> Grid:
    """Read a file with one row per (seed, id) as arrays; columns starting with ``prefix`` are read as well. With
    ``where`` only the rows count that have these values in these columns.

    Raises:
        InputError: a seed or column is missing, a pair comes twice, or the seeds do not have the same ids.
    """
    where = where or {}
    rows = read_rows(path, ("id", "seed", *where, *columns), writer)
    names = [*columns, *(key for key in rows[0] if prefix and key.startswith(prefix))]
    cells: dict[tuple[int, str], list[float]] = {}
    for line, row in enumerate(rows, start=2):
        if any(row[name] != value for name, value in where.items()):
            continue
        key = (_seed(row["seed"], path, line), row["id"])
        if key in cells:
            raise InputError(f"{path}:{line}: seed {key[0]}, id {key[1]!r} comes twice; run {writer} again")
        cells[key] = [_bool_or_number(row[name], path, line, name) for name in names]
    which = f" ({', '.join(where.values())})" if where else ""
    check_seeds({seed for seed, _ in cells}, seeds, f"{path}{which}", writer)
    return _grid(cells, seeds, names, path, writer)


def read_judged(profile: Profile, method: str) -> Grid:
    """Judged samples of one method; columns of ``JUDGED_COLUMNS`` and ``reward_*``."""
    path = metrics_path(profile, f"judged/{method}.csv")
    return read_grid(path, profile.seeds, JUDGED_COLUMNS[2:], f"the stage that judges `{method}`", prefix="reward_")


def read_rejudged(profile: Profile, judge: str, method: str) -> Grid:
    """Samples of one method under another judge than the profile's: the columns ``score``, ``reference_score``,
    ``win``."""
    path, columns = metrics_path(profile, f"judges/{judge}.csv"), ("score", "reference_score", "win")
    return read_grid(path, profile.seeds, columns, f"the stage rejudge@{judge}", where={"method": method})


def preferred_path(profile: Profile, judge: str) -> Path:
    """The file of ``read_preferred``."""
    return metrics_path(profile, f"judges/{judge}_preferences.csv")


def read_preferred(profile: Profile, judge: str) -> dict[str, list[float]]:
    """How much of each held-out preference another judge gives to the side that people chose (``correct``), and the
    profile's own judge (``main_correct``); without a judge that could not be asked."""
    path, writer = preferred_path(profile, judge), f"the stage rejudge@{judge}"
    rows = read_rows(path, ("id",), writer)
    return {
        column: [number(row[column], path, line, column) for line, row in enumerate(rows, start=2)]
        for column in ("correct", "main_correct")
        if column in rows[0]
    }


def read_variant(profile: Profile, study: str, variant: str) -> Grid:
    """Judged samples of one variant of a study; columns of ``JUDGED_COLUMNS`` and ``reward_*``."""
    path = metrics_path(profile, f"studies/{study}/{variant}.csv")
    return read_grid(path, profile.seeds, JUDGED_COLUMNS[2:], f"the stage that judges study `{study}`", "reward_")


def same_items(grids: dict[str, Grid], path: Callable[[str], Path | str]) -> None:
    """Raise InputError, naming the file by ``path``, unless all have the prompts of the first, in whatever order."""
    first = next(iter(grids))
    for name, grid in grids.items():
        if set(grid.items) != set(grids[first].items):
            odd = sorted(set(grid.items) ^ set(grids[first].items))[0]
            raise InputError(
                f"{path(name)}: not the prompts of `{first}` (for example {odd!r}); "
                "judge both on the same test split (`dvc repro`)"
            )


def read_figa_data(profile: Profile) -> dict[str, Grid]:
    """Reward, tokens and edit distance per pair, for each of the sides initial, revised and, where prompts of the pairs
    have one, reference."""
    path, writer = metrics_path(profile, "figa_data.csv"), "the stage that scores FIGA's data"
    columns = ("reward", "tokens", "edit_distance")
    sides: dict[str, dict[tuple[int, str], list[float]]] = {side: {} for side in SIDES}
    for line, row in enumerate(read_rows(path, ("id", "side", "seed", *columns), writer), start=2):
        if row["side"] not in sides:
            raise InputError(f"{path}:{line}: side: expected one of {', '.join(SIDES)}, found {row['side']!r}")
        key = (_seed(row["seed"], path, line), row["id"])
        if key in sides[row["side"]]:
            raise InputError(f"{path}:{line}: {row['side']} of id {key[1]!r} comes twice for seed {key[0]}")
        sides[row["side"]][key] = [number(row[name], path, line, name) for name in columns]
    grids = {}
    for side, cells in sides.items():
        if side == "reference" and not cells:
            continue
        check_seeds({seed for seed, _ in cells}, profile.seeds, f"{path} ({side})", writer)
        grids[side] = _grid(cells, profile.seeds, list(columns), path, writer)
    return grids


def read_reward_models(profile: Profile, required: list[str], name: str = "reward_models.csv") -> PerSeed:
    """``model -> metric -> value per seed`` of ``name``, the required models first. A metric of tokens that some seed
    has no value for (a model without a negative reward has no precision) is left out."""
    path, writer = metrics_path(profile, name), "the stage that evaluates the reward models"
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for line, row in enumerate(read_rows(path, ("model", "metric", "seed", "value"), writer), start=2):
        _put(cells.setdefault((row["model"], row["metric"]), {}), row, "value", path, line)
    found = list(dict.fromkeys(model for model, _ in cells))
    _require(found, required, "reward model", path, writer)
    models: PerSeed = {}
    for model in [*required, *(name for name in found if name not in required)]:
        models[model] = {
            metric: _by_seed(profile, values, f"{path} ({model}, {metric})", writer)
            for (name, metric), values in cells.items()
            if name == model and not (metric.startswith("token_") and set(values) < set(profile.seeds))
        }
    return models


def read_reward_pairs(profile: Profile, model: str, metric: str) -> Grid:
    """Whether a reward model ranks each held-out pair rightly (1, a tie 0.5, else 0); the column is ``correct``.

    Pairs about one prompt share responses and are not independent, so where prompts have several the items are prompts:
    with N pairs of P prompts and the accuracy a, the value of a prompt is a + P/N times the sum of (correct - a) over
    its pairs, whose mean is a and whose spread is that of the ratio estimator of cluster sampling (Cochran 1977,
    section 6). It may lie outside 0 to 1.
    """
    import numpy as np

    path, writer = metrics_path(profile, "reward_pairs.csv"), "the stage that evaluates the reward models"
    where = {"model": model, "metric": metric}
    grid = read_grid(path, profile.seeds, ("correct",), writer, where=where)
    prompts = {
        row["id"]: row["prompt"]
        for row in read_rows(path, ("id", "prompt", *where), writer)
        if all(row[name] == value for name, value in where.items())
    }
    names = list(dict.fromkeys(prompts[item] for item in grid.items))
    if len(names) == len(grid.items):
        return grid
    of_prompt = np.array([[prompts[item] == name for item in grid.items] for name in names], dtype=float)
    correct = grid.values["correct"]
    mean = correct.mean(axis=1, keepdims=True)
    values = mean + (correct - mean) @ of_prompt.T * len(names) / len(grid.items)
    return Grid(grid.seeds, names, {"correct": values})


def read_edit_likelihood(profile: Profile, models: Sequence[str]) -> tuple[dict[str, Grid], list[int]]:
    """Log-probabilities of held-out edits by policy, columns ``LIKELIHOOD_COLUMNS`` (sums in nats, numbers of tokens),
    of the same edits in the same order; and for each edit the number of its prompt, from 0."""
    path, writer = metrics_path(profile, "edit_likelihood.csv"), "the stage score_edits"
    grids = {
        model: read_grid(path, profile.seeds, LIKELIHOOD_COLUMNS, writer, where={"model": model}) for model in models
    }
    items = grids[models[0]].items
    for model, grid in grids.items():
        if grid.items != items:
            raise InputError(f"{path}: {model}: expected the edits of {models[0]}; run {writer} again")
    prompts = {row["id"]: row["prompt"] for row in read_rows(path, ("id", "prompt"), writer)}
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts[item] for item in items))}
    return grids, [numbers[prompts[item]] for item in items]


def read_token_intervals(profile: Profile) -> dict[tuple[str, str], tuple[float, float]]:
    """``(model, metric) -> (low, high)``: 95% intervals of token metrics over seeds and responses, of those that have
    one."""
    path, writer = metrics_path(profile, "token_intervals.csv"), "the stage that evaluates the reward models"
    rows = read_rows(path, ("model", "metric", "low", "high"), writer, empty_ok=True)
    return {
        (row["model"], row["metric"]): (number(row["low"], path, line, "low"), number(row["high"], path, line, "high"))
        for line, row in enumerate(rows, start=2)
    }


def read_budgets(profile: Profile, methods: list[str]) -> PerSeed:
    """``method -> training_tokens, sampled_tokens, gradient_updates -> value per seed``."""
    budgets: PerSeed = {}
    for method in methods:
        path, writer = metrics_path(profile, f"budgets/{method}.csv"), f"the stage that judges `{method}`"
        columns: dict[str, dict[int, float]] = {name: {} for name in BUDGET_COLUMNS}
        for line, row in enumerate(read_rows(path, ("seed", *BUDGET_COLUMNS), writer), start=2):
            for name in BUDGET_COLUMNS:
                _put(columns[name], row, name, path, line)
        budgets[method] = {name: _by_seed(profile, values, str(path), writer) for name, values in columns.items()}
    return budgets


def read_benchmark(profile: Profile, method: str) -> dict[tuple[str, str], list[float]]:
    """``(task, measure) -> value per seed`` of one method, as the harness gives them (rates as shares, 0 to 1).

    The standard error over a task's items is not read: all methods and seeds answer the same items.
    """
    path = metrics_path(profile, f"benchmarks/{method}.csv")
    writer = f"the stage that runs the benchmarks of `{method}`"
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for line, row in enumerate(read_rows(path, ("task", "metric", "seed", "value"), writer), start=2):
        _put(cells.setdefault((row["task"], row["metric"]), {}), row, "value", path, line)
    return {key: _by_seed(profile, values, f"{path} ({key[0]}, {key[1]})", writer) for key, values in cells.items()}


def read_search(profile: Profile) -> list[Candidate]:
    """The candidates of the hyperparameter search, in the order of the file; one of each method is the chosen one."""
    path, writer = metrics_path(profile, "search.csv"), "the stage that judges the search"
    columns = ("method", "candidate", "parameters", "win", "win_low", "win_high", "chosen")
    found: dict[tuple[str, str], Candidate] = {}
    for line, row in enumerate(read_rows(path, columns, writer), start=2):
        key = (row["method"], row["candidate"])
        if key in found:
            raise InputError(f"{path}:{line}: candidate {key[1]} of {key[0]} comes twice; run {writer} again")
        win, low, high = (number(row[name], path, line, name) for name in ("win", "win_low", "win_high"))
        chosen = bool(_bool_or_number(row["chosen"], path, line, "chosen"))
        place = _integer(row["candidate"], path, line, "candidate")
        found[key] = Candidate(row["method"], place, row["parameters"], win, low, high, chosen)
    _one_chosen(path, writer, [(item.method, item.number, item.chosen) for item in found.values()])
    return list(found.values())


def read_reward_search(profile: Profile) -> list[RewardCandidate]:
    """The candidates of the search for reward models, in the order of the file; one of each model is the chosen one."""
    path, writer = metrics_path(profile, "search_rewards.csv"), "the stage that judges the search"
    columns = ("model", "candidate", "parameters", "metric", "value", "chosen")
    found = [
        RewardCandidate(
            row["model"],
            _integer(row["candidate"], path, line, "candidate"),
            row["parameters"],
            row["metric"],
            number(row["value"], path, line, "value"),
            bool(_bool_or_number(row["chosen"], path, line, "chosen")),
        )
        for line, row in enumerate(read_rows(path, columns, writer), start=2)
    ]
    _one_chosen(path, writer, [(item.model, item.number, item.chosen) for item in found])
    return found


def _one_chosen(path: Path, writer: str, found: Sequence[tuple[str, int, bool]]) -> None:
    """Refuse a search, (name, candidate, chosen), in which not one candidate of each name is chosen."""
    for name in dict.fromkeys(name for name, *_ in found):
        chosen = [place for other, place, is_chosen in found if other == name and is_chosen]
        if len(chosen) != 1:
            raise InputError(
                f"{path}: {name}: expected one chosen candidate, found {_join(chosen)}; run {writer} again"
            )


def read_overoptimisation(profile: Profile) -> dict[str, dict[int, list[dict[str, float]]]]:
    """``reward -> seed -> points in the order of updates``, each with update and ``OVEROPTIMISATION_COLUMNS``.

    Every seed of a reward has the same updates.
    """
    path, writer = metrics_path(profile, "overoptimisation.csv"), "the stage that judges over-optimisation"
    columns = ("update", *OVEROPTIMISATION_COLUMNS)
    runs: dict[str, dict[int, list[dict[str, float]]]] = {}
    for line, row in enumerate(read_rows(path, ("reward", "seed", *columns), writer), start=2):
        point = {name: number(row[name], path, line, name) for name in columns}
        runs.setdefault(row["reward"], {}).setdefault(_seed(row["seed"], path, line), []).append(point)
    for reward, by_seed in runs.items():
        check_seeds(set(by_seed), profile.seeds, f"{path} ({reward})", writer)
        for points in by_seed.values():
            points.sort(key=lambda point: point["update"])
        first = [point["update"] for point in by_seed[profile.seeds[0]]]
        for seed, points in by_seed.items():
            updates = [point["update"] for point in points]
            if updates != first or len(set(updates)) != len(updates):
                raise InputError(
                    f"{path}: {reward}, seed {seed}: expected the updates {_join(map(int, first))} of seed "
                    f"{profile.seeds[0]}, each once, found {_join(map(int, updates))}; run {writer} again"
                )
    return {reward: {seed: by_seed[seed] for seed in profile.seeds} for reward, by_seed in runs.items()}


def read_credit(profile: Profile) -> PerSeed:
    """``reward -> weight_share, share_tokens -> value per seed``, as shares (0 to 1).

    ``weight_share`` is the part of all policy-gradient weight that falls on flawed tokens, ``share_tokens`` the part of
    the tokens that are flawed: what an even spread of the weight would give. Both are ratios of sums over answers.
    """
    path, writer = metrics_path(profile, "credit.csv"), "the stage that measures the credit"
    sums: dict[str, dict[int, dict[str, float]]] = {}
    seen: set[tuple[str, int, str]] = set()
    for line, row in enumerate(read_rows(path, ("reward", "seed", "id", *CREDIT_COLUMNS), writer), start=2):
        seed = _seed(row["seed"], path, line)
        key = (row["reward"], seed, row["id"])
        if key in seen:
            raise InputError(
                f"{path}:{line}: reward {key[0]}, seed {seed}, id {key[2]!r} comes twice; run {writer} again, with one "
                "method a reward"
            )
        seen.add(key)
        total = sums.setdefault(row["reward"], {}).setdefault(seed, dict.fromkeys(CREDIT_COLUMNS, 0.0))
        for name in CREDIT_COLUMNS:
            total[name] += number(row[name], path, line, name)
    shares: PerSeed = {}
    for reward, by_seed in sums.items():
        check_seeds(set(by_seed), profile.seeds, f"{path} ({reward})", writer)
        shares[reward] = {"weight_share": [], "share_tokens": []}
        for seed in profile.seeds:
            total = by_seed[seed]
            for share, part, whole in (
                ("weight_share", "weight_flawed", "weight_total"),
                ("share_tokens", "flawed_tokens", "tokens"),
            ):
                if not 0 <= total[part] <= total[whole] or total[whole] <= 0:
                    raise InputError(
                        f"{path}: {reward}, seed {seed}: expected 0 <= {part} <= {whole} and {whole} above 0 in sum, "
                        f"found {total[part]:g} and {total[whole]:g}; run {writer} again"
                    )
                shares[reward][share].append(total[part] / total[whole])
    return shares


def read_curves(
    profile: Profile, methods: list[str], optional: Sequence[str] = ()
) -> dict[str, dict[int, list[dict[str, float]]]]:
    """``method -> seed -> evaluations in the order of updates``, each with the columns of ``CURVE_COLUMNS``.

    All of ``methods`` must be in the file; those of ``optional`` that are in it follow.
    """
    path, writer = metrics_path(profile, "curves.csv"), "the stage that judges the learning curves"
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for line, row in enumerate(read_rows(path, ("method", "seed", *CURVE_COLUMNS), writer), start=2):
        point = {name: number(row[name], path, line, name) for name in CURVE_COLUMNS}
        curves.setdefault(row["method"], {}).setdefault(_seed(row["seed"], path, line), []).append(point)
    result = {}
    _require(list(curves), methods, "method", path, writer)
    for method in [*methods, *(name for name in optional if name in curves and name not in methods)]:
        check_seeds(set(curves[method]), profile.seeds, f"{path} ({method})", writer)
        result[method] = {}
        for seed in profile.seeds:
            points = sorted(curves[method][seed], key=lambda point: point["update"])
            updates = [point["update"] for point in points]
            if updates[0] != 0 or len(set(updates)) != len(updates):
                raise InputError(
                    f"{path}: {method}, seed {seed}: expected update 0 and each later one once, "
                    f"found {_join(int(update) for update in updates)}; run {writer} again"
                )
            result[method][seed] = points
    return result


def read_label_statistics(profile: Profile) -> dict[str, dict[str, float]]:
    """``split -> statistic -> value`` of the minimal-edit labels."""
    path = metrics_path(profile, "label_statistics.json")
    splits = read_json(path)
    for split, values in splits.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: {split}: expected statistics by name, found {values!r}")
        for name, value in values.items():
            number(str(value), path, 1, f"{split}.{name}")
    return splits


def read_label_quality(profile: Profile) -> dict[str, dict[str, list[float]]]:
    """``all | flaw type -> metric -> [value]``, or ``[value, low, high]`` where it has an interval, of the minimal-edit
    labels against the truth.

    A share without a denominator (null in the file: no token of that kind) is left out; the table shows a dash.
    """
    path = metrics_path(profile, "label_quality.json")
    quality = dict(read_json(path))
    if not quality:  # a source without marks of flaws
        return {}
    by_type = quality.pop("by_type", {})
    rows = {}
    for kind, values in {"all": quality, **by_type}.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: {kind}: expected metrics by name, found {values!r}")
        intervals = values.get("intervals", {})
        rows[kind] = {
            name: [number(str(part), path, 1, f"{kind}.{name}") for part in (value, *intervals.get(name, ()))]
            for name, value in values.items()
            if name != "intervals" and value is not None
        }
    return rows


def read_text_quality(profile: Profile) -> dict[str, dict[str, list[float]]]:
    """``split:text -> score, better -> one number a text``; ``better`` only where the text is one side of a pair."""
    path, writer = metrics_path(profile, "text_quality.csv"), "the stage that judges the texts"
    found: dict[str, dict[str, list[float]]] = {}
    for line, row in enumerate(read_rows(path, ("split", "text", "id", "score", "better"), writer), start=2):
        values = found.setdefault(f"{row['split']}:{row['text']}", {"score": [], "better": []})
        for name in values:
            if name == "score" or row[name]:
                values[name].append(number(row[name], path, line, name))
    return found


def read_token_examples(profile: Profile) -> list[dict]:
    """Test answers with a label, a gold mark (none where the source has no truth) and a reward per token, for the
    coloured figure."""
    path = metrics_path(profile, "token_examples.json")
    examples = read_json(path)
    if not isinstance(examples, list) or not examples:
        raise InputError(f"{path}: expected a list of examples; run the stage that writes it again")
    for index, example in enumerate(examples):
        missing = [key for key in ("id", "prompt", "response_tokens", "labels", "rewards") if key not in example]
        if missing:
            raise InputError(f"{path}: example {index}: {missing[0]} is missing; found {_join(example)}")
        length = len(example["response_tokens"])
        example.setdefault("gold", [False] * length)
        for key in ("labels", "gold", "rewards"):
            if len(example[key]) != length:
                raise InputError(f"{path}: example {index}: {length} tokens but {len(example[key])} {key}")
    return examples


def _grid(
    cells: dict[tuple[int, str], list[float]], seeds: list[int], names: list[str], path: Path, writer: str
) -> Grid:
    import numpy as np

    items = [item for seed, item in cells if seed == seeds[0]]
    for seed in seeds:
        others = {item for other, item in cells if other == seed}
        if others != set(items):
            odd = sorted(others ^ set(items))[0]
            raise InputError(
                f"{path}: seeds {seeds[0]} and {seed} do not have the same ids (for example {odd!r}); "
                f"run {writer} again"
            )
    block = np.array([[cells[seed, item] for item in items] for seed in seeds], dtype=np.float64)
    return Grid(list(seeds), items, {name: block[:, :, index] for index, name in enumerate(names)})


def _put(values: dict[int, float], row: dict[str, str], column: str, path: Path, line: int) -> float:
    """Note a row's number under its seed; a seed may come once."""
    seed = _seed(row["seed"], path, line)
    if seed in values:
        raise InputError(f"{path}:{line}: {column} comes twice for seed {seed}; run the stage again")
    values[seed] = number(row[column], path, line, column)
    return values[seed]


def _by_seed(profile: Profile, values: dict[int, float], what: str, writer: str) -> list[float]:
    check_seeds(set(values), profile.seeds, what, writer)
    return [values[seed] for seed in profile.seeds]


def _require(found: Sequence[str], required: Sequence[str], what: str, path: Path, writer: str) -> None:
    for name in required:
        if name not in found:
            raise InputError(f"{path}: no rows for {what} {name!r}; found {_join(found)}; train it, run {writer}")


def _seed(text: str, path: Path, line: int) -> int:
    return _integer(text, path, line, "seed")


def _integer(text: str, path: Path, line: int, column: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}:{line}: {column}: expected an integer, found {text!r}; run the stage again") from None


def _bool_or_number(text: str, path: Path, line: int, column: str) -> float:
    # A truth value is written as True/False by Python's csv and as true/false by others; both mean 1/0.
    truth = {"true": 1.0, "false": 0.0}.get(text.lower())
    return number(text, path, line, column) if truth is None else truth


def _join(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in values) or "none"
