"""PPO with a reward model; nothing but the reward source differs between the three systems of
Xu et al.: sequence reward from preferences, sequence reward from edits, one reward per token.

While it trains, the policy answers a fixed set of validation prompts now and then; the answers are written to
``rollouts.jsonl`` beside the model and judged later, by the evaluation, for the learning curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fgalign.config import Section, no_such_key
from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.core.rollout import Rollout, uniforms
from fgalign.core.schema import CurveSample, write_records
from fgalign.core.tensor_ops import masked_sum
from fgalign.core.tokens import decode_response
from fgalign.parallel import process_count, progress
from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
from fgalign.rewards import load_reward, response_scores
from fgalign.training import LengthSection, LoraSection, OptimConfig, fitting_prompts, peft_config

SET_BY_RUN = ("output_dir", "seed", "bf16", "use_cpu", "vllm_max_length")
"""Fields of ``FineGrainedPPOConfig`` that the profile sets elsewhere."""


class CurveConfig(Section):
    """Answers for the learning curve: after every ``every`` updates, to the first ``prompts`` validation prompts (0:
    none) of those that ``max_length`` leaves room for."""

    every: Annotated[int, Field(ge=1)] = 5
    prompts: Annotated[int, Field(ge=0)] = 64
    advantages: bool = False
    """Record the advantages of the tokens too (not with ``advantage: group``, whose responses come in groups)."""


class Config(LengthSection):
    """PPO as a method of the pipeline; ``trainer`` holds fields of ``FineGrainedPPOConfig``. Within ``max_length`` a
    prompt leaves room for ``response_length`` tokens; ``too_long`` is about the curve's prompts too."""

    kind: Literal["ppo"]
    needs: str
    """The reward model that pays."""
    discrete: bool = False
    """Pay each token -1, 0 or 1, its likeliest class under a token-level model with classes, not the difference of
    probabilities."""
    summed: bool = False
    """Pay the sum of a response's token rewards at its last token, in place of each at its own."""
    trainer: dict[str, Any]
    lora: LoraSection | None = None
    curve: CurveConfig = CurveConfig()

    def setting(self, name: str) -> Any:
        """A field of the trainer's arguments: the profile's, or its default."""
        return self.trainer.get(name, getattr(FineGrainedPPOConfig, name))

    @model_validator(mode="after")
    def _comparable(self) -> Config:
        known = [field.name for field in fields(FineGrainedPPOConfig) if field.name not in SET_BY_RUN]
        for key in self.trainer:
            if key not in known:
                raise ValueError(f"trainer.{key}: {no_such_key(key, known)}")
        try:  # YAML reads 1e-4 as a text; the dataclass takes whatever comes.
            typed = TypeAdapter(FineGrainedPPOConfig).validate_python({"output_dir": "", **self.trainer})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"trainer.{where}: {first['msg']}, found {first['input']!r}") from None
        self.trainer.update({key: getattr(typed, key) for key in self.trainer})
        if self.curve.advantages and self.trainer.get("advantage") == "group":
            raise ValueError("curve.advantages: expected false with advantage group, whose responses come in groups")
        return self


class CurveRecorder:
    """Callback that samples and scores the curve's answers, with the same random numbers every time."""

    def __init__(self, context: Context, config: Config, prompts: list[Any], encoded: list[list[int]]) -> None:
        self.context, self.config = context, config
        self.prompts, self.encoded = prompts, encoded
        generator = torch.Generator().manual_seed(context.seed)
        self.uniform = uniforms(len(prompts), config.setting("response_length"), generator)
        self.samples: list[CurveSample] = []

    @torch.no_grad()
    def __call__(self, trainer: FineGrainedPPOTrainer, update: int) -> None:
        """Record after ``update`` when it is due; the last update is always due."""
        if update % self.config.curve.every and update != trainer.args.updates:
            return
        size = trainer.args.rollout_batch_size
        for start in range(0, len(self.encoded), size):
            rows = slice(start, start + size)
            rollout = trainer.sample(self.encoded[rows], self.uniform[rows])
            mask = rollout.response_mask
            scores = response_scores(trainer.score(rollout), mask).tolist()
            kl = masked_sum(trainer.logps(rollout) - trainer.ref_logps(rollout), mask, 1).tolist()
            learned = self._advantages(trainer, rollout)
            answers = zip(self.prompts[rows], rollout.response_lists(), scores, kl, learned, strict=True)
            for record, ids, score, nats, advantages in answers:
                self.samples.append(
                    CurveSample(
                        id=record.id,
                        seed=self.context.seed,
                        update=update,
                        response_tokens=trainer.response_tokens,
                        gradient_updates=trainer.gradient_updates,
                        prompt=record.prompt,
                        response=decode_response(trainer.tokenizer, ids),
                        reward=round(score, 6),
                        kl=round(nats, 6),
                        token_ids=None if advantages is None else ids,
                        advantages=advantages,
                    )
                )

    def _advantages(self, trainer: FineGrainedPPOTrainer, rollout: Rollout) -> list[list[float] | None]:
        if not self.config.curve.advantages:
            return [None] * len(rollout.truncated)
        experience, _ = trainer.make_experience(rollout)
        pairs = zip(experience.advantages, rollout.response_mask, strict=True)
        return [[round(value, 4) for value in row[mask].tolist()] for row, mask in pairs]


def run(context: Context, config: Config) -> None:
    """Align the SFT model by PPO on the prompts of the training split."""
    trainer_config = {**config.trainer}
    length = config.setting("response_length")
    encoded = {
        split: fitting_prompts(context, context.split(split).prompts, config, length, split)
        for split in ("train", "validation")
    }
    curve = encoded["validation"][: config.curve.prompts]
    recorder = CurveRecorder(context, config, [record for record, _ in curve], [ids for _, ids in curve])
    title = f"{context.stage} seed {context.seed}"
    with progress(config.setting("updates"), title, "update") as bar:

        def log(statistics: Mapping[str, float], update: int) -> None:
            context.run.log(statistics, update)
            bar.update(1)
            bar.set_postfix_str(f"reward {statistics['reward/score']:.3f} KL {statistics['kl/response']:.2f}")

        # Several processes take the models from the host's memory and shard them from there: whole, they would not fit
        # on a GPU together.
        device = context.device if process_count() == 1 else "cpu"
        lora = config.lora and peft_config(OptimConfig(learning_rate=0.0, lora=config.lora), "CAUSAL_LM")
        trainer = FineGrainedPPOTrainer(
            load_causal_lm(context.model("sft"), device),
            None if lora else load_causal_lm(context.model("sft"), device),
            reward=load_reward(config.needs, context.model(config.needs), device, config.discrete, config.summed),
            args=FineGrainedPPOConfig(
                output_dir=str(context.out),
                seed=context.seed,
                bf16=context.bf16,
                use_cpu=context.device.type == "cpu",
                vllm_max_length=config.max_length,
                **trainer_config,
            ),
            train_dataset=[ids for _, ids in encoded["train"]],
            processing_class=context.tokenizer,
            value_model=_value_model(context, device) if trainer_config.get("value_model") == "separate" else None,
            peft_config=lora,
            log=log,
            callbacks=[recorder],
        )

        trained = torch.zeros((), dtype=torch.long, device=trainer.device)

        def count(_: Any, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                trained.add_(inputs[1].sum())

        trainer.model.register_forward_pre_hook(count)
        with closing(trainer):
            trainer.train()
    context.spend(
        training_tokens=int(trainer.accelerator.reduce(trained, "sum")),
        sampled_tokens=trainer.response_tokens,
        gradient_updates=trainer.gradient_updates,
    )
    trainer.save_model(context.out)
    write_records(context.out / "rollouts.jsonl", recorder.samples)


def _value_model(context: Context, device: torch.device | str) -> Any:
    """A value model of its own, started from the SFT model with a new head of one output."""
    from fgalign.core.modeling import load_token_reward_model

    return load_token_reward_model(context.model("sft"), device, num_labels=1)
