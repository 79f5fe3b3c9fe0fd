"""TRL's side of a PPO comparison: one unit is one update of ``trl.experimental.ppo.PPOTrainer``.

Runs in an environment of its own (``environment.py``), without fgalign. Set as the other side where the two differ by
default: float32 on the CPU, no gradient checkpointing, no sampling of examples between updates. ``num_mini_batches``
with one accumulation step gives an optimiser step a minibatch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed.gate import Gate, serve
from speed.workload import read_workload


def side(options: dict[str, Any], gate: Gate) -> None:
    """Options: ``folder`` (see ``workload``), ``threads``, ``device``."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(options["threads"])
    folder = Path(options["folder"])
    workload, prompts = read_workload(folder)
    full = workload.batch * workload.response_length
    counted = {"tokens": 0}
    truncate = ppo_trainer.truncate_response

    def counting(stop_token_id: int, pad_token_id: int, responses: Any) -> Any:
        kept = truncate(stop_token_id, pad_token_id, responses)
        counted["tokens"] += int((kept != pad_token_id).sum())
        return kept

    ppo_trainer.truncate_response = counting

    class AtGate(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.ready()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tokens = counted["tokens"] if workload.end_probability else full
            counted["tokens"] = 0
            gate.done(tokens=tokens)

    def load(kind: Any, name: str, **settings: Any) -> Any:
        return kind.from_pretrained(folder / name, dtype=torch.float32, **settings)

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=workload.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=workload.batch // workload.minibatch,
            num_ppo_epochs=workload.epochs,
            local_rollout_forward_batch_size=workload.batch,
            response_length=workload.response_length,
            temperature=1.0,
            stop_token="eos" if workload.end_probability else None,
            total_episodes=workload.batch * 100_000,
            learning_rate=1e-6,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=workload.bf16,
            use_cpu=options["device"] == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left"),
        model=load(AutoModelForCausalLM, "policy"),
        ref_model=load(AutoModelForCausalLM, "policy"),
        reward_model=load(AutoModelForSequenceClassification, "reward"),
        value_model=load(AutoModelForSequenceClassification, "policy", num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        # Asked for its length only; nothing is sampled from it.
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        callbacks=[AtGate()],
    )
    trainer.train()


if __name__ == "__main__":
    serve(side)
