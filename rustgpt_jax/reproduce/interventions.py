"""Interventions for a failed run: changed knobs, tried from a state before the failure in one compiled program."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import Config, Hyperparams, StaticConfig, get_path, partition, replace_paths, to_dict
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.pytrees import flatten_paths, format_path
from rustgpt_jax.training.hooks import MUST_BE_FINITE
from rustgpt_jax.training.train_step import (
    TrainState,
    compiled_init_state,
    stack,
    train_step,
)

CONTROL = "no change"
Z_LOSS = 1e-4
# The clipping norm, relative to the usual gradient norm.
CLIP_FRACTION = 0.1
LEARNING_RATE_DIVISORS = {"half the learning rate": 2, "learning rate / 10": 10, "learning rate / 100": 100}
FLOAT32 = {
    "model.dtype": "float32",
    "model.precision.mixer_dtype": None,
    "model.precision.feedforward_dtype": None,
    "model.precision.logits_dtype": None,
    "model.precision.matmul_dtype": None,
}


@dataclass(frozen=True)
class Intervention:
    """Changed knobs, or the reason why they cannot be changed."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()
    unavailable_reason: str | None = None


class InterventionResult(NamedTuple):
    """The result of an intervention by step: losses, and whether loss, gradient and update are finite."""

    intervention: Intervention
    losses: np.ndarray
    is_finite: np.ndarray

    def find_first_bad_index(self, threshold: float, start: int = 0) -> int | None:
        """Return the index of the first step that is not finite or, from `start` on, has a loss above `threshold`."""
        is_too_high = (self.losses > threshold) & (np.arange(len(self.losses)) >= start)
        is_bad = ~self.is_finite | is_too_high
        return int(np.argmax(is_bad)) if is_bad.any() else None


def list_interventions(config: Config, usual_norm: float) -> list[Intervention]:
    """Return the interventions for a stage, control first. `usual_norm` is the usual gradient norm, or 0 if unknown."""
    rates = ["learning_rate"] + (["muon_learning_rate"] if config.optimizer.name == "muon" else [])
    # The changed knobs, or the reason why they cannot be changed.
    found: dict[str, dict[str, Any] | str] = {CONTROL: {}}
    for name, divisor in LEARNING_RATE_DIVISORS.items():
        found[name] = {f"optimizer.{knob}": getattr(config.optimizer, knob) / divisor for knob in rates}
    found["tighter clipping"] = _clip_tighter(config, usual_norm)
    found["QK-norm"] = _enable_qk_norm(config)
    found["z-loss"] = {"training.z_loss": Z_LOSS}
    if config.training.z_loss > 0:
        found["z-loss"] = f"already enabled, with {config.training.z_loss:g}"
    found["float32"] = {path: value for path, value in FLOAT32.items() if get_path(config, path) != value}
    if all(get_path(config, path) in (None, "float32") for path in FLOAT32):
        found["float32"] = "already in float32"
    return [
        Intervention(name, unavailable_reason=knobs)
        if isinstance(knobs, str)
        else Intervention(name, (*knobs.items(),))
        for name, knobs in found.items()
    ]


def _clip_tighter(config: Config, usual_norm: float) -> dict[str, Any] | str:
    if not (usual_norm > 0 and math.isfinite(usual_norm)):
        return "the usual gradient norm is unknown"
    clip_norm = float(f"{CLIP_FRACTION * usual_norm:.0e}")
    if 0 < config.optimizer.clip_norm <= clip_norm:
        return f"gradients are already clipped to {config.optimizer.clip_norm:g}"
    return {"optimizer.clip_norm": clip_norm}


def _enable_qk_norm(config: Config) -> dict[str, Any] | str:
    knobs = {"model.attention.qk_norm": "head"}
    if config.model.attention.qk_norm != "none":
        return "already enabled"
    try:
        changed = resolve(to_dict(replace_paths(config, knobs)))
    except UserError as error:
        return str(error).rstrip(".")
    if flatten_paths(parameter_shapes(changed.model)).keys() == flatten_paths(parameter_shapes(config.model)).keys():
        return "no layer of the model has queries and keys to normalize"
    return knobs


def run_interventions(
    interventions: Sequence[Intervention], config: Config, state: TrainState, batches_S: Batch, first_step: np.int32
) -> list[InterventionResult]:
    """Run each available intervention from a state of the run over stacked batches."""
    groups: dict[StaticConfig, list[tuple[Intervention, Hyperparams]]] = {}
    for each in interventions:
        if each.unavailable_reason is None:
            static, hparams = partition(replace_paths(config, dict(each.knobs)))
            groups.setdefault(static, []).append((each, hparams))
    lanes = [
        (fit_state(state, static, members[0][1]), stack([hparams for _, hparams in members]))
        for static, members in groups.items()
    ]
    curves = jax.device_get(compiled_compute_curves(tuple(groups), lanes, batches_S, first_step))
    results = {
        each: InterventionResult(each, losses_PS[row], is_finite_PS[row])
        for members, (losses_PS, is_finite_PS) in zip(groups.values(), curves, strict=True)
        for row, (each, _) in enumerate(members)
    }
    return [results[each] for each in interventions if each in results]


def compute_curves(
    statics: tuple[StaticConfig, ...],
    lanes: list[tuple[TrainState, Hyperparams]],
    batches_S: Batch,
    first_step: jax.Array,
) -> list[tuple[jax.Array, jax.Array]]:
    """Train with each of several interventions.

    Args:
        statics: The static configs.
        lanes: For each of them, the initial state, and the hyperparameters of its P interventions.
        batches_S: The batches of S steps.
        first_step: The first step of the stage.

    Returns:
        For each static config the losses, and whether loss, gradient and update are finite (P x S).
    """

    def train(static: StaticConfig, state: TrainState, hparams: Hyperparams) -> tuple[jax.Array, jax.Array]:
        def step(state: TrainState, batch: Batch) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
            state, metrics = train_step(static, state, batch, hparams, first_step)
            is_finite = [jnp.isfinite(getattr(metrics, name)) for name in MUST_BE_FINITE]
            return state, (metrics.loss, jnp.stack(is_finite).all())

        return jax.lax.scan(step, state, batches_S)[1]

    return [
        jax.vmap(partial(train, static, state))(hparams_P)
        for static, (state, hparams_P) in zip(statics, lanes, strict=True)
    ]


compiled_compute_curves = jax.jit(compute_curves, static_argnums=0)


def fit_state(state: TrainState, static: StaticConfig, hparams: Hyperparams) -> TrainState:
    """Convert a state to another static config: keep leaves with the same path and shape, initialize the others."""
    old_leaves = flatten_paths(state)

    def fit(path: Any, leaf: jax.Array) -> jax.Array:
        old = old_leaves.get(format_path(path))
        return leaf if old is None or jnp.shape(old) != leaf.shape else old

    return jax.tree_util.tree_map_with_path(fit, compiled_init_state(static, hparams))


def format_flags(intervention: Intervention, config: Config, stage: str) -> Iterator[str]:
    """Yield the command-line flags of an intervention; knobs that the stage overrides are set for the stage only."""
    overridden = {path for each in config.stages if each.name == stage for path, _ in each.overrides}
    for path, value in intervention.knobs:
        name = f"stages.{stage}.{path}" if path in overridden else path
        yield f"--config.{name}={value:g}" if isinstance(value, float) else f"--config.{name}={value}"
