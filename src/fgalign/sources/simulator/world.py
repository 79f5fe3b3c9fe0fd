"""The world of ``mini``: places with facts, the briefs that ask for a description of one, and the language of answers.

Everything that the writers, the parser and the editor share is a table in this file. The tables keep three promises
that the parser relies on (``tests/test_simulator.py`` checks them): the values of two attributes are disjoint; no rude
or filler word occurs in a template or is a value; no two templates can produce the same sentence.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from typing import NamedTuple

from fgalign.errors import InputError

KINDS = ("Cafe", "Hotel", "Inn", "Hostel", "Lodge", "Villa")
NAMES = (
    *("Luna", "Nova", "Rosa", "Alba", "Bella", "Cora", "Dora", "Elba", "Flora", "Gala", "Iris", "Jade"),
    *("Kira", "Lira", "Mira", "Nora", "Opal", "Pola", "Rio", "Sol", "Tara", "Uma", "Vega", "Zora"),
)
VALUES: dict[str, tuple[str, ...]] = {
    "food": ("Thai", "Greek", "Indian", "Mexican", "French", "Turkish", "Korean", "Polish"),
    "view": ("lake", "river", "park", "harbor", "garden", "forest", "market", "castle"),
    "price": ("low", "fair", "high", "modest", "steep", "normal", "tiny", "huge"),
    "staff": ("kind", "shy", "polite", "funny", "strict", "patient", "lively", "clever"),
    "music": ("jazz", "rock", "folk", "opera", "piano", "pop", "blues", "soul"),
    "rooms": ("large", "small", "bright", "dark", "quiet", "modern", "rustic", "cozy"),
    "drink": ("coffee", "tea", "wine", "beer", "cider", "juice", "cocoa", "milk"),
    "holiday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}
ATTRIBUTES = tuple(VALUES)

# In a template `{}` is a slot (one word); `~` and `^` are the places where a filler or a rude word may be put, and are
# nothing otherwise. Words and marks are separated by blanks here, and joined as in normal English by `join`.
FACTS: dict[str, tuple[str, ...]] = {
    "food": ("It ~ serves ^ {} food .", "The ^ food is ~ {} .", "You can ~ eat ^ {} food ."),
    "view": ("It ~ faces the ^ {} .", "The ^ view is ~ of the {} .", "You can ~ see the ^ {} ."),
    "price": ("The ^ price is ~ {} .", "It ~ has a ^ {} price .", "You ~ pay a ^ {} price ."),
    "staff": ("The ^ staff are ~ {} .", "It ~ has ^ {} staff .", "You will ~ meet ^ {} staff ."),
    "music": ("It ~ plays ^ {} music .", "The ^ music is ~ {} .", "You will ~ hear ^ {} music ."),
    "rooms": ("The ^ rooms are ~ {} .", "It ~ has ^ {} rooms .", "You ~ get a ^ {} room ."),
    "drink": ("The ^ drink is ~ {} .", "It ~ pours ^ {} .", "You can ~ drink ^ {} ."),
    "holiday": ("It is ~ closed on ^ {} .", "It ~ closes on {} .", "The ^ doors are ~ closed on {} ."),
}
# The tone of an opening is its prefix; after it come, in each tone, the two slots of OPENING_TAIL: kind and name.
OPENING_PREFIXES: dict[str, tuple[str, ...]] = {
    "warm": ("Hello friends , welcome to", "Dear friends , come and see"),
    "formal": ("Dear guest , we present", "Ladies and gentlemen , we introduce"),
    "plain": ("This is", "Here is"),
}
OPENING_TAIL = "^ {} {} ."
TONES = tuple(OPENING_PREFIXES)
ENDINGS: dict[str, tuple[str, ...]] = {
    "thanks": ("We ~ thank you for reading .", "Many thanks for your time ."),
    "wish": ("We ~ wish you a nice day .", "Enjoy your stay with us ."),
}
NO_ENDING = "none"

RUDE_WORDS = ("stupid", "lousy", "silly", "dumb", "ugly", "awful")
RUDE_SENTENCES = ("Take it or leave it .", "Do not bother us .", "We do not care about you .")
FILLER_WORDS = ("really", "simply", "just", "actually", "basically", "honestly", "clearly", "truly")
FILLER_SENTENCES = ("There is much more to say .", "So much for that .", "As you know , it is what it is .")

_CLOSINGS = {"thanks": "End with thanks.", "wish": "End with a wish.", NO_ENDING: "No closing."}
_PROMPT = re.compile(
    r"(?P<kind>\w+) (?P<name>\w+): (?P<facts>\w+ \w+(?:, \w+ \w+)*)\. "
    r"Mention (?P<asked>\w+(?:, \w+)* and \w+)\. Be (?P<tone>\w+)\. (?P<closing>[\w ]+\.)"
)
_NO_SPACE_BEFORE = frozenset(".,!?;:")


class Brief(NamedTuple):
    """What a prompt says: ``facts`` as (attribute, value) in its order, and ``asked``, the attributes to mention."""

    kind: str
    name: str
    facts: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]
    tone: str
    ending: str

    @property
    def fact_set(self) -> tuple[tuple[str, str], ...]:
        """The facts in canonical order: what splits are kept disjoint by."""
        return tuple(sorted(self.facts))


def sample_brief(rng: random.Random) -> Brief:
    """Draw a brief: 4 or 5 facts, 2 or 3 of them asked for, tone and ending; all choices uniform and independent."""
    attributes = rng.sample(ATTRIBUTES, rng.choice((4, 5)))
    return Brief(
        kind=rng.choice(KINDS),
        name=rng.choice(NAMES),
        facts=tuple((attribute, rng.choice(VALUES[attribute])) for attribute in attributes),
        asked=tuple(rng.sample(attributes, rng.choice((2, 3)))),
        tone=rng.choice(TONES),
        ending=rng.choice((*ENDINGS, NO_ENDING)),
    )


def render_prompt(brief: Brief) -> str:
    """The prompt of a brief; ``parse_prompt`` is its inverse."""
    facts = ", ".join(f"{attribute} {value}" for attribute, value in brief.facts)
    asked = ", ".join(brief.asked[:-1]) + f" and {brief.asked[-1]}"
    closing = _CLOSINGS[brief.ending]
    return f"{brief.kind} {brief.name}: {facts}. Mention {asked}. Be {brief.tone}. {closing}"


@lru_cache(maxsize=65536)
def parse_prompt(prompt: str) -> Brief:
    """The brief that a prompt states.

    Raises:
        InputError: the text is not a prompt of this world.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is not None:
        facts = tuple(tuple(fact.split(" ")) for fact in match["facts"].split(", "))
        asked = tuple(match["asked"].replace(" and ", ", ").split(", "))
        endings = [ending for ending, text in _CLOSINGS.items() if text == match["closing"]]
        known = {attribute for attribute, _ in facts}
        once = len(known) == len(facts) and len(set(asked)) == len(asked)
        if endings and once and match["tone"] in TONES and set(asked) <= known <= set(ATTRIBUTES):
            return Brief(match["kind"], match["name"], facts, asked, match["tone"], endings[0])
    raise InputError(
        f"not a prompt of the simulated world: {prompt!r}; expected the wording "
        "'Cafe Luna: price low, food Thai, view lake, staff kind. Mention food and view. Be warm. End with thanks.'"
    )


def join(words: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join words and marks as in normal English; also the characters [start, end) that each one takes."""
    text, places = "", []
    for word in words:
        if text and word not in _NO_SPACE_BEFORE:
            text += " "
        places.append((len(text), len(text) + len(word)))
        text += word
    return text, places


def fill(template: str, *slots: str) -> str:
    """The plain sentence (or phrase) of a template, its slots filled and its ``~`` and ``^`` left out."""
    filled = iter(slots)
    words = [next(filled) if word == "{}" else word for word in template.split() if word not in ("~", "^")]
    return join(words)[0]


def vocabulary() -> list[str]:
    """Every word that prompts and answers of writers can hold, sorted."""
    templates = [t for group in (*FACTS.values(), *OPENING_PREFIXES.values(), *ENDINGS.values()) for t in group]
    phrases = [*templates, *RUDE_SENTENCES, *FILLER_SENTENCES, *_CLOSINGS.values(), "Mention and Be", *ATTRIBUTES]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    return sorted(words.union(KINDS, NAMES, VALUES, TONES, RUDE_WORDS, FILLER_WORDS, *VALUES.values()))
