"""Tables, figures, paper and index from made-up metrics: cells worked by hand, equal bytes, and errors that say why."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_metrics as made_up
from scipy.stats import t as student

from fgalign.config import Profile
from fgalign.errors import ConfigError, InputError
from fgalign.io import write_text
from fgalign.report.cells import Cell, cells_from_csv, cells_to_csv, display, layout, read_table
from fgalign.report.claims import CLAIMS, build_claims, claims_path, read_claims
from fgalign.report.config import reinforced_methods, report_config
from fgalign.report.figures import FIGURES, _band, _lines, build_figure
from fgalign.report.index import Stage, row_source, run_names, write_index
from fgalign.report.paper import (
    SET_BY_RUN,
    _ppo_settings,
    _search,
    _values,
    build_paper,
    compile_typst,
    paper_inputs,
    ppo_defaults,
)
from fgalign.report.reported import Reported, verdict
from fgalign.report.style import METHODS, SPARE_MARKERS, method_styles, metric_style, row_label
from fgalign.report.tables import TABLES, _accuracy, blocks, build_table, table_paths

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def profile(tmp_path):
    """A profile with three seeds and no metrics."""
    return made_up.write_profile(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A profile with all metrics, tables and figures, and the paper's source."""
    root = tmp_path_factory.mktemp("built")
    profile = made_up.write_profile(root)
    made_up.add_studies(profile)
    made_up.write_metrics(profile, prompts=20)
    made_up.write_more_metrics(profile, prompts=20)
    for name in TABLES:
        build_table(profile, name)
    for name in FIGURES:
        build_figure(profile, name)
    build_claims(profile)
    (root / "paper").mkdir()
    (root / "paper" / "main.typ").write_bytes((ROOT / "paper" / "main.typ").read_bytes())
    return profile


def cells_of(profile, name):
    """The cells of a freshly built table by (method, metric)."""
    path = build_table(profile, name)[0]
    return {(cell.method, cell.metric): cell for cell in read_table(path)}


def write_wins(profile, method, wins, scores=None, folder="judged"):
    """Judged samples with the given wins, ``wins[seed][prompt]``; everything else is constant."""
    rows = []
    for place, (seed, row) in enumerate(zip(profile.seeds, wins, strict=True)):
        for prompt, win in enumerate(row):
            score = scores[place][prompt] if scores else 1.0
            rows.append([f"p{prompt}", seed, score, 1.0, win, 2.5, 10, "False", 0.5, 0.6, 0.7])
    made_up.write_csv(profile.results / "metrics" / folder / f"{method}.csv", made_up.JUDGED, rows)


def write_curve(profile, runs):
    """``runs[method][seed place]`` lists scores at updates 0, 10, 20; each is 5 gradient updates and 100 tokens."""
    rows = []
    for method, by_seed in runs.items():
        for seed, scores in zip(profile.seeds, by_seed, strict=True):
            for place, score in enumerate(scores):
                rows.append([method, seed, 10 * place, 1000 * place, 50 * place, score, 0.5, 0.1 * place, 0.0])
    header = "method,seed,update,response_tokens,gradient_updates,score,win,kl,reward"
    made_up.write_csv(profile.results / "metrics" / "curves.csv", header, rows)


# --- cells -----------------------------------------------------------------------------------------------------------


def test_win_rate_and_paired_difference_by_hand(profile):
    # Prompts do not differ and seeds have means 0.25, 0.5, 0.75 of 4 prompts for ppo_token.
    token = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    plain = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    for method, wins in (("sft", plain), ("ppo_preference", plain), ("ppo_edit", token), ("ppo_token", token)):
        write_wins(profile, method, wins)
    cells = cells_of(profile, "xu_win_rate")
    # (1 + 2 + 3) / 12 = 50%; (0 + 1 + 2) / 12 = 25%; difference 25 points.
    assert cells["ppo_token", "win_rate"].mean == 50.0
    assert cells["ppo_preference", "win_rate"].mean == 25.0
    difference = cells["ppo_token", "difference_to_ppo_preference"]
    assert difference.mean == 25.0
    # Differences are 1000, 0100, 0010: each seed's mean is 1/4, so MS_seeds = 0; prompt means are 1/3, 1/3, 1/3, 0,
    # with sum of squared deviations 3 (1/12)^2 + (1/4)^2 = 1/12, so MS_prompts = 3 (1/12) / 3 = 1/12. The total sum of
    # squares is 3 - 12 (1/4)^2 = 9/4, so MS_res = (9/4 - 3 (1/12)) / 6 = 1/3. Both mean squares are below MS_res: the
    # variance of the mean is MS_res / 12 = 1/36, with 6 degrees of freedom.
    half = 100 * float(student.ppf(0.975, 6)) / 6
    assert difference.low == pytest.approx(25 - half, abs=5e-5)
    assert difference.high == pytest.approx(25 + half, abs=5e-5)
    assert difference.reported == 5.1
    assert cells["sft", "difference_to_ppo_preference"].mean == 0.0
    assert cells["ppo_token", "win_rate"].seeds == (1, 2, 3)
    assert ("ppo_preference", "difference_to_ppo_preference") not in cells


def test_pairs_are_matched_by_prompt_not_by_order(profile):
    wins = [[1, 0.5, 0], [1, 0.5, 0], [1, 0.5, 0]]
    for method in ("sft", "ppo_preference", "ppo_edit", "ppo_token"):
        write_wins(profile, method, wins)
    path = profile.results / "metrics" / "judged" / "ppo_token.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    difference = cells_of(profile, "xu_win_rate")["ppo_token", "difference_to_ppo_preference"]
    # The same win for the same prompt and seed everywhere: exactly no difference and no spread. Three prompts leave
    # room for 1 - 0.025^(1/3) = 70.76 points.
    assert (difference.mean, difference.high) == (0.0, pytest.approx(70.7598, abs=1e-4))
    assert difference.low == -difference.high


def test_figa_main_columns(profile):
    for method in made_up.METHODS:
        write_wins(profile, method, [[1, 0.5], [0.5, 0], [1, 0]], [[3, 1], [2, 0], [4, 2]])
    cells = cells_of(profile, "figa_main")
    assert [method for method, metric in cells if metric == "win_rate"] == ["base", "sft", "figa", *made_up.PPO]
    # Wins 1 + .5 + .5 + 0 + 1 + 0 = 3 of 6; scores 3 + 1 + 2 + 0 + 4 + 2 = 12 over 6.
    assert cells["figa", "win_rate"].mean == 50.0
    assert cells["figa", "score"].mean == 2.0
    assert (cells["figa", "reward"].mean, cells["figa", "reward"].reported) == (0.5, 4.62)
    assert (cells["figa", "kl"].mean, cells["figa", "tokens"].mean) == (2.5, 10.0)
    assert ("sft", "difference_to_sft") not in cells


def test_reward_models_by_hand(profile):
    made_up.write_reward_models(profile)
    path = profile.results / "metrics" / "reward_models.csv"
    models = ("rm_preference", "rm_edit", "rm_token")
    rows = [[model, "accuracy_edit", seed, 0.75] for model in models for seed in (1, 2, 3)]
    rows += [["rm_token", "token_recall", seed, value] for seed, value in ((1, 0.7), (2, 0.8), (3, 0.9))]
    rows += [["rm_token", "token_auroc", seed, 0.9] for seed in (1, 2, 3)]
    rows += [["rm_token", "token_auroc:Wrong-Grounding", seed, value] for seed, value in ((1, 0.6), (2, 0.7), (3, 0.8))]
    made_up.write_csv(path, "model,metric,seed,value", rows)
    pairs = {(model, "accuracy_edit"): [[1] * 12 + [0] * 4] * 3 for model in models}
    made_up.write_reward_pairs(profile, pairs)
    intervals = [["rm_token", "token_recall", 0.7, 0.875], ["rm_token", "token_auroc:Wrong-Grounding", 0.625, 0.75]]
    made_up.write_csv(profile.results / "metrics" / "token_intervals.csv", "model,metric,low,high", intervals)
    cells = cells_of(profile, "xu_reward_models")
    recall = cells["rm_token", "token_recall"]
    # The mean over seeds, and the stage's interval over seeds and responses.
    assert (recall.mean, recall.low, recall.high) == (80.0, 70.0, 87.5)
    auroc = cells["rm_token", "token_auroc"]
    assert (auroc.mean, auroc.low, auroc.high) == (0.9, None, None)
    # By kind of flaw below the others, in a block of its own.
    kind = cells["rm_token", "token_auroc:Wrong-Grounding"]
    assert (kind.mean, kind.low, kind.high) == (0.7, 0.625, 0.75)
    first, second = blocks(profile, "xu_reward_models", list(cells.values()))
    assert (second.title, second.header) == ("AUROC by kind of flaw", ("Wrong grounding",))
    assert [method for method, _ in second.rows] == ["rm_token"] and len(first.rows) == 3
    assert metric_style("benchmark_qa_truthfulness__acc").title == "QA truthfulness: accuracy (%)"
    # 12 of 16 pairs, the same at every seed, so all variance is the pairs': 0.75 * 0.25 * 16 / 15 = 0.2 of one pair,
    # 0.0125 of the mean of 16; the half width is t(0.975, 15) = 2.131450 times its root.
    accuracy = cells["rm_edit", "accuracy_edit"]
    assert accuracy.mean == 75.0
    assert accuracy.low == pytest.approx(75 - 213.1450 * 0.0125**0.5, abs=1e-3)
    assert accuracy.high == pytest.approx(75 + 213.1450 * 0.0125**0.5, abs=1e-3)


def test_figa_data_by_hand(profile):
    rows = [
        [item, side, seed, reward + seed, 10 + edits, edits]
        for side, reward, edits in (("initial", 0, 0), ("revised", 4, 2), ("reference", 5, 6))
        for item in ("a", "b")
        for seed in (1, 2, 3)
    ]
    made_up.write_csv(profile.results / "metrics" / "figa_data.csv", "id,side,seed,reward,tokens,edit_distance", rows)
    cells = cells_of(profile, "figa_data")
    assert cells["revised", "reward"].mean == 6.0  # 4 + (1 + 2 + 3) / 3
    assert (cells["reference", "tokens"].mean, cells["reference", "edit_distance"].mean) == (16.0, 6.0)
    assert (cells["initial", "edit_distance"].low, cells["initial", "edit_distance"].high) == (0.0, 0.0)


def test_efficiency_by_hand_and_censored(profile):
    write_curve(
        profile,
        {
            "ppo_preference": [[0.1, 0.3, 0.5], [0.1, 0.5, 0.4], [0.1, 0.4, 0.6]],  # best at 20, 10, 20: 0.5, 0.5, 0.6
            "ppo_edit": [[0.1, 0.5, 0.6], [0.1, 0.2, 0.3], [0.1, 0.2, 0.6]],  # reached at 10, never, 20
            "ppo_token": [[0.1, 0.6, 0.1], [0.1, 0.6, 0.7], [0.1, 0.6, 0.7]],  # reached at 10 by all, "at" counts
        },
    )
    cells = cells_of(profile, "xu_efficiency")
    assert cells["ppo_preference", "target_score"].mean == pytest.approx(1.6 / 3, abs=1e-4)
    assert cells["ppo_preference", "updates"].mean == pytest.approx(50 / 3, abs=1e-4)
    edit = cells["ppo_edit", "response_tokens"]
    # The seed that never gets there counts with its 2000 tokens: (1000 + 2000 + 2000) / 3, a lower bound.
    assert edit.mean == pytest.approx(5000 / 3, abs=1e-4)
    assert edit.lower_bound and edit.high is None
    assert edit.low == pytest.approx(5000 / 3 - 4.302653 * (1000 / 3**0.5) / 3**0.5, abs=1e-3)
    reached = cells["ppo_edit", "seeds_reached"]
    # Clopper-Pearson for 2 of 3: low solves P(X >= 2) = 0.025, high solves P(X <= 2) = 1 - p^3 = 0.025.
    assert reached.mean == pytest.approx(200 / 3, abs=1e-4)
    assert reached.high == pytest.approx(100 * 0.975 ** (1 / 3), abs=1e-3)
    low = reached.low / 100
    assert 3 * low**2 * (1 - low) + low**3 == pytest.approx(0.025, abs=1e-5)
    token = cells["ppo_token", "gradient_updates"]
    assert (token.mean, token.low, token.high) == (50.0, 50.0, 50.0)
    assert display(edit).value == "≥ 1.7" and display(edit).interval == ""


def test_plain_ppo_that_never_improves_is_reached_at_the_start(profile):
    write_curve(profile, {method: [[0.5, 0.4, 0.3]] * 3 for method in made_up.PPO})
    cells = cells_of(profile, "xu_efficiency")
    assert cells["ppo_token", "updates"].mean == 0.0


def test_other_reinforced_methods_join_the_ppo_tables(profile):
    profile.params["methods"] |= {"rloo_token": {"kind": "rloo", "curve": {"every": 5}}, "ppo_tlcr": {"kind": "ppo"}}
    profile.params["methods"]["dpo"] = {"kind": "dpo"}
    assert reinforced_methods(profile) == [*made_up.PPO, "rloo_token", "ppo_tlcr"]
    for method in ("sft", *made_up.PPO, "rloo_token", "ppo_tlcr"):
        write_wins(profile, method, [[1, 0], [1, 0], [1, 0]])
    assert {method for method, _ in cells_of(profile, "xu_win_rate")} == {"sft", *made_up.PPO}
    cells = cells_of(profile, "xu_extensions")
    assert ("rloo_token", "difference_to_ppo_preference") in cells and ("dpo", "win_rate") not in cells
    # Only methods with curves have rows in the efficiency table.
    write_curve(profile, {method: [[0.1, 0.2, 0.3]] * 3 for method in (*made_up.PPO, "ppo_tlcr", "dpo")})
    rows = {method for method, _ in cells_of(profile, "xu_efficiency")}
    assert rows == {*made_up.PPO, "ppo_tlcr"}


def test_budgets_and_rates_join_figa_main_where_they_exist(profile):
    for method in made_up.METHODS:
        write_wins(profile, method, [[1, 0], [1, 0], [1, 0]])
    assert not any(metric == "training_tokens" for _, metric in cells_of(profile, "figa_main"))
    folder = profile.results / "metrics"
    for method in profile.params["methods"]:
        rows = [[seed, 1000 * seed, 500, 7] for seed in (1, 2, 3)]
        header = "seed,training_tokens,sampled_tokens,gradient_updates"
        made_up.write_csv(folder / "budgets" / f"{method}.csv", header, rows)
    cells = cells_of(profile, "figa_main")
    # Mean of 1000, 2000, 3000 tokens, standard deviation 1000: half width t(0.975, 2) 1000 / sqrt(3).
    cell = cells["figa", "training_tokens"]
    assert (cell.mean, display(cell).value) == (2000.0, "2.0")
    assert cell.high - cell.mean == pytest.approx(4.302653 * 1000 / 3**0.5, abs=1e-2)
    assert ("sft", "training_tokens") not in cells
    for method in made_up.METHODS:
        rows = [[task, "acc", seed, value, ""] for seed in (1, 2, 3) for task, value in (("world_knowledge", 0.25),)]
        rows += [["world_bias", "likelihood_diff", seed, -3.5, ""] for seed in (1, 2, 3)]
        made_up.write_csv(folder / "benchmarks" / f"{method}.csv", "task,metric,seed,value,stderr", rows)
    cells = cells_of(profile, "figa_main")
    rate = cells["base", "benchmark_world_knowledge__acc"]
    assert (rate.mean, display(rate).interval) == (25.0, "")
    # What is no rate stands in its own table only, in its own unit.
    assert ("base", "benchmark_world_bias__likelihood_diff") not in cells
    assert cells_of(profile, "benchmarks")["sft", "benchmark_world_bias__likelihood_diff"].mean == -3.5
    assert metric_style("benchmark_world_knowledge__acc").title == "World knowledge: accuracy (%)"
    tex = (profile.results / "tables" / "figa_main.tex").read_text()
    assert tex.index("Initial model") < tex.index("Further") < tex.rindex("Initial model")
    (folder / "benchmarks" / "figa.csv").unlink()
    with pytest.raises(InputError, match=r"figa.csv: no such metrics file; run the stage that runs the benchmarks"):
        build_table(profile, "figa_main")
    (folder / "benchmarks" / "figa.csv").write_text(
        "task,metric,seed,value\nother,acc,1,1\nother,acc,2,1\nother,acc,3,1\n"
    )
    with pytest.raises(InputError, match=r"figa.csv: not the tasks of `base` \(for example"):
        build_table(profile, "figa_main")


def test_study_differences_are_to_the_first_variant_of_the_method(profile):
    noise = {"a_0": ("figa", 0.0), "b_0": ("ppo_token", 0.0), "a_1": ("figa", 0.5), "b_1": ("ppo_token", 0.5)}
    entries = {name: {"method": method, "level": level} for name, (method, level) in noise.items()}
    profile.params["studies"] = {"label_noise": {"variants": entries}}
    for name, wins in (("a_0", [1, 1]), ("b_0", [1, 0]), ("a_1", [1, 0]), ("b_1", [0, 0])):
        write_wins(profile, name, [wins] * 3, folder="studies/label_noise")
    cells = cells_of(profile, "label_noise")
    # Wins 2, 1, 1 and 0 of 2 prompts: each method loses 50 points to its own first variant.
    assert [cells[name, "win_rate"].mean for name in noise] == [100.0, 50.0, 50.0, 0.0]
    assert cells["a_1", "difference_to_first"].mean == cells["b_1", "difference_to_first"].mean == -50.0
    assert ("a_0", "difference_to_first") not in cells and ("b_0", "difference_to_first") not in cells
    tex = (profile.sweeps / "tables" / "label_noise.tex").read_text()
    # A block a method.
    order = [
        tex.index(text) for text in ("FIGA &", "FIGA, level 0.5", "Token-level PPO &", "Token-level PPO, level 0.5")
    ]
    assert order == sorted(order)
    profile.params["studies"]["label_noise"]["variants"]["a_1"] = {"method": "figa"}
    with pytest.raises(ConfigError, match=r"label_noise.variants.a_1: level is missing"):
        build_figure(profile, "label_noise")
    with pytest.raises(ConfigError, match=r"studies: no section 'figa_signals'"):
        build_table(profile, "figa_signals")


def test_learning_rates_of_several_methods_are_compared_with_the_first_row(profile):
    entries = {
        "plain": {"method": "ppo_preference"},
        "token": {"method": "ppo_token"},
        "token_2": {"method": "ppo_token"},
    }
    profile.params["studies"] = {"ppo_rates": {"variants": entries}}
    for name, wins in (("plain", [1, 0, 0, 0]), ("token", [1, 1, 0, 0]), ("token_2", [1, 1, 1, 0])):
        write_wins(profile, name, [wins] * 3, folder="studies/ppo_rates")
    cells = cells_of(profile, "ppo_rates")
    # 25, 50 and 75% of 4 prompts, in one block.
    assert [cells[name, "difference_to_first"].mean for name in ("token", "token_2")] == [25.0, 50.0]
    assert ("plain", "difference_to_first") not in cells
    assert "Token-level PPO &" not in (profile.sweeps / "tables" / "ppo_rates.tex").read_text()


def test_what_the_texts_are_worth_by_hand(profile):
    rows = [
        ["train", "chosen", "a", 0.0, 1.0], ["train", "rejected", "a", -2.0, ""],
        ["train", "chosen", "b", -1.0, 0.5], ["train", "rejected", "b", -1.0, ""],
        ["test", "reference", "c", 0.0, ""],
    ]  # fmt: skip
    made_up.write_csv(profile.results / "metrics" / "text_quality.csv", "split,text,id,score,better", rows)
    cells = cells_of(profile, "text_quality")
    assert [cells["train:chosen", name].mean for name in ("texts", "score", "flawless", "better")] == [
        2,
        -0.5,
        50.0,
        75.0,
    ]
    # Two scores half a point from their mean: standard deviation 0.7071, half width t(0.975, 1) / 2.
    assert cells["train:chosen", "score"].high == pytest.approx(-0.5 + 12.7062 / 2, abs=1e-3)
    assert cells["train:rejected", "score"].mean == -1.5 and ("train:rejected", "better") not in cells
    assert cells["test:reference", "flawless"].mean == 100.0
    tex = (profile.results / "tables" / "text_quality.tex").read_text()
    assert tex.index("Train") < tex.index("Chosen") < tex.index("Test") < tex.index("Reference")


def test_token_models_table(profile):
    made_up.add_studies(profile)
    made_up.write_more_metrics(profile, prompts=4)
    cells = cells_of(profile, "xu_token_models")
    # 0.92 - 0.2 + 0.004 seed: mean over seeds 1, 2, 3 is 0.728.
    assert cells["rm_token_bt", "accuracy_preference"].mean == pytest.approx(72.8)
    rows = [model for model, metric in cells if metric == "token_auroc"]
    assert rows == ["rm_token", "rm_token_bt", "rm_token_regression"]
    assert row_label(profile, "xu_token_models", "rm_token_bt") == "Bradley–Terry on sums"
    profile.params["token_models"]["rm_token_other"] = {}
    with pytest.raises(InputError, match=r"token_models.csv: no rows for reward model 'rm_token_other'"):
        build_table(profile, "xu_token_models")


def test_search_table_and_its_choice(profile):
    path = profile.sweeps / "metrics" / "search.csv"
    header = "method,candidate,parameters,win,win_low,win_high,chosen"
    rows = [["figa", 0, "lr=1; beta=2", 0.25, 0.2, 0.3, 0], ["figa", 1, "lr=2; beta=2", 0.5, 0.4, 0.6, 1]]
    made_up.write_csv(path, header, rows)
    cells = cells_of(profile, "search")
    cell = cells["figa/1: lr=2; beta=2", "search_win_rate"]
    assert (cell.mean, cell.low, cell.high) == (50.0, 40.0, 60.0)
    assert [display(cells[row, "chosen"]).value for row, metric in cells if metric == "chosen"] == ["", "yes"]
    assert row_label(profile, "search", "figa/1: lr=2; beta=2") == "FIGA: lr=2; beta=2"
    made_up.write_csv(path, header, [rows[0]])
    with pytest.raises(InputError, match=r"search.csv: figa: expected one chosen candidate, found none"):
        build_table(profile, "search")
    made_up.write_csv(path, header, [rows[1], rows[1]])
    with pytest.raises(InputError, match=r"search.csv:3: candidate 1 of figa comes twice"):
        build_table(profile, "search")


def test_overoptimisation_by_hand(profile):
    # Gold by update: seed 1 peaks at 10, seeds 2 and 3 at 20; on average 0, 1, 2, 1, so the best update is 20.
    gold = {1: (0, 3, 2, 1), 2: (0, 0, 2, 1), 3: (0, 0, 2, 1)}
    rows = [
        ["rm_token", seed, 10 * place, place**2, 0.5 * place, value, 0.5]
        for seed, values in gold.items()
        for place, value in enumerate(values)
    ]
    path = profile.sweeps / "metrics" / "overoptimisation.csv"
    made_up.write_csv(path, "reward,seed,update,kl,proxy,gold,win", rows)
    cells = {metric: cell for (_, metric), cell in cells_of(profile, "overoptimisation").items()}
    assert {metric: cell.mean for metric, cell in cells.items()} == {
        "best_update": 20.0, "best_kl": 4.0, "best_proxy": 1.0, "best_gold": 2.0,
        "last_update": 30.0, "last_kl": 9.0, "last_proxy": 1.5, "last_gold": 1.0, "difference_last_best": -1.0,
    }  # fmt: skip
    assert display(cells["difference_last_best"]).value == "−1.000"
    made_up.write_csv(path, "reward,seed,update,kl,proxy,gold,win", rows[:-1])
    with pytest.raises(
        InputError, match=r"rm_token, seed 3: expected the updates 0 10 20 30 of seed 1, .* found 0 10 20"
    ):
        build_figure(profile, "overoptimisation")


def test_pairs_about_one_prompt_count_as_one_item(profile):
    """Three prompts with 2, 1 and 1 pairs; by hand: accuracy 2/4, values of the prompts
    1/2 + 3/4 * (0.5 + 0.5), 1/2 - 3/4 * 0.5, the same: 1.25, 0.125, 0.125."""
    from fgalign.report.inputs import read_reward_pairs

    made_up.write_reward_pairs(profile, {("rm_edit", "accuracy_edit"): [[1, 1, 0, 0]] * 3})
    path = profile.results / "metrics" / "reward_pairs.csv"
    assert read_reward_pairs(profile, "rm_edit", "accuracy_edit").items == [f"pair-{n}" for n in range(4)]
    path.write_text(path.read_text().replace("pair-1,pair-1", "pair-1,pair-0"))
    grid = read_reward_pairs(profile, "rm_edit", "accuracy_edit")
    assert grid.items == ["pair-0", "pair-2", "pair-3"]
    assert grid.values["correct"].tolist() == [[1.25, 0.125, 0.125]] * 3
    # Alike in every seed, so Student's interval over three prompts: 50 +- 4.303 * 37.5, cut off.
    cell = _accuracy("xu_reward_models", "rm_edit", "accuracy_edit", grid)
    assert (cell.mean, cell.low, cell.high) == (50.0, 0.0, 100.0)


def test_a_source_without_marks_of_flaws_or_references_of_the_pairs(profile):
    """As AlpacaFarm: the tables show what there is."""
    from fgalign.report import inputs

    folder = profile.results / "metrics"
    folder.mkdir(parents=True)
    (folder / "label_quality.json").write_text("{}")
    assert inputs.read_label_quality(profile) == {}
    rows = [["a", side, seed, 0.5, 7, 0] for side in ("initial", "revised") for seed in profile.seeds]
    made_up.write_csv(folder / "figa_data.csv", "id,side,seed,reward,tokens,edit_distance", rows)
    assert list(inputs.read_figa_data(profile)) == ["initial", "revised"]
    example = {"id": "a", "prompt": "p", "response_tokens": ["x", "y"], "labels": [0, -1], "rewards": [0.1, 0.2]}
    (folder / "token_examples.json").write_text(json.dumps([example]))
    assert inputs.read_token_examples(profile)[0]["gold"] == [False, False]


def test_a_token_metric_that_a_seed_lacks_is_left_out(profile):
    from fgalign.report.inputs import read_reward_models

    rows = [["rm_token", "accuracy_edit", seed, 0.75] for seed in profile.seeds]
    rows += [["rm_token", "token_precision", profile.seeds[0], 0.5]]
    made_up.write_csv(profile.results / "metrics" / "reward_models.csv", "model,metric,seed,value", rows)
    assert list(read_reward_models(profile, ["rm_token"])["rm_token"]) == ["accuracy_edit"]


def test_credit_by_hand(profile):
    # Sums over two answers a seed: weight 1 + 2 of 4 + 6 is 30%; flawed tokens 1 + 1 of 10 + 10 are 10%.
    rows = [
        ["rm_token", seed, item, 1, 10, weight + 0.1 * (seed - 2), total]
        for seed in (1, 2, 3)
        for item, weight, total in (("a", 1, 4), ("b", 2, 6))
    ]
    path = profile.results / "metrics" / "credit.csv"
    made_up.write_csv(path, "reward,seed,id,flawed_tokens,tokens,weight_flawed,weight_total", rows)
    cells = {metric: cell for (_, metric), cell in cells_of(profile, "credit").items()}
    # Seeds give 28%, 30% and 32%: standard deviation 2 points, half width 4.3027 * 2 / sqrt(3).
    assert cells["weight_share"].mean == pytest.approx(30.0)
    assert cells["weight_share"].high == pytest.approx(30 + 4.302653 * 2 / 3**0.5, abs=1e-4)
    assert (cells["share_tokens"].mean, cells["difference_to_chance"].mean) == (10.0, 20.0)
    # Another method with the same reward would be added up with the first.
    made_up.write_csv(path, "reward,seed,id,flawed_tokens,tokens,weight_flawed,weight_total", [*rows, rows[3]])
    with pytest.raises(
        InputError, match=r"credit.csv:8: reward rm_token, seed 2, id 'b' comes twice; run .* method a re"
    ):
        build_table(profile, "credit")
    rows[0][5] = 40
    made_up.write_csv(path, "reward,seed,id,flawed_tokens,tokens,weight_flawed,weight_total", rows)
    with pytest.raises(InputError, match=r"rm_token, seed 1: expected 0 <= weight_flawed <= weight_total"):
        build_table(profile, "credit")


def test_labels_table(profile):
    folder = profile.results / "metrics"
    folder.mkdir(parents=True)
    (folder / "label_statistics.json").write_text(json.dumps({"train": {"pairs": 4, "share_bad": 0.125}}))
    rude = {"recall": 0.25, "share_of_labels": 0.5, "intervals": {"recall": [0.125, 0.375]}, "tokens": 8}
    quality = {"precision": 0.5, "recall": None, "pairs": 2, "by_type": {"rude": rude}}
    (folder / "label_quality.json").write_text(json.dumps(quality))
    cells = cells_of(profile, "labels")
    assert {key: cell.mean for key, cell in cells.items()} == {
        ("split:train", "pairs"): 4.0,
        ("split:train", "share_bad"): 12.5,
        ("flaws:all", "precision"): 50.0,
        ("flaws:all", "pairs"): 2.0,
        ("flaws:rude", "recall"): 25.0,
        ("flaws:rude", "share_of_labels"): 50.0,
        ("flaws:rude", "flawed_tokens"): 8.0,
    }
    bounds = {key: (cell.low, cell.high) for key, cell in cells.items() if cell.low is not None}
    assert bounds == {("flaws:rude", "recall"): (12.5, 37.5)}


def test_one_seed_has_no_interval_over_seeds(tmp_path):
    profile = made_up.write_profile(tmp_path)
    profile.params["seeds"] = [7]
    made_up.write_credit(profile)
    cells = cells_of(profile, "credit").values()
    assert {(cell.low, cell.high, cell.seeds) for cell in cells} == {(None, None, (7,))}


# --- the CSV and LaTeX forms ------------------------------------------------------------------------------------------


def test_csv_form_and_back():
    cells = [
        Cell("a", "win_rate", 50.00004, 40.0, 60.0, (1, 2), 5.1),
        Cell("a", "kl", -0.00001),
        Cell("b", "updates", 7.0, 5.0, None, (1, 2)),
    ]
    text = cells_to_csv(cells)
    assert text.splitlines() == [
        "method,metric,mean,ci_low,ci_high,seeds,reported",
        "a,win_rate,50.0000,40.0000,60.0000,1 2,5.1000",
        "a,kl,0.0000,,,,",
        "b,updates,7.0000,5.0000,,1 2,",
    ]
    assert cells_to_csv(cells_from_csv(text, "x")) == text
    with pytest.raises(InputError, match=r"t.csv:2: not a table row"):
        cells_from_csv(text.replace("50.0000", "fifty"), "t.csv")
    with pytest.raises(InputError, match=r"t.csv:1: expected the columns"):
        cells_from_csv("method,metric\n", "t.csv")


def test_a_column_that_the_first_rows_lack_stands_where_it_belongs():
    cells = [Cell("a", "x", 1.0), Cell("a", "z", 1.0), Cell("b", "x", 1.0), Cell("b", "y", 1.0), Cell("b", "z", 1.0)]
    cells += [Cell("b", "last", 1.0), Cell("c", "first", 1.0), Cell("c", "x", 1.0)]
    assert layout(cells)[0].metrics == ("first", "x", "y", "z", "last")
    # Rows keep the order of the whole table in every block.
    blocks = layout(
        [Cell("a", "x", 1.0), Cell("b", "x", 1.0), Cell("b", "y", 1.0), Cell("a", "y", 1.0)], lambda c: c.metric
    )
    assert [[row for row, _ in block.rows] for block in blocks] == [["a", "b"], ["a", "b"]]


def test_what_rounds_to_no_spread_has_no_interval():
    assert display(Cell("a", "win_rate", 50.0, 49.99, 50.01)).interval == ""
    assert display(Cell("a", "win_rate", 50.0, 49.9, 50.01)).interval == "[49.9, 50.0]"


def test_latex_has_as_many_columns_as_its_head_says(built):
    for name in TABLES:
        text = table_paths(built, name)[1].read_text()
        width = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1))
        rows = [line for line in text.splitlines() if line.endswith("\\\\")]
        assert len(rows) >= 3
        assert {line.count("&") - line.count(r"\&") + 1 for line in rows} == {width}, name
        assert not re.search(r"(?<!\\)_", "".join(rows)) and "−" not in text


# --- what must fail -------------------------------------------------------------------------------------------------


def test_missing_seed_fails_and_keeps_the_old_table(built, tmp_path):
    profile = made_up.write_profile(tmp_path)
    made_up.write_metrics(profile, prompts=5)
    before = build_table(profile, "figa_main")[0].read_bytes()
    for name, table in (("judged/figa.csv", "figa_main"), ("reward_models.csv", "xu_reward_models"),
                        ("curves.csv", "xu_efficiency"), ("figa_data.csv", "figa_data")):  # fmt: skip
        path = profile.results / "metrics" / name
        rows = list(csv.DictReader(path.read_text().splitlines()))
        kept = [list(row.values()) for row in rows if row["seed"] != "2"]
        made_up.write_csv(path, ",".join(rows[0]), kept)
        with pytest.raises(InputError, match=r"seed 2 is missing; expected seeds 1 2 3, found 1 3; run .*dvc repro"):
            build_table(profile, table)
    assert (profile.results / "tables" / "figa_main.csv").read_bytes() == before
    with pytest.raises(InputError, match="seed 2 is missing"):
        build_figure(profile, "learning_curves")
    assert not (profile.results / "figures").exists()


def test_missing_method_prompt_column_and_number_fail(profile):
    made_up.write_metrics(profile, prompts=5)
    judged = profile.results / "metrics" / "judged"
    text = (judged / "figa.csv").read_text()
    (judged / "figa.csv").unlink()
    with pytest.raises(InputError, match=r"figa.csv: no such metrics file; run the stage that judges `figa`"):
        build_table(profile, "figa_main")
    (judged / "figa.csv").write_text(text.replace("test-4,2,", "test-9,2,"))
    with pytest.raises(InputError, match=r"seeds 1 and 2 do not have the same ids \(for example 'test-4'\)"):
        build_table(profile, "figa_main")
    (judged / "figa.csv").write_text(text.replace("test-4,", "test-9,"))
    with pytest.raises(InputError, match=r"figa.csv: not the prompts of `base`"):
        build_table(profile, "figa_main")
    (judged / "figa.csv").write_text(text.replace(",kl,", ",kkl,"))
    with pytest.raises(InputError, match=r"figa.csv:1: column 'kl' is missing"):
        build_table(profile, "figa_main")
    lines = text.splitlines()
    lines[3] = re.sub(r"^(test-2,1,)[^,]*", r"\1nan", lines[3])
    (judged / "figa.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"figa.csv:4: score: expected a finite number, found 'nan'"):
        build_table(profile, "figa_main")
    (judged / "figa.csv").write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(InputError, match=r"comes twice"):
        build_table(profile, "figa_main")


def test_unknown_names_and_bad_sections(tmp_path):
    profile = made_up.write_profile(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown table 'x'; expected one of labels, text_quality"):
        build_table(profile, "x")
    with pytest.raises(ConfigError, match=r"unknown figure 'x'; expected one of learning_curves"):
        build_figure(profile, "x")
    for report, fault in (
        ({"methods": ["base"]}, "must name 'sft'"),
        ({"ppo_methods": ["ppo_token"]}, "must name 'ppo_preference'"),
        ({"reward_models": ["rm_edit", "rm_edit"]}, "names a row twice"),
        ({"exmples": 2}, "exmples"),
    ):
        with pytest.raises(ConfigError, match=fault):
            report_config(made_up.write_profile(tmp_path, **report))


# --- a new method ----------------------------------------------------------------------------------------------------


def test_a_new_method_appears_by_its_entry_in_the_parameters(tmp_path):
    profile = made_up.write_profile(tmp_path)
    profile.params["methods"]["simpo"] = {"beta": 2.0}
    made_up.write_metrics(profile, prompts=6, methods={**made_up.METHODS, "simpo": 0.5})
    assert report_config(profile).methods == ["base", "sft", "figa", *made_up.PPO, "simpo"]
    cells = cells_of(profile, "figa_main")
    assert ("simpo", "win_rate") in cells and ("simpo", "difference_to_sft") in cells
    assert "SIMPO" in (profile.results / "tables" / "figa_main.tex").read_text()
    build_claims(profile)
    claim = next(result for result in read_claims(profile) if result.claim == "figa_against_simpo")
    assert (claim.paper, claim.sentence) == ("beyond the papers", "FIGA beats SIMPO.")
    with_it = build_figure(profile, "win_rates")[1].read_bytes()
    profile.params["methods"].pop("simpo")
    assert build_figure(profile, "win_rates")[1].read_bytes() != with_it


def test_no_two_methods_look_alike(profile):
    listed = [METHODS[name] for name in made_up.METHODS]
    assert len({style.colour for style in listed}) == len({style.marker for style in listed}) == len(listed)
    profile.params["methods"] |= {f"method_{index}": {} for index in range(150)}
    styles = method_styles(profile)
    policies = [styles[name] for name in ("base", "sft", *profile.params["methods"])]
    assert len({(style.colour, style.marker, style.line) for style in policies}) == len(policies)
    # The first seven others are apart even in grey, from each other and from the listed ones.
    first = {style.marker for style in policies[6:13]}
    assert first == set(SPARE_MARKERS) and not first & {style.marker for style in METHODS.values()}


def test_styles_follow_the_order_of_the_profile_and_titles(profile):
    profile.params["methods"] |= {"dpo": {}, "expert_iteration": {"title": "SFT on the best"}}
    before = method_styles(profile)
    assert (before["dpo"].label, before["expert_iteration"].label) == ("DPO", "SFT on the best")
    profile.params["methods"]["late"] = {}
    assert {name: method_styles(profile)[name] for name in before} == before
    profile.params["methods"]["ppo_token"]["title"] = "Token PPO"
    assert row_label(profile, "figa_main", "ppo_token") == "Token PPO"
    assert method_styles(profile)["ppo_token"].colour == METHODS["ppo_token"].colour


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_a_second_build_gives_the_same_bytes(built):
    folders = [results / kind for results in (built.results, built.sweeps) for kind in ("tables", "figures")]
    files = sorted(path for folder in folders for path in folder.iterdir())
    assert len(files) == 2 * len(TABLES) + 2 * len(FIGURES)
    before = {path: path.read_bytes() for path in files}
    for name in TABLES:
        build_table(built, name)
    for name in FIGURES:
        build_figure(built, name)
    assert [path.name for path in files if path.read_bytes() != before[path]] == []
    for path in files:
        if path.suffix in (".pdf", ".png"):
            assert not re.search(rb"CreationDate|ModDate|Software|tIME|/Producer|Matplotlib", before[path]), path.name


def test_figures_do_not_follow_the_readers_own_settings(built):
    import matplotlib

    before = (built.results / "figures" / "win_rates.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        build_figure(built, "win_rates")
    assert (built.results / "figures" / "win_rates.png").read_bytes() == before


def test_band_is_mean_and_range_over_seeds():
    def points(*values):
        return [{"update": u, "response_tokens": 1000.0 * u, "score": score} for u, score in values]

    # Update 2 is missing in the second seed and left out.
    x, mean, low, high = _band([points((0, 1), (1, 2), (2, 9)), points((0, 3), (1, 5))], "score")
    assert (x, mean, low, high) == ([0, 1], [2, 3.5], [1, 2], [3, 5])


def test_tokens_are_broken_into_lines_at_the_column_width():
    tokens = ["Hello", ",", "Ġworld", "▁again", "\n", "</s>"]
    line = _lines({"response_tokens": tokens})[0]
    assert [(start, text) for start, _, text, _ in line] == [
        (0, "Hello"), (5, ","), (7, "world"), (13, "again"), (18, "↵"), (20, "[end]"),
    ]  # fmt: skip
    wide = _lines({"response_tokens": [" abcdefghi"] * 12})
    assert len(wide) > 1 and all(line[0][0] == 0 for line in wide)
    assert [index for line in wide for *_, index in line] == list(range(12))


# --- the paper -------------------------------------------------------------------------------------------------------


def test_paper_is_rebuilt_to_the_byte_and_holds_our_numbers(built):
    generated, tables, figures, pdf = build_paper(built.root)
    first = pdf.read_bytes()
    assert first.startswith(b"%PDF") and b"CreationDate" not in first
    assert {path.name for path in tables.iterdir()} == {f"{name}.tex" for name in TABLES}
    assert {path.name for path in figures.iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")
    }
    build_paper(built.root)
    assert pdf.read_bytes() == first
    numbers = json.loads((generated / "numbers.json").read_text())
    cells = {(c.method, c.metric): c for c in read_table(built.results / "tables" / "xu_win_rate.csv")}
    ours = cells["ppo_token", "difference_to_ppo_preference"]
    entry = numbers["comparisons"]["xu_win_rate.ppo_token.difference_to_ppo_preference"]
    assert entry["ours"] == f"{ours.mean:+.1f}".replace("-", "−")
    assert entry["reported"] == "+5.1"
    assert entry["verdict"] == verdict(Reported(5.1, "", ""), ours)
    assert numbers["human"] is None and numbers["more_seeds"] is None


def test_paper_shows_the_human_profile_once_it_has_tables(built, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(built.root, root)
    without = build_paper(root)[3].read_bytes()
    human = made_up.write_profile(root, "human", budget_note="Two hundred pairs and one epoch.")
    made_up.write_metrics(human, prompts=5)
    assert build_paper(root)[3].read_bytes() == without  # metrics alone are not tables
    build_table(human, "labels")
    build_figure(human, "token_labels")
    build_paper(root)
    numbers = json.loads((root / "paper" / "generated" / "numbers.json").read_text())["human"]
    assert list(numbers["tables"]) == ["labels"] and "Reward models" in numbers["missing_tables"]
    assert (root / "paper" / "figures" / "human_token_labels.pdf").exists()
    pages = compile_typst(root / "paper" / "main.typ", format="svg")
    assert len(pages) >= 4


def test_paper_shows_the_claims_with_more_seeds_once_they_were_tested(built, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(built.root, root)
    without = build_paper(root)[3].read_bytes()
    more = made_up.write_profile(root, "more-seeds")
    assert build_paper(root)[3].read_bytes() == without
    text = claims_path(built).read_text(encoding="utf-8")
    write_text(claims_path(more), text.replace("cannot tell", "holds"))
    build_paper(root)
    shown = json.loads((root / "paper" / "generated" / "numbers.json").read_text())
    assert shown["more_seeds"]["claims"]["counts"]["cannot tell"] == 0
    assert shown["more_seeds"]["claims"]["rows"][0]["sentence"] == shown["main"]["claims"]["rows"][0]["sentence"]
    assert claims_path(more) in paper_inputs(root)
    assert (root / "paper" / "main.pdf").read_bytes() != without


def texts_of(source, selector):
    """What the compiled paper says in the elements of a selector, in pieces."""
    import typst

    found = json.loads(typst.query(source, selector, root=source.parent, ignore_system_fonts=True))
    pieces = []

    def walk(node):
        if isinstance(node, dict) and node.get("func") in ("text", "raw", "space"):
            pieces.append(node.get("text", " "))
        elif isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    walk(found)
    return pieces


def test_paper_shows_all_that_the_human_profile_can_have(built, tmp_path):
    import shutil

    import yaml

    root = tmp_path / "copy"
    shutil.copytree(built.root, root)
    human = made_up.write_profile(root, "human", judge_title="ROUGE-L F1 with the gold long answer")
    made_up.add_studies(human)
    rates = {"optim.learning_rate": [0.0002, 4e-05], "optim.max_steps": [48]}
    human.params["search"]["reward_models"] = {"rm_preference": rates}
    human.params["rm_preference"] = {"optim": {"learning_rate": 4e-05, "max_steps": 144}}
    human.file.write_text(yaml.safe_dump(human.params, sort_keys=False), encoding="utf-8")
    made_up.write_metrics(human, prompts=7)
    made_up.write_more_metrics(human, prompts=7)
    rows = [
        [
            "rm_preference",
            number,
            f"optim.learning_rate={rate}; optim.max_steps=48",
            "accuracy_preference",
            value,
            number,
        ]
        for number, (rate, value) in enumerate((("0.0002", 0.40625), ("4e-05", 0.53125)))
    ]
    header = "model,candidate,parameters,metric,value,chosen"
    made_up.write_csv(human.sweeps / "metrics" / "search_rewards.csv", header, rows)
    for name in ("labels", "figa_main", "search", "judges", "edit_likelihood", "xu_reward_models", "xu_win_rate"):
        build_table(human, name)
    build_paper(root)
    source = root / "paper" / "main.typ"
    numbers = json.loads((root / "paper" / "generated" / "numbers.json").read_text())
    # The accuracy's own number of preferences, as the file has rows.
    assert numbers["human"]["judge_pairs"] == {"rouge_l": 7}
    assert human.results / "metrics" / "judges" / "rouge_l_preferences.csv" in paper_inputs(root)
    assert "(7 preferences; " in "".join(texts_of(source, "figure"))
    found = texts_of(source, "<human-search>")
    # A column a rate, from low to high; no raw keys.
    assert found[found.index("0.00004") + 1] == "0.0002" and not any("max_steps" in text for text in found)
    assert "Sequence, preferences(48 steps here, 144 in the run)" in "".join(found).replace(" (", "(")
    # A row without a line of its own in the table of what methods use has dashes.
    numbers["main"]["methods"].append(["novel", "Novel"])
    # The text follows the numbers: the fewest and the most answers cut off, and where intervals lie.
    for row, share in zip(numbers["human"]["methods"], ("9.5", "10.5", "9.0", "10.0", "10.0", "10.0"), strict=True):
        numbers["human"]["values"]["figa_main"][row[0]]["truncated"]["value"] = share
    for row, where in (("gamma_1", "above"), ("beta_0", "around")):
        cell = {"value": f"+{row}", "interval": "", "unit": "points", "side": where}
        numbers["main"]["values"]["figa_sweeps"][row] = {"difference_to_first": cell}
    (root / "paper" / "generated" / "numbers.json").write_text(json.dumps(numbers))
    used = texts_of(source, "<uses>")
    assert used[used.index("Novel") + 1 :][:4] == ["–"] * 4
    text = " ".join("".join(texts_of(source, "par")).split())
    assert re.search(r"in 9\.0%[^%]*\(FIGA\) to 10\.5%[^%]*\(SFT\) of the cases", text)
    assert "+gamma_1 points, a gain; to leave" in text and "by +beta_0 points, an interval that holds zero." in text
    # Policies on held-out edits, whose good tokens gain with the method's skill: 0.13 a pair of tokens of FIGA.
    assert re.search(r"The right way went FIGA \(\+0\.06\d nats \[[^]]*\] a token\); PPO", text)
    assert re.search(r"gained on the initial one under FIGA \(\+0\.1\d nats \[[^]]*\] an edit\);", text)
    assert "that holds zero for" not in text and "only where the correction is shorter" not in text
    # One sentence says of `human` what the other does.
    assert "chosen on the validation split" in text and "were set by hand, but for the learning rates" in text


def test_candidates_of_a_search_by_hand(profile):
    profile.params["methods"]["figa"]["optim"] = {"learning_rate": 0.0002, "max_steps": 48, "decay": 0.5}
    cells = [
        Cell("figa/0: optim.learning_rate=2e-05; optim.max_steps=24", "search_win_rate", 20.0, 10.0, 30.0),
        Cell("figa/0: optim.learning_rate=2e-05; optim.max_steps=24", "chosen", 0.0),
        Cell("figa/1: optim.learning_rate=0.0002; optim.max_steps=24", "search_win_rate", 25.0),
        Cell("figa/1: optim.learning_rate=0.0002; optim.max_steps=24", "chosen", 1.0),
    ]
    shown = _search(profile, cells)
    assert [(row["method"], row["rate"], row["other"], row["chosen"]) for row in shown["candidates"]] == [
        ("FIGA", "0.00002", [["max_steps", "24"]], False),
        ("FIGA", "0.0002", [["max_steps", "24"]], True),
    ]
    assert [(row["value"], row["interval"]) for row in shown["candidates"]] == [("20.0", "[10.0, 30.0]"), ("25.0", "")]
    assert {row["measure"] for row in shown["candidates"]} == {"Win rate, validation (%)"}
    # The run has the chosen rate and other steps.
    assert shown["runs"] == [{"method": "FIGA", "key": "max_steps", "chosen": "24", "run": "48"}]
    # What the profile says nothing of is no difference.
    del profile.params["methods"]["figa"]["optim"]
    assert _search(profile, cells)["runs"] == []


def test_on_which_side_of_zero_a_difference_lies():
    ends = {"above": (0.1, 2.0), "below": (-2.0, -0.1), "around": (0.0, 2.0), "": (None, None)}
    cells = [Cell(name, "difference_to_first", 1.0, *bounds) for name, bounds in ends.items()]
    values = _values([*cells, Cell("above", "win_rate", 50.0, 40.0, 60.0)])
    assert {name: row["difference_to_first"]["side"] for name, row in values.items()} == {name: name for name in ends}
    assert "side" not in values["above"]["win_rate"]


def test_ppo_defaults_are_those_of_the_trainer():
    from dataclasses import fields

    from fgalign.methods import ppo
    from fgalign.ppo_trainer import FineGrainedPPOConfig

    assert SET_BY_RUN == ppo.SET_BY_RUN
    known = [field for field in fields(FineGrainedPPOConfig) if field.name not in SET_BY_RUN]
    assert ppo_defaults() == {field.name: field.default for field in known}
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    said = "GAE with `lam` {lam} and `gamma` {gamma}; `clip_range` (ε) {clip_range} and `clip_range_value` "
    said += "{clip_range_value}; `value_coef` {value_coef}; `kl_coef` {kl_coef}."
    assert said.format(**ppo_defaults()) in text


def test_what_ppo_runs_with_by_hand(profile):
    profile.params["methods"]["ppo_preference"]["trainer"] = {"kl_coef": 0.15, "learning_rate": 5e-05}
    profile.params["methods"]["ppo_edit"]["trainer"] = {"kl_coef": 0.15}
    profile.params["methods"]["ppo_token"]["trainer"] = {"kl_coef": 0.15, "clip_range_value": None}
    shown = _ppo_settings([profile])
    rows = {row["key"]: row["cells"][0] for row in shown["rows"]}
    assert shown["profiles"] == ["mini"] and set(rows) == set(ppo_defaults())
    assert rows["kl_coef"] == {"value": "0.15", "set": True, "others": []}
    # The trainer's default is 1e-5.
    rest = [("0.00001", ["Fine-grained PPO (edits)", "Token-level PPO"])]
    assert rows["learning_rate"] == {"value": "0.00005", "set": True, "others": rest}
    assert rows["clip_range"] == {"value": "0.2", "set": False, "others": []}
    assert rows["clip_range_value"] == {"value": "0.2", "set": False, "others": [("none", ["Token-level PPO"])]}
    assert rows["whiten_advantages"]["value"] == "yes"


def test_paper_compiles_without_what_not_every_profile_has(built, tmp_path):
    profile = made_up.write_profile(tmp_path)
    made_up.write_metrics(profile, prompts=5)
    for name, table in TABLES.items():
        if table.core:
            build_table(profile, name)
    for name, figure in FIGURES.items():
        if figure.core:
            build_figure(profile, name)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "main.typ").write_bytes((ROOT / "paper" / "main.typ").read_bytes())
    generated, tables = build_paper(tmp_path)[:2]
    numbers = json.loads((generated / "numbers.json").read_text())
    assert numbers["main"]["claims"] is None and "Hyperparameter search" in numbers["main"]["missing_tables"]
    assert {path.stem for path in tables.iterdir()} == {name for name, table in TABLES.items() if table.core}
    # One of the further parts alone.
    made_up.add_studies(profile)
    made_up.write_more_metrics(profile, prompts=5)
    build_table(profile, "search")
    build_claims(profile)
    generated, tables, _, _ = build_paper(tmp_path)
    assert (tables / "search.tex").exists()
    claims = json.loads((generated / "numbers.json").read_text())["main"]["claims"]
    assert len(claims["rows"]) == sum(claims["counts"].values()) and len(claims["rows"]) + len(
        claims["untested"]
    ) == len(CLAIMS)


def test_paper_names_what_is_missing(built, tmp_path):
    profile = made_up.write_profile(tmp_path)
    (tmp_path / "paper").mkdir()
    with pytest.raises(InputError, match=r"main.typ: no such file, and the paper needs it"):
        build_paper(profile.root)


@pytest.mark.parametrize(
    ("low", "high", "reported", "comparable", "expected"),
    [
        (0.1, 9.0, 5.1, True, "agrees"),
        (-1.0, 9.0, 5.1, True, "cannot tell"),
        (-9.0, -0.1, 5.1, True, "does not agree"),
        (-9.0, -0.1, -2.0, True, "agrees"),
        (0.0, 9.0, 5.1, True, "cannot tell"),
        (0.1, 9.0, 5.1, False, "not comparable"),
        (None, None, 5.1, True, "not comparable"),
    ],
)
def test_verdicts(low, high, reported, comparable, expected):
    assert verdict(Reported(reported, "", "", comparable), Cell("a", "b", 1.0, low, high)) == expected


def test_the_paper_text_holds_no_result():
    text = (ROOT / "paper" / "main.typ").read_text(encoding="utf-8")
    body = re.sub(r"//.*|#set .*|columns: .*|inset: .*|width: \d+%|size: [\d.]+(pt|em)|#v\(.*?\)|luma\(\d+\)", "", text)
    # What is left with a decimal point is released: the threshold, and FIGA's weight of bad tokens.
    assert set(re.findall(r"(?<![\w.(])\d+\.\d+(?!\d*(?:cm|pt|em|fr))", body)) <= {"0.6", "0.5"}


# --- the index -------------------------------------------------------------------------------------------------------


def pipeline(profile):
    """A pipeline like the real one: stages with a foreach item, training before generation before judging."""

    def model(name):
        return f"data/mini/models/{name}"

    src = "src/fgalign/x.py"
    stages = {"base": {"cmd": "true", "outs": [model("base")], "params": ["base_model"]}}
    stages["align"] = {
        "foreach": ["sft", "figa", *made_up.PPO],
        "do": {"cmd": "true", "deps": [src, model("base")], "outs": [model("${item}")], "params": ["methods.${item}"]},
    }
    stages["judge"] = {
        "foreach": list(made_up.METHODS),
        "do": {
            "cmd": "true",
            "deps": [src, model("${item}")],
            "outs": ["results/mini/metrics/judged/${item}.csv", "results/mini/metrics/budgets/${item}.csv"],
        },
    }
    metrics, sweeps = "results/mini/metrics/", "results/mini/sweeps/metrics/"
    one = {"cmd": "true", "deps": [src]}
    stages["labels"] = {**one, "outs": [metrics + "label_statistics.json"]}
    studies = ["figa_signals", "figa_data_ablation", "figa_sweeps", "figa_filter", "label_noise", "ppo_rates"]
    studies.append("overoptimisation")
    trained = {"cmd": "true", "deps": [src, model("sft")], "outs": ["data/mini/studies/${item}"]}
    stages["study"] = {"foreach": studies, "do": trained}
    judged = {"cmd": "true", "deps": [src, "data/mini/studies/${item}"], "outs": [metrics + "studies/${item}"]}
    stages["judge_study"] = {"foreach": studies[:-1], "do": judged}
    deps = [src, "data/mini/studies/overoptimisation"]
    stages["overoptimisation"] = {**one, "deps": deps, "outs": [sweeps + "overoptimisation.csv"]}
    stages["benchmark"] = {**one, "deps": [src, "data/mini/models"], "outs": [metrics + "benchmarks"]}
    stages["token_models"] = {**one, "outs": [sweeps + "token_models.csv"]}
    stages["search"] = {**one, "outs": ["data/mini/search"]}
    stages["choose_search"] = {**one, "deps": [src, "data/mini/search"], "outs": [sweeps + "search.csv"]}
    stages["credit"] = {**one, "deps": [src, *(model(name) for name in made_up.PPO)], "outs": [metrics + "credit.csv"]}
    stages["score_edits"] = {
        "foreach": ["main"],
        "do": {**one, "deps": [src, "data/mini/models"], "outs": [metrics + "edit_likelihood.csv"]},
    }
    stages["text_quality"] = {**one, "outs": [metrics + "text_quality.csv"]}
    stages["label_quality"] = {**one, "outs": [metrics + "label_quality.json"]}
    stages["reward_models"] = {
        **one,
        "outs": [
            metrics + name for name in ("reward_models.csv", "reward_pairs.csv", "token_intervals.csv", "figa_data.csv")
        ],
    }
    judges = [metrics + f"judges/rouge_l{kind}.csv" for kind in ("", "_preferences")]
    stages["rejudge"] = {"foreach": ["rouge_l"], "do": {**one, "outs": judges}}
    stages["curves"] = {**one, "deps": [src, *(model(name) for name in made_up.PPO)], "outs": [metrics + "curves.csv"]}
    return stages


def test_index_links_every_row_and_all_its_links_exist(built, tmp_path):
    import shutil

    import yaml
    from dvc.repo import Repo

    root = tmp_path / "repo"
    shutil.copytree(built.root, root)
    (root / "src" / "fgalign" / "x.py").write_text("x = 1\n")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline(built)}))
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    Repo.init(str(root)).close()
    params = root / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("profile: mini", "profile: mini\nbase_model: {}"))
    subprocess.run([*git, "add", "src", "params.yaml", "dvc.yaml"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-qm", "code"], cwd=root, check=True)
    path = write_index(root)
    first = path.read_text()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    for link in re.findall(r"\]\(([^)]+)\)", first):
        assert (root / "results" / link).exists(), link
    main = first[first.index("### `figa_main`") :].splitlines()
    row = next(line for line in main if line.startswith("| FIGA (`figa`)"))
    assert "| `judge@figa`, `align@figa`, `benchmark` |" in row
    assert "`mini/benchmark@figa` |" in row
    assert "[params.yaml](../params.yaml) `methods.figa`" in row
    assert "`mini/judge@figa`, `mini/figa/seed-1`, `mini/figa/seed-2`, `mini/figa/seed-3`" in row
    assert "[figa.csv](mini/metrics/judged/figa.csv), [figa.csv](mini/metrics/budgets/figa.csv)" in row
    row = next(line for line in first.splitlines() if line.startswith("| Word (`word`)"))
    assert "| `judge_study@figa_signals`, `study@figa_signals` |" in row
    assert "`mini/judge_study@figa_signals/word`, `mini/study@figa_signals/word/seed-1`" in row
    row = next(line for line in first.splitlines() if "(`figa/1: optim.learning_rate=0.0003`)" in line)
    assert "| `choose_search`, `search` |" in row and "`mini/choose_search`, `mini/search/figa/1/seed-1` |" in row
    row = next(line for line in first[first.index("### `edit_likelihood`") :].splitlines() if "(`figa`)" in line)
    assert "| `score_edits@main`, `align@figa` |" in row and "`mini/score_edits`, `mini/figa/seed-1`" in row
    row = next(line for line in first.splitlines() if "(`token_ppo_beats_ppo`)" in line)
    assert "| `judge@ppo_token`, `judge@ppo_preference` |" in row and "[ppo_token.csv]" in row
    assert f"`{head[:12]}`" in row and "1 2 3" in row
    rows = [line for line in first.splitlines() if re.match(r"\| (?!row|claim )", line)]
    methods = [{cell.method for cell in read_table(table_paths(built, name)[0])} for name in TABLES]
    assert len(rows) == sum(map(len, methods)) + len(read_claims(built))
    # A later commit that touches no code leaves the index as it is.
    subprocess.run([*git, "add", "results"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-qm", "results"], cwd=root, check=True)
    assert write_index(root).read_text() == first
    # Of another profile the claims alone were built: they are linked all the same.
    more = made_up.write_profile(root, "more-seeds")
    write_text(claims_path(more), claims_path(built).read_text(encoding="utf-8").splitlines(keepends=True)[0])
    assert "## Profile `more-seeds`" in write_index(root).read_text()
    assert "[claims.csv](more-seeds/claims.csv)" in write_index(root).read_text()


def test_a_row_without_a_stage_is_an_error(built):
    with pytest.raises(InputError, match=r"no stage writes results/mini/metrics/judged/figa.csv"):
        row_source(built, [Stage("x", (), ("other",), ())], "figa_main", "figa", [1])


def test_run_names_follow_the_tracking(built):
    def stage(address, *outs):
        return Stage(address, (), outs, ())

    assert run_names(built, stage("base", "data/mini/models/base"), "base", [1, 2]) == ["mini/base"]
    assert run_names(built, stage("align@figa", "data/mini/models/figa"), "figa", [1, 2])[1] == "mini/figa/seed-2"
    assert run_names(built, stage("p/dvc.yaml:judge@figa"), "figa", [1, 2]) == ["mini/judge@figa"]
    assert run_names(built, stage("judge_start@base"), "base", [1, 2]) == ["mini/judge@base"]
    assert run_names(built, stage("p/dvc.yaml:curves"), "ppo_edit", [1, 2]) == ["mini/curves"]
    assert run_names(built, stage("benchmark"), "figa", [1, 2]) == ["mini/benchmark@figa"]
    assert run_names(built, stage("credit@main"), "rm_edit", [1, 2]) == ["mini/credit"]
    assert run_names(built, stage("reward_models"), "rm_edit", [4]) == ["mini/reward_models/rm_edit/seed-4"]
    assert run_names(built, stage("token_models"), "rm_token_bt", [4]) == ["mini/token_models/rm_token_bt/seed-4"]
    noise = stage("study@label_noise", "data/mini/studies/label_noise")
    assert run_names(built, noise, "figa_0.2", [1, 2])[1] == "mini/study@label_noise/figa_0.2/seed-2"
    assert run_names(built, stage("study_edits@label_noise"), "figa_0.2", [1]) == []
    assert run_names(built, stage("p/dvc.yaml:search"), "figa", [3]) == [
        "mini/search/figa/0/seed-1", "mini/search/figa/1/seed-1",
    ]  # fmt: skip


# --- start-up and the layers ------------------------------------------------------------------------------------------


def test_importing_the_report_is_light():
    code = (
        "import sys, fgalign.report.tables, fgalign.report.figures, fgalign.report.paper, fgalign.report.index,"
        "fgalign.report.check, fgalign.report.entry, fgalign.report.claims\n"
        "print([name for name in ('torch', 'matplotlib', 'scipy', 'numpy', 'typst', 'dvc') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_table_and_figure_has_an_entry_that_works(built, monkeypatch, capsys):
    import runpy

    names = [f"table_{name}" for name in TABLES] + [f"figure_{name}" for name in FIGURES]
    found = {path.stem for path in (ROOT / "reproduce").glob("*.py")} - {"check"}
    assert {*names, "claims"} == found
    monkeypatch.chdir(built.root)
    for kind, name in ((kind, name) for kind, names in (("table", TABLES), ("figure", FIGURES)) for name in names):
        entry = (ROOT / "reproduce" / f"{kind}_{name}.py").read_text()
        assert f'{kind}_entry("{name}")' in entry and f"`{name}`" in entry
    for name in ("table_labels", "figure_win_rates", "claims"):
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "reproduce" / f"{name}.py"), run_name="__main__")
        assert stop.value.code == 0
    out = capsys.readouterr()
    assert "claim,paper,sentence" in out.out and "results/mini/claims.csv" in out.err
    assert out.out.startswith("method,metric,mean") and "results/mini/figures/win_rates.png" in out.err


def test_settings_by_use(tmp_path):
    from fgalign.report.settings import write_settings

    methods = {
        "a": {"kind": "x", "optim": {"learning_rate": 1, "epochs": 2}, "search": {"optim.learning_rate": [1, 2]}},
        "b": {"kind": "y", "n": 4, "curve": {"every": 2}},
    }
    params = {"seeds": [1], "runtime": {}, "methods": methods, "search": {"seed": 1}, "source": {"seed": 0}}
    params["evaluation"] = {"judge": "j"}
    paths = write_settings(Profile("mini", tmp_path, params, tmp_path / "params.yaml"))
    evaluation, settings, recipe, search, search_rewards = (json.loads(path.read_text()) for path in paths)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"data/mini/{name}.json" for name in ("evaluation", "settings", "recipe", "search", "search_rewards")
    ]
    assert search_rewards == {}
    assert evaluation == {"evaluation": {"judge": "j"}, "seeds": [1], "runtime": {}}
    assert settings == {"seeds": [1], "evaluation": {"judge": "j"}, "methods": methods, "search": {"seed": 1}}
    assert recipe == params
    # What the search is to choose is not in what it starts from; its grid is.
    assert search["methods"]["a"] == {
        "kind": "x", "optim": {"epochs": 2}, "search": {"optim.learning_rate": [1, 2]},
    }  # fmt: skip
    assert search == {"runtime": {}, "search": {"seed": 1}, "methods": search["methods"]}
    assert "b" not in search["methods"]  # without a grid the search does not train it
    assert params["methods"]["a"]["optim"]["learning_rate"] == 1  # the profile itself keeps it

    # So it is with reward models that have a grid, and only with them.
    params["rm_edit"] = {"start": "sft", "optim": {"max_steps": 3, "learning_rate": 1}}
    params["rm_token"] = {"start": "sft"}
    grids = {"rm_edit": {"optim.max_steps": [3, 9], "start": ["base"]}}
    params["search"] = {"seed": 1, "together": [["a"]], "reward_models": grids}
    *_, of_methods, path = write_settings(Profile("mini", tmp_path, params, tmp_path / "params.yaml"))
    assert (of_methods.name, path.name) == ("search.json", "search_rewards.json")
    # Neither search runs again when what the other one tries is changed.
    assert json.loads(of_methods.read_text()) == search | {"search": {"seed": 1, "together": [["a"]]}}
    search = json.loads(path.read_text())
    own = {"seed": 1, "reward_models": grids}
    assert search == {"runtime": {}, "rm_edit": {"optim": {"learning_rate": 1}}, "search": own}
    params["search"] = {"seed": 1, "reward_models": ["rm_edit"]}
    with pytest.raises(ConfigError, match=r"params.yaml: search.reward_models: Input"):
        write_settings(Profile("mini", tmp_path, params, tmp_path / "params.yaml"))
    assert json.loads(path.read_text()) == search  # what was written before is as it was
