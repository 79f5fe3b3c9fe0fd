"""RRHF (Yuan et al. 2023, arXiv 2304.05302) on the preference pairs: both responses of a pair are the candidates,
ranked by the annotators' preference or by a reward model.

Logged beside the loss, of the last micro-batch: ``rrhf/rank``, ``rrhf/sft``, ``rrhf/misranked`` (see ``losses.rrhf``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.core.rollout import Rollout, as_rollout, response_logps
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.errors import TrainingError
from fgalign.losses.rrhf import RrhfLoss, rrhf_loss
from fgalign.rewards import load_reward
from fgalign.rewards.scoring import score_responses
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
    """RRHF as a method of the pipeline."""

    kind: Literal["rrhf"]
    needs: str = "sft"
    """The reward model that ranks with ``ranking: reward``; ``sft``: none."""
    ranking: Literal["preference", "reward"] = "preference"
    rank_weight: float = 1.0
    """Weight of the ranking loss beside the imitation of the best response (1 in the paper)."""
    optim: OptimConfig
    score_batch_size: int = 64

    @model_validator(mode="after")
    def _reward_of_the_ranking(self) -> Config:
        if self.ranking == "reward" and self.needs == "sft":
            raise ValueError("ranking: reward needs `needs`, the reward model that ranks")
        return self


class RRHFCollator:
    """Rows of ``prompt_ids``, ``responses`` (K lists of ids) and ``scores`` (K) to one batch of B x K sequences.

    Gives ``input_ids`` and ``attention_mask`` (B * K, L), ``response_mask`` (B * K, T) of the last T positions and
    ``scores`` (B, K); a prompt's candidates lie side by side.
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate; a sequence longer than ``max_length`` is a TrainingError."""
        rows = [(example, response) for example in examples for response in example["responses"]]
        for example, response in rows:
            tokens = len(example["prompt_ids"]) + len(response)
            if tokens > self.max_length:
                raise TrainingError(
                    f"pair {example['id']!r}: prompt and response have {tokens} tokens, more than max_length "
                    f"{self.max_length}; raise it or shorten the data"
                )
        prompts, responses = [example["prompt_ids"] for example, _ in rows], [response for _, response in rows]
        rollout = as_rollout(prompts, responses, self.pad_token_id, "cpu")
        return {
            "input_ids": rollout.input_ids,
            "attention_mask": rollout.attention_mask.long(),
            "response_mask": rollout.response_mask,
            "scores": torch.tensor([example["scores"] for example in examples]),
        }


class RRHFTrainer(Trainer):
    """Trains a causal LM with the RRHF loss on batches of ``RRHFCollator``; micro-batches of a step weigh alike."""

    def __init__(self, *args: Any, rank_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank_weight = rank_weight
        self.label_names = ["scores"]  # so that an evaluation knows that there is a loss
        # Each micro-batch gives a mean, so the parent divides by the accumulation.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, float] = {}

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> RrhfLoss:
        """The RRHF loss of one collated batch."""
        ids, attended, mask = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["response_mask"]
        split = ids.shape[1] - mask.shape[1]
        rollout = Rollout(ids[:, :split], attended[:, :split], ids[:, split:], mask, torch.zeros_like(mask[:, 0]))
        shape = (*inputs["scores"].shape, -1)
        logps = response_logps(model, rollout).view(shape)
        return rrhf_loss(logps, mask.view(shape), inputs["scores"], rank_weight=self.rank_weight)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch."""
        result = self.loss(model, inputs)
        self._parts = {f"rrhf/{name}": getattr(result, name).item() for name in ("rank", "sft", "misranked")}
        return (result.loss, {}) if return_outputs else result.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the loss's parts beside it."""
        super().log({**logs, **self._parts} if "loss" in logs else logs, *args, **kwargs)


def candidate_rows(context: Context, config: Config) -> list[dict[str, Any]]:
    """Rows of ``RRHFCollator``: (chosen, rejected) of each preference, with scores (1, 0) or the reward model's."""
    tokenizer = context.tokenizer
    rows = [
        {
            "id": pair.id,
            "prompt_ids": encode_prompt(tokenizer, pair.prompt),
            "responses": [encode_response(tokenizer, pair.chosen), encode_response(tokenizer, pair.rejected)],
            "scores": [1.0, 0.0],
        }
        for pair in context.split("train").preferences
    ]
    measured = ((f"pair {r['id']!r}", len(r["prompt_ids"]) + max(map(len, r["responses"])), r) for r in rows)
    rows = fitting(context, measured, config, "pairs")
    if config.ranking == "preference":
        return rows
    reward = load_reward(config.needs, context.model(config.needs), context.device)
    prompts = [row["prompt_ids"] for row in rows]
    with context.autocast():
        sides = [
            score_responses(reward, prompts, responses, tokenizer, config.score_batch_size, context.device).tolist()
            for responses in ([row["responses"][side] for row in rows] for side in (0, 1))
        ]
    return [{**row, "scores": list(scores)} for row, *scores in zip(rows, *sides, strict=True)]


def run(context: Context, config: Config) -> None:
    """Train RRHF from the SFT model on the preferences of the training split."""
    from datasets import Dataset

    optim = config.optim
    arguments = trainer_arguments(
        optim, output_dir=context.out, seed=context.seed, device=context.device.type, bf16=context.bf16
    )
    trainer = RRHFTrainer(
        add_lora(load_causal_lm(context.model("sft"), context.device), peft_config(optim, "CAUSAL_LM")),
        rank_weight=config.rank_weight,
        args=TrainingArguments(**arguments),
        data_collator=RRHFCollator(context.tokenizer.pad_token_id, config.max_length),
        train_dataset=Dataset.from_list(candidate_rows(context, config)),
        processing_class=context.tokenizer,
    )
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", optim))
    save_trained(trainer, context.tokenizer, context.out)
