"""Stages that judge: answers to test prompts and answers given while training, by the profile's judge; labels by the
truth. They open the test split and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgalign.config import Profile
from fgalign.core.schema import CurveSample, Edit, Sample, read_records
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.config import EvaluationConfig
from fgalign.evaluation.truth import initial_marks, read_truth, split_references
from fgalign.io import read_json, write_csv, write_json
from fgalign.tracking import track

BUDGET = ("training_tokens", "sampled_tokens", "gradient_updates")


def run_judge(profile: Profile, method: str) -> None:
    """judge: the judge scores the responses; ``results/<profile>/metrics/judged/<method>.csv``. What the method spent
    goes into ``metrics/budgets/<method>.csv`` (the initial model and SFT have no budget), what a language model took to
    judge into ``metrics/judged/<method>.llm_usage.json``."""
    from fgalign.evaluation.judging import check_title, judged_rows, profile_judge, write_spent

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    check_title(profile, config.judge, judge.title)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "test").references}
    samples = read_records(profile.data / "samples" / f"{method}.jsonl", Sample)
    rows = judged_rows(samples, references, judge)
    with track(profile, f"judge@{method}", None, {"judge": config.judge}) as run:
        for name in ("score", "win", "kl", "tokens"):
            run.log({name: sum(row[name] for row in rows) / len(rows)})
        run.log(judge.counts())
    folder = profile.results / "metrics" / "judged"
    write_csv(folder / f"{method}.csv", rows)
    write_spent(judge, folder, method)
    if method in profile.params.get("methods", {}):
        spent = [{"seed": seed, **read_budget(profile.model_folder(method, seed))} for seed in profile.seeds]
        write_csv(profile.results / "metrics" / "budgets" / f"{method}.csv", spent)


def read_budget(folder: Path) -> dict[str, int]:
    """What the training of a model spent, from its ``budget.json``.

    Raises:
        InputError: no such file, or a count is missing.
    """
    path = folder / "budget.json"
    spent = read_json(path)
    missing = [name for name in BUDGET if not isinstance(spent.get(name), int)]
    if missing:
        raise InputError(f"{path}: expected the counts {', '.join(BUDGET)}; {missing[0]} is missing: train it again")
    return {name: spent[name] for name in BUDGET}


def run_curves(profile: Profile, methods: Sequence[str]) -> None:
    """curves: the judge scores what policies answered to validation prompts while they trained; ``curves.csv``, and
    what a language model took to judge in ``curves.llm_usage.json``."""
    from fgalign.evaluation.judging import judged_items, profile_judge, write_spent

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "validation").references}
    points = []
    for method in methods:
        for seed in profile.seeds:
            samples = read_records(profile.model_folder(method, seed) / "rollouts.jsonl", CurveSample)
            for update in sorted({sample.update for sample in samples}):
                points.append((method, seed, update, [sample for sample in samples if sample.update == update]))
    # All at once: an answer without use is a small share of them, and a large one of a point.
    every = iter(judge.verdicts(judged_items([sample for *_, here in points for sample in here], references)))
    rows = []
    for method, seed, update, here in points:
        verdicts = [next(every) for _ in here]
        rows.append(
            {
                "method": method,
                "seed": seed,
                "update": update,
                "response_tokens": here[0].response_tokens,
                "gradient_updates": here[0].gradient_updates,
                "score": round(sum(verdict.score for verdict in verdicts) / len(here), 6),
                "win": round(sum(verdict.win for verdict in verdicts) / len(here), 6),
                "kl": round(sum(s.kl for s in here) / len(here), 6),
                "reward": round(sum(s.reward for s in here) / len(here), 6),
            }
        )
    with track(profile, "curves", None, {"judge": config.judge}) as run:
        run.log({"rows": len(rows), **judge.counts()})
    write_csv(profile.results / "metrics" / "curves.csv", rows)
    write_spent(judge, profile.results / "metrics", "curves")


def run_label_quality(profile: Profile) -> None:
    """label_quality: minimal-edit labels of the test edits' bad tokens against the truth; ``label_quality.json``, empty
    where the source marks no flaws."""
    from fgalign.core.modeling import load_tokenizer
    from fgalign.evaluation.labels import label_quality
    from fgalign.labels import LabelConfig, label_edits, with_tokens_changed

    tokenizer = load_tokenizer(profile.model_folder("base"))
    edits = with_tokens_changed(tokenizer, read_records(profile.data / "edits" / "test.jsonl", Edit), "test")
    pairs = label_edits(tokenizer, edits, profile.section("labels", LabelConfig))
    marks = initial_marks(profile.data / "gold" / "test")
    quality = label_quality(tokenizer, edits, pairs, marks) if marks else {}
    if not marks:
        print("test: the source marks no flaws, so that labels have no truth to be compared with")
    with track(profile, "label_quality", None, {}) as run:
        run.log({key: value for key, value in quality.items() if isinstance(value, float)})
    write_json(profile.results / "metrics" / "label_quality.json", quality)


def run_text_quality(profile: Profile) -> None:
    """text_quality: the judge's score of every text that methods learn from or are compared with; ``text_quality.csv``.
    ``better`` is 1 where it likes a chosen response better than the rejected one, or a revised response better than the
    initial one, 0.5 where it likes both alike, and empty elsewhere. For judges that score a text by itself."""
    from fgalign.core.raw_data import read_split
    from fgalign.evaluation.judges import outcome
    from fgalign.evaluation.judging import profile_judge

    config = profile.section("evaluation", EvaluationConfig)
    score = profile_judge(profile, config.judge, config.judge_options).score
    if score is None:
        raise ConfigError(f"{profile.file}: evaluation.judge: expected one that scores texts, found {config.judge!r}")
    rows = []

    def note(split: str, text: str, key: str, value: float, other: float | None = None) -> None:
        better = "" if other is None else outcome(value, other)
        rows.append({"split": split, "text": text, "id": key, "score": round(value, 6), "better": better})

    for split in ("train", "test"):
        data = read_split(profile.data / "raw" / split)
        for kind, records in (("demonstration", data.demonstrations), ("expert", data.references)):
            for record in records:
                note(split, kind, record.id, score(record.prompt, record.completion, None))
        edits = read_records(profile.data / "edits" / f"{split}.jsonl", Edit)
        for names, records in ((("chosen", "rejected"), data.preferences), (("revised", "initial"), edits)):
            for record in records:
                better, worse = (score(record.prompt, getattr(record, name), None) for name in names)
                note(split, names[0], record.id, better, worse)
                note(split, names[1], record.id, worse)
    for record in split_references(profile, "test"):
        note("test", "reference", record.id, score(record.prompt, record.reference, record.gold))
    with track(profile, "text_quality", None, {"judge": config.judge}) as run:
        run.log({"texts": len(rows)})
    write_csv(profile.results / "metrics" / "text_quality.csv", rows)


def run_samples(profile: Profile, methods: Sequence[str]) -> None:
    """samples: a few test prompts with every method's answer (first seed) and its score; ``samples.json``."""
    from fgalign.evaluation.judging import judged_items, profile_judge

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = split_references(profile, "test")[: config.examples]
    by_id = {record.id: record for record in references}
    responses: dict[str, dict[str, str]] = {record.id: {} for record in references}
    scores: dict[str, dict[str, float]] = {record.id: {} for record in references}
    shown = [
        (method, sample)
        for method in methods
        for sample in read_records(profile.data / "samples" / f"{method}.jsonl", Sample)
        if sample.seed == profile.seeds[0] and sample.id in by_id
    ]
    verdicts = judge.verdicts(judged_items([sample for _, sample in shown], by_id))
    for (method, sample), verdict in zip(shown, verdicts, strict=True):
        responses[sample.id][method] = sample.response
        scores[sample.id][method] = round(verdict.score, 6)
    write_json(
        profile.results / "samples.json",
        [
            {
                "id": record.id,
                "prompt": record.prompt,
                "reference": record.reference,
                "responses": responses[record.id],
                "scores": scores[record.id],
            }
            for record in references
        ],
    )
