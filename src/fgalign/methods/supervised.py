"""Supervised fine-tuning of the SFT model on the better response of each pair: the preferred or the revised one."""

from __future__ import annotations

from typing import Literal

from fgalign.context import Context
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.sft import align_rows, sft_row
from fgalign.training import LengthSection, OptimConfig, fitting


class Config(LengthSection):
    """Supervised fine-tuning as a method of the pipeline."""

    kind: Literal["supervised"]
    needs: Literal["sft"] = "sft"
    """The model to train further."""
    response: Literal["chosen", "revised"]
    """What to imitate: ``chosen`` of the preferences, or ``revised`` of the edits."""
    optim: OptimConfig


def run(context: Context, config: Config) -> None:
    """Train on the responses of the training split."""
    if config.response == "chosen":
        examples = [
            (pair.id, encode_prompt(context.tokenizer, pair.prompt), encode_response(context.tokenizer, pair.chosen))
            for pair in context.split("train").preferences
        ]
    else:
        examples = [(pair.id, pair.prompt_ids, pair.revised_ids) for pair in context.labelled("train")]
    measured = (
        (f"pair {key!r}", len(prompt) + len(response), sft_row([(prompt, False), (response, True)]))
        for key, prompt, response in examples
    )
    rows = fitting(context, measured, config, "responses")
    align_rows(context, rows, config.optim, config.max_length, start=context.model(config.needs))
