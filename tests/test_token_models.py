"""Variants of the token-level reward model: losses and readings by hand, saved models, their stages."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import tensor

from fgalign.config import Profile
from fgalign.context import Context
from fgalign.core.modeling import RuntimeConfig, load_token_reward_model
from fgalign.core.raw_data import read_split
from fgalign.core.schema import Edit, LabelledPair, read_records
from fgalign.errors import ConfigError, InputError
from fgalign.losses.token_reward import (
    IGNORE,
    OUTPUTS,
    binary_loss,
    bradley_terry_loss,
    inverse_frequency_weights,
    regression_loss,
    three_class_loss,
    token_loss,
    token_rewards_of,
)
from fgalign.rewards import load_reward, reward_function, saved_level
from fgalign.rewards.scoring import raw_rewards
from fgalign.rewards.training import TokenRewardCollator, TokenRewardSection, TokenRewardTrainer, train_token_model
from fgalign.training import OptimConfig

LN2, LN3 = math.log(2), math.log(3)

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


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_bradley_terry():
    # Sums over response tokens: 1 + 2 against 3, and 0.5 against -1 + 0.5; differences 0 and 1.
    # softplus(-0) = ln 2, softplus(-1) = ln(1 + e^-1) = 0.313262.
    x = IGNORE
    logits = tensor([[9.0, 1.0, 2.0], [9.0, 0.5, 9.0], [9.0, 3.0, 9.0], [9.0, -1.0, 0.5]]).unsqueeze(-1)
    labels = tensor([[x, 1, 0], [x, 1, x], [x, -1, x], [x, -1, 0]])
    close(bradley_terry_loss(logits, labels), (LN2 + 0.313262) / 2)
    # The labels are read for the mask alone.
    close(bradley_terry_loss(logits, torch.where(labels == x, x, 0)), (LN2 + 0.313262) / 2)


def test_regression():
    # Errors: 0.5 - -1 = 1.5, 0.5 - 1 = -0.5, 2 - 0 = 2; squared 2.25, 0.25, 4; the last is no token.
    logits, labels = tensor([[0.5, 0.5, 2.0, math.nan]]).unsqueeze(-1), tensor([[-1, 1, 0, IGNORE]])
    close(regression_loss(logits, labels), 6.5 / 3)
    # Weights 3, 1, 2 of bad, neutral, good: (3 * 2.25 + 2 * 0.25 + 1 * 4) / 6 = 11.25 / 6.
    close(regression_loss(logits, labels, tensor([3.0, 1.0, 2.0])), 11.25 / 6)


def test_binary():
    # Softmax (1/4, 3/4), (1/4, 3/4) and a neutral token: -ln 1/4 = 2 ln 2 for the bad one, -ln 3/4 for the good one.
    logits = tensor([[[0.0, LN3], [0.0, LN3], [5.0, -5.0], [5.0, -5.0]]])
    labels = tensor([[-1, 1, 0, IGNORE]])
    bad, good = 2 * LN2, 2 * LN2 - LN3
    close(binary_loss(logits, labels), (bad + good) / 2)
    close(binary_loss(logits, labels, tensor([3.0, 99.0, 1.0])), (3 * bad + good) / 4)


def test_binary_without_a_marked_token():
    logits = torch.ones(1, 2, 2, requires_grad=True)
    loss = binary_loss(logits, tensor([[0, IGNORE]]))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_losses_by_name():
    labels, weights = tensor([[-1, 1], [0, -1]]), tensor([3.0, 1.0, 2.0])
    functions = {
        "three_class": three_class_loss, "regression": regression_loss, "binary": binary_loss,
    }  # fmt: skip
    for name, outputs in OUTPUTS.items():
        logits = torch.randn(2, 2, outputs, generator=torch.Generator().manual_seed(0))
        expected = functions[name](logits, labels, weights) if name in functions else bradley_terry_loss(logits, labels)
        assert token_loss(name, logits, labels, weights) == expected
    with pytest.raises(ValueError, match=r"token loss: expected one of three_class, .*, found 'hinge'"):
        token_loss("hinge", logits, labels)


# --- readings ---------------------------------------------------------------------------------------------------------


def test_rewards_by_number_of_outputs():
    # Softmax (1/4, 1/2, 1/4), (1/6, 1/3, 1/2).
    three = tensor([[[0.0, LN2, 0.0], [0.0, LN2, LN3]]])
    close(token_rewards_of(three), [[0.0, 1 / 3]])
    # Softmax (1/4, 3/4), (2/3, 1/3): 2 * 3/4 - 1, 2 * 1/3 - 1.
    two = tensor([[[0.0, LN3], [LN2, 0.0]]])
    close(token_rewards_of(two), [[0.5, -1 / 3]])
    close(token_rewards_of(tensor([[[0.7], [-3.0]]])), [[0.7, -3.0]])
    with pytest.raises(ValueError, match="expected 1, 2 or 3 outputs a token, found 4"):
        token_rewards_of(torch.zeros(1, 1, 4))


def test_discrete_rewards():
    three = tensor([[[0.0, LN2, 0.0], [0.0, LN2, LN3], [1.0, 0.0, 0.9]]])
    assert token_rewards_of(three, discrete=True).tolist() == [[0.0, 1.0, -1.0]]
    two = tensor([[[0.0, LN3], [LN2, 0.0]]])
    assert token_rewards_of(two, discrete=True).tolist() == [[1.0, -1.0]]
    with pytest.raises(ValueError, match="discrete rewards: expected a model with classes, found one output"):
        token_rewards_of(torch.zeros(1, 1, 1), discrete=True)


def test_discrete_reward_function(make_model):
    model = make_model(kind="token", num_labels=3)
    prompts, responses = [[5, 6, 7], [8]], [[11, 12, 1], [13, 1]]
    ((rewards, _),) = raw_rewards(reward_function(model, "token", discrete=True), prompts, responses, 0, 2, "cpu")
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        classes = model(input_ids=tensor([prompt + response])).logits[0].argmax(-1)[len(prompt) :]
        assert rewards[row, : len(response)].tolist() == (classes - 1).tolist()
    for model, level, found in (
        (make_model(kind="sequence", num_labels=1), "sequence", "one score a response"),
        (make_model(kind="token", num_labels=1), "token", "one output a token"),
    ):
        with pytest.raises(ConfigError, match=f"discrete: expected a reward model with classes .* with {found}"):
            reward_function(model, level, discrete=True)


def test_a_classifiers_outputs_are_no_score(make_model):
    with pytest.raises(ConfigError, match=r"expected one output a sequence \(num_labels=1\), found 2; a classifier's"):
        reward_function(make_model(kind="sequence", num_labels=2), "sequence")
    with pytest.raises(ConfigError, match="expected a pad token in its configuration, found none"):
        reward_function(make_model(kind="sequence", num_labels=1, pad_token_id=None), "sequence")


def test_a_response_that_ends_in_the_pad_token_is_scored_at_its_last_token(make_model):
    model = make_model(kind="sequence", num_labels=1)
    prompts, responses = [[5, 6, 7], [8]], [[11, 12, 0], [13, 1]]  # 0 pads
    ((scores, _),) = raw_rewards(reward_function(model, "sequence"), prompts, responses, 0, 2, "cpu")
    hidden = model.model(input_ids=tensor([[5, 6, 7, 11, 12, 0]])).last_hidden_state
    assert float(scores[0]) == pytest.approx(float(model.score(hidden)[0, -1]), abs=1e-5)
    assert abs(float(scores[0]) - float(model.score(hidden)[0, -2])) > 1e-2  # not at the token before
    assert model.config.pad_token_id == 0
    ((alone, _),) = raw_rewards(reward_function(model, "sequence"), prompts[1:], responses[1:], 0, 1, "cpu")
    assert float(scores[1]) == pytest.approx(float(alone[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "outputs"), [("three_class", 2), ("binary", 3), ("regression", 3), ("bradley_terry", 2)]
)
def test_the_model_needs_as_many_outputs_as_the_loss(make_model, tokenizer, tmp_path, loss, outputs):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = make_model(kind="token", num_labels=outputs)
    with pytest.raises(
        ConfigError, match=f"expected {OUTPUTS[loss]} outputs a token for the loss {loss}, found {outputs}"
    ):
        TokenRewardTrainer(model, args, token_loss_name=loss, processing_class=tokenizer)


def test_trainer_needs_nothing_but_pairs(make_model, tokenizer, tmp_path):
    from transformers import TrainingArguments

    pair = {
        "id": "a", "prompt_ids": [5, 6], "initial_ids": [7, 8, 1], "initial_labels": [0, -1, 0],
        "revised_ids": [7, 9, 1], "revised_labels": [0, 1, 0],
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2, learning_rate=1e-2)
    model = make_model(kind="token", num_labels=3)
    before = model.score.weight.detach().clone()
    TokenRewardTrainer(model, args, train_dataset=[pair] * 4, processing_class=tokenizer).train()
    assert not torch.equal(before, model.score.weight)


def test_summed_rewards_are_paid_at_the_last_token(make_model, tmp_path):
    make_model(kind="token", num_labels=3).save_pretrained(tmp_path / "rm_token")
    make_model(kind="sequence", num_labels=1).save_pretrained(tmp_path / "rm_edit")
    prompts, responses = [[5, 6, 7], [8]], [[11, 12, 1], [13, 1]]
    (each, rollout), (whole, _) = (
        raw_rewards(
            load_reward("rm_token", tmp_path / "rm_token", "cpu", summed=summed), prompts, responses, 0, 2, "cpu"
        )[0]
        for summed in (False, True)
    )
    assert whole.tolist() == pytest.approx([float(each[0, :3].sum()), float(each[1, :2].sum())])
    assert len(set(whole.tolist())) == 2 and each.shape == (2, 3) and not rollout.response_mask[1, 2]
    with pytest.raises(ConfigError, match="summed: expected a token-level reward model, found rm_edit with one score"):
        load_reward("rm_edit", tmp_path / "rm_edit", "cpu", summed=True)


# --- training and saved models ----------------------------------------------------------------------------------------


@pytest.fixture
def context(make_model, tokenizer, tmp_path):
    start = tmp_path / "data" / "t" / "models" / "base"
    make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(start)
    tokenizer.save_pretrained(start)
    profile = Profile("t", tmp_path, {"seeds": [1]}, tmp_path / "params.yaml")
    return Context(profile, "tm", 1, torch.device("cpu"), RuntimeConfig(), tmp_path / "out")


@pytest.mark.parametrize("loss", list(OUTPUTS))
def test_trainer_uses_the_loss(make_model, tmp_path, loss):
    from transformers import TrainingArguments

    model = make_model(kind="token", num_labels=OUTPUTS[loss])
    model.dropout.p = 0.0
    weights = tensor([3.0, 1.0, 2.0])
    batch = TokenRewardCollator(0)([pair.model_dump() for pair in PAIRS])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = token_loss(loss, logits, batch["labels"], weights)
    trainer = TokenRewardTrainer(
        model,
        class_weights=weights,
        token_loss_name=loss,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
    )
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("loss", list(OUTPUTS))
def test_a_saved_model_is_read_as_it_was_trained(context, loss):
    optim = OptimConfig(learning_rate=1e-2, batch_size=2, max_steps=2)
    train_token_model(context, TokenRewardSection(start="base", optim=optim, max_length=16, loss=loss), PAIRS)
    model = load_token_reward_model(context.out).eval()
    assert model.config.num_labels == OUTPUTS[loss]
    assert saved_level(context.out) == "token"
    reward = load_reward("any_name", context.out, "cpu")
    ((rewards, _),) = raw_rewards(reward, [[5, 6]], [[9, 10, 1]], 0, 1, "cpu")
    outputs = model(input_ids=tensor([[5, 6, 9, 10, 1]])).logits[0, 2:]
    expected = {
        "three_class": outputs.softmax(-1)[:, -1] - outputs.softmax(-1)[:, 0],
        "binary": 2 * outputs.softmax(-1)[:, -1] - 1,
        "bradley_terry": outputs[:, 0],
        "regression": outputs[:, 0],
    }[loss]
    close(rewards[0], expected.detach())


def test_class_weights_of_each_loss():
    from fgalign.rewards.training import _class_weights

    def weights(loss):
        optim = OptimConfig(learning_rate=1e-2)
        return _class_weights(PAIRS, TokenRewardSection(optim=optim, loss=loss, class_weight_power=1.0))

    # 2 bad, 6 neutral, 3 good. Power 1 balances: 11 / (3 * count); of bad and good alone, 5 / (2 * count).
    for loss in ("three_class", "regression"):
        close(weights(loss), [11 / 6, 11 / 18, 11 / 9])
        close(weights(loss), inverse_frequency_weights(tensor([2, 6, 3]), 1.0))
    close(weights("binary"), [5 / 4, 0.0, 5 / 6])
    assert weights("bradley_terry") is None


def test_rewards_move_towards_the_labels(context):
    for loss in OUTPUTS:
        optim = OptimConfig(learning_rate=3e-2, batch_size=2, max_steps=60, schedule="constant")
        train_token_model(context, TokenRewardSection(start="base", optim=optim, max_length=16, loss=loss), PAIRS)
        reward = load_reward("x", context.out, "cpu")
        totals = []
        for side in ("initial_ids", "revised_ids"):
            ((rewards, _),) = raw_rewards(
                reward, [pair.prompt_ids for pair in PAIRS], [getattr(p, side) for p in PAIRS], 0, 2, "cpu"
            )
            totals.append((rewards.sum(1), rewards[:, 0]))
        (initial, bad), (revised, good) = totals
        assert bool((revised > initial).all()), loss
        if loss != "bradley_terry":  # it says nothing of single tokens
            assert bool((good > 0.3).all()) and bool((bad < -0.3).all()), (loss, good, bad)


def test_level_of_a_saved_model(make_model, tmp_path):
    for kind, level in (("sequence", "sequence"), ("token", "token")):
        make_model(kind=kind, num_labels=1).save_pretrained(tmp_path / kind)
        assert saved_level(tmp_path / kind) == level
    make_model().save_pretrained(tmp_path / "causal")
    with pytest.raises(ConfigError, match=r"causal: expected a reward model .*, found LlamaForCausalLM"):
        saved_level(tmp_path / "causal")
    with pytest.raises(InputError, match=r"none.config\.json: no such file; run the stage that writes it"):
        load_reward("any", tmp_path / "none", "cpu")
    with pytest.raises(ConfigError, match="reward model rm_token: expected one of level token, found level sequence"):
        load_reward("rm_token", tmp_path / "sequence", "cpu")
    assert load_reward("other", tmp_path / "sequence", "cpu")


# --- stages -----------------------------------------------------------------------------------------------------------

SECTION = {"start": "sft", "max_length": 160, "optim": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2}}


@pytest.fixture
def profile(make_model, tmp_path):
    """A small world with random models, up to the SFT model of two seeds."""
    from fgalign.base_model import train_tokenizer
    from fgalign.stages.data import run_edits, run_labels, run_raw

    sizes = {
        **{"n_train_corpus": 0, "n_train_prompts": 4, "n_train_demonstrations": 0, "n_train_preferences": 12},
        **{"n_validation_prompts": 4, "n_validation_demonstrations": 0, "n_validation_preferences": 4},
        **{"n_test_prompts": 4, "n_test_preferences": 16},
    }
    params = {
        "seeds": [1, 2],
        "runtime": {"device": "cpu", "threads": 1, "workers": 1},
        "source": {"name": "simulator", **sizes},
        "annotator": {"name": "simulated"},
        "labels": {"unit": "token"},
        "evaluation": {"judge": "simulator_gold", "batch_size": 8},
        "rm_preference": SECTION,
        "rm_edit": SECTION,
        "rm_token": SECTION,
        "token_models": {
            "tm_regression": {**SECTION, "title": "Regression", "loss": "regression"},
            "tm_binary": {**SECTION, "loss": "binary"},
        },
        "methods": {},
    }
    profile = Profile("t", tmp_path, params, tmp_path / "params.yaml")
    run_raw(profile)
    run_edits(profile)
    preferences = read_split(profile.data / "raw" / "train").preferences
    tokenizer = train_tokenizer([record.rejected for record in preferences], 400)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=160, **special)
    for folder in (profile.model_folder("base"), *(profile.model_folder("sft", seed) for seed in (1, 2))):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run_labels(profile)
    return profile


def test_stages(profile):
    from fgalign.rewards import LEVELS
    from fgalign.stages.judge import run_label_quality
    from fgalign.stages.reward_models import run_reward_models, run_token_models
    from fgalign.stages.train import run_reward_model

    for name in (*LEVELS, "tm_regression", "tm_binary"):
        run_reward_model(profile, name)
    run_reward_models(profile)
    run_token_models(profile)
    run_label_quality(profile)
    metrics = profile.results / "metrics"
    with open(metrics / "reward_models.csv") as file:
        usual = list(csv.DictReader(file))
    with open(profile.sweeps / "metrics" / "token_models.csv") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(usual[0]) == ["model", "metric", "seed", "value"]
    assert [row for row in found if row["model"] == "rm_token"] == [row for row in usual if row["model"] == "rm_token"]
    names = ["accuracy_preference", "accuracy_edit", "token_auroc", "token_precision", "token_recall"]
    kinds = list(json.loads((metrics / "label_quality.json").read_text())["by_type"])
    names += [f"token_auroc:{kind}" for kind in kinds]
    assert {"untruthful", "rude"} <= set(kinds)
    models = ("rm_token", "tm_regression", "tm_binary")
    expected = [(seed, model, name) for seed in "12" for model in models for name in names]
    # Precision is left out where no token is said to be bad.
    kept = [(row["seed"], row["model"], row["metric"]) for row in found]
    assert [key for key in expected if key in kept or key[2] != "token_precision"] == kept
    assert all(0 <= float(row["value"]) <= 1 for row in found)
    # Intervals of what rm_token is measured by on single tokens.
    with open(metrics / "token_intervals.csv") as file:
        intervals = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
    assert {model for model, _ in intervals} == {"rm_token"}
    assert {"token_auroc", "token_recall"} <= {metric for _, metric in intervals} <= set(names[2:])
    for row in usual:
        key = (row["model"], row["metric"])
        means = [float(other["value"]) for other in usual if (other["model"], other["metric"]) == key]
        if key in intervals:
            assert float(intervals[key]["low"]) <= sum(means) / len(means) <= float(intervals[key]["high"])
    # Pair by pair, an accuracy is the mean of its pairs.
    with open(metrics / "reward_pairs.csv") as file:
        pairs = list(csv.DictReader(file))
    for row in usual:
        if row["metric"].startswith("accuracy_"):
            key = ("model", "metric", "seed")
            mine = [float(pair["correct"]) for pair in pairs if all(pair[name] == row[name] for name in key)]
            assert set(mine) <= {0.0, 0.5, 1.0}
            assert float(row["value"]) == pytest.approx(sum(mine) / len(mine), abs=1e-6)


def test_other_edits_train_every_reward_model_that_a_method_reads_anew(profile, monkeypatch):
    from dataclasses import replace

    from fgalign.stages import studies
    from fgalign.stages.data import run_study_edits

    ppo = {"kind": "ppo", "trainer": {"updates": 1}}
    figa = {"kind": "figa", "optim": SECTION["optim"], "needs": "rm_preference"}
    scored = {"signal": "reward_model", "scorer": "tm_regression"}
    methods = {
        "ppo": {**ppo, "needs": "rm_preference"},
        "tlcr": {**ppo, "needs": "tm_binary"},
        "figa": figa,
        "bon": {"kind": "best_of_n", "needs": "rm_token"},
    }
    noisy = {"annotator": {"miss_rate": 0.5}}
    expected = {
        "ppo": ("ppo", {}, []),
        "edit": ("ppo", {"needs": "rm_edit"}, ["rm_edit"]),
        "tlcr": ("tlcr", {}, ["tm_binary"]),
        "away": ("tlcr", {"needs": "rm_preference"}, []),
        "figa": ("figa", {}, []),
        "scorer": ("figa", scored, ["tm_regression"]),
        "both": ("figa", {**scored, "needs": "rm_edit"}, ["rm_edit", "tm_regression"]),
        "once": ("figa", {**scored, "needs": "tm_regression"}, ["tm_regression"]),
    }
    variants = {key: {"method": method, "change": change, **noisy} for key, (method, change, _) in expected.items()}
    refused = {"variants": {**variants, "bon": {"method": "bon", **noisy}}}
    params = {"methods": methods, "studies": {"noise": {"variants": variants}, "refused": refused}}
    profile = replace(profile, params={**profile.params, **params})
    run_study_edits(profile, "noise")
    trained, read = [], {}

    def train(context, name):
        trained.append((context.stage, context.seed, context.edits("train") != edits))
        (context.out / "config.json").write_text(name)

    def align(context, method, change):
        entry = {**methods[method], **change}
        names = [entry["needs"], *([entry["scorer"]] if "scorer" in entry else [])]
        anew = [name for name in dict.fromkeys(names) if context.overlay in context.model(name).parents]
        read[context.stage] = anew
        (context.out / "config.json").write_text("")

    edits = read_records(profile.data / "edits" / "train.jsonl", Edit)
    monkeypatch.setattr(studies, "train_reward_model", train)
    monkeypatch.setattr(studies, "align", align)
    studies.run_study(profile, "noise")
    assert read == {f"noise/{key}": names for key, (*_, names) in expected.items()}
    assert trained == [
        (f"noise/{key}/{name}", seed, True)
        for key, (*_, names) in expected.items()
        for seed in (1, 2)
        for name in names
    ]
    # Best of n reads its reward model only when it answers.
    with pytest.raises(
        ConfigError, match=r"studies\.refused\.variants\.bon\.annotator: expected none with a method of"
    ):
        studies.run_study(profile, "refused")


def test_token_metrics_by_hand():
    from fgalign.stages.reward_models import token_intervals, token_parts

    rewards = [[-1.0, -0.5, 0.2], [0.1, -0.6]]
    kinds = [[{"rude"}, set(), {"padding"}], [set(), {"padding", "rude"}]]
    parts = token_parts(rewards, kinds)
    # Sound: -0.5 and 0.1. Rude: -1 and -0.6, both below both. Padding: 0.2 above both, -0.6 below both. Negative are
    # three tokens, two of them flawed, of three that are.
    assert {name: part.value for name, part in parts.items()} == pytest.approx(
        {
            "token_auroc": 4 / 6,
            "token_precision": 2 / 3,
            "token_recall": 2 / 3,
            "token_auroc:padding": 0.5,
            "token_auroc:rude": 1.0,
        }
    )
    assert set(token_parts([[0.1, 0.2]], [[{"rude"}, {"rude"}]])) == {"token_recall"}
    assert token_parts([[0.1]], [[set()]]) == {}
    # Recall: influences of response 0, 1/9 - 2/9, and of response 1, 1/9; twice that about 2/3. t(1) = 12.7 covers all.
    assert parts["token_recall"].values.tolist() == pytest.approx([2 / 3 - 2 / 9, 2 / 3 + 2 / 9])
    by_seed = [{("rm", "token_recall"): parts["token_recall"]}] * 2
    assert token_intervals(by_seed) == [{"model": "rm", "metric": "token_recall", "low": 0.0, "high": 1.0}]
    assert token_intervals([*by_seed, {}]) == []


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({}, "tm_none", "reward model: expected one of rm_preference, rm_edit, rm_token, tm_regression, tm_binary, f"),
        ({"tm_binary": {**SECTION, "loss": "hinge"}}, "tm_binary", r"token_models\.tm_binary\.loss: .*found 'hinge'"),
        ({"rm_edit": SECTION}, "rm_edit", "token_models: 'rm_edit' names another model; choose another name"),
        ({"sft": SECTION}, "sft", "token_models: 'sft' names another model"),
    ],
)
def test_names_of_token_models(tmp_path, changes, name, message):
    from fgalign.stages.train import run_reward_model

    models = {"tm_regression": SECTION, "tm_binary": SECTION, **changes}
    profile = Profile("t", tmp_path, {"seeds": [1], "token_models": models}, tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=message):
        run_reward_model(profile, name)
