"""What the numbers of a sweep can and cannot tell: intervals, paired comparisons, sensitivities, shares of variance.

A loss that is not finite belongs to a trial that diverged and so has no loss: it is left out everywhere, and `n` or
`n_pairs` says how many were counted, but for `lr_sensitivity`, which counts it as the loss at initialisation.
What the numbers cannot tell is nan.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from scipy import linalg, special, stats

# The highest degree of the polynomials that describe the effect of a number.
MOST_DEGREES = 5
# More columns than this for all interactions would take seconds.
MOST_PAIR_COLUMNS = 100
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


@dataclass(frozen=True)
class Shares:
    """How the variance of the losses divides; the shares (0 to 1) that are known and the rest add up to 1.

    `knobs` has the main effect of each knob, nan where it has one value or as many as there are trials. `pairs` has
    what two knobs explain together beyond the sum of each, and is empty where the trials cannot tell this from noise.
    `rest` is noise, with interactions of three and more knobs, and of two where `pairs` is empty.
    """

    knobs: dict[str, float]
    pairs: dict[tuple[str, str], float]
    rest: float


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


def decompose(
    knob_values: Mapping[str, Sequence[Any]], losses: Sequence[float], without_interactions: Collection[str] = ()
) -> Shares:
    """Divide the variance of the losses among the knobs, pairs of knobs, and noise.

    Least-squares analysis of variance of the whole design, with all main effects and, where the trials are enough,
    all interactions of two knobs. Each share is corrected for what chance would explain (omega squared). What knobs
    that vary together explain in common is divided between them. Numbers enter by their order alone, as polynomials of
    up to degree 5, of a lower one where the trials are few; other values have a mean each.

    Args:
        knob_values: Each knob's value in every trial, in the order of `losses`.
        losses: The losses; trials whose loss is not finite are left out.
        without_interactions: Knobs, such as the seed, whose interactions are noise.
    """
    columns, finite = _finite(knob_values, losses)
    n = len(finite)
    bases = {knob: basis for knob in columns if (basis := _basis(columns[knob])).values.shape[1] and n > 2}
    while bases and _n_columns(bases.values(), 1) > n - 2:
        del bases[max(bases, key=lambda knob: bases[knob].up_to(1).shape[1])]
    nothing = dict.fromkeys(columns, math.nan)
    if not bases:
        return Shares(nothing, {}, math.nan)
    if np.ptp(finite) == 0:
        return Shares(nothing | dict.fromkeys(bases, 0.0), {}, 1.0)

    degree = next((d for d in range(MOST_DEGREES, 1, -1) if _n_columns(bases.values(), d) <= (n - 1) / 2), 1)
    mains = {knob: basis.up_to(degree) for knob, basis in bases.items()}
    inner = [knob for knob in mains if knob not in without_interactions]
    room = n - 1 - _n_columns(bases.values(), degree) - max(2, n // 4)
    pairs = _pairs({knob: bases[knob] for knob in inner}, min(room, MOST_PAIR_COLUMNS))

    centered = finite - finite.mean()
    rest, rank = _fit([*mains.values(), *pairs.values()], centered)
    error = rest / (n - rank)
    total = float(np.sum(centered**2)) + error
    shares = {name: part / total for name, part in _split(centered, mains, pairs, error).items()}
    scale = max(sum(shares.values()), 1.0)
    return Shares(
        nothing | {knob: shares[knob] / scale for knob in mains},
        {pair: shares[pair] / scale for pair in pairs if pair in shares},
        max(1.0 - sum(shares.values()), 0.0),
    )


@dataclass(frozen=True)
class _Basis:
    """Orthonormal columns that span the effects of a knob; those of a number are in the order of their degree."""

    values: np.ndarray
    is_numeric: bool

    def up_to(self, degree: int) -> np.ndarray:
        return self.values[:, :degree] if self.is_numeric else self.values


def _basis(column: Sequence[Any]) -> _Basis:
    is_numeric = all(isinstance(value, Real) for value in column)
    values, levels = np.unique(column if is_numeric else [repr(value) for value in column], return_inverse=True)
    if len(values) < 2:
        return _Basis(np.empty((len(column), 0)), is_numeric)
    if is_numeric:
        places = np.linspace(-1, 1, len(values))[levels]
        effects = np.polynomial.chebyshev.chebvander(places, min(len(values) - 1, MOST_DEGREES))[:, 1:]
    else:
        effects = (levels[:, None] == np.arange(len(values) - 1)).astype(float)
    return _Basis(np.linalg.qr(effects - effects.mean(0))[0], is_numeric)


def _n_columns(bases: Iterable[_Basis], degree: int) -> int:
    return sum(basis.up_to(degree).shape[1] for basis in bases)


def _pairs(bases: Mapping[str, _Basis], most_columns: int) -> dict[tuple[str, str], np.ndarray]:
    """The columns of all interactions of two knobs, of the highest degree that fits; none if not even products do."""
    for degree in range(MOST_DEGREES, 0, -1):
        sizes = [basis.up_to(degree).shape[1] for basis in bases.values()]
        if sum(first * second for first, second in itertools.combinations(sizes, 2)) <= most_columns:
            parts = {knob: basis.up_to(degree) for knob, basis in bases.items()}
            return {
                (a, b): (parts[a][:, :, None] * parts[b][:, None, :]).reshape(len(parts[a]), -1)
                for a, b in itertools.combinations(parts, 2)
            }
    return {}


def _split(
    losses: np.ndarray, mains: Mapping[Any, np.ndarray], pairs: Mapping[Any, np.ndarray], error: float
) -> dict[Any, float]:
    """The sum of squares of each group of columns, less what noise of variance `error` would explain.

    A group has what only it explains: the loss of fit where it is left out. What several explain in common is divided
    in proportion to what each explains alone, pairs beyond all main effects. Pairs that explain nothing by
    construction, as where one knob follows from the other, are left out.
    """
    groups = {**mains, **pairs}
    n, (start, start_rank), (end, end_rank) = len(losses), _fit([], losses), _fit([*groups.values()], losses)
    alone, only = {}, {}
    for name, group in groups.items():
        before = [*mains.values()] if name in pairs else []
        (base, base_rank), (rest, rank) = _fit(before, losses), _fit([*before, group], losses)
        by_chance = (rank - base_rank) * rest / max(n - rank, 1)
        alone[name] = np.array([max(base - rest - by_chance, 0.0), rank - base_rank])
        rest, rank = _fit([columns for other, columns in groups.items() if other != name], losses)
        only[name] = np.array([rest - end, end_rank - rank])
    gain, of_only = np.array([start - end, end_rank - start_rank]), sum(only.values(), np.zeros(2))
    common = np.maximum(gain - of_only, 0.0) / sum(alone.values(), np.full(2, 1e-300))
    scale = np.where(of_only > gain, gain, 1.0) / np.where(of_only > gain, of_only, 1.0)
    parts = {name: only[name] * scale + alone[name] * common for name in groups if alone[name][1] > 0}
    return {name: max(float(squares - rank * error), 0.0) for name, (squares, rank) in parts.items()}


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


def _fit(groups: Sequence[np.ndarray], losses: np.ndarray) -> tuple[float, int]:
    """The sum of squares that a least-squares fit of a mean and of columns leaves, and the rank of its design."""
    design = np.hstack([np.ones((len(losses), 1)), *groups])
    weights, _, rank, _ = linalg.lstsq(design, losses, lapack_driver="gelsy")
    return float(np.sum((losses - design @ weights) ** 2)), int(rank)
