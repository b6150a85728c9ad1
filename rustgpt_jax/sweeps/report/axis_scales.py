"""Where the values of a knob stand on an axis: numbers by size or by ratio, all else side by side."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from rustgpt_jax.sweeps.report.labels import value_text
from rustgpt_jax.sweeps.report.results import is_number, key_of

# More values than this get round ticks instead of one each.
MOST_OWN_TICKS = 9
# Positive values that span a smaller factor stand by their size.
LEAST_FACTOR = 3.0

# Points are spread over this share of the way to the next value, and of the whole axis, where there are at least so
# many for each value.
POINT_SPREAD, MARGIN_SPREAD, POINTS_UNSPREAD = 0.45, 0.1, 8
GOLDEN = 0.6180339887498949

Tick = tuple[float, str]


@dataclass(frozen=True)
class Scale:
    """The distinct values of a knob in their order, and whether they are numbers, and spaced by ratio."""

    values: tuple[Any, ...]
    is_numeric: bool
    is_log: bool

    def place(self, value: Any) -> float:
        """The coordinate of a value. On a scale of ratios, 0 stands one step before the smallest positive value."""
        if not self.is_numeric:
            return float(self.index(value))
        if not self.is_log:
            return float(value)
        return math.log10(value) if value > 0 else self._place_of_zero

    def index(self, value: Any) -> int:
        """Return the number of values that precede this one."""
        return self._indices[key_of(value)]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {key_of(value): index for index, value in enumerate(self.values)}

    @cached_property
    def _place_of_zero(self) -> float:
        positive = [value for value in self.values if value > 0]
        step = math.log10(positive[-1] / positive[0]) / max(len(positive) - 1, 1)
        return math.log10(positive[0]) - min(step, 1.0)

    @cached_property
    def low(self) -> float:
        """The first coordinate."""
        return self.place(self.values[0])

    @cached_property
    def high(self) -> float:
        """The last coordinate."""
        return self.place(self.values[-1])

    def spread(self, n: int) -> list[float]:
        """How far aside to put each of n points so that those with one value do not hide each other, where many do."""
        places = sorted(self.place(value) for value in self.values)
        if n < POINTS_UNSPREAD * len(places):
            return [0.0] * n
        nearest = min((second - first for first, second in pairwise(places)), default=1.0)
        room = min(POINT_SPREAD * nearest, MARGIN_SPREAD * (self.high - self.low) or 1.0)
        # Multiples of the golden ratio fill an interval evenly, however many they are.
        return [room * (index * GOLDEN % 1 - 0.5) for index in range(n)]

    def ticks(self, least_gap: float) -> list[Tick]:
        """Coordinates and texts, at the values themselves if they are few, none nearer than a share of the axis."""
        if not self.is_numeric or len(self.values) <= MOST_OWN_TICKS:
            wanted = [(self.place(value), value_text(value)) for value in self.values]
        else:
            wanted = self._round_ticks()
        kept: list[Tick] = []
        for place, text in wanted:
            if not kept or place - kept[-1][0] >= least_gap * (self.high - self.low):
                kept.append((place, text))
        return kept

    def _round_ticks(self) -> list[Tick]:
        from matplotlib.ticker import MaxNLocator

        if not self.is_log:
            places = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
            return [(place, value_text(float(place))) for place in places if self._covers(place)]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        heads = (1,) if self.high - self.low > 2 else (1, 3)
        values = [head * 10.0**decade for decade in decades for head in heads]
        zero = [(self.low, "0")] if self.values[0] == 0 else []
        return zero + [(math.log10(value), value_text(value)) for value in values if self._covers(math.log10(value))]

    def _covers(self, place: float) -> bool:
        """Whether a tick lies between the ends, or so near to one that the axis still has room for it."""
        room = 0.04 * (self.high - self.low)
        return self.low - room <= place <= self.high + room


def scale_of(values: Iterable[Any]) -> Scale:
    """The scale that fits some values of a knob, in which there may be repetitions."""
    distinct = {key_of(value): value for value in values}.values()
    numeric = all(is_number(value) for value in distinct)
    own = tuple(sorted(distinct)) if numeric else tuple(distinct)
    return Scale(own, numeric, numeric and _is_spaced_by_ratio(own))


def _is_spaced_by_ratio(values: tuple[float, ...]) -> bool:
    """Whether the middle of the positive values is nearer to their geometric mean than to their arithmetic mean."""
    positive = [value for value in values if value > 0]
    if values[0] < 0 or len(positive) < 2 or positive[-1] / positive[0] < LEAST_FACTOR:
        return False
    logarithms = list(map(math.log, positive))
    arithmetic = math.log(fmean(positive))
    return abs(median(logarithms) - fmean(logarithms)) < abs(median(logarithms) - arithmetic)
