"""Judges: who wins a comparison with the reference answer, by a score of each side or by comparing the two.

A judge sees prompt, response, reference and, where the data has one, the gold answer; it never sees which method wrote
the response. Win rates are means of ``Verdict.win`` over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from fgalign.config import Section, find_root
from fgalign.errors import ConfigError, InputError

if TYPE_CHECKING:
    from fgalign.evaluation.llm_judge import LLMJudgeConfig


class Item(NamedTuple):
    """One comparison: a response and the reference answer to the same prompt; ``gold`` where the data has one."""

    prompt: str
    response: str
    reference: str
    gold: str | None = None


class Verdict(NamedTuple):
    """What a judge says of one item: scores of both sides, higher is better, and ``win``, the response's share of the
    victory: 1 a win, 0.5 a tie, 0 a loss, between them where a judge is asked twice.

    A judge that only compares has no scores: ``score`` is then ``win``, and ``reference_score`` 0.5.
    """

    score: float
    reference_score: float
    win: float


Score = Callable[[str, str, str | None], float]
Compare = Callable[[Sequence[Item]], list[Verdict]]


@dataclass(frozen=True)
class Judge:
    """A named judge; ``title`` is how captions call it.

    One of two functions judges. ``score(prompt, response, gold)`` returns a finite number for one response, higher is
    better. ``compare(items)`` judges many items together, which is for judges that answer in batches or in parallel,
    or that compare the two sides directly. ``counts()`` is what ``compare`` has used so far, by name, for the tracker;
    ``spent()`` what its verdicts took, the same in a run that found all answers in a cache. Both are empty for a judge
    that asks no language model.
    """

    name: str
    title: str
    score: Score | None = None
    compare: Compare | None = None
    counts: Callable[[], dict[str, float]] = dict
    spent: Callable[[], dict[str, Any]] = dict

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order; each reference is scored once."""
        if self.compare is not None:
            return self.compare(items)
        assert self.score is not None, f"judge {self.name} neither scores nor compares"
        references: dict[tuple[str, str, str | None], float] = {}
        found = []
        for item in items:
            key = (item.prompt, item.reference, item.gold)
            if key not in references:
                references[key] = self.score(*key)
            score = self.score(item.prompt, item.response, item.gold)
            found.append(Verdict(score, references[key], outcome(score, references[key])))
        return found


REWARD_JUDGE_TITLE = "score of a reward model trained on other preferences"


class RewardJudgeConfig(Section):
    """A trained sequence-level reward model as judge: its folder (model and tokenizer), absolute or relative to the
    repository's root. It must have learnt from other preferences, with another seed, than the models it judges."""

    folder: str
    batch_size: Annotated[int, Field(ge=1)] = 32
    device: Literal["auto", "cpu", "cuda"] = "auto"


def simulator_score(prompt: str, response: str, gold: str | None) -> float:
    """The simulator's own gold score; ``gold`` is not read, because the simulator derives the truth from the prompt."""
    from fgalign.sources.simulator.gold import gold_score

    return float(gold_score(prompt, response))


def rouge_l_score(prompt: str, response: str, gold: str | None) -> float:
    """ROUGE-L F1 (Lin 2004) of the response and the gold answer, from 0 to 1, by the ``rouge-score`` package.

    Words are lower-cased and stemmed (Porter), as in the evaluation of FineGrainedRLHF; the whole text is one sequence
    (ROUGE-L, not the per-sentence ROUGE-Lsum). A response without a word scores 0.

    Raises:
        InputError: there is no gold answer.
    """
    if gold is None:
        raise InputError(
            f"judge rouge_l: expected a gold answer for the prompt {_short(prompt)}, found none; "
            "use a source whose references have gold answers (qa_feedback), or another judge"
        )
    return float(_rouge_scorer().score(gold, response)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


_JUDGES = {
    judge.name: judge
    for judge in (
        Judge("simulator_gold", "gold score of the simulator", simulator_score),
        Judge("rouge_l", "ROUGE-L F1 with the gold long answer", rouge_l_score),
    )
}


def get_judge(name: str, llm: LLMJudgeConfig | None = None, reward_model: RewardJudgeConfig | None = None) -> Judge:
    """The judge of that name; ``llm`` and ``reward_model`` are the profile's sections of the judges so called.

    Raises:
        ConfigError: no judge has that name, or its section is missing.
    """
    if name == "llm":
        return _llm_judge(_needed(llm, "judge_options", "llm"))
    if name == "reward_model":
        return _reward_judge(_needed(reward_model, "judge_options", "reward_model"))
    if name not in _JUDGES:
        known = ", ".join([*_JUDGES, "llm", "reward_model"])
        raise ConfigError(f"judge: unknown judge {name!r}; expected one of {known}")
    return _JUDGES[name]


def _needed(section: Any, key: str, name: str) -> Any:
    if section is None:
        raise ConfigError(f"judge {name}: expected a section `evaluation.{key}` with its options, found none; add it")
    return section


def _llm_judge(config: LLMJudgeConfig) -> Judge:
    from fgalign.evaluation.llm_judge import LLMJudge

    judge = LLMJudge(config)

    def compare(items: Sequence[Item]) -> list[Verdict]:
        wins = judge.compare([(item.prompt, item.response, item.reference) for item in items])
        return [Verdict(win, 0.5, win) for win in wins]

    title = f"pairwise verdicts of {config.model}, both orders"
    return Judge("llm", title, compare=compare, counts=judge.counts, spent=judge.spent)


def _reward_judge(config: RewardJudgeConfig) -> Judge:
    from fgalign.core.modeling import RuntimeConfig, load_sequence_reward_model, load_tokenizer, set_up
    from fgalign.core.tokens import encode_prompt, encode_response
    from fgalign.rewards import reward_function, saved_level
    from fgalign.rewards.scoring import score_responses

    folder = find_root() / config.folder if not Path(config.folder).is_absolute() else Path(config.folder)
    if saved_level(folder) != "sequence":
        raise ConfigError(f"{folder}: expected a sequence-level reward model, found a token-level one")
    device = set_up(RuntimeConfig(device=config.device))
    tokenizer = load_tokenizer(folder)
    reward = reward_function(load_sequence_reward_model(folder, device), "sequence")

    def compare(items: Sequence[Item]) -> list[Verdict]:
        sides = list(dict.fromkeys((item.prompt, text) for item in items for text in (item.response, item.reference)))
        scores = score_responses(
            reward,
            [encode_prompt(tokenizer, prompt) for prompt, _ in sides],
            [encode_response(tokenizer, text) for _, text in sides],
            tokenizer,
            config.batch_size,
            device,
        )
        score = dict(zip(sides, scores.tolist(), strict=True))
        pairs = [(score[item.prompt, item.response], score[item.prompt, item.reference]) for item in items]
        return [Verdict(ours, theirs, outcome(ours, theirs)) for ours, theirs in pairs]

    return Judge("reward_model", REWARD_JUDGE_TITLE, compare=compare)


def outcome(score: float, reference_score: float) -> float:
    """1.0 for a win over the reference, 0.5 for a tie (equal scores), 0.0 for a loss.

    Raises:
        ValueError: a score is NaN, which would silently count as a loss.
    """
    if math.isnan(score) or math.isnan(reference_score):
        raise ValueError(f"outcome: expected two numbers, found score {score} and reference_score {reference_score}")
    if score == reference_score:
        return 0.5
    return 1.0 if score > reference_score else 0.0


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
