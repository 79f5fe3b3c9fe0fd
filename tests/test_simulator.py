"""The embedded world: its language, writers, gold parser, people, editor and the records built from them."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fgalign.annotate.simulated import SimulatedConfig, annotate, revise
from fgalign.config import parse_section
from fgalign.core.raw_data import RawData, RawSplit, read_split, write_raw
from fgalign.core.schema import SPLITS, Preference
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.truth import read_truth
from fgalign.sources.simulator import SimulatorConfig, build, world
from fgalign.sources.simulator.gold import PATTERNS, gold_score, gold_spans, parse_answer
from fgalign.sources.simulator.people import prefers_first
from fgalign.sources.simulator.writers import FLAW_MAKERS, write_answer

PROMPT = "Cafe Luna: price low, food Thai, view lake, staff kind. Mention food and view. Be warm. End with thanks."
NO_CLOSING = (
    "Inn Nora: food Greek, rooms dark, music jazz, drink tea. Mention music, drink and food. Be plain. No closing."
)
OPENING = "Hello friends, welcome to Cafe Luna."
FOOD, VIEW, THANKS = "It serves Thai food.", "It faces the lake.", "We thank you for reading."
FLAWLESS = f"{OPENING} {FOOD} {VIEW} {THANKS}"
PERFECT = SimulatedConfig(miss_rate=0.0, wrong_correction_rate=0.0)

# response, score, flawed text with its type in order; worked out by hand from the rules in gold.py.
BY_HAND = [
    pytest.param(FLAWLESS, 0.0, [], id="flawless"),
    pytest.param(
        "Dear friends, come and see Cafe Luna. You can see the lake. The food is Thai. Many thanks for your time.",
        0.0,
        [],
        id="flawless in other words and another order",
    ),
    pytest.param(FLAWLESS.replace("Thai", "Greek"), -1.5, [("Greek", "untruthful")], id="wrong value"),
    pytest.param(FLAWLESS.replace("Thai", "lake"), -1.5, [("lake", "untruthful")], id="value of another attribute"),
    pytest.param(FLAWLESS.replace("Luna", "Rosa"), -1.5, [("Rosa", "untruthful")], id="wrong name"),
    pytest.param(
        FLAWLESS.replace("Cafe Luna", "Inn Rosa"),
        -3.0,
        [("Inn", "untruthful"), ("Rosa", "untruthful")],
        id="wrong kind and name",
    ),
    pytest.param(FLAWLESS.replace("Thai", "lousy Thai"), -1.0, [("lousy", "rude")], id="rude word"),
    pytest.param(
        f"{OPENING} Do not bother us. {FOOD} {VIEW} {THANKS}", -1.0, [("Do not bother us.", "rude")], id="rude sentence"
    ),
    pytest.param(FLAWLESS.replace("faces", "really faces"), -0.5, [("really", "padding")], id="filler word"),
    pytest.param(
        FLAWLESS.replace("faces", "really really faces"),
        -1.0,
        [("really", "padding"), ("really", "padding")],
        id="each filler word costs",
    ),
    pytest.param(
        f"{OPENING} {FOOD} {VIEW} So much for that. {THANKS}",
        -0.5,
        [("So much for that.", "padding")],
        id="filler sentence",
    ),
    pytest.param(
        f"{OPENING} {FOOD} {VIEW} The food is Thai. {THANKS}",
        -0.5,
        [("The food is Thai.", "padding")],
        id="repeated fact in other words",
    ),
    pytest.param(
        f"{OPENING} {FOOD} {VIEW} The staff are kind. {THANKS}",
        -0.75,
        [("The staff are kind.", "off_instruction")],
        id="fact that nobody asked for",
    ),
    pytest.param(
        f"{OPENING} {FOOD} {VIEW} The music is jazz. {THANKS}",
        -0.75,
        [("The music is jazz.", "off_instruction")],
        id="fact that is not even given",
    ),
    pytest.param(
        FLAWLESS.replace("Hello friends, welcome to", "Dear guest, we present"),
        -0.75,
        [("Dear guest, we present", "off_instruction")],
        id="opening of another tone",
    ),
    pytest.param(
        FLAWLESS.replace(THANKS, "Enjoy your stay with us."),
        -0.75,
        [("Enjoy your stay with us.", "off_instruction")],
        id="another ending",
    ),
    pytest.param(
        f"{FLAWLESS} Enjoy your stay with us.",
        -0.75,
        [("Enjoy your stay with us.", "off_instruction")],
        id="one ending more",
    ),
    pytest.param(
        f"{FLAWLESS} Many thanks for your time.",
        -0.5,
        [("Many thanks for your time.", "padding")],
        id="the same ending twice",
    ),
    pytest.param(f"{OPENING} {FOOD} {THANKS}", -1.0, [], id="fact left out"),
    pytest.param(f"{OPENING} {FOOD} {VIEW}", -1.0, [], id="ending left out"),
    pytest.param(f"{FOOD} {VIEW} {THANKS}", -1.0, [], id="opening left out"),
    # The thanks do not end anything: surplus there (0.75), left out at the end (1).
    pytest.param(
        f"{OPENING} {THANKS} {FOOD} {VIEW}",
        -1.75,
        [(THANKS, "off_instruction")],
        id="ending in the middle",
    ),
    pytest.param(f"{FOOD} {OPENING} {VIEW} {THANKS}", -1.75, [(OPENING, "off_instruction")], id="opening too late"),
    pytest.param(
        f"{OPENING} It serves stupid Greek food. {VIEW} It really faces the lake. {THANKS}",
        -1.0 - 1.5 - 0.5 - 0.5,
        [("stupid", "rude"), ("Greek", "untruthful"), ("It really faces the lake.", "padding")],
        id="several flaws, one span inside another left out",
    ),
    # Garbled: 0.5 + 0.25 a token; "It", "food", "Thai", "." are 4, and the fact is left out (1).
    pytest.param(
        f"{OPENING} It food Thai. {VIEW} {THANKS}", -0.5 - 1.0 - 1.0, [("It food Thai.", "garbled")], id="garbled"
    ),
    pytest.param(FLAWLESS[:-1], -0.75, [("reading", "garbled")], id="last full stop lost"),
    # "We", "thank", "you" are 3 tokens, and the ending is left out.
    pytest.param(
        f"{OPENING} {FOOD} {VIEW} We thank you", -0.5 - 0.75 - 1.0, [("We thank you", "garbled")], id="cut off"
    ),
    # Opening, two facts and the ending are left out.
    pytest.param("", -4.0, [], id="empty"),
    pytest.param(" \n", -4.0, [], id="blank"),
    pytest.param("...", -4.0 - 3 * 0.75, [(".", "garbled")] * 3, id="full stops alone"),
    pytest.param("xyz", -4.0 - 0.75, [("xyz", "garbled")], id="one unknown word"),
    # Upper case is not the language of this world: 4 garbled sentences of 8, 5, 5 and 6 tokens, all left out.
    pytest.param(
        FLAWLESS.upper(),
        -4.0 - 4 * 0.5 - 0.25 * (8 + 5 + 5 + 6),
        [(part, "garbled") for part in (OPENING.upper(), FOOD.upper(), VIEW.upper(), THANKS.upper())],
        id="upper case",
    ),
]


@pytest.mark.parametrize(("response", "score", "marked"), BY_HAND)
def test_gold_by_hand(response: str, score: float, marked: list[tuple[str, str]]) -> None:
    assert gold_score(PROMPT, response) == score
    assert [(response[s.start : s.end], s.type) for s in gold_spans(PROMPT, response)] == marked


def test_gold_span_characters() -> None:
    # "Hello friends, welcome to Cafe Luna. " has 37 characters, "It serves " ten: Greek takes 47 to 52.
    response = FLAWLESS.replace("Thai", "Greek")
    assert [(s.start, s.end) for s in gold_spans(PROMPT, response)] == [(47, 52)]


def test_gold_without_closing() -> None:
    answer = "This is Inn Nora. The music is jazz. It pours tea. It serves Greek food."
    assert gold_score(NO_CLOSING, answer) == 0.0
    assert gold_score(NO_CLOSING, f"{answer} We thank you for reading.") == -0.75
    assert parse_answer(NO_CLOSING, "This is Inn Nora. It pours tea.").missing == ("music", "food")


def test_missing_names_opening_facts_and_ending_in_order() -> None:
    assert parse_answer(PROMPT, "").missing == ("opening", "food", "view", "ending")


@pytest.mark.parametrize(
    ("initial", "revised"),
    [
        (FLAWLESS.replace("Thai", "Greek"), FLAWLESS),
        (FLAWLESS.replace("Cafe Luna", "ugly Cafe Rosa"), FLAWLESS),
        (FLAWLESS.replace("faces", "really faces"), FLAWLESS),
        (FLAWLESS.replace("food.", "food really."), FLAWLESS),
        (f"{OPENING} Do not bother us. {FOOD} {VIEW} The staff are kind. {THANKS}", FLAWLESS),
        (f"{OPENING} It food Thai food. {FOOD} {VIEW} {THANKS} It is the", FLAWLESS),
        (FLAWLESS[:-1], FLAWLESS),
        (f"{OPENING} {FOOD} {VIEW} We thank you for reading. Do not bother us", FLAWLESS),
    ],
)
def test_edits_by_hand(initial: str, revised: str) -> None:
    assert revise(PROMPT, initial, PERFECT, random.Random(0)) == revised


# Where the editor chooses among wordings, an expression describes them all.
FOOD_INSERTED, THANKS_INSERTED = r"(\w+ )+Thai( food)?\.", r"(We thank|Many thanks) [\w ]+\."
WARM_INSERTED = r"(Hello friends, welcome to|Dear friends, come and see) Cafe Luna\."


@pytest.mark.parametrize(
    ("initial", "pattern"),
    [
        pytest.param(f"{OPENING} {VIEW} {THANKS}", f"{OPENING} {FOOD_INSERTED} {VIEW} {THANKS}", id="fact left out"),
        pytest.param(
            f"{OPENING} {FOOD} {THANKS}", rf"{OPENING} {FOOD} [\w ]+ lake\. {THANKS}", id="second fact left out"
        ),
        pytest.param(f"{OPENING} {FOOD} {VIEW}", f"{OPENING} {FOOD} {VIEW} {THANKS_INSERTED}", id="ending left out"),
        pytest.param(f"{FOOD} {VIEW} {THANKS}", f"{WARM_INSERTED} {FOOD} {VIEW} {THANKS}", id="opening left out"),
        pytest.param(
            f"Here is Cafe Luna. {FOOD} {VIEW} {THANKS}",
            f"{WARM_INSERTED} {FOOD} {VIEW} {THANKS}",
            id="wrong opening",
        ),
        pytest.param(
            f"{OPENING} {FOOD} {VIEW} Enjoy your stay with us.",
            f"{OPENING} {FOOD} {VIEW} {THANKS_INSERTED}",
            id="wrong ending",
        ),
        pytest.param("", f"{WARM_INSERTED} {FOOD_INSERTED} [\\w ]+ lake\\. {THANKS_INSERTED}", id="empty"),
    ],
)
def test_edits_that_choose_their_words(initial: str, pattern: str) -> None:
    for seed in range(8):
        assert re.fullmatch(pattern, revise(PROMPT, initial, PERFECT, random.Random(seed)))


def test_language_keeps_the_promises_that_the_parser_relies_on() -> None:
    values = [value for group in world.VALUES.values() for value in group]
    assert len(values) == len(set(values))
    fixed = {word for pattern in PATTERNS for word in pattern.words}
    noise = {*world.RUDE_WORDS, *world.FILLER_WORDS}
    assert not noise & (fixed | set(values) | set(world.NAMES) | set(world.KINDS))
    for i, one in enumerate(PATTERNS):
        for other in PATTERNS[:i]:
            same = len(one.words) == len(other.words) and all(
                a == b or "{}" in (a, b) for a, b in zip(one.words, other.words, strict=True)
            )
            assert not same, f"one sentence can be read as {one} and as {other}"
    fact_sets = sum(
        math.prod(len(world.VALUES[a]) for a in chosen) for n in (4, 5) for chosen in _subsets(world.ATTRIBUTES, n)
    )
    assert fact_sets > 100_000
    assert 150 <= len(world.vocabulary()) <= 300


def _subsets(items: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    if size == 0:
        return [()]
    return [(item, *rest) for i, item in enumerate(items) for rest in _subsets(items[i + 1 :], size - 1)]


def test_prompts_round_trip() -> None:
    rng = random.Random(0)
    for _ in range(500):
        brief = world.sample_brief(rng)
        assert world.parse_prompt(world.render_prompt(brief)) == brief


def test_a_fact_set_is_the_facts_in_any_order() -> None:
    one = world.parse_prompt(PROMPT)
    other = world.parse_prompt(
        "Inn Rosa: staff kind, view lake, food Thai, price low. Mention price and staff. Be plain. No closing."
    )
    assert one.fact_set == other.fact_set
    assert one.fact_set != world.parse_prompt(PROMPT.replace("low", "high")).fact_set


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Tell me a story.",
        PROMPT.replace("warm", "loud"),
        PROMPT.replace("food and view", "food and music"),
        PROMPT.replace("food and view", "food and food"),
        PROMPT.replace("End with thanks.", "End with a song."),
        PROMPT.replace("price low", "food Greek"),
    ],
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="not a prompt of the simulated world"):
        gold_score(prompt, FLAWLESS)


@pytest.mark.parametrize("mean_flaws", [0.4, 1.4, 4.0])
def test_parser_finds_exactly_what_writers_did(mean_flaws: float) -> None:
    rng = random.Random(f"exact/{mean_flaws}")
    kinds: dict[str, int] = {}
    for _ in range(1500):
        brief = world.sample_brief(rng)
        prompt, answer = world.render_prompt(brief), write_answer(brief, mean_flaws, rng)
        assert gold_spans(prompt, answer.text) == answer.spans, (prompt, answer)
        found = sorted(flaw.kind for flaw in parse_answer(prompt, answer.text).flaws)
        assert found == sorted(flaw.kind for flaw in answer.flaws), (prompt, answer)
        for kind in found:
            kinds[kind] = kinds.get(kind, 0) + 1
    # Kinds are drawn uniformly; only at many flaws an answer some find no place any more.
    assert kinds.keys() == FLAW_MAKERS.keys()
    assert all(0.14 < count / sum(kinds.values()) < 0.26 for count in kinds.values()), kinds


def test_lies_about_name_or_kind_are_as_many_as_stated() -> None:
    # Stated: 1 in 4 draws takes any slot: 2 of the opening and, on average, 2.5 facts. (2/4 + 2/5) / 2 / 4 = 0.1125.
    rng, lies, names = random.Random("lies"), 0, 0
    for _ in range(4000):
        brief = world.sample_brief(rng)
        answer = write_answer(brief, 0.4, rng)
        for flaw in answer.flaws:
            lies += flaw.kind == "untruthful"
            names += flaw.kind == "untruthful" and answer.text[flaw.start : flaw.end] in world.KINDS + world.NAMES
    assert abs(names / lies - 0.1125) < 4 * math.sqrt(0.1125 * 0.8875 / lies)


def test_writers_make_as_many_flaws_as_stated() -> None:
    for mean in (0.4, 1.4, 2.4):
        rng = random.Random(f"count/{mean}")
        counts = [len(write_answer(world.sample_brief(rng), mean, rng).flaws) for _ in range(3000)]
        assert abs(sum(counts) / 3000 - mean) < 4 * math.sqrt(mean / 3000)


def test_average_writer_scores() -> None:
    rng = random.Random("scores")
    scores, lengths = [], []
    for _ in range(3000):
        brief = world.sample_brief(rng)
        prompt, text = world.render_prompt(brief), write_answer(brief, 1.4, rng).text
        scores.append(gold_score(prompt, text))
        lengths.append(len(re.findall(r"\w+", text)))
        assert 18 <= len(re.findall(r"\w+", prompt)) <= 24
    mean = sum(scores) / 3000
    # 1.4 flaws of mean severity (1.5 + 1 + 1 + 0.75 + 0.5) / 5 = 0.95.
    assert abs(mean - -1.33) < 0.1
    assert math.sqrt(sum((score - mean) ** 2 for score in scores) / 3000) > 1.0
    assert min(lengths) >= 7 and max(lengths) <= 50


def _damaged(text: str, rng: random.Random) -> str:
    """Text as a bad model might write it: words inserted, lost, repeated, cut off, and odd characters."""
    for _ in range(rng.randint(1, 4)):
        words = text.split(" ")
        place = rng.randrange(len(words))
        action = rng.choice(("word", "mark", "lose", "cut", "repeat"))
        if action == "word":
            words.insert(place, rng.choice(world.vocabulary()))
        elif action == "mark":
            words.insert(place, rng.choice((".", ",", "!", "?", "..", "\n", "_", "é", "<s>", "\u200b")))
        elif action == "lose":
            words.pop(place)
        elif action == "cut":
            words = words[:place]
        else:
            words += words[place:]
        text = " ".join(words)[: None if rng.random() < 0.8 else -1]
    return text


def test_any_text_is_judged_and_can_be_repaired() -> None:
    rng = random.Random("damage")
    for _ in range(1200):
        brief = world.sample_brief(rng)
        prompt, text = world.render_prompt(brief), _damaged(write_answer(brief, 0.7, rng).text, rng)
        parse, spans = parse_answer(prompt, text), gold_spans(prompt, text)
        assert (gold_score(prompt, text) < 0.0) == bool(parse.flaws)
        assert all(a.end <= b.start for a, b in pairwise(spans))
        revised = revise(prompt, text, PERFECT, rng)
        assert gold_score(prompt, revised) == 0.0, (prompt, text, revised)
        assert revised == text or parse.flaws
        # Minimal: every word outside the spans is still there, in the order it had.
        kept = "".join(" " if any(s.start <= i < s.end for s in spans) else c for i, c in enumerate(text))
        left = iter(re.findall(r"\w+", revised))
        assert all(word in left for word in re.findall(r"\w+", kept)), (text, revised)


def test_nothing_added_to_a_flawless_answer_is_free() -> None:
    rng = random.Random("addition")
    sentences = [world.fill(t, *["low"] * t.count("{}")) for group in world.FACTS.values() for t in group]
    sentences += [world.fill(t) for group in world.ENDINGS.values() for t in group]
    sentences += [OPENING, *(world.fill(t) for t in (*world.RUDE_SENTENCES, *world.FILLER_SENTENCES))]
    words = [*world.vocabulary(), ".", ",", "!", "zzz"]
    places = [0, *(m.start() for m in re.finditer(" ", FLAWLESS)), len(FLAWLESS)]
    for addition in (*words, *sentences):
        for place in rng.sample(places, 6):
            assert gold_score(PROMPT, f"{FLAWLESS[:place]} {addition} {FLAWLESS[place:]}") <= -0.5, addition


def test_longer_loops_score_lower() -> None:
    for loop in (FLAWLESS, FOOD, "food food food.", "really", "It serves", THANKS, OPENING):
        scores = [gold_score(PROMPT, " ".join([FLAWLESS, *[loop] * n])) for n in range(6)]
        assert all(later <= earlier - 0.25 for earlier, later in pairwise(scores)), loop


def test_people_flip_as_stated() -> None:
    # The first is worse by 0.5: with temperature 0.5 it wins with sigmoid(-1) = 0.26894, reported with noise 0.1.
    filler = FLAWLESS.replace("faces", "really faces")
    lie = FLAWLESS.replace("Cafe Luna", "Inn Rosa")
    rng, trials = random.Random("people"), 1200

    def rate(first: str, second: str, noise: float) -> float:
        return sum(prefers_first(PROMPT, first, second, 0.5, noise, rng) for _ in range(trials)) / trials

    assert abs(rate(filler, FLAWLESS, 0.0) - 0.26894) < 0.04
    assert abs(rate(filler, FLAWLESS, 0.1) - (0.26894 * 0.9 + 0.73106 * 0.1)) < 0.04
    assert abs(rate(FLAWLESS, FLAWLESS, 0.1) - 0.5) < 0.045
    # A gap of 3 is six temperatures, sigmoid(6) = 0.9975: nearly all that is left is the noise.
    assert abs(rate(FLAWLESS, lie, 0.1) - (0.9975 * 0.9 + 0.0025 * 0.1)) < 0.02


def test_the_editor_misses_as_stated() -> None:
    config = SimulatedConfig(miss_rate=0.2, wrong_correction_rate=0.0)
    rng, before, after = random.Random("misses"), 0, 0
    for _ in range(2000):
        brief = world.sample_brief(rng)
        prompt, text = world.render_prompt(brief), write_answer(brief, 2.0, rng).text
        before += len(parse_answer(prompt, text).flaws)
        after += len(parse_answer(prompt, revise(prompt, text, config, rng)).flaws)
    assert before > 3500
    assert abs(after / before - 0.2) < 0.025


def test_a_wrong_correction_is_always_wrong() -> None:
    config = SimulatedConfig(miss_rate=0.0, wrong_correction_rate=1.0)
    assert all(gold_score(PROMPT, revise(PROMPT, FLAWLESS, config, random.Random(i))) == -1.5 for i in range(100))


def test_the_editor_corrects_wrongly_as_stated() -> None:
    config = SimulatedConfig(miss_rate=0.0, wrong_correction_rate=0.1)
    rng, wrong = random.Random("wrong"), 0
    for _ in range(3000):
        revised = revise(PROMPT, FLAWLESS, config, rng)
        if revised != FLAWLESS:
            wrong += 1
            differing = [(a, b) for a, b in zip(FLAWLESS.split(), revised.split(), strict=True) if a != b]
            ((old, new),) = differing
            attribute = {"Thai": "food", "lake.": "view"}[old]
            assert new.rstrip(".") in world.VALUES[attribute]
            assert gold_score(PROMPT, revised) == -1.5
    assert abs(wrong / 3000 - 0.1) < 0.02


def test_a_revision_is_never_empty() -> None:
    assert revise(PROMPT, "zzz.", SimulatedConfig(miss_rate=1.0), random.Random(0)) == "zzz."
    kept = [revise(PROMPT, "zzz.", SimulatedConfig(miss_rate=0.8), random.Random(i)) for i in range(100)]
    assert all(text.strip() for text in kept)


def test_annotate_edits_rejected_responses_only_where_needed() -> None:
    flawed = FLAWLESS.replace("Thai", "Greek")
    split = RawSplit(
        preferences=[
            Preference(id="a", prompt=PROMPT, chosen=FLAWLESS, rejected=flawed),
            Preference(id="b", prompt=PROMPT, chosen=flawed, rejected=FLAWLESS),
        ]
    )
    (edit,) = annotate(split, PERFECT, "train")
    assert (edit.id, edit.prompt, edit.initial, edit.revised) == ("a", PROMPT, flawed, FLAWLESS)


SMALL = {
    **{"n_train_corpus": 150, "n_train_prompts": 40, "n_train_demonstrations": 60, "n_train_preferences": 80},
    **{"n_validation_prompts": 20, "n_validation_demonstrations": 15, "n_validation_preferences": 25},
    **{"n_test_prompts": 30, "n_test_preferences": 35},
}


@pytest.fixture(scope="module")
def default_data() -> RawData:
    return build(SimulatorConfig(), Path("unused"))


def test_sizes_ids_and_truth(default_data: RawData) -> None:
    sizes = {
        split: [len(getattr(raw, kind)) for kind in ("prompts", "corpus", "demonstrations", "preferences")]
        for split, raw in default_data.splits.items()
    }
    assert sizes == {"train": [1500, 8000, 2000, 1500], "validation": [128, 0, 200, 300], "test": [200, 0, 0, 300]}
    for split in SPLITS:
        raw, truth = default_data.splits[split], default_data.truth[split]
        records = [*raw.prompts, *raw.corpus, *raw.demonstrations, *raw.preferences]
        assert len({record.id for record in records}) == len(records)
        assert all(record.id.startswith(f"{split}-") for record in records)
        expected = [] if split == "train" else [(p.id, p.prompt) for p in (*raw.prompts, *raw.preferences)]
        assert [(r.id, r.prompt) for r in truth.references] == expected
        # Training may read one answer by an expert to each prompt of its preferences.
        expected = [(p.id, p.prompt) for p in raw.preferences] if split == "train" else []
        assert [(r.id, r.prompt) for r in raw.references] == expected
        sides = [
            (p.id, side, text)
            for p in raw.preferences
            for side, text in (("initial", p.rejected), ("chosen", p.chosen))
        ]
        assert [(m.id, m.side, m.text) for m in truth.marks] == sides
        prompts = {p.id: p.prompt for p in raw.preferences}
        assert all(mark.spans == gold_spans(prompts[mark.id], mark.text) for mark in truth.marks)


def test_no_set_of_facts_is_used_twice(default_data: RawData) -> None:
    fact_sets = [
        world.parse_prompt(record.prompt).fact_set
        for raw in default_data.splits.values()
        for record in (*raw.prompts, *raw.corpus, *raw.demonstrations, *raw.preferences)
    ]
    assert len(fact_sets) == 14_128
    assert len(set(fact_sets)) == len(fact_sets)


def test_references_of_training_are_by_experts_and_change_no_other_record(default_data: RawData) -> None:
    found = default_data.splits["train"].references
    flaws = [len(parse_answer(r.prompt, r.completion).flaws) for r in found]
    # Poisson with mean 0.4 over 1,500 answers.
    assert abs(sum(flaws) / len(flaws) - 0.4) < 4 * math.sqrt(0.4 / len(flaws))
    assert found[0].id == "train-preference-00000"
    alone = random.Random("0/train-preference-00000/reference")
    assert found[0].completion == write_answer(world.parse_prompt(found[0].prompt), 0.4, alone).text
    rejected = {p.id: p.rejected for p in default_data.splits["train"].preferences}
    assert sum(r.completion == rejected[r.id] for r in found) < 0.05 * len(found)
    # Two answers by writers of the mixture, drawn first, from the record's own stream.
    first = default_data.splits["train"].preferences[0]
    brief, rng = world.parse_prompt(first.prompt), random.Random("0/train-preference-00000")
    written = set()
    for _ in range(2):
        mean = rng.choices((2.4, 1.4, 0.4), weights=(0.25, 0.5, 0.25))[0]
        written.add(write_answer(brief, mean, rng).text)
    assert written == {first.chosen, first.rejected}


def test_preferences_agree_with_the_truth_as_often_as_stated(default_data: RawData) -> None:
    pairs = default_data.splits["train"].preferences
    gaps = [gold_score(p.prompt, p.chosen) - gold_score(p.prompt, p.rejected) for p in pairs]
    decided = [gap for gap in gaps if gap != 0.0]
    flipped = sum(gap < 0.0 for gap in decided) / len(decided)
    # What the stated model of a person expects for these gaps, given temperature 0.5 and noise 0.05.
    right = [1.0 / (1.0 + math.exp(-abs(gap) / 0.5)) for gap in decided]
    expected = sum(1.0 - (0.95 * p + 0.05 * (1.0 - p)) for p in right) / len(right)
    assert abs(flipped - expected) < 4 * math.sqrt(expected * (1 - expected) / len(decided))
    assert 0.05 < flipped < 0.2
    assert all(p.chosen != p.rejected for p in pairs)


def test_references_leave_room_above_and_below(default_data: RawData) -> None:
    rng = random.Random("win rates")
    references = [r for split in ("validation", "test") for r in default_data.truth[split].references]

    def win_rate(mean_flaws: float) -> float:
        wins = 0.0
        for _ in range(4):
            for r in references:
                answer = write_answer(world.parse_prompt(r.prompt), mean_flaws, rng).text
                gap = gold_score(r.prompt, answer) - gold_score(r.prompt, r.reference)
                wins += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        return wins / (4 * len(references))

    assert 0.36 < win_rate(SimulatorConfig().average_flaws) < 0.5
    assert 0.78 < win_rate(0.0) < 0.87


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_builds_are_equal_byte_by_byte(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        data = build(SimulatorConfig(seed=seed, **SMALL), Path("x"))
        write_raw(data, tmp_path / name / "raw", tmp_path / name / "gold")
    one, two, other = (_files(tmp_path / name) for name in ("one", "two", "other"))
    # Five kinds and two of truth in each of three splits, and the references of train.
    assert len(one) == 22 and one == two and "raw/train/references.jsonl" in one
    assert one.keys() == other.keys() and one["raw/train/corpus.jsonl"] != other["raw/train/corpus.jsonl"]
    data = build(SimulatorConfig(seed=3, **SMALL), Path("y"))
    assert read_split(tmp_path / "one" / "raw" / "train") == data.splits["train"]
    assert read_truth(tmp_path / "one" / "gold" / "test") == data.truth["test"]


def test_records_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import hashlib; from pathlib import Path; from fgalign.sources.simulator import SimulatorConfig, build; "
        f"print(hashlib.sha256(repr(build(SimulatorConfig(**{SMALL!r}), Path('x'))).encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_more_training_data_leaves_the_other_splits_as_they_are() -> None:
    small = build(SimulatorConfig(**SMALL), Path("x"))
    more = build(SimulatorConfig(**{**SMALL, "n_train_corpus": 300, "n_train_preferences": 90}), Path("x"))
    for split in ("validation", "test"):
        assert small.splits[split] == more.splits[split] and small.truth[split] == more.truth[split]
    assert small.splits["train"].preferences == more.splits["train"].preferences[:80]


def test_a_redraw_gives_other_test_prompts_and_leaves_all_else() -> None:
    small = {"n_train_corpus": 300, "n_test_prompts": 40, "n_test_preferences": 30}
    first = build(SimulatorConfig(**small), Path())
    again = build(SimulatorConfig(**small, test_redraws=2), Path())
    for split in ("train", "validation"):
        assert again.splits[split] == first.splits[split] and again.truth[split] == first.truth[split]
    test = again.splits["test"]
    assert [record.id for record in test.prompts] == [f"test-prompt-{number:05d}" for number in range(80, 120)]
    assert [record.id for record in test.preferences] == [f"test-preference-{number:05d}" for number in range(60, 90)]
    assert {record.id for record in again.truth["test"].references} == {
        record.id for record in (*test.prompts, *test.preferences)
    }
    old = {
        record.prompt
        for data in (first, build(SimulatorConfig(**small, test_redraws=1), Path()))
        for part in data.splits.values()
        for record in (*part.prompts, *part.preferences, *part.demonstrations, *part.corpus)
    }
    new = [world.parse_prompt(record.prompt).fact_set for record in (*test.prompts, *test.preferences)]
    assert len(set(new)) == 70 and not set(new) & {world.parse_prompt(prompt).fact_set for prompt in old}


def test_every_rate_of_the_config_is_read() -> None:
    plain = build(SimulatorConfig(**SMALL), Path("x"))
    for field, value in {
        **{"novice_flaws": 3.0, "average_flaws": 1.0, "expert_flaws": 0.1, "reference_flaws": 0.3, "temperature": 2.0},
        **{"novice_weight": 2.0, "average_weight": 3.0, "expert_weight": 2.0, "label_noise": 0.4, "seed": 9},
    }.items():
        assert build(SimulatorConfig(**{**SMALL, field: value}), Path("x")) != plain, field


def test_each_record_has_its_own_luck() -> None:
    flawed = FLAWLESS.replace("Thai", "Greek")
    pairs = [Preference(id=str(i), prompt=PROMPT, chosen=FLAWLESS, rejected=flawed) for i in range(200)]
    edits = annotate(RawSplit(preferences=pairs), SimulatedConfig(miss_rate=0.5, wrong_correction_rate=0.0), "train")
    assert 70 < len(edits) < 130


def test_edits_are_deterministic_and_differ_by_seed() -> None:
    split = build(SimulatorConfig(**SMALL), Path("x")).splits["train"]
    config = SimulatedConfig(miss_rate=0.3)
    assert annotate(split, config, "train") == annotate(split, config, "train")
    assert annotate(split, config, "train") != annotate(split, SimulatedConfig(miss_rate=0.3, seed=1), "train")
    # An edit does not depend on the records beside it.
    alone = [e for p in split.preferences for e in annotate(RawSplit(preferences=[p]), config, "train")]
    assert alone == annotate(split, config, "train")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (SimulatorConfig, {"n_train_corpora": 3}, "n_train_corpora"),
        (SimulatorConfig, {"n_test_prompts": 0}, "n_test_prompts"),
        (SimulatorConfig, {"temperature": 0.0}, "temperature"),
        (SimulatorConfig, {"label_noise": 1.5}, "label_noise"),
        (SimulatorConfig, {"novice_weight": 0.0, "average_weight": 0.0, "expert_weight": 0.0}, "all three are 0"),
        (SimulatorConfig, {"n_train_corpus": 10_000_000}, "sets of facts"),
        (SimulatedConfig, {"miss_rate": -0.1}, "miss_rate"),
    ],
)
def test_bad_configs_are_refused(kind: type, value: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(value, kind, "params.yaml: source")
