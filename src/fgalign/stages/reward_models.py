"""Evaluation of the reward models on held-out pairs, and of the token-level ones on single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fgalign.config import Profile
from fgalign.core.raw_data import read_split
from fgalign.core.schema import Edit, read_records
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig
from fgalign.evaluation.truth import initial_marks, read_truth
from fgalign.io import write_csv, write_json
from fgalign.tracking import track

TOKEN_AUROC = "token_auroc"


def run_reward_models(profile: Profile) -> None:
    """reward_models: accuracy of every reward model on held-out pairs (``reward_models.csv``; pair by pair
    ``reward_pairs.csv``), token metrics against the truth, rewards of initial, revised and reference responses
    (``figa_data.csv``), examples for the picture (``token_examples.json``)."""

    from fgalign.core.tokens import encode_response
    from fgalign.labels import label_edit
    from fgalign.parallel import each_seed
    from fgalign.rewards import LEVELS

    held_out = HeldOut(profile)
    edits, pairs = held_out.edits, held_out.pairs
    references = {record.prompt: record for record in read_truth(profile.data / "gold" / "test").references}

    def one(seed: int) -> tuple[dict[str, dict[str, float]], list[dict], list[dict[str, Any]], list[list[float]]]:
        metrics: dict[str, dict[str, float]] = {}
        ranks: list[dict[str, Any]] = []
        figa: list[dict[str, Any]] = []
        token_rewards: list[list[float]] = []
        for name in REWARD_MODELS:
            reward = held_out.load(name, seed)
            scores = held_out.measure(reward, LEVELS[name])
            metrics[name] = scores.metrics
            token_rewards = scores.token_rewards or token_rewards
            ranks += [
                {"model": name, "metric": metric, "seed": seed, "id": key, "correct": value}
                for metric, values in scores.correct.items()
                for key, value in zip(held_out.ids[metric], values, strict=True)
            ]
            if name == "rm_preference":
                for row, (edit, pair) in enumerate(zip(edits, pairs, strict=True)):
                    distance = label_edit(pair.initial_ids, pair.revised_ids).distance
                    figa += [
                        _figa_row(edit.id, "initial", seed, scores.initial[row], len(pair.initial_ids), 0),
                        _figa_row(edit.id, "revised", seed, scores.revised[row], len(pair.revised_ids), distance),
                    ]
                with_reference = [
                    (edit, pair, encode_response(held_out.tokenizer, references[edit.prompt].reference))
                    for edit, pair in zip(edits, pairs, strict=True)
                    if edit.prompt in references
                ]
                values = held_out.score(
                    reward, [p.prompt_ids for _, p, _ in with_reference], [ids for *_, ids in with_reference]
                )
                figa += [
                    _figa_row(edit.id, "reference", seed, value, len(ids), label_edit(pair.initial_ids, ids).distance)
                    for (edit, pair, ids), value in zip(with_reference, values, strict=True)
                ]
            with track(profile, f"reward_models/{name}", seed, {}) as run:
                run.log(metrics[name])
        return metrics, ranks, figa, token_rewards

    by_seed = each_seed(profile.seeds, one, held_out.workers)
    write_json(
        profile.results / "metrics" / "token_examples.json",
        _examples(held_out.tokenizer, edits, pairs, held_out.truth, by_seed[0][3], held_out.config.examples),
    )
    rows = _metric_rows(profile, [metrics for metrics, *_ in by_seed])
    write_csv(profile.results / "metrics" / "reward_models.csv", rows)
    ranks = [row for _, ranks, _, _ in by_seed for row in ranks]
    write_csv(profile.results / "metrics" / "reward_pairs.csv", ranks)
    write_csv(profile.results / "metrics" / "figa_data.csv", [row for _, _, figa, _ in by_seed for row in figa])


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


class RewardScores(NamedTuple):
    """What one reward model says of held-out responses: metrics by name; of the accuracies also each pair's share
    (``ranked``); scores of the initial and the revised sides of the edits, (N,); rewards of every token of the initial
    sides, where it has them."""

    metrics: dict[str, float]
    correct: dict[str, list[float]]
    initial: Any
    revised: Any
    token_rewards: list[list[float]]


class HeldOut:
    """Test preferences and test edits (the first ``evaluation.pairs`` of each) with the truth about the edits' initial
    responses, to measure reward models with."""

    def __init__(self, profile: Profile) -> None:
        from fgalign.core.modeling import RuntimeConfig, load_tokenizer, seed_workers, set_up
        from fgalign.core.tokens import encode_prompt, encode_response
        from fgalign.evaluation.labels import gold_types
        from fgalign.labels import LabelConfig, label_edits

        self.profile = profile
        self.config = profile.section("evaluation", EvaluationConfig)
        runtime = profile.section("runtime", RuntimeConfig)
        self.device = set_up(runtime)
        self.workers = seed_workers(runtime, self.device)
        self.tokenizer = load_tokenizer(profile.model_folder("base"))
        preferences = read_split(profile.data / "raw" / "test").preferences[: self.config.pairs]
        self.edits = read_records(profile.data / "edits" / "test.jsonl", Edit)[: self.config.pairs]
        self.pairs = label_edits(self.tokenizer, self.edits, profile.section("labels", LabelConfig))
        marks = initial_marks(profile.data / "gold" / "test")
        self.kinds = [gold_types(self.tokenizer, edit.initial, marks[edit.id]) for edit in self.edits]
        self.truth = [[bool(kinds) for kinds in row] for row in self.kinds]
        self.ids = {
            "accuracy_preference": [record.id for record in preferences],
            "accuracy_edit": [edit.id for edit in self.edits],
        }
        self.preference_prompts = [encode_prompt(self.tokenizer, record.prompt) for record in preferences]
        self.chosen_ids = [encode_response(self.tokenizer, record.chosen) for record in preferences]
        self.rejected_ids = [encode_response(self.tokenizer, record.rejected) for record in preferences]

    def load(self, name: str, seed: int) -> Any:
        """The reward function of one seed of a reward model."""
        from fgalign.rewards import load_reward

        return load_reward(name, self.profile.model_folder(name, seed), self.device)

    def score(self, reward: Any, prompts: Sequence, responses: Sequence) -> Any:
        """One score a response, (N,)."""
        from fgalign.rewards.scoring import score_responses

        return score_responses(reward, prompts, responses, self.tokenizer, self.config.batch_size, self.device)

    def measure(self, reward: Any, level: str) -> RewardScores:
        """Accuracy on preferences and on edits; at the level ``token`` also AUROC, precision and recall of negative
        rewards against the truth about the tokens of initial responses, and as ``token_auroc:<kind>`` the AUROC of
        tokens with each kind of flaw against those without any."""
        from fgalign.evaluation.statistics import auroc, precision_recall
        from fgalign.rewards.scoring import raw_rewards

        prompts = [pair.prompt_ids for pair in self.pairs]
        initial_ids = [pair.initial_ids for pair in self.pairs]
        revised = self.score(reward, prompts, [pair.revised_ids for pair in self.pairs])
        initial = self.score(reward, prompts, initial_ids)
        chosen = self.score(reward, self.preference_prompts, self.chosen_ids)
        rejected = self.score(reward, self.preference_prompts, self.rejected_ids)
        correct = {"accuracy_preference": ranked(chosen, rejected), "accuracy_edit": ranked(revised, initial)}
        metrics = {metric: sum(values) / len(values) for metric, values in correct.items()}
        if level != "token":
            return RewardScores(metrics, correct, initial, revised, [])
        batches = raw_rewards(
            reward, prompts, initial_ids, self.tokenizer.pad_token_id, self.config.batch_size, self.device
        )
        token_rewards = [
            row[mask].tolist()
            for rewards, rollout in batches
            for row, mask in zip(rewards, rollout.response_mask.cpu(), strict=True)
        ]
        # The end token belongs to no word, so it has no truth.
        bad = [flag for flags in self.truth for flag in flags[:-1]]
        flat = [value for row in token_rewards for value in row[:-1]]
        quality = precision_recall([value < 0 for value in flat], bad)
        found = {
            TOKEN_AUROC: auroc([-value for value in flat], bad),
            "token_precision": quality.precision,
            "token_recall": quality.recall,
        }
        by_kind = auroc_by_kind(flat, [kinds for row in self.kinds for kinds in row[:-1]])
        found |= {f"{TOKEN_AUROC}:{name}": value for name, value in by_kind.items()}
        metrics |= {key: value for key, value in found.items() if value is not None}
        return RewardScores(metrics, correct, initial, revised, token_rewards)


def auroc_by_kind(rewards: Sequence[float], kinds: Sequence[set[str]]) -> dict[str, float | None]:
    """For each kind of flaw, in alphabetical order, the AUROC with which low rewards tell the tokens that have it,
    maybe among others, from those without any flaw; ``kinds`` are the flaws of each token. None where all tokens are
    flawed."""
    from fgalign.evaluation.statistics import auroc

    found = {}
    for name in sorted(set().union(*kinds)):
        kept = [
            (-reward, name in mine) for reward, mine in zip(rewards, kinds, strict=True) if name in mine or not mine
        ]
        found[name] = auroc([score for score, _ in kept], [flawed for _, flawed in kept])
    return found


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
            "gold": truth[row][:-1],
            "rewards": [round(value, 4) for value in rewards[row][:-1]],
        }
        for row in range(min(count, len(edits)))
    ]
