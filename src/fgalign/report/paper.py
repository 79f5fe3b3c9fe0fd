"""The paper: gather every table, figure and number under ``paper/`` and compile ``paper/main.typ`` with typst.

The text holds no number of ours. It reads ``paper/generated/numbers.json``, which this file writes from the built
tables, the profile and the samples; the compiler sees nothing outside ``paper/`` and uses only its own fonts, so the
same inputs give the same bytes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fgalign.config import DEFAULT_PROFILE, Profile, known_profiles, load_profile
from fgalign.errors import FgalignError, InputError
from fgalign.io import atomic_dir, atomic_file, read_json, write_json
from fgalign.report.cells import MINUS, Cell, display, read_table
from fgalign.report.claims import BEYOND, LEVEL, VERDICTS, Result, claims_from_csv, claims_path, read_claims, untested
from fgalign.report.config import other_judges, report_config
from fgalign.report.figures import FIGURES, figure_paths
from fgalign.report.reported import FIGA_ROW, FIGA_SOURCE, REPORTED, Reported, verdict
from fgalign.report.style import BENCHMARK, metric_style, row_label
from fgalign.report.tables import TABLES, blocks, table_paths

HUMAN = "human"
MORE_SEEDS = "more-seeds"
"""The default profile with more seeds, for the claims alone."""
_NOT_SHOWN = (
    "report", "root", "params_file", "world", "papers", "needed_token_models", "judge_models", "other_judges",
    "judge_tables",
)  # fmt: skip
EARLIER = {
    "earlier test split": "results/first-test-split/claims-12-seeds.csv",
    "another base model": "results/other-base-models/intel-xeon/claims-12-seeds.csv",
}
"""Claims of the profile with more seeds as they came out before; no stage writes them again."""


def paper_inputs(root: Path) -> list[Path]:
    """The files that ``build_paper`` reads: the source, and of the default profile its samples, the tables and figures
    that every profile has, and those of the others that were built, with the claims; of the human profile what was
    built; the claims with more seeds."""
    profile = load_profile(DEFAULT_PROFILE, root)
    paths = [root / "paper" / "main.typ", profile.file, profile.results / "samples.json"]
    paths += [path for name in _shown_tables(profile) for path in table_paths(profile, name)]
    paths += [path for name in _shown_figures(profile) for path in figure_paths(profile, name)]
    human = _human(root)
    if human:
        paths += [human.file, *(path for _, path in _built_tables(human)), *_built_figures(human)]
    tested = [claims_path(item) for item in (profile, human, _more_seeds(root)) if item]
    tested += [root / path for path in EARLIER.values()]
    return paths + [path for path in tested if path.exists()]


def paper_outputs(root: Path) -> list[Path]:
    """What ``build_paper`` writes: three folders, replaced as a whole, and the PDF."""
    paper = root / "paper"
    return [paper / "generated", paper / "tables", paper / "figures", paper / "main.pdf"]


def build_paper(root: Path) -> list[Path]:
    """Build ``paper/main.pdf`` and the folders it reads; returns the paths written.

    Raises:
        InputError: a table, a figure or the samples of the default profile are missing.
        FgalignError: the text does not compile (the message is the compiler's).
    """
    profile, human = load_profile(DEFAULT_PROFILE, root), _human(root)
    missing = [path for path in paper_inputs(root) if not path.exists()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such file, and the paper needs it; run `dvc repro` (or `fgalign table|figure`)"
        )
    numbers = paper_numbers(profile, human)
    generated, tables, figures, pdf = paper_outputs(root)
    with atomic_dir(generated) as folder:
        write_json(folder / "numbers.json", numbers)
    with atomic_dir(tables) as folder:
        for name in _shown_tables(profile):
            _copy(table_paths(profile, name)[1], folder)
    with atomic_dir(figures) as folder:
        for name in _shown_figures(profile):
            for path in figure_paths(profile, name):
                _copy(path, folder)
        for path in _built_figures(human) if human else []:
            _copy(path, folder, f"{HUMAN}_{path.name}")
    data = compile_typst(root / "paper" / "main.typ")
    with atomic_file(pdf, "wb") as file:
        file.write(data)
    return [generated, tables, figures, pdf]


def compile_typst(source: Path, **options: Any) -> bytes | list[bytes]:
    """Compile a typst file that reads only files beside or below it; bytes of the PDF, or what ``options`` ask for."""
    import typst

    try:
        return typst.compile(source, root=source.parent, ignore_system_fonts=True, timestamp=0, **options)
    except typst.TypstError as error:
        raise FgalignError(f"{source}: typst: {error}") from error


def paper_numbers(profile: Profile, human: Profile | None) -> dict[str, Any]:
    """All that the paper prints, as JSON: texts ready to show, not floats."""
    main = _profile_numbers(profile, _shown_tables(profile))
    return {
        "main": main,
        "human": _profile_numbers(human, list(dict(_built_tables(human)))) if human else None,
        "more_seeds": _with_more_seeds(profile.root),
        "earlier": _earlier(profile.root),
        "comparisons": _comparisons(profile, _more_seeds(profile.root)),
        "published_figa_row": {"source": FIGA_SOURCE, "cells": [list(item) for item in FIGA_ROW.items()]},
        "sample": _sample(profile),
        "settings": _settings(profile),
    }


def _profile_numbers(profile: Profile, names: list[str]) -> dict[str, Any]:
    config = report_config(profile)
    tables = {name: read_table(table_paths(profile, name)[0]) for name in names}
    return {
        "name": profile.name,
        "seeds": len(profile.seeds),
        "budget_note": config.budget_note,
        "judge_title": config.judge_title,
        "methods": [[name, row_label(profile, "figa_main", name)] for name in config.methods],
        "prompts": profile.params.get("evaluation", {}).get("prompts"),
        "other_judges": [judge.model_dump() for judge in other_judges(profile).values()],
        "tables": {name: _shown(profile, name, cells) for name, cells in tables.items()},
        "missing_tables": [TABLES[name].title for name in TABLES if name not in [*names, *_without_rows(profile)]],
        "figures": [name for name in FIGURES if all(path.exists() for path in figure_paths(profile, name))],
        "claims": _claims(profile),
        "values": {name: _values(cells) for name, cells in tables.items()},
    }


def _without_rows(profile: Profile) -> list[str]:
    """Tables that would be empty in this profile: that of the judges where it has one."""
    return [] if other_judges(profile) else ["judges"]


def _shown(profile: Profile, name: str, cells: list[Cell]) -> dict[str, Any]:
    """A table for typst: blocks of rows of cells, the verdict beside each published number. ``figa_main`` leaves out
    the rates of tasks, which have a table of their own."""
    shown = []
    if name == "figa_main" and table_paths(profile, "benchmarks")[0].exists():
        cells = [cell for cell in cells if not cell.metric.startswith(BENCHMARK)]
    for block in blocks(profile, name, cells):
        rows = []
        for method, row in block.rows:
            line = []
            for metric, cell in zip(block.metrics, row, strict=True):
                line.append({"value": cell.value, "interval": cell.interval, "reported": cell.reported})
                if cell.reported:
                    line[-1]["verdict"] = _verdict(name, cells, method, metric)
            rows.append({"label": row_label(profile, name, method), "cells": line})
        shown.append({"title": block.title, "header": list(block.header), "rows": rows})
    return {"title": TABLES[name].title, "blocks": shown}


def _claims(profile: Profile) -> dict[str, Any] | None:
    """The claims for typst: rows of the papers and beyond them, verdicts counted, and what was not tested."""
    if not claims_path(profile).exists():
        return None
    results = read_claims(profile)
    if not results:  # one seed
        return None
    papers = [result for result in results if result.paper != BEYOND]
    return {
        "rows": [_claim(result) for result in papers],
        "further": [_claim(result) for result in results if result.paper == BEYOND],
        "counts": {name: sum(result.verdict == name for result in papers) for name in reversed(VERDICTS)},
        "untested": untested(profile, results),
        "level": f"{LEVEL:g}",
    }


def _with_more_seeds(root: Path) -> dict[str, Any] | None:
    """The claims of the profile with more seeds, as ``_claims``, and how many seeds; None if they were not tested."""
    profile = _more_seeds(root)
    claims = _claims(profile) if profile else None
    if profile is None or not claims:
        return None
    prompts = profile.params.get("evaluation", {}).get("prompts")
    return {"name": MORE_SEEDS, "seeds": len(profile.seeds), "prompts": prompts, "claims": claims}


def _earlier(root: Path) -> dict[str, Any] | None:
    """Claims with more seeds whose verdict is another one in an earlier run: the runs' names, the newest first, and for
    each claim its sentence and (estimate, interval, verdict) of each run. None where there is nothing to compare."""
    profile, paths = _more_seeds(root), {title: root / path for title, path in EARLIER.items()}
    if profile is None or not claims_path(profile).exists() or not all(path.exists() for path in paths.values()):
        return None
    runs = {"here": read_claims(profile)}
    runs |= {title: claims_from_csv(path.read_text(encoding="utf-8"), path) for title, path in paths.items()}
    rows, same = [], 0
    found = [{result.claim: result for result in results} for results in runs.values()]
    for claim, result in found[0].items():
        each = [run[claim] for run in found if claim in run]
        if len(each) < len(found):
            continue
        if len({one.verdict for one in each}) == 1:
            same += 1
            continue
        cells = [[shown["estimate"], shown["interval"], shown["verdict"]] for shown in map(_claim, each)]
        rows.append({"sentence": result.sentence, "cells": cells})
    return {"runs": list(runs), "rows": rows, "same": same}


def _claim(result: Result) -> dict[str, str]:
    def show(value: float | None, sign: str = "+") -> str:
        if value is None:
            return ""
        # On which side of zero and of the smallest effect an interval ends is to be seen.
        near = round(value, 1) != value and round(value, 1) in (0.0, result.smallest_effect)
        return f"{value:{sign}.{2 if near else 1}f}".replace("-", MINUS)

    return {
        "name": result.claim,
        "paper": result.paper,
        "sentence": result.sentence,
        "quantity": result.quantity,
        "estimate": show(result.estimate),
        "interval": f"[{show(result.ci_low)}, {show(result.ci_high)}]",
        "p": "< 0.001" if result.p_holm < 0.001 else f"{result.p_holm:.3f}",
        "verdict": result.verdict,
        "why": _why(result),
        "detectable": show(result.detectable, ""),
        "smallest": f"{result.smallest_effect:g}",
        "reported": show(result.reported),
    }


def _why(result: Result) -> str:
    """Which of two reasons a claim does not hold for; empty for other verdicts."""
    if result.verdict != "does not hold":
        return ""
    return "reversed" if result.p_holm < LEVEL else f"below {result.smallest_effect:g}"


def _values(cells: list[Cell]) -> dict[str, dict[str, dict[str, str]]]:
    """``method -> metric -> {value, interval, unit}`` for single numbers in the text."""
    values: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells:
        shown = display(cell)
        entry = {"value": shown.value, "interval": shown.interval, "unit": metric_style(cell.metric).unit}
        values.setdefault(cell.method, {})[cell.metric] = entry
    return values


def _comparisons(profile: Profile, more: Profile | None) -> dict[str, dict[str, Any]]:
    """Each published number beside ours, with the computed verdict; keys are ``table.method.metric``. ``more`` of it is
    the same with more seeds, where the number belongs to a claim that was tested with them, else None."""
    tested: list[Result] = []
    if more and claims_path(more).exists():
        tested = [result for result in read_claims(more) if result.reported is not None]
    rows = {}
    for (table, method, metric), reported in REPORTED.items():
        cells = read_table(table_paths(profile, table)[0])
        for cell in cells:
            if (cell.method, cell.metric) == (method, metric):
                claim = next((result for result in tested if result.reported == reported.value), None)
                again = claim and replace(
                    cell, mean=claim.estimate, low=claim.ci_low, high=claim.ci_high, seeds=claim.seeds
                )
                rows[f"{table}.{method}.{metric}"] = {
                    "what": f"{row_label(profile, table, method)}: {metric_style(metric).title}",
                    "reported": display(cell).reported,
                    "source": f"{reported.source}: {reported.note}",
                    **_compared(reported, cell),
                    "more": _compared(reported, again) if again else None,
                }
    return rows


def _compared(reported: Reported, cell: Cell) -> dict[str, str]:
    """Our number beside a published one, with the verdict on its sign."""
    shown = display(cell)
    return {"ours": shown.value, "interval": shown.interval, "verdict": verdict(reported, cell)}


def _verdict(table: str, cells: list[Cell], method: str, metric: str) -> str:
    cell = next(cell for cell in cells if (cell.method, cell.metric) == (method, metric))
    return verdict(REPORTED[table, method, metric], cell)


def _sample(profile: Profile) -> dict[str, Any]:
    """The first sample: prompt, reference and each method's response with its score."""
    path = profile.results / "samples.json"
    samples = read_json(path)
    if not isinstance(samples, list) or not samples:
        raise InputError(f"{path}: expected a list of samples; run the stage that judges the methods again")
    sample = samples[0]
    absent = [key for key in ("id", "prompt", "reference", "responses", "scores") if key not in sample]
    if absent:
        raise InputError(f"{path}: the first sample has no {absent[0]!r}; found {', '.join(sample)}")
    methods = [method for method in report_config(profile).judged_methods if method in sample["responses"]]
    responses = [
        {
            "label": row_label(profile, "figa_main", method),
            "text": sample["responses"][method],
            "score": f"{sample['scores'][method] + 0.0:.2f}".replace("-", MINUS),  # not -0.00
        }
        for method in methods
    ]
    return {**{key: sample[key] for key in ("id", "prompt", "reference")}, "responses": responses}


def _settings(profile: Profile) -> list[list[str]]:
    """What the appendix shows of a profile: dotted keys and values, without titles, grids and lists of stages."""
    rows = _flatten({key: value for key, value in profile.params.items() if key not in _NOT_SHOWN})
    return [row for row in rows if row[1] != "{}" and not {"title", "search"} & set(row[0].split(".")[1:])]


def _flatten(value: Any, prefix: str = "") -> list[list[str]]:
    """Parameters as (dotted key, value) pairs, in the order of the file."""
    if isinstance(value, dict) and value:
        return [
            pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [[prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]]


def _human(root: Path) -> Profile | None:
    """The human profile, if it is configured and at least one of its tables was built."""
    if HUMAN not in known_profiles(root):
        return None
    profile = load_profile(HUMAN, root)
    return profile if _built_tables(profile) else None


def _more_seeds(root: Path) -> Profile | None:
    return load_profile(MORE_SEEDS, root) if MORE_SEEDS in known_profiles(root) else None


def _shown_tables(profile: Profile) -> list[str]:
    built = dict(_built_tables(profile))
    return [name for name, table in TABLES.items() if table.core or name in built]


def _shown_figures(profile: Profile) -> list[str]:
    built = set(_built_figures(profile))
    return [name for name, spec in FIGURES.items() if spec.core or built & set(figure_paths(profile, name))]


def _built_tables(profile: Profile) -> list[tuple[str, Path]]:
    paths = [(name, table_paths(profile, name)[0]) for name in TABLES]
    return [(name, path) for name, path in paths if path.exists()]


def _built_figures(profile: Profile) -> list[Path]:
    return [path for name in FIGURES for path in figure_paths(profile, name) if path.exists()]


def _copy(source: Path, folder: Path, name: str | None = None) -> None:
    (folder / (name or source.name)).write_bytes(source.read_bytes())
