"""The plan's formulas against numbers worked by hand, its checks, and the paper's profile as it is shipped."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fgalign.config import Profile, load_profile
from fgalign.errors import ConfigError
from fgalign.evaluation.config import EvaluationConfig
from fgalign.methods.figa import FilterConfig, keep_pairs
from fgalign.plan import (
    NOT_ESTIMATED,
    Architecture,
    PlanSection,
    Sizes,
    activation_bytes,
    build_on_meta,
    cache_bytes,
    check_shapes,
    decode_seconds,
    estimate_generate,
    estimate_ppo,
    estimate_trainer,
    report,
    sizes,
    with_filter,
)
from fgalign.ppo_trainer import FineGrainedPPOConfig
from fgalign.training import OptimConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = Architecture(
    model_type="llama", vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
# A layer: 4 x 8 x 8 of attention, 3 x 8 x 16 of the MLP, two norms of 8: 656. Beside them two embeddings of 100 x 8 and
# a norm: 1,608. In all 2,920; with a head of one output instead of the output layer 2,128.
POLICY, REWARD = Sizes(2920, 656, 2), Sizes(2128, 656, 2)
# Two GPUs reach 10^6 operations a second together, each 5 x 10^5 bytes a second in decoding.
PLAN = PlanSection(
    architecture=TINY,
    data={
        "demonstrations": 10, "preferences": 10, "edits": 10, "figa_pairs": 10, "test_prompts": 9,
        "prompt_tokens": 3, "response_tokens": 5,
    },
    gpus=2, memory_gib=1, tflops=1e-6, bandwidth=1e-3, utilisation=0.5, decode_utilisation=0.5, step_overhead_ms=10,
)  # fmt: skip


def test_sizes():
    assert sizes(build_on_meta(TINY, "CausalLM")) == POLICY
    assert sizes(build_on_meta(TINY, "SequenceClassification", num_labels=1)) == REWARD
    assert POLICY.rest == 1608
    # Tied, the output layer is the embeddings; a head takes its place as before.
    tied = TINY.model_copy(update={"tie_word_embeddings": True})
    assert sizes(build_on_meta(tied, "CausalLM")) == Sizes(2120, 656, 2)
    assert sizes(build_on_meta(tied, "SequenceClassification", num_labels=1)) == REWARD


def test_llama_7b_has_the_published_number_of_parameters():
    plan = load_profile("paper", ROOT).section("plan", PlanSection)
    assert sizes(build_on_meta(plan.architecture, "CausalLM")).total == 6_738_415_616
    # Half a MiB of cache a token: keys and values of 4,096 numbers of 2 bytes in each of 32 layers.
    assert cache_bytes(plan.architecture, 1, 1) == 2**19


def test_activations():
    # 3 rows x 5 positions x (26 x 8 + 8 x 16 = 336) = 5,040 a layer; an input of a layer is 3 x 5 x 8 x 2 = 240.
    assert activation_bytes(TINY, 3, 5, checkpointing=False) == 2 * 5040
    assert activation_bytes(TINY, 3, 5, checkpointing=True) == 2 * 240 + 5040


def test_decoding():
    # Weights 5,840 bytes; 64 bytes of cache a token x 3 rows x 5 tokens = 960: 0.0136 s, and 0.01 s; 4 times.
    assert decode_seconds(PLAN, 2920, 3, 4) == pytest.approx(0.0944)


@pytest.mark.parametrize(
    ("checkpointing", "extra", "seconds"),
    # 10 examples x 2 epochs x 8 tokens = 160 tokens, x 2,920 parameters = 467,200, x 6, 8 or 8 passes' operations.
    [(False, 0, 2.8032), (True, 0, 3.7376), (False, 1, 3.7376)],
)
def test_a_trainer(checkpointing, extra, seconds):
    optim = OptimConfig(learning_rate=1.0, epochs=2, batch_size=3, accumulation=5, gradient_checkpointing=checkpointing)
    found = estimate_trainer(
        PLAN, "sft", POLICY, optim, examples=10, rows_of_example=1, max_length=5, logit_positions=4, extra_passes=extra
    )
    assert found.kept == {"weights": 5840, "gradients": 5840, "optimiser": 11680}
    assert found.phases["training"] == {
        "gathered": 2 * (2 * 656 + 1608),
        "activations": 2 * 240 + 5040 if checkpointing else 10080,
        "logits": 16 * 3 * 4 * 100,
    }
    assert found.hours * 3600 == pytest.approx(seconds)
    assert found.examples == 30 and found.host == 11680 and found.before == {"loading": {"weights": 11680}}
    assert found.peak == 23360 + sum(found.phases["training"].values())


def test_figas_filter():
    optim = OptimConfig(learning_rate=1.0, epochs=2, batch_size=1)
    figa = estimate_trainer(
        PLAN, "figa", POLICY, optim, examples=10, rows_of_example=2, max_length=5, logit_positions=5
    )
    found = with_filter(PLAN, figa, REWARD, SimpleNamespace(score_batch_size=3, max_length=100))
    # 2,128 parameters of 4 bytes, and of 2 in bf16; one layer of 3 rows x 100 positions x 336.
    assert found.before == {
        "loading": {"weights": 11680},
        "filter": {"weights": 8512, "in bf16": 4256, "activations": 100_800},
    }
    assert found.peak == 113_568 and list(found.worst) == ["filter: weights", "filter: in bf16", "filter: activations"]
    # 10 edits x 2 sides x 8 tokens x 2 x 2,128 operations, shared by both GPUs.
    assert (found.hours - figa.hours) * 3600 == pytest.approx(0.68096)
    assert (found.kept, found.phases, found.examples) == (figa.kept, figa.phases, 2)
    # A GPU has no more than 5 of the 10 edits at once.
    all_at_once = with_filter(PLAN, figa, REWARD, SimpleNamespace(score_batch_size=64, max_length=100))
    assert all_at_once.before["filter"]["activations"] == 168_000


def test_ppo():
    args = FineGrainedPPOConfig(
        output_dir="", updates=3, rollout_batch_size=8, minibatch_size=4, epochs=2, response_length=4,
        reward_scale="none",
    )  # fmt: skip
    config = SimpleNamespace(max_length=10, curve=SimpleNamespace(every=2, prompts=4))
    found = estimate_ppo(PLAN, "ppo", POLICY, None, REWARD, config, args)
    assert found.kept == {"weights": 5840, "gradients": 5840, "optimiser": 11680, "frozen": 2 * (2920 + 2128)}
    assert found.phases == {
        "rollout": {"policy": 5840, "cache": 64 * 4 * 10},
        "scoring": {"gathered": 5840, "logits": 16 * 4 * 5 * 100},
        "update": {"gathered": 5840, "activations": 2 * 2 * 10 * 336, "logits": 16 * 2 * 5 * 100},
    }
    assert found.peak == 33456 + 37840
    # An update: 8 x 8 tokens x (2 x (2 x 2,920 + 2,128) + 2 x 6 x 2,920) operations = 3.262464 s, and 4 steps of
    # (5,840 + 64 x 4 x 5) / 500,000 + 0.01 s. Twice the curve: 4 steps with 2 rows each, 4 x 8 tokens scored.
    update, curve = 3.262464 + 0.09696, 0.09184 + 0.509952
    assert found.hours * 3600 == pytest.approx(3 * update + 2 * curve)
    # A value model of its own is trained too: its state, its layers' activations, its passes.
    separate = estimate_ppo(PLAN, "ppo", POLICY, REWARD, REWARD, config, args)
    assert separate.kept["optimiser"] == 4 * (2920 + 2128)
    assert separate.phases["update"]["activations"] == 2 * 13440
    more = 8 * 8 * (2 * 2128 + 12 * 2128) / 1e6
    points = 4 * 8 * 2 * 2128 / 1e6
    assert separate.hours * 3600 == pytest.approx(3 * (update + more) + 2 * (curve + points))
    # Fewer rows at once: less memory, more batches (2 of 2 rows, where 1 of 4 was).
    args.inference_batch_size = 2
    few = estimate_ppo(PLAN, "ppo", POLICY, None, REWARD, config, args)
    assert few.phases["rollout"]["cache"] == 64 * 2 * 10
    assert few.hours * 3600 == pytest.approx(3 * (3.262464 + 2 * 0.09184) + 2 * curve)


def test_vllm_stays_beside_scoring_and_update():
    def estimate(engine, lora=None):
        args = FineGrainedPPOConfig(
            output_dir="", updates=3, rollout_batch_size=8, minibatch_size=4, response_length=4, rollout_engine=engine,
            vllm_memory=0.25,
        )  # fmt: skip
        config = SimpleNamespace(max_length=10, lora=lora, curve=SimpleNamespace(every=2, prompts=4))
        return estimate_ppo(PLAN, "ppo", POLICY, None, REWARD, config, args)

    without, either, vllm = (estimate(engine) for engine in ("transformers", "auto", "vllm"))
    assert all("vLLM" not in phase for phase in without.phases.values())
    # A quarter of 1 GiB, whichever samples; of transformers alone the weights gathered and the cache.
    for phase in ("scoring", "update"):
        assert either.phases[phase] == vllm.phases[phase] == {**without.phases[phase], "vLLM": 2**28}
    assert either.phases["rollout"] == without.phases["rollout"] and "rollout" not in vllm.phases
    assert either.peak == vllm.peak == without.peak + 2**28
    # With an adapter `auto` samples from the trainer's own policy.
    assert estimate("auto", lora="some") == without


def test_answers():
    config = EvaluationConfig(judge="rouge_l", batch_size=4, response_length=2)
    rewards = dict.fromkeys(("rm_preference", "rm_edit", "rm_token"), REWARD)
    found = estimate_generate(PLAN, POLICY, rewards, config, answers=3, longest=6)
    assert (
        found.kept == {"weights": 11680, "in bf16": 5840}
        and found.host == 11680
        and found.before == {"loading": {"weights": 11680}}
    )
    assert found.phases == {"rollout": {"cache": 64 * 4 * 8}, "scoring": {"logits": 16 * 4 * 3 * 100}}
    assert found.examples is None and not found.once
    # 3 answers to 9 prompts are 9 batches of 2 steps of (5,840 + 64 x 4 rows x 4 tokens) / 500,000 + 0.01 s; one GPU,
    # 500,000 operations a second, has 27 x 8 tokens x 2 x (2 x 2,920 + 3 x 2,128) operations to do.
    assert found.hours * 3600 == pytest.approx(9 * 2 * (6864 / 5e5 + 0.01) + 216 * 24448 / 5e5)
    # The first 5 prompts alone: 2 batches an answer.
    fewer = estimate_generate(PLAN, POLICY, rewards, config.model_copy(update={"prompts": 5}), answers=3, longest=6)
    assert fewer.hours * 3600 == pytest.approx(6 * 2 * (6864 / 5e5 + 0.01) + 120 * 24448 / 5e5)


def test_shapes_fit():
    assert list(check_shapes(TINY)) == []


def test_shapes_that_do_not_fit_are_named(monkeypatch):
    import fgalign.plan as plan

    wider = TINY.model_copy(update={"vocab_size": 101})
    monkeypatch.setattr(plan, "build_on_meta", lambda a, kind, **config: build_on_meta(wider, kind, **config))
    assert list(check_shapes(TINY)) == [
        "causal LM: expected shape (2, 8, 100), found (2, 8, 101)",
        "policy with value (head), logits: expected shape (2, 4, 100), found (2, 4, 101)",
        "policy with value (separate), logits: expected shape (2, 4, 100), found (2, 4, 101)",
    ]


def test_heads_have_to_divide_the_hidden_size():
    with pytest.raises(ConfigError, match=r"expected num_attention_heads to divide hidden_size 8 .*, found 3 and 2"):
        build_on_meta(TINY.model_copy(update={"num_attention_heads": 3}), "CausalLM")


# --- the paper's profile ----------------------------------------------------------------------------------------------


@pytest.fixture
def paper():
    """The profile with the tiny architecture: its checks, without 7 billion parameters."""
    profile = load_profile("paper", ROOT)
    params = copy.deepcopy(profile.params)
    params["plan"]["architecture"] |= TINY.model_dump() | {"max_position_embeddings": 2048}
    return Profile("paper", ROOT, params, profile.file)


def test_the_shipped_profile_fits(paper):
    text, wrong = report(paper)
    assert wrong == []
    assert [line.split()[0] for line in text.splitlines()[3:13]] == [
        "sft", "rm_preference", "rm_edit", "rm_token", "figa", "ppo_preference", "ppo_edit", "ppo_token",
        "generate", "judge_model@preferences",
    ]  # fmt: skip
    assert text.splitlines()[-2:] == [
        "vLLM, where PPO may sample with it, holds its `vllm_memory` beside scoring and update, in GiB: ppo_preference "
        "23.7, ppo_edit 23.7, ppo_token 23.7.",
        "Not estimated: raw, edits, base, labels, reward_models, score_edits, benchmark, judge, rejudge, curves, "
        "tables and figures, loading models from disk.",
    ]


def test_what_has_no_estimate_is_a_stage():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert set(NOT_ESTIMATED) - set(stages) == {"tables and figures", "loading models from disk"}


@pytest.mark.parametrize(
    ("changes", "hours"),
    # 10,000 pairs x 5 epochs x 2 sides x 170 tokens x (8 + 2) passes x 2,920 parameters, on 8 x 0.3 x 10^5 operations a
    # second; the filter: 10,000 edits x 2 sides x 170 tokens x 2 x 2,128.
    [
        ({}, 574.54 + 16.75),
        ({"filter": None}, 574.54),
        ({"filter": None, "signal": "reward_difference"}, 574.54 + 16.75),
    ],
)
def test_figa_pays_for_rewards_where_it_takes_them(paper, changes, hours):
    paper.params["plan"]["tflops"] = 1e-7
    paper.params["methods"]["figa"] |= changes
    row = next(line for line in report(paper)[0].splitlines() if line.startswith("figa")).split()
    assert float(row[3]) == pytest.approx(hours, abs=0.02)


def test_the_papers_filter_keeps_pairs_on_any_scale():
    filtered = FilterConfig(**load_profile("paper", ROOT).params["methods"]["figa"]["filter"])
    # Mean 0, standard deviation sqrt(8 / 6) = 1.155: the third pair's revision is below -1.155, and loses.
    initial, revised = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -2.0])
    for scale in (0.01, 1.0, 100.0):
        assert keep_pairs(scale * initial - 7, scale * revised - 7, filtered).tolist() == [True, True, False]


def test_the_profile_for_one_gpu_fits_it():
    from fgalign.plan import report

    text, wrong = report(load_profile("human-gpu", ROOT))
    assert not wrong and "0.13 billion parameters, 1 GPUs of 79 GiB" in text
    assert "\n3 seeds share the GPU (`runtime.workers`)" in text
    assert "Not estimated: sft_chosen, " in text


def test_smollm2_has_the_published_number_of_parameters():
    plan = load_profile("human-gpu", ROOT).section("plan", PlanSection)
    # 30 layers of 3,540,096 (2 x 576 x 576 + 2 x 576 x 192 of attention, 3 x 576 x 1,536, two norms), one embedding of
    # 49,152 x 576 and a norm.
    assert sizes(build_on_meta(plan.architecture, "CausalLM")) == Sizes(134_515_008, 3_540_096, 30)


def test_seeds_side_by_side_share_the_memory():
    profile = load_profile("human-gpu", ROOT)
    text, _ = report(profile)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[3:20] if line}
    most, judge = float(rows["ppo_token"][2]), float(rows["judge_model@preferences"][2])
    # Room for two at a time: three do not fit, but for the judge, which is trained once and alone.
    profile.params["plan"]["memory_gib"] = room = 2 * most + 0.2
    assert judge < room < 3 * most
    _, wrong = report(profile)
    assert (
        f"ppo_token: needs 3 times {most:.1f} GiB a GPU, more than {room:g}: use fewer `runtime.workers`, more GPUs or "
        "smaller batches"
    ) in wrong
    assert not any(line.startswith("judge_model") for line in wrong)
    profile.params["runtime"]["workers"] = 2
    assert report(profile)[1] == []
    # Of two GPUs each seed gets both, one seed after another.
    profile.params["runtime"]["workers"] = 3
    assert "seeds share the GPU" not in report(profile, gpus=2)[0]


def test_best_of_n_answers_n_times(paper):
    def hours():
        return float(next(line for line in report(paper)[0].splitlines() if line.startswith("generate")).split()[3])

    paper.params["plan"]["tflops"] = 1e-7  # hours that two decimals show
    before = hours()
    paper.params["methods"]["best"] = {"kind": "best_of_n", "needs": "rm_token", "n": 4}
    # The initial model, the SFT model, FIGA and three PPOs answered: 6. Now 10.
    assert hours() == pytest.approx(10 / 6 * before, rel=0.001)


def test_what_edits_and_judges_fits_the_data(paper):
    # AlpacaFarm comes without edits and without gold answers, so neither replay nor ROUGE-L can work on it.
    from fgalign.annotate import get_annotator
    from fgalign.config import parse_section
    from fgalign.evaluation.judges import get_judge
    from fgalign.evaluation.llm_judge import LLMJudgeConfig

    assert paper.params["source"]["name"] == "alpaca_farm"
    section = dict(paper.params["annotator"])
    name = section.pop("name")
    assert name == "llm" and parse_section(section, get_annotator(name).config, "annotator").task == "minimal_edit"
    evaluation = paper.params["evaluation"]
    options = parse_section(evaluation["judge_options"], LLMJudgeConfig, "judge_options")
    assert get_judge(evaluation["judge"], llm=options).title == paper.params["report"]["judge_title"]


def test_a_judge_is_trained_once_and_not_for_each_seed(paper):
    paper.params["plan"]["tflops"] = 1e-7  # hours that two decimals show
    rows = {line.split()[0]: line.split() for line in report(paper)[0].splitlines()[3:14]}
    # 500 pairs over 4 epochs, where a reward model of the pipeline has 10,000 over one: a fifth of its time.
    assert float(rows["judge_model@preferences"][3]) == pytest.approx(float(rows["rm_token"][3]) / 5, rel=0.01)
    assert float(rows["judge_model@preferences"][4]) == pytest.approx(
        float(rows["judge_model@preferences"][3]), rel=0.01
    )
    assert float(rows["rm_token"][4]) == pytest.approx(3 * float(rows["rm_token"][3]), rel=0.01)
    hours = sum(float(row[3]) for stage, row in rows.items() if stage not in ("judge_model@preferences", "all"))
    assert float(rows["all"][1]) == pytest.approx(hours, rel=0.001)
    judge = float(rows["judge_model@preferences"][3])
    assert float(rows["all"][2]) == pytest.approx(3 * hours + judge, rel=0.001)


def test_the_shipped_profile_fits_at_full_size():
    profile = load_profile("paper", ROOT)
    text, wrong = report(profile)
    assert wrong == [] and text.startswith("Profile paper: 6.74 billion parameters, 8 GPUs of 79 GiB")
    # What the profile says of itself in its first lines is what the plan says.
    comments = profile.file.read_text(encoding="utf-8")
    rows = {line.split()[0]: line.split() for line in text.splitlines()[3:14] if line}
    judge = rows["judge_model@preferences"]
    assert f"{judge[2]} GiB a GPU, {judge[3]} hours" in comments
    for stage in ("sft", "rm_token", "figa", "ppo_token"):
        assert f"{rows[stage][2]} GiB a GPU, {rows[stage][3]} hours a seed" in comments, stage
    assert f"Answers: {rows['generate'][2]} GiB on one GPU, {rows['generate'][3]} hours a seed" in comments
    assert f"{rows['all'][1]} hours a seed, {rows['all'][2]} for 3 seeds" in comments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods.ppo_edit.max_length": 300}, "ppo_edit: max_length 300 leaves no room for a prompt"),
        ({"methods.ppo_edit.max_length": 2049}, "ppo_edit: max_length 2049 is more than the model's 2048 positions"),
        ({"rm_edit.max_length": 4096}, "rm_edit: max_length 4096 is more than the model's 2048"),
        ({"methods.figa.optim.accumulation": 16}, "figa: expected 128 examples a step, found 512 on 8 GPUs"),
        ({"methods.ppo_edit.trainer.microbatch_size": 5}, "ppo_edit: microbatch_size: expected a divisor of the 32"),
        ({"plan.gpus": 3}, "ppo_edit: rollout_batch_size: expected a multiple of 3 GPUs, found 512"),
        ({"plan.memory_gib": 1e-6}, "figa: needs 0.0 GiB a GPU, more than 1e-06"),
        ({"plan.examples_per_step": {"fiiga": 1}}, "plan.examples_per_step: expected stages of the profile, found"),
    ],
)
def test_what_does_not_fit_is_named(paper, change, message):
    for key, value in change.items():
        *parents, last = key.split(".")
        section = paper.params
        for parent in parents:
            section[parent] = dict(section[parent])  # YAML's anchors share mappings
            section = section[parent]
        section[last] = value
    _, wrong = report(paper)
    assert any(line.startswith(message) for line in wrong), wrong


def test_other_gpus(paper):
    text, wrong = report(paper, gpus=16)
    assert "16 GPUs of 79 GiB" in text
    assert [line for line in wrong if line.startswith("figa")] == [
        "figa: expected 128 examples a step, found 256 on 16 GPUs: change batch_size or accumulation"
    ]


def test_a_profile_without_a_plan():
    with pytest.raises(
        ConfigError, match=r"params\.yaml: section `plan` is missing; expected architecture, data, gpus"
    ):
        report(load_profile("mini", ROOT))
