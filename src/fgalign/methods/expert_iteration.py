"""Expert iteration (Anthony et al. 2017; for language models, RAFT: Dong et al. 2023, arXiv 2304.06767): sample several
responses a prompt, fine-tune on the one that a reward model scores highest, and again from the new policy."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fgalign.context import Context
from fgalign.core.modeling import load_causal_lm
from fgalign.decoding import draw_best
from fgalign.errors import ConfigError, TrainingError
from fgalign.parallel import process_count, progress
from fgalign.rewards import load_reward
from fgalign.sft import align_rows, sft_row
from fgalign.training import LengthSection, OptimConfig, fitting_prompts


class Config(LengthSection):
    """Expert iteration as a method of the pipeline."""

    kind: Literal["expert_iteration"]
    needs: str
    """The reward model that chooses."""
    optim: OptimConfig
    """Of each round; ``max_tokens`` is shared evenly by the rounds."""
    rounds: int = Field(default=1, ge=1)
    """Each round samples from the policy of the round before, and trains it further."""
    samples: int = Field(default=8, ge=1)
    """Responses drawn for each prompt, in each round."""
    response_length: int
    """Budget of a response, in tokens, which has to fit within ``max_length`` after the prompt; responses cut off by it
    are never trained on."""
    prompts: int | None = Field(default=None, ge=1)
    """The first so many training prompts (None: all)."""
    temperature: float = Field(default=1.0, gt=0)
    sample_batch_size: int = 100


def run(context: Context, config: Config) -> None:
    """Sample, choose and train in rounds, on the prompts of the training split.

    Raises:
        ConfigError: several processes were launched; a round starts from the files of the one before.
        TrainingError: every response of a round is cut off.
    """
    if process_count() > 1:
        raise ConfigError(f"methods.{context.stage}: expert iteration runs in one process, found {process_count()}")
    tokenizer = context.tokenizer
    records = context.split("train").prompts[: config.prompts]
    prompts = [ids for _, ids in fitting_prompts(context, records, config, config.response_length, "train")]
    reward = load_reward(config.needs, context.model(config.needs), context.device)
    generator = torch.Generator().manual_seed(context.seed)
    start = context.model("sft")
    for number in range(1, config.rounds + 1):
        title = f"{context.stage} seed {context.seed} round {number}"
        with (
            progress(len(prompts) * config.samples, title, "response") as bar,
            torch.autocast(context.device.type, torch.bfloat16, enabled=context.bf16),
        ):
            draws = draw_best(
                load_causal_lm(start, context.device).eval(),
                prompts,
                best_of=config.samples,
                reward=reward,
                length=config.response_length,
                generator=generator,
                batch_size=config.sample_batch_size,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                temperature=config.temperature,
                complete=True,
                progress=bar.update,
            )
        context.spend(sampled_tokens=draws.sampled_tokens)
        responses = [ids for rollout in draws.batches for ids in rollout.response_lists()]
        truncated = torch.cat([rollout.truncated for rollout in draws.batches])
        rows = [
            sft_row([(prompt, False), (response, True)])
            for prompt, response, cut in zip(prompts, responses, truncated.tolist(), strict=True)
            if not cut
        ]
        if not rows:
            raise TrainingError(
                f"methods.{context.stage}: round {number}: all {config.samples} responses to each prompt were cut off "
                f"at response_length {config.response_length}; raise it"
            )
        kept = draws.scores[~truncated]
        context.run.log({"expert/reward": float(kept.mean()), "expert/prompts": len(rows)}, number)
        align_rows(context, rows, _share(context, config, number), config.max_length, start=start)
        start = context.out


def _share(context: Context, config: Config, number: int) -> OptimConfig:
    """The optimiser of a round: what is left of the token budget up to this round's end."""
    if config.optim.max_tokens is None:
        return config.optim
    left = config.optim.max_tokens * number // config.rounds - context.spent["training_tokens"]
    return config.optim.model_copy(update={"max_tokens": max(left, 1)})
