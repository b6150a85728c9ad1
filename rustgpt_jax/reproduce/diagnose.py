"""The verb `doctor`: find the step at which a run went wrong, and try changes that would have prevented it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from rustgpt_jax.config.schema import Config
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.reproduce.anomaly_detection import (
    LOSS,
    NORM,
    Anomaly,
    DivergenceThreshold,
    compute_divergence_threshold,
    find_anomaly,
)
from rustgpt_jax.reproduce.interventions import (
    CONTROL,
    Intervention,
    InterventionResult,
    format_flags,
    possible_interventions,
    run_interventions,
)
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    History,
    RecordedRun,
    StepInternals,
    StepTensor,
)
from rustgpt_jax.reproduce.replay import write_page
from rustgpt_jax.reproduce.replay_step import ReplayedStep, replay_one_step
from rustgpt_jax.sweeps.report.results import format_value
from rustgpt_jax.tokenizers import Tokenizer, decode
from rustgpt_jax.tracking.formatting import replace_control_characters
from rustgpt_jax.tracking.progress import show_spinner

# What a step tells of its own fault: the tensor where it began, and the rows of the batch that stand out.

# A row whose loss is this many robust standard deviations above the median stands out.
ROW_DEVIATIONS = 6.0
# The median of absolute deviations of a normal distribution, times this, is its standard deviation.
MAD_TO_DEVIATION = 1.4826
MOST_ROWS_NAMED = 4
TOKENS_SHOWN = 40

# How each kind of tensor is spoken of.
WHAT = {
    PARAMETER: "the parameter",
    ACTIVATION: "the activation",
    ACTIVATION_GRADIENT: "the gradient of the activation",
    PARAMETER_GRADIENT: "the gradient of the parameter",
    UPDATE: "the update of the parameter",
}


def first_nonfinite(tensors: Sequence[StepTensor]) -> StepTensor | None:
    """Return the first tensor in order of computation with a non-finite element."""
    return next((tensor for tensor in tensors if tensor.nonfinite), None)


def describe_tensor(tensor: StepTensor) -> str:
    """Describe a tensor by its kind, name and layer."""
    layer = "" if tensor.layer is None else f" (layer {tensor.layer})"
    return f"{WHAT[tensor.kind]} {tensor.name}{layer}"


def describe_first_nonfinite(tensors: Sequence[StepTensor]) -> str:
    """Describe the first non-finite tensor and the one computed before it."""
    bad = first_nonfinite(tensors)
    if bad is None:
        most = max(tensors, key=lambda tensor: tensor.largest)
        return (
            "Every tensor of the step is finite, but the sum of their squares is not: "
            f"the largest magnitude is {most.largest:.3g}, in {describe_tensor(most)}."
        )
    count = f"{bad.nonfinite:,} of {bad.size:,} elements"
    sentence = f"The first tensor that is not finite is {describe_tensor(bad)}: {count}."
    if bad.kind == PARAMETER:
        return f"{sentence} It was so before the step began."
    before = tensors[tensors.index(bad) - 1]
    kinds = {PARAMETER: "every parameter is finite", ACTIVATION_GRADIENT: "every activation is finite"}
    if before.kind != bad.kind:
        known = kinds.get(before.kind, "the forward is finite")
        return f"{sentence} Before it {known}."
    return f"{sentence} Before it comes {describe_tensor(before)}, whose largest magnitude is {before.largest:.3g}."


class Growth(NamedTuple):
    """A tensor of a bad step, and the ratio of its largest magnitude to that in a normal step."""

    tensor: StepTensor
    calm: StepTensor
    times: float


def compute_growths(tensors: Sequence[StepTensor], calm: Sequence[StepTensor]) -> list[Growth]:
    """Return the growth of each tensor relative to a normal step, largest first."""
    pairs = zip(tensors, calm, strict=True)
    grown = [Growth(now, then, now.largest / then.largest) for now, then in pairs if then.largest > 0]
    return sorted(grown, key=lambda growth: -growth.times)


def describe_growth(tensors: Sequence[StepTensor], calm: Sequence[StepTensor], calm_step: int) -> list[str]:
    """Describe the activation and the gradient that grew most relative to a normal step."""
    sentences: list[str] = []
    for kind in (ACTIVATION, ACTIVATION_GRADIENT, PARAMETER_GRADIENT):
        most = next(iter(growth for growth in compute_growths(tensors, calm) if growth.tensor.kind == kind), None)
        if most is not None:
            sentences.append(
                f"The {kind} that grew most since step {calm_step} is {most.tensor.name}: its largest magnitude is "
                f"{most.tensor.largest:.3g}, {most.times:.3g} times what it was."
            )
    return sentences


def compute_row_losses(inside: StepInternals) -> np.ndarray:
    """Return the mean loss over the loss tokens of each row of the batch; 0 for a row without any."""
    losses_BT, weights_BT = np.asarray(inside.report.losses_BT), np.asarray(inside.report.weights_BT)
    learned_BT = np.where(weights_BT > 0, losses_BT * weights_BT, 0)
    return learned_BT.sum(axis=1) / np.maximum(weights_BT.sum(axis=1), 1)


def find_outlier_rows(losses_B: np.ndarray) -> list[int]:
    """Return the rows with a non-finite loss, or else those far above the others, worst first."""
    broken = np.flatnonzero(~np.isfinite(losses_B))
    if len(broken):
        return broken.tolist()
    median = np.median(losses_B)
    deviation = MAD_TO_DEVIATION * np.median(np.abs(losses_B - median))
    odd = np.flatnonzero(losses_B - median > ROW_DEVIATIONS * max(deviation, 1e-3))
    return odd[np.argsort(-losses_B[odd])].tolist()


def describe_batch(inside: StepInternals, tokenizer: Tokenizer) -> str:
    """Describe the outlier rows of a batch, with the beginning of the worst one."""
    losses_B = compute_row_losses(inside)
    rows, n_rows = find_outlier_rows(losses_B), len(losses_B)
    if not rows:
        span = f"from {losses_B.min():.3g} to {losses_B.max():.3g}"
        return f"No row of the batch stands out: the losses of its {n_rows} rows are {span}."
    if len(rows) == n_rows:
        return f"All {n_rows} rows of the batch have a loss that is not finite: it is not one of them alone."
    named = ", ".join(str(row) for row in rows[:MOST_ROWS_NAMED]) + (", ..." if len(rows) > MOST_ROWS_NAMED else "")
    which, stand = (f"row {named}", "stands") if len(rows) == 1 else (f"rows {named}", "stand")
    is_broken = not np.isfinite(losses_B[rows[0]])
    what = "not finite" if is_broken else f"{losses_B[rows[0]]:.3g}, the median is {np.median(losses_B):.3g}"
    text = decode(tokenizer, np.asarray(inside.batch.tokens_BT)[rows[0], :TOKENS_SHOWN].tolist())
    return f"Of the {n_rows} rows of the batch, {which} (from 0) {stand} out: loss {what}. It begins: {text!r}"


# Remedies begin at a checkpoint at least so many steps before the bad one, and at most so many, and go on after it.
LEAST_BEFORE, MOST_BEFORE, AFTER = 10, 200, 20
# The calm step that a spike is held against.
CALM_BEFORE = 5
# Recorded steps whose median is the usual loss and gradient norm.
CALM_RECORDS = 5
# How far from calm to spike a loss must come to be called one.
SPIKE_SHARE = 0.5


@dataclass(frozen=True)
class InterventionTrial:
    """Interventions tried over the steps `first` to `last`, their results, and the divergence threshold."""

    first: int
    last: int
    tried: list[Intervention]
    fates: list[InterventionResult]
    too_high: DivergenceThreshold

    def first_bad_step(self, fate: InterventionResult) -> int | None:
        """Return the step at which the run fails despite an intervention, or None if it survives."""
        index = fate.first_bad_step(self.too_high.above, max(0, self.too_high.since - self.first))
        return None if index is None else self.first + index

    def fate_of(self, remedy: Intervention) -> InterventionResult | None:
        """Return the result of an intervention, or None if it was unavailable."""
        return next((fate for fate in self.fates if fate.remedy == remedy), None)

    def survivors(self) -> list[InterventionResult]:
        """Return the results of interventions that survived, lowest final loss first."""
        alive = [fate for fate in self.fates if self.first_bad_step(fate) is None]
        return sorted(alive, key=lambda fate: float(fate.losses[-1]))


def diagnose_run(path: Path, step: int | None, console: Console) -> None:
    """Diagnose a run at a given step or at its worst step, and suggest remedies.

    Writes RUN/replay/step_K.html. If nothing stands out in the record, prints that the run is healthy.

    Raises:
        UserError: As for `RecordedRun` and `find_anomaly`.
    """

    def say(text: str) -> None:
        # What is to be copied must not be broken in two.
        is_command = text.startswith(" ")
        console.print(replace_control_characters(text), highlight=False, soft_wrap=is_command, markup=False)

    with RecordedRun(path, console) as past:
        with show_spinner(console, "looking for the step that went wrong"):
            found = find_anomaly(past, step)
        if found is None:
            say(f"{path} is healthy: every recorded loss and gradient is finite, and no loss stands out.")
            say("To look at a step all the same, give --step=K.")
            return
        if found.rewind is not None:
            past.go_before(found.rewind)
        say(f"Step {found.step} of {path} is looked at, because {found.why}.")
        with show_spinner(console, f"making step {found.step} again and measuring its tensors"):
            again, inside = replay_one_step(past, found.step, has_taps=True)
            assert inside is not None
            sentences = describe_anomaly(past, found, again, inside)
        for sentence in (again.verdict, *sentences):
            say(sentence)
        say(f"Each tensor of the step: {write_page(path, again, inside.tensors)}")
        view = View.of(past, again)
        if view is None:
            say("Its loss stands out from none that was recorded before it: there is nothing to be remedied.")
            return
        with show_spinner(console, "trying remedies, all in one program"):
            trial = try_interventions(past, view)
        for sentence in describe_earlier_intervention(trial, view, again.step, path):
            say(sentence)
        say(_heading(trial))
        _print(trial, console)
        for sentence in format_advice(trial, past.config, past.data_of(view.step).stage.name):
            say(sentence)


def describe_anomaly(past: RecordedRun, found: Anomaly, again: ReplayedStep, inside: StepInternals) -> list[str]:
    """Describe what the tensors and the batch of a bad step show about its cause."""
    loss, norm = again.metrics[LOSS], again.metrics[NORM]
    if found.is_fault and again.is_finite:
        return [
            f"Made again, the step is sound: loss {loss:.4g}, gradient norm {norm:.4g}. What went wrong lies neither "
            "in the data nor in the numbers, but in the machine, or in code that is not that of the run."
        ]
    sentences = [f"Its loss is {loss:.4g}, its gradient norm {norm:.4g}."]
    if not again.is_finite:
        sentences.append(describe_first_nonfinite(inside.tensors))
    else:
        calm_step = max(past.data_of(found.step).stage.first_step + 1, found.step - CALM_BEFORE)
        if calm_step < found.step:
            calm = past.look_into(past.state_at(calm_step - 1))
            sentences += describe_growth(inside.tensors, calm.tensors, calm_step)
    return [*sentences, describe_batch(inside, past.inputs.tokenizer)]


@dataclass(frozen=True)
class View:
    """A bad step in its record.

    step: the one that is to be survived: itself, or the one from which on the run was lost before. calm_norm: of the
    gradients while all was well, 0 if that is not known.
    """

    step: int
    too_high: DivergenceThreshold
    calm_norm: float

    @staticmethod
    def of(past: RecordedRun, again: ReplayedStep) -> "View | None":
        """The view of a step from what was recorded before it; None if its loss is finite and not above those."""
        history = past.history().until(again.step - 1)
        rule, loss = compute_divergence_threshold(past, past.history()), again.metrics[LOSS]
        is_sound = history.is_finite & (history.loss <= rule.above)
        sound = history.where(is_sound)
        calm = History(*(column[-CALM_RECORDS:] for column in sound))
        view = View(again.step, rule, float(np.median(calm.gradient_norm)) if len(calm.steps) else 0.0)
        if not again.is_finite or loss > rule.above:
            lost = history.steps[history.steps > sound.steps[-1]] if len(sound.steps) else history.steps
            step = int(lost[0]) if len(lost) else again.step
            # What the run has come back from, a remedy may come back from too.
            came_back = bool(np.any((history.steps < step) & (history.loss > rule.above)))
            return replace(view, step=step, too_high=rule._replace(since=step) if came_back else rule)
        if not len(calm.steps) or loss <= calm.loss.max():
            return None
        # A spike is no more than some loss of long before, when there was much to be learned.
        usual = float(np.median(calm.loss))
        meaning = f"half way from the losses before step {again.step} to its own"
        return replace(
            view, too_high=DivergenceThreshold(usual + SPIKE_SHARE * (loss - usual), meaning, int(calm.steps[0]))
        )


def try_interventions(past: RecordedRun, view: View) -> InterventionTrial:
    """Try every intervention from a state before the bad step on the run's batches, until some steps after it."""
    stage, program = past.data_of(view.step).stage, past.program_of(view.step)
    first, last = _first_step(past, view.step, stage.first_step), min(view.step + AFTER, stage.end_step)
    state = past.state_at(first - 1)
    batches = past.batches(state, last - first + 1)
    tried = possible_interventions(stage.config, view.calm_norm)
    stacked = Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
    found = run_interventions(tried, stage.config, state, stacked, program.first_step)
    return InterventionTrial(first, last, tried, found, view.too_high)


def _first_step(past: RecordedRun, step: int, begin: int) -> int:
    """Return the first step to try: after a checkpoint far enough before the bad step, but not too far."""
    nearest = max(begin, past.nearest(max(begin, step - LEAST_BEFORE)))
    return max(nearest, step - MOST_BEFORE) + 1


def describe_earlier_intervention(trial: InterventionTrial, view: View, step: int, path: Path) -> list[str]:
    """Say at which earlier step the run had already diverged, if it had."""
    control = next((trial.first_bad_step(fate) for fate in trial.fates if fate.remedy.name == CONTROL), None)
    lost_at = min(view.step, control or view.step)
    if lost_at == step:
        return []
    command = f"    python launch.py doctor {shlex.quote(str(path))} --step={lost_at}"
    return [f"The run was lost before, at step {lost_at}. To look at that:", command]


def format_advice(trial: InterventionTrial, config: Config, stage: str) -> list[str]:
    """Return recommendations as sentences."""
    survivors = trial.survivors()
    helpful = [fate.remedy for fate in survivors if fate.remedy.name != CONTROL]
    sentences: list[str] = []
    if len(helpful) < len(survivors):
        sentences.append(
            "With nothing changed, side by side with the others, it came through as well: sums taken in another "
            "order were enough, so of a remedy that survived nothing is proved."
        )
    if not helpful:
        rate = min(value for remedy in trial.tried for path, value in remedy.knobs if path == "optimizer.learning_rate")
        none = f"None of these remedies would have been enough, not even a learning rate of {format_value(rate)}."
        return [*sentences, f"{none} Look at the tensor and at the batch, or try a still lower rate."]
    best = helpful[0].name
    lowest = (
        f"{', '.join(remedy.name for remedy in helpful)}. Of these, {best} has the lowest loss at step {trial.last}"
    )
    return [
        *sentences,
        f"Survived: {lowest if len(helpful) > 1 else best}. Begin again with",
        f"    {' '.join(format_flags(helpful[0], config, stage))}",
    ]


def _heading(trial: InterventionTrial) -> str:
    rule = trial.too_high
    since = f" from step {rule.since} on" if rule.since > trial.first else ""
    return (
        f"What survives steps {trial.first} to {trial.last}, from the state before them. "
        f"Too high is a loss above {rule.above:.3g}{since}: {rule.meaning}."
    )


def _print(trial: InterventionTrial, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head, justify in (("remedy", "left"), ("knobs", "left"), ("", "left"), ("last loss", "right")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for remedy in trial.tried:
        table.add_row(*_row(remedy, trial))
    console.print(table, highlight=False)


def _row(remedy: Intervention, trial: InterventionTrial) -> Sequence[str]:
    fate = trial.fate_of(remedy)
    if fate is None:
        return remedy.name, "", f"not tried: {remedy.unavailable_reason}", ""
    died = trial.first_bad_step(fate)
    knobs = ", ".join(f"{path.split('.', 1)[1]}={format_value(value)}" for path, value in remedy.knobs)
    index = -1 if died is None else died - trial.first
    loss = float(fate.losses[index])
    if died is None:
        return remedy.name, knobs, "survived", f"{loss:.4f}"
    what = "too high" if fate.is_finite[index] else "not finite"
    return remedy.name, knobs, f"{what} at step {died}", f"{loss:.4g}"
