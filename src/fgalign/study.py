"""What the profile says of studies (variants of its methods) and of the hyperparameter search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fgalign.config import Profile, Section, parse_section
from fgalign.errors import ConfigError

RewardModel = Literal["rm_preference", "rm_edit", "rm_token"]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
"""Values to try by dotted key."""


class Variant(Section):
    """One variant of a study: keys of a method's entry that differ, or of the annotator whose edits it learns from.

    With other edits the labels are made anew, and the reward models that the method needs or takes as scorer are
    trained anew if they learn from edits. A method of kind ``best_of_n`` takes no other edits.
    """

    title: str | None = None
    method: str | None = None
    """The entry of ``methods`` that is varied (None: the study's)."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of that entry, for example ``optim.learning_rate``, and their values."""
    annotator: dict[str, Any] = Field(default_factory=dict)
    """Keys of the ``annotator`` section and their values."""
    level: float | None = None
    """Where the variant stands on the axis of a figure."""

    @property
    def same(self) -> bool:
        """Whether it is the method as the profile has it."""
        return not self.change and not self.annotator


class Study(Section):
    """A study: its variants in the order of its table; differences are taken to the first."""

    title: str | None = None
    method: str | None = None
    variants: dict[str, Variant]


class SearchSection(Section):
    """The hyperparameter search: every method's own ``search`` grid and the reward models' grids, trained with one
    seed, judged on the validation split."""

    seed: int
    """One of the profile's seeds; its SFT and reward models are the start."""
    together: list[list[str]] = Field(default_factory=list)
    """Groups of methods that are compared for one difference alone, and so share one choice (``choose``)."""
    reward_models: dict[RewardModel, Grid] = Field(default_factory=dict)
    """Grids of reward models, which a stage of their own tries. Methods are searched with the reward models of the
    pipeline, so these are to be chosen, entered and trained before them."""


@dataclass(frozen=True)
class Candidate:
    """One point of the grid of a method or of a reward model, which ``method`` names then."""

    method: str
    number: int
    changes: dict[str, Any]

    @property
    def parameters(self) -> str:
        """The changes as text: ``key=value``, in the order of the grid."""
        return "; ".join(f"{key}={value}" for key, value in self.changes.items())


def metrics_folder(profile: Profile, study: str) -> Path:
    """Where the judged variants of a study are."""
    results = profile.sweeps if study in profile.params.get("sweeps", {}) else profile.results
    return results / "metrics" / "studies" / study


def get_study(profile: Profile, name: str) -> Study:
    """A study of the profile, from its sections ``studies`` and ``sweeps`` (those of the second pipeline).

    Raises:
        ConfigError: there is none of that name, or a variant names no method.
    """
    studies = {**profile.params.get("studies", {}), **profile.params.get("sweeps", {})}
    if name not in studies:
        raise ConfigError(f"{profile.file}: studies: unknown study {name!r}; expected one of {', '.join(studies)}")
    study = parse_section(studies[name], Study, f"{profile.file}: studies.{name}")
    for key, variant in study.variants.items():
        if variant.method is None and study.method is None:
            raise ConfigError(f"{profile.file}: studies.{name}.variants.{key}: neither it nor the study names a method")
    return study


def search_section(profile: Profile) -> SearchSection:
    """The ``search`` section; ConfigError unless its seed is one of the profile's, and the methods of each group of
    ``together`` have a grid, the same."""
    config = profile.section("search", SearchSection)
    if config.seed not in profile.seeds:
        raise ConfigError(
            f"{profile.file}: search.seed: expected one of the seeds {profile.seeds}, found {config.seed}"
        )
    methods = profile.params.get("methods", {})
    for group in config.together:
        grids = [searched_keys(methods.get(method, {})) for method in group]
        for method, grid in zip(group, grids, strict=True):
            if not grid or grid != grids[0]:
                raise ConfigError(
                    f"{profile.file}: search.together: expected methods with the same `search` grid, found {group}; "
                    f"{method!r} has {'another' if grid else 'none or is no method'}; change its grid or the group"
                )
    return config


def searched_keys(entry: dict[str, Any]) -> Any:
    """The grid of a method's entry: lists of values by dotted key; empty where it has none."""
    return entry.get("search", {})


def candidates(profile: Profile) -> list[Candidate]:
    """Every point of the grid of every method that has one, in the order of the profile.

    Raises:
        ConfigError: no method has a grid, or a grid is not lists by dotted key.
    """
    found: list[Candidate] = []
    for method, entry in profile.params.get("methods", {}).items():
        grid = searched_keys(entry)
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise ConfigError(
                f"{profile.file}: methods.{method}.search: expected lists of values by key, found {grid!r}"
            )
        found += _points(method, grid)
    if not found:
        raise ConfigError(f"{profile.file}: methods: no method has a `search` grid")
    return found


def reward_candidates(profile: Profile) -> list[Candidate]:
    """Every point of the grids of reward models (``search.reward_models``), in the order of the profile.

    Raises:
        ConfigError: there is no grid.
    """
    grids = search_section(profile).reward_models
    if not grids:
        raise ConfigError(f"{profile.file}: search.reward_models: expected a grid for a reward model, found none")
    return [candidate for model, grid in grids.items() for candidate in _points(model, grid)]


def _points(name: str, grid: Grid) -> list[Candidate]:
    points = itertools.product(*grid.values()) if grid else []
    return [Candidate(name, number, dict(zip(grid, point, strict=True))) for number, point in enumerate(points)]


def choose(wins: dict[str, list[float]], together: Sequence[Sequence[str]] = ()) -> dict[str, int]:
    """The number of each method's candidate with the highest win rate, the first of equals; methods of one group share
    the candidate with the highest mean over them.

    Args:
        wins: of each method, the win rate of every candidate in their order.
        together: groups of methods with the same grid; a method that is in none is a group by itself.
    """
    grouped = {method for group in together for method in group}
    chosen = {}
    for group in [*together, *([method] for method in wins if method not in grouped)]:
        means = [sum(values) / len(group) for values in zip(*(wins[method] for method in group), strict=True)]
        chosen |= dict.fromkeys(group, means.index(max(means)))
    return chosen


def edits_file(profile: Profile, study: str, variant: str) -> Path:
    """Where the training edits of a variant with an annotator of its own are."""
    return profile.data / "studies" / f"{study}-edits" / f"{variant}.jsonl"
