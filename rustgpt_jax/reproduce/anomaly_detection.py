"""Find the step at which a run went wrong from its record: a non-finite value, a diverged loss, or a loss spike."""

import math
from typing import NamedTuple

import numpy as np

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.transformer import vocab_size
from rustgpt_jax.reproduce.recorded_run import History, RecordedRun, Rewind

LOSS, NORM = "train/loss", "train/gradient_norm"
# A loss so many times that of a model that knows nothing is a run that has left its way.
LOST_FACTOR = 1.5
# A recorded loss stands out that is further above so many before it than these are apart.
LOSSES_BEFORE = 20
BLOCK_LINES = 2**15


class Anomaly(NamedTuple):
    """A step at which a run went wrong, a description, and whether a value is not finite.

    rewind: how the run went back from it.
    """

    step: int
    why: str
    is_fault: bool
    rewind: Rewind | None = None


class DivergenceThreshold(NamedTuple):
    """The loss above which a run counts as diverged from step `since` on, and a description of it."""

    above: float
    meaning: str
    since: int = 1


def compute_divergence_threshold(past: RecordedRun, history: History) -> DivergenceThreshold:
    """Return the loss above which a run has diverged, from its vocabulary size and its first recorded loss."""
    n_tokens = vocab_size(past.inputs.full_config.model)
    first = next((float(loss) for loss in history.loss[:1] if math.isfinite(loss)), 0.0)
    if first > math.log(n_tokens):
        return DivergenceThreshold(LOST_FACTOR * first, f"{LOST_FACTOR:g} times the first loss")
    meaning = f"{LOST_FACTOR:g} times ln {n_tokens}, the loss of guessing among {n_tokens} tokens"
    return DivergenceThreshold(LOST_FACTOR * math.log(n_tokens), meaning)


def find_anomaly(past: RecordedRun, step: int | None) -> Anomaly | None:
    """Return the step to examine: the given step, the first fault, the first loss that is too high, or a spike.

    If the run was rewound after faults, returns the last fault. Among spikes, returns the last one that was counted, or
    else the largest. Returns None if nothing stands out.

    Raises:
        UserError: There is no record.
    """
    history = past.history()
    if step is not None:
        return _asked_for(past, history, step)
    faults = history.where(~history.is_finite)
    if len(faults.steps):
        columns = {"loss": faults.loss, "gradient": faults.gradient_norm}
        what = next((what for what, column in columns.items() if not math.isfinite(column[0])), "update")
        others = f", the first of {len(faults.steps)} such steps" if len(faults.steps) > 1 else ""
        return Anomaly(int(faults.steps[0]), f"its {what} is not finite{others}", True)
    if past.rewinds:
        return _undone(past.rewinds[-1])
    if not len(history.steps):
        raise UserError(
            f"{past.folder.path} has no record of its training (metrics.jsonl), so which step went wrong is not known. "
            "Give --step=K to look at a step."
        )
    rule = compute_divergence_threshold(past, history)
    lost = np.flatnonzero(history.loss > rule.above)
    if len(lost):
        before = int(history.steps[lost[0] - 1]) if lost[0] else 0
        found = _first_above(past, before, int(history.steps[lost[0]]), rule.above)
        return Anomaly(found, f"its loss is the first above {rule.above:.3g}, {rule.meaning}", False)
    counted = np.flatnonzero(np.diff(history.spikes) > 0)
    if len(counted):
        return _within(past, *map(int, history.steps[counted[-1] : counted[-1] + 2]))
    largest = find_spike(history)
    return None if largest is None else Anomaly(largest, "its loss is the largest spike of the record", False)


def _asked_for(past: RecordedRun, history: History, step: int) -> Anomaly:
    past.check(step)
    undone = next((rewind for rewind in past.rewinds[::-1] if rewind.step == step), None)
    if undone is not None:
        return _undone(undone)
    is_finite = history.is_finite[history.steps == step]
    return Anomaly(step, "you asked for it", bool(len(is_finite)) and not is_finite[-1])


def _undone(rewind: Rewind) -> Anomaly:
    why = f"its loss, gradient or update was not finite, and the run went back from it to step {rewind.to}"
    return Anomaly(rewind.step, why, True, rewind)


def _first_above(past: RecordedRun, before: int, after: int, ceiling: float) -> int:
    """Replay the steps after `before` up to `after`, and return the first whose loss is above a ceiling."""
    if after - before == 1:
        return after
    _, every = past.train(past.state_at(before), after - before)
    steps = range(before + 1, after + 1)
    return next((step for step, metrics in zip(steps, every, strict=True) if metrics.loss > ceiling), after)


def _within(past: RecordedRun, before: int, after: int) -> Anomaly:
    """Replay the steps after `before` up to `after`, and return the last at which the spike count rose."""
    state = past.state_at(before)
    count = int(state.loss_stats.spikes)
    _, every = past.train(state, after - before)
    counts = [count, *(int(metrics.spikes) for metrics in every)]
    rises = [index for index in range(len(every)) if counts[index + 1] > counts[index]]
    index = rises[-1] if rises else max(range(len(every)), key=lambda index: float(every[index].loss))
    return Anomaly(before + index + 1, "its loss is a spike", False)


def find_spike(history: History) -> int | None:
    """Return the recorded step whose loss stands out most from earlier losses, or None.

    The measure is the distance above the highest earlier loss, relative to the range of earlier losses.
    """
    largest, step = 1.0, None
    # A block at a time, because the windows take several times the memory of the losses.
    for start in range(LOSSES_BEFORE, len(history.loss), BLOCK_LINES):
        losses = history.loss[start - LOSSES_BEFORE : start + BLOCK_LINES]
        before = np.lib.stride_tricks.sliding_window_view(losses[:-1], LOSSES_BEFORE)
        highest, width = before.max(axis=1), np.ptp(before, axis=1)
        above = losses[LOSSES_BEFORE:] - highest
        scores = np.divide(above, width, out=np.zeros_like(above), where=width > 0)
        worst = int(scores.argmax())
        if scores[worst] > largest:
            largest, step = scores[worst], int(history.steps[start + worst])
    return step
