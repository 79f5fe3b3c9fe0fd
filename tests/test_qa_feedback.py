"""QA-Feedback in its published format: a sample written for these tests, and the real file where it is at hand."""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
from pathlib import Path

import pytest

from fgalign.annotate.replay import ReplayConfig, annotate
from fgalign.config import parse_section
from fgalign.core.raw_data import RawSplit, read_split, write_raw
from fgalign.core.schema import Prompt
from fgalign.errors import ConfigError, InputError, RecordError
from fgalign.evaluation.truth import read_truth
from fgalign.io import sha256
from fgalign.sources.qa_feedback import (
    DOWNLOADS,
    FOLDER_VARIABLE,
    QAFeedbackConfig,
    QAFile,
    best_prediction,
    build,
    correction,
    make_prompt,
    marks,
    parse_qa_record,
    preferences,
    read_qa_file,
    split_questions,
    training_questions,
)

SAMPLE = Path(__file__).parent / "data" / "qa_feedback" / "sample_feedback.json"
TRAIN = SAMPLE.parent / "train_feedback.json"
REAL_FOLDER = os.environ.get(FOLDER_VARIABLE)


@pytest.fixture(autouse=True)
def _no_named_folder(monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


@pytest.fixture
def questions():
    return read_qa_file(SAMPLE, "sample")


@pytest.fixture
def raw_record():
    return json.loads(SAMPLE.read_text(encoding="utf-8"))[0]


def sample_config(**changes) -> QAFeedbackConfig:
    values = {
        "folder": str(SAMPLE.parent),
        "files": [{"name": SAMPLE.name, "sha256": sha256(SAMPLE), "url": SAMPLE.as_uri()}],
        "questions": {"train": 3, "validation": 2, "test": 2},
        **changes,
    }
    return QAFeedbackConfig.model_validate(values)


# --- one record -------------------------------------------------------------------------------------------------------


def test_ids_count_from_zero_in_the_order_of_the_file(questions):
    assert [question.id for question in questions] == [f"sample-000{number}" for number in range(7)]


# Words of record 0: "Question: What colour is the sky?" 6, "Answer:" 1; "Sky:" 1, "The sky is blue by day." 6,
# "It is black at night." 5; "Rayleigh scattering:" 2, "Blue light scatters most." 4. Sums: 7, 14, 19, 25.
HEAD = "Question: What colour is the sky?"
FIRST, SECOND = "Sky: The sky is blue by day.", "Rayleigh scattering: Blue light scatters most."
NIGHT = " It is black at night."


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        (7, [HEAD]),
        (13, [HEAD]),
        (14, [HEAD, FIRST]),
        (18, [HEAD, FIRST]),
        (19, [HEAD, FIRST + NIGHT]),
        (24, [HEAD, FIRST + NIGHT]),
        (25, [HEAD, FIRST + NIGHT, SECOND]),
        (999, [HEAD, FIRST + NIGHT, SECOND]),
    ],
)
def test_prompt_is_cut_after_the_last_sentence_that_fits(questions, words, blocks):
    prompt = make_prompt(questions[0], words)
    assert prompt == "\n\n".join([*blocks, "Answer:\n"])
    assert len(prompt.split()) <= words


def test_a_later_shorter_sentence_does_not_jump_the_queue(questions):
    # Record 5: "Question: Where is the summit of Everest?" 7, "Answer:" 1, "Mount Everest:" 2 and its only sentence 10:
    # 20 in all; 19 leaves the sentence out, and with it the title.
    assert "Mount Everest" in make_prompt(questions[5], 20)
    assert "Mount Everest" not in make_prompt(questions[5], 19)
    # Record 2: 4 + 1 + 2 + "He was born in Stratford." 5 = 12, then "He wrote Hamlet." 3. With 11 words the second
    # sentence alone would fit (10), but it comes after one that does not.
    assert make_prompt(questions[2], 11) == "Question: who wrote hamlet\n\nAnswer:\n"


def test_prompt_refuses_a_budget_below_the_question(questions):
    with pytest.raises(InputError, match=r"record 0: field `question`: expected at most prompt_words = 6 .*, found 7;"):
        make_prompt(questions[0], 6)


def test_edit_keeps_the_initial_text_and_collapses_white_space_of_the_correction(questions):
    edit = correction(questions[0], "p")
    assert edit.id == "sample-0000"
    assert edit.initial == "The sky is blue. The sky is green. It is nice."
    assert edit.revised == "The sky is blue. It is black at night."


def test_no_edit_without_a_difference_or_without_a_text(questions):
    # 1: identical; 3: blank correction; 4: two spaces and a trailing one are the only difference.
    assert [question.id for question in questions if correction(question, "p") is None] == [
        "sample-0001",
        "sample-0003",
        "sample-0004",
    ]


def test_marks_are_the_flawed_characters_of_prediction_1_by_position(questions):
    truth = marks(questions[0])
    assert [(truth.text[span.start : span.end], span.type) for span in truth.spans] == [
        ("The sky is green.", "Wrong-Grounding"),
        ("It is nice.", "Irrelevant"),
    ]
    assert marks(questions[5]).spans == []


def test_preference_codes_name_the_winner_of_the_documented_pairs(questions):
    one, two, three, four = questions[0].record.predictions
    # Codes 1 2 0 2 0 1 for 12 13 14 23 24 34.
    assert [(pair.id, pair.chosen, pair.rejected) for pair in preferences(questions[0], "p")] == [
        ("sample-0000/12", one, two),
        ("sample-0000/13", three, one),
        ("sample-0000/23", three, two),
        ("sample-0000/34", three, four),
    ]


def test_ties_and_identical_texts_are_no_preferences(questions):
    # Record 6: five ties, and a winner between two identical texts.
    assert preferences(questions[6], "p") == []


def test_best_prediction_wins_most_comparisons(questions):
    # Record 0: 12 -> 1; 13 -> 3; 14 tie; 23 -> 3; 24 tie; 34 -> 3. Points 1.5, 0.5, 3, 1.
    assert best_prediction(questions[0].record) == questions[0].record.prediction_3
    # Record 3: 12 -> 2; 13, 14 ties; 23, 24 -> 2; 34 tie. Points 1, 3, 1, 1.
    assert best_prediction(questions[3].record) == questions[3].record.prediction_2
    # Record 5: 12 tie; 13, 14 -> 1; 23, 24 -> 2; 34 -> 3. Points 2.5, 2.5, 1, 0: the lower number wins.
    assert best_prediction(questions[5].record) == questions[5].record.prediction_1


# --- malformed records ------------------------------------------------------------------------------------------------

BREAKAGES = {
    "missing field": (lambda r: r.pop("gold"), "field `gold`: expected the field to be there"),
    "unknown field": (lambda r: r.update(note="x"), "field `note`: expected only the fields of the published format"),
    "wrong type": (lambda r: r.update({"prediction 1": 5}), r"field `prediction 1`: expected a valid string, found 5"),
    "blank text": (lambda r: r.update(question=" "), r"field `question`: expected a text that is not blank, found ' '"),
    "number as text": (
        lambda r: r["feedback"]["errors"][0].update(start="35"),
        r"field `feedback.errors.0.start`: expected a valid integer, found '35'",
    ),
    "unknown error type": (
        lambda r: r["feedback"]["errors"][1].update({"error type": "Rude"}),
        r"field `feedback.errors.1.error type`: expected 'Irrelevant', .*, found 'Rude'",
    ),
    "five comparisons": (lambda r: r["preference"].pop(), r"field `preference`: expected at least 6 items.*, found \["),
    "comparison code": (
        lambda r: r["preference"].__setitem__(2, 3),
        r"field `preference.2`: expected 0, 1 or 2, found 3",
    ),
    "passage without title": (lambda r: r["passages"].append([]), r"field `passages.2`: expected at least 1 item"),
    "span past the end": (
        lambda r: r["feedback"]["errors"][0].update(end=47),
        r"field `feedback.errors.0`: expected a span inside the 46 characters .* found start 35 and end 47",
    ),
    "empty span": (
        lambda r: r["feedback"]["errors"][0].update(end=35),
        r"field `feedback.errors.0`: expected a span inside .* found start 35 and end 35",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_malformed_record_is_one_error_with_file_record_and_field(raw_record, tmp_path, name):
    damage, message = BREAKAGES[name]
    good = copy.deepcopy(raw_record)
    damage(raw_record)
    path = tmp_path / "bad_feedback.json"
    path.write_text(json.dumps([good, raw_record]), encoding="utf-8")
    with pytest.raises(RecordError, match=r"bad_feedback\.json: record 1: " + message) as caught:
        read_qa_file(path, "bad")
    assert "\n" not in str(caught.value)


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(RecordError, match=r"f: record 0: field `record`: expected .*, found \[\]"):
        parse_qa_record([], "f: record 0")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "expected a list of at least one record"), ("{}", "found dict"), ("[\n{", r"x\.json:2: not JSON")],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_qa_file(path, "x")


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_same_question_and_same_article_share_a_split(questions, seed):
    splits = split_questions(questions, sample_config().questions, seed)
    home = {question.id: split for split, members in splits.items() for question in members}
    assert {split: len(members) for split, members in splits.items()} == {"train": 3, "validation": 2, "test": 2}
    assert len(home) == 7
    assert home["sample-0001"] == home["sample-0002"]  # "Who wrote Hamlet?" and "who wrote  hamlet"
    assert home["sample-0004"] == home["sample-0005"]  # both read the article Mount Everest


def test_the_seed_decides_the_splits(questions):
    drawn = {
        tuple(question.id for question in split_questions(questions, sample_config().questions, seed)["test"])
        for seed in range(20)
    }
    assert len(drawn) > 3
    assert split_questions(questions, sample_config().questions, 4) == split_questions(
        questions, sample_config().questions, 4
    )


def test_too_many_questions_are_refused(questions):
    config = sample_config(questions={"train": 4, "validation": 2, "test": 2})
    with pytest.raises(
        ConfigError, match=r"at most the 7 questions of the data, found 8 \(train 4, validation 2, test 2"
    ):
        split_questions(questions, config.questions, 0)


def test_groups_that_fit_nowhere_are_refused(questions):
    config = sample_config(questions={"train": 1, "validation": 1, "test": 1})
    two_of_one = questions[1:3] + questions[6:]  # the two Hamlet questions and one more, for three splits of one
    with pytest.raises(ConfigError, match=r"2 questions that belong together \(among them sample-0001\) fit no split"):
        split_questions(two_of_one, config.questions, 0)


# --- the whole source -------------------------------------------------------------------------------------------------


def test_build_fills_each_split_with_what_it_may_hold(tmp_path):
    data = build(sample_config(), tmp_path)
    for split, raw in data.splits.items():
        ids = [prompt.id for prompt in raw.prompts]
        assert [demo.id for demo in raw.demonstrations] == ([] if split == "test" else ids)
        assert raw.corpus == []
        truth = data.truth[split]
        assert [reference.id for reference in truth.references] == ([] if split == "train" else ids)
        assert [m.id for m in truth.marks] == ([] if split == "train" else [edit.id for edit in raw.corrections])
        # What training may read as a reference: an answer for each edit of the training split.
        assert [r.id for r in raw.references] == ([e.id for e in raw.corrections] if split == "train" else [])
        by_id = {edit.id: edit for edit in raw.corrections}
        assert all(m.text == by_id[m.id].initial for m in truth.marks)
        assert all(pair.prompt in {prompt.prompt for prompt in raw.prompts} for pair in raw.preferences)
    assert sum(len(raw.corrections) for raw in data.splits.values()) == 4  # 7 less records 1, 3 and 4
    # Without ties and identical texts: 4 + 6 + 3 + 3 + 6 + 5 + 0.
    assert sum(len(raw.preferences) for raw in data.splits.values()) == 27
    write_raw(data, tmp_path / "raw", tmp_path / "gold")
    assert read_split(tmp_path / "raw" / "test") == data.splits["test"]
    assert read_truth(tmp_path / "gold" / "test") == data.truth["test"]


def test_references_are_prediction_1_and_the_gold_answer(tmp_path, questions):
    records = {question.id: question.record for question in questions}
    for reference in build(sample_config(), tmp_path).truth["test"].references:
        assert reference.reference == records[reference.id].prediction_1
        assert reference.gold == records[reference.id].gold.strip()


def test_references_of_training_are_the_gold_answers(tmp_path, questions):
    records = {question.id: question.record for question in questions}
    found = [r for seed in range(10) for r in build(sample_config(seed=seed), tmp_path).splits["train"].references]
    assert found
    for reference in found:
        assert reference.completion == records[reference.id].gold.strip()
        assert reference.prompt.startswith(f"Question: {' '.join(records[reference.id].question.split())}")


@pytest.mark.parametrize("kind", ["best", "gold", "corrected"])
def test_demonstrations_are_the_answers_of_the_kind_asked_for(tmp_path, questions, kind):
    expected = {
        "best": ["The sky is blue, and black at night.", "Shakespeare wrote Hamlet.", "Eight."],
        "gold": ["The sky is blue by day and black at night.", "William Shakespeare wrote Hamlet."],
        "corrected": ["The sky is blue. It is black at night.", "Shakespeare wrote Hamlet."],
    }[kind]
    expected = dict(zip(["sample-0000", "sample-0001", "sample-0003"], expected, strict=False))
    found = {}
    for seed in range(10):  # until each question has been outside the test split
        data = build(sample_config(demonstrations=kind, seed=seed), tmp_path)
        for split in ("train", "validation"):
            found.update({demo.id: demo.completion for demo in data.splits[split].demonstrations})
    assert {id_: found[id_] for id_ in expected} == expected
    assert ("sample-0003" in found) == (kind != "corrected")  # its corrected text is blank


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folders": "x"}, r"folders: no such key; did you mean folder\?"),
        ({"demonstrations": "worst"}, r"demonstrations: .*'best', 'gold' or 'corrected'"),
        ({"prompt_words": 0}, "prompt_words"),
        ({"files": []}, "files"),
        (
            {"files": [QAFile(name=name, sha256="0" * 64, url="u") for name in ("a.json", "a_feedback.json")]},
            "share ids",
        ),
    ],
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(change, QAFeedbackConfig, "params.yaml: source")


# --- files ------------------------------------------------------------------------------------------------------------


def test_folder_may_be_relative_to_the_root_and_the_variable_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / SAMPLE.name).write_bytes(SAMPLE.read_bytes())
    assert build(sample_config(folder="here"), tmp_path) == build(sample_config(), tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(SAMPLE.parent))
    assert build(sample_config(folder="nowhere"), tmp_path) == build(sample_config(folder="here"), tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, "nowhere")
    with pytest.raises(InputError, match=r"no such file, although FGALIGN_QA_FEEDBACK names its folder; put file:"):
        build(sample_config(), tmp_path)


def test_a_named_folder_without_the_file_is_an_error_and_nothing_is_fetched(tmp_path):
    with pytest.raises(InputError, match=r"no such file, although source\.folder names its folder"):
        build(sample_config(folder="nowhere"), tmp_path)
    assert not (tmp_path / DOWNLOADS).exists()


def test_without_a_folder_the_file_is_fetched_once(tmp_path):
    config = sample_config(folder=None)
    first = build(config, tmp_path)
    assert (tmp_path / DOWNLOADS / SAMPLE.name).read_bytes() == SAMPLE.read_bytes()
    gone = config.files[0].model_copy(update={"url": (tmp_path / "gone").as_uri()})
    assert build(config.model_copy(update={"files": [gone]}), tmp_path) == first


def test_a_failed_fetch_says_what_to_do_and_leaves_nothing(tmp_path):
    file = {"name": SAMPLE.name, "sha256": sha256(SAMPLE), "url": (tmp_path / "gone.json").as_uri()}
    with pytest.raises(
        InputError,
        match=r"gone\.json: cannot be fetched .*save it as .*sample_feedback\.json, or set FGALIGN_QA_FEEDBACK to a "
        r"folder that holds sample_feedback\.json$",
    ):
        build(sample_config(folder=None, files=[file]), tmp_path)
    assert not (tmp_path / DOWNLOADS).exists()


def test_a_connection_that_ends_early_is_a_failed_fetch(tmp_path, monkeypatch):
    class Short(io.BytesIO):
        def read(self, *_):
            raise http.client.IncompleteRead(b"[")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Short())
    with pytest.raises(InputError, match=r"cannot be fetched \(IncompleteRead"):
        build(sample_config(folder=None), tmp_path)
    assert not (tmp_path / DOWNLOADS).exists()


@pytest.mark.parametrize("folder", [None, str(SAMPLE.parent)])
def test_a_wrong_checksum_is_refused(tmp_path, folder):
    file = {"name": SAMPLE.name, "sha256": "0" * 64, "url": SAMPLE.as_uri()}
    with pytest.raises(InputError, match=f"checksum mismatch: expected sha256 {'0' * 64}, found {sha256(SAMPLE)}"):
        build(sample_config(folder=folder, files=[file]), tmp_path)
    assert not (tmp_path / DOWNLOADS).exists()


# --- the training part ------------------------------------------------------------------------------------------------

# Of the five questions of the training part, number 0 is one of the development part ("Who wrote Hamlet?") and number 2
# has a passage of one of its articles (Mount Everest). Numbers 1 and 3 share an article (Lima) with each other.
DEVELOPMENT = {f"sample-000{number}" for number in range(7)}


def both_parts(**changes) -> QAFeedbackConfig:
    values = {
        "train_part": {"sha256": sha256(TRAIN), "rows": 5},
        "questions": {"train": None, "validation": 4, "test": 3},
        **changes,
    }
    return sample_config(**values)


def ids(data, split: str) -> list[str]:
    return [prompt.id for prompt in data.splits[split].prompts]


@pytest.mark.parametrize("seed", range(5))
def test_the_training_part_alone_trains_and_the_development_part_alone_evaluates(tmp_path, capsys, seed):
    data = build(both_parts(seed=seed), tmp_path)
    assert list(data.splits) == list(data.truth) == ["train", "validation", "test"]
    assert ids(data, "train") == ["train-0001", "train-0003", "train-0004"]
    assert len(ids(data, "validation")) == 4 and len(ids(data, "test")) == 3
    assert {*ids(data, "validation"), *ids(data, "test")} == DEVELOPMENT
    assert capsys.readouterr().out == (
        "train_feedback.json: 5 rows read; left out: 1 with a question of source.files, "
        "1 with an article of source.files\n"
    )


def test_the_training_split_holds_what_the_training_part_says(tmp_path):
    train = build(both_parts(), tmp_path).splits["train"]
    assert [(edit.id, edit.initial, edit.revised) for edit in train.corrections] == [
        ("train-0001", "It is Cusco.", "It is Lima."),
        ("train-0004", "It has five. It is nice.", "It has four."),
    ]
    assert [(reference.id, reference.completion) for reference in train.references] == [
        ("train-0001", "The capital of Peru is Lima."),
        ("train-0004", "A violin has four strings."),
    ]
    # 1 and 4: codes 2 0 0 1 1 0. 3: 1 1 1 1 0 2.
    kept = {"0001": ("12", "23", "24"), "0003": ("12", "13", "14", "23", "34"), "0004": ("12", "23", "24")}
    assert [pair.id for pair in train.preferences] == [f"train-{id_}/{c}" for id_, codes in kept.items() for c in codes]
    assert [demo.completion for demo in train.demonstrations] == [
        "It is Lima.",
        "Ten million people live there.",
        "Four.",
    ]


def test_questions_of_no_split_are_left_out_of_training_too(tmp_path, capsys):
    small = both_parts(questions={"train": None, "validation": 1, "test": 1})
    for seed in range(5):
        assert ids(build(small.model_copy(update={"seed": seed}), tmp_path), "train") == [
            "train-0001",
            "train-0003",
            "train-0004",
        ]
    assert capsys.readouterr().out.count("1 with a question of source.files") == 5


def test_fewer_training_questions_are_drawn_with_the_seed_and_keep_their_order(questions):
    part = read_qa_file(TRAIN, "train")
    drawn = set()
    for seed in range(20):
        chosen, dropped = training_questions(part, questions, 2, seed)
        assert dropped["beyond source.questions.train"] == 1 and dropped.total() == 3
        assert training_questions(part, questions, 2, seed) == (chosen, dropped)
        drawn.add(tuple(question.id for question in chosen))
    assert drawn == {("train-0001", "train-0003"), ("train-0001", "train-0004"), ("train-0003", "train-0004")}


def test_more_training_questions_than_are_left_are_refused(tmp_path, questions):
    too_many = both_parts(questions={"train": 4, "validation": 4, "test": 3})
    with pytest.raises(
        ConfigError, match=r"^source\.questions\.train: expected at most 3 questions, .* found 4; lower"
    ):
        build(too_many, tmp_path)
    with pytest.raises(ConfigError, match=r"expected at most 0 questions, .* found 1"):
        training_questions(questions, questions, None, 0)
    too_many = both_parts(questions={"train": 1, "validation": 4, "test": 4})
    with pytest.raises(ConfigError, match=r"at most the 7 questions of the data, found 8 \(validation 4, test 4\)"):
        build(too_many, tmp_path)


def test_without_a_training_part_null_takes_what_is_left(tmp_path, questions):
    data = build(sample_config(questions={"train": None, "validation": 2, "test": 2}), tmp_path)
    assert data == build(sample_config(), tmp_path)  # 3, 2 and 2 of 7
    config = sample_config(questions={"train": None, "validation": 4, "test": 3})
    with pytest.raises(
        ConfigError, match=r"at most the 7 questions of the data, found 8 \(train 1, validation 4, test 3"
    ):
        split_questions(questions, config.questions, 0)


@pytest.mark.parametrize("folder", ["named", None])
def test_an_unknown_checksum_is_printed_to_be_pinned(tmp_path, capsys, folder):
    """In a folder that is named, and fetched."""
    (tmp_path / "named").mkdir()
    for path in (SAMPLE, TRAIN):
        (tmp_path / "named" / path.name).write_bytes(path.read_bytes())
    options = {"folder": folder, "train_part": {"url": (tmp_path / "named" / TRAIN.name).as_uri(), "rows": 5}}
    data = build(both_parts(**options), tmp_path)
    assert data == build(both_parts(), tmp_path)
    where = tmp_path / (folder or DOWNLOADS) / TRAIN.name
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{where}: not checked, no sha256 was given; to pin this file: source.train_part.sha256: {sha256(TRAIN)}"
    )
    assert where.read_bytes() == TRAIN.read_bytes()
    options["train_part"]["sha256"] = "0" * 64
    with pytest.raises(
        InputError, match=rf"train_feedback\.json: checksum mismatch: expected sha256 {'0' * 64}, found"
    ):
        build(both_parts(**options), tmp_path)


def test_a_fetched_training_part_that_is_no_json_is_not_saved(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html>", encoding="utf-8")
    options = {"folder": None, "train_part": {"url": page.as_uri()}}
    with pytest.raises(InputError, match=r"page\.html: expected JSON, found another content \(.*\); nothing saved"):
        build(both_parts(**options), tmp_path)
    assert not (tmp_path / DOWNLOADS / TRAIN.name).exists()


def test_a_named_folder_without_the_training_part_is_an_error(tmp_path):
    (tmp_path / SAMPLE.name).write_bytes(SAMPLE.read_bytes())
    with pytest.raises(
        InputError, match=r"train_feedback\.json: no such file, although source\.folder .*; put https://"
    ):
        build(both_parts(folder=str(tmp_path)), tmp_path)


def test_all_files_that_are_missing_are_named_at_once(tmp_path):
    file = {"name": SAMPLE.name, "sha256": sha256(SAMPLE), "url": (tmp_path / "a").as_uri()}
    options = {"files": [file], "train_part": {"url": (tmp_path / "b").as_uri()}}
    here = tmp_path / "here"
    with pytest.raises(InputError) as error:
        build(both_parts(folder="here", **options), tmp_path)
    assert str(error.value) == (
        f"{here}/sample_feedback.json and {here}/train_feedback.json: no such file, although source.folder names its "
        f"folder; put file://{tmp_path}/a and file://{tmp_path}/b there, or unset source.folder to have it fetched"
    )
    here = tmp_path / DOWNLOADS
    with pytest.raises(InputError) as error:
        build(both_parts(folder=None, **options), tmp_path)
    wanted = [
        f"file://{tmp_path}/a and save it as {here}/sample_feedback.json",
        f"file://{tmp_path}/b and save it as {here}/train_feedback.json",
    ]
    ending = f", or set {FOLDER_VARIABLE} to a folder that holds sample_feedback.json and train_feedback.json"
    assert str(error.value).endswith(f"; on a machine with network access download {' and '.join(wanted)}{ending}")
    here.mkdir(parents=True)
    (here / SAMPLE.name).write_bytes(SAMPLE.read_bytes())
    with pytest.raises(InputError) as error:
        build(both_parts(folder=None, **options), tmp_path)
    assert str(error.value).endswith(f"; on a machine with network access download {wanted[1]}{ending}")


def test_the_training_part_has_as_many_questions_as_published(tmp_path):
    checked = sha256(TRAIN)
    with pytest.raises(
        InputError,
        match=r"train_feedback\.json: expected 2,853 questions, found 5; .* source\.train_part\.rows \(null: any",
    ):
        build(both_parts(train_part={"sha256": checked}), tmp_path)
    assert build(both_parts(train_part={"sha256": checked, "rows": None}), tmp_path) == build(both_parts(), tmp_path)


def test_the_published_training_part_stands_beside_the_development_part():
    """Same folder of the same commit, no checksum; off unless asked for."""
    config = QAFeedbackConfig(train_part={})
    assert QAFeedbackConfig().train_part is None and config.train_part.sha256 is None
    assert config.train_part.url == config.files[0].url.replace("dev_", "train_")
    assert config.train_part.url.endswith("/tasks/qa_feedback/data/train_feedback.json")
    files = [{"name": "train.json", "sha256": "0" * 64, "url": "u"}]
    with pytest.raises(ConfigError, match=r"source\.train_part: .*ids start with train, train: two files would share"):
        parse_section({"files": files, "train_part": {}}, QAFeedbackConfig, "params.yaml: source")


# --- the annotator that replays ---------------------------------------------------------------------------------------


def test_replay_hands_on_the_corrections(tmp_path):
    split = build(sample_config(), tmp_path).splits["train"]
    edits = annotate(split, ReplayConfig(), "train")
    assert edits == split.corrections
    assert edits is not split.corrections


def test_replay_refuses_a_split_without_corrections():
    split = RawSplit(prompts=[Prompt(id="a", prompt="p")])
    with pytest.raises(InputError, match=r"annotator replay: split test: expected corrections .* found none among 1 "):
        annotate(split, ReplayConfig(), "test")


# --- the published file -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_FOLDER, reason=f"{FOLDER_VARIABLE} does not name a folder with dev_feedback.json")
def test_the_published_development_part(tmp_path):
    """Counts of the published file: 494 corrections differ, 13 of them are blank; 2,616 comparisons have a winner."""
    data = build(QAFeedbackConfig(folder=REAL_FOLDER), tmp_path)
    splits = data.splits.values()
    assert [len(split.prompts) for split in splits] == [300, 100, 100]
    assert sum(len(split.corrections) for split in splits) == 494 - 13
    assert sum(len(split.preferences) for split in splits) == 2616
    assert max(len(prompt.prompt.split()) for split in splits for prompt in split.prompts) <= 300
