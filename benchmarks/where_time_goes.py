"""Where the time of the pipeline goes: per stage, inside the PPO runs, and in imports.

    python benchmarks/where_time_goes.py [--profile NAME] [--repeats N]

Reads what the last runs left (``timings/<profile>.jsonl`` and the tracked runs) and measures imports in fresh
processes. Nothing is asserted: machines differ, and a machine differs from itself by a fifth within minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from fgalign.config import Profile, load_profile
from fgalign.errors import FgalignError
from fgalign.hardware import stage_seconds, timings_file
from fgalign.tracking import tracking_uri

# First match wins; a stage's title is what the command line prints.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("data and labels", ("raw", "edits", "labels", "study_edits@", "benchmark_items")),
    ("base model and SFT", ("base", "sft")),
    ("reward models", ("rm_", "judge_model@")),
    ("alignment", ("align@",)),
    ("studies and search", ("study@", "judge_study@", "search", "choose_search", "overoptimisation")),
    ("benchmarks", ("benchmark",)),
    ("generation", ("generate@",)),
    (
        "judging and metrics",
        (
            "judge@",
            "rejudge@",
            "curves",
            "label_quality",
            "text_quality",
            "reward_models",
            "score_edits",
            "token_models",
            "credit",
            "samples",
        ),
    ),
    ("tables, figures, paper", ("settings", "table ", "figure ", "claims", "paper", "index")),
)
PPO_TIMES = ("time/rollout", "time/scoring", "time/update")
IMPORTS = (
    "pass",
    "import fgalign.cli",
    "import numpy",
    "import torch",
    "import datasets",
    "from transformers import AutoModelForCausalLM, Trainer",
    "import peft",
    "from trl import SFTTrainer, RewardTrainer",
    "from mlflow.tracking import MlflowClient",
    "import matplotlib.pyplot",
    "from scipy import stats",
)


def group_seconds(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each group of stages; those of no group under ``other``."""
    groups: dict[str, float] = {}
    for stage, seconds in stages.items():
        name = next((group for group, names in GROUPS if _belongs(stage, names)), "other")
        groups[name] = groups.get(name, 0.0) + seconds
    return groups


def ppo_seconds(profile: Profile) -> dict[str, dict[str, float]]:
    """Run name to seconds of rollout, scoring, update and the rest, for the newest finished run of each name."""
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(profile.root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return {}
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(f"fgalign-{profile.name}")
    if experiment is None:
        return {}
    runs: dict[str, dict[str, float]] = {}
    found = client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", order_by=["attributes.start_time DESC"]
    )
    for run in found:
        if run.info.run_name in runs or PPO_TIMES[0] not in run.data.metrics:
            continue
        parts = {
            name.removeprefix("time/"): sum(metric.value for metric in client.get_metric_history(run.info.run_id, name))
            for name in PPO_TIMES
        }
        # The rest: loading models, calibration, answers for the learning curve, saving.
        parts["rest"] = max(run.data.metrics["seconds"] - sum(parts.values()), 0.0)
        runs[run.info.run_name] = parts
    return dict(sorted(runs.items()))


def import_seconds(statements: Iterable[str], repeats: int) -> dict[str, float]:
    """Median wall time of each statement in fresh interpreters, start of the interpreter included."""
    seconds = {}
    for statement in statements:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        seconds[statement] = statistics.median(times)
    return seconds


def format_shares(title: str, seconds: Mapping[str, float], total: float | None = None) -> str:
    """A table of names, seconds and shares of ``total`` (default: the sum)."""
    whole = sum(seconds.values()) if total is None else total
    width = max(map(len, (title, *seconds)))
    lines = [f"{title:<{width}}  seconds  share"]
    for name, value in seconds.items():
        lines.append(f"{name:<{width}}  {value:7.1f}  {value / whole if whole else 0.0:5.0%}")
    lines.append(f"{'sum':<{width}}  {sum(seconds.values()):7.1f}")
    return "\n".join(lines)


def format_ppo(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A table of runs with the share of each part."""
    width = max(map(len, ("PPO run", *runs)))
    lines = [f"{'PPO run':<{width}}  seconds  rollout  scoring  update  rest"]
    for name, parts in runs.items():
        whole = sum(parts.values())
        shares = [parts[key] / whole if whole else 0.0 for key in ("rollout", "scoring", "update", "rest")]
        lines.append(
            f"{name:<{width}}  {whole:7.1f}  {shares[0]:7.0%}  {shares[1]:7.0%}  {shares[2]:6.0%}  {shares[3]:4.0%}"
        )
    return "\n".join(lines)


def format_imports(seconds: Mapping[str, float]) -> str:
    """A table of import statements."""
    width = max(map(len, seconds))
    return "\n".join(
        [
            f"{'in a fresh process':<{width}}  seconds",
            *(f"{name:<{width}}  {value:7.2f}" for name, value in seconds.items()),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 where nothing was run yet."""
    parser = argparse.ArgumentParser(description="Where the time of the pipeline goes.")
    parser.add_argument("--profile", help="profile (default: the selected one, else mini)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each import (0: measure none)")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        stages = stage_seconds(timings_file(profile))
    except FgalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_shares(f"group of stages ({profile.name})", group_seconds(stages)), end="\n\n")
    print(format_shares("stage", dict(sorted(stages.items(), key=lambda item: -item[1]))), end="\n\n")
    runs = ppo_seconds(profile)
    print(format_ppo(runs) if runs else "no finished PPO run is tracked", end="\n\n")
    if options.repeats > 0:
        print(format_imports(import_seconds(IMPORTS, options.repeats)))
    return 0


def _belongs(stage: str, names: tuple[str, ...]) -> bool:
    # A name that ends in a mark (@, _, blank) stands for all stages that begin with it.
    return any(stage == name or (not name[-1].isalnum() and stage.startswith(name)) for name in names)


if __name__ == "__main__":
    sys.exit(main())
