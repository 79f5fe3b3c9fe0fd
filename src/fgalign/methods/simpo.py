"""SimPO (Meng et al. 2024, arXiv 2405.14734) on the preference pairs; the worked example of docs/adding-a-method.md."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.core.rollout import Rollout, as_rollout, response_logps
from fgalign.core.tensor_ops import masked_mean
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.training import (
    LengthSection,
    OptimConfig,
    add_lora,
    fitting,
    peft_config,
    save_trained,
    train,
    trainer_arguments,
)


class Config(LengthSection):
    """SimPO as a method of the pipeline: ``beta`` scales the difference of mean log-probabilities, ``margin`` is its
    target (gamma in the paper)."""

    kind: Literal["simpo"]
    optim: OptimConfig
    beta: float = 2.0
    margin: float = 1.0


def simpo_loss(logps: Tensor, mask: Tensor, beta: float, margin: float) -> Tensor:
    """-log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - margin), the mean over pairs (equation 6).

    ``logps`` and ``mask`` have shape (2B, T): the chosen responses first, then the rejected ones.
    """
    chosen, rejected = masked_mean(logps, mask, dim=1).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()


def run(context: Context, config: Config) -> None:
    """Train SimPO from the SFT model on the preferences of the training split."""
    tokenizer = context.tokenizer

    def collate(rows: list[dict[str, str]]) -> dict[str, Tensor]:
        responses = [encode_response(tokenizer, row[side]) for side in ("chosen", "rejected") for row in rows]
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows] * 2
        batch = as_rollout(prompts, responses, tokenizer.pad_token_id, "cpu")
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), **batch._asdict()}

    class SimPOTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            rollout = Rollout(*(inputs[name] for name in Rollout._fields))
            return simpo_loss(response_logps(model, rollout), rollout.response_mask, config.beta, config.margin)

    optim, device = config.optim, context.device
    arguments = trainer_arguments(
        optim, output_dir=context.out, seed=context.seed, device=device.type, bf16=context.bf16
    )
    measured = []
    for pair in context.split("train").preferences:
        longer = max(len(encode_response(tokenizer, text)) for text in (pair.chosen, pair.rejected))
        measured.append((f"pair {pair.id!r}", len(encode_prompt(tokenizer, pair.prompt)) + longer, pair.model_dump()))
    rows = Dataset.from_list(fitting(context, measured, config, "pairs"))
    model = add_lora(load_causal_lm(context.model("sft"), device), peft_config(optim, "CAUSAL_LM"))
    trainer = SimPOTrainer(model, TrainingArguments(**arguments), collate, rows)
    trainer.model_accepts_loss_kwargs = False  # each micro-batch gives a mean, so the parent divides by their number
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", optim))
    save_trained(trainer, tokenizer, context.out)
