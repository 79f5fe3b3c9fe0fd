"""Evaluation of the reward models on held-out pairs, and of the token-level ones on single tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from fgalign.config import Profile
from fgalign.core.raw_data import read_split
from fgalign.core.schema import Edit, Preference, read_records
from fgalign.errors import InputError
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig
from fgalign.evaluation.truth import initial_marks, read_truth
from fgalign.io import write_csv, write_json
from fgalign.tracking import track

if TYPE_CHECKING:
    from fgalign.evaluation.statistics import Parts

TOKEN_AUROC = "token_auroc"
R = TypeVar("R", Preference, Edit)


def run_reward_models(profile: Profile) -> None:
    """reward_models: accuracy of every reward model on held-out pairs (``reward_models.csv``; pair by pair
    ``reward_pairs.csv``, where ``prompt`` is the first id about the same prompt), token metrics against the truth
    (their intervals over seeds and responses: ``token_intervals.csv``), rewards of initial, revised and reference
    responses, gold answers where the source has them (``figa_data.csv``), examples for the picture
    (``token_examples.json``)."""

    from fgalign.core.tokens import encode_response
    from fgalign.labels import label_edit
    from fgalign.parallel import each_seed
    from fgalign.rewards import LEVELS

    held_out = HeldOut(profile)
    edits, pairs = held_out.edits, held_out.pairs
    references = {record.prompt: record for record in read_truth(profile.data / "gold" / "test").references}
    answers = {prompt: record.gold or record.reference for prompt, record in references.items()}

    def one(seed: int) -> SeedScores:
        metrics: dict[str, dict[str, float]] = {}
        parts: dict[tuple[str, str], Parts] = {}
        ranks: list[dict[str, Any]] = []
        figa: list[dict[str, Any]] = []
        token_rewards: list[list[float]] = []
        for name in REWARD_MODELS:
            reward = held_out.load(name, seed)
            scores = held_out.measure(reward, LEVELS[name])
            metrics[name] = scores.metrics
            token_rewards = scores.token_rewards or token_rewards
            parts |= {(name, metric): part for metric, part in scores.parts.items()}
            ranks += [
                {"model": name, "metric": metric, "seed": seed, "id": key, "prompt": prompt, "correct": value}
                for metric, values in scores.correct.items()
                for (key, prompt), value in zip(held_out.ids[metric], values, strict=True)
            ]
            if name == "rm_preference":
                for row, (edit, pair) in enumerate(zip(edits, pairs, strict=True)):
                    distance = label_edit(pair.initial_ids, pair.revised_ids).distance
                    figa += [
                        _figa_row(edit.id, "initial", seed, scores.initial[row], len(pair.initial_ids), 0),
                        _figa_row(edit.id, "revised", seed, scores.revised[row], len(pair.revised_ids), distance),
                    ]
                with_reference = [
                    (edit, pair, encode_response(held_out.tokenizer, answers[edit.prompt]))
                    for edit, pair in zip(edits, pairs, strict=True)
                    if answers.get(edit.prompt, edit.initial) != edit.initial
                ]
                # None where all edits are about other prompts than those with a reference (AlpacaFarm's are), or where
                # what is edited is the reference itself.
                values = with_reference and held_out.score(
                    reward, [p.prompt_ids for _, p, _ in with_reference], [ids for *_, ids in with_reference]
                )
                figa += [
                    _figa_row(edit.id, "reference", seed, value, len(ids), label_edit(pair.initial_ids, ids).distance)
                    for (edit, pair, ids), value in zip(with_reference, values, strict=True)
                ]
            with track(profile, f"reward_models/{name}", seed, {}) as run:
                run.log(metrics[name])
        return SeedScores(metrics, parts, ranks, figa, token_rewards)

    by_seed = each_seed(profile.seeds, one, held_out.workers)
    write_json(
        profile.results / "metrics" / "token_examples.json",
        _examples(held_out.tokenizer, edits, pairs, held_out.truth, by_seed[0].token_rewards, held_out.config.examples),
    )
    folder = profile.results / "metrics"
    write_csv(folder / "reward_models.csv", _metric_rows(profile, [scores.metrics for scores in by_seed]))
    intervals = token_intervals([scores.parts for scores in by_seed])
    write_csv(folder / "token_intervals.csv", intervals, ("model", "metric", "low", "high"))
    write_csv(folder / "reward_pairs.csv", [row for scores in by_seed for row in scores.ranks])
    write_csv(folder / "figa_data.csv", [row for scores in by_seed for row in scores.figa])


def run_token_models(profile: Profile) -> None:
    """token_models: the metrics of ``reward_models.csv`` for rm_token and every model of the profile's section
    ``token_models``; ``token_models.csv``."""
    from fgalign.parallel import each_seed

    held_out = HeldOut(profile)

    def one(seed: int) -> dict[str, dict[str, float]]:
        metrics: dict[str, dict[str, float]] = {}
        for name in ("rm_token", *(profile.params.get("token_models") or {})):
            metrics[name] = held_out.measure(held_out.load(name, seed), "token").metrics
            with track(profile, f"token_models/{name}", seed, {}) as run:
                run.log(metrics[name])
        return metrics

    rows = _metric_rows(profile, each_seed(profile.seeds, one, held_out.workers))
    write_csv(profile.sweeps / "metrics" / "token_models.csv", rows)


class SeedScores(NamedTuple):
    """What one seed contributes to the files: metrics by model and name, token metrics in parts by (model, name), rows
    of ``reward_pairs.csv`` and ``figa_data.csv``, rewards of every token of the initial responses."""

    metrics: dict[str, dict[str, float]]
    parts: dict[tuple[str, str], Parts]
    ranks: list[dict[str, Any]]
    figa: list[dict[str, Any]]
    token_rewards: list[list[float]]


class RewardScores(NamedTuple):
    """What one reward model says of held-out responses: metrics by name; of the accuracies also each pair's share
    (``ranked``), of the token metrics the parts of each initial response; scores of the initial and the revised sides
    of the edits, (N,); rewards of every token of the initial sides, where it has them."""

    metrics: dict[str, float]
    correct: dict[str, list[float]]
    parts: dict[str, Parts]
    initial: Any
    revised: Any
    token_rewards: list[list[float]]


class HeldOut:
    """Preferences and edits of the test split, or of the validation split, to measure reward models with
    (``evaluation.pairs`` of each, see ``spread``); and the truth about the edits' initial responses, ``kinds`` and
    ``truth``, empty where the source has none.

    Raises:
        InputError: the split has no preferences.
    """

    def __init__(self, profile: Profile, split: Literal["validation", "test"] = "test") -> None:
        from fgalign.core.modeling import RuntimeConfig, load_tokenizer, seed_workers, set_up, use_bf16
        from fgalign.core.tokens import encode_prompt, encode_response
        from fgalign.evaluation.labels import gold_types_of
        from fgalign.labels import LabelConfig, label_edits, with_tokens_changed

        self.profile = profile
        self.config = profile.section("evaluation", EvaluationConfig)
        runtime = profile.section("runtime", RuntimeConfig)
        self.device = set_up(runtime)
        self.bf16 = use_bf16(runtime, self.device)
        self.workers = seed_workers(runtime, self.device)
        self.tokenizer = load_tokenizer(profile.model_folder("base"))
        preferences = spread(read_split(profile.data / "raw" / split).preferences, self.config.pairs)
        if not preferences:
            raise InputError(
                f"{profile.data / 'raw' / split / 'preferences.jsonl'}: expected preferences to measure reward models "
                f"with, found none; use a source that has some in its {split} split"
            )
        edits = read_records(profile.data / "edits" / f"{split}.jsonl", Edit)
        self.edits = spread(with_tokens_changed(self.tokenizer, edits, split), self.config.pairs)
        self.pairs = label_edits(self.tokenizer, self.edits, profile.section("labels", LabelConfig))
        marks = initial_marks(profile.data / "gold" / split)
        self.kinds = gold_types_of(self.tokenizer, self.edits, marks) if marks else []
        self.truth = [[bool(kinds) for kinds in row] for row in self.kinds]
        self.ids = {"accuracy_preference": by_prompt(preferences), "accuracy_edit": by_prompt(self.edits)}
        self.preference_prompts = [encode_prompt(self.tokenizer, record.prompt) for record in preferences]
        self.chosen_ids = [encode_response(self.tokenizer, record.chosen) for record in preferences]
        self.rejected_ids = [encode_response(self.tokenizer, record.rejected) for record in preferences]

    def load(self, name: str, seed: int) -> Any:
        """The reward function of one seed of a reward model."""
        return self.load_from(name, self.profile.model_folder(name, seed))

    def load_from(self, name: str, folder: Path) -> Any:
        """The reward function of a model of that name in another folder."""
        from fgalign.rewards import load_reward

        return load_reward(name, folder, self.device)

    def score(self, reward: Any, prompts: Sequence, responses: Sequence) -> Any:
        """One score a response, (N,)."""
        from fgalign.rewards.scoring import score_responses

        with self._autocast():
            return score_responses(reward, prompts, responses, self.tokenizer, self.config.batch_size, self.device)

    def _autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def measure(self, reward: Any, level: str) -> RewardScores:
        """Accuracy on preferences and on edits; at the level ``token``, with a truth, also AUROC, precision and recall
        of negative rewards against the truth about the tokens of initial responses, and as ``token_auroc:<kind>`` the
        AUROC of tokens with each kind of flaw against those without any."""
        revised, initial = self.pair_scores(reward, "accuracy_edit")
        chosen, rejected = self.pair_scores(reward, "accuracy_preference")
        correct = {"accuracy_preference": ranked(chosen, rejected), "accuracy_edit": ranked(revised, initial)}
        metrics = {metric: sum(values) / len(values) for metric, values in correct.items()}
        if level != "token":
            return RewardScores(metrics, correct, {}, initial, revised, [])
        token_rewards = self.token_rewards(reward)
        parts = self.token_parts(token_rewards)
        metrics |= {name: part.value for name, part in parts.items()}
        return RewardScores(metrics, correct, parts, initial, revised, token_rewards)

    def measure_by(self, reward: Any, metric: str) -> float | None:
        """One of the metrics of ``measure`` alone; None where there is no truth to measure it with."""
        if metric == TOKEN_AUROC:
            parts = self.token_parts(self.token_rewards(reward))
            return parts[metric].value if metric in parts else None
        values = ranked(*self.pair_scores(reward, metric))
        return sum(values) / len(values)

    def pair_scores(self, reward: Any, metric: str) -> tuple[Any, Any]:
        """Scores of the better and of the worse responses of an accuracy's pairs, (N,) each."""
        if metric == "accuracy_edit":
            prompts = [pair.prompt_ids for pair in self.pairs]
            better, worse = ([getattr(pair, side) for pair in self.pairs] for side in ("revised_ids", "initial_ids"))
        else:
            prompts, better, worse = self.preference_prompts, self.chosen_ids, self.rejected_ids
        return self.score(reward, prompts, better), self.score(reward, prompts, worse)

    def token_rewards(self, reward: Any) -> list[list[float]]:
        """The reward of every token of the edits' initial responses."""
        from fgalign.rewards.scoring import raw_rewards

        with self._autocast():
            batches = raw_rewards(
                reward,
                [pair.prompt_ids for pair in self.pairs],
                [pair.initial_ids for pair in self.pairs],
                self.tokenizer.pad_token_id,
                self.config.batch_size,
                self.device,
            )
        return [
            row[mask].tolist()
            for rewards, rollout in batches
            for row, mask in zip(rewards, rollout.response_mask.cpu(), strict=True)
        ]

    def token_parts(self, token_rewards: list[list[float]]) -> dict[str, Parts]:
        """``token_parts`` of these rewards against the truth; empty where the source has none. The end token belongs to
        no word, so it has no truth."""
        if not self.kinds:
            return {}
        return token_parts([row[:-1] for row in token_rewards], [row[:-1] for row in self.kinds])


def token_parts(rewards: Sequence[Sequence[float]], kinds: Sequence[Sequence[set[str]]]) -> dict[str, Parts]:
    """Token metrics of responses, each in parts: AUROC, precision and recall of low (negative) rewards against the
    tokens that have a flaw; ``token_auroc:<kind>`` tells tokens with that kind of flaw, maybe among others, from those
    without any. ``rewards`` and the kinds of flaw (``kinds``) of each token, by response. A metric without a
    denominator, or a class, is left out."""
    from fgalign.evaluation.statistics import auroc_parts, ratio_parts

    count = len(rewards)
    own = [number for number, row in enumerate(rewards) for _ in row]
    badness = [-value for row in rewards for value in row]
    found = [value > 0 for value in badness]
    flaws = [kind for row in kinds for kind in row]
    bad = [bool(kind) for kind in flaws]
    hits = [guess and fact for guess, fact in zip(found, bad, strict=True)]
    parts = {
        TOKEN_AUROC: auroc_parts(badness, bad, own, count),
        "token_precision": ratio_parts(hits, found, own, count),
        "token_recall": ratio_parts(hits, bad, own, count),
    }
    for name in sorted(set().union(*flaws)):
        kept = [place for place, kind in enumerate(flaws) if name in kind or not kind]
        columns = ([badness[place] for place in kept], [name in flaws[place] for place in kept])
        parts[f"{TOKEN_AUROC}:{name}"] = auroc_parts(*columns, [own[place] for place in kept], count)
    return {name: part for name, part in parts.items() if part is not None}


def token_intervals(by_seed: Sequence[dict[tuple[str, str], Parts]]) -> list[dict[str, Any]]:
    """Rows ``model, metric, low, high``: 95% intervals over seeds and responses of what every seed has; none where it
    rests on a single response."""
    from fgalign.evaluation.statistics import parts_interval

    rows = []
    for model, metric in by_seed[0]:
        parts = [scores[model, metric] for scores in by_seed if (model, metric) in scores]
        interval = parts_interval(parts) if len(parts) == len(by_seed) else None
        if interval is not None:
            ends = {"low": round(interval.low, 6), "high": round(interval.high, 6)}
            rows.append({"model": model, "metric": metric, **ends})
    return rows


def spread(records: Sequence[R], count: int | None) -> list[R]:
    """``count`` of the records (None: all), in their order, about as many prompts as possible: the first about each
    prompt, then the second ones, and so on, because records about one prompt are not independent."""
    if count is None or count >= len(records):
        return list(records)
    seen: Counter[str] = Counter()
    rounds = []
    for place, record in enumerate(records):
        rounds.append((seen[record.prompt], place))
        seen[record.prompt] += 1
    return [records[place] for place in sorted(place for _, place in sorted(rounds)[:count])]


def by_prompt(records: Sequence[Preference | Edit]) -> list[tuple[str, str]]:
    """The id of each record, and that of the first record about the same prompt: those are not independent."""
    first: dict[str, str] = {}
    return [(record.id, first.setdefault(record.prompt, record.id)) for record in records]


def ranked(better: Any, worse: Any) -> list[float]:
    """For each pair 1 where the better response scores higher, 0.5 for a tie, 0 otherwise: (N,), (N,) to N numbers."""
    return ((better > worse).double() + 0.5 * (better == worse).double()).tolist()


def _metric_rows(profile: Profile, by_seed: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a seed, model and metric, from the metrics by model of each seed."""
    return [
        {"model": name, "metric": metric, "seed": seed, "value": round(value, 6)}
        for seed, metrics in zip(profile.seeds, by_seed, strict=True)
        for name, values in metrics.items()
        for metric, value in values.items()
    ]


def _figa_row(key: str, side: str, seed: int, reward: Any, tokens: int, distance: int) -> dict[str, Any]:
    return {
        "id": key,
        "side": side,
        "seed": seed,
        "reward": round(float(reward), 6),
        "tokens": tokens,
        "edit_distance": distance,
    }


def _examples(
    tokenizer: Any, edits: list[Edit], pairs: list, truth: list[list[bool]], rewards: list[list[float]], count: int
) -> list[dict[str, Any]]:
    from fgalign.core.tokens import token_texts

    return [
        {
            "id": edits[row].id,
            "prompt": edits[row].prompt,
            "response_tokens": token_texts(tokenizer, pairs[row].initial_ids[:-1]),
            "labels": pairs[row].initial_labels[:-1],
            **({"gold": truth[row][:-1]} if truth else {}),
            "rewards": [round(value, 4) for value in rewards[row][:-1]],
        }
        for row in range(min(count, len(edits)))
    ]
