"""Fine-grained PPO: proximal policy optimisation whose reward may be one score a response or one reward a token.

``FineGrainedPPOTrainer`` is usable by itself, in TRL's manner::

    trainer = FineGrainedPPOTrainer(
        model, ref_model, reward=reward, args=FineGrainedPPOConfig(output_dir="out"),
        train_dataset=prompt_ids, processing_class=tokenizer)
    trainer.train()

``reward`` takes a ``Rollout`` and returns shape (B,) or (B, T). How rewards enter, exactly:

1. A sequence score is placed at the response's last token; token rewards stay where they are. Both are multiplied by
   one constant: 1 / (standard deviation of a response's total reward over responses of the policy before training, to
   the first ``calibration_prompts`` prompts or all there are), with ``reward_scale="reference_std"``; nothing is
   subtracted, so that token rewards gain no bonus for length.
2. A response cut off by the length budget gets ``-missing_eos_penalty`` at its last token. It ends the episode as the
   end-of-sequence token does: no value is bootstrapped.
3. With ``whiten_rewards`` the rewards of the batch are divided by their standard deviation (mean kept).
4. ``kl_coef`` times the KL estimate of the token is subtracted from each token's reward.
5. Generalised advantage estimation; or, with ``advantage="group"`` and without any value model, the reward-to-go of a
   token minus the mean of that of the other responses to the prompt (``losses.ppo.group_advantages``). With
   ``whiten_advantages`` the advantages of the batch get mean 0 and variance 1.

On several processes (`accelerate launch`) each samples, scores and trains on its share of a round's responses; prompts,
random numbers, minibatches and statistics are those of one process, so that losses are the same up to rounding.

``GLOSSARY`` explains every statistic that is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgalign.core.compiled import OPTIONS, check_compiler, compute_positions_once, join_products
from fgalign.core.modeling import (
    Float32Linear,
    attend_in_float32,
    check_float32,
    check_kept,
    float32_head,
    freeze_in_bf16,
    full_state,
    is_sharded,
    learned_positions,
    leave_out_cudnn_attention,
    project_at_once,
    save_model,
)
from fgalign.core.rollout import Recorder, Rollout, response_logps, uniforms
from fgalign.core.tensor_ops import entropy, gae, masked_mean, masked_sum, position_ids, tempered, token_logps, whiten
from fgalign.distributed import (
    by_rows,
    check_supported,
    clip_gradients,
    full_parameters,
    gather_rollout,
    gathered,
    own_rows,
    prepare_trained,
    shard_frozen,
)
from fgalign.errors import ConfigError, TrainingError
from fgalign.losses.ppo import (
    KL_ERROR,
    AdaptiveKLController,
    FixedKLController,
    ValueLoss,
    group_advantages,
    kl_per_token,
    policy_loss,
    rewards_at_last_token,
    shaped_rewards,
    value_loss,
)
from fgalign.rewards import RewardFunction, response_scores
from fgalign.rollout_engine import ENGINES, RolloutEngine, TransformersEngine, choose_engine, start_vllm

GLOSSARY: dict[str, str] = {
    "reward/score": "mean score of a response before scaling: the sequence reward, or the sum of its token rewards",
    "reward/score_std": "standard deviation over the batch of that score",
    "reward/token": "mean scaled reward of a token, without penalties",
    "reward/shaped": "mean over responses of the sum of what the policy is paid: scaled rewards minus penalties",
    "kl/response": "mean over responses of sum_t log pi(y_t) - log pi_ref(y_t), in nats",
    "kl/coef": "coefficient of the KL penalty in this update",
    "response/tokens": "mean response length, the end-of-sequence token included",
    "response/truncated": "share of responses that the length budget cut off",
    "policy/loss": "clipped surrogate loss, mean over the update's minibatches",
    "policy/clip_fraction": "share of tokens whose probability ratio was clipped",
    "policy/approximate_kl": "k3 estimate of the KL between old and new policy, nats a token",
    "policy/entropy": "mean entropy of the next-token distribution, in nats",
    "value/loss": "half the (clipped) squared error of the values; 0 with advantage group",
    "value/clip_fraction": "share of tokens whose value was clipped; 0 with advantage group",
    "value/explained_variance": (
        "1 - var(returns - values) / var(returns), with the values before the update; with advantage group, the means "
        "over the other responses to the prompt stand for the values"
    ),
    "gradient/norm": "norm of the gradient before clipping, mean over optimiser steps",
    "learning_rate": "learning rate at the update's last optimiser step",
    "count/response_tokens": "response tokens sampled so far",
    "count/gradient_updates": "optimiser steps taken so far",
    "time/rollout": "seconds of sampling",
    "time/scoring": "seconds of reward model, reference and old policy",
    "time/update": "seconds of forward and backward passes and optimiser steps",
}
"""Name of each logged statistic and what it is."""


@dataclass
class FineGrainedPPOConfig:
    """Arguments of ``FineGrainedPPOTrainer``. Batch sizes count responses, over all processes together.

    Raises:
        ConfigError: a value that cannot work, when the trainer is made.
    """

    output_dir: str
    seed: int = 1
    updates: int = 50
    """Rounds of sampling and updating."""
    rollout_batch_size: int = 64
    """Responses sampled in a round."""
    epochs: int = 4
    """Passes over a round's responses."""
    minibatch_size: int = 16
    """Responses of one optimiser step."""
    microbatch_size: int | None = None
    """Responses of one forward and backward pass of a process (None: its minibatch), by length; gradients of its passes
    add up."""
    inference_batch_size: int | None = None
    """Responses that a process samples or scores at once (None: its share of the round); vLLM decides by itself."""
    rollout_engine: str = "transformers"
    """What samples: ``transformers``, ``vllm``, or ``auto``: vLLM where it is installed and there is a GPU."""
    vllm_memory: float = 0.3
    """Share of a GPU's memory that vLLM may take."""
    vllm_max_length: int | None = None
    """Longest prompt and response together that vLLM has to serve, in tokens (None: that of ``train_dataset``)."""
    learning_rate: float = 1e-5
    value_learning_rate: float | None = None
    """Learning rate of the value head or value model (None: the same)."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly to its value."""
    schedule: str = "constant"
    """After the warm-up: ``constant``, or ``linear``: falling in equal steps, to reach 0 after the last update."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    response_length: int = 48
    """Budget of a response, in tokens."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities that are trained."""
    gamma: float = 1.0
    advantage: str = "gae"
    """``gae``, or ``group``: no value model; see the module's text, 5."""
    group_size: int = 1
    """Responses to each prompt of a round; 1 with ``gae``, at least 2 with ``group``."""
    lam: float = 0.95
    """Of ``gae``."""
    clip_range: float = 0.2
    clip_range_value: float | None = 0.2
    value_coef: float = 0.1
    """Weight of the value loss beside the policy loss."""
    value_model: str = "head"
    """``head``: a linear layer on the policy's last hidden state; ``separate``: a model of its own."""
    kl_coef: float = 0.05
    kl_controller: str = "fixed"
    """``fixed`` or ``adaptive`` (towards ``kl_target`` nats a response, Ziegler et al. 2019)."""
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    kl_estimator: str = "k1"
    reward_scale: str = "reference_std"
    """``reference_std`` (see the module's text, 1) or ``none``."""
    calibration_prompts: int = 256
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = 1.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Compute in bf16 through accelerate's mixed precision; weights that are trained stay in float32."""
    use_cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    compile: bool = False
    """Run sampling, scoring and update through torch.compile. The first updates take about a minute more, later ones
    less time. For one process; on the CPU it needs a C++ compiler. With ``bf16`` sampling reads copies of the linear
    weights in bf16, 2 bytes each."""
    reuse_sampling: bool = False
    """Take log-probabilities, entropies and (from a value head) values of the old policy from the passes that sampled
    the responses, up to rounding; that saves a pass over them. For one process and the engine transformers."""
    fused: bool = True
    """Take AdamW's step in one kernel. It is faster, and rounds otherwise than without."""


def check_config(args: FineGrainedPPOConfig) -> None:
    """Raise ConfigError where values cannot work together."""
    for name, allowed in {
        "schedule": ("constant", "linear"),
        "value_model": ("head", "separate"),
        "kl_controller": ("fixed", "adaptive"),
        "kl_estimator": ("k1", "k2", "k3"),
        "reward_scale": ("reference_std", "none"),
        "advantage": ("gae", "group"),
        "rollout_engine": ENGINES,
    }.items():
        if getattr(args, name) not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(args, name)!r}")
    counts = ("updates", "rollout_batch_size", "epochs", "minibatch_size", "response_length", "calibration_prompts")
    for name in (*counts, "microbatch_size", "inference_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, found {getattr(args, name)}")
    if args.rollout_batch_size % args.minibatch_size:
        raise ConfigError(
            f"minibatch_size: expected a divisor of rollout_batch_size {args.rollout_batch_size}, "
            f"found {args.minibatch_size}"
        )
    if args.advantage == "gae" and args.group_size != 1:
        raise ConfigError(f"group_size: expected 1 with advantage gae, found {args.group_size}")
    if args.advantage == "group":
        if args.group_size < 2 or args.rollout_batch_size % args.group_size:
            raise ConfigError(
                "group_size: expected at least 2 and a divisor of rollout_batch_size "
                f"{args.rollout_batch_size} with advantage group, found {args.group_size}"
            )
        if args.value_model != "head":
            raise ConfigError(f"value_model: advantage group has none; leave it at 'head', found {args.value_model!r}")
    if not 0 < args.vllm_memory < 1:
        raise ConfigError(f"vllm_memory: expected a share between 0 and 1, found {args.vllm_memory}")
    for name in ("learning_rate", "kl_coef", "value_coef", "clip_range", "gamma", "lam"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ConfigError(f"{name}: expected a number of at least 0, found {getattr(args, name)}")
    for name in ("kl_target", "kl_horizon"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"{name}: expected above 0, found {getattr(args, name)}")
    if args.kl_controller == "adaptive" and not args.kl_horizon > KL_ERROR * args.rollout_batch_size:
        raise ConfigError(
            f"kl_horizon: expected more than {KL_ERROR} * rollout_batch_size {args.rollout_batch_size} with "
            f"kl_controller adaptive, or one round could take kl_coef to 0 or below, found {args.kl_horizon}; raise it"
        )
    if not args.temperature > 0:
        raise ConfigError(f"temperature: expected above 0 (training needs a distribution), found {args.temperature}")


def check_prompts(prompts: Sequence[Any], pad_token_id: int) -> None:
    """Raise ConfigError unless prompts are lists of token ids, none of them empty or padded."""
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            raise ConfigError(
                "train_dataset: expected a list of prompts, each a list of token ids, found "
                f"{type(prompts).__name__} of {type(prompt).__name__}"
            )
        if not prompt or not all(isinstance(token, Integral) for token in prompt):  # numpy's too
            raise ConfigError(f"train_dataset: prompt {number}: expected token ids, found {_beginning(prompt)}")
        if pad_token_id in (prompt[0], prompt[-1]):
            raise ConfigError(
                f"train_dataset: prompt {number}: expected no padding (token {pad_token_id}), found "
                f"{_beginning(prompt)}; give prompts as they are, each of its own length"
            )


def _beginning(prompt: Sequence[Any]) -> str:
    return "none" if not prompt else ", ".join(map(str, prompt[:8])) + (", …" if len(prompt) > 8 else "")


class PolicyWithValue(nn.Module):
    """A causal LM and the value of each state, behind one forward pass (so that accelerate can wrap both). Without
    ``has_values`` there is neither head nor model, and the values are 0."""

    def __init__(self, policy: Any, value_model: Any = None, has_values: bool = True) -> None:
        super().__init__()
        # What FSDP shards by itself; and what TRL asks of a model that it unwraps.
        self._no_split_modules = getattr(policy, "_no_split_modules", None)
        self.is_gradient_checkpointing = False
        self.policy = policy
        self.value_model = value_model
        self.has_values = has_values
        if has_values and value_model is None:
            # What the output layer reads; some models project their hidden states first.
            layer = policy.get_output_embeddings()
            size = layer.in_features if hasattr(layer, "in_features") else policy.config.get_text_config().hidden_size
            self.value_head = Float32Linear(size, 1)
            # Values start at 0: an untrained head must not disturb the first advantages.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def run_policy(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the policy alone. Sharded weights are gathered by the outermost module, which is this one."""
        return self.policy(*args, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Logits (B, keep, V) and values (B, keep) at the last ``keep`` positions."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask),
            "use_cache": False,
        }
        if not self.has_values:
            logits = self._kept(self.policy(**inputs, logits_to_keep=keep).logits, keep)
            return logits, torch.zeros(logits.shape[:2], device=logits.device)
        if self.value_model is not None:
            logits = self._kept(self.policy(**inputs, logits_to_keep=keep).logits, keep)
            return logits, self.separate_values(input_ids, attention_mask, keep)
        output = self.policy(**inputs, logits_to_keep=keep, output_hidden_states=True)
        hidden = output.hidden_states[-1][:, -keep:]
        return self._kept(output.logits, keep), self.head_values(hidden)

    def _kept(self, logits: Tensor, keep: int) -> Tensor:
        check_kept(self.policy, logits, keep)
        return logits

    def head_values(self, hidden: Tensor) -> Tensor:
        """Values of hidden states."""
        return self.value_head(hidden).squeeze(-1).float()

    def separate_values(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """Values (B, keep) of the value model at the last ``keep`` positions."""
        positions = position_ids(attention_mask)
        output = self.value_model(input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return output.logits[:, -keep:].squeeze(-1).float()


@dataclass
class Experience:
    """A round's responses and what the updates need of them; (B, T) each but the rollout. With advantage ``group`` the
    values are the baselines and the returns the rewards-to-go."""

    rollout: Rollout
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def experience_losses(
    args: FineGrainedPPOConfig,
    model: PolicyWithValue,
    rollout: Rollout,
    old_logps: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> dict[str, Tensor]:
    """Losses of responses and what they were made of, each a mean over their tokens; (B, T) each but the rollout."""
    mask = rollout.response_mask
    logits, values = response_outputs(model, rollout)
    logps = token_logps(tempered(logits, args.temperature), rollout.response_ids)
    policy = policy_loss(logps, old_logps, advantages, mask, args.clip_range)
    if args.advantage == "group":
        value = ValueLoss(torch.zeros((), device=mask.device), torch.zeros((), device=mask.device))
    else:
        value = value_loss(values, old_values, returns, mask, args.clip_range_value)
    return {
        "policy/loss": policy.loss,
        "policy/clip_fraction": policy.clip_fraction,
        "policy/approximate_kl": policy.approximate_kl,
        "value/loss": value.loss,
        "value/clip_fraction": value.clip_fraction,
    }


def response_outputs(model: PolicyWithValue, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) that predict each response token, and values (B, T) of the states before them."""
    keep = rollout.response_ids.shape[1] + 1
    logits, values = model(rollout.input_ids, rollout.attention_mask.long(), keep)
    return logits[:, :-1], values[:, :-1]


def old_policy(model: PolicyWithValue, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the response tokens, values and entropies: (B, T) each."""
    logits, values = response_outputs(model, rollout)
    scaled = tempered(logits, temperature)
    return token_logps(scaled, rollout.response_ids), values, entropy(scaled)


def old_values(model: PolicyWithValue, rollout: Rollout) -> Tensor:
    """Values (B, T) of a separate value model."""
    keep = rollout.response_ids.shape[1] + 1
    return model.separate_values(rollout.input_ids, rollout.attention_mask.long(), keep)[:, :-1]


class ShardedPolicy:
    """The policy within a ``PolicyWithValue`` whose weights FSDP has sharded, called as a causal LM is."""

    def __init__(self, model: PolicyWithValue) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.run_policy(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The policy's configuration."""
        return self.model.policy.config

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode, or out of it."""
        self.model.train(mode)


class FineGrainedPPOTrainer:
    """PPO with a reward a sequence or a token (see the module's text).

    Args:
        model: causal LM to align; what is trained of it in float32 (``dtype=torch.float32`` when it is loaded).
        ref_model: the reference policy, another object than ``model``, kept as it is; with ``peft_config`` it may be
            None: then it is the model with its adapter switched off.
        reward: see the module's text; of several rows no reward may depend on another row. It may return its tensor on
            any device. A ``model`` that the function carries as an attribute is put on the trainer's device, and
            sharded where the policy is.
        args: the configuration.
        train_dataset: prompts as lists of token ids.
        processing_class: tokenizer; gives the ids of padding and end of sequence.
        value_model: token-classification model with one label, for ``args.value_model="separate"``.
        peft_config: adapters to train instead of all weights.
        log: called with (statistics, update) after each update.
        callbacks: called with (trainer, update) before training, as update 0, and after each update.

    Raises:
        ConfigError: bad arguments; ``TrainingError``: a loss or a reward that is not finite.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        reward: RewardFunction,
        args: FineGrainedPPOConfig,
        train_dataset: Sequence[Sequence[int]],
        processing_class: Any,
        *,
        value_model: Any = None,
        peft_config: Any = None,
        log: Callable[[Mapping[str, float], int], None] | None = None,
        callbacks: Sequence[Callable[[FineGrainedPPOTrainer, int], None]] = (),
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        check_config(args)
        if processing_class.pad_token_id in (None, processing_class.eos_token_id):
            raise ConfigError(
                f"tokenizer: expected a padding token beside the end-of-sequence token, found "
                f"{processing_class.pad_token!r}; set `tokenizer.pad_token` to another token"
            )
        if (args.value_model == "separate") != (value_model is not None):
            given = "none" if value_model is None else "one"
            raise ConfigError(f"value_model: {args.value_model!r} in args, but {given} given")
        if ref_model is model:
            # An adapter goes into the model itself, so this holds with ``peft_config`` too.
            raise ConfigError("ref_model: expected another object than model, or the KL is always 0; load it twice")
        if ref_model is None and peft_config is None:
            raise ConfigError("ref_model: None works only with peft_config, where the adapter can be switched off")
        check_prompts(train_dataset, processing_class.pad_token_id)
        for name, each in (("model", model), ("value_model", value_model)):
            if getattr(each, "_is_stateful", False):
                raise ConfigError(
                    f"{name}: expected a model with a key-value cache, found {type(each).__name__}, which keeps a state"
                )
        if len(train_dataset) < args.rollout_batch_size // args.group_size:
            groups = f" / group_size {args.group_size}" if args.group_size > 1 else ""
            raise ConfigError(
                f"train_dataset: {len(train_dataset)} prompts, fewer than rollout_batch_size "
                f"{args.rollout_batch_size}{groups}"
            )
        calibration = {"calibration_prompts": args.calibration_prompts, "train_dataset": len(train_dataset)}
        for name, count in calibration.items():
            if args.reward_scale == "reference_std" and count < 2:
                raise ConfigError(
                    f"{name}: expected at least 2 prompts with reward_scale reference_std, found {count}: one response "
                    "has no standard deviation; give more, or set reward_scale to none"
                )
        longest = max(map(len, train_dataset)) + args.response_length
        for name, each in (("model", model), ("ref_model", ref_model), ("value_model", value_model)):
            limit = None if each is None else learned_positions(each.config)
            if limit is not None and longest > limit:
                raise ConfigError(
                    f"train_dataset: expected at most {limit} tokens of prompt and response, the positions that {name} "
                    f"has learned, found {longest}, {args.response_length} of them response_length; shorten either"
                )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.bf16:
            freeze_in_bf16(model)
        for each in (model, ref_model):
            project_at_once(each)
        for each in filter(None, (model, value_model)):
            check_float32(each)
            if args.gradient_checkpointing:
                each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.args = args
        if not torch.distributed.is_initialized():
            # Another trainer of this process may have computed in another precision.
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "no")
        if args.use_cpu and self.accelerator.device.type != "cpu":
            raise ConfigError("use_cpu: another trainer of this process has taken a GPU; start a process for this one")
        if self.accelerator.device.type == "cuda":
            leave_out_cudnn_attention()
        check_supported(self.accelerator, adapter=peft_config is not None)
        if args.bf16 and self.accelerator.device.type == "cpu":
            for each in (model, ref_model, value_model, getattr(reward, "model", None)):
                attend_in_float32(each)
        for each in (value_model, getattr(reward, "model", None)):
            float32_head(each)
        self.reward = reward
        self.prompts = train_dataset
        self.tokenizer = processing_class
        self._log = log
        self._callbacks = list(callbacks)
        processes = self.accelerator.num_processes
        if args.rollout_batch_size % processes or args.minibatch_size % processes:
            raise ConfigError(f"rollout_batch_size and minibatch_size: expected multiples of {processes} processes")
        if args.compile and processes > 1:
            raise ConfigError(f"compile: expected false on {processes} processes, found true")
        if args.compile:
            check_compiler(self.accelerator.device)
            for each in (model, ref_model, value_model, getattr(reward, "model", None)):
                join_products(each)
                if self.accelerator.device.type == "cpu":
                    compute_positions_once(each)
        self._engine_name = choose_engine(args.rollout_engine, own=args.use_cpu or peft_config is not None)
        if args.reuse_sampling and (processes > 1 or self._engine_name != "transformers"):
            raise ConfigError("reuse_sampling: expected one process and rollout_engine 'transformers'")
        # Without dropout the ratio of the new to the old policy is 1 before the first step.
        both = PolicyWithValue(model, value_model, has_values=args.advantage == "gae").eval()
        fused = {"fused": True} if args.fused else {}
        optimizer = torch.optim.AdamW(self._groups(both), weight_decay=args.weight_decay, betas=(0.9, 0.95), **fused)
        microbatch_size = args.microbatch_size or args.minibatch_size // processes
        self.model, self.optimizer = prepare_trained(
            both, optimizer, self.accelerator, microbatch_size, args.max_grad_norm
        )
        compiled = partial(torch.compile, options=OPTIONS) if args.compile else _as_it_is
        self._losses = compiled(partial(experience_losses, args))
        self._old, self._old_values, self._logps = compiled(old_policy), compiled(old_values), compiled(response_logps)
        head = both.head_values if hasattr(both, "value_head") else None
        self._recorder = Recorder(head, args.compile) if args.reuse_sampling else None
        if args.compile and hasattr(reward, "model"):
            reward.model.compile(options=OPTIONS)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ref_model = shard_frozen(ref_model, self.accelerator) if ref_model is not None else None
        if isinstance(getattr(reward, "model", None), nn.Module):
            shard_frozen(reward.model, self.accelerator)
        self.kl_controller = (
            FixedKLController(args.kl_coef)
            if args.kl_controller == "fixed"
            else AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        )
        self._generator = torch.Generator().manual_seed(args.seed)
        self._order = self._prompt_order()
        self.reward_factor = 1.0
        self._calibrated = False
        self.engine = self._start_engine()
        self._weights_changed = True
        self.response_tokens = 0
        self.gradient_updates = 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.accelerator.device

    @property
    def policy(self) -> Any:
        """The policy under training, without the value head: a causal LM, or ``ShardedPolicy``."""
        if self.accelerator.is_fsdp2:
            return ShardedPolicy(self.model)
        return self.accelerator.unwrap_model(self.model).policy

    def train(self) -> None:
        """Run all updates. The rewards' factor stays that of the first call."""
        if not self._calibrated:
            self.reward_factor, self._calibrated = self._calibrate(), True
        self._call_back(0)
        for update in range(1, self.args.updates + 1):
            statistics = self.step(update)
            if self._log is not None:
                self._log(statistics, update)
            self._call_back(update)

    def close(self) -> None:
        """Give back what the rollout engine holds; to be called when the trainer has sampled for the last time, or
        failed (``contextlib.closing`` does both)."""
        self.engine.close()

    def step(self, update: int) -> dict[str, float]:
        """One round: sample, score, update; returns the statistics that GLOSSARY explains."""
        self._set_learning_rate(update)
        started = time.perf_counter()
        rollout = self.sample(self._next_prompts(), recorder=self._recorder)
        sampled = time.perf_counter()
        experience, statistics = self.make_experience(rollout, self._recorder and self._recorder.take())
        self.response_tokens += int(rollout.response_mask.sum())
        self.kl_controller.update(statistics["kl/response"], self.args.rollout_batch_size)
        scored = time.perf_counter()
        statistics |= self.update(experience)
        statistics |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "count/response_tokens": self.response_tokens,
            "count/gradient_updates": self.gradient_updates,
            "time/rollout": sampled - started,
            "time/scoring": scored - sampled,
            "time/update": time.perf_counter() - scored,
        }
        return statistics

    def sample(
        self, prompts: Sequence[Sequence[int]], uniform: Tensor | None = None, recorder: Recorder | None = None
    ) -> Rollout:
        """One response of the current policy to each prompt; ``uniform`` (B, T) fixes the random numbers. Every process
        gives all prompts and gets all responses. ``recorder`` draws the tokens and keeps what is said of them
        (engine transformers only)."""
        if uniform is None:
            uniform = uniforms(len(prompts), self.args.response_length, self._generator)
        if self._weights_changed:
            self.engine.sync()
            self._weights_changed = False
        rows = own_rows(len(prompts), self.accelerator)
        # vLLM has a type of its own for its weights.
        with self._autocast() if isinstance(self.engine, TransformersEngine) else nullcontext():
            rollout = self.engine.sample(
                [prompts[row] for row in rows],
                uniform[rows],
                self.args.temperature,
                **({} if recorder is None else {"recorder": recorder}),
            )
        return gather_rollout(rollout, len(prompts), self.tokenizer.pad_token_id, self.accelerator)

    @torch.no_grad()
    def make_experience(
        self, rollout: Rollout, recorded: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Experience, dict[str, float]]:
        """Score a round's responses and compute advantages; also its statistics. Nothing of the trainer changes.
        ``recorded``: what a ``Recorder`` took of these responses (None: a pass over them finds out)."""
        args, mask = self.args, rollout.response_mask
        raw = self.score(rollout)
        if recorded is None:
            logps, values, entropies = self.by_rows(rollout, lambda part: self._old(self.model, part, args.temperature))
        else:
            logps, values, entropies = recorded
            if args.value_model == "separate":
                with self._autocast():
                    values = self.by_rows(rollout, lambda part: self._old_values(self.model, part))
        ref_logps = self.ref_logps(rollout)
        kl = kl_per_token(logps, ref_logps, args.kl_estimator)
        scaled = self.reward_factor * (rewards_at_last_token(raw, mask) if raw.dim() == 1 else raw)
        paid = scaled - args.missing_eos_penalty * rewards_at_last_token(rollout.truncated.float(), mask)
        if args.whiten_rewards:
            paid = whiten(paid, mask, shift_mean=False)
        shaped = shaped_rewards(paid, kl, self.kl_controller.value, mask)
        if args.advantage == "group":
            advantages, returns = group_advantages(shaped, mask, args.group_size, args.gamma)
            values = returns - advantages
        else:
            advantages, returns = gae(shaped, values, mask, gamma=args.gamma, lam=args.lam)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask)

        scores = response_scores(raw, mask)
        tokens = int(mask.sum())
        residual = masked_mean((returns - values - masked_mean(returns - values, mask)).square(), mask)
        spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
        statistics = {
            "reward/score": float(scores.float().mean()),
            "reward/score_std": float(scores.std(correction=0)),
            "reward/token": float(masked_mean(scaled, mask)),
            "reward/shaped": float(masked_sum(shaped, mask, 1).float().mean()),
            "kl/response": float(masked_sum(logps - ref_logps, mask, 1).float().mean()),
            "kl/coef": self.kl_controller.value,
            "response/tokens": tokens / args.rollout_batch_size,
            "response/truncated": float(rollout.truncated.float().mean()),
            "policy/entropy": float(masked_mean(entropies, mask)),
            "value/explained_variance": float(1 - residual / spread.clamp(min=1e-8)),
        }
        return Experience(rollout, logps, values, advantages, returns), statistics

    def update(self, experience: Experience) -> dict[str, float]:
        """All optimiser steps of a round; the mean of their statistics."""
        rows = experience.advantages.shape[0]
        sums: dict[str, float] = {}
        steps = 0
        self._checkpoint_layers()
        for _ in range(self.args.epochs):
            order = torch.randperm(rows, generator=self._generator)
            for chunk in order.split(self.args.minibatch_size):
                for name, value in self.minibatch_step(experience, chunk).items():
                    sums[name] = sums.get(name, 0.0) + value
                steps += 1
        self.model.eval()
        self._weights_changed = True
        return {name: value / steps for name, value in sums.items()}

    def minibatch_step(self, experience: Experience, chunk: Tensor) -> dict[str, float]:
        """One optimiser step on the responses at ``chunk``, in micro-batches whose gradients add up exactly; a process
        takes its share of them."""
        args, processes = self.args, self.accelerator.num_processes
        mask = experience.rollout.response_mask[chunk.to(self.device)]
        total = mask.sum().clamp(min=1)
        statistics = dict.fromkeys(
            ("policy/loss", "policy/clip_fraction", "policy/approximate_kl", "value/loss", "value/clip_fraction"), 0.0
        )
        own = chunk[self.accelerator.process_index :: processes]
        if (
            args.microbatch_size is not None
        ):  # responses of one length together: a micro-batch is as wide as its longest
            own = own[mask.sum(1).cpu()[self.accelerator.process_index :: processes].argsort(stable=True)]
        pieces = own.split(args.microbatch_size or len(own))
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            # DeepSpeed takes its step in the backward pass, and asks this whether to.
            self.accelerator.sync_gradients = last
            # With sharded weights each pass has its gradients reduced too: kept until the last, they would be whole.
            with nullcontext() if last or is_sharded(self.accelerator) else self.accelerator.no_sync(self.model):
                losses, share = self._micro_losses(experience, piece.to(self.device), total)
                # Processes' gradients are averaged, so each multiplies by their number.
                loss = (losses["policy/loss"] + args.value_coef * losses["value/loss"]) * share
                # One copy from the device for all numbers: each waits for everything before it.
                value, weight, *parts = torch.stack(
                    [loss.detach(), share, *map(Tensor.detach, losses.values())]
                ).tolist()
                if not math.isfinite(value):
                    raise TrainingError(
                        f"PPO loss is {value} after {self.gradient_updates} gradient updates; expected a finite "
                        "number: lower the learning rate or look at the rewards"
                    )
                self.accelerator.backward(loss * processes)
            for name, part in zip(losses, parts, strict=True):
                statistics[name] += part * weight
        norm = clip_gradients(self.model, args.max_grad_norm, self.accelerator)
        if not math.isfinite(norm):
            raise TrainingError(
                f"PPO's gradient is {norm} after {self.gradient_updates} gradient updates, with losses that are "
                "finite: lower the learning rate, or compute in float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.gradient_updates += 1
        if processes > 1:
            sums = torch.tensor(list(statistics.values()), dtype=torch.float64, device=self.device)
            statistics = dict(zip(statistics, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        return {**statistics, "gradient/norm": norm}

    def _autocast(self) -> Any:
        # Not accelerate's, which goes by the precision of the trainer that was made last in this process.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def save_model(self, folder: str | Path | None = None) -> None:
        """Save policy (adapter merged) and tokenizer to ``folder`` (default: ``args.output_dir``); of several processes
        the main one writes."""
        state = full_state(self.model, self.accelerator, "policy.")
        if self.accelerator.is_main_process:
            policy = self.accelerator.unwrap_model(self.model).policy
            save_model(policy, self.tokenizer, Path(folder or self.args.output_dir), state)
        self.accelerator.wait_for_everyone()

    def _micro_losses(self, experience: Experience, index: Tensor, total: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of a micro-batch, each a mean over its tokens, and its share of the minibatch's tokens."""
        rollout = experience.rollout.rows(index)
        width = rollout.response_mask.shape[1]
        of_tokens = (experience.old_logps, experience.old_values, experience.advantages, experience.returns)
        losses = self._losses(self.model, rollout, *(field[index, :width] for field in of_tokens))
        return losses, rollout.response_mask.sum() / total

    def by_rows(self, rollout: Rollout, function: Callable[[Rollout], Any]) -> Any:
        """``function`` of a rollout, shared out over the processes (``distributed.by_rows``)."""
        return by_rows(rollout, function, self.accelerator, self.args.inference_batch_size)

    @torch.no_grad()
    def logps(self, rollout: Rollout) -> Tensor:
        """Log-probabilities (B, T) of the response tokens under the policy under training."""

        def own(part: Rollout) -> Tensor:
            with self._autocast():
                return self._logps(self.policy, part, self.args.temperature)

        return self.by_rows(rollout, own)

    @torch.no_grad()
    def ref_logps(self, rollout: Rollout) -> Tensor:
        """Log-probabilities (B, T) of the response tokens under the reference policy."""

        def own(part: Rollout) -> Tensor:
            with self._autocast():
                if self.ref_model is not None:
                    return self._logps(self.ref_model, part, self.args.temperature)
                with self.policy.disable_adapter():
                    return self._logps(self.policy, part, self.args.temperature)

        return self.by_rows(rollout, own)

    def score(self, rollout: Rollout) -> Tensor:
        """Rewards of the responses, (B,) or (B, T), checked: finite, and of one of the two shapes."""
        return self.by_rows(rollout, self._score)

    def _score(self, rollout: Rollout) -> Tensor:
        with self._autocast():
            rewards = self.reward(rollout)
        if not isinstance(rewards, Tensor):
            raise TrainingError(f"reward: expected a tensor, found {type(rewards).__name__}; return torch.tensor(...)")
        rewards = rewards.to(self.device).float()
        if rewards.shape not in (rollout.truncated.shape, rollout.response_mask.shape):
            raise TrainingError(
                f"reward: expected shape {tuple(rollout.truncated.shape)} (one score a response) or "
                f"{tuple(rollout.response_mask.shape)} (one reward a token), found {tuple(rewards.shape)}"
            )
        if rewards.dim() == 2:
            rewards = torch.where(rollout.response_mask, rewards, torch.zeros_like(rewards))
        if not bool(torch.isfinite(rewards).all()):
            raise TrainingError("reward: expected finite numbers, found NaN or infinity; look at the reward model")
        return rewards

    @torch.no_grad()
    def _calibrate(self) -> float:
        """1 / standard deviation of the total reward over responses of the policy before training."""
        if self.args.reward_scale == "none":
            return 1.0
        size = self.args.rollout_batch_size
        chosen = [self.prompts[index] for index in range(min(self.args.calibration_prompts, len(self.prompts)))]
        scores = []
        for start in range(0, len(chosen), size):
            rollout = self.sample(chosen[start : start + size])
            scores.append(response_scores(self.score(rollout), rollout.response_mask))
        # In float64, where the mean of equal float32 numbers is that number.
        spread = float(torch.cat(scores).double().std(correction=0))
        if not spread > 1e-6:
            raise TrainingError(
                f"reward_scale: the reward is the same ({float(torch.cat(scores).mean()):.4g}) for all {len(chosen)} "
                "calibration responses; look at the reward model"
            )
        return 1.0 / spread

    def _groups(self, both: PolicyWithValue) -> list[dict[str, Any]]:
        args = self.args
        value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        policy = [parameter for parameter in both.policy.parameters() if parameter.requires_grad]
        groups = [{"params": policy, "lr": args.learning_rate}]
        if both.has_values:
            value = list((both.value_model or both.value_head).parameters())
            groups.append({"params": value, "lr": value_rate})
        return groups

    def _checkpoint_layers(self) -> None:
        """Put the layers that recompute into training mode, without which transformers keeps their activations; their
        parts stay in evaluation mode, without dropout, and dropout of the layers' own is set to 0."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer) and self.args.gradient_checkpointing:
                module.training = True
                # OPT's layers, for one, apply dropout by their own flag.
                for name in ("dropout", "activation_dropout", "attention_dropout"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)

    def _set_learning_rate(self, update: int) -> None:
        args = self.args
        factor = min(1.0, update / args.warmup_updates) if args.warmup_updates else 1.0
        if args.schedule == "linear" and update > args.warmup_updates:
            factor = (args.updates - update + 1) / (args.updates - args.warmup_updates)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def _next_prompts(self) -> list[Sequence[int]]:
        """The next round's prompts, each ``group_size`` times in a row; every process draws the same."""
        size = self.args.group_size
        drawn = [self.prompts[next(self._order)] for _ in range(self.args.rollout_batch_size // size)]
        return [prompt for prompt in drawn for _ in range(size)]

    def _prompt_order(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.args.seed)
        while True:
            yield from torch.randperm(len(self.prompts), generator=generator).tolist()

    def _call_back(self, update: int) -> None:
        for callback in self._callbacks:
            callback(self, update)

    def _start_engine(self) -> RolloutEngine:
        ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        if self._engine_name == "transformers":
            return TransformersEngine(
                lambda: self.policy,
                lambda: gathered(self.model, self.accelerator),
                self.device,
                batch_size=self.args.inference_batch_size,
                compiled=self.args.compile,
                bf16=self.args.bf16 and not hasattr(self.policy, "merge_adapter"),
                **ids,
            )
        policy = self.accelerator.unwrap_model(self.model).policy
        if hasattr(policy, "merge_adapter"):
            raise ConfigError("rollout_engine: expected 'transformers' with peft_config, found 'vllm'")
        return start_vllm(
            policy.name_or_path,
            lambda: full_parameters(policy, self.accelerator),
            self.device,
            max_length=self.args.vllm_max_length or max(map(len, self.prompts)) + self.args.response_length,
            memory=self.args.vllm_memory,
            **ids,
        )


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


CONFIG_FIELDS = tuple(field.name for field in fields(FineGrainedPPOConfig))
