"""FIGATrainer: the collator by hand, the loss against a plain loop over methods' formula, equivalences of batching."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from fgalign.core.schema import Edit, LabelledPair
from fgalign.core.tensor_ops import token_logps
from fgalign.errors import ConfigError, TrainingError
from fgalign.labels import LabelConfig, label_edits
from fgalign.losses.figa import figa_loss
from fgalign.methods.figa import FIGACollator, FIGAConfig, FIGATrainer, FilterConfig, keep_pairs
from fgalign.rewards.training import TokenRewardCollator

EDITS = [
    ("where is the cat?", "the cat sat on the log", "the cat sat on the mat"),
    ("who?", "a dog", "a cat and a dog"),
    ("what is red?", "the mat and the log are red", "the mat is red"),
    ("say it", "the dog is the dog", "the dog is here"),
    ("the log?", "red", "brown"),
    ("a mat?", "a mat is on the log", "the mat is on the log"),
    ("cat?", "cat", "the cat is here"),
    ("and?", "the log is red and the mat is brown", "the log is brown and the mat is red"),
]
# A random model gives each token an NLL of about ln 280 = 5.6 nats; this threshold drops about half of the penalties.
THRESHOLD = 5.6


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    edits = [Edit(id=str(n), prompt=p, initial=i, revised=r) for n, (p, i, r) in enumerate(EDITS)]
    return [pair.model_dump() for pair in label_edits(tokenizer, edits, LabelConfig())]


@pytest.fixture
def make_trainer(make_model, tokenizer, pairs, tmp_path):
    def make(model=None, peft_config=None, data=pairs, **config):
        settings = {
            "output_dir": str(tmp_path), "threshold": THRESHOLD, "per_device_train_batch_size": 8, "max_steps": 1,
            "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
            "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        }  # fmt: skip
        return FIGATrainer(
            model or make_model(
                vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
            ),
            args=FIGAConfig(**{**settings, **config}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )  # fmt: skip

    return make


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def loss_after(trainer):
    """The loss of one step."""
    return trainer.train().training_loss


# --- collator ---------------------------------------------------------------------------------------------------------


def test_collator():
    # The end token is 1. Pair a: its initial response's end was "edited" (label -1), its revised one's was not.
    # Pair b: the initial response was cut off, its last token is a bad token like others; the revised one was too.
    examples = [
        {
            "id": "a", "prompt_ids": [5, 6], "initial_ids": [7, 8, 1], "initial_labels": [-1, 0, -1],
            "revised_ids": [9, 1], "revised_labels": [1, 0],
        },
        {
            "id": "b", "prompt_ids": [5], "initial_ids": [7, 8], "initial_labels": [0, -1],
            "revised_ids": [9, 10, 1, 7], "revised_labels": [0, 1, 0, 0],
        },
    ]  # fmt: skip
    batch = FIGACollator(pad_token_id=0, eos_token_id=1, max_length=5, alpha=2.0, beta=0.5, gamma=0.25)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 9, 1, 0], [5, 9, 10, 1, 7], [5, 6, 7, 8, 1], [5, 7, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    # Weights of predicting tokens 1 to 4; nothing for prompts and padding, gamma for a revised response's other tokens.
    assert batch["weights"].tolist() == [
        [0.0, 2.0, 2.0, 0.0],
        [0.25, 2.0, 0.25, 0.25],
        [0.0, -0.5, 0.0, 0.0],
        [0.0, -0.5, 0.0, 0.0],
    ]


def test_pairs_may_be_records(make_trainer, pairs):
    records = [LabelledPair(**pair) for pair in pairs]
    assert loss_after(make_trainer(data=records)) == loss_after(make_trainer(data=pairs))
    both = TokenRewardCollator(0)
    assert all(torch.equal(value, both(pairs)[name]) for name, value in both(records).items())
    with pytest.raises(ConfigError, match="revised_ids: expected responses that end with the end-of-sequence token"):
        endless = {"revised_ids": [5], "revised_labels": [1]}
        make_trainer(data=[record.model_copy(update=endless) for record in records])


def test_what_is_no_pair_is_refused(make_trainer):
    edits = [Edit(id="1", prompt="p", initial="i", revised="r")]
    with pytest.raises(TrainingError, match=r"expected labelled pairs, found Edit; `labels\.label_edits` makes"):
        make_trainer(data=edits)
    with pytest.raises(TrainingError, match="train_dataset: expected labelled pairs, found Edit"):
        TokenRewardCollator(0)(edits)


def test_pair_longer_than_allowed(make_trainer, pairs):
    longest = max(len(p["prompt_ids"]) + max(len(p["initial_ids"]), len(p["revised_ids"])) for p in pairs)
    make_trainer(max_length=longest).data_collator(pairs)
    with pytest.raises(TrainingError, match=rf"pair '7': prompt and .* response have {longest} tokens, more than"):
        make_trainer(max_length=longest - 1).data_collator(pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revised_labels": [1]}, "pair '0': revised_labels: expected one for each of the .* tokens .*, found 1$"),
        ({"initial_labels": None}, "pair '0': initial_labels: expected one .*, found none$"),
        ({"revised_scales": [1.0]}, "pair '0': revised_scales: expected one .*, found 1$"),
        ({"initial_scales": [1.0]}, "pair '0': revised_scales: expected one .*, found none$"),
        ({"prompt_ids": []}, "pair '0': prompt_ids: expected token ids, found none; `labels.label_edits` makes"),
        ({"initial_ids": None}, "pair '0': initial_ids: expected token ids, found none"),
    ],
)
def test_a_pair_needs_a_label_a_token(make_trainer, pairs, changes, message):
    with pytest.raises(TrainingError, match=message):
        make_trainer().data_collator([{**pairs[0], **changes}])


@pytest.mark.parametrize(
    ("side", "label", "message"),
    [
        ("initial", 1, r"pair '0': initial_labels: expected -1 or 0, found 1$"),  # the sign of a mask
        ("initial", 0.5, r"initial_labels: expected -1 or 0, found 0\.5$"),
        ("revised", -1, r"pair '0': revised_labels: expected 0 or 1, found -1$"),
    ],
)
def test_a_label_of_the_other_side_is_refused(make_trainer, pairs, side, label, message):
    labels = [label, *pairs[0][f"{side}_labels"][1:]]
    for collator in (make_trainer().data_collator, TokenRewardCollator(0)):
        with pytest.raises(TrainingError, match=message):
            collator([{**pairs[0], f"{side}_labels": labels}])
    scales = {f"{name}_scales": [1.0] * len(pairs[0][f"{name}_ids"]) for name in ("revised", "initial")}
    with pytest.raises(TrainingError, match="initial_scales: expected finite numbers, found NaN"):
        make_trainer().data_collator(
            [{**pairs[0], **scales, "initial_scales": [math.nan] * len(scales["initial_scales"])}]
        )


def test_responses_that_never_end_are_refused(make_model, pairs, tmp_path):
    endless = [
        {**pair, "revised_ids": pair["revised_ids"][:-1], "revised_labels": pair["revised_labels"][:-1]}
        for pair in pairs
    ]
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    with pytest.raises(
        ConfigError, match=f"expected responses that end with the end-of-sequence token 1, found none of {len(pairs)}"
    ):
        FIGATrainer(make_model(), FIGAConfig(output_dir=str(tmp_path), report_to="none"), endless, tokenizer)


def test_a_model_that_would_round_its_steps_away_is_refused(make_trainer, make_model):
    with pytest.raises(ConfigError, match=r"model: expected float32 .*found torch\.bfloat16"):
        make_trainer(make_model().to(torch.bfloat16))


def test_a_tokenizer_without_padding_is_refused(make_model, pairs, tmp_path):
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=1)
    with pytest.raises(ConfigError, match="tokenizer: expected one with a padding token"):
        FIGATrainer(make_model(), FIGAConfig(output_dir=str(tmp_path)), pairs, tokenizer)


def test_one_process_takes_the_batch_of_one_gpu_however_many_there_are(make_model, tokenizer, pairs, tmp_path):
    args = FIGAConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    assert args.n_gpu <= 1  # asked for here, because transformers looks for GPUs now
    args._n_gpu = 8
    assert FIGATrainer(make_model(), args, pairs, tokenizer)._train_batch_size == 4


def test_an_evaluation_has_a_loss(make_trainer, pairs):
    trainer = make_trainer(data=pairs[:4], per_device_eval_batch_size=4)
    with torch.no_grad():
        batch = trainer.data_collator(pairs[4:])
        expected = trainer.loss(trainer.model.eval(), batch).loss
    assert trainer.evaluate(pairs[4:])["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_step_is_divided_by_what_it_weighs_with_dropout_too(make_trainer, make_model, tokenizer, monkeypatch):
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(vocab_size=len(tokenizer), attention_dropout=0.6, **ids)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer = make_trainer(model, threshold=5.63, **options)
    counted, weighed = [], []
    get, log = trainer.get_batch_samples, trainer.log

    def get_batch_samples(*args):
        batches, count = get(*args)
        counted.append(count.item())
        return batches, count

    def keep(logs, *args):
        weighed.extend([trainer._counts["figa/weighted_tokens"]] if "loss" in logs else [])
        log(logs, *args)

    monkeypatch.setattr(trainer, "get_batch_samples", get_batch_samples)
    monkeypatch.setattr(trainer, "log", keep)
    trainer.train()
    assert counted[:3] == weighed


# --- loss -------------------------------------------------------------------------------------------------------------


def plain_loss(model, pairs, eos, *, alpha, beta, gamma, threshold, reading):
    """methods.md's formula, token by token, row by row, in Python floats. Also counts (weighted, dropped)."""
    total, weighted, dropped = 0.0, 0, 0
    for pair in pairs:
        for side in ("revised", "initial"):
            prompt, ids, labels = pair["prompt_ids"], pair[f"{side}_ids"], pair[f"{side}_labels"]
            logps = model(input_ids=tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
                logp = logps[len(prompt) + t - 1, token].item()
                is_end = t == len(ids) - 1 and token == eos
                if side == "revised":
                    r = alpha if label == 1 or is_end else gamma
                    total -= r * logp
                else:
                    r = beta if label == -1 and not is_end else 0.0
                    likely = -logp <= threshold if reading == "nll" else math.exp(logp) >= threshold
                    if r and not likely:
                        r = 0.0
                        dropped += 1
                    total += r * logp
                weighted += r != 0
    return total / weighted, weighted, dropped


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0, "beta": 0.5, "gamma": 0.0, "threshold": THRESHOLD, "reading": "nll"},
        {"alpha": 1.5, "beta": 0.7, "gamma": 0.2, "threshold": THRESHOLD, "reading": "nll"},
        {"alpha": 1.0, "beta": 0.5, "gamma": 0.1, "threshold": math.exp(-THRESHOLD), "reading": "probability"},
    ],
)
def test_loss_is_the_formula(make_trainer, pairs, tokenizer, options):
    arguments = {("threshold_reading" if name == "reading" else name): value for name, value in options.items()}
    trainer = make_trainer(**arguments)
    expected, weighted, dropped = plain_loss(trainer.model, pairs, tokenizer.eos_token_id, **options)
    result = trainer.loss(trainer.model, trainer.data_collator(pairs))
    assert result.loss.item() == pytest.approx(expected, abs=2e-6)
    assert (int(result.weighted_tokens), int(result.dropped_tokens)) == (weighted, dropped)
    assert 0 < dropped < sum(label == -1 for pair in pairs for label in pair["initial_labels"])


@pytest.mark.parametrize("named", [True, False])
def test_only_weighted_positions_equal_all_positions(make_trainer, pairs, named, monkeypatch):
    trainer = make_trainer()
    batch = trainer.data_collator(pairs)
    positions = int((batch["weights"] != 0).sum())
    columns = int((batch["weights"] != 0).any(0).sum())
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[:-1])))
    if not named:
        monkeypatch.setattr(trainer.model, "get_output_embeddings", lambda: None)
    trainer.loss(trainer.model, batch)
    trainer.model(input_ids=batch["input_ids"])
    # Afterwards the model is as it was.
    assert seen == [(positions,) if named else (len(batch["weights"]), columns), tuple(batch["input_ids"].shape)]
    some = trainer.loss(trainer.model, batch)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = token_logps(logits[:, :-1], batch["input_ids"][:, 1:])
    every = figa_loss(logps, batch["weights"], threshold=THRESHOLD)
    assert some.loss.item() == pytest.approx(every.loss.item(), abs=1e-6)
    assert some[1:] == every[1:]
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for a, b in zip(torch.autograd.grad(some.loss, weights), torch.autograd.grad(every.loss, weights), strict=True):
        close(a, b)


def test_batch_without_weights(make_trainer, pairs):
    trainer = make_trainer(alpha=0.0, beta=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    entry = trainer.state.log_history[0]
    assert (entry["loss"], entry["figa/weighted_tokens"], entry["figa/empty_batches"]) == (0, 0, 1)


# --- training ---------------------------------------------------------------------------------------------------------


def test_one_step_is_the_gradient_of_the_formula(make_trainer, pairs):
    trainer = make_trainer()
    before = parameters(trainer.model)
    loss = trainer.loss(trainer.model, trainer.data_collator(pairs)).loss
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    trainer.train()
    for (name, value), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        close(value.detach(), before[name] - 0.1 * gradient)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (3, 3)])
def test_accumulation_equals_one_batch(make_trainer, size, accumulation):
    whole = make_trainer()
    whole.train()
    parts = make_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    parts.train()
    assert parts.state.global_step == 1
    for (name, a), b in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-7, name
    ours, theirs = parts.state.log_history[0], whole.state.log_history[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    for name in ("figa/weighted_tokens", "figa/dropped_tokens", "figa/empty_batches"):
        assert ours[name] == theirs[name], name
    assert ours["figa/dropped_tokens"] > 0


def test_accumulation_over_several_steps(make_trainer):
    # Three epochs of 8 pairs, 4 a step: the second half of an epoch is a step of its own, with its own count.
    trainers = [
        make_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=6)
        for size in (4, 1)
    ]
    for trainer in trainers:
        trainer.train()
    first, second = trainers
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-6, name
    counts = [[entry["figa/weighted_tokens"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
    assert counts[0] == counts[1] and len(counts[0]) == 6


def test_training_lowers_the_loss_and_raises_the_margin(make_trainer, pairs):
    from datasets import Dataset

    trainer = make_trainer(data=Dataset.from_list(pairs), max_steps=30, learning_rate=5e-3, optim="adamw_torch")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1


def test_same_seed_same_model(make_trainer):
    results = []
    for _ in range(2):
        trainer = make_trainer(per_device_train_batch_size=2, max_steps=4)
        trainer.train()
        results.append(parameters(trainer.model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_lora_in_bf16_freezes_in_bf16(make_trainer):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for config, frozen in (
        ({"peft_config": adapter, "bf16": True}, torch.bfloat16),
        ({"peft_config": adapter}, torch.float32),
    ):
        trainer = make_trainer(**config)
        trainer.train()
        types = {(each.requires_grad, each.dtype) for each in trainer.model.parameters()}
        assert types == {(True, torch.float32), (False, frozen)}


def test_lora(make_trainer, tmp_path, tokenizer):
    from peft import LoraConfig

    from fgalign.core.modeling import load_causal_lm, save_model

    trainer = make_trainer(
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"), max_steps=3
    )
    before = parameters(trainer.model)
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    ids = tensor([[5, 6, 7]])
    trained = trainer.model.eval()(input_ids=ids).logits.detach()
    save_model(trainer.model, tokenizer, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not list((tmp_path / "merged").glob("adapter*"))
    close(load_causal_lm(tmp_path / "merged")(input_ids=ids).logits.detach(), trained, 1e-5)


def test_loss_that_is_not_finite(make_trainer, make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="FIGA loss is nan at step 0; expected a finite number: lower the learning"):
        make_trainer(model).train()


def test_unknown_reading(make_trainer):
    with pytest.raises(ConfigError, match="threshold_reading: expected 'nll' or 'probability', found 'p'"):
        make_trainer(threshold_reading="p")


# --- filter -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, [True, True, True]),
        # Raw rewards: initial 0, 2, 1; revised 4, 2, 3.
        ({"unit": "raw", "eta1": 1.0}, [True, False, False]),  # R(initial) < 1, strictly
        ({"unit": "raw", "eta2": 3.0}, [True, False, False]),  # R(revised) > 3, strictly
        ({"unit": "raw", "eta3": 2.0}, [True, False, False]),  # gaps 4, 0, 2
        ({"unit": "raw", "eta1": 1.5, "eta2": 2.5, "eta3": 1.0}, [True, False, True]),
        # Mean 2, variance (4 + 0 + 1 + 4 + 0 + 1) / 6 = 5/3, deviation 1.290994: initial -1.549, 0, -0.775;
        # revised 1.549, 0, 0.775; gaps 3.098, 0, 1.549.
        ({"eta1": -0.775}, [True, False, False]),
        ({"eta1": -0.774}, [True, False, True]),
        ({"eta2": 0.774}, [True, False, True]),
        ({"eta3": 1.548}, [True, False, True]),
        ({"eta3": 1.550}, [True, False, False]),
        ({"eta3": 3.099}, [False, False, False]),
    ],
)
def test_filter(config, kept):
    found = keep_pairs(tensor([0.0, 2.0, 1.0]), tensor([4.0, 2.0, 3.0]), FilterConfig(**config))
    # -1 / 1.290994 = -0.774597, so -0.775 is below it and -0.774 above.
    assert found.tolist() == kept
