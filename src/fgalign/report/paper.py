"""The paper: gather every table, figure and number under ``paper/`` and compile ``paper/main.typ`` with typst.

The text holds no number of ours. It reads ``paper/generated/numbers.json``, which this file writes from the built
tables, the profile and the samples; the compiler sees nothing outside ``paper/`` and uses only its own fonts, so the
same inputs give the same bytes.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from fgalign.config import DEFAULT_PROFILE, Profile, known_profiles, load_profile
from fgalign.errors import FgalignError, InputError
from fgalign.io import atomic_dir, atomic_file, read_json, write_json
from fgalign.report import inputs
from fgalign.report.cells import MINUS, Cell, display, read_table
from fgalign.report.claims import BEYOND, LEVEL, VERDICTS, Result, claims_from_csv, claims_path, read_claims, untested
from fgalign.report.config import PLAIN_PPO, other_judges, report_config
from fgalign.report.figures import FIGURES, figure_paths
from fgalign.report.reported import FIGA_ROW, FIGA_SOURCE, REPORTED, Reported, verdict
from fgalign.report.style import BENCHMARK, method_style, metric_style, row_label
from fgalign.report.tables import TABLES, blocks, table_paths

HUMAN = "human"
MORE_SEEDS = "more-seeds"
"""The default profile with more seeds, for the claims alone."""
_NOT_SHOWN = (
    "report", "root", "params_file", "world", "papers", "needed_token_models", "judge_models", "other_judges",
    "judge_tables", "edit_likelihood",
)  # fmt: skip
EARLIER = {
    "earlier test split": "results/first-test-split/claims-12-seeds.csv",
    "another base model": "results/other-base-models/intel-xeon/claims-12-seeds.csv",
}
"""Claims of the profile with more seeds as they came out before; no stage writes them again."""
PPO_SOURCE = Path(__file__).resolve().parents[1] / "ppo_trainer.py"
SET_BY_RUN = ("output_dir", "seed", "bf16", "use_cpu", "vllm_max_length")
"""Fields of the PPO trainer's arguments that no profile sets among them (``methods.ppo.SET_BY_RUN``)."""


def paper_inputs(root: Path) -> list[Path]:
    """The files that ``build_paper`` reads: the source, and of the default profile its samples, the tables and figures
    that every profile has, and those of the others that were built, with the claims; of the human profile what was
    built; the claims with more seeds; beside the table of the judges the preferences that they were asked about."""
    profile = load_profile(DEFAULT_PROFILE, root)
    paths = [root / "paper" / "main.typ", profile.file, profile.results / "samples.json"]
    paths += [path for name in _shown_tables(profile) for path in table_paths(profile, name)]
    paths += [path for name in _shown_figures(profile) for path in figure_paths(profile, name)]
    human = _human(root)
    if human:
        paths += [human.file, *(path for _, path in _built_tables(human)), *_built_figures(human)]
    for item in (profile, human):
        paths += [inputs.preferred_path(item, judge) for judge in _asked(item)] if item else []
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
        "ppo_settings": _ppo_settings([profile, *([human] if human else [])]),
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
        "judge_pairs": {judge: len(inputs.read_preferred(profile, judge)["correct"]) for judge in _asked(profile)},
        "search": _search(profile, tables["search"]) if "search" in tables else None,
        "tables": {name: _shown(profile, name, cells) for name, cells in tables.items()},
        "missing_tables": [TABLES[name].title for name in TABLES if name not in [*names, *_without_rows(profile)]],
        "figures": [name for name in FIGURES if all(path.exists() for path in figure_paths(profile, name))],
        "claims": _claims(profile),
        "values": {name: _values(cells) for name, cells in tables.items()},
    }


def _asked(profile: Profile) -> list[str]:
    """The other judges whose accuracy on people's preferences a table shows."""
    return list(other_judges(profile)) if table_paths(profile, "judges")[0].exists() else []


def _without_rows(profile: Profile) -> list[str]:
    """Tables that would be empty in this profile, or that it does not ask for."""
    judges = [] if other_judges(profile) else ["judges"]
    return judges + ([] if profile.params.get("edit_likelihood") else ["edit_likelihood"])


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


def _search(profile: Profile, cells: list[Cell]) -> dict[str, list[dict[str, Any]]]:
    """The search for typst: its candidates, and settings of what was chosen with which the profile does not run, as
    where the steps of all were set by the one that they were tried for."""
    chosen = {cell.method for cell in cells if cell.metric == "chosen" and cell.mean}
    candidates, runs = [], []
    for cell in cells:
        if cell.metric == "chosen":
            continue
        name, parameters = cell.method.partition("/")[0], cell.method.partition(": ")[2]
        method = method_style(profile, name).label
        pairs = [pair.split("=", 1) for pair in parameters.split("; ") if pair]
        used = profile.params.get("methods", {}).get(name) or profile.params.get(name)
        for key, value in pairs if cell.method in chosen else []:
            run = _dotted(used, key)
            if run is not None and _plain(run) != _plain(value):
                runs.append({"method": method, "key": _last(key), "chosen": _plain(value), "run": _plain(run)})
        shown = display(cell)
        candidates.append(
            {
                "block": TABLES["search"].block(profile, cell),
                "method": method,
                "rate": next((_plain(value) for key, value in pairs if _last(key) == "learning_rate"), ""),
                "other": [[_last(key), _plain(value)] for key, value in pairs if _last(key) != "learning_rate"],
                "measure": metric_style(cell.metric).title,
                "value": shown.value,
                "interval": shown.interval,
                "chosen": cell.method in chosen,
            }
        )
    return {"candidates": candidates, "runs": runs}


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _dotted(entry: Any, key: str) -> Any:
    """The value of a dotted key in nested sections; None where a part is missing."""
    for part in key.split("."):
        entry = entry.get(part) if isinstance(entry, dict) else None
    return entry


def _values(cells: list[Cell]) -> dict[str, dict[str, dict[str, str]]]:
    """``method -> metric -> {value, interval, unit}`` for single numbers in the text; of a difference also ``side``."""
    values: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells:
        shown = display(cell)
        entry = {"value": shown.value, "interval": shown.interval, "unit": metric_style(cell.metric).unit}
        if cell.metric.startswith("difference_"):
            entry["side"] = _side(cell)
        values.setdefault(cell.method, {})[cell.metric] = entry
    return values


def _side(cell: Cell) -> str:
    """Where the interval of a difference lies: wholly ``above`` zero, wholly ``below`` it, or ``around`` it; empty
    without an interval."""
    if cell.low is None or cell.high is None:
        return ""
    return "above" if cell.low > 0 else "below" if cell.high < 0 else "around"


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
    absent = [
        row_label(profile, "figa_main", method)
        for method in report_config(profile).judged_methods
        if method not in sample["responses"]
    ]
    shown = {key: sample[key] for key in ("id", "prompt", "reference")}
    return {**shown, "responses": responses, "absent": absent}


def _settings(profile: Profile) -> list[list[str]]:
    """What the appendix shows of a profile: dotted keys and values, without titles, grids and lists of stages, and
    without the arguments of PPO, which have a table."""
    params = {key: value for key, value in profile.params.items() if key not in _NOT_SHOWN}
    for name in _ppo_methods(profile):
        own = {key: value for key, value in params["methods"][name].items() if key != "trainer"}
        params["methods"] = {**params["methods"], name: own}
    rows = _flatten(params)
    return [row for row in rows if row[1] != "{}" and not {"title", "search"} & set(row[0].split(".")[1:])]


def _ppo_settings(profiles: list[Profile]) -> dict[str, Any]:
    """The arguments with which PPO trains, the profile's or else the default: for each, by profile, the value of plain
    PPO, whether the profile sets it, and the other values with the methods that have them."""
    runs = {
        profile.name: {
            method_style(profile, name).label: profile.params["methods"][name].get("trainer") or {}
            for name in _ppo_methods(profile)
        }
        for profile in profiles
    }
    rows = []
    for key, default in ppo_defaults().items():
        cells = []
        for methods in runs.values():
            values: dict[str, list[str]] = {}
            for label, trainer in methods.items():
                values.setdefault(_plain(trainer.get(key, default)), []).append(label)
            (value, _), *others = values.items() if values else [("", [])]
            cells.append({"value": value, "set": key in next(iter(methods.values()), {}), "others": others})
        rows.append({"key": key, "cells": cells})
    return {"profiles": list(runs), "rows": rows}


def _ppo_methods(profile: Profile) -> list[str]:
    """Methods of the profile that PPO's trainer trains, plain PPO first."""
    known, entries = report_config(profile).ppo_methods, profile.params.get("methods", {})
    names = [name for name, entry in entries.items() if entry.get("kind") == "ppo" or name in known]
    return sorted(names, key=lambda name: name != PLAIN_PPO)


def ppo_defaults() -> dict[str, Any]:
    """Defaults of ``FineGrainedPPOConfig`` but for what a run sets by itself. They are read from the source, as the
    report imports nothing that trains.

    Raises:
        FgalignError: the source has no such class, or a default that is no literal.
    """
    tree = ast.parse(PPO_SOURCE.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FineGrainedPPOConfig"]
    if len(classes) != 1:
        raise FgalignError(f"{PPO_SOURCE}: expected one class FineGrainedPPOConfig, found {len(classes)}")
    fields = [node for node in classes[0].body if isinstance(node, ast.AnnAssign) and node.value is not None]
    try:
        found = {ast.unparse(node.target): ast.literal_eval(node.value) for node in fields}
    except ValueError as error:
        raise FgalignError(f"{PPO_SOURCE}: FineGrainedPPOConfig: expected literals as defaults: {error}") from None
    return {name: value for name, value in found.items() if name not in SET_BY_RUN}


def _plain(value: Any) -> str:
    """A setting as readers see it: numbers without exponent."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return str(value)
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


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
