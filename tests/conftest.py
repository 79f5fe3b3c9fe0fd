"""Shared fixtures: tiny models with random weights and a tiny tokenizer, all real and all made here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

os.environ["FGALIGN_TRACKING"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB, PAD, EOS = 30, 0, 1


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--gpu``: see ``pytest_configure``."""
    parser.addoption("--gpu", action="store_true", help="let tests see the GPUs of this machine (tests/test_gpu.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs: tests compare with numbers that are on the CPU, and trainers would take a GPU that is there."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


SENTENCES = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "a cat and a dog are here",
    "the mat is red and the log is brown",
    "here is the answer: the cat is red",
]


@pytest.fixture
def make_gpt2() -> Callable[..., Any]:
    """``make_gpt2(kind)``: a small GPT-2. Its positions are absolute, so that a wrong one shows, which Llama's relative
    positions would hide."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel

    kinds = {
        "causal": GPT2LMHeadModel,
        "sequence": GPT2ForSequenceClassification,
        "token": GPT2ForTokenClassification,
    }

    def make(kind: str = "causal", **config: Any) -> Any:
        torch.manual_seed(0)
        settings = {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        return kinds[kind](GPT2Config(**{**settings, **config})).eval()

    return make


@pytest.fixture
def ids() -> Any:
    """A tokenizer's special ids for models with a vocabulary of 30: what the PPO trainer asks of a tokenizer."""
    return SimpleNamespace(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, save_pretrained=lambda folder: None)


@pytest.fixture(scope="session")
def read_once() -> Callable[..., Any]:
    """``read_stages`` that reads a repository at most once."""
    from fgalign.report.index import read_stages

    return functools.cache(read_stages)


@pytest.fixture
def stages_read_once(read_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``table_stage`` reads the stages, which takes DVC seconds, once for all tables."""
    monkeypatch.setattr("fgalign.report.check.read_stages", read_once)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on five sentences."""
    from fgalign.base_model import train_tokenizer

    return train_tokenizer(SENTENCES, 280)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(seed, kind, **config)``: a two-layer Llama with random weights, in evaluation mode.

    The weights are drawn ten times wider than Llama's, so that distributions are far from uniform.
    """
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )

    torch.set_num_threads(1)
    kinds = {
        "causal": LlamaForCausalLM,
        "sequence": LlamaForSequenceClassification,
        "token": LlamaForTokenClassification,
    }

    def make(seed: int = 0, kind: str = "causal", **config: Any) -> Any:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        return kinds[kind](LlamaConfig(**{**settings, **config})).eval()

    return make
