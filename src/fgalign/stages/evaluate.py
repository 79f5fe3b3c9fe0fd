"""Evaluation stages, the only ones that open the test split and the truth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fgalign.config import Profile
from fgalign.errors import InputError
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig
from fgalign.evaluation.truth import initial_marks, read_truth
from fgalign.io import read_json, write_csv, write_json
from fgalign.raw_data import read_split
from fgalign.schema import CurveSample, Edit, Reference, Sample, read_records, write_records
from fgalign.tracking import track

BUDGET = ("training_tokens", "sampled_tokens", "gradient_updates")


def run_generate(profile: Profile, method: str) -> None:
    """generate: every seed's policy answers the test prompts; ``data/<profile>/samples/<method>.jsonl``."""
    from fgalign.parallel import each_seed

    answerer = Answerer(profile, split_references(profile, "test"))
    started = time.monotonic()

    def one(seed: int) -> list[Sample]:
        return answerer.answer(profile.model_folder(method, seed), seed, f"generate {method}")

    samples = [sample for part in each_seed(profile.seeds, one, answerer.workers) for sample in part]
    # The run opens late: a connection to its store must not be shared by the processes of the seeds.
    with track(profile, f"generate@{method}", None, answerer.config.model_dump(), started=started) as run:
        run.log({"responses": len(samples), "tokens": sum(sample.tokens for sample in samples)})
    write_records(profile.data / "samples" / f"{method}.jsonl", samples)


class Answerer:
    """Lets policies answer the prompts of ``references`` (the first ``evaluation.prompts`` of them).

    Each answer comes with its KL to the SFT policy of the same seed, both at the sampling temperature, and its score
    under the three reward models of the same seed. The random numbers are those of the seed, whichever the policy.
    """

    def __init__(self, profile: Profile, references: Sequence[Reference]) -> None:
        from fgalign.modeling import RuntimeConfig, load_tokenizer, seed_workers, set_up
        from fgalign.tokens import encode_prompt

        self.profile = profile
        self.config = profile.section("evaluation", EvaluationConfig)
        self.references = list(references)[: self.config.prompts]
        self.runtime = profile.section("runtime", RuntimeConfig)
        self.device = set_up(self.runtime)
        self.workers = seed_workers(self.runtime, self.device)
        self.tokenizer = load_tokenizer(profile.model_folder("base"))
        self.prompts = [encode_prompt(self.tokenizer, record.prompt) for record in self.references]

    def answer(self, folder: Path, seed: int, title: str) -> list[Sample]:
        """One answer of the policy in ``folder`` to each prompt, decoded as its ``decoding.json`` says."""
        import torch

        from fgalign.decoding import best_of_n_kl, draw_best, read_decoding, with_prompts
        from fgalign.modeling import load_causal_lm, use_bf16
        from fgalign.parallel import progress
        from fgalign.rewards import load_reward, response_scores
        from fgalign.rollout import response_logps
        from fgalign.tensor_ops import masked_sum
        from fgalign.tokens import decode_response

        profile, config, device, tokenizer = self.profile, self.config, self.device, self.tokenizer
        policy = load_causal_lm(folder, device).eval()
        reference = load_causal_lm(profile.model_folder("sft", seed), device).eval()
        rewards = {name: load_reward(name, profile.model_folder(name, seed), device) for name in REWARD_MODELS}
        decoding = read_decoding(folder)
        prefix = tokenizer(decoding.prefix, add_special_tokens=False)["input_ids"]
        chooser = None
        if decoding.reward is not None:
            chooser = load_reward(decoding.reward, profile.model_folder(decoding.reward, seed), device)
        generator = torch.Generator().manual_seed(config.seed + seed)
        # The KL is that between the distributions as they are sampled; greedy ones would have none.
        warmth = config.temperature or 1.0
        samples: list[Sample] = []
        with (
            progress(len(self.prompts) * decoding.best_of, f"{title} seed {seed}", "answer") as bar,
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(self.runtime, device)),
        ):
            draws = draw_best(
                policy,
                self.prompts,
                best_of=decoding.best_of,
                reward=chooser,
                length=config.response_length,
                generator=generator,
                batch_size=config.batch_size,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                temperature=config.temperature,
                prefix=prefix,
                progress=bar.update,
            )
            records, prompts = iter(self.references), iter(self.prompts)
            for rollout in draws.batches:
                mask = rollout.response_mask
                seen = rollout
                if prefix:
                    seen = with_prompts(rollout, [[*next(prompts), *prefix] for _ in mask], tokenizer.pad_token_id)
                ratios = response_logps(policy, seen, warmth) - response_logps(reference, rollout, warmth)
                kl = (masked_sum(ratios, mask, 1) + best_of_n_kl(decoding.best_of)).tolist()
                scores = {name: response_scores(reward(rollout), mask).tolist() for name, reward in rewards.items()}
                for row, ids in enumerate(rollout.response_lists()):
                    record = next(records)
                    samples.append(
                        Sample(
                            id=record.id,
                            seed=seed,
                            prompt=record.prompt,
                            response=decode_response(tokenizer, ids),
                            tokens=len(ids),
                            truncated=bool(rollout.truncated[row]),
                            kl=round(kl[row], 6),
                            rewards={name: round(values[row], 6) for name, values in scores.items()},
                        )
                    )
        return samples


def run_judge(profile: Profile, method: str) -> None:
    """judge: the judge scores the responses; ``results/<profile>/metrics/judged/<method>.csv``. What the method spent
    goes into ``metrics/budgets/<method>.csv`` (the initial model and SFT have no budget)."""
    from fgalign.evaluation.judging import judged_rows, profile_judge

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "test").references}
    samples = read_records(profile.data / "samples" / f"{method}.jsonl", Sample)
    rows = judged_rows(samples, references, judge)
    with track(profile, f"judge@{method}", None, {"judge": config.judge}) as run:
        for name in ("score", "win", "kl", "tokens"):
            run.log({name: sum(row[name] for row in rows) / len(rows)})
        run.log(judge.counts())
    write_csv(profile.results / "metrics" / "judged" / f"{method}.csv", rows)
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
    """curves: the judge scores what policies answered to validation prompts while they trained; ``curves.csv``."""
    from fgalign.evaluation.judging import judged_items, profile_judge

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = {record.id: record for record in read_truth(profile.data / "gold" / "validation").references}
    rows = []
    for method in methods:
        for seed in profile.seeds:
            samples = read_records(profile.model_folder(method, seed) / "rollouts.jsonl", CurveSample)
            for update in sorted({sample.update for sample in samples}):
                here = [sample for sample in samples if sample.update == update]
                verdicts = judge.verdicts(judged_items(here, references))
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


def run_label_quality(profile: Profile) -> None:
    """label_quality: minimal-edit labels of the test edits' bad tokens against the truth; ``label_quality.json``."""
    from fgalign.evaluation.labels import label_quality
    from fgalign.labels import LabelConfig, label_edits
    from fgalign.modeling import load_tokenizer

    tokenizer = load_tokenizer(profile.model_folder("base"))
    edits = read_records(profile.data / "edits" / "test.jsonl", Edit)
    pairs = label_edits(tokenizer, edits, profile.section("labels", LabelConfig))
    marks = initial_marks(profile.data / "gold" / "test")
    quality = label_quality(tokenizer, edits, pairs, marks)
    with track(profile, "label_quality", None, {}) as run:
        run.log({key: value for key, value in quality.items() if isinstance(value, float)})
    write_json(profile.results / "metrics" / "label_quality.json", quality)


def run_samples(profile: Profile, methods: Sequence[str]) -> None:
    """samples: a few test prompts with every method's answer (first seed) and its score; ``samples.json``."""
    from fgalign.evaluation.judging import judged_items, profile_judge

    config = profile.section("evaluation", EvaluationConfig)
    judge = profile_judge(profile, config.judge, config.judge_options)
    references = split_references(profile, "test")[: config.examples]
    by_id = {record.id: record for record in references}
    responses: dict[str, dict[str, str]] = {record.id: {} for record in references}
    scores: dict[str, dict[str, float]] = {record.id: {} for record in references}
    for method in methods:
        samples = [
            sample
            for sample in read_records(profile.data / "samples" / f"{method}.jsonl", Sample)
            if sample.seed == profile.seeds[0] and sample.id in by_id
        ]
        for sample, verdict in zip(samples, judge.verdicts(judged_items(samples, by_id)), strict=True):
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


def split_references(profile: Profile, split: str) -> list[Reference]:
    """The reference of each prompt of the ``validation`` or ``test`` split, in the order of the prompts.

    Raises:
        InputError: a prompt has none.
    """
    by_id = {record.id: record for record in read_truth(profile.data / "gold" / split).references}
    prompts = read_split(profile.data / "raw" / split).prompts
    missing = [record.id for record in prompts if record.id not in by_id]
    if missing:
        where = f"gold/{split}/references.jsonl"
        raise InputError(f"{where}: prompt {missing[0]!r} has no reference; make the raw data again")
    return [by_id[record.id] for record in prompts]
