"""AlpacaFarm: instructions, human or simulated preferences between two outputs, and 805 evaluation instructions.

Source: Dubois et al. 2023, *AlpacaFarm: A Simulation Framework for Methods that Learn from Human Feedback* (arXiv
2305.14387), data set ``tatsu-lab/alpaca_farm`` (CC BY-NC 4.0). Its loading script names the files; the files are read,
the script is not run. The meaning of ``preference`` (1: ``output_1`` is preferred, 2: ``output_2``) is that of
``data_preprocessor.py`` in github.com/tatsu-lab/alpaca_farm.

What becomes what: the SFT instructions are the demonstrations, the unlabelled ones the training prompts; the preference
pairs are split by prompt into all three splits; the validation instructions are the validation prompts with
text-davinci-003's output as reference, the evaluation set the test prompts with text-davinci-003's output as reference.
The data set has no edits, so an annotator has to make them. ``references`` are text-davinci-003's outputs for the
instructions that the preference pairs are about, so that an annotator can revise towards them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Literal, NamedTuple

from pydantic import Field

from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import SPLITS, Demonstration, Preference, Prompt, Reference, Split
from fgalign.errors import RecordError
from fgalign.sources.hub import (
    INSTRUCTION_COLUMNS,
    Columns,
    Commit,
    Count,
    HubSection,
    PromptStyle,
    RepoName,
    Row,
    fault,
    instruction_prompt,
    load,
    prompt_key,
    report,
    sample,
    split_prompts,
)

INSTRUCTIONS = "alpaca_instructions"
EVALUATION = "alpaca_farm_evaluation.json"

_INSTRUCTION: Columns = {**INSTRUCTION_COLUMNS, "output": (str, NoneType)}
_PAIR: Columns = {**INSTRUCTION_COLUMNS, "output_1": (str,), "output_2": (str,), "preference": (int, float)}


class AlpacaFarmConfig(HubSection):
    """Which preferences, which prompt text, and how many of everything.

    ``prompt_style`` ``alpaca`` is the text that the papers' models were trained with; the base model's chat template
    should then render the content of the user turn and nothing else. Sizes of null take all there is.
    ``n_<split>_preferences`` counts different prompts, and ``n_validation_preferences`` defaults to the 500 that
    AlpacaFarm's reward model keeps for evaluation; the other sizes count rows with different prompts, too.
    """

    repo: RepoName = "tatsu-lab/alpaca_farm"
    revision: Commit | None = "e576524ca841af3c36fd6912e68e5920430928c1"
    rows: dict[str, Count] = Field(default_factory=lambda: {EVALUATION: 805})
    preferences: Literal["alpaca_human_preference", "alpaca_gpt4_preference", "alpaca_noisy_multi_preference"] = (
        "alpaca_human_preference"
    )
    prompt_style: PromptStyle = "alpaca"
    seed: int = 0
    n_demonstrations: Count | None = None
    n_train_prompts: Count | None = None
    n_validation_prompts: Count | None = None
    n_test_prompts: Count | None = None
    n_train_preferences: Count | None = None
    n_validation_preferences: Count = 500
    n_test_preferences: Count = 500


class _Answered(NamedTuple):
    """An instruction with its prompt text and output; the output may be blank."""

    id: str
    prompt: str
    output: str


def _answered(rows: Sequence[Row], prefix: str, style: PromptStyle) -> list[_Answered]:
    return [
        _Answered(
            f"{prefix}-{row.number:05d}",
            instruction_prompt(row.values["instruction"], row.values["input"], style),
            (row.values["output"] or "").strip(),
        )
        for row in rows
    ]


def preference(row: Row, prefix: str, style: PromptStyle) -> Preference | str:
    """The pair of a row, or why it is left out.

    Raises:
        RecordError: ``preference`` is neither 1 nor 2.
    """
    values = row.values
    if values["preference"] not in (1, 2):
        raise RecordError(f"{row.where}: column `preference`: expected 1 or 2, found {values['preference']!r}")
    texts = values["output_1"].strip(), values["output_2"].strip()
    reason = fault(*texts)
    if reason:
        return reason
    chosen, rejected = texts if values["preference"] == 1 else texts[::-1]
    prompt = instruction_prompt(values["instruction"], values["input"], style)
    return Preference(id=f"{prefix}-{row.number:05d}", prompt=prompt, chosen=chosen, rejected=rejected)


def build(config: AlpacaFarmConfig, root: Path) -> RawData:
    """Read AlpacaFarm and split it; no prompt of the test or validation split is in another one.

    Rows whose prompt is in the evaluation set, then in the validation instructions, then in the held-out preferences
    are left out of the parts that come later. Rows with a blank instruction or a blank output that is needed, and pairs
    of identical outputs, are left out, too; all are counted and reported.

    Raises:
        InputError: a file cannot be had or is not what it has to be.
        ConfigError: no revision is pinned, or a size is larger than the data.
    """
    pairs_file = f"{config.preferences}.json"
    files: dict[str, Columns] = {
        f"{INSTRUCTIONS}/{name}.json": _INSTRUCTION for name in ("sft", "unlabeled", "val", "preference")
    }
    rows = load(config, {**files, EVALUATION: _INSTRUCTION, pairs_file: _PAIR}, root)
    dropped: Counter[str] = Counter()
    taken: dict[str, Split] = {}

    def part(name: str, prefix: str, split: Split, *, output: bool) -> list[_Answered]:
        """Rows of a file that may go into a split: not blank, and their prompt not in another split."""
        kept = []
        for row, item in zip(rows[name], _answered(rows[name], prefix, config.prompt_style), strict=True):
            if not row.values["instruction"].strip() or (output and not item.output):
                dropped["with a blank text"] += 1
            elif taken.get(prompt_key(item.prompt), split) != split:
                dropped["whose prompt is in another split"] += 1
            else:
                kept.append(item)
        return kept

    def some(items: Sequence[_Answered], size: int | None, key: str) -> list[_Answered]:
        return sample(items, [item.prompt for item in items], size, config.seed, f"source.{key}")

    test = part(EVALUATION, "eval", "test", output=True)
    taken.update((prompt_key(item.prompt), "test") for item in test)
    validation = part(f"{INSTRUCTIONS}/val.json", "val", "validation", output=True)
    taken.update((prompt_key(item.prompt), "validation") for item in validation)
    pairs = _split_pairs(config, rows[pairs_file], taken, dropped)
    for split in ("validation", "test"):
        taken.update((prompt_key(pair.prompt), split) for pair in pairs[split])
    sft = part(f"{INSTRUCTIONS}/sft.json", "sft", "train", output=True)
    unlabelled = part(f"{INSTRUCTIONS}/unlabeled.json", "unlabeled", "train", output=False)

    test = some(test, config.n_test_prompts, "n_test_prompts")
    validation = some(validation, config.n_validation_prompts, "n_validation_prompts")
    prompts = some(unlabelled, config.n_train_prompts, "n_train_prompts")
    demonstrations = {"train": some(sft, config.n_demonstrations, "n_demonstrations"), "validation": validation}
    answers = {
        item.prompt: item.output
        for item in _answered(rows[f"{INSTRUCTIONS}/preference.json"], "preference", config.prompt_style)
        if item.output
    }
    data = RawData(splits={}, truth={})
    for split, items in zip(SPLITS, (prompts, validation, test), strict=True):
        data.splits[split] = RawSplit(
            prompts=[Prompt(id=item.id, prompt=item.prompt) for item in items],
            demonstrations=[
                Demonstration(id=item.id, prompt=item.prompt, completion=item.output)
                for item in demonstrations.get(split, [])
            ],
            preferences=pairs[split],
            references=[
                Demonstration(id=pair.id, prompt=pair.prompt, completion=answers[pair.prompt])
                for pair in pairs[split]
                if pair.prompt in answers
            ],
        )
        data.truth[split] = Truth()
        if split != "train":
            data.truth[split].references = [
                Reference(id=item.id, prompt=item.prompt, reference=item.output) for item in items
            ]
    report("alpaca_farm", sum(len(part) for part in rows.values()), dropped)
    return data


def _split_pairs(
    config: AlpacaFarmConfig, rows: Sequence[Row], taken: dict[str, Split], dropped: Counter[str]
) -> dict[Split, list[Preference]]:
    """The preference pairs by split, those left out that are no pair or whose prompt another split has taken."""
    pairs: list[Preference] = []
    for row in rows:
        pair = preference(row, "pair", config.prompt_style)
        if isinstance(pair, str):
            dropped[pair] += 1
        elif not row.values["instruction"].strip():
            dropped["with a blank text"] += 1
        elif prompt_key(pair.prompt) in taken:
            dropped["whose prompt is in another split"] += 1
        else:
            pairs.append(pair)
    sizes = {
        "train": config.n_train_preferences,
        "validation": config.n_validation_preferences,
        "test": config.n_test_preferences,
    }
    home = split_prompts((pair.prompt for pair in pairs), sizes, config.seed, "source.n_<split>_preferences")
    return {split: [pair for pair in pairs if home.get(prompt_key(pair.prompt)) == split] for split in SPLITS}
