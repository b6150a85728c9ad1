"""What a sweep found: its trials as its files tell, the settings that they are seeds of, and the table of them all.

Losses are compared where training ended, never on the way: ranks change while the learning rate decays.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rustgpt_jax.config import Config, flatten, stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.runs.folder import RunFolder, load_config, write_atomically
from rustgpt_jax.runs.metrics import read_metrics
from rustgpt_jax.sweeps.folder import SweepFolder, read_about
from rustgpt_jax.sweeps.ledger import Event, Ledger

SEED = "seed"
TRAIN_LOSS, VALID_LOSS, BITS_PER_BYTE = "train/loss", "valid/loss", "valid/bits_per_byte"
FINISHED, DIVERGED, FAILED, PRUNED = "finished", "diverged", "failed", "pruned"
STOPPED, RUNNING, PLANNED = "stopped", "running", "planned"
STATUSES = (FINISHED, DIVERGED, FAILED, PRUNED, STOPPED, RUNNING, PLANNED)

Overrides = Mapping[str, Any]
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TrialResult:
    """One trial. The validation curve, the final and the best loss are in the metric that the sweep compares.

    Curves are (step, loss) pairs, the finite ones. Only a finished trial has final losses. `best_loss` is the lowest
    of the last stage's evaluations, `initial_loss` the training loss at step 1.
    """

    id: str
    overrides: Overrides
    knobs: Overrides
    status: str
    step: int
    total_steps: int | None
    train_curve: Curve
    valid_curve: Curve
    initial_loss: float | None
    train_loss: float | None
    valid_loss: float | None
    bits_per_byte: float | None
    final_loss: float | None
    best_loss: float | None
    error: str | None

    @property
    def seed(self) -> Any:
        """The trial's seed, None where no trial of the sweep says it."""
        return self.knobs.get(SEED)


@dataclass(frozen=True)
class Setting:
    """The trials that differ only in their seed."""

    overrides: Overrides
    knobs: Overrides
    trials: tuple[TrialResult, ...]

    @property
    def losses(self) -> dict[Any, float]:
        """The final losses by seed."""
        return {trial.seed: trial.final_loss for trial in self.trials if trial.final_loss is not None}

    @property
    def n_diverged(self) -> int:
        """How many of the trials diverged."""
        return sum(trial.status == DIVERGED for trial in self.trials)

    @property
    def mean_loss(self) -> float:
        """The mean of the final losses, infinite where there is none."""
        losses = self.losses.values()
        return sum(losses) / len(losses) if losses else math.inf


@dataclass(frozen=True)
class Results:
    """A sweep as it stands: what was asked, what is compared, the knobs that vary, and the trials as planned."""

    name: str
    command: str
    config_file: str
    metric: str
    swept: tuple[str, ...]
    trials: tuple[TrialResult, ...]

    @property
    def knobs(self) -> tuple[str, ...]:
        """The swept knobs but the seed."""
        return tuple(path for path in self.swept if path != SEED)

    @cached_property
    def finished(self) -> tuple[TrialResult, ...]:
        """The trials that have a final loss."""
        return tuple(trial for trial in self.trials if trial.final_loss is not None)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials there are of each status that occurs."""
        counted = Counter(trial.status for trial in self.trials)
        return {status: counted[status] for status in STATUSES if counted[status]}


@dataclass(frozen=True)
class _Record:
    """A trial as read: what the ledger says of it, its lines of metrics and its config, if it has begun."""

    id: str
    overrides: Overrides
    status: str
    step: int | None
    error: str | None
    lines: list[dict[str, Any]]
    config: Config | None


def read_results(folder: Path) -> Results:
    """Read a sweep from its folder. Raises UserError if the folder holds none, or a damaged file."""
    about = _read_about(folder)
    ledger = _read_ledger(folder)
    records = [_read_trial(SweepFolder(folder).trial(trial), trial, events) for trial, events in ledger.items()]
    known = _known_values(records)
    knobs = [{path: record.overrides.get(path, known.get(path)) for path in known} for record in records]
    swept = tuple(path for path in known if len({key_of(values[path]) for values in knobs}) > 1)
    metric = _metric(swept, records)
    trials = [
        _trial(record, {path: values[path] for path in known if path in swept or path == SEED}, metric)
        for record, values in zip(records, knobs, strict=True)
    ]
    return Results(about["name"], about["command"], about["config_file"], metric, swept, tuple(trials))


def settings(results: Results) -> tuple[Setting, ...]:
    """The trials grouped by all that their overrides say but the seed, in planned order."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in results.trials:
        groups.setdefault(key_of(_without_seed(trial.overrides)), []).append(trial)
    return tuple(
        Setting(_without_seed(group[0].overrides), _without_seed(group[0].knobs), tuple(group))
        for group in groups.values()
    )


def write_csv(results: Results, path: Path) -> None:
    """Write the trials as planned, one a row, with nothing in it that a clock or an interruption could change.

    Losses of trials that did not finish are left empty. Raises UserError if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    losses = ("train_loss", "valid_loss", "bits_per_byte", "best")
    writer.writerow(("trial", *results.swept, "status", "steps", *losses))
    for trial in results.trials:
        values = [trial.train_loss, trial.valid_loss, trial.bits_per_byte, trial.best_loss]
        knobs = [_cell(trial.knobs[path]) for path in results.swept]
        writer.writerow([trial.id, *knobs, trial.status, trial.step, *map(_cell, values)])
    write_atomically(path, text.getvalue())


def key_of(value: Any) -> str:
    """A text that is the same for equal values, lists and mappings among them."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def is_number(value: Any) -> bool:
    """Whether a knob's value has a place on an axis: a finite number and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _without_seed(values: Overrides) -> dict[str, Any]:
    return {path: value for path, value in values.items() if path != SEED}


def _cell(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, (str, int, float)) else json.dumps(value)


def _read_about(folder: Path) -> dict[str, Any]:
    about = read_about(folder)
    missing = {"name", "command", "config_file"} - about.keys()
    if missing:
        raise UserError(f"{SweepFolder(folder).about_file} is damaged: it has no {sorted(missing)[0]!r}.")
    return about


def _read_ledger(folder: Path) -> dict[str, list[Event]]:
    """The events of each trial in their order, trials in the order in which they were planned."""
    events: dict[str, list[Event]] = {}
    for event in Ledger(SweepFolder(folder).ledger_file).events():
        if event["event"] == "planned" or event["trial"] in events:
            events.setdefault(event["trial"], []).append(event)
    return events


def _read_trial(run: RunFolder, trial: str, events: list[Event]) -> _Record:
    last = [event for event in events if event["event"] != "queued"][-1]
    status = RUNNING if last["event"] == "began" else last["event"]
    config = load_config(run.path) if run.config_file.exists() else None
    lines = read_metrics(run.path)
    return _Record(trial, events[0]["overrides"], status, last.get("step"), last.get("error"), lines, config)


def _known_values(records: Iterable[_Record]) -> dict[str, Any]:
    """Every overridden knob, with the value it has in the trials that leave it alone, None where none of them began."""
    records = list(records)
    paths = dict.fromkeys(path for record in records for path in record.overrides)
    values: dict[str, Any] = {}
    for path in (*paths, *(() if SEED in paths else (SEED,))):
        others = (record for record in records if record.config is not None and path not in record.overrides)
        values[path] = next((_value(record.config, path) for record in others if record.config), None)
    return values


def _value(config: Config, path: str) -> Any:
    _, *of_stage = path.split(".", 2) if path.startswith("stages.") else (path,)
    if not of_stage:
        return flatten(config).get(path)
    name, knob = of_stage
    whole = {stage.name: stage.config for stage in stages(config)}
    return flatten(whole[name]).get(knob) if name in whole else None


def _metric(swept: Iterable[str], records: Iterable[_Record]) -> str:
    """What is compared: losses a token of different tokenizers or texts do not compare, bits per byte do."""
    groups = {path.split(".")[2 if path.startswith("stages.") else 0] for path in swept}
    wanted = BITS_PER_BYTE if groups & {"tokenizer", "data"} else VALID_LOSS
    finished = [record for record in records if record.status == FINISHED]
    return wanted if all(_last(record.lines, wanted) is not None for record in finished) else TRAIN_LOSS


def _last(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(list(lines)) if name in line), None)


def _curve(lines: Iterable[Mapping[str, Any]], name: str) -> Curve:
    return tuple((line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name]))


def _trial(record: _Record, knobs: Overrides, metric: str) -> TrialResult:
    lines, status = record.lines, record.status
    last = {name: _last(lines, name) for name in (TRAIN_LOSS, VALID_LOSS, BITS_PER_BYTE)}
    compared = last[metric]
    # A loss may leave the finite numbers between the last step and the evaluation after it.
    if status == FINISHED and compared is not None and not math.isfinite(compared):
        status = DIVERGED
    if status != FINISHED:
        last = dict.fromkeys(last)
    of_last_stage = [line for line in lines if line.get("stage") == lines[-1].get("stage")]
    evaluated = _curve(of_last_stage, metric) if metric != TRAIN_LOSS else ()
    first = [loss for step, loss in _curve(lines, TRAIN_LOSS) if step == 1]
    return TrialResult(
        id=record.id,
        overrides=record.overrides,
        knobs=knobs,
        status=status,
        step=record.step if record.step is not None else max((line["step"] for line in lines), default=0),
        total_steps=stages(record.config)[-1].end_step if record.config else None,
        train_curve=_curve(lines, TRAIN_LOSS),
        valid_curve=_curve(lines, metric) if metric != TRAIN_LOSS else (),
        initial_loss=first[0] if first else None,
        train_loss=last[TRAIN_LOSS],
        valid_loss=last[VALID_LOSS],
        bits_per_byte=last[BITS_PER_BYTE],
        final_loss=last[metric],
        best_loss=min((loss for _, loss in evaluated), default=None),
        error=record.error,
    )
