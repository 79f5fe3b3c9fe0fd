"""Judges and outcomes, with scores worked out by hand."""

from __future__ import annotations

import math
import sys
import types

import pytest

from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.judges import Item, Judge, RewardJudgeConfig, get_judge, outcome


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # Longest common subsequence "the cat mat" = 3; P = 3/4, R = 3/6; F1 = 2 * 3 / (4 + 6) = 0.6.
        ("the cat red mat", "the cat sat on the mat", 0.6),
        # Order counts: both words are there, but only one in sequence; P = R = 1/2.
        ("dog cat", "cat dog", 0.5),
        # Case and punctuation do not count, and stemming makes "cats" and "cat" one word; P = R = 1.
        ("The CATS.", "the cat", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("?!", "cat", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(response, gold, expected):
    assert get_judge("rouge_l").score("any prompt", response, gold) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_needs_a_gold_answer():
    with pytest.raises(
        InputError, match=r"judge rouge_l: expected a gold answer for the prompt 'why\?', found none; use"
    ):
        get_judge("rouge_l").score("why?", "because", None)


def test_the_simulators_judge_hands_prompt_and_response_to_the_simulator(monkeypatch):
    """The simulator itself is tested elsewhere; here, that its score arrives unchanged and gold is not read."""
    calls = []
    module = types.ModuleType("fgalign.sources.simulator.gold")
    module.gold_score = lambda prompt, response: calls.append((prompt, response)) or -3
    monkeypatch.setitem(sys.modules, "fgalign.sources.simulator.gold", module)
    score = get_judge("simulator_gold").score("p", "r", None)
    assert score == -3.0
    assert isinstance(score, float)
    assert calls == [("p", "r")]


def test_judges_have_titles_for_captions():
    assert get_judge("simulator_gold").title == "gold score of the simulator"
    assert get_judge("rouge_l").title == "ROUGE-L F1 with the gold long answer"
    assert get_judge("rouge_l").name == "rouge_l"


def test_an_unknown_judge_is_refused():
    with pytest.raises(
        ConfigError, match=r"unknown judge 'gpt'; expected one of simulator_gold, rouge_l, llm, reward_model$"
    ):
        get_judge("gpt")


@pytest.mark.parametrize(
    ("score", "reference", "expected"),
    [(2.0, 1.0, 1.0), (1.0, 1.0, 0.5), (0.5, 1.0, 0.0), (-1.0, -2.0, 1.0), (-math.inf, 0.0, 0.0)],
)
def test_outcome_is_win_tie_or_loss(score, reference, expected):
    assert outcome(score, reference) == expected


@pytest.mark.parametrize(("score", "reference"), [(math.nan, 0.0), (0.0, math.nan)])
def test_outcome_refuses_nan(score, reference):
    with pytest.raises(
        ValueError, match=r"expected two numbers, found score (nan|0\.0) and reference_score (nan|0\.0)"
    ):
        outcome(score, reference)


def test_a_scoring_judge_compares_by_its_scores():
    calls = []

    def score(prompt, response, gold):
        calls.append(response)
        return float(len(response))

    judge = Judge("length", "length", score)
    items = [Item("p", "long", "ref"), Item("p", "re", "ref"), Item("p", "fer", "ref"), Item("q", "a", "ref", "gold")]
    assert [tuple(verdict) for verdict in judge.verdicts(items)] == [
        (4.0, 3.0, 1.0),
        (2.0, 3.0, 0.0),
        (3.0, 3.0, 0.5),
        (1.0, 3.0, 0.0),
    ]
    # A reference is scored once for each prompt and gold answer.
    assert sorted(calls) == ["a", "fer", "long", "re", "ref", "ref"]
    assert judge.counts() == {}


def test_rouge_l_behind_the_contract():
    item = Item("p", response="the cat red mat", reference="the dog", gold="the cat sat on the mat")
    # The response: 0.6, see above. The reference: "the" = 1; P = 1/2, R = 1/6; F1 = 2 * 1 / (2 + 6) = 0.25.
    (verdict,) = get_judge("rouge_l").verdicts([item])
    assert tuple(verdict) == pytest.approx((0.6, 0.25, 1.0), abs=1e-12)


@pytest.fixture
def reward_judge(make_model, tokenizer, tmp_path):
    model = make_model(
        3,
        "sequence",
        num_labels=1,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=256,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, RewardJudgeConfig(folder=str(tmp_path), batch_size=2, device="cpu")


def test_a_reward_model_judges_by_its_scores(reward_judge, tokenizer):
    import torch

    model, config = reward_judge
    judge = get_judge("reward_model", reward_model=config)
    items = [
        Item("say it", "the cat sat on the mat", "the dog"),
        Item("say it", "the dog", "the dog"),
        Item("say it", "the dog", "the cat sat on the mat"),
    ]

    def score(prompt, response):
        # The chat template of the tokenizer, by hand; one text at a time, without padding.
        ids = tokenizer(f"<|user|>{prompt}<|assistant|>{response}<|end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, 0].item()

    cat, dog = score("say it", "the cat sat on the mat"), score("say it", "the dog")
    assert abs(cat - dog) > 1e-3
    found = judge.verdicts(items)
    assert [value for verdict in found for value in verdict[:2]] == pytest.approx(
        [cat, dog, dog, dog, dog, cat], abs=1e-5
    )
    wins = [1.0, 0.5, 0.0] if cat > dog else [0.0, 0.5, 1.0]
    assert [verdict.win for verdict in found] == wins


def test_a_reward_judge_needs_its_section_and_a_sequence_model(make_model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"judge reward_model: expected a section `evaluation\.judge_options`"):
        get_judge("reward_model")
    make_model(0, "token", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a sequence-level reward model, found a token-level one"):
        get_judge("reward_model", reward_model=RewardJudgeConfig(folder=str(tmp_path)))
