"""FIGA (Guo et al., ICLR 2024): a supervised loss over revised and initial responses, weighted token by token.

``FIGATrainer`` is usable by itself, in TRL's manner::

    trainer = FIGATrainer(model, args=FIGAConfig(output_dir="out"), train_dataset=dataset, processing_class=tokenizer)

with the columns of ``LabelledPair``, and, if wanted, ``revised_scales`` and ``initial_scales``: a factor for the weight
of each response token. Logged beside the loss: ``figa/weighted_tokens`` (tokens with a weight, in the
last step), ``figa/dropped_tokens`` (penalties that the threshold dropped in it), ``figa/empty_batches`` (forward passes
so far in which no token had a weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fgalign.config import Section
from fgalign.context import Context
from fgalign.core.modeling import check_float32, check_kept, freeze_in_bf16, load_causal_lm
from fgalign.core.schema import BAD, GOOD, LabelledPair
from fgalign.core.tensor_ops import pad, token_logps
from fgalign.core.tokens import encode_response
from fgalign.distributed import own_rows
from fgalign.errors import ConfigError, InputError, TrainingError
from fgalign.labels import Unit, label_bag_of_words, label_by_unit
from fgalign.losses.figa import (
    FigaLoss,
    Signal,
    difference_scales,
    figa_loss,
    initial_weights,
    revised_weights,
    scored_labels,
)
from fgalign.parallel import process_count
from fgalign.training import (
    LengthSection,
    OptimConfig,
    add_lora,
    check_pair,
    fitting,
    measured_pairs,
    pair_row,
    peft_config,
    save_trained,
    train,
    trainer_arguments,
)


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
    next token at each position, see ``losses.figa``. Which side a row is never follows from its place. Where examples
    have ``revised_scales`` and ``initial_scales`` (one number a response token), the weights are multiplied by them.
    """

    pad_token_id: int
    eos_token_id: int
    max_length: int
    alpha: float
    beta: float
    gamma: float

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        """Collate; a pair longer than ``max_length``, or one that ``training.check_pair`` refuses, is a
        TrainingError."""
        examples = [pair_row(example) for example in examples]
        ids, labels, is_revised, scales = [], [], [], []
        scaled = any(f"{side}_scales" in example for example in examples for side in ("revised", "initial"))
        for example in examples:
            check_pair(example, scaled)
        for side in ("revised", "initial"):
            for example in examples:
                row = [*example["prompt_ids"], *example[f"{side}_ids"]]
                if len(row) > self.max_length:
                    raise TrainingError(
                        f"pair {example.get('id')!r}: prompt and {side} response have {len(row)} tokens, more than "
                        f"max_length {self.max_length}; raise it or shorten the data"
                    )
                ids.append(row)
                labels.append([0] * len(example["prompt_ids"]) + list(example[f"{side}_labels"]))
                is_revised.append([side == "revised"])
                if scaled:
                    scales.append([0.0] * len(example["prompt_ids"]) + list(example[f"{side}_scales"]))
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
        if scales:
            weights = weights * pad(scales, 0.0, side="right", dtype=torch.float32)
        return {
            "input_ids": input_ids,
            "attention_mask": (position < lengths).long(),
            "weights": weights[:, 1:],
        }


class FIGATrainer(Trainer):
    """Trains a causal LM with the FIGA loss; data set columns are those of ``schema.LabelledPair``, and a list of such
    pairs is a data set too.

    The loss is divided by the number of weighted tokens of the whole optimiser step: with gradient accumulation a pass
    without gradients counts them first, so that 1 x 8 pairs and 8 x 1 pairs take the same step (the released code
    divides within each micro-batch, which changes the loss).

    Raises:
        ConfigError: weights that are not float32, a tokenizer without a padding token, revised responses none of which
            ends, a model without ``logits_to_keep``.
        TrainingError: a loss that is not finite, a pair that ``FIGACollator`` refuses.
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
        if processing_class.pad_token_id is None:
            raise ConfigError("tokenizer: expected one with a padding token, found none; set `tokenizer.pad_token`")
        rows = map(pair_row, islice(train_dataset or (), 1000))
        ends = (row["revised_ids"][-1:] for row in rows if "revised_ids" in row)
        if (found := list(ends)) and [processing_class.eos_token_id] not in map(list, found):
            raise ConfigError(
                f"train_dataset: revised_ids: expected responses that end with the end-of-sequence token "
                f"{processing_class.eos_token_id}, found none of {len(found)}; without it no response learns to end"
            )
        collator = FIGACollator(
            pad_token_id=processing_class.pad_token_id,
            eos_token_id=processing_class.eos_token_id,
            max_length=args.max_length,
            alpha=args.alpha,
            beta=args.beta,
            gamma=args.gamma,
        )
        # One process trains on one GPU: the columns that reach the output layer are not rows that could be scattered.
        # Before the parent, which takes its batch size from this.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=add_lora(model, peft_config),
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        check_float32(self.model)
        if args.bf16:
            freeze_in_bf16(self.model)
        self.label_names = ["weights"]  # so that an evaluation knows that there is a loss
        # The loss is normalised here, over the whole step; the parent must not divide it by the accumulation again
        # (older transformers ask the second attribute).
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._counts = dict.fromkeys(("figa/weighted_tokens", "figa/dropped_tokens", "figa/empty_batches"), 0.0)

    def loss(self, model: Any, inputs: dict[str, Tensor], normalizer: Tensor | float | None = None) -> FigaLoss:
        """The FIGA loss of one collated batch. Only positions that have a weight reach the output layer, if the model
        names it; else the columns in which some row has one."""
        weights = inputs["weights"]
        rows, columns = torch.nonzero(weights, as_tuple=True)
        if len(rows) == 0:
            rows = columns = torch.zeros(1, dtype=torch.long, device=weights.device)
        kept, place = torch.unique(columns, return_inverse=True)
        plain = self.accelerator.unwrap_model(model)
        with only_positions(plain, rows, place, len(kept)):
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=kept,
            ).logits
        if logits.dim() == 3:  # no output layer was found: all rows of the columns
            check_kept(plain, logits, len(kept))
            logits = logits[rows, place]
        logps = token_logps(logits, inputs["input_ids"][rows, columns + 1])
        return figa_loss(
            logps,
            weights[rows, columns],
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
        # Dropout, if the model has any, drops the same as in the passes that train.
        self.model.train()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch in batches:
                count += self.loss(self.model, self._prepare_inputs(batch)).weighted_tokens
        # Data-parallel training averages gradients over processes: the share of each is the mean count.
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1) / self.args.world_size

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with FIGA's counts, of all processes, beside the loss."""
        if "loss" in logs:
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float64, device=self.args.device)
            logs = {**logs, **dict(zip(self._counts, self.accelerator.reduce(counts, "sum").tolist(), strict=True))}
        super().log(logs, *args, **kwargs)


@contextmanager
def only_positions(model: Any, rows: Tensor, columns: Tensor, kept: int) -> Iterator[None]:
    """While the block runs, the model's output layer sees the N positions (rows, columns) of its (B, T, H) input alone,
    and gives logits (N, V). A model that names no output layer stays as it is.

    Raises:
        ConfigError: T is not ``kept``: the model does not know ``logits_to_keep``.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return

    def chosen(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        check_kept(model, inputs[0], kept)
        return (inputs[0][rows, columns], *inputs[1:])

    handle = layer.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


class FilterConfig(Section):
    """Which pairs FIGA trains on: R(initial) < eta1, R(revised) > eta2, R(revised) - R(initial) > eta3 under a reward
    model; None drops a condition. ``unit`` std measures R in standard deviations from its mean over all responses of
    the training pairs, so that thresholds carry over between reward models."""

    unit: Literal["raw", "std"] = "std"
    eta1: float | None = None
    eta2: float | None = None
    eta3: float | None = None


class Config(LengthSection):
    """FIGA as a method of the pipeline."""

    kind: Literal["figa"]
    needs: str
    """The reward model that filters the pairs and measures reward differences."""
    optim: OptimConfig
    signal: Signal = "levenshtein"
    """``levenshtein``: edit labels. ``bag_of_words``: labels without alignment (``labels.label_bag_of_words``).
    ``reward_model``: rewards of the token-level model ``scorer`` (``losses.figa.scored_labels``). ``constant``: alpha
    on all tokens of revised responses, beta on all of initial ones. ``reward_difference``: ``constant`` times a factor
    a pair, its gain under ``needs`` (``losses.figa.difference_scales``). End-of-sequence tokens keep their rules."""
    unit: Unit | None = None
    """Of ``levenshtein``: align again by token or word (None: the labels as the labels stage made them; tokens with
    ``response: reference``)."""
    scorer: str | None = None
    """Of ``reward_model``: the token-level reward model."""
    response: Literal["revised", "reference"] = "revised"
    """What stands on the revised side: the edit's revision, or the reference answer, written afresh."""
    pairs: Annotated[int, Field(ge=1)] | None = None
    """Train on the first so many of the pairs that the filter keeps (None: all)."""
    alpha: float = 1.0
    beta: float = 0.5
    gamma: float = 0.0
    threshold: float | None = 0.6
    threshold_reading: Literal["nll", "probability"] = "nll"
    filter: FilterConfig | None = None
    score_batch_size: int = 64

    @model_validator(mode="after")
    def _fit(self) -> Config:
        if self.unit is not None and self.signal != "levenshtein":
            raise ValueError(f"unit: expected only with signal levenshtein, found {self.unit!r} with {self.signal}")
        if (self.scorer is not None) != (self.signal == "reward_model"):
            raise ValueError(
                "scorer: expected a token-level reward model with signal reward_model, and none with others; "
                f"found {self.scorer!r} with {self.signal}"
            )
        return self


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


def reference_pairs(pairs: list[LabelledPair], context: Context, config: Config) -> list[LabelledPair]:
    """The pairs with their prompts' reference answers in place of the revised responses, labelled by Levenshtein
    distance; a pair whose reference has the same tokens as its initial response is left out.

    Raises:
        InputError: the profile has no references, or none for some pair.
    """
    where = f"methods.{context.stage}.response"
    answers = {record.id: record.completion for record in context.split("train").references}
    if not answers:
        raise InputError(
            f"{where}: 'reference' needs raw/train/references.jsonl, which this profile does not have; make the raw "
            "data again with a source that writes references, or use 'revised'"
        )
    found = []
    for pair in pairs:
        if pair.id not in answers:
            raise InputError(
                f"{where}: expected a reference answer with the id of every edit, found none for {pair.id!r}"
            )
        ids = encode_response(context.tokenizer, answers[pair.id])
        if ids == pair.initial_ids:
            continue
        labels = label_by_unit(context.tokenizer, pair.initial_ids, ids, config.unit or "token")
        found.append(
            LabelledPair(
                id=pair.id,
                prompt_ids=pair.prompt_ids,
                initial_ids=pair.initial_ids,
                initial_labels=labels.initial,
                revised_ids=ids,
                revised_labels=labels.revised,
            )
        )
    return found


def pair_rewards(pairs: list[LabelledPair], context: Context, config: Config) -> tuple[Tensor, Tensor]:
    """Rewards of the initial and the revised responses under the model ``config.needs``: (N,), (N,). Each of several
    launched processes scores its share, and all get the same numbers, so that they keep the same pairs."""
    from accelerate import PartialState
    from accelerate.utils import gather

    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import score_responses

    reward = load_reward(config.needs, context.model(config.needs), context.device)
    alone = process_count() == 1
    own = pairs if alone else [pairs[row] for row in own_rows(len(pairs), PartialState())]
    prompts = [pair.prompt_ids for pair in own]
    with context.autocast():
        initial, revised = (
            score_responses(reward, prompts, sides, context.tokenizer, config.score_batch_size, context.device)
            for sides in ([pair.initial_ids for pair in own], [pair.revised_ids for pair in own])
        )
    if alone:
        return initial, revised
    initial, revised = (gather(side.to(context.device))[: len(pairs)].cpu() for side in (initial, revised))
    return initial, revised


def chosen_pairs(count: int, rewards: tuple[Tensor, Tensor] | None, config: Config, stage: str) -> list[int]:
    """Positions of the pairs to train on: those that the filter keeps, the first ``config.pairs`` of them.

    Raises:
        TrainingError: the filter keeps none, or fewer than asked for.
    """
    kept = list(range(count))
    if config.filter is not None:
        kept = torch.nonzero(keep_pairs(*rewards, config.filter)).squeeze(-1).tolist()
    if not kept:
        raise TrainingError(f"methods.{stage}.filter keeps none of {count} pairs; lower its thresholds")
    if config.pairs is not None and len(kept) < config.pairs:
        raise TrainingError(
            f"methods.{stage}.pairs: expected at least {config.pairs} pairs after the filter, found {len(kept)} of "
            f"{count}; ask for fewer or lower the filter's thresholds"
        )
    return kept[: config.pairs]


def token_scores(pairs: list[LabelledPair], context: Context, config: Config) -> list[dict[str, Any]]:
    """The columns that the signal ``reward_model`` changes, a mapping a pair: labels and scales of both sides.

    Raises:
        ConfigError: the scorer gives one reward a response.
    """
    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import raw_rewards

    reward = load_reward(config.scorer, context.model(config.scorer), context.device)
    tokenizer = context.tokenizer
    columns: list[dict[str, Any]] = [{} for _ in pairs]
    for side, sign in (("initial", BAD), ("revised", GOOD)):
        responses = [getattr(pair, f"{side}_ids") for pair in pairs]
        prompts = [pair.prompt_ids for pair in pairs]
        row = iter(columns)
        with context.autocast():
            batches = raw_rewards(
                reward, prompts, responses, tokenizer.pad_token_id, config.score_batch_size, context.device
            )
        for rewards, rollout in batches:
            if rewards.dim() != 2:
                raise ConfigError(
                    f"methods.{context.stage}.scorer: expected a token-level reward model, found {config.scorer!r}, "
                    "which gives one reward a response"
                )
            labels, scales = scored_labels(rewards, (rollout.response_ids == tokenizer.eos_token_id).cpu(), sign)
            for ids, label, scale in zip(rollout.response_lists(), labels.tolist(), scales.tolist(), strict=True):
                next(row).update({f"{side}_labels": label[: len(ids)], f"{side}_scales": scale[: len(ids)]})
    return columns


def training_rows(
    pairs: list[LabelledPair], rewards: tuple[Tensor, Tensor] | None, context: Context, config: Config
) -> list[dict[str, Any]]:
    """The trainer's rows: the pairs with the labels, and where the signal has them the scales, of ``config.signal``.

    Raises:
        TrainingError: no pair's revised response has a higher reward (signal ``reward_difference``).
    """
    rows = [pair.model_dump() for pair in pairs]
    if config.signal == "reward_model":
        for row, columns in zip(rows, token_scores(pairs, context, config), strict=True):
            row |= columns
        return rows
    if config.signal == "levenshtein" and (config.unit is None or config.response == "reference"):
        return rows
    for row in rows:
        initial, revised = row["initial_ids"], row["revised_ids"]
        if config.signal == "levenshtein":
            row["initial_labels"], row["revised_labels"], _ = label_by_unit(
                context.tokenizer, initial, revised, config.unit
            )
        elif config.signal == "bag_of_words":
            row["initial_labels"], row["revised_labels"] = label_bag_of_words(initial, revised)
        else:
            row["initial_labels"], row["revised_labels"] = [BAD] * len(initial), [GOOD] * len(revised)
    if config.signal == "reward_difference":
        try:
            factors = difference_scales(*rewards).tolist()
        except ValueError as error:
            raise TrainingError(f"methods.{context.stage}.signal: {error}; use another signal") from None
        for row, factor in zip(rows, factors, strict=True):
            for side in ("initial", "revised"):
                row[f"{side}_scales"] = [factor] * len(row[f"{side}_ids"])
    return rows


def run(context: Context, config: Config) -> None:
    """Train FIGA from the SFT model on the labelled pairs of the training split."""
    from datasets import Dataset

    every = context.labelled("train")
    pairs = reference_pairs(every, context, config) if config.response == "reference" else every
    if config.too_long == "drop":  # before the filter, so that ``config.pairs`` counts pairs that fit
        pairs = fitting(context, measured_pairs(pairs), config, "pairs")
    rewards = None
    if config.filter is not None or config.signal == "reward_difference":
        rewards = pair_rewards(pairs, context, config)
    kept = chosen_pairs(len(pairs), rewards, config, context.stage)
    rewards = rewards and tuple(side[kept] for side in rewards)
    kept_pairs = [pairs[index] for index in kept]
    if config.too_long == "error":
        fitting(context, measured_pairs(kept_pairs), config, "pairs")
    rows = training_rows(kept_pairs, rewards, context, config)
    context.run.log({"pairs": len(every), "pairs_kept": len(rows)})
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
        train_dataset=Dataset.from_list(rows),
        processing_class=context.tokenizer,
        peft_config=peft_config(config.optim, "CAUSAL_LM"),
    )
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", config.optim))
    save_trained(trainer, context.tokenizer, context.out)
