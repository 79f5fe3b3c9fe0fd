"""Profiles: one ``params.yaml`` a profile, read into closed sections.

A profile is a folder with a ``params.yaml`` (the default profile's lies at the top of the repository, where DVC looks
for it; the others in ``reproduce/profiles/<name>/``). A section is a pydantic model that the code using it declares;
an unknown or ill-typed key is one error that names file and key.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fgalign.errors import ConfigError

DEFAULT_PROFILE = "mini"
KEYS = (
    "profile", "root", "params_file", "seeds", "runtime", "source", "annotator", "labels", "base_model", "sft",
    "rm_preference", "rm_edit", "rm_token", "token_models", "needed_token_models", "methods", "studies", "sweeps",
    "search", "evaluation", "judge_models", "other_judges", "judge_tables", "edit_likelihood", "benchmarks", "report",
    "world", "papers", "plan",
)  # fmt: skip
"""Everything that a profile may have at its top."""
NAMED = ("methods", "token_models", "studies", "sweeps", "judge_models", "other_judges")
"""Of those, the ones that hold a section under each name."""
SECRETS = ("key", "apikey", "secret", "password", "authorization", "auth", "headers")
"""Last words of a name under which a secret stands; ``token`` is one too where a text stands behind it."""
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""What names an environment variable."""


class Section(BaseModel):
    """Base of all configuration sections: closed, immutable; a public default is a documented choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Profile:
    """One profile: its name, the repository's root and the parameters as read."""

    name: str
    root: Path
    params: dict[str, Any]
    file: Path

    def section(self, key: str, kind: type[S], changes: Mapping[str, Any] | None = None) -> S:
        """Parse one top-level section; ``changes`` replace values of it by dotted key.

        Raises:
            ConfigError: the section is missing, or a key in it is unknown or ill-typed.
        """
        if key not in self.params:
            raise ConfigError(f"{self.file}: section `{key}` is missing; expected {', '.join(kind.model_fields)}")
        return parse_section(changed(self.params[key], changes), kind, f"{self.file}: {key}")

    @property
    def seeds(self) -> list[int]:
        """The training seeds, at least one, all different."""
        seeds = self.params.get("seeds")
        integers = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        if not integers or len(set(seeds)) != len(seeds):
            raise ConfigError(
                f"{self.file}: seeds: expected a list of different integers from 0 to 2**32 - 1, found {seeds!r}"
            )
        return seeds

    @property
    def data(self) -> Path:
        """Records and models of this profile (held by DVC, not by git)."""
        return self.root / "data" / self.name

    def models(self, name: str) -> Path:
        """Folder of a model's seeds; a token model that no method needs belongs to the second pipeline."""
        later = set(self.params.get("token_models") or {}) - set(self.params.get("needed_token_models") or [])
        return (self.data / "sweeps" if name in later else self.data) / "models" / name

    def model_folder(self, name: str, seed: int = 0) -> Path:
        """Folder of a trained model; the base model has no seeds."""
        folder = self.models(name)
        return folder if name == "base" else folder / f"seed-{seed}"

    @property
    def results(self) -> Path:
        """Metrics, tables and figures of this profile (small text and pictures, held by git)."""
        return self.root / "results" / self.name

    @property
    def sweeps(self) -> Path:
        """Results of the second pipeline (``reproduce/sweeps``), apart because the first must not wait for them."""
        return self.results / "sweeps"


def parse_section(value: Any, kind: type[S], where: str) -> S:
    """Validate one mapping as a section; ``where`` starts the message of the ConfigError. Of several errors an unknown
    key is named first: a key with a slip in it is often missing under its own name too."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        *parents, last = first["loc"] or ("(section)",)
        key = ".".join(map(str, (*parents, last)))
        # What stands under an unknown key may be a secret, and a section's own check says what it found.
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}.{key}: {no_such_key(last, _inner(kind, parents).model_fields)}") from None
        found = "" if first["type"] in ("missing", "value_error") else f", found {first.get('input')!r}"
        raise ConfigError(f"{where}.{key}: {first['msg']}{found}") from None


def no_such_key(key: object, known: Iterable[str]) -> str:
    """What an error says of a key that nothing reads: the known key that looks like it, or all of them."""
    known = list(known)
    close = get_close_matches(str(key), known, 1)
    return f"no such key; did you mean {close[0]}?" if close else f"no such key; known keys: {', '.join(known)}"


def changed(section: Any, changes: Mapping[str, Any] | None) -> Any:
    """A copy of a section with other values; ``changes`` are by dotted key."""
    section = copy.deepcopy(section)
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        inner = section
        for parent in parents:
            inner = inner.setdefault(parent, {}) if isinstance(inner, dict) else {}
        inner[last] = value
    return section


def _inner(kind: type[BaseModel], keys: Sequence[int | str]) -> type[BaseModel]:
    """The section below ``kind`` at the end of ``keys``, through unions such as ``Section | None``."""
    for key in keys:
        if key in kind.model_fields:
            annotation = kind.model_fields[key].annotation
            models = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
            kind = next((part for part in models if issubclass(part, BaseModel)), kind)
    return kind


def _refuse_secrets(value: Any, where: str) -> None:
    """Raise ConfigError, without the value, where a secret seems to stand under a name such as ``api_key``, as
    ``key_variable`` or in an address: what a profile holds is copied into files, tables and tracked runs."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        last = re.split(r"[^a-z]+", str(name).lower())[-1]
        if name == "key_variable":
            secret = isinstance(inner, str) and not VARIABLE.fullmatch(inner)
        elif name == "base_url":
            secret = isinstance(inner, str) and bool(re.search(r"//[^/]*@|[?#]", inner))
        else:
            secret = isinstance(inner, str | list | dict) and last in SECRETS
            secret |= isinstance(inner, str) and last == "token"
        if secret:
            raise ConfigError(
                f"{where}: {name}: a secret must not stand in a profile: export it as an environment variable, whose "
                "name (capitals, digits and _) an LLM's section takes as `key_variable`"
            )
        _refuse_secrets(inner, f"{where}: {name}")


def _refuse_repeated(node: Any, path: Path, seen: set[int] | None = None) -> None:
    """Raise ConfigError where a section of a YAML tree has a key twice, of which YAML silently takes the last."""
    seen = set() if seen is None else seen
    if not isinstance(getattr(node, "value", None), list) or id(node) in seen:  # an anchor's section stands repeatedly
        return
    seen.add(id(node))
    pairs = [pair if isinstance(pair, tuple) else (None, pair) for pair in node.value]
    names = [key.value for key, _ in pairs if key is not None and isinstance(key.value, str)]
    for key, inner in pairs:
        if key is not None and names.count(key.value) > 1:
            last = max(other.start_mark.line for other, _ in pairs if other.value == key.value)
            raise ConfigError(
                f"{path}:{last + 1}: the key {key.value!r} stands twice in this section; keep one of them"
            )
        _refuse_repeated(inner, path, seen)


def _check_keys(params: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for a top-level key that nothing reads, and for a section that cannot hold what it has to."""
    for key, value in params.items():
        if key not in KEYS:
            raise ConfigError(f"{path}: {key}: {no_such_key(key, KEYS)}")
        if key in ("base_model", "methods") and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key}: expected a section, found {value!r}")
        if key in NAMED and value is not None:
            inner = value.values() if isinstance(value, dict) else [value]
            wrong = [section for section in inner if not isinstance(section, dict)]
            if wrong:
                raise ConfigError(f"{path}: {key}: expected a section under each name, found {wrong[0]!r}")


def find_root(start: Path | None = None) -> Path:
    """The repository's root: the nearest folder at or above ``start`` (default: here) with ``dvc.yaml`` and ``src``."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists() and (folder / "src" / "fgalign").exists():
            return folder
    raise ConfigError(f"{here}: not inside the fgalign repository (no folder at or above it holds dvc.yaml and src)")


def profile_file(root: Path, name: str) -> Path:
    """Path of the ``params.yaml`` of a profile."""
    return root / "params.yaml" if name == DEFAULT_PROFILE else root / "reproduce" / "profiles" / name / "params.yaml"


def known_profiles(root: Path) -> list[str]:
    """Names of the profiles that the repository holds."""
    others = sorted(path.parent.name for path in (root / "reproduce" / "profiles").glob("*/params.yaml"))
    return [DEFAULT_PROFILE, *others]


def load_profile(name: str | None = None, root: Path | None = None) -> Profile:
    """Load a profile by name; without one, that of the environment variable ``FGALIGN_PROFILE``, or ``mini``.

    Raises:
        ConfigError: no such profile, or its file is not YAML, has a key twice or an unknown one, or a secret in it.
    """
    import yaml

    root = root or find_root()
    name = name or os.environ.get("FGALIGN_PROFILE") or DEFAULT_PROFILE
    path = profile_file(root, name)
    if not path.exists():
        raise ConfigError(f"unknown profile {name!r}; expected one of {', '.join(known_profiles(root))}")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        tree = loader.get_single_node()
        _refuse_repeated(tree, path)
        params = loader.construct_document(tree) if tree is not None else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    found = params.get("profile") if isinstance(params, dict) else params
    if found != name:
        raise ConfigError(f"{path}: profile: expected {name!r}, found {found!r}")
    _refuse_secrets(params, str(path))
    _check_keys(params, path)
    return Profile(name=name, root=root, params=params, file=path)
