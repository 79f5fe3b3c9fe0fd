"""Rollout engines: vLLM's answers to a rollout, weights handed over after each update, memory given back.

vLLM's ``LLM`` is a stand-in: what is tested is what the engine asks of it and what it makes of its answers. The last
test runs vLLM itself, where it is installed.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgalign.core.rollout import Rollout, response_logits, sample_responses
from fgalign.core.tensor_ops import pad
from fgalign.errors import ConfigError, TrainingError
from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
from fgalign.rollout_engine import VLLMEngine, choose_engine, start_vllm

EOS, PAD = 1, 0
PROMPTS = [[2 + (3 * n + k) % 28 for k in range(1 + n % 4)] for n in range(12)]


def answer(ids: list[int], reason: str = "stop") -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason=reason)])


class Stub:
    """``vllm.LLM`` as far as the engine uses it: gives prepared answers, notes what it is asked and given."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.asked, self.given, self.resets = answers, [], [], 0
        model = SimpleNamespace(load_weights=lambda weights: self.given.extend(weights))
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, params))
        return self.answers

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def engine(llm: Any, weights: Any = lambda: []) -> VLLMEngine:
    return VLLMEngine(llm, lambda **options: options, weights, torch.device("cpu"), eos_token_id=EOS, pad_token_id=PAD)


def test_answers_become_a_rollout():
    # Ended, ended without the token being reported, cut off, ended with its last token, ended at once.
    answers = [answer([7, 8, EOS]), answer([9]), answer([5, 6, 7, 8], "length"), answer([5, 6, 7, EOS]), answer([])]
    prompts = [[2], [3, 4], [5, 6, 7], [8], [9]]
    rollout = engine(Stub(answers)).sample(prompts, torch.zeros(5, 4), 1.0)
    assert rollout.prompt_ids.tolist() == [[0, 0, 2], [0, 3, 4], [5, 6, 7], [0, 0, 8], [0, 0, 9]]
    assert rollout.prompt_mask.sum(1).tolist() == [1, 2, 3, 1, 1]
    assert rollout.response_ids.tolist() == [[7, 8, 1, 0], [9, 1, 0, 0], [5, 6, 7, 8], [5, 6, 7, 1], [1, 0, 0, 0]]
    assert rollout.response_mask.sum(1).tolist() == [3, 2, 4, 4, 1]
    assert rollout.response_mask[1].tolist() == [True, True, False, False]
    assert rollout.truncated.tolist() == [False, False, True, False, False]


def test_what_it_asks_for():
    llm = Stub([answer([EOS]), answer([EOS])])
    engine(llm).sample([[2], [3, 4]], torch.tensor([[0.0, 0.9], [0.5, 0.1]]), 0.7)
    ((prompts, params),) = llm.asked
    assert prompts == [{"prompt_token_ids": [2]}, {"prompt_token_ids": [3, 4]}]
    # A row's seed is its own first random number: 0 and half of 2^31.
    assert [options["seed"] for options in params] == [0, 2**30]
    for options in params:
        assert options["max_tokens"] == 2 and options["temperature"] == 0.7 and options["stop_token_ids"] == [EOS]
        assert options["n"] == 1 and options["top_p"] == 1.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([answer([3], "abort")], "vLLM: expected finish_reason stop or length, found 'abort'"),
        ([answer([3, 4, 5], "length")], "vLLM: expected at most 2 tokens, found 3"),
        ([answer([3, 4], "stop")], "vLLM: expected at most 2 tokens, found 3"),  # the end of sequence is one more
    ],
)
def test_answers_that_cannot_be(answers, message):
    with pytest.raises(TrainingError, match=message):
        engine(Stub(answers)).sample([[2]], torch.zeros(1, 2), 1.0)


def test_weights_are_handed_over_one_by_one():
    llm = Stub([])
    weights = [("model.a", torch.ones(2)), ("lm_head.weight", torch.zeros(3))]
    engine(llm, lambda: iter(weights)).sync()
    assert [name for name, _ in llm.given] == ["model.a", "lm_head.weight"] and llm.resets == 1
    assert all(given is value for (_, given), (_, value) in zip(llm.given, weights, strict=True))


class Mirror(Stub):
    """Answers with a transformers model that has only the weights handed over, sampling as the trainer would."""

    def __init__(self, model: Any, uniform: Any) -> None:
        super().__init__([])
        self.model, self.uniform = model, uniform

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.model.load_state_dict(dict(self.given), strict=True)
        rows = [request["prompt_token_ids"] for request in prompts]
        rollout = sample_responses(
            self.model, pad(rows, PAD, side="left"), pad([[1] * len(ids) for ids in rows], 0, side="left").bool(),
            self.uniform(len(rows), params[0]["max_tokens"]), eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        pairs = zip(rollout.response_lists(), rollout.truncated.tolist(), strict=True)
        return [answer(ids, "length" if cut else "stop") for ids, cut in pairs]


def test_ppo_trains_the_same_with_an_engine_that_has_its_weights(make_model, ids, tmp_path, monkeypatch):
    import fgalign.ppo_trainer as ppo_trainer

    def reward(rollout):
        return ((rollout.response_ids == 7) & rollout.response_mask).float()

    results, syncs = [], []
    for name in ("transformers", "vllm"):
        drawn = []

        def start(model, weights, device, *, max_length, memory, eos_token_id, pad_token_id, drawn=drawn):
            assert (max_length, memory) == (4 + 6, 0.25)
            llm = Mirror(make_model(9), lambda rows, length: drawn.pop(0))
            syncs.append(llm)
            return engine(llm, weights)

        monkeypatch.setattr(ppo_trainer, "start_vllm", start)
        monkeypatch.setattr(ppo_trainer, "choose_engine", lambda name, own: name)
        plain = ppo_trainer.uniforms
        # The stand-in draws with the trainer's random numbers, so that the answers are comparable.
        monkeypatch.setattr(
            ppo_trainer, "uniforms", lambda *args, plain=plain, drawn=drawn: drawn.append(plain(*args)) or drawn[-1]
        )
        trainer = FineGrainedPPOTrainer(
            make_model(0), make_model(0), reward,
            FineGrainedPPOConfig(
                output_dir=str(tmp_path), updates=2, rollout_batch_size=8, epochs=1, minibatch_size=4,
                learning_rate=1e-2, response_length=6, calibration_prompts=8, use_cpu=True, rollout_engine=name,
                vllm_memory=0.25,
            ),
            PROMPTS, ids,
        )  # fmt: skip
        trainer.train()
        monkeypatch.setattr(ppo_trainer, "uniforms", plain)
        results.append({key: value.detach().clone() for key, value in trainer.model.named_parameters()})
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key
    # Before the calibration and after each update but the last, once: the policy's parameters without the value head.
    assert syncs[0].resets == 2
    names = [key for key, _ in make_model(0).named_parameters()]
    assert [key for key, _ in syncs[0].given] == 2 * names


def test_a_prompt_that_leaves_no_room_is_refused():
    found = VLLMEngine(
        Stub([]), lambda **options: options, lambda: [], torch.device("cpu"), eos_token_id=EOS, pad_token_id=PAD,
        max_length=6,
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"vllm_max_length: expected at least 7 \(a prompt of 3 tokens, a response of 4"
    ):
        found.sample([[2], [3, 4, 5]], torch.zeros(2, 4), 1.0)


class Core:
    """``vllm.LLM`` as far as it starts and ends: takes one thread, makes a process group unless there is one, and in
    the end destroys it all the same."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.llm_engine = SimpleNamespace(engine_core=self)
        self.ended = 0
        torch.set_num_threads(1)
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.group = torch.distributed.new_group([0])

    def shutdown(self) -> None:
        self.ended += 1
        torch.distributed.destroy_process_group(self.group)
        torch.distributed.destroy_process_group()


@pytest.fixture
def start(monkeypatch):
    """``start_vllm`` with a ``Core`` for vLLM's ``LLM``; no process group and as many threads as before are left."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Core, SamplingParams=None))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    threads = torch.get_num_threads()
    yield lambda: start_vllm(
        "m", lambda: [], torch.device("cpu"), max_length=10, memory=0.2, eos_token_id=EOS, pad_token_id=PAD
    )
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("processes", "backend"), [("1", "uni"), ("2", "external_launcher")])
def test_how_vllm_is_started(start, monkeypatch, processes, backend):
    monkeypatch.setenv("WORLD_SIZE", processes)
    before = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    started = start()
    asked = started.llm.options
    assert started.max_length == asked["max_model_len"] == 10 and asked["max_num_batched_tokens"] == 4096
    assert asked["distributed_executor_backend"] == backend and asked["gpu_memory_utilization"] == 0.2
    # In this process, or its weights could not be reached; and nothing is left for what this process starts later.
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")} == before


def test_closing_ends_vllm_once_and_all_that_it_started(start):
    torch.set_num_threads(2)
    started = start()
    core = started.llm
    assert torch.distributed.is_initialized() and torch.get_num_threads() == 1
    started.close()
    started.close()
    assert core.ended == 1 and started.llm is None
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == 2


def test_closing_leaves_the_process_group_of_the_trainer(start):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    started = start()
    group = started.llm.group
    started.close()
    torch.distributed.barrier()
    # vLLM's own group is gone, and what it destroys them with is as it was.
    with pytest.raises(ValueError, match="Invalid process group"):
        torch.distributed.destroy_process_group(group)
    torch.distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("fails", [False, True])
def test_a_seed_of_ppo_closes_its_engine(fails, tmp_path, monkeypatch):
    from fgalign.methods import ppo

    done = []

    class Trainer:
        device, response_tokens, gradient_updates = "cpu", 3, 2
        accelerator = SimpleNamespace(reduce=lambda value, how: value)
        model = torch.nn.Identity()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def train(self) -> None:
            done.append("train")
            if fails:
                raise TrainingError("a loss that is not finite")

        def close(self) -> None:
            done.append("close")

        def save_model(self, folder: Any) -> None:
            done.append("save")

    for name in ("CurveRecorder", "load_causal_lm", "load_reward"):
        monkeypatch.setattr(ppo, name, lambda *args: SimpleNamespace(samples=[]))
    monkeypatch.setattr(ppo, "FineGrainedPPOTrainer", Trainer)
    context = SimpleNamespace(
        split=lambda name: SimpleNamespace(prompts=[]), tokenizer=None, stage="ppo", seed=1, out=tmp_path, bf16=False,
        device=torch.device("cpu"), model=lambda name: tmp_path, spend=lambda **spent: done.append("spend"),
    )  # fmt: skip
    config = ppo.Config(kind="ppo", needs="rm_token", trainer={})
    if fails:
        with pytest.raises(TrainingError):
            ppo.run(context, config)
        assert done == ["train", "close"]
    else:
        ppo.run(context, config)
        assert done == ["train", "close", "spend", "save"]


def test_choose_engine(monkeypatch):
    import fgalign.rollout_engine as rollout_engine

    found = {"spec": None, "gpu": True}
    monkeypatch.setattr(rollout_engine, "find_spec", lambda name: found["spec"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found["gpu"])
    assert choose_engine("auto") == choose_engine("transformers") == "transformers"
    with pytest.raises(ConfigError, match="rollout_engine: 'vllm' asked for, but it is not installed"):
        choose_engine("vllm")
    found["spec"] = object()
    assert choose_engine("auto") == choose_engine("vllm") == "vllm"
    # Where the trainer's own policy has to sample, `auto` does not choose what would be refused.
    assert choose_engine("auto", own=True) == "transformers" and choose_engine("vllm", own=True) == "vllm"
    found["gpu"] = False
    assert choose_engine("auto") == "transformers"


def test_vllm_itself_follows_the_weights_and_leaves_nothing(make_model, tmp_path):
    pytest.importorskip("vllm")
    shape = {"hidden_size": 64, "intermediate_size": 96}
    make_model(0, **shape).save_pretrained(tmp_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    uniform = torch.rand(len(PROMPTS), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @torch.no_grad()
    def shortfall(rollout: Any, model: Any) -> float:
        """How far a token's logit is below the largest at its place, at most."""
        logits = response_logits(model, Rollout(*(field.cpu() for field in rollout)))
        taken = logits.gather(-1, rollout.response_ids.cpu().unsqueeze(-1)).squeeze(-1)
        return float((logits.amax(-1) - taken)[rollout.response_mask.cpu()].max())

    policy = SimpleNamespace()
    for seeds in ((1, 2), (3,)):  # two engines one after the other
        started = start_vllm(
            str(tmp_path),
            lambda: ((key, value.detach().to(device)) for key, value in policy.model.named_parameters()),
            device,
            max_length=max(map(len, PROMPTS)) + 8, memory=0.2, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        within = weakref.ref(started.llm.llm_engine.model_executor.driver_worker.model_runner.model)
        for seed in seeds:
            policy.model = make_model(seed, **shape)
            started.sync()
            # Nearly greedy: a logit 0.8 below the largest has a probability of at most e^-16, up to bf16's rounding.
            rollout = started.sample(PROMPTS, uniform, 0.05)
            assert shortfall(rollout, policy.model) < 0.8 < 2 < shortfall(rollout, make_model(seed + 5, **shape))
            assert rollout.response_mask.sum(1).tolist() == [len(ids) for ids in rollout.response_lists()]
            for ids, cut in zip(rollout.response_lists(), rollout.truncated.tolist(), strict=True):
                assert EOS not in ids[:-1] and (len(ids) == 8 if cut else ids[-1] == EOS)
        started.close()
        assert within() is None and gc.get_freeze_count() == 0 and not torch.distributed.is_initialized()
