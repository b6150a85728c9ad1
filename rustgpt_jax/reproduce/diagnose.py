"""The verb `doctor`: find the step at which a run went wrong, and try changes that would have prevented it."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from rustgpt_jax.config.schema import Config
from rustgpt_jax.errors import UserError, program_name
from rustgpt_jax.model.transformer import vocab_size
from rustgpt_jax.reproduce.interventions import (
    CONTROL,
    Intervention,
    InterventionResult,
    format_flags,
    list_interventions,
    run_interventions,
)
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    PARAMETER,
    PARAMETER_GRADIENT,
    History,
    RecordedRun,
    Rewind,
    StepInternals,
    StepTensor,
)
from rustgpt_jax.reproduce.replay import ReplayedStep, is_finite, replay_one_step, write_page
from rustgpt_jax.sweeps.report.results import format_value
from rustgpt_jax.tokenizers import Tokenizer, decode
from rustgpt_jax.tracking.console import replace_control_characters, show_spinner
from rustgpt_jax.training.train_step import stack

LOSS, NORM = "train/loss", "train/gradient_norm"
# A loss above this multiple of the first loss, or of the loss of a uniform guess, counts as diverged.
DIVERGENCE_FACTOR = 1.5
# To find spikes, each loss is compared with this many earlier losses.
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
        reason: The reason for examining it.
        is_fault: Whether a value is not finite.
        rewind: The rewind of the run from this step, if there was one.
    """

    step: int
    reason: str
    is_fault: bool
    rewind: Rewind | None = None


class DivergenceThreshold(NamedTuple):
    """The loss above which a run counts as diverged, from step `since` on, with a description."""

    loss: float
    meaning: str
    since: int = 1


def compute_divergence_threshold(run: RecordedRun, history: History) -> DivergenceThreshold:
    """Return the loss above which a run has diverged, from its vocabulary size and its first recorded loss."""
    n_tokens = vocab_size(run.inputs.full_config.model)
    first = next((float(loss) for loss in history.loss[:1] if math.isfinite(loss)), 0.0)
    if first > math.log(n_tokens):
        return DivergenceThreshold(DIVERGENCE_FACTOR * first, f"{DIVERGENCE_FACTOR:g} times the first loss")
    meaning = f"{DIVERGENCE_FACTOR:g} times ln {n_tokens}, the loss of a uniform guess among {n_tokens} tokens"
    return DivergenceThreshold(DIVERGENCE_FACTOR * math.log(n_tokens), meaning)


def find_anomaly(run: RecordedRun, step: int | None) -> Anomaly | None:
    """Return the step to examine: the given step, the first fault, the first loss that is too high, or a spike.

    If the run was rewound after faults, returns the last fault. Among spikes, returns the last one that was counted, or
    else the largest. Returns None if nothing stands out.

    Raises:
        UserError: There is no record.
    """
    history = run.load_history()
    if step is not None:
        run.check_step(step)
        rewind = next((rewind for rewind in run.rewinds[::-1] if rewind.step == step), None)
        is_finite = history.is_finite[history.steps == step]
        given = Anomaly(step, "--step selects it", bool(len(is_finite)) and not is_finite[-1])
        return given if rewind is None else _rewound_fault(rewind)
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


def _rewound_fault(rewind: Rewind) -> Anomaly:
    reason = f"its loss, gradient or update was not finite, and the run rewound from it to step {rewind.to}"
    return Anomaly(rewind.step, reason, True, rewind)


def _first_above(run: RecordedRun, before: int, after: int, threshold: float) -> int:
    """Replay the steps after `before` up to `after`, and return the first whose loss is above a threshold."""
    if after - before == 1:
        return after
    _, every = run.train(run.compute_state(before), after - before)
    steps = range(before + 1, after + 1)
    return next((step for step, metrics in zip(steps, every, strict=True) if metrics.loss > threshold), after)


def _last_spike(run: RecordedRun, before: int, after: int) -> Anomaly:
    """Replay the steps after `before` up to `after`, and return the last at which the spike count rose."""
    state = run.compute_state(before)
    count = int(state.loss_stats.spikes)
    _, every = run.train(state, after - before)
    counts = [count, *(int(metrics.spikes) for metrics in every)]
    rises = [index for index in range(len(every)) if counts[index + 1] > counts[index]]
    index = rises[-1] if rises else max(range(len(every)), key=lambda index: float(every[index].loss))
    return Anomaly(before + index + 1, "its loss is a spike", False)


def find_spike(history: History) -> int | None:
    """Return the recorded step whose loss stands out most from earlier losses, or None.

    A loss is rated by its distance above the highest of the preceding losses, relative to the range of those losses.
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
        usual_norm: The typical gradient norm before it; 0 if unknown.
    """

    step: int
    threshold: DivergenceThreshold
    usual_norm: float


def find_failure(run: RecordedRun, replayed: ReplayedStep) -> Failure | None:
    """Return the failure that a step belongs to; None if its loss is finite and not above the usual losses."""
    history = run.load_history()
    threshold, loss = compute_divergence_threshold(run, history), replayed.metrics[LOSS]
    history = history.where(history.steps < replayed.step)
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
    meaning = f"halfway between the losses before step {replayed.step} and its loss"
    return Failure(replayed.step, DivergenceThreshold(spike, meaning, int(usual.steps[0])), usual_norm)


# The diagnosis.

# A row whose loss is this many robust standard deviations above the median stands out.
ROW_DEVIATIONS = 6.0
# The standard deviation of a normal distribution divided by its median absolute deviation.
MAD_TO_DEVIATION = 1.4826
MAX_ROWS_NAMED = 4
TOKENS_SHOWN = 40
# Interventions start from a checkpoint at least MIN_BEFORE and at most MAX_BEFORE steps before the failure, and
# continue for STEPS_AFTER steps after it.
MIN_BEFORE, MAX_BEFORE, STEPS_AFTER = 10, 200, 20
# A bad step is compared with the one this many steps before it.
STEPS_TO_REFERENCE = 5


@dataclass(frozen=True)
class InterventionTrial:
    """Interventions tried over the steps `first` to `last`, and their results (none for unavailable ones)."""

    first: int
    last: int
    interventions: list[Intervention]
    results: list[InterventionResult]
    threshold: DivergenceThreshold

    def find_first_bad_step(self, result: InterventionResult) -> int | None:
        """Return the step at which the run fails despite an intervention, or None if it survives."""
        index = result.find_first_bad_index(self.threshold.loss, max(0, self.threshold.since - self.first))
        return None if index is None else self.first + index

    def list_survivors(self) -> list[InterventionResult]:
        """Return the results of interventions that survived, lowest final loss first."""
        survived = [result for result in self.results if self.find_first_bad_step(result) is None]
        return sorted(survived, key=lambda result: float(result.losses[-1]))

    def describe(self) -> list[dict[str, Any]]:
        """Return the interventions as JSON has them."""
        results = {result.intervention: result for result in self.results}
        described = []
        for each in self.interventions:
            result = results.get(each)
            bad_step = None if result is None else self.find_first_bad_step(result)
            described.append(
                {
                    "name": each.name,
                    "knobs": dict(each.knobs),
                    "not_tried": each.unavailable_reason,
                    "survived": None if result is None else bad_step is None,
                    "failed_at": bad_step,
                    "last_loss": None if result is None or bad_step is not None else float(result.losses[-1]),
                }
            )
        return described


class Diagnosis(NamedTuple):
    """What is wrong with a run.

    Attributes:
        anomaly: The step that was examined and why; None if the run is healthy.
        sentences: What was found.
        page: The page that shows the tensors of the step.
        trial: The interventions that were tried, or None.
        flags: The command-line flags of the best intervention; empty if none survived.
    """

    anomaly: Anomaly | None = None
    sentences: Sequence[str] = ()
    page: Path | None = None
    trial: InterventionTrial | None = None
    flags: Sequence[str] = ()

    def describe(self) -> dict[str, Any]:
        """Return the diagnosis as JSON has it."""
        return {
            "is_healthy": self.anomaly is None,
            "step": None if self.anomaly is None else self.anomaly.step,
            "reason": None if self.anomaly is None else self.anomaly.reason,
            "findings": self.sentences,
            "page": self.page,
            "interventions": [] if self.trial is None else self.trial.describe(),
            "flags": self.flags,
        }


def diagnose_run(path: Path, step: int | None, console: Console) -> Diagnosis:
    """Diagnose a run at a given step or at its worst step, and suggest interventions.

    Writes RUN/replay/step_K.html. If nothing stands out in the record, prints that the run is healthy.

    Raises:
        UserError: As for `RecordedRun` and `find_anomaly`.
    """

    def show(text: str) -> None:
        # Commands are indented, and must not be wrapped.
        console.print(replace_control_characters(text), highlight=False, soft_wrap=text.startswith(" "), markup=False)

    with RecordedRun(path, console) as run:
        with show_spinner(console, "looking for the step that went wrong"):
            anomaly = find_anomaly(run, step)
        if anomaly is None:
            show(f"{path} is healthy: every recorded loss and gradient is finite, and no loss stands out.")
            show("To examine a step anyway, give --step=K.")
            return Diagnosis()
        if anomaly.rewind is not None:
            run.undo_rewind(anomaly.rewind)
        show(f"Examining step {anomaly.step} of {path}, because {anomaly.reason}.")
        with show_spinner(console, f"replaying step {anomaly.step} and measuring its tensors"):
            replayed, internals = replay_one_step(run, anomaly.step, with_intermediates=True)
            assert internals is not None
            sentences = describe_anomaly(run, anomaly, replayed, internals)
        sentences = [replayed.verdict, *sentences]
        for sentence in sentences:
            show(sentence)
        page = write_page(path, replayed, internals.tensors)
        show(f"All tensors of the step: {page}")
        failure = find_failure(run, replayed)
        if failure is None:
            show("Its loss does not stand out from those recorded before it, so no intervention is tried.")
            return Diagnosis(anomaly, sentences, page)
        with show_spinner(console, "trying interventions, all in one program"):
            trial = try_interventions(run, failure)
        earlier = describe_earlier_failure(trial, failure, replayed.step, path)
        for sentence in earlier:
            show(sentence)
        threshold = trial.threshold
        since = f" from step {threshold.since} on" if threshold.since > trial.first else ""
        show(
            f"Interventions from the state before step {trial.first}, until step {trial.last}. "
            f"A loss above {threshold.loss:.3g}{since} counts as a failure: {threshold.meaning}."
        )
        _print_trial(trial, console)
        stage = run.get_stage(failure.step)[0].stage.name
        for sentence in format_advice(trial, run.config, stage):
            show(sentence)
        helpful = [each for each in trial.list_survivors() if each.intervention.name != CONTROL]
        flags = list(format_flags(helpful[0].intervention, run.config, stage)) if helpful else []
        return Diagnosis(anomaly, [*sentences, *map(str.strip, earlier)], page, trial, flags)


def describe_anomaly(run: RecordedRun, anomaly: Anomaly, replayed: ReplayedStep, internals: StepInternals) -> list[str]:
    """Describe the tensors and the batch of a bad step, which may reveal the cause."""
    loss, norm = replayed.metrics[LOSS], replayed.metrics[NORM]
    if anomaly.is_fault and is_finite(replayed.metrics):
        return [
            f"The replayed step is finite: loss {loss:.4g}, gradient norm {norm:.4g}. The cause is neither the data "
            "nor the computation, but a hardware error, or code that differs from the code of the run."
        ]
    sentences = [f"Its loss is {loss:.4g}, its gradient norm {norm:.4g}."]
    if not is_finite(replayed.metrics):
        sentences.append(describe_first_nonfinite(internals.tensors))
    else:
        first_step = run.get_stage(anomaly.step)[0].stage.first_step + 1
        reference_step = max(first_step, anomaly.step - STEPS_TO_REFERENCE)
        if reference_step < anomaly.step:
            reference = run.measure_step(run.compute_state(reference_step - 1))
            sentences += describe_growth(internals.tensors, reference.tensors, reference_step)
    return [*sentences, describe_batch(internals, run.inputs.tokenizer)]


def describe_first_nonfinite(tensors: Sequence[StepTensor]) -> str:
    """Describe the first non-finite tensor in order of computation, and the one computed before it."""
    index = next((index for index, tensor in enumerate(tensors) if tensor.nonfinite), None)
    if index is None:
        largest = max(tensors, key=lambda tensor: tensor.largest)
        return (
            "Every tensor of the step is finite, but the sum of their squares is not: "
            f"the largest magnitude is {largest.largest:.3g}, in {_describe_tensor(largest)}."
        )
    bad = tensors[index]
    count = f"{bad.nonfinite:,} of {bad.size:,} elements"
    sentence = f"The first tensor that is not finite is {_describe_tensor(bad)}: {count}."
    if bad.kind == PARAMETER:
        return f"{sentence} It was not finite before the step."
    before = tensors[index - 1]
    if before.kind == bad.kind:
        return (
            f"{sentence} The one before it is {_describe_tensor(before)}, whose largest magnitude is "
            f"{before.largest:.3g}."
        )
    earlier = {
        PARAMETER: "every parameter",
        ACTIVATION: "the forward pass",
        ACTIVATION_GRADIENT: "every activation gradient",
    }
    return f"{sentence} Before it, {earlier.get(before.kind, 'every gradient')} is finite."


def _describe_tensor(tensor: StepTensor) -> str:
    return f"the {tensor.kind} {tensor.name}" + ("" if tensor.layer is None else f" (layer {tensor.layer})")


def describe_growth(tensors: Sequence[StepTensor], reference: Sequence[StepTensor], reference_step: int) -> list[str]:
    """Describe the activation and the gradients that grew most relative to a normal step."""
    sentences: list[str] = []
    for kind in (ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT):
        grown = [
            (tensor.largest / then.largest, tensor)
            for tensor, then in zip(tensors, reference, strict=True)
            if tensor.kind == kind and then.largest > 0
        ]
        if grown:
            growth, tensor = max(grown, key=lambda pair: pair[0])
            sentences.append(
                f"The {kind} that grew most since step {reference_step} is {tensor.name}: its largest magnitude is "
                f"{tensor.largest:.3g}, {growth:.3g} times what it was."
            )
    return sentences


def describe_batch(internals: StepInternals, tokenizer: Tokenizer) -> str:
    """Describe the outlier rows of a batch, with the beginning of the worst one."""
    losses_BT, weights_BT = np.asarray(internals.report.losses_BT), np.asarray(internals.report.weights_BT)
    learned_BT = np.where(weights_BT > 0, losses_BT * weights_BT, 0)
    losses_B = learned_BT.sum(axis=1) / np.maximum(weights_BT.sum(axis=1), 1)
    rows, n_rows = find_outlier_rows(losses_B), len(losses_B)
    if not rows:
        span = f"from {losses_B.min():.3g} to {losses_B.max():.3g}"
        return f"No row of the batch stands out: the losses of its {n_rows} rows are {span}."
    if len(rows) == n_rows:
        return f"All {n_rows} rows of the batch have a loss that is not finite, so no single row is the cause."
    named = ", ".join(map(str, rows[:MAX_ROWS_NAMED])) + (", ..." if len(rows) > MAX_ROWS_NAMED else "")
    which = f"row {named} (from 0) stands" if len(rows) == 1 else f"rows {named} (from 0) stand"
    loss = f"{losses_B[rows[0]]:.3g}, the median is {np.median(losses_B):.3g}"
    if not np.isfinite(losses_B[rows[0]]):
        loss = "not finite"
    text = decode(tokenizer, np.asarray(internals.batch.tokens_BT)[rows[0], :TOKENS_SHOWN].tolist())
    return f"Of the {n_rows} rows of the batch, {which} out: loss {loss}. It begins: {text!r}"


def find_outlier_rows(losses_B: np.ndarray) -> list[int]:
    """Return the rows with a non-finite loss, or else those far above the others, worst first."""
    nonfinite = np.flatnonzero(~np.isfinite(losses_B))
    if len(nonfinite):
        return nonfinite.tolist()
    median = np.median(losses_B)
    deviation = MAD_TO_DEVIATION * np.median(np.abs(losses_B - median))
    outliers = np.flatnonzero(losses_B - median > ROW_DEVIATIONS * max(deviation, 1e-3))
    return outliers[np.argsort(-losses_B[outliers])].tolist()


def try_interventions(run: RecordedRun, failure: Failure) -> InterventionTrial:
    """Try every intervention on the run's batches, from a state before a failure until some steps after it."""
    data, program = run.get_stage(failure.step)
    stage = data.stage
    latest = max(stage.first_step, failure.step - MIN_BEFORE)
    saved = max(stage.first_step, *(step for step in run.list_saved_steps() if step <= latest))
    first = max(saved, failure.step - MAX_BEFORE) + 1
    last = min(failure.step + STEPS_AFTER, stage.end_step)
    state = run.compute_state(first - 1)
    batches_S = stack(run.load_batches(state, last - first + 1))
    interventions = list_interventions(stage.config, failure.usual_norm)
    results = run_interventions(interventions, stage.config, state, batches_S, program.first_step)
    return InterventionTrial(first, last, interventions, results, failure.threshold)


def describe_earlier_failure(trial: InterventionTrial, failure: Failure, step: int, path: Path) -> list[str]:
    """Return a message about the earlier step at which the run had already failed; empty if it had not."""
    control = next(
        (trial.find_first_bad_step(result) for result in trial.results if result.intervention.name == CONTROL), None
    )
    failed = min(failure.step, control or failure.step)
    if failed == step:
        return []
    command = f"    {program_name()} doctor {shlex.quote(str(path))} --step={failed}"
    return [f"The run had already failed at step {failed}. To examine that step:", command]


def _print_trial(trial: InterventionTrial, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head in ("intervention", "knobs", ""):
        table.add_column(head)
    table.add_column("last loss", justify="right")
    results = {result.intervention: result for result in trial.results}
    for intervention in trial.interventions:
        if intervention not in results:
            table.add_row(intervention.name, "", f"not tried: {intervention.unavailable_reason}", "")
            continue
        result = results[intervention]
        bad_step = trial.find_first_bad_step(result)
        verdict, loss = "survived", f"{result.losses[-1]:.4f}"
        if bad_step is not None:
            index = bad_step - trial.first
            verdict = f"{'too high' if result.is_finite[index] else 'not finite'} at step {bad_step}"
            loss = f"{result.losses[index]:.4g}"
        knobs = ", ".join(f"{path.split('.', 1)[1]}={format_value(value)}" for path, value in intervention.knobs)
        table.add_row(intervention.name, knobs, verdict, loss)
    console.print(table, highlight=False)


def format_advice(trial: InterventionTrial, config: Config, stage: str) -> list[str]:
    """Return recommendations as sentences."""
    survivors = trial.list_survivors()
    helpful = [result.intervention for result in survivors if result.intervention.name != CONTROL]
    sentences: list[str] = []
    if len(helpful) < len(survivors):
        sentences.append(
            "Without a change, the run survived, too, when trained in one program with the interventions: another "
            "order of sums was enough, so the survival of an intervention proves nothing."
        )
    if not helpful:
        lowest = min(
            value for each in trial.interventions for path, value in each.knobs if path == "optimizer.learning_rate"
        )
        return [
            *sentences,
            f"No intervention is enough, not even a learning rate of {format_value(lowest)}. Inspect the tensor and "
            "the batch named above, or try a lower learning rate.",
        ]
    best = helpful[0].name
    if len(helpful) > 1:
        best = f"{', '.join(each.name for each in helpful)}. Of these, {best} has the lowest loss at step {trial.last}"
    flags = " ".join(format_flags(helpful[0], config, stage))
    return [*sentences, f"Survived: {best}. Start again with", f"    {flags}"]
