"""Which of several contenders is faster, where a machine has better and worse seconds?

python experiments/benchmarks/run.py

They take turns, in another order each round, so that all have the same share of the bad seconds. A time is told as the
median of the rounds, with the width of their middle half as a share of it; a ratio is made in each round, and told
likewise: what slows a whole round down is not in it.

FINDING: none of its own; see `run.py`.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.accelerator_report import spread
from experiments.benchmarks.best_batch import Failure, tree_of

# What a turn has measured, by name; seconds mostly.
Reading = dict[str, float]
# Seconds in which the threads of the one before come to rest.
PAUSE = 0.05


class Told(NamedTuple):
    """A median, and the width of the middle half as a share of it."""

    median: float
    spread: float


def get_config() -> ConfigDict:
    """The smallest of the models."""
    return tree_of("124m")


def take_turns(
    contenders: Mapping[str, Callable[[], Reading]], rounds: int, warm_up: int = 1, pause: float = PAUSE
) -> tuple[dict[str, list[Reading]], dict[str, str]]:
    """The readings of each contender, one a round, and why some have none.

    Rounds of warming up are not counted. A contender that raises Failure is out, with all its readings.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in contenders}
    failures: dict[str, str] = {}
    for turn in range(warm_up + rounds):
        for name in rotated(list(readings), turn):
            try:
                reading = contenders[name]()
            except Failure as failure:
                failures[name] = str(failure)
                del readings[name]
            else:
                readings[name] += [reading] if turn >= warm_up else []
            time.sleep(pause)
    return readings, failures


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in their order, from another one in each turn."""
    first = turn % max(1, len(names))
    return names[first:] + names[:first]


def told(values: list[float]) -> Told:
    """Some measurements of the same thing."""
    return Told(float(np.median(values)), spread(values))


def times_as_fast(ours: list[float], theirs: list[float]) -> Told:
    """How many times as fast as they we are, by the seconds of the same rounds."""
    return told([their / our for our, their in zip(ours, theirs, strict=True)])
