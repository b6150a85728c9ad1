"""Interventions for a failed run: changed knobs, tried from a state before the failure in one compiled program."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import Config, Hyperparams, StaticConfig, partition, replace_paths, to_dict
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.pytrees import flatten_paths, format_path
from rustgpt_jax.training.hooks import MUST_BE_FINITE
from rustgpt_jax.training.train_step import (
    State,
    compiled_init_state,
    train_step,
    vmappable,
)

Z_LOSS = 1e-4
# Of the norm that gradients had while all was well.
CLIPPED_SHARE = 0.1
# What a learning rate is divided by.
RATE_DIVISORS = {"half": 2, "a tenth of": 10, "a hundredth of": 100}

CONTROL = "as it was"


@dataclass(frozen=True)
class Intervention:
    """Changed knobs, or the reason why they are unavailable."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()
    unavailable_reason: str | None = None


class InterventionResult(NamedTuple):
    """The result of an intervention by step: losses, and whether loss, gradient and update are finite."""

    remedy: Intervention
    losses: np.ndarray
    is_finite: np.ndarray

    def first_bad_step(self, ceiling: float, since: int = 0) -> int | None:
        """The index of the first step with something that is not finite, or with a loss above `ceiling`.

        The latter counts from the index `since` on.
        """
        is_too_high = (self.losses > ceiling) & (np.arange(len(self.losses)) >= since)
        bad = ~self.is_finite | is_too_high
        return int(np.argmax(bad)) if bad.any() else None


def possible_interventions(config: Config, calm_norm: float) -> list[Intervention]:
    """What can be tried with a stage of this config, whose gradients had about the norm `calm_norm`; first nothing."""
    rates = ["optimizer.learning_rate"]
    if config.optimizer.name == "muon":
        rates.append("optimizer.muon_learning_rate")
    values = {path: getattr(config.optimizer, path.split(".")[1]) for path in rates}
    return [
        Intervention(CONTROL),
        *(
            Intervention(f"{share} the learning rate", tuple((path, value / divisor) for path, value in values.items()))
            for share, divisor in RATE_DIVISORS.items()
        ),
        _tighter_clipping(config, calm_norm),
        _qk_norm(config),
        _z_loss(config),
        _float32(config),
    ]


def _tighter_clipping(config: Config, calm_norm: float) -> Intervention:
    largest = _rounded(CLIPPED_SHARE * calm_norm)
    name = "tighter clipping"
    if not largest > 0:
        return Intervention(name, unavailable_reason="no gradient norm is known from before")
    if 0 < config.optimizer.clip_norm <= largest:
        return Intervention(name, unavailable_reason=f"gradients are clipped to {config.optimizer.clip_norm:g} already")
    return Intervention(name, (("optimizer.clip_norm", largest),))


def _qk_norm(config: Config) -> Intervention:
    name = "QK-norm"
    if config.model.qk_norm != "none":
        return Intervention(name, unavailable_reason="it is on already")
    knobs = (("model.qk_norm", "head"),)
    try:
        changed = resolve(to_dict(replace_paths(config, dict(knobs))))
    except UserError as error:
        return Intervention(name, unavailable_reason=str(error).rstrip("."))
    if flatten_paths(parameter_shapes(changed.model)).keys() == flatten_paths(parameter_shapes(config.model)).keys():
        return Intervention(name, unavailable_reason="no layer of the model has queries and keys to normalize")
    return Intervention(name, knobs)


def _z_loss(config: Config) -> Intervention:
    if config.training.z_loss > 0:
        return Intervention("z-loss", unavailable_reason=f"it is on already, with {config.training.z_loss:g}")
    return Intervention("z-loss", (("training.z_loss", Z_LOSS),))


def _float32(config: Config) -> Intervention:
    wide = {
        "dtype": "float32",
        "mixer_dtype": None,
        "feedforward_dtype": None,
        "logits_dtype": None,
        "matmul_dtype": None,
    }
    changes = {f"model.{knob}": value for knob, value in wide.items() if getattr(config.model, knob) != value}
    if all(getattr(config.model, knob) in (None, "float32") for knob in wide):
        return Intervention("float32", unavailable_reason="in float32 already")
    return Intervention("float32", tuple(changes.items()))


def _rounded(value: float) -> float:
    """Round a positive number to one significant digit."""
    return float(f"{value:.0e}") if value > 0 and math.isfinite(value) else 0.0


# All at once.


class Lane(NamedTuple):
    """Interventions that share a program: they start from one state, and `hparams` has a leading axis for them."""

    state: State
    hparams: Hyperparams


def run_interventions(
    tried: Sequence[Intervention], config: Config, state: State, batches_S: Batch, first_step: np.int32
) -> list[InterventionResult]:
    """Run each available intervention from a state of the run over stacked batches, and return its losses."""
    groups: dict[StaticConfig, list[tuple[Intervention, Hyperparams]]] = {}
    for remedy in tried:
        if remedy.unavailable_reason is None:
            static, hparams = partition(replace_paths(config, dict(remedy.knobs)))
            groups.setdefault(static, []).append((remedy, hparams))
    lanes = [
        Lane(
            fit_state(state, static, members[0][1]),
            jax.tree.map(lambda *values: np.stack(values), *(hparams for _, hparams in members)),
        )
        for static, members in groups.items()
    ]
    curves = jax.device_get(compiled_compute_curves(tuple(groups), lanes, batches_S, first_step))
    found = {
        remedy: InterventionResult(remedy, losses_PS[row], is_finite_PS[row])
        for members, (losses_PS, is_finite_PS) in zip(groups.values(), curves, strict=True)
        for row, (remedy, _) in enumerate(members)
    }
    return [found[remedy] for remedy in tried if remedy in found]


def compute_curves(
    statics: tuple[StaticConfig, ...], lanes: list[Lane], batches_S: Batch, first_step: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Return the losses and whether all is finite (P x S) for each lane; members of a lane are vmapped."""

    def steps(static: StaticConfig, state: State, hparams: Hyperparams) -> tuple[jax.Array, jax.Array]:
        def body(state: State, batch: Batch) -> tuple[State, tuple[jax.Array, jax.Array]]:
            state, metrics = train_step(static, state, batch, hparams, first_step)
            is_finite = [jnp.isfinite(getattr(metrics, name)) for name in MUST_BE_FINITE]
            return state, (metrics.loss, jnp.stack(is_finite).all())

        return jax.lax.scan(body, state, batches_S)[1]

    return [
        jax.vmap(lambda hparams, static=static, lane=lane: steps(static, lane.state, hparams))(lane.hparams)
        for static, lane in zip(map(vmappable, statics), lanes, strict=True)
    ]


compiled_compute_curves = jax.jit(compute_curves, static_argnums=0)


def fit_state(state: State, static: StaticConfig, hparams: Hyperparams) -> State:
    """Convert a state to another static config: keep leaves with the same path and shape, initialize the others."""
    kept = flatten_paths(state)
    fresh = compiled_init_state(static, hparams)

    def fit(path: Any, leaf: jax.Array) -> jax.Array:
        old = kept.get(format_path(path))
        return leaf if old is None or jnp.shape(old) != leaf.shape else old

    return jax.tree_util.tree_map_with_path(fit, fresh)


def format_flags(remedy: Intervention, config: Config, stage: str) -> Iterator[str]:
    """Yield the command-line flags of an intervention, for the stage if that overrides the knob itself."""
    own = {path for each in config.stages if each.name == stage for path, _ in each.overrides}
    for path, value in remedy.knobs:
        where = f"stages.{stage}.{path}" if path in own else path
        yield f"--config.{where}={value:g}" if isinstance(value, float) else f"--config.{where}={value}"
