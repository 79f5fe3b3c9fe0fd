"""Supervised fine-tuning through TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.core.schema import Demonstration
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.tracking import Run
from fgalign.training import (
    LengthSection,
    OptimConfig,
    check_lengths,
    peft_config,
    save_trained,
    train,
    trainer_arguments,
)


class SFTSection(LengthSection):
    """The SFT stage: the reference policy of all that follows, trained on the demonstrations' completions."""

    optim: OptimConfig
    max_length: int = 128


def sft_row(parts: Sequence[tuple[Sequence[int], bool]]) -> dict[str, list[int]]:
    """Token ids, each part with whether the loss counts there, to TRL's ``input_ids`` and ``completion_mask``."""
    return {
        "input_ids": [token for part, _ in parts for token in part],
        "completion_mask": [int(counts) for part, counts in parts for _ in part],
    }


def tokenize(
    tokenizer: Any, records: Sequence[Demonstration], *, completion_only: bool = True
) -> Iterator[tuple[str, int, dict[str, list[int]]]]:
    """Demonstrations as rows of ``training.fitting``: rows of ``input_ids`` and ``completion_mask`` (1 where the loss
    counts) for TRL."""
    for record in records:
        prompt, response = encode_prompt(tokenizer, record.prompt), encode_response(tokenizer, record.completion)
        row = sft_row([(prompt, not completion_only), (response, True)])
        yield f"demonstration {record.id!r}", len(row["input_ids"]), row


def train_sft(
    model: Any,
    tokenizer: Any,
    records: Sequence[Demonstration],
    optim: OptimConfig,
    *,
    max_length: int,
    completion_only: bool = True,
    **options: Any,
) -> dict[str, int]:
    """Fine-tune on demonstrations; ``options``, and what is returned, are those of ``train_rows``.

    Raises:
        InputError: one is longer than ``max_length``.
    """
    named = list(tokenize(tokenizer, records, completion_only=completion_only))
    check_lengths(((what, tokens) for what, tokens, _ in named), max_length)
    rows = [row for *_, row in named]
    return train_rows(model, tokenizer, rows, optim, max_length=max_length, **options)


def align_rows(
    context: Context,
    rows: list[dict[str, list[int]]],
    optim: OptimConfig,
    max_length: int,
    *,
    start: Path,
) -> None:
    """Fine-tune the model in ``start`` on rows of ``sft_row``, save it into ``context.out`` and add to what the context
    has spent."""
    spent = train_rows(
        load_causal_lm(start, context.device),
        context.tokenizer,
        rows,
        optim,
        out=context.out,
        seed=context.seed,
        device=context.device.type,
        bf16=context.bf16,
        max_length=max_length,
        run=context.run,
        title=f"{context.stage} seed {context.seed}",
    )
    context.spend(**spent)


def train_rows(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    optim: OptimConfig,
    *,
    out: Path,
    seed: int,
    device: str,
    bf16: bool,
    max_length: int,
    run: Run,
    title: str,
) -> dict[str, int]:
    """Fine-tune on rows of ``sft_row`` and save model and tokenizer into ``out``; returns what ``training.train``
    does."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = trainer_arguments(optim, output_dir=out, seed=seed, device=device, bf16=bf16)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**arguments, max_length=max_length, completion_only_loss=True, dataset_num_proc=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config(optim, "CAUSAL_LM"),
    )
    spent = train(trainer, run, title, optim)
    save_trained(trainer, tokenizer, out)
    return spent
