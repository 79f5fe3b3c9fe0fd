"""The pipeline as DVC sees it: what stages depend on, what training may open, and the whole graph run for real."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
import yaml
from preloaded import preloaded

from fgalign.errors import InputError
from fgalign.methods import METHODS
from fgalign.parallel import can_fork
from fgalign.sources import SOURCES

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
SECOND = yaml.safe_load((ROOT / "reproduce" / "sweeps" / "dvc.yaml").read_text(encoding="utf-8"))
HUMAN_SEARCH = yaml.safe_load((ROOT / "reproduce/profiles/human/search/dvc.yaml").read_text(encoding="utf-8"))
SMOKE = "reproduce/profiles/smoke/dvc.yaml"
# What a stage's numbers cannot depend on: messages, tracking, the command line, how files are written, processes.
# Nor on the table of methods: a new line in it must not train the others again.
MINOR = ("errors", "tracking", "cli", "io", "config", "parallel", "unfinished", "hardware", "methods")
NOT_DEPENDENCIES = {"fgalign", *(f"fgalign.{name}" for name in MINOR)}
STAGE_FUNCTIONS = {
    "raw": ("data", "run_raw"),
    "edits": ("data", "run_edits"),
    "labels": ("data", "run_labels"),
    "base": ("train", "run_base"),
    "sft": ("train", "run_sft"),
    "rm_preference": ("train", "run_reward_model"),
    "rm_edit": ("train", "run_reward_model"),
    "rm_token": ("train", "run_reward_model"),
    "align": ("train", "run_align"),
    "token_model": ("train", "run_reward_model"),
    "study": ("studies", "run_study"),
    "generate_start": ("generate", "run_generate"),
    "generate": ("generate", "run_generate"),
    "judge_start": ("judge", "run_judge"),
    "judge": ("judge", "run_judge"),
    "judge_model": ("judge_model", "run_judge_model"),
    "rejudge": ("rejudge", "run_rejudge"),
    "label_quality": ("judge", "run_label_quality"),
    "reward_models": ("reward_models", "run_reward_models"),
    "curves": ("judge", "run_curves"),
    "token_models": ("reward_models", "run_token_models"),
    "judge_study": ("compare", "run_judge_study"),
    "credit": ("compare", "run_credit"),
    "benchmark_items": ("benchmarks", "run_benchmark_items"),
    "benchmark": ("benchmarks", "run_benchmark"),
    "samples": ("judge", "run_samples"),
    "search": ("studies", "run_search"),
    "choose_search": ("compare", "run_choose_search"),
    "search_rewards": ("studies", "run_search_rewards"),
    "choose_rewards": ("compare", "run_choose_rewards"),
    "study_edits": ("data", "run_study_edits"),
    "overoptimisation": ("compare", "run_overoptimisation"),
}
# Methods that the studies vary.
STUDIED = {kind: METHODS[kind] for kind in ("figa", "ppo")}
TRAINING = ("base", "sft", "rm_preference", "rm_edit", "rm_token", "token_model", "align", "study", "judge_model")


def module_file(name: str) -> Path | None:
    path = ROOT / "src" / name.replace(".", "/")
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.exists():
            return candidate
    return None


def imports(node: ast.AST) -> set[str]:
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.ImportFrom) and item.module and item.module.split(".")[0] == "fgalign":
            found.add(item.module)
            found |= {name for alias in item.names if module_file(name := f"{item.module}.{alias.name}")}
    return found


def closure(roots: set[str]) -> set[str]:
    seen: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name not in seen | NOT_DEPENDENCIES:
            seen.add(name)
            todo += imports(ast.parse(module_file(name).read_text(encoding="utf-8")))
    return seen


def code_of(module: str, function: str) -> set[str]:
    """Files of the package that a stage's function can import, itself among them."""
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    roots = set().union(*(imports(node) for node in tree.body if node.__class__ not in (ast.FunctionDef, ast.ClassDef)))
    todo, done = [function], set()
    while todo:
        name = todo.pop()
        if name in functions and name not in done:
            done.add(name)
            roots |= imports(functions[name])
            todo += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    files = {str(module_file(name).relative_to(ROOT)) for name in closure(roots - {module})}
    return {*files, str(module_file(module).relative_to(ROOT))}


def body(stage: str) -> dict:
    entry = PIPELINE["stages"].get(stage) or SECOND["stages"][stage]
    return entry.get("do", entry)


def undeclared(stage: str, entry: dict, module: str, function: str) -> list[str]:
    """Files that a stage's function can import and its deps do not name; of methods and sources those that it can
    run."""
    needed = code_of(f"fgalign.stages.{module}", function)
    registered = {"align": METHODS, "search": METHODS, "study": STUDIED, "raw": SOURCES}
    for name in registered.get(stage, {}).values():
        needed |= {str(module_file(item).relative_to(ROOT)) for item in closure({name})}
    if stage == "align":
        needed = {path for path in needed if not re.fullmatch(r"src/fgalign/methods/\w+\.py", path)}
        needed.add("src/fgalign/methods/${item.kind}.py")
    declared = entry.get("do", entry)["deps"]
    return sorted(path for path in needed if not any(path == dep or path.startswith(f"{dep}/") for dep in declared))


@pytest.mark.parametrize("stage", STAGE_FUNCTIONS)
def test_a_stage_depends_on_the_code_it_runs(stage: str) -> None:
    module, function = STAGE_FUNCTIONS[stage]
    every = (PIPELINE, SECOND, HUMAN_SEARCH)
    pipelines = [pipeline["stages"][stage] for pipeline in every if stage in pipeline["stages"]]
    assert pipelines
    for entry in pipelines:
        missing = undeclared(stage, entry, module, function)
        assert not missing, f"dvc.yaml: stage {stage}: add to deps: {missing}"


@pytest.mark.parametrize("stage", TRAINING)
def test_training_depends_neither_on_the_truth_nor_on_the_test_split(stage: str) -> None:
    inputs = [dep for dep in body(stage)["deps"] if not dep.startswith("src/")]
    assert not [dep for dep in inputs if "/gold" in dep or "test" in dep]
    # A whole folder of a data kind would hold the test split; labels hold none.
    assert not {"data/${profile}/raw", "data/${profile}/edits"} & set(inputs)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the profile smoke, committed."""
    root = tmp_path_factory.mktemp("repository")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        source = ROOT / name
        if source.exists() and not name.startswith(("results/", "tests/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, root / name, follow_symlinks=False)
    profile = (root / SMOKE).parent
    profile.mkdir()
    shutil.copy2(ROOT / "tests" / "smoke" / "params.yaml", profile)
    (root / SMOKE).symlink_to("../../../dvc.yaml")
    run(root, "git", "init", "-q")
    run(root, "git", "add", "-A")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "copy")
    return root


@pytest.fixture(scope="module")
def programs(copy: Path) -> Iterator[Path]:
    """A folder for the PATH whose `fgalign` does not import the libraries each time."""
    if not can_fork():
        yield Path(sys.executable).parent
        return
    with preloaded(environment(copy)) as folder:
        yield folder


@pytest.fixture(scope="module")
def smoke(copy: Path, programs: Path) -> Path:
    """The copy with the whole pipeline run on the smoke profile, the real way: through DVC."""
    repro(copy, programs=programs)
    return copy


def test_every_table_has_the_stage_that_builds_it(stages_read_once) -> None:
    from fgalign.config import load_profile
    from fgalign.report.check import table_stage
    from fgalign.report.tables import TABLES

    profile = load_profile("mini", ROOT)
    of_others = ("judges", "edit_likelihood")
    stages = {name: table_stage(profile, name) for name in TABLES if name not in of_others}
    assert stages["figa_main"] == "figa_main" and stages["labels"] == "labels_table"
    assert stages["figa_signals"] == "study_table@figa_signals"
    assert stages["search"] == "reproduce/sweeps/dvc.yaml:search_table"
    human = load_profile("human", ROOT)
    assert table_stage(human, "figa_main") == "reproduce/profiles/human/dvc.yaml:figa_main"
    for name in of_others:
        assert table_stage(human, name) == f"reproduce/profiles/human/dvc.yaml:{name}@main"
        with pytest.raises(InputError, match="no stage of the profile mini builds this table"):
            table_stage(profile, name)
    with pytest.raises(InputError, match="no stage of the profile human builds this table"):
        table_stage(human, "credit")


def test_what_a_stage_reads_some_stage_writes(read_once) -> None:
    stages = read_once(ROOT)
    written = {PurePosixPath(out) for stage in stages for out in stage.outs}
    for stage in stages:
        for dep in map(PurePosixPath, stage.deps):
            if dep.parts[0] in ("data", "results"):
                found = dep in written or written & set(dep.parents) or any(dep in out.parents for out in written)
                assert found, f"{stage.address}: no stage writes {dep}"


def test_the_committed_index_names_stages_that_write_what_it_links(read_once) -> None:
    stages = {stage.address: stage for stage in read_once(ROOT)}
    rows = re.findall(
        r"^\| (?!row |claim |-)(.+) \|$", (ROOT / "results" / "INDEX.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 100
    for row in rows:
        _, named, config, seeds, metrics, runs, commit = row.split(" | ")
        chain = [stages[name] for name in re.findall(r"`([^`]+)`", named)]
        for link in re.findall(r"\]\(([^)]+)\)", metrics):
            assert any(f"results/{link}".startswith(out) for stage in chain for out in stage.outs), (row, link)
        assert "params.yaml](" in config and re.fullmatch(r"none|\d+( \d+)*", seeds), row
        assert (runs.startswith("`") or not runs) and re.fullmatch(r"`[0-9a-f]{12}`", commit), row


def environment(root: Path, programs: Path | None = None) -> dict[str, str]:
    """Of a program in the copy: its package, this interpreter's programs, before them those of a folder."""
    path = [programs, Path(sys.executable).parent, os.environ["PATH"]]
    found = {**os.environ, "PATH": ":".join(str(part) for part in path if part), "PYTHONPATH": str(root / "src")}
    # Whatever the tests around this one set, the pipeline tracks into the copy's own store.
    for name in ("FGALIGN_TRACKING", "MLFLOW_TRACKING_URI", "FGALIGN_PROFILE"):
        found.pop(name, None)
    return found


def run(root: Path, *command: str, programs: Path | None = None) -> str:
    result = subprocess.run(
        command, cwd=root, env=environment(root, programs), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def repro(root: Path, *arguments: str, programs: Path | None = None) -> str:
    return run(root, "dvc", "repro", SMOKE, *arguments, programs=programs)


def test_a_forked_command_ends_as_any_other(copy: Path, programs: Path) -> None:
    def fgalign(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command, variables = [programs / "fgalign", *arguments], environment(copy) | {"FGALIGN_PROFILE": "nope"}
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)

    found = fgalign("settings", "--profile", "smoke", folder=copy)
    assert (found.returncode, found.stderr) == (0, "") and found.stdout.startswith("[smoke] settings\n")
    found = fgalign("settings", folder=copy)
    assert (found.returncode, found.stdout) == (1, "") and found.stderr.startswith("error: unknown profile 'nope'")
    found = fgalign("settings", "--profile", "smoke", folder=copy.parent)
    assert found.returncode == 1 and "not inside the fgalign repository" in found.stderr
    assert fgalign("no-such-command", folder=copy).returncode == 2


def test_the_whole_graph_runs_and_gives_every_table_and_figure(smoke: Path) -> None:
    results = smoke / "results" / "smoke"
    tables = {path.name for path in (results / "tables").iterdir()}
    names = (
        "labels",
        "figa_data",
        "figa_core",
        "figa_main",
        "benchmarks",
        "xu_win_rate",
        "xu_reward_models",
        "xu_efficiency",
        "judges",
        "edit_likelihood",
    )
    assert tables == {f"{name}.{kind}" for name in names for kind in ("csv", "tex")}
    figures = {path.name for path in (results / "figures").iterdir()}
    names = ("learning_curves", "token_labels", "win_rates")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("pdf", "png")}
    assert not [path for path in (smoke / "data" / "smoke").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_every_training_and_evaluation_stage_is_a_tracked_run(smoke: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{smoke / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fgalign-smoke")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    names = {item.info.run_name for item in runs}
    expected = {"smoke/base", "smoke/label_quality", "smoke/score_edits"}
    for stage in ("sft", "rm_preference", "rm_edit", "rm_token", "figa", "ppo_preference", "ppo_edit", "ppo_token"):
        expected |= {f"smoke/{stage}/seed-{seed}" for seed in (1, 2)}
    expected |= {"smoke/judge_model@preferences/seed-101", "smoke/rejudge@reward_model"}
    assert expected <= names
    assert all(item.info.status == "FINISHED" for item in runs)
    token = next(item for item in runs if item.info.run_name == "smoke/ppo_token/seed-1")
    assert token.data.params["needs"] == "rm_token"
    assert {"reward/score", "kl/response", "policy/loss"} <= set(token.data.metrics)
    assert token.data.tags["dvc_stage"].endswith("align@ppo_token") and token.data.tags["git_commit"]
    assert "data/smoke/models/rm_token=" in token.data.tags["dvc_lock"]


def test_a_second_run_changes_nothing(smoke: Path) -> None:
    assert "up to date" in repro(smoke)


def test_training_without_truth_and_test_split_gives_the_same_bytes(smoke: Path) -> None:
    lock = smoke / "reproduce" / "profiles" / "smoke" / "dvc.lock"
    before = lock.read_bytes()
    data = smoke / "data" / "smoke"
    hidden = {path: data / f"hidden-{path.parent.name}-{path.name}" for path in (data / "gold", data / "raw" / "test")}
    hidden[data / "edits" / "test.jsonl"] = data / "hidden-edits"
    for path, place in hidden.items():
        shutil.move(path, place)
    try:
        # By the `fgalign` that is installed, so importing the libraries beforehand changes no byte either.
        stages = [f"{SMOKE}:{stage}" for stage in ("sft", "rm_edit", "rm_token", "align@figa", "align@ppo_token")]
        stages.append(f"{SMOKE}:judge_model@preferences")
        run(smoke, "dvc", "repro", "-f", "-s", *stages)
    finally:
        for path, place in hidden.items():
            shutil.move(place, path)
    assert lock.read_bytes() == before


@pytest.mark.parametrize("name", ["mini", "more-seeds", "human", "human-gpu", "smoke", "paper"])
def test_every_section_of_every_profile_is_valid(name: str, copy: Path) -> None:
    from fgalign.config import load_profile
    from fgalign.profiles import check_profile

    check_profile(load_profile(name, copy))


def test_more_seeds_differs_from_mini_in_its_seeds_alone() -> None:
    """Methods and variants are a part of those of mini, everything that decides their numbers the same."""
    from fgalign.config import load_profile
    from fgalign.report.claims import CLAIMS

    mini, more = (load_profile(name, ROOT) for name in ("mini", "more-seeds"))
    assert more.seeds[: len(mini.seeds)] == mini.seeds and len(more.seeds) == len(set(more.seeds)) == 12
    apart = {"profile", "root", "params_file", "seeds", "report", "papers"}
    fewer = {"token_models", "needed_token_models", "sweeps", "search", "methods", "studies"}
    for key in set(mini.params) - apart - fewer:
        assert more.params[key] == mini.params[key], key
    for name, method in more.params["methods"].items():
        assert method == {key: value for key, value in mini.params["methods"][name].items() if key != "search"}, name
    for name, study in more.params["studies"].items():
        theirs = mini.params["studies"][name]
        assert {**study, "variants": None} == {**theirs, "variants": None}
        assert study["variants"].items() <= theirs["variants"].items()
        assert next(iter(study["variants"])) == next(iter(theirs["variants"]))
    assert set(mini.params) == set(more.params)
    # It has what each claim compares: those of mini that can be tested can be tested with more seeds.
    for claim in CLAIMS:
        assert [path.name for path in claim.files(more)] == [path.name for path in claim.files(mini)], claim.name
        wanted = {path.stem for path in claim.files(mini) if path.parent.name == "judged"}
        assert wanted <= {*more.params["methods"], "sft"}, claim.name


@pytest.fixture(scope="module")
def known_world(smoke: Path):
    """The smoke profile with token models, studies and a search, all stages of them run in this process."""
    from dataclasses import replace

    from fgalign.config import load_profile
    from fgalign.stages.compare import (
        run_choose_rewards,
        run_choose_search,
        run_credit,
        run_judge_study,
        run_overoptimisation,
    )
    from fgalign.stages.data import run_study_edits
    from fgalign.stages.reward_models import run_token_models
    from fgalign.stages.studies import run_search, run_search_rewards, run_study
    from fgalign.stages.train import run_reward_model

    profile = load_profile("smoke", smoke)
    token = profile.params["rm_token"]
    methods = {**profile.params["methods"]}
    methods["figa"] = {**methods["figa"], "search": {"optim.learning_rate": [1.0e-4, 3.0e-4]}}
    methods["ppo_token"] = {**methods["ppo_token"], "search": {"trainer.learning_rate": [1.0e-3]}}
    noisy = {"miss_rate": 0.5, "wrong_correction_rate": 0.5}
    few = {"trainer.updates": 1, "trainer.kl_coef": 0.0}
    profile = replace(
        profile,
        params={
            **profile.params,
            "methods": methods,
            "search": {
                **profile.params["search"],
                "reward_models": {
                    "rm_preference": {"optim.learning_rate": [1.0e-3, 3.0e-3]},
                    "rm_token": {"class_weight_power": [0.0, 0.5], "optim.learning_rate": [1.0e-3]},
                },
            },
            "token_models": {
                "rm_token_bt": {**token, "loss": "bradley_terry", "title": "BT"},
                "rm_tlcr": {**token, "loss": "binary"},
            },
            "studies": {
                "figa_signals": {
                    "method": "figa",
                    "variants": {"levenshtein": {}, "constant": {"change": {"signal": "constant"}}},
                }
            },
            "sweeps": {
                "label_noise": {
                    "variants": {
                        "figa_0": {"method": "figa", "level": 0.0, "annotator": {"miss_rate": 0.0}},
                        "ppo_token_0.5": {"method": "ppo_token", "level": 0.5, "annotator": noisy, "change": few},
                    }
                },
                "overoptimisation": {
                    "variants": {
                        "rm_preference": {"method": "ppo_preference", "change": few},
                        "rm_token": {"method": "ppo_token", "change": few},
                    }
                },
            },
        },
    )
    for name in profile.params["token_models"]:
        run_reward_model(profile, name)
    run_token_models(profile)
    run_study_edits(profile, "label_noise")
    for study in ("figa_signals", "label_noise", "overoptimisation"):
        run_study(profile, study)
    for study in ("figa_signals", "label_noise"):
        run_judge_study(profile, study)
    run_search(profile)
    run_choose_search(profile)
    run_search_rewards(profile)
    run_choose_rewards(profile)
    run_overoptimisation(profile)
    run_credit(profile, ["ppo_preference", "ppo_edit", "ppo_token"])
    return profile


def rows_of(path: Path) -> list[dict[str, str]]:
    import csv

    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_trains_each_variant_with_each_seed_and_judges_it_as_methods_are_judged(known_world) -> None:
    metrics = known_world.results / "metrics"
    study = metrics / "studies" / "figa_signals"
    assert sorted(path.name for path in study.iterdir()) == ["constant.csv", "levenshtein.csv"]
    rows = rows_of(study / "levenshtein.csv")
    # The first variant changes nothing, so its models are those of the method, to the last digit of every answer.
    assert rows == rows_of(metrics / "judged" / "figa.csv")
    assert rows != rows_of(study / "constant.csv")
    assert len(rows) == 2 * 12  # seeds x test prompts


def test_other_edits_bring_other_labels_and_another_reward_model(known_world) -> None:
    from fgalign.core.schema import Edit, read_records

    folder = known_world.data / "studies"
    plain = read_records(known_world.data / "edits" / "train.jsonl", Edit)
    noisy = read_records(folder / "label_noise-edits" / "ppo_token_0.5.jsonl", Edit)
    careful = read_records(folder / "label_noise-edits" / "figa_0.jsonl", Edit)
    # An editor who overlooks more leaves more responses as they were.
    assert len(noisy) < len(plain) <= len(careful) and plain != careful
    assert not list((folder / "label_noise").rglob("rm_token")), "the variant's own reward model is scratch"
    rows = rows_of(known_world.sweeps / "metrics" / "studies" / "label_noise" / "ppo_token_0.5.csv")
    # Judged with the pipeline's reward models, the same prompts, and other answers than without noise.
    judged = rows_of(known_world.results / "metrics" / "judged" / "ppo_token.csv")
    assert [row["id"] for row in rows] == [row["id"] for row in judged] and rows != judged


def test_texts_are_scored_by_the_judge(known_world) -> None:
    from fgalign.core.schema import Edit, Preference, read_records
    from fgalign.sources.simulator.gold import gold_score
    from fgalign.stages.judge import run_text_quality

    run_text_quality(known_world)
    rows = rows_of(known_world.results / "metrics" / "text_quality.csv")
    found = {(row["split"], row["text"], row["id"]): row for row in rows}
    assert len(found) == len(rows)
    assert {row["text"] for row in rows if row["split"] == "test"} >= {
        "reference",
        "chosen",
        "rejected",
        "revised",
        "initial",
    }
    pair = read_records(known_world.data / "raw" / "train" / "preferences.jsonl", Preference)[0]
    chosen, rejected = (found["train", side, pair.id] for side in ("chosen", "rejected"))
    scores = gold_score(pair.prompt, pair.chosen), gold_score(pair.prompt, pair.rejected)
    assert (float(chosen["score"]), float(rejected["score"])) == pytest.approx(scores, abs=1e-6)
    assert (
        float(chosen["better"]) == (scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1]) and rejected["better"] == ""
    )
    edits = read_records(known_world.data / "edits" / "test.jsonl", Edit)
    assert all(found["test", "revised", edit.id]["better"] != "" for edit in edits)


def test_the_search_chooses_the_candidate_that_wins_most(known_world) -> None:
    rows = rows_of(known_world.sweeps / "metrics" / "search.csv")
    assert [(row["method"], row["candidate"], row["parameters"]) for row in rows] == [
        ("figa", "0", "optim.learning_rate=0.0001"),
        ("figa", "1", "optim.learning_rate=0.0003"),
        ("ppo_token", "0", "trainer.learning_rate=0.001"),
    ]
    wins = [float(row["win"]) for row in rows]
    assert [row["chosen"] for row in rows] == (["1", "0", "1"] if wins[0] >= wins[1] else ["0", "1", "1"])
    # The method itself has a learning curve; its candidate, which is judged when it is trained, has none.
    assert "curve" in known_world.params["methods"]["ppo_token"]
    assert (known_world.data / "search" / "ppo_token" / "0" / "rollouts.jsonl").read_text() == ""


def test_nothing_is_trained_when_one_candidate_cannot_be(known_world) -> None:
    from dataclasses import replace

    from fgalign.errors import ConfigError
    from fgalign.stages.studies import run_search, run_search_rewards, run_study

    def changed(section: str, value: object):
        return replace(known_world, params={**known_world.params, section: value})

    figa = {**known_world.params["methods"]["figa"], "search": {"optim.learning_rate": [1.0e-4, -1.0]}}
    rates = {"rm_token": {"optim.learning_rate": [1.0e-3, -1.0]}}
    variants = {"figa_signals": {"method": "figa", "variants": {"a": {}, "b": {"change": {"signal": "no_such"}}}}}
    trained = {path: path.stat().st_mtime_ns for path in known_world.data.rglob("*")}
    with pytest.raises(ConfigError, match=r"methods.figa.optim.learning_rate: Input should be"):
        run_search(changed("methods", {**known_world.params["methods"], "figa": figa}))
    with pytest.raises(ConfigError, match=r"rm_token.optim.learning_rate: Input should be"):
        run_search_rewards(changed("search", {"seed": 1, "reward_models": rates}))
    with pytest.raises(ConfigError, match=r"methods.figa.signal: Input should be"):
        run_study(changed("studies", variants), "figa_signals")
    assert {path: path.stat().st_mtime_ns for path in known_world.data.rglob("*")} == trained


def test_the_search_chooses_reward_models_by_what_they_are_for(known_world) -> None:
    from fgalign.report.tables import search as search_table
    from fgalign.stages.reward_models import HeldOut

    rows = rows_of(known_world.sweeps / "metrics" / "search_rewards.csv")
    assert [(row["model"], row["candidate"], row["parameters"], row["metric"]) for row in rows] == [
        ("rm_preference", "0", "optim.learning_rate=0.001", "accuracy_preference"),
        ("rm_preference", "1", "optim.learning_rate=0.003", "accuracy_preference"),
        ("rm_token", "0", "class_weight_power=0.0; optim.learning_rate=0.001", "token_auroc"),
        ("rm_token", "1", "class_weight_power=0.5; optim.learning_rate=0.001", "token_auroc"),
    ]
    for pair in (rows[:2], rows[2:]):
        first, second = (float(row["value"]) for row in pair)
        assert [row["chosen"] for row in pair] == (["1", "0"] if first >= second else ["0", "1"])
    # Measured on the validation split, not on the test split.
    held_out = {split: HeldOut(known_world, split) for split in ("validation", "test")}
    model = known_world.data / "search_rewards" / "rm_token" / "1"
    found = {split: held.measure(held.load_from("rm_token", model), "token") for split, held in held_out.items()}
    assert round(found["validation"].metrics["token_auroc"], 6) == float(rows[3]["value"])
    assert found["test"].metrics["token_auroc"] != found["validation"].metrics["token_auroc"]
    # Each is trained with its own values.
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, model.parent / "0")]
    assert weights[0] != weights[1]
    cells = {(cell.method, cell.metric): cell.mean for cell in search_table(known_world)}
    assert cells["rm_preference/1: optim.learning_rate=0.003", "accuracy_preference"] == pytest.approx(
        100 * float(rows[1]["value"])
    )
    assert cells["rm_token/0: class_weight_power=0.0; optim.learning_rate=0.001", "chosen"] == float(rows[2]["chosen"])


def test_reward_models_of_a_source_without_truth(known_world, monkeypatch, capsys) -> None:
    """As AlpacaFarm: no marks of flaws, and references of other prompts than the edits'."""
    from types import SimpleNamespace

    from fgalign.errors import InputError
    from fgalign.stages import compare, judge, reward_models

    written = {}
    for module in (reward_models, judge):
        monkeypatch.setattr(module, "initial_marks", lambda folder: {})
        monkeypatch.setattr(module, "write_json", lambda path, value: written.update({path.name: value}))
    monkeypatch.setattr(reward_models, "read_truth", lambda folder: SimpleNamespace(references=[]))
    monkeypatch.setattr(reward_models, "write_csv", lambda path, rows, *_: written.update({path.name: rows}))
    reward_models.run_reward_models(known_world)
    judge.run_label_quality(known_world)
    usual = rows_of(known_world.results / "metrics" / "reward_models.csv")
    kept = [row for row in usual if row["metric"].startswith("accuracy_")]
    assert [
        {**row, "seed": str(row["seed"]), "value": str(row["value"])} for row in written["reward_models.csv"]
    ] == kept
    assert {row["side"] for row in written["figa_data.csv"]} == {"initial", "revised"}
    assert written["token_intervals.csv"] == [] and written["label_quality.json"] == {}
    assert "rewards" in written["token_examples.json"][0] and "gold" not in written["token_examples.json"][0]
    assert "the source marks no flaws" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected marks of flaws, to choose rm_token by its token_auroc, found none"):
        compare.run_choose_rewards(known_world)
    # Prompts of the world have one pair each.
    assert all(row["prompt"] == row["id"] for row in written["reward_pairs.csv"])


def test_flawed_tokens_lie_where_the_stripped_text_has_them() -> None:
    from types import SimpleNamespace

    from fgalign.stages.compare import flawed_tokens

    # The truth is about "we are rude", the response as it is shown, without the space that the first token brings.
    texts = [" we", " are", "", " rude"]
    span = SimpleNamespace(start=7, end=11)
    assert "we are rude"[span.start : span.end] == "rude"
    assert flawed_tokens(texts, [span]) == [False, False, False, True]
    assert flawed_tokens(texts, [SimpleNamespace(start=0, end=2)]) == [True, False, False, False]


def test_credit_and_overoptimisation_read_what_was_recorded(known_world) -> None:
    rows = rows_of(known_world.results / "metrics" / "credit.csv")
    assert {row["reward"] for row in rows} == {"rm_preference", "rm_edit", "rm_token"}
    assert len(rows) == 3 * 2 * 3 * 4  # rewards x seeds x updates 0, 1, 2 x prompts
    assert all(0 <= float(row["weight_flawed"]) <= float(row["weight_total"]) + 1e-6 for row in rows)
    assert any(0 < int(row["flawed_tokens"]) < int(row["tokens"]) for row in rows)
    curve = rows_of(known_world.sweeps / "metrics" / "overoptimisation.csv")
    first = [row for row in curve if row["update"] == "0"]
    assert len(curve) == 2 * 2 * 2 and all(float(row["proxy"]) == 0.0 and float(row["kl"]) == 0.0 for row in first)


def test_the_report_shows_them(known_world) -> None:
    from fgalign.report.claims import build_claims
    from fgalign.report.figures import build_figure
    from fgalign.report.tables import build_table

    for name in ("xu_token_models", "figa_signals", "label_noise", "overoptimisation", "search", "credit"):
        assert all(path.exists() for path in build_table(known_world, name))
    for name in ("credit", "figa_signals", "label_noise", "overoptimisation"):
        assert all(path.exists() for path in build_figure(known_world, name))
    assert build_claims(known_world)


def test_flawed_tokens_are_those_that_overlap_a_span_in_more_than_white_space() -> None:
    from fgalign.core.schema import Span
    from fgalign.stages.compare import flawed_tokens

    # "They serve lousy food." with "lousy" (characters 11 to 16) flawed.
    texts = ["They", " serve", " lou", "sy", " food", "."]
    assert flawed_tokens(texts, [Span(start=11, end=16, type="rude")]) == [False, False, True, True, False, False]
    # A span that only touches the space before a token does not flaw it.
    assert flawed_tokens(texts, [Span(start=10, end=11, type="rude")]) == [False] * 6
    assert flawed_tokens(texts, []) == [False] * 6


def test_the_grid_of_the_search_is_a_product_in_the_order_of_the_profile(known_world) -> None:
    from dataclasses import replace

    from fgalign.errors import ConfigError
    from fgalign.study import candidates, reward_candidates, search_section

    def with_grid(grid: object):
        params = {**known_world.params, "methods": {"figa": {"search": grid}}, "search": {"seed": 1}}
        return replace(known_world, params=params)

    found = candidates(with_grid({"alpha": [1, 2], "beta": [0.5, 0.0]}))
    assert [(item.number, item.changes) for item in found] == [
        (0, {"alpha": 1, "beta": 0.5}),
        (1, {"alpha": 1, "beta": 0.0}),
        (2, {"alpha": 2, "beta": 0.5}),
        (3, {"alpha": 2, "beta": 0.0}),
    ]
    with pytest.raises(ConfigError, match=r"methods.figa.search: expected lists of values by key"):
        candidates(with_grid({"alpha": 1}))
    with pytest.raises(ConfigError, match="no method has a `search` grid"):
        candidates(with_grid({}))
    with_reward = with_grid({}).params | {"search": {"seed": 1, "reward_models": {"rm_edit": {"max_length": [64, 96]}}}}
    found = reward_candidates(replace(known_world, params=with_reward))
    assert [(item.method, item.number, item.changes) for item in found] == [
        ("rm_edit", 0, {"max_length": 64}),
        ("rm_edit", 1, {"max_length": 96}),
    ]
    with pytest.raises(ConfigError, match=r"search.reward_models: expected a grid for a reward model, found none"):
        reward_candidates(with_grid({}))
    with pytest.raises(ConfigError, match=r"search.seed: expected one of the seeds \[1, 2\], found 9"):
        search_section(replace(known_world, params={**known_world.params, "search": {"seed": 9}}))


def test_methods_that_differ_in_one_thing_share_what_the_search_chooses(known_world) -> None:
    from dataclasses import replace

    from fgalign.errors import ConfigError
    from fgalign.study import choose, search_section

    wins = {"a": [0.3, 0.2, 0.1], "b": [0.1, 0.4, 0.2], "c": [0.5, 0.5, 0.4]}
    # Alone: the highest, of equals the first. Together: means 0.2, 0.3, 0.15.
    assert choose(wins) == {"a": 0, "b": 1, "c": 0}
    assert choose(wins, [["a", "b"]]) == {"a": 1, "b": 1, "c": 0}

    def together(group: list[str]):
        methods = {"a": {"search": {"x": [1]}}, "b": {"search": {"x": [1]}}, "c": {"search": {"x": [2]}}}
        search = {"seed": 1, "together": [group]}
        return search_section(replace(known_world, params={"seeds": [1], "methods": methods, "search": search}))

    assert together(["a", "b"]).together == [["a", "b"]]
    for group in (["a", "c"], ["a", "d"]):
        with pytest.raises(ConfigError, match=rf"search.together: expected methods with the same .*'{group[1]}' has"):
            together(group)


@pytest.mark.parametrize("name", ["mini", "human"])
def test_the_profile_uses_what_the_search_chose(name: str) -> None:
    from fgalign.config import load_profile
    from fgalign.study import candidates

    profile = load_profile(name, ROOT)
    rows = rows_of(profile.sweeps / "metrics" / "search.csv")
    grid = {(item.method, str(item.number)): item.changes for item in candidates(profile)}
    assert {(row["method"], row["candidate"]) for row in rows} == set(grid)
    for row in rows:
        if row["chosen"] == "1":
            entry = profile.params["methods"][row["method"]]
            for key, value in grid[row["method"], row["candidate"]].items():
                used = entry
                for part in key.split("."):
                    used = used[part]
                assert used == value, f"{profile.file}: methods.{row['method']}.{key}: the search chose {value}"


def test_the_committed_search_of_reward_models_is_the_profiles_grid() -> None:
    """Of `human`, and what its documents say of it: 144 steps are better than 48 at each rate of the token-level model,
    and no better than a token's place on the test answers."""
    import json

    from fgalign.config import load_profile
    from fgalign.study import reward_candidates

    profile = load_profile("human", ROOT)
    rows = rows_of(profile.sweeps / "metrics" / "search_rewards.csv")
    assert [(row["model"], row["candidate"], row["parameters"]) for row in rows] == [
        (item.method, str(item.number), item.parameters) for item in reward_candidates(profile)
    ]
    grid = {(item.method, str(item.number)): item.changes for item in reward_candidates(profile)}
    for model in ("rm_preference", "rm_edit", "rm_token"):
        own = [row for row in rows if row["model"] == model]
        chosen = [row for row in own if row["chosen"] == "1"]
        assert [row["value"] for row in chosen] == [max((row["value"] for row in own), key=float)]
        used = profile.params[model]["optim"]
        assert used["learning_rate"] == grid[model, chosen[0]["candidate"]]["optim.learning_rate"]
        assert used["max_steps"] == 144  # for all: what the token-level model's best candidate has
    tokens = [row for row in rows if row["model"] == "rm_token"]
    short, long = (
        [float(row["value"]) for row in tokens if f"max_steps={steps}" in row["parameters"]] for steps in (48, 144)
    )
    assert len(short) == len(long) == 3 and max(short) < min(long)
    ends = (min(short), max(short), min(long), max(long))
    assert [f"{value:.2f}" for value in ends] == ["0.52", "0.55", "0.57", "0.61"]
    quality = json.loads((profile.results / "metrics" / "label_quality.json").read_text())
    assert f"{quality['position_auroc']:.2f}" == "0.62" and max(long) < quality["position_auroc"]
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "(AUROC 0.52 to 0.55 on 64 validation answers)" in text and "every rate does better, 0.57 to 0.61." in text


def test_what_is_said_of_the_searched_rates_of_human_is_so() -> None:
    """FIGA's and the PPOs' are the lowest of their grids."""
    text = " ".join((ROOT / "paper" / "main.typ").read_text(encoding="utf-8").split())
    assert "FIGA's and the PPOs' are the lowest of their grids" in text
    rows = rows_of(ROOT / "results/human/sweeps/metrics/search.csv")
    wins: dict[str, dict[float, float]] = {}
    for row in rows:
        wins.setdefault(row["method"], {})[float(row["parameters"].split("=")[1])] = float(row["win"])
    chosen = {row["method"]: float(row["parameters"].split("=")[1]) for row in rows if row["chosen"] == "1"}
    assert chosen == {method: min(found) for method, found in wins.items()}
    figa = [f"{100 * win:.1f}" for win in wins.pop("figa").values()]
    means = [f"{100 * sum(found[rate] for found in wins.values()) / 3:.1f}" for rate in (5e-5, 2e-4, 1e-3)]
    assert (figa, means) == (["20.3", "20.3", "20.3", "14.1"], ["23.4", "20.3", "16.1"])
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    assert f"FIGA's win rates are {', '.join(figa[:3])} and {figa[3]}%" in text
    assert f"the PPOs' means {', '.join(means[:2])} and {means[2]}%" in text


def test_what_the_paper_says_of_the_shared_learning_rate_is_so() -> None:
    """Its section on deviations says it in words: the PPOs' value is the lowest of their grid, and token-level PPO by
    itself would have taken another."""
    text = " ".join((ROOT / "paper" / "main.typ").read_text(encoding="utf-8").split())
    assert "which is the lowest of their grid" in text and "token-level PPO would have taken another" in text
    rows = [row for row in rows_of(ROOT / "results/mini/sweeps/metrics/search.csv") if row["method"] == "ppo_token"]
    rates = [float(row["parameters"].split("=")[1]) for row in rows]
    shared = [row["chosen"] for row in rows].index("1")
    wins = [float(row["win"]) for row in rows]
    assert rates[shared] == min(rates) and wins[shared] < max(wins)
