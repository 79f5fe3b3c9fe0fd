"""The section of a profile that says how models are evaluated."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fgalign.config import Profile, Section

REWARD_MODELS = ("rm_preference", "rm_edit", "rm_token")
"""Those that every policy's answers are scored with."""


def policies_with_weights(profile: Profile) -> list[str]:
    """SFT and the profile's methods in its order, without those that choose among SFT's answers."""
    return ["sft", *(name for name, entry in profile.params["methods"].items() if entry.get("kind") != "best_of_n")]


class EvaluationConfig(Section):
    """How methods are compared: sampling, the judge, how many examples are shown."""

    judge: str
    judge_options: dict[str, Any] = Field(default_factory=dict)
    """Of a judge that has options (``llm``, ``reward_model``)."""
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    response_length: Annotated[int, Field(ge=1)] = 48
    batch_size: Annotated[int, Field(ge=1)] = 100
    prompts: Annotated[int, Field(ge=2)] | None = None
    """The first so many test prompts (None: all)."""
    pairs: Annotated[int, Field(ge=2)] | None = None
    """So many test preferences and test edits for the reward models (None: all), from as many prompts as possible."""
    examples: Annotated[int, Field(ge=1)] = 4
    seed: int = 0
    """Of sampling; added to a method's seed."""
