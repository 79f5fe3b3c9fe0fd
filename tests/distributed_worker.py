"""One process of tests/test_distributed.py: trains a tiny Llama by FIGA and by PPO and writes what it logged.

accelerate launch --config_file reproduce/accelerate/fsdp.yaml --num_processes 2 --mixed_precision no
    tests/distributed_worker.py OUT

With more arguments it runs those stages of OUT's repository instead ("align figa").
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

VOCAB, PAD, EOS = 30, 0, 1
PROMPTS = [[2 + (3 * n + k) % 28 for k in range(1 + n % 4)] for n in range(13)]


def shard_on_the_cpu() -> None:
    """Make accelerate use FSDP on the CPU as well, as it was launched.

    accelerate (1.15) turns FSDP on for accelerators only. Its state is told here; all that follows is accelerate's and
    torch's own code.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = started


def zero3_on_the_cpu() -> None:
    """Make accelerate use DeepSpeed on the CPU as well, as it was launched, and ZeRO-3 share out small parameters too.

    accelerate (1.15) turns DeepSpeed on where it is not told to stay on the CPU: its state is not told here. ZeRO-3
    leaves parameters of up to 100,000 numbers whole, and the models here have no larger ones.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.comm import torch as communication

    # It would compile a kernel of its own for sums on the CPU; without it gloo does them.
    communication.build_shm_op = lambda: None
    start, filled_in = AcceleratorState.__init__, DeepSpeedPlugin.__post_init__

    def started(self: Any, *args: Any, cpu: bool = False, **kwargs: Any) -> None:
        if not PartialState._shared_state:
            PartialState(cpu=True)
        start(self, *args, **kwargs)

    def filled_in_for_small_models(self: Any) -> None:
        filled_in(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    AcceleratorState.__init__ = started
    DeepSpeedPlugin.__post_init__ = filled_in_for_small_models


def llama(seed: int = 0, kind: str = "CausalLM", **config: Any) -> Any:
    import transformers

    from fgalign.core.modeling import load_whole

    load_whole()
    torch.manual_seed(seed)
    return getattr(transformers, f"LlamaFor{kind}")(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
            eos_token_id=EOS, pad_token_id=PAD, **config,
        )
    ).eval()  # fmt: skip


def tokenizer() -> Any:
    return SimpleNamespace(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, save_pretrained=lambda folder: None)


def pairs(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def side(length: int, label: int) -> tuple[list[int], list[int]]:
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        return [*ids, EOS], [label * (place % 2) for place in range(length + 1)]

    found = []
    for number in range(count):
        initial, revised = side(3 + number % 4, -1), side(4 + number % 3, 1)
        found.append(
            {
                "id": str(number), "prompt_ids": PROMPTS[number % 13], "initial_ids": initial[0],
                "initial_labels": initial[1], "revised_ids": revised[0], "revised_labels": revised[1],
            }
        )  # fmt: skip
    return found


def numbers(logs: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if not name.startswith(("time/", "train_", "total_"))}


held: dict[str, float] = {}


def share_held(model: Any) -> float:
    """Share of a model's parameters that this process holds."""
    parameters = list(model.parameters())
    own = sum((p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)).numel() for p in parameters)
    return own / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def figa(out: Path, processes: int) -> list[dict[str, float]]:
    from datasets import Dataset

    from fgalign.methods.figa import FIGAConfig, FIGATrainer
    from fgalign.training import save_trained

    trainer = FIGATrainer(
        llama(),
        FIGAConfig(
            output_dir=str(out), per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
            learning_rate=1e-2, num_train_epochs=2, threshold=3.0, logging_steps=1, seed=1, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0.5,
        ),
        Dataset.from_list(pairs(24)),
        tokenizer(),
    )  # fmt: skip
    trainer.train()
    save_trained(trainer, tokenizer(), out)
    held["figa"] = share_held(trainer.model)
    return [numbers(logs) for logs in trainer.state.log_history if "loss" in logs]


def filter_rewards(count: int) -> dict[str, Any]:
    """Rewards of the first ``count`` pairs as FIGA's filter takes them, and how many responses this process scored."""
    import fgalign.rewards
    from fgalign.core.schema import LabelledPair
    from fgalign.methods.figa import pair_rewards

    reward = fgalign.rewards.reward_function(llama(5, "SequenceClassification", num_labels=1), "sequence")
    scored = []

    def counted(rollout: Any) -> torch.Tensor:
        scored.append(len(rollout.truncated))
        return reward(rollout)

    fgalign.rewards.load_reward = lambda *_: counted
    context = SimpleNamespace(
        model=lambda name: None, device=torch.device("cpu"), tokenizer=tokenizer(), autocast=nullcontext
    )
    config = SimpleNamespace(needs="rm_preference", score_batch_size=3)
    initial, revised = pair_rewards([LabelledPair(**pair) for pair in pairs(count)], context, config)
    return {"initial": initial.tolist(), "revised": revised.tolist(), "scored": sum(scored)}


def ppo(out: Path, **config: Any) -> list[dict[str, float]]:
    from fgalign.distributed import full_parameters
    from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
    from fgalign.rewards import reward_function

    logs: list[dict[str, float]] = []
    settings = {
        "output_dir": str(out), "updates": 3, "rollout_batch_size": 8, "epochs": 2, "minibatch_size": 4,
        "learning_rate": 1e-2, "response_length": 6, "calibration_prompts": 13, "use_cpu": True,
    }  # fmt: skip
    separate = config.get("value_model") == "separate"
    trainer = FineGrainedPPOTrainer(
        llama(),
        llama(),
        reward_function(llama(5, "TokenClassification", num_labels=3), "token"),
        FineGrainedPPOConfig(**{**settings, **config}),
        PROMPTS,
        tokenizer(),
        value_model=llama(4, "TokenClassification", num_labels=1) if separate else None,
        log=lambda statistics, update: logs.append(numbers(statistics)),
    )
    trainer.train()
    rollout = trainer.sample(PROMPTS[:5])
    logs.append({"kl of 5 answers": float((trainer.logps(rollout) - trainer.ref_logps(rollout))[:, 0].sum())})
    # What vLLM would be given.
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    full = full_parameters(policy, trainer.accelerator)
    logs[-1]["mean weight"] = float(torch.stack([value.abs().mean() for _, value in full]).mean())
    trainer.save_model()
    held[out.name] = min(share_held(model) for model in (trainer.model, trainer.ref_model, trainer.reward.model))
    return logs


def main() -> None:
    out = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        zero3_on_the_cpu()
    if len(sys.argv) > 2:
        os.chdir(out)
        from fgalign.cli import app

        for stage in sys.argv[2:]:
            app([*stage.split(), "--profile", "smoke"], standalone_mode=False)
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    found = {
        "figa": figa(out / "figa", processes),
        "ppo": ppo(out / "ppo", whiten_rewards=True, inference_batch_size=3, microbatch_size=1),
        "ppo, value model": ppo(out / "value", value_model="separate", gradient_checkpointing=True),
        "ppo, groups": ppo(out / "group", advantage="group", group_size=4, max_grad_norm=0.5),
        "filter": filter_rewards(7),
    }
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found["launch"] = {"processes": accelerator.num_processes, "held": held}
    if accelerator.is_main_process:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
