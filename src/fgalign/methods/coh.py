"""Chain of hindsight (Liu, Sferrazza, Abbeel 2023, arXiv 2302.02676): fine-tuning on both responses of a preference in
one sequence, each after a phrase that says how good it is; decoding starts with the good phrase.
"""

from __future__ import annotations

from typing import Literal

from fgalign.context import Context
from fgalign.core.tokens import encode_response
from fgalign.decoding import Decoding, encode_prefixed, write_decoding
from fgalign.sft import align_rows, sft_row
from fgalign.training import LengthSection, OptimConfig, fitting


class Config(LengthSection):
    """Chain of hindsight as a method of the pipeline.

    A pair gives two rows, with <prompt> one user turn up to where the model's turn begins, and <end> the
    end-of-sequence token; the loss counts on responses and their <end>::

        <prompt>{good}{chosen}<end>{bad}{rejected}<end>
        <prompt>{bad}{rejected}<end>{good}{chosen}<end>

    Decoding continues <prompt>{good}. ``max_length`` is that of a row, with both responses.
    """

    kind: Literal["coh"]
    needs: Literal["sft"] = "sft"
    """The model to train further."""
    good: str = "A good answer: "
    bad: str = "A bad answer: "
    optim: OptimConfig


def run(context: Context, config: Config) -> None:
    """Train on the preferences of the training split; decoding is told the good phrase."""
    tokenizer = context.tokenizer
    rows = []
    for pair in context.split("train").preferences:
        good = (config.good, encode_response(tokenizer, pair.chosen))
        bad = (config.bad, encode_response(tokenizer, pair.rejected))
        for (phrase, first), (next_phrase, second) in ((good, bad), (bad, good)):
            parts = [
                (encode_prefixed(tokenizer, pair.prompt, phrase), False),
                (first, True),
                (tokenizer(next_phrase, add_special_tokens=False)["input_ids"], False),
                (second, True),
            ]
            row = sft_row(parts)
            rows.append((f"pair {pair.id!r}, both responses", len(row["input_ids"]), row))
    rows = fitting(context, rows, config, "rows")
    align_rows(context, rows, config.optim, config.max_length, start=context.model(config.needs))
    write_decoding(context.out, Decoding(prefix=config.good))
