"""Rollout engines: vLLM's answers to a rollout, weights handed over after each update; vLLM's ``LLM`` is a stand-in.

vLLM itself is not installed here. What is tested is what the engine asks of it and what it makes of its answers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgalign.core.rollout import sample_responses
from fgalign.core.tensor_ops import pad
from fgalign.errors import ConfigError, TrainingError
from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
from fgalign.rollout_engine import VLLMEngine, choose_engine

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


def test_vllm_in_a_single_process_finds_what_a_launcher_would_have_set(monkeypatch):
    import os
    import sys

    from fgalign.rollout_engine import start_vllm

    asked = {}
    stand_in = SimpleNamespace(LLM=lambda **options: asked.update(options), SamplingParams=None)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    started = start_vllm(
        "m", lambda: [], torch.device("cpu"), max_length=10, memory=0.2, eos_token_id=EOS, pad_token_id=PAD
    )
    assert started.max_length == asked["max_model_len"] == 10 and asked["max_num_batched_tokens"] == 4096
    assert [os.environ[name] for name in names[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 0


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
