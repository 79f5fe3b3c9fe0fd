"""The source of one's own edits, on a sample written here: what each row becomes, splits, faults by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgalign.config import Profile, parse_section
from fgalign.core.raw_data import RawData, read_split
from fgalign.core.schema import SPLITS, Demonstration, Edit, LabelledPair, Preference, Prompt, Reference, read_records
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.evaluation.truth import read_truth
from fgalign.sources import get_source
from fgalign.stages.data import run_edits, run_labels, run_raw


def edit(prompt: str, initial: str = "the dog sat", revised: str = "the cat sat", **more: object) -> dict:
    return {"prompt": prompt, "initial": initial, "revised": revised, **more}


TRAIN = [
    edit("a", "a dog", "a cat", reference="one cat"),
    edit("b", "red mat", "brown mat", id="mine", preferred="the brown mat"),
    edit("a", "the dog", "a cat"),
]
VALIDATION = [edit("v", "a log", "a mat", reference="the mat")]
TEST = [
    edit("t", "is red", "is brown", reference="brown it is"),
    edit("t", "are red", "are brown", reference="brown they are"),
    edit("u", "is here", "is there", reference="there"),
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def folder(root: Path, **changes: list[dict]) -> Path:
    for split, rows in ({"train": TRAIN, "validation": VALIDATION, "test": TEST} | changes).items():
        write(root / "mine" / f"{split}.jsonl", rows)
    return root / "mine"


def make(root: Path, local: str = "mine", **options: object) -> RawData:
    source = get_source("edit_dataset")
    return source.build(parse_section({"local": local, **options}, source.config, "params.yaml: source"), root)


def test_what_a_row_becomes(tmp_path):
    folder(tmp_path)
    data = make(tmp_path)
    train, test = data.splits["train"], data.splits["test"]
    assert train.prompts == [Prompt(id="train-00000", prompt="a"), Prompt(id="mine", prompt="b")]
    assert train.corrections == [
        Edit(id="train-00000", prompt="a", initial="a dog", revised="a cat"),
        Edit(id="mine", prompt="b", initial="red mat", revised="brown mat"),
        Edit(id="train-00002", prompt="a", initial="the dog", revised="a cat"),
    ]
    # What is preferred, else the revision, before the initial response.
    assert train.preferences == [
        Preference(id="train-00000", prompt="a", chosen="a cat", rejected="a dog"),
        Preference(id="mine", prompt="b", chosen="the brown mat", rejected="red mat"),
        Preference(id="train-00002", prompt="a", chosen="a cat", rejected="the dog"),
    ]
    # The third row has the first one's prompt and revision.
    assert train.demonstrations == [
        Demonstration(id="train-00000", prompt="a", completion="a cat"),
        Demonstration(id="mine", prompt="b", completion="brown mat"),
    ]
    assert train.references == [Demonstration(id="train-00000", prompt="a", completion="one cat")]
    assert len(test.preferences) == len(test.corrections) == 3 and test.demonstrations == []
    assert data.truth["train"].references == []
    assert data.truth["validation"].references == [
        Reference(id="validation-00000", prompt="v", reference="a log", gold="the mat")
    ]
    # One a prompt: the first row's.
    assert data.truth["test"].references == [
        Reference(id="test-00000", prompt="t", reference="is red", gold="brown it is"),
        Reference(id="test-00002", prompt="u", reference="is here", gold="there"),
    ]


def test_without_references_there_is_no_gold_answer(tmp_path):
    folder(tmp_path, validation=[edit("v")], test=[edit("t")])
    data = make(tmp_path)
    assert [record.gold for record in data.truth["test"].references] == [None]
    assert data.splits["test"].references == []


def test_references_to_imitate(tmp_path):
    folder(tmp_path, train=[TRAIN[0]])
    data = make(tmp_path, demonstrations="reference")
    assert [record.completion for record in data.splits["train"].demonstrations] == ["one cat"]
    assert [record.completion for record in data.splits["validation"].demonstrations] == ["the mat"]
    folder(tmp_path)
    with pytest.raises(InputError, match=r"mine/train\.jsonl:2: field `reference`: expected an answer to imitate"):
        make(tmp_path, demonstrations="reference")


def test_one_file_is_split_by_prompt(tmp_path):
    # The order of the prompts is d, a, b, c (tests/test_hub_sources.py); D! goes where d is.
    write(tmp_path / "edits.jsonl", [edit(prompt) for prompt in ("a", "b", "c", "d", "D!")])
    data = make(tmp_path, "edits.jsonl", n_validation=1, n_test=1)
    ids = [[record.id for record in data.splits[split].corrections] for split in SPLITS]
    assert ids == [["edits-00001", "edits-00002"], ["edits-00000"], ["edits-00003", "edits-00004"]]
    assert [len(data.splits[split].prompts) for split in SPLITS] == [2, 1, 2]
    fewer = make(tmp_path, "edits.jsonl", n_train=1, n_validation=1, n_test=1)
    assert [record.prompt for record in fewer.splits["train"].prompts] == ["b"]
    with pytest.raises(ConfigError, match=r"source\.n_test: expected a number, as source\.local is one file, found nu"):
        make(tmp_path, "edits.jsonl", n_validation=1)
    with pytest.raises(
        ConfigError, match=r"4 different prompts can fill, found train at least 1, validation 2, test 2"
    ):
        make(tmp_path, "edits.jsonl", n_validation=2, n_test=2)


def test_a_part_of_a_folder(tmp_path):
    folder(tmp_path, train=[edit(prompt) for prompt in ("a", "b", "c", "d", "D!")])
    data = make(tmp_path, n_train=2, n_test=2)
    assert [record.prompt for record in data.splits["train"].corrections] == ["a", "d", "D!"]
    assert len(data.splits["test"].corrections) == 3
    with pytest.raises(ConfigError, match=r"source\.n_test: expected at most the 2 different prompts of the data, fou"):
        make(tmp_path, n_test=3)


def test_a_prompt_in_two_splits(tmp_path):
    folder(tmp_path, test=[*TEST, edit("V.")])
    with pytest.raises(InputError, match=r"mine/test\.jsonl:4: field `prompt`: .* found that of .*validation\.jsonl:1"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "initial": "y"}, r"field `revised` of a EditRow record: Field required"),
        (edit("x", id=3), r"field `id` of a EditRow record: .*string, found 3"),
        (edit(" "), r"field `prompt` of a EditRow record: "),
        (edit("x", "same", "same"), r"revised is identical to initial: leave out responses that need no edit"),
        (edit("x", preferred="the dog sat"), r"preferred is identical to initial: leave it out where no other"),
        (
            edit("x", edited="y"),
            r"field `edited` of a EditRow record: .*; expected the fields id, prompt, initial, rev",
        ),
        (edit("x", id="mine"), r"id 'mine' was used before, at .*train\.jsonl:2; ids must be unique"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    folder(tmp_path, test=[*TEST, row])
    with pytest.raises(RecordError, match=rf"mine/test\.jsonl:4: .*{message}"):
        make(tmp_path)


def test_some_references_are_found_before_the_judge_misses_one(tmp_path):
    folder(tmp_path, test=[*TEST, edit("w")])
    with pytest.raises(InputError, match=r"test\.jsonl:4: field `reference`: expected one for every prompt of the val"):
        make(tmp_path)
    folder(tmp_path, test=[*TEST, edit("u")])  # another edit of a prompt that has one
    assert len(make(tmp_path).truth["test"].references) == 2


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"mine: no such file or folder, although source\.local names it"):
        make(tmp_path)
    place = folder(tmp_path)
    (place / "test.jsonl").rename(place / "tests.jsonl")
    with pytest.raises(
        InputError, match=r"mine: expected one file for the test split, such as test\.jsonl, found none"
    ):
        make(tmp_path)
    write(place / "test.jsonl", TEST)
    write(place / "test.json", TEST)
    with pytest.raises(InputError, match=r"for the test split, .* found test\.json and test\.jsonl"):
        make(tmp_path)
    (place / "test.json").unlink()
    write(place / "test.jsonl", [])
    with pytest.raises(InputError, match=r"test\.jsonl: expected at least one edit, found none"):
        make(tmp_path)
    with pytest.raises(InputError, match=r"train\.jsonl: checksum mismatch"):
        make(tmp_path, sha256={"train.jsonl": "0" * 64})
    with pytest.raises(ConfigError, match=r"source\.sha256: expected files that are read \(train\.jsonl, .*'x\.json'"):
        make(tmp_path, sha256={"x.json": "0" * 64})


def test_null_is_no_value(tmp_path):
    import pyarrow
    import pyarrow.parquet

    place = folder(tmp_path)
    (place / "train.jsonl").unlink()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([edit("a", id=None, reference=None)]), place / "train.parquet"
    )
    (found,) = make(tmp_path).splits["train"].corrections
    assert found.id == "train-00000"


def test_the_stages_raw_edits_and_labels_run_on_it(tmp_path, tokenizer, capsys):
    folder(tmp_path)
    params = {
        "source": {"name": "edit_dataset", "local": "mine"},
        "annotator": {"name": "replay"},
        "labels": {"unit": "word"},
    }
    profile = Profile("p", tmp_path, params, tmp_path / "params.yaml")
    tokenizer.save_pretrained(profile.data / "models" / "base")
    run_raw(profile)
    run_edits(profile)
    run_labels(profile)
    for split, rows in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        edits = read_records(profile.data / "edits" / f"{split}.jsonl", Edit)
        assert edits == read_split(profile.data / "raw" / split).corrections
        assert [(found.initial, found.revised) for found in edits] == [(row["initial"], row["revised"]) for row in rows]
    assert read_truth(profile.data / "gold" / "test").references[0].gold == "brown it is"
    pair = read_records(profile.data / "labels" / "train.jsonl", LabelledPair)[1]

    def marked(side: str, label: int) -> str:
        ids, labels = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_labels")
        return tokenizer.decode([id_ for id_, found in zip(ids, labels, strict=True) if found == label])

    # "red mat" became "brown mat".
    assert (marked("initial", -1).strip(), marked("revised", 1).strip()) == ("red", "brown")
    assert "test: 3 edits" in capsys.readouterr().out
