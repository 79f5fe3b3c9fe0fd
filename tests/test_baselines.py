"""The baselines: what each trains on, losses against plain loops, token budgets, what is written beside models."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import tensor

from fgalign import sft, training
from fgalign.config import ConfigError, Profile, Section, parse_section
from fgalign.context import Context
from fgalign.core.compiled import OPTIONS
from fgalign.core.modeling import RuntimeConfig, freeze_in_bf16, load_causal_lm, save_model, set_up, use_bf16
from fgalign.core.raw_data import RawData, RawSplit, Truth, write_raw
from fgalign.core.schema import SPLITS, Demonstration, Edit, Preference, Prompt, write_records
from fgalign.core.tokens import encode_prompt, encode_response
from fgalign.errors import InputError, TrainingError
from fgalign.labels import LabelConfig, label_edits
from fgalign.methods import (
    METHODS,
    best_of_n,
    coh,
    dpo,
    expert_iteration,
    figa,
    get_method,
    ppo,
    rrhf,
    simpo,
    supervised,
)
from fgalign.rewards import training as rewards
from fgalign.stages import train as stages
from fgalign.tracking import Run
from fgalign.training import LengthSection, OptimConfig, ProgressCallback, decay, fitting, row_length

TRIPLES = [
    ("where is the cat?", "the cat sat on the mat", "the cat sat on the log"),
    ("who?", "a cat and a dog", "a dog"),
    ("what is red?", "the mat is red", "the mat and the log are red"),
    ("say it", "the dog is here", "the dog is the dog"),
    ("the log?", "brown", "red"),
    ("a mat?", "the mat is on the log", "a mat is on the log"),
]
RECORDS = [Preference(id=str(n), prompt=p, chosen=c, rejected=r) for n, (p, c, r) in enumerate(TRIPLES)]
EDITS = [Edit(id=str(n), prompt=p, initial=i, revised=r) for n, (p, r, i) in enumerate(TRIPLES[:4])]
OPTIM = {"learning_rate": 1e-2, "batch_size": 2, "schedule": "constant"}


class Log(Run):
    """A run that keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def log(self, metrics, step=0):
        self.entries.append((step, dict(metrics)))


@pytest.fixture(scope="module")
def profile(tmp_path_factory, make_model, tokenizer):
    """A profile with tiny models and six preferences and prompts, four labelled pairs."""
    root = tmp_path_factory.mktemp("tiny")
    params = {"seeds": [1], "runtime": {"device": "cpu", "threads": 1}, "sft": {"optim": OPTIM, "max_length": 64}}
    made = Profile("tiny", root, params, root / "params.yaml")
    split = RawSplit(
        prompts=[Prompt(id=record.id, prompt=record.prompt) for record in RECORDS],
        demonstrations=[Demonstration(id=r.id, prompt=r.prompt, completion=r.chosen) for r in RECORDS],
        preferences=RECORDS,
    )
    raw = RawData(dict.fromkeys(SPLITS, split), dict.fromkeys(SPLITS, Truth()))
    write_raw(raw, made.data / "raw", made.data / "gold")
    write_records(made.data / "labels" / "train.jsonl", label_edits(tokenizer, EDITS, LabelConfig()))
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    save_model(make_model(0, **settings), tokenizer, made.model_folder("base"))
    save_model(make_model(1, **settings), tokenizer, made.model_folder("sft", 1))
    save_model(make_model(2, "sequence", num_labels=1, **settings), tokenizer, made.model_folder("rm_preference", 1))
    (made.model_folder("sft", 1) / "budget.json").write_text("{}")
    return made


@pytest.fixture
def context(profile, tmp_path):
    runtime = RuntimeConfig(device="cpu", threads=1)
    out = tmp_path / "out"
    out.mkdir()
    return Context(profile, "mine", 1, set_up(runtime), runtime, out, Log())


@pytest.fixture
def rows(monkeypatch):
    """The rows that a method fine-tunes on through ``align_rows``, in place of training."""
    found = []
    for module in (coh, supervised):
        monkeypatch.setattr(module, "align_rows", lambda context, rows, *rest, start: found.extend(rows))
    return found


def config(kind, **options):
    section = {"kind": kind, "optim": OPTIM, "max_length": 64, **options}
    return parse_section(section, get_method(kind).Config, "here")


def lengths(tokenizer, *fields):
    """Tokens of prompt and response of each of RECORDS, summed over the fields."""
    return [
        len(encode_prompt(tokenizer, record.prompt)) + len(encode_response(tokenizer, getattr(record, field)))
        for record in RECORDS
        for field in fields
    ]


def logps(model, prompt, response):
    """Log-probabilities of the response's tokens, a plain forward pass without padding."""
    logits = model(input_ids=tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]


def batches(trainer):
    return list(trainer.get_train_dataloader())


# --- what they train on -----------------------------------------------------------------------------------------------


def test_supervised_rows(context, rows, tokenizer):
    supervised.run(context, config("supervised", response="chosen"))
    for row, record in zip(rows, RECORDS, strict=True):
        prompt, response = encode_prompt(tokenizer, record.prompt), encode_response(tokenizer, record.chosen)
        assert row == {
            "input_ids": prompt + response,
            "completion_mask": [0] * len(prompt) + [1] * len(response),
        }
    rows.clear()
    supervised.run(context, config("supervised", response="revised"))
    texts = [f"<|user|>{edit.prompt}<|assistant|>{edit.revised}<|end|>" for edit in EDITS]
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == texts
    with pytest.raises(InputError, match=r"pair '0': prompt and response have \d+ tokens, more than max_length 9; "):
        supervised.run(context, config("supervised", response="chosen", max_length=9))


def test_chain_of_hindsight_rows(context, rows, tokenizer):
    coh.run(context, config("coh", good="good: ", bad="bad: ", max_length=128))
    texts = []
    for record in RECORDS:
        for order in (
            (("good", record.chosen), ("bad", record.rejected)),
            (("bad", record.rejected), ("good", record.chosen)),
        ):
            answers = "".join(f"{phrase}: {text}<|end|>" for phrase, text in order)
            texts.append(f"<|user|>{record.prompt}<|assistant|>{answers}")
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == texts
    # The loss counts on the responses with their end tokens, and nowhere else.
    for row, record in zip(rows[:2], [RECORDS[0]] * 2, strict=True):
        counted = [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]
        first, second = encode_response(tokenizer, record.chosen), encode_response(tokenizer, record.rejected)
        assert counted == (first + second if row is rows[0] else second + first)
    assert json.loads((context.out / "decoding.json").read_text()) == {
        "best_of": 1,
        "reward": None,
        "prefix": "good: ",
    }
    with pytest.raises(InputError, match=r"pair '0', both responses: .* more than max_length 20"):
        coh.run(context, config("coh", max_length=20))


def test_decoding_of_coh_continues_as_training_began(context, rows, tokenizer):
    from fgalign.decoding import encode_prefixed, read_decoding

    coh.run(context, config("coh", max_length=128))
    start = encode_prefixed(tokenizer, RECORDS[0].prompt, read_decoding(context.out).prefix)
    assert rows[0]["input_ids"][: len(start)] == start
    assert rows[0]["completion_mask"][: len(start) + 1] == [0] * len(start) + [1]


def test_dpo_rows(tokenizer):
    (_, tokens, row), *_ = dpo.preference_rows(tokenizer, RECORDS)
    assert tokens == max(lengths(tokenizer, "chosen", "rejected")[:2])
    assert row == {
        "prompt_ids": encode_prompt(tokenizer, RECORDS[0].prompt),
        "chosen_ids": encode_response(tokenizer, RECORDS[0].chosen),
        "rejected_ids": encode_response(tokenizer, RECORDS[0].rejected),
    }


def test_rrhf_rows(context, tokenizer):
    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import score_responses

    rows = rrhf.candidate_rows(context, config("rrhf"))
    assert [row["scores"] for row in rows] == [[1.0, 0.0]] * 6
    ranked = rrhf.candidate_rows(context, config("rrhf", ranking="reward", needs="rm_preference"))
    reward = load_reward("rm_preference", context.model("rm_preference"), "cpu")
    for row, plain, record in zip(ranked, rows, RECORDS, strict=True):
        prompt = encode_prompt(tokenizer, record.prompt)
        both = [encode_response(tokenizer, record.chosen), encode_response(tokenizer, record.rejected)]
        assert (row["id"], row["prompt_ids"], row["responses"]) == (record.id, prompt, both)
        assert row["scores"] == pytest.approx(score_responses(reward, [prompt] * 2, both, tokenizer, 2, "cpu").tolist())
        assert {**row, "scores": [1.0, 0.0]} == plain
    # The reward model disagrees with the annotators somewhere.
    assert {chosen > rejected for chosen, rejected in (row["scores"] for row in ranked)} == {True, False}
    with pytest.raises(ConfigError, match="ranking: reward needs `needs`"):
        config("rrhf", ranking="reward")


def test_rrhf_collator():
    collator = rrhf.RRHFCollator(pad_token_id=0, max_length=5)
    examples = [
        {"id": "a", "prompt_ids": [5, 6], "responses": [[7, 8, 1], [9, 1]], "scores": [0.5, 2.0]},
        {"id": "b", "prompt_ids": [5], "responses": [[7, 1], [8, 9, 10, 1]], "scores": [1.0, 0.0]},
    ]
    batch = collator(examples)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 1, 0], [5, 6, 9, 1, 0, 0], [0, 5, 7, 1, 0, 0], [0, 5, 8, 9, 10, 1],
    ]  # fmt: skip
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert batch["response_mask"].int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["scores"].tolist() == [[0.5, 2.0], [1.0, 0.0]]
    with pytest.raises(TrainingError, match="pair 'a': prompt and response have 5 tokens, more than max_length 4; "):
        rrhf.RRHFCollator(pad_token_id=0, max_length=4)(examples)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Methods up to where they would train: ``trained(run, context, config)`` gives the trainer."""

    def stop(trainer, run, title, optim):
        raise StopIteration(trainer)

    def run(method, context, options):
        monkeypatch.setattr(method, "train", stop)
        try:
            method.run(context, options)
        except StopIteration as found:
            return found.value
        raise AssertionError

    return run


def test_dpo_loss_is_the_formula(context, trained, tokenizer, make_model):
    trainer = trained(dpo, context, config("dpo", beta=0.3))
    start = load_causal_lm(context.model("sft"))
    policy = make_model(7, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    trainer.model.load_state_dict(policy.state_dict())
    expected = []
    for record in RECORDS[:3]:
        margin = 0.0
        for sign, text in ((1, record.chosen), (-1, record.rejected)):
            prompt, response = encode_prompt(tokenizer, record.prompt), encode_response(tokenizer, text)
            margin += sign * (sum(logps(policy, prompt, response)) - sum(logps(start, prompt, response)))
        expected.append(math.log1p(math.exp(-0.3 * margin)))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(expected) / 3, abs=2e-5)


def test_rrhf_loss_is_the_formula(context, trained, tokenizer):
    options = config("rrhf", ranking="reward", needs="rm_preference", rank_weight=0.7)
    trainer = trained(rrhf, context, options)
    model = load_causal_lm(context.model("sft")).eval()
    total = 0.0
    for row in rrhf.candidate_rows(context, options)[:4]:
        means = [sum(part) / len(part) for part in (logps(model, row["prompt_ids"], r) for r in row["responses"])]
        better, worse = (0, 1) if row["scores"][0] > row["scores"][1] else (1, 0)
        total += 0.7 * max(0.0, means[worse] - means[better]) - means[better]
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(total / 4, abs=2e-6)


# --- training ---------------------------------------------------------------------------------------------------------

RUNS = {
    "dpo": {},
    "rrhf": {},
    "coh": {"max_length": 128},
    "supervised": {"response": "chosen"},
    "figa": {"needs": "rm_preference"},
}


def one_pass(kind, tokenizer):
    """Tokens of each example of a method, worked out from its data."""
    pairs = lengths(tokenizer, "chosen", "rejected")
    if kind == "supervised":
        return lengths(tokenizer, "chosen")
    if kind == "figa":
        return [sum(lengths(tokenizer, "chosen", "rejected")[2 * row : 2 * row + 2]) for row in range(len(EDITS))]
    both = [pairs[2 * row] + pairs[2 * row + 1] for row in range(len(RECORDS))]
    if kind != "coh":
        return both
    phrases = sum(len(tokenizer(text)["input_ids"]) for text in ("A good answer: ", "A bad answer: "))
    return [
        tokens - len(encode_prompt(tokenizer, record.prompt)) + phrases
        for tokens, record in zip(both, RECORDS, strict=True)
        for _ in range(2)
    ]


@pytest.mark.parametrize("kind", RUNS)
def test_tokens_spent_without_a_budget(kind, context, tokenizer):
    # Padding does not count: batches of 2 of different lengths. Two passes over all examples.
    method = get_method(kind)
    method.run(context, config(kind, **RUNS[kind], optim={**OPTIM, "epochs": 2}))
    examples = one_pass(kind, tokenizer)
    assert context.spent == {
        "training_tokens": 2 * sum(examples),
        "sampled_tokens": 0,
        "gradient_updates": 2 * math.ceil(len(examples) / 2),
    }
    assert (context.out / "model.safetensors").exists()


@pytest.mark.parametrize("kind", RUNS)
def test_a_budget_ends_training_at_the_step_that_reaches_it(kind, context, tokenizer):
    # All examples in one step, as two micro-batches; the second step reaches a budget one token above the first's.
    examples = one_pass(kind, tokenizer)
    step = sum(examples)
    optim = {**OPTIM, "batch_size": len(examples) // 2, "accumulation": 2, "epochs": 9}
    options = {**RUNS[kind], "optim": {**optim, "max_tokens": step + 1}}
    get_method(kind).run(context, config(kind, **options))
    assert (context.spent["training_tokens"], context.spent["gradient_updates"]) == (2 * step, 2)
    context.spent = {}
    get_method(kind).run(context, config(kind, **{**options, "optim": {**optim, "max_tokens": step}}))
    assert (context.spent["training_tokens"], context.spent["gradient_updates"]) == (step, 1)


def test_a_budget_changes_nothing_before_it_ends(context):
    # Two examples have at most 19 + 16 tokens and four at least 11 + 13 + 15 + 15, so the second step reaches 41.
    states = []
    for optim in ({**OPTIM, "max_steps": 2}, {**OPTIM, "epochs": 9, "max_tokens": 41}):
        supervised.run(context, config("supervised", response="chosen", optim=optim))
        states.append((context.out / "model.safetensors").read_bytes())
        assert context.spent.pop("gradient_updates") == 2
        context.spent = {}
    assert states[0] == states[1]


def test_the_schedule_is_laid_out_over_the_budget(context, tokenizer, monkeypatch):
    # Examples of 19, 15, 13 and 11 or so tokens, one a step: a step's learning rate is 0.01 times what is left of the
    # 50 tokens when it begins; with two steps of warm-up the first has 0 and the second half of that.
    rates, lengths = [], []

    def train(**optim):
        rates.clear(), lengths.clear()
        options = {**OPTIM, "batch_size": 1, "epochs": 9, "max_tokens": 50, **optim}
        supervised.run(context, config("supervised", response="chosen", optim=options))

    class Recorder(ProgressCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

        def on_step_end(self, args, state, control, **kwargs):
            lengths.append(state.num_input_tokens_seen)
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(training, "ProgressCallback", Recorder)
    train(schedule="linear")
    assert len(rates) >= 3 and lengths[-1] >= 50 > lengths[-2]
    assert rates == pytest.approx([0.01 * (1 - seen / 50) for seen in [0, *lengths[:-1]]])
    train(schedule="linear", warmup_steps=2)
    assert rates[:3] == pytest.approx([0, 0.005 * (1 - lengths[0] / 50), 0.01 * (1 - lengths[1] / 50)])
    train(schedule="cosine")
    assert rates[1] == pytest.approx(0.005 * (1 + math.cos(math.pi * lengths[0] / 50)))
    train(schedule="constant")
    assert rates == [0.01] * len(rates)


def test_row_length_by_hand():
    assert row_length({"input_ids": [1, 2, 3], "id": "a long name"}) == 3
    assert row_length({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}) == 5
    assert row_length({"prompt_ids": [1], "responses": [[2], [3, 4]], "scores": [0.5, 0.25]}) == 3
    assert row_length({"prompt": "ab", "chosen": "cde", "rejected": "f"}) == 5


@pytest.mark.parametrize("kind", RUNS)
def test_every_trainer_can_group_by_length(kind, context, tokenizer, monkeypatch):
    """Grouped are prompt and response, or of two responses the longer."""
    seen = []

    class Recorder(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(kwargs["train_dataloader"].batch_sampler.sampler.lengths)
            super().on_train_begin(args, state, control, **kwargs)

    monkeypatch.setattr(training, "ProgressCallback", Recorder)
    optim = {**OPTIM, "max_steps": 1, "sampling": "group_by_length"}
    get_method(kind).run(context, config(kind, **RUNS[kind], optim=optim))
    if kind in ("dpo", "rrhf"):
        assert seen == [
            [
                len(encode_prompt(tokenizer, record.prompt))
                + max(len(encode_response(tokenizer, text)) for text in (record.chosen, record.rejected))
                for record in RECORDS
            ]
        ]
    assert len(seen) == 1 and len(set(seen[0])) > 1


@pytest.mark.parametrize("kind", RUNS)
def test_every_trainer_compiled_is_the_same_up_to_rounding(kind, context, monkeypatch):
    # Traced as ever, but run op by op: writing kernels takes long.
    compiled = []

    def tracing(function, **options):
        compiled.append(options)
        return compiler(function, **options)

    compiler = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", tracing)
    states, layers = [], []
    for on in (False, True):
        optim = {**OPTIM, "max_steps": 2, "compile": on}
        get_method(kind).run(context, config(kind, **RUNS[kind], optim=optim))
        states.append(load_causal_lm(context.out).state_dict())
        layers.append(len(compiled))
    assert layers == [0, 2] and compiled == [{"dynamic": True, "options": OPTIONS}] * 2
    start = load_causal_lm(context.model("sft")).state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(start[name], value) for name, value in states[0].items())


def test_compiling_is_for_one_process(context, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ConfigError, match="compile: expected false on 2 processes, found true"):
        supervised.run(context, config("supervised", response="chosen", optim={**OPTIM, "compile": True}))


@pytest.mark.parametrize("kind", RUNS)
def test_every_trainer_attends_in_float32_on_the_cpu(kind, context, monkeypatch):
    seen = []

    def attention(query, *rest, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return attend(query, *rest, **options)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    context.runtime = RuntimeConfig(device="cpu", threads=1, dtype="bf16")
    get_method(kind).run(context, config(kind, **RUNS[kind], optim={**OPTIM, "max_steps": 1}))
    assert {(dtype, autocast) for dtype, autocast, graded in seen if graded} == {(torch.float32, False)}
    assert load_causal_lm(context.out).config._attn_implementation == "sdpa"


def test_decay_by_hand():
    assert [decay("linear", part) for part in (0.0, 0.25, 1.0, 1.5)] == [1.0, 0.75, 0.0, 0.0]
    assert [decay("cosine", part) for part in (0.0, 0.5, 1.0, 1.5)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert decay("constant", 0.7) == decay("constant_with_warmup", 0.7) == 1.0


@pytest.mark.parametrize("kind", ["dpo", "rrhf"])
def test_training_widens_the_margin(kind, context, tokenizer):
    def margin(model):
        total = 0.0
        for record in RECORDS:
            prompt = encode_prompt(tokenizer, record.prompt)
            chosen, rejected = (encode_response(tokenizer, text) for text in (record.chosen, record.rejected))
            chosen_logps, rejected_logps = logps(model, prompt, chosen), logps(model, prompt, rejected)
            total += sum(chosen_logps) / len(chosen) - sum(rejected_logps) / len(rejected)
        return total

    get_method(kind).run(context, config(kind, optim={**OPTIM, "epochs": 8}))
    assert margin(load_causal_lm(context.out)) > margin(load_causal_lm(context.model("sft"))) + 1


@pytest.mark.parametrize("kind", [*RUNS, "simpo"])
def test_lora(kind, context):
    optim = {**OPTIM, "max_steps": 2, "lora": {"r": 2, "alpha": 4}}
    method = get_method(kind)
    simpo = parse_section({"kind": "simpo", "optim": optim}, method.Config, "here") if kind == "simpo" else None
    method.run(context, simpo or config(kind, **RUNS[kind], optim=optim))
    before, after = load_causal_lm(context.model("sft")).state_dict(), load_causal_lm(context.out).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved)
    assert not list(context.out.glob("adapter*"))


@pytest.mark.parametrize("kind", RUNS)
def test_lora_in_bf16_adds_to_frozen_weights_in_bf16(kind, context):
    context.runtime = RuntimeConfig(device="cpu", threads=1, dtype="bf16")
    optim = {**OPTIM, "max_steps": 2, "lora": {"r": 2, "alpha": 4}}
    get_method(kind).run(context, config(kind, **RUNS[kind], optim=optim))
    before, after = load_causal_lm(context.model("sft")).state_dict(), load_causal_lm(context.out).state_dict()
    for name, value in after.items():
        if "_proj" not in name:
            assert torch.equal(value, before[name].bfloat16().float())
    moved = [name for name, value in after.items() if not torch.equal(value, value.bfloat16().float())]
    assert moved and all("_proj" in name for name in moved)


def test_freezing_in_bf16_by_hand():
    from peft import LoraConfig, get_peft_model
    from torch import nn

    class Net(nn.Module):
        _keep_in_fp32_modules_strict = ("gate",)

        def __init__(self):
            super().__init__()
            self.layer, self.gate = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            for linear in (self.layer, self.gate):
                nn.init.constant_(linear.weight, 1 + 2**-9)

    net = Net()
    freeze_in_bf16(net)  # nothing is frozen here
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    model = get_peft_model(net, LoraConfig(r=1, lora_alpha=1, target_modules=["layer"]))
    freeze_in_bf16(model)
    # Next to 1, bf16 has steps of 2^-7.
    assert model.layer.base_layer.weight.dtype == torch.bfloat16 and float(model.layer.base_layer.weight) == 1
    assert model.gate.weight.dtype == torch.float32 and float(model.gate.weight) == 1 + 2**-9
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_an_adapter_over_bf16_runs_with_autocast_and_without(make_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(0).eval(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    inputs = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            torch.nn.init.normal_(module.weight)
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
        if name.endswith("lora_B.default"):
            torch.nn.init.normal_(module.weight, std=0.1)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    freeze_in_bf16(model)
    freeze_in_bf16(model)  # once more changes nothing
    for autocast, kind in ((True, torch.bfloat16), (False, torch.float32)):
        inputs.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits
        assert set(inputs) == {kind}
        torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "device", "units", "expected"),
    [
        ("auto", "cpu", True, False), ("auto", "cuda", False, True), ("fp32", "cuda", True, False),
        ("bf16", "cpu", False, True), ("matrix_units", "cpu", True, True), ("matrix_units", "cpu", False, False),
        ("matrix_units", "cpu", None, False), ("matrix_units", "cuda", False, True), ("fp32", "cpu", True, False),
    ],
)  # fmt: skip
def test_where_bf16_is_used(monkeypatch, dtype, device, units, expected):
    if units is None:  # an older torch cannot say
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    assert use_bf16(RuntimeConfig(dtype=dtype), torch.device(device)) is expected


# --- best of n and expert iteration -----------------------------------------------------------------------------------


def test_best_of_n_is_the_sft_model_and_how_to_decode_it(context):
    best_of_n.run(context, parse_section({"kind": "best_of_n", "needs": "rm_edit", "n": 5}, best_of_n.Config, "here"))
    sft = context.model("sft")
    names = {path.name for path in sft.iterdir()} - {"budget.json"}
    assert {path.name for path in context.out.iterdir()} == names | {"decoding.json"}
    assert all((context.out / name).read_bytes() == (sft / name).read_bytes() for name in names)
    decoding = json.loads((context.out / "decoding.json").read_text())
    assert decoding == {"best_of": 5, "reward": "rm_edit", "prefix": ""}
    assert context.spent == {"training_tokens": 0, "sampled_tokens": 0, "gradient_updates": 0}


EXPERT = {"needs": "rm_preference", "samples": 3, "response_length": 24, "sample_batch_size": 4}


@pytest.fixture
def rounds(monkeypatch, make_model, tokenizer):
    """What expert iteration hands to each round's training; each round then saves another random model."""
    found = []

    def align_rows(context, rows, optim, max_length, *, start):
        found.append((rows, optim, start))
        settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        save_model(make_model(10 + len(found), **settings), tokenizer, context.out)
        context.spend(training_tokens=700, gradient_updates=2)

    monkeypatch.setattr(expert_iteration, "align_rows", align_rows)
    return found


def best_responses(context, model, generator):
    """Of three draws a prompt the complete one with the highest reward, worked out plainly; and all tokens drawn."""
    from fgalign.core.rollout import sample_all, uniforms
    from fgalign.rewards import load_reward
    from fgalign.rewards.scoring import score_responses

    tokenizer, prompts = context.tokenizer, [encode_prompt(context.tokenizer, record.prompt) for record in RECORDS]
    reward = load_reward("rm_preference", context.model("rm_preference"), "cpu")
    best, tokens = [(-math.inf, None)] * len(prompts), 0
    for _ in range(3):
        drawn = sample_all(
            model,
            prompts,
            uniforms(6, 24, generator),
            batch_size=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        responses = [ids for rollout in drawn for ids in rollout.response_lists()]
        tokens += sum(map(len, responses))
        scores = score_responses(reward, prompts, responses, tokenizer, 6, "cpu").tolist()
        for row, (ids, score) in enumerate(zip(responses, scores, strict=True)):
            if ids[-1] == tokenizer.eos_token_id and score > best[row][0]:
                best[row] = (score, ids)
    return [(prompt, ids) for prompt, (_, ids) in zip(prompts, best, strict=True) if ids is not None], tokens


def test_expert_iteration_trains_on_the_best_complete_responses_of_the_latest_policy(context, rounds, make_model):
    expert_iteration.run(context, config("expert_iteration", **EXPERT, rounds=2))
    generator = torch.Generator().manual_seed(1)
    settings = {"vocab_size": len(context.tokenizer), "eos_token_id": context.tokenizer.eos_token_id, "pad_token_id": 0}
    policies = [load_causal_lm(context.model("sft")).eval(), make_model(11, **settings)]
    tokens = 0
    for (rows, _, _), policy in zip(rounds, policies, strict=True):
        expected, drawn = best_responses(context, policy, generator)
        tokens += drawn
        assert 0 < len(expected) < 6  # some prompts have no complete response
        assert [row["input_ids"] for row in rows] == [prompt + ids for prompt, ids in expected]
        assert [row["completion_mask"] for row in rows] == [[0] * len(p) + [1] * len(ids) for p, ids in expected]
    assert [start for _, _, start in rounds] == [context.model("sft"), context.out]
    assert context.spent == {"training_tokens": 1400, "sampled_tokens": tokens, "gradient_updates": 4}
    assert [entry["expert/prompts"] for _, entry in context.run.entries] == [len(rows) for rows, _, _ in rounds]


def test_expert_iteration_shares_its_token_budget(context, rounds):
    optim = {**OPTIM, "max_tokens": 2000}
    options = {**EXPERT, "response_length": 40, "rounds": 3, "optim": optim}
    expert_iteration.run(context, config("expert_iteration", **options))
    # Round ends are due at 666, 1333 and 2000 tokens; each round spends 700.
    assert [optim.max_tokens for _, optim, _ in rounds] == [666, 633, 600]


def test_expert_iteration_without_complete_responses(context):
    with pytest.raises(TrainingError, match=r"methods\.mine: round 1: all 3 responses to each prompt were cut off at"):
        expert_iteration.run(context, config("expert_iteration", **{**EXPERT, "response_length": 1}))


def test_expert_iteration_for_real(context):
    expert_iteration.run(context, config("expert_iteration", **EXPERT, rounds=2))
    assert context.spent["gradient_updates"] >= 2 and context.spent["training_tokens"] > 0
    before, after = load_causal_lm(context.model("sft")).state_dict(), load_causal_lm(context.out).state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_spending_adds_up(context):
    context.spend(training_tokens=3, gradient_updates=1)
    context.spend(training_tokens=4, sampled_tokens=5)
    assert context.spent == {"training_tokens": 7, "sampled_tokens": 5, "gradient_updates": 1}


def test_budget_file(profile, tokenizer):
    from fgalign.stages.train import run_sft, train_seeds

    train_seeds(profile, "counted", Section(), lambda context: context.spend(training_tokens=3))
    folder = profile.model_folder("counted", 1)
    assert json.loads((folder / "budget.json").read_text()) == {
        "training_tokens": 3,
        "sampled_tokens": 0,
        "gradient_updates": 0,
    }
    train_seeds(profile, "silent", Section(), lambda context: None)
    assert list(profile.model_folder("silent", 1).iterdir()) == []
    saved = profile.model_folder("sft", 1)
    kept = {path.name: path.read_bytes() for path in saved.iterdir()}
    run_sft(profile)
    budget = json.loads((saved / "budget.json").read_text())
    assert budget == {"training_tokens": sum(lengths(tokenizer, "chosen")), "sampled_tokens": 0, "gradient_updates": 3}
    for name, content in kept.items():
        (saved / name).write_bytes(content)


def test_ppo_counts_what_it_trains_on(context, profile, tokenizer):
    trainer = {
        "updates": 2, "rollout_batch_size": 4, "minibatch_size": 2, "epochs": 3, "learning_rate": 0.0,
        "response_length": 8, "calibration_prompts": 6, "kl_coef": 0.0,
    }  # fmt: skip
    section = {"kind": "ppo", "needs": "rm_preference", "trainer": trainer, "curve": {"every": 1, "prompts": 2}}
    method = get_method("ppo")
    method.run(context, parse_section(section, method.Config, "here"))
    # Two rounds of 4 responses, the prompts in the seeded order without repeats; three passes over each round.
    order = torch.randperm(6, generator=(generator := torch.Generator().manual_seed(1))).tolist()
    order += torch.randperm(6, generator=generator).tolist()
    prompts = sum(len(encode_prompt(tokenizer, RECORDS[row].prompt)) for row in order[:8])
    assert context.spent["gradient_updates"] == 2 * 3 * 2
    assert context.spent["training_tokens"] == 3 * (prompts + context.spent["sampled_tokens"])
    assert 8 <= context.spent["sampled_tokens"] <= 64


def test_the_kinds():
    assert {"supervised", "dpo", "rrhf", "coh", "best_of_n", "expert_iteration"} < set(METHODS)
    assert figa.Config.model_fields["optim"].annotation is OptimConfig


# --- options that all share -------------------------------------------------------------------------------------------


def test_dropout_that_dpo_would_turn_off_is_refused(context):
    with pytest.raises(ConfigError, match=r"methods\.mine\.optim\.lora\.dropout: expected 0, .* found 0\.1"):
        dpo.run(context, config("dpo", optim={**OPTIM, "lora": {"dropout": 0.1}}))


def test_rows_that_fit_by_hand(context, capsys):
    rows = [("a", 8, "first"), ("b", 9, "second"), ("c", 3, "third")]
    assert fitting(context, rows, LengthSection(max_length=9), "pairs") == ["first", "second", "third"]
    with pytest.raises(InputError, match=r"^b: prompt and response have 9 tokens, more than max_length 8; raise it, "):
        fitting(context, rows, LengthSection(max_length=8), "pairs")
    assert capsys.readouterr().out == "" and context.run.entries == []
    assert fitting(context, rows, LengthSection(max_length=9, too_long="drop"), "pairs") == ["first", "second", "third"]
    assert capsys.readouterr().out == ""
    assert fitting(context, iter(rows), LengthSection(max_length=8, too_long="drop"), "train prompts") == [
        "first",
        "third",
    ]
    assert capsys.readouterr().out == "mine seed 1: 1 of 3 train prompts left out: more than max_length 8 tokens\n"
    assert context.run.entries == [(0, {"left_out/pairs": 0}), (0, {"left_out/train_prompts": 1})]
    with pytest.raises(
        InputError,
        match=r"^mine seed 1: pairs: expected some of at most max_length 2 .*, found none among 3 \(the short.* 3\)",
    ):
        fitting(context, rows, LengthSection(max_length=2, too_long="drop"), "pairs")


def longest(tokenizer, kind):
    """Tokens that each row has to have room for, worked out from the data: with a pair, those of its longer side."""
    if kind in ("sft", "supervised"):
        return lengths(tokenizer, "chosen")
    if kind in ("ppo", "expert_iteration"):
        return [len(encode_prompt(tokenizer, record.prompt)) + 24 for record in RECORDS]
    if kind == "coh":
        return one_pass("coh", tokenizer)
    both = lengths(tokenizer, "chosen", "rejected")
    pairs = [max(both[2 * row : 2 * row + 2]) for row in range(len(RECORDS))]
    return pairs[: len(EDITS)] if kind in ("figa", "rm_token") else pairs


@pytest.fixture
def learnt_from(monkeypatch):
    """``learnt_from(kind, context, **limits)``: the rows that reach what would train or sample, as token ids or a
    row's columns."""

    def stop(*args, **kwargs):
        raise StopIteration(kwargs.get("train_dataset") or args[1])

    def trainer(trainer, *_):
        raise StopIteration(list(trainer.train_dataset))

    def run(kind, context, **limits):
        for module in (sft, rewards, dpo, rrhf, simpo, figa):
            monkeypatch.setattr(module, "train", trainer)
        monkeypatch.setattr(expert_iteration, "draw_best", stop)
        monkeypatch.setattr(ppo, "FineGrainedPPOTrainer", stop)
        options = {"optim": OPTIM, **limits}
        try:
            if kind == "sft":
                monkeypatch.setitem(context.profile.params, "sft", options)
                monkeypatch.setattr(stages, "train_seeds", lambda *arguments: arguments[-1](context))
                stages.run_sft(context.profile)
            elif kind == "rm_preference":
                section = rewards.RewardSection(start="sft", **options)
                rewards.train_sequence_model(context, section, rewards.preference_rows(context.tokenizer, TRIPLES))
            elif kind == "rm_token":
                section = rewards.TokenRewardSection(start="sft", **options)
                rewards.train_token_model(context, section, context.labelled("train"))
            else:
                needs = {"needs": "rm_preference"} if kind in ("figa", "ppo", "expert_iteration") else {}
                own = {"supervised": {"response": "chosen"}, "expert_iteration": {"response_length": 24}}.get(kind, {})
                if kind == "ppo":
                    own = {"trainer": {"response_length": 24}}
                    del options["optim"]
                method = get_method(kind)
                method.run(context, parse_section({"kind": kind, **options, **needs, **own}, method.Config, "here"))
        except StopIteration as found:
            return found.value
        raise AssertionError

    return run


NAMED = {
    "sft": "demonstrations",
    "supervised": "responses",
    "coh": "rows",
    "ppo": "train prompts",
    "expert_iteration": "train prompts",
    **dict.fromkeys(["rm_preference", "rm_token", "dpo", "simpo", "rrhf", "figa"], "pairs"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_one_token_too_many_stops_training_or_is_left_out(kind, context, tokenizer, learnt_from, capsys):
    sizes = longest(tokenizer, kind)
    most = max(sizes)
    whole = learnt_from(kind, context, max_length=most)
    assert len(whole) == len(sizes)
    with pytest.raises(InputError, match=rf"have {most} tokens, more than max_length {most - 1}; raise it"):
        learnt_from(kind, context, max_length=most - 1)
    assert "left out" not in capsys.readouterr().out
    left = learnt_from(kind, context, max_length=most - 1, too_long="drop")
    assert left == [row for row, size in zip(whole, sizes, strict=True) if size < most]
    count = len(whole) - len(left)
    line = f"mine seed 1: {count} of {len(whole)} {NAMED[kind]} left out: more than max_length {most - 1} tokens\n"
    assert 0 < count < len(whole) and line in capsys.readouterr().out
    assert (0, {f"left_out/{NAMED[kind].replace(' ', '_')}": count}) in context.run.entries


def test_the_learning_curve_has_the_first_prompts_that_fit(context, tokenizer, learnt_from, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(ppo, "CurveRecorder", lambda *arguments: shown.append(arguments[2:]))
    size = max(longest(tokenizer, "ppo")) - 1
    learnt_from("ppo", context, max_length=size, too_long="drop", curve={"prompts": 3})
    fit = [record for record in RECORDS if len(encode_prompt(tokenizer, record.prompt)) + 24 <= size]
    ((records, ids),) = shown
    assert [record.id for record in records] == [record.id for record in fit][:3]
    assert ids == [encode_prompt(tokenizer, record.prompt) for record in fit][:3]
    left_out = len(RECORDS) - len(fit)
    assert f"mine seed 1: {left_out} of 6 validation prompts left out" in capsys.readouterr().out


def test_figas_filter_and_count_know_nothing_of_what_is_too_long(context, tokenizer, learnt_from, monkeypatch):
    scored = []
    monkeypatch.setattr(
        figa,
        "pair_rewards",
        lambda pairs, *_: scored.append(pairs) or (tensor([0.0] * len(pairs)), tensor([1.0] * len(pairs))),
    )
    sizes = longest(tokenizer, "figa")
    limits = {"max_length": max(sizes) - 1, "filter": {"eta3": 0.5}}
    fit = [str(row) for row, size in enumerate(sizes) if size < max(sizes)]
    kept = learnt_from("figa", context, **limits, too_long="drop", pairs=len(fit))
    assert [row["id"] for row in kept] == [pair.id for pair in scored[0]] == fit
    # Without it, a pair that the filter leaves out may be as long as it likes.
    rewards = tensor([float(size < max(sizes)) for size in sizes])
    monkeypatch.setattr(figa, "pair_rewards", lambda *_: (torch.zeros(len(sizes)), rewards))
    assert [row["id"] for row in learnt_from("figa", context, **limits)] == fit


def test_weights_that_are_not_finite_after_few_steps_are_no_model(context):
    # Three steps: the loss is logged every five.
    with pytest.raises(TrainingError, match=r"mine seed 1: .* is not finite after 3 steps"):
        rrhf.run(context, config("rrhf", optim={**OPTIM, "learning_rate": 1e38}))
    assert not list(context.out.glob("*.safetensors"))


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_a_constant_rate_has_its_warm_up(context, tmp_path, max_tokens):
    optim = OptimConfig(**{**OPTIM, "warmup_steps": 4, "max_tokens": max_tokens})
    arguments = training.trainer_arguments(optim, output_dir=tmp_path, seed=1, device="cpu", bf16=False)
    assert (arguments["lr_scheduler_type"], arguments["warmup_steps"]) == ("constant_with_warmup", 4)


def test_what_reads_like_a_special_token_in_a_response_is_text(tokenizer):
    eos = tokenizer.eos_token
    ids = encode_response(tokenizer, f"the cat {eos} sat")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).strip() == f"the cat {eos} sat"


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"learning_rat": 1.0}, r"trainer\.learning_rat: no such key; did you mean learning_rate\?"),
        ({"seed": 3}, r"trainer\.seed: no such key"),
        ({"kl_coef": "much"}, r"trainer\.kl_coef: .*valid number.*found 'much'"),
    ],
)
def test_a_slip_in_ppos_section_is_refused(trainer, message):
    with pytest.raises(ConfigError, match=message):
        parse_section({"kind": "ppo", "needs": "rm_token", "trainer": trainer}, get_method("ppo").Config, "here")


def test_ppos_settings_have_the_trainers_defaults():
    section = {"kind": "ppo", "needs": "rm_token", "trainer": {"updates": 3}}
    found = parse_section(section, get_method("ppo").Config, "here")
    assert (found.setting("updates"), found.setting("response_length")) == (3, 48)
    # YAML reads 1e-4, which has no point, as a text.
    found = parse_section({**section, "trainer": {"learning_rate": "1e-4"}}, get_method("ppo").Config, "here")
    assert found.trainer == {"learning_rate": 1e-4}
