"""Studies and the hyperparameter search: many variants of the profile's methods, trained side by side in one stage.

A study varies one thing at a time and trains every variant with every seed. Its models are kept until they are judged
(``stages.compare``); like every training stage it reads neither the test split nor the truth.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgalign.config import Profile, Section
from fgalign.context import Context
from fgalign.core.modeling import RuntimeConfig, seed_everything, seed_workers, set_up
from fgalign.core.schema import Edit, read_records, write_records
from fgalign.errors import ConfigError, InputError
from fgalign.labels import LabelConfig, label_edits, with_tokens_changed
from fgalign.stages.train import align, method_config, reward_config, train_parts, train_reward_model
from fgalign.study import Candidate, candidates, edits_file, get_study, reward_candidates, search_section
from fgalign.tracking import track

LEARNED_FROM_EDITS = ("rm_edit", "rm_token")
"""Reward models that other edits change, beside those of the section ``token_models``."""


def run_study(profile: Profile, name: str) -> None:
    """study: train every variant with every seed; ``data/<profile>/studies/<study>/<variant>/seed-<s>``.

    A variant that changes nothing is the method itself: its models are those of the method's own stage.

    Raises:
        InputError: such a variant, and the method is not trained.
        ConfigError: a variant that cannot be trained; none is.
    """
    study = get_study(profile, name)
    configs = {}
    for key, variant in study.variants.items():
        method = variant.method or study.method
        _, configs[key] = method_config(profile, method, variant.change)
        if variant.annotator and profile.params["methods"][method]["kind"] == "best_of_n":
            raise ConfigError(
                f"{profile.file}: studies.{name}.variants.{key}.annotator: expected none with a method of kind "
                "best_of_n, which chooses answers by the pipeline's reward model whatever the edits; drop the variant"
            )
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)

    def train(item: tuple[str, int], out: Path) -> set[Path]:
        key, seed = item
        variant = study.variants[key]
        method = variant.method or study.method
        if variant.same:
            trained = profile.model_folder(method, seed)
            if not trained.is_dir():
                raise InputError(f"{trained}: no such model; train it first: dvc repro align@{method}")
            with track(profile, f"study@{name}/{key}", seed, {"models": method}):
                shutil.copytree(trained, out, dirs_exist_ok=True)
            return {trained}
        seed_everything(seed)
        with (
            tempfile.TemporaryDirectory() as scratch,
            track(profile, f"study@{name}/{key}", seed, variant.model_dump()) as run,
        ):
            overlay = Path(scratch)
            context = Context(profile, f"{name}/{key}", seed, device, runtime, out, run, overlay=overlay)
            made_from = set()
            if variant.annotator:
                made_from.add(edits_file(profile, name, key))
                _learn_from(read_records(edits_file(profile, name, key), Edit), context, configs[key])
            align(context, method, variant.change)
        return made_from | {path for path in context.inputs if overlay not in path.parents}

    named = {f"{key}/seed-{seed}": (key, seed) for key in study.variants for seed in profile.seeds}
    target = profile.data / "studies" / name
    train_parts(profile, f"study@{name}", named, target, train, seed_workers(runtime, device), device)


def run_search(profile: Profile) -> None:
    """search: train every candidate of the methods' grids; ``data/<profile>/search/<method>/<number>``.

    Raises:
        ConfigError: a candidate that cannot be trained; none is.
    """

    def values(candidate: Candidate) -> dict[str, Any]:
        # It is judged by its answers when it is trained: it needs no learning curve.
        entry = profile.params["methods"][candidate.method]
        return {**candidate.changes, **({"curve.prompts": 0} if "curve" in entry else {})}

    grid = candidates(profile)
    for candidate in grid:
        method_config(profile, candidate.method, values(candidate))
    _search(profile, "search", grid, lambda context, point: align(context, point.method, values(point)))


def run_search_rewards(profile: Profile) -> None:
    """search_rewards: train every candidate of the reward models' grids;
    ``data/<profile>/search_rewards/<model>/<number>``.

    Raises:
        ConfigError: a candidate that cannot be trained; none is.
    """
    grid = reward_candidates(profile)
    for candidate in grid:
        reward_config(profile, candidate.method, candidate.changes)

    def train(context: Context, candidate: Candidate) -> None:
        train_reward_model(context, candidate.method, candidate.changes)

    _search(profile, "search_rewards", grid, train)


def _search(
    profile: Profile, name: str, grid: Sequence[Candidate], train: Callable[[Context, Candidate], None]
) -> None:
    """Train every candidate with the seed of the search."""
    seed = search_section(profile).seed
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)

    def one(candidate: Candidate, out: Path) -> set[Path]:
        seed_everything(seed)
        title = f"search/{candidate.method}/{candidate.number}"
        with track(profile, title, seed, candidate.changes) as run:
            context = Context(profile, title, seed, device, runtime, out, run)
            train(context, candidate)
        return context.inputs

    items = {f"{candidate.method}/{candidate.number}": candidate for candidate in grid}
    train_parts(profile, name, items, profile.data / name, one, seed_workers(runtime, device), device)


def _learn_from(edits: list[Edit], context: Context, config: Section) -> None:
    """Put labels of these edits, and the reward models that the method reads trained on them, over those of the
    pipeline."""
    profile, overlay = context.profile, context.overlay
    assert overlay is not None
    edits = with_tokens_changed(context.tokenizer, edits, context.stage)
    pairs = label_edits(context.tokenizer, edits, profile.section("labels", LabelConfig))
    write_records(overlay / "labels" / "train.jsonl", pairs)
    write_records(overlay / "edits" / "train.jsonl", edits)
    changed = {*LEARNED_FROM_EDITS, *(profile.params.get("token_models") or {})}
    for name in dict.fromkeys(getattr(config, field, None) for field in ("needs", "scorer")):
        if name in changed:
            out = overlay / "models" / name
            out.mkdir(parents=True)
            train_reward_model(replace(context, stage=f"{context.stage}/{name}", out=out), name)
