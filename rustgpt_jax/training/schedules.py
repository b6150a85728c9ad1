"""Learning-rate schedules: a multiplier from 0 to 1 of the learning rate at each step.

Each is a pure function of (step, steps, config of the schedule), all of which may be traced, so that one compiled
program serves every length of warmup and of training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ScheduleConfig
from rustgpt_jax.registry import lookup

Scalar = jax.Array | float
Schedule = Callable[[jax.Array, Scalar, ScheduleConfig], jax.Array]


def constant(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Constant 1."""
    del steps, schedule
    return jnp.ones_like(step, jnp.float32)


def linear(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Linear decay from 1 after the warmup to final_lr_frac."""
    return 1.0 - (1.0 - schedule.final_lr_frac) * _progress(step, schedule.warmup_steps, steps)


def cosine(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Cosine decay from 1 after the warmup to final_lr_frac (arXiv 1608.03983)."""
    wave = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, schedule.warmup_steps, steps)))
    return schedule.final_lr_frac + (1.0 - schedule.final_lr_frac) * wave


def wsd(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Constant 1, then linear decay to final_lr_frac over the last decay_frac of the steps (arXiv 2404.06395)."""
    start = jnp.asarray(steps, jnp.float32) * (1.0 - schedule.decay_frac)
    return 1.0 - (1.0 - schedule.final_lr_frac) * _progress(step, start, steps)


def _progress(step: jax.Array, start: Scalar, end: Scalar) -> jax.Array:
    span = jnp.maximum(jnp.asarray(end - start, jnp.float32), 1.0)
    return jnp.clip((jnp.asarray(step, jnp.float32) - start) / span, 0.0, 1.0)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def schedule_multiplier(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Return the learning-rate multiplier at `step` (from 0) of a stage of `steps`, with linear warmup."""
    warm = (jnp.asarray(step, jnp.float32) + 1.0) / (jnp.asarray(schedule.warmup_steps, jnp.float32) + 1.0)
    return jnp.minimum(warm, lookup(SCHEDULES, schedule.name, "config.schedule.name")(step, steps, schedule))
