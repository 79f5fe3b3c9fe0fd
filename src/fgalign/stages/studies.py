"""Studies and the hyperparameter search: many variants of the profile's methods, trained side by side in one stage.

A study varies one thing at a time and trains every variant with every seed. Its models are kept until they are judged
(``stages.compare``); like every training stage it reads neither the test split nor the truth.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from fgalign.config import Profile
from fgalign.context import Context
from fgalign.core.modeling import RuntimeConfig, release_memory, seed_everything, seed_workers, set_up
from fgalign.core.schema import Edit, read_records, write_records
from fgalign.errors import InputError
from fgalign.io import atomic_dir
from fgalign.labels import LabelConfig, label_edits, with_tokens_changed
from fgalign.parallel import each_seed
from fgalign.stages.train import align, train_reward_model
from fgalign.study import Candidate, candidates, edits_file, get_study, reward_candidates, search_section
from fgalign.tracking import track

LEARNED_FROM_EDITS = ("rm_edit", "rm_token")
"""Reward models that other edits change."""


def run_study(profile: Profile, name: str) -> None:
    """study: train every variant with every seed; ``data/<profile>/studies/<study>/<variant>/seed-<s>``.

    A variant that changes nothing is the method itself: its models are those of the method's own stage.

    Raises:
        InputError: such a variant, and the method is not trained.
    """
    study = get_study(profile, name)
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    with atomic_dir(profile.data / "studies" / name) as folder:

        def one(item: tuple[str, int]) -> None:
            key, seed = item
            variant = study.variants[key]
            method = variant.method or study.method
            out = folder / key / f"seed-{seed}"
            if variant.same:
                trained = profile.model_folder(method, seed)
                if not trained.is_dir():
                    raise InputError(f"{trained}: no such model; train it first: dvc repro align@{method}")
                with track(profile, f"study@{name}/{key}", seed, {"models": method}):
                    shutil.copytree(trained, out)
                return
            out.mkdir(parents=True)
            seed_everything(seed)
            with (
                tempfile.TemporaryDirectory() as scratch,
                track(profile, f"study@{name}/{key}", seed, variant.model_dump()) as run,
            ):
                context = Context(profile, f"{name}/{key}", seed, device, runtime, out, run, overlay=Path(scratch))
                if variant.annotator:
                    edits = read_records(edits_file(profile, name, key), Edit)
                    _learn_from(edits, context, method)
                align(context, method, variant.change)
            release_memory(device)

        items = [(key, seed) for key in study.variants for seed in profile.seeds]
        each_seed(items, one, seed_workers(runtime, device))


def run_search(profile: Profile) -> None:
    """search: train every candidate of the grids of methods and of reward models;
    ``data/<profile>/search/<method or model>/<number>``."""
    config = search_section(profile)
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    with atomic_dir(profile.data / "search") as folder:

        def one(candidate: Candidate) -> None:
            out = folder / candidate.method / str(candidate.number)
            out.mkdir(parents=True)
            seed_everything(config.seed)
            title = f"search/{candidate.method}/{candidate.number}"
            with track(profile, title, config.seed, candidate.changes) as run:
                context = Context(profile, title, config.seed, device, runtime, out, run)
                if candidate.method in config.reward_models:
                    train_reward_model(context, candidate.method, candidate.changes)
                else:
                    # It is judged by its answers when it is trained: it needs no learning curve.
                    entry = profile.params["methods"][candidate.method]
                    no_curve = {"curve.prompts": 0} if "curve" in entry else {}
                    align(context, candidate.method, {**candidate.changes, **no_curve})
            release_memory(device)

        each_seed(candidates(profile) + reward_candidates(profile), one, seed_workers(runtime, device))


def _learn_from(edits: list[Edit], context: Context, method: str) -> None:
    """Put labels of these edits, and a reward model trained on them, over those of the pipeline."""
    profile, overlay = context.profile, context.overlay
    assert overlay is not None
    edits = with_tokens_changed(context.tokenizer, edits, context.stage)
    pairs = label_edits(context.tokenizer, edits, profile.section("labels", LabelConfig))
    write_records(overlay / "labels" / "train.jsonl", pairs)
    write_records(overlay / "edits" / "train.jsonl", edits)
    needed = profile.params["methods"][method].get("needs")
    if needed in LEARNED_FROM_EDITS:
        out = overlay / "models" / needed
        out.mkdir(parents=True)
        train_reward_model(replace(context, stage=f"{context.stage}/{needed}", out=out), needed)
