"""Interleaved timing, which compares contenders fairly on a machine whose speed varies.

python experiments/benchmarks/run.py

The contenders take turns, in a different order in each round, so that slow periods affect all of them alike. A time is
the median over rounds, with the interquartile range as a fraction of it; a ratio is computed in each round and
summarized in the same way, so that the slowdown of a whole round cancels out.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from experiments.benchmarks.accelerator_report import spread
from experiments.benchmarks.best_batch import Failure

# The measurements of a turn by name, mostly seconds.
Reading = dict[str, float]
# The seconds between turns, during which the threads of the previous contender become idle.
PAUSE = 0.05


class Summary(NamedTuple):
    """A median, and the interquartile range as a fraction of it."""

    median: float
    spread: float


def take_turns(
    contenders: Mapping[str, Callable[[], Reading]], rounds: int, warm_up: int = 1, pause: float = PAUSE
) -> tuple[dict[str, list[Reading]], dict[str, str]]:
    """Return the readings of each contender, one per round, and the reasons for missing ones.

    Warm-up rounds are not counted. A contender that raises Failure is removed with all its readings.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in contenders}
    failures: dict[str, str] = {}
    for turn in range(warm_up + rounds):
        for name in rotate(list(readings), turn):
            try:
                reading = contenders[name]()
            except Failure as failure:
                failures[name] = str(failure)
                del readings[name]
            else:
                readings[name] += [reading] if turn >= warm_up else []
            time.sleep(pause)
    return readings, failures


def rotate(names: list[str], turn: int) -> list[str]:
    """Rotate the names by an offset that depends on the turn."""
    first = turn % max(1, len(names))
    return names[first:] + names[:first]


def summarize(values: list[float]) -> Summary:
    """Summarize repeated measurements."""
    return Summary(float(np.median(values)), spread(values))


def times_as_fast(ours: list[float], theirs: list[float]) -> Summary:
    """Return our speed relative to theirs, from the seconds in the same rounds."""
    return summarize([their / our for our, their in zip(ours, theirs, strict=True)])
