"""The record types that flow through the pipeline, and reading and writing them as JSONL.

One record is one line of JSON with exactly the fields below; an unknown field, a missing field, a wrong type or an
empty text is one error that names file and line. Field names are those of TRL's data sets where TRL has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fgalign.errors import RecordError
from fgalign.io import atomic_file

Text = Annotated[str, StringConstraints(strip_whitespace=False, min_length=1, pattern=r"\S")]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

BAD, NEUTRAL, GOOD = -1, 0, 1


class Record(BaseModel):
    """Base of all records: closed (unknown fields are errors), strict (no coercion), immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Prompt(Record):
    """A prompt without a response; what reinforcement learning rolls out from."""

    id: Text
    prompt: Text


class Demonstration(Record):
    """A prompt and a response to imitate (TRL's prompt-completion type)."""

    id: Text
    prompt: Text
    completion: Text


class Preference(Record):
    """Two responses to one prompt, the first preferred by an annotator (TRL's preference type)."""

    id: Text
    prompt: Text
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _differ(self) -> Preference:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text: a preference needs two different responses")
        return self


class Edit(Record):
    """A response and its minimal revision by an annotator."""

    id: Text
    prompt: Text
    initial: Text
    revised: Text

    @model_validator(mode="after")
    def _differ(self) -> Edit:
        if self.initial == self.revised:
            raise ValueError("revised is identical to initial: leave out responses that need no edit")
        return self


class LabelledPair(Record):
    """An edit as token ids with a label per token: -1 bad (initial side only), 0 neutral, 1 good (revised side only).

    The ids of a response end with the end-of-sequence token; the lists of ids and labels of a side are equally long.
    """

    id: Text
    prompt_ids: Annotated[list[int], Field(min_length=1)]
    initial_ids: Annotated[list[int], Field(min_length=1)]
    initial_labels: list[Literal[-1, 0]]
    revised_ids: Annotated[list[int], Field(min_length=1)]
    revised_labels: list[Literal[0, 1]]

    @model_validator(mode="after")
    def _lengths(self) -> LabelledPair:
        for side in ("initial", "revised"):
            ids, labels = getattr(self, f"{side}_ids"), getattr(self, f"{side}_labels")
            if len(ids) != len(labels):
                raise ValueError(f"{side}_ids has {len(ids)} tokens but {side}_labels {len(labels)} labels")
        return self


class Reference(Record):
    """Evaluation only: the answer to compare with, and, where the data has one, the gold answer a judge reads."""

    id: Text
    prompt: Text
    reference: Text
    gold: Text | None = None


class Span(Record):
    """Characters ``start`` (inclusive) to ``end`` (exclusive) of a text are flawed, in the way that ``type`` names."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]
    type: Text


class GoldMarks(Record):
    """Evaluation only: the truth about one response. ``side`` says which response of the record ``id`` is meant."""

    id: Text
    side: Literal["initial", "chosen"]
    text: Text
    spans: list[Span]

    @model_validator(mode="after")
    def _inside(self) -> GoldMarks:
        for span in self.spans:
            if not span.start < span.end <= len(self.text):
                raise ValueError(f"span {span.start}..{span.end} is not inside the text of {len(self.text)} characters")
        return self


class Sample(Record):
    """One generated response with what the models say of it (see ``evaluation.generate``).

    ``kl`` is the Monte-Carlo estimate sum_t log pi(y_t) - log pi_ref(y_t) of the whole response, in nats; where it is
    the best of n responses, log n - (n - 1) / n is added (``decoding.best_of_n_kl``); ``tokens`` counts response
    tokens, the end-of-sequence token among them; ``truncated`` says that none was produced within the
    budget; ``rewards`` holds the score of each reward model, by name.
    """

    id: Text
    seed: int
    prompt: Text
    response: str
    tokens: Annotated[int, Field(ge=0)]
    truncated: bool
    kl: float
    rewards: dict[str, float]


class CurveSample(Record):
    """A validation answer sampled while a method trained: after which update, response tokens, gradient updates.

    ``token_ids`` and ``advantages``, one a token, where the method records the advantages that it would learn from.
    """

    id: Text
    seed: int
    update: Annotated[int, Field(ge=0)]
    response_tokens: Annotated[int, Field(ge=0)]
    gradient_updates: Annotated[int, Field(ge=0)]
    prompt: Text
    response: str
    reward: float
    kl: float
    token_ids: list[int] | None = None
    advantages: list[float] | None = None


R = TypeVar("R", bound=Record)


def parse_record(kind: type[R], value: object, where: str) -> R:
    """Validate one record; ``where`` (for example ``file:line``) starts the message of the RecordError."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        found = "" if first["type"] == "missing" else f", found {_short(first.get('input'))}"
        raise RecordError(
            f"{where}: field `{field}` of a {kind.__name__} record: {first['msg']}{found}; "
            f"expected the fields {', '.join(kind.model_fields)}"
        ) from None


def read_records(path: str | Path, kind: type[R], *, empty_ok: bool = False) -> list[R]:
    """Read a JSONL file of one record type.

    Raises:
        RecordError: a line is not JSON or not a valid record, an ``id`` comes twice, or the file is missing or empty
            (unless ``empty_ok``).
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(f"{path}: no such file; expected {kind.__name__} records, one JSON object a line")
    records: list[R] = []
    seen: dict[object, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
            except UnicodeDecodeError as error:
                raise RecordError(f"{where}: not UTF-8: {error.reason} at byte {error.start + 1} of the line") from None
            except ValueError as error:
                message = getattr(error, "msg", error)
                raise RecordError(f"{where}: not JSON: {message}; expected one {kind.__name__} object a line") from None
            record = parse_record(kind, value, where)
            key = tuple(getattr(record, name, None) for name in ("id", "side", "seed", "update"))
            if key in seen:
                raise RecordError(f"{where}: id {key[0]!r} was used before, at line {seen[key]}; ids must be unique")
            seen[key] = number
            records.append(record)
    if not records and not empty_ok:
        raise RecordError(f"{path}: no records; expected at least one {kind.__name__}")
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSONL, one a line in the given order, atomically; returns how many.

    Raises:
        RecordError: a record holds a number that is not finite.
    """
    count = 0
    with atomic_file(path) as file:
        for record in records:
            value = record.model_dump(mode="json")
            try:
                file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            except ValueError:
                raise RecordError(
                    f"{path}: {type(record).__name__} record {value['id']!r}: expected finite numbers, found "
                    + ", ".join(f"{name} {item}" for name, item in value.items() if not _finite(item))
                ) from None
            count += 1
    return count


def _finite(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(math.isfinite(item) for item in values if isinstance(item, float))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
