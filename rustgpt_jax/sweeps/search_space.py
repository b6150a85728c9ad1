"""Building blocks of sweeps: each trial is a mapping of config paths to values that override the sweep's config.

    values, seeds              one knob over several values
    product, zip_, chain       combine sweeps: all combinations, element by element, or concatenated
    sample, sobol              points of a space, which maps knobs to distributions
    successive_halving, tpe    searches, whose trials depend on earlier results

Any iterable of overrides is a sweep, so a handwritten list or a generator works as well.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rustgpt_jax.errors import UserError

__all__ = ["Overrides", "chain", "product", "sample", "seeds", "sobol", "successive_halving", "tpe", "values", "zip_"]
__all__ += ["choice", "integers", "log_integers", "log_uniform", "uniform", "Search", "SuccessiveHalving", "TPE"]
__all__ += ["Categorical", "Distribution", "Integers", "LogIntegers", "LogUniform", "Uniform"]

# Dotted path of a knob -> value: {"optimizer.learning_rate": 1e-3, "stages.pretrain.training.steps": 50}.
Overrides = dict[str, Any]

# Sampled numbers are rounded to this many digits; narrow ranges get more digits, so that values remain distinct.
DIGITS = 4


def values(path: str, *options: Any) -> list[Overrides]:
    """Vary one knob over several values, in order.

    Raises:
        UserError: No value is given, or a value is a generator, an array or another collection.
    """
    if not isinstance(path, str):
        raise UserError(f"values({path!r}, ...): the first argument is the path of a knob: values('seed', 0, 1).")
    if not options:
        raise UserError(f"values({path!r}): no values to try.")
    return [{path: _to_plain(f"values({path!r}, ...)", option)} for option in options]


def seeds(n: int, first: int = 0) -> list[Overrides]:
    """Vary the seed: first, first + 1, ..., first + n - 1. Raises UserError if n < 1 or first < 0."""
    start = _check_integer("seeds: first", first, 0)
    return [{"seed": start + index} for index in range(_check_integer("seeds: n", n, 1))]


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Combine sweeps into all combinations; the first varies slowest. Raises UserError if two set the same knob."""
    return [_merge("product", parts) for parts in itertools.product(*_to_lists("product", sweeps))]


def zip_(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Combine sweeps element by element: merge the first overrides of each into a trial, then the second, etc.

    Raises:
        UserError: The sweeps have different lengths, or two set the same knob.
    """
    lists = _to_lists("zip_", sweeps)
    lengths = [len(trials) for trials in lists]
    if len(set(lengths)) > 1:
        raise UserError(f"zip_: the sweeps have different lengths: {', '.join(map(str, lengths))}.")
    return [_merge("zip_", parts) for parts in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Concatenate sweeps."""
    return [dict(trial) for trials in _to_lists("chain", sweeps) for trial in trials]


# Distributions. `quantile` maps a number u in [0, 1) to a value, and does not decrease as u increases.


@dataclass(frozen=True)
class Uniform:
    """The uniform distribution over real numbers from low to high."""

    low: float
    high: float

    def quantile(self, u: float) -> float:
        """Return the u-quantile, rounded."""
        span = self.high - self.low
        value = round(self.low + u * span, DIGITS - math.floor(math.log10(span)))
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class LogUniform:
    """Log-uniform distribution over [low, high]."""

    low: float
    high: float

    def quantile(self, u: float) -> float:
        """Return the u-quantile, rounded."""
        exact = math.exp(_interpolate(math.log(self.low), math.log(self.high), u))
        narrowness = min(1.0, (self.high - self.low) / self.low)
        value = float(f"{exact:.{DIGITS - math.floor(math.log10(narrowness))}g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Integers:
    """The uniform distribution over integers from low to high, both included."""

    low: int
    high: int

    def quantile(self, u: float) -> int:
        """Return the u-quantile."""
        return min(self.low + math.floor(u * (self.high - self.low + 1)), self.high)


@dataclass(frozen=True)
class LogIntegers:
    """The distribution of numbers that are log-uniform from low - 1/2 to high + 1/2, rounded to integers."""

    low: int
    high: int

    def quantile(self, u: float) -> int:
        """Return the u-quantile."""
        exact = math.exp(_interpolate(math.log(self.low - 0.5), math.log(self.high + 0.5), u))
        return min(max(math.floor(exact + 0.5), self.low), self.high)


@dataclass(frozen=True)
class Categorical:
    """The uniform distribution over unordered options."""

    options: tuple[Any, ...]

    def quantile(self, u: float) -> Any:
        """Return the u-quantile in the order of the options."""
        return self.options[min(math.floor(u * len(self.options)), len(self.options) - 1)]


Distribution = Uniform | LogUniform | Integers | LogIntegers | Categorical
Space = Mapping[str, Distribution]


def uniform(low: float, high: float) -> Uniform:
    """Return a uniform distribution over real numbers. Raises UserError unless low < high and both are finite."""
    _check_range("uniform", low, high, Real)
    return Uniform(float(low), float(high))


def log_uniform(low: float, high: float) -> LogUniform:
    """Return a distribution that is uniform in log space. Raises UserError unless 0 < low < high < infinity."""
    _check_range("log_uniform", low, high, Real, above=0)
    return LogUniform(float(low), float(high))


def integers(low: int, high: int) -> Integers:
    """Return a uniform distribution over the integers from low to high, both included.

    Raises:
        UserError: low or high is not an integer, or low >= high.
    """
    _check_range("integers", low, high, Integral)
    return Integers(int(low), int(high))


def log_integers(low: int, high: int) -> LogIntegers:
    """Return a distribution over the integers from low to high, both included, that is uniform in log space.

    Raises:
        UserError: low or high is not an integer, or not 0 < low < high.
    """
    _check_range("log_integers", low, high, Integral, above=0)
    return LogIntegers(int(low), int(high))


def choice(*options: Any) -> Categorical:
    """Return a uniform distribution over unordered values of any type.

    Raises:
        UserError: No value is given, or a value is a generator, an array or another collection.
    """
    if not options:
        raise UserError("choice: no options to choose from.")
    return Categorical(tuple(_to_plain("choice(...)", option) for option in options))


def sample(n: int, space: Space, seed: int = 0) -> list[Overrides]:
    """Sample n independent points of a space.

    The points are a function of the seed, the first k of them do not depend on n, and the values of a knob do not
    depend on which other knobs are in the space.

    Raises:
        UserError: n < 1, seed < 0, or the space is empty or contains something other than distributions.
    """
    _check_space("sample", space)
    start = _check_integer("sample: seed", seed, 0)
    generators = {path: random.Random(f"{start} {path}") for path in space}
    return [
        {path: distribution.quantile(generators[path].random()) for path, distribution in space.items()}
        for _ in range(_check_integer("sample: n", n, 1))
    ]


def sobol(n: int, space: Space, seed: int = 0) -> list[Overrides]:
    """Return n points of a scrambled Sobol sequence (Owen, 1998), which cover a space more evenly than random ones.

    The points are a function of the seed, and the first k do not depend on n; powers of two are the most even. Raises
    UserError as `sample` does.
    """
    # Import here, since this takes longer than everything else that is needed to list a sweep.
    from scipy.stats.qmc import Sobol

    _check_space("sobol", space)
    # Sampling a whole power of two gives the same points for any n.
    exponent = (_check_integer("sobol: n", n, 1) - 1).bit_length()
    points = Sobol(len(space), rng=_check_integer("sobol: seed", seed, 0)).random_base2(exponent)[:n].tolist()
    return [
        {path: distribution.quantile(u) for (path, distribution), u in zip(space.items(), point, strict=True)}
        for point in points
    ]


@dataclass(frozen=True)
class SuccessiveHalving:
    """A search whose trials start together; at each rung (a step), the best fraction `keep` of them continues.

    Jamieson and Talwalkar, arXiv 1502.07943.
    """

    trials: tuple[Overrides, ...]
    rungs: tuple[int, ...]
    keep: float


@dataclass(frozen=True)
class TPE:
    """A search whose points are proposed in batches by a tree-structured Parzen estimator.

    Each of the `n_trials` points is run as one trial or, if `seeds` are given, as one trial per seed; then the result
    is the mean over the seeds.
    Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011.
    """

    n_trials: int
    space: tuple[tuple[str, Distribution], ...]
    batch: int
    seed: int
    seeds: tuple[int, ...]

    @property
    def n_runs(self) -> int:
        """The number of trials over all points and seeds."""
        return self.n_trials * max(1, len(self.seeds))

    @property
    def median_point(self) -> Overrides:
        """The median of each distribution."""
        return {path: distribution.quantile(0.5) for path, distribution in self.space}


Search = SuccessiveHalving | TPE


def successive_halving(trials: Iterable[Overrides], rungs: Sequence[int], keep: float = 1 / 3) -> SuccessiveHalving:
    """Search by training all trials to the first rung, the best fraction `keep` of them to the second, and so on.

    Args:
        trials: The trials at the start.
        rungs: Steps of a run, in ascending order.
        keep: A fraction between 0 and 1.

    Raises:
        UserError: An argument is invalid.
    """
    (listed,) = _to_lists("successive_halving", [trials])
    if not listed:
        raise UserError("successive_halving: no trials.")
    steps = tuple(_check_integer("successive_halving: a rung", rung, 1) for rung in rungs)
    if not steps or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise UserError(f"successive_halving: rungs must be ascending steps, such as (100, 300, 900), got {steps}.")
    if not isinstance(keep, Real) or not 0 < keep < 1:
        raise UserError(f"successive_halving: keep must be between 0 and 1, such as 1/3, got {keep!r}.")
    return SuccessiveHalving(tuple(dict(trial) for trial in listed), steps, float(keep))


def tpe(n_trials: int, space: Space, batch: int = 8, seed: int = 0, seeds: Sequence[int] = ()) -> TPE:
    """Search a space with a tree-structured Parzen estimator (Optuna).

    Args:
        n_trials: The number of points.
        space: The distribution of each searched knob.
        batch: The number of points proposed at a time.
        seed: The seed of the search.
        seeds: The seeds with which each point is tried; by default, the seed of the config.

    Raises:
        UserError: n_trials or batch < 1, the space is invalid, or a seed is repeated or also in the space.
    """
    _check_space("tpe", space)
    listed = tuple(_check_integer("tpe: a seed", value, 0) for value in seeds)
    if len(set(listed)) < len(listed):
        raise UserError(f"tpe: seeds={listed} has duplicates.")
    if listed and "seed" in space:
        raise UserError("tpe: 'seed' is both in the space and given by seeds.")
    return TPE(
        _check_integer("tpe: n_trials", n_trials, 1),
        tuple(space.items()),
        _check_integer("tpe: batch", batch, 1),
        _check_integer("tpe: seed", seed, 0),
        listed,
    )


def _to_lists(caller: str, sweeps: Sequence[Iterable[Overrides]]) -> list[list[Overrides]]:
    """Convert sweeps to lists. Each is read only once, since it may be an iterator."""
    lists = [list(sweep) if isinstance(sweep, Iterable) else [] for sweep in sweeps]
    for number, (sweep, trials) in enumerate(zip(sweeps, lists, strict=True), 1):
        if not isinstance(sweep, Iterable) or not all(isinstance(trial, Mapping) for trial in trials):
            raise UserError(
                f"{caller}: argument {number} is not a sweep, which is a sequence of overrides such as "
                "[{'optimizer.learning_rate': 1e-3}] or the result of values, product etc."
            )
    return lists


def _merge(caller: str, parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        for path, value in part.items():
            if path in merged:
                raise UserError(f"{caller}: {path!r} is set by two of the sweeps.")
            merged[path] = value
    return merged


def _to_plain(caller: str, option: Any) -> Any:
    """Convert NumPy scalars to Python numbers, which JSON supports."""
    if isinstance(option, Iterable) and not isinstance(option, str | tuple | list | Mapping):
        raise UserError(f"{caller}: a value is a {type(option).__name__}; write * before it to pass its items.")
    return option.item() if hasattr(option, "item") else option


def _interpolate(low: float, high: float, u: float) -> float:
    return low + u * (high - low)


def _check_integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise UserError(f"{name} must be an integer >= {low}, got {value!r}.")
    return int(value)


def _check_range(caller: str, low: Any, high: Any, kind: type, above: float = -math.inf) -> None:
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, kind):
            raise UserError(
                f"{caller}: {name} must be {'an integer' if kind is Integral else 'a number'}, got {bound!r}."
            )
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{caller}: low={low!r} must be below high={high!r}, and both finite.")
    if low <= above:
        raise UserError(f"{caller}: low={low!r} must be above 0 to have a logarithm.")


def _check_space(caller: str, space: Space) -> None:
    if not isinstance(space, Mapping) or not space:
        raise UserError(f"{caller}: a space maps knobs to distributions: {{'optimizer.b2': uniform(0.9, 0.999)}}.")
    for path, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise UserError(
                f"{caller}: {path} is {distribution!r}, not a distribution such as uniform(0, 1) or choice(1, 2)."
            )
