"""Benchmark stages: the items of our tasks, and every seed's scores on the tasks of the profile."""

from __future__ import annotations

import time

from pydantic import ConfigDict

from fgalign.benchmarks import BenchmarkConfig
from fgalign.config import Profile, Section
from fgalign.core.schema import write_records
from fgalign.io import atomic_dir, write_csv
from fgalign.tracking import track


class NamedSource(Section):
    """The name of the profile's source, whatever its other keys are."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


def run_benchmark_items(profile: Profile) -> None:
    """benchmark_items: the items of our tasks; ``data/<profile>/benchmarks/<task>.jsonl``.

    The folder stays empty where the profile has only tasks of the harness.
    """
    from fgalign.benchmarks.items import build_items

    config = profile.section("benchmarks", BenchmarkConfig)
    items = build_items(config, profile.section("source", NamedSource).name, profile.data)
    with atomic_dir(profile.data / "benchmarks") as folder:
        for task, records in items.items():
            print(f"{task}: {write_records(folder / f'{task}.jsonl', records)} items")


def run_benchmark(profile: Profile) -> None:
    """benchmark: every model's scores on the tasks; ``results/<profile>/metrics/benchmarks/<method>.csv``.

    One row for each task, metric and seed; ``stderr`` is the standard error over the items, empty where the harness
    gives none. The base model, which has no seeds, is evaluated once, and each seed gets its scores. Of how a method is
    decoded, only a phrase that begins its responses counts: a likelihood knows no best of several responses. All models
    are evaluated in one stage, because loading the harness takes longer than a small model's tasks.
    """
    from fgalign.benchmarks.harness import ChatLM, Score, load_tasks, run_tasks, task_manager
    from fgalign.core.modeling import (
        RuntimeConfig,
        load_causal_lm,
        load_tokenizer,
        release_memory,
        seed_workers,
        set_up,
        use_bf16,
    )
    from fgalign.decoding import read_decoding
    from fgalign.parallel import each_seed

    config = profile.section("benchmarks", BenchmarkConfig)
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    tokenizer = load_tokenizer(profile.model_folder("base"))
    manager = task_manager(config.tasks, config.local, profile.data / "benchmarks")
    if set(config.tasks) > set(config.local):
        load_tasks(manager, config.tasks)  # What is to be fetched is missed before any model is loaded.

    def one(item: tuple[str, int]) -> list[Score]:
        method, seed = item
        folder = profile.model_folder(method, seed)
        lm = ChatLM(
            load_causal_lm(folder, device).eval(),
            tokenizer,
            batch_size=config.batch_size,
            bf16=use_bf16(runtime, device),
            prefix=read_decoding(folder).prefix,
            title=f"benchmark {method}" + ("" if method == "base" else f" seed {seed}"),
        )
        scores = run_tasks(lm, manager, config)
        del lm
        release_memory(device)
        return scores

    started = time.monotonic()
    methods = ["sft", *profile.params.get("methods", {})]
    items = [("base", profile.seeds[0]), *((method, seed) for method in methods for seed in profile.seeds)]
    scores = dict(zip(items, each_seed(items, one, seed_workers(runtime, device)), strict=True))
    with atomic_dir(profile.results / "metrics" / "benchmarks") as out:
        for method in ("base", *methods):
            rows = [
                {
                    "task": score.task,
                    "metric": score.metric,
                    "seed": seed,
                    "value": round(score.value, 6),
                    "stderr": "" if score.stderr is None else round(score.stderr, 6),
                }
                for seed in profile.seeds
                for score in scores[method, profile.seeds[0] if method == "base" else seed]
            ]
            write_csv(out / f"{method}.csv", rows)
            with track(profile, f"benchmark@{method}", None, config.model_dump(), started=started) as run:
                names = dict.fromkeys((row["task"], row["metric"]) for row in rows)
                for task, metric in names:
                    values = [row["value"] for row in rows if (row["task"], row["metric"]) == (task, metric)]
                    run.log({f"{task}/{metric}": sum(values) / len(values)})
