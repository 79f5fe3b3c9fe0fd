"""Text to token ids and back, the same way everywhere: a prompt is one user turn of the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fgalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as one user turn, up to where the response begins (the generation prompt is included).

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; expected one that renders a user turn: "
            "set `tokenizer.chat_template` before saving the tokenizer"
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response with the end-of-sequence token at its end; what reads like a special token in the
    response is text.

    Raises:
        InputError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; expected one that ends a response: "
            "set `tokenizer.eos_token`"
        )
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of response ids, special tokens and outer white space dropped."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> list[str]:
    """Text of each token, white space kept; the texts joined give the response where tokens are whole characters (with
    the space before it that some tokenizers put there). ``skip_special_tokens``: theirs is empty."""
    # Behind another token, because decoders such as LLaMA's drop the space before the first one.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode(anchor, **options))
    return [tokenizer.decode([*anchor, token], **options)[before:] for token in ids]


def token_offsets(tokenizer: PreTrainedTokenizerBase, response: str) -> list[tuple[int, int]]:
    """Character range (start, end) in ``response`` of each token of ``encode_response``; the end token's is empty."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    offsets = tokenizer(response, **options, return_offsets_mapping=True)["offset_mapping"]
    return [*(tuple(pair) for pair in offsets), (len(response), len(response))]
