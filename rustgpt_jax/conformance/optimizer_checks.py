"""Checks of optimizers and of schedules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import OptimizerConfig, ScheduleConfig
from rustgpt_jax.conformance.fixtures import (
    Broken,
    numbers_of,
    quick_jit,
    require_close,
    require_finite,
    require_same_tree,
)
from rustgpt_jax.conformance.targets import Subject
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.training.optimizers import get_eval_params, make_optimizer, schedule_multiplier

OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=0.02,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    momentum=0.9,
    muon_learning_rate=0.02,
    weight_decay=0.01,
    weight_decay_groups=((r".*", 1.0),),
    clip_norm=0.0,
    state_dtype="float32",
    offload_state=False,
)
# The shapes of a model's parameters: stacked over layers inside the blocks, plain outside.
SHAPES = {
    "embedding": {"table": (7, 4)},
    "blocks": {"0": {"mixer": {"query": {"kernel": (2, 4, 6), "bias": (2, 6)}}, "mixer_norm": {"scale": (2, 4)}}},
}
DESCENT_STEPS = 200
LEAST_DESCENT = 0.5
# Near the point, an orthogonalised gradient is one of rounding errors.
FEW_STEPS = 10
CLOSE = 1e-4
TRIALS = np.array([0.01, 0.02, 0.05], np.float32)

SCHEDULE = ScheduleConfig(name="constant", warmup_steps=5, decay_frac=0.2, final_lr_frac=0.1)
MOST_STEPS = 64


def _params(seed: int = 0, size: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(size) * rng.standard_normal(shape, np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def optimizer_update(subject: Subject) -> str:
    """Updates have the shapes and types of the parameters, the state keeps its own, and all stays finite."""
    config = dataclasses.replace(OPTIMIZER, name=subject.name)

    def update(gradients: Any, params: Any) -> Any:
        transformation = make_optimizer(config)
        state = transformation.init(params)
        updates, after = transformation.update(gradients, state, params)
        return updates, after, state

    compiled = quick_jit(update)
    for kind, gradients in ("zero", _params(1, 0.0)), ("ordinary", _params(1)), ("large", _params(1, 1e6)):
        params = _params()
        updates, after, state = jax.device_get(compiled(gradients, params))
        _require_like(updates, params, "an update")
        _require_like(after, state, "the state of the optimizer")
        for name, leaf in flatten_paths((updates, after)).items():
            require_finite(leaf, f"{name} is not finite after {kind} gradients", ())
    return f"{len(flatten_paths(state))} arrays of state"


def _require_like(found: Any, expected: Any, what: str) -> None:
    require_same_tree(found, expected, what)
    after = flatten_paths(found)
    for name, leaf in flatten_paths(expected).items():
        there, here = np.asarray(after[name]), np.asarray(leaf)
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            shown = f"{there.dtype}{list(there.shape)} instead of {here.dtype}{list(here.shape)}"
            raise Broken(f"{what} has another shape or type", name, shown)


def _descent(learning_rate: Any, config: OptimizerConfig, steps: int) -> tuple[Any, Any]:
    """Half the squared distance to a target before and after some steps, and the parameters."""
    config = dataclasses.replace(config, learning_rate=learning_rate)
    start, target = _params(0), _params(1)

    def loss(params: Any) -> Any:
        squares = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)) / 2, params, target)
        return sum(jax.tree.leaves(squares))

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = make_optimizer(config).update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    first = jax.tree.map(jnp.asarray, start)
    (params, state), _ = jax.lax.scan(step, (first, make_optimizer(config).init(first)), None, length=steps)
    params = get_eval_params(config, params, state)
    return jnp.stack([loss(start), loss(params)]), params


def optimizer_descent(subject: Subject) -> str:
    """The squared distance to a point gets smaller."""
    config = dataclasses.replace(OPTIMIZER, name=subject.name)
    (before, after), _ = jax.device_get(quick_jit(lambda rate: _descent(rate, config, DESCENT_STEPS))(np.float32(0.02)))
    if not after < LEAST_DESCENT * before:
        raise Broken("a quadratic does not get smaller", f"step {DESCENT_STEPS}", f"{before:.4g} became {after:.4g}")
    return f"{before:.3g} to {after:.2g} in {DESCENT_STEPS} steps"


def optimizer_numbers(subject: Subject) -> str:
    """Its numbers may be arguments of a program, which is then compiled once, alone and side by side with vmap."""
    config = dataclasses.replace(OPTIMIZER, name=subject.name)
    numbers = numbers_of(config)
    del numbers["learning_rate"]
    traced = []

    def run(learning_rate: Any, numbers: Any) -> Any:
        traced.append(learning_rate)
        return _descent(learning_rate, dataclasses.replace(config, **numbers), FEW_STEPS)[1]

    compiled = quick_jit(run)
    alone = [jax.device_get(compiled(rate, numbers)) for rate in TRIALS]
    if len(traced) > 1:
        raise Broken("another learning rate compiles another program", "the second rate", f"{len(traced)} programs")
    together = jax.device_get(quick_jit(jax.vmap(run, in_axes=(0, None)))(TRIALS, numbers))
    fixed = jax.device_get(quick_jit(lambda: _descent(float(TRIALS[0]), config, FEW_STEPS)[1])())
    worst = 0.0
    for name, leaf in flatten_paths(fixed).items():
        what = f"{name} is another with numbers as arguments than with constants"
        worst = max(worst, require_close(flatten_paths(alone[0])[name], leaf, CLOSE, what, ()))
    for trial in range(len(TRIALS)):
        for name, leaf in flatten_paths(alone[trial]).items():
            what = f"trial {trial} of vmap is not what it is alone: {name}"
            worst = max(worst, require_close(flatten_paths(together)[name][trial], leaf, CLOSE, what, ()))
    return f"one program; {len(TRIALS)} trials within {worst:.0e}"


def _factors(config: ScheduleConfig) -> Any:
    def all_steps(steps: Any, numbers: Any) -> Any:
        here = dataclasses.replace(config, **numbers)
        return jax.vmap(lambda step: schedule_multiplier(step, steps, here))(jnp.arange(MOST_STEPS))

    return quick_jit(all_steps)


def schedule_factor(subject: Subject) -> str:
    """The factor is between 0 and 1 at every step of a run of any length, and above 0 at the first one."""
    compiled = _factors(dataclasses.replace(SCHEDULE, name=subject.name))
    cases = 0
    for steps in (1, 2, 7, MOST_STEPS):
        for warmup in (0, 1, 5, 2 * MOST_STEPS):
            for decay, final in (0.0, 0.0), (0.2, 0.1), (1.0, 1.0):
                numbers = {"warmup_steps": warmup, "decay_frac": decay, "final_lr_frac": final}
                values = np.asarray(compiled(steps, numbers))[:steps]
                where = f"of {steps} with {warmup} warm-up steps, decay_frac {decay} and final_lr_frac {final}"
                outside = np.flatnonzero(~((values >= 0) & (values <= 1 + 1e-6)))
                if len(outside):
                    what = "the factor is not between 0 and 1"
                    raise Broken(what, f"step {outside[0]} {where}", f"{values[outside[0]]:.6g}")
                if values[0] <= 0:
                    raise Broken("the first step has no learning rate", f"step 0 {where}", f"{values[0]:.6g}")
                cases += 1
    return f"{cases} lengths and numbers"


def schedule_numbers(subject: Subject) -> str:
    """Its numbers may be arguments of a program: the factors are those of Python numbers."""
    config = dataclasses.replace(SCHEDULE, name=subject.name)
    traced = _factors(config)(np.float32(MOST_STEPS), numbers_of(config))
    fixed = quick_jit(
        lambda: jax.vmap(lambda step: schedule_multiplier(step, MOST_STEPS, config))(jnp.arange(MOST_STEPS))
    )()
    what = "the factor is another with numbers as arguments than with constants"
    return f"within {require_close(traced, fixed, CLOSE, what, ('step',)):.0e}"
