"""Raw preference data: one file a source, each a function ``build(config, root) -> RawData``.

A source says what the world gives: prompts, demonstrations, preferences between responses, human corrections where
there are any, and, kept apart for evaluation, the truth. It splits by prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fgalign.config import Section
from fgalign.core.raw_data import RawData
from fgalign.errors import ConfigError

SOURCES = ("simulator", "qa_feedback", "alpaca_farm", "spa", "hh_rlhf", "preference_dataset")


class Source(NamedTuple):
    """A source of raw data: ``build(config, root)``, where ``root`` is the folder that relative paths start from, and
    the type of its configuration."""

    build: Callable[[Any, Path], RawData]
    config: type[Section]


def get_source(name: str) -> Source:
    """A source by name, imported only when asked for.

    Raises:
        ConfigError: no source has that name.
    """
    if name == "simulator":
        from fgalign.sources.simulator import SimulatorConfig, build

        return Source(build, SimulatorConfig)
    if name == "qa_feedback":
        from fgalign.sources.qa_feedback import QAFeedbackConfig
        from fgalign.sources.qa_feedback import build as build_qa

        return Source(build_qa, QAFeedbackConfig)
    if name == "alpaca_farm":
        from fgalign.sources.alpaca_farm import AlpacaFarmConfig
        from fgalign.sources.alpaca_farm import build as build_alpaca_farm

        return Source(build_alpaca_farm, AlpacaFarmConfig)
    if name == "spa":
        from fgalign.sources.spa import SPAConfig
        from fgalign.sources.spa import build as build_spa

        return Source(build_spa, SPAConfig)
    if name == "hh_rlhf":
        from fgalign.sources.hh_rlhf import HHRLHFConfig
        from fgalign.sources.hh_rlhf import build as build_hh_rlhf

        return Source(build_hh_rlhf, HHRLHFConfig)
    if name == "preference_dataset":
        from fgalign.sources.preference_dataset import PreferenceDatasetConfig
        from fgalign.sources.preference_dataset import build as build_preference_dataset

        return Source(build_preference_dataset, PreferenceDatasetConfig)
    raise ConfigError(f"source.name: unknown source {name!r}; expected one of {', '.join(SOURCES)}")
