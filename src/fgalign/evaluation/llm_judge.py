"""The judge that is a language model: it compares a response with the reference, in both orders.

A model favours a position (Zheng et al. 2023, arXiv 2306.05685), so each pair is asked twice with A and B swapped and
the outcome is the mean of both verdicts, a tie where one of them cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from fgalign.config import find_root
from fgalign.llm import LLM, LLMConfig
from fgalign.llm.prompts import Prompt

Verdict = Literal["A", "B", "tie"]
_LAST_LINE = re.compile(r"[*_#>`\s]*verdict[*_\s]*:[*_`\s]*\[*(a|b|tie)\]*[*_`\s.]*", re.IGNORECASE)
_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}


class LLMJudgeConfig(LLMConfig):
    """How the judge is reached and asked. ``prompt`` is a file with a prompt in place of the packaged
    ``pairwise_judge.md``, absolute or relative to the repository's root."""

    prompt: str | None = None


class LLMJudge:
    """Compares responses with references. ``pairs`` counts what was compared so far, ``inconsistent`` the pairs whose
    two orders gave different outcomes, ``unreadable`` those with an order that has no verdict, ``identical`` those not
    asked about because both texts are the same."""

    def __init__(self, config: LLMJudgeConfig) -> None:
        path = None if config.prompt is None else find_root() / config.prompt
        self.prompt = Prompt("pairwise_judge", ("prompt", "a", "b"), path)
        self.llm = LLM(config, "judge")
        self.pairs = self.inconsistent = self.unreadable = self.identical = 0

    def compare(self, triples: Sequence[tuple[str, str, str]]) -> list[float]:
        """The outcome of each (prompt, response, reference), from 0 to 1: the mean over both orders of 1 where the
        response wins, 0.5 for a tie, 0 where the reference wins.

        Equal texts (but for outer white space) tie unasked. A pair with an order without a verdict that can be read
        ties, because the other order alone would favour a position; ``max_failed`` limits the share of such orders.

        Raises:
            LLMError: see ``fgalign.llm.LLM.ask``.
        """
        asked = [place for place, (_, a, b) in enumerate(triples) if a.strip() != b.strip()]
        prompts = []
        for prompt, response, reference in (triples[place] for place in asked):
            prompts.append(self.prompt.fill(prompt=prompt, a=response, b=reference))
            prompts.append(self.prompt.fill(prompt=prompt, a=reference, b=response))
        verdicts = self.llm.ask(prompts, parse_verdict)
        outcomes = [0.5] * len(triples)
        inconsistent = unreadable = 0
        for number, place in enumerate(asked):
            first, second = verdicts[2 * number], verdicts[2 * number + 1]
            if first is None or second is None:
                unreadable += 1
                continue
            ours = (_points(first, "A"), _points(second, "B"))
            outcomes[place] = sum(ours) / 2
            inconsistent += ours[0] != ours[1]
        self.pairs += len(triples)
        self.inconsistent += inconsistent
        self.unreadable += unreadable
        self.identical += len(triples) - len(asked)
        print(
            f"judge: {len(triples)} pairs; {inconsistent} inconsistent (the orders disagree), {unreadable} tied, "
            f"because an order has no verdict, {len(triples) - len(asked)} of identical texts",
            flush=True,
        )
        return outcomes

    def counts(self) -> dict[str, float]:
        """What the judge has used and found so far, by name, for the tracker."""
        return {**self.llm.counts(), **{f"judge/{name}": value for name, value in self._found().items()}}

    def spent(self) -> dict[str, Any]:
        """What the verdicts took from an empty cache (``fgalign.llm.LLM.spent``), and what was found."""
        return {**self.llm.spent(), **self._found()}

    def _found(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("pairs", "inconsistent", "unreadable", "identical")}


def parse_verdict(answer: str) -> Verdict | None:
    """The verdict on the last line that is not blank (``Verdict: A``, ``B`` or ``tie``; Markdown and case do not
    count); None where that line is anything else."""
    lines = answer.strip().splitlines()
    match = _LAST_LINE.fullmatch(lines[-1]) if lines else None
    return _VERDICTS[match[1].lower()] if match else None


def _points(verdict: Verdict, response: Literal["A", "B"]) -> float:
    """Points of the response, shown as A or B in this order."""
    if verdict == "tie":
        return 0.5
    return 1.0 if verdict == response else 0.0
