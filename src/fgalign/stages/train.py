"""Training stages: base model, SFT, reward models, alignment methods; all but the base model train all seeds, in
forked processes where there are cores for them (``parallel.each_seed``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fgalign.config import Profile, Section, changed, parse_section
from fgalign.context import Context
from fgalign.core.modeling import (
    RuntimeConfig,
    check_positions,
    release_memory,
    seed_everything,
    seed_workers,
    set_up,
    use_bf16,
)
from fgalign.core.raw_data import read_split
from fgalign.errors import ConfigError
from fgalign.io import write_json
from fgalign.methods import METHODS, get_method
from fgalign.parallel import each_seed, is_main_process, output_dir
from fgalign.tracking import track
from fgalign.unfinished import stage_parts

T = TypeVar("T")

MODELS = ("base", "sft", "rm_preference", "rm_edit", "rm_token")
"""Models that every profile has, whose folders no other may take."""


def train_seeds(profile: Profile, stage: str, config: Section, train: Callable[[Context], None]) -> None:
    """Run ``train`` for every seed of the profile and put the models of all of them in place together, each with a
    ``budget.json`` of what it has spent (see ``Context.spend``). Seeds that were ready when the stage stopped before
    are not trained again (``fgalign.unfinished``). Processes that `accelerate launch` started train each seed
    together, one after the other."""
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    length, where = getattr(config, "max_length", None), f"{profile.file}: {stage}: max_length"
    check_positions(profile.model_folder("base"), length, where)

    def one(seed: int, out: Path) -> set[Path]:
        seed_everything(seed)
        with track(profile, stage, seed, config.model_dump()) as run:
            context = Context(profile, stage, seed, device, runtime, out, run)
            train(context)
            if context.spent:
                write_json(out / "budget.json", context.spent)
        return context.inputs

    items = {f"seed-{seed}": seed for seed in profile.seeds}
    train_parts(profile, stage, items, profile.models(stage), one, seed_workers(runtime, device), device)


def train_parts(
    profile: Profile,
    stage: str,
    items: Mapping[str, T],
    target: Path,
    train: Callable[[T, Path], set[Path]],
    workers: int,
    device: torch.device,
) -> None:
    """Train every item, by the path of its models within ``target``, side by side. Those that were ready when the stage
    stopped before are not trained again (``fgalign.unfinished``). ``train`` gets an item and a folder for its models,
    and returns what it has read."""
    with stage_parts(profile, stage, list(items), target, str(device)) as parts:

        def one(name: str) -> None:
            out = parts.folder / name
            out.mkdir(parents=True)
            parts.finish(name, train(items[name], out))
            release_memory(device)

        if parts.ready and is_main_process():
            print(f"{stage}: ready since the run that stopped: {', '.join(parts.ready)}", flush=True)
        each_seed([name for name in items if name not in parts.ready], one, workers)


def run_base(profile: Profile) -> None:
    """base: the base model and the tokenizer, ``data/<profile>/models/base``."""
    from fgalign.base_model import (
        PretrainedConfig,
        ScratchConfig,
        build_pretrained,
        build_scratch,
        portable_arithmetic,
    )

    section: Mapping[str, Any] = profile.params.get("base_model", {})
    kinds = {"scratch": ScratchConfig, "pretrained": PretrainedConfig}
    kind = section.get("kind")
    if kind not in kinds:
        raise ConfigError(f"{profile.file}: base_model.kind: expected scratch or pretrained, found {kind!r}")
    config = parse_section(section, kinds[kind], f"{profile.file}: base_model")
    runtime = profile.section("runtime", RuntimeConfig)
    if isinstance(config, ScratchConfig):
        if config.portable:
            portable_arithmetic()
        if config.threads is not None:
            runtime = runtime.model_copy(update={"threads": config.threads})
    device = set_up(runtime)
    with (
        output_dir(profile.model_folder("base")) as out,
        track(profile, "base", None, config.model_dump()) as run,
    ):
        if isinstance(config, PretrainedConfig):
            build_pretrained(config, out)
        else:
            corpus = read_split(profile.data / "raw" / "train").corpus
            build_scratch(config, corpus, out, device=device.type, bf16=use_bf16(runtime, device), run=run)


def run_sft(profile: Profile) -> None:
    """sft: supervised fine-tuning of the base model on the demonstrations, the reference policy."""
    from fgalign.sft import SFTSection, align_rows, tokenize
    from fgalign.training import fitting

    config = profile.section("sft", SFTSection)

    def train(context: Context) -> None:
        records = tokenize(context.tokenizer, context.split("train").demonstrations)
        rows = fitting(context, records, config, "demonstrations")
        align_rows(context, rows, config.optim, config.max_length, start=context.model("base"))

    train_seeds(profile, "sft", config, train)


def run_reward_model(profile: Profile, name: str) -> None:
    """rm_preference, rm_edit, rm_token: the three reward models; or one of the profile's section ``token_models``."""
    train_seeds(profile, name, reward_config(profile, name), lambda context: train_reward_model(context, name))


def reward_config(profile: Profile, name: str, changes: Mapping[str, Any] | None = None) -> Section:
    """The section of a reward model; ``changes`` replace values of it by dotted key.

    Raises:
        ConfigError: there is no such reward model, or two models have one name.
    """
    from fgalign.rewards.training import RewardSection, TokenRewardSection

    kinds: dict[str, type[RewardSection]] = {
        "rm_preference": RewardSection,
        "rm_edit": RewardSection,
        "rm_token": TokenRewardSection,
    }
    others = profile.params.get("token_models") or {}
    if name not in {**kinds, **others}:
        raise ConfigError(f"reward model: expected one of {', '.join({**kinds, **others})}, found {name!r}")
    taken = {*MODELS, *profile.params.get("methods", {})} & set(others)
    if taken:
        raise ConfigError(f"{profile.file}: token_models: {min(taken)!r} names another model; choose another name")
    if name not in others:
        return profile.section(name, kinds[name], changes)
    # The title is the report's.
    section = {key: value for key, value in others[name].items() if key != "title"}
    where = f"{profile.file}: token_models.{name}"
    return parse_section(changed(section, changes), TokenRewardSection, where)


def train_reward_model(context: Context, name: str, changes: Mapping[str, Any] | None = None) -> None:
    """Train one seed of a reward model on its own kind of data; ``changes`` replace values of its section by dotted
    key."""
    from fgalign.rewards.training import (
        TokenRewardSection,
        preference_rows,
        train_sequence_model,
        train_token_model,
    )

    config = reward_config(context.profile, name, changes)
    if isinstance(config, TokenRewardSection):
        train_token_model(context, config, context.labelled("train"))
        return
    if name == "rm_preference":
        triples = [(pair.prompt, pair.chosen, pair.rejected) for pair in context.split("train").preferences]
    else:
        triples = [(edit.prompt, edit.revised, edit.initial) for edit in context.edits("train")]
    train_sequence_model(context, config, preference_rows(context.tokenizer, triples))


def run_align(profile: Profile, name: str) -> None:
    """align: one alignment method of the profile's ``methods`` section."""
    _, config = method_config(profile, name)
    train_seeds(profile, name, config, lambda context: align(context, name))


def align(context: Context, name: str, changes: Mapping[str, Any] | None = None) -> None:
    """Train one seed of a method; ``changes`` replace values of its entry by dotted key."""
    module, config = method_config(context.profile, name, changes)
    module.run(context, config)


def method_config(profile: Profile, name: str, changes: Mapping[str, Any] | None = None) -> tuple[Any, Section]:
    """Module and configuration of a method: its entry in ``methods`` without what others read, ``title`` (the report),
    ``search`` (the search) and, where the method has no use for it, ``needs: sft`` (the pipeline).

    Raises:
        ConfigError: no such method or kind, or a key or value that the method does not take.
    """
    methods = profile.params.get("methods", {})
    if name not in methods:
        raise ConfigError(f"{profile.file}: methods: unknown method {name!r}; expected one of {', '.join(methods)}")
    if name in MODELS:
        raise ConfigError(f"{profile.file}: methods: {name!r} names another model; choose another name")
    kind = methods[name].get("kind")
    if kind not in METHODS:
        raise ConfigError(f"{profile.file}: methods.{name}.kind: expected one of {', '.join(METHODS)}, found {kind!r}")
    section = {key: value for key, value in methods[name].items() if key not in ("title", "search")}
    section = changed(section, changes)
    module = get_method(kind)
    if section.get("needs") == "sft" and "needs" not in module.Config.model_fields:
        del section["needs"]
    return module, parse_section(section, module.Config, f"{profile.file}: methods.{name}")
