"""Training reward models: sequence level through TRL's RewardTrainer, token level through transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fgalign.context import Context
from fgalign.core.modeling import check_float32, load_sequence_reward_model, load_token_reward_model
from fgalign.core.schema import LabelledPair
from fgalign.core.tensor_ops import pad
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.errors import ConfigError, InputError
from fgalign.losses.token_reward import IGNORE, OUTPUTS, TokenLoss, inverse_frequency_weights, token_loss
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


class RewardSection(LengthSection):
    """A reward model's stage; all start from ``start`` (``base`` or ``sft``), with a new head."""

    start: Literal["base", "sft"] = "sft"
    optim: OptimConfig
    max_length: int = 128


class TokenRewardSection(RewardSection):
    """A token-level model: its loss (``losses.token_reward``) and the power p of the class weights, frequency ** -p
    (``bradley_terry`` has no classes and uses none)."""

    loss: TokenLoss = "three_class"
    class_weight_power: float = 0.5


def preference_rows(tokenizer: Any, triples: Sequence[tuple[str, str, str]]) -> list[dict[str, list[int]]]:
    """(prompt, better, worse) texts to TRL's columns ``chosen_ids`` and ``rejected_ids``."""
    return [
        {
            "chosen_ids": encode_prompt(tokenizer, prompt) + encode_response(tokenizer, better),
            "rejected_ids": encode_prompt(tokenizer, prompt) + encode_response(tokenizer, worse),
        }
        for prompt, better, worse in triples
    ]


def train_sequence_model(context: Context, config: RewardSection, rows: list[dict[str, list[int]]]) -> int:
    """Train a sequence-level reward model (Bradley-Terry loss) on pairs and save it; returns the number of pairs.

    Raises:
        InputError: see ``training.fitting``.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    measured = ((f"pair {number}", max(map(len, row.values())), row) for number, row in enumerate(rows))
    rows = fitting(context, measured, config, "pairs")
    model = load_sequence_reward_model(context.model(config.start), context.device, num_labels=1)
    trainer = RewardTrainer(
        model,
        # Dropout as in the token-level model's training, which is transformers' own.
        args=RewardConfig(**_arguments(context, config.optim), max_length=config.max_length, disable_dropout=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=context.tokenizer,
        peft_config=peft_config(config.optim, "SEQ_CLS"),
    )
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", config.optim))
    save_trained(trainer, context.tokenizer, context.out)
    return len(rows)


class TokenRewardCollator:
    """Labelled pairs to one batch of 2B rows: ``input_ids``, ``attention_mask`` and ``labels`` (2B, L), where labels
    are -1, 0 or 1 at response tokens and IGNORE elsewhere."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        """Collate: revised responses first, then initial ones."""
        examples = [pair_row(example) for example in examples]
        ids, labels = [], []
        for example in examples:
            check_pair(example)
        for side in ("revised", "initial"):
            for example in examples:
                ids.append([*example["prompt_ids"], *example[f"{side}_ids"]])
                labels.append([IGNORE] * len(example["prompt_ids"]) + list(example[f"{side}_labels"]))
        return {
            "input_ids": pad(ids, self.pad_token_id, side="right"),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, side="right"),
            "labels": pad(labels, IGNORE, side="right"),
        }


class TokenRewardTrainer(Trainer):
    """Trains a token-classification model on labelled pairs, a list of them or the columns of one. It must have as many
    outputs as ``token_loss_name`` needs (``losses.token_reward.OUTPUTS``); ``class_weights`` (3,): bad,
    neutral, good. Without a ``data_collator`` it takes ``TokenRewardCollator``.

    Raises:
        ConfigError: another number of outputs, or weights that are not float32; ``TrainingError``: a pair that
            ``training.check_pair`` refuses.
    """

    def __init__(
        self,
        *args: Any,
        class_weights: Tensor | None = None,
        token_loss_name: TokenLoss = "three_class",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("data_collator") is None and kwargs.get("processing_class") is not None:
            kwargs["data_collator"] = TokenRewardCollator(kwargs["processing_class"].pad_token_id)
        super().__init__(*args, **kwargs)
        check_float32(self.model)
        outputs = self.model.config.num_labels
        if outputs != OUTPUTS[token_loss_name]:
            raise ConfigError(
                f"model: expected {OUTPUTS[token_loss_name]} outputs a token for the loss {token_loss_name}, found "
                f"{outputs}; load a token-classification model with num_labels={OUTPUTS[token_loss_name]}"
            )
        self.args.remove_unused_columns = False  # the collator reads every column
        self.class_weights = class_weights
        self.token_loss_name = token_loss_name
        # Each micro-batch gives a mean, so the parent divides by the accumulation.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The token loss of a batch."""
        labels = inputs["labels"]
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        weights = None if self.class_weights is None else self.class_weights.to(labels.device)
        loss = token_loss(self.token_loss_name, output.logits, labels, weights)
        return (loss, output) if return_outputs else loss


def class_counts(pairs: Sequence[LabelledPair]) -> Tensor:
    """Tokens labelled bad, neutral and good over both sides: (3,)."""
    bad = -sum(sum(pair.initial_labels) for pair in pairs)
    good = sum(sum(pair.revised_labels) for pair in pairs)
    total = sum(len(pair.initial_ids) + len(pair.revised_ids) for pair in pairs)
    return torch.tensor([bad, total - bad - good, good])


def train_token_model(context: Context, config: TokenRewardSection, pairs: list[LabelledPair]) -> None:
    """Train a token-level reward model on labelled pairs and save it."""
    from datasets import Dataset

    pairs = fitting(context, measured_pairs(pairs), config, "pairs")
    lora = peft_config(config.optim, "TOKEN_CLS")
    if lora is not None:
        # The new head is trained in full; peft leaves it out of "all-linear" by itself for sequence models only.
        lora.exclude_modules = ["score", "classifier"]
    model = load_token_reward_model(context.model(config.start), context.device, num_labels=OUTPUTS[config.loss])
    trainer = TokenRewardTrainer(
        add_lora(model, lora),
        class_weights=_class_weights(pairs, config),
        token_loss_name=config.loss,
        args=TrainingArguments(**_arguments(context, config.optim)),
        data_collator=TokenRewardCollator(context.tokenizer.pad_token_id),
        train_dataset=Dataset.from_list([pair.model_dump() for pair in pairs]),
        processing_class=context.tokenizer,
    )
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", config.optim))
    save_trained(trainer, context.tokenizer, context.out)


def _class_weights(pairs: Sequence[LabelledPair], config: TokenRewardSection) -> Tensor | None:
    """Weights of bad, neutral and good; with the binary loss neutral tokens do not count and have weight 0.

    Raises:
        InputError: a class that counts has no token.
    """
    counts = class_counts(pairs)
    if config.loss == "bradley_terry":
        return None
    missing = [name for name, count in zip(("bad", "neutral", "good"), counts.tolist(), strict=True) if count == 0]
    if missing and (config.loss != "binary" or missing != ["neutral"]):
        raise InputError(
            f"labels/train.jsonl: expected tokens of each class for the loss {config.loss}, found none that is "
            f"{missing[0]}; edit more responses, or use the loss bradley_terry"
        )
    if config.loss == "binary":
        bad, good = inverse_frequency_weights(counts[[0, 2]], config.class_weight_power)
        return torch.stack([bad, torch.zeros_like(bad), good])
    return inverse_frequency_weights(counts, config.class_weight_power)


def _arguments(context: Context, optim: OptimConfig) -> dict[str, Any]:
    return trainer_arguments(
        optim, output_dir=Path(context.out), seed=context.seed, device=context.device.type, bf16=context.bf16
    )
