"""Which step of a run went wrong, to judge by its record: not finite, or else its loss too high, or else a spike."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.transformer import vocabulary
from rustgpt_jax.reproduce.again import is_fault
from rustgpt_jax.reproduce.past import Past, Rewind

LOSS, NORM, SPIKES = "train/loss", "train/gradient_norm", "train/spikes"
FAULTS = {LOSS: "loss", NORM: "gradient"}
# A loss so many times that of a model that knows nothing is a run that has left its way.
LOST_FACTOR = 1.5
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


class TooHigh(NamedTuple):
    """Above which loss, and from step `since` on, a loss is too high, and what that loss is in words."""

    above: float
    meaning: str
    since: int = 1


def lost_above(past: Past) -> TooHigh:
    """The loss above which a run is lost, to judge by its vocabulary and its first recorded loss."""
    n_tokens = vocabulary(past.material.whole.model)
    first = next((line[LOSS] for line in past.records()[:1] if math.isfinite(line[LOSS])), 0.0)
    if first > math.log(n_tokens):
        return TooHigh(LOST_FACTOR * first, f"{LOST_FACTOR:g} times the first loss")
    meaning = f"{LOST_FACTOR:g} times ln {n_tokens}, the loss of guessing among {n_tokens} tokens"
    return TooHigh(LOST_FACTOR * math.log(n_tokens), meaning)


def suspect(past: Past, step: int | None) -> Suspect:
    """The step to look at: the one that is given, the first fault, the first loss too high, or a spike.

    Where a run went back from faults, its last one. Of spikes, the last that was counted, or else the largest.
    Raises UserError if there is no record, or nothing in it stands out.
    """
    lines = past.records()
    if step is not None:
        past.check(step)
        undone = next((rewind for rewind in past.rewinds[::-1] if rewind.step == step), None)
        if undone is not None:
            return _undone(undone)
        line = next((line for line in lines[::-1] if line["step"] == step), None)
        return Suspect(step, "you asked for it", line is not None and is_fault(line))
    faults = [line for line in lines if is_fault(line)]
    if faults:
        what = next((what for name, what in FAULTS.items() if not math.isfinite(faults[0].get(name, 0.0))), "update")
        others = f", the first of {len(faults)} such steps" if len(faults) > 1 else ""
        return Suspect(faults[0]["step"], f"its {what} is not finite{others}", True)
    if past.rewinds:
        return _undone(past.rewinds[-1])
    if not lines:
        raise UserError(
            f"{past.folder.path} has no record of its training (metrics.jsonl), so which step went wrong is not known. "
            "Give --step=K to look at a step."
        )
    rule = lost_above(past)
    lost = next((index for index, line in enumerate(lines) if line[LOSS] > rule.above), None)
    if lost is not None:
        before = lines[lost - 1]["step"] if lost else 0
        found = _first_above(past, before, lines[lost]["step"], rule.above)
        return Suspect(found, f"its loss is the first above {rule.above:.3g}, {rule.meaning}", False)
    counted = _last_counted(lines)
    if counted is not None:
        return _within(past, *counted)
    largest = spike(lines)
    if largest is None:
        raise UserError(
            f"{past.folder.path}: every recorded loss and gradient is finite, and no loss stands out. "
            "Give --step=K to look at a step."
        )
    return Suspect(largest, "its loss is the largest spike of the record", False)


def _undone(rewind: Rewind) -> Suspect:
    why = f"its loss, gradient or update was not finite, and the run went back from it to step {rewind.to}"
    return Suspect(rewind.step, why, True, rewind)


def _first_above(past: Past, before: int, after: int, ceiling: float) -> int:
    """The first step after `before` and up to `after` whose loss is above a ceiling: they are made again."""
    if after - before == 1:
        return after
    _, every = past.train(past.state_at(before), after - before)
    steps = range(before + 1, after + 1)
    return next((step for step, metrics in zip(steps, every, strict=True) if metrics.loss > ceiling), after)


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
