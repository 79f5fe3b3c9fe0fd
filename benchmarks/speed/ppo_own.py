"""This package's side of a PPO comparison: one unit is one update of ``FineGrainedPPOTrainer``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from speed.gate import Gate, serve
from speed.trace import traced
from speed.workload import read_workload


def side(options: dict[str, Any], gate: Gate) -> None:
    """Options: ``folder`` (see ``workload``), ``threads``, ``device``, ``value_model`` (``head`` or ``separate``),
    ``level`` of the reward (``sequence`` or ``token``), fields of ``FineGrainedPPOConfig`` as ``config``, and
    ``traced`` (say too what sampling and update spend their time on, see ``trace``)."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    from fgalign.core.modeling import keep_freed_memory
    from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
    from fgalign.rewards import reward_function

    torch.set_num_threads(options["threads"])
    keep_freed_memory()  # as every stage of the pipeline does
    folder = Path(options["folder"])
    workload, prompts = read_workload(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    # -1 is never sampled: every response then has the full length.
    end = tokenizer.eos_token_id if workload.end_probability else -1
    kinds = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
    names = {"sequence": "reward", "token": "token_reward"}
    level, separate = options["level"], options["value_model"] == "separate"
    reward = kinds[level].from_pretrained(folder / names[level], dtype=torch.float32).to(options["device"])
    trainer = FineGrainedPPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        reward=reward_function(reward, level),
        args=FineGrainedPPOConfig(
            output_dir=str(folder / "own"),
            rollout_batch_size=workload.batch,
            minibatch_size=workload.minibatch,
            epochs=workload.epochs,
            response_length=workload.response_length,
            learning_rate=1e-6,
            value_model=options["value_model"],
            reward_scale="none",
            missing_eos_penalty=0.0,
            reuse_sampling=True,  # as TRL does: the old policy's log-probabilities are those of sampling
            use_cpu=options["device"] == "cpu",
            **{"bf16": workload.bf16, **options.get("config", {})},
        ),
        train_dataset=prompts,
        processing_class=SimpleNamespace(pad_token_id=tokenizer.pad_token_id, eos_token_id=end),
        value_model=AutoModelForTokenClassification.from_pretrained(
            folder / "policy", num_labels=1, dtype=torch.float32
        )
        if separate
        else None,
    )
    found: dict[str, float] = {}
    if options.get("traced"):
        trainer.sample = traced(trainer.sample, options["device"], "rollout", found)
        trainer.update = traced(trainer.update, options["device"], "update", found)
    gate.ready()
    update = 0
    while True:
        update += 1
        before = trainer.response_tokens
        statistics = trainer.step(update)
        times = {name: statistics[f"time/{name}"] for name in ("rollout", "scoring", "update")}
        gate.done(tokens=trainer.response_tokens - before, **times, **found)


if __name__ == "__main__":
    serve(side)
