"""The README and docs: every command works or resolves, every snippet runs, every relative link leads somewhere.

`python tests/test_readme.py` writes docs/glossary.md again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.ppo_trainer import GLOSSARY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "results" / "INDEX.md"]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("README.md")])
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
RECORDS = [code for language, code in BLOCKS if language == "json"]


def readme_commands() -> list[str]:
    """Every line of the bash blocks without its comment, and every command that stands in the text, each once."""
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:make|dvc|python|fgalign|conda|pip) [^`]+)`", prose)
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", line).strip() for line in [*lines, *spans] if line.strip()))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What the README's clone gives a newcomer: this working tree without what git ignores, cloned anew."""
    where = tmp_path_factory.mktemp("clone")
    origin = where / "origin"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists() and not name.startswith("data/"):
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, origin / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], cwd=origin, check=True, capture_output=True)
    command = next(line for line in readme_commands() if line.startswith("git clone"))
    subprocess.run(command.replace("ADDRESS", str(origin)).split(), cwd=where, check=True, capture_output=True)
    return where / "fgalign"


@pytest.fixture(scope="module")
def stages(read_once):
    """Addresses of all stages as DVC resolves them."""
    return {stage.address for stage in read_once(ROOT)}


def run(command: str, folder: Path) -> str:
    """Output of a command, which must succeed, with this interpreter's programs first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "FGALIGN_TRACKING": "off"}
    # A make that runs the tests must not hand its flags to the makes tested here.
    env = {name: value for name, value in env.items() if not name.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def with_target(line: str, words: list[str]) -> str:
    """A line of `make check` with the stage in it that the shell would find out."""
    from fgalign.config import load_profile
    from fgalign.report.check import table_stage

    tables = [word.removeprefix("TABLE=") for word in words if word.startswith("TABLE=")]
    return line.replace("$target", table_stage(load_profile("mini", ROOT), tables[0]) if tables else "dvc.yaml")


def dvc_targets(command: str) -> list[str]:
    """Targets of a `dvc repro` or `dvc dag` command; the default pipeline where none is named."""
    return [word for word in command.split()[2:] if not word.startswith("-")] or ["dvc.yaml"]


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_works_or_resolves(command, clone, stages, stages_read_once):
    program, *words = command.split()
    resolved = [command] if program == "dvc" else []
    if program == "make":  # expensive: what it would run must exist
        lines = [with_target(line, words) for line in run(f"make -n {' '.join(words)}", clone).splitlines()]
        resolved = [line for line in lines if line.startswith("dvc ")]
        assert words[0] in ("setup", "test", "ui") or resolved or "fgalign plan --profile paper" in lines
        for script in re.findall(r"^python (\S+\.py)", "\n".join(lines), re.MULTILINE):
            assert (clone / script).exists()
    elif command.startswith("dvc status"):
        found = re.findall(r"^(\S+):$", run(command, clone), re.MULTILINE)
        assert found and not [address for address in found if ":" in address]  # of the default pipeline alone
    elif re.match(r"python reproduce/(table_|claims)", command):  # quick, and from what is in git alone
        printed = run(command, clone)
        changes = subprocess.run(["git", "status", "--short"], cwd=clone, capture_output=True, text=True, check=True)
        assert printed.count("\n") > 10 and not changes.stdout
    elif program in ("python", "fgalign"):
        assert "usage" in run(f"{command} --help", clone).lower()
    elif command == ". .venv/bin/activate":
        assert "-m venv .venv" in run("make -n setup", clone)
    elif program == "conda":
        assert yaml.safe_load((clone / words[-1]).read_text(encoding="utf-8"))["name"] == "fgalign"
    elif program in ("git", "cd"):  # the fixture ran the one, and the other enters what it made
        assert words[-1] == clone.name
    else:
        assert program == "dvc", f"no check for this command of the README: {command}"
    for line in resolved:
        if line.split()[1] in ("repro", "dag"):
            for target in dvc_targets(line):
                assert target in stages or (target.endswith("dvc.yaml") and (clone / target).exists()), line


def test_readme_names_its_two_commands_first():
    assert readme_commands()[:4] == ["git clone ADDRESS fgalign", "cd fgalign", "make reproduce", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_tables_of_the_readme_are_those_of_the_report():
    from fgalign.report.tables import TABLES

    sections = [part.split("\n\n")[0] for part in re.split(r"\| table \|.* shows \|", README)[1:]]
    assert set(re.findall(r"^\| `(\w+)`", "\n".join(sections), re.MULTILINE)) == set(TABLES)


def test_stages_beside_the_tables_are_theirs(stages_read_once):
    from fgalign.config import load_profile
    from fgalign.report.check import table_stage

    (section,) = [part.split("\n\n")[0] for part in README.split("| table | stage | shows |")[1:]]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    profile = load_profile("mini", ROOT)
    assert rows == [(table, table_stage(profile, table)) for table, _ in rows] and len(rows) == section.count("\n") - 1


def test_snippets_run_as_they_stand(tmp_path, monkeypatch, capsys, tokenizer, make_model):
    """With a tiny model in the place of the SFT model that the pipeline leaves."""
    from fgalign.core.modeling import save_model

    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    save_model(model, tokenizer, tmp_path / "data/mini/models/sft/seed-1")
    monkeypatch.chdir(tmp_path)
    (lines,) = RECORDS
    Path("edits.jsonl").write_text(lines, encoding="utf-8")
    assert len(SNIPPETS) == 3
    namespace: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["pairs"][0].initial_labels.count(-1) > 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()] == ["1", "2"]
    assert namespace["scorer"].config.num_labels == 3 and namespace["token_reward"].model is namespace["scorer"]
    assert (tmp_path / "out/ppo/model.safetensors").exists()


def glossary() -> str:
    """docs/glossary.md, from the trainer's own table."""
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in GLOSSARY.items())
    return (
        "# Statistics that PPO logs\n\n"
        "One value an update. Generated from `fgalign.ppo_trainer.GLOSSARY` by `python tests/test_readme.py`.\n\n"
        f"| name | meaning |\n|---|---|\n{rows}\n"
    )


def test_glossary_page_is_the_trainers():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert page == glossary(), "write it again: python tests/test_readme.py"


@pytest.fixture(scope="module")
def benchmark_script():
    spec = importlib.util.spec_from_file_location("where_time_goes", ROOT / "benchmarks" / "where_time_goes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_time_of_stages_is_the_newest_of_each(benchmark_script, tmp_path):
    log = tmp_path / "mini.jsonl"
    log.write_text(
        '{"stage": "sft", "seconds": 9.0}\n{"stage": "align@figa", "seconds": 2.0}\n'
        '{"stage": "rm_edit", "seconds": 1.5}\n{"stage": "reward_models", "seconds": 0.5}\n'
        '{"stage": "sft", "seconds": 4.0}\n{"stage": "table xu_win_rate", "seconds": 0.25}\n'
    )
    seconds = benchmark_script.stage_seconds(log)
    assert seconds == {"align@figa": 2.0, "rm_edit": 1.5, "reward_models": 0.5, "sft": 4.0, "table xu_win_rate": 0.25}
    assert benchmark_script.group_seconds(seconds) == {
        "alignment": 2.0,
        "reward models": 1.5,
        "judging and metrics": 0.5,
        "base model and SFT": 4.0,
        "tables, figures, paper": 0.25,
    }
    assert benchmark_script.format_shares("stage", {"a": 1.0, "b": 3.0}).splitlines()[1:] == [
        "a          1.0    25%",
        "b          3.0    75%",
        "sum        4.0",
    ]
    log.write_text('{"stage": "sft"}\n')
    with pytest.raises(InputError, match=r"mini\.jsonl:1: expected"):
        benchmark_script.stage_seconds(log)
    with pytest.raises(InputError, match="no timings yet"):
        benchmark_script.stage_seconds(tmp_path / "none.jsonl")


def test_hardware_says_what_the_stages_took_and_on_what(tmp_path):
    from fgalign.config import Profile
    from fgalign.hardware import write_hardware
    from fgalign.io import read_json

    profile = Profile("mini", tmp_path, {"runtime": {"threads": 3}}, tmp_path / "params.yaml")
    with pytest.raises(InputError, match="no timings yet"):
        write_hardware(profile)
    (tmp_path / "timings").mkdir()
    (tmp_path / "timings" / "mini.jsonl").write_text(
        '{"stage": "sft", "seconds": 99.0}\n{"stage": "raw", "seconds": 30.0}\n{"stage": "sft", "seconds": 60.0}\n'
    )
    found = write_hardware(profile)
    assert found == read_json(profile.results / "hardware.json")
    assert found["threads"] == 3
    assert (found["minutes"], found["seconds"]) == (1.5, {"raw": 30.0, "sft": 60.0})
    assert found["cores"] >= 1 and 0 < found["memory_gib"] < 10_000 and found["versions"]["torch"]
    machine = {"processor", "family_model", "instructions", "cores", "threads", "memory_gib", "gpu", "system"}
    assert set(found) == machine | {"versions", "minutes", "seconds"}  # and no name of the machine


def test_every_stage_has_a_group(benchmark_script):
    """Titles are those that the stages' commands print and log; see fgalign.cli."""
    files = (ROOT / "dvc.yaml", ROOT / "reproduce" / "sweeps" / "dvc.yaml")
    stages = [stage for path in files for stage in yaml.safe_load(path.read_text(encoding="utf-8"))["stages"].values()]
    for body in stages:
        command, name = [*body.get("do", body)["cmd"].split(), ""][1:3]
        named = ("align", "generate", "judge", "judge-model", "rejudge", "study", "judge-study", "study-edits")
        titles = {"reward-model": "rm_x", **{kind: f"{kind.replace('-', '_')}@x" for kind in named}}
        title = titles.get(
            command, f"{command} {name}" if command in ("table", "figure") else command.replace("-", "_")
        )
        assert "other" not in benchmark_script.group_seconds({title: 1.0}), title


def test_time_inside_ppo_is_read_from_the_newest_run(benchmark_script, tmp_path, monkeypatch):
    from fgalign.tracking import stop, track

    (tmp_path / "params.yaml").write_text("profile: mini\n")
    monkeypatch.delenv("FGALIGN_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    profile = Profile("mini", tmp_path, {}, tmp_path / "params.yaml")
    assert benchmark_script.ppo_seconds(profile) == {}
    for rollout in (7.0, 1.0):  # the second run of the name counts
        with track(profile, "ppo_token", 1, {}) as tracked:
            for update in (1, 2):
                tracked.log({"time/rollout": rollout, "time/scoring": 0.5, "time/update": 2.0}, update)
        time.sleep(0.01)  # runs are told apart by milliseconds
    stop()
    parts = benchmark_script.ppo_seconds(profile)
    assert list(parts) == ["mini/ppo_token/seed-1"]
    found = parts["mini/ppo_token/seed-1"]
    assert (found["rollout"], found["scoring"], found["update"]) == (2.0, 1.0, 4.0)
    line = benchmark_script.format_ppo({"run": {"rollout": 1.0, "scoring": 1.0, "update": 2.0, "rest": 0.0}})
    assert line.splitlines()[1].split() == ["run", "4.0", "25%", "25%", "50%", "0%"]


def test_imports_are_measured_in_fresh_processes(benchmark_script):
    seconds = benchmark_script.import_seconds(["pass"], 1)
    assert 0 < seconds["pass"] < 10
    assert benchmark_script.format_imports(seconds).splitlines()[1].startswith("pass")


if __name__ == "__main__":
    (ROOT / "docs" / "glossary.md").write_text(glossary(), encoding="utf-8")
