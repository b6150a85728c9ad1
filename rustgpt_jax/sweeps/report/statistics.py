"""What the numbers of a sweep can and cannot tell: intervals, paired comparisons, sensitivities, shares of variance.

A loss that is not finite belongs to a trial that diverged and so has no loss: it is left out everywhere, and `n` or
`n_pairs` says how many were counted, but for `lr_sensitivity`, which counts it as the loss at initialisation.
What the numbers cannot tell is nan.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from scipy import special, stats

# A numeric knob with more distinct values than this is cut into quantile bins, at most so many.
MOST_LEVELS = 6
# How many trials a bin, or a cell of two knobs' bins, holds in the mean if all bins of a knob are alike.
TRIALS_IN_A_CELL = 4
# The accepted probability of any false claim in a sweep, and the simulated sweeps that keep it.
FALSE_CLAIMS = 0.05
SIMULATED_LOSSES, SIMULATED_SWEEPS, CHUNK = 6_000_000, (10_000, 100_000), 500_000


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its confidence interval; low and high are nan where n < 2, and all where n = 0."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The mean difference over pairs, its confidence interval, and the p-value of there being no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n_pairs: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of the finite values and its Student t interval, which takes them to be independent and normal."""
    counted = np.array([value for value in values if math.isfinite(value)], float)
    n = len(counted)
    mean = float(counted.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * counted.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Mapping[Any, float], b: Mapping[Any, float], confidence: float = 0.95) -> Comparison | None:
    """Compare losses by seed, a - b (below 0 where a is better), over the seeds at which both are finite.

    A paired t-test; None if fewer than two seeds are left. Where all differences are equal there is no spread to
    test against, and the t-test, which takes them to be normal, would say p = 0 from two seeds: the interval is nan,
    and the p-value that of the sign-flip test, the chance 2^(1 - n) that n fair coins fall alike (1 for no difference).
    """
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    if len(seeds) < 2:
        return None
    first, second = np.array([[losses[seed] for seed in seeds] for losses in (a, b)], float)
    differences = first - second
    difference, n = float(differences.mean()), len(seeds)
    # Equal but for rounding.
    rounding = 64 * np.finfo(float).eps * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(differences) <= rounding:
        p_value = 1.0 if abs(difference) <= rounding else 2.0 ** (1 - n)
        return Comparison(difference, math.nan, math.nan, p_value, n)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    half = -error * float(special.stdtrit(n - 1, (1 - confidence) / 2))
    p_value = 2 * float(special.stdtr(n - 1, -abs(difference) / error))
    return Comparison(difference, difference - half, difference + half, p_value, n)


def compare_with_best(
    losses: Sequence[Mapping[Any, float]], n_candidates: int | None = None
) -> list[Comparison | None]:
    """Compare each setting with the best one, accounting for the choice of the best by the same losses.

    The p-values and the 95% intervals come from one distribution: that of the smallest p-value of paired t-tests
    against the setting with the lowest mean, chosen anew in each simulated sweep without effects, with the same seeds
    missing. The probability of any p-value below 0.05 for a setting that is not worse than the best one, and of any
    interval that misses the true difference, is at most 5%. Assumes normal losses; docs/statistics.md has error rates
    measured without equal variances and without normality.

    Args:
        losses: The losses of each setting by seed; the first setting is the best one.
        n_candidates: How many settings, from the first on, the best was chosen among. All by default.

    Returns:
        For each setting but the first, its comparison with the first; None where they share fewer than two seeds.
    """
    finite = [{seed: loss for seed, loss in setting.items() if math.isfinite(loss)} for setting in losses]
    compared = [paired(setting, finite[0]) for setting in finite[1:]]
    if sum(comparison is not None for comparison in compared) < 2:
        return compared
    seeds = sorted({seed for setting in finite for seed in setting}, key=str)
    pattern = [tuple(seed in setting for seed in seeds) for setting in finite]
    n_candidates = n_candidates or len(losses)
    # Without effects the order of settings does not matter: sorted, for the cache.
    smallest = smallest_p_values((*sorted(pattern[:n_candidates]), *sorted(pattern[n_candidates:])), n_candidates)
    threshold = float(smallest[int(FALSE_CLAIMS * (len(smallest) + 1)) - 1])
    adjusted: list[Comparison | None] = []
    for setting, comparison in zip(finite[1:], compared, strict=True):
        # The p-value and whether the interval holds 0 agree: both compare the unadjusted p-value with the threshold.
        wider = paired(setting, finite[0], 1 - threshold)
        if comparison is None or wider is None:
            adjusted.append(None)
            continue
        n_below = int(np.searchsorted(smallest, comparison.p_value, side="right"))
        adjusted.append(replace(wider, p_value=(1 + n_below) / (1 + len(smallest))))
    return adjusted


@lru_cache(maxsize=32)
def smallest_p_values(pattern: tuple[tuple[bool, ...], ...], n_candidates: int) -> np.ndarray:
    """The smallest p-value against the best setting in each of many simulated sweeps without effects, sorted.

    Args:
        pattern: For each setting, which of the sweep's seeds have a loss.
        n_candidates: How many settings, from the first on, can be the best one.
    """
    present = np.array(pattern, float)
    n_sweeps = int(np.clip(SIMULATED_LOSSES // present.size, *SIMULATED_SWEEPS))
    rng = np.random.default_rng(0)
    size = max(CHUNK // present.size, 1)
    chunks = [
        _smallest_p_values(rng.normal(size=(min(size, n_sweeps - start), *present.shape)), present, n_candidates)
        for start in range(0, n_sweeps, size)
    ]
    smallest = np.sort(np.concatenate(chunks))
    smallest.flags.writeable = False
    return smallest


def _smallest_p_values(losses: np.ndarray, present: np.ndarray, n_candidates: int) -> np.ndarray:
    """The smallest p-value against the best setting in each sweep; losses are indexed by sweep, setting and seed."""
    means = (losses * present).sum(2)[:, :n_candidates] / present.sum(1)[:n_candidates]
    best = means.argmin(1)
    sweeps = np.arange(len(losses))
    shared = present * present[best][:, None]
    n_shared = shared.sum(2)
    differences = (losses - losses[sweeps, best][:, None]) * shared
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = differences.sum(2) / n_shared
        squares = ((differences - mean[:, :, None]) ** 2 * shared).sum(2)
        t = np.abs(mean) / np.sqrt(squares / (n_shared - 1) / n_shared)
    t[sweeps, best] = 0.0
    smallest = np.ones(len(losses))
    for n in np.unique(n_shared[n_shared > 1]):
        largest = np.where(n_shared == n, t, 0.0).max(1)
        smallest = np.minimum(smallest, 2 * special.stdtr(n - 1, -largest))
    return smallest


def lr_sensitivity(losses_by_rate: Mapping[float, float], initial_loss: float) -> float:
    """How far the loss lies above the best one, in the mean over the learning rates of a sweep (arXiv 2309.14322).

    The mean of min(loss, initial_loss) - best loss, where a loss that is not finite counts as the initial one. A rate
    weighs as much as its share of the logarithmic axis: half of the way to each neighbour, and as far again outwards
    at the ends. With rates evenly spaced that is the plain mean; else the trapezoid rule, carried on past the ends.
    nan if no rate gives a loss below the initial one, or one of the rates is not above 0.
    """
    rates = np.array(sorted(losses_by_rate), float)
    losses = np.array([losses_by_rate[rate] for rate in sorted(losses_by_rate)], float)
    capped = np.minimum(np.where(np.isfinite(losses), losses, initial_loss), initial_loss)
    if not np.any(capped < initial_loss) or rates[0] <= 0:
        return math.nan
    widths = np.gradient(np.log(rates)) if len(rates) > 1 else np.ones(1)
    return float(np.average(capped - capped.min(), weights=widths))


def importance(knob_values: Mapping[str, Sequence[Any]], losses: Sequence[float]) -> dict[str, float]:
    """For each knob, the share (0 to 1) of the variance of the losses that it explains alone.

    `knob_values` gives each knob's value in every trial, in the order of `losses`. Omega-squared, which takes off what
    a knob without effect would explain by chance (Hays, Statistics for Psychologists, 1963). A numeric knob with more
    than six distinct values is cut into two to six quantile bins, of four trials or more where there are enough.
    nan where the trials cannot tell: the knob has one level, or none of its levels is seen twice.
    """
    columns, finite = _finite(knob_values, losses)
    intercept = np.ones((len(finite), 1))
    return {knob: _explained(finite, intercept, _indicators(_levels(column, 1))) for knob, column in columns.items()}


def interactions(knob_values: Mapping[str, Sequence[Any]], losses: Sequence[float]) -> dict[tuple[str, str], float]:
    """For each pair of knobs, the share (0 to 1) of the variance that both explain together beyond the sum of each.

    The least-squares fit of a mean to each cell against that of one effect of each knob, corrected for chance as
    `importance` is. Bins are wider here, so that a cell holds four trials or more in the mean. nan where the trials
    cannot tell: no cell is seen twice, or the cells seen are too few to tell an interaction from a sum of effects,
    as where one knob follows from the other.
    """
    columns, finite = _finite(knob_values, losses)
    shares = {}
    for pair in itertools.combinations(columns, 2):
        first, second = (_levels(columns[knob], 2) for knob in pair)
        # NumPy 2.0 alone gives the places as a row.
        cells = np.unique(np.stack([first, second]), axis=1, return_inverse=True)[1].reshape(-1)
        shares[pair] = _explained(finite, np.hstack([_indicators(first), _indicators(second)]), _indicators(cells))
    return shares


def _finite(
    knob_values: Mapping[str, Sequence[Any]], losses: Sequence[float]
) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Each knob's values in the trials whose losses are finite, and these losses."""
    finite = np.isfinite(np.asarray(losses, float))
    columns = {
        knob: [value for value, counts in zip(column, finite, strict=True) if counts]
        for knob, column in knob_values.items()
    }
    return columns, np.asarray(losses, float)[finite]


def _levels(column: Sequence[Any], knobs: int) -> np.ndarray:
    """A knob's values as levels 0, 1, ..., whose bins leave enough trials in a cell of so many knobs."""
    if not all(isinstance(value, Real) for value in column):
        return np.unique([repr(value) for value in column], return_inverse=True)[1]
    numbers = np.array(column, float)
    if len(np.unique(numbers)) <= MOST_LEVELS:
        return np.unique(numbers, return_inverse=True)[1]
    bins = min(max(math.floor((len(column) / TRIALS_IN_A_CELL) ** (1 / knobs)), 2), MOST_LEVELS)
    # Edges that are values, so that only the order of the values counts, not their scale.
    edges = np.quantile(numbers, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.searchsorted(edges, numbers)


def _indicators(levels: np.ndarray) -> np.ndarray:
    return (levels[:, None] == np.unique(levels)).astype(float)


def _explained(losses: np.ndarray, smaller: np.ndarray, larger: np.ndarray) -> float:
    """The share of variance that a larger linear model explains beyond a smaller one within it, less that by chance."""
    if len(losses) == 0:
        return math.nan
    losses = losses - losses.mean()
    (small_rest, small_rank), (rest, rank) = _fit(smaller, losses), _fit(larger, losses)
    if rank == len(losses) or rank == small_rank:
        return math.nan
    error = rest / (len(losses) - rank)
    if np.ptp(losses) == 0:
        return 0.0
    total = np.sum(losses**2)
    return float(np.clip((small_rest - rest - (rank - small_rank) * error) / (total + error), 0, 1))


def _fit(design: np.ndarray, losses: np.ndarray) -> tuple[float, int]:
    """The sum of squares that a least-squares fit leaves, and the rank of its design."""
    weights, _, rank, _ = np.linalg.lstsq(design, losses)
    return float(np.sum((losses - design @ weights) ** 2)), int(rank)
