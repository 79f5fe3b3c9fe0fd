"""What samples PPO's responses: transformers with the policy itself, or vLLM with a copy of it on the same GPU.

An engine has three methods. ``sample`` draws a response to each prompt; ``sync`` is called when the policy has changed,
before the next ``sample``; ``close`` gives back its memory. An engine gives tokens; the log-probabilities that PPO
trains on are the trainer's own, or, where the trainer asks for it, what its own policy said while transformers sampled
from it (``rollout.Recorder``).

``VLLMEngine`` is tested against a stand-in for vLLM's ``LLM`` class, and, where vLLM is installed, with vLLM itself.
That was done with vLLM for CPUs (0.32); on a GPU it has not been run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fgalign.core.rollout import (
    CompiledDecoder,
    Recorder,
    Rollout,
    as_rollout,
    check_fixed_cache,
    concatenate,
    sample_responses,
)
from fgalign.core.tensor_ops import pad
from fgalign.errors import ConfigError, TrainingError
from fgalign.parallel import process_count

ENGINES = ("transformers", "vllm", "auto")


class RolloutEngine(Protocol):
    """Samples responses for the PPO trainer."""

    def sync(self) -> None:
        """Take over the policy's weights."""

    def sample(self, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float) -> Rollout:
        """One response to each prompt of at most T tokens; ``uniform`` (B, T) in [0, 1) is all its randomness."""

    def close(self) -> None:
        """Give back what it holds; it samples no more."""


def choose_engine(name: str, own: bool = False) -> str:
    """``transformers`` or ``vllm``; ``auto`` is vLLM where it is installed and there is a GPU, unless the trainer's own
    policy has to sample (``own``: on the CPU, or with an adapter).

    Raises:
        ConfigError: vLLM is asked for and is not installed.
    """
    if name == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout_engine: 'vllm' asked for, but it is not installed; install vllm, or use 'auto'")
    if name == "auto":
        ready = not own and find_spec("vllm") is not None and torch.cuda.is_available()
        return "vllm" if ready else "transformers"
    return name


class TransformersEngine:
    """Samples from the policy itself, at most ``batch_size`` responses at once. ``gathered`` makes a context in which
    its weights are whole; ``compiled`` runs it through ``rollout.CompiledDecoder``, ``bf16`` from a copy in bf16."""

    def __init__(
        self,
        policy: Callable[[], Any],
        gathered: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        *,
        eos_token_id: int,
        pad_token_id: int,
        batch_size: int | None = None,
        compiled: bool = False,
        bf16: bool = False,
    ) -> None:
        self.policy, self.gathered, self.device, self.batch_size = policy, gathered, device, batch_size
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        if compiled:
            check_fixed_cache(policy(), pad_token_id)
        self.decoder = CompiledDecoder(policy(), bf16) if compiled else None

    def sync(self) -> None:
        """Take over the policy's weights where the decoder has copies of them."""
        if self.decoder is not None:
            self.decoder.sync()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniform: Tensor,
        temperature: float,
        recorder: Recorder | None = None,
    ) -> Rollout:
        """One response to each prompt, a row's random numbers being its own (``rollout.sample_responses``)."""
        size = self.batch_size or len(prompts)
        parts = []
        with self.gathered():
            for start in range(0, len(prompts), size):
                chosen = prompts[start : start + size]
                part = sample_responses(
                    self.policy(),
                    pad(chosen, self.pad_token_id, side="left").to(self.device),
                    pad([[1] * len(ids) for ids in chosen], 0, side="left").bool().to(self.device),
                    uniform[start : start + size],
                    eos_token_id=self.eos_token_id,
                    pad_token_id=self.pad_token_id,
                    temperature=temperature,
                    decoder=self.decoder,
                    recorder=recorder,
                )
                parts.append(part)
        return concatenate(parts, self.pad_token_id)

    def close(self) -> None:
        """Nothing to do: it holds nothing of its own."""


class VLLMEngine:
    """Samples with a vLLM engine in this process, on this process's GPU.

    Args:
        llm: vLLM's ``LLM``, see ``start_vllm``.
        sampling_params: vLLM's ``SamplingParams``.
        weights: gives name and full value of each of the policy's parameters, in transformers' names.
        device: where rollouts go.
        max_length: longest prompt and response together that ``llm`` serves, in tokens (None: any).
        shut_down: ends ``llm``.
    """

    def __init__(
        self,
        llm: Any,
        sampling_params: Callable[..., Any],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        device: torch.device,
        *,
        eos_token_id: int,
        pad_token_id: int,
        max_length: int | None = None,
        shut_down: Callable[[Any], None] = lambda llm: None,
    ) -> None:
        self.llm, self.sampling_params, self.weights, self.device = llm, sampling_params, weights, device
        self.shut_down = shut_down
        self.max_length = max_length
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id

    def sync(self) -> None:
        """Load the policy's weights into vLLM's model, one parameter at a time, and drop what it had cached."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, value in self.weights():
            model.load_weights([(name, value)])
        self.llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float) -> Rollout:
        """One response to each prompt; the first random number of a row is the seed of its request.

        Raises:
            ConfigError: a prompt leaves no room for the response, which vLLM would cut off without a word.
            TrainingError: vLLM gave up a request, or gave more tokens than asked for.
        """
        budget = uniform.shape[1]
        longest = max(map(len, prompts)) + budget
        if self.max_length is not None and longest > self.max_length:
            raise ConfigError(
                f"vllm_max_length: expected at least {longest} (a prompt of {longest - budget} tokens, a response of "
                f"{budget}), found {self.max_length}"
            )
        params = [
            self.sampling_params(
                n=1,
                temperature=temperature,
                top_p=1.0,
                max_tokens=budget,
                stop_token_ids=[self.eos_token_id],
                seed=seed,
                detokenize=False,
            )
            for seed in (uniform[:, 0] * 2**31).long().tolist()
        ]
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = [request.outputs[0] for request in self.llm.generate(requests, params, use_tqdm=False)]
        responses, truncated = [], []
        for output in outputs:
            ids = list(output.token_ids)
            if output.finish_reason not in ("stop", "length"):
                raise TrainingError(f"vLLM: expected finish_reason stop or length, found {output.finish_reason!r}")
            # The end of sequence is part of a response, whether or not the engine reports the token that stopped it.
            if output.finish_reason == "stop" and (not ids or ids[-1] != self.eos_token_id):
                ids.append(self.eos_token_id)
            if len(ids) > budget:
                raise TrainingError(f"vLLM: expected at most {budget} tokens, found {len(ids)}")
            responses.append(ids)
            truncated.append(ids[-1] != self.eos_token_id)

        rollout = as_rollout(prompts, responses, self.pad_token_id, self.device)
        return rollout._replace(truncated=torch.tensor(truncated, device=self.device))

    def close(self) -> None:
        """Shut vLLM down, once. Otherwise it would keep its weights and cache, and, because it takes all that is there
        when it starts out of Python's garbage collection, the trainer's models too."""
        llm, self.llm = self.llm, None
        if llm is not None:
            self.shut_down(llm)


def start_vllm(
    model: str,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
    device: torch.device,
    *,
    max_length: int | None,
    memory: float,
    eos_token_id: int,
    pad_token_id: int,
) -> VLLMEngine:
    """A vLLM engine in this process.

    Args:
        model: folder or name of the policy's checkpoint, for its architecture; the weights come by ``sync``.
        max_length: longest prompt and response together, in tokens (None: the model's).
        memory: share of the GPU's memory that vLLM may take, weights and KV cache together.
    """
    # One process for vLLM and the trainer, so that weights can be handed over.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers what runs here
    from vllm import LLM, SamplingParams

    launched, threads = torch.distributed.is_initialized(), torch.get_num_threads()
    llm = LLM(
        model=model,
        dtype="bfloat16",
        tensor_parallel_size=1,
        # Launched processes have an engine each, beside the trainer's process group.
        distributed_executor_backend="external_launcher" if process_count() > 1 else "uni",
        gpu_memory_utilization=memory,
        max_model_len=max_length,
        # vLLM sets its memory aside by the largest batch of prompt tokens, of which the default is far too large.
        max_num_batched_tokens=max(4096, max_length or 0),
        generation_config="vllm",
        skip_tokenizer_init=True,
    )

    def shut_down(llm: Any) -> None:
        with kept_process_group(launched):
            llm.llm_engine.engine_core.shutdown()
        torch.set_num_threads(threads)  # vLLM takes one

    ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return VLLMEngine(llm, SamplingParams, weights, device, max_length=max_length, shut_down=shut_down, **ids)


@contextmanager
def kept_process_group(keep: bool) -> Iterator[None]:
    """Within it torch's default process group is not destroyed. vLLM ends it when it shuts down, whoever made it, and
    the trainer's processes need it on."""
    destroy = torch.distributed.destroy_process_group

    def spare_default(group: Any = None) -> None:
        if group not in (None, torch.distributed.group.WORLD):
            destroy(group)

    if keep:
        torch.distributed.destroy_process_group = spare_default
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
