"""The annotator that is a language model: minimal edits, or revisions towards a reference answer.

Xu et al. had Claude 2 edit the less preferred response minimally; FIGA had GPT-3.5 revise a model's response towards
the data set's answer. Here any model behind an OpenAI-compatible address does either (``fgalign.llm``).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from rapidfuzz.distance import Levenshtein

from fgalign.config import find_root
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Edit, Split
from fgalign.errors import InputError
from fgalign.llm import LLM, LLMConfig
from fgalign.llm.prompts import Prompt

_EDITED = re.compile(r"<edited>(.*)</edited>", re.DOTALL)
FIELDS = {"minimal_edit": ("prompt", "response"), "revise_to_reference": ("prompt", "response", "reference")}


class LLMAnnotatorConfig(LLMConfig):
    """What the model is asked to do, besides how it is reached.

    ``prompt`` is a file with a prompt in place of the packaged one (``fgalign/llm/prompts/<task>.md``), absolute or
    relative to the repository's root. ``responses`` limits how many responses of each split are edited (None: all).
    """

    task: Literal["minimal_edit", "revise_to_reference"] = "minimal_edit"
    prompt: str | None = None
    responses: Annotated[int, Field(ge=1)] | None = None


def annotate(
    split: RawSplit, config: LLMAnnotatorConfig, split_name: Split, asked: dict[str, LLM] | None = None
) -> list[Edit]:
    """Edit the less preferred response of each preference; of a split without preferences, the initial side of each
    correction. To revise towards references, the responses are those that a reference answers.

    An edit keeps the id of what was edited. Responses that the model leaves unchanged, and those without an answer that
    can be used, are not returned. ``asked`` gets the model under the split's name, for what it has used.

    Raises:
        InputError: the split has no response to edit, or no reference where references are needed.
        LLMError: see ``fgalign.llm.LLM.ask``.
    """
    path = None if config.prompt is None else find_root() / config.prompt
    prompt = Prompt(config.task, FIELDS[config.task], path)
    tasks = to_edit(split, config, split_name)
    llm = LLM(config, f"{config.task} {split_name}")
    if asked is not None:
        asked[split_name] = llm
    revised = llm.ask([prompt.fill(**values) for _, values in tasks], parse_edit)
    edits, changed = [], 0.0
    for (id_, values), text in zip(tasks, revised, strict=True):
        initial = values["response"]
        if text is not None and text != initial.strip():
            # The parser drops outer white space; what the response had is no edit.
            lead, trail = initial[: -len(initial.lstrip())], initial[len(initial.rstrip()) :]
            edits.append(Edit(id=id_, prompt=values["prompt"], initial=initial, revised=f"{lead}{text}{trail}"))
            changed += Levenshtein.normalized_distance(initial.split(), text.split())
    unchanged = sum(text is not None for text in revised) - len(edits)
    share = f"; an edit changes {changed / len(edits):.1%} of the words on average" if edits else ""
    print(f"{split_name}: {len(edits)} of {len(tasks)} responses edited, {unchanged} left unchanged{share}")
    return edits


def to_edit(split: RawSplit, config: LLMAnnotatorConfig, split_name: Split) -> list[tuple[str, dict[str, str]]]:
    """What is edited: each response's id, and the prompt's fields (``FIELDS``).

    Raises:
        InputError: as ``annotate``.
    """
    if config.task == "minimal_edit":
        tasks = [(id_, {"prompt": asked, "response": text}) for id_, asked, text in _responses(split, split_name)]
    else:
        tasks = _with_references(split, split_name)
    return tasks[: config.responses]


def parse_edit(answer: str) -> str | None:
    """The text between ``<edited>`` and ``</edited>``, outer white space dropped; None unless each tag stands exactly
    once, in this order, with a text between."""
    if answer.count("<edited>") != 1 or answer.count("</edited>") != 1:
        return None
    match = _EDITED.search(answer)
    return (match[1].strip() or None) if match else None


def _responses(split: RawSplit, split_name: Split) -> list[tuple[str, str, str]]:
    """(id, prompt, response) of everything that can be edited."""
    found = [(pair.id, pair.prompt, pair.rejected) for pair in split.preferences]
    found = found or [(edit.id, edit.prompt, edit.initial) for edit in split.corrections]
    if not found:
        raise InputError(
            f"annotator llm: split {split_name}: expected preferences, or corrections whose initial side can be "
            f"edited, found none among {len(split.prompts)} prompts; use a source that has one of them"
        )
    return found


def _with_references(split: RawSplit, split_name: Split) -> list[tuple[str, dict[str, str]]]:
    responses = {pair.id: (pair.prompt, pair.rejected) for pair in split.preferences}
    responses |= {edit.id: (edit.prompt, edit.initial) for edit in split.corrections}
    tasks = []
    for reference in split.references:
        if reference.id not in responses:
            continue
        asked, response = responses[reference.id]
        if asked != reference.prompt:
            raise InputError(
                f"annotator llm: split {split_name}: id {reference.id!r}: the reference answers another prompt than "
                "the response of this id; give each reference the id of the response whose prompt it answers"
            )
        tasks.append((reference.id, {"prompt": asked, "response": response, "reference": reference.completion}))
    if not tasks:
        raise InputError(
            f"annotator llm: task revise_to_reference: split {split_name}: expected references with the ids of "
            f"corrections or preferences, found none (references: {len(split.references)}, corrections: "
            f"{len(split.corrections)}, preferences: {len(split.preferences)}); use a source with reference answers, "
            "or `task: minimal_edit`"
        )
    return tasks
