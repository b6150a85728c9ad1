"""How the model learns where a token stands.

By a vector added to its embedding, by turning queries and keys, or by scores that depend on the distance.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.dtypes import widened
from rustgpt_jax.model.linear import scaled_normal
from rustgpt_jax.model.rope_scaling import ROPE_SCALINGS, Rope
from rustgpt_jax.registry import choose


class PositionScheme(NamedTuple):
    """The three places where positions may enter; None where they do not.

    embed: a Flax leaf that maps positions_BT to vectors (B, T, D) added to the embeddings.
    rotate: a function of (x_BTHC, positions_BT, config) applied to queries and keys.
    bias: a function of (query_positions_BT, key_positions_BS, config) that gives bias_BHTS, added to the scores.
    """

    embed: type[nn.Module] | None = None
    rotate: Callable[[jax.Array, jax.Array, ModelConfig], jax.Array] | None = None
    bias: Callable[[jax.Array, jax.Array, ModelConfig], jax.Array] | None = None


class LearnedPositions(nn.Module):
    """A table with one vector for each position up to context_length."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", scaled_normal(self.config.init_std), shape)[positions_BT]


def rotary(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): channel c and c + C/2 turn by position * base^(-2c/C) radians.

    C counts the channels that are rotated, the first `rope_fraction` of the head; the rest stay as they are.
    """
    rope = choose(ROPE_SCALINGS, config.rope_scaling, "config.model.rope_scaling")(
        _frequencies(x_BTHC, config.rope_base, config.rope_fraction), config
    )
    return _turned(x_BTHC, positions_BT, rope)


def local_rotary(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """RoPE with a base of its own and no scaling, for layers that see a short window (Gemma 3, arXiv 2503.19786)."""
    frequencies_C = _frequencies(x_BTHC, config.local_rope_base, config.rope_fraction)
    return _turned(x_BTHC, positions_BT, Rope(frequencies_C, 1.0))


def _frequencies(x_BTHC: jax.Array, base: Any, fraction: float) -> jax.Array:
    """Radians a position that each pair of channels turns by."""
    half = int(x_BTHC.shape[-1] * fraction) // 2
    return jnp.asarray(base, jnp.float32) ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _turned(x_BTHC: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    angles_BTHC = positions_BT[:, :, None, None].astype(jnp.float32) * rope.frequencies_C[None, None, None, :]
    cos, sin = rope.magnitude * jnp.cos(angles_BTHC), rope.magnitude * jnp.sin(angles_BTHC)
    half = rope.frequencies_C.shape[0]
    wide = widened(x_BTHC)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTHC.dtype)


def alibi(query_positions_BT: jax.Array, key_positions_BS: jax.Array, config: ModelConfig) -> jax.Array:
    """Attention with linear biases (arXiv 2108.12409): minus the distance, times a slope of each head."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    slopes_H = jnp.asarray(alibi_slopes(config.n_heads), jnp.float32)
    return -slopes_H[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi: 2^(-8/n), 2^(-16/n), ... for the powers of two n; for others those of the power below them,
    then every other one of twice that power."""
    power = 1 << (heads.bit_length() - 1)
    of_power = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    of_twice = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([of_power, of_twice])[:heads]


POSITIONS: dict[str, PositionScheme] = {
    "learned": PositionScheme(embed=LearnedPositions),
    "rope": PositionScheme(rotate=rotary),
    "local_rope": PositionScheme(rotate=local_rotary),
    "alibi": PositionScheme(bias=alibi),
    "none": PositionScheme(),
}
