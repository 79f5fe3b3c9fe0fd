"""The checker's verdicts, worked by hand, and the script against a small git repository."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_metrics as made_up

from fgalign.report.cells import Cell, cells_to_csv
from fgalign.report.check import compare_cells, format_report, passes

ROOT = Path(__file__).resolve().parents[1]
OLD = Cell("figa", "win_rate", 50.0, 45.0, 55.0, (1, 2, 3))
VERDICT = Cell("figa_beats_sft", "verdict", 1.0, seeds=(1, 2, 3))


def changed(**changes):
    """OLD with some fields changed."""
    return Cell(**{**OLD.__dict__, **changes})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (OLD, OLD, "exact"),
        (OLD, changed(mean=50.00004), "exact"),  # four decimals are all that a table holds
        (OLD, changed(mean=50.0001), "within"),
        (OLD, changed(low=44.0), "within"),
        (OLD, changed(mean=55.0), "within"),
        (OLD, changed(mean=55.0002), "differs"),
        (OLD, changed(mean=44.9), "differs"),
        (OLD, changed(seeds=(1, 2)), "other seeds"),
        (OLD, changed(reported=51.0), "differs"),
        (OLD, None, "only committed"),
        (None, OLD, "only rebuilt"),
        # No seeds and no interval: the data alone decide, and a change is a difference.
        (changed(low=None, high=None, seeds=()), changed(low=None, high=None, seeds=()), "exact"),
        (changed(low=None, high=None, seeds=()), changed(mean=50.1, low=None, high=None, seeds=()), "differs"),
        # One seed has no interval, and says nothing of others.
        (changed(low=None, high=None), changed(low=None, high=None), "exact"),
        (changed(low=None, high=None), changed(mean=50.1, low=None, high=None), "no interval"),
        # A lower bound is open above.
        (changed(high=None), changed(mean=99.0, high=None), "within"),
        (changed(high=None), changed(mean=44.0, high=None), "differs"),
        (OLD, changed(high=None), "differs"),
        (changed(high=None), OLD, "differs"),
        # Neither do seeds that all gave the same number.
        (changed(low=50.0, high=50.0), changed(mean=50.1, low=50.0, high=50.0), "no interval"),
        (changed(low=50.0, high=50.0), changed(low=48.0, high=52.0), "exact"),
        # A verdict may move to its neighbour.
        (VERDICT, VERDICT, "exact"),
        (VERDICT, replace(VERDICT, mean=0.0), "moved"),
        (VERDICT, replace(VERDICT, mean=-1.0), "differs"),
    ],
)
def test_verdict(old, new, expected):
    row = compare_cells("t", [old] if old else [], [new] if new else [])[0]
    assert row.verdict == expected
    assert passes([row]) == (expected in ("exact", "within", "no interval", "moved"))


def test_tolerance_is_half_the_committed_interval():
    def tolerance(cell):
        return compare_cells("t", [cell], [OLD])[0].tolerance

    assert tolerance(OLD) == "5.0000"
    assert tolerance(changed(high=None)) == "at least 45.0000"
    assert tolerance(changed(low=None, high=None)) == "no interval"
    assert tolerance(changed(low=None, high=None, seeds=())) == "exact"
    assert tolerance(VERDICT) == "one step"


def test_no_cells_do_not_pass():
    assert not passes([])


def test_report_lists_cells_and_counts():
    rows = compare_cells("t", [OLD, changed(metric="kl")], [changed(mean=51.0), changed(metric="tokens")])
    text = format_report(rows, ["t"])
    assert [row.verdict for row in rows] == ["within", "only committed", "only rebuilt"]
    assert "DIFFERENT: 3 cells of t: 0 exact, 1 within, 0 differs, 1 only committed, 1 only rebuilt" in text
    line = next(line for line in text.splitlines() if "win_rate" in line)
    assert line.split() == ["t", "figa", "win_rate", "50.0000", "51.0000", "5.0000", "within"]


@pytest.fixture
def repository(tmp_path):
    """A git repository with one committed table of one profile."""
    profile = made_up.write_profile(tmp_path)
    path = profile.results / "tables" / "figa_main.csv"
    path.parent.mkdir(parents=True)
    path.write_text(cells_to_csv([OLD]))
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "results"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return path


@pytest.fixture
def script(repository, monkeypatch):
    """The script as a module, inside the repository."""
    monkeypatch.chdir(repository.parents[3])
    spec = importlib.util.spec_from_file_location("check_script", ROOT / "reproduce" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(script, monkeypatch):
    """The script's main, with every table taken as rebuilt: there is no pipeline."""
    monkeypatch.setattr(script, "not_rebuilt", lambda *_: [])
    return script.main


def test_script_compares_with_the_commit(repository, check, capsys):
    assert check([]) == 0
    assert "OK: 1 cells of figa_main: 1 exact, 0 within, 0 differs" in capsys.readouterr().out
    repository.write_text(cells_to_csv([changed(mean=52.0)]))
    assert check(["--table", "figa_main"]) == 0
    repository.write_text(cells_to_csv([changed(mean=60.0)]))
    assert check(["--table", "figa_main", "--against", "HEAD", "--profile", "mini"]) == 1
    assert "differs" in capsys.readouterr().out


def test_script_fails_on_a_table_that_was_not_rebuilt_or_never_committed(repository, check, capsys):
    repository.unlink()
    assert check([]) == 2
    assert "no such table; run `fgalign table figa_main`" in capsys.readouterr().err
    repository.write_text(cells_to_csv([OLD]))
    (repository.parent / "labels.csv").write_text(cells_to_csv([OLD]))
    assert check([]) == 0  # what was never committed is compared only where it is named
    assert check(["--table", "labels"]) == 2
    assert "git show HEAD:results/mini/tables/labels.csv" in capsys.readouterr().err
    assert check(["--table", "nonsense"]) == 2
    assert "unknown table 'nonsense'" in capsys.readouterr().err
    assert check(["--against", "no-such-ref"]) == 2


def test_tables_of_the_second_pipeline_are_checked_only_by_name(repository, check, capsys):
    path = repository.parents[1] / "sweeps" / "tables" / "search.csv"
    path.parent.mkdir(parents=True)
    path.write_text(cells_to_csv([OLD]))
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["add", "-A"], ["commit", "-qm", "sweeps"]):
        subprocess.run([*git, *command], cwd=repository.parents[3], check=True)
    path.write_text(cells_to_csv([changed(mean=60.0)]))
    assert check([]) == 0
    out = capsys.readouterr().out
    assert "OK: 1 cells of figa_main: 1 exact" in out
    assert out.endswith("Not looked at, as another pipeline builds them: search; --table NAME checks one.\n")
    assert check(["--table", "search"]) == 1


PIPELINE = """
stages:
  raw:
    cmd: echo 1 > data/mini/raw
    outs: [data/mini/raw]
  figa_main:
    cmd: cp rebuilt.csv results/mini/tables/figa_main.csv
    deps: [data/mini/raw]
    outs: [results/mini/tables/figa_main.csv: {cache: false}]
"""


def test_a_table_that_was_not_rebuilt_is_said(repository, script, capsys):
    from dvc.repo import Repo

    root = repository.parents[3]
    (root / "rebuilt.csv").write_text(cells_to_csv([OLD]))
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "data" / "mini").mkdir(parents=True)
    with Repo.init(str(root)) as repo:
        assert script.main([]) == 2  # nothing has run
        repo.reproduce()
    capsys.readouterr()
    assert script.main([]) == 0
    assert capsys.readouterr().out.endswith("OK: 1 cells of figa_main: 1 exact, 0 within, 0 differs\n")
    (root / "data" / "mini" / "raw").unlink()  # as in a clone
    assert script.main(["--table", "figa_main"]) == 2
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "figa_main: not rebuilt here: the committed file was compared with itself",
        "NOT REBUILT: 1 cells of figa_main: 1 exact, 0 within, 0 differs; "
        "1 of them compared with themselves: `make check` rebuilds first",
    ]
    repository.write_text(cells_to_csv([changed(mean=52.0)]))  # another file than the committed one
    assert script.main([]) == 0
    repository.write_text(cells_to_csv([changed(mean=60.0)]))
    assert script.main([]) == 1
    assert "not rebuilt" not in capsys.readouterr().out


def lock(base):
    return f"schema: '2.0'\nstages:\n  base:\n    outs:\n    - path: data/mini/models/base\n      md5: {base}\n"


def test_another_base_model_is_said(repository, check, capsys):
    root = repository.parents[3]
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    note = "The base model is not the committed one"
    repository.write_text(cells_to_csv([changed(mean=60.0)]))
    assert check([]) == 1  # no lock
    (root / "dvc.lock").write_text(lock("a.dir"))
    subprocess.run([*git, "add", "dvc.lock"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-qm", "lock"], cwd=root, check=True)
    assert check([]) == 1  # the same base model
    (root / "dvc.lock").write_text("stages: {}")
    assert check([]) == 1  # none yet
    assert note not in capsys.readouterr().out
    (root / "dvc.lock").write_text(lock("b.dir"))
    assert check([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(note)
    repository.write_text(cells_to_csv([OLD]))
    assert check([]) == 0
    assert note not in capsys.readouterr().out


def test_claims_are_checked_by_estimate_and_verdict(repository, check, capsys):
    from fgalign.report.claims import Result, claims_to_csv

    root = repository.parents[3]
    claim = Result(
        "figa_beats_sft", "FIGA", "FIGA beats SFT.", "win rate (points)", 5.0, 1.0, 9.0, 0.01, 0.02, "holds", 6.0, 2.0,
        (1, 2, 3), None,
    )  # fmt: skip
    path = root / "results" / "mini" / "claims.csv"
    path.write_text(claims_to_csv([claim]))
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["add", "-A"], ["commit", "-qm", "claims"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    assert check([]) == 0
    assert "OK: 3 cells of figa_main claims: 3 exact" in capsys.readouterr().out
    path.write_text(claims_to_csv([replace(claim, estimate=6.0)]))
    assert check(["--table", "claims"]) == 0
    path.write_text(claims_to_csv([replace(claim, estimate=6.0, verdict="cannot tell")]))
    assert check(["--table", "claims"]) == 0
    assert "OK: 2 cells of claims: 0 exact, 1 within, 0 differs, 1 moved" in capsys.readouterr().out
    # A verdict that turned round is a difference even where the estimate lies within the committed interval.
    path.write_text(claims_to_csv([replace(claim, estimate=6.0, verdict="does not hold")]))
    assert check(["--table", "claims"]) == 1
    assert "2 cells of claims: 0 exact, 1 within, 1 differs" in capsys.readouterr().out
    path.unlink()
    assert check(["--table", "claims"]) == 2
    assert "claims.csv: no such file; run `fgalign claims`" in capsys.readouterr().err
