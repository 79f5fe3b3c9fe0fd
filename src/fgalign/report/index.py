"""``results/INDEX.md``: for each row of each table and each claim, where its numbers come from.

Stage, configuration, metrics file and code are read from the pipeline as DVC resolves it, so the index cannot name a
stage that does not exist; the commit is the last one that touched the code and the parameters of that row's stages.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from fgalign.config import Profile, known_profiles, load_profile
from fgalign.errors import FgalignError, InputError
from fgalign.io import write_text
from fgalign.report.cells import Cell, read_table
from fgalign.report.claims import claim_files, claims_path, read_claims
from fgalign.report.config import variants
from fgalign.report.settings import RECIPE
from fgalign.report.style import row_label
from fgalign.report.tables import TABLES, table_paths

BASE = "base"
EVALUATED_MODELS = ("reward_models", "token_models")
"""Stages that evaluate reward models, one run a model and seed."""
WITHOUT_RUN = ("study_edits", "settings")
"""Stages that only gather what others recorded, and are not tracked."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline: its address for ``dvc repro``, paths relative to the root, parameters by file."""

    address: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Source:
    """Where a row comes from; paths relative to the root."""

    stages: tuple[Stage, ...]
    metrics: tuple[str, ...]
    runs: tuple[str, ...]
    commit: str


def read_stages(root: Path) -> list[Stage]:
    """Every stage of every ``dvc.yaml`` in the repository, templates resolved by DVC itself.

    Raises:
        InputError: DVC cannot read the pipeline (its message is given).
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return [_stage(stage, root) for stage in repo.index.stages if hasattr(stage, "name")]
    except DvcException as error:
        raise InputError(f"{root / 'dvc.yaml'}: {error}") from error


def changed_stages(root: Path, stages: Iterable[Stage]) -> set[str]:
    """Addresses of those of the stages that DVC would run: something they read or write is not as ``dvc.lock`` has it.

    Raises:
        InputError: DVC cannot read the pipeline, or another DVC is at work in the repository (its message is given).
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    wanted = {stage.address for stage in stages}
    files = sorted({address.rpartition(":")[0] or "dvc.yaml" for address in wanted})
    try:
        with Repo(str(root)) as repo, lock_repo(repo):
            found = [stage for file in files for stage in repo.stage.load_all(str(root / file))]
            return {address for stage in found if (address := _address(stage, root)) in wanted and stage.status()}
    except DvcException as error:
        raise InputError(f"{root / 'dvc.yaml'}: {error}") from error


def row_source(profile: Profile, stages: list[Stage], table: str, row: str, seeds: Iterable[int]) -> Source:
    """Stages, metrics files, runs and commit behind a row of a table.

    The stages are those that wrote the metrics files, and those before them that belong to the row (its training, its
    generation), recognised by the names in ``Table.parts`` in what they are called or write.
    """
    spec = TABLES[table]
    return _source(profile, stages, spec.files(profile, row), f"table {table}", spec.parts(row), row, list(seeds))


def claim_source(profile: Profile, stages: list[Stage], claim: str, seeds: Iterable[int]) -> Source:
    """Stages that wrote what a claim reads, its metrics files, runs and commit; the rows of the tables lead further."""
    files = claim_files(profile, claim)
    return _source(profile, stages, files, f"claim {claim}", [], None, list(seeds))


def _source(
    profile: Profile,
    stages: list[Stage],
    paths: list[Path],
    reader: str,
    parts: list[str],
    row: str | None,
    seeds: list[int],
) -> Source:
    files = [_relative(path, profile.root) for path in paths]
    found: list[Stage] = []
    runs: list[str] = []
    for file in files:
        writers = [stage for stage in stages if any(_inside(file, out) for out in stage.outs)]
        if not writers:
            raise InputError(f"{profile.root / 'dvc.yaml'}: no stage writes {file}, which {reader} reads")
        earlier = [stage for stage in ancestors(writers, stages) if any(_belongs(stage, part) for part in parts)]
        found += [*writers, *earlier]
        name = row or Path(file).stem
        runs += [run for stage in (*writers, *earlier) for run in run_names(profile, stage, name, seeds)]
    chain = tuple(dict.fromkeys(found))
    return Source(chain, tuple(files), tuple(dict.fromkeys(runs)), _commit(profile, chain))


def write_index(root: Path) -> Path:
    """Write ``results/INDEX.md`` for every profile whose tables or claims were built; returns its path.

    Raises:
        InputError: a table is missing in a profile that has others, or no stage writes a metrics file.
    """
    _last_commit.cache_clear()  # what was committed since the last call counts
    stages = read_stages(root)
    parts = [
        "# Where every number comes from",
        "Generated by `fgalign index`; do not edit. A row of a table below stands for all cells of that row. "
        "`dvc repro STAGE` makes it again with all that it needs. The run names are those of MLflow (`make ui`), "
        "in the experiment of the profile; the newest run of a name belongs to the results here. The commit is the "
        "last one that touched the code or the parameters of the stages named (in a clone with full history).",
    ]
    for name in known_profiles(root):
        profile = load_profile(name, root)
        built = [table for table in TABLES if table_paths(profile, table)[0].exists()]
        if built or claims_path(profile).exists():
            parts.append(f"## Profile `{name}`")
            parts.append(f"Experiment `fgalign-{name}`, seeds {' '.join(map(str, profile.seeds))}.")
            parts += [_section(profile, stages, table) for table in built]
            if claims_path(profile).exists():
                parts.append(_claims_section(profile, stages))
    path = root / "results" / "INDEX.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _section(profile: Profile, stages: list[Stage], table: str) -> str:
    csv_path, tex_path = table_paths(profile, table)
    here = profile.root / "results"
    rows: dict[str, list[Cell]] = {}
    for cell in read_table(csv_path):
        rows.setdefault(cell.method, []).append(cell)
    lines = [
        f"### `{table}`: {TABLES[table].title}",
        "",
        f"Files {_link(csv_path, here)}, {_link(tex_path, here)}.",
        "",
        *_head("row"),
    ]
    for method, cells in rows.items():
        seeds = sorted({seed for cell in cells for seed in cell.seeds})
        source = row_source(profile, stages, table, method, seeds)
        lines.append(_line(f"{row_label(profile, table, method)} (`{method}`)", source, seeds, profile, here))
    return "\n".join(lines)


def _claims_section(profile: Profile, stages: list[Stage]) -> str:
    here = profile.root / "results"
    lines = ["### `claims`: Claims and verdicts", "", f"File {_link(claims_path(profile), here)}.", "", *_head("claim")]
    for result in read_claims(profile):
        source = claim_source(profile, stages, result.claim, result.seeds)
        title = f"{result.sentence} _{result.verdict}_ (`{result.claim}`)"
        lines.append(_line(title, source, result.seeds, profile, here))
    return "\n".join(lines)


def _head(first: str) -> list[str]:
    return [f"| {first} | stages | config | seeds | metrics | runs | commit |", "|---|---|---|---|---|---|---|"]


def _line(title: str, source: Source, seeds: Iterable[int], profile: Profile, here: Path) -> str:
    columns = [
        title,
        ", ".join(f"`{stage.address}`" for stage in source.stages),
        _config(source, profile, here),
        " ".join(map(str, seeds)) or "none",
        ", ".join(_link(profile.root / file, here) for file in source.metrics),
        ", ".join(f"`{run}`" for run in source.runs),
        f"`{source.commit}`" if source.commit else "not committed",
    ]
    return "| " + " | ".join(columns) + " |"


def _config(source: Source, profile: Profile, here: Path) -> str:
    """Parameter files with the sections that the row's stages name, the profile's own in the place of the copy that
    they read; the profile's own file where they name none."""
    own, recipe = (_relative(path, profile.root) for path in (profile.file, profile.data / RECIPE))
    keys: dict[str, dict[str, None]] = {}
    for stage in source.stages:
        for file, names in stage.params:
            keys.setdefault(own if file == recipe else file, {}).update(dict.fromkeys(names))
    keys = keys or {own: {}}
    return "; ".join(
        " ".join([_link(profile.root / file, here), *(f"`{name}`" for name in names)]) for file, names in keys.items()
    )


def run_names(profile: Profile, stage: Stage, row: str, seeds: list[int]) -> list[str]:
    """Names of the MLflow runs of a stage that concern a row, as ``fgalign.tracking`` gives them.

    - A study has ``<profile>/study@<study>/<variant>/seed-<s>`` and its evaluation
      ``<profile>/judge_study@<study>/<variant>``; a row that is no variant concerns all of them.
    - The searches have ``<profile>/search/<method or model>/<number>/seed-<s>`` with their own seed; a row is a method
      or model, or ``<method or model>/<number>: <parameters>``.
    - A training stage writes ``data/<profile>/models/<name>`` and has ``<profile>/<name>/seed-<s>`` for each seed (the
      base model has none).
    - A judge that is trained has one with its own seed.
    - The evaluation of the reward models has ``<profile>/<stage>/<model>/seed-<s>``.
    - A stage of ``WITHOUT_RUN`` has none. Any other has one, ``<profile>/<stage>``, where ``judge_start`` and the like
      are called as the stage that does the same for the methods.
    """
    name = stage.address.rsplit(":", 1)[-1]
    kind, _, item = name.partition("@")
    if kind in WITHOUT_RUN:
        return []
    if kind in ("study", "judge_study"):
        known = list(variants(profile, item))
        concerned = [row] if row in known else known
        ends = [f"/seed-{seed}" for seed in seeds] if kind == "study" else [""]
        return [f"{profile.name}/{name}/{variant}{end}" for variant in concerned for end in ends]
    if kind == "judge_model":
        return [f"{profile.name}/{name}/seed-{profile.params['judge_models'][item]['seed']}"]
    if kind in ("search", "search_rewards"):
        return _search_runs(profile, kind, row)
    models = f"{_relative(profile.data, profile.root)}/models/"
    trained = [out.removeprefix(models).split("/")[0] for out in stage.outs if out.startswith(models)]
    if trained:
        return [
            f"{profile.name}/{name}/seed-{seed}" if name != BASE else f"{profile.name}/{name}"
            for name in trained
            for seed in (seeds if name != BASE else seeds[:1])
        ]
    name = name.removesuffix("@main")
    if name == "benchmark":
        return [f"{profile.name}/benchmark@{row}"]
    if name in EVALUATED_MODELS:
        # Rows that are not reward models (FIGA's data) are scored by the model of preferences.
        rewards = [row] if row.startswith("rm_") or row in profile.params.get("token_models", {}) else ["rm_preference"]
        return [f"{profile.name}/{name}/{model}/seed-{seed}" for model in rewards for seed in seeds]
    return [f"{profile.name}/{name.replace('_start@', '@')}"]


def _search_runs(profile: Profile, kind: str, row: str) -> list[str]:
    from fgalign.study import candidates, reward_candidates, search_section

    seed = search_section(profile).seed
    grid = candidates(profile) if kind == "search" else reward_candidates(profile)
    found = [f"{candidate.method}/{candidate.number}" for candidate in grid]
    wanted = row.partition(":")[0]
    return [f"{profile.name}/search/{name}/seed-{seed}" for name in found if wanted in (name, name.partition("/")[0])]


def _belongs(stage: Stage, method: str) -> bool:
    pattern = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(method)}(?![A-Za-z0-9_])")
    return bool(pattern.search(stage.address) or any(pattern.search(out) for out in stage.outs))


def ancestors(start: list[Stage], stages: list[Stage]) -> list[Stage]:
    """The stages before ``start``, in the order in which a reader follows them back."""
    before = _before(tuple(stages))
    queue, found = list(start), []
    while queue:
        for other in before[queue.pop(0)]:
            if other not in found and other not in start:
                found.append(other)
                queue.append(other)
    return found


@cache
def _before(stages: tuple[Stage, ...]) -> dict[Stage, list[Stage]]:
    """For each stage those that write a file or folder that it depends on, something in it or something around it."""
    writing: dict[str, set[int]] = {}
    inside: dict[str, set[int]] = {}
    for number, stage in enumerate(stages):
        for out in stage.outs:
            writing.setdefault(out, set()).add(number)
            for path in _with_folders(out):
                inside.setdefault(path, set()).add(number)
    before = {}
    for stage in stages:
        found = {number for dep in stage.deps for number in inside.get(dep, ())}
        found |= {number for dep in stage.deps for path in _with_folders(dep) for number in writing.get(path, ())}
        before[stage] = [stages[number] for number in sorted(found)]
    return before


def _with_folders(path: str) -> list[str]:
    return [path, *map(str, PurePosixPath(path).parents)]


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _commit(profile: Profile, stages: tuple[Stage, ...]) -> str:
    code = {dep for stage in stages for dep in stage.deps if _inside(dep, "src")}
    return _last_commit(profile.root, tuple(sorted(code | {_relative(profile.file, profile.root)})))


@cache
def _last_commit(root: Path, paths: tuple[str, ...]) -> str:
    command = ["git", "log", "-1", "--abbrev=12", "--format=%h", "--", *paths]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise FgalignError("the index needs git on the PATH to name commits") from error
    except subprocess.CalledProcessError:
        return ""  # no commit yet, or not a git repository
    return result.stdout.strip()


def _stage(stage: Any, root: Path) -> Stage:
    from dvc.dependency import ParamsDependency

    deps, params = [], []
    for dep in stage.deps:
        path = _relative(Path(dep.fs_path), root)
        if isinstance(dep, ParamsDependency):
            params.append((path, tuple(dep.params)))
        else:
            deps.append(path)
    outs = tuple(_relative(Path(out.fs_path), root) for out in stage.outs)
    return Stage(_address(stage, root), tuple(deps), outs, tuple(params))


def _address(stage: Any, root: Path) -> str:
    # DVC's own address depends on the folder one stands in; ours is the one to give at the root.
    file = _relative(Path(stage.path), root)
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _link(path: Path, here: Path) -> str:
    if not path.exists():
        raise InputError(f"{path}: no such file, but the index links it; run `dvc repro`")
    return f"[{path.name}]({_relative(path, here)})"
