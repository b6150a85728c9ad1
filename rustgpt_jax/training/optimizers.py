"""Optimizers built from Optax transformations, and learning-rate schedules.

Each entry of OPTIMIZERS is a function of (config, lr_multiplier) that returns an `optax.GradientTransformation`, where
`lr_multiplier` is the value of the schedule at the step. All numbers may be traced: the transformation is built inside
the step. An optimizer whose parameters for evaluation are not the trained ones also has an entry in EVAL_PARAMS.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rustgpt_jax.config.schema import OptimizerConfig, ScheduleConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import flatten_paths, format_path
from rustgpt_jax.registry import lookup


def adamw(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    learning_rate = lr_multiplier * config.learning_rate
    return optax.chain(_scale_by_adam(config), weight_decay(config), optax.scale(-learning_rate))


def adam(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980), with weight decay added to the gradient."""
    learning_rate = lr_multiplier * config.learning_rate
    return optax.chain(weight_decay(config), _scale_by_adam(config), optax.scale(-learning_rate))


def sgd(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Gradient descent with momentum, with weight decay added to the gradient."""
    trace = optax.trace(config.momentum, accumulator_dtype=_moment_dtype(config))
    return optax.chain(weight_decay(config), trace, optax.scale(-lr_multiplier * config.learning_rate))


def lion(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum, with decoupled weight decay (arXiv 2302.06675)."""
    direction = optax.scale_by_lion(config.b1, config.b2, mu_dtype=_moment_dtype(config))
    return optax.chain(direction, weight_decay(config), optax.scale(-lr_multiplier * config.learning_rate))


def muon(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Orthogonalized momentum for the matrices inside the blocks, AdamW for all others (Jordan 2024, arXiv 2502.16982).

    Matrices learn at muon_learning_rate, scaled by sqrt(max(1, outputs / inputs)); the rest at learning_rate.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum, mu_dtype=_moment_dtype(config), weight_dimension_numbers=_stacked_matrices
        ),
        optax.stateless(_scale_by_shape),
        weight_decay(config),
        optax.scale(-lr_multiplier * config.muon_learning_rate),
    )
    return optax.partition({"muon": matrices, "adamw": adamw(config, lr_multiplier)}, muon_partition)


def schedule_free(config: OptimizerConfig, lr_multiplier: jax.Array | float) -> optax.GradientTransformation:
    """Schedule-free AdamW: averaging replaces momentum and learning-rate decay (arXiv 2405.15682).

    Gradients and weight decay are taken at the parameters, y = b1 x + (1 - b1) z; z moves by Adam without momentum;
    x, where the model is evaluated, is the mean of all z, weighted by the square of the highest learning rate so far.
    As in the authors' code, these weights do not include Adam's bias correction. b1 must be above 0.
    """
    learning_rate = lr_multiplier * config.learning_rate
    direction = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    movement = optax.chain(direction, weight_decay(config), optax.scale(-learning_rate))

    def averaging(b1: jax.Array | float) -> optax.GradientTransformationExtraArgs:
        return optax.contrib.schedule_free(movement, learning_rate, b1, state_dtype=_moment_dtype(config))

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # The state has the b1 that y was computed with, which may be that of another stage. y - z is b1 times x - z.
        updates, after = averaging(state.b1).update(gradients, state, params)
        excess = config.b1 / state.b1 - 1.0
        updates = jax.tree.map(lambda update, y, z: update + excess * (y + update - z), updates, params, after.z)
        return updates, after._replace(b1=jnp.asarray(config.b1, state.b1.dtype))

    return optax.GradientTransformation(averaging(config.b1).init, update)


def muon_partition(params: Any) -> Any:
    """Label each parameter "muon" or "adamw": muon takes the stacked matrices of the blocks.

    These are kernels with three axes (layers, inputs, outputs) or four (layers, experts, inputs, outputs), except for
    depthwise convolutions and routers.
    """

    def label(path: Any, parameter: jax.Array) -> str:
        name = format_path(path)
        is_matrix = name.startswith("blocks/") and parameter.ndim >= 3 and not re.search("convolution|router", name)
        return "muon" if is_matrix else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _stacked_matrices(params: Any) -> Any:
    # The first axes are layers and experts. By default, Optax takes (layers, inputs) for a matrix.
    return jax.tree.map(
        lambda leaf: optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1), params
    )


def _scale_by_shape(updates: Any, params: Any = None) -> Any:
    del params
    return jax.tree.map(lambda update: update * max(1.0, update.shape[-1] / update.shape[-2]) ** 0.5, updates)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=_moment_dtype(config))


def _moment_dtype(config: OptimizerConfig) -> str | None:
    """Return Optax's argument for the dtype of first moments; None means float32, as the parameters."""
    return None if config.state_dtype == "float32" else config.state_dtype


def weight_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Add weight_decay * factor * parameter, with the factor of the first group that matches the parameter."""

    def update(updates: Any, params: Any) -> Any:
        def decayed(path: Any, update: jax.Array, parameter: jax.Array) -> jax.Array:
            group_factor = decay_factor(format_path(path), config.weight_decay_groups)
            return update if group_factor == 0 else update + config.weight_decay * group_factor * parameter

        return jax.tree_util.tree_map_with_path(decayed, updates, params)

    return optax.stateless(update)


def decay_factor(name: str, groups: tuple[tuple[str, float], ...]) -> float:
    """Return the factor of the first group that matches a parameter's path. Raises UserError if none does."""
    for expression, group_factor in groups:
        try:
            found = re.search(expression, name)
        except re.error as error:
            raise UserError(
                f"config.optimizer.weight_decay_groups: {expression!r} is not a regular expression: {error}."
            ) from None
        if found:
            return group_factor
    raise UserError(
        f"config.optimizer.weight_decay_groups: no expression matches the parameter {name!r}; end with ('.*', 1.0)."
    )


def check_decay_groups(params: Any, config: OptimizerConfig) -> None:
    """Raise UserError if a parameter (or shape) of a tree is in no weight decay group."""
    for path in flatten_paths(params):
        decay_factor(path, config.weight_decay_groups)


def clip_by_norm(gradients: Any, norm: jax.Array, largest: jax.Array | float) -> Any:
    """Scale gradients of global norm `norm` down so that their norm is at most `largest` (arXiv 1211.5063)."""
    scale = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda gradient: gradient * scale, gradients)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, jax.Array | float], optax.GradientTransformation]] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "lion": lion,
    "muon": muon,
    "schedule_free": schedule_free,
}

# Functions of (params, opt_state) that return the parameters for evaluation, if they are not the trained ones.
EVAL_PARAMS: dict[str, Callable[[Any, Any], Any]] = {
    "schedule_free": lambda params, opt_state: optax.contrib.schedule_free_eval_params(opt_state, params)
}


def make_optimizer(config: OptimizerConfig, lr_multiplier: jax.Array | float = 1.0) -> optax.GradientTransformation:
    """Build the optimizer named in the config, with the learning rate scaled by `lr_multiplier`."""
    return lookup(OPTIMIZERS, config.name, "config.optimizer.name")(config, lr_multiplier)


def get_eval_params(config: OptimizerConfig, params: Any, opt_state: Any) -> Any:
    """Return the parameters for evaluation and sampling: the trained ones, unless EVAL_PARAMS has an entry."""
    return EVAL_PARAMS[config.name](params, opt_state) if config.name in EVAL_PARAMS else params


# Learning-rate schedules: a multiplier from 0 to 1 of the learning rate at each step.
#
# Each is a function of (step, steps, schedule), all of which may be traced, so that one compiled program serves every
# length of warmup and of training.

Scalar = jax.Array | float
Schedule = Callable[[jax.Array, Scalar, ScheduleConfig], jax.Array]


def constant(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """No decay after the warmup."""
    del steps, schedule
    return jnp.ones_like(step, jnp.float32)


def linear(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Linear decay after the warmup, from 1 to final_lr_frac."""
    return 1.0 - (1.0 - schedule.final_lr_frac) * _progress(step, schedule.warmup_steps, steps)


def cosine(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Cosine decay after the warmup, from 1 to final_lr_frac (arXiv 1608.03983)."""
    wave = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, schedule.warmup_steps, steps)))
    return schedule.final_lr_frac + (1.0 - schedule.final_lr_frac) * wave


def wsd(step: jax.Array, steps: Scalar, schedule: ScheduleConfig) -> jax.Array:
    """Warmup-stable-decay: linear decay to final_lr_frac over the last decay_frac of the steps (arXiv 2404.06395)."""
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
