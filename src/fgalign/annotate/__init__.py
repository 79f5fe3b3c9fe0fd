"""Minimal editing: one file an annotator, each a function ``annotate(split, config, split_name) -> list[Edit]``.

An annotator gets one split of the raw data and returns edits; responses that it leaves unchanged are not returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fgalign.config import Section
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Edit, Split
from fgalign.errors import ConfigError

if TYPE_CHECKING:
    from fgalign.llm import LLM


class Annotator(NamedTuple):
    """An annotator: ``annotate(split, config, split_name)``, the type of its configuration and, where edits cost
    something, ``check`` with the same arguments: it raises for a split that cannot be edited and edits nothing.
    ``asked`` holds the language model that edited a split last, by the split's name; None where none edits."""

    annotate: Callable[[RawSplit, Any, Split], list[Edit]]
    config: type[Section]
    check: Callable[[RawSplit, Any, Split], object] | None = None
    asked: Mapping[str, LLM] | None = None


def get_annotator(name: str) -> Annotator:
    """An annotator by name, imported only when asked for.

    Raises:
        ConfigError: no annotator has that name.
    """
    if name == "simulated":
        from fgalign.annotate.simulated import SimulatedConfig, annotate

        return Annotator(annotate, SimulatedConfig)
    if name == "replay":
        from fgalign.annotate.replay import ReplayConfig
        from fgalign.annotate.replay import annotate as replay

        return Annotator(replay, ReplayConfig)
    if name == "llm":
        from fgalign.annotate.llm import LLMAnnotatorConfig, to_edit
        from fgalign.annotate.llm import annotate as ask_llm

        asked: dict[str, LLM] = {}
        return Annotator(partial(ask_llm, asked=asked), LLMAnnotatorConfig, to_edit, asked)
    raise ConfigError(f"annotator.name: unknown annotator {name!r}; expected simulated, replay or llm")
