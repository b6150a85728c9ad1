"""Position encodings: learned embeddings, RoPE with its scalings to longer contexts, and ALiBi."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import PositionEncoding
from rustgpt_jax.model.layers import normal_init
from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.registry import lookup


class Rope(NamedTuple):
    """Rotation of queries and keys.

    Attributes:
        frequencies_C: Radians per position of each pair of channels.
        magnitude: Factor that rotated queries and keys are multiplied by.
    """

    frequencies_C: jax.Array
    magnitude: Any


def no_scaling(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Return unscaled frequencies."""
    return Rope(frequencies_C, _magnitude(config, 1.0))


def linear_scaling(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide all frequencies by the factor: position interpolation (arXiv 2306.15595)."""
    return Rope(frequencies_C / config.rope.factor, _magnitude(config, 1.0))


def llama3_scaling(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide low frequencies by the factor, depending on the turns within the original context (Llama 3.1)."""
    turns_C = _original_context(config) * frequencies_C / (2 * math.pi)
    unscaled_C = (turns_C - config.rope.beta_slow) / (config.rope.beta_fast - config.rope.beta_slow)
    return Rope(_interpolate(frequencies_C, config.rope.factor, unscaled_C), _magnitude(config, 1.0))


def yarn_scaling(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide low frequencies by the factor, with a ramp over channels, and scale attention (arXiv 2309.00071)."""

    def channel(turns: Any) -> jax.Array:
        """Return the channel (a real number) that makes this many turns within the original context."""
        wavelength = _original_context(config) / jnp.asarray(turns, jnp.float32)
        return half * jnp.log(wavelength / (2 * math.pi)) / jnp.log(jnp.asarray(config.rope.theta, jnp.float32))

    half = frequencies_C.shape[0]
    fast, slow = channel(config.rope.beta_fast), channel(config.rope.beta_slow)
    if config.rope.truncate:
        fast, slow = jnp.floor(fast), jnp.ceil(slow)
    fast, slow = jnp.maximum(fast, 0), jnp.minimum(slow, 2 * half - 1)
    unscaled_C = 1 - (jnp.arange(half, dtype=jnp.float32) - fast) / jnp.maximum(slow - fast, 1e-3)
    magnitude = 0.1 * jnp.log(jnp.asarray(config.rope.factor, jnp.float32)) + 1.0
    return Rope(_interpolate(frequencies_C, config.rope.factor, unscaled_C), _magnitude(config, magnitude))


def longrope_scaling(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide the frequency of each pair of channels by its own factor and scale attention (arXiv 2402.13753)."""
    factors_C = jnp.asarray(longrope_factors(config), jnp.float32)
    factor = jnp.asarray(config.rope.factor, jnp.float32)
    magnitude = jnp.sqrt(1 + jnp.log(factor) / math.log(_original_context(config)))
    return Rope(frequencies_C / factors_C, _magnitude(config, magnitude))


def longrope_factors(config: ModelConfig) -> tuple[float, ...]:
    """Return the longrope factors for a model's context length.

    They do not depend on the length of a text, so KV caches stay valid.
    """
    is_long = config.context_length > _original_context(config)
    return config.rope.long_factors if is_long else config.rope.short_factors


def _interpolate(frequencies_C: jax.Array, factor: Any, unscaled_C: jax.Array) -> jax.Array:
    """Interpolate between divided frequencies, at unscaled_C 0 or less, and the original ones, at 1 or more."""
    unscaled_C = jnp.clip(unscaled_C, 0.0, 1.0)
    return unscaled_C * frequencies_C + (1 - unscaled_C) * frequencies_C / factor


def _original_context(config: ModelConfig) -> int:
    assert config.rope.original_context is not None, "required by the scaling; checked when the config is resolved"
    return config.rope.original_context


def _magnitude(config: ModelConfig, default: Any) -> Any:
    return default if config.rope.attention_factor is None else config.rope.attention_factor


ROPE_SCALINGS: dict[str, Callable[[jax.Array, ModelConfig], Rope]] = {
    "none": no_scaling,
    "linear": linear_scaling,
    "llama3": llama3_scaling,
    "yarn": yarn_scaling,
    "longrope": longrope_scaling,
}


class LearnedPositions(nn.Module):
    """A learned vector for each position up to context_length."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", normal_init(self.config.init_std), shape)[positions_BT]


def apply_rope(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotate channels c and c + C/2 by position * theta^(-2c/C) radians: RoPE (arXiv 2104.09864).

    C is the number of rotated channels, the first `rope.fraction` of the head; the others are unchanged.
    """
    rope = lookup(ROPE_SCALINGS, config.rope.scaling, "config.model.rope.scaling")(
        _frequencies(x_BTHC, config.rope.theta, config.rope.fraction), config
    )
    return _rotate(x_BTHC, positions_BT, rope)


def apply_local_rope(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Apply RoPE with its own theta and without scaling, for sliding windows (Gemma 3, arXiv 2503.19786)."""
    frequencies_C = _frequencies(x_BTHC, config.rope.local_theta, config.rope.fraction)
    return _rotate(x_BTHC, positions_BT, Rope(frequencies_C, 1.0))


def _frequencies(x_BTHC: jax.Array, theta: Any, fraction: float) -> jax.Array:
    """Return the radians per position of each pair of channels."""
    half = int(x_BTHC.shape[-1] * fraction) // 2
    return jnp.asarray(theta, jnp.float32) ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _rotate(x_BTHC: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    angles_BTHC = positions_BT[:, :, None, None].astype(jnp.float32) * rope.frequencies_C[None, None, None, :]
    cos, sin = rope.magnitude * jnp.cos(angles_BTHC), rope.magnitude * jnp.sin(angles_BTHC)
    half = rope.frequencies_C.shape[0]
    wide = to_float32(x_BTHC)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x_BTHC.dtype)


def alibi(query_positions_BT: jax.Array, key_positions_BS: jax.Array, config: ModelConfig) -> jax.Array:
    """Return ALiBi (arXiv 2108.12409): minus the distance, times a slope for each head."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    slopes_H = jnp.asarray(alibi_slopes(config.attention.n_heads), jnp.float32)
    return -slopes_H[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the ALiBi slopes, of shape (heads,).

    For n heads, a power of two, they are 2^(-8/n), 2^(-16/n), and so on. For other numbers, they are those of the
    next smaller power of two, followed by every other slope of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, more])[:heads]


POSITIONS: dict[str, PositionEncoding] = {
    "learned": PositionEncoding(embed=LearnedPositions),
    "rope": PositionEncoding(rotate=apply_rope),
    "local_rope": PositionEncoding(rotate=apply_local_rope),
    "alibi": PositionEncoding(bias=alibi),
    "none": PositionEncoding(),
}
