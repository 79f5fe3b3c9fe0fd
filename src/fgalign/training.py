"""What the trainers of transformers and TRL share here: one optimiser section, one translation to their arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fgalign.config import Section
from fgalign.context import Context
from fgalign.core.compiled import compile_layers
from fgalign.core.modeling import (
    attend_in_float32,
    freeze_in_bf16,
    full_state,
    is_sharded,
    project_at_once,
    reduce_in_float32,
    save_model,
)
from fgalign.core.schema import BAD, GOOD, NEUTRAL, LabelledPair, Prompt
from fgalign.core.tokens import encode_prompt
from fgalign.errors import ConfigError, InputError, TrainingError
from fgalign.parallel import is_main_process, process_count, progress
from fgalign.tracking import Run

R = TypeVar("R")

# Named for the transformers that is installed: newer ones warn of the old name. Always passed, as TRL's default is on.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


class LoraSection(Section):
    """LoRA (Hu et al. 2021) through peft; the adapter is merged into the saved model."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"


class OptimConfig(Section):
    """How a model is optimised. Batch sizes count examples (pairs, where examples are pairs) of one optimiser step on
    one device and one forward pass; ``accumulation`` passes make a step.

    With ``max_tokens`` training ends at the first optimiser step at or after so many tokens without padding have gone
    forward and backward; ``epochs`` is then only an upper bound, and ``schedule`` is laid out over these tokens.
    """

    learning_rate: float = Field(ge=0.0, allow_inf_nan=False)
    epochs: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    max_steps: int = -1
    max_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    compile: bool = False
    """Run the model's layers through torch.compile: the first step takes longer, later ones less time. For one
    process."""
    sampling: Literal["random", "group_by_length"] = "random"
    """Order of the examples; ``group_by_length`` puts those of similar length (``row_length``) into one batch, which
    then pads little."""
    lora: LoraSection | None = None


class LengthSection(Section):
    """Base of the sections of trainings that take no row of more than ``max_length`` tokens."""

    max_length: int = 512
    """Longest prompt and response together, in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """What a longer row of the training data does: it stops the stage before it trains, or is left out and counted.
    Test prompts are never left out."""


def trainer_arguments(optim: OptimConfig, *, output_dir: Path, seed: int, device: str, bf16: bool) -> dict[str, Any]:
    """Keyword arguments of ``transformers.TrainingArguments`` and TRL's configs for one training."""
    falls = optim.schedule in ("linear", "cosine")
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "data_seed": seed,
        "learning_rate": optim.learning_rate,
        "num_train_epochs": optim.epochs,
        "max_steps": optim.max_steps,
        "per_device_train_batch_size": optim.batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        "warmup_steps": optim.warmup_steps,
        # Over a budget of tokens ``train`` lays the schedule out, over its factors for the warm-up. What transformers
        # calls constant leaves the warm-up out.
        "lr_scheduler_type": optim.schedule if falls and not optim.max_tokens else "constant_with_warmup",
        "weight_decay": optim.weight_decay,
        "adam_beta2": optim.adam_beta2,
        "max_grad_norm": optim.max_grad_norm,
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 5,
        # Off, because it would show the mean of earlier losses in place of one that is not finite.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device != "cpu",
        "remove_unused_columns": False,
        "train_sampling_strategy": optim.sampling,
        # What ``train`` stops by and returns: the attention masks of all training batches, summed.
        "include_num_input_tokens_seen": "non_padding",
        _CHECKPOINTING: optim.gradient_checkpointing,
        # With FSDP each pass of a step has its gradients reduced: kept until the last, they would be whole on each GPU.
        **({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}} if _uses_fsdp() else {}),
    }


def _uses_fsdp() -> bool:
    return process_count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


_LABELS = {"revised": {NEUTRAL, GOOD}, "initial": {BAD, NEUTRAL}}


def pair_row(example: Any) -> Mapping[str, Any]:
    """An example of a data set by column: a ``LabelledPair`` as its fields, a mapping as it is.

    Raises:
        TrainingError: it is neither.
    """
    if isinstance(example, LabelledPair):
        return example.model_dump()
    if not isinstance(example, Mapping):
        raise TrainingError(
            f"train_dataset: expected labelled pairs, found {type(example).__name__}; `labels.label_edits` makes "
            "labelled pairs of edits"
        )
    return example


def check_pair(example: Mapping[str, Any], scaled: bool = False) -> None:
    """Raise TrainingError unless an example of a data set has what ``schema.LabelledPair`` says: a prompt, and for each
    token of a response a label of its side; with ``scaled`` a finite number too (``revised_scales``,
    ``initial_scales``)."""
    where = f"pair {example.get('id')!r}"
    for column in ("prompt_ids", "revised_ids", "initial_ids"):
        if not example.get(column):
            raise TrainingError(
                f"{where}: {column}: expected token ids, found none; `labels.label_edits` makes labelled pairs of edits"
            )
    for side, allowed in _LABELS.items():
        size = len(example[f"{side}_ids"])
        for column in (f"{side}_labels", *([f"{side}_scales"] if scaled else [])):
            given = example.get(column)
            if given is None or len(given) != size:
                found = "none" if given is None else str(len(given))
                raise TrainingError(
                    f"{where}: {column}: expected one for each of the {size} tokens of {side}_ids, found {found}"
                )
        odd = set(example[f"{side}_labels"]) - allowed
        if odd:
            raise TrainingError(
                f"{where}: {side}_labels: expected {' or '.join(map(str, sorted(allowed)))}, found {min(odd)}"
            )
        if scaled and not all(map(math.isfinite, example[f"{side}_scales"])):
            raise TrainingError(f"{where}: {side}_scales: expected finite numbers, found NaN or infinity")


def peft_config(optim: OptimConfig, task_type: str) -> Any:
    """peft's ``LoraConfig``, or None without LoRA. ``task_type``: CAUSAL_LM, SEQ_CLS or TOKEN_CLS."""
    if optim.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=optim.lora.r,
        lora_alpha=optim.lora.alpha,
        lora_dropout=optim.lora.dropout,
        target_modules=optim.lora.target_modules,
        task_type=task_type,
    )


def add_lora(model: Any, config: Any) -> Any:
    """The model with the adapter of peft's ``LoraConfig``, or as it is for None."""
    if config is None:
        return model
    from peft import get_peft_model

    model = get_peft_model(model, config)
    project_at_once(model)
    return model


def decay(schedule: str, fraction: float) -> float:
    """Factor of the learning rate when this fraction of the token budget is spent, 0 to 1: ``linear`` and ``cosine``
    fall from 1 to 0, others stay at 1."""
    left = max(0.0, 1.0 - fraction)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return 1.0


def row_length(row: Mapping[str, Any]) -> int:
    """How long a training row is, to group rows by: its prompt and the longest of its other columns. Ids of a list, or
    of the longest of several lists; in a row without lists, characters of a text."""
    kind = list if any(isinstance(value, list) for value in row.values()) else str
    lengths = {
        name: max(map(len, value)) if value and isinstance(value[0], list) else len(value)
        for name, value in row.items()
        if isinstance(value, kind)
    }
    prompt = sum(length for name, length in lengths.items() if name.startswith("prompt"))
    return prompt + max((length for name, length in lengths.items() if not name.startswith("prompt")), default=0)


def check_lengths(rows: Iterable[tuple[str, int]], max_length: int) -> None:
    """Raise InputError, before any training, where a row (what it is, its tokens) is longer than ``max_length``."""
    for what, tokens in rows:
        if tokens > max_length:
            raise InputError(
                f"{what}: prompt and response have {tokens} tokens, more than max_length {max_length}; raise it, "
                "shorten the data, or (where the section takes it) leave such rows out by too_long: drop"
            )


def fitting(context: Context, rows: Iterable[tuple[str, int, R]], limits: LengthSection, kind: str) -> list[R]:
    """The rows (what each is, its tokens, the row) of at most ``limits.max_length`` tokens, in their order.

    With ``too_long: drop`` one line, and the tracked run, say how many of the ``kind`` ("pairs") are left out.

    Raises:
        InputError: a row is longer and ``too_long`` is ``error``, or all are.
    """
    rows = list(rows)
    if limits.too_long == "error":
        check_lengths(((what, tokens) for what, tokens, _ in rows), limits.max_length)
    kept = [row for _, tokens, row in rows if tokens <= limits.max_length]
    left_out = len(rows) - len(kept)
    title = f"{context.stage} seed {context.seed}"
    if left_out and not kept:
        raise InputError(
            f"{title}: {kind}: expected some of at most max_length {limits.max_length} tokens, found none among "
            f"{len(rows):,} (the shortest has {min(tokens for _, tokens, _ in rows)}); raise it or shorten the data"
        )
    if limits.too_long == "drop":
        context.run.log({f"left_out/{kind.replace(' ', '_')}": left_out})
    if left_out and is_main_process():
        print(
            f"{title}: {left_out:,} of {len(rows):,} {kind} left out: more than max_length {limits.max_length} tokens",
            flush=True,
        )
    return kept


def measured_pairs(pairs: Sequence[LabelledPair]) -> Iterator[tuple[str, int, LabelledPair]]:
    """Labelled pairs as rows of ``fitting``, each as long as its prompt with the longer side."""
    for pair in pairs:
        side, ids = max(("initial", pair.initial_ids), ("revised", pair.revised_ids), key=lambda item: len(item[1]))
        yield f"pair {pair.id!r}, {side} side", len(pair.prompt_ids) + len(ids), pair


def fitting_prompts(
    context: Context, records: Sequence[Prompt], limits: LengthSection, response_length: int, split: str
) -> list[tuple[Prompt, list[int]]]:
    """Prompts of a split with their token ids, as far as ``limits`` leaves room for responses of ``response_length``
    tokens after them; see ``fitting``."""
    rows = []
    for record in records:
        ids = encode_prompt(context.tokenizer, record.prompt)
        what = f"prompt {record.id!r} of the {split} split, response_length {response_length}"
        rows.append((what, len(ids) + response_length, (record, ids)))
    return fitting(context, rows, limits, f"{split} prompts")


def train(trainer: Trainer, run: Run, title: str, optim: OptimConfig) -> dict[str, int]:
    """Train with a bar and a tracked run instead of the trainer's own printing, to the end of the token budget if
    ``optim`` has one. The trainer's arguments are those that ``trainer_arguments`` made of ``optim``.

    Returns:
        ``training_tokens`` and ``gradient_updates``, as ``Context.spend`` takes them.

    Raises:
        TrainingError: a logged loss, or a weight at the end, that is not finite.
    """
    rows, length = trainer.train_dataset, trainer.args.length_column_name
    if optim.sampling == "group_by_length" and not {"input_ids", length} & set(rows.column_names):
        # The sampler of transformers knows by itself how long ``input_ids`` are, and nothing else.
        trainer.train_dataset = rows.add_column(length, [row_length(row) for row in rows])
    if trainer.args.bf16:
        freeze_in_bf16(trainer.model)
    if trainer.args.bf16 and trainer.args.device.type == "cpu":
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            attend_in_float32(model)
    if optim.compile:
        if trainer.accelerator.num_processes > 1:
            raise ConfigError(f"compile: expected false on {trainer.accelerator.num_processes} processes, found true")
        compile_layers(trainer.model)
    reduce_in_float32(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(run, title, optim.max_tokens, optim.schedule))
    trainer.train()
    # The last steps' losses may never have been logged.
    for name, parameter in trainer.model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad and not bool(own.isfinite().all()):
            raise TrainingError(
                f"{title}: {name} is not finite after {trainer.state.global_step} steps; lower the learning rate or "
                "look at the data"
            )
    return {"training_tokens": trainer.state.num_input_tokens_seen, "gradient_updates": trainer.state.global_step}


def save_trained(trainer: Trainer, tokenizer: Any, folder: Path) -> None:
    """Save what a trainer has trained (``modeling.save_model``); of several processes the main one writes."""
    sharded = is_sharded(trainer.accelerator)
    if sharded and hasattr(trainer.model, "merge_and_unload"):
        raise ConfigError("optim.lora: expected none with sharded weights; launch with reproduce/accelerate/ddp.yaml")
    state = full_state(trainer.model_wrapped, trainer.accelerator)
    if is_main_process():
        save_model(trainer.model, tokenizer, folder, state)


class ProgressCallback(TrainerCallback):
    """Shows a bar, sends what a trainer logs to the tracked run, lays the schedule out over a token budget and stops
    at its end (the bar then counts tokens), and stops at a loss that is not finite."""

    def __init__(self, run: Run, title: str, max_tokens: int | None = None, schedule: str = "constant") -> None:
        self.run, self.title, self.max_tokens, self.schedule, self.bar = run, title, max_tokens, schedule, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; let the learning rate follow the tokens."""
        self.bar = progress(self.max_tokens or state.max_steps, self.title, "token" if self.max_tokens else "step")
        if self.max_tokens is not None:
            scheduler = kwargs["lr_scheduler"]
            scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it with DeepSpeed
            scheduler.lr_lambdas = [
                lambda step, warmup=warmup: (
                    warmup(step) * decay(self.schedule, state.num_input_tokens_seen / self.max_tokens)
                )
                for warmup in scheduler.lr_lambdas
            ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, end training when the budget is spent."""
        if self.max_tokens is None:
            self.bar.update(1)
            return
        self.bar.update(min(state.num_input_tokens_seen, self.max_tokens) - self.bar.n)
        if state.num_input_tokens_seen >= self.max_tokens:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Send numbers on."""
        logs = {key: float(value) for key, value in (logs or {}).items() if not key.startswith(("train_", "total_"))}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingError(
                f"{self.title}: the loss is {logs['loss']} at step {state.global_step}; expected a finite number: "
                "lower the learning rate or look at the data"
            )
        self.run.log(logs, state.global_step)
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()
