"""QA-Feedback: questions with passages, four model answers each, human corrections, error spans and preferences.

Source: Wu et al. 2023, *Fine-Grained Human Feedback Gives Better Rewards for Language Model Training* (arXiv
2306.01693), data folder ``tasks/qa_feedback/data`` of allenai/FineGrainedRLHF (Apache-2.0), whose README fixes the
meaning of every field used here:

- ``prediction 1`` to ``prediction 4`` are samples of the data set's own initial policy. ``feedback`` (character spans
  of errors, missing information, corrected answer) is about ``prediction 1`` only.
- ``preference`` holds six comparisons in the order 1-2, 1-3, 1-4, 2-3, 2-4, 3-4: 1 = the first answer is preferred,
  2 = the second, 0 = no preference. The data agree: with this order 29 of the 2,000 triples of the development part
  contradict a ranking (452 and 648 with two other natural orders), and the answer marked as preferred has the
  higher word F1 with the gold answer in 1,684 of the 2,606 comparisons without a draw (65 %; read the other way
  round, the codes would give 35 %).

The development part (500 questions) is read by default; the training part (2,853) comes with the option ``train_part``.

What becomes what: ``prediction 1`` -> ``corrected-prediction`` is an edit; spans are the truth about its initial side;
the comparisons are the preferences; the long gold answer is what a judge reads.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from fgalign.config import Section
from fgalign.core.raw_data import RawData, RawSplit, Truth
from fgalign.core.schema import (
    SPLITS,
    Demonstration,
    Edit,
    GoldMarks,
    Preference,
    Prompt,
    Reference,
    Span,
    Split,
    Text,
)
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.io import atomic_file, check_sha256, read_json, sha256
from fgalign.sources.hub import report

FOLDER_VARIABLE = "FGALIGN_QA_FEEDBACK"
DOWNLOADS = Path("data") / "downloads" / "qa_feedback"
COMPARISONS = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))

_PUBLISHED = (
    "https://raw.githubusercontent.com/allenai/FineGrainedRLHF/5ffbe54b8d4d37ef002681849791594bcc9f1e3f/"
    "tasks/qa_feedback/data/"
)
_DEV_FILE = {
    "name": "dev_feedback.json",
    "sha256": "f394289ecfdc5a2d1663170254b92d75ad3c53ba36df9f627c70d4c6fc4f3291",
    "url": f"{_PUBLISHED}dev_feedback.json",
}
_TRAIN_NAME = "train_feedback.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# --- configuration ----------------------------------------------------------------------------------------------------


class QAFile(Section):
    """One published file: its name, the SHA-256 of its bytes, and where it can be fetched."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+\.json$")]
    sha256: Sha256
    url: str

    @property
    def prefix(self) -> str:
        """What the ids of its questions start with: ``dev`` for ``dev_feedback.json``."""
        return self.name.removesuffix(".json").removesuffix("_feedback")


class TrainPart(QAFile):
    """The published training part. Its SHA-256 is not known to this project, which never had the file: null takes what
    is there, or what is fetched, and prints its SHA-256, to be given here from then on. ``rows`` is the number of
    questions that it must have (null: any), as published 2,853."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+\.json$")] = _TRAIN_NAME
    sha256: Sha256 | None = None
    url: str = f"{_PUBLISHED}{_TRAIN_NAME}"
    rows: Annotated[int, Field(ge=1)] | None = 2853


class Questions(Section):
    """How many questions each split gets; questions beyond the sum are left out. ``train`` null: all that are left."""

    train: Annotated[int, Field(ge=1)] | None = 300
    validation: Annotated[int, Field(ge=1)] = 100
    test: Annotated[int, Field(ge=1)] = 100


class QAFeedbackConfig(Section):
    """Which files are read and how they become splits and prompts.

    ``folder`` holds the published files: absolute, or relative to the repository's root; null fetches them into
    ``data/downloads/qa_feedback``. The environment variable ``FGALIGN_QA_FEEDBACK`` overrides it.

    ``train_part`` has the training split come from a file of its own, and validation and test from ``files`` alone.
    Questions that are in ``files`` too, or have a passage of an article in ``files``, are left out of training, whether
    or not a split holds those of ``files``; the stage prints how many. ``{}`` takes the published training part.

    ``prompt_words`` limits a prompt in words (split at white space), question and titles included. It counts words
    because a source knows no tokenizer; English text has roughly 1.3 to 1.5 tokens a word, so leave room for that.

    ``demonstrations`` names the answer to imitate: ``best``, the prediction that wins most of its human comparisons
    (a tie counts half, the lower number wins a draw), which asks of the imitation data nothing that preferences do not
    already say; ``gold``, the long gold answer, as in the original work's supervised training; ``corrected``, the
    human-corrected prediction 1.
    """

    folder: str | None = None
    files: Annotated[list[QAFile], Field(min_length=1)] = Field(default_factory=lambda: [QAFile(**_DEV_FILE)])
    train_part: TrainPart | None = None
    questions: Questions = Field(default_factory=Questions)
    seed: int = 0
    prompt_words: Annotated[int, Field(ge=1)] = 300
    demonstrations: Literal["best", "gold", "corrected"] = "best"

    @field_validator("files")
    @classmethod
    def _distinct(cls, files: list[QAFile]) -> list[QAFile]:
        prefixes = [file.prefix for file in files]
        if len(set(prefixes)) != len(prefixes):
            raise ValueError(f"ids start with {', '.join(prefixes)}: two files would share ids; give them other names")
        return files

    @field_validator("train_part")
    @classmethod
    def _distinct_from_files(cls, part: TrainPart | None, info: ValidationInfo) -> TrainPart | None:
        cls._distinct([*info.data.get("files", []), *([part] if part else [])])
        return part


# --- the published format ---------------------------------------------------------------------------------------------


class _Published(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SpanError(_Published):
    """A flawed span of prediction 1, in characters, ``end`` exclusive."""

    error_type: Literal["Irrelevant", "Redundant", "Incoherent", "Wrong-Grounding", "Unverifiable"] = Field(
        alias="error type"
    )
    explanation: str
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]


class MissingInfo(_Published):
    """Sentences of a passage (both counted from 1) that the answer should have used. Read, checked, not used."""

    error_type: Literal["Missing-Answer", "Missing-Major-Auxiliary", "Missing-Minor-Auxiliary"] = Field(
        alias="error type"
    )
    passage_id: int
    sentence_id: list[int]


class Feedback(_Published):
    """Human feedback on prediction 1. The corrected text may be empty: nothing of the answer was worth keeping."""

    errors: list[SpanError]
    missing_info: list[MissingInfo] = Field(alias="missing-info")
    corrected: str = Field(alias="corrected-prediction")


class QARecord(_Published):
    """One question as published; a passage is its title followed by its sentences."""

    question: Text
    passages: list[Annotated[list[str], Field(min_length=1)]]
    gold: Text
    prediction_1: Text = Field(alias="prediction 1")
    prediction_2: Text = Field(alias="prediction 2")
    prediction_3: Text = Field(alias="prediction 3")
    prediction_4: Text = Field(alias="prediction 4")
    feedback: Feedback
    preference: Annotated[list[Literal[0, 1, 2]], Field(min_length=len(COMPARISONS), max_length=len(COMPARISONS))]

    @property
    def predictions(self) -> tuple[str, str, str, str]:
        """The four answers, prediction 1 first."""
        return self.prediction_1, self.prediction_2, self.prediction_3, self.prediction_4


@dataclass(frozen=True)
class _Question:
    """A record with its id and with where it stands, for messages."""

    id: str
    where: str
    record: QARecord


def parse_qa_record(value: object, where: str) -> QARecord:
    """Validate one published record; ``where`` (``file: record N``) starts the message.

    Raises:
        RecordError: a field is missing, unknown or ill-typed, a text is blank, or a span is not inside prediction 1.
    """
    try:
        record = QARecord.model_validate(value)
    except ValidationError as error:
        raise RecordError(f"{where}: {_explain(error)}") from None
    length = len(record.prediction_1)
    for number, span in enumerate(record.feedback.errors):
        if not span.start < span.end <= length:
            raise RecordError(
                f"{where}: field `feedback.errors.{number}`: expected a span inside the {length} characters of "
                f"prediction 1, found start {span.start} and end {span.end}"
            )
    return record


def _explain(error: ValidationError) -> str:
    """The first problem as ``field `...`: expected ..., found ...``."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "record"
    if first["type"] == "missing":
        return f"field `{field}`: expected the field to be there, found no such field"
    if first["type"] == "extra_forbidden":
        return f"field `{field}`: expected only the fields of the published format, found an unknown one"
    text = repr(first.get("input"))
    found = text if len(text) <= 60 else text[:57] + "..."
    if first["type"] == "string_pattern_mismatch":
        return f"field `{field}`: expected a text that is not blank, found {found}"
    expected = re.sub(r"^\w+ should (be|have) ", "", first["msg"])
    return f"field `{field}`: expected {expected}, found {found}"


def read_qa_file(path: Path, prefix: str) -> list[_Question]:
    """Read one published file; the ids are ``prefix-NNNN``, N being the position in the file, counted from 0.

    Raises:
        InputError: the file is missing, not JSON, or not a list of records (each error names file, record and field).
    """
    values = read_json(path)
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: expected a list of at least one record, found {type(values).__name__}")
    return [
        _Question(f"{prefix}-{number:04d}", f"{path}: record {number}", record)
        for number, record in enumerate(
            parse_qa_record(value, f"{path}: record {number}") for number, value in enumerate(values)
        )
    ]


# --- where the files are ----------------------------------------------------------------------------------------------


def locate(files: Sequence[QAFile], config: QAFeedbackConfig, root: Path) -> list[Path]:
    """Paths of published files whose checksums are right, fetched first if no folder is named.

    A folder that somebody named (environment variable, or ``folder``) must hold them all: nothing is fetched then. A
    checksum that is not given is printed instead of checked.

    Raises:
        InputError: files are not in the named folder or cannot be fetched (the message names all that are missing), or
            one has another checksum.
    """
    named = os.environ.get(FOLDER_VARIABLE) or config.folder
    folder = root / (named or DOWNLOADS)  # an absolute folder replaces the root
    paths = [folder / file.name for file in files]
    missing = [file for file, path in zip(files, paths, strict=True) if not path.exists()]
    if named and missing:
        origin = FOLDER_VARIABLE if os.environ.get(FOLDER_VARIABLE) else "source.folder"
        raise InputError(
            f"{' and '.join(str(folder / file.name) for file in missing)}: no such file, although {origin} names its "
            f"folder; put {' and '.join(file.url for file in missing)} there, or unset {origin} to have it fetched"
        )
    for number, file in enumerate(missing):
        wanted = " and ".join(f"{left.url} and save it as {folder / left.name}" for left in missing[number:])
        advice = (
            f"on a machine with network access download {wanted}, or set {FOLDER_VARIABLE} to a folder that holds "
            f"{' and '.join(file.name for file in files)}"
        )
        fetch(file, folder / file.name, advice)
    for file, path in zip(files, paths, strict=True):
        if file.sha256 is None:
            print(
                f"{path}: not checked, no sha256 was given; to pin this file: source.train_part.sha256: {sha256(path)}"
            )
        else:
            check_sha256(path, file.sha256)
    return paths


def fetch(file: QAFile, path: Path, advice: str, timeout: float = 60.0) -> None:
    """Fetch a file to ``path``; it appears there complete and with the right checksum, or not at all (without a
    checksum: complete and JSON).

    Raises:
        InputError: it cannot be reached (the message ends with ``advice``), its checksum is another one, or it is not
            JSON.
    """
    try:
        with urllib.request.urlopen(file.url, timeout=timeout) as response:
            content = response.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise InputError(f"{file.url}: cannot be fetched ({error}); {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if file.sha256 is None:
        try:
            json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file.url}: expected JSON, found another content ({error}); nothing saved") from None
    elif found != file.sha256:
        raise InputError(f"{file.url}: checksum mismatch: expected sha256 {file.sha256}, found {found}; nothing saved")
    with atomic_file(path, "wb") as target:
        target.write(content)


# --- splits -----------------------------------------------------------------------------------------------------------


def _keys(question: _Question) -> list[tuple[str, str]]:
    """What no two splits may share: the question, but for case and punctuation, and the articles of its passages."""
    text = " ".join(re.findall(r"\w+", question.record.question.casefold()))
    return [("question", text), *(("article", passage[0].strip()) for passage in question.record.passages)]


def _groups(questions: list[_Question]) -> list[list[_Question]]:
    """Questions that must share a split: the same question, or passages of the same article."""
    parent = list(range(len(questions)))

    def find(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, question in enumerate(questions):
        for key in _keys(question):
            parent[find(index)] = find(first_with.setdefault(key, index))
    groups: dict[int, list[_Question]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(find(index), []).append(question)
    return list(groups.values())


def split_questions(
    questions: list[_Question], counts: Questions, seed: int, splits: Sequence[Split] = SPLITS
) -> dict[Split, list[_Question]]:
    """Draw the splits at random, each of exactly the wanted size, its questions in the order of the file.

    Questions that are the same but for case and punctuation, or whose passages come from the same article, always
    share a split (or are left out together), so that nothing read in training answers a test question. Groups of
    several questions are placed before single ones, which fill what is left.

    Raises:
        ConfigError: there are too few questions, or the groups do not fit the sizes.
    """
    wanted = {split: getattr(counts, split) for split in splits}
    if wanted.get("train", 0) is None:
        wanted["train"] = max(1, len(questions) - sum(filter(None, wanted.values())))
    total = sum(wanted.values())
    if total > len(questions):
        raise ConfigError(
            f"source.questions: expected at most the {len(questions)} questions of the data, found {total} "
            f"({', '.join(f'{split} {count}' for split, count in wanted.items())})"
        )
    generator = random.Random(seed)
    groups = _groups(questions)
    generator.shuffle(groups)
    groups.sort(key=len, reverse=True)
    room: dict[str, int] = {**wanted, "left out": len(questions) - total}
    home: dict[str, str] = {}
    for group in groups:
        open_to = [name for name, free in room.items() if free >= len(group)]
        if not open_to:
            raise ConfigError(
                f"source.questions: {len(group)} questions that belong together (among them {group[0].id}) fit no "
                "split; use fewer questions in one split, or another seed"
            )
        # The chance is proportional to the free places, so that no split attracts the questions that share articles.
        chosen = generator.choices(open_to, weights=[room[name] for name in open_to])[0]
        room[chosen] -= len(group)
        home.update((question.id, chosen) for question in group)
    return {split: [question for question in questions if home[question.id] == split] for split in splits}


def training_questions(
    questions: list[_Question], others: list[_Question], count: int | None, seed: int
) -> tuple[list[_Question], Counter[str]]:
    """``count`` questions of the training part drawn at random (null: all) in their order, and, by reason, how many are
    left out: those that are among ``others``, those with a passage of an article of theirs, those beyond ``count``.

    Raises:
        ConfigError: fewer are left than wanted, or none.
    """
    taken = {key for question in others for key in _keys(question)}
    left: list[_Question] = []
    dropped: Counter[str] = Counter()
    for question in questions:
        shared = {kind for kind, _ in taken.intersection(_keys(question))}
        if "question" in shared:
            dropped["with a question of source.files"] += 1
        elif shared:
            dropped["with an article of source.files"] += 1
        else:
            left.append(question)
    wanted = max(1, len(left)) if count is None else count
    if wanted > len(left):
        raise ConfigError(
            f"source.questions.train: expected at most {len(left)} questions, those of source.train_part that share no "
            f"question and no article with source.files, found {wanted}; lower it, or null for all of them"
        )
    if wanted < len(left):
        dropped["beyond source.questions.train"] = len(left) - wanted
        left = [left[index] for index in sorted(random.Random(seed).sample(range(len(left)), wanted))]
    return left, dropped


# --- records ----------------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """White space collapsed: a run of it (line ends and no-break spaces too) is one space, none at the ends."""
    return " ".join(text.split())


def make_prompt(question: _Question, prompt_words: int) -> str:
    """The question, whole, then passages in their order, cut after the last sentence within ``prompt_words`` words.

    The first sentence that does not fit ends the prompt: what a prompt holds is a beginning, without gaps. A title
    is given only with at least one sentence. Articles open with their title and an empty line; that is given once.

    Raises:
        InputError: the question alone is longer than the budget.
    """
    head = f"Question: {_one_line(question.record.question)}"
    free = prompt_words - len(head.split()) - 1  # 1: "Answer:"
    if free < 0:
        raise InputError(
            f"{question.where}: field `question`: expected at most prompt_words = {prompt_words} words with "
            f"`Question:` and `Answer:`, found {prompt_words - free}; raise source.prompt_words"
        )
    blocks = [head]
    for raw_title, *sentences in question.record.passages:
        title = _one_line(raw_title)
        texts = [_one_line(sentence.removeprefix(f"{raw_title}\n\n")) for sentence in sentences]
        texts = [text for text in texts if text]
        free -= len(title.split())
        kept: list[str] = []
        for text in texts:
            free -= len(text.split())
            if free < 0:
                break
            kept.append(text)
        if kept:
            blocks.append(f"{title}: {' '.join(kept)}")
        if free < 0:
            break
    return "\n\n".join([*blocks, "Answer:\n"])


def correction(question: _Question, prompt: str) -> Edit | None:
    """Prediction 1 and its human correction, or None without one.

    None when the texts differ in white space only, or when the correction is blank (people found nothing to keep; an
    empty response is no revision to learn from). The initial text is untouched, because the error spans count its
    characters; white space in the correction is collapsed, because deleting a span by hand often left two spaces.
    """
    initial, revised = question.record.prediction_1, _one_line(question.record.feedback.corrected)
    if not revised or revised == _one_line(initial):
        return None
    return Edit(id=question.id, prompt=prompt, initial=initial, revised=revised)


def preferences(question: _Question, prompt: str) -> list[Preference]:
    """The human comparisons with a winner, ids like ``dev-0017/12``; ties and identical texts are left out."""
    texts = question.record.predictions
    found = []
    for (first, second), code in zip(COMPARISONS, question.record.preference, strict=True):
        pair = texts[first - 1], texts[second - 1]
        if code == 0 or pair[0] == pair[1]:
            continue
        chosen, rejected = pair if code == 1 else pair[::-1]
        found.append(Preference(id=f"{question.id}/{first}{second}", prompt=prompt, chosen=chosen, rejected=rejected))
    return found


def best_prediction(record: QARecord) -> str:
    """The answer with most wins in the six comparisons, a tie counting half; of equals, the one with lower number."""
    points = [0.0] * 4
    for (first, second), code in zip(COMPARISONS, record.preference, strict=True):
        points[first - 1] += {0: 0.5, 1: 1.0, 2: 0.0}[code]
        points[second - 1] += {0: 0.5, 1: 0.0, 2: 1.0}[code]
    return record.predictions[points.index(max(points))]


def demonstration(question: _Question, prompt: str, kind: str) -> Demonstration | None:
    """The answer to imitate (see ``QAFeedbackConfig.demonstrations``); None when the corrected text is blank."""
    record = question.record
    answers = {"best": best_prediction(record), "gold": record.gold, "corrected": record.feedback.corrected}
    completion = _one_line(answers[kind])
    return Demonstration(id=question.id, prompt=prompt, completion=completion) if completion else None


def marks(question: _Question) -> GoldMarks:
    """The human error spans on prediction 1, by position."""
    spans = sorted(question.record.feedback.errors, key=lambda span: (span.start, span.end))
    return GoldMarks(
        id=question.id,
        side="initial",
        text=question.record.prediction_1,
        spans=[Span(start=span.start, end=span.end, type=span.error_type) for span in spans],
    )


def _some(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def build(config: QAFeedbackConfig, root: Path) -> RawData:
    """Read QA-Feedback and split it.

    Every split gets prompts, preferences and corrections; train and validation get demonstrations too. The references
    of train are the gold answers to the questions with a correction. Truth is given for validation and test: the
    reference is prediction 1, the answer of the data set's own model that people corrected; the gold answer is the
    data set's; marks exist for the questions with a correction.

    Raises:
        InputError: a file cannot be had or is not what it has to be.
        ConfigError: the sizes of the splits do not suit the data.
    """
    part = config.train_part
    files = [*config.files, *([part] if part else [])]
    paths = locate(files, config, root)
    read = [read_qa_file(path, file.prefix) for file, path in zip(files, paths, strict=True)]
    questions = [question for file in read[: len(config.files)] for question in file]
    if part is None:
        splits = split_questions(questions, config.questions, config.seed)
    else:
        published = read[-1]
        if part.rows not in (None, len(published)):
            raise InputError(
                f"{paths[-1]}: expected {part.rows:,} questions, found {len(published):,}; fetch the published file "
                "again, or correct source.train_part.rows (null: any number) if the data is meant to differ"
            )
        training, dropped = training_questions(published, questions, config.questions.train, config.seed)
        report(part.name, len(published), dropped)
        splits = {"train": training}
        splits |= split_questions(questions, config.questions, config.seed, ("validation", "test"))
    data = RawData(splits={}, truth={})
    for split, members in splits.items():
        prompts = {question.id: make_prompt(question, config.prompt_words) for question in members}
        corrections = {question.id: correction(question, prompts[question.id]) for question in members}
        raw, truth = RawSplit(), Truth()
        raw.prompts = [Prompt(id=id_, prompt=prompt) for id_, prompt in prompts.items()]
        raw.corrections = _some(list(corrections.values()))
        raw.preferences = [pair for question in members for pair in preferences(question, prompts[question.id])]
        if split != "test":
            raw.demonstrations = _some(
                [demonstration(question, prompts[question.id], config.demonstrations) for question in members]
            )
        if split == "train":
            raw.references = [
                Demonstration(id=question.id, prompt=prompts[question.id], completion=_one_line(question.record.gold))
                for question in members
                if corrections[question.id]
            ]
        else:
            truth.references = [
                Reference(
                    id=question.id,
                    prompt=prompts[question.id],
                    reference=question.record.prediction_1,
                    gold=_one_line(question.record.gold),
                )
                for question in members
            ]
            truth.marks = [marks(question) for question in members if corrections[question.id]]
        data.splits[split], data.truth[split] = raw, truth
    return data
