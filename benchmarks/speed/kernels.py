"""What is measured inside one process: FIGA's collation and loss, and labelling beside the plain Levenshtein call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from speed.gate import turn
from speed.pairs import PairWorkload, labelled_pairs, responses


def seconds(work: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of the processor of each piece of work in each round; the order turns every second round, and ``warmup``
    rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-warmup, rounds):
        for name in turn(list(work), number):
            started = time.process_time()
            work[name]()
            if number >= 0:
                found[name].append(time.process_time() - started)
    return found


def labelling(workload: PairWorkload, rounds: int) -> dict[str, list[float]]:
    """Seconds to label all pairs (``labels``), and of the Levenshtein call alone (``editops``)."""
    from rapidfuzz.distance import Levenshtein

    from fgalign.labels import label_edit

    pairs = responses(workload)
    return seconds(
        {
            "labels": lambda: [label_edit(initial, revised) for initial, revised in pairs],
            "editops": lambda: [Levenshtein.editops(initial, revised) for initial, revised in pairs],
        },
        rounds,
    )


def figa_batch(workload: PairWorkload) -> tuple[Any, list[dict[str, Any]]]:
    """FIGA's collator with released weights, and the examples of one batch."""
    from fgalign.methods.figa import FIGACollator

    longest = workload.prompt_length + 2 * workload.longest + 1
    collator = FIGACollator(pad_token_id=0, eos_token_id=1, max_length=longest, alpha=1.0, beta=0.5, gamma=0.0)
    return collator, labelled_pairs(workload, 1)[: workload.batch]


def collation(workload: PairWorkload, rounds: int) -> dict[str, list[float]]:
    """Seconds to collate a batch into ids, attention mask and weights (``figa``), and into ids and attention mask alone
    (``pad``)."""
    from fgalign.core.tensor_ops import pad

    collator, examples = figa_batch(workload)

    def plain() -> None:
        rows = [[*e["prompt_ids"], *e[f"{side}_ids"]] for side in ("revised", "initial") for e in examples]
        pad(rows, 0, side="right")
        pad([[1] * len(row) for row in rows], 0, side="right")

    return seconds({"figa": lambda: collator(examples), "pad": plain}, rounds)


def loss(workload: PairWorkload, rounds: int) -> dict[str, list[float]]:
    """Seconds of the loss and its gradient with respect to given float32 logits: FIGA's trainer, whose output layer
    sees positions with weights only (``figa``), and cross-entropy at every position (``cross_entropy``)."""
    import torch

    from fgalign.methods.figa import FIGATrainer

    collator, examples = figa_batch(workload)
    batch = collator(examples)
    weighted = batch["weights"] != 0
    targets = batch["input_ids"][:, 1:]
    torch.manual_seed(workload.seed)
    logits = torch.randn(*targets.shape, workload.vocab_size)
    some = logits[weighted].clone().requires_grad_()
    every = logits.requires_grad_()
    # What the loss asks of its trainer and its model; these logits are what an output layer would have made.
    trainer = SimpleNamespace(
        args=SimpleNamespace(threshold=0.6, threshold_reading="nll"),
        accelerator=SimpleNamespace(unwrap_model=lambda _: SimpleNamespace(get_output_embeddings=lambda: None)),
    )

    def figa() -> None:
        some.grad = None
        FIGATrainer.loss(trainer, lambda **inputs: SimpleNamespace(logits=some), batch).loss.backward()

    def cross_entropy() -> None:
        every.grad = None
        torch.nn.functional.cross_entropy(every.flatten(0, 1), targets.flatten()).backward()

    return seconds({"figa": figa, "cross_entropy": cross_entropy}, rounds)
