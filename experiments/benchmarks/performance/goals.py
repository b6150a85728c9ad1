"""Speed goals on two cores, the same for every processor, and whether the measurements reach them.

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
TRAINING_GOALS = {
    "float32": {"shk": 1.6, "mid": 1.5, "124M": 1.5},
    "bfloat16": {"shk": 1.6, "mid": 1.2, "124M": 1.15},
}
# Seconds per token, by peer, dtype of weights, our kernel ("": the best) and batch size.
DECODING_GOALS = {
    (LLAMA_CPP, "float32", "plain", 1): 0.75,
    (LLAMA_CPP, "float32", "native", 1): 0.95,
    (LLAMA_CPP, "bfloat16", "native", 1): 1.0,
    (LLAMA_CPP, "int8", "", 1): 1.2,
    (TRANSFORMERS, "float32", "plain", 1): 1.3,
    (TRANSFORMERS, "float32", "native", 1): 2.0,
    (TRANSFORMERS, "bfloat16", "native", 1): 2.3,
    (TRANSFORMERS, "float32", "", 8): 2.0,
    (TRANSFORMERS, "bfloat16", "", 8): 2.0,
}
# Seconds of a prompt of one row, by dtype of weights.
PROMPT_GOALS = {"float32": 1.2, "bfloat16": 1.2}
# Time to run RustGPT's job, as a fraction of what RustGPT itself takes.
JOB_GOALS = {"compute": 0.4, "all": 0.6}
# Seconds of `train` on shk for 40 steps, by what is timed and whether the compilation cache is full.
START_GOALS = {("first step", True): 1.0, ("all", True): 2.8, ("all", False): 5.8}


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


def goals(measured: Row) -> list[Goal]:
    """Return all goals, given the measurements on one processor, whether measured or not."""
    training, decoding, startup = (measured.get(name, {}) for name in ("training", "decoding", "startup"))
    sweeps = measured.get("sweeps", {})
    return [
        *_training(training),
        *_decoding(decoding),
        *_steadiness(decoding),
        *_job(startup),
        *_starts(startup),
        *_sweeps(sweeps),
    ]


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
    for (peer, dtype, kernel, batch), wanted in DECODING_GOALS.items():
        ours = f"{OURS}, {kernel}" if kernel else OURS
        what = f"decoding, batch {batch}, {dtype}{f', {kernel}' if kernel else ''}, against {peer}"
        found.append(_of(what, wanted, ratio(races.get(f"{dtype}, batch {batch}"), ours, peer, "token")))
    for dtype, wanted in PROMPT_GOALS.items():
        compared = ratio(races.get(f"{dtype}, batch 1"), OURS, TRANSFORMERS, "prompt")
        found.append(_of(f"prompt of 128 tokens, batch 1, {dtype}, against {TRANSFORMERS}", wanted, compared))
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


def _job(startup: Row) -> list[Goal]:
    """Return the goals of RustGPT's job, whose program takes turns with our whole command, but not with our steps."""
    theirs, bare = startup.get("rustgpt", []), startup.get("job's bare steps", {}).get("readings", {}).get("job", {})
    ours = {
        "compute": [each * startup["updates"] for each in bare.get("seconds", [])],
        "all": [row["all"] for row in startup.get("jobs", [])[1:]],
    }
    whats = {"compute": "RustGPT's job, compute alone", "all": "RustGPT's job, all included, warm cache"}

    def goal(what: str, values: list[float]) -> Goal:
        shares = [value / float(np.median(theirs)) for value in values] if theirs else []
        measured, width = (float(np.median(shares)), spread(shares)) if shares else (None, None)
        return Goal(f"{whats[what]}, of its program's time", False, JOB_GOALS[what], measured, width, times)

    return [goal(what, values) for what, values in ours.items()]


def _starts(startup: Row) -> list[Goal]:
    def goal(what: str, is_warm: bool, wanted: float) -> Goal:
        rows = startup.get("starts", [])
        values = [row[what] for row in (rows[1:] if is_warm else rows[:1])]
        name = "until the first step" if what == "first step" else "40 steps"
        title = f"train on shk, {name}, {'warm' if is_warm else 'cold'} cache"
        measured, width = (float(np.median(values)), spread(values)) if values else (None, None)
        return Goal(title, False, wanted, measured, width, seconds)

    return [goal(what, is_warm, wanted) for (what, is_warm), wanted in START_GOALS.items()]


def _sweeps(sweeps: Row) -> list[Goal]:
    row = sweeps.get("models", {}).get("tiny")
    more = fewer = None
    if row:
        more = min(row["more"].values()) / row["bare"]
        cold = [(label, value) for label, value in row["rows"] if "cold" in label]
        processes = next(value for label, value in cold if label.startswith("16 train processes"))
        fewer = processes / min(value for label, value in cold if label.startswith("one sweep"))
    return [
        Goal("one more trial of a sweep of tiny, in bare steps", False, 1.0, more, None, times),
        Goal("16 cold trials of tiny in one sweep, against as many processes", True, 9.0, fewer, None, times),
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
