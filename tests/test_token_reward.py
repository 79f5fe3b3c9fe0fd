"""The token-level reward model's loss, rewards, class weights and collator; scoring with reward models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.core.rollout import as_rollout
from fgalign.core.schema import LabelledPair
from fgalign.errors import ConfigError
from fgalign.losses.token_reward import (
    CLASSES,
    IGNORE,
    inverse_frequency_weights,
    three_class_loss,
    three_class_rewards,
)
from fgalign.rewards import response_scores, reward_function
from fgalign.rewards.scoring import raw_rewards, score_responses
from fgalign.rewards.training import TokenRewardCollator, TokenRewardTrainer, class_counts

LN2 = math.log(2)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


# Softmax (1/4, 1/2, 1/4), (1/4, 1/4, 1/2) and (1/2, 1/4, 1/4) over bad, neutral, good.
LOGITS = tensor([[[0.0, LN2, 0.0], [0.0, 0.0, LN2], [LN2, 0.0, 0.0], [7.0, -9.0, 3.0]]])
LABELS = tensor([[-1, 1, 0, IGNORE]])


def test_classes():
    assert CLASSES == (-1, 0, 1)


def test_loss():
    # -ln of 1/4 (bad), 1/2 (good), 1/4 (neutral): 2 ln 2, ln 2, 2 ln 2; mean 5/3 ln 2.
    close(three_class_loss(LOGITS, LABELS), 5 / 3 * LN2)


def test_weighted_loss():
    # Weights 3, 1, 2 of bad, neutral, good: (3 * 2 + 2 * 1 + 1 * 2) ln 2 / (3 + 2 + 1) = 10/6 ln 2;
    # with 4, 1, 1: (4 * 2 + 1 * 1 + 1 * 2) ln 2 / 6 = 11/6 ln 2.
    close(three_class_loss(LOGITS, LABELS, tensor([3.0, 1.0, 2.0])), 10 / 6 * LN2)
    close(three_class_loss(LOGITS, LABELS, tensor([4.0, 1.0, 1.0])), 11 / 6 * LN2)


def test_rewards():
    close(three_class_rewards(LOGITS)[:, :3], [[0.0, 0.25, -0.25]])
    sure = three_class_rewards(tensor([[[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]]]))
    close(sure, [[-1.0, 1.0]])


def test_class_weights():
    # Frequencies 1/4, 1/2, 1/4. Power 1: 4, 2, 4 over their mean 1 + 1 + 1 = 3. Power 1/2: 2, 1.414214, 2 over
    # 0.5 + 0.707107 + 0.5 = 1.707107.
    counts = tensor([1, 2, 1])
    close(inverse_frequency_weights(counts, 1.0), [4 / 3, 2 / 3, 4 / 3])
    close(inverse_frequency_weights(counts), [1.171573, 0.828427, 1.171573])
    close(inverse_frequency_weights(counts, 0.0), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"expected all above 0, found \[0, 2, 1\]"):
        inverse_frequency_weights(tensor([0, 2, 1]))


PAIRS = [
    LabelledPair(
        id="a", prompt_ids=[5, 6], initial_ids=[7, 8, 1], initial_labels=[-1, 0, 0],
        revised_ids=[9, 1], revised_labels=[1, 0],
    ),
    LabelledPair(
        id="b", prompt_ids=[5], initial_ids=[7, 1], initial_labels=[-1, 0],
        revised_ids=[9, 10, 7, 1], revised_labels=[1, 1, 0, 0],
    ),
]  # fmt: skip


def test_class_counts():
    # Bad 1 + 1; good 1 + 2; of 3 + 2 + 2 + 4 = 11 tokens 6 are neutral.
    assert class_counts(PAIRS).tolist() == [2, 6, 3]


def test_collator():
    batch = TokenRewardCollator(pad_token_id=0)([pair.model_dump() for pair in PAIRS])
    assert batch["input_ids"].tolist() == [
        [5, 6, 9, 1, 0],  # revised a
        [5, 9, 10, 7, 1],  # revised b
        [5, 6, 7, 8, 1],  # initial a
        [5, 7, 1, 0, 0],  # initial b
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    x = IGNORE
    assert batch["labels"].tolist() == [[x, x, 1, 0, x], [x, 1, 1, 0, 0], [x, x, -1, 0, 0], [x, -1, 0, x, x]]


def test_trainer_loss(make_model, tmp_path):
    """The trainer's loss is the weighted loss of the model's logits, and accumulation averages the micro-batches."""
    from transformers import TrainingArguments

    model = make_model(kind="token", num_labels=3)
    weights = tensor([3.0, 1.0, 2.0])
    batches = [TokenRewardCollator(0)([pair.model_dump()]) for pair in PAIRS]
    expected = [
        three_class_loss(
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"], weights
        )
        for b in batches
    ]
    before = model.score.weight.detach().clone()
    (gradient,) = torch.autograd.grad((expected[0] + expected[1]) / 2, model.score.weight)
    model.config.classifier_dropout = 0.0
    model.dropout.p = 0.0
    trainer = TokenRewardTrainer(
        model,
        class_weights=weights,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1,
            learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True,
            remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        data_collator=TokenRewardCollator(0),
        train_dataset=[pair.model_dump() for pair in PAIRS],
    )  # fmt: skip
    assert trainer.compute_loss(model, batches[0]).item() == pytest.approx(expected[0].item(), abs=1e-6)
    trainer.train()
    close(model.score.weight.detach(), before - 0.5 * gradient, 1e-6)


# --- scoring ----------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 12, 1], [13, 1], [14, 15, 16, 17, 1]]


@pytest.mark.parametrize("family", ["make_model", "make_gpt2"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_scores_do_not_depend_on_the_batch(request, ids, family, level):
    model = request.getfixturevalue(family)(kind=level, num_labels=1 if level == "sequence" else 3)
    reward = reward_function(model, level)
    scores = [score_responses(reward, PROMPTS, RESPONSES, ids, size, "cpu") for size in (1, 2, 3)]
    assert scores[0].shape == (3,)
    assert len(set(scores[0].tolist())) == 3
    for other in scores[1:]:
        close(other, scores[0])


def test_sequence_reward_is_read_at_the_last_token(make_model, ids):
    model = make_model(kind="sequence", num_labels=1)
    scores = score_responses(reward_function(model, "sequence"), PROMPTS, RESPONSES, ids, 3, "cpu")
    for score, prompt, response in zip(scores, PROMPTS, RESPONSES, strict=True):
        hidden = model.model(input_ids=tensor([prompt + response])).last_hidden_state[0, -1]
        close(score, model.score(hidden)[0].detach())


def test_sequence_reward_reads_nothing_outside_the_mask(make_model):
    reward = reward_function(make_model(kind="sequence", num_labels=1), "sequence")
    rollout = as_rollout(PROMPTS, RESPONSES, 0, "cpu")
    other = rollout._replace(
        prompt_ids=torch.where(rollout.prompt_mask, rollout.prompt_ids, 20),
        response_ids=torch.where(rollout.response_mask, rollout.response_ids, 21),
    )
    close(reward(other), reward(rollout))


def test_token_rewards_belong_to_their_tokens(make_model):
    model = make_model(kind="token", num_labels=3)
    ((rewards, rollout),) = raw_rewards(reward_function(model, "token"), PROMPTS, RESPONSES, 0, 3, "cpu")
    assert rewards.shape == (3, 5)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        probabilities = model(input_ids=tensor([prompt + response])).logits[0].softmax(-1)[len(prompt) :]
        close(rewards[row, : len(response)], (probabilities[:, 2] - probabilities[:, 0]).detach())
        assert rewards[row, len(response) :].abs().sum() == 0
    close(response_scores(rewards, rollout.response_mask), rewards.sum(1))


def test_response_scores():
    mask = tensor([[True, True, False], [True, False, False]])
    close(response_scores(tensor([1.0, 2.0]), mask), [1.0, 2.0])
    close(response_scores(tensor([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]]), mask), [3.0, 3.0])


def test_as_rollout():
    rollout = as_rollout(PROMPTS[:2], RESPONSES[:2], 0, "cpu")
    assert rollout.input_ids.tolist() == [[5, 6, 7, 11, 12, 1], [0, 0, 8, 13, 1, 0]]
    assert rollout.attention_mask.long().tolist() == [[1] * 6, [0, 0, 1, 1, 1, 0]]
    assert rollout.truncated.tolist() == [False, False]


def test_unknown_level(make_model):
    with pytest.raises(ConfigError, match="reward level: expected 'sequence' or 'token', found 'word'"):
        reward_function(make_model(), "word")


def test_lora_trains_the_new_head_and_saves_a_plain_model(make_model, tokenizer, tmp_path):
    """The whole path with LoRA: peft must adapt the layers and leave the three-label head to be trained as it is."""
    from fgalign.config import Profile
    from fgalign.context import Context
    from fgalign.core.modeling import RuntimeConfig, load_token_reward_model
    from fgalign.rewards.training import TokenRewardSection, train_token_model
    from fgalign.training import LoraSection, OptimConfig

    start = tmp_path / "data" / "t" / "models" / "base"
    make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(start)
    tokenizer.save_pretrained(start)
    profile = Profile("t", tmp_path, {"seeds": [1]}, tmp_path / "params.yaml")
    context = Context(profile, "rm_token", 1, torch.device("cpu"), RuntimeConfig(), tmp_path / "out")
    optim = OptimConfig(learning_rate=1e-2, batch_size=2, max_steps=2, lora=LoraSection(r=2, alpha=4))
    train_token_model(context, TokenRewardSection(start="base", optim=optim, max_length=16), PAIRS)
    files = {path.name for path in context.out.iterdir()}
    assert "model.safetensors" in files and "adapter_config.json" not in files
    torch.manual_seed(0)
    trained, untrained = load_token_reward_model(context.out), load_token_reward_model(start, num_labels=3)
    assert trained.config.num_labels == 3
    layers = [
        (new, old)
        for (name, new), old in zip(trained.named_parameters(), untrained.parameters(), strict=True)
        if "q_proj" in name
    ]
    assert all(not torch.equal(new, old) for new, old in layers)
