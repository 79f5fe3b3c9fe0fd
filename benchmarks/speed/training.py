"""Both sides of the training comparison: FIGA's trainer, and TRL's SFTTrainer on the same tokens in the same batches.
One unit is some optimiser steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed.gate import Gate, serve
from speed.pairs import PairWorkload, labelled_pairs, supervised_rows


def side(options: dict[str, Any], gate: Gate) -> None:
    """Options: ``folder`` (see ``workload``), ``threads``, ``device``, ``trainer`` (``figa`` or ``sft``), ``pairs``
    (fields of ``PairWorkload``), ``bf16``, ``compile`` (False unless given)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    from fgalign.core.compiled import compile_layers
    from fgalign.methods.figa import FIGAConfig, FIGATrainer
    from fgalign.training import OptimConfig, trainer_arguments

    torch.set_num_threads(options["threads"])
    folder, workload = Path(options["folder"]), PairWorkload(**options["pairs"])
    figa = options["trainer"] == "figa"

    class AtGate(TrainerCallback):
        def __init__(self) -> None:
            self.tokens = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.ready()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % workload.steps == 0:
                before, self.tokens = self.tokens, int(state.num_input_tokens_seen)
                gate.done(tokens=self.tokens - before)

    arguments = trainer_arguments(
        OptimConfig(
            learning_rate=1e-5,
            max_steps=1_000_000,
            batch_size=workload.batch if figa else 2 * workload.batch,
            schedule="constant",
        ),
        output_dir=folder / options["trainer"],
        seed=1,
        device=options["device"],
        bf16=options["bf16"],
    )
    arguments["train_sampling_strategy"] = "sequential"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pairs = labelled_pairs(workload, tokenizer.eos_token_id)
    longest = workload.prompt_length + 2 * workload.longest + 1
    if figa:
        trainer = FIGATrainer(
            model,
            args=FIGAConfig(**arguments, max_length=longest),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
    else:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model,
            args=SFTConfig(**arguments, max_length=longest, completion_only_loss=True, dataset_num_proc=None),
            train_dataset=Dataset.from_list(supervised_rows(pairs, workload.batch)),
            processing_class=tokenizer,
        )
    if options.get("compile"):
        compile_layers(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AtGate())
    trainer.train()


if __name__ == "__main__":
    serve(side)
