"""The few compiled programs that all checks of a model share, and what they are run on."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance.tiny_config import LENGTH, ROWS
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block_inputs import AUXILIARY_LOSS

PLACES_T = np.arange(LENGTH, dtype=np.int32)


class Rows(NamedTuple):
    """What a forward is run on, and the weights of the logits in the sum that gradients are taken of.

    auxiliary: the weight of the model's auxiliary loss in that sum.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    weights_BTV: Any
    auxiliary: Any


class Result(NamedTuple):
    """The weighted sum of the logits, the logits, and the gradient of the sum."""

    total: Any
    logits_BTV: Any
    gradient: Any


@contextmanager
def conditions() -> Iterator[None]:
    """What checks run under: quick compilations, and products of float32 numbers that are float32 on every device."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@cache
def quick_options() -> dict[str, Any]:
    """Options of the compiler that save most of its time, where this version of it has them."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quick_jit(function: Any, **options: Any) -> Any:
    """`jax.jit` with the options of a quick compilation."""
    return jax.jit(function, compiler_options=quick_options(), **options)


def weighted_sum(params: Any, rows: Rows, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The sum of the weighted logits and of the auxiliary loss, and the logits."""
    hidden_BTD, _, signals = transformer.hidden_states(
        params, rows.tokens_BT, model, positions_BT=rows.positions_BT, segments_BT=rows.segments_BT
    )
    logits_BTV = transformer.logits(params, hidden_BTD, model)
    total = jnp.sum(rows.weights_BTV * logits_BTV)
    if AUXILIARY_LOSS in signals:
        total = total + rows.auxiliary * signals[AUXILIARY_LOSS]
    return total, logits_BTV


def forward_and_backward(params: Any, rows: Rows, model: ModelConfig) -> Result:
    """Logits and gradients of the uncached model: most checks are calls of this one program."""
    (total, logits_BTV), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(params, rows, model)
    return Result(total, logits_BTV, gradient)


@cache
def _compiled() -> Any:
    return quick_jit(forward_and_backward, static_argnames="model")


def run(params: Any, rows: Rows, model: ModelConfig) -> Result:
    """`forward_and_backward`, compiled, with results as NumPy arrays."""
    return jax.device_get(_compiled()(params, rows, model=model))


@cache
def _compiled_forward() -> Any:
    return quick_jit(weighted_sum, static_argnames="model")


def run_forward(params: Any, rows: Rows, model: ModelConfig) -> tuple[Any, np.ndarray]:
    """Return the weighted sum and the logits like `run`, without computing gradients."""
    return jax.device_get(_compiled_forward()(params, rows, model=model))


def numbers_of(config: Any) -> dict[str, Any]:
    """The knobs of a part of a config that a training program takes as arguments, as arrays."""
    return {
        field.name: np.float32(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata.get("number") and not (field.metadata["off_at_zero"] and getattr(config, field.name) == 0)
    }


@cache
def _compiled_init() -> Any:
    return quick_jit(lambda key, model: transformer.init(key, model), static_argnames="model")


def initial_params(model: ModelConfig, seed: int = 0) -> Any:
    """What `transformer.init` makes."""
    return jax.device_get(_compiled_init()(jax.random.key(seed), model=model))


@cache
def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Initial parameters moved at random, so that all of them matter: those of 0 and 1 too. Do not write to them."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return leaf + (0.5 * noise if not leaf.any() else 0.2 * np.sqrt(np.mean(np.square(leaf))) * noise)

    return jax.tree.map(moved, initial_params(model, seed))


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """ROWS rows of LENGTH tokens."""
    return np.random.default_rng(seed).integers(0, model.vocab_size or 0, (ROWS, LENGTH)).astype(np.int32)


def rows_of(tokens_BT: np.ndarray, model: ModelConfig, positions_BT: Any = None, segments_BT: Any = None) -> Rows:
    """Rows of which each is one document, unless it is said otherwise, with random weights of their logits."""
    weights = np.random.default_rng(7).standard_normal((*tokens_BT.shape, model.vocab_size or 0)).astype(np.float32)
    return Rows(
        tokens_BT,
        np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
        if positions_BT is None
        else positions_BT,
        np.ones_like(tokens_BT) if segments_BT is None else segments_BT,
        weights,
        np.float32(1.0),
    )


@cache
def ordinary(model: ModelConfig) -> Result:
    """What the model makes of random rows of one document each."""
    return run(random_params(model), rows_of(random_tokens(model), model), model)


@cache
def _compiled_cached() -> Any:
    return quick_jit(transformer.apply, static_argnames="model")


def run_cached(params: Any, tokens_BT: Any, model: ModelConfig, cache: Any, positions_BT: Any, segments_BT: Any) -> Any:
    """logits_BTV and the cache after a call with a cache, as NumPy arrays."""
    call = partial(_compiled_cached(), positions_BT=positions_BT, segments_BT=segments_BT, model=model)
    return jax.device_get(call(params, tokens_BT, cache=cache))


def empty_cache(model: ModelConfig) -> Any:
    """A cache for ROWS rows of LENGTH tokens, as NumPy arrays."""
    return jax.device_get(quick_jit(lambda: transformer.init_cache(model, ROWS, LENGTH))())
