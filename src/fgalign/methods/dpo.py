"""DPO (Rafailov et al. 2023, arXiv 2305.18290) on the preference pairs, through TRL's DPOTrainer; the reference is the
SFT model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.core.schema import Preference
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.errors import ConfigError
from fgalign.training import LengthSection, OptimConfig, fitting, peft_config, save_trained, train, trainer_arguments


class Config(LengthSection):
    """DPO as a method of the pipeline."""

    kind: Literal["dpo"]
    needs: Literal["sft"] = "sft"
    """The model to train further, and the reference."""
    optim: OptimConfig
    beta: float = 0.1
    """Strength of the KL penalty to the SFT model."""


class TokenizedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokenised already: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, the columns
    that its collator reads. (TRL would tokenise prompt and response as one text, and merge tokens across them.)"""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def preference_rows(tokenizer: Any, pairs: list[Preference]) -> Iterator[tuple[str, int, dict[str, list[int]]]]:
    """Preferences to the rows of ``TokenizedDPOTrainer``, each with its name and tokens for ``training.fitting``."""
    for pair in pairs:
        row = {
            "prompt_ids": encode_prompt(tokenizer, pair.prompt),
            "chosen_ids": encode_response(tokenizer, pair.chosen),
            "rejected_ids": encode_response(tokenizer, pair.rejected),
        }
        longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        yield f"pair {pair.id!r}", longest, row


def run(context: Context, config: Config) -> None:
    """Train DPO from the SFT model on the preferences of the training split.

    Raises:
        ConfigError: dropout in the adapter, which TRL's trainer would turn off without a word.
    """
    optim = config.optim
    if optim.lora and optim.lora.dropout:
        raise ConfigError(
            f"methods.{context.stage}.optim.lora.dropout: expected 0, because DPO compares with a reference and TRL "
            f"trains it without dropout, found {optim.lora.dropout}"
        )
    pairs = preference_rows(context.tokenizer, context.split("train").preferences)
    rows = fitting(context, pairs, config, "pairs")
    arguments = trainer_arguments(
        optim, output_dir=context.out, seed=context.seed, device=context.device.type, bf16=context.bf16
    )
    trainer = TokenizedDPOTrainer(
        load_causal_lm(context.model(config.needs), context.device),
        # With LoRA the reference is the model with its adapter switched off.
        None if optim.lora else load_causal_lm(context.model(config.needs), context.device),
        args=DPOConfig(**arguments, beta=config.beta, max_length=config.max_length),
        train_dataset=Dataset.from_list(rows),
        processing_class=context.tokenizer,
        peft_config=peft_config(optim, "CAUSAL_LM"),
    )
    context.spend(**train(trainer, context.run, f"{context.stage} seed {context.seed}", optim))
    save_trained(trainer, context.tokenizer, context.out)
