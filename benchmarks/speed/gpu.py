"""Rows that need a GPU: SmolLM2-135M in bf16 against TRL, utilisation of the update, decoding beside its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed.comparisons import PPO_SIDES, TRL_PPO, WARMUP_COMPILED, Session, against_trl, ours, values
from speed.table import Row, Target, row
from speed.trace import limits
from speed.workload import PPOWorkload

# Dense bf16 operations a second and bytes a second, from the makers' data sheets; the first name that fits counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GH200", 989e12, 4.0e12),
    ("H200", 989e12, 4.8e12),
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100", 989e12, 3.35e12),
    ("A100-PCIE-40GB", 312e12, 1.555e12),
    ("A100-SXM4-40GB", 312e12, 1.555e12),
    ("A100", 312e12, 1.935e12),
    ("L40S", 362e12, 0.864e12),
)


def peaks(name: str) -> tuple[float, float] | None:
    """Operations and bytes a second of a GPU by its name; None where it is not listed."""
    return next(((operations, width) for part, operations, width in PEAKS if part in name), None)


def training_flops(parameters: int, tokens: int) -> float:
    """Operations of a forward and backward pass: 6 for each weight that multiplies and each token, attention not
    counted."""
    return 6.0 * parameters * tokens


def decode_bound(weight_bytes: float, cache_bytes: float, rows: int, bandwidth: float) -> float:
    """Tokens a second of decoding if nothing but memory took time: a step reads all weights once and every row's cache
    (``cache_bytes`` each, at the mean length)."""
    return rows * bandwidth / (weight_bytes + rows * cache_bytes)


def pretrained(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the profile ``human``, taken over into ``folder``."""
    from fgalign.base_model import PretrainedConfig, build_pretrained
    from fgalign.config import load_profile, parse_section

    section = load_profile("human", Path(__file__).resolve().parents[2]).params["base_model"]
    build_pretrained(parse_section(section, PretrainedConfig, "base_model"), folder)
    return folder


def smollm2(session: Session) -> list[Row]:
    """PPO of both learners against TRL on the GPU; utilisation and decoding of ours, and what limits them."""
    import torch
    from transformers import AutoConfig

    model = str(pretrained(session.folder / "smollm2"))
    workload = PPOWorkload(batch=64, minibatch=16, prompt_length=64, response_length=128, pretrained=model, bf16=True)
    on_gpu = replace(session, device="cuda", busy=[])
    sides = {name: PPO_SIDES[name] for name in (TRL_PPO, *(side for side, _ in ours("", PPO_SIDES)))}
    folder = on_gpu.work("gpu", workload)
    answers = on_gpu.run(folder, sides, WARMUP_COMPILED)
    rows = against_trl(answers, "PPO, SmolLM2-135M on the GPU", Target(">=", 3.0))
    found = peaks(torch.cuda.get_device_name())
    if found is None:
        return rows
    config = AutoConfig.from_pretrained(model)
    for side, called in (("head", "shared trunk"), ("head compiled", "shared trunk, compiled")):
        module, options = PPO_SIDES[side]
        profiled = replace(on_gpu, rounds=1).run(folder, {side: (module, {**options, "traced": True})}, WARMUP_COMPILED)
        rows += utilisation(answers[side], profiled[side][0], called, workload, config, *found)
    return rows


def utilisation(
    answers: Sequence[Mapping[str, float]],
    profiled: Mapping[str, float],
    called: str,
    workload: PPOWorkload,
    config: Any,
    operations: float,
    bandwidth: float,
) -> list[Row]:
    """Operations a second of the update beside the GPU's peak, and sampled tokens a second (the prompts' pass included)
    beside the bound that memory sets: weights and cache are read as bf16, as autocast casts weights once while it
    samples. ``profiled`` is a run under the profiler, for what limits each."""
    layers, output = multiplying_weights(config)
    length = workload.prompt_length + workload.response_length
    # The output layer runs where a response token is predicted, and once more behind the last.
    flops = training_flops(layers, workload.batch * length)
    flops += training_flops(output, workload.batch * (workload.response_length + 1))
    heads = config.num_key_value_heads
    mean = workload.prompt_length + workload.response_length / 2
    cache = 2 * 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * mean
    bound = decode_bound(2.0 * (layers + output), cache, workload.batch, bandwidth)
    sampled = [answer["tokens"] / answer["rollout"] for answer in answers]
    return [
        row(
            f"PPO update, {called}, on the GPU",
            "peak of the GPU",
            "operations",
            "10^12/s",
            [flops * workload.epochs / seconds / 1e12 for seconds in values(answers, "update")],
            [operations / 1e12] * len(answers),
            note=limits(profiled, "update"),
        ),
        row(
            f"Decoding, {called}, on the GPU",
            "bandwidth bound",
            "tokens",
            "1/s",
            sampled,
            [bound] * len(answers),
            note=limits(profiled, "rollout"),
        ),
    ]


def multiplying_weights(config: Any) -> tuple[int, int]:
    """Weights of a Llama's matrices that multiply a token: of all layers, and of the output layer; embeddings not."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * width * width + 2 * width * config.num_key_value_heads * head
    layers = config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)
    return layers, width * config.vocab_size
