"""score_edits: how likely policies hold what held-out edits put in and what they take out. Opens the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgalign.config import Profile
from fgalign.core.schema import BAD, GOOD, NEUTRAL, Edit, LabelledPair, read_records
from fgalign.errors import InputError
from fgalign.evaluation.config import EvaluationConfig, policies_with_weights
from fgalign.io import write_csv
from fgalign.tracking import track

if TYPE_CHECKING:
    import torch


def run_score_edits(profile: Profile) -> None:
    """score_edits: log-probabilities of the test split's edits (``evaluation.pairs`` of them) under SFT and every
    method with weights of its own; ``edit_likelihood.csv``.

    A row is one edit under one policy of one seed; all log-probabilities are sums over tokens, in nats: of the whole
    ``initial`` and ``revised`` response with its end token, and of the tokens labelled ``good`` and ``bad`` and those
    ``kept``, with their numbers. ``prompt`` is the id of the first edit of the same prompt. Everything is computed in
    float32, because policies are compared that differ by little.

    Raises:
        InputError: the test split has no edits.
    """
    from fgalign.core.modeling import RuntimeConfig, load_tokenizer, release_memory, seed_workers, set_up
    from fgalign.labels import LabelConfig, label_edits, with_tokens_changed
    from fgalign.parallel import each_seed, progress
    from fgalign.stages.reward_models import by_prompt, spread

    config = profile.section("evaluation", EvaluationConfig)
    runtime = profile.section("runtime", RuntimeConfig)
    device = set_up(runtime)
    tokenizer = load_tokenizer(profile.model_folder("base"))
    path = profile.data / "edits" / "test.jsonl"
    edits = spread(with_tokens_changed(tokenizer, read_records(path, Edit), "test"), config.pairs)
    if not edits:
        raise InputError(f"{path}: expected edits to measure policies with, found none")
    pairs = label_edits(tokenizer, edits, profile.section("labels", LabelConfig))
    ids = by_prompt(edits)
    models = policies_with_weights(profile)

    def one(seed: int) -> list[dict[str, Any]]:
        rows = []
        with progress(len(models) * len(pairs), f"score_edits seed {seed}", "edit") as bar:
            for model in models:
                folder = profile.model_folder(model, seed)
                sums = score_pairs(folder, pairs, tokenizer, config.batch_size, device, bar.update)
                rows += [
                    {"model": model, "seed": seed, "id": key, "prompt": prompt, **found}
                    for (key, prompt), found in zip(ids, sums, strict=True)
                ]
                release_memory(device)
        return rows

    rows = [row for part in each_seed(profile.seeds, one, seed_workers(runtime, device)) for row in part]
    with track(profile, "score_edits", None, {}) as run:
        for model in models:
            own = [row for row in rows if row["model"] == model]
            run.log({f"{model}/{side}": sum(row[side] for row in own) / len(own) for side in ("initial", "revised")})
    write_csv(profile.results / "metrics" / "edit_likelihood.csv", rows)


def score_pairs(
    folder: Path,
    pairs: Sequence[LabelledPair],
    tokenizer: Any,
    batch_size: int,
    device: torch.device,
    done: Callable[[int], object],
) -> list[dict[str, float]]:
    """What the policy in ``folder`` says of each pair, after the prompt as its ``decoding.json`` has it: see
    ``run_score_edits``. ``done`` is told the number of pairs done in each batch."""
    import torch

    from fgalign.core.modeling import load_causal_lm
    from fgalign.core.rollout import as_rollout, response_logps
    from fgalign.decoding import read_decoding

    model = load_causal_lm(folder, device).eval()
    prefix = tokenizer(read_decoding(folder).prefix, add_special_tokens=False)["input_ids"]
    found: list[dict[str, float]] = [{} for _ in pairs]
    # Pairs of like lengths together, because a batch is as wide as its longest.
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row].prompt_ids) + len(pairs[row].revised_ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [[*pairs[row].prompt_ids, *prefix] for row in rows]
        for side in ("initial", "revised"):
            responses = [getattr(pairs[row], f"{side}_ids") for row in rows]
            rollout = as_rollout(prompts, responses, tokenizer.pad_token_id, device)
            with torch.no_grad():
                logps = response_logps(model, rollout).double().cpu()
            for row, line in zip(rows, logps, strict=True):
                labels = getattr(pairs[row], f"{side}_labels")
                found[row] |= _sums(side, line[: len(labels)].tolist(), labels)
        done(len(rows))
    return found


def _sums(side: str, logps: Sequence[float], labels: Sequence[int]) -> dict[str, float]:
    kinds = {"initial": {"bad": BAD}, "revised": {"good": GOOD, "kept": NEUTRAL}}[side]
    sums: dict[str, float] = {side: round(sum(logps), 5)}
    for kind, label in kinds.items():
        own = [logp for logp, found in zip(logps, labels, strict=True) if found == label]
        sums |= {kind: round(sum(own), 5), f"{kind}_tokens": len(own)}
    return sums
