"""Writers: a flawless answer to a brief, with local flaws put into it, and the writer's own record of each flaw.

The record says what kind each flaw is and which characters it takes. ``gold.py`` does not see it; it finds the flaws
again from the text, and a test holds the two against each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fgalign.core.schema import Span
from fgalign.sources.simulator.world import (
    ENDINGS,
    FACTS,
    FILLER_SENTENCES,
    FILLER_WORDS,
    KINDS,
    NAMES,
    NO_ENDING,
    OPENING_PREFIXES,
    OPENING_TAIL,
    RUDE_SENTENCES,
    RUDE_WORDS,
    TONES,
    VALUES,
    Brief,
    join,
)


class MadeFlaw(NamedTuple):
    """A flaw that a writer made: its kind and the characters [start, end) it takes, None where words are left out."""

    kind: str
    start: int | None
    end: int | None


class Answer(NamedTuple):
    """A written answer and the flaws in it, in the order of the text (those without a place last)."""

    text: str
    flaws: tuple[MadeFlaw, ...]

    @property
    def spans(self) -> list[Span]:
        """The writer's own marks."""
        return [Span(start=f.start, end=f.end, type=f.kind) for f in self.flaws if f.start is not None]


def write_answer(brief: Brief, mean_flaws: float, rng: random.Random) -> Answer:
    """Write an answer with Poisson(``mean_flaws``) flaws, each of a kind drawn uniformly from ``FLAW_MAKERS``.

    A kind that finds no place any more gives way to another one drawn; when none finds one, the answer stays with the
    flaws it has (at the default means this does not happen in thousands of answers).
    """
    draft = _flawless(brief, rng)
    for _ in range(_poisson(mean_flaws, rng)):
        for kind in rng.sample(tuple(FLAW_MAKERS), len(FLAW_MAKERS)):
            if _make_flaw(draft, kind, rng):
                break
    return _render(draft)


@dataclass(eq=False)
class _Line:
    """A sentence of a draft: the words of a template; ``flaw_of`` says which flaw, if any, a position belongs to."""

    role: str
    key: str
    words: list[str]
    slots: list[int]
    flaw_of: dict[int, int] = field(default_factory=dict)
    # A line that a flaw took whole, or that another line depends on, takes part in no further flaw of that sort.
    whole: bool = False
    repeated: bool = False

    def put(self, position: int, word: str, flaw: int) -> None:
        self.words[position] = word
        self.flaw_of[position] = flaw


@dataclass
class _Draft:
    brief: Brief
    lines: list[_Line]
    kinds: list[str] = field(default_factory=list)

    def new_flaw(self, kind: str) -> int:
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def of(self, role: str) -> list[_Line]:
        return [line for line in self.lines if line.role == role]

    def insert_before_ending(self, line: _Line, after: int, rng: random.Random) -> None:
        """Insert a line somewhere behind position ``after``, but never behind the ending."""
        last = len(self.lines) - len(self.of("ending"))
        self.lines.insert(rng.randint(after + 1, last), line)


def _line(role: str, key: str, template: str, slots: tuple[str, ...] = ()) -> _Line:
    words = template.split()
    places = [i for i, word in enumerate(words) if word == "{}"]
    for place, slot in zip(places, slots, strict=True):
        words[place] = slot
    return _Line(role, key, words, places)


def _fact(brief: Brief, attribute: str, rng: random.Random) -> _Line:
    return _line("fact", attribute, rng.choice(FACTS[attribute]), (dict(brief.facts)[attribute],))


def _opening(brief: Brief, tone: str, rng: random.Random) -> _Line:
    template = f"{rng.choice(OPENING_PREFIXES[tone])} {OPENING_TAIL}"
    return _line("opening", tone, template, (brief.kind, brief.name))


def _ending(ending: str, rng: random.Random) -> _Line:
    return _line("ending", ending, rng.choice(ENDINGS[ending]))


def _flawless(brief: Brief, rng: random.Random) -> _Draft:
    lines = [_opening(brief, brief.tone, rng), *(_fact(brief, attribute, rng) for attribute in brief.asked)]
    if brief.ending != NO_ENDING:
        lines.append(_ending(brief.ending, rng))
    return _Draft(brief, lines)


# Each maker puts one flaw into the draft, or returns False and leaves the draft alone when there is no place for it.


def _wrong_value(draft: _Draft, rng: random.Random) -> bool:
    places = [
        (line, place)
        for line in draft.lines
        if line.role in ("opening", "fact") and not (line.role == "fact" and line.whole)
        for place in line.slots
        if place not in line.flaw_of
    ]
    # Three lies in four are about a fact, the fourth about any slot; else name and kind would take almost half of them.
    facts = [(line, place) for line, place in places if line.role == "fact"]
    if facts and rng.random() < 0.75:
        places = facts
    if not places:
        return False
    line, place = rng.choice(places)
    values = VALUES[line.key] if line.role == "fact" else (KINDS if place == line.slots[0] else NAMES)
    wrong = rng.choice([value for value in values if value != line.words[place]])
    line.put(place, wrong, draft.new_flaw("untruthful"))
    return True


def _insert_word(draft: _Draft, kind: str, mark: str, words: tuple[str, ...], rng: random.Random) -> bool:
    lines = [line for line in draft.lines if mark in line.words and not (line.whole and line.role != "opening")]
    if not lines:
        return False
    line = rng.choice(lines)
    line.put(line.words.index(mark), rng.choice(words), draft.new_flaw(kind))
    return True


def _insert_sentence(draft: _Draft, kind: str, sentences: tuple[str, ...], rng: random.Random) -> bool:
    line = _line("extra", kind, rng.choice(sentences))
    _flaw_whole(line, draft.new_flaw(kind))
    draft.lines.insert(rng.randint(1, len(draft.lines)), line)
    return True


def _rude_word(draft: _Draft, rng: random.Random) -> bool:
    return _insert_word(draft, "rude", "^", RUDE_WORDS, rng)


def _rude_sentence(draft: _Draft, rng: random.Random) -> bool:
    return _insert_sentence(draft, "rude", RUDE_SENTENCES, rng)


def _filler_word(draft: _Draft, rng: random.Random) -> bool:
    return _insert_word(draft, "padding", "~", FILLER_WORDS, rng)


def _filler_sentence(draft: _Draft, rng: random.Random) -> bool:
    return _insert_sentence(draft, "padding", FILLER_SENTENCES, rng)


def _repeated_fact(draft: _Draft, rng: random.Random) -> bool:
    facts = [line for line in draft.of("fact") if not line.whole]
    if not facts:
        return False
    original = rng.choice(facts)
    original.repeated = True
    copy = _fact(draft.brief, original.key, rng)
    _flaw_whole(copy, draft.new_flaw("padding"))
    draft.insert_before_ending(copy, draft.lines.index(original), rng)
    return True


def _unrequested_fact(draft: _Draft, rng: random.Random) -> bool:
    said = {line.key for line in draft.of("fact")}
    others = [a for a, _ in draft.brief.facts if a not in draft.brief.asked and a not in said]
    if not others:
        return False
    line = _fact(draft.brief, rng.choice(others), rng)
    _flaw_whole(line, draft.new_flaw("off_instruction"))
    draft.insert_before_ending(line, 0, rng)
    return True


def _wrong_opening(draft: _Draft, rng: random.Random) -> bool:
    old = draft.lines[0]
    if old.whole or old.flaw_of:
        return False
    new = _opening(draft.brief, rng.choice([tone for tone in TONES if tone != draft.brief.tone]), rng)
    flaw = draft.new_flaw("off_instruction")
    for position in range(len(new.words) - len(OPENING_TAIL.split())):
        new.flaw_of[position] = flaw
    new.whole = True
    draft.lines[0] = new
    return True


def _wrong_ending(draft: _Draft, rng: random.Random) -> bool:
    old = draft.of("ending")
    # An ending that was asked for and left out is an omission: putting a wrong one there would heal it in part.
    if any(line.whole or line.flaw_of for line in old) or (not old and draft.brief.ending != NO_ENDING):
        return False
    line = _ending(rng.choice([ending for ending in ENDINGS if ending != draft.brief.ending]), rng)
    _flaw_whole(line, draft.new_flaw("off_instruction"))
    if old:
        draft.lines[draft.lines.index(old[0])] = line
    else:
        draft.lines.append(line)
    return True


def _left_out(draft: _Draft, rng: random.Random) -> bool:
    # An answer keeps one of the facts asked for at least: below that it would be no answer.
    facts = [line for line in draft.of("fact") if not line.whole]
    lines = [*(facts if len(facts) > 1 else ()), *draft.of("ending")]
    lines = [line for line in lines if not (line.whole or line.repeated or line.flaw_of)]
    if not lines:
        return False
    draft.lines.remove(rng.choice(lines))
    draft.new_flaw("omission")
    return True


_Maker = Callable[[_Draft, random.Random], bool]
# The kinds of flaw that writers make; a kind's makers are drawn with these weights.
FLAW_MAKERS: dict[str, tuple[tuple[_Maker, float], ...]] = {
    "untruthful": ((_wrong_value, 1.0),),
    "rude": ((_rude_word, 0.65), (_rude_sentence, 0.35)),
    "off_instruction": ((_unrequested_fact, 0.4), (_wrong_opening, 0.3), (_wrong_ending, 0.3)),
    "padding": ((_filler_word, 0.6), (_repeated_fact, 0.2), (_filler_sentence, 0.2)),
    "omission": ((_left_out, 1.0),),
}


def _make_flaw(draft: _Draft, kind: str, rng: random.Random) -> bool:
    makers = list(FLAW_MAKERS[kind])
    while makers:
        maker = rng.choices(makers, weights=[weight for _, weight in makers])[0]
        if maker[0](draft, rng):
            return True
        makers.remove(maker)
    return False


def _flaw_whole(line: _Line, flaw: int) -> None:
    line.whole = True
    line.flaw_of = dict.fromkeys(range(len(line.words)), flaw)


def _render(draft: _Draft) -> Answer:
    placed = [
        (word, line.flaw_of.get(position))
        for line in draft.lines
        for position, word in enumerate(line.words)
        if word not in ("~", "^")
    ]
    text, characters = join([word for word, _ in placed])
    found: dict[int, tuple[int, int]] = {}
    for (_, flaw), (start, end) in zip(placed, characters, strict=True):
        if flaw is not None:
            found[flaw] = (found.get(flaw, (start, end))[0], end)
    flaws = [MadeFlaw(kind, *found.get(number, (None, None))) for number, kind in enumerate(draft.kinds)]
    return Answer(text, tuple(sorted(flaws, key=lambda flaw: (flaw.start is None, flaw.start or 0))))


def _poisson(mean: float, rng: random.Random) -> int:
    # Knuth's product of uniforms: `random` has no Poisson, and NumPy's stream may change between versions.
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count
