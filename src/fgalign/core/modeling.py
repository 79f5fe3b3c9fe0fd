"""Loading, seeding and saving models: every model of the pipeline goes through transformers, as safetensors."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import platform
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgalign.config import Section
from fgalign.errors import ConfigError, InputError
from fgalign.parallel import can_fork, cores, process_count

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT = 256 * 2**20
_FLOAT32_ATTENTION = "sdpa_float32"
_HEADS = ("score", "classifier")
"""What transformers calls the new layer of a sequence or token classification model."""


class RuntimeConfig(Section):
    """Where and how models run.

    ``device`` auto takes the GPU when there is one. ``dtype`` auto is bf16 on a GPU and fp32 on the CPU;
    matrix_units is bf16 on a CPU too, if it multiplies bf16 in matrix units (Intel's AMX). ``threads`` is the number of
    CPU threads (None: torch's choice); fixing it keeps sums in the same order on every machine.
    ``workers`` is how many seeds run side by side (None: as many as there are cores for, and one on a GPU); results do
    not depend on it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "matrix_units", "fp32", "bf16"] = "auto"
    threads: int | None = None
    workers: int | None = None


def set_up(config: RuntimeConfig) -> torch.device:
    """Choose the device, fix the threads and make torch deterministic; returns the device.

    In one of several launched processes it joins the others (accelerate's ``PartialState``), and a GPU is the process's
    own.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Looking for a GPU must not start CUDA here: with ``workers`` above 1, forked processes do.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if process_count() == 1 and config.device != "cpu":
        # One process has one GPU, the first of those it is given. transformers would spread a batch over all that it
        # sees, which TRL refuses.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda asked for, but torch finds no GPU; use `device: auto` or `device: cpu`")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    torch.use_deterministic_algorithms(True, warn_only=use_cuda)
    # Deterministic mode also fills every new tensor, which costs a third of a training step; nothing here reads
    # memory it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if use_cuda:
        leave_out_cudnn_attention()
    keep_freed_memory()
    if process_count() > 1:
        from accelerate import PartialState

        # While the main process loads or saves a large model, the others wait for longer than NCCL's 10 minutes.
        PartialState(cpu=not use_cuda, timeout=timedelta(hours=2))
        # Trainers of transformers take this for their precision, whatever their arguments say.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if use_bf16(config, device) else "no"
    return device


def leave_out_cudnn_attention() -> None:
    """Have attention with a mask computed by another kernel than cuDNN's, which torch from 2.11 on prefers on H100 and
    H200: its backward pass can give NaN (https://github.com/pytorch/pytorch/issues/196678), and it makes a plan for
    every new length, which a growing cache has at each token."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks of up to 256 MiB for the next tensors instead of giving them back to the
    system and clearing their pages anew each time, which was 4 to 10% of a small model's training; whether it does.
    Only of glibc, whose ``mallopt`` this is (https://man7.org/linux/man-pages/man3/mallopt.3.html)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # In this order: trimming less without mapping less would map every large block anew. Room at the top lets a block
    # that is a little too large for the freed one grow into it.
    wanted = ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, 4 * _KEPT), (_M_TOP_PAD, _KEPT // 2))
    return all(mallopt(name, value) for name, value in wanted)


def use_bf16(config: RuntimeConfig, device: torch.device) -> bool:
    """Whether models compute in bf16 (weights under training stay in fp32)."""
    # An older torch cannot say what the processor can do.
    units = config.dtype == "matrix_units" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return config.dtype == "bf16" or (config.dtype != "fp32" and (device.type == "cuda" or units))


def seed_workers(config: RuntimeConfig, device: torch.device) -> int:
    """How many seeds to run side by side (see ``parallel.each_seed``)."""
    if config.workers is not None:
        return config.workers
    return max(1, cores() // torch.get_num_threads()) if device.type == "cpu" and can_fork() else 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (transformers' ``set_seed``)."""
    from transformers import set_seed

    set_seed(seed)


def load_tokenizer(path: Path | str) -> Any:
    """Load a tokenizer from a folder.

    Raises:
        InputError: no such folder, or its tokenizer has no end-of-sequence or padding token, or they are the same token
            (then the true end of a response cannot be told from padding).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_existing(path))
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise InputError(f"{path}: the tokenizer has no {name}; set one before saving it")
    if tokenizer.eos_token_id == tokenizer.pad_token_id:
        raise InputError(
            f"{path}: the tokenizer pads with its end-of-sequence token ({tokenizer.eos_token!r}); "
            "set another pad token before saving it"
        )
    return tokenizer


def load_causal_lm(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Load a causal language model in float32."""
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, path).to(device)


def load_sequence_reward_model(path: Path | str, device: torch.device | str = "cpu", **kwargs: Any) -> Any:
    """Load (or, from a causal LM's folder, start) a model with one score a sequence, which is float32 under autocast
    too (``Float32Linear``)."""
    from transformers import AutoModelForSequenceClassification

    return float32_head(_loaded(AutoModelForSequenceClassification, path, **kwargs)).to(device)


def load_token_reward_model(path: Path | str, device: torch.device | str = "cpu", **kwargs: Any) -> Any:
    """Load (or, from a causal LM's folder, start) a model with logits of (bad, neutral, good) at each token, which are
    float32 under autocast too (``Float32Linear``)."""
    from transformers import AutoModelForTokenClassification

    return float32_head(_loaded(AutoModelForTokenClassification, path, **kwargs)).to(device)


def _loaded(auto: Any, path: Path | str, **kwargs: Any) -> Any:
    """A model of one of transformers' Auto classes in float32; where transformers has no reward model (sequence or
    token classification) of a causal LM's family, one made of its parts (``classifier_class``).

    Raises:
        InputError: the folder lacks weights other than those of a new head, which would be drawn at random.
    """
    from transformers import AutoConfig

    load_whole()
    config = type(AutoConfig.from_pretrained(_existing(path)))
    chosen = auto if config in auto._model_mapping else classifier_class(config, auto.__name__)
    model, found = chosen.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **kwargs)
    missing = [name for name in found["missing_keys"] if name.split(".")[0] not in _HEADS]
    if missing:
        raise InputError(
            f"{path}: expected the weights of a {type(model).__name__}, found none for {min(missing)} and "
            f"{len(missing) - 1} others; make the model again"
        )
    if getattr(model.config, "output_router_logits", False):
        # TRL's SFT leaves it on; its loss over the experts does not fit the masks of sampling.
        model.config.output_router_logits = False
    return model


@cache
def classifier_class(config: type, kind: str) -> type:
    """A class for sequence or token classification of a causal LM's family, from transformers' generic head and the
    family's own backbone: about half of the families have none.

    Args:
        config: the family's configuration class.
        kind: name of the Auto class that lacks it.

    Raises:
        ConfigError: no such family, or none of its backbones.
    """
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, modeling_layers

    task = kind.removeprefix("AutoModelFor")
    head = getattr(modeling_layers, f"GenericFor{task}", None)
    families = (AutoModelForCausalLM._model_mapping, AutoModel._model_mapping)
    if head is None or any(config not in family for family in families):
        raise ConfigError(f"model: expected a causal LM of transformers, found {config.__name__}, which has no {kind}")
    causal = families[0][config]
    # The family's base class, which knows how its weights are named and drawn; the causal LM itself adds generation.
    base = next(
        each
        for each in causal.__mro__[1:]
        if issubclass(each, PreTrainedModel) and each.__name__.endswith("PreTrainedModel")
    )

    def start(self: Any, settings: Any) -> None:
        head.__init__(self, settings)
        text = settings.get_text_config()
        size = getattr(text, "word_embed_proj_dim", text.hidden_size)  # OPT's backbone ends in a projection
        self.score = nn.Linear(size, settings.num_labels, bias=self.score.bias is not None)

    name = causal.__name__
    for suffix in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        name = name.removesuffix(suffix)
    name = f"{name}For{task}"
    own = {"__init__": start, "config_class": config, "base_model_prefix": causal.base_model_prefix}
    return type(name, (head, base), own)


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves alone: its outputs keep the precision of its weights (bf16 under FSDP in
    bf16). In bf16 rewards and values have steps of 1/256 of their size, more than they change from token to token."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of the weights."""
        # The meta device, on which shapes are checked, knows no autocast.
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def float32_head(model: Any) -> Any:
    """``model`` with its head, which transformers calls ``score`` or ``classifier``, made a ``Float32Linear``."""
    for name in _HEADS:
        head = getattr(model, name, None)
        if type(head) is nn.Linear:
            head.__class__ = Float32Linear
    return model


def check_positions(folder: Path, length: int | None, where: str) -> None:
    """Raise ConfigError where a model learned a place for each position and has fewer than ``length``: beyond them it
    would read outside its table. Rotary positions and ALiBi have no such end. ``where`` says what ``length`` is of."""
    from transformers import AutoConfig

    if length is None:
        return
    config = AutoConfig.from_pretrained(_existing(folder))
    limit = learned_positions(config)
    if limit is not None and length > limit:
        raise ConfigError(
            f"{where}: expected at most {limit}, the positions that {type(config).__name__} of {folder} "
            f"has learned, found {length}"
        )


def learned_positions(config: Any) -> int | None:
    """How many positions a model with this configuration has learned; None where they have no end."""
    config = config.get_text_config()
    endless = any(hasattr(config, name) for name in ("rope_parameters", "rope_theta", "rotary_pct", "alibi"))
    endless = endless or config.model_type in ("bloom", "mpt")
    return None if endless else getattr(config, "max_position_embeddings", None)


def load_whole() -> None:
    """Have transformers load and make whole models. Once a trainer has used ZeRO-3 it would share out the weights of
    every later one at once, whatever accelerate's ``zero3_init_flag`` says, and only a model that DeepSpeed has
    prepared can run so."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def attend_in_float32(model: Any) -> None:
    """Let the attention of a model of transformers compute in float32 where autocast would have it in bf16: on the CPU
    the backward pass of torch's attention in bf16 takes 3 to 15 times as long. Nothing changes of None, of a model that
    does not attend through torch's ``scaled_dot_product_attention``, and of what is saved."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(_FLOAT32_ATTENTION, _float32_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_FLOAT32_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_FLOAT32_ATTENTION)


def attends_in_float32(config: Any) -> bool:
    """Whether a model with this configuration went through ``attend_in_float32``."""
    return getattr(config, "_attn_implementation", None) == _FLOAT32_ATTENTION


def _float32_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """transformers' attention over (B, heads, S, size) in float32, its output in the type of ``query``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with torch.autocast(query.device.type, enabled=False):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output, weights = attend(module, query.float(), key.float(), value.float(), *args, **options)
    return output.to(query.dtype), weights


def freeze_in_bf16(model: Any) -> None:
    """Hold in bf16 what an adapter leaves untrained, in place; nothing changes of a model without an adapter of peft's.

    For training under bf16 autocast, which would turn every such weight into bf16 again in each pass, so at each token
    of a sampled response too (torch keeps its copies only of weights that are trained), and whose activations float32
    norms would turn back. Weights that the family wants in float32 whatever the rest has
    (``_keep_in_fp32_modules_strict``) stay so."""
    if not hasattr(model, "get_base_model"):
        return
    kept = getattr(model.get_base_model(), "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32 and not any(each in name for each in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "_cast_input_dtype"):
            module.__class__ = _left_to_autocast(type(module))


@cache
def _left_to_autocast(kind: type) -> type:
    """The class ``kind`` of an adapter's layers without peft's own cast of their input where autocast is on, which
    would undo it: bf16 to float32 and back in each layer."""
    if getattr(kind, "_leaves_to_autocast", False):
        return kind

    def _cast_input_dtype(self: Any, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        on = x is not None and torch.is_autocast_enabled(x.device.type)
        return x if on else kind._cast_input_dtype(self, x, dtype)

    return type(kind.__name__, (kind,), {"_cast_input_dtype": _cast_input_dtype, "_leaves_to_autocast": True})


def project_at_once(model: Any) -> None:
    """Have a causal LM's output layer project all rows of a batch in one matrix product, also where its weights are not
    trained. There torch gives each row a product of its own if ``logits_to_keep`` left a part of the hidden states, and
    in bf16 on the CPU each a copy of the weights: 0.9 GB for 16 responses of SmolLM2."""
    layer = None if model is None else model.get_output_embeddings()
    if layer is not None and _contiguous not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def check_float32(model: nn.Module) -> None:
    """Raise ConfigError where a parameter that is trained is not float32: smaller types round small steps away, and
    ``bf16`` computes in bf16 with float32 weights all the same."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"model: expected float32 for every parameter that is trained, found {parameter.dtype} for {name}; "
                "load the model with dtype=torch.float32 (`bf16` computes in bf16 all the same)"
            )


def check_kept(model: Any, output: Tensor, kept: int) -> None:
    """Raise ConfigError unless a model gave (B, ``kept``, ...) when asked for so many positions: some swallow
    ``logits_to_keep``, and their positions would be other ones."""
    if output.shape[1] != kept:
        raise ConfigError(
            f"model: expected logits of {kept} positions from {type(model).__name__}, found {output.shape[1]}: it does "
            "not know `logits_to_keep`; use a causal LM that does"
        )


def release_memory(device: torch.device) -> None:
    """Give back a GPU's memory of what is no longer used: trainers hold themselves in a circle, which Python clears
    only now and then, and autocast keeps its copies of weights until its context ends."""
    if device.type == "cuda":
        torch.clear_autocast_cache()
        gc.collect()
        torch.cuda.empty_cache()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: Any, tokenizer: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Save model (a LoRA adapter merged into a copy of it) and tokenizer as safetensors and JSON; the model can go on
    training.

    ``state``: the model's full weights, where the model itself holds a part of them (``full_state``).
    """
    if state is None and hasattr(model, "merge_and_unload"):
        # Merging takes the adapter out of the model, and taking it back out of the weights would leave rounding there.
        # In float32, because in bf16 (``freeze_in_bf16``) the weights would swallow small changes.
        model = copy.deepcopy(model).float().merge_and_unload()
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    tokenizer.save_pretrained(folder)


def is_sharded(accelerator: Any) -> bool:
    """Whether a process holds only a part of the weights (FSDP, ZeRO-3)."""
    kind = str(accelerator.distributed_type)
    return "FSDP" in kind or ("DEEPSPEED" in kind and accelerator.state.deepspeed_plugin.zero_stage == 3)


def reduce_in_float32(accelerator: Any) -> None:
    """Under FSDP and ZeRO-3 in bf16, reduce gradients in float32 and add up those of several passes in it, and leave
    outputs as they are: without this they do it in bf16. To be called before anything is prepared."""
    if accelerator.mixed_precision != "bf16":
        return
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    elif is_sharded(accelerator):
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }


def full_state(model: Any, accelerator: Any, prefix: str = "") -> dict[str, Any] | None:
    """All weights of a prepared model whose names begin with ``prefix``, without it; complete on the main process.
    None where the model itself holds them. Every process has to call it."""
    if not is_sharded(accelerator):
        return None
    state = accelerator.get_state_dict(model) or {}
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
        raise InputError(f"{path}: no model there; run the stage that writes it (`dvc dag` shows which)")
    return path
