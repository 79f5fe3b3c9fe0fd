"""What a profile says of its report: which rows the tables have, and what the captions say of the budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fgalign.config import Profile, Section, parse_section
from fgalign.study import Variant, get_study

PLAIN_PPO = "ppo_preference"
SFT = "sft"
DEFAULT_PPO_METHODS = [PLAIN_PPO, "ppo_edit", "ppo_token"]
CORE_METHODS = ["base", SFT, "figa", PLAIN_PPO]
"""Rows of `figa_core`: what FIGA starts from, FIGA, and PPO."""
SWEEPS = ("xu_token_models", "figa_sweeps", "figa_filter", "label_noise", "ppo_rates", "overoptimisation", "search")
"""Tables and figures of the second pipeline (``reproduce/sweeps``), whose files are apart from the first one's."""
REWARD_MODELS = ["rm_preference", "rm_edit", "rm_token"]
STUDIES = ("figa_signals", "figa_data_ablation", "figa_sweeps", "figa_filter", "label_noise", "ppo_rates")
"""Studies of the profile that are tables, by the names of both."""
ACROSS_METHODS = ("ppo_rates",)
"""Studies whose variants are compared with the first even where that is of another method."""

Names = Annotated[list[str], Field(min_length=1)]


class JudgeTitle(Section):
    """What captions say of another judge of the profile: its title and, where it was trained, on what."""

    title: Annotated[str, Field(min_length=1)]
    trained_on: str = ""


class ReportConfig(Section):
    """What the report shows; a method of the profile is in every table and figure that lists methods."""

    judge_title: Annotated[str, Field(min_length=1)]
    """What the judge measures, as a caption says it; for example ``gold score``."""
    budget_note: Annotated[str, Field(min_length=1)]
    """One or two sentences for the captions: on which models, data and steps this profile spent its budget."""
    methods: Names
    """Rows of ``figa_main``, in this order; ``sft`` must be among them, the paired differences refer to it. Left out in
    the profile: ``base``, ``sft`` and all of the profile's ``methods``."""
    ppo_methods: Names = DEFAULT_PPO_METHODS
    """Rows that ``xu_win_rate`` (after SFT), ``xu_efficiency`` and the learning curves must have; plain PPO must be
    among them. The profile's other methods that learn by reinforcement follow them."""
    reward_models: Names = REWARD_MODELS
    """Rows that ``xu_reward_models`` must have; further models in the metrics file follow them."""
    examples: Annotated[int, Field(ge=1)] = 3
    """How many test answers the figure of coloured tokens shows."""

    @model_validator(mode="after")
    def _consistent(self) -> ReportConfig:
        for key in ("methods", "ppo_methods", "reward_models"):
            names = getattr(self, key)
            if len(set(names)) != len(names):
                raise ValueError(f"{key} names a row twice: {' '.join(names)}")
        for key, needed in (("methods", SFT), ("ppo_methods", PLAIN_PPO)):
            if needed not in getattr(self, key):
                raise ValueError(f"{key} must name {needed!r}, which the other rows are compared with")
        return self

    @property
    def judged_methods(self) -> list[str]:
        """Every method that a table or figure shows under the judge, in the order of the tables."""
        return list(dict.fromkeys([*self.methods, *self.ppo_methods]))


def report_config(profile: Profile) -> ReportConfig:
    """The ``report`` section of ``profile``; ConfigError as for any section."""
    section = profile.params.get("report")
    if isinstance(section, dict) and "methods" not in section:
        methods = ["base", SFT, *profile.params.get("methods", {})]
        return parse_section({**section, "methods": methods}, ReportConfig, f"{profile.file}: report")
    return profile.section("report", ReportConfig)


def measured(profile: Profile) -> str:
    """What answers were measured with, for captions: the profile, how many seeds and test prompts, the judge."""
    seeds, prompts = len(profile.seeds), profile.params.get("evaluation", {}).get("prompts")
    counts = f"{profile.name}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    counts += f", {prompts} test prompts" if prompts else ""
    return f"{counts}; judge: {report_config(profile).judge_title}"


def other_judges(profile: Profile) -> dict[str, JudgeTitle]:
    """The judges beside the profile's own, in its order, as captions call them; none where it has none.

    Raises:
        ConfigError: a judge has no title.
    """
    return {
        name: parse_section(
            {key: entry[key] for key in JudgeTitle.model_fields if key in entry},
            JudgeTitle,
            f"{profile.file}: other_judges.{name}",
        )
        for name, entry in (profile.params.get("other_judges") or {}).items()
    }


def reinforced_methods(profile: Profile) -> list[str]:
    """The report's PPO methods, then the profile's others that learn by reinforcement: of kind ``ppo``, or with a
    ``curve`` of their training."""
    entries = profile.params.get("methods", {})
    others = [name for name, entry in entries.items() if entry.get("kind") == "ppo" or "curve" in entry]
    return list(dict.fromkeys([*report_config(profile).ppo_methods, *others]))


def variants(profile: Profile, study: str) -> dict[str, Variant]:
    """The variants of a study in the order of its table, each with its method; none where the profile lacks the study.

    Raises:
        ConfigError: the study is malformed, or a variant has no method.
    """
    if not any(study in profile.params.get(section, {}) for section in ("studies", "sweeps")):
        return {}
    spec = get_study(profile, study)
    return {
        name: variant.model_copy(update={"method": variant.method or spec.method})
        for name, variant in spec.variants.items()
    }
