"""RoPE for contexts longer than those that a model was trained with: which channels turn how much more slowly."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig


class Rope(NamedTuple):
    """Radians a position by which each pair of channels turns, and what queries and keys are multiplied by."""

    frequencies_C: jax.Array
    magnitude: Any


def unscaled(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """The frequencies as they are."""
    return Rope(frequencies_C, _magnitude(config, 1.0))


def linear(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """All channels turn more slowly by the factor (arXiv 2306.15595)."""
    return Rope(frequencies_C / config.rope_factor, _magnitude(config, 1.0))


def llama3(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Slow channels turn more slowly by the factor, fast ones do not: by turns in the old context (Llama 3.1)."""
    turns_C = _original_context(config) * frequencies_C / (2 * math.pi)
    kept_C = (turns_C - config.rope_slow_turns) / (config.rope_fast_turns - config.rope_slow_turns)
    return Rope(_mixed(frequencies_C, config.rope_factor, kept_C), _magnitude(config, 1.0))


def yarn(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """As llama3, with the ramp along the number of the channel, and sharper attention (arXiv 2309.00071)."""

    def channel(turns: Any) -> jax.Array:
        """The channel, as a real number, that makes so many turns in the old context."""
        wavelength = _original_context(config) / jnp.asarray(turns, jnp.float32)
        return half * jnp.log(wavelength / (2 * math.pi)) / jnp.log(jnp.asarray(config.rope_base, jnp.float32))

    half = frequencies_C.shape[0]
    fast, slow = channel(config.rope_fast_turns), channel(config.rope_slow_turns)
    if config.rope_truncate:
        fast, slow = jnp.floor(fast), jnp.ceil(slow)
    fast, slow = jnp.maximum(fast, 0), jnp.minimum(slow, 2 * half - 1)
    kept_C = 1 - (jnp.arange(half, dtype=jnp.float32) - fast) / jnp.maximum(slow - fast, 1e-3)
    magnitude = 0.1 * jnp.log(jnp.asarray(config.rope_factor, jnp.float32)) + 1.0
    return Rope(_mixed(frequencies_C, config.rope_factor, kept_C), _magnitude(config, magnitude))


def longrope(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide the frequency of each pair of channels by its own factor and scale attention (arXiv 2402.13753)."""
    factors_C = jnp.asarray(longrope_factors(config), jnp.float32)
    factor = jnp.asarray(config.rope_factor, jnp.float32)
    magnitude = jnp.sqrt(1 + jnp.log(factor) / math.log(_original_context(config)))
    return Rope(frequencies_C / factors_C, _magnitude(config, magnitude))


def longrope_factors(config: ModelConfig) -> tuple[float, ...]:
    """Return the longrope factors for a model's context: the same for all texts, so that KV caches stay valid."""
    is_long = config.context_length > _original_context(config)
    return config.rope_long_factors if is_long else config.rope_short_factors


def _mixed(frequencies_C: jax.Array, factor: Any, kept_C: jax.Array) -> jax.Array:
    """Between frequencies divided by the factor, at kept_C 0 or less, and those as they are, at 1 or more."""
    kept_C = jnp.clip(kept_C, 0.0, 1.0)
    return kept_C * frequencies_C + (1 - kept_C) * frequencies_C / factor


def _original_context(config: ModelConfig) -> int:
    assert config.rope_original_context is not None, "resolve refuses a config without it"
    return config.rope_original_context


def _magnitude(config: ModelConfig, usual: Any) -> Any:
    return usual if config.rope_attention_factor is None else config.rope_attention_factor


ROPE_SCALINGS: dict[str, Callable[[jax.Array, ModelConfig], Rope]] = {
    "none": unscaled,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
