"""The algebra of sweeps: which trials there are, each said as the knobs in which it differs from the sweep's config.

    values, seeds              one knob over several values
    product, zipped, chain     sweeps combined: every combination, side by side, one after another
    sample, sobol              points of a space, which gives each knob a distribution
    successive_halving, tree_parzen    searches: plain data here, which a launcher carries out

A sweep is any iterable of overrides, so a list written by hand or a generator is one too.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from rustgpt_jax.errors import UserError

# Dotted path of a knob -> value: {"optimizer.learning_rate": 1e-3, "seed": 1, "stages.pretrain.training.steps": 50}.
Overrides = dict[str, Any]

# Drawn numbers are rounded to this many digits, and to as many more as a narrow range needs to keep its values apart.
DIGITS = 4


def values(path: str, *options: Any) -> list[Overrides]:
    """One knob over several values, in their order. Raises UserError for no values, or several given as one."""
    if not isinstance(path, str):
        raise UserError(f"values({path!r}, ...): the path of a knob comes first: values('seed', 0, 1).")
    if not options:
        raise UserError(f"values({path!r}): there is no value to try.")
    return [{path: _plain(f"values({path!r}, ...)", option)} for option in options]


def seeds(n: int, first: int = 0) -> list[Overrides]:
    """The seeds first, first + 1, ..., n of them. Raises UserError if n < 1 or first < 0."""
    start = _whole("seeds: first", first, 0)
    return [{"seed": start + place} for place in range(_whole("seeds: n", n, 1))]


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Every combination of the trials of several sweeps; the first sweep varies slowest.

    Raises UserError if two sweeps give the same knob.
    """
    return [_union("product", parts) for parts in itertools.product(*_listed("product", sweeps))]


def zip_(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """Sweeps side by side: the first trials of all as one trial, then the second, and so on.

    Raises UserError if they have different lengths, or if two give the same knob.
    """
    lists = _listed("zipped", sweeps)
    lengths = [len(trials) for trials in lists]
    if len(set(lengths)) > 1:
        raise UserError(f"zipped: the sweeps have different lengths: {', '.join(map(str, lengths))}.")
    return [_union("zipped", parts) for parts in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """The trials of several sweeps, one sweep after another."""
    return [dict(trial) for trials in _listed("chain", sweeps) for trial in trials]


# Distributions: each turns a number u, uniform from 0 to 1 (exclusive), into a value. `at` never falls as u grows.


@dataclass(frozen=True)
class Uniform:
    """Every number from low to high, equally likely."""

    low: float
    high: float

    def at(self, u: float) -> float:
        """Return the u-quantile of the distribution."""
        span = self.high - self.low
        value = round(self.low + u * span, DIGITS - math.floor(math.log10(span)))
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class LogUniform:
    """Every number from low to high, its logarithm uniform: as many from 1e-4 to 1e-3 as from 1e-3 to 1e-2."""

    low: float
    high: float

    def at(self, u: float) -> float:
        """Return the u-quantile of the distribution."""
        exact = math.exp(_between(math.log(self.low), math.log(self.high), u))
        narrowness = min(1.0, (self.high - self.low) / self.low)
        value = float(f"{exact:.{DIGITS - math.floor(math.log10(narrowness))}g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Integers:
    """Every whole number from low to high, both included, equally likely."""

    low: int
    high: int

    def at(self, u: float) -> int:
        """Return the u-quantile of the distribution."""
        return min(self.low + math.floor(u * (self.high - self.low + 1)), self.high)


@dataclass(frozen=True)
class LogIntegers:
    """Every whole number from low to high, both included: log-uniform from low - 1/2 to high + 1/2, then rounded."""

    low: int
    high: int

    def at(self, u: float) -> int:
        """Return the u-quantile of the distribution."""
        exact = math.exp(_between(math.log(self.low - 0.5), math.log(self.high + 0.5), u))
        return min(max(math.floor(exact + 0.5), self.low), self.high)


@dataclass(frozen=True)
class Categorical:
    """One of the options, equally likely. A search takes them to be without order."""

    options: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """Return the u-quantile of the distribution over the options."""
        return self.options[min(math.floor(u * len(self.options)), len(self.options) - 1)]


Distribution = Uniform | LogUniform | Integers | LogIntegers | Categorical
Space = Mapping[str, Distribution]


def uniform(low: float, high: float) -> Uniform:
    """Numbers from low to high. Raises UserError unless low < high and both are finite."""
    _check_range("uniform", low, high, Real)
    return Uniform(float(low), float(high))


def log_uniform(low: float, high: float) -> LogUniform:
    """Numbers from low to high, uniform in their logarithm. Raises UserError unless 0 < low < high < infinity."""
    _check_range("log_uniform", low, high, Real, above=0)
    return LogUniform(float(low), float(high))


def integers(low: int, high: int) -> Integers:
    """Whole numbers from low to high, both included. Raises UserError unless both are whole and low < high."""
    _check_range("integers", low, high, Integral)
    return Integers(int(low), int(high))


def log_integers(low: int, high: int) -> LogIntegers:
    """Whole numbers from low to high, both included, uniform in their logarithm.

    Raises UserError unless both are whole and 0 < low < high.
    """
    _check_range("log_integers", low, high, Integral, above=0)
    return LogIntegers(int(low), int(high))


def choice(*options: Any) -> Categorical:
    """One of some values of any kind. Raises UserError for no values, or several given as one."""
    if not options:
        raise UserError("choice: there is no option to choose from.")
    return Categorical(tuple(_plain("choice(...)", option) for option in options))


def sample(n: int, space: Space, seed: int = 0) -> list[Overrides]:
    """N independent random points of a space: the same for the same seed, and the first k are those of n = k.

    A knob's values do not depend on which other knobs the space has. Raises UserError if n < 1 or seed < 0, or for a
    space that is empty or holds something else than distributions.
    """
    _check_space("sample", space)
    start = _whole("sample: seed", seed, 0)
    draws = {path: random.Random(f"{start} {path}") for path in space}
    return [
        {path: distribution.at(draws[path].random()) for path, distribution in space.items()}
        for _ in range(_whole("sample: n", n, 1))
    ]


def sobol(n: int, space: Space, seed: int = 0) -> list[Overrides]:
    """N points of a scrambled Sobol sequence, which fill a space more evenly than random ones (Owen, 1998).

    The same for the same seed, and the first k are those of n = k; a power of two is spread best. Raises UserError
    as `sample` does.
    """
    # Takes longer to import than all the rest of a listed sweep.
    from scipy.stats.qmc import Sobol

    _check_space("sobol", space)
    # The whole power of two: what scipy asks for, and the same points whatever n.
    exponent = (_whole("sobol: n", n, 1) - 1).bit_length()
    points = Sobol(len(space), rng=_whole("sobol: seed", seed, 0)).random_base2(exponent)[:n].tolist()
    return [
        {path: distribution.at(u) for (path, distribution), u in zip(space.items(), point, strict=True)}
        for point in points
    ]


# Searches: trials that depend on the results of earlier ones.


@dataclass(frozen=True)
class SuccessiveHalving:
    """Trials that start together; at each rung (a step), the best fraction `keep` of the rest continues.

    Jamieson and Talwalkar, arXiv 1502.07943.
    """

    trials: tuple[Overrides, ...]
    rungs: tuple[int, ...]
    keep: float


@dataclass(frozen=True)
class TPE:
    """Points of a space, proposed in batches by a tree-structured Parzen estimator.

    Each of the `n_trials` points is one trial, or one for each of `seeds`, over which its result is the mean.
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
    def middle(self) -> Overrides:
        """The point in the middle of every distribution."""
        return {path: distribution.at(0.5) for path, distribution in self.space}


Search = SuccessiveHalving | TPE


def successive_halving(trials: Iterable[Overrides], rungs: Sequence[int], keep: float = 1 / 3) -> SuccessiveHalving:
    """Run the trials to the first rung, the best `keep` (a share) of them on to the second, and so on.

    `rungs` are steps of a run. Raises UserError for no trials, rungs that do not rise, or a share outside (0, 1).
    """
    (listed,) = _listed("successive_halving", [trials])
    if not listed:
        raise UserError("successive_halving: there are no trials.")
    steps = tuple(_whole("successive_halving: a rung", rung, 1) for rung in rungs)
    if not steps or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise UserError(f"successive_halving: rungs are steps that rise, such as (100, 300, 900), not {steps}.")
    if not isinstance(keep, Real) or not 0 < keep < 1:
        raise UserError(f"successive_halving: keep is a share between 0 and 1, such as 1/3, not {keep!r}.")
    return SuccessiveHalving(tuple(dict(trial) for trial in listed), steps, float(keep))


def tree_parzen(n_trials: int, space: Space, batch: int = 8, seed: int = 0, seeds: Sequence[int] = ()) -> TPE:
    """Search a space by n_trials points, `batch` at a time; `seed` makes the search itself repeatable.

    With `seeds`, each point is tried with all of them; without, with the config's own. Raises UserError if n_trials
    or batch < 1, for a bad space as `sample` does, and for seeds given twice or also in the space.
    """
    _check_space("tree_parzen", space)
    listed = tuple(_whole("tree_parzen: a seed", value, 0) for value in seeds)
    if len(set(listed)) < len(listed):
        raise UserError(f"tree_parzen: a seed is given twice in seeds={listed}.")
    if listed and "seed" in space:
        raise UserError("tree_parzen: the knob 'seed' is given both in the space and by seeds.")
    return TPE(
        _whole("tree_parzen: n_trials", n_trials, 1),
        tuple(space.items()),
        _whole("tree_parzen: batch", batch, 1),
        _whole("tree_parzen: seed", seed, 0),
        listed,
    )


def _listed(caller: str, sweeps: Sequence[Iterable[Overrides]]) -> list[list[Overrides]]:
    """The trials of each sweep, whose iterators are consumed once."""
    lists = [list(sweep) if isinstance(sweep, Iterable) else [] for sweep in sweeps]
    for place, (sweep, trials) in enumerate(zip(sweeps, lists, strict=True), 1):
        if not isinstance(sweep, Iterable) or not all(isinstance(trial, Mapping) for trial in trials):
            raise UserError(
                f"{caller}: argument {place} is not a sweep, which is a sequence of overrides such as "
                "[{'optimizer.learning_rate': 1e-3}] or what values, product and the like give."
            )
    return lists


def _union(caller: str, parts: Sequence[Overrides]) -> Overrides:
    union: Overrides = {}
    for part in parts:
        for path, value in part.items():
            if path in union:
                raise UserError(f"{caller}: the knob {path!r} is given by two of the sweeps.")
            union[path] = value
    return union


def _plain(caller: str, option: Any) -> Any:
    """An option as a value for JSON: a scalar of NumPy becomes Python's."""
    if isinstance(option, Iterable) and not isinstance(option, str | tuple | list | Mapping):
        raise UserError(f"{caller}: one of the values is a {type(option).__name__}; a * before it gives its items.")
    return option.item() if hasattr(option, "item") else option


def _between(low: float, high: float, u: float) -> float:
    return low + u * (high - low)


def _whole(what: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{what} is a whole number from {least} up, not {value!r}.")
    return int(value)


def _check_range(caller: str, low: Any, high: Any, kind: type, above: float = -math.inf) -> None:
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, kind):
            raise UserError(f"{caller}: {name} is a {'whole ' * (kind is Integral)}number, not {bound!r}.")
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{caller}: low={low!r} and high={high!r} are not a range; low is below high, both finite.")
    if low <= above:
        raise UserError(f"{caller}: low={low!r} has no logarithm; it must be above 0.")


def _check_space(caller: str, space: Space) -> None:
    if not isinstance(space, Mapping) or not space:
        raise UserError(f"{caller}: a space gives each knob a distribution: {{'optimizer.b2': uniform(0.9, 0.999)}}.")
    for path, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise UserError(
                f"{caller}: {path} is {distribution!r}, not a distribution such as uniform(0, 1) or choice(1, 2)."
            )
