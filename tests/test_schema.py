"""Records: what is accepted, and that bad input is one error with file, line, field, expected and found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fgalign.core.schema import (
    CurveSample,
    Edit,
    GoldMarks,
    LabelledPair,
    Preference,
    Prompt,
    Reference,
    Sample,
    Span,
    parse_record,
    read_records,
    write_records,
)
from fgalign.errors import FgalignError, RecordError

EDIT = {"id": "a", "prompt": "p", "initial": "bad one", "revised": "good one"}
PAIR = {
    "id": "a",
    "prompt_ids": [5],
    "initial_ids": [6, 1],
    "initial_labels": [-1, 0],
    "revised_ids": [7, 1],
    "revised_labels": [1, 0],
}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def failure(path: Path, kind: type) -> str:
    with pytest.raises(RecordError) as caught:
        read_records(path, kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_was_written_is_read(tmp_path):
    records = [
        Edit(id="1", prompt="Wo?", initial="in Köln", revised="in\u2028Berlin 😀"),
        Edit(id="2", prompt="p", initial=" a", revised="a"),
    ]
    path = tmp_path / "deep" / "edits.jsonl"
    assert write_records(path, records) == 2
    assert read_records(path, Edit) == records
    assert path.read_bytes().count(b"\n") == 2  # a line separator inside a text is not the end of a line


def test_malformed_line(tmp_path):
    message = failure(lines(tmp_path / "e.jsonl", EDIT, '{"id": "b", '), Edit)
    assert message.startswith(f"{tmp_path / 'e.jsonl'}:2: not JSON")
    assert "expected one Edit object a line" in message


def test_blank_line(tmp_path):
    assert failure(lines(tmp_path / "e.jsonl", EDIT, ""), Edit).startswith(f"{tmp_path / 'e.jsonl'}:2: not JSON")


def test_not_utf8(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(json.dumps(EDIT).encode() + b'\n{"id": "\xff"}\n')
    message = failure(path, Edit)
    assert message.startswith(f"{path}:2: not UTF-8")


def test_not_an_object(tmp_path):
    message = failure(lines(tmp_path / "e.jsonl", "[1, 2]"), Edit)
    assert message.startswith(f"{tmp_path / 'e.jsonl'}:1: ")
    assert "found [1, 2]" in message and "expected the fields id, prompt, initial, revised" in message


@pytest.mark.parametrize(
    ("change", "field", "found"),
    [
        ({"extra": 3}, "extra", "found 3"),  # unknown field
        ({"revised": 7}, "revised", "found 7"),  # wrong type
        ({"revised": ""}, "revised", "found ''"),  # empty answer
        ({"revised": " \n"}, "revised", "found ' \\n'"),  # an answer of white space alone is empty
        ({"revised": None}, "revised", "found None"),
        ({"initial": "good one"}, "record", "identical to initial"),  # identical edit
    ],
)
def test_bad_field(tmp_path, change, field, found):
    message = failure(lines(tmp_path / "e.jsonl", EDIT, {**EDIT, "id": "b", **change}), Edit)
    assert message.startswith(f"{tmp_path / 'e.jsonl'}:2: field `{field}` of a Edit record: ")
    assert found in message
    assert message.endswith("expected the fields id, prompt, initial, revised")


def test_missing_field(tmp_path):
    message = failure(lines(tmp_path / "e.jsonl", {"id": "a", "prompt": "p", "initial": "x"}), Edit)
    assert f"{tmp_path / 'e.jsonl'}:1: field `revised` of a Edit record: Field required; expected the fields" in message


def test_long_value_is_shortened(tmp_path):
    message = failure(lines(tmp_path / "e.jsonl", {**EDIT, "revised": ["x" * 500]}), Edit)
    assert len(message.removeprefix(str(tmp_path))) < 250


def test_identical_preference():
    with pytest.raises(RecordError, match=r"^here: .*same text"):
        parse_record(Preference, {"id": "a", "prompt": "p", "chosen": "x", "rejected": "x"}, "here")


def test_duplicate_id(tmp_path):
    rows = [EDIT, {**EDIT, "id": "b"}, {**EDIT, "revised": "other"}]
    message = failure(lines(tmp_path / "e.jsonl", *rows), Edit)
    assert message == f"{tmp_path / 'e.jsonl'}:3: id 'a' was used before, at line 1; ids must be unique"


@pytest.mark.parametrize("other", [{"seed": 2}, {"update": 5}])
def test_the_same_id_at_another_seed_or_update_is_no_duplicate(tmp_path, other):
    row = {
        "id": "a", "seed": 1, "update": 0, "response_tokens": 0, "gradient_updates": 0, "prompt": "p", "response": "",
        "reward": 0.5, "kl": 0.0,
    }  # fmt: skip
    assert len(read_records(lines(tmp_path / "c.jsonl", row, {**row, **other}), CurveSample)) == 2
    assert ":2: id 'a' was used before" in failure(lines(tmp_path / "c.jsonl", row, row), CurveSample)


def test_the_same_id_on_the_other_side_is_no_duplicate(tmp_path):
    row = {"id": "a", "side": "initial", "text": "abc", "spans": []}
    assert len(read_records(lines(tmp_path / "m.jsonl", row, {**row, "side": "chosen"}), GoldMarks)) == 2


def test_missing_file(tmp_path):
    message = failure(tmp_path / "none.jsonl", Prompt)
    assert message.startswith(f"{tmp_path / 'none.jsonl'}: no such file; expected Prompt records")


def test_empty_file(tmp_path):
    path = lines(tmp_path / "e.jsonl")
    assert failure(path, Prompt) == f"{path}: no records; expected at least one Prompt"
    assert read_records(path, Prompt, empty_ok=True) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"initial_labels": [-1]}, "record"),  # one label too few
        ({"revised_labels": [1, 0, 0]}, "record"),  # one too many
        ({"initial_labels": [1, 0]}, "initial_labels.0"),  # nothing is good in an initial response
        ({"revised_labels": [0, -1]}, "revised_labels.1"),  # nothing is bad in a revised one
        ({"prompt_ids": []}, "prompt_ids"),
        ({"revised_ids": [], "revised_labels": []}, "revised_ids"),
        ({"initial_ids": [6.0, 1]}, "initial_ids.0"),  # strict: no number is rounded to an id
        ({"initial_ids": ["6", 1]}, "initial_ids.0"),
        ({"initial_ids": [True, 1]}, "initial_ids.0"),
    ],
)
def test_labelled_pair(change, where):
    assert parse_record(LabelledPair, PAIR, "here").initial_ids == [6, 1]
    with pytest.raises(RecordError, match=rf"^here: field `{where}` of a LabelledPair"):
        parse_record(LabelledPair, {**PAIR, **change}, "here")


@pytest.mark.parametrize(("start", "end", "fine"), [(0, 3, True), (2, 3, True), (2, 4, False), (1, 1, False)])
def test_spans_lie_inside_the_text(start, end, fine):
    value = {"id": "a", "side": "chosen", "text": "abc", "spans": [{"start": start, "end": end, "type": "rude"}]}
    if fine:
        assert parse_record(GoldMarks, value, "here").spans == [Span(start=start, end=end, type="rude")]
    else:
        with pytest.raises(RecordError, match=rf"span {start}\.\.{end} is not inside the text of 3 characters"):
            parse_record(GoldMarks, value, "here")


def test_an_empty_sampled_response_is_a_record():
    # A policy may say nothing; only data that people wrote must not be empty.
    sample = Sample(id="a", seed=1, prompt="p", response="", tokens=1, truncated=False, kl=0.0, rewards={})
    assert sample.response == ""


def test_records_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Reference(id="a", prompt="p", reference="r").reference = "s"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, value):
    path = lines(tmp_path / "s.jsonl", "before")
    bad = Sample(id="a", seed=1, prompt="p", response="r", tokens=1, truncated=False, kl=value, rewards={})
    good = bad.model_copy(update={"kl": 0.0})
    with pytest.raises(FgalignError, match=r"s\.jsonl: .*'a'.*(nan|inf)"):
        write_records(path, [good, bad])
    assert path.read_text() == "before\n"
    assert [file.name for file in tmp_path.iterdir()] == ["s.jsonl"]


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_number_that_is_not_finite_is_not_read(tmp_path, value):
    row = '{"id": "a", "seed": 1, "prompt": "p", "response": "r", "tokens": 1, "truncated": false, "rewards": {}, '
    message = failure(lines(tmp_path / "s.jsonl", row + f'"kl": {value}' + "}"), Sample)
    assert message.startswith(f"{tmp_path / 's.jsonl'}:1: ")


def test_an_error_while_records_are_made_leaves_the_old_file(tmp_path):
    path = lines(tmp_path / "e.jsonl", EDIT)
    before = path.read_bytes()

    def records():
        yield Edit(**EDIT)
        raise RuntimeError("the annotator broke")

    with pytest.raises(RuntimeError, match="the annotator broke"):
        write_records(path, records())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["e.jsonl"]
