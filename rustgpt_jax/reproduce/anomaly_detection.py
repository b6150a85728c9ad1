"""Find the step at which a run went wrong from its record: a non-finite value, a diverged loss, or a loss spike."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rustgpt_jax.errors import UserError
from rustgpt_jax.model.transformer import vocab_size
from rustgpt_jax.reproduce.recorded_run import History, RecordedRun, Rewind
from rustgpt_jax.reproduce.replay import ReplayedStep, is_finite

LOSS, NORM = "train/loss", "train/gradient_norm"
# A loss above this multiple of the first loss, or of that of a uniform guess, counts as diverged.
DIVERGENCE_FACTOR = 1.5
# The number of earlier losses that a loss is compared with to find spikes.
LOSSES_BEFORE = 20
BLOCK_LINES = 2**15
# The number of recorded steps whose median is the usual loss and gradient norm.
USUAL_STEPS = 5
# A loss above this fraction of the way from the usual loss to the spike counts as a spike.
SPIKE_FRACTION = 0.5


class Anomaly(NamedTuple):
    """A step at which a run went wrong.

    Attributes:
        step: The step.
        reason: Why it is examined.
        is_fault: Whether a value is not finite.
        rewind: The rewind of the run from this step, if there was one.
    """

    step: int
    reason: str
    is_fault: bool
    rewind: Rewind | None = None


class DivergenceThreshold(NamedTuple):
    """The loss above which a run counts as diverged from step `since` on, and a description of it."""

    loss: float
    meaning: str
    since: int = 1


def compute_divergence_threshold(run: RecordedRun, history: History) -> DivergenceThreshold:
    """Return the loss above which a run has diverged, from its vocabulary size and its first recorded loss."""
    n_tokens = vocab_size(run.inputs.full_config.model)
    first = next((float(loss) for loss in history.loss[:1] if math.isfinite(loss)), 0.0)
    if first > math.log(n_tokens):
        return DivergenceThreshold(DIVERGENCE_FACTOR * first, f"{DIVERGENCE_FACTOR:g} times the first loss")
    meaning = f"{DIVERGENCE_FACTOR:g} times ln {n_tokens}, the loss of guessing among {n_tokens} tokens"
    return DivergenceThreshold(DIVERGENCE_FACTOR * math.log(n_tokens), meaning)


def find_anomaly(run: RecordedRun, step: int | None) -> Anomaly | None:
    """Return the step to examine: the given step, the first fault, the first loss that is too high, or a spike.

    If the run was rewound after faults, returns the last fault. Among spikes, returns the last one that was counted, or
    else the largest. Returns None if nothing stands out.

    Raises:
        UserError: There is no record.
    """
    history = run.history()
    if step is not None:
        return _examine_given(run, history, step)
    faults = history.where(~history.is_finite)
    if len(faults.steps):
        columns = {"loss": faults.loss, "gradient": faults.gradient_norm}
        name = next((name for name, column in columns.items() if not math.isfinite(column[0])), "update")
        others = f", the first of {len(faults.steps)} such steps" if len(faults.steps) > 1 else ""
        return Anomaly(int(faults.steps[0]), f"its {name} is not finite{others}", True)
    if run.rewinds:
        return _rewound_fault(run.rewinds[-1])
    if not len(history.steps):
        raise UserError(
            f"{run.folder.path} has no record of its training (metrics.jsonl), so the step that went wrong is unknown. "
            "Give --step=K to examine a step."
        )
    threshold = compute_divergence_threshold(run, history)
    diverged = np.flatnonzero(history.loss > threshold.loss)
    if len(diverged):
        before = int(history.steps[diverged[0] - 1]) if diverged[0] else 0
        found = _first_above(run, before, int(history.steps[diverged[0]]), threshold.loss)
        return Anomaly(found, f"its loss is the first above {threshold.loss:.3g}, {threshold.meaning}", False)
    counted = np.flatnonzero(np.diff(history.spikes) > 0)
    if len(counted):
        return _last_spike(run, *map(int, history.steps[counted[-1] : counted[-1] + 2]))
    largest = find_spike(history)
    return None if largest is None else Anomaly(largest, "its loss is the largest spike of the record", False)


def _examine_given(run: RecordedRun, history: History, step: int) -> Anomaly:
    run.check_step(step)
    rewind = next((rewind for rewind in run.rewinds[::-1] if rewind.step == step), None)
    if rewind is not None:
        return _rewound_fault(rewind)
    is_finite = history.is_finite[history.steps == step]
    return Anomaly(step, "it was given", bool(len(is_finite)) and not is_finite[-1])


def _rewound_fault(rewind: Rewind) -> Anomaly:
    reason = f"its loss, gradient or update was not finite, and the run rewound from it to step {rewind.to}"
    return Anomaly(rewind.step, reason, True, rewind)


def _first_above(run: RecordedRun, before: int, after: int, threshold: float) -> int:
    """Replay the steps after `before` up to `after`, and return the first whose loss is above a threshold."""
    if after - before == 1:
        return after
    _, every = run.train(run.state_at(before), after - before)
    steps = range(before + 1, after + 1)
    return next((step for step, metrics in zip(steps, every, strict=True) if metrics.loss > threshold), after)


def _last_spike(run: RecordedRun, before: int, after: int) -> Anomaly:
    """Replay the steps after `before` up to `after`, and return the last at which the spike count rose."""
    state = run.state_at(before)
    count = int(state.loss_stats.spikes)
    _, every = run.train(state, after - before)
    counts = [count, *(int(metrics.spikes) for metrics in every)]
    rises = [index for index in range(len(every)) if counts[index + 1] > counts[index]]
    index = rises[-1] if rises else max(range(len(every)), key=lambda index: float(every[index].loss))
    return Anomaly(before + index + 1, "its loss is a spike", False)


def find_spike(history: History) -> int | None:
    """Return the recorded step whose loss stands out most from earlier losses, or None.

    The measure is the distance above the highest earlier loss, relative to the range of earlier losses.
    """
    largest, step = 1.0, None
    # Process a block at a time, because the windows take several times the memory of the losses.
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


@dataclass(frozen=True)
class Failure:
    """The failure that an intervention must prevent.

    Attributes:
        step: The step at which it began, which may be before the examined step.
        threshold: The loss above which the run counts as failed.
        usual_norm: The usual gradient norm before it; 0 if unknown.
    """

    step: int
    threshold: DivergenceThreshold
    usual_norm: float


def find_failure(run: RecordedRun, replayed: ReplayedStep) -> Failure | None:
    """Return the failure that a step belongs to; None if its loss is finite and not above the usual losses."""
    history = run.history()
    threshold, loss = compute_divergence_threshold(run, history), replayed.metrics[LOSS]
    history = history.until(replayed.step - 1)
    sound = history.where(history.is_finite & (history.loss <= threshold.loss))
    usual = History(*(column[-USUAL_STEPS:] for column in sound))
    usual_norm = float(np.median(usual.gradient_norm)) if len(usual.steps) else 0.0
    if not is_finite(replayed.metrics) or loss > threshold.loss:
        bad_steps = history.steps[history.steps > sound.steps[-1]] if len(sound.steps) else history.steps
        step = int(bad_steps[0]) if len(bad_steps) else replayed.step
        # The run recovered from earlier losses above the threshold, so an intervention may, too.
        has_recovered = bool(np.any((history.steps < step) & (history.loss > threshold.loss)))
        return Failure(step, threshold._replace(since=step) if has_recovered else threshold, usual_norm)
    if not len(usual.steps) or loss <= usual.loss.max():
        return None
    # A spike may be no higher than the losses at the start of training, so only later losses count.
    usual_loss = float(np.median(usual.loss))
    spike = usual_loss + SPIKE_FRACTION * (loss - usual_loss)
    meaning = f"half way from the losses before step {replayed.step} to its loss"
    return Failure(replayed.step, DivergenceThreshold(spike, meaning, int(usual.steps[0])), usual_norm)
