"""The simulated annotator: edits a response as little as possible so that it becomes good, and errs at stated rates.

It reads prompt and response alone, so it edits text of any origin, for example samples of a model.
"""

from __future__ import annotations

import random
from typing import Annotated, NamedTuple

from pydantic import Field

from fgalign.config import Section
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Edit
from fgalign.sources.simulator.gold import Flaw, Parse, parse_answer
from fgalign.sources.simulator.world import (
    ENDINGS,
    FACTS,
    NO_ENDING,
    OPENING_PREFIXES,
    OPENING_TAIL,
    VALUES,
    Brief,
    fill,
)

Rate = Annotated[float, Field(ge=0.0, le=1.0)]


class SimulatedConfig(Section):
    """How the annotator errs.

    ``miss_rate``: the probability that a flaw is overlooked, independently for each flaw. ``wrong_correction_rate``:
    the probability, for each response that gives at least one asked-for value truthfully, that one such value is
    changed to a wrong one.
    """

    seed: int = 0
    miss_rate: Rate = 0.1
    wrong_correction_rate: Rate = 0.03


def annotate(split: RawSplit, config: SimulatedConfig, split_name: str) -> list[Edit]:
    """Edit the rejected response of each preference; the edit keeps the preference's id, unchanged ones are left out.

    Raises:
        InputError: a prompt is not one of the simulated world.
    """
    edits = []
    for pair in split.preferences:
        rng = random.Random(f"{config.seed}/{split_name}/{pair.id}")
        revised = revise(pair.prompt, pair.rejected, config, rng)
        if revised != pair.rejected:
            edits.append(Edit(id=pair.id, prompt=pair.prompt, initial=pair.rejected, revised=revised))
    return edits


def revise(prompt: str, response: str, config: SimulatedConfig, rng: random.Random) -> str:
    """Repair the flaws of one response; words that are not flawed are not touched.

    A wrong word is replaced, a rude or filler word or a surplus or garbled sentence deleted, what is missing inserted
    where it belongs. Should nothing be left (all garbled, and all that is missing overlooked), the response is
    returned as it came.

    Raises:
        InputError: the prompt is not one of the simulated world.
    """
    parse = parse_answer(prompt, response)
    noticed = [flaw for flaw in parse.flaws if rng.random() >= config.miss_rate]
    changes = [_repair(flaw, parse.brief, rng) for flaw in noticed if not _covered(flaw, noticed)]
    if parse.truths and rng.random() < config.wrong_correction_rate:
        changes.append(_wrong_correction(parse, rng))
    revised = _apply(response, changes) if changes else response
    return revised if revised.strip() else response


class _Change(NamedTuple):
    """Replace the characters [start, end) by ``text``; ``sentence`` marks a sentence to insert (an empty range)."""

    start: int
    end: int
    text: str
    sentence: bool = False


def _covered(flaw: Flaw, noticed: list[Flaw]) -> bool:
    """Whether the repair of another flaw takes these words away, so that there is nothing left to repair."""
    return flaw.remedy != "insert" and any(
        other is not flaw and other.remedy in ("delete", "prefix", "ending") and _inside(flaw, other)
        for other in noticed
    )


def _inside(flaw: Flaw, other: Flaw) -> bool:
    return other.start <= flaw.start and flaw.end <= other.end


def _repair(flaw: Flaw, brief: Brief, rng: random.Random) -> _Change:
    start, end = flaw.start, flaw.end
    if flaw.remedy == "insert":
        return _Change(start, end, _sentence(flaw.target, brief, rng), sentence=True)
    if flaw.remedy == "stop":
        return _Change(end, end, ".")
    if flaw.remedy == "prefix":
        return _Change(start, end, fill(rng.choice(OPENING_PREFIXES[flaw.target])))
    if flaw.remedy == "ending":
        return _Change(start, end, fill(rng.choice(ENDINGS[flaw.target])))
    return _Change(start, end, flaw.target if flaw.remedy == "word" else "")


def _sentence(target: str, brief: Brief, rng: random.Random) -> str:
    if target == "opening":
        return fill(f"{rng.choice(OPENING_PREFIXES[brief.tone])} {OPENING_TAIL}", brief.kind, brief.name)
    if target == "ending":
        assert brief.ending != NO_ENDING, "the parser never misses an ending that nobody asked for"
        return fill(rng.choice(ENDINGS[brief.ending]))
    return fill(rng.choice(FACTS[target]), dict(brief.facts)[target])


def _wrong_correction(parse: Parse, rng: random.Random) -> _Change:
    truth = rng.choice(parse.truths)
    right = dict(parse.brief.facts)[truth.attribute]
    return _Change(truth.start, truth.end, rng.choice([v for v in VALUES[truth.attribute] if v != right]))


def _apply(response: str, changes: list[_Change]) -> str:
    """Apply changes whose ranges are disjoint; to delete a word is to delete the space before it, too."""
    pieces: list[str] = []
    done = 0
    for change in sorted(changes, key=lambda change: (change.start, change.start != change.end)):
        before = response[done : change.start]
        pieces.append(before if change.text and not change.sentence else before.rstrip())
        if change.sentence:
            pieces.append(f" {change.text} " if change.start == 0 else f" {change.text}")
        else:
            pieces.append(change.text)
        done = change.end
    pieces.append(response[done:])
    text = ""
    for piece in pieces:
        text += piece.lstrip() if not text or text[-1].isspace() else piece
    return text.strip()
