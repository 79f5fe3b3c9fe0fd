"""SPA: the data set of FIGA, outputs of Alpaca-7B with their revision by GPT-3.5 and the ground truth.

Source: Guo et al., ICLR 2024, *Beyond Imitation* (arXiv 2311.04072), data set ``RUCAIBox/SPA`` (MIT). Its fields, by
the README of the authors' repository: ``output`` is the ground truth, ``original_output`` Alpaca-7B's, and
``revised_output`` its revision by GPT-3.5; ``instruction`` and ``input`` make the prompt.

What becomes what: ``original_output`` -> ``revised_output`` is an edit; ``output`` is the reference to revise towards
and the gold answer a judge reads. The commit has to be given: only its short form, 956ea42 (May 2024), could be
verified here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import SPLITS, Demonstration, Edit, Preference, Prompt, Reference
from fgalign.errors import InputError
from fgalign.sources.hub import (
    INSTRUCTION_COLUMNS,
    Columns,
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
    split_prompts,
)

FILE = "SPA.json"

_OUTPUTS = ("output", "original_output", "revised_output")
_COLUMNS: Columns = {**INSTRUCTION_COLUMNS, **dict.fromkeys(_OUTPUTS, (str,))}


class SPAConfig(HubSection):
    """Prompt text, roles of the outputs, and sizes of the splits in different prompts (null: all that are left).

    ``demonstrations`` names the output to imitate in supervised training. ``reference`` names the output that answers
    of a model are compared with; the default is the answer of the model that the data set sets out to align. The data
    set has no preferences; ``preferences: output`` takes the ground truth as preferred to the original output, as the
    data set's construction implies, ``none`` gives none.
    """

    repo: RepoName = "RUCAIBox/SPA"
    known_commit: ClassVar[str] = "that of May 2024 begins with 956ea42"
    prompt_style: PromptStyle = "alpaca"
    demonstrations: Literal["output", "revised_output"] = "output"
    reference: Literal["original_output", "revised_output", "output"] = "original_output"
    preferences: Literal["output", "none"] = "output"
    seed: int = 0
    n_train: Count | None = None
    n_validation: Count = 500
    n_test: Count = 500


class _Item(NamedTuple):
    """One row with its prompt and its three outputs, outer white space taken off."""

    id: str
    prompt: str
    outputs: dict[str, str]


def item(row: Row, style: PromptStyle) -> _Item | str:
    """The prompt and outputs of a row, or why it is left out: a blank text, or nothing was revised."""
    values = row.values
    outputs = {name: values[name].strip() for name in _OUTPUTS}
    reason = fault(outputs["original_output"], outputs["revised_output"])
    if not reason and not (values["instruction"].strip() and outputs["output"]):
        reason = "with a blank text"
    if reason:
        return reason
    return _Item(f"spa-{row.number:05d}", instruction_prompt(values["instruction"], values["input"], style), outputs)


def build(config: SPAConfig, root: Path) -> RawData:
    """Read SPA and split it by prompt.

    Every split gets prompts, corrections, preferences and, as references, the ground truth; train and validation get
    demonstrations. References for evaluation are given for validation and test, one a prompt, with the ground truth as
    the gold answer. Rows whose revision equals the original (outer white space aside) are left out.

    Raises:
        InputError: the file cannot be had, is not what it has to be, or has no usable row.
        ConfigError: no revision is pinned, or the sizes do not suit the data.
    """
    rows = load(config, {FILE: _COLUMNS}, root)[FILE]
    dropped: Counter[str] = Counter()
    items: list[_Item] = []
    for row in rows:
        found = item(row, config.prompt_style)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            items.append(found)
    report("spa", len(rows), dropped)
    if not items:
        raise InputError(f"{FILE}: expected at least one revised output, found none; fetch the published file again")
    sizes = {"train": config.n_train, "validation": config.n_validation, "test": config.n_test}
    home = split_prompts((found.prompt for found in items), sizes, config.seed)
    data = RawData(splits={}, truth={})
    for split in SPLITS:
        members = [found for found in items if home.get(prompt_key(found.prompt)) == split]
        first: dict[str, _Item] = {}
        for found in members:
            first.setdefault(found.prompt, found)
        raw, truth = RawSplit(), Truth()
        raw.prompts = [Prompt(id=found.id, prompt=prompt) for prompt, found in first.items()]
        raw.corrections = [
            Edit(
                id=found.id,
                prompt=found.prompt,
                initial=found.outputs["original_output"],
                revised=found.outputs["revised_output"],
            )
            for found in members
        ]
        if config.preferences == "output":
            raw.preferences = [
                Preference(
                    id=found.id,
                    prompt=found.prompt,
                    chosen=found.outputs["output"],
                    rejected=found.outputs["original_output"],
                )
                for found in members
                if found.outputs["output"] != found.outputs["original_output"]
            ]
        if split != "test":
            raw.demonstrations = [
                Demonstration(id=found.id, prompt=found.prompt, completion=found.outputs[config.demonstrations])
                for found in members
            ]
        raw.references = [
            Demonstration(id=found.id, prompt=found.prompt, completion=found.outputs["output"]) for found in members
        ]
        if split != "train":
            truth.references = [
                Reference(
                    id=found.id,
                    prompt=prompt,
                    reference=found.outputs[config.reference],
                    gold=found.outputs["output"],
                )
                for prompt, found in first.items()
            ]
        data.splits[split], data.truth[split] = raw, truth
    return data
