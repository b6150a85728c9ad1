"""Recompute a step of a run and compare it with its record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rustgpt_jax.reproduce.compare_metrics import TIMED, describe_missing_record
from rustgpt_jax.reproduce.recorded_run import RecordedRun, StepInternals, to_metric_dict
from rustgpt_jax.training.hooks import MUST_BE_FINITE
from rustgpt_jax.workdir.code_snapshot import hash_running_code
from rustgpt_jax.workdir.environment import collect_environment, flatten_environment
from rustgpt_jax.workdir.event_log import load_launches

MOST_CHANGES_NAMED = 4
# What of an environment may change bits.
MATTERS = ("devices.", "machine.", "settings.", "variables.", "packages.jax")


@dataclass(frozen=True)
class ReplayedStep:
    """A step recomputed from the state after `from_step`, that of the nearest valid checkpoint.

    Attributes:
        metrics: Metrics by their names in metrics.jsonl.
        record: The line of that file, or None if the step was not logged.
        reasons: Why the step may differ bitwise; empty if all known conditions are the same.
        missing: Why an expected line is missing; empty if it is present, or the run does not log the step.
        log_every: The logging interval of the run.
    """

    run: str
    step: int
    stage: str
    from_step: int
    metrics: dict[str, float]
    record: dict[str, Any] | None
    reasons: tuple[str, ...]
    missing: str = ""
    log_every: int = 1

    @property
    def recorded(self) -> dict[str, float]:
        """Return the recorded metrics that are a function of the config."""
        record = self.record or {}
        return {name: value for name, value in record.items() if name.startswith("train/") and name not in TIMED}

    @property
    def unequal(self) -> list[str]:
        """Return the recorded metrics that are not bit-identical now."""
        return [name for name, value in self.recorded.items() if not _same(value, self.metrics.get(name))]

    @property
    def lacking(self) -> list[str]:
        """Return the metrics that are missing from the recorded line of the step."""
        return [name for name in self.metrics if self.record is not None and name not in self.record]

    @property
    def is_same(self) -> bool:
        """Whether the step matches its record, or was not meant to be recorded."""
        return not (self.unequal or self.lacking or self.missing)

    @property
    def is_finite(self) -> bool:
        """Whether the loss, the gradient and the update are finite."""
        return not is_fault(self.metrics)

    @property
    def verdict(self) -> str:
        """Say in a sentence whether the step matches its record."""
        if self.missing:
            return f"There is nothing to compare this with: metrics.jsonl {self.missing}."
        if self.record is None:
            every = f"config.logging.log_every={self.log_every}"
            return f"The run does not record step {self.step} ({every}): there is nothing to compare this with."
        if self.lacking and not self.unequal:
            names = ", ".join(name.removeprefix("train/") for name in self.lacking)
            return f"The recorded numbers are the same, but metrics.jsonl lacks numbers of this step: {names}."
        if not self.unequal:
            return f"All {len(self.recorded)} recorded numbers of the step are the same, bit for bit."
        names = ", ".join(name.removeprefix("train/") for name in self.unequal)
        if not self.reasons:
            return f"Not the recorded bits: {names}. The code is that of the run, and so is all it is known to run in."
        return f"Not the recorded bits: {names}. Perhaps because {'; '.join(self.reasons)}."


def is_fault(metrics: Mapping[str, Any]) -> bool:
    """Whether metrics, or a line of their record, have a loss, gradient or update that is not finite."""
    return not all(math.isfinite(metrics.get(f"train/{name}", 0.0)) for name in MUST_BE_FINITE)


def replay_one_step(past: RecordedRun, step: int, has_taps: bool) -> tuple[ReplayedStep, StepInternals | None]:
    """Recompute a step of a run, with its intermediates if `has_taps`. Raises UserError for an unknown step."""
    past.check(step)
    state = past.saved_state(step - 1)
    from_step = int(state.step)
    state = past.advanced(state, step - 1)
    inside = past.look_into(state) if has_taps else None
    _, (metrics,) = past.train(state, 1)
    run, stage, record = past.folder.path.resolve().name, past.data_of(step).stage, past.record(step)
    missing = "" if record is not None else describe_missing_record(past.folder, stage, step)
    if record is None and not missing and stage.is_logged(step):
        missing = f"has no line of step {step}"
    again = ReplayedStep(
        run=run,
        step=step,
        stage=stage.name,
        from_step=from_step,
        metrics=to_metric_dict(metrics),
        record=record,
        reasons=_reasons(past, step),
        missing=missing,
        log_every=stage.config.logging.log_every,
    )
    return again, inside


def _same(recorded: float, now: float | None) -> bool:
    if now is None:
        return False
    return recorded == now or (math.isnan(recorded) and math.isnan(now))


def _reasons(past: RecordedRun, step: int) -> tuple[str, ...]:
    launch = next((launch for launch in load_launches(past.folder)[::-1] if launch.step < step), None)
    if launch is None:
        return ("it was made by other code or elsewhere, of which there is no record",)
    found: list[str] = []
    code = hash_running_code(past.folder)
    if launch.code != code:
        found.append(f"the code was {launch.code} and is {code}")
    if launch.mode == "fused":
        found.append(f"it was trained fused with {launch.width - 1} others, whose sums are taken in another order")
    there, here = flatten_environment(launch.environment), flatten_environment(collect_environment())
    changed = [name for name in there | here if name.startswith(MATTERS) and there.get(name) != here.get(name)]
    found += [f"{name} was {there.get(name)!r} and is {here.get(name)!r}" for name in changed[:MOST_CHANGES_NAMED]]
    return tuple(found)
