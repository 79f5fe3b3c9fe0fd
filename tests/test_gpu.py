"""The trainers on a GPU (``python -m pytest -n 0 tests/test_gpu.py --gpu``; without the option no test sees one): what
the CPU gives, up to rounding, and what only a GPU does. The same tests run on the CPU, where they say that one training
repeats another."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainingArguments

from fgalign.core.rollout import sample_responses, uniforms
from fgalign.core.schema import Edit
from fgalign.core.tensor_ops import pad
from fgalign.labels import LabelConfig, label_edits
from fgalign.methods.figa import FIGAConfig, FIGATrainer
from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
from fgalign.rewards.training import TokenRewardTrainer

PROMPTS = [[2 + (3 * n + k) % 28 for k in range(1 + n % 4)] for n in range(12)]
ROUNDING = 2e-4


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU, or no --gpu")
    return torch.device(request.param)


def close(found, expected, tolerance=ROUNDING):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float().cpu(), value, rtol=tolerance, atol=tolerance, msg=name)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def wanted(rollout):
    """A reward a token: 1 for one of them."""
    return (rollout.response_ids == 7).float()


@pytest.fixture
def ppo(make_model, ids, tmp_path):
    """``ppo(device, ...)``: the weights of a policy, and the statistics of its last round, after two rounds."""

    def run(device, critic=None, peft_config=None, **config):
        settings = {
            "output_dir": str(tmp_path / "out"), "updates": 2, "rollout_batch_size": 8, "epochs": 2,
            "minibatch_size": 4, "learning_rate": 1e-3, "response_length": 6, "calibration_prompts": 12,
            "use_cpu": device.type == "cpu",
        }  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # a process keeps the first trainer's device
        rounds = []
        trainer = FineGrainedPPOTrainer(
            make_model(0), make_model(0), wanted, FineGrainedPPOConfig(**{**settings, **config}), PROMPTS, ids,
            value_model=critic, peft_config=peft_config, log=lambda statistics, step: rounds.append(statistics),
        )  # fmt: skip
        trainer.train()
        assert {value.device.type for value in trainer.model.parameters()} == {device.type}
        return weights(trainer.model), rounds[-1]

    return run


@pytest.mark.parametrize("learner", ["head", "separate", "lora", "recorded", "checkpointing"])
def test_ppo(device, ppo, make_model, learner):
    from peft import LoraConfig

    def options():
        return {
            "head": {},
            "separate": {"critic": make_model(1, "token", num_labels=1), "value_model": "separate"},
            "lora": {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")},
            "recorded": {"reuse_sampling": True, "microbatch_size": 2, "inference_batch_size": 4},
            "checkpointing": {"gradient_checkpointing": True},
        }[learner]

    torch.manual_seed(0)  # of the adapter
    expected, _ = ppo(torch.device("cpu"), **options())
    torch.manual_seed(0)
    found, _ = ppo(device, **options())
    close(found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_ppo_in_bf16(device, ppo, compiled):
    if compiled and device.type == "cpu":
        pytest.skip("tests/test_ppo_trainer.py compiles on the CPU")
    _, statistics = ppo(device, bf16=True, compile=compiled, reuse_sampling=compiled)
    assert all(map(math.isfinite, statistics.values()))
    # Ratios of log-probabilities that one precision gave twice stay near 1.
    assert abs(statistics["kl/response"]) < 1 and 2 <= statistics["count/response_tokens"] / 8 <= 12


def test_the_same_tokens_are_sampled(device, make_model):
    uniform = uniforms(len(PROMPTS), 8, torch.Generator().manual_seed(1))

    def sampled(where):
        prompts = pad(PROMPTS, 0, side="left").to(where)
        rollout = sample_responses(
            make_model(0).to(where), prompts, prompts > 0, uniform, eos_token_id=1, pad_token_id=0
        )
        return rollout.response_ids.cpu(), rollout.response_mask.cpu(), rollout.truncated.cpu()

    for found, expected in zip(sampled(device), sampled(torch.device("cpu")), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["figa", "token"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_supervised(device, make_model, tokenizer, tmp_path, kind, accumulation):
    edits = [
        Edit(id="0", prompt="where is the cat?", initial="the cat sat on the log", revised="the cat sat on the mat"),
        Edit(id="1", prompt="who?", initial="a dog", revised="a cat and a dog"),
    ]
    pairs = [pair.model_dump() for pair in label_edits(tokenizer, edits, LabelConfig())]
    shape = {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id
    }  # fmt: skip

    def trained(where):
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 2 // accumulation, "max_steps": 3,
            "gradient_accumulation_steps": accumulation, "learning_rate": 1e-2, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "use_cpu": where.type == "cpu", "bf16": False,
            "remove_unused_columns": False, "seed": 1,
        }  # fmt: skip
        if kind == "figa":
            trainer = FIGATrainer(
                make_model(**shape), args=FIGAConfig(**settings, threshold=5.6), train_dataset=pairs,
                processing_class=tokenizer,
            )  # fmt: skip
        else:
            trainer = TokenRewardTrainer(
                make_model(0, "token", num_labels=3, **shape), args=TrainingArguments(**settings),
                class_weights=torch.tensor([2.0, 1.0, 2.0]), train_dataset=Dataset.from_list(pairs),
                processing_class=tokenizer,
            )  # fmt: skip
        trainer.train()
        return weights(trainer.model)

    close(trained(device), trained(torch.device("cpu")))
