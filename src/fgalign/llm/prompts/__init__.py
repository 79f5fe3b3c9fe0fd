"""Prompts for language models, one Markdown file each: placeholders ``{{name}}``, and a leading comment not sent."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fgalign.errors import ConfigError

_COMMENT = re.compile(r"\A\s*<!--.*?-->\s*", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


class Prompt:
    """A prompt with placeholders.

    ``name`` is the name of a file of this folder without ``.md``; ``path`` another file to read in its place.
    ``fields`` are the placeholders that the file has to have, each at least once, and no others.

    Raises:
        ConfigError: the file is missing or not text, or its placeholders are not ``fields``.
    """

    def __init__(self, name: str, fields: Iterable[str], path: str | Path | None = None) -> None:
        file = Path(path) if path is not None else Path(__file__).with_name(f"{name}.md")
        if not file.is_file():
            raise ConfigError(f"{file}: no such prompt file; expected one with the placeholders {_listed(fields)}")
        try:
            self.text = _COMMENT.sub("", file.read_text(encoding="utf-8-sig")).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: expected a prompt file in UTF-8, found {error}; save it as UTF-8") from None
        found = set(_PLACEHOLDER.findall(self.text))
        if found != set(fields):
            raise ConfigError(f"{file}: expected the placeholders {_listed(fields)}, found {_listed(found) or 'none'}")

    def fill(self, **values: str) -> str:
        """The prompt with its placeholders replaced; what looks like a placeholder inside a value stays as it is."""
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)


def _listed(names: Iterable[str]) -> str:
    return ", ".join("{{" + name + "}}" for name in sorted(names))
