"""The comparisons: what is measured, against what, and with which target. Each gives rows of the table."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fgalign.hardware import describe
from speed.gate import Process, Runner, Thread, alternate
from speed.pairs import PairWorkload
from speed.table import Row, Target, row
from speed.workload import PPOWorkload, write_workload

Answers = dict[str, list[dict[str, float]]]
Sides = Mapping[str, tuple[str, dict[str, Any]]]
"""Name of a side to its module and its own options."""

TRL_PPO, SFT = "TRL PPOTrainer", "TRL SFTTrainer"
COMPILED = {"config": {"compile": True}}
PPO_SIDES: Sides = {
    TRL_PPO: ("speed.ppo_trl", {}),
    "separate": ("speed.ppo_own", {"value_model": "separate", "level": "sequence"}),
    "head": ("speed.ppo_own", {"value_model": "head", "level": "sequence"}),
    "separate compiled": ("speed.ppo_own", {"value_model": "separate", "level": "sequence", **COMPILED}),
    "head compiled": ("speed.ppo_own", {"value_model": "head", "level": "sequence", **COMPILED}),
    "separate products": ("speed.ppo_products", {"value_model": "separate"}),
    "head products": ("speed.ppo_products", {"value_model": "head"}),
}
REWARD_SIDES: Sides = {
    level: ("speed.ppo_own", {"value_model": "head", "level": level}) for level in ("token", "sequence")
}
BF16 = {"config": {"compile": True, "bf16": True}}
BF16_SIDES: Sides = {
    "separate bf16": ("speed.ppo_own", {"value_model": "separate", "level": "sequence", **BF16}),
    "head bf16": ("speed.ppo_own", {"value_model": "head", "level": "sequence", **BF16}),
}
"""Only where the processor multiplies bf16 in matrix units; elsewhere that is several times slower."""
BY_LENGTH = {"config": {"compile": True, "microbatch_size": 8}}
ENDING_SIDES: Sides = {
    **{name: PPO_SIDES[name] for name in (TRL_PPO, "separate", "head")},
    "separate compiled": ("speed.ppo_own", {"value_model": "separate", "level": "sequence", **BY_LENGTH}),
    "head compiled": ("speed.ppo_own", {"value_model": "head", "level": "sequence", **BY_LENGTH}),
}
LEARNERS = {"separate": "separate value model", "head": "shared trunk"}
STATES = {"": "", " compiled": ", compiled", " bf16": ", compiled, bf16"}
MATRIX_UNITS = "amx_bf16"
WARMUP_COMPILED = 4
"""Updates until torch.compile has seen all sizes."""
PARTS = ("rollout", "scoring", "update")
"""Parts of the time of an update that our side reports."""

# Of the released FIGA code at 8 pairs x 512 x 32,000, measured earlier on a machine of this kind, not in the same run.
RELEASED_MASKS, RELEASED_LOSS = "51-93 ms", "8.5 s on 2 threads, 13.4 s on 1"


@dataclass
class Session:
    """How this run measures. ``trl_python`` is the interpreter of TRL's environment (None: leave its rows out);
    ``quick`` runs every side in this process on ``ppo`` and ``pairs`` as they are given."""

    folder: Path
    rounds: int = 5
    warmup: int = 1
    threads: int = 1
    device: str = "cpu"
    trl_python: Path | None = None
    quick: bool = False
    ppo: PPOWorkload = field(default_factory=PPOWorkload)
    larger: PPOWorkload = field(
        default_factory=lambda: PPOWorkload(hidden_size=384, layers=6, heads=6, intermediate_size=1024)
    )
    pairs: PairWorkload = field(default_factory=PairWorkload)
    long_pairs: PairWorkload = field(
        default_factory=lambda: PairWorkload(
            pairs=100, batch=8, prompt_length=64, shortest=447, longest=447, vocab_size=32_000
        )
    )
    label_pairs: PairWorkload = field(default_factory=lambda: PairWorkload(pairs=200, shortest=512, longest=512))
    busy: list[float] = field(default_factory=list)
    """Wall seconds over seconds of the processor, of every unit: above 1 (on one thread) a side had to wait."""

    def work(self, name: str, workload: PPOWorkload | None = None) -> Path:
        """A new folder, with a workload written into it."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        if workload is not None:
            write_workload(folder, workload)
        return folder

    @contextmanager
    def started(self, folders: Sequence[Path], sides: Sides) -> Iterator[dict[str, Runner]]:
        """The sides, ready to work on the first of some folders; TRL's PPO is left out where it has no environment."""
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for name, (module, own) in sides.items():
                if name == TRL_PPO and self.trl_python is None:
                    continue
                common = {"threads": self.threads, "device": self.device, **own}
                if self.quick:
                    common.pop("config", None)  # compiling is not quick
                every = [{"folder": str(folder), **common} for folder in folders]
                if self.quick:
                    runner: Any = Thread(importlib.import_module(module).side, every)
                else:
                    python = self.trl_python if name == TRL_PPO else sys.executable
                    runner = Process(python, module, every, folders[0] / f"{len(runners)}.log")
                stack.callback(runner.close)
                runners[name] = runner
            yield runners

    def turns(self, runners: Mapping[str, Runner], rounds: int, warmup: int | None = None) -> Answers:
        """Let the sides take turns. With one thread on the CPU, ``seconds`` and its parts are those of the processor
        (see ``processor_seconds``)."""
        answers = alternate(runners, rounds, self.warmup if warmup is None else warmup)
        units = [answer for rows in answers.values() for answer in rows]
        self.busy += [unit["seconds"] / max(unit["cpu_seconds"], 1e-9) for unit in units]
        if self.device != "cpu" or self.threads > 1:
            return answers
        return {name: [processor_seconds(answer) for answer in rows] for name, rows in answers.items()}

    def run(self, folder: Path, sides: Sides, warmup: int | None = None) -> Answers:
        """Run the sides on what is in ``folder``, in turns, after ``warmup`` rounds (None: the session's).

        Raises:
            RuntimeError: a side failed.
        """
        with self.started([folder], sides) as runners:
            return self.turns(runners, self.rounds, warmup)


def processor_seconds(answer: Mapping[str, float]) -> dict[str, float]:
    """An answer with ``cpu_seconds`` in the place of wall time, the parts scaled alike: on one thread the two agree on
    an idle machine, and only wall time grows with what else the machine does."""
    share = answer["cpu_seconds"] / answer["seconds"]
    parts = {name: answer[name] * share for name in PARTS if name in answer}
    return {**answer, **parts, "seconds": answer["cpu_seconds"]}


def per_second(answers: Sequence[Mapping[str, float]], count: str = "tokens") -> list[float]:
    """What a side did a second, round by round."""
    return [answer[count] / answer["seconds"] for answer in answers]


def values(answers: Sequence[Mapping[str, float]], name: str, scale: float = 1.0) -> list[float]:
    """One of the numbers of a side, round by round, times ``scale``."""
    return [answer[name] * scale for answer in answers]


def memory(comparison: str, other_side: str, ours: Sequence, other: Sequence) -> Row:
    """Peak memory of two sides, in MiB of the process (or of the GPU)."""
    both = (values(side, "peak_memory", 2**-20) for side in (ours, other))
    return row(comparison, other_side, "peak memory", "MiB", *both)


def ppo(session: Session) -> list[Row]:
    """One PPO update, against TRL."""
    if session.trl_python is None:
        return []
    sides = {**PPO_SIDES, **bf16_sides(session)}
    answers = session.run(session.work("ppo", session.ppo), sides, WARMUP_COMPILED)
    rows = against_trl(answers, "PPO", Target(">=", 3.0))
    for learner, title in LEARNERS.items():
        name = f"PPO's matrix products alone, {title}"
        both = (per_second(answers[side]) for side in (f"{learner} products", TRL_PPO))
        rows.append(row(name, TRL_PPO, "response tokens", "1/s", *both, note="a bound, not a trainer"))
    return rows


def bf16_sides(session: Session) -> Sides:
    """``BF16_SIDES`` where the processor has matrix units for it."""
    return BF16_SIDES if MATRIX_UNITS in describe(session.threads)["instructions"] else {}


def ppo_larger(session: Session) -> list[Row]:
    """The same with a larger model: our fastest way of each learner on this processor, against TRL."""
    if session.trl_python is None:
        return []
    fastest = bf16_sides(session) or {name: PPO_SIDES[name] for name in ("separate compiled", "head compiled")}
    sides = {TRL_PPO: PPO_SIDES[TRL_PPO], **fastest}
    answers = session.run(session.work("ppo_larger", session.larger), sides, WARMUP_COMPILED)
    return against_trl(answers, "PPO, 12 million parameters", Target(">=", 3.0))


def token_rewards(session: Session) -> list[Row]:
    """What token-level rewards cost one PPO update. That is less than one process differs from the next that does the
    same work, so both sides are started as many times as there are rounds, and each start gives one ratio: that of the
    medians of its rounds."""
    folder = session.work("token_rewards", session.ppo)
    starts = [session.run(folder, REWARD_SIDES) for _ in range(session.rounds)]
    token, sequence = ([middle(answers[level]) for answers in starts] for level in REWARD_SIDES)
    name, other = "PPO, token-level rewards", "sequence-level"
    both = (values(token, "seconds"), values(sequence, "seconds"))
    note = f"medians of {session.rounds} updates in each of {session.rounds} starts"
    return [
        row(name, other, "time", "s/update", *both, Target("<=", 1.05), note=note),
        memory(name, other, token, sequence),
    ]


def middle(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each of a side's numbers."""
    return {name: statistics.median(values(answers, name)) for name in answers[0]}


def against_trl(answers: Answers, title: str, target: Target) -> list[Row]:
    """Rows of both learners against TRL's PPO, as they are and compiled; none where that did not run."""
    if TRL_PPO not in answers:
        return []
    rows = []
    for side, learner in ours(title, answers):
        both = (answers[side], answers[TRL_PPO])
        rows.append(row(learner, TRL_PPO, "response tokens", "1/s", *map(per_second, both), target))
        rows.append(memory(learner, TRL_PPO, *both))
    return rows


def ours(title: str, among: Iterable[str]) -> list[tuple[str, str]]:
    """Names of our sides of both learners ``among`` those given, and what the table calls them."""
    return [
        (f"{side}{state}", f"{title}, {learner}{called}")
        for side, learner in LEARNERS.items()
        for state, called in STATES.items()
        if f"{side}{state}" in among
    ]


def ppo_ending(session: Session) -> list[Row]:
    """The same where responses end by themselves, what is compiled with micro-batches by length. Lengths are drawn on
    each side, so time an update is compared."""
    if session.trl_python is None:
        return []
    workload = PPOWorkload(**{**asdict(session.ppo), "end_probability": 1 / 24})
    answers = session.run(session.work("ppo_ending", workload), ENDING_SIDES, WARMUP_COMPILED)
    rows = []
    for side, learner in ours("PPO, responses that end", ENDING_SIDES):
        both = (answers[side], answers[TRL_PPO])
        rows.append(row(learner, TRL_PPO, "time", "s/update", *(values(answer, "seconds") for answer in both)))
        rows.append(memory(learner, TRL_PPO, *both))
    return rows


def figa(session: Session) -> list[Row]:
    """FIGA's training against supervised fine-tuning on the same tokens.

    Raises:
        RuntimeError: the two did not see the same number of tokens.
    """
    options = {"pairs": asdict(session.pairs), "bf16": session.ppo.bf16}
    sides = {
        "figa": ("speed.training", {**options, "trainer": "figa"}),
        "figa compiled": ("speed.training", {**options, "trainer": "figa", "compile": not session.quick}),
        SFT: ("speed.training", {**options, "trainer": "sft"}),
    }
    answers = session.run(session.work("figa", session.ppo), sides)
    other, rows = answers.pop(SFT), []
    for name, ours in answers.items():
        if values(ours, "tokens") != values(other, "tokens"):
            raise RuntimeError(
                f"FIGA and SFT: expected the same tokens, found {values(ours, 'tokens')} and {values(other, 'tokens')}"
            )
        title = "FIGA training" + ", compiled" * name.endswith("compiled")
        rows.append(row(title, SFT, "tokens", "1/s", per_second(ours), per_second(other), Target(">=", 0.95)))
        rows.append(memory(title, SFT, ours, other))
    return rows


def kernel(session: Session, name: str, workload: PairWorkload, times: int) -> tuple[list, list]:
    """What our side and the other one of ``speed.kernels`` measured, ``times`` pieces of work a unit."""
    options = {"kernel": name, "pairs": asdict(workload), "times": times}
    sides = {str(ours): ("speed.kernels", {**options, "ours": ours}) for ours in (True, False)}
    answers = session.run(session.work(name), sides)
    return answers["True"], answers["False"]


def figa_kernels(session: Session) -> list[Row]:
    """FIGA's masks and loss on one batch of long sequences, in milliseconds."""
    workload = session.long_pairs
    size = f"{workload.batch} pairs × {workload.prompt_length + workload.longest + 1}"
    loss = f"FIGA loss, {size} × {workload.vocab_size:,}"
    rows = []
    for title, name, times, other, note in (
        (f"FIGA masks, {size}", "masks", 20, "padding alone", f"released code: {RELEASED_MASKS}"),
        (loss, "loss", 1, "plain cross-entropy", f"released code: {RELEASED_LOSS}"),
    ):
        both = kernel(session, name, workload, times)
        milliseconds = ([1000 / value for value in per_second(answers, "times")] for answers in both)
        rows.append(row(title, other, "time", "ms", *milliseconds, note=note))
        rows.append(memory(title, other, *both))
    return rows


def labelling(session: Session) -> list[Row]:
    """Labelled pairs a second on one core, beside the Levenshtein call that it makes."""
    workload = session.label_pairs
    both = kernel(session, "labelling", workload, 1)
    title, other = f"Labelling, {workload.longest} tokens", "Levenshtein.editops"
    rates = ([workload.pairs * value for value in per_second(answers, "times")] for answers in both)
    return [row(title, other, "pairs", "1/s", *rates), memory(title, other, *both)]


COMPARISONS: dict[str, Callable[[Session], list[Row]]] = {
    "ppo": ppo,
    "ppo_larger": ppo_larger,
    "token_rewards": token_rewards,
    "ppo_ending": ppo_ending,
    "figa": figa,
    "figa_kernels": figa_kernels,
    "labelling": labelling,
}
