"""Judging samples: the judge that a profile names, and the rows of its verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgalign.config import Profile, Section, parse_section
from fgalign.core.schema import CurveSample, Reference, Sample
from fgalign.errors import ConfigError
from fgalign.evaluation.judges import Item, Judge, RewardJudgeConfig, get_judge
from fgalign.io import write_json
from fgalign.llm import SPENT_FILE


def judge_options(
    profile: Profile, name: str, options: Mapping[str, Any], key: str = "evaluation.judge_options"
) -> Section | None:
    """The options of the judge of that name, parsed (None: it has none); ``key`` is where they stand in the profile.

    Raises:
        ConfigError: no such judge, or options that it does not take.
    """
    where = f"{profile.file}: {key}"
    if name == "llm":
        from fgalign.evaluation.llm_judge import LLMJudgeConfig

        return parse_section(options, LLMJudgeConfig, where)
    if name == "reward_model":
        return parse_section(options, RewardJudgeConfig, where)
    try:
        get_judge(name)
    except ConfigError as error:
        raise ConfigError(f"{profile.file}: {key.rpartition('.')[0]}.{error}") from None
    if options:
        raise ConfigError(f"{where}: the judge {name!r} has no options, found {', '.join(options)}")
    return None


def profile_judge(
    profile: Profile, name: str, options: Mapping[str, Any], key: str = "evaluation.judge_options"
) -> Judge:
    """The judge of that name with options of the profile; ``key`` is where they stand in it.

    Raises:
        ConfigError: no such judge, or options that it does not take.
    """
    section = judge_options(profile, name, options, key)
    return get_judge(name) if section is None else get_judge(name, **{name: section})


def check_title(profile: Profile, name: str, title: str) -> None:
    """Raise ConfigError where the report calls the profile's judge something else than its ``title``."""
    found = profile.params.get("report", {}).get("judge_title", title)
    if found != title:
        raise ConfigError(
            f"{profile.file}: report.judge_title: expected {title!r}, what the judge {name!r} is called in captions, "
            f"found {found!r}"
        )


def write_spent(judge: Judge, folder: Path, name: str) -> None:
    """Write what a language model took to judge into ``<name>.llm_usage.json`` beside its scores; for another judge
    there is no such file, nor an old one. The same answers give the same file, from the cache or not."""
    path = folder / f"{name}.{SPENT_FILE}"
    spent = judge.spent()
    if spent:
        write_json(path, spent)
    else:
        path.unlink(missing_ok=True)


def judged_rows(samples: Sequence[Sample], references: Mapping[str, Reference], judge: Judge) -> list[dict[str, Any]]:
    """Each sample's row of ``judged/<method>.csv``: scores of response and reference answer, and who wins."""
    rows = []
    for sample, verdict in zip(samples, judge.verdicts(judged_items(samples, references)), strict=True):
        rows.append(
            {
                "id": sample.id,
                "seed": sample.seed,
                "score": round(verdict.score, 6),
                "reference_score": round(verdict.reference_score, 6),
                "win": verdict.win,
                "kl": sample.kl,
                "tokens": sample.tokens,
                "truncated": int(sample.truncated),
                **{f"reward_{name}": value for name, value in sample.rewards.items()},
            }
        )
    return rows


def judged_items(samples: Sequence[Sample | CurveSample], references: Mapping[str, Reference]) -> list[Item]:
    """Each response beside the reference answer to its prompt."""
    found = [references[sample.id] for sample in samples]
    return [Item(r.prompt, s.response, r.reference, r.gold) for s, r in zip(samples, found, strict=True)]
