"""The papers' claims, each with our estimate, a 95% interval, a corrected p value and a verdict computed here.

A claim is one entry of ``CLAIMS``: a sentence, and the two sides whose difference it is about. Differences are *better
side as claimed* minus *other side*, so a positive estimate speaks for the claim. Values with one number per seed and
prompt (or held-out pair) are paired by both (``statistics.paired_interval``), values with one number per seed by seed
(a paired t test).

- **Seeds.** The variance between seeds of a win rate is pooled over all policies that the papers' claims name, that of
  an accuracy over all reward models (``statistics.pooled_seed_variance``, ``seed_pools``); one difference by itself has
  seeds - 1 degrees of freedom. Where a difference's own variance is larger, it is taken.
- **Correction.** Holm's over the papers' claims that the profile can test. Rows beyond the papers (FIGA against every
  other method of the profile) are a family of their own: a method that somebody adds changes no verdict on a paper.
- **Verdict.** *holds*: adjusted p below 0.05 and the estimate on the claimed side. *does not hold*: adjusted p below
  0.05 and the estimate on the other side, or else the 95% interval, which has to reach down to 0, wholly below the
  smallest effect of interest of the quantity (``Quantity.smallest``): an effect that would matter is ruled out. *cannot
  tell* otherwise.
- **Power.** ``detectable`` is the true difference that a two-sided test of ours finds with 80% power,
  (t(1 - a/2, nu) + t(0.8, nu)) * SE, with the standard error SE and degrees of freedom nu of the estimate and the level
  a that Holm's procedure holds this p value against: 0.05 / (m - i + 1) for the i-th smallest of m.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.io import write_text
from fgalign.report import inputs
from fgalign.report.cells import Cell
from fgalign.report.config import PLAIN_PPO, SFT, variants
from fgalign.report.inputs import metrics_path
from fgalign.report.reported import REPORTED
from fgalign.report.style import method_style
from fgalign.report.tables import PERCENT, best_score, first_reaching, paired_wins

if TYPE_CHECKING:
    import numpy as np

    from fgalign.evaluation.statistics import SeedVariance
    from fgalign.report.inputs import Grid

Verdict = Literal["holds", "does not hold", "cannot tell"]
Sides = tuple["np.ndarray", "np.ndarray"]
Grids = dict[tuple[Path, str], "Grid"]
"""What was measured, by metrics file and name: a method, a variant or a reward model."""

XU, FIGA, BEYOND = "Xu et al.", "FIGA", "beyond the papers"
LEVEL = 0.05
POWER = 0.8
FIGA_METHOD = "figa"


@dataclass(frozen=True)
class Quantity:
    """What a claim compares: its name with the unit, the smallest difference that would matter, in that unit, and where
    there is one number per seed and prompt, the column that has it."""

    name: str
    smallest: float
    column: str | None = None
    limit: float | None = None
    """Of one number per seed the largest possible size of a difference: seeds that all have the same leave no spread,
    and the interval is then the exact binomial's within this."""


WIN_RATE = Quantity("win rate (points)", 2.0, "win")
ON_EDITS = Quantity("accuracy on held-out edits (points)", 2.0, "correct")
ON_PREFERENCES = Quantity("accuracy on held-out preferences (points)", 2.0, "correct")
STEPS = Quantity("steps to plain PPO's best score (points of the budget)", 5.0, limit=100.0)
CREDIT = Quantity("weight on flawed tokens beyond chance (points)", 2.0)


@dataclass(frozen=True)
class Claim:
    """A claim in one sentence. ``sides`` reads the two compared sides, each of shape [seeds, prompts] (one column where
    there is one value per seed), or is None where the profile does not have them; ``files`` says what it reads."""

    name: str
    paper: str
    sentence: str
    quantity: Quantity
    sides: Callable[[Profile], Sides | None]
    files: Callable[[Profile], list[Path]]
    reported: float | None = None

    grids: Callable[[Profile], Grids | None] | None = None
    """Where there is one number per seed and prompt: both sides, the claimed one first."""


@dataclass(frozen=True)
class Result:
    """A row of ``claims.csv``; numbers in the unit of the quantity, ``seeds`` behind the estimate."""

    claim: str
    paper: str
    sentence: str
    quantity: str
    estimate: float
    ci_low: float
    ci_high: float
    p_value: float
    p_holm: float
    verdict: Verdict
    detectable: float
    smallest_effect: float
    seeds: tuple[int, ...]
    reported: float | None


@dataclass(frozen=True)
class Estimate:
    """A paired difference: 95% interval, two-sided p, and half the width of the interval at any other level."""

    mean: float
    low: float
    high: float
    p_value: float
    half_width: Callable[[float], float]


def estimate(
    better: np.ndarray, other: np.ndarray, seed_variance: SeedVariance | None = None, limit: float | None = None
) -> Estimate:
    """Paired difference ``better - other`` of two arrays of shape [seeds, prompts]; ``limit`` as in ``Quantity``."""
    from fgalign.evaluation.statistics import constant_interval, paired_interval

    def at(level: float) -> tuple[float, float]:
        if limit is not None and len({*(better - other).flat}) == 1:
            return constant_interval(float((better - other).flat[0]), better.size, level, (-limit, limit))
        found = paired_interval(better, other, level, seed_variance)
        return found.low, found.high

    def half_width(level: float) -> float:
        low, high = at(level)
        return (high - low) / 2

    found = paired_interval(better, other, seed_variance=seed_variance)
    return Estimate(found.mean, *at(1 - LEVEL), found.p_value, half_width)


def verdict(mean: float, low: float, high: float, p_holm: float, smallest: float) -> Verdict:
    """The verdict on a claim whose claimed side is positive; rules at the top of this file."""
    if p_holm < LEVEL:
        return "holds" if mean > 0 else "does not hold"
    return "does not hold" if low <= 0 and high < smallest else "cannot tell"


def detectable_effect(half_width: Callable[[float], float], level: float) -> float:
    """The true difference found with 80% power at ``level``: the half width of the interval of confidence 1 - level,
    which is t(1 - level/2) SE, plus that of the one of confidence 0.6, which is t(0.8) SE."""
    return half_width(1 - level) + half_width(2 * POWER - 1)


def judge(estimates: list[Estimate], smallest: list[float]) -> list[tuple[float, Verdict, float]]:
    """Adjusted p, verdict and detectable effect of each claim of one family, in the order given."""
    from fgalign.evaluation.statistics import holm

    adjusted = holm([found.p_value for found in estimates])
    order = sorted(range(len(estimates)), key=lambda index: estimates[index].p_value)
    rank = {index: place for place, index in enumerate(order)}
    return [
        (
            p_holm,
            verdict(found.mean, found.low, found.high, p_holm, least),
            detectable_effect(found.half_width, LEVEL / (len(estimates) - rank[index])),
        )
        for index, (found, p_holm, least) in enumerate(zip(estimates, adjusted, smallest, strict=True))
    ]


def claim_results(profile: Profile) -> list[Result]:
    """Every claim that the profile can test, the papers' first.

    Raises:
        InputError: a metrics file of a method or study of the profile is missing or incomplete; fewer than two seeds.
    """
    if len(profile.seeds) < 2:
        raise InputError(
            f"{profile.file}: seeds: claims need at least two training seeds, found {len(profile.seeds)}; "
            "one run says nothing about a method"
        )
    results = []
    pools = seed_pools(profile)
    for claims in (CLAIMS, further_claims(profile)):
        tested = [(claim, sides) for claim in claims if (sides := claim.sides(profile)) is not None]
        estimates = [estimate(*sides, pools.get(claim.quantity.name), claim.quantity.limit) for claim, sides in tested]
        judged = judge(estimates, [claim.quantity.smallest for claim, _ in tested])
        for (claim, _), found, (p_holm, decision, detectable) in zip(tested, estimates, judged, strict=True):
            results.append(
                Result(
                    claim.name, claim.paper, claim.sentence, claim.quantity.name,
                    found.mean, found.low, found.high, found.p_value, p_holm, decision,
                    detectable, claim.quantity.smallest, tuple(profile.seeds), claim.reported,
                )
            )  # fmt: skip
    return results


def seed_pools(profile: Profile) -> dict[str, SeedVariance]:
    """By name of the quantity, the variance between seeds in squared points, pooled over the policies (or reward
    models) that the papers' claims name and the profile has, each once; only of quantities with two. Methods beyond the
    papers have no part in it, so that one that somebody adds changes no verdict on a paper.

    Raises:
        InputError: as ``claim_results``; the sides were measured on different prompts.
    """
    import numpy as np

    from fgalign.evaluation.statistics import pooled_seed_variance

    grids: dict[Quantity, Grids] = {}
    for claim in CLAIMS:
        if claim.grids and (found := claim.grids(profile)):
            grids.setdefault(claim.quantity, {}).update(found)
    pools = {}
    for quantity, found in grids.items():
        tables: list[np.ndarray] = []
        for grid in _same_items(found).values():
            _, values = paired_wins(next(iter(found.values())), grid, quantity.column)
            # A study's first variant is the method itself, and has its answers.
            if not any(np.array_equal(values, other) for other in tables):
                tables.append(values)
        if len(tables) > 1:
            pools[quantity.name] = pooled_seed_variance(tables)
    return pools


def further_claims(profile: Profile) -> tuple[Claim, ...]:
    """Comparisons that the papers do not make: FIGA against every other method of the profile, and what the edits alone
    and the token level alone contribute."""
    methods = profile.params.get("methods", {})
    named = {FIGA_METHOD, *(other for _, other in FIGA_BASELINES)}
    others = [name for name in methods if name not in named] if FIGA_METHOD in methods else []
    figa = method_style(profile, FIGA_METHOD).label
    rows = [(f"figa_against_{name}", f"{figa} beats {method_style(profile, name).label}.", name) for name in others]
    return (*FURTHER, *(_wins(name, BEYOND, sentence, FIGA_METHOD, other) for name, sentence, other in rows))


def untested(profile: Profile, results: Iterable[Result]) -> list[str]:
    """Sentences of the papers' claims that ``results`` does not have, because the profile lacks what they compare."""
    found = {result.claim for result in results}
    return [claim.sentence for claim in CLAIMS if claim.name not in found]


def claim_files(profile: Profile, name: str) -> list[Path]:
    """The metrics files behind a claim; InputError for an unknown one."""
    for claim in (*CLAIMS, *further_claims(profile)):
        if claim.name == name:
            return claim.files(profile)
    raise InputError(f"{claims_path(profile)}: unknown claim {name!r}; run `fgalign claims` again")


def claims_path(profile: Profile) -> Path:
    """``results/<profile>/claims.csv``."""
    return profile.results / "claims.csv"


def build_claims(profile: Profile) -> Path:
    """Test every claim and write ``claims.csv``, without a row where there is one seed, which says nothing about a
    method; returns its path. Errors as ``claim_results``."""
    results = claim_results(profile) if len(profile.seeds) > 1 else []
    if not results:
        print(f"{profile.file}: seeds: claims need at least two training seeds, found 1; none is tested")
    write_text(claims_path(profile), claims_to_csv(results))
    return claims_path(profile)


def claims_to_csv(results: Iterable[Result]) -> str:
    """The tracked form: four decimals, p values with four significant digits; ``reported`` may be empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        writer.writerow([_text(name, getattr(result, name)) for name in COLUMNS])
    return out.getvalue()


def claims_from_csv(text: str, where: str | Path) -> list[Result]:
    """Parse the tracked form; InputError names ``where`` and the line."""
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(
            f"{where}:1: expected the columns {','.join(COLUMNS)}, found {reader.fieldnames}; run `fgalign claims`"
        )
    results = []
    for row in reader:
        try:
            numbers = {name: float(row[name]) for name in NUMBERS}
            seeds = tuple(int(seed) for seed in row["seeds"].split())
            if row["verdict"] not in VERDICTS:
                raise ValueError(row["verdict"])
            reported = float(row["reported"]) if row["reported"] else None
            results.append(Result(**{**row, **numbers, "seeds": seeds, "reported": reported}))
        except (ValueError, TypeError, AttributeError):
            raise InputError(
                f"{where}:{reader.line_num}: not a claim: {list(row.values())}; run `fgalign claims`"
            ) from None
    return results


def read_claims(profile: Profile) -> list[Result]:
    """The tested claims of a profile; InputError where they were not tested."""
    path = claims_path(profile)
    if not path.exists():
        raise InputError(f"{path}: no such file; run `fgalign claims` or `dvc repro claims`")
    return claims_from_csv(path.read_text(encoding="utf-8"), path)


VERDICTS: dict[str, float] = {"does not hold": -1.0, "cannot tell": 0.0, "holds": 1.0}
"""Verdicts as numbers, for the check: a cell without an interval, which must be the same."""


def claim_cells(results: Iterable[Result]) -> list[Cell]:
    """Claims as cells of a table, so that the check compares them: the estimate with its interval, and the verdict."""
    cells = []
    for result in results:
        cells.append(
            Cell(
                result.claim, "estimate", result.estimate, result.ci_low, result.ci_high, result.seeds, result.reported
            )
        )
        cells.append(Cell(result.claim, "verdict", VERDICTS[result.verdict], seeds=result.seeds))
    return cells


COLUMNS = tuple(field.name for field in fields(Result))
NUMBERS = ("estimate", "ci_low", "ci_high", "p_value", "p_holm", "detectable", "smallest_effect")


def _text(column: str, value: object) -> str:
    if value is None:
        return ""
    if column.startswith("p_"):
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:.4f}".replace("-0.0000", "0.0000")
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _wins(name: str, paper: str, sentence: str, better: str, other: str, reported: float | None = None) -> Claim:
    """Win rate of one method against that of another, paired by seed and prompt; both must be in the profile."""

    def grids(profile: Profile) -> Grids | None:
        known = {"base", SFT, *profile.params.get("methods", {})}
        if not {better, other} <= known:
            return None
        keys = zip(files(profile), (better, other), strict=True)
        return {(path, method): inputs.read_judged(profile, method) for path, method in keys}

    def files(profile: Profile) -> list[Path]:
        return [metrics_path(profile, f"judged/{method}.csv") for method in (better, other)]

    return _of_grids(name, paper, sentence, WIN_RATE, grids, files, reported)


def _variant(name: str, sentence: str, study: str, other: str) -> Claim:
    """Win rate of a study's first variant against another; not tested where the profile or its metrics lack the study
    as a whole or the profile lacks the variant."""

    def names(profile: Profile) -> list[str]:
        first, *others = variants(profile, study) or [None]
        return [first, other] if other in others else []

    def files(profile: Profile) -> list[Path]:
        return [metrics_path(profile, f"studies/{study}/{variant}.csv") for variant in names(profile)]

    def grids(profile: Profile) -> Grids | None:
        if not names(profile) or not metrics_path(profile, f"studies/{study}").is_dir():
            return None
        keys = zip(files(profile), names(profile), strict=True)
        return {(path, variant): inputs.read_variant(profile, study, variant) for path, variant in keys}

    return _of_grids(name, FIGA, sentence, WIN_RATE, grids, files)


def _accuracy(name: str, sentence: str, quantity: Quantity, better: str) -> Claim:
    """Accuracy of a reward model against that of the one from preferences, paired by seed and held-out pair."""
    metric = "accuracy_edit" if quantity is ON_EDITS else "accuracy_preference"
    file = "reward_pairs.csv"

    def grids(profile: Profile) -> Grids:
        path = metrics_path(profile, file)
        return {(path, model): inputs.read_reward_pairs(profile, model, metric) for model in (better, "rm_preference")}

    return _of_grids(name, XU, sentence, quantity, grids, partial(_one, file))


def _of_grids(
    name: str,
    paper: str,
    sentence: str,
    quantity: Quantity,
    grids: Callable[[Profile], Grids | None],
    files: Callable[[Profile], list[Path]],
    reported: float | None = None,
) -> Claim:
    """A claim whose two sides have one number per seed and prompt."""

    def sides(profile: Profile) -> Sides | None:
        found = grids(profile)
        return None if found is None else paired_wins(*_same_items(found).values(), quantity.column)

    return Claim(name, paper, sentence, quantity, sides, files, reported, grids)


def _same_items(grids: Grids) -> Grids:
    inputs.same_items({f"{path} ({name})": grid for (path, name), grid in grids.items()}, str)
    return grids


def _steps(profile: Profile) -> Sides | None:
    """Share of the budget, in PPO steps, until the best validation score of plain PPO of the same seed, in percent:
    plain PPO (slower as claimed, hence first) and token-level PPO.

    A seed that never reaches the target counts with the whole budget: the compared quantity is the *restricted mean*
    (Royston and Parmar 2013), the mean of min(steps, budget), which is observed for every seed, so that no censored
    value has to be guessed. Plain PPO reaches its own best by construction, within the budget; whoever is censored
    therefore loses the seed, and the comparison is on the hard side for token-level PPO.
    """
    methods = (PLAIN_PPO, "ppo_token")
    if not set(methods) <= set(profile.params.get("methods", {})):
        return None
    curves = inputs.read_curves(profile, list(methods))
    spent: dict[str, list[float]] = {method: [] for method in methods}
    for seed in profile.seeds:
        runs = {method: curves[method][seed] for method in methods}
        target = best_score(runs[PLAIN_PPO])
        budget = min(points[-1]["update"] for points in runs.values())
        if budget <= 0:
            raise InputError(
                f"{metrics_path(profile, 'curves.csv')}: seed {seed}: expected evaluations after update 0, found none; "
                "train longer or evaluate more often"
            )
        for method, points in runs.items():
            hit = first_reaching(points, target)
            spent[method].append(min(hit["update"] if hit else budget, budget) / budget)
    return _column(spent[PLAIN_PPO]), _column(spent["ppo_token"])


def _credit(profile: Profile) -> Sides | None:
    """Weight on flawed tokens beyond chance, in points: token rewards against sequence rewards from preferences."""
    if not metrics_path(profile, "credit.csv").exists():
        return None
    shares = inputs.read_credit(profile)
    sides = []
    for reward in ("rm_token", "rm_preference"):
        if reward not in shares:
            raise InputError(
                f"{metrics_path(profile, 'credit.csv')}: no rows for reward {reward!r}; found {', '.join(shares)}; "
                "run the stage that measures the credit again"
            )
        weight, chance = shares[reward]["weight_share"], shares[reward]["share_tokens"]
        sides.append(_column([mine - even for mine, even in zip(weight, chance, strict=True)]))
    return sides[0], sides[1]


def _column(values: list[float]) -> np.ndarray:
    """Shares, one a seed, in percent and as a table with one column: shape [seeds, 1]."""
    import numpy as np

    return PERCENT * np.asarray(values, dtype=float)[:, None]


def _one(name: str, profile: Profile) -> list[Path]:
    return [metrics_path(profile, name)]


# The baselines of FIGA's main table, as a sentence names them, and the method of a profile that stands for each.
FIGA_BASELINES = (
    ("the SFT model that it starts from", SFT),
    ("SFT on the revised responses", "sft_revised"),
    ("PPO", PLAIN_PPO),
    ("DPO", "dpo"),
    ("RRHF", "rrhf"),
    ("CoH", "coh"),
)
# Coarser signals than Levenshtein labels, and the variant of `figa_signals` that stands for each.
COARSER = (
    ("bag-of-words labels", "bag_of_words"),
    ("one constant weight for the whole response", "constant"),
    ("weights by the reward difference", "reward_difference"),
)

_BETTER_MODEL = "A reward model {} judges held-out {} better than a sequence-level one from preferences."

CLAIMS: tuple[Claim, ...] = (
    _wins(
        "token_ppo_beats_ppo",
        XU,
        "Token-level PPO beats PPO.",
        "ppo_token",
        PLAIN_PPO,
        REPORTED["xu_win_rate", "ppo_token", "difference_to_ppo_preference"].value,
    ),
    _wins("edit_ppo_beats_ppo", XU, "Fine-grained PPO (edits) beats PPO.", "ppo_edit", PLAIN_PPO),
    _accuracy("edit_model_on_edits", _BETTER_MODEL.format("from edits", "edits"), ON_EDITS, "rm_edit"),
    _accuracy(
        "edit_model_on_preferences", _BETTER_MODEL.format("from edits", "preferences"), ON_PREFERENCES, "rm_edit"
    ),
    _accuracy("token_model_on_edits", _BETTER_MODEL.format("per token", "edits"), ON_EDITS, "rm_token"),
    _accuracy(
        "token_model_on_preferences", _BETTER_MODEL.format("per token", "preferences"), ON_PREFERENCES, "rm_token"
    ),
    Claim(
        "token_ppo_needs_fewer_steps", XU, "Token-level PPO needs fewer steps than PPO to PPO's best score.",
        STEPS, _steps, partial(_one, "curves.csv"),
    ),
    *(
        _wins(f"figa_beats_{other.removesuffix('_preference')}", FIGA, f"FIGA beats {what}.", FIGA_METHOD, other)
        for what, other in FIGA_BASELINES
    ),
    *(
        _variant(f"levenshtein_beats_{other}", f"Levenshtein labels beat {what}.", "figa_signals", other)
        for what, other in COARSER
    ),
    _variant(
        "revised_beats_reference", "Revised responses beat reference responses as FIGA's data.",
        "figa_data_ablation", "reference",
    ),
)  # fmt: skip

FURTHER: tuple[Claim, ...] = (
    _wins(
        "token_ppo_beats_edit_ppo", BEYOND, "Token-level PPO beats fine-grained PPO (edits).", "ppo_token", "ppo_edit"
    ),
    _wins(
        "token_rewards_beat_their_sum", BEYOND, "Token rewards, each at its token, beat their sum at the last token.",
        "ppo_token", "ppo_token_sum",
    ),
    _wins("ppo_beats_sft", BEYOND, "PPO beats the SFT model that it starts from.", PLAIN_PPO, SFT),
    Claim(
        "token_rewards_find_flaws", BEYOND,
        "Token rewards put more weight on flawed tokens, beyond chance, than sequence rewards.",
        CREDIT, _credit, partial(_one, "credit.csv"),
    ),
)  # fmt: skip
