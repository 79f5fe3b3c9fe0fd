"""The profile's settings by use, as files that stages depend on instead of the whole profile."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from fgalign.config import Profile
from fgalign.errors import ConfigError
from fgalign.io import write_json
from fgalign.report.config import STUDIES
from fgalign.study import Grid, SearchSection, searched_keys

SHOWN = ("seeds", "report", "evaluation", "methods", "token_models", "studies", "sweeps", "search")
"""Sections of a profile that tables and figures read: seeds, titles, which rows there are, how many prompts."""
EVALUATED = ("evaluation", "seeds", "runtime")
"""Sections that sampling and judging read. A file of their own: so many stages sample and judge that parsing the whole
profile for each took half a second of every `dvc repro`."""
RECIPE = "recipe.json"


def write_settings(profile: Profile) -> list[Path]:
    """Write into ``data/<profile>``: ``evaluation.json``, what answers are sampled and judged with; ``settings.json``,
    what tables and figures show; ``recipe.json``, everything, for the paper and for the parameters of the other stages,
    which DVC reads from it; ``search.json``, what the hyperparameter search starts from, without the values that it is
    to choose: entering its choice does not make it run again; and the same for that of reward models,
    ``search_rewards.json``, empty where none has a grid. Returns their paths.

    Raises:
        ConfigError: a study that no table shows, or a ``search`` section that is none; nothing is written, and nothing
            is trained for it.
    """
    params = profile.params
    search = params.get("search") or {}
    grids = profile.section("search", SearchSection).reward_models if search else {}
    known = (*STUDIES, "overoptimisation")
    for section in ("studies", "sweeps"):
        for name in params.get(section) or {}:
            if name not in known:
                raise ConfigError(
                    f"{profile.file}: {section}.{name}: no table shows a study of this name; expected one of "
                    f"{', '.join(known)}, or add it to STUDIES and TABLES (docs/adding-a-method.md)"
                )

    def sections(names: tuple[str, ...]) -> dict[str, Any]:
        return {key: params[key] for key in names if key in params}

    contents = {
        "evaluation.json": sections(EVALUATED),
        "settings.json": sections(SHOWN),
        RECIPE: params,
    }
    contents["search.json"] = without_choices(sections(("runtime", "methods")), {})
    if "search" in params:
        contents["search.json"]["search"] = {key: search[key] for key in search if key != "reward_models"}
    contents["search_rewards.json"] = {}
    if grids:
        own = {key: search[key] for key in ("seed", "reward_models")}
        contents["search_rewards.json"] = without_choices(sections(("runtime", *grids)), grids) | {"search": own}
    for name, content in contents.items():
        write_json(profile.data / name, content)
    return [profile.data / name for name in contents]


def without_choices(params: dict[str, Any], reward_grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The parameters without those values that the grid of a method or of a reward model replaces, without methods that
    have no grid, and without learning curves, which the search does not record.

    Args:
        params: sections of a profile, those of the reward models in ``reward_grids`` among them.
        reward_grids: values to try by dotted key, by reward model.
    """
    params = deepcopy(params)
    methods = params.get("methods", {})
    if "methods" in params:
        params["methods"] = methods = {name: entry for name, entry in methods.items() if searched_keys(entry)}
    for entry in methods.values():
        entry.pop("curve", None)
    grids = [(entry, searched_keys(entry)) for entry in methods.values()]
    grids += [(params[name], grid) for name, grid in reward_grids.items() if name in params]
    for entry, grid in grids:
        for dotted in grid:
            *path, last = dotted.split(".")
            section = entry
            for key in path:
                section = section.get(key, {})
            section.pop(last, None)
    return params
