"""Claims: the rules of the verdict, Holm's correction and the detectable effect by hand; the two sides of each kind."""

from __future__ import annotations

import numpy as np
import pytest
import synthetic_metrics as made_up
from scipy.stats import t as student

from fgalign.errors import InputError
from fgalign.evaluation.statistics import paired_interval, pooled_seed_variance
from fgalign.report.claims import (
    BEYOND,
    CLAIMS,
    Estimate,
    build_claims,
    claim_cells,
    claim_files,
    claim_results,
    claims_from_csv,
    claims_to_csv,
    detectable_effect,
    estimate,
    judge,
    read_claims,
    seed_pools,
    untested,
    verdict,
)


@pytest.fixture
def profile(tmp_path):
    """A profile with three seeds, all metrics and every study."""
    profile = made_up.write_profile(tmp_path)
    made_up.add_studies(profile)
    made_up.write_metrics(profile, prompts=6)
    made_up.write_more_metrics(profile, prompts=6)
    return profile


def by_name(profile):
    """The tested claims by their names."""
    return {result.claim: result for result in claim_results(profile)}


def write_wins(profile, path, wins):
    """Judged samples with the given wins, ``wins[seed][prompt]``."""
    rows = [
        [f"p{prompt}", seed, 1.0, 1.0, win, 2.5, 10, "False", 0.5, 0.6, 0.7]
        for seed, row in zip(profile.seeds, wins, strict=True)
        for prompt, win in enumerate(row)
    ]
    made_up.write_csv(profile.results / "metrics" / f"{path}.csv", made_up.JUDGED, rows)


def write_scores(profile, runs, last=(20, 20, 20)):
    """``runs[method][seed place]`` lists scores at updates 0, 10 and ``last`` of the seed."""
    rows = [
        [method, seed, update, 100 * update, 5 * update, score, 0.5, 0.1, 0.0]
        for method, by_seed in runs.items()
        for seed, scores, end in zip(profile.seeds, by_seed, last, strict=True)
        for update, score in zip((0, 10, end), scores, strict=True)
    ]
    header = "method,seed,update,response_tokens,gradient_updates,score,win,kl,reward"
    made_up.write_csv(profile.results / "metrics" / "curves.csv", header, rows)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "low", "high", "p_holm", "expected"),
    [
        (3.0, 1.0, 5.0, 0.049, "holds"),
        (3.0, 1.0, 5.0, 0.05, "cannot tell"),
        (-3.0, -5.0, -1.0, 0.049, "does not hold"),
        (-3.0, -5.0, -1.0, 0.2, "does not hold"),  # an effect of 2 points or more is ruled out
        (0.5, -0.9, 1.9, 0.2, "does not hold"),
        (0.5, -1.0, 2.0, 0.2, "cannot tell"),
        (0.5, 0.1, 1.0, 0.01, "holds"),  # small, but on the claimed side beyond doubt
        (0.5, 0.1, 1.0, 0.06, "cannot tell"),  # perhaps small, but there
        (0.0, 0.0, 0.0, 1.0, "does not hold"),  # the same everywhere
    ],
)
def test_verdict(mean, low, high, p_holm, expected):
    assert verdict(mean, low, high, p_holm, smallest=2.0) == expected


def test_estimate_and_detectable_effect_by_hand():
    # Differences 1, 2, 3 of three seeds: mean 2, standard error 1 / sqrt(3), 2 degrees of freedom.
    found = estimate(np.array([[2.0], [4.0], [6.0]]), np.array([[1.0], [2.0], [3.0]]))
    error = 1 / 3**0.5
    assert found.mean == 2.0
    # t(0.975, 2) = 4.302653; t = 2 sqrt(3) = 3.4641, for which p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / 3.7417.
    assert found.high - 2.0 == pytest.approx(4.302653 * error, abs=1e-6)
    assert found.p_value == pytest.approx(1 - 12**0.5 / 14**0.5, abs=1e-9)
    # t(0.8, 2) = 0.6 / sqrt(2 * 0.8 * 0.2) = 1.060660.
    assert detectable_effect(found.half_width, 0.05) == pytest.approx((4.302653 + 1.060660) * error, abs=1e-6)
    # At 0.05 / 2: t(0.9875, 2) = 0.975 / sqrt(2 * 0.9875 * 0.0125) = 6.205347.
    assert detectable_effect(found.half_width, 0.025) == pytest.approx((6.205347 + 1.060660) * error, abs=1e-6)


def test_seeds_that_coincide_decide_nothing():
    found = estimate(np.full((3, 1), 40.0), np.zeros((3, 1)), limit=100.0)
    # Three seeds: 1 - 0.025^(1/3) = 0.707598 of the way to each limit.
    assert (found.low, found.high) == pytest.approx((40 - 0.7075982 * 140, 40 + 0.7075982 * 60))
    assert found.p_value == 0.25
    none = estimate(np.zeros((4, 1)), np.zeros((4, 1)), limit=100.0)
    assert judge([none], [5.0])[0][:2] == (1.0, "cannot tell")


def test_holm_and_the_level_of_each_claim_by_hand():
    levels = []

    def half_width(level):
        levels.append(round(level, 6))
        return level

    claims = [Estimate(1.0, 0.5, 9.0, p, half_width) for p in (0.01, 0.04, 0.03)]
    results = judge(claims, [2.0, 2.0, 2.0])
    # In order of p: 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, and 1 * 0.04, raised to 0.06.
    assert [p for p, _, _ in results] == pytest.approx([0.03, 0.06, 0.06])
    assert [decision for _, decision, _ in results] == ["holds", "cannot tell", "cannot tell"]
    # Holm holds the smallest p against 0.05 / 3, the next (0.03) against 0.05 / 2, the last (0.04) against 0.05.
    assert levels[::2] == pytest.approx([1 - 0.05 / 3, 0.95, 0.975], abs=1e-6)
    assert levels[1::2] == [0.6, 0.6, 0.6]


# --- what is compared ------------------------------------------------------------------------------------------------


def test_win_rates_are_paired_by_seed_and_prompt(profile):
    profile.params["studies"].clear()
    write_wins(profile, "judged/ppo_token", [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    plain = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    for method in ("base", "sft", "figa", "ppo_preference", "ppo_edit"):
        write_wins(profile, f"judged/{method}", plain)
    # The rows of one side in another order: pairs go by id.
    path = profile.results / "metrics" / "judged" / "ppo_token.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    found = by_name(profile)["token_ppo_beats_ppo"]
    # As worked in test_report: difference 25 points, standard error 100 / 6, 6 degrees of freedom, t = 1.5. The other
    # policies are all alike and count once, and pooling over the two sides of a difference changes nothing.
    assert found.estimate == pytest.approx(25.0)
    assert found.ci_high == pytest.approx(25 + 100 * float(student.ppf(0.975, 6)) / 6)
    assert found.p_value == pytest.approx(2 * float(student.sf(1.5, 6)))
    assert (found.reported, found.seeds, found.smallest_effect) == (5.1, (1, 2, 3), 2.0)
    # The same wins everywhere: no difference, no error.
    same = by_name(profile)["figa_beats_ppo"]
    assert (same.estimate, same.ci_low, same.ci_high, same.p_value, same.verdict) == (0, 0, 0, 1, "does not hold")


def test_accuracies_are_paired_by_seed_and_pair(profile):
    generator = np.random.default_rng(1)
    models, metrics = ("rm_preference", "rm_edit", "rm_token"), ("accuracy_edit", "accuracy_preference")
    correct = {(model, metric): generator.integers(0, 3, (3, 8)) / 2 for metric in metrics for model in models}
    made_up.write_reward_pairs(profile, correct)
    found = by_name(profile)
    for metric, name in zip(metrics, ("edits", "preferences"), strict=True):
        pool = pooled_seed_variance([100 * correct[model, metric] for model in models])
        assert pool.freedom == 4
        for model, claim in (("rm_edit", f"edit_model_on_{name}"), ("rm_token", f"token_model_on_{name}")):
            sides = [100 * correct[side, metric] for side in (model, "rm_preference")]
            expected = paired_interval(*sides, seed_variance=pool)
            assert found[claim].estimate == pytest.approx(sides[0].mean() - sides[1].mean())
            assert (found[claim].ci_low, found[claim].p_value) == pytest.approx((expected.low, expected.p_value))
    del correct["rm_token", "accuracy_edit"]
    made_up.write_reward_pairs(profile, correct)
    with pytest.raises(InputError, match=r"reward_pairs.csv \(rm_token, accuracy_edit\): seed 1 is missing; expected"):
        claim_results(profile)


def test_a_seed_that_never_reaches_the_target_counts_with_the_whole_budget(profile):
    never = [0.1, 0.2, 0.3]
    runs = {
        "ppo_preference": [[0.1, 0.3, 0.5], [0.1, 0.5, 0.4], [0.1, 0.4, 0.6]],  # best at 20, 10, 20
        "ppo_edit": [never] * 3,
        "ppo_token": [[0.1, 0.6, 0.1], never, [0.1, 0.6, 0.7]],  # reached at 10, never, 10
    }
    write_scores(profile, runs)
    # Shares of the budget 100, 50, 100 and 50, 100, 50: plain minus token 50, -50, 50 points.
    assert by_name(profile)["token_ppo_needs_fewer_steps"].estimate == pytest.approx(50 / 3)
    # A longer budget for seed 1 alone: 40 of 40 against 10 of 40 steps, 75 points.
    write_scores(profile, runs, last=(40, 20, 20))
    assert by_name(profile)["token_ppo_needs_fewer_steps"].estimate == pytest.approx(75 / 3)


def test_credit_is_compared_beyond_chance(profile):
    rows = [
        [reward, seed, "a", 1, chance, weight + seed, 100]
        for reward, chance, weight in (("rm_token", 10, 30), ("rm_preference", 5, 28))
        for seed in (1, 2, 3)
    ]
    header = "reward,seed,id,flawed_tokens,tokens,weight_flawed,weight_total"
    made_up.write_csv(profile.results / "metrics" / "credit.csv", header, rows)
    # Token: 30 + seed less 10 points of chance; sequence: 28 + seed less 20.
    assert by_name(profile)["token_rewards_find_flaws"].estimate == pytest.approx(12.0)


def test_the_variance_between_seeds_is_pooled_over_the_policies_of_the_papers_claims(profile):
    profile.params["studies"].pop("figa_data_ablation")
    generator = np.random.default_rng(0)
    wins = {method: generator.integers(0, 2, (3, 5)) for method in ("sft", "ppo_preference", "ppo_edit", "ppo_token")}
    wins["figa"] = wins["levenshtein"] = generator.integers(0, 2, (3, 5))  # the study's first variant is FIGA
    wins |= {variant: generator.integers(0, 2, (3, 5)) for variant in ("bag_of_words", "constant", "reward_difference")}
    beyond = {name: generator.integers(0, 2, (3, 5)) for name in ("base", "word", "reward_model", "simpo")}
    profile.params["methods"]["simpo"] = {"kind": "simpo"}
    for name, values in (wins | beyond).items():
        folder = "studies/figa_signals" if name in made_up.SIGNALS else "judged"
        write_wins(profile, f"{folder}/{name}", values)
    named = [100 * values for name, values in wins.items() if name != "levenshtein"]
    assert len(named) == 8
    pool = pooled_seed_variance(named)
    assert seed_pools(profile)["win rate (points)"] == pytest.approx(tuple(pool)) and pool.freedom == 7 * 2
    found = by_name(profile)
    for claim, better, other in (
        ("token_ppo_beats_ppo", "ppo_token", "ppo_preference"),
        ("levenshtein_beats_constant", "figa", "constant"),
        ("figa_against_simpo", "figa", "simpo"),
    ):
        sides = [100.0 * (wins | beyond)[name] for name in (better, other)]
        expected = paired_interval(*sides, seed_variance=pool)
        assert (found[claim].ci_low, found[claim].p_value) == pytest.approx((expected.low, expected.p_value))
        # The last one's own variance is larger than the pooled one.
        own = found[claim].ci_low == pytest.approx(paired_interval(*sides).low)
        assert own == (claim == "figa_against_simpo")


def test_variants_are_compared_with_the_first(profile):
    profile.params["studies"].pop("figa_data_ablation")
    for method in ("base", "sft", "figa", "ppo_preference", "ppo_edit", "ppo_token"):
        write_wins(profile, f"judged/{method}", [[1, 1, 0, 0]] * 3)
    for variant in made_up.SIGNALS:
        wins = [1, 0, 0, 0] if variant == "constant" else [1, 1, 1, 0]
        write_wins(profile, f"studies/figa_signals/{variant}", [wins] * 3)
    found = by_name(profile)
    assert found["levenshtein_beats_constant"].estimate == pytest.approx(50.0)
    assert found["levenshtein_beats_bag_of_words"].estimate == 0.0
    folder = profile.results / "metrics" / "studies" / "figa_signals"
    assert claim_files(profile, "levenshtein_beats_constant") == [folder / "levenshtein.csv", folder / "constant.csv"]


# --- what is left out, and what must fail ----------------------------------------------------------------------------


def test_claims_that_a_profile_cannot_test_are_left_out_and_named(profile):
    names = list(by_name(profile))
    without = ["figa_beats_sft_revised", "figa_beats_dpo", "figa_beats_rrhf", "figa_beats_coh"]
    assert [claim.name for claim in CLAIMS if claim.name not in names] == without
    profile.params["methods"]["dpo"] = {"kind": "dpo"}
    made_up.write_judged(profile, "dpo", 0.5, 6)
    results = claim_results(profile)
    assert untested(profile, results) == [
        "FIGA beats SFT on the revised responses.", "FIGA beats RRHF.", "FIGA beats CoH.",
    ]  # fmt: skip
    profile.params["studies"]["figa_signals"]["variants"].pop("constant")
    profile.params["studies"].pop("figa_data_ablation")
    (profile.results / "metrics" / "credit.csv").unlink()
    gone = {result.claim for result in results} - set(by_name(profile))
    assert gone == {"levenshtein_beats_constant", "revised_beats_reference", "token_rewards_find_flaws"}


def test_a_part_of_a_study_or_a_method_that_is_missing_is_an_error(profile):
    folder = profile.results / "metrics"
    (folder / "studies" / "figa_signals" / "constant.csv").unlink()
    with pytest.raises(InputError, match=r"constant.csv: no such metrics file; run the stage that judges study"):
        build_claims(profile)
    assert not (profile.results / "claims.csv").exists()
    made_up.write_judged(profile, "constant", 0.4, 6, "studies/figa_signals")
    (folder / "judged" / "figa.csv").unlink()
    with pytest.raises(InputError, match=r"figa.csv: no such metrics file"):
        build_claims(profile)


def test_one_seed_is_not_enough(profile, capsys):
    profile.params["seeds"] = [1]
    with pytest.raises(InputError, match=r"params.yaml: seeds: claims need at least two training seeds, found 1"):
        claim_results(profile)
    build_claims(profile)
    assert read_claims(profile) == []
    assert "params.yaml: seeds: claims need at least two training seeds, found 1; none is" in capsys.readouterr().out


def test_a_further_method_changes_no_verdict_on_the_papers(profile):
    before = {name: result for name, result in by_name(profile).items() if result.paper != BEYOND}
    profile.params["methods"]["simpo"] = {"title": "SimPO"}
    made_up.write_judged(profile, "simpo", 0.9, 6)
    after = by_name(profile)
    assert {name: after[name] for name in before} == before
    assert (after["figa_against_simpo"].sentence, after["figa_against_simpo"].paper) == ("FIGA beats SimPO.", BEYOND)
    # Holm's last step: the largest p of the further rows is multiplied by 1 or raised to the one before.
    further = [result for result in after.values() if result.paper == BEYOND]
    smallest = min(further, key=lambda result: result.p_value)
    assert smallest.p_holm == pytest.approx(min(1.0, len(further) * smallest.p_value))


# --- the file --------------------------------------------------------------------------------------------------------


def test_csv_form_and_back(profile):
    path = build_claims(profile)
    text = path.read_text()
    assert text.splitlines()[0] == (
        "claim,paper,sentence,quantity,estimate,ci_low,ci_high,p_value,p_holm,verdict,detectable,smallest_effect,"
        "seeds,reported"
    )
    results = read_claims(profile)
    assert claims_to_csv(results) == text and results[0].reported == 5.1 and results[1].reported is None
    assert results[0].estimate == pytest.approx(claim_results(profile)[0].estimate, abs=5e-5)
    cells = claim_cells(results)
    assert (cells[0].method, cells[0].metric, cells[0].low) == ("token_ppo_beats_ppo", "estimate", results[0].ci_low)
    assert cells[1].mean == {"does not hold": -1, "cannot tell": 0, "holds": 1}[results[0].verdict]
    with pytest.raises(InputError, match=r"c.csv:1: expected the columns claim,paper"):
        claims_from_csv("claim,paper\n", "c.csv")
    with pytest.raises(InputError, match=r"c.csv:2: not a claim: .*run `fgalign claims`"):
        claims_from_csv(text.replace(",2.0000,", ",two,", 1), "c.csv")
    for row in (text.splitlines()[1] + ",more", text.splitlines()[1].replace(results[0].verdict, "maybe")):
        with pytest.raises(InputError, match=r"c.csv:2: not a claim"):
            claims_from_csv("\n".join([text.splitlines()[0], row]), "c.csv")
    path.unlink()
    with pytest.raises(InputError, match=r"claims.csv: no such file; run `fgalign claims`"):
        read_claims(profile)


def test_every_claim_has_a_sentence_and_a_name_of_its_own():
    assert len({claim.name for claim in CLAIMS}) == len({claim.sentence for claim in CLAIMS}) == len(CLAIMS) == 17
    assert all(claim.sentence.endswith(".") for claim in CLAIMS)
