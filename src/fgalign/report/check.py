"""Compare rebuilt tables and claims with the committed ones, cell by cell.

A rebuilt value is *exact* when it equals the committed one in all printed decimals, *within* when it lies in the
committed 95% interval (a lower bound is open above), and *differs* otherwise. A cell without seeds and without an
interval depends on the data alone and must be exact. One that was trained and shows no spread, because there is one
seed or all seeds gave the same number, says nothing about how far others may lie: where its value is another, it has
*no interval*, and does not fail. A cell that only one side has, or whose seeds or published number changed, differs,
and so does one that is a lower bound on one side alone. Of a claim the estimate and the verdict are compared, the
verdict as a number: 1 holds, 0 cannot tell, -1 does not hold; it has *moved* where it went to a neighbour, which an
estimate within its interval can make it do, and that does not fail.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.report.cells import Cell, cells_from_csv, cells_to_csv, read_table
from fgalign.report.claims import claim_cells, claims_from_csv, claims_path, read_claims
from fgalign.report.index import BASE, ancestors, changed_stages, read_stages
from fgalign.report.tables import SWEEPS, TABLES, table_paths, table_spec

Verdict = Literal["exact", "within", "no interval", "moved", "differs", "only committed", "only rebuilt", "other seeds"]
PASSING = ("exact", "within", "no interval", "moved")
CLAIMS = "claims"
VERDICT = "verdict"
"""Name of ``claims.csv`` among the tables to check."""


@dataclass(frozen=True)
class Comparison:
    """One cell on both sides; None where a side does not have it."""

    table: str
    method: str
    metric: str
    committed: Cell | None
    rebuilt: Cell | None
    verdict: Verdict

    @property
    def tolerance(self) -> str:
        """What the committed cell allows, as text: half the width of its interval, or why there is none."""
        cell = self.committed
        if cell is None:
            return ""
        if cell.metric == VERDICT:
            return "one step"
        if not _spread(cell):
            return "no interval" if cell.seeds else "exact"
        if cell.high is None:
            return f"at least {cell.low:.4f}"
        return f"{(cell.high - cell.low) / 2:.4f}"


def compare_cells(table: str, committed: Iterable[Cell], rebuilt: Iterable[Cell]) -> list[Comparison]:
    """Compare two versions of a table, in the order of the committed one; cells that are new come last."""
    old = {(cell.method, cell.metric): cell for cell in committed}
    new = {(cell.method, cell.metric): cell for cell in rebuilt}
    rows = []
    for key in [*old, *(key for key in new if key not in old)]:
        rows.append(Comparison(table, *key, old.get(key), new.get(key), _verdict(old.get(key), new.get(key))))
    return rows


def check_tables(profile: Profile, names: Iterable[str], against: str = "HEAD") -> list[Comparison]:
    """Compare the tables on disk with those of the commit ``against``.

    Raises:
        ConfigError: an unknown table.
        InputError: a table was not rebuilt, or ``against`` is no commit or holds no such table.
    """
    rows = []
    for name in names:
        path = _csv_path(profile, name)
        where = f"{against}:{path.name}"
        if name == CLAIMS:
            committed = claim_cells(claims_from_csv(committed_text(profile.root, path, against), where))
            rebuilt = claim_cells(read_claims(profile))
        else:
            committed = cells_from_csv(committed_text(profile.root, path, against), where)
            rebuilt = read_table(path)
        rows += compare_cells(name, committed, rebuilt)
    return rows


def not_rebuilt(profile: Profile, names: Iterable[str], against: str = "HEAD") -> list[str]:
    """Names of the tables that are, to the byte, those of the commit ``against`` and whose stage, or one before it, DVC
    would run: what stands there is the committed file, which agrees with itself whatever the code does.

    Raises:
        InputError: DVC cannot say what it would run, or ``against`` is no commit or holds no such table.
    """
    paths = {name: _csv_path(profile, name) for name in names}
    same = [
        name
        for name, path in paths.items()
        if path.read_text(encoding="utf-8") == committed_text(profile.root, path, against)
    ]
    if not same:
        return []
    stages = read_stages(profile.root)
    chains = {}
    for name in same:
        writers = [stage for stage in stages if paths[name].relative_to(profile.root).as_posix() in stage.outs]
        chains[name] = [*writers, *ancestors(writers, stages)]
    changed = changed_stages(profile.root, (stage for chain in chains.values() for stage in chain))
    # A table that no stage builds any more was not rebuilt either.
    return [name for name in same if not chains[name] or any(stage.address in changed for stage in chains[name])]


def committed_tables(profile: Profile, against: str = "HEAD") -> list[str]:
    """Names of the tables to check, ``claims`` among them: those in the commit ``against``, in the order of the papers,
    but for those of the second pipeline (``tables.SWEEPS``), which the first does not rebuild."""
    return [name for name in _held(profile, against) if name not in SWEEPS]


def left_out(profile: Profile, against: str = "HEAD") -> list[str]:
    """Names of the committed tables that ``committed_tables`` leaves out."""
    return [name for name in _held(profile, against) if name in SWEEPS]


def _held(profile: Profile, against: str) -> list[str]:
    results = profile.results.relative_to(profile.root).as_posix()
    held = set(_git(profile.root, "ls-tree", "-r", "--name-only", against, f"{results}/").splitlines())
    return [n for n in (*TABLES, CLAIMS) if _csv_path(profile, n).relative_to(profile.root).as_posix() in held]


def table_stage(profile: Profile, name: str) -> str:
    """Address of the stage that builds a table, as ``dvc repro`` takes it at the repository's root.

    Raises:
        ConfigError: an unknown table.
        InputError: no stage builds it in this profile.
    """
    path = _csv_path(profile, name).relative_to(profile.root).as_posix()
    for stage in read_stages(profile.root):
        if path in stage.outs:
            return stage.address
    raise InputError(f"{path}: no stage of the profile {profile.name} builds this table; choose another table")


def _csv_path(profile: Profile, name: str) -> Path:
    if name == CLAIMS:
        return claims_path(profile)
    table_spec(name)
    return table_paths(profile, name)[0]


def committed_text(root: Path, path: Path, against: str) -> str:
    """The text of a file at a commit; InputError where the commit does not hold it."""
    return _git(root, "show", f"{against}:{path.relative_to(root).as_posix()}")


def base_model_note(profile: Profile, against: str = "HEAD") -> str | None:
    """A line that says why levels may differ, where the base model is not the one of the commit; None where it is, or
    where one side has no ``dvc.lock`` that tells."""
    lock = profile.file.parent / "dvc.lock"
    try:
        hashes = {_base_hash(lock.read_text(encoding="utf-8")), _base_hash(committed_text(profile.root, lock, against))}
    except (OSError, InputError):
        return None
    if len(hashes - {None}) < 2:
        return None
    return (
        "The base model is not the committed one: it was trained again, with other code, data or parameters, or where "
        "torch rounds otherwise. What all methods share, such as the level of win rates, then moves by more than "
        "intervals over seeds and prompts say; compare methods with each other, and the claims."
    )


def _base_hash(lock: str) -> str | None:
    import yaml

    stage = yaml.load(lock, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"].get(BASE)
    return stage and stage["outs"][0]["md5"]


def format_report(rows: list[Comparison], names: Iterable[str], same: Iterable[str] = ()) -> str:
    """The comparison as plain text: one line a cell, the tables that were not rebuilt (``same``), the counts."""
    table = [("table", "row", "metric", "committed", "rebuilt", "tolerance", "verdict")]
    for row in rows:
        sides = [f"{cell.mean:.4f}" if cell else "-" for cell in (row.committed, row.rebuilt)]
        table.append((row.table, row.method, row.metric, *sides, row.tolerance, row.verdict))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            _pad(text, width, index) for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    counts = Counter(row.verdict for row in rows)
    tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("exact", "within", "differs"))
    others = "".join(
        f", {counts[verdict]} {verdict}" for verdict in counts if verdict not in ("exact", "within", "differs")
    )
    same = list(same)
    notes = [f"{name}: not rebuilt here: the committed file was compared with itself" for name in same]
    verdict = "DIFFERENT" if not passes(rows) else "NOT REBUILT" if same else "OK"
    summary = f"{verdict}: {len(rows)} cells of {' '.join(names)}: {tally}{others}"
    if same:
        itself = sum(row.table in same for row in rows)
        summary += f"; {itself} of them compared with themselves: `make check` rebuilds first"
    return "\n".join([*lines, "", *notes, summary])


def passes(rows: list[Comparison]) -> bool:
    """True when there are cells, and none that differs or stands on one side alone."""
    return bool(rows) and all(row.verdict in PASSING for row in rows)


def _verdict(old: Cell | None, new: Cell | None) -> Verdict:
    if new is None:
        return "only committed"
    if old is None:
        return "only rebuilt"
    if old.seeds != new.seeds:
        return "other seeds"
    if old.reported != new.reported:
        return "differs"
    if cells_to_csv([old]) == cells_to_csv([new]):
        return "exact"
    if old.metric == VERDICT:
        return "moved" if abs(old.mean - new.mean) == 1 else "differs"
    if _lower_bound(old) != _lower_bound(new):
        return "differs"
    if not _spread(old):
        same = f"{old.mean:.4f}" == f"{new.mean:.4f}"
        return "exact" if same else "no interval" if old.seeds else "differs"
    high = float("inf") if old.high is None else old.high
    return "within" if old.low <= float(f"{new.mean:.4f}") <= high else "differs"


def _lower_bound(cell: Cell) -> bool:
    return cell.low is not None and cell.high is None


def _spread(cell: Cell) -> bool:
    """Whether the cell has an interval, and one that is wider than a point."""
    return cell.low is not None and (cell.high is None or cell.high > cell.low)


def _pad(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column in (3, 4, 5) else text.ljust(width)


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, encoding="utf-8")
    except FileNotFoundError:
        raise InputError("the check needs git on the PATH to read the committed tables") from None
    if result.returncode:
        raise InputError(
            f"git {' '.join(arguments)}: {result.stderr.strip()}; "
            "name a commit that holds the tables (--against), or commit results first"
        )
    return result.stdout
