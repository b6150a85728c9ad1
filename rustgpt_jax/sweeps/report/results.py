"""What a sweep found: its trials as its files tell, the settings that they are seeds of, and the table of them all.

Losses are compared where training ended, never on the way: ranks change while the learning rate decays.
"""

import csv
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.config.schema import FIELDS, Config, affects_result, config_hash, flatten, stages
from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps.sweep_dir import Event, Ledger, SweepDir, read_sweep_info
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.workdir.run_dir import RunDir, diff_configs, load_config

SEED = "seed"
TRAIN_LOSS, VALID_LOSS, BITS_PER_BYTE = "train/loss", "valid/loss", "valid/bits_per_byte"
FINISHED, DIVERGED, FAILED, PRUNED = "finished", "diverged", "failed", "pruned"
STOPPED, RUNNING, PLANNED, MISSING = "stopped", "running", "planned", "missing"
STATUSES = (FINISHED, DIVERGED, FAILED, PRUNED, STOPPED, RUNNING, PLANNED, MISSING)

Overrides = Mapping[str, Any]
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TrialResult:
    """One trial. Final and best losses are in the metric that the sweep compares.

    Curves are lists of finite (step, loss) pairs; the validation curve is in the sweep's `validation_metric`. Only a
    finished trial has final losses. `best_loss` is the lowest evaluation loss of the last stage, and `initial_loss` the
    training loss at step 1. Trials with equal `setting` have the same resolved config except for the seed. A missing
    trial was started, but its files are deleted or damaged.
    """

    id: str
    setting: str
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
    """The current state of a sweep: its definition, the metric compared, the knobs that vary, and its trials.

    `removed` has trials that are no longer part of the sweep after its config or sweep function was edited; they are
    not compared. `n_damaged` counts damaged lines of the ledger, which are skipped.
    """

    name: str
    command: str
    config_file: str
    metric: str
    swept: tuple[str, ...]
    trials: tuple[TrialResult, ...]
    removed: tuple[TrialResult, ...] = ()
    n_damaged: int = 0

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

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The value of each known knob by dotted path, from the overrides or the config."""
        if self.config is None:
            return self.overrides
        of_stages = (
            {f"stages.{stage.name}.{path}": value for path, value in flatten(stage.config).items()}
            for stage in stages(self.config)
        )
        return {**self.overrides, **{k: v for values in of_stages for k, v in values.items()}, **flatten(self.config)}


def read_results(folder: Path) -> Results:
    """Read a sweep from its folder. Trials with damaged files are reported as missing.

    Raises:
        UserError: The folder holds no sweep or cannot be read.
    """
    about = read_sweep_info(folder)
    ledger = Ledger(SweepDir(folder).ledger_file)
    records = {name: _read_trial(SweepDir(folder).trial(name), *known) for name, known in _planned(ledger).items()}
    current = [records[name] for name in about.get("trials", records) if name in records]
    removed = [record for name, record in records.items() if name not in about.get("trials", records)]
    swept = _swept(current)
    metric = _metric(swept, current)
    return Results(
        name=about["name"],
        command=about["command"],
        config_file=about["config_file"],
        metric=metric,
        swept=swept,
        trials=_trials(current, swept, metric),
        removed=_trials(removed, _swept([*current, *removed]), metric),
        n_damaged=ledger.n_damaged(),
    )


def group_by_setting(results: Results) -> tuple[Setting, ...]:
    """Group the trials by their resolved config without the seed, in planned order."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in results.trials:
        groups.setdefault(trial.setting, []).append(trial)
    return tuple(
        Setting(_without_seed(group[0].overrides), _without_seed(group[0].knobs), tuple(group))
        for group in groups.values()
    )


def validation_metric(metric: str) -> str:
    """Return the metric of the validation curves for a sweep that compares `metric`."""
    return VALID_LOSS if metric == TRAIN_LOSS else metric


def write_csv(results: Results, path: Path) -> None:
    """Write one row per planned trial, with no content that depends on a clock or on interruptions.

    The losses of unfinished trials are left empty. Trials that are no longer part of the sweep are written to
    removed.csv next to the file.

    Raises:
        UserError: A file is not writable.
    """
    write_atomically(path, _table(results.trials, results.swept))
    apart = path.with_name("removed.csv")
    if results.removed:
        write_atomically(apart, _table(results.removed, tuple(results.removed[0].knobs)))
    else:
        apart.unlink(missing_ok=True)


def _table(trials: Iterable[TrialResult], knobs: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    losses = ("train_loss", "valid_loss", "bits_per_byte", "best")
    writer.writerow(("trial", *knobs, "status", "steps", *losses))
    for trial in trials:
        values = [trial.train_loss, trial.valid_loss, trial.bits_per_byte, trial.best_loss]
        cells = [_cell(trial.knobs[path]) for path in knobs]
        writer.writerow([trial.id, *cells, trial.status, trial.step, *map(_cell, values)])
    # File names may not be valid Unicode.
    return text.getvalue().encode(errors="backslashreplace")


def to_key(value: Any) -> str:
    """A text that is the same for equal values, lists and mappings among them."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def is_number(value: Any) -> bool:
    """Whether a knob's value has a place on an axis: a finite number and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _without_seed(values: Overrides) -> dict[str, Any]:
    return {path: value for path, value in values.items() if path != SEED}


def _cell(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, (str, int, float)) else json.dumps(value)


def _planned(ledger: Ledger) -> dict[str, tuple[Overrides, Event]]:
    """Return the overrides and the last event of each trial, in planned order."""
    states = ledger.states()
    return {trial: (overrides, states[trial]) for trial, overrides in ledger.planned().items()}


def _read_trial(run: RunDir, overrides: Overrides, last: Event) -> _Record:
    status, error = RUNNING if last["event"] == "began" else last["event"], last.get("error")
    try:
        config, lines = load_config(run.path) if run.config_file.exists() else None, read_metrics(run.path)
        if status != PLANNED and not run.path.exists() or status == FINISHED and not lines:
            gone = run.metrics_file if run.path.exists() else run.path
            status, error = MISSING, f"{gone} was deleted"
    except UserError as damage:
        config, lines = None, []
        status, error = (status, error) if status == FAILED else (MISSING, str(damage))
    return _Record(last["trial"], overrides, status, last.get("step"), error, lines, config)


def _swept(records: Sequence[_Record]) -> tuple[str, ...]:
    """Return the knobs that vary: those that a trial overrides, and others in which the configs differ."""
    values = {
        path: {to_key(record.values.get(path, value)) for record in records}
        for path, value in _known_values(records).items()
    }
    return tuple(path for path, different in values.items() if len(different) > 1)


def _trials(records: Sequence[_Record], swept: Iterable[str], metric: str) -> tuple[TrialResult, ...]:
    known = _known_values(records)
    shown = {path: known.get(path) for path in (*swept, SEED)}
    return tuple(
        _trial(record, {path: record.values.get(path, value) for path, value in shown.items()}, metric)
        for record in records
    )


def _known_values(records: Sequence[_Record]) -> dict[str, Any]:
    """Return the default of every varying knob, from trials that do not override it, or None if none was started."""
    paths = dict.fromkeys(path for record in records for path in record.overrides)
    configs = [record.config for record in records if record.config is not None]
    for config in configs[1:]:
        changed = diff_configs(configs[0], config)
        paths |= dict.fromkeys(path for path in changed if affects_result(path) and path != "stages")
    values: dict[str, Any] = {}
    for path in (*paths, *(() if SEED in paths else (SEED,))):
        others = (record for record in records if record.config is not None and path not in record.overrides)
        values[path] = next((record.values.get(path) for record in others), None)
    return values


def _setting(record: _Record) -> str:
    """Return a string that is equal for trials whose resolved configs differ only in the seed."""
    if record.config is None:
        return to_key(_without_seed(record.overrides))
    return config_hash(replace(record.config, seed=0))


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
        setting=_setting(record),
        overrides=record.overrides,
        knobs=knobs,
        status=status,
        step=record.step if record.step is not None else max((line["step"] for line in lines), default=0),
        total_steps=stages(record.config)[-1].end_step if record.config else None,
        train_curve=_curve(lines, TRAIN_LOSS),
        valid_curve=_curve(lines, validation_metric(metric)),
        initial_loss=first[0] if first else None,
        train_loss=last[TRAIN_LOSS],
        valid_loss=last[VALID_LOSS],
        bits_per_byte=last[BITS_PER_BYTE],
        final_loss=last[metric],
        best_loss=min((loss for _, loss in evaluated), default=None),
        error=record.error,
    )


# What knobs, values, losses and settings are called where people read of them.

# Last names of knobs that say nothing without their group.
BARE_NAMES = ("name", "steps")


@dataclass(frozen=True)
class Metric:
    """The name of a loss and its unit."""

    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


METRICS = {
    VALID_LOSS: Metric("validation loss", "nats a token"),
    BITS_PER_BYTE: Metric("validation loss", "bits per byte"),
    TRAIN_LOSS: Metric("training loss", "nats a token"),
}


def knob_names(paths: Iterable[str]) -> dict[str, str]:
    """A short name for each dotted path: its last word, with the groups before it that tell it from the others."""
    paths = list(paths)
    names: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        clear = [end for end in ends if sum(("." + other).endswith("." + end) for other in paths) == 1]
        short = next((end for end in clear if end not in BARE_NAMES), path)
        # d_model and n_layers are words of the field.
        names[path] = re.sub(r"(?<=[a-z]{2})_", " ", short.removesuffix(".name").replace(".", " "))
    return names


def format_value(value: Any) -> str:
    """A knob's value in at most four significant digits, without the zeros of an exponent: 0.001, 3e-5, muon."""
    if isinstance(value, float):
        mantissa, e, exponent = f"{value:.4g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return str(value)


def format_loss(loss: float) -> str:
    """A loss, or a difference of two, with the digits that a seed leaves of it."""
    return f"{loss:.4f}"


def format_p_value(p_value: float) -> str:
    """A p-value with its sign: p = 0.012, p < 0.001."""
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def describe_setting(knobs: Mapping[str, Any]) -> str:
    """The values of some knobs in a line: 'optimizer muon, learning rate 0.003'."""
    names = knob_names([*knobs, SEED])
    return ", ".join(f"{names[path]} {format_value(value)}" for path, value in knobs.items()) or "the config as it is"


def format_rerun_command(results: Results, overrides: Overrides) -> str:
    """The command that trains one trial of a sweep again, alone, with the knobs that the sweep's own command set."""
    kept = [(path, text) for path, text in _set_by(results.command) if path not in overrides]
    own = [(path, _argument(path, value)) for path, value in overrides.items()]
    flags = (shlex.quote(f"--config.{path}={text}") for path, text in kept + own)
    return " ".join(["python launch.py train", f"--config={shlex.quote(results.config_file)}", *flags])


def _set_by(command: str) -> list[tuple[str, str]]:
    """The knobs that a command line sets, as --config.x=VALUE or --config.x VALUE, and the texts of their values."""
    words = iter(shlex.split(command))
    values: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("-") and word.lstrip("-").startswith("config."):
            path, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
            values.append((path, text if equals else next(words, "")))
    return values


def _argument(path: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and path in FIELDS and FIELDS[path].metadata.get("pattern"):
        return ",".join(value)
    return value if isinstance(value, str) else repr(value)
