"""Checks of a whole profile before any stage runs, and new profiles as copies of others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fgalign.config import DEFAULT_PROFILE, KEYS, Profile, parse_section, profile_file
from fgalign.errors import ConfigError
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig
from fgalign.io import atomic_dir

if TYPE_CHECKING:
    from fgalign.study import Study, Variant

WITHOUT_GOLD = ("simulator", "alpaca_farm", "hh_rlhf", "preference_dataset")
"""Sources without gold answers, which the judge `rouge_l` reads."""

_SWEEPS = "make it a study of `sweeps`, with a pipeline of its own as reproduce/sweeps/dvc.yaml"


# --- checks -----------------------------------------------------------------------------------------------------------


def check_names(profile: Profile) -> None:
    """Check what can be checked at once, without torch: source, annotator and judges with their options, methods' kinds
    and what they need, studies, search, benchmarks, labels and report, as far as the profile has these sections.

    Raises:
        ConfigError: the first fault, with file and key.
    """
    from fgalign.benchmarks import LOCAL_TASKS, BenchmarkConfig
    from fgalign.labels import LabelConfig
    from fgalign.report.config import report_config
    from fgalign.stages.data import annotator_config, source_config
    from fgalign.study import search_section

    params = profile.params
    _check_place(profile)
    if "seeds" in params:
        _ = profile.seeds
    source = None
    if "source" in params:
        source_config(profile)
        source = params["source"]["name"]
    if "annotator" in params:
        annotator_config(profile)
    if "labels" in params:
        profile.section("labels", LabelConfig)
    _check_methods(profile)
    _check_studies(profile)
    if params.get("search"):
        search_section(profile)
    if "report" in params:
        report_config(profile)
    _check_judges(profile, source)
    if "benchmarks" in params:
        for task in profile.section("benchmarks", BenchmarkConfig).local:
            possible = LOCAL_TASKS.get(source, ())
            if task not in possible:
                raise ConfigError(
                    f"{profile.file}: benchmarks.tasks: {task!r} cannot be made from the source {source!r}; expected "
                    f"of ours {', '.join(possible) or 'none'}: leave it out"
                )
    if params.get("world") and source != "simulator":
        raise ConfigError(
            f"{profile.file}: world: expected [], as no world with known truth makes the source {source!r}, found "
            f"{params['world']!r}"
        )


def check_profile(profile: Profile) -> None:
    """Check every section of a profile: ``check_names``, and those of training, whose code imports torch.

    Raises:
        ConfigError: the first fault, with file and key.
    """
    missing = [key for key in KEYS if key not in profile.params and key != "plan"]
    if missing:
        raise ConfigError(f"{profile.file}: expected the section `{missing[0]}`, found none; see params.yaml")
    check_names(profile)

    from fgalign.base_model import PretrainedConfig, ScratchConfig
    from fgalign.core.modeling import RuntimeConfig
    from fgalign.plan import PlanSection
    from fgalign.ppo_trainer import FineGrainedPPOConfig, check_config
    from fgalign.sft import SFTSection
    from fgalign.stages.judge_model import judge_model_config
    from fgalign.stages.train import method_config, reward_config
    from fgalign.study import candidates, reward_candidates

    params = profile.params
    profile.section("runtime", RuntimeConfig)
    profile.section("sft", SFTSection)
    if "plan" in params:
        profile.section("plan", PlanSection)
    kinds = {"scratch": ScratchConfig, "pretrained": PretrainedConfig}
    kind = params["base_model"].get("kind")
    if kind not in kinds:
        raise ConfigError(f"{profile.file}: base_model.kind: expected scratch or pretrained, found {kind!r}")
    parse_section(params["base_model"], kinds[kind], f"{profile.file}: base_model")
    for name in (*REWARD_MODELS, *(params["token_models"] or {})):
        reward_config(profile, name)
    for name in params["judge_models"] or {}:
        judge_model_config(profile, name)
    changes = [(name, {}) for name in params["methods"]]
    changes += [(variant.method or study.method, variant.change) for *_, study, variant in _variants(profile)]
    if any(entry.get("search") for entry in params["methods"].values()):
        changes += [(candidate.method, candidate.changes) for candidate in candidates(profile)]
    for name, change in changes:
        _, config = method_config(profile, name, change)
        if config.kind == "ppo":
            check_config(FineGrainedPPOConfig(output_dir="", **config.trainer))
    if (params["search"] or {}).get("reward_models"):
        for candidate in reward_candidates(profile):
            reward_config(profile, candidate.method, candidate.changes)


def _check_place(profile: Profile) -> None:
    """Where DVC is told that the profile and the repository are, and the paper, which only one profile can write."""
    params = profile.params
    if "root" in params and (profile.file.parent / str(params["root"])).resolve() != profile.root.resolve():
        raise ConfigError(
            f"{profile.file}: root: expected the way from this file's folder to {profile.root}, found "
            f"{params['root']!r}"
        )
    expected = profile.file.relative_to(profile.root).as_posix()
    if params.get("params_file", expected) != expected:
        raise ConfigError(f"{profile.file}: params_file: expected {expected}, found {params['params_file']!r}")
    if params.get("papers") and profile.name != DEFAULT_PROFILE:
        raise ConfigError(
            f"{profile.file}: papers: expected [], found {params['papers']!r}: the paper is the profile "
            f"{DEFAULT_PROFILE}'s, and DVC runs nothing where two stages write it"
        )


def _check_methods(profile: Profile) -> None:
    """Kinds, and that the pipeline makes what each method needs; otherwise DVC misses a folder after hours."""
    from fgalign.methods import METHODS

    methods, models = profile.params.get("methods") or {}, profile.params.get("token_models") or {}
    needed = profile.params.get("needed_token_models") or []
    if not isinstance(needed, list) or not set(needed) <= set(models):
        raise ConfigError(
            f"{profile.file}: needed_token_models: expected a list of some of token_models "
            f"({', '.join(models) or 'none'}), found {needed!r}"
        )
    made = ["sft", *REWARD_MODELS, *needed]
    for name, entry in methods.items():
        kind, needs = entry.get("kind"), entry.get("needs")
        if kind not in METHODS:
            raise ConfigError(
                f"{profile.file}: methods.{name}.kind: expected one of {', '.join(METHODS)}, found {kind!r}"
            )
        if needs not in made and needs not in {"base", *methods} - {name}:
            later = "; name it in needed_token_models" if needs in models else ""
            raise ConfigError(
                f"{profile.file}: methods.{name}.needs: expected one of {', '.join(made)}, found {needs!r}{later}"
            )


def _variants(profile: Profile) -> Iterator[tuple[str, str, Study, Variant]]:
    """Every variant of every study: the section and the key below it, the study and itself."""
    from fgalign.study import get_study

    for section in ("studies", "sweeps"):
        for name in profile.params.get(section) or {}:
            study = get_study(profile, name)
            for key, variant in study.variants.items():
                yield section, f"{name}.variants.{key}", study, variant


def _check_studies(profile: Profile) -> None:
    from fgalign.stages.data import annotator_config

    methods = profile.params.get("methods") or {}
    for section, key, study, variant in _variants(profile):
        where, method = f"{profile.file}: {section}.{key}", variant.method or study.method
        if method not in methods:
            raise ConfigError(f"{where}: expected one of the methods {', '.join(methods)}, found {method!r}")
        if variant.annotator:
            annotator_config(profile, variant.annotator, f"{section}.{key}.annotator")
        if section == "studies":
            # DVC lets a study wait for the method that it names, and knows of nothing else that its variants need.
            if method != study.method:
                raise ConfigError(
                    f"{where}: expected a variant of the study's own method, {study.method!r}, found {method!r}; "
                    f"{_SWEEPS}"
                )
            if variant.annotator:
                raise ConfigError(f"{where}.annotator: expected none, as no stage makes these edits; {_SWEEPS}")


def _check_judges(profile: Profile, source: str | None) -> None:
    """The profile's judge, what captions call it, and its other judges."""
    from fgalign.evaluation.judges import REWARD_JUDGE_TITLE
    from fgalign.evaluation.judging import check_title, judge_options, profile_judge
    from fgalign.report.config import other_judges
    from fgalign.stages.rejudge import other_judge

    def check_source(key: str, judge: str) -> None:
        other_world = judge == "simulator_gold" and source not in ("simulator", None)
        if other_world or (judge == "rouge_l" and source in WITHOUT_GOLD):
            raise ConfigError(
                f"{profile.file}: {key}: expected a judge of what the source {source!r} gives, found {judge!r}, which "
                f"reads {'gold answers' if judge == 'rouge_l' else 'the truth of the simulator'}"
            )

    if "evaluation" in profile.params:
        config = profile.section("evaluation", EvaluationConfig)
        judge_options(profile, config.judge, config.judge_options)
        check_source("evaluation.judge", config.judge)
        if config.judge == "reward_model":
            check_title(profile, config.judge, REWARD_JUDGE_TITLE)
        else:
            check_title(profile, config.judge, profile_judge(profile, config.judge, config.judge_options).title)
    others, models = profile.params.get("other_judges") or {}, profile.params.get("judge_models") or {}
    other_judges(profile)
    for name in others:
        config = other_judge(profile, name)
        folder = {"folder": config.needs} if config.judge == "reward_model" else {}
        key = f"other_judges.{name}"
        judge_options(profile, config.judge, {**folder, **config.judge_options}, f"{key}.judge_options")
        check_source(f"{key}.judge", config.judge)
        kind, _, model = config.needs.partition("/")
        if kind == "judges" and model not in models:
            raise ConfigError(
                f"{profile.file}: {key}.needs: expected judges/ and one of judge_models "
                f"({', '.join(models) or 'none'}), found {config.needs!r}"
            )
    if profile.params.get("judge_tables") and not others:
        tables = profile.params["judge_tables"]
        raise ConfigError(f"{profile.file}: judge_tables: expected [], as there are no other_judges, found {tables!r}")


# --- new profiles -----------------------------------------------------------------------------------------------------


def new_profile(name: str, like: Profile) -> Profile:
    """Write ``reproduce/profiles/<name>``: the ``params.yaml`` of another profile with what is its own replaced, and a
    link to ``dvc.yaml``. What belongs to one profile alone is left out: the paper, the second pipeline, the search.

    Raises:
        ConfigError: the name is taken or cannot be one, or the copy is not valid; nothing is written.
    """
    import yaml

    file = profile_file(like.root, name)
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or yaml.safe_load(name) != name:
        raise ConfigError(f"new profile: expected a name of small letters, digits, - and _, found {name!r}")
    places = (file if file.exists() else file.parent, like.root / "data" / name, like.root / "results" / name)
    taken = [place.relative_to(like.root).as_posix() for place in places if place.exists()]
    if taken:
        raise ConfigError(
            f"new profile: the name {name!r} is taken: {' and '.join(taken)} is there; nothing was written: take "
            "another name"
        )
    values = {
        "profile": name,
        "root": "../../..",
        "params_file": file.relative_to(like.root).as_posix(),
        "sweeps": "{}",
        "search": f"{{seed: {like.seeds[0]}}}",
        "papers": "[]",
    }
    text, params = _with_values(like, values)
    made = Profile(name=name, root=like.root, params=params, file=file)
    check_profile(made)
    header = (
        f"# Profile {name}: a copy of {like.name} by `fgalign new-profile`. docs/new-profile.md says what to change.\n"
        f"# Command: make reproduce PROFILE={name}\n"
    )
    with atomic_dir(file.parent) as folder:
        (folder / "params.yaml").write_text(header + text, encoding="utf-8")
        (folder / "dvc.yaml").symlink_to("../../../dvc.yaml")
    return made


def _with_values(profile: Profile, values: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The text of a profile with other values at its top, which loses the comment above each, and what it says.

    Raises:
        ConfigError: the text cannot be changed line by line.
    """
    import yaml

    text = profile.file.read_text(encoding="utf-8").rstrip("\n") + "\n"
    expected = dict(profile.params)
    for key, value in values.items():
        expected[key] = yaml.safe_load(value)
        if profile.params.get(key) != expected[key]:
            # The key's line and the indented lines below it.
            section = rf"^(?:#.*\n)*{key}:.*\n(?:[ \t]+\S.*\n|[ \t]*\n(?=[ \t]+\S))*"
            text = re.sub(section, f"{key}: {value}\n", text, count=1, flags=re.MULTILINE)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        found = error
    if found != expected:
        raise ConfigError(
            f"{profile.file}: cannot be copied line by line: expected {', '.join(values)} each at the beginning of a "
            "line, and no anchor in them that is used elsewhere; copy it by hand (docs/new-profile.md)"
        )
    return text, expected
