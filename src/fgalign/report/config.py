"""The ``report`` section of a profile: which rows the tables have, and what the captions say of the budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fgalign.config import Profile, Section, parse_section

PLAIN_PPO = "ppo_preference"
SFT = "sft"
DEFAULT_PPO_METHODS = [PLAIN_PPO, "ppo_edit", "ppo_token"]
REWARD_MODELS = ["rm_preference", "rm_edit", "rm_token"]

Names = Annotated[list[str], Field(min_length=1)]


class ReportConfig(Section):
    """What the report shows. A method is added to every table and figure that lists methods by naming it here."""

    judge_title: Annotated[str, Field(min_length=1)]
    """What the judge measures, as a caption says it; for example ``gold score``."""
    budget_note: Annotated[str, Field(min_length=1)]
    """One or two sentences for the captions: on which models, data and steps this profile spent its budget."""
    methods: Names
    """Rows of ``figa_main``, in this order; ``sft`` must be among them, the paired differences refer to it. Left out in
    the profile: ``base``, ``sft`` and the profile's ``methods``, less the PPO variants other than plain PPO."""
    ppo_methods: Names = DEFAULT_PPO_METHODS
    """Rows of ``xu_win_rate`` (after SFT), ``xu_efficiency`` and the learning curves; plain PPO must be among them."""
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
        ppo_methods = section.get("ppo_methods", DEFAULT_PPO_METHODS)
        trained = [name for name in profile.params.get("methods", {}) if name == PLAIN_PPO or name not in ppo_methods]
        return parse_section({**section, "methods": ["base", SFT, *trained]}, ReportConfig, f"{profile.file}: report")
    return profile.section("report", ReportConfig)
