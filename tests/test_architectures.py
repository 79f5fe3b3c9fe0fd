"""Any causal LM: families that are built otherwise than Llama (learned or no positions, projections, no reward model in
transformers, caches of their own) through loading, sampling, FIGA, PPO and reward models, with tiny random weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from fgalign.core.modeling import (
    check_positions,
    load_causal_lm,
    load_sequence_reward_model,
    load_token_reward_model,
    save_model,
)
from fgalign.core.rollout import as_rollout, check_fixed_cache, response_logps
from fgalign.errors import ConfigError, InputError
from fgalign.losses.figa import figa_loss
from fgalign.methods.figa import FIGAConfig, FIGATrainer
from fgalign.ppo_trainer import FineGrainedPPOConfig, FineGrainedPPOTrainer
from fgalign.rewards import reward_function

PAD, EOS, SIZE = 0, 1, 40
COMMON = {
    "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},  # hidden states are projected before the output layer
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},  # its weights are not under `model`
    "gemma3_text": {"head_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gemma3": {"head_dim": 8, "sliding_window": 4},  # reads images too: the text has a configuration of its own
}
PARTS = {
    "gemma3": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_id": 39, "boi_token_index": 38, "eoi_token_index": 37,
    }
}  # fmt: skip
"""The parts of models that have other ones than the text, whose settings are those of ``FAMILIES``."""
WITHOUT_REWARD_MODELS = {
    "opt": "OPTForTokenClassification", "gptj": "GPTJForTokenClassification", "gemma3": "Gemma3ForTokenClassification",
}  # fmt: skip
"""Families for which transformers has no token classification, and the name of ours."""


class Tokenizer:
    """What the trainers ask of a tokenizer."""

    pad_token_id, eos_token_id, pad_token, name_or_path = PAD, EOS, "<pad>", "tiny"

    def save_pretrained(self, folder):
        """Nothing to keep."""


def build(kind, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES.get(kind, {}), **changes}
    if kind in PARTS:
        settings = {"text_config": settings, **PARTS[kind]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    def save(kind, **changes):
        save_model(build(kind, **changes), Tokenizer(), tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.mark.parametrize("kind", FAMILIES)
def test_reward_models_read_the_policys_hidden_states(saved, tmp_path, kind):
    folder = saved(kind)
    ids = tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
    hidden = load_causal_lm(folder).eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    for level, load, outputs in (("token", load_token_reward_model, 3), ("sequence", load_sequence_reward_model, 1)):
        model = load(folder, num_labels=outputs).eval()
        head = getattr(model, "score", None) or model.classifier
        expected = head(hidden) if level == "token" else head(hidden)[:, -1]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        if level == "token" and kind in WITHOUT_REWARD_MODELS:
            assert type(model).__name__ == WITHOUT_REWARD_MODELS[kind]
        # What is saved is read again as it was.
        save_model(model, Tokenizer(), tmp_path / level)
        again = load(tmp_path / level).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_score_is_that_of_the_last_token_even_if_it_pads(saved, kind):
    model = load_sequence_reward_model(saved(kind), num_labels=1).eval()
    torch.nn.init.normal_(model.score.weight)
    prompts, responses = [[3, 4, 5], [7]], [[6, 7, PAD], [8, 9]]
    found = reward_function(model, "sequence")(as_rollout(prompts, responses, PAD, "cpu"))
    for row, ids in enumerate([[3, 4, 5, 6, 7, PAD], [7, 8, 9]]):
        scores = model.score(model.model(input_ids=tensor([ids])).last_hidden_state)[0, :, 0]
        assert float(found[row]) == pytest.approx(float(scores[-1]), abs=1e-5)
        assert abs(float(scores[-1] - scores[-2])) > 1e-2
    text = model.config.get_text_config()
    assert text.pad_token_id == PAD
    text.pad_token_id = None
    with pytest.raises(
        ConfigError, match=r"expected a pad token in its configuration, found none; set config\.get_text"
    ):
        reward_function(model, "sequence")


def test_missing_weights_are_not_drawn_at_random(saved):
    from safetensors.torch import load_file, save_file

    folder = saved("llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1.mlp" not in name}, folder / "model.safetensors"
    )
    with pytest.raises(
        InputError, match=r"expected the weights of a LlamaForCausalLM, found none for model.layers.1.mlp"
    ):
        load_causal_lm(folder)


PROMPTS = [[3, 4, 5, 6], [7], [8, 9], [10, 11, 12]]


def ppo_config(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path / "out"), "updates": 1, "rollout_batch_size": 4, "minibatch_size": 4, "epochs": 1,
        "response_length": 5, "calibration_prompts": 4, "use_cpu": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return FineGrainedPPOConfig(**{**settings, **changes})


@pytest.mark.parametrize("kind", FAMILIES)
def test_ppo_runs_and_its_log_probabilities_are_those_of_single_rows(saved, tmp_path, kind):
    folder = saved(kind)
    reward = reward_function(load_token_reward_model(folder, num_labels=3), "token")
    trainer = FineGrainedPPOTrainer(
        load_causal_lm(folder), load_causal_lm(folder), reward, ppo_config(tmp_path), PROMPTS, Tokenizer()
    )
    rollout = trainer.sample(PROMPTS)
    together = trainer.logps(rollout)
    for row, response in enumerate(rollout.response_lists()):
        alone = trainer.policy(input_ids=tensor([PROMPTS[row] + response])).logits[0, len(PROMPTS[row]) - 1 : -1]
        expected = alone.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(together[row, : len(response)], expected, rtol=0, atol=1e-4)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.save_model(tmp_path / "out")
    torch.testing.assert_close(response_logps(load_causal_lm(tmp_path / "out").eval(), rollout), trainer.logps(rollout))


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_is_trained_over_frozen_weights_in_bf16(saved, tmp_path, kind):
    from peft import LoraConfig

    folder = saved(kind)
    reward = reward_function(load_token_reward_model(folder, num_labels=3), "token")
    args = ppo_config(tmp_path, learning_rate=5e-2, bf16=True)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = FineGrainedPPOTrainer(
        load_causal_lm(folder), None, reward, args, PROMPTS, Tokenizer(), peft_config=adapter
    )
    trainer.train()
    rollout = trainer.sample(PROMPTS)
    trainer.save_model(tmp_path / "out")
    start = load_causal_lm(folder).eval()
    for parameter in start.parameters():
        parameter.data = parameter.data.bfloat16().float()
    plain, merged = (response_logps(each, rollout) for each in (start, load_causal_lm(tmp_path / "out").eval()))
    mask = rollout.response_mask
    # The reference is the model as it was, the policy what is saved, up to bf16; and the adapter has moved.
    torch.testing.assert_close(trainer.ref_logps(rollout)[mask], plain[mask], rtol=0, atol=0.03)
    torch.testing.assert_close(trainer.logps(rollout)[mask], merged[mask], rtol=0, atol=0.03)
    assert (plain - merged)[mask].abs().max() > 0.06
    figa = FIGATrainer(
        load_causal_lm(folder),
        FIGAConfig(output_dir=str(tmp_path / "figa"), report_to="none", use_cpu=True, threshold=None, bf16=True),
        [PAIR, {**PAIR, "id": "b", "prompt_ids": [9]}],
        Tokenizer(),
        peft_config=adapter,
    )
    assert figa.train().training_loss > 0


PAIR = {
    "id": "a", "prompt_ids": [3, 4], "initial_ids": [5, 6, 7, EOS], "initial_labels": [0, -1, 0, 0],
    "revised_ids": [5, 8, 7, EOS], "revised_labels": [0, 1, 0, 0],
}  # fmt: skip


def figa(model, tmp_path):
    args = FIGAConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, threshold=None)
    return FIGATrainer(model, args, [PAIR, {**PAIR, "id": "b", "prompt_ids": [9]}], Tokenizer())


@pytest.mark.parametrize("kind", FAMILIES)
def test_figa_is_the_loss_of_the_full_logits(tmp_path, kind):
    trainer = figa(build(kind), tmp_path)
    batch = trainer.data_collator(trainer.train_dataset)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = figa_loss(logps.flatten(), batch["weights"].flatten(), threshold=None).loss
    torch.testing.assert_close(trainer.loss(trainer.model, batch).loss, expected, rtol=0, atol=1e-5)


def test_a_model_that_ignores_logits_to_keep_is_refused(tmp_path, monkeypatch):
    model = build("llama")
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, logits_to_keep=0, **k: forward(self, *a, **k))
    trainer = figa(model, tmp_path)
    batch = trainer.data_collator(trainer.train_dataset)
    # Columns 2 and 4 of the first pair (a prompt of two tokens) predict a token with a weight; 1 and 3 of the next.
    with pytest.raises(ConfigError, match="expected logits of 4 positions from LlamaForCausalLM, found 6: it does not"):
        trainer.loss(trainer.model, batch)


def test_a_fixed_cache_is_tried_before_it_is_used():
    for kind in ("llama", "gpt2", "mistral", "bloom"):
        check_fixed_cache(build(kind), PAD)
    neo = build("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match="compile: expected a model that works with a key-value cache of fixed size"):
        check_fixed_cache(neo, PAD)


def test_learned_positions_end(saved):
    for kind, limit in (("gpt2", 64), ("opt", 64)):
        folder = saved(kind)
        check_positions(folder, limit, "here")
        with pytest.raises(ConfigError, match=f"here: expected at most {limit}, the positions that .* found 65"):
            check_positions(folder, limit + 1, "here")
    check_positions(saved("llama"), 1000, "here")
    check_positions(saved("bloom"), 1000, "here")


def test_router_logits_stay_out_of_sampling(saved):
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    model = load_causal_lm(saved("qwen2_moe", **experts, output_router_logits=True)).eval()
    assert model.config.output_router_logits is False
    rollout = SimpleNamespace(
        input_ids=tensor([[3, 4, 5, 6]]),
        attention_mask=torch.ones(1, 4, dtype=torch.bool),
        response_ids=tensor([[5, 6]]),
    )
    assert response_logps(model, rollout).shape == (1, 2)


def test_the_base_stage_sets_the_special_tokens_of_the_text_too(saved, tokenizer, tmp_path):
    from transformers import AutoConfig

    from fgalign.base_model import PretrainedConfig, build_pretrained

    folder = saved("gemma3", vocab_size=len(tokenizer), pad_token_id=7, eos_token_id=8)
    tokenizer.save_pretrained(folder)
    (tmp_path / "base").mkdir()
    build_pretrained(PretrainedConfig(kind="pretrained", name=str(folder)), tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    expected = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for part in (config, config.text_config, load_causal_lm(tmp_path / "base").generation_config):
        assert (part.pad_token_id, part.eos_token_id) == expected
