"""Sampling and log-probabilities: what a row gets depends on the row alone, and agrees with a plain loop."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, MistralConfig, MistralForCausalLM

from fgalign.core.kv_cache import GrowingCache
from fgalign.core.modeling import attend_in_float32
from fgalign.core.rollout import (
    CompiledDecoder,
    Decoder,
    Rollout,
    response_logits,
    response_logps,
    sample_all,
    sample_responses,
    sample_tokens,
    uniforms,
)
from fgalign.core.tensor_ops import pad

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]
BUDGET = 10


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


def rollout_of(prompts, responses, extra_left=0, extra_right=0):
    """A rollout of given tokens, with more padding than it needs: the extra columns belong to rows cut away again."""
    prompts = [*prompts, [2] * (max(map(len, prompts)) + extra_left)]
    responses = [*responses, [2] * (max(map(len, responses)) + extra_right)]
    fields = []
    for rows, side in ((prompts, "left"), (responses, "right")):
        fields += [pad(rows, 0, side=side), pad([[1] * len(row) for row in rows], 0, side=side).bool()]
    return Rollout(*(field[:-1] for field in fields), torch.zeros(len(prompts) - 1, dtype=torch.bool))


def sample(model, prompts, uniform, temperature=1.0, decoder=None):
    return sample_responses(
        model,
        pad(prompts, 0, side="left"),
        pad([[1] * len(row) for row in prompts], 0, side="left").bool(),
        uniform,
        eos_token_id=1,
        pad_token_id=0,
        temperature=temperature,
        decoder=decoder,
    )


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.4999, 0), (0.5001, 1), (0.7499, 1), (0.7501, 2), (1 - 2**-53, 2)]
)
def test_inverse_of_the_cumulative_distribution(uniform, token):
    # Probabilities 1/2, 1/4, 1/4: cumulative 0.5, 0.75, 1.
    logits = tensor([[math.log(2), 0.0, 0.0]])
    assert sample_tokens(logits, tensor([uniform], dtype=torch.float64), 1.0).tolist() == [token]


def test_temperature():
    # Logits 0 and ln 3 at temperature 1/2 are 0 and ln 9: probabilities 0.1 and 0.9. At 0 the larger always wins.
    logits, uniform = tensor([[0.0, math.log(3)]] * 2), tensor([0.0999, 0.1001], dtype=torch.float64)
    assert sample_tokens(logits, uniform, 0.5).tolist() == [0, 1]
    assert sample_tokens(logits, uniform, 1.0).tolist() == [0, 0]  # 0.25 and 0.75
    assert sample_tokens(logits, uniform, 0).tolist() == [1, 1]


def test_impossible_tokens_are_never_drawn():
    logits = tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert sample_tokens(logits, tensor([uniform], dtype=torch.float64), 1.0).item() in (1, 2)


def test_the_largest_random_number_draws_a_token():
    # Rounding may leave the last cumulative probability a little above or below 1.
    logits = 3 * torch.randn(2000, 30, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits, torch.full((2000,), 1 - 2**-53, dtype=torch.float64), 1.0)
    assert set(drawn.tolist()) == {29}


def test_sampled_frequencies_are_the_probabilities():
    # 1,000 evenly spread random numbers fall into each interval in proportion to its length, to one in 1,000.
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sample_tokens(logits.expand(1000, -1), uniform, 0.7)
    frequencies = torch.bincount(drawn, minlength=30) / 1000
    close(frequencies, (logits / 0.7).softmax(-1), 1.1e-3)


def test_uniforms():
    first, again = (uniforms(3, 4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 4) and first.dtype == torch.float64
    assert bool(((first >= 0) & (first < 1)).all())


# --- a response -------------------------------------------------------------------------------------------------------


class Script:
    """A causal LM that always says the next token of its script, with probability 1."""

    training = True
    config = LlamaConfig(num_hidden_layers=1)

    def __init__(self, rows):
        self.rows, self.step, self.masks, self.modes = rows, 0, [], []

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def __call__(self, input_ids, attention_mask, position_ids, **_):
        self.modes.append(self.training)
        self.masks.append(attention_mask.tolist())
        logits = torch.full((len(self.rows), 1, 30), -math.inf)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[self.step]] = 0.0
        self.step += 1
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_end_of_sequence_and_budget():
    # Row 0 ends at its second token, row 1 with its last allowed one, row 2 is cut off; what row 0 would say after its
    # end is dropped.
    model = Script([[5, 1, 7, 7], [6, 8, 9, 1], [7, 7, 7, 7]])
    rollout = sample(model, [[20], [21, 22], [23]], torch.zeros(3, 4, dtype=torch.float64))
    assert rollout.response_ids.tolist() == [[5, 1, 0, 0], [6, 8, 9, 1], [7, 7, 7, 7]]
    assert rollout.response_mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert rollout.truncated.tolist() == [False, False, True]
    assert rollout.response_lists() == [[5, 1], [6, 8, 9, 1], [7, 7, 7, 7]]
    # The end token itself may be attended to, the padding after it may not.
    assert model.masks == [
        [[0, 1], [1, 1], [0, 1]],
        [[0, 1, 1], [1, 1, 1], [0, 1, 1]],
        [[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
        [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    ]
    assert model.modes == [False] * 4 and model.training is True


def test_sampling_stops_when_every_row_has_ended():
    model = Script([[5, 1], [1, 9]])
    rollout = sample(model, [[20], [21]], torch.zeros(2, 50, dtype=torch.float64))
    assert rollout.response_ids.tolist() == [[5, 1], [1, 0]]
    assert model.step == 2
    assert rollout.truncated.tolist() == [False, False]


def test_the_pad_token_is_a_token_like_others_inside_a_response():
    # A policy may say the pad token; only what comes after the end is padding.
    rollout = sample(Script([[0, 5, 1]]), [[20]], torch.zeros(1, 5, dtype=torch.float64))
    assert rollout.response_lists() == [[0, 5, 1]]


def plain_sample(model, prompt, uniform, temperature):
    """One response without batch, padding, cache or tensors of random numbers."""
    ids, response = list(prompt), []
    for number in uniform.tolist():
        logits = model(input_ids=tensor([ids])).logits[0, -1].double()
        cumulative, token = 0.0, -1
        for probability in (logits / temperature).softmax(-1).tolist():
            token += 1
            cumulative += probability
            if number < cumulative:
                break
        response.append(token)
        ids.append(token)
        if token == 1:
            break
    return response


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_agrees_with_a_plain_loop(make_model, temperature):
    model = make_model(vocab_size=12)  # few tokens, so that some rows end early
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    uniform = uniforms(5, BUDGET, torch.Generator().manual_seed(1))
    rollout = sample(model, prompts, uniform, temperature)
    expected = [plain_sample(model, prompts[row], uniform[row], temperature) for row in range(5)]
    assert rollout.response_lists() == expected
    assert rollout.truncated.tolist() == [1 not in row for row in expected]
    assert len({len(row) for row in expected}) > 1  # the test would say little if all were equally long


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_compiled_decoder_draws_the_same(make_model, monkeypatch, temperature):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = make_model(vocab_size=12)
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    decoder = CompiledDecoder(model)
    held = []
    for seed, rows, budget in ((1, 5, BUDGET), (2, 5, BUDGET), (3, 3, BUDGET), (4, 3, 64), (5, 5, BUDGET)):
        uniform = uniforms(rows, budget, torch.Generator().manual_seed(seed))
        expected, found = (sample(model, prompts[:rows], uniform, temperature, with_) for with_ in (None, decoder))
        assert found.response_lists() == expected.response_lists()
        held.append({rows: cache.layers[0].keys.shape[2] for rows, cache in decoder._caches.items()})
    # The longest prompt and BUDGET have fewer than 64 tokens; a longer cache replaces all that are shorter.
    assert held == [{5: 64}, {5: 64}, {5: 64, 3: 64}, {3: 128}, {3: 128, 5: 128}]


def test_layers_with_sliding_windows_are_compiled_as_often_as_others(monkeypatch):
    graphs = []

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    settings = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    uniform = uniforms(5, BUDGET, torch.Generator().manual_seed(1))
    compiled, drawn = {}, {}
    for window in (None, 4):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**settings, sliding_window=window)).eval()
        torch._dynamo.reset()
        graphs.clear()
        decoder = CompiledDecoder(model)
        for _ in range(2):
            drawn[window] = sample(model, PROMPTS, uniform, decoder=decoder).response_lists()
        compiled[window] = len(graphs)
        assert drawn[window] == sample(model, PROMPTS, uniform).response_lists()
    assert compiled[4] == compiled[None] > 0
    # With the longest prompt, of five tokens, the first token drawn lies beyond the window already.
    assert drawn[4] != drawn[None]


@pytest.mark.parametrize("kind", [Decoder, CompiledDecoder])
@pytest.mark.parametrize(
    ("bf16", "float32_attention", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (True, True, torch.float32)],
)
def test_the_cache_holds_keys_and_values_in_one_type(make_model, monkeypatch, kind, bf16, float32_attention, expected):
    # Under autocast the rotary embedding makes float32 of the keys, which a cache of fixed size cannot hold beside the
    # values.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = make_model()
    if float32_attention:
        attend_in_float32(model)
    decoder = kind(model)
    uniform = uniforms(5, 3, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sample(model, PROMPTS, uniform, 1.0, decoder)
    types = {part.dtype for layer in decoder.cache.layers for part in (layer.keys, layer.values)}
    assert types == {expected}


def test_the_cache_grows_in_place(make_model):
    model, decoder = make_model(), Decoder(make_model())
    decoder.start(1, 6)
    places = []
    for seen, ids in ((3, [[5, 6, 7]]), (4, [[8]]), (5, [[9]])):
        positions = torch.arange(seen - len(ids[0]), seen)[None]
        found, _ = decoder.step(tensor(ids), torch.ones(1, 6).long(), positions, seen, hidden=False)
        expected = model(input_ids=tensor([[5, 6, 7, 8, 9][:seen]])).logits[:, -1]
        close(found.detach(), expected.detach())
        layers = decoder.cache.layers
        assert [part.shape[2] for layer in layers for part in (layer.keys, layer.values)] == [seen] * 4
        places.append([part.data_ptr() for layer in layers for part in (layer.keys, layer.values)])
    assert places[0] == places[1] == places[2] and len(set(places[0])) == 4


def test_layers_with_sliding_windows_keep_their_cache():
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], vocab_size=30)
    sliding, full = GrowingCache(config, 7).layers
    expected = DynamicCache(config=config).layers
    assert type(sliding) is type(expected[0]) is not type(full)
    assert isinstance(full, type(expected[1])) and full.length == 7


def test_agrees_with_greedy_generate(make_model):
    model = make_model(seed=3)
    rollout = sample(model, PROMPTS, uniforms(5, BUDGET, torch.Generator().manual_seed(0)), temperature=0)
    generated = model.generate(
        input_ids=pad(PROMPTS, 0, side="left"),
        attention_mask=pad([[1] * len(row) for row in PROMPTS], 0, side="left"),
        max_new_tokens=BUDGET,
        do_sample=False,
    )[:, 5:]
    assert rollout.response_ids.tolist() == generated.tolist()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_do_not_matter(make_model, size):
    model = make_model(vocab_size=12)
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    uniform = uniforms(5, BUDGET, torch.Generator().manual_seed(2))
    done = []
    batches = sample_all(model, prompts, uniform, batch_size=size, eos_token_id=1, pad_token_id=0, progress=done.append)
    assert [len(batch.truncated) for batch in batches] == done
    assert sum(done) == 5
    found = [row for batch in batches for row in batch.response_lists()]
    assert found == sample(model, prompts, uniform).response_lists()


# --- log-probabilities ------------------------------------------------------------------------------------------------

RESPONSES = [[3, 4, 1], [5, 1], [6, 7, 8, 9, 1], [1], [2, 3, 4]]


@pytest.fixture(scope="module")
def plain_logps(make_model):
    """Log-probability of each response token, row by row, without padding."""
    model = make_model()
    out = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logps = model(input_ids=tensor([prompt + response])).logits[0].log_softmax(-1)
        out.append([logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)])
    return out


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 4), (2, 2)])
def test_logps_do_not_depend_on_padding(make_model, plain_logps, left, right):
    rollout = rollout_of(PROMPTS, RESPONSES, left, right)
    logps = response_logps(make_model(), rollout)
    assert logps.shape == (5, 5 + right)
    for row, expected in enumerate(plain_logps):
        close(logps[row, : len(expected)].detach(), expected)


def test_absolute_positions(make_gpt2):
    model = make_gpt2()
    plain = [response_logps(model, rollout_of([p], [r]))[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    together = response_logps(model, rollout_of(PROMPTS, RESPONSES, 3, 1))
    uniform = uniforms(5, BUDGET, torch.Generator().manual_seed(1))
    for row, expected in enumerate(plain):
        close(together[row, : len(expected)].detach(), expected.detach())
    assert sample(model, PROMPTS, uniform).response_lists() == [
        plain_sample(model, PROMPTS[row], uniform[row], 1.0) for row in range(5)
    ]


@pytest.mark.parametrize("chosen", [[0], [3], [2, 1], [4, 0, 3]])
def test_logps_do_not_depend_on_the_batch(make_model, plain_logps, chosen):
    rollout = rollout_of(PROMPTS, RESPONSES, extra_left=2, extra_right=1)
    for part in (
        rollout.rows(tensor(chosen)),
        rollout_of([PROMPTS[row] for row in chosen], [RESPONSES[row] for row in chosen]),
    ):
        logps = response_logps(make_model(), part).detach()
        for row, index in enumerate(chosen):
            close(logps[row, : len(RESPONSES[index])], plain_logps[index])


def test_rows_drop_common_padding():
    rollout = rollout_of(PROMPTS, RESPONSES, extra_left=2, extra_right=1)._replace(
        truncated=tensor([False, True, False, False, True])
    )
    part = rollout.rows(tensor([3, 1]))
    assert part.prompt_ids.tolist() == [[14, 15], [0, 8]]
    assert part.prompt_mask.tolist() == [[True, True], [False, True]]
    assert part.response_ids.tolist() == [[1, 0], [5, 1]]
    assert part.response_mask.tolist() == [[True, False], [True, True]]
    assert part.truncated.tolist() == [False, True]


def test_logps_at_a_temperature(make_model):
    model, rollout = make_model(), rollout_of(PROMPTS, RESPONSES)
    logits = response_logits(model, rollout)
    assert logits.shape == (5, 5, 30)
    expected = (logits / 2).log_softmax(-1).gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    close(response_logps(model, rollout, 2.0).detach(), expected.detach())


def test_gradients_flow(make_model):
    model, rollout = make_model(), rollout_of(PROMPTS, RESPONSES)
    response_logps(model, rollout)[rollout.response_mask].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
