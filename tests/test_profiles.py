"""Whole profiles: every fault is found before a stage runs, and a new profile is a copy that stops no pipeline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fgalign import cli
from fgalign.config import Profile, changed, load_profile
from fgalign.errors import ConfigError
from fgalign.profiles import check_names, check_profile, new_profile

ROOT = Path(__file__).resolve().parents[1]
SMOKE = yaml.safe_load((ROOT / "tests" / "smoke" / "params.yaml").read_text(encoding="utf-8"))
QA = {
    "source": {"name": "qa_feedback"},
    "annotator": {"name": "replay"},
    "evaluation.judge": "rouge_l",
    "report.judge_title": "ROUGE-L F1 with the gold long answer",
    "benchmarks.tasks": ["qa_truthfulness"],
}


def smoke(changes: dict | None = None) -> Profile:
    """The tests' profile with other values by dotted key."""
    return Profile("smoke", ROOT, changed(SMOKE, changes), ROOT / "reproduce/profiles/smoke/params.yaml")


# --- checks without torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: expected a list of different integers"),
        ({"source.name": "simulatr"}, "source.name: unknown source 'simulatr'; expected one of simulator, qa_feedback"),
        ({"source.sed": 1}, "source.sed: no such key; did you mean seed?"),
        ({"source.n_test_prompts": "few"}, "source.n_test_prompts: Input should be a valid integer"),
        ({"annotator.name": "replya"}, "annotator.name: unknown annotator 'replya'; expected simulated, replay or llm"),
        ({"annotator.miss_rate": 2}, "annotator.miss_rate: Input should be less than or equal to 1, found 2"),
        ({"labels.unit": "letter"}, "labels.unit: Input should be "),
        ({"evaluation.judge": "simulator_god"}, "evaluation.judge: unknown judge 'simulator_god'; expected one of sim"),
        ({"evaluation.temprature": 1.0}, "evaluation.temprature: no such key; did you mean temperature?"),
        (
            {"evaluation.judge": "rouge_l"},
            "evaluation.judge: expected a judge of what the source 'simulator' gives, fo",
        ),
        ({**QA, "evaluation.judge": "simulator_gold"}, "which reads the truth of the simulator"),
        ({"evaluation.judge_options": {"a": 1}}, "evaluation.judge_options: the judge 'simulator_gold' has no options"),
        (
            {"report.judge_title": "points"},
            "report.judge_title: expected 'gold score of the simulator', what the judge",
        ),
        (
            {"evaluation.judge": "reward_model", "evaluation.judge_options": {"folder": "data/x"}},
            "report.judge_title: expected 'score of a reward model trained on other preferences', what the judge",
        ),
        ({"methods.figa.kind": "fgia"}, "methods.figa.kind: expected one of figa, ppo, supervised,"),
        (
            {"methods.figa.needs": "rm_tokn"},
            "methods.figa.needs: expected one of sft, rm_preference, rm_edit, rm_token, found 'rm_tokn'",
        ),
        ({"methods.figa.needs": "figa"}, "methods.figa.needs: expected one of sft, "),
        ({"methods.figa.needs": None}, "methods.figa.needs: expected one of sft, "),
        (
            {"methods.figa.needs": "rm_bt", "token_models.rm_bt": SMOKE["rm_token"]},
            "rm_token, found 'rm_bt'; name it in needed_token_models",
        ),
        ({"needed_token_models": ["rm_bt"]}, "needed_token_models: expected a list of some of token_models (none), fo"),
        ({"studies.figa_signals": {"method": "fig", "variants": {"a": {}}}}, "variants.a: expected one of the methods"),
        (
            {"studies.x": {"method": "figa", "variants": {"a": {"annotator": {"mis_rate": 0.1}}}}},
            "studies.x.variants.a.annotator.mis_rate: no such key; did you mean miss_rate?",
        ),
        (
            {"studies.x": {"variants": {"a": {"method": "figa"}}}},
            "studies.x.variants.a: expected a variant of the study's own method, None, found 'figa'; make it a study",
        ),
        (
            {"studies.x": {"method": "figa", "variants": {"a": {}, "b": {"method": "ppo_token"}}}},
            "studies.x.variants.b: expected a variant of the study's own method, 'figa', found 'ppo_token'; make it",
        ),
        (
            {"studies.x": {"method": "figa", "variants": {"a": {"annotator": {"miss_rate": 0.1}}}}},
            "studies.x.variants.a.annotator: expected none, as no stage makes these edits; make it a study of `sweeps`",
        ),
        ({"search.seed": 9}, "search.seed: expected one of the seeds [1, 2], found 9"),
        ({"other_judges.reward_model.judge": "reward"}, "other_judges.reward_model.judge: unknown judge 'reward'"),
        (
            {"other_judges.reward_model.needs": "judges/prefs"},
            "needs: expected judges/ and one of judge_models (preferences), found 'judges/prefs'",
        ),
        ({"other_judges": {}}, "judge_tables: expected [], as there are no other_judges, found ['main']"),
        ({"benchmarks.tasks": ["qa_truthfulness"]}, "benchmarks.tasks: 'qa_truthfulness' cannot be made from the sou"),
        ({**QA, "world": ["main"]}, "world: expected [], as no world with known truth makes the source 'qa_feedback'"),
        ({"papers": ["main"]}, "papers: expected [], found ['main']: the paper is the profile mini's"),
        ({"root": "../.."}, "root: expected the way from this file's folder to "),
        ({"params_file": "params.yaml"}, "params_file: expected reproduce/profiles/smoke/params.yaml, found 'params"),
    ],
)
def test_a_fault_is_found_before_any_stage_and_names_file_and_key(changes, message):
    with pytest.raises(ConfigError) as error:
        check_names(smoke(changes))
    assert str(error.value).startswith(f"{ROOT}/reproduce/profiles/smoke/params.yaml: ") and message in str(error.value)


def test_what_is_right_passes():
    check_names(smoke())
    check_names(smoke(QA))
    check_names(smoke({"methods.figa.needs": "ppo_token"}))  # DVC makes one method's model before another
    needed = {"token_models.rm_bt": SMOKE["rm_token"], "needed_token_models": ["rm_bt"], "methods.figa.needs": "rm_bt"}
    check_names(smoke(needed))
    several = {"variants": {"a": {"method": "figa"}, "b": {"method": "ppo_token", "annotator": {"miss_rate": 0.1}}}}
    check_names(smoke({"sweeps.x": several}))
    # As far as there are sections: a part of the pipeline needs no others.
    check_names(Profile("smoke", ROOT, {"seeds": [1], "evaluation": {"judge": "rouge_l"}}, smoke().file))


def test_the_stage_settings_checks_them_and_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    params = changed(SMOKE, {"profile": "mini", "root": ".", "params_file": "params.yaml"})
    monkeypatch.chdir(tmp_path)
    for judge in ("simulator_god", "simulator_gold"):
        params["evaluation"]["judge"] = judge
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        if judge == "simulator_god":
            with pytest.raises(ConfigError, match=r"params\.yaml: evaluation\.judge: unknown judge 'simulator_god'"):
                cli.settings("mini")
            assert not (tmp_path / "data").exists()
    cli.settings("mini")
    assert (tmp_path / "data" / "mini" / "recipe.json").exists()


def test_they_import_no_torch():
    """`settings` begins every `dvc repro`, and torch takes seconds."""
    code = (
        "import sys; from fgalign.config import load_profile; from fgalign.profiles import check_names\n"
        "for name in ('mini', 'human', 'paper'): check_names(load_profile(name))\n"
        "assert not {'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=True)


# --- all sections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.judge": "simulator_god"}, "evaluation.judge: unknown judge"),  # what the stage settings checks
        ({"runtime.thread": 1}, "runtime.thread: no such key; did you mean threads?"),
        ({"sft.optim": {"learning_rat": 1.0e-3}}, "sft.optim.learning_rat: no such key; did you mean learning_rate?"),
        ({"rm_token.class_wieght_power": 1.0}, "rm_token.class_wieght_power: no such key; did you mean class_weight_p"),
        ({"rm_preference.optim.epochs": "many"}, "rm_preference.optim.epochs: Input should be a valid number"),
        ({"base_model.kind": "scrach"}, "base_model.kind: expected scratch or pretrained, found 'scrach'"),
        ({"base_model.layer": 1}, "base_model.layer: no such key; did you mean layers?"),
        ({"methods.figa.bta": 1.0}, "methods.figa.bta: no such key; did you mean beta?"),
        (
            {"methods.ppo_preference.trainer.kl_coeff": 0.1},
            "methods.ppo_preference.(section): Value error, trainer.kl_c",
        ),
        ({"methods.figa.search": {"bta": [1.0]}}, "methods.figa.bta: no such key; did you mean beta?"),
        ({"studies.a": {"method": "figa", "variants": {"b": {"change": {"bta": 1.0}}}}}, "methods.figa.bta: no such k"),
        ({"judge_models.preferences.seed": 2}, "judge_models.preferences.seed: expected a seed that trains no model"),
        ({"token_models.rm_bt": {"los": "binary"}}, "token_models.rm_bt.los: no such key; did you mean loss?"),
        ({"search.reward_models": {"rm_edit": {"epoch": [1]}}}, "rm_edit.epoch: no such key"),
        ({"plan": {"gpu": 1}}, "plan.gpu: no such key; did you mean gpus?"),
    ],
)
def test_the_whole_check_parses_every_section(changes, message):
    with pytest.raises(ConfigError) as error:
        check_profile(smoke(changes))
    assert str(error.value).startswith(f"{ROOT}/reproduce/profiles/smoke/params.yaml: ") and message in str(error.value)


def test_the_whole_check_misses_a_section():
    params = {key: value for key, value in SMOKE.items() if key != "rm_edit"}
    with pytest.raises(ConfigError, match=r"params\.yaml: expected the section `rm_edit`, found none"):
        check_profile(Profile("smoke", ROOT, params, smoke().file))
    check_profile(smoke())


# --- new profiles -----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A repository with the pipelines of `mini` and `human`, without code and data."""
    names = ["params.yaml", "dvc.yaml", "reproduce/sweeps/dvc.yaml", "reproduce/profiles/human/params.yaml"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "reproduce/profiles/human/dvc.yaml").symlink_to("../../../dvc.yaml")
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    return tmp_path


def test_a_new_profile_is_a_copy_with_what_is_its_own(repository):
    mini = load_profile("mini", repository)
    made = new_profile("mine", mini)
    assert made == load_profile("mine", repository)
    own = {"profile": "mine", "root": "../../..", "params_file": "reproduce/profiles/mine/params.yaml"}
    assert made.params == {**mini.params, **own, "sweeps": {}, "search": {"seed": 1}, "papers": []}
    lines = made.file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Profile mine: a copy of mini") and "make reproduce PROFILE=mine" in lines[1]
    assert lines[2:5] == [f"{key}: {value}" for key, value in own.items()]
    # The comments on what is copied stay, those on what is not go.
    text = "\n".join(lines)
    assert "# Every method that is trained learns from the same pairs" in text and "second pipeline, `make" not in text
    link = made.file.with_name("dvc.yaml")
    assert os.readlink(link) == "../../../dvc.yaml" and link.resolve() == repository / "dvc.yaml"


def test_a_new_profile_like_another(repository):
    human = load_profile("human", repository)
    made = new_profile("mine", human)
    own = {"profile": "mine", "params_file": "reproduce/profiles/mine/params.yaml", "search": {"seed": 1}}
    assert load_profile("mine", repository).params == {**human.params, **own}
    assert made.params["papers"] == made.params["world"] == []
    assert new_profile("third", made).params["methods"] == human.params["methods"]


def test_a_new_profile_overwrites_nothing(repository):
    mini = load_profile("mini", repository)
    file = new_profile("mine", mini).file
    file.write_text("changed", encoding="utf-8")
    for folder in ("results/old", "data/downloads"):
        (repository / folder).mkdir(parents=True)
    taken = {
        "mine": "reproduce/profiles/mine/params.yaml",
        "old": "results/old",
        "downloads": "data/downloads",
        "mini": "params.yaml",
    }
    for name, where in taken.items():
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken: {where} is there; nothing was written"):
            new_profile(name, mini)
    assert file.read_text(encoding="utf-8") == "changed"


@pytest.mark.parametrize("name", ["My", "a/b", "../a", "1", "", "true"])
def test_a_name_that_cannot_be_one(repository, name):
    with pytest.raises(ConfigError, match="new profile: expected a name"):
        new_profile(name, load_profile("mini", repository))
    assert [path.name for path in (repository / "reproduce" / "profiles").iterdir()] == ["human"]


def test_a_profile_that_cannot_be_copied_or_is_not_valid(repository):
    file = repository / "params.yaml"
    text = file.read_text(encoding="utf-8")
    for old, new, message in (
        ("judge_models: {}", "judge_models: {a: *far}", r"params\.yaml: cannot be copied line by line"),
        ("judge: simulator_gold", "judge: simulator_god", r"mine/params\.yaml: evaluation\.judge: unknown judge"),
    ):
        file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            new_profile("mine", load_profile("mini", repository))
    assert [path.name for path in (repository / "reproduce" / "profiles").iterdir()] == ["human"]


def test_dvc_reads_the_pipelines_beside_a_new_profile(repository, monkeypatch):
    from dvc.exceptions import OutputDuplicationError
    from dvc.repo import Repo

    monkeypatch.chdir(repository)
    Repo.init(str(repository), no_scm=True).close()
    file = new_profile("mine", load_profile("mini", repository)).file
    with Repo(str(repository)) as repo:
        repo.index.check_graph()
        names = {stage.addressing for stage in repo.index.stages}
    assert {"paper@main", "reproduce/profiles/mine/dvc.yaml:align@figa"} <= names
    # Checks of the checker: the paper is written once.
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("papers: []", "papers: [main]"), encoding="utf-8")
    with Repo(str(repository)) as repo, pytest.raises(OutputDuplicationError, match="paper/generated"):
        repo.index.check_graph()


def test_dvc_lets_a_study_wait_for_the_method_that_it_varies(repository, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(repository)
    Repo.init(str(repository), no_scm=True).close()
    file = new_profile("mine", load_profile("mini", repository)).file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("studies:", "studies:\n  rates: {method: ppo_token, variants: {a: {}}}"), "utf-8")
    with Repo(str(repository)) as repo:
        stages = {stage.addressing.rpartition(":")[2]: stage for stage in repo.index.stages if "mine" in stage.path}
    models = [f"data/mine/models/{name}" for name in ("figa", "ppo_token")]
    waits = {
        name: [model for model in models if repository / model in {Path(dep.fs_path) for dep in stages[name].deps}]
        for name in ("study@rates", "study@figa_signals")
    }
    assert waits == {"study@rates": models[1:], "study@figa_signals": models[:1]}
    assert [param for dep in stages["study@rates"].params for param in dep.params] == [
        "studies.rates",
        "methods.ppo_token",
        "seeds",
        "runtime",
    ]
