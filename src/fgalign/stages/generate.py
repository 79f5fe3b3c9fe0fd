"""generate: policies answer the test prompts. Opens the test split and the reference answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fgalign.config import Profile
from fgalign.core.schema import Reference, Sample, write_records
from fgalign.errors import ConfigError
from fgalign.evaluation.config import REWARD_MODELS, EvaluationConfig
from fgalign.evaluation.truth import split_references
from fgalign.tracking import track


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
        from fgalign.core.modeling import RuntimeConfig, load_tokenizer, seed_workers, set_up
        from fgalign.core.tokens import encode_prompt

        self.profile = profile
        self.config = profile.section("evaluation", EvaluationConfig)
        self.references = list(references)[: self.config.prompts]
        self.runtime = profile.section("runtime", RuntimeConfig)
        self.device = set_up(self.runtime)
        self.workers = seed_workers(self.runtime, self.device)
        self.tokenizer = load_tokenizer(profile.model_folder("base"))
        self.prompts = [encode_prompt(self.tokenizer, record.prompt) for record in self.references]
        self._check_positions([])

    def answer(self, folder: Path, seed: int, title: str) -> list[Sample]:
        """One answer of the policy in ``folder`` to each prompt, decoded as its ``decoding.json`` says."""
        import torch

        from fgalign.core.modeling import load_causal_lm, release_memory, use_bf16
        from fgalign.core.rollout import response_logps
        from fgalign.core.tensor_ops import masked_sum
        from fgalign.core.tokens import decode_response
        from fgalign.decoding import best_of_n_kl, draw_best, read_decoding, with_prompts
        from fgalign.parallel import progress
        from fgalign.rewards import load_reward, response_scores

        profile, config, device, tokenizer = self.profile, self.config, self.device, self.tokenizer
        decoding = read_decoding(folder)
        prefix = tokenizer(decoding.prefix, add_special_tokens=False)["input_ids"]
        self._check_positions(prefix)
        if decoding.best_of > 1 and not config.temperature:
            raise ConfigError(
                f"{profile.file}: evaluation.temperature: expected above 0 for {folder}, which answers with the best "
                f"of {decoding.best_of} responses, found 0, with which all of them are the same; raise it"
            )
        # One model at a time (best-of-n: two), so that what trains on a GPU can also be evaluated there.
        policy = load_causal_lm(folder, device).eval()
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
            del chooser
            prompts = iter(self.prompts)
            logps = []
            for rollout in draws.batches:
                seen = rollout
                if prefix:
                    behind = [[*next(prompts), *prefix] for _ in rollout.response_mask]
                    seen = with_prompts(rollout, behind, tokenizer.pad_token_id)
                logps.append(response_logps(policy, seen, warmth))
            del policy
            release_memory(device)
            reference = load_causal_lm(profile.model_folder("sft", seed), device).eval()
            gained = best_of_n_kl(decoding.best_of)
            kls = [
                (masked_sum(own - response_logps(reference, seen, warmth), seen.response_mask, 1) + gained).tolist()
                for own, seen in zip(logps, draws.batches, strict=True)
            ]
            del reference
            scores: dict[str, list[list[float]]] = {}
            for name in REWARD_MODELS:
                release_memory(device)
                reward = load_reward(name, profile.model_folder(name, seed), device)
                scores[name] = [
                    response_scores(reward(rollout), rollout.response_mask).tolist() for rollout in draws.batches
                ]
                del reward
            release_memory(device)
            records = iter(self.references)
            for batch, (rollout, kl) in enumerate(zip(draws.batches, kls, strict=True)):
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
                            rewards={name: round(values[batch][row], 6) for name, values in scores.items()},
                        )
                    )
        return samples

    def _check_positions(self, prefix: Sequence[int]) -> None:
        """Raise ConfigError where the longest prompt leaves no room for prefix and response among the positions that
        the model has learned."""
        from fgalign.core.modeling import check_positions

        longest = max(map(len, self.prompts), default=0)
        behind = f", prefix ({len(prefix)})" if prefix else ""
        parts = f"the longest prompt ({longest} tokens){behind} and response_length {self.config.response_length}"
        length = longest + len(prefix) + self.config.response_length
        check_positions(self.profile.model_folder("base"), length, f"{self.profile.file}: evaluation: {parts} together")
