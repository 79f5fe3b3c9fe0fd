"""The stage that judges again: every method's answers by another judge than the profile's, and how well this judge
agrees with people. It opens the test split and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fgalign.config import Profile, Section, parse_section
from fgalign.core.schema import Preference, Reference, Sample, read_records
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.config import EvaluationConfig
from fgalign.evaluation.judges import Item, Judge
from fgalign.evaluation.judging import judged_items, profile_judge, write_spent
from fgalign.evaluation.truth import read_truth
from fgalign.io import read_json, write_csv
from fgalign.tracking import track

REPORTED = ("title", "trained_on")
"""Keys of an entry that the report reads."""
READS_GOLD = ("rouge_l",)
"""Judges that need a gold answer to the prompt."""


class OtherJudge(Section):
    """An entry of the profile's section ``other_judges``."""

    judge: str
    judge_options: dict[str, Any] = Field(default_factory=dict)
    """As ``evaluation.judge_options``; a ``folder`` left out is that of ``needs``."""
    needs: str
    """In ``data/<profile>``, what the judge reads besides answers and references; DVC makes it first. ``gold/test``
    where that is nothing."""
    preferences: Annotated[int, Field(ge=1)] | None = None
    """The first so many test prompts with a preference, to compare the judge with people on (None: all)."""


def run_rejudge(profile: Profile, name: str) -> None:
    """rejudge: another judge scores every method's answers, ``results/<profile>/metrics/judges/<name>.csv``, and says
    of people's preferences which side it likes, ``<name>_preferences.csv``, beside the profile's own judge. What each
    of the two took, if it is a language model, is in ``<name>.llm_usage.json`` and ``<name>_main.llm_usage.json``."""
    config = other_judge(profile, name)
    options = dict(config.judge_options)
    if config.judge == "reward_model":
        options.setdefault("folder", str(profile.data / config.needs))
    judge = profile_judge(profile, config.judge, options, f"other_judges.{name}.judge_options")
    own = profile.section("evaluation", EvaluationConfig)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "test").references}
    pairs = read_records(profile.data / "raw" / "test" / "preferences.jsonl", Preference, empty_ok=True)
    if config.judge == "reward_model":
        asked_about = [*(record.prompt for record in references.values()), *(pair.prompt for pair in pairs)]
        check_unseen(Path(options["folder"]), list(dict.fromkeys(asked_about)), profile.root)
    rows = []
    for method in ("base", "sft", *profile.params["methods"]):
        samples = read_records(profile.data / "samples" / f"{method}.jsonl", Sample)
        rows += [{"method": method, **row} for row in rejudged_rows(samples, references, judge)]
    asked = one_a_prompt(pairs)[: config.preferences]
    main = profile_judge(profile, own.judge, own.judge_options)
    gold = {record.prompt: record.gold for record in references.values() if record.gold is not None}
    preferred = preference_rows(asked, gold, {"correct": judge, "main_correct": main})
    with track(profile, f"rejudge@{name}", None, {"judge": config.judge, "needs": config.needs}) as run:
        run.log({"score": _mean(rows, "score"), "win": _mean(rows, "win")})
        run.log({column: _mean(preferred, column) for column in preferred[0] if column != "id"})
        run.log({**judge.counts(), **{f"main/{key}": value for key, value in main.counts().items()}})
    folder = profile.results / "metrics" / "judges"
    write_csv(folder / f"{name}.csv", rows)
    write_csv(folder / f"{name}_preferences.csv", preferred)
    write_spent(judge, folder, name)
    write_spent(main, folder, f"{name}_main")


def other_judge(profile: Profile, name: str) -> OtherJudge:
    """The entry of that name in the section ``other_judges``.

    Raises:
        ConfigError: there is none, or a key is missing, unknown or ill-typed.
    """
    judges = profile.params.get("other_judges") or {}
    if name not in judges:
        known = ", ".join(judges) or "none"
        raise ConfigError(f"{profile.file}: other_judges: unknown judge {name!r}; expected one of {known}")
    section = {key: value for key, value in judges[name].items() if key not in REPORTED}
    return parse_section(section, OtherJudge, f"{profile.file}: other_judges.{name}")


def check_unseen(folder: Path, prompts: Sequence[str], root: Path) -> None:
    """Raise InputError where a judge that the pipeline has trained (its folder has ``trained_on.json``) has learnt from
    one of the prompts whose answers it is to judge."""
    path = root / folder / "trained_on.json"
    if not path.exists():
        return
    learnt = set(read_json(path)["prompts"])
    shared = [prompt for prompt in prompts if prompt in learnt]
    if shared:
        raise InputError(
            f"{path}: expected a judge that has not learnt from the test prompts, found {len(shared)} of "
            f"{len(prompts)} among its own (for example {shared[0][:60]!r}); train it on other prompts"
        )


def rejudged_rows(samples: Sequence[Sample], references: dict[str, Reference], judge: Judge) -> list[dict[str, Any]]:
    """Each sample's verdict; what is no matter of the judge (KL, length, rewards) stands in ``judged/<method>.csv``."""
    return [
        {
            "id": sample.id,
            "seed": sample.seed,
            "score": round(verdict.score, 6),
            "reference_score": round(verdict.reference_score, 6),
            "win": verdict.win,
        }
        for sample, verdict in zip(samples, judge.verdicts(judged_items(samples, references)), strict=True)
    ]


def one_a_prompt(pairs: Sequence[Preference]) -> list[Preference]:
    """The first preference of each prompt: several about one prompt share their answers and are not independent."""
    first: dict[str, Preference] = {}
    for pair in pairs:
        first.setdefault(pair.prompt, pair)
    return list(first.values())


def preference_rows(
    pairs: Sequence[Preference], gold: dict[str, str], judges: dict[str, Judge]
) -> list[dict[str, Any]]:
    """For each preference how much of it each judge gives to the side that people chose, by column: 1 where it likes
    that side better, 0.5 for a tie, 0 where it likes the other. A judge that reads gold answers has no column where
    a prompt lacks one (preferences about other prompts than those of the test).

    Raises:
        InputError: there are no preferences.
    """
    if not pairs:
        raise InputError("raw/test/preferences.jsonl: expected preferences to compare a judge with, found none")
    items = [Item(pair.prompt, pair.chosen, pair.rejected, gold.get(pair.prompt)) for pair in pairs]
    rows: list[dict[str, Any]] = [{"id": pair.id} for pair in pairs]
    for column, judge in judges.items():
        if judge.name in READS_GOLD and any(item.gold is None for item in items):
            continue
        for row, verdict in zip(rows, judge.verdicts(items), strict=True):
            row[column] = verdict.win
    return rows


def _mean(rows: Sequence[dict[str, Any]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)
