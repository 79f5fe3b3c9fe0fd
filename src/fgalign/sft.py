"""Supervised fine-tuning through TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgalign.config import Section
from fgalign.errors import InputError
from fgalign.modeling import save_model
from fgalign.schema import Demonstration
from fgalign.tokens import encode_prompt, encode_response
from fgalign.tracking import Run
from fgalign.training import OptimConfig, peft_config, train, trainer_arguments


class SFTSection(Section):
    """The SFT stage: the reference policy of all that follows, trained on the demonstrations' completions."""

    optim: OptimConfig
    max_length: int = 128


def tokenize(
    tokenizer: Any, records: Sequence[Demonstration], max_length: int, *, completion_only: bool
) -> list[dict[str, list[int]]]:
    """Rows of ``input_ids`` and ``completion_mask`` (1 where the loss counts) for TRL.

    Raises:
        InputError: a row is longer than ``max_length``.
    """
    rows = []
    for record in records:
        prompt, response = encode_prompt(tokenizer, record.prompt), encode_response(tokenizer, record.completion)
        if len(prompt) + len(response) > max_length:
            raise InputError(
                f"demonstration {record.id!r}: prompt and completion have {len(prompt) + len(response)} tokens, more "
                f"than max_length {max_length}; raise it or shorten the data"
            )
        rows.append(
            {
                "input_ids": prompt + response,
                "completion_mask": [int(not completion_only)] * len(prompt) + [1] * len(response),
            }
        )
    return rows


def train_sft(
    model: Any,
    tokenizer: Any,
    records: Sequence[Demonstration],
    optim: OptimConfig,
    *,
    out: Path,
    seed: int,
    device: str,
    bf16: bool,
    max_length: int,
    completion_only: bool = True,
    run: Run,
    title: str,
) -> None:
    """Fine-tune on demonstrations and save model and tokenizer into ``out``."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = trainer_arguments(optim, output_dir=out, seed=seed, device=device, bf16=bf16)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**arguments, max_length=max_length, completion_only_loss=True, dataset_num_proc=None),
        train_dataset=Dataset.from_list(tokenize(tokenizer, records, max_length, completion_only=completion_only)),
        processing_class=tokenizer,
        peft_config=peft_config(optim, "CAUSAL_LM"),
    )
    train(trainer, run, title)
    save_model(trainer.model, tokenizer, out)
