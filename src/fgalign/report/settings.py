"""The settings that tables and figures show, as one file that their stages depend on."""

from __future__ import annotations

from pathlib import Path

from fgalign.config import Profile
from fgalign.io import write_json

SHOWN = ("seeds", "report", "methods", "token_models", "studies", "sweeps", "search")
"""Sections of a profile that the report reads: seeds, titles, which rows there are."""


def write_settings(profile: Profile) -> Path:
    """Write ``data/<profile>/settings.json``; returns its path."""
    path = profile.data / "settings.json"
    write_json(path, {key: profile.params[key] for key in SHOWN if key in profile.params})
    return path
