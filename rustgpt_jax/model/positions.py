"""How the model learns where a token stands.

By a vector added to its embedding, by turning queries and keys, or by scores that depend on the distance.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import PositionEncoding
from rustgpt_jax.model.linear import normal_init
from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.registry import lookup

# RoPE for contexts longer than those that a model was trained with: which channels turn how much more slowly.


class Rope(NamedTuple):
    """Radians a position by which each pair of channels turns, and what queries and keys are multiplied by."""

    frequencies_C: jax.Array
    magnitude: Any


def unscaled(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """The frequencies as they are."""
    return Rope(frequencies_C, _magnitude(config, 1.0))


def linear(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """All channels turn more slowly by the factor (arXiv 2306.15595)."""
    return Rope(frequencies_C / config.rope.factor, _magnitude(config, 1.0))


def llama3(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Slow channels turn more slowly by the factor, fast ones do not: by turns in the old context (Llama 3.1)."""
    turns_C = _original_context(config) * frequencies_C / (2 * math.pi)
    kept_C = (turns_C - config.rope.beta_slow) / (config.rope.beta_fast - config.rope.beta_slow)
    return Rope(_mixed(frequencies_C, config.rope.factor, kept_C), _magnitude(config, 1.0))


def yarn(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """As llama3, with the ramp along the number of the channel, and sharper attention (arXiv 2309.00071)."""

    def channel(turns: Any) -> jax.Array:
        """The channel, as a real number, that makes so many turns in the old context."""
        wavelength = _original_context(config) / jnp.asarray(turns, jnp.float32)
        return half * jnp.log(wavelength / (2 * math.pi)) / jnp.log(jnp.asarray(config.rope.theta, jnp.float32))

    half = frequencies_C.shape[0]
    fast, slow = channel(config.rope.beta_fast), channel(config.rope.beta_slow)
    if config.rope.truncate:
        fast, slow = jnp.floor(fast), jnp.ceil(slow)
    fast, slow = jnp.maximum(fast, 0), jnp.minimum(slow, 2 * half - 1)
    kept_C = 1 - (jnp.arange(half, dtype=jnp.float32) - fast) / jnp.maximum(slow - fast, 1e-3)
    magnitude = 0.1 * jnp.log(jnp.asarray(config.rope.factor, jnp.float32)) + 1.0
    return Rope(_mixed(frequencies_C, config.rope.factor, kept_C), _magnitude(config, magnitude))


def longrope(frequencies_C: jax.Array, config: ModelConfig) -> Rope:
    """Divide the frequency of each pair of channels by its own factor and scale attention (arXiv 2402.13753)."""
    factors_C = jnp.asarray(longrope_factors(config), jnp.float32)
    factor = jnp.asarray(config.rope.factor, jnp.float32)
    magnitude = jnp.sqrt(1 + jnp.log(factor) / math.log(_original_context(config)))
    return Rope(frequencies_C / factors_C, _magnitude(config, magnitude))


def longrope_factors(config: ModelConfig) -> tuple[float, ...]:
    """Return the longrope factors for a model's context: the same for all texts, so that KV caches stay valid."""
    is_long = config.context_length > _original_context(config)
    return config.rope.long_factors if is_long else config.rope.short_factors


def _mixed(frequencies_C: jax.Array, factor: Any, kept_C: jax.Array) -> jax.Array:
    """Between frequencies divided by the factor, at kept_C 0 or less, and those as they are, at 1 or more."""
    kept_C = jnp.clip(kept_C, 0.0, 1.0)
    return kept_C * frequencies_C + (1 - kept_C) * frequencies_C / factor


def _original_context(config: ModelConfig) -> int:
    assert config.rope.original_context is not None, "resolve refuses a config without it"
    return config.rope.original_context


def _magnitude(config: ModelConfig, usual: Any) -> Any:
    return usual if config.rope.attention_factor is None else config.rope.attention_factor


ROPE_SCALINGS: dict[str, Callable[[jax.Array, ModelConfig], Rope]] = {
    "none": unscaled,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


class LearnedPositions(nn.Module):
    """A table with one vector for each position up to context_length."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", normal_init(self.config.init_std), shape)[positions_BT]


def apply_rope(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): channel c and c + C/2 turn by position * base^(-2c/C) radians.

    C counts the channels that are rotated, the first `rope.fraction` of the head; the rest stay as they are.
    """
    rope = lookup(ROPE_SCALINGS, config.rope.scaling, "config.model.rope.scaling")(
        _frequencies(x_BTHC, config.rope.theta, config.rope.fraction), config
    )
    return _turned(x_BTHC, positions_BT, rope)


def apply_local_rope(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """RoPE with a base of its own and no scaling, for layers that see a short window (Gemma 3, arXiv 2503.19786)."""
    frequencies_C = _frequencies(x_BTHC, config.rope.local_theta, config.rope.fraction)
    return _turned(x_BTHC, positions_BT, Rope(frequencies_C, 1.0))


def _frequencies(x_BTHC: jax.Array, base: Any, fraction: float) -> jax.Array:
    """Radians a position that each pair of channels turns by."""
    half = int(x_BTHC.shape[-1] * fraction) // 2
    return jnp.asarray(base, jnp.float32) ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _turned(x_BTHC: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    angles_BTHC = positions_BT[:, :, None, None].astype(jnp.float32) * rope.frequencies_C[None, None, None, :]
    cos, sin = rope.magnitude * jnp.cos(angles_BTHC), rope.magnitude * jnp.sin(angles_BTHC)
    half = rope.frequencies_C.shape[0]
    wide = to_float32(x_BTHC)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTHC.dtype)


def alibi(query_positions_BT: jax.Array, key_positions_BS: jax.Array, config: ModelConfig) -> jax.Array:
    """Attention with linear biases (arXiv 2108.12409): minus the distance, times a slope of each head."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    slopes_H = jnp.asarray(alibi_slopes(config.attention.n_heads), jnp.float32)
    return -slopes_H[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slopes of ALiBi (heads,), one for each head.

    For n a power of two, they are 2^(-8/n), 2^(-16/n), and so on. For other numbers of heads, they are those of the
    power of two below, then every other one of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    of_power = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    of_twice = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([of_power, of_twice])[:heads]


POSITIONS: dict[str, PositionEncoding] = {
    "learned": PositionEncoding(embed=LearnedPositions),
    "rope": PositionEncoding(rotate=apply_rope),
    "local_rope": PositionEncoding(rotate=apply_local_rope),
    "alibi": PositionEncoding(bias=alibi),
    "none": PositionEncoding(),
}
