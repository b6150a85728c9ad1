"""Measure how often a sweep's report claims a difference between settings when there is none.

python -m tests.false_claims [--sweeps=2000]

Simulated sweeps go through the report's own `compare_with_best`. A sweep counts as a false claim if any setting that is
not worse than the best one is said to be, and as a missed difference if any true difference from the best setting lies
outside its interval. docs/concepts/statistics.md has the figures of one run of this command.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np

from rustgpt_jax.sweeps.report.stats import FALSE_CLAIMS, compare_with_best

Draw = Callable[[np.random.Generator, int, int], np.ndarray]
SETTINGS, SEEDS = (2, 3, 5, 10, 20), (3, 5, 10)


def normal(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Independent losses of equal variance, plus an effect of the seed common to all settings."""
    return rng.normal(size=(settings, seeds)) + rng.normal(size=seeds)


def unequal_variances(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Standard deviations that differ by a factor of up to 30 between settings."""
    return normal(rng, settings, seeds) * np.geomspace(1, 30, settings)[:, None]


def correlated(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Settings that are random mixtures of a few factors."""
    mixture = rng.normal(size=(settings, max(settings // 2, 2)))
    return mixture @ rng.normal(size=(mixture.shape[1], seeds)) + 0.1 * rng.normal(size=(settings, seeds))


def heavy_tails(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Losses with outliers: Student's t with 3 degrees of freedom."""
    return rng.standard_t(3, size=(settings, seeds))


def skewed(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Losses with a long tail upwards: the exponential distribution."""
    return rng.exponential(size=(settings, seeds))


def missing_seeds(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """The last third of the settings without their last seed, as after failures."""
    losses = normal(rng, settings, seeds)
    losses[settings - settings // 3 :, -1] = math.nan
    return losses


def some_worse(rng: np.random.Generator, settings: int, seeds: int) -> np.ndarray:
    """Half of the settings worse by one standard deviation, the others alike."""
    return normal(rng, settings, seeds)


def truth_of(draw: Draw, settings: int) -> np.ndarray:
    """Return the true mean of each setting, up to a constant."""
    return np.where(np.arange(settings) < (settings + 1) // 2, 0.0, 1.0) if draw is some_worse else np.zeros(settings)


DRAWS: tuple[Draw, ...] = (normal, unequal_variances, correlated, heavy_tails, skewed, missing_seeds, some_worse)


def error_rates(draw: Draw, settings: int, seeds: int, sweeps: int, seed: int = 0) -> tuple[float, float]:
    """Return the fractions of sweeps with a false claim, and with an interval that misses the true difference."""
    rng, truth = np.random.default_rng([seed, settings, seeds]), truth_of(draw, settings)
    false_claims = missed = 0
    for _ in range(sweeps):
        losses = draw(rng, settings, seeds) + truth[:, None]
        order = np.argsort(np.nanmean(losses, axis=1))
        found = compare_with_best([dict(enumerate(row)) for row in losses[order].tolist()])
        above = truth[order[1:]] - truth[order[0]]
        pairs = [(comparison, true) for comparison, true in zip(found, above, strict=True) if comparison]
        false_claims += any(made.p_value < FALSE_CLAIMS and made.difference > 0 >= true for made, true in pairs)
        missed += any(not made.low <= true <= made.high for made, true in pairs)
    return false_claims / sweeps, missed / sweeps


def main() -> None:
    """Print a table for each way to draw losses: the rate of false claims, and of missed differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweeps", type=int, default=2000)
    sweeps = parser.parse_args().sweeps
    print(f"False claims (and intervals that miss a difference) in % of {sweeps} sweeps, nominal {FALSE_CLAIMS:.0%}.")
    for draw in DRAWS:
        print(f"\n{draw.__name__}: {draw.__doc__}\nsettings  " + "".join(f"{n:>8} seeds" for n in SEEDS))
        for settings in SETTINGS:
            rates = [error_rates(draw, settings, n, sweeps) for n in SEEDS]
            cells = "".join(f"{100 * claims:7.1f} ({100 * missed:4.1f})" for claims, missed in rates)
            print(f"{settings:8}  {cells}", flush=True)


if __name__ == "__main__":
    main()
