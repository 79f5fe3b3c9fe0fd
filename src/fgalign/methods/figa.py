"""FIGA (Guo et al., ICLR 2024): a supervised loss over revised and initial responses, weighted token by token.

``FIGATrainer`` is usable by itself, in TRL's manner::

    trainer = FIGATrainer(model, args=FIGAConfig(output_dir="out"), train_dataset=dataset, processing_class=tokenizer)

with the columns of ``LabelledPair``. Logged beside the loss: ``figa/weighted_tokens`` (tokens with a weight, in the
last step), ``figa/dropped_tokens`` (penalties that the threshold dropped in it), ``figa/empty_batches`` (forward passes
so far in which no token had a weight).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fgalign.config import Section
from fgalign.context import Context
from fgalign.errors import ConfigError, TrainingError
from fgalign.losses.figa import FigaLoss, figa_loss, initial_weights, revised_weights
from fgalign.modeling import load_causal_lm, save_model
from fgalign.schema import LabelledPair
from fgalign.tensor_ops import pad, token_logps
from fgalign.training import OptimConfig, peft_config, train, trainer_arguments


@dataclass
class FIGAConfig(TrainingArguments):
    """Arguments of ``FIGATrainer``: those of transformers, and FIGA's own with their released values."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of added and substituted tokens (released: 1)."})
    beta: float = field(default=0.5, metadata={"help": "Penalty on deleted and substituted tokens (released: 0.5)."})
    gamma: float = field(default=0.0, metadata={"help": "Weight of a revised response's other tokens (released: 0)."})
    threshold: float | None = field(default=0.6, metadata={"help": "Penalties end here (released: 0.6); None: never."})
    threshold_reading: str = field(
        default="nll", metadata={"help": "'nll': penalise while NLL <= threshold (released); 'probability': p >= it."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest prompt and response together, in tokens."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the collator reads every column."})


@dataclass
class FIGACollator:
    """Labelled pairs to one batch of 2B rows, revised responses first, then initial ones.

    Gives ``input_ids``, ``attention_mask`` (2B, L) and ``weights`` (2B, L - 1): the signed weight of predicting the
    next token at each position, see ``losses.figa``. Which side a row is never follows from its place.
    """

    pad_token_id: int
    eos_token_id: int
    max_length: int
    alpha: float
    beta: float
    gamma: float

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate; a pair longer than ``max_length`` is a TrainingError."""
        ids, labels, is_revised = [], [], []
        for side in ("revised", "initial"):
            for example in examples:
                row = [*example["prompt_ids"], *example[f"{side}_ids"]]
                if len(row) > self.max_length:
                    raise TrainingError(
                        f"pair {example.get('id')!r}: prompt and {side} response have {len(row)} tokens, more than "
                        f"max_length {self.max_length}; raise it or shorten the prompt"
                    )
                ids.append(row)
                labels.append([0] * len(example["prompt_ids"]) + list(example[f"{side}_labels"]))
                is_revised.append([side == "revised"])
        lengths = torch.tensor([len(row) for row in ids]).unsqueeze(1)
        starts = torch.tensor([len(example["prompt_ids"]) for example in examples] * 2).unsqueeze(1)
        input_ids = pad(ids, self.pad_token_id, side="right")
        position = torch.arange(input_ids.shape[1])
        in_response = (position >= starts) & (position < lengths)
        eos = (position == lengths - 1) & (input_ids == self.eos_token_id)
        label = pad(labels, 0, side="right")
        weights = torch.where(
            torch.tensor(is_revised),
            revised_weights(label, eos, alpha=self.alpha, gamma=self.gamma),
            initial_weights(label, eos, beta=self.beta),
        )
        weights = torch.where(in_response, weights, torch.zeros_like(weights))
        return {
            "input_ids": input_ids,
            "attention_mask": (position < lengths).long(),
            "weights": weights[:, 1:],
        }


class FIGATrainer(Trainer):
    """Trains a causal LM with the FIGA loss; data set columns are those of ``schema.LabelledPair``.

    The loss is divided by the number of weighted tokens of the whole optimiser step: with gradient accumulation a pass
    without gradients counts them first, so that 1 x 8 pairs and 8 x 1 pairs take the same step (the released code
    divides within each micro-batch, which changes the loss).

    Raises:
        TrainingError: a loss that is not finite, a pair longer than ``max_length``.
    """

    def __init__(
        self,
        model: Any,
        args: FIGAConfig,
        train_dataset: Any,
        processing_class: Any,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.threshold_reading not in ("nll", "probability"):
            raise ConfigError(f"threshold_reading: expected 'nll' or 'probability', found {args.threshold_reading!r}")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        collator = FIGACollator(
            pad_token_id=processing_class.pad_token_id,
            eos_token_id=processing_class.eos_token_id,
            max_length=args.max_length,
            alpha=args.alpha,
            beta=args.beta,
            gamma=args.gamma,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss is normalised here, over the whole step; the parent must not divide it by the accumulation again
        # (older transformers ask the second attribute).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._counts = dict.fromkeys(("figa/weighted_tokens", "figa/dropped_tokens", "figa/empty_batches"), 0.0)

    def loss(self, model: Any, inputs: dict[str, Tensor], normalizer: Tensor | float | None = None) -> FigaLoss:
        """The FIGA loss of one collated batch. Only columns in which some row has a weight reach the output layer."""
        weights = inputs["weights"]
        columns = torch.nonzero((weights != 0).any(0)).squeeze(-1)
        if len(columns) == 0:
            columns = torch.zeros(1, dtype=torch.long, device=weights.device)
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=columns,
        ).logits
        logps = token_logps(logits, inputs["input_ids"][:, columns + 1])
        return figa_loss(
            logps,
            weights[:, columns],
            threshold=self.args.threshold,
            reading=self.args.threshold_reading,
            normalizer=normalizer,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch, divided by the weighted tokens of the whole step."""
        result = self.loss(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(result.loss)):
            raise TrainingError(
                f"FIGA loss is {result.loss.item()} at step {self.state.global_step}; expected a finite number: "
                "lower the learning rate, or set a threshold so that penalties end"
            )
        if model.training:
            self._counts["figa/weighted_tokens"] += float(result.weighted_tokens)
            self._counts["figa/dropped_tokens"] += float(result.dropped_tokens)
            self._counts["figa/empty_batches"] += float(result.weighted_tokens == 0)
        return (result.loss, {}) if return_outputs else result.loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, and the number of weighted tokens in all of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._counts |= {"figa/weighted_tokens": 0.0, "figa/dropped_tokens": 0.0}
        if len(batches) == 1 and self.args.world_size == 1:
            return batches, None
        count = torch.zeros((), device=self.args.device)
        with torch.no_grad():
            for batch in batches:
                count += self.loss(self.model, self._prepare_inputs(batch)).weighted_tokens
        # Data-parallel training averages gradients over processes: the share of each is the mean count.
        return batches, self.accelerator.reduce(count, "mean").clamp(min=1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with FIGA's counts beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self._counts}
        super().log(logs, *args, **kwargs)


class FilterConfig(Section):
    """Which pairs FIGA trains on: R(initial) < eta1, R(revised) > eta2, R(revised) - R(initial) > eta3 under a reward
    model; None drops a condition. ``unit`` std measures R in standard deviations from its mean over all responses of
    the training pairs, so that thresholds carry over between reward models."""

    unit: Literal["raw", "std"] = "std"
    eta1: float | None = None
    eta2: float | None = None
    eta3: float | None = None


class Config(Section):
    """FIGA as a method of the pipeline."""

    kind: Literal["figa"]
    needs: str
    """The reward model that filters the pairs: a name of ``fgalign.rewards.LEVELS``."""
    optim: OptimConfig
    alpha: float = 1.0
    beta: float = 0.5
    gamma: float = 0.0
    threshold: float | None = 0.6
    threshold_reading: Literal["nll", "probability"] = "nll"
    max_length: int = 512
    filter: FilterConfig | None = None
    score_batch_size: int = 64


def keep_pairs(initial: Tensor, revised: Tensor, config: FilterConfig) -> Tensor:
    """Which pairs the filter keeps, from their rewards: (N,), (N,) to (N,) bool."""
    if config.unit == "std":
        every = torch.cat([initial, revised])
        centre, spread = every.mean(), every.std(correction=0).clamp(min=1e-8)
        initial, revised = (initial - centre) / spread, (revised - centre) / spread
        gap = revised - initial
    else:
        gap = revised - initial
    keep = torch.ones_like(initial, dtype=torch.bool)
    if config.eta1 is not None:
        keep &= initial < config.eta1
    if config.eta2 is not None:
        keep &= revised > config.eta2
    if config.eta3 is not None:
        keep &= gap > config.eta3
    return keep


def filter_pairs(pairs: list[LabelledPair], context: Context, config: Config) -> list[LabelledPair]:
    """The pairs that the reward filter keeps.

    Raises:
        TrainingError: it keeps none.
    """
    if config.filter is None:
        return pairs
    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import score_responses

    reward = load_reward(config.needs, context.model(config.needs), context.device)
    prompts = [pair.prompt_ids for pair in pairs]
    scores = [
        score_responses(reward, prompts, sides, context.tokenizer, config.score_batch_size, context.device)
        for sides in ([pair.initial_ids for pair in pairs], [pair.revised_ids for pair in pairs])
    ]
    keep = keep_pairs(*scores, config.filter)
    kept = [pair for pair, flag in zip(pairs, keep.tolist(), strict=True) if flag]
    if not kept:
        raise TrainingError(f"methods.{context.stage}.filter keeps none of {len(pairs)} pairs; lower its thresholds")
    return kept


def run(context: Context, config: Config) -> None:
    """Train FIGA from the SFT model on the labelled pairs of the training split."""
    from datasets import Dataset

    every = context.labelled("train")
    pairs = filter_pairs(every, context, config)
    context.run.log({"pairs": len(every), "pairs_kept": len(pairs)})
    arguments = trainer_arguments(
        config.optim, output_dir=context.out, seed=context.seed, device=context.device.type, bf16=context.bf16
    )
    trainer = FIGATrainer(
        load_causal_lm(context.model("sft"), context.device),
        args=FIGAConfig(
            **arguments,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            threshold=config.threshold,
            threshold_reading=config.threshold_reading,
            max_length=config.max_length,
        ),
        train_dataset=Dataset.from_list([pair.model_dump() for pair in pairs]),
        processing_class=context.tokenizer,
        peft_config=peft_config(config.optim, "CAUSAL_LM"),
    )
    train(trainer, context.run, f"{context.stage} seed {context.seed}")
    save_model(trainer.model, context.tokenizer, context.out)
