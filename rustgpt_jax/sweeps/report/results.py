"""Results of a sweep, read from its folder, and the names and formats of its knobs and losses.

Only final losses are compared, because ranks change while the learning rate decays.
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
from rustgpt_jax.config.validation import is_number
from rustgpt_jax.errors import UserError, program_name
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

    Curves are lists of finite (step, loss) pairs. Only a finished trial has final losses. `best_loss` is the lowest
    evaluation loss of the last stage, and `initial_loss` the training loss at step 1. Trials with equal `setting` have
    the same resolved config except for the seed. A missing trial was started, but its files are deleted or damaged.
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
        """The trial's seed, or None if it is unknown."""
        return self.knobs.get(SEED)


@dataclass(frozen=True)
class Setting:
    """Trials that differ only in their seed."""

    overrides: Overrides
    knobs: Overrides
    trials: tuple[TrialResult, ...]

    @property
    def losses(self) -> dict[Any, float]:
        """The final losses by seed."""
        return {trial.seed: trial.final_loss for trial in self.trials if trial.final_loss is not None}

    @property
    def n_diverged(self) -> int:
        """The number of diverged trials."""
        return sum(trial.status == DIVERGED for trial in self.trials)

    @property
    def mean_loss(self) -> float:
        """The mean of the final losses, infinite if there are none."""
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
        """The swept knobs except for the seed."""
        return tuple(path for path in self.swept if path != SEED)

    @cached_property
    def finished(self) -> tuple[TrialResult, ...]:
        """The trials with a final loss."""
        return tuple(trial for trial in self.trials if trial.final_loss is not None)

    @property
    def counts(self) -> dict[str, int]:
        """The number of trials by status."""
        counted = Counter(trial.status for trial in self.trials)
        return {status: counted[status] for status in STATUSES if counted[status]}


@dataclass(frozen=True)
class _Record:
    """A trial as read: its state in the ledger, its metrics, and its config if it has started."""

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
    """Read the results of a sweep from its folder. Trials with damaged files are reported as missing.

    Raises:
        UserError: The folder holds no sweep or cannot be read.
    """
    about = read_sweep_info(folder)
    ledger = Ledger(SweepDir(folder).ledger_file)
    states = ledger.states()
    records = {
        name: _read_trial(SweepDir(folder).trial(name), overrides, states[name])
        for name, overrides in ledger.planned().items()
    }
    current = [records[name] for name in about.get("trials", records) if name in records]
    removed = [record for name, record in records.items() if name not in about.get("trials", records)]
    swept = _find_swept(current)
    metric = _select_metric(swept, current)
    return Results(
        name=about["name"],
        command=about["command"],
        config_file=about["config_file"],
        metric=metric,
        swept=swept,
        trials=_make_results(current, swept, metric),
        removed=_make_results(removed, _find_swept([*current, *removed]), metric),
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


def get_validation_metric(metric: str) -> str:
    """Return the metric of the validation curves for a sweep that compares `metric`."""
    return VALID_LOSS if metric == TRAIN_LOSS else metric


def write_csv(results: Results, path: Path) -> None:
    """Write one row per planned trial. The content does not depend on timing or interruptions.

    The losses of unfinished trials are left empty. Trials that are no longer part of the sweep are written to
    removed.csv next to the file.

    Raises:
        UserError: A file is not writable.
    """
    write_atomically(path, _to_csv(results.trials, results.swept))
    removed_file = path.with_name("removed.csv")
    if results.removed:
        write_atomically(removed_file, _to_csv(results.removed, tuple(results.removed[0].knobs)))
    else:
        removed_file.unlink(missing_ok=True)


def _to_csv(trials: Iterable[TrialResult], knobs: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("trial", *knobs, "status", "steps", "train_loss", "valid_loss", "bits_per_byte", "best"))
    for trial in trials:
        losses = trial.train_loss, trial.valid_loss, trial.bits_per_byte, trial.best_loss
        values = trial.id, *(trial.knobs[path] for path in knobs), trial.status, trial.step, *losses
        # The writer writes None as an empty cell.
        writer.writerow(
            [value if isinstance(value, str | int | float | None) else json.dumps(value) for value in values]
        )
    # File names may not be valid Unicode.
    return text.getvalue().encode(errors="backslashreplace")


def to_key(value: Any) -> str:
    """Return a string that is the same for equal values, including lists and mappings."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def _without_seed(values: Overrides) -> dict[str, Any]:
    return {path: value for path, value in values.items() if path != SEED}


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


def _find_swept(records: Sequence[_Record]) -> tuple[str, ...]:
    """Return the knobs that vary: those that a trial overrides, and others in which the configs differ."""
    values = {
        path: {to_key(record.values.get(path, value)) for record in records}
        for path, value in _find_defaults(records).items()
    }
    return tuple(path for path, different in values.items() if len(different) > 1)


def _make_results(records: Sequence[_Record], swept: Iterable[str], metric: str) -> tuple[TrialResult, ...]:
    known = _find_defaults(records)
    shown = {path: known.get(path) for path in (*swept, SEED)}
    return tuple(
        _make_result(record, {path: record.values.get(path, value) for path, value in shown.items()}, metric)
        for record in records
    )


def _find_defaults(records: Sequence[_Record]) -> dict[str, Any]:
    """Return the default of every varying knob, taken from trials that do not override it; None if none has started."""
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


def _select_metric(swept: Iterable[str], records: Iterable[_Record]) -> str:
    """Return the metric to compare; losses per token are not comparable between tokenizers or corpora."""
    groups = {path.split(".")[2 if path.startswith("stages.") else 0] for path in swept}
    wanted = BITS_PER_BYTE if groups & {"tokenizer", "data"} else VALID_LOSS
    finished = [record for record in records if record.status == FINISHED]
    return wanted if all(_last_value(record.lines, wanted) is not None for record in finished) else TRAIN_LOSS


def _last_value(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(list(lines)) if name in line), None)


def _extract_curve(lines: Iterable[Mapping[str, Any]], name: str) -> Curve:
    return tuple((line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name]))


def _make_result(record: _Record, knobs: Overrides, metric: str) -> TrialResult:
    lines, status, config = record.lines, record.status, record.config
    last = {name: _last_value(lines, name) for name in (TRAIN_LOSS, VALID_LOSS, BITS_PER_BYTE)}
    compared = last[metric]
    # The evaluation after the last step may be infinite or NaN.
    if status == FINISHED and compared is not None and not math.isfinite(compared):
        status = DIVERGED
    if status != FINISHED:
        last = dict.fromkeys(last)
    of_last_stage = [line for line in lines if line.get("stage") == lines[-1].get("stage")]
    evaluated = _extract_curve(of_last_stage, metric) if metric != TRAIN_LOSS else ()
    first = [loss for step, loss in _extract_curve(lines, TRAIN_LOSS) if step == 1]
    return TrialResult(
        id=record.id,
        setting=config_hash(replace(config, seed=0)) if config else to_key(_without_seed(record.overrides)),
        overrides=record.overrides,
        knobs=knobs,
        status=status,
        step=record.step if record.step is not None else max((line["step"] for line in lines), default=0),
        total_steps=stages(config)[-1].end_step if config else None,
        train_curve=_extract_curve(lines, TRAIN_LOSS),
        valid_curve=_extract_curve(lines, get_validation_metric(metric)),
        initial_loss=first[0] if first else None,
        train_loss=last[TRAIN_LOSS],
        valid_loss=last[VALID_LOSS],
        bits_per_byte=last[BITS_PER_BYTE],
        final_loss=last[metric],
        best_loss=min((loss for _, loss in evaluated), default=None),
        error=record.error,
    )


# Last parts of paths that are ambiguous without their group.
BARE_NAMES = ("name", "steps")


@dataclass(frozen=True)
class Metric:
    """The name of a loss and its unit."""

    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


METRICS = {
    VALID_LOSS: Metric("validation loss", "nats per token"),
    BITS_PER_BYTE: Metric("validation loss", "bits per byte"),
    TRAIN_LOSS: Metric("training loss", "nats per token"),
}


def get_knob_names(paths: Iterable[str]) -> dict[str, str]:
    """Return a short name for each path: its last part, and preceding ones as needed to distinguish the paths."""
    paths = list(paths)
    names: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        clear = [end for end in ends if sum(("." + other).endswith("." + end) for other in paths) == 1]
        short = next((end for end in clear if end not in BARE_NAMES), path)
        # Keep common names such as d_model and n_layers.
        names[path] = re.sub(r"(?<=[a-z]{2})_", " ", short.removesuffix(".name").replace(".", " "))
    return names


def format_value(value: Any) -> str:
    """Format a knob's value with at most four significant digits and a short exponent: 0.001, 3e-5, muon."""
    if isinstance(value, float):
        mantissa, e, exponent = f"{value:.4g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return str(value)


def format_loss(loss: float) -> str:
    """Format a loss or a difference of losses; further digits only reflect the noise between seeds."""
    return f"{loss:.4f}"


def format_p_value(p_value: float) -> str:
    """Format a p-value: p = 0.012, p < 0.001."""
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def describe_setting(knobs: Mapping[str, Any]) -> str:
    """Describe a setting's knob values: 'optimizer muon, learning rate 0.003'."""
    names = get_knob_names([*knobs, SEED])
    return ", ".join(f"{names[path]} {format_value(value)}" for path, value in knobs.items()) or "the base config"


def format_rerun_command(results: Results, overrides: Overrides) -> str:
    """Return the command that trains one trial alone, including the overrides of the sweep's command.

    For a sweep that a Python program defined, return the call of `rustgpt_jax.train`.
    """
    if not results.config_file:
        return f"rustgpt_jax.train(config, workdir, {dict(overrides)!r})"
    kept = [(path, text) for path, text in _parse_overrides(results.command) if path not in overrides]
    own = [(path, _to_argument(path, value)) for path, value in overrides.items()]
    flags = (shlex.quote(f"--config.{path}={text}") for path, text in kept + own)
    return " ".join([f"{program_name()} train", f"--config={shlex.quote(results.config_file)}", *flags])


def _parse_overrides(command: str) -> list[tuple[str, str]]:
    """Return the paths and values of a command's flags --config.x=VALUE or --config.x VALUE."""
    words = iter(shlex.split(command))
    values: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("-") and word.lstrip("-").startswith("config."):
            path, equals, text = word.lstrip("-").removeprefix("config.").partition("=")
            values.append((path, text if equals else next(words, "")))
    return values


def _to_argument(path: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and path in FIELDS and FIELDS[path].metadata.get("pattern"):
        return ",".join(value)
    return value if isinstance(value, str) else repr(value)
