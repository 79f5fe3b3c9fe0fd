"""Intervals and measures, with the arithmetic of every expectation shown. Quantiles of t are from printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fgalign.evaluation.statistics import (
    Parts,
    SeedVariance,
    auroc,
    auroc_parts,
    crossed_interval,
    holm,
    paired_interval,
    parts_interval,
    pooled_seed_variance,
    ratio_parts,
    seed_interval,
)

T2, T3, T4 = 4.302653, 3.182446, 2.776445  # 97.5 % quantiles of t with 2, 3 and 4 degrees of freedom


# --- crossed intervals ------------------------------------------------------------------------------------------------


def test_one_seed_is_the_t_interval_over_prompts():
    # Mean 3; squares 4 + 1 + 0 + 1 + 4 = 10, variance 10/4 = 2.5, error sqrt(2.5/5) = 0.707107; t(4) = 2.776445.
    interval = crossed_interval([[1, 2, 3, 4, 5]])
    assert interval.mean == 3
    assert interval.high - 3 == pytest.approx(T4 * math.sqrt(0.5), rel=1e-6)
    assert 3 - interval.low == pytest.approx(T4 * math.sqrt(0.5), rel=1e-6)


def test_one_prompt_is_the_t_interval_over_seeds():
    # Mean 2; squares 1 + 0 + 1, variance 1, error sqrt(1/3); t(2) = 4.302653.
    interval = crossed_interval([[1], [2], [3]])
    assert interval == seed_interval([1, 2, 3])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(T2 / math.sqrt(3), rel=1e-6)


def test_seeds_and_prompts_both_vary():
    # Rows (seeds)   1 3 5 | mean 3        column means 3 4 8, grand mean 5
    #                5 5 11 | mean 7
    # MS_seeds   = 3 * (4 + 4) / 1 = 24
    # MS_prompts = 2 * (4 + 1 + 9) / 2 = 14
    # residuals: 1-3-3+5 = 0, 3-3-4+5 = 1, 5-3-8+5 = -1; second row 0, -1, 1. Squares 4; MS_res = 4 / (1 * 2) = 2
    # variance = (24 + 14 - 2) / 6 = 6, error sqrt(6)
    # nu = 36^2 / (24^2/1 + 14^2/2 + 2^2/2) = 1296 / (576 + 98 + 2) = 1296/676 = 1.917160
    interval = crossed_interval([[1, 3, 5], [5, 5, 11]])
    half = stats.t.ppf(0.975, 1296 / 676) * math.sqrt(6)
    assert interval.mean == pytest.approx(5, abs=1e-12)
    assert interval.high == pytest.approx(5 + half, rel=1e-12)
    assert interval.low == pytest.approx(5 - half, rel=1e-12)


def test_a_seed_component_below_zero_counts_as_zero():
    # Rows 0 4 8 | 4     column means 1 3 8, grand mean 4: seed means equal, MS_seeds = 0
    #      2 2 8 | 4     MS_prompts = 2 * (9 + 1 + 16) / 2 = 26
    # residuals -1 1 0, 1 -1 0: squares 4, MS_res = 4/2 = 2. v_a = (0 - 2)/3 < 0 counts as 0:
    # variance = MS_prompts / 6 = 26/6, and nu = that of MS_prompts alone, 2.
    interval = crossed_interval([[0, 4, 8], [2, 2, 8]])
    assert interval.high - interval.mean == pytest.approx(T2 * math.sqrt(26 / 6), rel=1e-6)
    # The same table on its side: now the prompts' component is the one that vanishes.
    turned = crossed_interval(np.array([[0, 4, 8], [2, 2, 8]]).T)
    assert turned == pytest.approx(interval, rel=1e-12)


def test_both_components_below_zero_leave_the_residual():
    # All row and column means are 0, so the residuals are the values: six of size 1, squares 6,
    # MS_res = 6 / (2 * 2) = 1.5, variance 1.5/9, nu = 4.
    interval = crossed_interval([[1, -1, 0], [-1, 0, 1], [0, 1, -1]])
    assert interval.high == pytest.approx(T4 * math.sqrt(1.5 / 9), rel=1e-6)


def test_degrees_of_freedom_do_not_fall_below_both_factors():
    # Rows 0 2 | 1 ; 2 9 | 5.5 -- column means 1, 5.5, grand mean 3.25.
    # MS_seeds = MS_prompts = 2 * 2 * 2.25^2 = 20.25; residuals +-1.25: MS_res = 4 * 1.5625 = 6.25
    # variance = (20.25 + 20.25 - 6.25)/4 = 8.5625
    # nu = 34.25^2 / (20.25^2 + 20.25^2 + 6.25^2) = 1173.0625 / 859.1875 = 1.365
    interval = crossed_interval([[0, 2], [2, 9]])
    assert interval.high - 3.25 == pytest.approx(
        stats.t.ppf(0.975, 1173.0625 / 859.1875) * math.sqrt(8.5625), rel=1e-12
    )
    # Rows 0 0 / 0 1: all three mean squares are 0.25, no component remains, nu is the residual's, 1:
    # half = 12.7062 * sqrt(0.25/4) = 12.7062 * 0.25.
    equal = crossed_interval([[0, 0], [0, 1]])
    assert equal.high - 0.25 == pytest.approx(12.706205 * 0.25, rel=1e-6)
    # Rows 0 1 / 1 10: MS_seeds = MS_prompts = 4 * 2.5^2 = 25, residuals +-2: MS_res = 16; nu = 34^2 / (625 + 625 + 256)
    # = 1156/1506 = 0.77 is below the 1 of either factor, so 1: half = 12.7062 * sqrt(34/4).
    lifted = crossed_interval([[0, 1], [1, 10]])
    assert lifted.high - 3 == pytest.approx(12.706205 * math.sqrt(8.5), rel=1e-6)


def test_identical_seeds_are_no_more_than_one_seed():
    # Nothing varies over seeds: four copies tell as much as one, and the interval is that of the prompts alone.
    row = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert crossed_interval([row] * 4) == pytest.approx(crossed_interval([row]), rel=1e-9)


def test_equal_values_within_bounds_have_the_exact_binomial_interval():
    # 0 of 50: Clopper and Pearson's upper limit is 1 - 0.025^(1/50) = 0.071122, from a printed table 7.1 %.
    assert crossed_interval([[0] * 50], bounds=(0, 1)) == (0, 0, pytest.approx(0.071122, abs=1e-6))
    assert crossed_interval([[1] * 50, [1] * 50], bounds=(0, 1)) == (1, pytest.approx(0.928878, abs=1e-6), 1)
    # All ties of 4: 1 - 0.025^(1/4) = 0.602365 of the way to either bound.
    ties = pytest.approx(0.5 - 0.301182, abs=1e-6), pytest.approx(0.5 + 0.301182, abs=1e-6)
    assert crossed_interval([[0.5] * 4], bounds=(0, 1)) == (0.5, *ties)
    # Differences of what lies between 0 and 100 reach from -100 to 100.
    same = paired_interval([[0, 100] * 25], [[0, 100] * 25], bounds=(0, 100))
    assert same == (0, pytest.approx(-7.1122, abs=1e-4), pytest.approx(7.1122, abs=1e-4), 1)
    # Seeds alone are not prompts.
    assert seed_interval([0, 0, 0], bounds=(0, 1)) == (0, 0, 0)


def test_constant_values_have_no_width():
    assert crossed_interval(np.full((3, 4), 0.1)) == (0.1, 0.1, 0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 400 experiments of 4 seeds and 30 prompts with v_a = v_b = v_e = 1 and mean 0. With 95 % coverage the count of
    # misses has mean 20 and standard deviation 4.4; an interval over the 120 values as if independent would miss
    # about 225 times (its half width is 0.58 standard deviations of the mean).
    generator = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        table = generator.normal(size=(4, 1)) + generator.normal(size=(1, 30)) + generator.normal(size=(4, 30))
        interval = crossed_interval(table)
        misses += not interval.low <= 0 <= interval.high
    assert 5 <= misses <= 37


def test_level_widens_the_interval():
    # t(2) at 99.5 % is 9.924843.
    assert crossed_interval([[1], [2], [3]], level=0.99).high - 2 == pytest.approx(9.924843 / math.sqrt(3), rel=1e-6)


def test_bounds_cut_the_interval_and_refuse_values_outside():
    # Mean 2/3, error sqrt((1/3) / 3) = 1/3; 2/3 +- 4.302653/3 = (-0.7676, 2.1009).
    assert crossed_interval([[1, 1, 0]]).low == pytest.approx(2 / 3 - T2 / 3, rel=1e-6)
    assert crossed_interval([[1, 1, 0]], bounds=(0, 1)) == pytest.approx((2 / 3, 0, 1), abs=1e-12)
    with pytest.raises(ValueError, match=r"expected values from 0 to 1, found 0\.0 to 2\.0"):
        crossed_interval([[1, 2, 0]], bounds=(0, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [3, math.nan]], r"values: expected finite numbers, found nan at seed 1, prompt 1 \(1 of 4 values"),
        ([[math.inf, 2], [math.nan, 1]], r"found inf at seed 0, prompt 0 \(2 of 4 values"),
        ([[1]], r"at least two values, found \(1, 1\)"),
        ([1, 2], r"expected shape \(seeds, prompts\) .* found \(2,\)"),
        (np.empty((2, 0)), r"found \(2, 0\)"),
    ],
)
def test_crossed_interval_refuses_bad_tables(values, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(values)


def test_levels_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match=r"level: expected a number between 0 and 1, found 95"):
        crossed_interval([[1, 2]], level=95)


def three_way(residual):
    """Means of 3 policies and 2 seeds, the same for 2 prompts, and a pattern that only the highest interaction sees."""
    means = np.array([[0, 2], [0, 0], [0, 1]], dtype=float)[:, :, None]
    pattern = np.einsum("m,s,p->msp", [1, -1, 0], [1, -1], [1, -1])
    return means + residual * pattern


@pytest.mark.parametrize(("residual", "expected"), [(0.0, 0.5), (0.25, 0.375), (1.0, 0.0)])
def test_pooled_seed_variance_by_hand(residual, expected):
    # Less row means (1, 0, 0.5), column means (0, 1) and plus the mean 0.5, the means are -0.5, 0.5; 0.5, -0.5; 0, 0:
    # squares sum to 1, MS_ms = 2 * 1 / (2 * 1) = 1. The pattern's squares sum to 8, so MS_msp = 8 c^2 / (2 * 1 * 1).
    # v = (1 - 0) / 2; (1 - 0.25) / 2; (1 - 4) / 2 is below 0.
    found = pooled_seed_variance(three_way(residual))
    assert found == pytest.approx((expected, 2))
    # What all policies of a seed, a prompt, or both have in common does not count.
    common = np.array([[5.0, -1.0], [2.0, 7.0]])
    assert pooled_seed_variance(three_way(residual) + common) == pytest.approx(tuple(found))


def test_paired_interval_with_a_pooled_variance_by_hand():
    # Differences 1, 3 in both seeds: MS_seeds = MS_res = 0, MS_prompts = 2 * (1 + 1) / 1 = 4. With v = 0.5 MS_seeds
    # becomes 2 * 2 * 0.5 = 2 with 2 degrees of freedom: error sqrt((2 + 4) / 4), freedom 6^2 / (2^2 / 2 + 4^2 / 1) = 2.
    a, b = np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    found = paired_interval(a, b, seed_variance=SeedVariance(0.5, 2))
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 * math.sqrt(1.5), rel=1e-6)
    assert paired_interval(a, b).high - 2 == pytest.approx(12.706205, rel=1e-6)  # one degree of freedom, error 1


def test_a_difference_that_varies_more_between_seeds_keeps_its_own_variance():
    a, b = np.array([[1.0, 3.0], [7.0, 9.0]]), np.zeros((2, 2))  # MS_seeds = 2 * (9 + 9) / 1 = 36
    assert paired_interval(a, b, seed_variance=SeedVariance(8.9, 20)) == paired_interval(a, b)  # 2 * 2 * 8.9 = 35.6
    assert paired_interval(a, b, seed_variance=SeedVariance(9.1, 20)).high < paired_interval(a, b).high


def test_pooling_over_the_two_sides_alone_changes_nothing():
    generator = np.random.default_rng(3)
    for spread in (0.0, 0.3, 2.0):
        a, b = (generator.normal(size=(4, 30)) + spread * generator.normal(size=(4, 1)) for _ in range(2))
        pooled = paired_interval(a, b, 0.9, pooled_seed_variance([a, b]))
        assert pooled == pytest.approx(paired_interval(a, b, 0.9))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[1, 2], [3, 4]], r"at least two policies, two seeds and two prompts \(3 dimensions\), found shape \(2, 2\)"),
        ([[[1, 2], [3, 4]]], r"found shape \(1, 2, 2\)"),
        ([[[1, 2], [3, 4]], [[1, 2], [3, math.nan]]], "found nan at policy 1, seed 1, prompt 1"),
    ],
)
def test_pooled_seed_variance_refuses_bad_tables(tables, message):
    with pytest.raises(ValueError, match=message):
        pooled_seed_variance(tables)


def test_a_pooled_variance_needs_seeds_and_prompts():
    with pytest.raises(ValueError, match=r"seed_variance: expected at least two seeds and two prompts.*\(2, 1\)"):
        paired_interval([[1], [2]], [[0], [0]], seed_variance=SeedVariance(1.0, 3))


def test_seed_interval_wants_one_value_a_seed():
    with pytest.raises(ValueError, match=r"one value a seed \(1 dimension\), found shape \(1, 2\)"):
        seed_interval([[1, 2]])
    with pytest.raises(ValueError, match="at least two values"):
        seed_interval([1])


# --- paired intervals -------------------------------------------------------------------------------------------------


def test_paired_interval_is_the_t_test_of_the_differences():
    # Differences 1 2 3 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14/3, error sqrt(14/12) = 1.080123, 3 degrees.
    a, b = [[5, 6, 7, 10]], [[4, 4, 4, 4]]
    result = paired_interval(a, b)
    assert result.mean == 3
    assert result.high - 3 == pytest.approx(T3 * math.sqrt(14 / 12), rel=1e-6)
    assert result.p_value == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue, rel=1e-9)


def test_p_value_and_interval_agree_about_zero():
    # The difference that puts 0 exactly on the interval's edge has p = 0.05: errors as in the crossed example above,
    # shifted so that the mean equals the half width.
    table = np.array([[1.0, 3, 5], [5, 5, 11]])
    half = stats.t.ppf(0.975, 1296 / 676) * math.sqrt(6)
    result = paired_interval(table - 5 + half, np.zeros((2, 3)))
    assert result.low == pytest.approx(0, abs=1e-9)
    assert result.p_value == pytest.approx(0.05, rel=1e-9)
    assert paired_interval(np.zeros((2, 3)), table - 5 + half).p_value == pytest.approx(0.05, rel=1e-9)


def test_what_prompts_share_does_not_widen_a_paired_interval():
    # a and b differ by exactly 1 on prompts of very different difficulty.
    base = np.array([[0.0, 100, -50], [3, 90, 7]])
    assert paired_interval(base + 1, base) == (1, 1, 1, 0.25)  # the sign test's 2 / 2^3
    assert paired_interval(base, base) == (0, 0, 0, 1)


def test_differences_of_seeds_that_coincide_are_weak_evidence():
    # One value a seed: the sign test of 3 seeds is 2 / 2^3; of many it is strong.
    assert paired_interval([[40.0]] * 3, [[0.0]] * 3).p_value == 0.25
    assert paired_interval([[40.0]] * 12, [[0.0]] * 12).p_value == 2.0**-11


def test_a_share_of_tokens_without_spread_has_the_exact_binomial_interval():
    parts = ratio_parts([1, 1, 1], [1, 1, 1], [0, 1, 2], 50)
    # 0.025^(1/3) = 0.292402: three responses of three.
    assert parts_interval([parts]) == pytest.approx((1.0, 0.2924018, 1.0))
    nothing = ratio_parts([0, 0, 0], [1, 1, 1], [0, 1, 2], 50)
    assert parts_interval([nothing, nothing]) == pytest.approx((0.0, 0.0, 0.7075982))


def test_paired_interval_refuses_other_shapes_and_nan():
    with pytest.raises(ValueError, match=r"two tables of one shape, found \(1, 3\) and \(1, 2\)"):
        paired_interval([[1, 2, 3]], [[1, 2]])
    with pytest.raises(ValueError, match=r"b: expected finite numbers, found nan at seed 0, prompt 1"):
        paired_interval([[1, 2]], [[1, math.nan]])


# --- rankings and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0.0),
        ([5, 5, 5], [True, False, True], 0.5),
        # Positives 3 and 1, negatives 2 and 1: 3>2, 3>1 win, 1<2 loses, 1=1 half: 2.5 of 4.
        ([3, 1, 2, 1], [1, 1, 0, 0], 0.625),
        ([1, 2], [1, 1], None),
        ([1, 2], [0, 0], None),
        ([], [], None),
    ],
)
def test_auroc_counts_ordered_pairs(scores, labels, expected):
    assert auroc(scores, labels) == (None if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, math.nan], [0, 1], "scores: expected finite numbers, found nan at position 1"),
        ([1, 2], [0, 2], "labels: expected booleans or 0 and 1, found 2"),
        ([1, 2], [-1, 1], "labels: expected booleans or 0 and 1, found -1"),
        ([1, 2, 3], [0, 1], r"as many scores as labels .* found \(3,\), \(2,\)"),
    ],
)
def test_auroc_refuses_bad_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, labels)


def test_parts_of_an_auroc_by_hand():
    # The positives 3 and 1 beat 1 and 1/4 of the negatives; the negatives 2 and 1 leave 1/2 and 3/4 of the positives
    # above them. Less 0.625 and halved: 3/16, -3/16, -1/16, 1/16. Response 0 has the 3 and the 2, influence 2/16, which
    # counts twice, as there are two responses; response 1 the rest.
    parts = auroc_parts([3, 1, 2, 1], [1, 1, 0, 0], [0, 1, 0, 1], 2)
    assert parts.value == pytest.approx(0.625, abs=1e-12)
    assert parts.values.tolist() == pytest.approx([0.875, 0.375], abs=1e-12)
    assert parts.responses == 2
    # All positives in one of three responses, one of them without tokens.
    parts = auroc_parts([3, 1, 2, 1], [1, 1, 0, 0], [0, 0, 0, 2], 3)
    assert parts.values.tolist() == pytest.approx([0.625 - 3 / 16, 0.625, 0.625 + 3 / 16], abs=1e-12)
    assert parts.responses == 1
    assert auroc_parts([1, 2], [1, 1], [0, 0], 1) is None


def test_parts_of_a_ratio_by_hand():
    # 2 of 3: influences (1 - 2/3) / 3 = 1/9, -2/9 and 1/9; response 0 has the first two, response 2 has no token.
    parts = ratio_parts([True, False, True], [1, 1, 1], [0, 0, 1], 3)
    assert parts.value == pytest.approx(2 / 3)
    assert parts.values.tolist() == pytest.approx([1 / 3, 1, 2 / 3])
    assert parts.responses == 2
    # F1 of two hits among 3 said and 4 true is 4/7; the response without either does not count.
    said, true = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 1, 0])
    parts = ratio_parts(2 * (said & true), said + true, [0, 0, 0, 1, 1, 2], 3)
    assert (parts.value, parts.responses) == (pytest.approx(4 / 7), 2)
    # Response 0 has 4 of 5, (4 - 20/7) / 7 = 8/49; response 1 has 0 of 2, -8/49.
    assert parts.values.tolist() == pytest.approx([4 / 7 + 24 / 49, 4 / 7 - 24 / 49, 4 / 7])
    assert ratio_parts([0, 0], [0, 0], [0, 1], 2) is None


def test_parts_refuse_bad_input():
    with pytest.raises(ValueError, match=r"expected one shape, found part \(2,\) and whole \(1,\)"):
        ratio_parts([1, 0], [1], [0, 0], 1)
    with pytest.raises(ValueError, match=r"responses: expected one number a token, shape \(2,\), found \(1,\)"):
        ratio_parts([1, 0], [1, 1], [0], 1)
    with pytest.raises(ValueError, match="responses: expected numbers from 0 to 1, found 0 to 2"):
        auroc_parts([1, 2], [0, 1], [0, 2], 2)


def test_interval_of_parts_by_hand():
    # Standard deviation 0.01, error 0.01 / sqrt(3); 3 responses give t(2), 2 of them t(1) = 12.706205, 1 nothing.
    values = np.array([0.49, 0.5, 0.51])
    for responses, quantile in ((3, T2), (2, 12.706205)):
        interval = parts_interval([Parts(0.5, values, responses)])
        assert interval.high - 0.5 == pytest.approx(quantile * 0.01 / math.sqrt(3), rel=1e-6)
    assert parts_interval([Parts(0.5, values, 1)]) is None
    # Cut to a share's limits; of several seeds the fewest responses count.
    assert parts_interval([Parts(0.5, 100 * (values - 0.5) + 0.5, 3)]) == (0.5, 0, 1)
    two = [Parts(0.5, values, 3), Parts(0.5, values, 2)]
    assert parts_interval(two).high - 0.5 == pytest.approx(12.706205 * 0.01 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("positives", [3, 12])
def test_an_interval_of_parts_holds_the_truth(positives):
    """Tokens of 30 responses whose level differs, positives in a few of them; scores are normal, so that the true
    AUROC is Phi(0.3 / sqrt(2 (1 + 0.25)))."""
    random, held = np.random.default_rng(1), 0
    truth = stats.norm.cdf(0.3 / math.sqrt(2 * 1.25))
    own = np.repeat(np.arange(30), 20)
    labels = (own < positives) & (np.tile(np.arange(20), 30) < 10)
    for _ in range(400):
        levels = random.normal(0, 0.5, (2, 30))
        scores = random.normal(size=own.size) + np.where(labels, 0.3 + levels[0, own], levels[1, own])
        interval = parts_interval([auroc_parts(scores, labels, own, 30)])
        held += interval.low <= truth <= interval.high
    assert 0.89 <= held / 400 <= 0.99


def test_holm_steps_down():
    # Sorted 0.01 0.02 0.03 0.04: times 4 3 2 1 = 0.04 0.06 0.06 0.04; running maximum 0.04 0.06 0.06 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06], abs=1e-12)
    # 0.5 * 2 = 1, then max(1, 0.9) = 1; nothing exceeds 1.
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.6, 0.7, 0.8]) == [1.0, 1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(ValueError, match=rf"from 0 to 1, found {bad} at position 1"):
        holm([0.5, bad])
