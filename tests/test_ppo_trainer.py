"""FineGrainedPPOTrainer: its documented steps against plain loops, its equivalences and errors, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fgalign.core.modeling import load_causal_lm
from fgalign.core.rollout import Rollout, response_logps
from fgalign.errors import ConfigError, TrainingError
from fgalign.ppo_trainer import GLOSSARY, Experience, FineGrainedPPOConfig, FineGrainedPPOTrainer, check_prompts
from fgalign.rewards import reward_function

WANTED = 7
PROMPTS = [[2 + (3 * n + k) % 28 for k in range(1 + n % 4)] for n in range(12)]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


def share(rollout):
    """A score a response: the share of its tokens that are the wanted one."""
    return ((rollout.response_ids == WANTED) & rollout.response_mask).sum(1) / rollout.response_mask.sum(1)


def count(rollout):
    """A reward a token: 1 for the wanted one, and something that no one may read outside the response."""
    return (rollout.response_ids == WANTED).float().where(rollout.response_mask, tensor(math.nan))


def at_last_token(rollout):
    """The scores of ``share`` as rewards a token, all zero but the last."""
    rewards = torch.zeros(rollout.response_mask.shape)
    for row, score in enumerate(share(rollout).tolist()):
        rewards[row, int(rollout.response_mask[row].sum()) - 1] = score
    return rewards


@pytest.fixture
def make_trainer(make_model, ids, tmp_path):
    def make(
        reward=share, model=None, ref_model="same", critic=None, peft_config=None, log=None, prompts=PROMPTS, **config
    ):
        # The class's defaults, but small; the wide learning rate makes the policy move within a few updates.
        settings = {
            "output_dir": str(tmp_path / "out"), "updates": 2, "rollout_batch_size": 8, "epochs": 2,
            "minibatch_size": 4, "learning_rate": 1e-2, "response_length": 6, "calibration_prompts": 12,
            "use_cpu": True,
        }  # fmt: skip
        return FineGrainedPPOTrainer(
            model or make_model(0),
            make_model(0) if ref_model == "same" else ref_model,
            reward,
            FineGrainedPPOConfig(**{**settings, **config}),
            prompts,
            ids,
            value_model=critic,
            peft_config=peft_config,
            log=log,
        )

    return make


def trained(trainer):
    """All parameters after training."""
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def lora(dropout=0.0):
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


# --- the documented steps, by plain loops -----------------------------------------------------------------------------


def fixed_rollout():
    """Three responses: one ended, one cut off, one that ended at once."""
    return Rollout(
        tensor([[2, 3, 4], [0, 5, 6], [0, 0, 8]]),
        tensor([[True] * 3, [False, True, True], [False, False, True]]),
        tensor([[7, 9, 1, 0], [7, 7, 10, 11], [1, 0, 0, 0]]),
        tensor([[True, True, True, False], [True] * 4, [True, False, False, False]]),
        tensor([False, True, False]),
    )


def rows_of(rollout):
    return [
        (rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist(), response)
        for row, response in enumerate(rollout.response_lists())
    ]


def plain_logps(model, prompt, response, temperature):
    logits = model(input_ids=tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("whitened", [False, True])
def test_experience(make_trainer, make_model, level, estimator, whitened):
    scores = [0.5, -1.0, 2.0]
    tokens = [[0.1, -0.2, 0.3], [0.0, 1.0, -1.0, 0.5], [0.7]]
    padded = tensor([row + [math.nan] * (4 - len(row)) for row in tokens])
    trainer = make_trainer(
        (lambda rollout: tensor(scores)) if level == "sequence" else (lambda rollout: padded),
        ref_model=make_model(5), temperature=1.5, gamma=0.9, lam=0.8, kl_coef=0.3, kl_estimator=estimator,
        missing_eos_penalty=0.4, whiten_rewards=whitened, whiten_advantages=whitened, rollout_batch_size=3,
        minibatch_size=3,
    )  # fmt: skip
    trainer.reward_factor = 2.0
    head = trainer.model.value_head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    head.bias.data.fill_(0.3)
    rollout = fixed_rollout()
    experience, statistics = trainer.make_experience(rollout)

    rows, policy, reference = rows_of(rollout), trainer.policy, trainer.ref_model
    logps = [plain_logps(policy, *row, 1.5) for row in rows]
    differences = [old - plain_logps(reference, *row, 1.5) for old, row in zip(logps, rows, strict=True)]
    paid = []
    for row, (_, response) in enumerate(rows):
        rewards = [0.0] * len(response) if level == "sequence" else list(tokens[row])
        if level == "sequence":
            rewards[-1] = scores[row]
        rewards = [2.0 * value for value in rewards]
        if row == 1:
            rewards[-1] -= 0.4
        paid.append(rewards)
    if whitened:
        every = tensor([value for rewards in paid for value in rewards])
        deviation = float(every.var(correction=0).add(1e-8).sqrt())
        paid = [[value / deviation for value in rewards] for rewards in paid]
    advantages, returns, shaped_sum = [], [], 0.0
    for (prompt, response), rewards, difference in zip(rows, paid, differences, strict=True):
        states = policy(input_ids=tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
        values = head(states[len(prompt) - 1 : -1])[:, 0].tolist()
        kl = {
            "k1": difference,
            "k2": difference**2 / 2,
            "k3": (-difference).exp() - 1 + difference,
        }[estimator].tolist()
        shaped = [reward - 0.3 * nats for reward, nats in zip(rewards, kl, strict=True)]
        shaped_sum += sum(shaped)
        row_advantages, running = [0.0] * len(response), 0.0
        for t in reversed(range(len(response))):
            after = values[t + 1] if t + 1 < len(response) else 0.0
            running = shaped[t] + 0.9 * after - values[t] + 0.9 * 0.8 * running
            row_advantages[t] = running
        advantages.append(row_advantages)
        returns.append([a + v for a, v in zip(row_advantages, values, strict=True)])
    if whitened:
        every = tensor([value for row in advantages for value in row])
        centre, deviation = float(every.mean()), float(every.var(correction=0).add(1e-8).sqrt())
        advantages = [[(value - centre) / deviation for value in row] for row in advantages]
    for row, (_, response) in enumerate(rows):
        close(experience.old_logps[row, : len(response)], logps[row].detach())
        close(experience.advantages[row, : len(response)], advantages[row], 1e-4)
        close(experience.returns[row, : len(response)], returns[row], 1e-4)
        assert experience.advantages[row, len(response) :].abs().sum() == 0

    score = scores if level == "sequence" else [sum(row) for row in tokens]
    mean = sum(score) / 3
    assert statistics["reward/score"] == pytest.approx(mean, abs=1e-6)
    assert statistics["reward/score_std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in score) / 3), abs=1e-6)
    # 8 tokens in all; scaled by 2.
    assert statistics["reward/token"] == pytest.approx(2 * sum(score) / 8, abs=1e-6)
    assert statistics["reward/shaped"] == pytest.approx(shaped_sum / 3, abs=1e-4)
    # In nats of log pi - log pi_ref, whatever estimator is paid.
    assert statistics["kl/response"] == pytest.approx(sum(d.sum().item() for d in differences) / 3, abs=1e-4)
    assert statistics["response/tokens"] == pytest.approx(8 / 3)
    assert statistics["response/truncated"] == pytest.approx(1 / 3)


def test_absolute_positions(make_trainer, make_gpt2):
    trainer = make_trainer(model=make_gpt2(), ref_model=make_gpt2())
    rollout = fixed_rollout()
    experience, statistics = trainer.make_experience(rollout)
    for row, (prompt, response) in enumerate(rows_of(rollout)):
        close(experience.old_logps[row, : len(response)], plain_logps(trainer.policy, prompt, response, 1.0).detach())
    assert statistics["kl/response"] == pytest.approx(0, abs=1e-5)


def test_value_head_starts_at_zero(make_trainer):
    trainer = make_trainer()
    experience, statistics = trainer.make_experience(fixed_rollout())
    assert experience.old_values.abs().max() == 0
    assert statistics["value/explained_variance"] == 0
    trainer.train()
    assert trainer.model.value_head.weight.abs().max() > 0


def test_first_loss_is_minus_the_mean_advantage(make_trainer):
    # Nothing has moved yet: every ratio is 1, nothing is clipped, and whitened advantages have mean 0.
    trainer = make_trainer(epochs=1, rollout_batch_size=8, minibatch_size=8, updates=1)
    statistics = trainer.step(1)
    assert statistics["policy/loss"] == pytest.approx(0, abs=1e-6)
    assert statistics["policy/approximate_kl"] == pytest.approx(0, abs=1e-6)
    assert statistics["policy/clip_fraction"] == statistics["value/clip_fraction"] == 0


def moved_trainer(make_trainer, make_model, **config):
    """A trainer whose policy and values are no longer those that made the experience, and the experience."""
    trainer = make_trainer(**config)
    experience, _ = trainer.make_experience(trainer.sample(PROMPTS[:8]))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return trainer, experience


def gradients_of_minibatch(trainer, experience, chunk):
    """Statistics of one optimiser step and the gradients it would have used."""
    found = {}

    def keep(*args, **kwargs):
        for name, value in trainer.model.named_parameters():
            found[name] = value.grad.clone()

    trainer.optimizer.step = keep
    return trainer.minibatch_step(experience, chunk), found


CHUNK = tensor([5, 0, 7, 2, 3])


def test_minibatch_loss(make_trainer, make_model):
    config = {"clip_range": 0.05, "clip_range_value": 0.1, "max_grad_norm": 1e9, "temperature": 1.3}
    trainer, experience = moved_trainer(make_trainer, make_model, **config)
    rows = rows_of(experience.rollout)
    policy, value, policy_clipped, value_clipped, kl, tokens = 0.0, 0.0, 0, 0, 0.0, 0
    for row in CHUNK.tolist():
        prompt, response = rows[row]
        logps = plain_logps(trainer.policy, prompt, response, 1.3).tolist()
        states = trainer.policy(input_ids=tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
        values = trainer.model.value_head(states[len(prompt) - 1 : -1])[:, 0].tolist()
        for t, (logp, v) in enumerate(zip(logps, values, strict=True)):
            old, old_v, a, target = (
                float(field[row, t])
                for field in (experience.old_logps, experience.old_values, experience.advantages, experience.returns)
            )
            ratio = math.exp(logp - old)
            plain, clipped = -a * ratio, -a * min(max(ratio, 0.95), 1.05)
            policy += max(plain, clipped)
            policy_clipped += clipped > plain
            bounded = min(max(v, old_v - 0.1), old_v + 0.1)
            value += max((v - target) ** 2, (bounded - target) ** 2) / 2
            value_clipped += (bounded - target) ** 2 > (v - target) ** 2
            kl += ratio - 1 - (logp - old)
            tokens += 1
    statistics, _ = gradients_of_minibatch(trainer, experience, CHUNK)
    assert statistics["policy/loss"] == pytest.approx(policy / tokens, abs=1e-5)
    assert statistics["value/loss"] == pytest.approx(value / tokens, abs=1e-5)
    assert statistics["policy/clip_fraction"] == pytest.approx(policy_clipped / tokens, abs=1e-6)
    assert statistics["value/clip_fraction"] == pytest.approx(value_clipped / tokens, abs=1e-6)
    assert statistics["policy/approximate_kl"] == pytest.approx(kl / tokens, abs=1e-5)
    assert policy_clipped and value_clipped and policy_clipped < tokens and value_clipped < tokens


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_equal_the_minibatch(make_trainer, make_model, size):
    results = []
    for microbatch in (None, size):
        trainer, experience = moved_trainer(make_trainer, make_model, microbatch_size=microbatch, max_grad_norm=1e9)
        results.append(gradients_of_minibatch(trainer, experience, CHUNK))
    (whole, expected), (parts, found) = results
    for name, gradient in expected.items():
        close(found[name], gradient, 2e-6)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, abs=1e-5), name


def test_microbatches_are_of_like_length(make_trainer, make_model):
    trainer, experience = moved_trainer(make_trainer, make_model, microbatch_size=2, max_grad_norm=1e9)
    shorter = torch.arange(6) < tensor([3, 6, 1, 5, 2, 6, 4, 1]).unsqueeze(1)
    experience = replace(experience, rollout=experience.rollout._replace(response_mask=shorter))
    widths, losses = [], trainer._losses
    trainer._losses = lambda model, rollout, *rest: (
        widths.append(rollout.response_ids.shape[1]),
        losses(model, rollout, *rest),
    )[1]
    trainer.minibatch_step(experience, tensor([5, 0, 2, 3, 6]))  # of 6, 3, 1, 5 and 4 tokens
    assert widths == [3, 5, 6]


def test_inference_in_batches_changes_nothing(make_trainer):
    uniform = torch.rand(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for size in (None, 3):
        trainer = make_trainer(count, inference_batch_size=size)
        seen = []
        trainer.policy.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(len(output.logits)))
        rollout = trainer.sample(PROMPTS[:8], uniform)
        experience, statistics = trainer.make_experience(rollout)
        found.append((rollout, experience, statistics, trainer.logps(rollout)))
        assert max(seen) == (size or 8)
    (whole, expected, one, logps), (parts, experience, several, logps_of_parts) = found
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    mask = whole.response_mask
    close(logps_of_parts[mask], logps[mask])
    for name in ("old_logps", "old_values", "advantages", "returns"):
        close(getattr(experience, name)[mask], getattr(expected, name)[mask])
    assert several == pytest.approx(one, abs=1e-5)


def test_gradient_is_clipped(make_trainer, make_model):
    trainer, experience = moved_trainer(make_trainer, make_model, max_grad_norm=1e9)
    statistics, _ = gradients_of_minibatch(trainer, experience, CHUNK)
    limit = statistics["gradient/norm"] / 2
    trainer, experience = moved_trainer(make_trainer, make_model, max_grad_norm=limit)
    statistics, gradients = gradients_of_minibatch(trainer, experience, CHUNK)
    assert statistics["gradient/norm"] == pytest.approx(2 * limit, rel=1e-5)  # the norm before clipping
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert norm == pytest.approx(limit, rel=1e-4)


# --- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"whiten_rewards": True, "reward_scale": "none"}])
def test_reward_at_the_last_token_equals_the_sequence_reward(make_trainer, options):
    logs = []
    results = [
        trained(make_trainer(reward, log=lambda statistics, update: logs.append(statistics), **options))
        for reward in (share, at_last_token)
    ]
    assert same(*results)
    for a, b in zip(logs[:2], logs[2:], strict=True):
        assert {k: v for k, v in a.items() if "time" not in k} == {k: v for k, v in b.items() if "time" not in k}


def test_a_reward_elsewhere_is_another_reward(make_trainer):
    # The same total, at the first token: the equality above is not because rewards do nothing.
    def at_first_token(rollout):
        return torch.cat([share(rollout)[:, None], torch.zeros_like(rollout.response_mask[:, 1:])], 1)

    assert not same(trained(make_trainer(share, gamma=0.9)), trained(make_trainer(at_first_token, gamma=0.9)))


def test_same_seed_same_parameters(make_trainer):
    first, again, other = (trained(make_trainer(count, seed=seed)) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer):
    results, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(count, gradient_checkpointing=checkpointing, updates=1)
        forwards = []
        trainer.policy.model.layers[0].input_layernorm.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        rollout = trainer.sample(PROMPTS[:8])
        experience, _ = trainer.make_experience(rollout)
        forwards.clear()
        trainer.update(experience)
        calls.append(len(forwards))
        results.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    assert calls == [4, 8]  # 2 epochs of 2 minibatches; each layer runs again for the backward pass
    for name, value in results[0].items():
        close(results[1][name], value, 1e-5)


def test_gradient_checkpointing_of_a_value_model(make_trainer, make_model):
    calls = []
    for checkpointing in (False, True):
        critic = make_model(3, "token", num_labels=1)
        trainer = make_trainer(
            count, critic=critic, value_model="separate", gradient_checkpointing=checkpointing, updates=1
        )
        forwards = []
        critic.model.layers[0].input_layernorm.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        experience, _ = trainer.make_experience(trainer.sample(PROMPTS[:8]))
        forwards.clear()
        trainer.update(experience)
        calls.append(len(forwards))
    assert calls == [4, 8]


def test_dropout_of_a_layer_itself_is_off_with_gradient_checkpointing(make_trainer, make_model):
    """As in OPT, whose layers apply dropout by their own flag, which checkpointing needs to be that of training."""
    model = make_model(0)
    trainer = make_trainer(count, model=model, gradient_checkpointing=True, updates=1)
    model.model.layers[0].dropout = 0.1
    trainer.step(1)
    assert model.model.layers[0].dropout == 0.0


@pytest.mark.parametrize("adapter", [False, True])
def test_dropout_is_off(make_trainer, make_model, adapter):
    # Dropout would make the old policy differ from itself; the first ratios must be 1.
    model = make_model(0, attention_dropout=0.5).train()
    trainer = make_trainer(
        model=model, epochs=1, minibatch_size=8, updates=1, ref_model=None if adapter else "same",
        peft_config=lora(dropout=0.5) if adapter else None, gradient_checkpointing=not adapter,
    )  # fmt: skip
    if adapter:
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    assert trainer.step(1)["policy/approximate_kl"] == pytest.approx(0, abs=1e-7)


# --- statistics, schedules, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"kl_controller": "adaptive", "reward_scale": "none"}, {"clip_range_value": None}]
)
def test_every_statistic_is_in_the_glossary_and_back(make_trainer, options):
    logs = {}
    trainer = make_trainer(log=lambda statistics, update: logs.update({update: statistics}), **options)
    trainer.train()
    assert list(logs) == [1, 2]
    for statistics in logs.values():
        assert set(statistics) == set(GLOSSARY)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in statistics.values())
    # 2 epochs of 2 minibatches a round.
    assert [logs[update]["count/gradient_updates"] for update in logs] == [4, 8]
    tokens = [logs[update]["response/tokens"] * 8 for update in logs]
    assert [logs[update]["count/response_tokens"] for update in logs] == [tokens[0], sum(tokens)]
    assert all(text.strip() for text in GLOSSARY.values())


def test_callbacks_are_told_each_update(make_trainer):
    seen = []
    trainer = make_trainer()
    trainer._callbacks.append(lambda who, update: seen.append((who is trainer, update, who.gradient_updates)))
    trainer.train()
    assert seen == [(True, 0, 0), (True, 1, 4), (True, 2, 8)]


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_updates": 2}, [1 / 2, 1, 1, 1, 1, 1]),
        # After the warm-up the four updates left fall in equal steps from the full rate towards 0.
        ({"warmup_updates": 2, "schedule": "linear"}, [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ({"schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
def test_learning_rate(make_trainer, options, factors):
    trainer = make_trainer(updates=6, value_learning_rate=3e-2, **options)
    found = []
    for update in range(1, 7):
        trainer._set_learning_rate(update)
        found.append([group["lr"] for group in trainer.optimizer.param_groups])
    close(tensor(found), [[1e-2 * factor, 3e-2 * factor] for factor in factors], 1e-9)


def test_value_learning_rate_of_zero(make_trainer):
    trainer = make_trainer(value_learning_rate=0.0)
    trainer.train()
    assert trainer.model.value_head.weight.abs().max() == 0


def test_weight_decay(make_trainer):
    # With a learning rate of 0.01 and decay of 10, a parameter without gradient shrinks by 0.9 at each of 4 steps.
    trainer = make_trainer(weight_decay=10.0, updates=1)
    before = trainer.policy.model.embed_tokens.weight.detach().clone()
    used = []
    trainer.reward = lambda rollout: used.append(rollout.input_ids.flatten()) or share(rollout)
    trainer.train()
    unused = ~torch.isin(torch.arange(30), torch.cat(used))
    assert bool(unused.any())
    close(trainer.policy.model.embed_tokens.weight[unused].detach(), 0.9**4 * before[unused], 1e-6)


def test_prompts_come_once_a_pass(make_trainer):
    trainer = make_trainer()
    drawn = [tuple(prompt) for _ in range(3) for prompt in trainer._next_prompts()]
    passes = [sorted(drawn[:12]), sorted(drawn[12:])]
    assert passes == [sorted(map(tuple, PROMPTS))] * 2
    assert drawn[:12] != drawn[12:]


def test_reward_scale(make_trainer):
    # The factor is 1 / deviation of the scores, so a reward ten times as large trains the same model.
    one, ten = (make_trainer(lambda rollout, k=k: k * share(rollout)) for k in (1, 10))
    results = [trained(one), trained(ten)]
    assert one.reward_factor == pytest.approx(10 * ten.reward_factor, rel=1e-5)
    for name, value in results[0].items():
        close(results[1][name], value, 1e-3)
    scores = []
    trainer = make_trainer(lambda rollout: scores.append(share(rollout)) or share(rollout))
    factor = trainer._calibrate()
    assert sum(len(score) for score in scores) == 12
    assert factor == pytest.approx(1 / float(torch.cat(scores).std(correction=0)), rel=1e-5)
    trainer = make_trainer(reward_scale="none")
    trainer.train()
    assert trainer.reward_factor == 1.0


def test_adaptive_coefficient(make_trainer):
    logs = []
    trainer = make_trainer(
        kl_controller="adaptive", kl_coef=0.1, kl_target=1e-3, kl_horizon=100.0, updates=3,
        log=lambda statistics, update: logs.append(statistics),
    )  # fmt: skip
    trainer.train()
    # 8 responses a round: * 1.016 where the KL is above the target, * 0.984 where it is below (as in the first round,
    # where it is 0); the coefficient that is logged is the one that was paid.
    expected = [0.1]
    for statistics in logs:
        expected.append(expected[-1] * (1.016 if statistics["kl/response"] > 1.2e-3 else 0.984))
    assert [statistics["kl/coef"] for statistics in logs] == pytest.approx(expected[:3], rel=1e-6)
    assert trainer.kl_controller.value == pytest.approx(expected[3], rel=1e-6)
    assert logs[1]["kl/response"] > 1.2e-3
    # Half of the batch is horizon enough: a round changes the coefficient by 0.2 * 8 / 4 at most.
    trainer = make_trainer(kl_controller="adaptive", kl_coef=0.1, kl_horizon=4.0)
    trainer.kl_controller.update(0.0, 8)
    assert trainer.kl_controller.value == pytest.approx(0.06)
    make_trainer(kl_horizon=1.6)  # which the fixed coefficient does not read


def test_kl_penalty_holds_the_policy_back(make_trainer):
    kl = []
    for coefficient in (0.0, 2.0):
        logs = []
        make_trainer(
            count, kl_coef=coefficient, learning_rate=3e-3, updates=12, log=lambda s, _, logs=logs: logs.append(s)
        ).train()
        kl.append(logs[-1]["kl/response"])
    assert kl[1] < kl[0] / 2


# --- models -----------------------------------------------------------------------------------------------------------


def test_separate_value_model(make_trainer, make_model, tmp_path):
    critic = make_model(3, kind="token", num_labels=1)
    trainer = make_trainer(count, critic=critic, value_model="separate")
    experience, _ = trainer.make_experience(fixed_rollout())
    for row, (prompt, response) in enumerate(rows_of(fixed_rollout())):
        values = critic(input_ids=tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, 0]
        close(experience.old_values[row, : len(response)], values.detach())
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    after = trained(trainer)
    for part in ("policy.", "value_model."):
        assert not same(*({k: v for k, v in where.items() if k.startswith(part)} for where in (before, after)))
    trainer.save_model()
    rollout = fixed_rollout()
    expected = response_logps(trainer.policy, rollout).detach()
    close(response_logps(load_causal_lm(tmp_path / "out"), rollout).detach(), expected, 1e-6)


def test_value_head_disturbs_no_policy_gradient(make_trainer):
    # With value_coef 0 the head learns nothing, and the policy learns from the policy loss alone.
    trainer = make_trainer(count, value_coef=0.0)
    trainer.train()
    assert trainer.model.value_head.weight.abs().max() == 0


@pytest.fixture
def any_precision():
    """accelerate keeps the precision of the first trainer of a process for all that follow."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16(make_trainer, monkeypatch, any_precision, compiled):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    logs = []
    told = {"log": lambda statistics, update: logs.append(statistics)}
    trainer = make_trainer(bf16=True, compile=compiled, reuse_sampling=compiled, **told)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(math.isfinite(value) for value in logs[-1].values())


def test_in_bf16_all_models_attend_in_float32_on_the_cpu(make_trainer, make_model, monkeypatch, any_precision):
    seen = []

    def attention(query, *rest, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return attend(query, *rest, **options)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    policy, reference = make_model(0), make_model(0)
    critic, scorer = (make_model(3, kind="token", num_labels=count) for count in (1, 3))
    make_trainer(
        reward_function(scorer, "token"), model=policy, ref_model=reference, critic=critic, value_model="separate",
        bf16=True,
    ).train()  # fmt: skip
    assert set(seen) == {(torch.float32, False)}
    assert {model.config._attn_implementation for model in (policy, reference, critic, scorer)} == {"sdpa_float32"}
    # Another attention stays as it is.
    eager = make_model(0)
    eager.set_attn_implementation("eager")
    make_trainer(model=eager, bf16=True)
    assert eager.config._attn_implementation == "eager"


REUSED = {
    "value head": {},
    "temperature, batches": {"reward": count, "temperature": 0.7, "inference_batch_size": 3},
    "value model": {"value_model": "separate"},
    "group": {"advantage": "group", "group_size": 2},
    "adapter": {"peft_config": lora(), "ref_model": None},
}


@pytest.mark.parametrize("case", REUSED)
def test_reused_sampling_is_a_pass_up_to_rounding(make_trainer, make_model, case):
    def make(**more):
        options = {"response_length": 20, **REUSED[case], **more}
        if options.get("value_model") == "separate":
            options["critic"] = make_model(3, kind="token", num_labels=1)
        return make_trainer(**options)

    trainer = make(reuse_sampling=True)
    trainer.step(1)  # or the values would all be 0
    recorder = trainer._recorder
    rollout = trainer.sample([PROMPTS[row % 12] for row in range(8)], recorder=recorder)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 1
    experience, statistics = trainer.make_experience(rollout, recorder.take())
    expected, other = trainer.make_experience(rollout)
    for name in ("old_logps", "old_values", "advantages", "returns"):
        found, wanted = (getattr(one, name)[rollout.response_mask] for one in (experience, expected))
        close(found, wanted)
        assert wanted.abs().max() > 1e-2, name
    assert statistics == pytest.approx(other, rel=1e-4, abs=1e-5)
    with_, without = trained(make(reuse_sampling=True)), trained(make())
    assert all(torch.allclose(with_[name], without[name], atol=2e-3) for name in without)


def test_reused_sampling_saves_the_pass(make_trainer, monkeypatch):
    def never(*_):
        raise AssertionError("a pass over the responses")

    trainer = make_trainer(reuse_sampling=True)
    monkeypatch.setattr(trainer, "_old", never)
    trainer.train()
    with pytest.raises(AssertionError, match="a pass over the responses"):
        trainer.make_experience(fixed_rollout())


def test_reused_sampling_needs_the_policy_itself(make_trainer, monkeypatch):
    monkeypatch.setattr("fgalign.ppo_trainer.choose_engine", lambda name, own: "vllm")
    with pytest.raises(ConfigError, match="reuse_sampling: expected one process and rollout_engine 'transformers'"):
        make_trainer(reuse_sampling=True)


COMPILED = [
    {},
    {"reward": count, "epochs": 1, "temperature": 0.7, "microbatch_size": 2},
    {"reuse_sampling": True, "temperature": 0.7},
]


@pytest.mark.parametrize("options", COMPILED)
def test_compiled_is_the_same_up_to_rounding(make_trainer, make_model, monkeypatch, options):
    # Traced and differentiated ahead of time, as ever, but run op by op: writing kernels takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    logs = {False: [], True: []}
    for compiled, kept in logs.items():
        policy, reference = (make_model(0, num_hidden_layers=1) for _ in range(2))
        told = {"log": lambda s, _, kept=kept: kept.append(s), "compile": compiled}
        make_trainer(model=policy, ref_model=reference, **told, **options).train()
    for plain, fast in zip(logs[False], logs[True], strict=True):
        for name in set(plain) - {"time/rollout", "time/scoring", "time/update"}:
            assert fast[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-4), name
    assert logs[True][-1]["policy/loss"] != 0


def test_compiled_for_real(make_trainer, make_model):
    # The default backend, which writes and compiles C++; one layer, and the update alone, to keep that short.
    plain, fast = (
        make_trainer(count, model=make_model(0, num_hidden_layers=1), compile=compiled) for compiled in (False, True)
    )
    experience, _ = plain.make_experience(fixed_rollout())
    chunk = torch.arange(len(fixed_rollout().truncated))
    expected = plain.minibatch_step(experience, chunk)
    assert fast.minibatch_step(experience, chunk) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_compiled_positions_are_computed_once_a_pass(make_trainer, make_model):
    counted = {}

    def count_in(name):
        def compiler(graph, _):
            targets = [node.target for node in graph.graph.nodes]
            counted[name] = targets.count(torch.ops.aten.cos.default)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=count_in("forward"),
        bw_compiler=count_in("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    plain, hooked = make_model(0), make_model(0)
    make_trainer(model=hooked, compile=True)
    ids = torch.tensor([[2, 3, 4, 5]])
    found = {}
    for name, model in {"plain": plain, "hooked": hooked}.items():
        torch._dynamo.reset()  # after eight models torch would run the next one without compiling
        logits = torch.compile(model, backend=backend)(input_ids=ids, use_cache=False).logits
        logits.sum().backward()
        found[name] = (logits.detach(), dict(counted))
    assert torch.equal(found["plain"][0], found["hooked"][0])
    assert found["hooked"][1] == {"forward": 1, "backward": 0}
    assert found["plain"][1]["backward"] > 0  # what the hook is for


def test_a_reward_model_is_compiled_too(make_trainer, make_model):
    model = make_model(3, kind="sequence", num_labels=1)
    make_trainer(reward_function(model, "sequence"))
    assert model._compiled_call_impl is None
    make_trainer(reward_function(model, "sequence"), compile=True)
    assert model._compiled_call_impl is not None


def test_compiled_adapter_can_be_switched_off(make_trainer, make_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rollout = fixed_rollout()
    mask = rollout.response_mask
    model = make_model(0, num_hidden_layers=1)
    before = response_logps(model, rollout)[mask].detach()
    trainer = make_trainer(count, model=model, ref_model=None, peft_config=lora(), compile=True)
    with torch.no_grad():
        for name, value in trainer.policy.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    close(trainer.ref_logps(rollout)[mask], before)
    assert (trainer.logps(rollout)[mask] - before).abs().max() > 1e-3


def test_compiling_needs_a_compiler(make_trainer, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"compile: .* needs a C[+][+] compiler on the CPU, found none"):
        make_trainer(compile=True)


@pytest.mark.parametrize(("options", "fused"), [({}, True), ({"fused": True}, True), ({"fused": False}, None)])
def test_fused_optimizer(make_trainer, options, fused):
    assert make_trainer(**options).optimizer.param_groups[0]["fused"] is fused


def test_fused_optimizer_steps_the_same_up_to_rounding(make_trainer):
    plain, fused = (trained(make_trainer(count, fused=choice)) for choice in (False, True))
    for name, value in plain.items():
        close(fused[name], value, 1e-4)


def test_lora(make_trainer, make_model, tmp_path):
    base = make_model(0)
    trainer = make_trainer(count, ref_model=None, peft_config=lora(), updates=3)
    rollout = fixed_rollout()
    mask = rollout.response_mask
    before = response_logps(base, rollout)[mask].detach()
    close(trainer.ref_logps(rollout)[mask], before)
    start = {name: value.detach().clone() for name, value in trainer.policy.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.policy.named_parameters() if not torch.equal(value, start[name])}
    assert moved and all("lora_" in name for name in moved)
    close(trainer.ref_logps(rollout)[mask], before)  # still the model without its adapter
    after = response_logps(trainer.policy, rollout)[mask].detach()
    assert (after - before).abs().max() > 1e-2
    trainer.save_model()
    saved = tmp_path / "out"
    assert (saved / "model.safetensors").exists() and not list(saved.glob("adapter*"))
    close(response_logps(load_causal_lm(saved), rollout)[mask].detach(), after)


def test_an_adapter_in_bf16_leaves_the_frozen_weights_in_bf16(make_trainer, make_model, tmp_path, any_precision):
    base = make_model(0)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = make_trainer(count, model=base, ref_model=None, peft_config=lora(), bf16=True, updates=2)
    types = {(parameter.requires_grad, parameter.dtype) for parameter in trainer.policy.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    trainer.train()
    trainer.save_model()
    saved = load_causal_lm(tmp_path / "out").state_dict()
    assert set(saved) == set(start)
    for name, value in saved.items():
        frozen = start[name].bfloat16().float()
        if "_proj" not in name:
            assert torch.equal(value, frozen)
        elif "v_proj" in name:
            # The adapter's part is added in float32: in bf16 most of it would be gone.
            assert not torch.equal(value, frozen) and not torch.equal(value, value.bfloat16().float())


class Calls(TorchDispatchMode):
    """Keeps what torch calls, and with which arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "expected"), [(False, 14), (True, 0)])
def test_a_pass_with_an_adapter_casts_no_frozen_weight(make_trainer, make_model, monkeypatch, frozen, expected):
    """Two layers of seven linear ones, whose weights autocast would cast at each token."""
    if not frozen:
        monkeypatch.setattr("fgalign.ppo_trainer.freeze_in_bf16", lambda model: None)
    trainer = make_trainer(count, model=make_model(0), ref_model=None, peft_config=lora(), bf16=True)
    weights = {id(each) for each in trainer.policy.parameters() if not each.requires_grad and each.dim() == 2}
    with torch.no_grad(), trainer._autocast(), Calls() as seen:
        hidden = trainer.policy.get_base_model().model(input_ids=tensor([[5, 6, 7]])).last_hidden_state
    casts = [args for function, args in seen.calls if function is torch.ops.aten._to_copy.default]
    assert sum(id(args[0]) in weights for args in casts) == expected
    assert hidden.dtype == (torch.bfloat16 if frozen else torch.float32)


@pytest.mark.parametrize("at_once", [False, True])
def test_an_output_layer_that_is_not_trained_makes_one_product(make_trainer, make_model, monkeypatch, at_once):
    if not at_once:  # what torch does by itself: a product a response
        monkeypatch.setattr("fgalign.ppo_trainer.project_at_once", lambda model: None)
    reference = make_model(0).requires_grad_(False)
    trainer = make_trainer(count, ref_model=reference)
    rollout = fixed_rollout()
    with Calls() as seen:
        found = trainer.ref_logps(rollout)
    products = [
        args for function, args in seen.calls if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    ]
    shapes = [tuple(left.shape[:-1]) for left, right in products if right.shape[-1] == reference.config.vocab_size]
    # Logits before each of the four tokens, and those after the last, of three responses.
    assert shapes == ([(15,)] if at_once else [(3, 5)])
    close(found[rollout.response_mask], response_logps(make_model(0), rollout)[rollout.response_mask].detach())


@pytest.mark.parametrize("options", [{"ref_model": None}, {}, {"advantage": "group", "group_size": 2}])
def test_an_adapter_goes_on_training_after_the_policy_is_saved(make_trainer, tmp_path, options):
    plain = trained(make_trainer(count, peft_config=lora(), updates=2, **options))
    trainer = make_trainer(count, peft_config=lora(), updates=2, **options)
    trainer._callbacks.append(lambda trainer, update: trainer.save_model(tmp_path / f"update-{update}"))
    assert same(plain, trained(trainer))
    saved = [response_logps(load_causal_lm(tmp_path / f"update-{n}"), fixed_rollout()).detach() for n in range(3)]
    assert not torch.equal(saved[0], saved[1]) and not torch.equal(saved[1], saved[2])


def test_saved_policy(make_trainer, tmp_path):
    trainer = make_trainer(count)
    trainer.train()
    trainer.save_model(tmp_path / "elsewhere")
    rollout = fixed_rollout()
    expected = response_logps(trainer.policy, rollout).detach()
    close(response_logps(load_causal_lm(tmp_path / "elsewhere"), rollout).detach(), expected, 1e-6)


def test_reference_stays(make_trainer, make_model):
    trainer = make_trainer(count)
    trainer.train()
    for value, expected in zip(trainer.ref_model.parameters(), make_model(0).parameters(), strict=True):
        assert torch.equal(value, expected)


def test_a_second_training_keeps_the_rewards_factor(make_trainer):
    trainer = make_trainer(count)
    trainer.train()
    factor = trainer.reward_factor
    trainer.train()
    assert trainer.reward_factor == factor != 1.0


# --- errors -----------------------------------------------------------------------------------------------------------


def test_models_that_would_not_learn_are_refused(make_trainer, make_model):
    model = make_model(0)
    for adapter in (None, lora()):
        with pytest.raises(ConfigError, match="ref_model: expected another object than model, or the KL is always 0"):
            make_trainer(model=model, ref_model=model, peft_config=adapter)
    with pytest.raises(
        ConfigError, match=r"expected float32 for every parameter that is trained, found torch.bfloat16"
    ):
        make_trainer(model=make_model(0).bfloat16())
    # What is not trained may be small: an adapter over a model in bf16.
    make_trainer(model=make_model(0).bfloat16(), peft_config=lora())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda r: torch.full(r.truncated.shape, math.nan), "reward: expected finite numbers, found NaN or infinity"),
        (lambda r: torch.full(r.response_mask.shape, math.inf), "reward: expected finite numbers, found NaN"),
        (lambda r: share(r)[:3], r"reward: expected shape \(8,\) .* or \(8, \d\) .*, found \(3,\)"),
        (lambda r: share(r).tolist(), r"reward: expected a tensor, found list; return torch\.tensor\(\.\.\.\)"),
        (lambda r: share(r)[:, None, None], r"reward: expected shape .*, found \(8, 1, 1\)"),
        (lambda r: torch.full(r.truncated.shape, 0.25), r"reward_scale: the reward is the same \(0\.25\) for all 12"),
        # Too large for float32 to average without rounding.
        (lambda r: torch.full(r.truncated.shape, 1000.1), r"reward_scale: the reward is the same \(1000\) for all 12"),
    ],
)
def test_bad_reward(make_trainer, reward, message):
    with pytest.raises(TrainingError, match=message):
        make_trainer(reward).train()


def test_nan_outside_the_response_is_fine(make_trainer):
    make_trainer(count, updates=1).train()


def test_loss_that_is_not_finite(make_trainer):
    trainer = make_trainer()
    experience, _ = trainer.make_experience(fixed_rollout())
    broken = Experience(**{**vars(experience), "returns": torch.full_like(experience.returns, math.inf)})
    with pytest.raises(
        TrainingError, match=r"PPO loss is (inf|nan) after 0 gradient updates; expected a finite number"
    ):
        trainer.minibatch_step(broken, tensor([0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule: expected one of constant, linear, found 'cosine'"),
        ({"value_model": "none"}, "value_model: expected one of head, separate, found 'none'"),
        (
            {"kl_controller": "adaptive", "kl_horizon": 1.6},
            r"kl_horizon: expected more than 0\.2 \* rollout_batch_size 8 with kl_controller adaptive, .*, found 1\.6",
        ),
        ({"kl_controller": "x"}, "kl_controller: expected one of fixed, adaptive, found 'x'"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, found 'k4'"),
        ({"reward_scale": "x"}, "reward_scale: expected one of reference_std, none, found 'x'"),
        ({"updates": 0}, "updates: expected at least 1, found 0"),
        ({"response_length": 0}, "response_length: expected at least 1, found 0"),
        ({"microbatch_size": 0}, "microbatch_size: expected at least 1, found 0"),
        ({"calibration_prompts": 0}, "calibration_prompts: expected at least 1, found 0"),
        ({"inference_batch_size": 0}, "inference_batch_size: expected at least 1, found 0"),
        ({"rollout_engine": "x"}, "rollout_engine: expected one of transformers, vllm, auto, found 'x'"),
        ({"vllm_memory": 1.5}, "vllm_memory: expected a share between 0 and 1, found 1.5"),
        ({"minibatch_size": 3}, "minibatch_size: expected a divisor of rollout_batch_size 8, found 3"),
        ({"rollout_batch_size": 16}, "train_dataset: 12 prompts, fewer than rollout_batch_size 16"),
        ({"temperature": 0.0}, "temperature: expected above 0 .*, found 0.0"),
        (
            {"calibration_prompts": 1},
            "calibration_prompts: expected at least 2 prompts with reward_scale ref.* found 1: ",
        ),
        (
            {"prompts": [[3]], "rollout_batch_size": 1, "minibatch_size": 1},
            "train_dataset: expected at least 2 prompts with reward_scale reference_std, found 1: one response has no",
        ),
        ({"value_model": "separate"}, "value_model: 'separate' in args, but none given"),
        ({"ref_model": None}, "ref_model: None works only with peft_config"),
    ],
)
def test_bad_arguments(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


# --- learning ---------------------------------------------------------------------------------------------------------


def even_share(rollout):
    """A score a response: the share of its tokens with an even id."""
    return ((rollout.response_ids % 2 == 0) & rollout.response_mask).sum(1) / rollout.response_mask.sum(1)


def even_count(rollout):
    """A reward a token: 1 for an even id."""
    return (rollout.response_ids % 2 == 0).float()


@pytest.mark.parametrize("reward", [even_share, even_count])
def test_it_learns(make_trainer, reward):
    # About half of the tokens pay at first, so that no processor's rounding decides whether the policy meets them: with
    # 12 seeds it came from 0.51-0.66 to 0.77-1.00 within 15 updates.
    logs = []
    make_trainer(
        reward, updates=20, rollout_batch_size=12, minibatch_size=6, epochs=4,
        log=lambda statistics, update: logs.append(statistics),
    ).train()  # fmt: skip
    shares = [
        statistics["reward/score"] / (1 if reward is even_share else statistics["response/tokens"])
        for statistics in logs
    ]
    assert sum(shares[-3:]) / 3 > 0.75, shares


def test_a_gradient_that_is_not_finite_stops_the_training(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(float("nan")))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="PPO's gradient is nan after 0 gradient updates, with losses that are"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a text"] * 12, "expected a list of prompts, each a list of token ids, found list of str"),
        ([[3, 4], []] * 6, "prompt 1: expected token ids, found none"),
        ([[3.0, 4.0]] * 12, r"prompt 0: expected token ids, found 3\.0, 4\.0"),
        ([[3], [0, 0, 4]] * 6, r"prompt 1: expected no padding \(token 0\), found 0, 0, 4; give prompts as they are"),
        ([[3, 4, 0]] * 12, "prompt 0: expected no padding"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused(prompts, message):
    with pytest.raises(ConfigError, match=f"train_dataset: {message}"):
        check_prompts(prompts, 0)


def test_prompts_of_numpy_are_prompts_of_python(make_trainer):
    import numpy as np

    arrays = [list(np.array(prompt)) for prompt in PROMPTS]
    assert same(*(trained(make_trainer(prompts=prompts, updates=1)) for prompts in (PROMPTS, arrays)))


def test_one_prompt_is_enough_without_the_scale(make_trainer):
    make_trainer(
        prompts=[[3, 4]], rollout_batch_size=1, minibatch_size=1, calibration_prompts=1, reward_scale="none", updates=1
    ).train()


@pytest.mark.parametrize("name", ["learning_rate", "kl_coef", "clip_range", "lam", "gamma", "value_coef"])
def test_numbers_that_cannot_work_are_refused(make_trainer, name):
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"{name}: expected a number of at least 0, found"):
            make_trainer(**{name: value})


def test_a_model_with_a_state_is_refused(make_trainer, make_model):
    model = make_model()
    model._is_stateful = True
    with pytest.raises(ConfigError, match="model: expected a model with a key-value cache, found LlamaForCausalLM"):
        make_trainer(model=model)


def test_learned_positions_end(make_trainer, make_model, make_gpt2):
    # The longest prompt has 4 tokens, a response up to 6.
    make_trainer(model=make_gpt2(n_positions=10), ref_model=make_gpt2(n_positions=10), updates=1).train()
    message = (
        "train_dataset: expected at most 9 tokens of prompt and response, the positions that {} has learned, found 10, "
        "6 of them response_length; shorten either"
    )
    short = make_gpt2(n_positions=9)
    for models, name in (
        ({"model": short}, "model"),
        ({"ref_model": short}, "ref_model"),
        ({"critic": make_gpt2("token", n_positions=9, num_labels=1), "value_model": "separate"}, "value_model"),
    ):
        with pytest.raises(ConfigError, match=message.format(name)):
            make_trainer(**models)
    make_trainer(model=make_model(max_position_embeddings=9))  # rotary positions have no end


def test_values_are_not_rounded_to_bf16(make_trainer):
    model = make_trainer().model
    torch.nn.init.normal_(model.value_head.weight)
    ids = torch.randint(model.policy.config.vocab_size, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        values = model(ids, torch.ones_like(ids), 4)[1]
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_a_value_model_and_a_reward_model_keep_float32_outputs(make_trainer, make_model):
    critic, scorer = make_model(3, kind="token", num_labels=1), make_model(4, kind="sequence", num_labels=1)
    trainer = make_trainer(reward_function(scorer, "sequence"), critic=critic, value_model="separate")
    ids = torch.randint(5, critic.config.vocab_size, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = (trainer.model.separate_values(ids, torch.ones_like(ids), 4), scorer(input_ids=ids).logits)
    for values in outputs:
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_a_later_trainer_of_another_precision_changes_no_earlier_one(make_trainer):
    first = make_trainer(bf16=True)
    second = make_trainer(bf16=False)
    for trainer, enabled in ((first, True), (second, False), (first, True)):
        with trainer._autocast():
            assert torch.is_autocast_enabled("cpu") == enabled
            assert not enabled or torch.get_autocast_dtype("cpu") == torch.bfloat16
