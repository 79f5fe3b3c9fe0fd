"""Labelled pairs of random tokens, for FIGA and for labelling, and the same tokens as rows for SFT."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PairWorkload:
    """Pairs of responses, lengths in tokens. A revised response is its initial one after an edit to a share
    ``edited`` of the tokens: substitution, insertion and deletion equally often. Training takes ``batch`` pairs a step
    and ``steps`` steps a unit."""

    pairs: int = 256
    batch: int = 16
    steps: int = 8
    prompt_length: int = 16
    shortest: int = 24
    longest: int = 72
    edited: float = 0.18
    vocab_size: int = 2000
    seed: int = 0


def edit(response: Sequence[int], share: float, vocab_size: int, draw: random.Random) -> list[int]:
    """A copy with random edits at a share of its places; at least one token is left."""
    revised: list[int] = []
    for token in response:
        kind = draw.choice(("substitute", "insert", "delete")) if draw.random() < share else "keep"
        revised += [draw.randrange(2, vocab_size)] if kind in ("substitute", "insert") else []
        revised += [token] if kind in ("keep", "insert") else []
    return revised or [draw.randrange(2, vocab_size)]


def responses(workload: PairWorkload) -> list[tuple[list[int], list[int]]]:
    """Initial and revised responses, without the end-of-sequence token."""
    draw = random.Random(workload.seed)
    found = []
    for _ in range(workload.pairs):
        length = draw.randint(workload.shortest, workload.longest)
        initial = [draw.randrange(2, workload.vocab_size) for _ in range(length)]
        found.append((initial, edit(initial, workload.edited, workload.vocab_size, draw)))
    return found


def labelled_pairs(workload: PairWorkload, eos_token_id: int) -> list[dict[str, Any]]:
    """Rows of FIGA's trainer."""
    from fgalign.labels import label_edit

    draw = random.Random(workload.seed + 1)
    rows = []
    for number, (initial, revised) in enumerate(responses(workload)):
        initial, revised = [*initial, eos_token_id], [*revised, eos_token_id]
        labels = label_edit(initial, revised)
        rows.append(
            {
                "id": str(number),
                "prompt_ids": [draw.randrange(2, workload.vocab_size) for _ in range(workload.prompt_length)],
                "initial_ids": initial,
                "initial_labels": labels.initial,
                "revised_ids": revised,
                "revised_labels": labels.revised,
            }
        )
    return rows


def supervised_rows(pairs: Sequence[dict[str, Any]], batch: int) -> list[dict[str, list[int]]]:
    """The same sequences for TRL's SFTTrainer, in the order in which FIGA's batches hold them: of each ``batch`` pairs
    first all revised responses, then all initial ones."""
    rows = []
    for start in range(0, len(pairs), batch):
        for side in ("revised", "initial"):
            for pair in pairs[start : start + batch]:
                prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
                rows.append(
                    {
                        "input_ids": [*prompt, *response],
                        "completion_mask": [0] * len(prompt) + [1] * len(response),
                    }
                )
    return rows
