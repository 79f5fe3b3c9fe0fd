"""Products of layers that read the same tensor, the copy in bf16 that samples, drawing in one go, clipping."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn, tensor

from fgalign.core.compiled import Bf16Copy, check_compiler, join_products
from fgalign.core.rollout import Recorder
from fgalign.distributed import clip_gradients
from fgalign.errors import ConfigError

IDS = tensor([[2, 3, 4, 5, 6]])


def products(model, **context):
    """Logits and gradients of a model under torch.compile, and the number of its linear layers' products."""
    torch._dynamo.reset()
    counted = []

    def backend(graph, _):
        counted.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph.forward

    with torch.autocast("cpu", torch.bfloat16, **context):
        logits = torch.compile(model, backend=backend)(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters()}, sum(counted)


@pytest.mark.parametrize("bf16", [False, True])
def test_layers_that_read_the_same_are_one_product(make_model, bf16):
    plain, joined = make_model(0), make_model(0)
    names = [name for name, _ in joined.named_parameters()]
    join_products(joined)
    join_products(None)
    assert [name for name, _ in joined.named_parameters()] == names
    assert torch.equal(joined(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # nothing changes without compiling
    (expected, gradients, many), (found, others, few) = (products(each, enabled=bf16) for each in (plain, joined))
    layers = plain.config.num_hidden_layers
    # Seven products a layer (queries, keys, values, output; gate, up, down) and the logits; then four.
    assert (many, few) == (7 * layers + 1, 4 * layers + 1)
    tolerance = 2e-2 if bf16 else 1e-5
    assert torch.allclose(found, expected, atol=tolerance)
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, atol=tolerance * float(gradient.abs().max())), name


@pytest.mark.parametrize("join", [False, True])
def test_the_copy_in_bf16_says_what_autocast_says(make_model, join):
    model = make_model(0)
    if join:
        join_products(model)
    copied = Bf16Copy(model)

    def both():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return [each(input_ids=IDS).logits for each in (model, copied.model)]

    first, same = both()
    assert torch.equal(first, same)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(*both())
    copied.sync()
    moved, same = both()
    assert torch.equal(moved, same) and not torch.equal(moved, first)
    norms = [dict(each.named_parameters())["model.norm.weight"] for each in (model, copied.model)]
    assert norms[0] is norms[1]  # what no linear layer has is shared
    assert copied.model.model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.k_proj.weight.dtype == torch.float32
    if join:
        mlp = copied.model.model.layers[0].mlp
        together = mlp.gate_proj._joined.together["weight"]
        assert torch.equal(together, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def test_drawing_in_one_go(monkeypatch):
    # Probabilities 1/4, 1/2, 1/4: 0.2 draws the first, 0.3 and 0.7 the second, 0.8 the third.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    logits = tensor([[1.0, 2.0, 1.0]]).log().expand(4, 3)
    hidden = tensor([[1.0], [2.0], [3.0], [4.0]])
    uniform = tensor([0.2, 0.3, 0.7, 0.8], dtype=torch.float64)
    for compiled in (False, True):
        recorder = Recorder(lambda states: states[:, 0] * 10, compiled)
        recorder.start()
        assert recorder.draw(logits, hidden, uniform, 1.0).tolist() == [0, 1, 1, 2]
        # At temperature 1/2 the probabilities are 1/6, 4/6, 1/6.
        assert recorder.draw(logits, hidden, uniform, 0.5).tolist() == [1, 1, 1, 1]
        logps, values, entropies = recorder.take()
        assert torch.allclose(logps.exp(), tensor([[1 / 4, 2 / 3], [1 / 2, 2 / 3], [1 / 2, 2 / 3], [1 / 4, 2 / 3]]))
        assert values.tolist() == [[10, 10], [20, 20], [30, 30], [40, 40]]
        # 1.5 bits; 1/3 log 6 + 2/3 log 1.5
        assert torch.allclose(entropies, tensor([[1.0397208, 0.8675632]]).expand(4, 2))


@pytest.mark.parametrize(("limit", "expected"), [(10.0, [3.0, 4.0]), (2.5, [1.5, 2.0])])
def test_gradients_are_clipped_to_their_norm(limit, expected):
    model = nn.Linear(2, 1)
    model.weight.grad = tensor([[3.0, 4.0]])  # the bias has none
    assert clip_gradients(model, limit, Accelerator(cpu=True)) == 5.0
    assert torch.allclose(model.weight.grad, tensor([expected]))


@pytest.mark.parametrize(
    "device, variable, installed, message",
    [
        ("cpu", "CXX", "clang++", r"a C\+\+ compiler on the CPU, found none; install g\+\+"),
        ("cuda", "CC", "gcc", "a C compiler on a GPU, found none; install gcc"),
    ],
)
def test_without_a_compiler(monkeypatch, tmp_path, device, variable, installed, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=message):
        check_compiler(torch.device(device))
    (tmp_path / installed).touch(mode=0o755)
    check_compiler(torch.device(device))
