"""The matrix products of a PPO update and nothing else: what no implementation in this precision can be faster than.

One unit multiplies matrices of the sizes that the layers of policy, value model, reference and reward model multiply in
one update. Attention, norms, activations, softmax, losses and the optimiser are left out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from speed.gate import Gate, serve
from speed.workload import PPOWorkload, read_workload

Product = tuple[int, int, int]
"""Rows, inner size and columns of a product."""


def products(workload: PPOWorkload, separate: bool) -> Counter[Product]:
    """How often an update multiplies matrices of each size; ``separate``: with a value model of its own.

    A forward pass has one product a weight, a backward pass two. The output layer counts where a token is sampled or
    trained, the other layers at all tokens. Heads of one output are left out.
    """
    found: Counter[Product] = Counter()
    width, inner = workload.hidden_size, workload.intermediate_size
    layer = {(width, width): 4, (width, inner): 2, (inner, width): 1}
    trunk = {size: times * workload.layers for size, times in layer.items()}
    output = {(width, workload.vocab_size): 1}
    length = workload.prompt_length + workload.response_length

    def forward(weights: dict[tuple[int, int], int], rows: int, times: int = 1) -> None:
        for (into, out), number in weights.items():
            found[rows, into, out] += number * times

    def backward(weights: dict[tuple[int, int], int], rows: int, times: int) -> None:
        for (into, out), number in weights.items():
            found[rows, out, into] += number * times  # to the layer below
            found[into, rows, out] += number * times  # to the weight

    batch, mini = workload.batch, workload.minibatch
    # Sampling: the prompt, then one token a response at a time.
    forward(trunk, batch * workload.prompt_length)
    forward(trunk, batch, workload.response_length - 1)
    forward(output, batch, workload.response_length)
    # Scoring: reference, reward model, and old values where another model has them (the old policy is sampling's).
    forward(trunk, batch * length, 2 + separate)
    forward(output, batch * workload.response_length)
    steps = workload.epochs * batch // mini
    for work in (forward, backward):
        work(trunk, mini * length, steps * (1 + separate))
        work(output, mini * workload.response_length, steps)
    return found


def operations(found: Counter[Product]) -> int:
    """Multiplications and additions of all products."""
    return sum(2 * rows * inner * columns * times for (rows, inner, columns), times in found.items())


def side(options: dict[str, Any], gate: Gate) -> None:
    """Options: ``folder`` (see ``workload``), ``threads``, ``device``, ``value_model`` (``head`` or ``separate``)."""
    import torch

    torch.set_num_threads(options["threads"])
    workload, _ = read_workload(Path(options["folder"]))
    work = [
        (torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns), times)
        for (rows, inner, columns), times in products(workload, options["value_model"] == "separate").items()
    ]
    gate.ready()
    while True:
        for left, right, out, times in work:
            for _ in range(times):
                torch.mm(left, right, out=out)
        gate.done(tokens=workload.batch * workload.response_length)


if __name__ == "__main__":
    serve(side)
