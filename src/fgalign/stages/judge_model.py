"""The stage that trains a judge: a sequence-level reward model that scores answers in the evaluation and that nothing
is trained against. It learns from the preferences of the validation split, from the initial model, with its own seed.

The folder is ``data/<profile>/judges/<name>``, apart from ``models``, whose folder is an input of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fgalign.config import Profile, parse_section
from fgalign.context import Context
from fgalign.core.modeling import RuntimeConfig, seed_everything, set_up
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Preference
from fgalign.errors import ConfigError, InputError
from fgalign.io import write_json
from fgalign.parallel import output_dir
from fgalign.rewards.training import RewardSection, preference_rows, train_sequence_model
from fgalign.tracking import track

SPLIT = "validation"


class JudgeModelSection(RewardSection):
    """A judge of the profile's section ``judge_models``: a reward model's options, with a ``seed`` of its own. It
    starts from the initial model, because all that it judges starts from SFT."""

    seed: int
    start: Literal["base"] = "base"


def run_judge_model(profile: Profile, name: str) -> None:
    """judge_model: one judge of the profile's section ``judge_models``, ``data/<profile>/judges/<name>``; beside the
    model ``trained_on.json`` says which prompts it has learnt from."""
    config = judge_model_config(profile, name)
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    stage = f"judge_model@{name}"
    with output_dir(profile.data / "judges" / name) as out:
        seed_everything(config.seed)
        with track(profile, stage, config.seed, config.model_dump()) as run:
            train_judge(Context(profile, stage, config.seed, device, runtime, out, run), config)


def judge_model_config(profile: Profile, name: str) -> JudgeModelSection:
    """The section of a judge.

    Raises:
        ConfigError: there is no such judge, a key is unknown or ill-typed, or the seed is one of the profile's.
    """
    judges = profile.params.get("judge_models") or {}
    if name not in judges:
        known = ", ".join(judges) or "none"
        raise ConfigError(f"{profile.file}: judge_models: unknown judge {name!r}; expected one of {known}")
    config = parse_section(judges[name], JudgeModelSection, f"{profile.file}: judge_models.{name}")
    if config.seed in profile.seeds:
        raise ConfigError(
            f"{profile.file}: judge_models.{name}.seed: expected a seed that trains no model that is judged, none of "
            f"{', '.join(map(str, profile.seeds))}, found {config.seed}; choose another"
        )
    return config


def train_judge(context: Context, config: JudgeModelSection) -> None:
    """Train the judge on the preferences of the validation split and save it.

    Raises:
        InputError: the split has no preferences, or one about a prompt of the training split.
    """
    pairs = context.split(SPLIT).preferences
    check_disjoint(pairs, context.split("train"), str(context.profile.data / "raw" / SPLIT / "preferences.jsonl"))
    triples = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    count = train_sequence_model(context, config, preference_rows(context.tokenizer, triples))
    write_json(context.out / "budget.json", context.spent)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    write_json(
        context.out / "trained_on.json",
        {"split": SPLIT, "seed": config.seed, "pairs": count, "prompts": prompts},
    )


def check_disjoint(pairs: Sequence[Preference], train: RawSplit, where: str) -> None:
    """Raise InputError unless there are pairs, all about prompts that nothing in the training split is about."""
    if not pairs:
        raise InputError(f"{where}: expected preferences to train a judge on, found none; let the source make some")
    seen = {
        record.prompt
        for records in (train.prompts, train.demonstrations, train.preferences, train.corrections)
        for record in records
    }
    shared = [pair for pair in pairs if pair.prompt in seen]
    if shared:
        raise InputError(
            f"{where}: expected prompts that the training split does not have, found {len(shared)} of {len(pairs)} "
            f"pairs with one of its prompts (for example {shared[0].id!r}); make the splits of the source disjoint"
        )
