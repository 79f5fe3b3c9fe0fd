"""Raw preference data: one file a source, each a function ``build(config, root) -> RawData``.

A source says what the world gives: prompts, demonstrations, preferences between responses, human corrections where
there are any, and, kept apart for evaluation, the truth. It splits by prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fgalign.config import Section
from fgalign.errors import ConfigError
from fgalign.raw_data import RawData


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
    raise ConfigError(f"source.name: unknown source {name!r}; expected simulator or qa_feedback")
