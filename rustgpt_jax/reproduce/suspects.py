"""Which step of a run went wrong, to judge by its record: a loss or gradient that is not finite, or else a spike."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce.again import is_fault
from rustgpt_jax.reproduce.past import Past, Rewind

LOSS, NORM, SPIKES = "train/loss", "train/gradient_norm", "train/spikes"
FAULTS = {LOSS: "loss", NORM: "gradient"}
# A recorded loss stands out that is further above so many before it than these are apart.
LOSSES_BEFORE = 20


class Suspect(NamedTuple):
    """A step, what is wrong with it in words, and whether that is something that is not finite.

    rewind: how the run went back from it.
    """

    step: int
    why: str
    is_fault: bool
    rewind: Rewind | None = None


def suspect(past: Past, step: int | None) -> Suspect:
    """The step to look at: the one that is given, the last fault of the record, or its last or largest spike.

    Raises UserError if nothing in the record stands out.
    """
    lines = past.records()
    if step is not None:
        past.check(step)
        undone = next((rewind for rewind in past.rewinds[::-1] if rewind.step == step), None)
        if undone is not None:
            return _undone(undone)
        line = next((line for line in lines[::-1] if line["step"] == step), None)
        return Suspect(step, "you asked for it", line is not None and is_fault(line))
    fault = next((line for line in lines[::-1] if is_fault(line)), None)
    if fault is not None:
        what = next((what for name, what in FAULTS.items() if not math.isfinite(fault.get(name, 0.0))), "update")
        return Suspect(fault["step"], f"its {what} is not finite", True)
    if past.rewinds:
        return _undone(past.rewinds[-1])
    counted = _last_counted(lines)
    if counted is not None:
        return _within(past, *counted)
    found = spike(lines)
    if found is None:
        raise UserError(
            f"{past.folder.path}: every recorded loss and gradient is finite, and no loss stands out. "
            "Give --step=K to look at a step."
        )
    return Suspect(found, "its loss is the largest spike of the record", False)


def _undone(rewind: Rewind) -> Suspect:
    why = f"its loss, gradient or update was not finite, and the run went back from it to step {rewind.to}"
    return Suspect(rewind.step, why, True, rewind)


def _last_counted(lines: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    """Between which two recorded steps the count of spikes rose last."""
    for before, after in zip(lines[-2::-1], lines[:0:-1], strict=True):
        if after.get(SPIKES, 0) > before.get(SPIKES, 0):
            return before["step"], after["step"]
    return None


def _within(past: Past, before: int, after: int) -> Suspect:
    """The step after `before` and up to `after` in which the count of spikes rose last: they are made again."""
    state = past.state_at(before)
    count = int(state.health.spikes)
    _, every = past.train(state, after - before)
    counts = [count, *(int(metrics.spikes) for metrics in every)]
    rises = [index for index in range(len(every)) if counts[index + 1] > counts[index]]
    index = rises[-1] if rises else max(range(len(every)), key=lambda index: float(every[index].loss))
    return Suspect(before + index + 1, "its loss is a spike", False)


def spike(lines: Sequence[dict[str, Any]]) -> int | None:
    """The recorded step whose loss stands out most from those before it, None if none does."""
    losses = [line[LOSS] for line in lines]
    scores = {
        lines[index]["step"]: _ranges_above(losses[index], losses[index - LOSSES_BEFORE : index])
        for index in range(LOSSES_BEFORE, len(lines))
    }
    worst = max(scores, key=scores.__getitem__, default=None)
    return worst if worst is not None and scores[worst] > 1 else None


def _ranges_above(loss: float, before: Sequence[float]) -> float:
    """How far a loss is above the highest of those before it, as a multiple of their range."""
    width = max(before) - min(before)
    return (loss - max(before)) / width if width > 0 else 0.0
