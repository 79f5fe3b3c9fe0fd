"""Leave-one-out advantages: by hand, against RLOO, and in the trainer, which then has no value model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.core.rollout import Rollout
from fgalign.errors import ConfigError
from fgalign.losses.ppo import group_advantages
from fgalign.ppo_trainer import GLOSSARY, FineGrainedPPOConfig, FineGrainedPPOTrainer

WANTED = 7
PROMPTS = [[2 + (3 * n + k) % 28 for k in range(1 + n % 4)] for n in range(6)]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


# --- the function -----------------------------------------------------------------------------------------------------


def test_by_hand():
    # Lengths 3, 1, 2; gamma 1/2. Rewards-to-go: 1 + 3.5 / 2 = 2.75, 2 + 3 / 2 = 3.5, 3; 4; 0 + 2 / 2 = 1, 2.
    x = math.nan
    rewards = tensor([[1.0, 2.0, 3.0], [4.0, x, x], [0.0, 2.0, x]])
    mask = tensor([[True, True, True], [True, False, False], [True, True, False]])
    advantages, to_go = group_advantages(rewards, mask, 3, gamma=0.5)
    close(to_go, [[2.75, 3.5, 3.0], [4.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    # Baselines at the first token: (4 + 1) / 2, (2.75 + 1) / 2, (2.75 + 4) / 2; at the second, where the middle
    # response has ended: (0 + 2) / 2 and (3.5 + 0) / 2; at the third: 0.
    close(advantages, [[0.25, 2.5, 3.0], [2.125, 0.0, 0.0], [-2.375, 0.25, 0.0]])


def test_groups_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 4, generator=generator)
    mask = torch.ones(6, 4, dtype=torch.bool)
    whole, _ = group_advantages(rewards, mask, 2, gamma=0.9)
    for start in (0, 2, 4):
        part, _ = group_advantages(rewards[start : start + 2], mask[:2], 2, gamma=0.9)
        close(whole[start : start + 2], part, 0)
    # Two responses, equally long: what one gains the other loses.
    close(whole[0::2] + whole[1::2], torch.zeros(3, 4))


def test_equals_rloo():
    # RLOO: the score minus the mean score of the others, at every token of the response.
    scores = tensor([1.0, 4.0, -2.0, 0.5, 0.0, 0.25])
    rewards = torch.zeros(6, 5)
    rewards[:, -1] = scores
    advantages, _ = group_advantages(rewards, torch.ones(6, 5, dtype=torch.bool), 3, gamma=1.0)
    expected = [1 - (4 - 2) / 2, 4 - (1 - 2) / 2, -2 - (1 + 4) / 2, 0.5 - 0.25 / 2, -0.75 / 2, 0.25 - 0.5 / 2]
    close(advantages, tensor(expected)[:, None].expand(6, 5))


def test_the_first_token_is_rloo_whatever_the_lengths():
    scores, lengths = tensor([1.0, 4.0, -2.0]), (1, 4, 2)
    rewards, mask = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    for row, length in enumerate(lengths):
        rewards[row, length - 1] = scores[row]
        mask[row, :length] = True
    advantages, _ = group_advantages(rewards, mask, 3, gamma=1.0)
    close(advantages[:, 0], [0.0, 4.5, -4.5])
    # The others have ended: nothing is left to compare with.
    close(advantages[1], [4.5, 4 - (0 - 2) / 2, 4.0, 4.0])


@pytest.mark.parametrize("size", [0, 1, 4])
def test_bad_group_size(size):
    with pytest.raises(ValueError, match=f"group_size: expected 2 or more and a divisor of the 6 rows, found {size}"):
        group_advantages(torch.zeros(6, 2), torch.ones(6, 2, dtype=torch.bool), size, 1.0)


# --- the trainer ------------------------------------------------------------------------------------------------------


def share(rollout):
    return ((rollout.response_ids == WANTED) & rollout.response_mask).sum(1) / rollout.response_mask.sum(1)


def count(rollout):
    return (rollout.response_ids == WANTED).float().where(rollout.response_mask, tensor(math.nan))


@pytest.fixture
def make_trainer(make_model, ids, tmp_path):
    def make(reward=count, model=None, ref_model=None, critic=None, log=None, **config):
        settings = {
            "output_dir": str(tmp_path / "out"), "updates": 2, "rollout_batch_size": 8, "epochs": 2,
            "minibatch_size": 4, "learning_rate": 1e-2, "response_length": 6, "calibration_prompts": 6,
            "use_cpu": True, "advantage": "group", "group_size": 4,
        }  # fmt: skip
        return FineGrainedPPOTrainer(
            model or make_model(0),
            ref_model or make_model(0),
            reward,
            FineGrainedPPOConfig(**{**settings, **config}),
            PROMPTS,
            ids,
            value_model=critic,
            log=log,
        )

    return make


def fixed_rollout():
    """Two prompts with two responses each; the second response was cut off."""
    return Rollout(
        tensor([[2, 3], [2, 3], [0, 8], [0, 8]]),
        tensor([[True, True]] * 2 + [[False, True]] * 2),
        tensor([[7, 9, 1, 0], [7, 7, 10, 11], [1, 0, 0, 0], [9, 1, 0, 0]]),
        tensor([[True] * 3 + [False], [True] * 4, [True] + [False] * 3, [True, True, False, False]]),
        tensor([False, True, False, False]),
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("whitened", [False, True])
def test_experience(make_trainer, make_model, level, whitened):
    scores = [0.5, -1.0, 2.0, 1.0]
    tokens = [[0.1, -0.2, 0.3], [0.0, 1.0, -1.0, 0.5], [0.7], [0.4, -0.9]]
    padded = tensor([row + [math.nan] * (4 - len(row)) for row in tokens])
    trainer = make_trainer(
        (lambda rollout: tensor(scores)) if level == "sequence" else (lambda rollout: padded),
        ref_model=make_model(5), gamma=0.9, kl_coef=0.3, missing_eos_penalty=0.4, whiten_advantages=whitened,
        rollout_batch_size=4, minibatch_size=4, group_size=2,
    )  # fmt: skip
    trainer.reward_factor = 2.0
    rollout = fixed_rollout()
    experience, statistics = trainer.make_experience(rollout)

    to_go = []
    for row, response in enumerate(rollout.response_lists()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        logps = [
            model(input_ids=tensor([prompt + response]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)[range(len(response)), response]
            for model in (trainer.policy, trainer.ref_model)
        ]
        paid = [0.0] * (len(response) - 1) + [scores[row]] if level == "sequence" else tokens[row]
        paid = [2.0 * value for value in paid]
        paid[-1] -= 0.4 * (row == 1)
        shaped = [value - 0.3 * nats for value, nats in zip(paid, (logps[0] - logps[1]).tolist(), strict=True)]
        after = [0.0] * (len(shaped) + 1)
        for t in reversed(range(len(shaped))):
            after[t] = shaped[t] + 0.9 * after[t + 1]
        to_go.append(after[:-1])
    advantages = []
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        baseline = to_go[other] + [0.0] * 4
        advantages.append([value - baseline[t] for t, value in enumerate(to_go[row])])
    before = [value for row in advantages for value in row]
    if whitened:
        every = tensor(before)
        centre, deviation = float(every.mean()), float(every.var(correction=0).add(1e-8).sqrt())
        advantages = [[(value - centre) / deviation for value in row] for row in advantages]
    for row, values in enumerate(advantages):
        close(experience.advantages[row, : len(values)], values, 1e-4)
        close(experience.returns[row, : len(values)], to_go[row], 1e-4)
        assert experience.advantages[row, len(values) :].abs().sum() == 0
    # The baseline in the place of the values: 1 - var(advantages) / var(rewards-to-go), before whitening.
    flat = tensor([value for row in to_go for value in row])
    expected = 1 - float(tensor(before).var(correction=0) / flat.var(correction=0))
    assert statistics["value/explained_variance"] == pytest.approx(expected, abs=1e-4)


def test_no_value_model(make_trainer):
    logs = []
    trainer = make_trainer(log=lambda statistics, update: logs.append(statistics))
    assert not [name for name, _ in trainer.model.named_parameters() if not name.startswith("policy.")]
    assert len(trainer.optimizer.param_groups) == 1
    asked = []
    trainer.policy.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("output_hidden_states")), with_kwargs=True
    )
    trainer.train()
    assert len(asked) > 8 and not any(asked)
    for statistics in logs:
        assert set(statistics) == set(GLOSSARY)
        assert all(math.isfinite(value) for value in statistics.values())
        assert statistics["value/loss"] == statistics["value/clip_fraction"] == 0


def test_value_settings_change_nothing(make_trainer):
    # The value coefficient, its clipping and its learning rate are read by nothing then.
    results = []
    for options in ({}, {"value_coef": 9.0, "clip_range_value": None, "value_learning_rate": 1.0, "lam": 0.1}):
        trainer = make_trainer(**options)
        trainer.train()
        results.append([value.detach().clone() for value in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_prompt_comes_group_size_times_in_a_row(make_trainer):
    trainer = make_trainer()
    rounds = [[tuple(prompt) for prompt in trainer._next_prompts()] for _ in range(3)]
    for drawn in rounds:
        assert len(drawn) == 8 and drawn[:4] == [drawn[0]] * 4 and drawn[4:] == [drawn[4]] * 4
    # Three rounds of two prompts are one pass over the six.
    assert sorted({prompt for drawn in rounds for prompt in drawn}) == sorted(map(tuple, PROMPTS))
    rollout = trainer.sample(trainer._next_prompts())
    assert len({tuple(response) for response in rollout.response_lists()[:4]}) > 1


def test_reward_at_the_last_token_equals_the_sequence_reward(make_trainer):
    def at_last_token(rollout):
        rewards = torch.zeros(rollout.response_mask.shape)
        for row, score in enumerate(share(rollout).tolist()):
            rewards[row, int(rollout.response_mask[row].sum()) - 1] = score
        return rewards

    results = []
    for reward in (share, at_last_token):
        trainer = make_trainer(reward)
        trainer.train()
        results.append([value.detach().clone() for value in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "grpo"}, "advantage: expected one of gae, group, found 'grpo'"),
        ({"advantage": "gae"}, "group_size: expected 1 with advantage gae, found 4"),
        ({"group_size": 1}, "group_size: expected at least 2 and a divisor of rollout_batch_size 8 .*, found 1"),
        ({"group_size": 3}, "group_size: expected at least 2 and a divisor of rollout_batch_size 8 .*, found 3"),
        ({"value_model": "separate"}, "value_model: advantage group has none; leave it at 'head', found 'separate'"),
        (
            {"rollout_batch_size": 28},
            "train_dataset: 6 prompts, fewer than rollout_batch_size 28 / group_size 4",
        ),
    ],
)
def test_bad_arguments(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize("reward", [share, count])
def test_it_learns(make_trainer, reward):
    logs = []
    make_trainer(
        reward, updates=15, rollout_batch_size=12, minibatch_size=6, epochs=4, group_size=3,
        log=lambda statistics, update: logs.append(statistics),
    ).train()  # fmt: skip
    scores = [statistics["reward/score"] for statistics in logs]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > 3 * first + 0.3, scores
