"""HH-RLHF: human preferences between two continuations of a dialogue, helpful and harmless.

Source: Bai et al. 2022, *Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback*
(arXiv 2204.05862), data set ``Anthropic/hh-rlhf`` (MIT). A row holds two whole transcripts, ``chosen`` and
``rejected``; turns begin with an empty line and ``Human:`` or ``Assistant:``, and the last turn is the response.

What becomes what: the shared beginning, up to the last ``Assistant:``, is the prompt; the two last turns are the pair.
The data set's test files are the test split; validation is drawn from the train files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fgalign.core.raw_data import RawData
from fgalign.core.schema import Preference
from fgalign.errors import InputError
from fgalign.sources.hub import (
    Columns,
    Commit,
    Count,
    HubSection,
    RepoName,
    Row,
    Sha256,
    fault,
    load,
    preference_data,
    prompt_key,
    report,
    sample,
    split_prompts,
    stem,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

_COLUMNS: Columns = {"chosen": (str,), "rejected": (str,)}

Subset = Literal["helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"]

# As Git LFS records them at the pinned commit; those of helpful-rejection-sampled could not be verified.
_SHA256 = {
    "harmless-base/train.jsonl.gz": "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "harmless-base/test.jsonl.gz": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    "helpful-base/train.jsonl.gz": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test.jsonl.gz": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train.jsonl.gz": "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-online/test.jsonl.gz": "39a475cc7e0df972902f8e3a0972726fce826ac65369bda8c671de4330c60a10",
}


class HHRLHFConfig(HubSection):
    """Which of the four parts are read, and sizes of the splits in different prompts (null: all there are)."""

    repo: RepoName = "Anthropic/hh-rlhf"
    revision: Commit | None = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    sha256: dict[str, Sha256] = Field(default_factory=lambda: dict(_SHA256))
    subsets: Annotated[list[Subset], Field(min_length=1)] = Field(
        default_factory=lambda: ["helpful-base", "harmless-base"]
    )
    seed: int = 0
    n_train: Count | None = None
    n_validation: Count = 500
    n_test: Count | None = None


def last_turn(transcript: str) -> tuple[str, str] | None:
    """Prompt and response of a transcript, or None when it is malformed.

    The prompt ends with the last ``Assistant:``, without the empty line at the transcript's beginning; the response has
    its outer white space taken off. A transcript that does not begin with a human turn, or whose last turn is not the
    assistant's or is blank, is malformed.
    """
    cut = transcript.rfind(ASSISTANT)
    if not transcript.startswith(HUMAN) or cut < 0 or transcript.rfind(HUMAN) > cut:
        return None
    prompt, response = transcript[: cut + len(ASSISTANT)].strip(), transcript[cut + len(ASSISTANT) :].strip()
    return (prompt, response) if response else None


def pair(row: Row, prefix: str) -> Preference | str:
    """The pair of a row, or why it is left out."""
    chosen, rejected = last_turn(row.values["chosen"]), last_turn(row.values["rejected"])
    if chosen is None or rejected is None:
        return "malformed (no human turn at the beginning, or no assistant's turn at the end)"
    if chosen[0] != rejected[0]:
        return "malformed (chosen and rejected differ before the last turn)"
    reason = fault(chosen[1], rejected[1])
    if reason:
        return reason
    return Preference(id=f"{prefix}-{row.number:05d}", prompt=chosen[0], chosen=chosen[1], rejected=rejected[1])


def build(config: HHRLHFConfig, root: Path) -> RawData:
    """Read HH-RLHF and split it; training prompts that are in the test files, too, are left out.

    See ``hub.preference_data`` for what each split holds. Malformed rows and pairs of identical responses are left
    out, counted and reported by kind.

    Raises:
        InputError: a file cannot be had, is not what it has to be, or has no usable row.
        ConfigError: no revision is pinned, or the sizes do not suit the data.
    """
    files = {f"{subset}/{part}.jsonl.gz": _COLUMNS for part in ("test", "train") for subset in config.subsets}
    rows = load(config, files, root)
    dropped: Counter[str] = Counter()
    pairs: dict[str, list[Preference]] = {"test": [], "train": []}
    tested: set[str] = set()
    for name in files:  # the test files come first
        part = name.split("/")[1].split(".")[0]
        for row in rows[name]:
            found = pair(row, stem(name))
            if isinstance(found, str):
                dropped[found] += 1
            elif part == "train" and prompt_key(found.prompt) in tested:
                dropped["whose prompt is in another split"] += 1
            else:
                pairs[part].append(found)
        if part == "test":
            tested.update(prompt_key(found.prompt) for found in pairs["test"])
    report("hh_rlhf", sum(len(part) for part in rows.values()), dropped)
    for part, found in pairs.items():
        if not found:
            raise InputError(f"hh_rlhf: the {part} files of {', '.join(config.subsets)}: expected pairs, found none")
    home = split_prompts(
        (found.prompt for found in pairs["train"]),
        {"train": config.n_train, "validation": config.n_validation},
        config.seed,
    )
    test_prompts = [found.prompt for found in pairs["test"]]
    return preference_data(
        {
            "train": [found for found in pairs["train"] if home.get(prompt_key(found.prompt)) == "train"],
            "validation": [found for found in pairs["train"] if home.get(prompt_key(found.prompt)) == "validation"],
            "test": sample(pairs["test"], test_prompts, config.n_test, config.seed, "source.n_test"),
        }
    )
