"""Statistics of sweeps against scipy, brute force and known truths; nan, and no warning, where nothing is known."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from false_claims import DRAWS, Draw, error_rates, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from rustgpt_jax.sweeps.report.statistics import (
    Comparison,
    Interval,
    compare_with_best,
    importance,
    interactions,
    lr_sensitivity,
    mean_interval,
    paired,
    smallest_p_values,
)

LOSS = st.floats(0.01, 20)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
MANY_SAMPLES = 4000


# Means.


@given(st.lists(LOSS, min_size=2, max_size=20, unique=True), st.floats(0.5, 0.999))
def test_the_interval_is_that_of_the_t_test(values: list[float], confidence: float) -> None:
    assume(np.ptp(values) > 1e-6)
    found = mean_interval(values, confidence)
    oracle = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert found.n == len(values)
    np.testing.assert_allclose([found.mean, found.low, found.high], [np.mean(values), *oracle], rtol=1e-8)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int, confidence: float) -> None:
    draws = np.random.default_rng(n).normal(3.0, 0.2, (MANY_SAMPLES, n))
    intervals = [mean_interval(values, confidence) for values in draws.tolist()]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in intervals])
    assert abs(covered - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / MANY_SAMPLES)


@given(st.lists(LOSS, max_size=6), st.lists(NOT_FINITE, max_size=3))
def test_what_diverged_has_no_part_in_a_mean(values: list[float], diverged: list[float]) -> None:
    assert repr(mean_interval([*diverged, *values])) == repr(mean_interval(values))
    assert mean_interval([*diverged, *values]).n == len(values)


def test_one_value_has_no_interval_and_equal_values_a_point() -> None:
    assert repr(mean_interval([2.5])) == repr(Interval(2.5, math.nan, math.nan, 1))
    assert repr(mean_interval([])) == repr(Interval(math.nan, math.nan, math.nan, 0))
    assert mean_interval([2.5, 2.5, 2.5]) == Interval(2.5, 2.5, 2.5, 3)


# Pairs.


@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=12), st.randoms())
def test_a_comparison_is_the_t_test_on_the_differences(pairs: list[tuple[float, float]], order: Any) -> None:
    differences = [first - second for first, second in pairs]
    assume(np.ptp(differences) > 1e-6)
    seeds = list(range(len(pairs)))
    order.shuffle(seeds)
    a = {seed: pairs[seed][0] for seed in seeds} | {100: 1.0, 102: math.nan, 103: 1.0}
    b = {seed: pairs[seed][1] for seed in reversed(seeds)} | {101: 1.0, 102: 1.0, 103: math.inf}
    found = paired(a, b)
    assert found is not None
    oracle = stats.ttest_1samp(differences, 0)
    low, high = oracle.confidence_interval(0.95)
    assert found.n_pairs == len(pairs)
    np.testing.assert_allclose(
        [found.difference, found.low, found.high, found.p_value],
        [np.mean(differences), low, high, oracle.pvalue],
        rtol=1e-6,
        atol=1e-12,
    )
    turned = paired(b, a)
    assert turned == Comparison(-found.difference, -found.high, -found.low, found.p_value, found.n_pairs)


def test_pairing_sees_a_small_difference_under_the_noise_of_seeds_and_p_values_of_nothing_are_uniform() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(500):
        luck = rng.normal(0, 1, 5)
        a, b = (dict(enumerate((luck + rng.normal(0, 0.01, 5)).tolist())) for _ in "ab")
        nothing, better = paired(a, b), paired({seed: loss - 0.05 for seed, loss in a.items()}, b)
        assert nothing is not None and better is not None
        assert better.p_value < 0.05
        assert better.high < 0
        p_values.append(nothing.p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_equal_differences_have_the_p_value_of_the_sign_flip_test() -> None:
    for n in (2, 3, 6):
        a = {seed: (1 + seed) / 7 for seed in range(n)}
        b = {seed: loss + 0.1 for seed, loss in a.items()}
        # Equal but for rounding.
        assert len({a[seed] - b[seed] for seed in a}) > 1
        found = paired(a, b)
        assert found is not None
        flips = [abs(sum(signs)) >= n for signs in itertools.product((-1, 1), repeat=n)]
        assert found.p_value == np.mean(flips)
        assert found.difference == pytest.approx(-0.1)
        assert math.isnan(found.low) and math.isnan(found.high)
        same = paired(a, dict(a))
        assert repr(same) == repr(Comparison(0.0, math.nan, math.nan, 1.0, n))


def test_no_comparison_without_two_pairs() -> None:
    assert paired({}, {}) is None
    assert paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0}) is None
    assert paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: math.nan}) is None


# Comparisons with the best setting.


def ordered_by_mean(losses: np.ndarray) -> list[dict[int, float]]:
    """The losses of each setting by seed, best setting first; nan where a seed is missing."""
    return [dict(enumerate(row)) for row in losses[np.argsort(np.nanmean(losses, 1))].tolist()]


def test_two_settings_are_compared_by_the_paired_test_alone() -> None:
    settings = ordered_by_mean(np.random.default_rng(0).normal(size=(2, 4)))
    assert compare_with_best(settings) == [paired(settings[1], settings[0])]
    one_seed = {0: 3.0}
    assert compare_with_best([*settings, one_seed]) == [paired(settings[1], settings[0]), None]
    assert compare_with_best(settings[:1]) == []


def test_the_threshold_is_the_5_percent_quantile_over_sweeps_that_choose_their_best_setting() -> None:
    # Setting 3 lacks two seeds, and setting 4 diverged once: it is compared, but cannot be the best.
    present = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]], bool)
    smallest = smallest_p_values(tuple(map(tuple, present.tolist())), 4)
    rng, oracle = np.random.default_rng(1), []
    for _ in range(1000):
        losses = np.where(present, rng.normal(size=present.shape), np.nan)
        best = int(np.nanargmin(np.nanmean(losses[:4], 1)))
        p_values = []
        for other in set(range(5)) - {best}:
            both = present[best] & present[other]
            p_values.append(stats.ttest_rel(losses[best, both], losses[other, both]).pvalue)
        oracle.append(min(p_values))
    assert stats.ks_2samp(smallest, oracle).pvalue > 1e-3


@given(st.integers(3, 6), st.integers(2, 5), st.integers(0, 1000), st.floats(0.1, 10))
def test_intervals_and_p_values_agree_and_units_and_seeds_do_not_matter(
    n_settings: int, n_seeds: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(n_settings, n_seeds)) + 3 * rng.integers(0, 3, (n_settings, 1))
    settings = ordered_by_mean(losses)
    found = compare_with_best(settings)
    moved = compare_with_best(ordered_by_mean(scale * (losses + rng.normal(size=n_seeds))))
    for comparison, other, setting in zip(found, moved, settings[1:], strict=True):
        alone = paired(setting, settings[0])
        assert comparison is not None and other is not None and alone is not None
        assert (comparison.p_value < 0.05) == (not comparison.low <= 0 <= comparison.high)
        assert comparison.p_value > alone.p_value and comparison.high > alone.high
        assert other.p_value == pytest.approx(comparison.p_value, abs=1e-4)
        assert other.high == pytest.approx(scale * comparison.high, rel=1e-5, abs=1e-9)


def assert_rarely_wrong(draw: Draw, n_settings: int, n_seeds: int, sweeps: int) -> None:
    """The rates of false claims and of missed differences are at most 5%, but for what chance gives once in 10,000."""
    most = stats.binom.ppf(0.9999, sweeps, 0.05) / sweeps
    false_claims, missed = error_rates(draw, n_settings, n_seeds, sweeps)
    assert false_claims <= most and missed <= most


@pytest.mark.parametrize(("n_settings", "n_seeds"), [(2, 3), (5, 5), (20, 5)])
def test_sweeps_without_effects_give_at_most_5_percent_of_false_claims(n_settings: int, n_seeds: int) -> None:
    assert_rarely_wrong(normal, n_settings, n_seeds, 400)


@pytest.mark.long
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("n_settings", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("n_seeds", [2, 5])
def test_false_claims_stay_below_5_percent_whatever_the_losses(draw: Draw, n_settings: int, n_seeds: int) -> None:
    assert_rarely_wrong(draw, n_settings, n_seeds, 1000)


# Learning rates.


@given(
    st.lists(st.one_of(st.floats(0.1, 9), NOT_FINITE), min_size=2, max_size=9),
    st.floats(1e-6, 1e-2),
    st.floats(1.1, 10),
)
def test_sensitivity_over_evenly_spaced_rates_is_the_published_mean(
    losses: list[float], low: float, ratio: float
) -> None:
    assume(any(-math.inf < loss < 5 for loss in losses))
    rates = [low * ratio**place for place in range(len(losses))]
    capped = [min(loss, 5.0) if math.isfinite(loss) else 5.0 for loss in losses]
    oracle = sum(loss - min(capped) for loss in capped) / len(capped)
    table = dict(reversed(list(zip(rates, losses, strict=True))))
    assert lr_sensitivity(table, 5.0) == pytest.approx(oracle, rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(-6, 0), min_size=3, max_size=8, unique=True))
def test_sensitivity_over_uneven_rates_is_the_trapezoid_rule_with_longer_ends(exponents: list[float]) -> None:
    places = np.sort(exponents)
    assume(np.diff(places).min() > 1e-3)
    losses = 1 + (places + 3) ** 2
    capped = np.minimum(losses, 6.0) - min(losses.min(), 6.0)
    assume(losses.min() < 6)
    first, last = (places[1] - places[0]) / 2, (places[-1] - places[-2]) / 2
    area = np.trapezoid(capped, places) + capped[0] * first + capped[-1] * last
    oracle = area / (places[-1] - places[0] + first + last)
    table = dict(zip((10.0 ** places[::-1]).tolist(), losses[::-1].tolist(), strict=True))
    assert lr_sensitivity(table, 6.0) == pytest.approx(oracle, rel=1e-6, abs=1e-9)


def test_sensitivity_does_not_depend_on_where_the_sweep_is_dense() -> None:
    def measured(exponents: np.ndarray) -> float:
        return lr_sensitivity({10.0**place: 1 + abs(place + 3) for place in exponents.tolist()}, 9.0)

    even = measured(np.linspace(-5, -1, 201))
    dense = measured(np.concatenate([np.linspace(-5, -3, 1000)[:-1], np.linspace(-3, -1, 100)]))
    assert even == pytest.approx(1.0, rel=0.02)
    assert dense == pytest.approx(even, rel=0.02)


def test_sensitivity_of_a_sweep_without_an_answer() -> None:
    assert lr_sensitivity({1e-3: 2.0}, 5.0) == 0.0
    assert lr_sensitivity({1e-3: 2.0, 1e-2: math.nan}, 5.0) == pytest.approx(1.5)
    for table in ({}, {1e-3: math.nan, 1e-2: math.inf}, {1e-3: 6.0, 1e-2: 5.0}, {0.0: 2.0, 1e-2: 3.0}):
        assert math.isnan(lr_sensitivity(table, 5.0))
    assert math.isnan(lr_sensitivity({1e-3: 2.0, 1e-2: 3.0}, math.nan))


# Shares of variance.


def omega_squared(groups: Sequence[np.ndarray]) -> float:
    """The textbook's formula, from the F statistic of scipy."""
    n, k = sum(map(len, groups)), len(groups)
    f = stats.f_oneway(*groups).statistic
    return max(0.0, (k - 1) * (f - 1) / ((k - 1) * (f - 1) + n))


@given(st.lists(st.lists(LOSS, min_size=2, max_size=5), min_size=2, max_size=6), st.randoms())
def test_importance_is_omega_squared(groups: list[list[float]], order: Any) -> None:
    assume(all(np.ptp(group) > 1e-3 for group in groups))
    rows = [(level, loss) for level, group in enumerate(groups) for loss in group]
    order.shuffle(rows)
    knobs = {"word": [f"part {level}" for level, _ in rows], "number": [1e-3 * 2**level for level, _ in rows]}
    found = importance(knobs, [loss for _, loss in rows])
    oracle = omega_squared([np.array(group) for group in groups])
    assert found == pytest.approx({"word": oracle, "number": oracle}, rel=1e-6, abs=1e-9)


def brute_interaction(first: list[int], second: list[int], losses: np.ndarray) -> float:
    """Two-way analysis of variance of a full factorial design with the same number of trials in every cell."""
    grid = np.array([[[y for p, q, y in zip(first, second, losses, strict=True) if (p, q) == (i, j)]
                      for j in sorted(set(second))] for i in sorted(set(first))])  # fmt: skip
    rows, columns, replicates = grid.shape
    additive = grid.mean((1, 2))[:, None] + grid.mean((0, 2))[None, :] - grid.mean()
    between = replicates * np.sum((grid.mean(2) - additive) ** 2)
    error = np.sum((grid - grid.mean(2, keepdims=True)) ** 2) / (rows * columns * (replicates - 1))
    total = np.sum((grid - grid.mean()) ** 2)
    return max(0.0, (between - (rows - 1) * (columns - 1) * error) / (total + error))


@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 3), st.integers(0, 10_000))
def test_interactions_are_those_of_the_two_way_analysis_of_variance(rows: int, columns: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (list(side) for side in zip(*list(itertools.product(range(rows), range(columns))) * n, strict=True))
    losses = rng.normal(size=(rows, columns))[first, second] + 0.5 * rng.normal(size=len(first))
    found = interactions({"a": first, "b": [f"part {level}" for level in second]}, losses.tolist())
    assert found == pytest.approx({("a", "b"): brute_interaction(first, second, losses)}, rel=1e-6, abs=1e-9)


def synthetic(rng: np.random.Generator, n: int) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Trials whose losses have known shares: a 0.5, b 0.2, a and b together 0.2, noise 0.1, nothing from c."""
    a, b, c = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.uniform(size=n)
    signs = 2 * np.stack([a, b]) - 1
    losses = math.sqrt(0.5) * signs[0] + math.sqrt(0.2) * signs[1] + math.sqrt(0.2) * signs[0] * signs[1]
    knobs = {"a": a.tolist(), "b": [("cosine", "wsd")[level] for level in b], "c": c.tolist()}
    return knobs, losses + rng.normal(0, math.sqrt(0.1), n)


def test_known_shares_are_found() -> None:
    rng = np.random.default_rng(1)
    knobs, losses = synthetic(rng, 4000)
    assert importance(knobs, losses.tolist()) == pytest.approx({"a": 0.5, "b": 0.2, "c": 0.0}, abs=0.03)
    expected = {("a", "b"): 0.2, ("a", "c"): 0.0, ("b", "c"): 0.0}
    assert interactions(knobs, losses.tolist()) == pytest.approx(expected, abs=0.03)


def test_known_shares_are_found_in_the_mean_of_small_sweeps() -> None:
    rng = np.random.default_rng(2)
    sweeps = [synthetic(rng, 40) for _ in range(150)]
    alone = [importance(knobs, losses.tolist()) for knobs, losses in sweeps]
    together = [interactions(knobs, losses.tolist()) for knobs, losses in sweeps]
    assert np.mean([share["a"] for share in alone]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([share["b"] for share in alone]) == pytest.approx(0.2, abs=0.04)
    assert np.mean([share["a", "b"] for share in together]) == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("n", [12, 30, 100])
def test_noise_is_explained_by_nothing(n: int) -> None:
    rng = np.random.default_rng(n)
    alone, together, plain = [], [], []
    for _ in range(150):
        losses = rng.normal(size=n)
        knobs = {"rate": rng.uniform(size=n).tolist(), "part": [str(level) for level in rng.integers(0, 3, n)]}
        alone.append(list(importance(knobs, losses.tolist()).values()))
        together.append(list(interactions(knobs, losses.tolist()).values()))
        codes = np.array([int(level) for level in knobs["part"]])
        means = np.array([losses[codes == level].mean() for level in codes])
        plain.append(np.var(means) / np.var(losses))
    # Shares cut off at 0 keep a small mean; without the correction it is several times as large.
    assert np.median(alone) < 0.01
    assert np.mean(alone) < 0.6 * np.mean(plain)
    assert np.nanmean(together) < max(0.6 * np.mean(plain), 0.03)


def test_the_correction_for_chance_is_unbiased() -> None:
    rng = np.random.default_rng(3)
    # Losses with a large effect of another knob, so that nothing is cut off at 0.
    shares = []
    for _ in range(400):
        part = np.repeat([0, 1, 2], 6)
        shares.append(importance({"part": part.tolist()}, (part + rng.normal(0, 1, 18)).tolist())["part"])
    assert np.mean(shares) == pytest.approx((2 / 3) / (2 / 3 + 1), abs=0.03)


@given(st.integers(8, 40), st.integers(0, 1000))
def test_only_the_order_of_a_numeric_knob_counts(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates, other, losses = rng.uniform(1e-4, 1e-1, n), rng.integers(0, 2, n).tolist(), rng.normal(size=n).tolist()
    for share in (importance, interactions):
        plain = share({"rate": rates.tolist(), "other": other}, losses)
        logged = share({"rate": np.log(rates).tolist(), "other": other}, losses)
        np.testing.assert_allclose(list(plain.values()), list(logged.values()), rtol=1e-9, atol=1e-12)


@given(st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 100))
def test_shares_do_not_depend_on_units(scale: float, shift: float, seed: int) -> None:
    knobs, losses = synthetic(np.random.default_rng(seed), 30)
    for share in (importance, interactions):
        plain, moved = share(knobs, losses.tolist()), share(knobs, (scale * losses + shift).tolist())
        np.testing.assert_allclose(list(plain.values()), list(moved.values()), rtol=1e-5, atol=1e-6)


def test_many_values_of_a_numeric_knob_are_bins() -> None:
    rng = np.random.default_rng(0)
    rates = np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), 200))
    losses = (np.log10(rates) + 2.5) ** 2
    assert 0.8 < importance({"rate": rates.tolist()}, losses.tolist())["rate"] < 1
    assert importance({"rate": [1, 2, 3, 4, 5, 6] * 2}, [1, 2, 3, 4, 5, 6] * 2) == pytest.approx({"rate": 1.0})
    # Seven values and one trial of each: two bins.
    assert importance({"rate": list(range(8))}, [0, 0, 0, 0, 1, 1, 1, 1]) == pytest.approx({"rate": 1.0})


def test_what_diverged_explains_nothing() -> None:
    knobs, losses = synthetic(np.random.default_rng(5), 40)
    diverged = {knob: [*column, column[0], column[1]] for knob, column in knobs.items()}
    for share in (importance, interactions):
        assert share(diverged, [*losses.tolist(), math.nan, math.inf]) == share(knobs, losses.tolist())


def test_values_of_any_kind_are_levels() -> None:
    losses = [1.0, 1.1, 2.0, 2.1]
    for column in ([None, None, 64, 64], [["a"], ["a"], ["b"], ["b"]], [True, True, False, False], [{}, {}, 1, 1]):
        assert importance({"knob": column}, losses)["knob"] > 0.9


def test_what_the_trials_cannot_tell_is_nan() -> None:
    same = [1, 1, 1, 1]
    assert math.isnan(importance({"knob": same}, [1, 2, 3, 4])["knob"])
    assert math.isnan(importance({"knob": ["a", "b", "c", "d"]}, [1, 2, 3, 4])["knob"])
    assert math.isnan(importance({"knob": [1, 1, 2]}, [math.nan, math.nan, 1.0])["knob"])
    assert math.isnan(importance({"knob": []}, [])["knob"])
    assert importance({}, [1, 2]) == {}
    assert interactions({"a": [1, 2]}, [1, 2]) == {}
    grid = {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}
    # One trial a cell; the same with one cell empty; one knob that follows from the other; a knob that stays.
    assert math.isnan(interactions(grid, [1, 2, 3, 5])["a", "b"])
    assert math.isnan(interactions({"a": [0, 0, 1, 1], "b": [0, 1, 0, 0]}, [1, 2, 3, 5])["a", "b"])
    assert math.isnan(interactions({"a": [0, 0, 1, 1], "b": [5, 5, 6, 6]}, [1, 2, 3, 5])["a", "b"])
    assert math.isnan(interactions({"a": [0, 0, 1, 1], "b": same}, [1, 2, 3, 5])["a", "b"])
    assert math.isnan(interactions(grid, [math.nan] * 4)["a", "b"])


def test_equal_losses_have_nothing_to_explain() -> None:
    knobs = {"a": [0, 0, 1, 1] * 2, "b": [0, 1, 0, 1] * 2}
    assert importance(knobs, [0.1] * 8) == {"a": 0.0, "b": 0.0}
    assert interactions(knobs, [0.1] * 8) == {("a", "b"): 0.0}


def test_columns_that_do_not_fit_the_losses_are_refused() -> None:
    with pytest.raises(ValueError):
        importance({"a": [0, 0, 1]}, [1.0, 2.0])
