"""What a profile needs before it is run: shapes checked on the meta device, memory a GPU, hours a stage.

No weights are loaded and nothing is downloaded: models are built from ``plan.architecture`` on torch's meta device,
where a forward pass gives shapes and costs nothing. Memory and hours are estimates by the formulas below, whose
assumptions are keys of the profile's section ``plan``; none of them has been compared with a run of LLaMA-7B.

Notation: P parameters of a trained model, n GPUs, R rows of a forward pass, L positions of a row, h hidden size, i
intermediate size, V vocabulary, l layers. Memory, in bytes a GPU, with weights sharded over n GPUs (FSDP):

- weights 4P/n, gradients 4P/n, Adam's two moments 8P/n, in float32; a frozen model 4P/n;
- gathered weights in bf16: two layers (one is fetched while one computes) and all that is in no layer;
- activations in bf16, for each layer R·L·(26h + 8i); with gradient checkpointing 2·R·L·h for each layer and the above
  for one;
- logits 16·R·K·V at K positions: in bf16, scaled by the temperature, in float32, and the gradients;
- loading: transformers' trainers start from the whole model in float32 on each GPU, 4P; PPO's models are loaded into
  the host's memory, by every process, and sharded from there;
- FIGA's filter, before its training: a whole reward model on each GPU, 4P in float32 and 2P for its copy in bf16, and
  the activations of one layer, R·L·(26h + 8i);
- rollouts of transformers: the policy gathered whole, 2P, and the key-value cache, 4·l·(key-value heads)·(head size)·L
  for each row;
- vLLM: the share ``vllm_memory`` of the GPU, which it holds while PPO scores and trains too. With ``rollout_engine``
  auto either may sample, and both count.

Time: training costs 6P operations a token, 8P with gradient checkpointing, a forward pass 2P; seconds are operations /
(n · ``tflops`` · ``utilisation``). FIGA's filter passes once over both sides of every edit. A decoding step takes
``step_overhead_ms``, and the time to read weights and cache once at ``bandwidth`` · ``decode_utilisation``; a batch
takes as many steps as a response may have tokens.

Answering the test prompts (``generate``) takes one GPU and one model at a time: 4P in float32 and 2P for its copy in
bf16, the cache of the longest prompts, then a forward pass of the policy, its reference and each reward model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from fgalign.config import Profile, Section
from fgalign.core.modeling import RuntimeConfig, parameter_count
from fgalign.errors import ConfigError
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig

GIB = 2**30

NOT_ESTIMATED = (
    "raw", "edits", "base", "labels", "reward_models", "score_edits", "benchmark", "judge", "rejudge", "curves",
    "tables and figures", "loading models from disk",
)  # fmt: skip
"""Stages of every profile that have no estimate, and what no estimate counts."""


class Architecture(Section):
    """What makes the model's shapes, under the names of its ``config.json``."""

    model_type: Literal["llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False


class DataSize(Section):
    """How much data the stages read, and mean lengths in tokens."""

    demonstrations: int
    preferences: int
    edits: int
    figa_pairs: int
    """Pairs that FIGA's filter keeps."""
    test_prompts: int
    """Prompts that every method answers with every seed."""
    judge_preferences: int = 0
    """Pairs that each judge of ``judge_models`` is trained on."""
    prompt_tokens: int
    response_tokens: int


class PlanSection(Section):
    """The hardware that a profile is meant for, and what the estimates assume."""

    architecture: Architecture
    data: DataSize
    gpus: int = Field(ge=1)
    memory_gib: float
    """Memory of one GPU."""
    tflops: float
    """Peak of one GPU in bf16, 10^12 operations a second."""
    bandwidth: float
    """Of one GPU's memory, GB a second."""
    utilisation: float
    """Share of the peak that training and scoring reach."""
    decode_utilisation: float
    """Share of the bandwidth that decoding reaches."""
    step_overhead_ms: float
    """Of a decoding step, beside reading weights and cache."""
    examples_per_step: dict[str, int] = Field(default_factory=dict)
    """By stage, examples of one optimiser step over all GPUs, where a paper states them."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, one decoder layer, and those in no layer."""

    total: int
    layer: int
    layers: int

    @property
    def rest(self) -> int:
        """Parameters in no decoder layer: embeddings, final norm, output layer or head."""
        return self.total - self.layers * self.layer


@dataclass(frozen=True)
class Estimate:
    """One stage: bytes a GPU by what they are for, ``kept`` throughout and in each of ``phases`` that do not overlap;
    the same of phases ``before`` anything is kept; bytes of a host's memory for each process, hours for one seed,
    examples of an optimiser step (None: nothing is trained); ``once``: trained once and not for each seed."""

    stage: str
    kept: dict[str, float]
    phases: dict[str, dict[str, float]]
    before: dict[str, dict[str, float]]
    host: float
    hours: float
    examples: int | None
    once: bool = False

    @property
    def worst(self) -> dict[str, float]:
        """Bytes a GPU at the worst moment, by what they are for."""
        moments = [
            {**kept, **{f"{phase}: {key}": value for key, value in parts.items()}}
            for kept, phases in ((self.kept, self.phases), ({}, self.before))
            for phase, parts in phases.items()
        ]
        return max(moments, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes a GPU at the worst moment."""
        return sum(self.worst.values())


def build_on_meta(architecture: Architecture, kind: str, **config: Any) -> Any:
    """A model without weights, in bf16: ``kind`` is CausalLM, SequenceClassification or TokenClassification.

    Raises:
        ConfigError: heads do not divide the hidden size, or key-value heads the heads.
    """
    import torch
    import transformers

    a = architecture
    if a.hidden_size % a.num_attention_heads or a.num_attention_heads % a.num_key_value_heads:
        raise ConfigError(
            f"plan.architecture: expected num_attention_heads to divide hidden_size {a.hidden_size} and "
            f"num_key_value_heads to divide it, found {a.num_attention_heads} and {a.num_key_value_heads}"
        )
    settings = {key: value for key, value in a.model_dump().items() if key != "model_type"}
    with torch.device("meta"):
        built = getattr(transformers, f"AutoModelFor{kind}").from_config(
            transformers.AutoConfig.for_model(a.model_type, **settings, pad_token_id=0, **config),
            # The others look at a mask's values, which there are none of.
            attn_implementation="eager",
        )
    return built.to(torch.bfloat16)


def sizes(model: Any) -> Sizes:
    """Parameters of a transformers model."""
    layers = model.base_model.layers
    return Sizes(parameter_count(model), parameter_count(layers[0]), len(layers))


def layer_bytes(a: Architecture, rows: int, length: int) -> float:
    """Bytes of one layer's activations."""
    return rows * length * (26 * a.hidden_size + 8 * a.intermediate_size)


def activation_bytes(a: Architecture, rows: int, length: int, checkpointing: bool) -> float:
    """Bytes of activations kept for the backward pass."""
    layer = layer_bytes(a, rows, length)
    if not checkpointing:
        return a.num_hidden_layers * layer
    return a.num_hidden_layers * 2 * rows * length * a.hidden_size + layer


def logits_bytes(a: Architecture, rows: int, positions: int) -> float:
    """Bytes of logits, their copies and gradients."""
    return 16.0 * rows * positions * a.vocab_size


def cache_bytes(a: Architecture, rows: int, length: int) -> float:
    """Bytes of the key-value cache in bf16."""
    head = a.hidden_size // a.num_attention_heads
    return 4.0 * a.num_hidden_layers * a.num_key_value_heads * head * rows * length


def gathered_bytes(model: Sizes) -> float:
    """Bytes of a sharded model's weights that are whole at one time while it runs."""
    return 2.0 * (2 * model.layer + model.rest)


def training_seconds(plan: PlanSection, operations: float) -> float:
    """Seconds of that many operations on all GPUs."""
    return operations / (plan.gpus * plan.tflops * 1e12 * plan.utilisation)


def decode_seconds(plan: PlanSection, parameters: int, rows: int, steps: int) -> float:
    """Seconds of decoding one batch on one GPU; the cache counts at its mean length."""
    read = 2.0 * parameters + cache_bytes(plan.architecture, rows, plan.data.prompt_tokens + steps // 2)
    return steps * (plan.step_overhead_ms / 1e3 + read / (plan.bandwidth * 1e9 * plan.decode_utilisation))


def state_bytes(model: Sizes, gpus: int) -> dict[str, float]:
    """Weights, gradients and optimiser state of a trained model."""
    return {
        "weights": 4.0 * model.total / gpus,
        "gradients": 4.0 * model.total / gpus,
        "optimiser": 8.0 * model.total / gpus,
    }


def estimate_trainer(
    plan: PlanSection,
    stage: str,
    model: Sizes,
    optim: Any,
    *,
    examples: int,
    rows_of_example: int,
    max_length: int,
    logit_positions: int,
    extra_passes: int = 0,
) -> Estimate:
    """A stage of transformers' Trainer: SFT, a reward model, FIGA. ``extra_passes``: forward passes beside training."""
    rows = optim.batch_size * rows_of_example
    tokens = examples * optim.epochs * rows_of_example * (plan.data.prompt_tokens + plan.data.response_tokens)
    passes = (8 if optim.gradient_checkpointing else 6) + 2 * extra_passes
    return Estimate(
        stage,
        state_bytes(model, plan.gpus),
        {
            "training": {
                "gathered": gathered_bytes(model),
                "activations": activation_bytes(plan.architecture, rows, max_length, optim.gradient_checkpointing),
                "logits": logits_bytes(plan.architecture, rows, logit_positions),
            }
        },
        {"loading": {"weights": 4.0 * model.total}},
        4.0 * model.total,
        training_seconds(plan, passes * model.total * tokens) / 3600,
        optim.batch_size * optim.accumulation * plan.gpus,
    )


def with_filter(plan: PlanSection, figa: Estimate, reward: Sizes, config: Any) -> Estimate:
    """FIGA's estimate with that of the rewards of all pairs, which it takes before it trains: each process holds a
    whole reward model and scores its share."""
    data = plan.data
    rows = min(config.score_batch_size, -(-data.edits // plan.gpus))
    tokens = 2 * data.edits * (data.prompt_tokens + data.response_tokens)
    scoring = {
        "weights": 4.0 * reward.total,
        "in bf16": 2.0 * reward.total,
        "activations": layer_bytes(plan.architecture, rows, config.max_length),
    }
    return replace(
        figa,
        before={**figa.before, "filter": scoring},
        host=max(figa.host, 4.0 * reward.total),
        hours=figa.hours + training_seconds(plan, 2 * reward.total * tokens) / 3600,
    )


def estimate_ppo(
    plan: PlanSection, stage: str, policy: Sizes, value: Sizes | None, reward: Sizes, config: Any, args: Any
) -> Estimate:
    """A PPO method, its hours with rollouts from transformers; ``value`` None is a head on the policy."""
    a, data, n = plan.architecture, plan.data, plan.gpus
    trained = Sizes(policy.total + (value.total if value else 0), policy.layer, policy.layers)
    share = -(-args.rollout_batch_size // n)
    rows = min(share, args.inference_batch_size or share)
    microbatch = args.microbatch_size or args.minibatch_size // n
    update_length = config.max_length
    checkpointing = args.gradient_checkpointing
    kept = {**state_bytes(trained, n), "frozen": 4.0 * (policy.total + reward.total) / n}
    activations = activation_bytes(a, microbatch, update_length, checkpointing) * (2 if value else 1)
    phases = {
        "rollout": {"policy": 2.0 * policy.total, "cache": cache_bytes(a, rows, config.max_length)},
        "scoring": {"gathered": gathered_bytes(policy), "logits": logits_bytes(a, rows, args.response_length + 1)},
        "update": {
            "gathered": gathered_bytes(policy) + (gathered_bytes(value) if value else 0.0),
            "activations": activations,
            "logits": logits_bytes(a, microbatch, args.response_length + 1),
        },
    }
    if may_use_vllm(config, args):
        for phase in ("scoring", "update"):
            phases[phase]["vLLM"] = args.vllm_memory * plan.memory_gib * GIB
    if args.rollout_engine == "vllm":
        del phases["rollout"]  # vLLM alone, and less than while it is beside the others
    sequence = data.prompt_tokens + data.response_tokens
    forward = 2 * (2 * policy.total + reward.total + (value.total if value else 0))
    step = (8 if checkpointing else 6) * trained.total * args.epochs
    one_update = training_seconds(plan, args.rollout_batch_size * sequence * (forward + step))

    def rollout(responses: int) -> float:
        own = -(-responses // n)
        batches = -(-own // min(own, rows))
        return batches * decode_seconds(plan, policy.total, min(own, rows), args.response_length)

    points = args.updates // config.curve.every + 1
    seconds = args.updates * (one_update + rollout(args.rollout_batch_size))
    seconds += points * (
        rollout(config.curve.prompts) + training_seconds(plan, config.curve.prompts * sequence * forward)
    )
    if args.reward_scale == "reference_std":
        seconds += rollout(args.calibration_prompts)
    host = 4.0 * (2 * policy.total + reward.total + (value.total if value else 0))
    return Estimate(stage, kept, phases, {}, host, seconds / 3600, args.minibatch_size)


def may_use_vllm(config: Any, args: Any) -> bool:
    """Whether a PPO method samples with vLLM, or does where it is installed (``rollout_engine.choose_engine``)."""
    return args.rollout_engine == "vllm" or (args.rollout_engine == "auto" and config.lora is None)


def estimate_generate(
    plan: PlanSection, policy: Sizes, rewards: Mapping[str, Sizes], config: EvaluationConfig, answers: int, longest: int
) -> Estimate:
    """All methods' responses to the test prompts, and their KL and scores, on one GPU; ``answers`` a prompt, over the
    methods; ``longest`` tokens a prompt at most."""
    a, data = plan.architecture, plan.data
    one_gpu = plan.model_copy(update={"gpus": 1})
    prompts = min(data.test_prompts, config.prompts or data.test_prompts)
    rows = min(config.batch_size, prompts)
    batches = answers * -(-prompts // rows)
    forward = 2 * (2 * policy.total + sum(rewards[name].total for name in REWARD_MODELS))
    tokens = answers * prompts * (data.prompt_tokens + data.response_tokens)
    seconds = batches * decode_seconds(plan, policy.total, rows, config.response_length)
    return Estimate(
        "generate",
        {"weights": 4.0 * policy.total, "in bf16": 2.0 * policy.total},
        {
            "rollout": {"cache": cache_bytes(a, rows, longest + config.response_length)},
            "scoring": {"logits": logits_bytes(a, rows, config.response_length + 1)},
        },
        {"loading": {"weights": 4.0 * policy.total}},
        4.0 * policy.total,
        (seconds + training_seconds(one_gpu, forward * tokens)) / 3600,
        None,
    )


def check_shapes(a: Architecture) -> Iterator[str]:
    """Build every kind of model on the meta device, run it, and say where a shape is not what its stage expects."""
    import torch

    from fgalign.ppo_trainer import PolicyWithValue

    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    mask = torch.ones(2, 8, dtype=torch.long, device="meta")
    causal = build_on_meta(a, "CausalLM")
    value = build_on_meta(a, "TokenClassification", num_labels=1)
    expected = {
        "causal LM": (causal(input_ids=ids).logits, (2, 8, a.vocab_size)),
        "sequence reward model": (
            build_on_meta(a, "SequenceClassification", num_labels=1)(input_ids=ids).logits,
            (2, 1),
        ),
        "token reward model": (
            build_on_meta(a, "TokenClassification", num_labels=3)(input_ids=ids).logits,
            (2, 8, 3),
        ),
    }
    for name, model in {"head": None, "separate": value}.items():
        logits, values = PolicyWithValue(causal, model).to("meta", torch.bfloat16)(ids, mask, 4)
        expected[f"policy with value ({name}), logits"] = (logits, (2, 4, a.vocab_size))
        expected[f"policy with value ({name}), values"] = (values, (2, 4))
    for name, (found, shape) in expected.items():
        if tuple(found.shape) != shape:
            yield f"{name}: expected shape {shape}, found {tuple(found.shape)}"


def estimates(profile: Profile, plan: PlanSection) -> list[Estimate]:
    """Every stage of the profile that has an estimate: SFT, reward models, FIGA, PPO, answers to the test prompts,
    judges."""
    from fgalign.losses.token_reward import OUTPUTS
    from fgalign.ppo_trainer import FineGrainedPPOConfig, check_config
    from fgalign.rewards import LEVELS
    from fgalign.rewards.training import TokenRewardSection
    from fgalign.sft import SFTSection
    from fgalign.stages.judge_model import judge_model_config
    from fgalign.stages.train import method_config, reward_config

    a, data = plan.architecture, plan.data
    causal = sizes(build_on_meta(a, "CausalLM"))
    sft = profile.section("sft", SFTSection)
    found = [
        estimate_trainer(
            plan, "sft", causal, sft.optim, examples=data.demonstrations, rows_of_example=1,
            max_length=sft.max_length, logit_positions=sft.max_length,
        )
    ]  # fmt: skip
    rewards: dict[str, Sizes] = {}
    for name in (*LEVELS, *(profile.params.get("token_models") or {})):
        config = reward_config(profile, name)
        if isinstance(config, TokenRewardSection):
            model = build_on_meta(a, "TokenClassification", num_labels=OUTPUTS[config.loss])
        else:
            model = build_on_meta(a, "SequenceClassification", num_labels=1)
        rewards[name] = sizes(model)
        found.append(
            estimate_trainer(
                plan, name, rewards[name], config.optim, rows_of_example=2, max_length=config.max_length,
                examples=data.preferences if name == "rm_preference" else data.edits, logit_positions=0,
            )
        )  # fmt: skip
    answers = 2  # the initial and the SFT model's
    for name in profile.params.get("methods", {}):
        _, config = method_config(profile, name)
        answers += getattr(config, "n", 1) if config.kind == "best_of_n" else 1
        if config.kind == "figa":
            counts = config.optim.accumulation > 1 or plan.gpus > 1
            estimate = estimate_trainer(
                plan, name, causal, config.optim, examples=data.figa_pairs, rows_of_example=2,
                max_length=config.max_length, logit_positions=config.max_length, extra_passes=int(counts),
            )  # fmt: skip
            if config.filter is not None or config.signal == "reward_difference":
                estimate = with_filter(plan, estimate, rewards[config.needs], config)
            found.append(estimate)
        elif config.kind == "ppo":
            args = FineGrainedPPOConfig(output_dir="", **config.trainer)
            check_config(args)
            value = None
            if args.value_model == "separate":
                value = sizes(build_on_meta(a, "TokenClassification", num_labels=1))
            found.append(estimate_ppo(plan, name, causal, value, rewards[config.needs], config, args))
    evaluation = profile.section("evaluation", EvaluationConfig)
    found.append(estimate_generate(plan, causal, rewards, evaluation, answers, sft.max_length))
    for name in profile.params.get("judge_models") or {}:
        config = judge_model_config(profile, name)
        estimate = estimate_trainer(
            plan, f"judge_model@{name}", sizes(build_on_meta(a, "SequenceClassification", num_labels=1)), config.optim,
            rows_of_example=2, max_length=config.max_length, examples=data.judge_preferences, logit_positions=0,
        )  # fmt: skip
        found.append(replace(estimate, once=True))
    return found


def problems(profile: Profile, plan: PlanSection, found: list[Estimate]) -> Iterator[str]:
    """What would stop the profile on this hardware, a sentence each."""
    from fgalign.stages.train import method_config

    sections: dict[str, Mapping[str, Any]] = {
        name: profile.params[name] for name in ("sft", "rm_preference", "rm_edit", "rm_token")
    }
    for name, section in (profile.params.get("judge_models") or {}).items():
        sections[f"judge_model@{name}"] = section
    longest = plan.architecture.max_position_embeddings
    for name in profile.params.get("methods", {}):
        _, config = method_config(profile, name)
        sections[name] = config.model_dump()
        if config.kind != "ppo":
            continue
        names = ("microbatch_size", "response_length", "rollout_batch_size", "minibatch_size")
        trainer = {key: config.setting(key) for key in names}
        if trainer["response_length"] >= config.max_length:
            yield (
                f"{name}: max_length {config.max_length} leaves no room for a prompt before response_length "
                f"{trainer['response_length']}"
            )
        for key in ("rollout_batch_size", "minibatch_size"):
            if trainer[key] % plan.gpus:
                yield f"{name}: {key}: expected a multiple of {plan.gpus} GPUs, found {trainer[key]}"
        own = trainer["minibatch_size"] // plan.gpus
        if trainer["microbatch_size"] and own % trainer["microbatch_size"]:
            yield (
                f"{name}: microbatch_size: expected a divisor of the {own} responses that a GPU has of a minibatch, "
                f"found {trainer['microbatch_size']}"
            )
    for name, section in sections.items():
        length = section.get("max_length")
        if length is not None and length > longest:
            yield f"{name}: max_length {length} is more than the model's {longest} positions"
    by_stage = {estimate.stage: estimate for estimate in found}
    for name, examples in plan.examples_per_step.items():
        if name not in by_stage:
            yield f"plan.examples_per_step: expected stages of the profile, found {name!r}"
        elif by_stage[name].examples != examples:
            yield (
                f"{name}: expected {examples} examples a step, found {by_stage[name].examples} on {plan.gpus} GPUs: "
                "change batch_size or accumulation"
            )
    for estimate in found:
        count = 1 if estimate.once else side_by_side(profile, plan)
        if count * estimate.peak > plan.memory_gib * GIB:
            times, fewer = (f"{count} times ", "fewer `runtime.workers`, ") if count > 1 else ("", "")
            yield (
                f"{estimate.stage}: needs {times}{estimate.peak / GIB:.1f} GiB a GPU, more than {plan.memory_gib:g}: "
                f"use {fewer}more GPUs or smaller batches"
            )


def side_by_side(profile: Profile, plan: PlanSection) -> int:
    """Seeds that share a GPU: ``runtime.workers`` of them where there is one GPU. Several are all given to each seed in
    turn."""
    workers = profile.section("runtime", RuntimeConfig).workers or 1
    return min(workers, len(profile.seeds)) if plan.gpus == 1 else 1


def report(profile: Profile, gpus: int | None = None) -> tuple[str, list[str]]:
    """The plan as text, and what does not fit, a sentence each; ``gpus`` takes the place of the profile's.

    Raises:
        ConfigError: the profile has no section ``plan``, or a section in it is bad.
    """
    from fgalign.stages.train import method_config

    plan = profile.section("plan", PlanSection)
    if gpus is not None:
        plan = plan.model_copy(update={"gpus": gpus})
    found = estimates(profile, plan)
    wrong = [*check_shapes(plan.architecture), *problems(profile, plan, found)]
    model = sizes(build_on_meta(plan.architecture, "CausalLM"))
    seeds = len(profile.seeds)
    width = max(16, *(len(estimate.stage) + 1 for estimate in found))

    def runs(estimate: Estimate) -> int:
        return 1 if estimate.once else seeds

    lines = [
        f"Profile {profile.name}: {model.total / 1e9:.2f} billion parameters, {plan.gpus} GPUs of "
        f"{plan.memory_gib:g} GiB and {plan.tflops:g} TFLOPS (bf16); shapes checked on the meta device",
        "",
        f"{'stage':<{width}}{'a step':>7}  {'GiB a GPU':>9}  {'hours a seed':>12}  {f'hours, {seeds} seeds':>14}   "
        "GiB of",
    ]
    for estimate in found:
        shown = ", ".join(f"{key} {value / GIB:.1f}" for key, value in estimate.worst.items() if value)
        step = estimate.examples or "-"
        lines.append(
            f"{estimate.stage:<{width}}{step:>7}  {estimate.peak / GIB:>9.1f}  {estimate.hours:>12.2f}  "
            f"{runs(estimate) * estimate.hours:>14.1f}   {shown}"
        )
    total = sum(estimate.hours for estimate in found if not estimate.once)
    in_all = sum(runs(estimate) * estimate.hours for estimate in found)
    saved = sum(runs(estimate) for estimate in found if estimate.examples is not None)
    lines += [
        f"{'all':<{width}}{'':>7}  {'':>9}  {total:>12.2f}  {in_all:>14.1f}",
        "",
        f"Assumed: {plan.utilisation:.0%} of the peak in training, {plan.decode_utilisation:.0%} of {plan.bandwidth:g} "
        f"GB/s in decoding and {plan.step_overhead_ms:g} ms a step; prompts of {plan.data.prompt_tokens} and responses "
        f"of {plan.data.response_tokens} tokens on average; hours of rollouts from transformers; formulas in plan.py.",
        f"Host memory while loading: {max(estimate.host for estimate in found) / GIB:.0f} GiB a process.",
        f"Disk: {4 * model.total / GIB:.0f} GiB a saved model, one a stage and seed (a judge has one): "
        f"{4 * model.total / GIB * (saved + 1):.0f} GiB in all, and as much again in DVC's cache where the file system "
        "cannot share files (reflinks).",
    ]
    vllm = {estimate.stage: estimate.phases["update"].get("vLLM") for estimate in found if "update" in estimate.phases}
    if held := [f"{stage} {share / GIB:.1f}" for stage, share in vllm.items() if share]:
        lines.append(
            "vLLM, where PPO may sample with it, holds its `vllm_memory` beside scoring and update, in GiB: "
            f"{', '.join(held)}."
        )
    if (count := side_by_side(profile, plan)) > 1:
        lines.append(
            f"{count} seeds share the GPU (`runtime.workers`): its memory has to hold each row {count} times, but for "
            "what is trained once; hours are those of one seed after another."
        )
    estimated = {estimate.stage for estimate in found}
    others = [
        name
        for name in profile.params.get("methods", {})
        if name not in estimated and method_config(profile, name)[1].kind != "best_of_n"
    ]
    lines.append(f"Not estimated: {', '.join([*others, *NOT_ESTIMATED])}.")
    return "\n".join(lines), wrong
