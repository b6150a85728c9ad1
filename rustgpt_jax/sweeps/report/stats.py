"""Statistics of a sweep: intervals, paired comparisons, learning-rate sensitivity, and shares of variance.

A loss that is not finite belongs to a diverged trial. It is ignored and not counted in `n` or `n_pairs`, except that
`compute_lr_sensitivity` replaces it by the loss at initialization. Results that cannot be computed are NaN.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from scipy import linalg, special

# Maximum degree of the polynomials that model the effect of a numeric knob.
MAX_DEGREE = 5
# Maximum number of columns for all interactions; more would take seconds to fit.
MAX_PAIR_COLUMNS = 100
# The accepted probability of any false claim in a sweep, and the number of simulated sweeps used to control it.
FALSE_CLAIMS = 0.05
MAX_SIMULATED_LOSSES, SIMULATED_SWEEPS, CHUNK = 6_000_000, (10_000, 100_000), 500_000


@dataclass(frozen=True)
class Interval:
    """A mean of n values and its confidence interval, which is NaN if n < 2; the mean is NaN if n = 0."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The mean paired difference, its confidence interval, and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    n_pairs: int


@dataclass(frozen=True)
class VarianceDecomposition:
    """Fractions of the loss variance, from 0 to 1; the known ones and `rest` sum to 1.

    Attributes:
        knobs: The main effect of each knob; NaN if it has a single value or a different one in each trial.
        pairs: Interactions of two knobs beyond their main effects; empty if they cannot be separated from noise.
        rest: Noise and interactions of three or more knobs, and of two if `pairs` is empty.
    """

    knobs: dict[str, float]
    pairs: dict[tuple[str, str], float]
    rest: float


def compute_mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Compute the mean of the finite values and its t interval, assuming independent normal values."""
    counted = np.array([value for value in values if math.isfinite(value)], float)
    n = len(counted)
    mean = float(counted.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2) * counted.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def compare_paired(a: Mapping[Any, float], b: Mapping[Any, float], confidence: float = 0.95) -> Comparison | None:
    """Compare losses by seed with a paired t-test of a - b, over the seeds at which both are finite.

    If all differences are equal, the t-test would give p = 0 even for two seeds. Then the interval is NaN, and the
    p-value is that of the sign-flip test: 2^(1 - n) for n seeds, or 1 if the difference is 0.

    Returns:
        The comparison, or None if fewer than two seeds are shared.
    """
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    if len(seeds) < 2:
        return None
    first, second = np.array([[losses[seed] for seed in seeds] for losses in (a, b)], float)
    differences = first - second
    difference, n = float(differences.mean()), len(seeds)
    # Equal up to rounding.
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
    """Compare each setting with the best one, accounting for selecting the best on the same losses.

    P-values and 95% intervals are based on the distribution of the smallest p-value of paired t-tests against the
    setting with the lowest mean, which is selected anew in each simulated sweep without effects and with the same seeds
    missing. The probability of any p-value below 0.05 for a setting that is not worse than the best one, and of any
    interval that misses the true difference, is at most 5%. Assumes normal losses; docs/concepts/statistics.md has
    error rates measured for unequal variances and non-normal losses.

    Args:
        losses: The losses of each setting by seed; the first setting is the best one.
        n_candidates: The number of settings, from the first on, among which the best was selected; all by default.

    Returns:
        For each setting but the first, its comparison with the first, or None if they share fewer than two seeds.
    """
    finite = [{seed: loss for seed, loss in setting.items() if math.isfinite(loss)} for setting in losses]
    compared = [compare_paired(setting, finite[0]) for setting in finite[1:]]
    if sum(comparison is not None for comparison in compared) < 2:
        return compared
    seeds = sorted({seed for setting in finite for seed in setting}, key=str)
    pattern = [tuple(seed in setting for seed in seeds) for setting in finite]
    n_candidates = n_candidates or len(losses)
    # The order of settings is irrelevant without effects, so sort them to get more cache hits.
    smallest = simulate_smallest_p_values(
        (*sorted(pattern[:n_candidates]), *sorted(pattern[n_candidates:])), n_candidates
    )
    threshold = float(smallest[int(FALSE_CLAIMS * (len(smallest) + 1)) - 1])
    adjusted: list[Comparison | None] = []
    for setting, comparison in zip(finite[1:], compared, strict=True):
        # The p-value and the interval are consistent: both compare the unadjusted p-value with the threshold.
        wider = compare_paired(setting, finite[0], 1 - threshold)
        if comparison is None or wider is None:
            adjusted.append(None)
            continue
        n_below = int(np.searchsorted(smallest, comparison.p_value, side="right"))
        adjusted.append(replace(wider, p_value=(1 + n_below) / (1 + len(smallest))))
    return adjusted


@lru_cache(maxsize=32)
def simulate_smallest_p_values(pattern: tuple[tuple[bool, ...], ...], n_candidates: int) -> np.ndarray:
    """Return the sorted smallest p-values against the best setting in simulated sweeps without effects.

    Args:
        pattern: For each setting, which of the sweep's seeds have a loss.
        n_candidates: The number of settings, from the first on, that can be the best one.
    """
    present = np.array(pattern, float)
    n_sweeps = int(np.clip(MAX_SIMULATED_LOSSES // present.size, *SIMULATED_SWEEPS))
    rng = np.random.default_rng(0)
    size = max(CHUNK // present.size, 1)
    chunks = [
        _compute_smallest_p_values(
            rng.normal(size=(min(size, n_sweeps - start), *present.shape)), present, n_candidates
        )
        for start in range(0, n_sweeps, size)
    ]
    smallest = np.sort(np.concatenate(chunks))
    smallest.flags.writeable = False
    return smallest


def _compute_smallest_p_values(losses: np.ndarray, present: np.ndarray, n_candidates: int) -> np.ndarray:
    """Return the smallest p-value against the best setting per sweep, for losses indexed by sweep, setting and seed."""
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


def compute_lr_sensitivity(losses_by_rate: Mapping[float, float], initial_loss: float) -> float:
    """Compute the learning-rate sensitivity (arXiv 2309.14322): the mean of min(loss, initial loss) - best loss.

    A non-finite loss counts as the initial one. Each rate is weighted by its share of the logarithmic axis: half the
    distance to each neighbor, extended by the same distance at the ends. For evenly spaced rates, this is the plain
    mean.

    Returns:
        The sensitivity, or NaN if no loss is below the initial one, or a rate is not positive.
    """
    rates = np.array(sorted(losses_by_rate), float)
    losses = np.array([losses_by_rate[rate] for rate in sorted(losses_by_rate)], float)
    capped = np.minimum(np.where(np.isfinite(losses), losses, initial_loss), initial_loss)
    if not np.any(capped < initial_loss) or rates[0] <= 0:
        return math.nan
    widths = np.gradient(np.log(rates)) if len(rates) > 1 else np.ones(1)
    return float(np.average(capped - capped.min(), weights=widths))


def decompose_variance(
    knob_values: Mapping[str, Sequence[Any]], losses: Sequence[float], without_interactions: Collection[str] = ()
) -> VarianceDecomposition:
    """Decompose the variance of the losses into knobs, pairs of knobs, and noise.

    Fits a least-squares analysis of variance of the whole design with all main effects and, if there are enough trials,
    all two-way interactions. Each share is corrected for chance (omega squared). Variance explained jointly by
    correlated knobs is divided between them. Numeric knobs enter by rank, as polynomials of degree up to 5, or lower if
    there are few trials; other knobs have a mean per value.

    Args:
        knob_values: The values of each knob, in the order of `losses`.
        losses: The losses; trials with a non-finite loss are ignored.
        without_interactions: Knobs, such as the seed, whose interactions count as noise.
    """
    all_losses = np.asarray(losses, float)
    is_finite = np.isfinite(all_losses)
    finite, n = all_losses[is_finite], int(is_finite.sum())
    columns = {
        knob: [value for value, counts in zip(column, is_finite, strict=True) if counts]
        for knob, column in knob_values.items()
    }
    bases = {knob: basis for knob in columns if (basis := _make_basis(columns[knob])).values.shape[1] and n > 2}
    while bases and _count_columns(bases.values(), 1) > n - 2:
        del bases[max(bases, key=lambda knob: bases[knob].up_to(1).shape[1])]
    nothing = dict.fromkeys(columns, math.nan)
    if not bases:
        return VarianceDecomposition(nothing, {}, math.nan)
    if np.ptp(finite) == 0:
        return VarianceDecomposition(nothing | dict.fromkeys(bases, 0.0), {}, 1.0)

    degree = next((d for d in range(MAX_DEGREE, 1, -1) if _count_columns(bases.values(), d) <= (n - 1) / 2), 1)
    mains = {knob: basis.up_to(degree) for knob, basis in bases.items()}
    inner = [knob for knob in mains if knob not in without_interactions]
    room = n - 1 - _count_columns(bases.values(), degree) - max(2, n // 4)
    pairs = _make_interactions({knob: bases[knob] for knob in inner}, min(room, MAX_PAIR_COLUMNS))

    centered = finite - finite.mean()
    rest, rank = _fit([*mains.values(), *pairs.values()], centered)
    error = rest / (n - rank)
    total = float(np.sum(centered**2)) + error
    shares = {name: part / total for name, part in _divide_variance(centered, mains, pairs, error).items()}
    scale = max(sum(shares.values()), 1.0)
    return VarianceDecomposition(
        nothing | {knob: shares[knob] / scale for knob in mains},
        {pair: shares[pair] / scale for pair in pairs if pair in shares},
        max(1.0 - sum(shares.values()), 0.0),
    )


@dataclass(frozen=True)
class _Basis:
    """Orthonormal columns that span the effects of a knob; for a numeric knob, in order of degree."""

    values: np.ndarray
    is_numeric: bool

    def up_to(self, degree: int) -> np.ndarray:
        return self.values[:, :degree] if self.is_numeric else self.values


def _make_basis(column: Sequence[Any]) -> _Basis:
    is_numeric = all(isinstance(value, Real) for value in column)
    values, levels = np.unique(column if is_numeric else [repr(value) for value in column], return_inverse=True)
    if len(values) < 2:
        return _Basis(np.empty((len(column), 0)), is_numeric)
    if is_numeric:
        places = np.linspace(-1, 1, len(values))[levels]
        effects = np.polynomial.chebyshev.chebvander(places, min(len(values) - 1, MAX_DEGREE))[:, 1:]
    else:
        effects = (levels[:, None] == np.arange(len(values) - 1)).astype(float)
    return _Basis(np.linalg.qr(effects - effects.mean(0))[0], is_numeric)


def _count_columns(bases: Iterable[_Basis], degree: int) -> int:
    return sum(basis.up_to(degree).shape[1] for basis in bases)


def _make_interactions(bases: Mapping[str, _Basis], most_columns: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the columns of all two-way interactions, of the highest degree that fits; empty if none does."""
    for degree in range(MAX_DEGREE, 0, -1):
        sizes = [basis.up_to(degree).shape[1] for basis in bases.values()]
        if sum(first * second for first, second in itertools.combinations(sizes, 2)) <= most_columns:
            parts = {knob: basis.up_to(degree) for knob, basis in bases.items()}
            return {
                (a, b): (parts[a][:, :, None] * parts[b][:, None, :]).reshape(len(parts[a]), -1)
                for a, b in itertools.combinations(parts, 2)
            }
    return {}


def _divide_variance(
    losses: np.ndarray, mains: Mapping[Any, np.ndarray], pairs: Mapping[Any, np.ndarray], error: float
) -> dict[Any, float]:
    """Return each column group's sum of squares, minus the amount expected from noise with variance `error`.

    The sum of squares of a group is what only that group explains: the loss of fit when it is removed. Variance
    explained jointly is divided in proportion to what each group explains alone, pairs only beyond all main effects.
    Pairs that are linearly dependent on the other columns, for example if one knob determines another, are omitted.
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


def _fit(groups: Sequence[np.ndarray], losses: np.ndarray) -> tuple[float, int]:
    """Return the residual sum of squares of a least-squares fit with an intercept, and the rank of the design."""
    design = np.hstack([np.ones((len(losses), 1)), *groups])
    weights, _, rank, _ = linalg.lstsq(design, losses, lapack_driver="gelsy")
    return float(np.sum((losses - design @ weights) ** 2)), int(rank)
