"""Two processes give what one gives: losses of FIGA and PPO under FSDP and ZeRO-3, and a stage's files under data
parallelism and ZeRO-3.

All are started by `accelerate launch` with the configurations in reproduce/accelerate, over gloo on the CPU.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fgalign.config import Profile
from fgalign.core.modeling import is_sharded, reduce_in_float32
from fgalign.core.rollout import Rollout, concatenate
from fgalign.distributed import by_rows, check_supported, in_batches
from fgalign.errors import ConfigError, InputError
from fgalign.parallel import each_seed, is_main_process, output_dir, process_count

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "reproduce" / "accelerate"
WORKER = str(ROOT / "tests" / "distributed_worker.py")
TOLERANCE = 1e-5
"""Of every logged number, relative where it is above 1: sums in another order, carried through 12 optimiser steps."""


def run(*command: str, cwd: Path = ROOT, fails: bool = False) -> str:
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "FGALIGN_PROFILE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "FGALIGN_TRACKING": "off"}
    environment["DS_ACCELERATOR"] = "cpu"  # read by DeepSpeed alone
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert (result.returncode != 0) == fails, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def launch(config: str, *command: str, cwd: Path = ROOT, fails: bool = False) -> str:
    options = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "--mixed_precision", "no"]
    # Port 0: any that is free.
    return run("-m", "accelerate.commands.launch", *options, "--main_process_port", "0", *command, cwd=cwd, fails=fails)


ZERO3 = pytest.param(
    "zero3.yaml",
    marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`"),
)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = tmp_path_factory.mktemp("one")
    run(WORKER, str(one))
    return one


@pytest.fixture(scope="module", params=["fsdp.yaml", ZERO3])
def folders(request: Any, one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    two = tmp_path_factory.mktemp("two")
    launch(request.param, WORKER, str(two))
    return one_process, two


@pytest.mark.parametrize("name", ["figa", "ppo", "ppo, value model", "ppo, groups"])
def test_two_processes_with_shared_weights_log_what_one_does(folders: tuple[Path, Path], name: str) -> None:
    one, two = (json.loads((folder / "found.json").read_text())[name] for folder in folders)
    assert len(one) == len(two) == (6 if name == "figa" else 4)
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key
    # The check means something: the policy moved, and the losses with it.
    losses = [logs["loss" if name == "figa" else "policy/loss"] for logs in one[:3]]
    assert max(losses) - min(losses) > 0.01


def test_two_processes_share_the_rewards_of_figas_filter(folders: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / "found.json").read_text())["filter"] for folder in folders)
    # Both sides of 7 pairs, or of 4 in each of two processes.
    assert (one["scored"], two["scored"]) == (14, 8)
    for side in ("initial", "revised"):
        assert len(set(one[side])) == 7  # the order shows
        assert two[side] == pytest.approx(one[side], abs=TOLERANCE)


def test_the_two_processes_held_half_of_every_model(folders: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / "found.json").read_text())["launch"] for folder in folders)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert set(one["held"].values()) == {1.0}
    # Dimensions of 30 and 16 split evenly, the reward model's 3 outputs as 2 and 1.
    assert two["held"].keys() == one["held"].keys() and all(share < 0.51 for share in two["held"].values())


@pytest.mark.parametrize("name", ["figa", "ppo", "value", "group"])
def test_they_save_one_whole_model(folders: tuple[Path, Path], name: str) -> None:
    one, two = (load_file(folder / name / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)
    assert sorted(path.name for path in (folders[1] / name).iterdir()) == sorted(
        path.name for path in (folders[0] / name).iterdir()
    )


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_accelerate_reads_every_configuration_and_its_command_names_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # raises on an unknown key
    assert config.num_processes % config.num_machines == 0
    kind = {"fsdp": "FSDP", "zero3": "DEEPSPEED"}.get(path.stem.split("_")[0], "MULTI_GPU")
    assert config.distributed_type == kind
    assert f"--config_file reproduce/accelerate/{path.name} " in path.read_text(encoding="utf-8")


def test_deepspeed_leaves_accumulation_and_clipping_to_each_stage() -> None:
    """transformers refuses values here that are not the stage's own, and PPO's trainer would not use them."""
    config = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())["deepspeed_config"]
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(config)


def test_deepspeed_is_started_on_each_of_several_nodes_as_the_slurm_script_does() -> None:
    """By accelerate's default, pdsh, each node would start the processes of all."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    options = "--num_machines 2 --num_processes 8 --machine_rank 1 --main_process_ip n7 --main_process_port 29500"
    arguments = ["--config_file", str(CONFIGS / "zero3.yaml"), *options.split(), "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    args.deepspeed_fields_from_accelerate_config = ""  # set by the command itself
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None  # no program but torchrun, on this node
    found = args.nnodes, args.node_rank, args.nproc_per_node, args.rdzv_endpoint
    assert found == ("2", 1, "4", "n7:29500")


def test_several_nodes_differ_from_one_in_the_nodes_alone() -> None:
    one, two = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("fsdp", "fsdp_multi_node"))
    changed = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    assert {key: value for key, value in two.items() if key not in changed} == {
        key: value for key, value in one.items() if key not in changed
    }
    assert two["num_processes"] == 2 * one["num_processes"]


def test_the_slurm_script_is_bash_and_runs_every_training_stage() -> None:
    script = ROOT / "reproduce" / "slurm" / "paper.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    params = yaml.safe_load((ROOT / "reproduce" / "profiles" / "paper" / "params.yaml").read_text(encoding="utf-8"))
    assert f"for method in {' '.join(params['methods'])}; do stage align" in text
    # DVC would train again what it is not told of.
    assert text.index("srun --") < text.index('dvc commit --force "reproduce/profiles/$PROFILE/dvc.yaml:$name"')
    # srun does not take over the processor cores of sbatch, and would leave one to 8 processes.
    assert text.index("export SRUN_CPUS_PER_TASK=") < text.index("srun --")
    assert set(re.findall(r"reproduce/accelerate/\w+\.yaml", text)) <= {
        f"reproduce/accelerate/{path.name}" for path in CONFIGS.iterdir()
    }


STAND_INS = {
    "scontrol": "echo n7; seq 8 20000",  # more than a pipe holds: one whose reader stops early would fail
    # As Slurm does: the command on every node, and a failure of one is a failure.
    "srun": """echo "cores $SRUN_CPUS_PER_TASK" >> calls
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" || exit 1; done""",
    "accelerate": 'echo "accelerate $*" >> calls; [ "$*" = "${*/rm_edit/}" ]',
    "dvc": 'echo "dvc $*" >> calls',
}
"""What the Slurm script calls, by name; `accelerate` fails at `rm_edit`."""


def test_the_slurm_script_starts_a_process_a_gpu_on_every_node_and_tells_dvc(tmp_path: Path) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip

    def sbatch(*stage: str, **environment: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", str(ROOT / "reproduce" / "slurm" / "paper.sbatch"), *stage],
            env={"PATH": os.environ["PATH"], **slurm, **environment}, check=False,
        )  # fmt: skip
        return result.returncode, (tmp_path / "calls").read_text().splitlines()

    command = (
        "accelerate launch --config_file reproduce/accelerate/{0}.yaml --num_machines {1} --num_processes {2} "
        "--machine_rank {3} --main_process_ip n7 --main_process_port 29500 -m fgalign.cli {4} --profile {5}"
    )
    assert sbatch("align", "figa") == (0, [
        "cores 32",
        command.format("fsdp_multi_node", 2, 8, 0, "align figa", "paper"),
        command.format("fsdp_multi_node", 2, 8, 1, "align figa", "paper"),
        "dvc commit --force reproduce/profiles/paper/dvc.yaml:align@figa",
    ])  # fmt: skip
    changed = {"PROFILE": "human-gpu", "CONFIG": "reproduce/accelerate/ddp.yaml"}
    assert sbatch("judge-model", "preferences", **changed, SLURM_NNODES="1") == (0, [
        "cores 32",
        command.format("ddp", 1, 4, 0, "judge-model preferences", "human-gpu"),
        "dvc commit --force reproduce/profiles/human-gpu/dvc.yaml:judge_model@preferences",
    ])  # fmt: skip
    # One after another, and none after one that failed; DVC is told of none that did.
    status, calls = sbatch(SLURM_NNODES="1")
    assert status != 0 and [line for line in calls if not line.startswith("cores")] == [
        command.format("fsdp", 1, 4, 0, "sft", "paper"),
        "dvc commit --force reproduce/profiles/paper/dvc.yaml:sft",
        command.format("fsdp", 1, 4, 0, "reward-model rm_preference", "paper"),
        "dvc commit --force reproduce/profiles/paper/dvc.yaml:rm_preference",
        command.format("fsdp", 1, 4, 0, "reward-model rm_edit", "paper"),
    ]


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the smoke profile, and the data and models that `align figa` and `align ppo_token` read."""
    from fgalign.stages.data import run_edits, run_labels, run_raw
    from fgalign.stages.train import run_base, run_reward_model, run_sft

    root = tmp_path_factory.mktemp("repository")
    params = yaml.safe_load((ROOT / "tests" / "smoke" / "params.yaml").read_text(encoding="utf-8"))
    params["runtime"]["workers"] = 1
    # Two steps of 16. Several processes fill up the last step of an epoch with its first rows; one does not.
    params["methods"]["figa"]["pairs"] = 32
    file = root / "reproduce" / "profiles" / "smoke" / "params.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(params))
    (root / "dvc.yaml").touch()
    (root / "src" / "fgalign").mkdir(parents=True)
    profile = Profile("smoke", root, params, file)
    for stage in (run_raw, run_edits, run_base, run_labels, run_sft):
        stage(profile)
    for name in ("rm_preference", "rm_token"):
        run_reward_model(profile, name)
    return root


def outputs(root: Path, method: str) -> dict[str, Any]:
    """Every file of a method's models: weights as tensors, the rest as text."""
    folder = root / "data" / "smoke" / "models" / method
    return {
        str(path.relative_to(folder)): load_file(path) if path.suffix == ".safetensors" else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "training_args.bin"
    }


METHODS = ("figa", "ppo_token")


@pytest.fixture(scope="module")
def expected(repository: Path) -> dict[str, Any]:
    """What one process writes for each method."""
    from fgalign.config import load_profile
    from fgalign.stages.train import run_align

    profile = load_profile("smoke", repository)
    one = {}
    for method in METHODS:
        run_align(profile, method)
        one[method] = outputs(repository, method)
        shutil.rmtree(repository / "data" / "smoke" / "models" / method)
    # FIGA's pairs a step: 8 x 2 in one process, 4 x 2 in each of two.
    profile.params["methods"]["figa"]["optim"]["batch_size"] = 4
    file = repository / "reproduce" / "profiles" / "smoke" / "params.yaml"
    file.write_text(yaml.safe_dump(profile.params))
    return one


@pytest.fixture(scope="module", params=["cpu_gloo.yaml", ZERO3])
def aligned(
    request: Any, repository: Path, expected: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str, list[str]]:
    """What one process writes for each method, what two write, what two print, and what they say of their times."""
    timings = repository / "timings" / "smoke.jsonl"
    timings.unlink(missing_ok=True)
    said = launch(request.param, WORKER, str(repository), *(f"align {method}" for method in METHODS))
    two = {method: outputs(repository, method) for method in METHODS}
    for method in METHODS:
        shutil.rmtree(repository / "data" / "smoke" / "models" / method)
    return expected, two, said, timings.read_text().splitlines()


@pytest.mark.parametrize("method", METHODS)
def test_a_launched_stage_writes_once_and_what_one_process_writes(repository, aligned, method) -> None:
    one, two, said, timings = aligned
    expected, found = one[method], two[method]
    assert found.keys() == expected.keys()
    assert {"seed-1/model.safetensors", "seed-2/budget.json"} <= found.keys()
    for name, value in expected.items():
        if name.endswith(".safetensors"):
            for key, tensor in value.items():
                torch.testing.assert_close(found[name][key], tensor, rtol=0, atol=2e-5)
        elif not name.endswith("rollouts.jsonl"):
            assert found[name] == value, name
        else:  # the answers of the learning curve
            for a, b in zip(*(map(json.loads, text.splitlines()) for text in (value, found[name])), strict=True):
                assert {k: v for k, v in a.items() if k not in ("reward", "kl", "advantages")} == {
                    k: v for k, v in b.items() if k not in ("reward", "kl", "advantages")
                }
                assert (b["reward"], b["kl"]) == pytest.approx((a["reward"], a["kl"]), abs=1e-4)
                assert b["advantages"] == pytest.approx(a["advantages"], abs=1e-3)
    # Said once, timed once, nothing left beside the models.
    assert said.count(f"[smoke] align@{method}\n") == 1
    assert sum(f"align@{method}" in line for line in timings) == 1
    assert not [path for path in (repository / "data" / "smoke" / "models").iterdir() if path.name.startswith(".")]


def test_stages_that_are_not_trained_refuse_to_be_launched(repository: Path, monkeypatch) -> None:
    from fgalign.cli import stage

    monkeypatch.chdir(repository)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match=r"^raw: this stage runs in one process, found 2; start it without"),
        stage("smoke", "raw"),
    ):
        pass


# --- processes, in one ------------------------------------------------------------------------------------------------


def test_process_count_and_main_process(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (process_count(), is_main_process()) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, main in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert (process_count(), is_main_process()) == (2, main)


def test_launched_processes_train_seeds_one_after_another(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert each_seed([3, 1], lambda seed: (seed, os.getpid()), 2) == [(3, os.getpid()), (1, os.getpid())]


def test_only_the_main_process_puts_its_folder_in_place(tmp_path, monkeypatch) -> None:
    import fgalign.parallel as parallel

    met = []
    monkeypatch.setattr(parallel, "wait_for_everyone", lambda: met.append((tmp_path / "out").exists()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with output_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("other")
    assert not (tmp_path / "out").exists() and not folder.exists()
    monkeypatch.setenv("RANK", "0")
    with output_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("main")
    assert (tmp_path / "out" / "a").read_text() == "main"
    assert met == [False, False]  # all have met before anything is in place
    with pytest.raises(InputError), output_dir(tmp_path / "out"):
        raise InputError("broken")
    assert (tmp_path / "out" / "a").read_text() == "main" and met == [False, False]


def accelerator(kind: str, **state: Any) -> Any:
    return SimpleNamespace(
        distributed_type=f"DistributedType.{kind}", is_fsdp2=state.pop("version", 2) == 2,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(**state)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "sharded"),
    [
        (accelerator("NO"), False),
        (accelerator("MULTI_GPU"), False),
        (accelerator("FSDP"), True),
        (accelerator("DEEPSPEED", zero_stage=3), True),
        (accelerator("DEEPSPEED", zero_stage=2), False),
    ],
)
def test_what_is_sharded_takes_no_adapter(found: Any, sharded: bool) -> None:
    assert is_sharded(found) == sharded
    check_supported(found, adapter=False)
    if not sharded:
        check_supported(found, adapter=True)
        return
    with pytest.raises(ConfigError, match="peft_config: expected none with sharded weights"):
        check_supported(found, adapter=True)


def test_fsdp_of_version_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="accelerate: expected fsdp_version 2, found 1"):
        check_supported(accelerator("FSDP", version=1), adapter=False)


def test_in_bf16_deepspeed_adds_gradients_up_in_float32() -> None:
    config: dict[str, Any] = {"bf16": {"enabled": True}}
    found = accelerator("DEEPSPEED", version=0, zero_stage=3, deepspeed_config=config)
    for precision in ("no", "bf16"):
        assert "communication_data_type" not in config
        found.mixed_precision = precision
        reduce_in_float32(found)
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"


def test_expert_iteration_refuses_to_be_launched(monkeypatch) -> None:
    from fgalign.methods.expert_iteration import run as expert_iteration

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"methods\.expert: expert iteration runs in one process, found 2"):
        expert_iteration(SimpleNamespace(stage="expert"), None)


def test_a_base_model_without_a_chat_template_gets_the_profiles(tmp_path, make_model, tokenizer) -> None:
    from fgalign.base_model import PretrainedConfig, build_pretrained
    from fgalign.core.modeling import load_tokenizer, save_model
    from fgalign.core.tokens import encode_prompt

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    save_model(make_model(vocab_size=len(bare)), bare, tmp_path / "published")
    params = yaml.safe_load((ROOT / "reproduce" / "profiles" / "paper" / "params.yaml").read_text())
    section = params["base_model"] | {"name": str(tmp_path / "published")}
    build_pretrained(PretrainedConfig(**section), tmp_path / "base")
    saved = load_tokenizer(tmp_path / "base")
    text = saved.decode(encode_prompt(saved, "where is the cat?"), skip_special_tokens=False)
    assert text.endswith("appropriately completes the request.\n\n### Instruction:\nwhere is the cat?\n\n### Response:")
    # The source's prompt goes into the template, which brings Alpaca's text: it must not bring it too.
    from fgalign.sources.alpaca_farm import AlpacaFarmConfig
    from fgalign.sources.hub import instruction_prompt

    source = {key: value for key, value in params["source"].items() if key != "name"}
    prompt = instruction_prompt("Name it.", "A cat.", AlpacaFarmConfig(**source).prompt_style)
    text = saved.decode(encode_prompt(saved, prompt), skip_special_tokens=False)
    assert text.count("### Instruction:") == text.count("### Response:") == 1 and "Name it.\n\nA cat." in text


def test_rows_in_batches() -> None:
    assert in_batches([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert in_batches([0, 1], None) == [[0, 1]]


def rollout(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    from fgalign.core.rollout import as_rollout

    return as_rollout(prompts, responses, 0, "cpu")


def test_a_function_of_rows_in_batches_gives_all_rows_in_order() -> None:
    from accelerate import Accelerator

    seen = []

    def lengths(part: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(part.truncated))
        return part.response_mask.sum(1), part.response_ids

    whole = rollout([[5], [6, 7], [8]], [[9, 1], [9], [9, 9, 1]])
    found, ids = by_rows(whole, lengths, Accelerator(cpu=True), 2)
    assert seen == [2, 1] and found.tolist() == [2, 1, 3] and torch.equal(ids, whole.response_ids)


def test_concatenate_pads_prompts_on_the_left_and_responses_on_the_right() -> None:
    joined = concatenate([rollout([[5]], [[9, 9, 1]]), rollout([[6, 7], [8]], [[9, 1], [1]])], 0)
    assert joined.prompt_ids.tolist() == [[0, 5], [6, 7], [0, 8]]
    assert joined.prompt_mask.tolist() == [[False, True], [True, True], [False, True]]
    assert joined.response_ids.tolist() == [[9, 9, 1], [9, 1, 0], [1, 0, 0]]
    assert joined.response_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert joined.truncated.tolist() == [False] * 3
