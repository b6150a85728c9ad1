"""Speed goals on two cores, and whether the measurements reach them.

python experiments/benchmarks/run.py training decoding startup --text=tinyshakespeare.txt

Ratios are computed in each round of a race, and their median is reported. "The best" of a framework is its contender
with the smallest median time in that race.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.accelerator_report import percent, spread, times
from experiments.benchmarks.performance.turns import times_as_fast

Row = dict[str, Any]
OURS, TORCH, TRANSFORMERS, LLAMA_CPP = "rustgpt_jax", "torch", "transformers", "llama.cpp"
TRAINING_GOALS = {"float32": {"shk": 1.5, "mid": 1.0, "124M": 1.15}, "bfloat16": {"mid": 0.8, "124M": 0.8}}
# Decoding at batch 1 compared with llama.cpp, by dtype and kernel ("": the best).
DECODING_GOALS = {
    ("float32", "plain"): 0.65,
    ("float32", "native"): 0.95,
    ("bfloat16", "native"): 0.8,
    ("int8", ""): 0.8,
}
BATCHED = {"float32": 1.5, "bfloat16": 1.5}


class Ratio(NamedTuple):
    """A speed ratio, its spread over rounds, and the contenders compared."""

    median: float
    spread: float
    ours: str
    theirs: str


class Goal(NamedTuple):
    """A bound to reach, and the measured value; None if it was not measured."""

    what: str
    at_least: bool
    wanted: float
    measured: float | None
    spread: float | None
    shown: Callable[[float | None], str]
    who: str = ""

    @property
    def verdict(self) -> str:
        """'reached', 'missed' or 'not measured'."""
        if self.measured is None:
            return "not measured"
        reached = self.measured >= self.wanted if self.at_least else self.measured <= self.wanted
        return "reached" if reached else "missed"


def best(race: Row, beginning: str, what: str) -> str | None:
    """Return the fastest contender whose name has a prefix."""
    medians = {name: np.median(column[what]) for name, column in race["readings"].items() if name.startswith(beginning)}
    return min(medians, key=lambda name: medians[name], default=None)


def ratio(race: Row | None, ours: str, theirs: str, what: str) -> Ratio | None:
    """Return the speed of our best relative to their best; None if one of them was not measured."""
    if race is None:
        return None
    first, second = best(race, ours, what), best(race, theirs, what)
    if first is None or second is None:
        return None
    summary = times_as_fast(race["readings"][first][what], race["readings"][second][what])
    return Ratio(summary.median, summary.spread, first, second)


def goals(results: Row) -> list[Goal]:
    """Return all goals, whether measured or not."""
    training, decoding, startup = (results.get(name, {}) for name in ("training", "decoding", "startup"))
    return [*_training(training), *_decoding(decoding), *_steadiness(decoding), *_startup(startup)]


def _of(what: str, wanted: float, found: Ratio | None) -> Goal:
    if found is None:
        return Goal(what, True, wanted, None, None, times)
    return Goal(what, True, wanted, found.median, found.spread, times, f"{found.ours} / {found.theirs}")


def _training(training: Row) -> list[Goal]:
    races, found = training.get("races", {}), list[Goal]()
    for against, wanted_of in TRAINING_GOALS.items():
        for shape, wanted in wanted_of.items():
            compared = ratio(races.get(f"{shape}, {against}"), OURS, TORCH, "seconds")
            found.append(_of(f"training step, {shape}, against torch {against}", wanted, compared))
    whole = training.get("whole", {}).get("readings", {})
    measured, width = None, None
    if whole.keys() >= {"whole", "bare"}:
        added = times_as_fast(whole["bare"], whole["whole"])
        measured, width = added.median - 1, added.spread
    return [*found, Goal("what a run adds to its bare steps", False, 0.05, measured, width, percent)]


def _decoding(decoding: Row) -> list[Goal]:
    races, found = decoding.get("races", {}), list[Goal]()
    for (dtype, kernel), wanted in DECODING_GOALS.items():
        ours = f"{OURS}, {kernel}" if kernel else OURS
        compared = ratio(races.get(f"{dtype}, batch 1"), ours, LLAMA_CPP, "token")
        what = f"decoding, batch 1, {dtype}{f', {kernel}' if kernel else ''}, against llama.cpp"
        found.append(_of(what, wanted, compared))
    for dtype, wanted in BATCHED.items():
        compared = ratio(races.get(f"{dtype}, batch 8"), OURS, TRANSFORMERS, "token")
        found.append(_of(f"decoding, batch 8, {dtype}, against transformers", wanted, compared))
    return found


def _steadiness(decoding: Row) -> list[Goal]:
    """Return the goals of the variation of decoding steps, each with its worst value over all variants."""
    rows = {
        name: {what: values[0] for what, values in column.items()}
        for race in decoding.get("steadiness", {}).values()
        for name, column in race["readings"].items()
    }

    def worst(what: str, wanted: float, of: Callable[[Mapping[str, float]], float], shown: Any) -> Goal:
        values = {name: of(row) for name, row in rows.items()}
        name = max(values, key=lambda name: values[name], default=None)
        return Goal(what, False, wanted, None if name is None else values[name], None, shown, name or "")

    return [
        worst("decoding steps, p99 over p50", 1.5, lambda row: row["p99"] / row["p50"], times),
        worst("decoding steps, programs compiled after warm-up", 0, lambda row: row["compiled"], whole),
        worst("decoding steps, growth of memory", 1e6, lambda row: row["grown"], megabytes),
    ]


def _startup(startup: Row) -> list[Goal]:
    jobs, starts = startup.get("jobs", [])[1:], startup.get("starts", [])[1:]
    bare = startup.get("job's bare steps", {}).get("readings", {}).get("job", {}).get("seconds", [])
    compute = [each * startup["updates"] for each in bare]

    def median(what: str, wanted: float, values: list[float]) -> Goal:
        width = spread(values) if values else None
        return Goal(what, False, wanted, float(np.median(values)) if values else None, width, seconds)

    return [
        median("RustGPT's job (20 s there), compute", 8.0, compute),
        median("RustGPT's job, all included, warm cache", 12.0, [row["all"] for row in jobs]),
        median("second start of train on shk until the first step", 2.0, [row["first step"] for row in starts]),
    ]


def seconds(value: float | None) -> str:
    """Format seconds, as in 1.23 s."""
    return "-" if value is None else f"{value:.3g} s"


def whole(value: float | None) -> str:
    """Format a count, as in 3."""
    return "-" if value is None else f"{value:.0f}"


def megabytes(value: float | None) -> str:
    """Format bytes, as in 1.2 MB."""
    return "-" if value is None else f"{value / 1e6:.1f} MB"
