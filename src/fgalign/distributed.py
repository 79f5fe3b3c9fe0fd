"""Training on several processes: what a trainer of ours has to say to accelerate, FSDP and DeepSpeed.

`accelerate launch` starts the processes and its configuration file chooses between data parallelism, FSDP (version 2)
and DeepSpeed ZeRO-3; sharding, gathering and reducing are theirs. All three have run on CPU processes alone. Every
function does nothing, or next to nothing, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fgalign.core.modeling import is_sharded, reduce_in_float32
from fgalign.core.rollout import Rollout
from fgalign.errors import ConfigError

T = TypeVar("T")


def check_supported(accelerator: Any, *, adapter: bool) -> None:
    """Raise ConfigError for what does not work with sharded weights: FSDP's version 1, and adapters."""
    if "FSDP" in str(accelerator.distributed_type) and not accelerator.is_fsdp2:
        raise ConfigError("accelerate: expected fsdp_version 2, found 1; see reproduce/accelerate/fsdp.yaml")
    if adapter and is_sharded(accelerator):
        raise ConfigError(
            "peft_config: expected none with sharded weights (FSDP, ZeRO-3); launch with reproduce/accelerate/ddp.yaml"
        )


def prepare_trained(
    both: Any, optimizer: Any, accelerator: Any, microbatch_size: int, max_grad_norm: float
) -> tuple[Any, Any]:
    """accelerate's ``prepare`` of a ``PolicyWithValue`` and its optimiser. ``max_grad_norm`` is for DeepSpeed, which
    clips gradients itself."""
    reduce_in_float32(accelerator)
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import register_fsdp_forward_method

        both, optimizer = accelerator.prepare(both, optimizer)
        register_fsdp_forward_method(both, "run_policy")
        return both, optimizer
    if "DEEPSPEED" in str(accelerator.distributed_type):
        # Batch sizes DeepSpeed takes from a data loader, and there is none; a trainer before this one has left its own.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": max_grad_norm,
            "train_micro_batch_size_per_gpu": microbatch_size,
            "gradient_accumulation_steps": 1,
            "train_batch_size": microbatch_size * accelerator.num_processes,
        }
    return accelerator.prepare(both, optimizer)


def clip_gradients(model: nn.Module, max_norm: float, accelerator: Any) -> float:
    """Scale a model's gradients down to ``max_norm`` where their norm is above it; their norm before. Without
    accelerate's distributed types gradients within it are left alone, where torch would multiply all of them by 1."""
    if str(accelerator.distributed_type) != "DistributedType.NO":
        return float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if not norm + 1e-6 <= max_norm:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def shard_frozen(model: Any, accelerator: Any) -> Any:
    """A model that is not trained, in evaluation mode on this process's device; sharded where the policy is."""
    if not is_sharded(accelerator):
        return model.to(accelerator.device).eval()
    model.requires_grad_(False)
    if accelerator.is_fsdp2:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model).eval()
    from trl.models import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


def full_parameters(module: nn.Module, accelerator: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and full value of each parameter in turn, on every process. All have to go through to the end."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):
            yield name, parameter.detach().to(accelerator.device).full_tensor()
        elif is_sharded(accelerator) and not accelerator.is_fsdp2:  # FSDP's root may hold its own whole
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()
        else:
            yield name, parameter.detach()


@contextmanager
def gathered(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Within it a layer of a sharded policy keeps its full weights once it has run, as sampling token by token needs;
    then they are freed. Processes need not take the same number of steps after the first."""
    if not is_sharded(accelerator):
        yield
    elif accelerator.is_fsdp2:
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        keeps = accelerator.state.fsdp_plugin.reshard_after_forward
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                # The root keeps its weights until the backward pass, as ``fully_shard`` decides by itself.
                part.set_reshard_after_forward(keeps and part is not model, recurse=False)
    else:
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        # The value model, as large as the policy, stays shared out: it samples nothing.
        with deepspeed.zero.GatheredParameters(list(accelerator.unwrap_model(model).policy.parameters())):
            remove_hooks(model)
            try:
                yield
            finally:
                add_hooks(model)


def own_rows(count: int, accelerator: Any) -> list[int]:
    """Rows of a batch that this process works on, as many as every other; the last row comes again where ``count`` is
    no multiple of the processes."""
    total = -(-count // accelerator.num_processes) * accelerator.num_processes
    with accelerator.split_between_processes([min(row, count - 1) for row in range(total)]) as rows:
        return rows


def gather_rows(values: T, count: int, accelerator: Any) -> T:
    """A tensor, or tuple of tensors, of each process's ``own_rows`` to that of the whole batch, on every process."""
    if accelerator.num_processes == 1:
        return values

    def gather(value: Tensor) -> Tensor:
        # Not every backend gathers booleans.
        sent = value.to(torch.uint8) if value.dtype == torch.bool else value.contiguous()
        return accelerator.gather(sent)[:count].to(value.dtype)

    return gather(values) if isinstance(values, Tensor) else tuple(gather(value) for value in values)


def gather_rollout(rollout: Rollout, count: int, pad_token_id: int, accelerator: Any) -> Rollout:
    """Each process's responses to its ``own_rows`` as one rollout, padded as one process would have padded it."""
    if accelerator.num_processes == 1:
        return rollout
    fields = []
    for name, value in rollout._asdict().items():
        if value.dim() == 2:
            value = accelerator.pad_across_processes(
                value.long(),
                dim=1,
                pad_index=pad_token_id if name.endswith("ids") else 0,
                pad_first=name.startswith("prompt"),
            ).to(value.dtype)
        fields.append(value)
    return Rollout(*gather_rows(tuple(fields), count, accelerator))


def in_batches(rows: Sequence[int], size: int | None) -> list[Sequence[int]]:
    """Rows in pieces of at most ``size`` (None: one piece)."""
    return [rows] if size is None else [rows[start : start + size] for start in range(0, len(rows), size)]


def by_rows(rollout: Rollout, function: Callable[[Rollout], T], accelerator: Any, batch_size: int | None = None) -> T:
    """``function`` of a rollout whose rows do not depend on each other: each process takes its ``own_rows``,
    ``batch_size`` at a time, and all get the results of all rows in order. ``function`` gives a tensor or a tuple of
    tensors, rows first."""
    count = len(rollout.truncated)
    if accelerator.num_processes == 1 and (batch_size is None or batch_size >= count):
        return function(rollout)
    parts = []
    for rows in in_batches(own_rows(count, accelerator), batch_size):
        parts.append(function(Rollout(*(field[rows] for field in rollout))))
    if isinstance(parts[0], Tensor):
        return gather_rows(torch.cat(parts), count, accelerator)
    return gather_rows(tuple(map(torch.cat, zip(*parts, strict=True))), count, accelerator)
