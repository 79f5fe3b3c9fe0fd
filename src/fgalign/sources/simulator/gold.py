"""Evaluation's truth about an answer: one parse of the text finds its flaws, and score and marks are read off it.

Nothing but evaluation, the simulated people and the simulated editor may import this file. It knows the language of
the world (``world.py``), but nothing of how the writers make flaws, and judges any text whatsoever.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from fgalign.core.schema import Span
from fgalign.sources.simulator.world import (
    ENDINGS,
    FACTS,
    FILLER_SENTENCES,
    FILLER_WORDS,
    NO_ENDING,
    OPENING_PREFIXES,
    OPENING_TAIL,
    RUDE_SENTENCES,
    RUDE_WORDS,
    Brief,
    parse_prompt,
)

# A lie is worse than silence, and silence worse than a word too many. `garbled` costs GARBLED_TOKEN more a token.
SEVERITY = {
    "untruthful": 1.5,
    "rude": 1.0,
    "omission": 1.0,
    "off_instruction": 0.75,
    "padding": 0.5,
    "garbled": 0.5,
}
GARBLED_TOKEN = 0.25

_TOKEN = re.compile(r"\w+|[^\w\s]")
_STOPS = frozenset(".!?")
_NOISE = {**dict.fromkeys(RUDE_WORDS, "rude"), **dict.fromkeys(FILLER_WORDS, "padding")}

Remedy = Literal["delete", "word", "prefix", "ending", "stop", "insert"]


class Flaw(NamedTuple):
    """One flaw of an answer.

    ``start`` and ``end`` are characters; both are equal for words left out: the place where they belong. ``remedy``
    says what repairs it: delete the span; put the word ``target`` there; put an opening prefix of tone ``target``;
    put an ending ``target``; add a full stop; or insert the sentence for ``target``, which is "opening", "ending" or
    an attribute.
    """

    kind: str
    severity: float
    start: int
    end: int
    remedy: Remedy
    target: str = ""


class Mention(NamedTuple):
    """A value that the answer gives truthfully where it was asked for: attribute and characters."""

    attribute: str
    start: int
    end: int


class Parse(NamedTuple):
    """What an answer says and does wrong. ``flaws`` are in the order of the text."""

    brief: Brief
    flaws: tuple[Flaw, ...]
    truths: tuple[Mention, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """What was asked for and is not there: "opening", attributes, "ending"."""
        return tuple(flaw.target for flaw in self.flaws if flaw.kind == "omission")


def gold_score(prompt: str, response: str) -> float:
    """The quality of a response: minus the sum of the severities of its flaws, so 0 is flawless and nothing is above.

    Not capped: each further flaw costs, so an endless answer is worse than a long one. ``SEVERITY`` lists what a flaw
    costs; a garbled sentence costs ``0.5 + 0.25 x`` its words and marks, besides what it leaves unsaid. All severities
    are multiples of 1/4, so scores are exact. White space is not judged. Any string is a legal response.

    Raises:
        InputError: the prompt is not one of this world.
    """
    return -sum((flaw.severity for flaw in parse_answer(prompt, response).flaws), start=0.0)


def gold_spans(prompt: str, response: str) -> list[Span]:
    """The flawed characters of a response, in order; a span inside another one is left out.

    A flaw takes the words that have to go or to change: a single word, the prefix of an opening, or a sentence with
    its full stop. An omission takes none.

    Raises:
        InputError: the prompt is not one of this world.
    """
    spans: list[Span] = []
    for flaw in sorted(parse_answer(prompt, response).flaws, key=lambda flaw: (flaw.start, -flaw.end)):
        if flaw.start < flaw.end and not (spans and flaw.end <= spans[-1].end):
            spans.append(Span(start=flaw.start, end=flaw.end, type=flaw.kind))
    return spans


def parse_answer(prompt: str, response: str) -> Parse:
    """Find all flaws of a response, sentence by sentence.

    - Rude and filler words are flaws wherever they stand; the rest of a sentence is read without them.
    - A sentence that is none of the world's, or that lacks its full stop, is garbled.
    - The first mention of an attribute that was asked for counts: its value is true or ``untruthful``. A further
      mention is ``padding``, a mention of any other attribute ``off_instruction``, whatever value it gives.
    - An opening counts when no counting fact and no ending stands before it, an ending when no counting fact stands
      behind it; those elsewhere are ``off_instruction``. Of several that count, the first of the kind asked for (else
      the first) is taken; another one of its kind is ``padding``, any other ``off_instruction``.
    - A wrong opening or ending stands for the right one: one flaw, not a wrong one and a missing one.
    - What was asked for and has no sentence is an ``omission``.

    Raises:
        InputError: the prompt is not one of this world.
    """
    brief = parse_prompt(prompt)
    sentences = [_read(tokens) for tokens in _split(response)]
    flaws = [flaw for sentence in sentences for flaw in sentence.flaws]

    primary: dict[str, _Sentence] = {}
    for sentence in sentences:
        if sentence.role == "fact" and sentence.key in brief.asked:
            primary.setdefault(sentence.key, sentence)
    counting = list(primary.values())
    opening = _judge_opening(brief, sentences, counting, flaws)
    ending = _judge_ending(brief, sentences, counting, flaws)

    facts, truths = dict(brief.facts), []
    for sentence in sentences:
        if sentence.role in ("rude", "padding"):
            flaws.append(_whole(sentence, sentence.role))
        elif sentence.role == "fact" and primary.get(sentence.key) is not sentence:
            flaws.append(_whole(sentence, "padding" if sentence.key in brief.asked else "off_instruction"))
        elif sentence.role == "fact":
            value, right = sentence.slots[0], facts[sentence.key]
            if value.text == right:
                truths.append(Mention(sentence.key, value.start, value.end))
            else:
                flaws.append(_flaw("untruthful", value.start, value.end, "word", right))

    # A missing sentence belongs behind the sentence of what was asked for before it, or at the very beginning.
    place = opening.end if opening else 0
    if opening is None:
        flaws.append(_flaw("omission", 0, 0, "insert", "opening"))
    for attribute in brief.asked:
        if attribute in primary:
            place = primary[attribute].end
        else:
            flaws.append(_flaw("omission", place, place, "insert", attribute))
    if ending is None and brief.ending != NO_ENDING:
        flaws.append(_flaw("omission", len(response), len(response), "insert", "ending"))
    # Stable: what is missing at one and the same place stays in the order in which it was asked for.
    return Parse(brief, tuple(sorted(flaws, key=lambda flaw: flaw.start)), tuple(truths))


class _Token(NamedTuple):
    text: str
    start: int
    end: int


class _Sentence(NamedTuple):
    """A sentence as read: its role and key, its slots, the tokens of an opening's prefix, and flaws inside it."""

    role: str
    key: str
    start: int
    end: int
    slots: tuple[_Token, ...] = ()
    prefix: tuple[_Token, ...] = ()
    flaws: tuple[Flaw, ...] = ()


class _Pattern(NamedTuple):
    role: str
    key: str
    words: tuple[str, ...]
    prefix: int


def _pattern(role: str, key: str, template: str, prefix: int = 0) -> _Pattern:
    return _Pattern(role, key, tuple(word for word in template.split() if word not in ("~", "^")), prefix)


def _patterns() -> list[_Pattern]:
    patterns = [_pattern("fact", key, template) for key, group in FACTS.items() for template in group]
    patterns += [
        _pattern("opening", tone, f"{prefix} {OPENING_TAIL}", len(prefix.split()))
        for tone, group in OPENING_PREFIXES.items()
        for prefix in group
    ]
    patterns += [_pattern("ending", key, template) for key, group in ENDINGS.items() for template in group]
    patterns += [_pattern("rude", "", template) for template in RUDE_SENTENCES]
    patterns += [_pattern("padding", "", template) for template in FILLER_SENTENCES]
    return patterns


PATTERNS = tuple(_patterns())
_BY_SHAPE: dict[tuple[int, str], list[_Pattern]] = {}
for _each in PATTERNS:
    _BY_SHAPE.setdefault((len(_each.words), _each.words[0]), []).append(_each)


def _flaw(kind: str, start: int, end: int, remedy: Remedy, target: str = "") -> Flaw:
    return Flaw(kind, SEVERITY[kind], start, end, remedy, target)


def _whole(sentence: _Sentence, kind: str) -> Flaw:
    return _flaw(kind, sentence.start, sentence.end, "delete")


def _split(response: str) -> list[list[_Token]]:
    """The tokens of each sentence; a stop ends a sentence, and what follows the last stop is one more."""
    sentences: list[list[_Token]] = [[]]
    for match in _TOKEN.finditer(response):
        sentences[-1].append(_Token(match.group(), match.start(), match.end()))
        if match.group() in _STOPS:
            sentences.append([])
    return [tokens for tokens in sentences if tokens]


def _match(tokens: list[_Token]) -> _Pattern | None:
    for pattern in _BY_SHAPE.get((len(tokens), tokens[0].text), ()) if tokens else ():
        if all(
            want == token.text or (want == "{}" and token.text[0].isalnum())
            for want, token in zip(pattern.words, tokens, strict=True)
        ):
            return pattern
    return None


def _read(tokens: list[_Token]) -> _Sentence:
    start, end = tokens[0].start, tokens[-1].end
    kept = [token for token in tokens if token.text not in _NOISE]
    flaws = [_flaw(_NOISE[token.text], token.start, token.end, "delete") for token in tokens if token.text in _NOISE]
    if kept and kept[-1].text not in _STOPS:
        # Cut off: either all but the full stop is there, or it is no sentence.
        last = kept[-1]
        cost = SEVERITY["garbled"] + GARBLED_TOKEN
        flaws.append(Flaw("garbled", cost, last.start, last.end, "stop"))
        kept.append(_Token(".", last.end, last.end))
    pattern = _match(kept)
    if pattern is None:
        cost = SEVERITY["garbled"] + GARBLED_TOKEN * len(tokens)
        return _Sentence("garbled", "", start, end, flaws=(Flaw("garbled", cost, start, end, "delete"),))
    slots = tuple(token for word, token in zip(pattern.words, kept, strict=True) if word == "{}")
    return _Sentence(pattern.role, pattern.key, start, end, slots, tuple(kept[: pattern.prefix]), tuple(flaws))


def _choose(placed: list[_Sentence], wanted: str) -> _Sentence | None:
    return next((sentence for sentence in placed if sentence.key == wanted), placed[0] if placed else None)


def _judge_surplus(
    sentences: list[_Sentence], placed: list[_Sentence], chosen: _Sentence | None, flaws: list[Flaw]
) -> None:
    for sentence in sentences:
        if sentence is not chosen:
            again = chosen is not None and sentence in placed and sentence.key == chosen.key
            flaws.append(_whole(sentence, "padding" if again else "off_instruction"))


def _judge_opening(
    brief: Brief, sentences: list[_Sentence], counting: list[_Sentence], flaws: list[Flaw]
) -> _Sentence | None:
    """The opening that counts, if any; all flaws of openings are added to ``flaws``."""
    openings = [sentence for sentence in sentences if sentence.role == "opening"]
    body = [*counting, *(sentence for sentence in sentences if sentence.role == "ending")]
    placed = [opening for opening in openings if all(opening.start < other.start for other in body)]
    chosen = _choose(placed, brief.tone)
    _judge_surplus(openings, placed, chosen, flaws)
    if chosen is None:
        return None
    if chosen.key != brief.tone:
        flaws.append(_flaw("off_instruction", chosen.prefix[0].start, chosen.prefix[-1].end, "prefix", brief.tone))
    for token, right in zip(chosen.slots, (brief.kind, brief.name), strict=True):
        if token.text != right:
            flaws.append(_flaw("untruthful", token.start, token.end, "word", right))
    return chosen


def _judge_ending(
    brief: Brief, sentences: list[_Sentence], counting: list[_Sentence], flaws: list[Flaw]
) -> _Sentence | None:
    """The ending that counts, if any; all flaws of endings are added to ``flaws``."""
    endings = [sentence for sentence in sentences if sentence.role == "ending"]
    placed = [ending for ending in endings if all(ending.start > other.start for other in counting)]
    chosen = _choose(placed, brief.ending) if brief.ending != NO_ENDING else None
    _judge_surplus(endings, placed, chosen, flaws)
    if chosen is not None and chosen.key != brief.ending:
        flaws.append(_flaw("off_instruction", chosen.start, chosen.end, "ending", brief.ending))
    return chosen
