"""Checks of a config before anything is compiled: components exist, and an existing run can continue with it."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import STEPS, Config, EarlierConfig, affects_result, can_change_on_resume, stages
from rustgpt_jax.data.datasets import CORPORA
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import interfaces
from rustgpt_jax.model.kernels import ANY_DEVICE
from rustgpt_jax.model.kernels.verify import select_kernels
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS, ROPE_SCALINGS
from rustgpt_jax.registry import lookup
from rustgpt_jax.tokenizers import IMPORTED, TOKENIZERS
from rustgpt_jax.tracking.trackers import check_trackers
from rustgpt_jax.training.optimizers import OPTIMIZERS, SCHEDULES, schedule_multiplier
from rustgpt_jax.workdir.run_dir import RunDir, diff_configs, load_config, load_earlier

# Knobs that name components of the model, with their registry and interface.
MODEL_COMPONENTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "mixers": (MIXERS, interfaces.MIXER),
    "feedforwards": (FEEDFORWARDS, interfaces.FEEDFORWARD),
    "positions": (POSITIONS, interfaces.POSITION),
    "norm": (NORMS, interfaces.NORM),
}


def validate_components(config: Config) -> None:
    """Check that every component named in a config exists and has the right interface.

    Raises:
        UserError: A name is unknown, a component has another interface, or no device supports the attention kernel.
    """
    model = config.model
    if config.tokenizer.name != IMPORTED:
        _check_function(TOKENIZERS, config.tokenizer.name, "config.tokenizer.name", "texts", "vocab_size")
    _check_function(ROPE_SCALINGS, model.rope.scaling, "config.model.rope.scaling", "frequencies", "config")
    for knob, (table, kind) in MODEL_COMPONENTS.items():
        named = getattr(model, knob)
        for name in (named,) if isinstance(named, str) else named:
            if kind not in interfaces.component_kinds(lookup(table, name, f"config.model.{knob}")):
                raise UserError(f"config.model.{knob}={name!r} is not {kind}: {interfaces.DESCRIPTIONS[kind]}.")
    _check_function(OPTIMIZERS, config.optimizer.name, "config.optimizer.name", "config", "rate")
    check_trackers(config.logging.trackers)
    for stage in stages(config):
        _check_function(CORPORA, stage.config.data.corpus, "config.data.corpus", "config")
        _check_function(SCHEDULES, stage.config.schedule.name, "config.schedule.name", "step", "steps", "schedule")
        select_kernels(stage.config.model, ANY_DEVICE, stage.config.seq_len)


def _check_function(table: Mapping[str, Any], name: str, knob: str, *arguments: str) -> None:
    """Check that a component exists and can be called with these arguments."""
    try:
        inspect.signature(lookup(table, name, knob)).bind(*arguments)
    except (TypeError, ValueError):  # Not callable, a different signature, or a built-in without a signature.
        raise UserError(f"{knob}={name!r} is not a function of ({', '.join(arguments)}).") from None


# Changes of the config of an existing run. The run folder stores each earlier config with its last step, so that a
# rerun applies the same changes at the same steps.


class ResumePlan(NamedTuple):
    """The config to resume a run with, its earlier configs, and messages about changes."""

    config: Config
    earlier: tuple[EarlierConfig, ...] = ()
    messages: tuple[str, ...] = ()


def plan_resume(path: Path, config: Config, extends: bool = False) -> ResumePlan:
    """Return how a run continues with a config. Nothing is written.

    Args:
        path: The run folder, which may not exist.
        config: The requested config.
        extends: Whether to allow more steps than the learning-rate schedule of the run was made for.

    Raises:
        UserError: The run cannot continue with this config, or `extends` has no effect.
    """
    run = RunDir(path)
    if not run.config_file.exists():
        if extends:
            raise UserError(f"--extend: {path} has no run to extend.")
        return ResumePlan(config)
    stored, earlier = load_config(path), load_earlier(path)
    changed = {knob: values for knob, values in diff_configs(stored, config).items() if affects_result(knob)}
    fixed = {knob: values for knob, values in changed.items() if not can_change_on_resume(knob)}
    if fixed:
        shown = "; ".join(
            f"{knob} is {there!r} in the run and {here!r} in this config" for knob, (there, here) in fixed.items()
        )
        raise UserError(f"{path} has a run with another config: {shown}. Choose another --run folder.")
    n_done = max(run.saved_steps, default=0)
    # A command that was stopped may be repeated unchanged, with --extend.
    was_extended = any(stages(each.config)[-1].end_step < stages(stored)[-1].end_step for each in earlier)
    extends = extends and bool(changed or not was_extended)
    messages = _check_steps(path, stored, config, changed, n_done, extends)
    if not changed or stages(config)[-1].end_step == n_done:
        return ResumePlan(stored if changed else config, earlier)
    # Steps after the last checkpoint are trained again. A config that no step was trained with stays in the list.
    earlier = tuple(each._replace(until=min(each.until, n_done)) for each in earlier)
    values = "; ".join(f"{knob} is {here!r} instead of {there!r}" for knob, (there, here) in changed.items())
    if any(knob.endswith("logging.eval_batches") for knob in changed):
        message = (
            "Validation losses before that step are from other batches, so they do not count for the best checkpoint."
        )
        messages = (*messages, message)
    if any(knob.endswith("logging.best_metric") for knob in changed):
        messages = (*messages, "The best checkpoint is chosen among the evaluations after that step.")
    return ResumePlan(
        config, (*earlier, EarlierConfig(n_done, stored)), (f"From step {n_done} on, {values}.", *messages)
    )


def _check_steps(
    path: Path, stored: Config, config: Config, changed: Iterable[str], n_done: int, extends: bool
) -> tuple[str, ...]:
    """Return messages about a change of the number of steps.

    Raises:
        UserError: The change is not allowed.
    """
    before, after = stages(stored)[-1].end_step, stages(config)[-1].end_step
    if extends and after <= before:
        raise UserError(f"--extend: {path} has {before} steps; give a larger config.{STEPS}, such as {2 * before}.")
    if not any(knob.endswith(STEPS) for knob in changed):
        return ()
    problem = f"{path} has a run with another config: {STEPS} is {before} in the run and {after} in this config"
    if _started_stages(stored, n_done) != _started_stages(config, n_done) or after < n_done or after == n_done < before:
        raise UserError(f"{problem}, and {n_done} steps are done already. Choose another --run folder.")
    old, new = _multipliers(stored, n_done), _multipliers(config, n_done)
    if np.array_equal(old, new):
        return ()
    stage = next((stage for stage in stages(config) if n_done < stage.end_step), stages(config)[-1])
    first = int(np.flatnonzero(old != new)[0]) + 1
    next_multiplier = _multipliers(config, n_done + 1)[-1] if after > n_done else old[-1]
    effect = (
        f"the {stage.config.schedule.name} schedule of {after} steps differs from that of {before} from step {first} "
        f"on: the steps that are done do not change, and after step {n_done} the learning rate goes from "
        f"{old[-1]:.4g} to {next_multiplier:.4g} of its peak"
    )
    if not extends:
        raise UserError(f"{problem}; {effect}. Use --extend to continue anyway, or choose another --run folder.")
    return (f"--extend: {effect}.",)


def _started_stages(config: Config, n_done: int) -> list[tuple[str, int]]:
    """Return the names and first steps of the stages that have started."""
    return [(stage.name, stage.first_step) for stage in stages(config) if stage.first_step < max(n_done, 1)]


def _multipliers(config: Config, n_steps: int) -> np.ndarray:
    """Return the learning-rate multipliers of the first `n_steps` steps, or of all steps if there are fewer."""
    parts = [np.zeros(0, np.float32)]
    for stage in stages(config):
        count = min(stage.end_step, n_steps) - stage.first_step
        if count > 0:
            steps = jnp.arange(count, dtype=jnp.int32)
            parts.append(np.asarray(schedule_multiplier(steps, stage.config.training.steps, stage.config.schedule)))
    return np.concatenate(parts)
