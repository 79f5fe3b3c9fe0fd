"""The embedded source: a small world in which the truth about every answer is known.

It stands in for people the way AlpacaFarm stands in for annotators: writers of different skill describe places, and
simulated people say which of two descriptions they prefer. ``README.md`` in this folder shows examples and all rates.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fgalign.config import Section
from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import SPLITS, Demonstration, GoldMarks, Preference, Prompt, Reference, Split
from fgalign.sources.simulator.people import prefers_first
from fgalign.sources.simulator.world import Brief, render_prompt, sample_brief
from fgalign.sources.simulator.writers import Answer, write_answer

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
MeanFlaws = Annotated[float, Field(ge=0.0, le=4.0)]
Weight = Annotated[float, Field(ge=0.0)]

# No set of facts is used twice. There are 268,800 sets of four facts and 1,691,648 of five; drawing unused ones stays
# fast, and the two sizes about equally frequent, only while most are unused.
MAX_RECORDS = 200_000


class SimulatorConfig(Section):
    """The simulator's seed, sizes and rates.

    ``n_<split>_<kind>`` count records; the prompts of the validation and the test split, those of preferences too, get
    a reference each, for evaluation; those of training preferences get one by an expert, which training may read.
    ``*_flaws`` are the mean numbers of flaws in an answer of that writer (Poisson). The writers of the corpus and of
    the preferences are drawn by ``*_weight``, those of demonstrations are all average. ``temperature`` (in units of
    gold score) and ``label_noise`` belong to the simulated person of ``people.prefers_first``.
    """

    seed: int = 0

    n_train_corpus: Count = 8000
    n_train_prompts: Positive = 1500
    n_train_demonstrations: Count = 2000
    n_train_preferences: Count = 1500
    n_validation_prompts: Positive = 128
    n_validation_demonstrations: Count = 200
    n_validation_preferences: Count = 300
    n_test_prompts: Positive = 200
    n_test_preferences: Count = 300
    test_redraws: Count = 0
    """How often the test split has been drawn anew, because results on the one before were seen while something was
    settled. All other records stay as they are: the new ones are drawn after them."""

    novice_flaws: MeanFlaws = 2.4
    average_flaws: MeanFlaws = 1.4
    expert_flaws: MeanFlaws = 0.4
    reference_flaws: MeanFlaws = 1.05
    novice_weight: Weight = 0.25
    average_weight: Weight = 0.5
    expert_weight: Weight = 0.25

    temperature: Annotated[float, Field(gt=0.0)] = 0.5
    label_noise: Rate = 0.05

    @model_validator(mode="after")
    def _possible(self) -> SimulatorConfig:
        if self.novice_weight + self.average_weight + self.expert_weight == 0.0:
            raise ValueError("novice_weight, average_weight and expert_weight: all three are 0; one must be positive")
        wanted = sum(size for name, size in self if name.startswith("n_"))
        wanted += self.test_redraws * (self.n_test_prompts + self.n_test_preferences)
        if wanted > MAX_RECORDS:
            raise ValueError(
                f"{wanted} records need as many different sets of facts; to keep new ones easy to find, "
                f"expected at most {MAX_RECORDS} records"
            )
        return self


def build(config: SimulatorConfig, root: Path) -> RawData:
    """Build all records; the same config gives the same records, and ``root`` is not used (no file is read).

    No set of facts is used twice, in whatever split or kind. The test split is drawn first and the corpus last, and
    every record has a random stream of its own, so that a larger training set leaves validation and test as they are.
    The test split of a redraw comes after all of these, and its numbers go on behind those of the draw before.
    """
    sizes: dict[tuple[Split, str], int] = {
        ("test", "prompt"): config.n_test_prompts,
        ("test", "preference"): config.n_test_preferences,
        ("validation", "prompt"): config.n_validation_prompts,
        ("validation", "preference"): config.n_validation_preferences,
        ("validation", "demonstration"): config.n_validation_demonstrations,
        ("train", "preference"): config.n_train_preferences,
        ("train", "demonstration"): config.n_train_demonstrations,
        ("train", "prompt"): config.n_train_prompts,
        ("train", "corpus"): config.n_train_corpus,
    }
    data = RawData({split: RawSplit() for split in SPLITS}, {split: Truth() for split in SPLITS})
    used: set[tuple[tuple[str, str], ...]] = set()
    for (split, kind), size in sizes.items():
        briefs = _new_briefs(random.Random(f"{config.seed}/{split}/{kind}/briefs"), used)
        for number in range(size):
            name = f"{split}-{kind}-{number:05d}"
            _add_record(config, data, split, kind, name, next(briefs), random.Random(f"{config.seed}/{name}"))
    for draw in range(1, config.test_redraws + 1):
        data.splits["test"], data.truth["test"] = RawSplit(), Truth()
        for kind in ("prompt", "preference"):
            size = sizes["test", kind]
            briefs = _new_briefs(random.Random(f"{config.seed}/test/{kind}/briefs/{draw}"), used)
            for number in range(draw * size, (draw + 1) * size):
                name = f"test-{kind}-{number:05d}"
                _add_record(config, data, "test", kind, name, next(briefs), random.Random(f"{config.seed}/{name}"))
    return data


def _new_briefs(rng: random.Random, used: set[tuple[tuple[str, str], ...]]) -> Iterator[Brief]:
    while True:
        brief = sample_brief(rng)
        if brief.fact_set not in used:
            used.add(brief.fact_set)
            yield brief


def _add_record(
    config: SimulatorConfig, data: RawData, split: Split, kind: str, name: str, brief: Brief, rng: random.Random
) -> None:
    raw, truth, prompt = data.splits[split], data.truth[split], render_prompt(brief)
    if kind == "prompt":
        raw.prompts.append(Prompt(id=name, prompt=prompt))
        if split != "train":
            reference = write_answer(brief, config.reference_flaws, rng)
            truth.references.append(Reference(id=name, prompt=prompt, reference=reference.text))
    elif kind == "preference":
        chosen, rejected = _compare(config, prompt, brief, rng)
        raw.preferences.append(Preference(id=name, prompt=prompt, chosen=chosen.text, rejected=rejected.text))
        truth.marks.append(GoldMarks(id=name, side="initial", text=rejected.text, spans=rejected.spans))
        truth.marks.append(GoldMarks(id=name, side="chosen", text=chosen.text, spans=chosen.spans))
        if split == "train":
            # A stream of its own: no other record changes.
            afresh = write_answer(brief, config.expert_flaws, random.Random(f"{config.seed}/{name}/reference"))
            raw.references.append(Demonstration(id=name, prompt=prompt, completion=afresh.text))
        else:
            reference = write_answer(brief, config.reference_flaws, rng)
            truth.references.append(Reference(id=name, prompt=prompt, reference=reference.text))
    elif kind == "demonstration":
        answer = write_answer(brief, config.average_flaws, rng)
        raw.demonstrations.append(Demonstration(id=name, prompt=prompt, completion=answer.text))
    else:
        answer = write_answer(brief, _some_writer(config, rng), rng)
        raw.corpus.append(Demonstration(id=name, prompt=prompt, completion=answer.text))


def _some_writer(config: SimulatorConfig, rng: random.Random) -> float:
    """The mean number of flaws of a writer drawn from the mixture."""
    means = (config.novice_flaws, config.average_flaws, config.expert_flaws)
    return rng.choices(means, weights=(config.novice_weight, config.average_weight, config.expert_weight))[0]


def _compare(config: SimulatorConfig, prompt: str, brief: Brief, rng: random.Random) -> tuple[Answer, Answer]:
    """Two different answers by writers of the mixture, the one that a simulated person prefers first."""
    first = write_answer(brief, _some_writer(config, rng), rng)
    second = write_answer(brief, _some_writer(config, rng), rng)
    while second.text == first.text:
        second = write_answer(brief, _some_writer(config, rng), rng)
    if prefers_first(prompt, first.text, second.text, config.temperature, config.label_noise, rng):
        return first, second
    return second, first
