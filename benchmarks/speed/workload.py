"""What both sides of the PPO comparisons work on: a policy, a reward model and prompts, written to a folder once.

torch and transformers alone: the side that runs in TRL's own environment imports this file too.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, EOS = 0, 1


@dataclass(frozen=True)
class PPOWorkload:
    """One PPO update. Lengths in tokens, batches in responses. The model is a Llama with random weights, unless
    ``pretrained`` names a folder with a saved one."""

    batch: int = 64
    minibatch: int = 16
    epochs: int = 4
    prompt_length: int = 16
    response_length: int = 48
    """Budget of a response, and its length where ``end_probability`` is 0."""
    end_probability: float = 0.0
    """Chance of a token to be the end of the response (before training); 0: every response has the full length."""
    vocab_size: int = 2000
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 344
    pretrained: str | None = None
    bf16: bool = False
    """Mixed precision on both sides (on a GPU)."""
    prompts: int = 256
    seed: int = 0


def write_workload(folder: Path, workload: PPOWorkload) -> None:
    """Write ``policy``, ``reward`` (one score a response), ``token_reward`` (three classes a token), ``tokenizer``,
    ``prompts.json`` and ``workload.json`` into ``folder``."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # heads that start at random are meant to
    torch.manual_seed(workload.seed)
    if workload.pretrained is None:
        policy, tokenizer = random_policy(workload), plain_tokenizer(workload.vocab_size)
        lowest = EOS + 1
    else:
        policy = AutoModelForCausalLM.from_pretrained(workload.pretrained, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(workload.pretrained)
        lowest = 1 + max(tokenizer.all_special_ids)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, kind, labels in (
        ("reward", AutoModelForSequenceClassification, 1),
        ("token_reward", AutoModelForTokenClassification, 3),
    ):
        kind.from_pretrained(folder / "policy", num_labels=labels).save_pretrained(folder / name)
    size = (workload.prompts, workload.prompt_length)
    prompts = torch.randint(lowest, policy.config.vocab_size, size).tolist()
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "workload.json").write_text(json.dumps(asdict(workload)))


def read_workload(folder: Path) -> tuple[PPOWorkload, list[list[int]]]:
    """The workload of a folder and its prompts as lists of token ids."""
    workload = PPOWorkload(**json.loads((folder / "workload.json").read_text()))
    return workload, json.loads((folder / "prompts.json").read_text())


def random_policy(workload: PPOWorkload) -> Any:
    """A Llama with random weights that never samples the padding token, and the end token with the wanted probability.

    One feature of the residual stream is the same at every position: all embeddings have it and no layer writes to it.
    The output weights of the two tokens read that feature alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=workload.vocab_size,
            hidden_size=workload.hidden_size,
            intermediate_size=workload.intermediate_size,
            num_hidden_layers=workload.layers,
            num_attention_heads=workload.heads,
            num_key_value_heads=workload.heads,
            max_position_embeddings=max(256, workload.prompt_length + workload.response_length),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        ids = torch.randint(EOS + 1, workload.vocab_size, (16, workload.prompt_length))
        constant = model.model(ids).last_hidden_state[..., 0].mean()
        end = -100.0
        if workload.end_probability:
            odds = workload.end_probability / (1 - workload.end_probability)
            end = math.log((workload.vocab_size - 2) * odds)
        model.lm_head.weight[[PAD, EOS]] = 0.0
        model.lm_head.weight[PAD, 0] = -100.0 / constant
        model.lm_head.weight[EOS, 0] = end / constant
    return model


def plain_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of whole words ``2``, ``3``, ...: the trainers ask it for its special tokens only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS} | {str(token): token for token in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
