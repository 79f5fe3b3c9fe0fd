"""The command line: one command a stage of the pipeline. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fgalign import tracking
from fgalign.config import DEFAULT_PROFILE, Profile, load_profile
from fgalign.errors import ConfigError, FgalignError
from fgalign.hardware import timings_file
from fgalign.parallel import is_main_process, process_count

app = typer.Typer(
    help="fgalign: fine-grained alignment of language models. Each command is one stage of dvc.yaml.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ProfileOption = Annotated[
    str | None, typer.Option("--profile", "-p", help="Profile (default: $FGALIGN_PROFILE, else mini).")
]
Name = Annotated[str, typer.Argument()]
Names = Annotated[list[str], typer.Argument()]


@contextmanager
def stage(profile_name: str | None, title: str, launched: bool = False, tracked: bool = True) -> Iterator[Profile]:
    """A profile for a stage; says what runs, and keeps how long it took in an untracked file. Before the imports of a
    stage with runs (``tracked``) those of tracking begin beside them.

    Raises:
        ConfigError: `accelerate launch` started several processes of a stage that is not meant for it (``launched``).
    """
    if process_count() > 1 and not launched:
        raise ConfigError(
            f"{title}: this stage runs in one process, found {process_count()}; start it without accelerate launch "
            "(training stages can be launched: sft, reward-model, align, judge-model)"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # The stages show bars of their own; those of loading and mapping are many and short.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    started = time.time()
    profile = load_profile(profile_name)
    if not is_main_process():
        yield profile
        return
    print(f"[{profile.name}] {title}", flush=True)
    if tracked:
        tracking.start()
    try:
        yield profile
    finally:
        tracking.stop()
    seconds = {"stage": title, "seconds": round(time.time() - started, 2)}
    log = timings_file(profile)
    log.parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(seconds) + "\n")
    print(f"[{profile.name}] {title}: {seconds['seconds']} s", flush=True)


@app.command()
def plan(
    profile: ProfileOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Instead of the profile's number of GPUs.")] = None,
) -> None:
    """Check a profile without running it: shapes, memory a GPU, hours a stage (those with a section `plan`)."""
    from fgalign.plan import report

    text, wrong = report(load_profile(profile), gpus)
    print(text)
    for line in wrong:
        print(f"does not fit: {line}")
    if wrong:
        raise ConfigError(f"plan: {len(wrong)} of the profile's settings do not fit; see above")


@app.command()
def new_profile(
    name: Name, like: Annotated[str, typer.Option(help="The profile that is copied.")] = DEFAULT_PROFILE
) -> None:
    """Write reproduce/profiles/NAME, a copy of another profile to be changed (docs/new-profile.md)."""
    from fgalign.profiles import new_profile as write

    made = write(name, load_profile(like))
    _say(made, [made.file, made.file.with_name("dvc.yaml")])
    print("What to change in it: docs/new-profile.md")


@app.command()
def check_profile(profile: ProfileOption = None) -> None:
    """Check every section of a profile before any stage runs (docs/new-profile.md)."""
    from fgalign.profiles import check_profile as check

    current = load_profile(profile)
    check(current)
    print(f"{current.file.relative_to(current.root)}: every section is valid")


@app.command()
def hardware(profile: ProfileOption = None) -> None:
    """Write results/<profile>/hardware.json: this machine, versions, and what the last runs of the stages took."""
    from fgalign.hardware import write_hardware

    found = write_hardware(load_profile(profile))
    print(f"{found['processor']}, GPU {found['gpu'] and found['gpu']['name']}: {found['minutes']} minutes of stages")


@app.command()
def raw(profile: ProfileOption = None) -> None:
    """Raw preference data from the profile's source."""
    with stage(profile, "raw", tracked=False) as current:
        from fgalign.stages.data import run_raw

        run_raw(current)


@app.command()
def edits(profile: ProfileOption = None) -> None:
    """Minimal edits by the profile's annotator."""
    with stage(profile, "edits", tracked=False) as current:
        from fgalign.stages.data import run_edits

        run_edits(current)


@app.command()
def base(profile: ProfileOption = None) -> None:
    """The base model and the tokenizer."""
    with stage(profile, "base") as current:
        from fgalign.stages.train import run_base

        run_base(current)


@app.command()
def labels(profile: ProfileOption = None) -> None:
    """Token labels from the edits."""
    with stage(profile, "labels") as current:
        from fgalign.stages.data import run_labels

        run_labels(current)


@app.command()
def sft(profile: ProfileOption = None) -> None:
    """Supervised fine-tuning: the reference policy."""
    with stage(profile, "sft", launched=True) as current:
        from fgalign.stages.train import run_sft

        run_sft(current)


@app.command()
def reward_model(name: Name, profile: ProfileOption = None) -> None:
    """A reward model: rm_preference, rm_edit or rm_token."""
    with stage(profile, name, launched=True) as current:
        from fgalign.stages.train import run_reward_model

        run_reward_model(current, name)


@app.command()
def align(name: Name, profile: ProfileOption = None) -> None:
    """An alignment method of the profile's `methods` section."""
    with stage(profile, f"align@{name}", launched=True) as current:
        from fgalign.stages.train import run_align

        run_align(current, name)


@app.command()
def generate(name: Name, profile: ProfileOption = None) -> None:
    """Answers of a method to the test prompts."""
    with stage(profile, f"generate@{name}") as current:
        from fgalign.stages.generate import run_generate

        run_generate(current, name)


@app.command()
def judge(name: Name, profile: ProfileOption = None) -> None:
    """The judge's scores of a method's answers."""
    with stage(profile, f"judge@{name}") as current:
        from fgalign.stages.judge import run_judge

        run_judge(current, name)


@app.command()
def judge_model(name: Name, profile: ProfileOption = None) -> None:
    """A judge of the profile's `judge_models` section: a reward model that only judges."""
    with stage(profile, f"judge_model@{name}", launched=True) as current:
        from fgalign.stages.judge_model import run_judge_model

        run_judge_model(current, name)


@app.command()
def rejudge(name: Name, profile: ProfileOption = None) -> None:
    """The scores of another judge, of the profile's `other_judges` section, for every method's answers."""
    with stage(profile, f"rejudge@{name}") as current:
        from fgalign.stages.rejudge import run_rejudge

        run_rejudge(current, name)


@app.command()
def curves(names: Names, profile: ProfileOption = None) -> None:
    """The judge's scores of what methods answered while they trained."""
    with stage(profile, "curves") as current:
        from fgalign.stages.judge import run_curves

        run_curves(current, names)


@app.command()
def label_quality(profile: ProfileOption = None) -> None:
    """Minimal-edit labels against the truth."""
    with stage(profile, "label_quality") as current:
        from fgalign.stages.judge import run_label_quality

        run_label_quality(current)


@app.command()
def text_quality(profile: ProfileOption = None) -> None:
    """The judge's scores of the texts that methods learn from."""
    with stage(profile, "text_quality") as current:
        from fgalign.stages.judge import run_text_quality

        run_text_quality(current)


@app.command()
def reward_models(profile: ProfileOption = None) -> None:
    """The reward models on held-out pairs and against the truth."""
    with stage(profile, "reward_models") as current:
        from fgalign.stages.reward_models import run_reward_models

        run_reward_models(current)


@app.command()
def score_edits(profile: ProfileOption = None) -> None:
    """How likely every policy holds the tokens that held-out edits put in and take out."""
    with stage(profile, "score_edits") as current:
        from fgalign.stages.score_edits import run_score_edits

        run_score_edits(current)


@app.command()
def token_models(profile: ProfileOption = None) -> None:
    """Every token-level reward model on held-out pairs and against the truth."""
    with stage(profile, "token_models") as current:
        from fgalign.stages.reward_models import run_token_models

        run_token_models(current)


@app.command()
def study_edits(name: Name, profile: ProfileOption = None) -> None:
    """Training edits of a study whose variants have annotators of their own."""
    with stage(profile, f"study_edits@{name}", tracked=False) as current:
        from fgalign.stages.data import run_study_edits

        run_study_edits(current, name)


@app.command()
def study(name: Name, profile: ProfileOption = None) -> None:
    """Every variant of a study, trained with every seed."""
    with stage(profile, f"study@{name}") as current:
        from fgalign.stages.studies import run_study

        run_study(current, name)


@app.command()
def judge_study(name: Name, profile: ProfileOption = None) -> None:
    """Answers and the judge's scores of every variant of a study."""
    with stage(profile, f"judge_study@{name}") as current:
        from fgalign.stages.compare import run_judge_study

        run_judge_study(current, name)


@app.command()
def search(profile: ProfileOption = None) -> None:
    """Every candidate of the methods' hyperparameter grids, trained with one seed."""
    with stage(profile, "search") as current:
        from fgalign.stages.studies import run_search

        run_search(current)


@app.command()
def choose_search(profile: ProfileOption = None) -> None:
    """The candidate of each method that wins most often on the validation split."""
    with stage(profile, "choose_search") as current:
        from fgalign.stages.compare import run_choose_search

        run_choose_search(current)


@app.command()
def search_rewards(profile: ProfileOption = None) -> None:
    """Every candidate of the reward models' hyperparameter grids, trained with one seed."""
    with stage(profile, "search_rewards") as current:
        from fgalign.stages.studies import run_search_rewards

        run_search_rewards(current)


@app.command()
def choose_rewards(profile: ProfileOption = None) -> None:
    """The candidate of each reward model that does best on the validation split."""
    with stage(profile, "choose_rewards") as current:
        from fgalign.stages.compare import run_choose_rewards

        run_choose_rewards(current)


@app.command()
def overoptimisation(profile: ProfileOption = None) -> None:
    """Proxy reward and gold score as the KL to SFT grows."""
    with stage(profile, "overoptimisation") as current:
        from fgalign.stages.compare import run_overoptimisation

        run_overoptimisation(current)


@app.command()
def credit(names: Names, profile: ProfileOption = None) -> None:
    """How much of the policy-gradient weight falls on truly flawed tokens."""
    with stage(profile, "credit") as current:
        from fgalign.stages.compare import run_credit

        run_credit(current, names)


@app.command()
def samples(names: Names, profile: ProfileOption = None) -> None:
    """A few test prompts with every method's answer."""
    with stage(profile, "samples", tracked=False) as current:
        from fgalign.stages.judge import run_samples

        run_samples(current, names)


@app.command()
def benchmark_items(profile: ProfileOption = None) -> None:
    """The items of the benchmark tasks that are ours."""
    with stage(profile, "benchmark_items", tracked=False) as current:
        from fgalign.stages.benchmarks import run_benchmark_items

        run_benchmark_items(current)


@app.command()
def benchmark(profile: ProfileOption = None) -> None:
    """Scores of all models on the profile's benchmark tasks."""
    with stage(profile, "benchmark") as current:
        from fgalign.stages.benchmarks import run_benchmark

        run_benchmark(current)


@app.command()
def settings(profile: ProfileOption = None) -> None:
    """The profile's settings by use: evaluation, settings, recipe, search and search_rewards (.json)."""
    with stage(profile, "settings", tracked=False) as current:
        from fgalign.profiles import check_names
        from fgalign.report.settings import write_settings

        check_names(current)
        _say(current, write_settings(current))


@app.command()
def table(name: Name, profile: ProfileOption = None) -> None:
    """A table, as CSV and LaTeX."""
    with stage(profile, f"table {name}", tracked=False) as current:
        from fgalign.report.tables import build_table

        _say(current, build_table(current, name))


@app.command()
def figure(name: Name, profile: ProfileOption = None) -> None:
    """A figure, as PDF and PNG."""
    with stage(profile, f"figure {name}", tracked=False) as current:
        from fgalign.report.figures import build_figure

        _say(current, build_figure(current, name))


@app.command()
def claims(profile: ProfileOption = None) -> None:
    """The papers' claims with our estimates and verdicts: results/<profile>/claims.csv."""
    with stage(profile, "claims", tracked=False) as current:
        from fgalign.report.claims import build_claims

        _say(current, [build_claims(current)])


@app.command()
def paper(profile: ProfileOption = None) -> None:
    """The paper: paper/main.pdf and the tables, figures and numbers it shows."""
    with stage(profile, "paper", tracked=False) as current:
        from fgalign.report.paper import build_paper

        _say(current, build_paper(current.root))


@app.command()
def index(profile: ProfileOption = None) -> None:
    """results/INDEX.md: where every number comes from."""
    with stage(profile, "index", tracked=False) as current:
        from fgalign.report.index import write_index

        _say(current, [write_index(current.root)])


def _say(profile: Profile, paths: list[Path]) -> None:
    for path in paths:
        print(path.relative_to(profile.root))


def _stop(*_: object) -> None:
    """End as Slurm's time limit or a stopped container asks for: what the stage began to write is removed, and a second
    signal, which accelerate's launcher sends, does not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the command line; an error that fgalign raises on purpose is one line on standard error and exit code 1."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except FgalignError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
