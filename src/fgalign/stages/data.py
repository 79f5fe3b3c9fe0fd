"""Stages before any model: raw data, minimal edits, token labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

from pydantic import ConfigDict

from fgalign.annotate import Annotator, get_annotator
from fgalign.config import Profile, Section, parse_section
from fgalign.core.raw_data import read_split, write_raw
from fgalign.core.schema import SPLITS, Edit, read_records, write_records
from fgalign.errors import ConfigError, InputError
from fgalign.io import atomic_dir, write_json
from fgalign.labels import LabelConfig, label_edits, label_statistics, with_tokens_changed
from fgalign.llm import SPENT_FILE
from fgalign.sources import Source, get_source
from fgalign.tracking import Run, track

T = TypeVar("T")


class NamedSection(Section):
    """A section that names a source or an annotator; its other keys are that one's own configuration."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


def run_raw(profile: Profile) -> None:
    """raw: the source writes ``data/<profile>/raw`` (for training) and ``data/<profile>/gold`` (evaluation only)."""
    source, config = source_config(profile)
    data = source.build(config, profile.root)
    with atomic_dir(profile.data / "raw") as raw, atomic_dir(profile.data / "gold") as gold:
        write_raw(data, raw, gold)
    for split in SPLITS:
        part = data.splits[split]
        counts = {kind: len(records) for kind, records in vars(part).items() if records}
        print(f"{split}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def run_edits(profile: Profile) -> None:
    """edits: the annotator minimally edits responses; ``data/<profile>/edits/<split>.jsonl``. What a language model
    took for each split is in ``llm_usage.json`` there, and what it used in this run is tracked."""
    annotator, config = annotator_config(profile)
    if annotator.check is not None:
        for split in SPLITS:
            annotator.check(read_split(profile.data / "raw" / split), config, split)
    tracked = nullcontext(Run()) if annotator.asked is None else track(profile, "edits", None, config.model_dump())
    with atomic_dir(profile.data / "edits") as folder, tracked as run:
        for split in SPLITS:
            edits = annotator.annotate(read_split(profile.data / "raw" / split), config, split)
            if annotator.asked is not None:
                run.log({f"{split}/{key}": value for key, value in annotator.asked[split].counts().items()})
            if not edits:
                name = profile.params["annotator"]["name"]
                raise InputError(f"edits: the annotator {name!r} made none for the {split} split; check its section")
            write_records(folder / f"{split}.jsonl", edits)
            print(f"{split}: {len(edits)} edits")
        if annotator.asked is not None:
            write_json(folder / SPENT_FILE, {split: llm.spent() for split, llm in annotator.asked.items()})


def run_labels(profile: Profile) -> None:
    """labels: token labels of the training and validation edits, and statistics of all three splits' labels."""
    from fgalign.core.modeling import load_tokenizer

    config = profile.section("labels", LabelConfig)
    tokenizer = load_tokenizer(profile.data / "models" / "base")
    statistics = {}
    with atomic_dir(profile.data / "labels") as folder, track(profile, "labels", None, config.model_dump()) as run:
        for split in ("train", "validation"):
            edits = read_records(profile.data / "edits" / f"{split}.jsonl", Edit)
            pairs = label_edits(tokenizer, with_tokens_changed(tokenizer, edits, split), config)
            write_records(folder / f"{split}.jsonl", pairs)
            statistics[split] = label_statistics(pairs)
            run.log({f"{split}/{name}": value for name, value in statistics[split].items()})
            print(f"{split}: " + ", ".join(f"{name} {value:.3g}" for name, value in statistics[split].items()))
    write_json(profile.results / "metrics" / "label_statistics.json", statistics)


def run_study_edits(profile: Profile, name: str) -> None:
    """study_edits: training edits of the variants of a study whose annotator differs;
    ``data/<profile>/studies/<study>-edits/<variant>.jsonl``, and ``<variant>.llm_usage.json`` where a language model
    made them."""
    from fgalign.study import edits_file, get_study

    study = get_study(profile, name)
    split = read_split(profile.data / "raw" / "train")
    with atomic_dir(edits_file(profile, name, "").parent) as folder:
        for key, variant in study.variants.items():
            if variant.annotator:
                where = f"studies.{name}.variants.{key}.annotator"
                annotator, config = annotator_config(profile, variant.annotator, where)
                count = write_records(folder / f"{key}.jsonl", annotator.annotate(split, config, "train"))
                print(f"{key}: {count} edits")
                if annotator.asked is not None:
                    write_json(folder / f"{key}.{SPENT_FILE}", annotator.asked["train"].spent())


def source_config(profile: Profile) -> tuple[Source, Section]:
    """The profile's source and its configuration.

    Raises:
        ConfigError: no such source, or a key or value that it does not take.
    """
    source, options = _named(profile, "source", get_source)
    return source, parse_section(options, source.config, f"{profile.file}: source")


def annotator_config(
    profile: Profile, changes: Mapping[str, Any] | None = None, key: str = "annotator"
) -> tuple[Annotator, Section]:
    """The profile's annotator and its configuration; ``changes``, which stand under ``key``, replace values of it.

    Raises:
        ConfigError: no such annotator, or a key or value that it does not take.
    """
    annotator, options = _named(profile, "annotator", get_annotator)
    return annotator, parse_section({**options, **(changes or {})}, annotator.config, f"{profile.file}: {key}")


def _named(profile: Profile, key: str, get: Callable[[str], T]) -> tuple[T, dict[str, Any]]:
    """What a section names and the section's other keys."""
    section = profile.section(key, NamedSection)
    try:
        return get(section.name), section.model_extra or {}
    except ConfigError as error:
        raise ConfigError(f"{profile.file}: {error}") from None
