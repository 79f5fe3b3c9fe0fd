"""Other judges: how one is trained, that it judges the same answers again, and the table, by hand."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import synthetic_metrics as made_up
from scipy.stats import t as student

from fgalign.config import Profile
from fgalign.core.raw_data import RawSplit
from fgalign.core.schema import Demonstration, Edit, Preference, Prompt
from fgalign.errors import ConfigError, InputError
from fgalign.evaluation.judges import Judge
from fgalign.io import write_json
from fgalign.report.cells import read_table
from fgalign.report.index import Stage, run_names
from fgalign.report.tables import TABLES, blocks, build_table
from fgalign.stages.judge_model import check_disjoint, judge_model_config, run_judge_model
from fgalign.stages.rejudge import check_unseen, one_a_prompt, other_judge, preference_rows, run_rejudge

SECTION = {"seed": 101, "max_length": 160, "optim": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 2}}
LENGTH = Judge("length", "length", lambda prompt, response, gold: float(len(response)))
GOLD = Judge("rouge_l", "overlap", lambda prompt, response, gold: float(response == gold))


def pair(key, prompt, chosen="long", rejected="no"):
    return Preference(id=key, prompt=prompt, chosen=chosen, rejected=rejected)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- how a judge is trained -------------------------------------------------------------------------------------------


def configured(tmp_path, **sections):
    return Profile("t", tmp_path, {"seeds": [1, 2], **sections}, tmp_path / "params.yaml")


def test_a_judge_has_a_seed_that_trains_nothing_it_judges(tmp_path):
    assert judge_model_config(configured(tmp_path, judge_models={"one": SECTION}), "one").start == "base"
    with pytest.raises(
        ConfigError,
        match=r"params\.yaml: judge_models\.one\.seed: expected a seed .* none of 1, 2, found 2; choose another",
    ):
        judge_model_config(configured(tmp_path, judge_models={"one": {**SECTION, "seed": 2}}), "one")


def test_a_judge_starts_from_the_initial_model(tmp_path):
    with pytest.raises(ConfigError, match=r"judge_models\.one\.start: Input should be 'base', found 'sft'"):
        judge_model_config(configured(tmp_path, judge_models={"one": {**SECTION, "start": "sft"}}), "one")


def test_unknown_judges_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"judge_models: unknown judge 'two'; expected one of one$"):
        judge_model_config(configured(tmp_path, judge_models={"one": SECTION}), "two")
    with pytest.raises(ConfigError, match=r"other_judges: unknown judge 'llm'; expected one of none$"):
        other_judge(configured(tmp_path), "llm")
    with pytest.raises(ConfigError, match=r"other_judges\.llm\.needs: Field required"):
        other_judge(configured(tmp_path, other_judges={"llm": {"judge": "llm", "title": "LLM"}}), "llm")


@pytest.mark.parametrize(
    "train",
    [
        RawSplit(prompts=[Prompt(id="t", prompt="b")]),
        RawSplit(demonstrations=[Demonstration(id="t", prompt="b", completion="x")]),
        RawSplit(preferences=[pair("t", "b")]),
        RawSplit(corrections=[Edit(id="t", prompt="b", initial="x", revised="y")]),
    ],
)
def test_a_judge_learns_from_no_prompt_of_the_training_split(train):
    pairs = [pair("1", "a"), pair("2", "b"), pair("3", "b")]
    with pytest.raises(InputError, match=r"where: expected prompts .*, found 2 of 3 pairs .*\(for example '2'\)"):
        check_disjoint(pairs, train, "where")
    check_disjoint(pairs[:1], train, "where")
    with pytest.raises(InputError, match="where: expected preferences to train a judge on, found none"):
        check_disjoint([], train, "where")


def test_a_judge_judges_no_prompt_that_it_has_learnt_from(tmp_path):
    check_unseen(tmp_path, ["a"], tmp_path)  # a judge from elsewhere says nothing of its training
    write_json(tmp_path / "trained_on.json", {"prompts": ["b", "c"]})
    check_unseen(tmp_path, ["a"], tmp_path)
    with pytest.raises(InputError, match=r"trained_on\.json: expected .*, found 1 of 2 among its own .*'b'"):
        check_unseen(tmp_path, ["a", "b"], tmp_path)


# --- judges and people ------------------------------------------------------------------------------------------------


def test_one_preference_a_prompt():
    pairs = [pair("1", "a"), pair("2", "a"), pair("3", "b"), pair("4", "a")]
    assert [item.id for item in one_a_prompt(pairs)] == ["1", "3"]


def test_what_a_judge_gives_to_the_side_that_people_chose():
    pairs = [pair("1", "a", "long", "no"), pair("2", "b", "no", "long"), pair("3", "c", "same", "size")]
    gold = {"a": "no", "b": "no", "c": "other"}
    # By length: 4 > 2, 2 < 4, 4 = 4. By the gold answer: it is the rejected side, the chosen one, neither.
    assert preference_rows(pairs, gold, {"correct": LENGTH, "main_correct": GOLD}) == [
        {"id": "1", "correct": 1.0, "main_correct": 0.0},
        {"id": "2", "correct": 0.0, "main_correct": 1.0},
        {"id": "3", "correct": 0.5, "main_correct": 0.5},
    ]
    # Without a gold answer to each prompt the judge that reads it is not asked.
    del gold["c"]
    rows = preference_rows(pairs, gold, {"correct": LENGTH, "main_correct": GOLD})
    assert [list(row) for row in rows] == [["id", "correct"]] * 3
    with pytest.raises(InputError, match="expected preferences to compare a judge with, found none"):
        preference_rows([], gold, {"correct": LENGTH})


# --- the stages for real ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(make_model, tmp_path, monkeypatch):
    """A small world with random models and three methods' answers of two seeds."""
    from fgalign.base_model import train_tokenizer
    from fgalign.core.raw_data import read_split
    from fgalign.core.schema import Sample, write_records
    from fgalign.evaluation.truth import split_references
    from fgalign.stages.data import run_raw

    sizes = {
        **{"n_train_corpus": 0, "n_train_prompts": 4, "n_train_demonstrations": 0, "n_train_preferences": 12},
        **{"n_validation_prompts": 4, "n_validation_demonstrations": 0, "n_validation_preferences": 6},
        **{"n_test_prompts": 4, "n_test_preferences": 8},
    }
    params = {
        "seeds": [1, 2],
        "runtime": {"device": "cpu", "threads": 1, "workers": 1},
        "source": {"name": "simulator", **sizes},
        "evaluation": {"judge": "simulator_gold", "batch_size": 8},
        "methods": {"figa": {"kind": "figa"}},
        "judge_models": {"preferences": SECTION},
        "other_judges": {
            "reward_model": {
                "title": "Reward model",
                "judge": "reward_model",
                "judge_options": {"batch_size": 3, "device": "cpu"},
                "needs": "judges/preferences",
                "preferences": 5,
            },
            "again": {"title": "The same again", "judge": "simulator_gold", "needs": "gold/test"},
        },
    }
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    profile = Profile("t", tmp_path, params, tmp_path / "params.yaml")
    run_raw(profile)
    train = read_split(profile.data / "raw" / "train").preferences
    tokenizer = train_tokenizer([record.rejected for record in train], 400)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=160, **special)
    model.save_pretrained(profile.model_folder("base"))
    tokenizer.save_pretrained(profile.model_folder("base"))
    references = split_references(profile, "test")
    for place, method in enumerate(("base", "sft", "figa")):
        samples = [
            Sample(
                id=record.id, seed=seed, prompt=record.prompt, response=train[3 * place + seed].rejected, tokens=9,
                truncated=False, kl=0.0, rewards={},
            )
            for seed in (1, 2)
            for record in references
        ]  # fmt: skip
        write_records(profile.data / "samples" / f"{method}.jsonl", samples)
    return profile


def test_a_judge_is_trained_on_the_validation_split_and_judges_every_answer(small):
    import torch

    from fgalign.core.raw_data import read_split
    from fgalign.core.schema import Sample, read_records
    from fgalign.core.tokens import encode_prompt, encode_response
    from fgalign.evaluation.truth import read_truth
    from fgalign.rewards import saved_level

    # Training needs neither the truth nor the test split.
    hidden = {path: small.root / path.name for path in (small.data / "gold", small.data / "raw" / "test")}
    for path, place in hidden.items():
        shutil.move(path, place)
    run_judge_model(small, "preferences")
    for path, place in hidden.items():
        shutil.move(place, path)
    folder = small.data / "judges" / "preferences"
    assert saved_level(folder) == "sequence"
    validation = read_split(small.data / "raw" / "validation").preferences
    trained_on = json.loads((folder / "trained_on.json").read_text())
    assert trained_on["prompts"] == list(dict.fromkeys(pair.prompt for pair in validation))
    assert (trained_on["split"], trained_on["pairs"], trained_on["seed"]) == ("validation", 6, 101)
    assert json.loads((folder / "budget.json").read_text())["gradient_updates"] == 2

    run_rejudge(small, "reward_model")
    metrics = small.results / "metrics" / "judges"
    rows = rows_of(metrics / "reward_model.csv")
    # Three methods x two seeds x four prompts.
    assert len(rows) == 24 and [row["method"] for row in rows[::8]] == ["base", "sft", "figa"]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(prompt, response):
        ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, 0].item()

    references = {record.id: record for record in read_truth(small.data / "gold" / "test").references}
    samples = read_records(small.data / "samples" / "figa.jsonl", Sample)
    for row, sample in zip(rows[16:], samples, strict=True):
        ours, theirs = score(sample.prompt, sample.response), score(sample.prompt, references[sample.id].reference)
        assert (row["id"], row["seed"]) == (sample.id, str(sample.seed))
        assert (float(row["score"]), float(row["reference_score"])) == pytest.approx((ours, theirs), abs=1e-4)
        assert float(row["win"]) == float(ours > theirs)
    # The first five prompts with a preference, under both judges.
    preferred = rows_of(metrics / "reward_model_preferences.csv")
    pairs = one_a_prompt(read_split(small.data / "raw" / "test").preferences)[:5]
    assert [row["id"] for row in preferred] == [item.id for item in pairs]
    expected = [float(score(p.prompt, p.chosen) > score(p.prompt, p.rejected)) for p in pairs]
    assert [float(row["correct"]) for row in preferred] == expected
    assert {row["main_correct"] for row in preferred} <= {"0.0", "0.5", "1.0"}


def test_a_judge_counts_the_pairs_that_fit(small, capsys):
    from fgalign.core.modeling import load_tokenizer
    from fgalign.core.raw_data import read_split
    from fgalign.core.tokens import encode_prompt, encode_response

    tokenizer = load_tokenizer(small.model_folder("base"))
    sizes = [
        len(encode_prompt(tokenizer, pair.prompt))
        + max(len(encode_response(tokenizer, text)) for text in (pair.chosen, pair.rejected))
        for pair in read_split(small.data / "raw" / "validation").preferences
    ]
    fit = sum(size < max(sizes) for size in sizes)
    small.params["judge_models"] = {"preferences": {**SECTION, "max_length": max(sizes) - 1, "too_long": "drop"}}
    run_judge_model(small, "preferences")
    trained_on = json.loads((small.data / "judges" / "preferences" / "trained_on.json").read_text())
    assert trained_on["pairs"] == fit < 6
    assert f"judge_model@preferences seed 101: {6 - fit} of 6 pairs left out: more than" in capsys.readouterr().out


def test_a_judge_that_has_seen_a_test_prompt_is_refused(small):
    from fgalign.evaluation.truth import read_truth

    run_judge_model(small, "preferences")
    path = small.data / "judges" / "preferences" / "trained_on.json"
    prompt = read_truth(small.data / "gold" / "test").references[0].prompt
    write_json(path, {**json.loads(path.read_text()), "prompts": [prompt]})
    with pytest.raises(InputError, match="expected a judge that has not learnt from the test prompts, found 1 of 12"):
        run_rejudge(small, "reward_model")


def test_the_profiles_own_judge_asked_again_says_the_same(small):
    from fgalign.stages.judge import run_judge

    run_rejudge(small, "again")
    small.params["methods"] = {}  # it has no budget to read
    run_judge(small, "figa")
    again = [row for row in rows_of(small.results / "metrics/judges/again.csv") if row["method"] == "figa"]
    columns = ("id", "seed", "score", "reference_score", "win")
    judged = rows_of(small.results / "metrics/judged/figa.csv")
    assert [[row[name] for name in columns] for row in again] == [[row[name] for name in columns] for row in judged]
    for row in rows_of(small.results / "metrics/judges/again_preferences.csv"):
        assert row["correct"] == row["main_correct"]


def test_a_language_model_can_be_the_other_judge(small, tmp_path):
    from test_llm import Server, by_length

    from fgalign.core.raw_data import read_split
    from fgalign.core.schema import Sample, read_records
    from fgalign.evaluation.truth import split_references

    server = Server()
    server.reply = by_length
    options = {"base_url": server.url, "model": "m", "cache": str(tmp_path / "cache")}
    small.params["other_judges"]["llm"] = {"title": "m", "judge": "llm", "judge_options": options, "needs": "gold/test"}
    try:
        run_rejudge(small, "llm")
    finally:
        server.close()
    rows = rows_of(small.results / "metrics/judges/llm.csv")[:8]
    references = {record.id: record.reference for record in split_references(small, "test")}

    def longer(ours, theirs):
        return (1 + (len(ours) > len(theirs)) - (len(ours) < len(theirs))) / 2

    samples = read_records(small.data / "samples" / "base.jsonl", Sample)
    assert [float(row["win"]) for row in rows] == [longer(item.response, references[item.id]) for item in samples]
    pairs = one_a_prompt(read_split(small.data / "raw" / "test").preferences)
    preferred = rows_of(small.results / "metrics/judges/llm_preferences.csv")
    assert [float(row["correct"]) for row in preferred] == [longer(item.chosen, item.rejected) for item in pairs]
    # 3 methods x 2 seeds x 4 prompts and the preferences; each different request has 10 + 3 tokens.
    path = small.results / "metrics/judges/llm.llm_usage.json"
    first, requests = path.read_bytes(), len(server.prompts)
    spent = json.loads(first)
    assert (spent["pairs"], spent["requests"], len(set(server.prompts))) == (24 + len(pairs), requests, requests)
    assert (spent["input_tokens"], spent["output_tokens"], spent["unreadable"]) == (10 * requests, 3 * requests, 0)
    run_rejudge(small, "llm")  # from the cache: the server is gone
    assert path.read_bytes() == first
    assert not (small.results / "metrics/judges/llm_main.llm_usage.json").exists()


def test_what_a_language_model_took_lies_beside_its_scores(small, tmp_path):
    from test_llm import Server, by_length

    from fgalign.core.schema import CurveSample, write_records
    from fgalign.evaluation.truth import split_references
    from fgalign.stages.judge import run_curves, run_judge

    for seed in small.seeds:
        samples = [
            CurveSample(
                id=record.id, update=0, response_tokens=9, gradient_updates=0, prompt=record.prompt, response="A word.",
                seed=seed, kl=0.0, reward=0.0,
            )
            for record in split_references(small, "validation")[:2]
        ]  # fmt: skip
        write_records(small.model_folder("ppo", seed) / "rollouts.jsonl", samples)
    server = Server()
    server.reply = by_length
    options = {"base_url": server.url, "model": "m", "cache": str(tmp_path / "cache")}
    gold = small.params["evaluation"]
    small.params["evaluation"] = {"judge": "llm", "judge_options": options, "batch_size": 8}
    small.params["methods"] = {}
    metrics = small.results / "metrics"
    try:
        run_judge(small, "figa")
        run_rejudge(small, "again")
        run_curves(small, ["ppo"])
    finally:
        server.close()
    found = {path.relative_to(metrics).as_posix() for path in metrics.rglob("*.llm_usage.json")}
    # The other judge is the simulator; the main one is asked about the preferences.
    assert found == {"judged/figa.llm_usage.json", "judges/again_main.llm_usage.json", "curves.llm_usage.json"}
    spent = {path: json.loads((metrics / path).read_text()) for path in found}
    # 2 seeds x 4 prompts; 2 seeds x 2 prompts with the same answer, asked about once in each order.
    assert [spent["judged/figa.llm_usage.json"][name] for name in ("pairs", "prompts", "requests")] == [8, 16, 16]
    assert [spent["curves.llm_usage.json"][name] for name in ("pairs", "prompts", "requests")] == [4, 8, 4]
    # What a language model took is not left beside the scores of another judge.
    small.params["evaluation"] = gold
    run_judge(small, "figa")
    run_rejudge(small, "again")
    assert [path.name for path in metrics.rglob("*.llm_usage.json")] == ["curves.llm_usage.json"]


def test_options_of_a_judge_that_it_does_not_take_are_refused(small):
    small.params["other_judges"]["again"]["judge_options"] = {"model": "x"}
    with pytest.raises(ConfigError, match=r"other_judges\.again\.judge_options: the judge 'simulator_gold' has no op"):
        run_rejudge(small, "again")


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path):
    """Three seeds, sixteen prompts; the main judge gives every comparison to the response."""
    profile = made_up.write_profile(tmp_path)
    profile.params["other_judges"] = {"other": {"title": "Another judge", "trained_on": "dice", "needs": "x"}}
    for method in made_up.METHODS:
        rows = [[f"p{item}", seed, 1, 0, 1, 0, 9, 0, 0.5, 0.6, 0.7] for seed in profile.seeds for item in range(16)]
        made_up.write_csv(profile.results / "metrics" / "judged" / f"{method}.csv", made_up.JUDGED, rows)
    return profile


def write_other(profile, wins, correct=(1.0, 0.0), main=(1.0, 1.0)):
    """The other judge's verdicts ``wins[method][prompt]``, the same at every seed, prompts in the opposite order."""
    rows = [
        [method, f"p{item}", seed, 1, 0, wins[method][item]]
        for method in wins
        for seed in profile.seeds
        for item in reversed(range(16))
    ]
    folder = profile.results / "metrics" / "judges"
    made_up.write_csv(folder / "other.csv", "method,id,seed,score,reference_score,win", rows)
    pairs = [[f"q{place}", *values] for place, values in enumerate(zip(correct, main, strict=True))]
    made_up.write_csv(folder / "other_preferences.csv", "id,correct,main_correct", pairs)


def cells_of(profile):
    return {(cell.method, cell.metric): cell for cell in read_table(build_table(profile, "judges")[0])}


def test_agreement_by_hand(profile):
    wins = {method: [1.0] * 16 for method in made_up.METHODS}
    # A tie and a loss are other outcomes than the win that the main judge sees, 0.75 of a win is the same.
    wins["figa"] = [0.5, 0.0, 0.25, 0.0] + [0.75] * 6 + [1.0] * 6
    write_other(profile, wins)
    cells = cells_of(profile)
    alike = cells["figa", "agreement:other"]
    # 12 of 16 at every seed: variance 0.75 * 0.25 * 16 / 15 = 0.2 of one prompt, 0.0125 of the mean of 16.
    half = 100 * float(student.ppf(0.975, 15)) * 0.0125**0.5
    assert alike.mean == 75.0 and alike.seeds == (1, 2, 3)
    assert (alike.low, alike.high) == (pytest.approx(75 - half, abs=1e-3), pytest.approx(75 + half, abs=1e-3))
    assert cells["sft", "agreement:other"].mean == 100.0
    # Over six methods the four prompts have 5/6 and the others 1: 92 of 96, a sixth of the spread.
    overall = cells["judge:other", "agreement"]
    assert overall.mean == pytest.approx(100 * 92 / 96, abs=1e-4)
    assert overall.low == pytest.approx(100 * 92 / 96 - half / 6, abs=1e-3)
    # Wins 0.5 + 0 + 0.25 + 0 + 6 x 0.75 + 6 = 11.25 of 16; SFT wins all.
    assert cells["figa", "win_rate:other"].mean == pytest.approx(100 * 11.25 / 16, abs=1e-4)
    assert cells["figa", "difference_to_sft:other"].mean == pytest.approx(100 * 11.25 / 16 - 100, abs=1e-4)
    assert (cells["figa", "win_rate"].mean, cells["figa", "difference_to_sft"].mean) == (100.0, 0.0)
    assert ("sft", "difference_to_sft:other") not in cells


def test_verdicts_are_matched_by_prompt_not_by_order(profile):
    other = {method: [1.0] * 8 + [0.0] * 8 for method in made_up.METHODS}
    write_other(profile, other)
    for method in made_up.METHODS:
        rows = [
            [f"p{item}", seed, 1, 0, float(item < 8), 0, 9, 0, 0.5, 0.6, 0.7]
            for seed in profile.seeds
            for item in range(16)
        ]
        made_up.write_csv(profile.results / "metrics" / "judged" / f"{method}.csv", made_up.JUDGED, rows)
    assert cells_of(profile)["judge:other", "agreement"].mean == 100.0


def test_accuracy_on_preferences_by_hand(profile):
    correct, main = [1.0] * 12 + [0.0] * 4, [1.0] * 8 + [0.0] * 8
    write_other(profile, {method: [1.0] * 16 for method in made_up.METHODS}, correct, main)
    cells = cells_of(profile)
    accuracy = cells["judge:other", "accuracy_preference"]
    half = 100 * float(student.ppf(0.975, 15)) * 0.0125**0.5  # as above: 12 of 16
    assert (accuracy.mean, accuracy.seeds) == (75.0, ())
    assert accuracy.low == pytest.approx(75 - half, abs=1e-3)
    assert cells["judge:other", "accuracy_main"].mean == 50.0
    # The judges differ on 4 of 16 pairs, always to the gain of the other: 0.25, with the same variance.
    difference = cells["judge:other", "difference_accuracy"]
    assert difference.mean == 25.0 and difference.low == pytest.approx(25 - half, abs=1e-3)


def test_a_main_judge_that_could_not_be_asked_has_no_accuracy(profile):
    write_other(profile, {method: [1.0] * 16 for method in made_up.METHODS})
    made_up.write_csv(profile.results / "metrics/judges/other_preferences.csv", "id,correct", [["a", 1.0], ["b", 0.0]])
    metrics = [metric for method, metric in cells_of(profile) if method == "judge:other"]
    assert metrics == ["accuracy_preference", "agreement"]


def test_the_table_names_its_judges(profile):
    write_other(profile, {method: [1.0] * 16 for method in made_up.METHODS})
    csv_path, tex_path = build_table(profile, "judges")
    text = tex_path.read_text()
    assert "% Main judge: gold score of the simulator.\n% Other judge: Another judge, trained on dice.\n" in text
    shown = blocks(profile, "judges", read_table(csv_path))
    assert [block.title for block in shown] == ["gold score of the simulator", "Another judge", "Other judges"]
    assert shown[0].header == ("Win rate (%)", "Win rate − SFT (points)")
    assert shown[1].header == (*shown[0].header, "Same outcome as main judge (%)")
    assert [method for method, _ in shown[1].rows] == list(made_up.METHODS)
    assert shown[2].header[:2] == ("Accuracy, preferences (%)", "Accuracy, main judge (%)")
    assert "\nAnother judge & 50.0" in text


def test_what_must_fail(profile):
    wins = {method: [1.0] * 16 for method in made_up.METHODS}
    with pytest.raises(InputError, match=r"judges/other\.csv: no such metrics file; run the stage rejudge@other"):
        build_table(profile, "judges")
    write_other(profile, {method: wins[method] for method in wins if method != "figa"})
    with pytest.raises(InputError, match=r"judges/other\.csv \(figa\): seed 1 is missing"):
        build_table(profile, "judges")
    write_other(profile, wins)
    path = profile.results / "metrics" / "judges" / "other.csv"
    path.write_text(path.read_text().replace(",p3,", ",p33,"))
    with pytest.raises(InputError, match=r"other\.csv: not the prompts of `main judge` \(for example 'p3'\)"):
        build_table(profile, "judges")
    profile.params["other_judges"] = {"other": {"needs": "x"}}
    with pytest.raises(ConfigError, match=r"other_judges\.other\.title: Field required"):
        build_table(profile, "judges")
    profile.params["other_judges"] = {}
    with pytest.raises(ConfigError, match="other_judges: expected at least one judge, found none"):
        build_table(profile, "judges")


def test_the_index_names_files_and_runs(profile):
    profile.params["judge_models"] = {"preferences": SECTION}
    spec = TABLES["judges"]
    names = [path.name for path in spec.files(profile, "judge:other")]
    assert names == ["other.csv", "other_preferences.csv"] and spec.parts("judge:other") == ["other", "judge_model"]
    assert [path.name for path in spec.files(profile, "figa")] == ["figa.csv", "other.csv"]

    def runs(address, *outs):
        return run_names(profile, Stage(address, (), outs, ()), "judge:other", [1, 2])

    assert runs("p/dvc.yaml:rejudge@other") == ["mini/rejudge@other"]
    assert runs("p/dvc.yaml:judge_model@preferences", "data/mini/judges/preferences") == [
        "mini/judge_model@preferences/seed-101"
    ]
