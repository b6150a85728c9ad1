"""`doctor`: the step that went wrong is made again, its first bad tensor named, and remedies are tried before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from rustgpt_jax.config import Config
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model.transformer import vocabulary
from rustgpt_jax.reproduce import findings
from rustgpt_jax.reproduce.again import Again, is_fault, make_again
from rustgpt_jax.reproduce.past import Inside, Past
from rustgpt_jax.reproduce.remedies import CONTROL, Fate, Remedy, fates, flags, remedies
from rustgpt_jax.reproduce.replay import write_page
from rustgpt_jax.reproduce.suspects import LOSS, NORM, Suspect, suspect
from rustgpt_jax.runs.formatting import printable
from rustgpt_jax.sweeps.report.words import value_text

# Remedies begin at a checkpoint at least so many steps before the bad one, and at most so many, and go on after it.
LEAST_BEFORE, MOST_BEFORE, AFTER = 10, 200, 20
# The calm step that a spike is held against.
CALM_BEFORE = 5
# Recorded steps whose median is the usual loss and gradient norm.
CALM_RECORDS = 5
# How far from calm to spike a loss must come to be called one.
SPIKE_SHARE = 0.5
# A loss this many times that of a model that knows nothing is a run that has left its way.
LOST_FACTOR = 1.5


@dataclass(frozen=True)
class Trial:
    """Remedies tried over the steps `first` to `last`, and the fate of each that could be.

    A loss that reaches `ceiling` in step `since` or later is too high.
    """

    first: int
    last: int
    tried: list[Remedy]
    fates: list[Fate]
    ceiling: float
    since: int = 1

    def died_at(self, fate: Fate) -> int | None:
        """The step at which a run would have ended with a remedy, None if it came through."""
        index = fate.died_at(self.ceiling, max(0, self.since - self.first))
        return None if index is None else self.first + index

    def fate_of(self, remedy: Remedy) -> Fate | None:
        """The fate of a remedy, None if it could not be tried."""
        return next((fate for fate in self.fates if fate.remedy == remedy), None)

    def survivors(self) -> list[Fate]:
        """Those that came through, the lowest loss at the end first."""
        alive = [fate for fate in self.fates if self.died_at(fate) is None]
        return sorted(alive, key=lambda fate: float(fate.losses[-1]))


def doctor(path: Path, step: int | None, console: Console) -> None:
    """Say what went wrong in a run, at a step or at its worst, and what would have helped.

    Writes RUN/replay/step_K.html. Raises UserError as `Past` and `suspect` do.
    """

    def say(text: str) -> None:
        console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    with Past(path, console) as past:
        found = suspect(past, step)
        if found.rewind is not None:
            past.go_before(found.rewind)
        say(f"Step {found.step} of {path} is looked at, because {found.why}.")
        again, inside = make_again(past, found.step, has_taps=True)
        assert inside is not None
        say(again.verdict)
        for sentence in diagnosis(past, found, again, inside):
            say(sentence)
        say(f"Each tensor of the step: {write_page(path, again, inside.tensors)}")
        view = View.of(past, again)
        if view is None:
            say("Its loss is not above those before it: there is nothing to be remedied.")
            return
        if view.lost_at is not None:
            say(f"The run was lost before: from step {view.lost_at} on its loss is {view.ceiling:.3g} or more.")
        trial = try_remedies(past, again, view)
        _print(trial, console)
        for sentence in advice(trial, past.config, again.stage):
            say(sentence)


def diagnosis(past: Past, found: Suspect, again: Again, inside: Inside) -> list[str]:
    """What the step tells of its own fault."""
    loss, norm = again.metrics[LOSS], again.metrics[NORM]
    if found.is_fault and again.is_finite:
        return [
            f"Made again, the step is sound: loss {loss:.4g}, gradient norm {norm:.4g}. What went wrong lies neither "
            "in the data nor in the numbers, but in the machine, or in code that is not that of the run."
        ]
    sentences = [f"Its loss is {loss:.4g}, its gradient norm {norm:.4g}."]
    if not again.is_finite:
        sentences.append(findings.of_first_bad(inside.tensors))
    else:
        calm_step = max(past.data_of(found.step).stage.first_step + 1, found.step - CALM_BEFORE)
        if calm_step < found.step:
            calm = past.look_into(past.state_at(calm_step - 1))
            sentences += findings.of_growth(inside.tensors, calm.tensors, calm_step)
    return [*sentences, findings.of_batch(inside, past.material.tokenizer)]


@dataclass(frozen=True)
class View:
    """A bad step in its record.

    ceiling, since: the loss that is too much, and the step from which on that is so. lost_at: the step from which on
    the run was lost before this one. calm_norm: of the gradients while all was well, 0 if that is not known.
    """

    ceiling: float
    since: int
    lost_at: int | None
    calm_norm: float

    @staticmethod
    def of(past: Past, again: Again) -> "View | None":
        """The view of a step from what was recorded before it; None if its loss is finite and not above those."""
        lines = [line for line in past.records() if line["step"] < again.step and not is_fault(line)]
        losses, loss = [line[LOSS] for line in lines], again.metrics[LOSS]
        ceiling = LOST_FACTOR * max(math.log(vocabulary(past.material.whole.model)), *losses[:1], 0.0)
        sound = [line for line in lines if line[LOSS] < ceiling]
        lost = [line["step"] for line in lines if not sound or line["step"] > sound[-1]["step"]]
        norms = [line[NORM] for line in sound[-CALM_RECORDS:]]
        view = View(ceiling, 1, lost[0] if lost else None, median(norms) if norms else 0.0)
        before = losses[-CALM_RECORDS:]
        if lost or not before or not again.is_finite:
            return view
        # A spike is no more than some loss of long before, when there was much to be learned.
        spike = median(before) + SPIKE_SHARE * (loss - median(before))
        is_spike = loss > max(before)
        return replace(view, ceiling=spike, since=lines[-CALM_RECORDS:][0]["step"]) if is_spike else None


def try_remedies(past: Past, again: Again, view: View) -> Trial:
    """Every remedy from a state before the step, on the batches that the run read, to some steps after it."""
    stage, program = past.data_of(again.step).stage, past.program_of(again.step)
    first, last = (
        _first_step(past, view.lost_at or again.step, stage.first_step),
        min(again.step + AFTER, stage.end_step),
    )
    state = past.state_at(first - 1)
    batches = past.batches(state, last - first + 1)
    tried = remedies(stage.config, view.calm_norm)
    stacked = Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
    return Trial(
        first, last, tried, fates(tried, stage.config, state, stacked, program.first_step), view.ceiling, view.since
    )


def _first_step(past: Past, step: int, begin: int) -> int:
    """The first step that is tried: after a checkpoint that lies far enough before the bad one, but not too far."""
    nearest = max(begin, past.nearest(max(begin, step - LEAST_BEFORE)))
    return max(nearest, step - MOST_BEFORE) + 1


def advice(trial: Trial, config: Config, stage: str) -> list[str]:
    """What to do, in sentences."""
    survivors = trial.survivors()
    helpful = [fate for fate in survivors if fate.remedy.name != CONTROL]
    sentences: list[str] = []
    if any(fate.remedy.name == CONTROL for fate in survivors):
        sentences.append(
            "With nothing changed, side by side with the others, it came through as well: sums taken in another "
            "order were enough, so of a remedy that survived nothing is proved."
        )
    if not helpful:
        return [*sentences, "None of the remedies would have been enough. Look at the tensor and at the batch."]
    best = helpful[0]
    named = ", ".join(fate.remedy.name for fate in helpful)
    return [
        *sentences,
        f"Survived: {named}. Of these, {best.remedy.name} has the lowest loss at step {trial.last}. Begin again with",
        f"    {' '.join(flags(best.remedy, config, stage))}",
    ]


def _print(trial: Trial, console: Console) -> None:
    console.print(f"What survives steps {trial.first} to {trial.last}, from the state before them:", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head, justify in (("remedy", "left"), ("knobs", "left"), ("", "left"), ("last loss", "right")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for remedy in trial.tried:
        table.add_row(*_row(remedy, trial))
    console.print(table, highlight=False)


def _row(remedy: Remedy, trial: Trial) -> Sequence[str]:
    fate = trial.fate_of(remedy)
    if fate is None:
        return remedy.name, "", f"not tried: {remedy.hindrance}", ""
    died = trial.died_at(fate)
    knobs = ", ".join(f"{path.split('.', 1)[1]}={value_text(value)}" for path, value in remedy.knobs)
    index = -1 if died is None else died - trial.first
    loss = float(fate.losses[index])
    if died is None:
        return remedy.name, knobs, "survived", f"{loss:.4f}"
    is_finite = math.isfinite(loss) and math.isfinite(float(fate.gradient_norms[index]))
    what = "too high" if is_finite else "not finite"
    return remedy.name, knobs, f"{what} at step {died}", f"{loss:.4g}"
