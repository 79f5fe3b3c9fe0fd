"""Decoding: its file, best of n and prefixes by hand and against plain sampling, and how the evaluation uses them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import tensor

from fgalign.config import ConfigError, Profile, parse_section
from fgalign.core.modeling import save_model
from fgalign.core.rollout import Rollout, sample_all, uniforms
from fgalign.core.schema import Reference
from fgalign.core.tokens import decode_response, encode_prompt
from fgalign.decoding import (
    Decoding,
    best_of_n_kl,
    draw_best,
    encode_prefixed,
    keep_best,
    read_decoding,
    with_prompts,
    write_decoding,
)

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
SETTINGS = {"batch_size": 2, "eos_token_id": 1, "pad_token_id": 0}


def test_file(tmp_path):
    assert read_decoding(tmp_path) == Decoding(best_of=1, reward=None, prefix="")
    decoding = Decoding(best_of=4, reward="rm_edit", prefix="Good: ")
    write_decoding(tmp_path, decoding)
    assert json.loads((tmp_path / "decoding.json").read_text()) == {
        "best_of": 4,
        "reward": "rm_edit",
        "prefix": "Good: ",
    }
    assert read_decoding(tmp_path) == decoding
    (tmp_path / "decoding.json").write_text('{"best_off": 2}')
    with pytest.raises(ConfigError, match=r"decoding\.json\.best_off: no such key; did you mean best_of\?"):
        read_decoding(tmp_path)


@pytest.mark.parametrize("value", [{"best_of": 2}, {"best_of": 0}])
def test_bad_values(value):
    with pytest.raises(ConfigError, match=r"here\.(\(section\): .*needs `reward`|best_of: .*greater than)"):
        parse_section(value, Decoding, "here")


def test_kl_bound_by_hand():
    # ln 1 - 0, ln 2 - 1/2, ln 4 - 3/4
    assert [best_of_n_kl(n) for n in (1, 2, 4)] == pytest.approx([0.0, 0.1931472, 0.6362944], abs=1e-7)


def test_prefix_follows_the_prompt(tokenizer):
    ids = encode_prefixed(tokenizer, "where is the cat?", "here: ")
    assert ids == encode_prompt(tokenizer, "where is the cat?") + tokenizer("here: ")["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>where is the cat?<|assistant|>here: "
    assert encode_prefixed(tokenizer, "who?", "") == encode_prompt(tokenizer, "who?")


def rollout(responses, truncated):
    width = max(len(ids) for ids in responses)
    return Rollout(
        tensor([[0, 5], [6, 7], [0, 8]]),
        tensor([[0, 1], [1, 1], [0, 1]]).bool(),
        tensor([ids + [0] * (width - len(ids)) for ids in responses]),
        tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in responses]).bool(),
        tensor(truncated),
    )


def test_keep_best_by_hand():
    draws = [
        rollout([[2, 3, 1], [4, 1], [5, 6, 7, 8]], [False, False, True]),
        rollout([[9, 1], [2, 2], [1]], [False, True, False]),
    ]
    # Row 1: the second; row 2: a tie, so the first; row 3: the second. The fourth column is padding then.
    kept = keep_best(draws, tensor([[0.0, 2.0, -1.0], [0.5, 2.0, 3.0]]), 0)
    assert kept.response_lists() == [[9, 1], [4, 1], [1]]
    assert kept.response_ids.tolist() == [[9, 1], [4, 1], [1, 0]]
    assert kept.truncated.tolist() == [False, False, False]
    assert torch.equal(kept.prompt_ids, draws[0].prompt_ids) and torch.equal(kept.prompt_mask, draws[0].prompt_mask)
    kept = keep_best(draws, tensor([[0.0, 1.0, 9.0], [0.5, 2.0, 3.0]]), 0)
    assert kept.response_lists() == [[9, 1], [2, 2], [5, 6, 7, 8]]
    assert kept.truncated.tolist() == [False, True, True]


def test_other_prompts_for_the_same_responses():
    drawn = rollout([[2, 1], [3], [4]], [False, True, True])
    swapped = with_prompts(drawn, [[5, 5, 5], [6], [7, 7]], 0)
    assert swapped.prompt_ids.tolist() == [[5, 5, 5], [0, 0, 6], [0, 7, 7]]
    assert swapped.prompt_mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert all(torch.equal(a, b) for a, b in zip(swapped[2:], drawn[2:], strict=True))


def draw(model, best_of, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    return draw_best(
        model,
        PROMPTS,
        **{**SETTINGS, "best_of": best_of, "length": 6, "generator": generator, "reward": None, **options},
    )


def test_one_draw_is_plain_sampling(make_model):
    model = make_model()
    block = uniforms(5, 6, torch.Generator().manual_seed(3))
    plain = sample_all(model, PROMPTS, block, **SETTINGS)
    draws = draw(model, 1)
    assert len(draws.batches) == len(plain) == 3 and draws.scores.tolist() == []
    for found, expected in zip(draws.batches, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert draws.sampled_tokens == sum(len(ids) for rollout in plain for ids in rollout.response_lists())
    # The first draw of several is the same: a reward that falls with each call keeps it.
    order = iter(range(0, -1000, -1))
    first = draw(model, 3, reward=lambda rollout: torch.full((len(rollout.truncated),), float(next(order))))
    assert [rollout.response_lists() for rollout in first.batches] == [rollout.response_lists() for rollout in plain]


def test_the_best_of_several_draws(make_model):
    model = make_model()
    generator = torch.Generator().manual_seed(3)
    each = []
    for _ in range(4):
        batches = sample_all(model, PROMPTS, uniforms(5, 6, generator), **SETTINGS)
        each.append([ids for rollout in batches for ids in rollout.response_lists()])
    draws = draw(model, 4, reward=lambda rollout: (rollout.response_ids * rollout.response_mask).sum(1).float())
    kept = [ids for rollout in draws.batches for ids in rollout.response_lists()]
    assert kept == [max(candidates, key=sum) for candidates in zip(*each, strict=True)]
    assert draws.scores.tolist() == [sum(ids) for ids in kept]
    assert draws.sampled_tokens == sum(len(ids) for responses in each for ids in responses)
    assert kept != each[0]
    # Token rewards are summed over the response.
    by_token = draw(model, 4, reward=lambda rollout: rollout.response_ids.float() + 100 * ~rollout.response_mask)
    assert [ids for rollout in by_token.batches for ids in rollout.response_lists()] == kept


def test_complete_responses_come_first(make_model):
    model = make_model()

    def reward(rollout):  # truncated ones are the better ones
        return rollout.truncated.float() + rollout.response_mask.sum(1) / 100

    kept = draw(model, 6, reward=reward)
    assert torch.cat([rollout.truncated for rollout in kept.batches]).all()
    kept = draw(model, 6, reward=reward, complete=True)
    truncated = torch.cat([rollout.truncated for rollout in kept.batches])
    assert (~truncated).sum() > 0 and (kept.scores.isinf() == truncated).all()
    for row, ids in enumerate(ids for rollout in kept.batches for ids in rollout.response_lists()):
        assert truncated[row] or ids[-1] == 1


def test_the_policy_sees_the_prefix_and_the_reward_does_not(make_model):
    model = make_model()
    prefixed = sample_all(
        model, [[*ids, 20, 21] for ids in PROMPTS], uniforms(5, 6, torch.Generator().manual_seed(3)), **SETTINGS
    )
    seen = []

    def reward(rollout):
        seen.append(rollout)
        return torch.zeros(len(rollout.truncated))

    draws = draw(model, 2, prefix=[20, 21], reward=reward)
    assert [r.response_lists() for r in draws.batches] == [r.response_lists() for r in prefixed]
    for found in (draws.batches, seen[::2]):
        assert [
            ids[mask].tolist() for r in found for ids, mask in zip(r.prompt_ids, r.prompt_mask, strict=True)
        ] == PROMPTS


# --- evaluation -------------------------------------------------------------------------------------------------------

REFERENCES = [
    Reference(id=str(number), prompt=prompt, reference="the cat")
    for number, prompt in enumerate(["where is the cat?", "who?", "what is red?", "is the dog on the log?", "a mat?"])
]


@pytest.fixture
def answer(tmp_path, make_model, tokenizer):
    """``answer(decoding)``: the answers of a policy with that decoding (None: without a file), and all models."""
    from fgalign.evaluation.config import REWARD_MODELS
    from fgalign.stages.generate import Answerer

    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    params = {
        "seeds": [1],
        "runtime": {"device": "cpu"},
        "evaluation": {"judge": "none", "response_length": 8, "batch_size": 2, "seed": 4},
    }
    profile = Profile("tiny", tmp_path, params, tmp_path / "params.yaml")
    save_model(make_model(0, **settings), tokenizer, profile.model_folder("base"))
    save_model(make_model(1, **settings), tokenizer, profile.model_folder("sft", 1))
    save_model(make_model(2, **settings), tokenizer, profile.model_folder("mine", 1))
    for number, name in enumerate(REWARD_MODELS):
        kind, labels = ("token", 3) if name == "rm_token" else ("sequence", 1)
        save_model(
            make_model(5 + number, kind, num_labels=labels, **settings), tokenizer, profile.model_folder(name, 1)
        )

    def run(decoding, method="mine"):
        folder = profile.model_folder(method, 1)
        (folder / "decoding.json").unlink(missing_ok=True)
        if decoding is not None:
            write_decoding(folder, decoding)
        return Answerer(profile, REFERENCES).answer(folder, 1, "answer")

    run.profile = profile
    return run


def logp(model, prompt, response, temperature):
    logits = (model(input_ids=tensor([prompt + response])).logits[0].double() / temperature).log_softmax(-1)
    return sum(logits[len(prompt) + t - 1, token].item() for t, token in enumerate(response))


def plain(answer, tokenizer, prefix=""):
    """What the policy samples with the evaluation's random numbers: token ids, and their KL terms one by one."""
    from fgalign.core.modeling import load_causal_lm

    policy, sft = (load_causal_lm(answer.profile.model_folder(name, 1)).eval() for name in ("mine", "sft"))
    prompts = [encode_prompt(tokenizer, record.prompt) for record in REFERENCES]
    seen = [encode_prefixed(tokenizer, record.prompt, prefix) for record in REFERENCES]
    block = uniforms(5, 8, torch.Generator().manual_seed(5))  # seed 1 and evaluation.seed 4
    temperature = answer.profile.params["evaluation"].get("temperature", 1.0)
    batches = sample_all(
        policy, seen, block, batch_size=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, temperature=temperature
    )
    responses = [ids for rollout in batches for ids in rollout.response_lists()]
    kl = [
        logp(policy, with_prefix, ids, temperature) - logp(sft, without, ids, temperature)
        for with_prefix, without, ids in zip(seen, prompts, responses, strict=True)
    ]
    return responses, kl


@pytest.mark.parametrize(("prefix", "temperature"), [("", 1.0), ("here is the answer: ", 1.0), ("", 0.5)])
def test_answers_of_one_draw(answer, tokenizer, prefix, temperature):
    answer.profile.params["evaluation"]["temperature"] = temperature
    samples = answer(Decoding(prefix=prefix) if prefix else None)
    responses, kl = plain(answer, tokenizer, prefix)
    assert [sample.response for sample in samples] == [decode_response(tokenizer, ids) for ids in responses]
    assert [sample.tokens for sample in samples] == [len(ids) for ids in responses]
    assert [sample.kl for sample in samples] == pytest.approx(kl, abs=2e-5)
    # The reward models see the plain prompt.
    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import score_responses

    reward = load_reward("rm_edit", answer.profile.model_folder("rm_edit", 1), "cpu")
    prompts = [encode_prompt(tokenizer, record.prompt) for record in REFERENCES]
    scores = score_responses(reward, prompts, responses, tokenizer, 5, "cpu").tolist()
    assert [sample.rewards["rm_edit"] for sample in samples] == pytest.approx(scores, abs=2e-6)


def test_answers_without_a_file_are_those_of_the_defaults(answer):
    assert answer(None) == answer(Decoding())


@pytest.mark.parametrize("name", ["rm_preference", "rm_token"])
def test_answers_of_the_best_of_three(answer, name):
    one, three = answer(None), answer(Decoding(best_of=3, reward=name))
    assert all(best.rewards[name] >= first.rewards[name] for best, first in zip(three, one, strict=True))
    assert [sample.id for sample in three] == [record.id for record in REFERENCES]
    same = [
        best.response == first.response and best.rewards == first.rewards
        for best, first in zip(three, one, strict=True)
    ]
    assert not all(same)
    # The same response, kept: its KL to the SFT policy is higher by the bound for n = 3, ln 3 - 2/3.
    kept = [(best.kl, first.kl) for best, first, equal in zip(three, one, same, strict=True) if equal]
    assert kept and all(best - first == pytest.approx(0.4319456, abs=2e-6) for best, first in kept)


def test_the_best_of_equal_draws_is_refused(answer):
    answer.profile.params["evaluation"]["temperature"] = 0.0
    assert answer(None) == answer(None)
    with pytest.raises(
        ConfigError, match=r"params.yaml: evaluation.temperature: expected above 0 for .*mine.seed-1, .* best of 3 resp"
    ):
        answer(Decoding(best_of=3, reward="rm_token"))


def test_prompts_that_leave_no_room_for_a_response_are_refused(answer, tokenizer, make_gpt2):
    from fgalign.stages.generate import Answerer

    longest = max(len(encode_prompt(tokenizer, record.prompt)) for record in REFERENCES)
    prefix = len(tokenizer("the cat", add_special_tokens=False)["input_ids"])
    base = answer.profile.model_folder("base")

    def learned(positions):
        # Only its configuration is read: the policies are Llamas, which run at any position.
        make_gpt2(n_positions=positions).config.save_pretrained(base)

    learned(longest + 8)
    answer(None)
    where = rf"params.yaml: evaluation: the longest prompt \({longest} tokens\)"
    with pytest.raises(
        ConfigError, match=rf"{where}, prefix \({prefix}\) and response_length 8 together: expected at m"
    ):
        answer(Decoding(prefix="the cat"))
    learned(longest + 8 + prefix)
    answer(Decoding(prefix="the cat"))
    learned(longest + 7)
    with pytest.raises(
        ConfigError, match=rf"{where} and response_length 8 together: expected at most {longest + 7}, .*{longest + 8}$"
    ):
        Answerer(answer.profile, REFERENCES)


def test_the_best_of_the_sft_policy_has_the_bound_as_kl(answer):
    samples = answer(Decoding(best_of=4, reward="rm_preference"), "sft")
    assert {sample.kl for sample in samples} == {0.636294}
