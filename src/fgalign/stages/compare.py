"""Evaluation of what the studies and the search trained, and of what methods recorded while they trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fgalign.config import Profile
from fgalign.core.schema import CurveSample, read_records
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.config import EvaluationConfig
from fgalign.evaluation.judges import Judge
from fgalign.evaluation.truth import read_truth, split_references
from fgalign.io import write_csv
from fgalign.stages.generate import Answerer
from fgalign.study import (
    Candidate,
    candidates,
    choose,
    get_study,
    metrics_folder,
    reward_candidates,
    search_section,
)
from fgalign.tracking import track

T = TypeVar("T", bound=Hashable)

SEARCH_METRIC = {"rm_preference": "accuracy_preference", "rm_edit": "accuracy_edit", "rm_token": "token_auroc"}
"""What a candidate of each reward model is chosen by: how well it does, on held-out data, what it is trained for."""


def run_judge_study(profile: Profile, name: str) -> None:
    """judge_study: every variant answers the test prompts and is judged; ``studies/<study>/<variant>.csv``. What a
    language model took to judge them all is in ``<study>.llm_usage.json`` there."""
    from fgalign.evaluation.judging import write_spent

    study = get_study(profile, name)
    items = [(key, seed) for key in study.variants for seed in profile.seeds]
    folder = profile.data / "studies" / name
    started = time.monotonic()
    judge, judged = _judge(
        profile, "test", items, lambda item: (folder / item[0] / f"seed-{item[1]}", item[1], f"{name}/{item[0]}")
    )
    for key in study.variants:
        rows = [row for seed in profile.seeds for row in judged[key, seed]]
        with track(profile, f"judge_study@{name}/{key}", None, {"judge": judge.name}, started) as run:
            run.log({column: _mean(rows, column) for column in ("score", "win", "kl", "tokens")})
        write_csv(metrics_folder(profile, name) / f"{key}.csv", rows)
    write_spent(judge, metrics_folder(profile, name), name)


def run_choose_search(profile: Profile) -> None:
    """choose_search: every candidate of a method answers the validation prompts; the one that wins most often is chosen
    (``study.choose``); ``search.csv``."""
    from fgalign.evaluation.judging import write_spent
    from fgalign.evaluation.statistics import crossed_interval

    config = search_section(profile)
    seed = config.seed
    grid = candidates(profile)
    folder = profile.data / "search"
    started = time.monotonic()
    places = [(candidate.method, candidate.number) for candidate in grid]
    judge, judged = _judge(
        profile,
        "validation",
        places,
        lambda place: (folder / place[0] / str(place[1]), seed, f"search/{place[0]}/{place[1]}"),
    )
    wins: dict[str, list[float]] = {}
    for place in places:
        wins.setdefault(place[0], []).append(_mean(judged[place], "win"))
    best = choose(wins, config.together)
    table = []
    for candidate in grid:
        rows = judged[candidate.method, candidate.number]
        interval = crossed_interval([[row["win"] for row in rows]], bounds=(0.0, 1.0))
        table.append(
            {
                "method": candidate.method,
                "candidate": candidate.number,
                "parameters": candidate.parameters,
                "win": round(interval.mean, 6),
                "win_low": round(interval.low, 6),
                "win_high": round(interval.high, 6),
                "chosen": int(best[candidate.method] == candidate.number),
            }
        )
    with track(profile, "choose_search", None, {}, started) as run:
        run.log({f"{method}/win": wins[method][number] for method, number in best.items()})
    write_csv(profile.sweeps / "metrics" / "search.csv", table)
    write_spent(judge, profile.sweeps / "metrics", "search")


def run_choose_rewards(profile: Profile) -> None:
    """choose_rewards: of a reward model the candidate that is best on the validation split by ``SEARCH_METRIC``, the
    first of equals, is chosen; ``search_rewards.csv``.

    Raises:
        InputError: the validation split has no truth to choose a token-level model by.
    """
    from fgalign.parallel import each_seed
    from fgalign.stages.reward_models import HeldOut

    grid = reward_candidates(profile)
    started = time.monotonic()
    held_out = HeldOut(profile, "validation")

    def one(candidate: Candidate) -> float | None:
        model = candidate.method
        reward = held_out.load_from(model, profile.data / "search_rewards" / model / str(candidate.number))
        return held_out.measure_by(reward, SEARCH_METRIC[model])

    table: list[dict[str, Any]] = []
    for candidate, value in zip(grid, each_seed(grid, one, held_out.workers), strict=True):
        metric = SEARCH_METRIC[candidate.method]
        if value is None:
            raise InputError(
                f"{profile.data / 'gold' / 'validation'}: expected marks of flaws, to choose {candidate.method} by its "
                f"{metric}, found none; leave it out of search.reward_models"
            )
        table.append(
            {
                "model": candidate.method,
                "candidate": candidate.number,
                "parameters": candidate.parameters,
                "metric": metric,
                "value": round(value, 6),
                "chosen": 0,
            }
        )
    for model in dict.fromkeys(row["model"] for row in table):
        max((row for row in table if row["model"] == model), key=lambda row: row["value"])["chosen"] = 1
    with track(profile, "choose_rewards", None, {}, started) as run:
        run.log({f"{row['model']}/{row['metric']}": row["value"] for row in table if row["chosen"]})
    write_csv(profile.sweeps / "metrics" / "search_rewards.csv", table)


def run_overoptimisation(profile: Profile, study: str = "overoptimisation") -> None:
    """overoptimisation: proxy reward and judge's score of the study's policies as their KL grows (Gao et al. 2022);
    ``overoptimisation.csv``.

    The proxy is the mean score of the reward model that is trained on, minus that before training, in units of its
    standard deviation over responses before training; the columns are means over the recorded validation prompts.
    """
    from fgalign.evaluation.judging import judged_items, profile_judge, write_spent

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "validation").references}
    rows = []
    for key in get_study(profile, study).variants:
        for seed in profile.seeds:
            path = profile.data / "studies" / study / key / f"seed-{seed}" / "rollouts.jsonl"
            by_update: dict[int, list[CurveSample]] = {}
            for sample in read_records(path, CurveSample):
                by_update.setdefault(sample.update, []).append(sample)
            first = [sample.reward for sample in by_update[0]]
            centre = sum(first) / len(first)
            spread = (sum((reward - centre) ** 2 for reward in first) / len(first)) ** 0.5
            for update in sorted(by_update):
                here = by_update[update]
                verdicts = judge.verdicts(judged_items(here, references))
                rows.append(
                    {
                        "reward": key,
                        "seed": seed,
                        "update": update,
                        "kl": round(sum(sample.kl for sample in here) / len(here), 6),
                        "proxy": round((sum(sample.reward for sample in here) / len(here) - centre) / spread, 6),
                        "gold": round(sum(verdict.score for verdict in verdicts) / len(here), 6),
                        "win": round(sum(verdict.win for verdict in verdicts) / len(here), 6),
                    }
                )
    with track(profile, "overoptimisation", None, {}) as run:
        run.log({"rows": len(rows)})
    write_csv(profile.sweeps / "metrics" / "overoptimisation.csv", rows)
    write_spent(judge, profile.sweeps / "metrics", "overoptimisation")


def run_credit(profile: Profile, methods: Sequence[str]) -> None:
    """credit: how much of the policy-gradient weight falls on truly flawed tokens; ``metrics/credit.csv``.

    The weight of a token is the absolute value of its advantage, as PPO used it; it is recorded with the validation
    answers while a method trains. The truth is the judge's parser, on the answer that the policy wrote. A row is named
    by the method's reward model.

    Raises:
        ConfigError: two methods have the same reward model.
        InputError: a method has not recorded its advantages.
    """
    from fgalign.core.modeling import load_tokenizer
    from fgalign.core.tokens import token_texts
    from fgalign.sources.simulator.gold import gold_spans

    rewards: dict[str, str] = {}
    for method in methods:
        other = rewards.setdefault(profile.params["methods"][method]["needs"], method)
        if other != method:
            raise ConfigError(
                f"{profile.file}: methods.{method}.needs: expected another reward model than that of {other}, by which "
                "the rows of credit.csv are named; measure the credit of one of the two"
            )
    tokenizer = load_tokenizer(profile.model_folder("base"))
    rows = []
    for needs, method in rewards.items():
        for seed in profile.seeds:
            path = profile.model_folder(method, seed) / "rollouts.jsonl"
            for sample in read_records(path, CurveSample):
                if sample.advantages is None:
                    raise InputError(f"{path}: id {sample.id!r} has no advantages; train with `curve.advantages: true`")
                texts = token_texts(tokenizer, sample.token_ids, skip_special_tokens=True)
                flawed = flawed_tokens(texts, gold_spans(sample.prompt, sample.response))
                weights = [abs(value) for value in sample.advantages[: len(flawed)]]
                rows.append(
                    {
                        "reward": needs,
                        "seed": seed,
                        "id": f"{sample.id}/{sample.update}",
                        "flawed_tokens": sum(flawed),
                        "tokens": len(flawed),
                        "weight_flawed": round(sum(w for w, bad in zip(weights, flawed, strict=True) if bad), 6),
                        "weight_total": round(sum(weights), 6),
                    }
                )
    with track(profile, "credit", None, {}) as run:
        run.log({"rows": len(rows)})
    write_csv(profile.results / "metrics" / "credit.csv", rows)


def flawed_tokens(texts: Sequence[str], spans: Sequence[Any]) -> list[bool]:
    """Whether each token, given by its text, overlaps a flawed span in more than white space. Spans are those of the
    joined text without its outer white space."""
    joined = "".join(texts)
    flags, start = [], len(joined.lstrip()) - len(joined)
    for text in texts:
        places = [start + offset for offset, letter in enumerate(text) if not letter.isspace()]
        flags.append(any(span.start <= place < span.end for place in places for span in spans))
        start += len(text)
    return flags


def _judge(
    profile: Profile, split: str, items: Sequence[T], place: Callable[[T], tuple[Path, int, str]]
) -> tuple[Judge, dict[T, list[dict[str, Any]]]]:
    """Answers of the model of each item (``place``: its folder, seed and title) to the prompts of a split, judged."""
    from fgalign.evaluation.judging import judged_rows, profile_judge
    from fgalign.parallel import each_seed

    answerer = Answerer(profile, split_references(profile, split))
    samples = each_seed(items, lambda item: answerer.answer(*place(item)), answerer.workers)
    judge = profile_judge(profile, answerer.config.judge, answerer.config.judge_options)
    references = {record.id: record for record in answerer.references}
    return judge, {item: judged_rows(part, references, judge) for item, part in zip(items, samples, strict=True)}


def _mean(rows: Sequence[dict[str, Any]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)
