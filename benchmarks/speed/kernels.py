"""Sides of the small comparisons: FIGA's collation and loss, and labelling, each beside the plain operation. A unit
is that piece of work, some times over.

Both sides of a comparison import the same, so that their peak memory differs by what the work takes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from speed.gate import Gate, serve
from speed.pairs import PairWorkload, labelled_pairs, responses

Work = Callable[[], object]


def labelling(workload: PairWorkload, ours: bool) -> Work:
    """Label all pairs; the other side: the Levenshtein call alone."""
    from rapidfuzz.distance import Levenshtein

    from fgalign.labels import label_edit

    pairs, align = responses(workload), label_edit if ours else Levenshtein.editops
    return lambda: [align(initial, revised) for initial, revised in pairs]


def figa_batch(workload: PairWorkload) -> tuple[Any, list[dict[str, Any]]]:
    """FIGA's collator with released weights, and the examples of one batch."""
    from fgalign.methods.figa import FIGACollator

    longest = workload.prompt_length + 2 * workload.longest + 1
    collator = FIGACollator(pad_token_id=0, eos_token_id=1, max_length=longest, alpha=1.0, beta=0.5, gamma=0.0)
    return collator, labelled_pairs(workload, 1)[: workload.batch]


def masks(workload: PairWorkload, ours: bool) -> Work:
    """Collate a batch into ids, attention mask and weights; the other side: into ids and attention mask alone."""
    from fgalign.core.tensor_ops import pad

    collator, examples = figa_batch(workload)

    def plain() -> None:
        rows = [[*e["prompt_ids"], *e[f"{side}_ids"]] for side in ("revised", "initial") for e in examples]
        pad(rows, 0, side="right")
        pad([[1] * len(row) for row in rows], 0, side="right")

    return (lambda: collator(examples)) if ours else plain


def loss(workload: PairWorkload, ours: bool) -> Work:
    """The loss and its gradient with respect to given float32 logits: FIGA's trainer, which has them at positions with
    weights only; the other side: cross-entropy at every position."""
    import torch

    from fgalign.methods.figa import FIGATrainer

    collator, examples = figa_batch(workload)
    batch = collator(examples)
    targets = batch["input_ids"][:, 1:]
    size = (int((batch["weights"] != 0).sum()),) if ours else targets.shape
    torch.manual_seed(workload.seed)
    logits = torch.randn(*size, workload.vocab_size).requires_grad_()
    # What the loss asks of its trainer and its model; these logits are what an output layer would have made.
    trainer = SimpleNamespace(
        args=SimpleNamespace(threshold=0.6, threshold_reading="nll"),
        accelerator=SimpleNamespace(unwrap_model=lambda _: SimpleNamespace(get_output_embeddings=lambda: None)),
    )

    def figa() -> None:
        logits.grad = None
        FIGATrainer.loss(trainer, lambda **inputs: SimpleNamespace(logits=logits), batch).loss.backward()

    def cross_entropy() -> None:
        logits.grad = None
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    return figa if ours else cross_entropy


KERNELS: dict[str, Callable[[PairWorkload, bool], Work]] = {"labelling": labelling, "masks": masks, "loss": loss}


def side(options: dict[str, Any], gate: Gate) -> None:
    """Options: ``threads``, ``kernel`` (of ``KERNELS``), ``ours``, ``pairs`` (fields of ``PairWorkload``), ``times``
    that a unit does the work."""
    import torch

    torch.set_num_threads(options["threads"])
    work = KERNELS[options["kernel"]](PairWorkload(**options["pairs"]), options["ours"])
    gate.ready()
    while True:
        for _ in range(options["times"]):
            work()
        gate.done(times=options["times"])


if __name__ == "__main__":
    serve(side)
