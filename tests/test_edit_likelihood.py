"""Log-probabilities of held-out edits under policies: the sums, the stage and the table, by hand."""

from __future__ import annotations

import csv

import pytest
import torch
from scipy.stats import t as student

from fgalign.config import Profile
from fgalign.core.schema import Edit, LabelledPair, write_records
from fgalign.decoding import Decoding, write_decoding
from fgalign.errors import InputError
from fgalign.io import write_csv
from fgalign.report.cells import read_table
from fgalign.report.tables import build_table
from fgalign.stages.score_edits import run_score_edits, score_pairs

# --- sums -------------------------------------------------------------------------------------------------------------

PAIRS = [
    LabelledPair(
        id="long", prompt_ids=[5, 6, 7], initial_ids=[8, 9, 10, 1], initial_labels=[0, -1, -1, 0],
        revised_ids=[8, 11, 1], revised_labels=[0, 1, 0],
    ),
    LabelledPair(
        id="short", prompt_ids=[4], initial_ids=[9, 1], initial_labels=[0, 0],
        revised_ids=[9, 12, 1], revised_labels=[0, 1, 0],
    ),
]  # fmt: skip


def plain_logps(model, prompt, response):
    """Log-probability of each response token, without padding or batches."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    logps = logits.double().log_softmax(-1)
    return [float(logps[len(prompt) + place - 1, token]) for place, token in enumerate(response)]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("prefix", ["", "a"])
def test_sums_of_tokens_by_label(make_model, tokenizer, tmp_path, batch_size, prefix):
    model = make_model(seed=3, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    extra = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    write_decoding(tmp_path, Decoding(prefix=prefix))
    done = []
    found = score_pairs(tmp_path, PAIRS, tokenizer, batch_size, torch.device("cpu"), done.append)
    assert done == [1] * 2 if batch_size == 1 else [2]
    long = plain_logps(model, [5, 6, 7, *extra], [8, 9, 10, 1]), plain_logps(model, [5, 6, 7, *extra], [8, 11, 1])
    short = plain_logps(model, [4, *extra], [9, 1]), plain_logps(model, [4, *extra], [9, 12, 1])
    for sums, (initial, revised), bad in ((found[0], long, initial_bad(long)), (found[1], short, 0.0)):
        expected = {
            "initial": sum(initial), "bad": bad, "revised": sum(revised), "good": revised[1],
            "kept": revised[0] + revised[2],
        }  # fmt: skip
        assert {name: sums[name] for name in expected} == pytest.approx(expected, abs=2e-5)
    counts = [{name: value for name, value in sums.items() if name.endswith("_tokens")} for sums in found]
    assert counts == [
        {"bad_tokens": 2, "good_tokens": 1, "kept_tokens": 2},
        {"bad_tokens": 0, "good_tokens": 1, "kept_tokens": 2},
    ]


def initial_bad(sides):
    return sides[0][1] + sides[0][2]


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(make_model, tokenizer, tmp_path, monkeypatch):
    """Random policies of two seeds and three edits, two of them of one prompt."""
    params = {
        "seeds": [1, 2],
        "runtime": {"device": "cpu", "threads": 1, "workers": 1},
        "evaluation": {"judge": "rouge_l", "batch_size": 2},
        "labels": {"unit": "token"},
        "methods": {"figa": {"kind": "figa"}, "best_of_4": {"kind": "best_of_n"}},
    }
    (tmp_path / "src" / "fgalign").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    made = Profile("t", tmp_path, params, tmp_path / "params.yaml")
    make_model(vocab_size=len(tokenizer)).save_pretrained(made.model_folder("base"))
    tokenizer.save_pretrained(made.model_folder("base"))
    for place, model in enumerate(("sft", "figa")):
        for seed in (1, 2):
            make_model(seed=10 * place + seed, vocab_size=len(tokenizer)).save_pretrained(
                made.model_folder(model, seed)
            )
    edits = [
        Edit(id="a", prompt="the cat", initial="the cat sat", revised="the dog sat"),
        Edit(id="b", prompt="the dog", initial="the dog", revised="the cat"),
        Edit(id="c", prompt="the cat", initial="sat", revised="the cat sat"),
    ]
    write_records(made.data / "edits" / "test.jsonl", edits)
    return made


def rows_of(profile):
    with open(profile.results / "metrics" / "edit_likelihood.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_policy_with_weights_of_its_own_scores_every_edit(profile, tokenizer):
    from fgalign.core.modeling import load_causal_lm
    from fgalign.core.tokens import encode_prompt, encode_response

    run_score_edits(profile)
    rows = rows_of(profile)
    places = [(row["seed"], row["model"], row["id"], row["prompt"]) for row in rows]
    edits = [("a", "a"), ("b", "b"), ("c", "a")]
    assert places == [(seed, model, *edit) for seed in "12" for model in ("sft", "figa") for edit in edits]
    model = load_causal_lm(profile.model_folder("figa", 2), torch.device("cpu"))
    expected = sum(plain_logps(model, encode_prompt(tokenizer, "the dog"), encode_response(tokenizer, "the cat")))
    assert float(rows[-2]["revised"]) == pytest.approx(expected, abs=2e-5)
    # Seeds side by side: the same file.
    path = profile.results / "metrics" / "edit_likelihood.csv"
    text = path.read_text()
    profile.params["runtime"]["workers"] = 2
    run_score_edits(profile)
    assert path.read_text() == text
    # The table takes it as it is.
    assert {cell.method for cell in read_table(build_table(profile, "edit_likelihood")[0])} == {"figa"}


def test_edits_that_change_no_token_leave_nothing_to_measure(profile, monkeypatch):
    monkeypatch.setattr("fgalign.labels.with_tokens_changed", lambda tokenizer, edits, where: [])
    with pytest.raises(InputError, match=r"test\.jsonl: expected edits to measure policies with, found none"):
        run_score_edits(profile)


# --- the table --------------------------------------------------------------------------------------------------------


def write(profile, rows):
    """Rows (model, seed, id, prompt, initial, revised, good, bad, kept); an edit has two good tokens, one bad and four
    kept ones."""
    names = ("model", "seed", "id", "prompt", "initial", "revised", "good", "bad", "kept")
    tokens = {"good_tokens": 2, "bad_tokens": 1, "kept_tokens": 4}
    made = [{**dict(zip(names, row, strict=True)), **tokens} for row in rows]
    write_csv(profile.results / "metrics" / "edit_likelihood.csv", made)


def cells_of(profile):
    return {cell.metric: cell for cell in read_table(build_table(profile, "edit_likelihood")[0])}


def test_changes_from_sft_by_hand(profile):
    profile.params["seeds"] = [1]
    edits = [f"e{number}" for number in range(4)]
    sft = [("sft", 1, edit, edit, -20, -10, -4, -3, -2) for edit in edits]
    # Changes of the good tokens: 2, 4, 6, 12; of the bad one -1 each; of the kept ones 0; of the initial response -1,
    # of the revised one -1, -2, 0, 3, so of the margin 0, -1, 1, 4.
    figa = [
        ("figa", 1, edit, edit, -21, -10 + margin - 1, -4 + good, -4, -2)
        for edit, good, margin in zip(edits, (2, 4, 6, 12), (0, -1, 1, 4), strict=True)
    ]
    write(profile, [*figa, *sft])
    cells = cells_of(profile)
    # A token's share of 2, 4, 6, 12 over two tokens each: 1, 2, 3, 6, with mean 3 and variance 14 / 3.
    half = student.ppf(0.975, 3) * (14 / 3 / 4) ** 0.5
    good = cells["difference_good"]
    assert (good.mean, good.low, good.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    bad = cells["difference_bad"]
    assert (bad.mean, bad.low, bad.high) == (-1, -1, -1)
    assert cells["difference_kept"].mean == 0
    difference = cells["difference_good_bad"]
    assert (difference.mean, difference.low) == pytest.approx((4, 4 - half), abs=1e-4)
    # 0, -1, 1, 4: mean 1, variance 14 / 3; a half, no, yes, yes.
    margin = cells["difference_margin"]
    assert (margin.mean, margin.high) == pytest.approx((1, 1 + half), abs=1e-4)
    assert cells["towards_revised"].mean == 62.5


def test_edits_of_one_prompt_count_as_one(profile):
    profile.params["seeds"] = [1]
    edits = [("e0", "e0"), ("e1", "e0"), ("e2", "e2")]
    sft = [("sft", 1, *edit, 0, 0, 0, 0, 0) for edit in edits]
    figa = [("figa", 1, *edit, 0, change, 0, 0, 0) for edit, change in zip(edits, (1, 2, 6), strict=True)]
    write(profile, [*sft, *figa])
    margin = cells_of(profile)["difference_margin"]
    # The mean of all three is 3. Cluster sampling of two prompts: 3 + 2/3 (1 - 3 + 2 - 3) = 1, 3 + 2/3 (6 - 3) = 5;
    # their variance is 8, the error 2, with one degree of freedom.
    assert margin.mean == 3
    assert margin.high - margin.mean == pytest.approx(student.ppf(0.975, 1) * 2, abs=1e-3)


def test_edits_that_shorten_and_that_lengthen_a_response(profile):
    profile.params["seeds"] = [1]
    edits = [f"e{number}" for number in range(5)]
    sft = [("sft", 1, edit, edit, 0, 0, 0, 0, 0) for edit in edits]
    figa = [("figa", 1, edit, edit, 0, change, 0, 0, 0) for edit, change in zip(edits, (1, 3, 9, -2, -4), strict=True)]
    write(profile, [*sft, *figa])
    path = profile.results / "metrics" / "edit_likelihood.csv"
    lines = path.read_text().splitlines()
    # e0 and e1 take out more tokens than they put in, e2 as many, e3 and e4 fewer.
    for number, tokens in enumerate(((1, 2), (0, 9), (3, 3), (2, 1), (5, 0))):
        for line in (1 + number, 6 + number):
            lines[line] = lines[line].replace(",2,1,4", f",{tokens[0]},{tokens[1]},4")
    path.write_text("\n".join(lines) + "\n")
    cells = cells_of(profile)
    names = ("difference_margin", "difference_margin_shorter", "difference_margin_longer")
    assert [cells[name].mean for name in names] == [1.4, 2, -3]
    # Of 1 and 3 the variance is 2, and the other three count for nothing: the ratio estimator of 5 edits has
    # 2 + 5/2 (-1), 2 + 5/2 (1) and three times 2, with variance 3.125; two edits leave one degree of freedom.
    half = student.ppf(0.975, 1) * (3.125 / 5) ** 0.5
    assert cells["difference_margin_shorter"].high == pytest.approx(2 + half, abs=1e-3)


def test_seeds_are_paired_with_their_own_sft_and_widen_the_interval(profile):
    edits = ["e0", "e1", "e2"]
    sft = [("sft", seed, edit, edit, 0, 10 * seed, 0, 0, 0) for seed in (1, 2) for edit in edits]
    figa = [("figa", seed, edit, edit, 0, 10 * seed + seed, 0, 0, 0) for seed in (1, 2) for edit in edits]
    write(profile, [*sft, *figa])
    margin = cells_of(profile)["difference_margin"]
    # Changes 1 and 2, the same for all edits: the variance between seeds is 0.5, the error 0.5, one degree of freedom.
    assert (margin.mean, margin.seeds) == (1.5, (1, 2))
    assert margin.high - margin.mean == pytest.approx(student.ppf(0.975, 1) * 0.5, abs=1e-3)


def test_what_no_edit_has_is_left_out(profile):
    profile.params["seeds"] = [1]
    write(profile, [(model, 1, edit, edit, 0, 0, 0, 0, 0) for model in ("sft", "figa") for edit in "ab"])
    path = profile.results / "metrics" / "edit_likelihood.csv"
    path.write_text(path.read_text().replace(",2,1,4\n", ",2,0,4\n"))
    metrics = ["good", "kept", "margin", "margin_longer"]
    assert list(cells_of(profile)) == [*(f"difference_{metric}" for metric in metrics), "towards_revised"]


def test_what_must_fail(profile):
    with pytest.raises(InputError, match=r"edit_likelihood\.csv: no such metrics file; run the stage score_edits"):
        build_table(profile, "edit_likelihood")
    rows = [(model, seed, edit, edit, 0, 0, 0, 0, 0) for model in ("sft", "figa") for seed in (1, 2) for edit in "ab"]
    write(profile, rows[:4])
    with pytest.raises(InputError, match=r"edit_likelihood\.csv \(figa\): seed 1 is missing"):
        build_table(profile, "edit_likelihood")
    write(profile, [*rows[:4], *((*row[:2], "c" if row[2] == "b" else "a", *row[3:]) for row in rows[4:])])
    with pytest.raises(InputError, match=r"figa: expected the edits of sft; run the stage score_edits again"):
        build_table(profile, "edit_likelihood")
