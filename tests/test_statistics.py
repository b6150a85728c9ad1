"""Statistics of sweeps, compared with scipy, brute force and simulations."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from false_claims import DRAWS, Draw, error_rates, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from rustgpt_jax.sweeps.report.stats import (
    Comparison,
    Interval,
    VarianceDecomposition,
    compare_paired,
    compare_with_best,
    compute_lr_sensitivity,
    compute_mean_interval,
    decompose_variance,
    simulate_smallest_p_values,
)

LOSS = st.floats(0.01, 20)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
MANY_SAMPLES = 4000


# Means.


@given(st.lists(LOSS, min_size=2, max_size=20, unique=True), st.floats(0.5, 0.999))
def test_interval_equals_the_t_interval(values: list[float], confidence: float) -> None:
    assume(np.ptp(values) > 1e-6)
    found = compute_mean_interval(values, confidence)
    oracle = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert found.n == len(values)
    np.testing.assert_allclose([found.mean, found.low, found.high], [np.mean(values), *oracle], rtol=1e-8)


@given(st.lists(LOSS, max_size=6), st.lists(NOT_FINITE, max_size=3))
def test_non_finite_losses_are_ignored_in_a_mean(values: list[float], diverged: list[float]) -> None:
    assert repr(compute_mean_interval([*diverged, *values])) == repr(compute_mean_interval(values))
    assert compute_mean_interval([*diverged, *values]).n == len(values)


def test_interval_of_one_value_and_of_equal_values() -> None:
    assert repr(compute_mean_interval([2.5])) == repr(Interval(2.5, math.nan, math.nan, 1))
    assert repr(compute_mean_interval([])) == repr(Interval(math.nan, math.nan, math.nan, 0))
    assert compute_mean_interval([2.5, 2.5, 2.5]) == Interval(2.5, 2.5, 2.5, 3)


# Pairs.


@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=12), st.randoms())
def test_comparison_equals_the_paired_t_test(pairs: list[tuple[float, float]], order: Any) -> None:
    differences = [first - second for first, second in pairs]
    assume(np.ptp(differences) > 1e-6)
    seeds = list(range(len(pairs)))
    order.shuffle(seeds)
    a = {seed: pairs[seed][0] for seed in seeds} | {100: 1.0, 102: math.nan, 103: 1.0}
    b = {seed: pairs[seed][1] for seed in reversed(seeds)} | {101: 1.0, 102: 1.0, 103: math.inf}
    found = compare_paired(a, b)
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
    turned = compare_paired(b, a)
    assert turned == Comparison(-found.difference, -found.high, -found.low, found.p_value, found.n_pairs)


def test_equal_differences_use_the_sign_flip_test() -> None:
    for n in (2, 3, 6):
        a = {seed: (1 + seed) / 7 for seed in range(n)}
        b = {seed: loss + 0.1 for seed, loss in a.items()}
        # Equal but for rounding.
        assert len({a[seed] - b[seed] for seed in a}) > 1
        found = compare_paired(a, b)
        assert found is not None
        flips = [abs(sum(signs)) >= n for signs in itertools.product((-1, 1), repeat=n)]
        assert found.p_value == np.mean(flips)
        assert found.difference == pytest.approx(-0.1)
        assert math.isnan(found.low) and math.isnan(found.high)
        same = compare_paired(a, dict(a))
        assert repr(same) == repr(Comparison(0.0, math.nan, math.nan, 1.0, n))


def test_comparison_needs_two_pairs() -> None:
    assert compare_paired({}, {}) is None
    assert compare_paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0}) is None
    assert compare_paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: math.nan}) is None


# Comparisons with the best setting.


def ordered_by_mean(losses: np.ndarray) -> list[dict[int, float]]:
    """The losses of each setting by seed, best setting first; nan where a seed is missing."""
    return [dict(enumerate(row)) for row in losses[np.argsort(np.nanmean(losses, 1))].tolist()]


def test_two_settings_are_compared_by_the_paired_test() -> None:
    settings = ordered_by_mean(np.random.default_rng(0).normal(size=(2, 4)))
    assert compare_with_best(settings) == [compare_paired(settings[1], settings[0])]
    one_seed = {0: 3.0}
    assert compare_with_best([*settings, one_seed]) == [compare_paired(settings[1], settings[0]), None]
    assert compare_with_best(settings[:1]) == []


def test_smallest_p_values_match_simulated_sweeps() -> None:
    # Setting 3 lacks two seeds, and setting 4 diverged once: it is compared, but cannot be the best.
    present = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]], bool)
    smallest = simulate_smallest_p_values(tuple(map(tuple, present.tolist())), 4)
    rng, oracle = np.random.default_rng(1), []
    for _ in range(400):
        losses = np.where(present, rng.normal(size=present.shape), np.nan)
        best = int(np.nanargmin(np.nanmean(losses[:4], 1)))
        p_values = []
        for other in set(range(5)) - {best}:
            both = present[best] & present[other]
            p_values.append(stats.ttest_rel(losses[best, both], losses[other, both]).pvalue)
        oracle.append(min(p_values))
    assert stats.ks_2samp(smallest, oracle).pvalue > 1e-3


@hypothesis.settings(max_examples=20)
@given(st.integers(3, 5), st.integers(2, 4), st.integers(0, 1000), st.floats(0.1, 10))
def test_adjusted_intervals_and_p_values_agree_and_are_scale_invariant(
    n_settings: int, n_seeds: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(n_settings, n_seeds)) + 3 * rng.integers(0, 3, (n_settings, 1))
    settings = ordered_by_mean(losses)
    found = compare_with_best(settings)
    moved = compare_with_best(ordered_by_mean(scale * (losses + rng.normal(size=n_seeds))))
    for comparison, other, setting in zip(found, moved, settings[1:], strict=True):
        alone = compare_paired(setting, settings[0])
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
def test_false_claim_rate_without_effects_is_at_most_5_percent(n_settings: int, n_seeds: int) -> None:
    assert_rarely_wrong(normal, n_settings, n_seeds, 400)


@pytest.mark.long
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("n_settings", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("n_seeds", [2, 5])
def test_false_claim_rate_is_at_most_5_percent_for_all_distributions(draw: Draw, n_settings: int, n_seeds: int) -> None:
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
    assert compute_lr_sensitivity(table, 5.0) == pytest.approx(oracle, rel=1e-6, abs=1e-9)


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
    assert compute_lr_sensitivity(table, 6.0) == pytest.approx(oracle, rel=1e-6, abs=1e-9)


def test_sensitivity_does_not_depend_on_the_density_of_rates() -> None:
    def measured(exponents: np.ndarray) -> float:
        return compute_lr_sensitivity({10.0**place: 1 + abs(place + 3) for place in exponents.tolist()}, 9.0)

    even = measured(np.linspace(-5, -1, 201))
    dense = measured(np.concatenate([np.linspace(-5, -3, 1000)[:-1], np.linspace(-3, -1, 100)]))
    assert even == pytest.approx(1.0, rel=0.02)
    assert dense == pytest.approx(even, rel=0.02)


def test_sensitivity_of_degenerate_sweeps() -> None:
    assert compute_lr_sensitivity({1e-3: 2.0}, 5.0) == 0.0
    assert compute_lr_sensitivity({1e-3: 2.0, 1e-2: math.nan}, 5.0) == pytest.approx(1.5)
    for table in ({}, {1e-3: math.nan, 1e-2: math.inf}, {1e-3: 6.0, 1e-2: 5.0}, {0.0: 2.0, 1e-2: 3.0}):
        assert math.isnan(compute_lr_sensitivity(table, 5.0))
    assert math.isnan(compute_lr_sensitivity({1e-3: 2.0, 1e-2: 3.0}, math.nan))


# Shares of variance.


def brute_shares(columns: Sequence[Sequence[int]], losses: np.ndarray, pairs: bool) -> list[float]:
    """Omega squared of main effects, interactions and noise in a balanced full factorial design, from cell means."""
    effects: dict[tuple[int, ...], np.ndarray] = {(): np.full(len(losses), losses.mean())}
    degrees = {(): 1}
    for knobs in [*itertools.combinations(range(len(columns)), 1), *itertools.combinations(range(len(columns)), 2)]:
        cells = list(zip(*(columns[knob] for knob in knobs), strict=True))
        means = np.array([losses[[other == cell for other in cells]].mean() for cell in cells])
        inside = [subset for size in range(len(knobs)) for subset in itertools.combinations(knobs, size)]
        effects[knobs] = means - sum(effects[subset] for subset in inside)
        degrees[knobs] = len(set(cells)) - sum(degrees[subset] for subset in inside)
    reported = [knobs for knobs in effects if knobs and len(knobs) <= 1 + pairs]
    fitted = losses.mean() + sum(effects[knobs] for knobs in reported)
    error = np.sum((losses - fitted) ** 2) / (len(losses) - 1 - sum(degrees[knobs] for knobs in reported))
    total = np.sum((losses - losses.mean()) ** 2) + error
    shares = [max(np.sum(effects[knobs] ** 2) - degrees[knobs] * error, 0) / total for knobs in reported]
    return [*shares, 1 - sum(shares)]


@given(st.lists(st.integers(2, 4), min_size=2, max_size=3), st.integers(2, 3), st.integers(0, 10_000))
def test_balanced_designs_match_the_analysis_of_variance(sizes: list[int], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = list(zip(*list(itertools.product(*map(range, sizes))) * n, strict=True))
    losses = 3.0 * np.array(columns[0]) * columns[1] + np.array(columns[-1]) + rng.normal(size=len(columns[0]))
    knobs = {"a": columns[0], "b": [f"part {level}" for level in columns[1]], "c": [2.0**x for x in columns[-1]]}
    found = decompose_variance(dict(list(knobs.items())[: len(sizes)]), losses.tolist())
    oracle = brute_shares(columns, losses, pairs=bool(found.pairs))
    assert found.pairs or len(losses) <= 8
    assert [*found.knobs.values(), *found.pairs.values(), found.rest] == pytest.approx(oracle, rel=1e-6, abs=1e-9)


def test_equal_effects_have_equal_shares() -> None:
    a, b, c = zip(*itertools.product((0, 1), repeat=3), strict=True)
    losses = (np.array(a) + b + c).tolist()
    found = decompose_variance({"a": a, "b": b, "c": c}, losses)
    assert found.knobs == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert found.rest == pytest.approx(0, abs=1e-9) and found.pairs == {}
    # With a trial missing, and with a seed that does nothing.
    rest = decompose_variance({"a": a[1:], "b": b[1:], "c": c[1:]}, losses[1:])
    assert rest.knobs == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, abs=1e-9)
    seeds = decompose_variance(
        {"a": a * 2, "b": b * 2, "c": c * 2, "seed": ["0"] * 8 + ["1"] * 8}, losses * 2, ["seed"]
    )
    assert [*seeds.knobs.values()] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-9)
    assert set(seeds.pairs) == {("a", "b"), ("a", "c"), ("b", "c")}


def synthetic(rng: np.random.Generator, n: int) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Return trials with known shares: a 0.5, b 0.2, a and b together 0.2, noise 0.1, c 0."""
    a, b, c = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.uniform(size=n)
    signs = 2 * np.stack([a, b]) - 1
    losses = math.sqrt(0.5) * signs[0] + math.sqrt(0.2) * signs[1] + math.sqrt(0.2) * signs[0] * signs[1]
    knobs = {"a": a.tolist(), "b": [("cosine", "wsd")[level] for level in b], "c": c.tolist()}
    return knobs, losses + rng.normal(0, math.sqrt(0.1), n)


@pytest.mark.parametrize(("n", "sweeps", "tolerance"), [(4000, 1, 0.03), (40, 100, 0.04)])
def test_known_shares_are_found_in_random_designs(n: int, sweeps: int, tolerance: float) -> None:
    rng = np.random.default_rng(n)
    found = [decompose_variance(knobs, losses.tolist()) for knobs, losses in (synthetic(rng, n) for _ in range(sweeps))]
    shares = np.array([[*shares.knobs.values(), *shares.pairs.values(), shares.rest] for shares in found])
    np.testing.assert_allclose(shares.sum(1), 1)
    assert shares.mean(0) == pytest.approx([0.5, 0.2, 0.0, 0.2, 0.0, 0.0, 0.1], abs=tolerance)


def test_smooth_effects_of_continuous_knobs_are_found() -> None:
    rng = np.random.default_rng(0)
    rate, decay = rng.uniform(-4, -1, (2, 300))
    first, second = 3 * (rate + 2.5) ** 2, decay**3 / 20
    product = 0.8 * (rate + 2.5) * (decay + 2.5)
    noise = rng.normal(0, 0.3, 300)
    found = decompose_variance(
        {"rate": (10**rate).tolist(), "decay": decay.tolist()}, (first + second + product + noise).tolist()
    )
    parts = np.array([np.var(first), np.var(second), np.var(product), np.var(noise)])
    shares = [*found.knobs.values(), *found.pairs.values(), found.rest]
    assert shares == pytest.approx(parts / parts.sum(), abs=0.04)


@pytest.mark.parametrize("n", [12, 30, 100])
def test_pure_noise_has_small_shares(n: int) -> None:
    rng = np.random.default_rng(n)
    found = []
    for _ in range(100):
        knobs = {"rate": rng.uniform(size=n).tolist(), "part": [str(level) for level in rng.integers(0, 3, n)]}
        found.append(decompose_variance(knobs, rng.normal(size=n).tolist()))
    # Clipping at 0 biases the mean, but not the median.
    assert np.median([list(shares.knobs.values()) for shares in found], axis=0).max() < 0.1
    assert np.mean([shares.rest for shares in found]) > 1 - 2.2 / math.sqrt(n)


@given(st.integers(3, 40), st.integers(0, 1000), st.floats(0.1, 100), st.floats(-100, 100))
def test_shares_sum_to_1_and_are_scale_invariant(n: int, seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    rates, losses = rng.uniform(1e-4, 1e-1, n), rng.normal(size=n)
    knobs = {"rate": rates.tolist(), "part": [str(level) for level in rng.integers(0, 3, n)], "same": [1] * n}
    found = decompose_variance(knobs, losses.tolist())
    moved = decompose_variance(knobs | {"rate": np.log(rates).tolist()}, (scale * losses + shift).tolist())
    for one, other in ((found.knobs, moved.knobs), (found.pairs, moved.pairs)):
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-6)
    shares = np.array([*found.knobs.values(), *found.pairs.values(), found.rest])
    assert np.nansum(shares) == pytest.approx(1) and np.nanmin(shares) >= 0
    assert math.isnan(found.knobs["same"])


def test_diverged_trials_are_ignored_in_shares() -> None:
    knobs, losses = synthetic(np.random.default_rng(5), 40)
    diverged = {knob: [*column, column[0], column[1]] for knob, column in knobs.items()}
    assert decompose_variance(diverged, [*losses.tolist(), math.nan, math.inf]) == decompose_variance(
        knobs, losses.tolist()
    )


def test_values_of_any_type_are_levels() -> None:
    losses = [1.0, 1.1, 2.0, 2.1]
    for column in ([None, None, 64, 64], [["a"], ["a"], ["b"], ["b"]], [True, True, False, False], [{}, {}, 1, 1]):
        assert decompose_variance({"knob": column}, losses).knobs["knob"] > 0.9


def test_undetermined_shares_are_nan() -> None:
    for column, losses in (
        ([1, 1, 1, 1], [1, 2, 3, 4]),
        (["a", "b", "c", "d"], [1, 2, 3, 4]),
        ([1, 1, 2], [math.nan, math.nan, 1.0]),
        ([], []),
    ):
        assert math.isnan(decompose_variance({"knob": column}, losses).knobs["knob"])
    assert decompose_variance({}, [1, 2]).knobs == {}
    # One trial per cell: interactions cannot be distinguished from noise.
    assert decompose_variance({"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}, [1, 2, 3, 5]).pairs == {}
    # A knob with a different value in each trial has no share, but other knobs do.
    words = decompose_variance({"word": list("abcdef"), "a": [0, 0, 0, 1, 1, 1]}, [1, 1, 1, 2, 2, 2]).knobs
    assert math.isnan(words["word"]) and words["a"] == pytest.approx(1)


def test_equal_losses_have_zero_shares() -> None:
    found = decompose_variance({"a": [0, 0, 1, 1] * 2, "b": [0, 1, 0, 1] * 2}, [0.1] * 8)
    assert found == VarianceDecomposition({"a": 0.0, "b": 0.0}, {}, 1.0)


def test_columns_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError):
        decompose_variance({"a": [0, 0, 1]}, [1.0, 2.0])
