"""Raw preference data: one file a source, each a function ``build(config, root) -> RawData``; the table below is the
whole registry.

A source says what the world gives: prompts, demonstrations, preferences between responses, human corrections where
there are any, and, kept apart for evaluation, the truth. It splits by prompt. To add one: a file here, a line in
``SOURCES``, its name in the profile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from fgalign.config import Section
from fgalign.core.raw_data import RawData
from fgalign.errors import ConfigError

SOURCES: dict[str, str] = {
    "simulator": "fgalign.sources.simulator",
    "qa_feedback": "fgalign.sources.qa_feedback",
    "alpaca_farm": "fgalign.sources.alpaca_farm",
    "spa": "fgalign.sources.spa",
    "hh_rlhf": "fgalign.sources.hh_rlhf",
    "preference_dataset": "fgalign.sources.preference_dataset",
    "edit_dataset": "fgalign.sources.edit_dataset",
}
"""Name of a source (``source.name`` in a profile) to the module that builds it."""


class Source(NamedTuple):
    """A source of raw data: ``build(config, root)``, where ``root`` is the folder that relative paths start from, and
    the type of its configuration."""

    build: Callable[[Any, Path], RawData]
    config: type[Section]


def get_source(name: str) -> Source:
    """A source by name, imported only when asked for; its configuration is of the type that ``build`` says it takes.

    Raises:
        ConfigError: no source has that name.
    """
    if name not in SOURCES:
        raise ConfigError(f"source.name: unknown source {name!r}; expected one of {', '.join(SOURCES)}")
    build = importlib.import_module(SOURCES[name]).build
    return Source(build, get_type_hints(build)["config"])
