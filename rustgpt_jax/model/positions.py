"""How the model learns where a token stands: by a vector added to its embedding, or by turning queries and keys."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.linear import scaled_normal


class PositionScheme(NamedTuple):
    """The two places where positions may enter.

    embed: a Flax leaf that maps positions_BT to vectors (B, T, D) added to the embeddings, or None.
    rotate: a function of (x_BTHC, positions_BT, config) applied to queries and keys.
    """

    embed: type[nn.Module] | None
    rotate: Callable[[jax.Array, jax.Array, ModelConfig], jax.Array]


class LearnedPositions(nn.Module):
    """A table with one vector for each position up to context_length."""

    config: ModelConfig

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = (self.config.context_length, self.config.d_model)
        return self.param("table", scaled_normal(self.config.init_std), shape)[positions_BT]


def unrotated(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Queries and keys as they are."""
    del positions_BT, config
    return x_BTHC


def rotary(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): channel c and c + C/2 turn by position * base^(-2c/C) radians."""
    half = x_BTHC.shape[-1] // 2
    frequencies_C = jnp.asarray(config.rope_base, jnp.float32) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BTHC = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_C[None, None, None, :]
    cos, sin = jnp.cos(angles_BTHC), jnp.sin(angles_BTHC)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHC.dtype)


POSITIONS: dict[str, PositionScheme] = {
    "learned": PositionScheme(embed=LearnedPositions, rotate=unrotated),
    "rope": PositionScheme(embed=None, rotate=rotary),
}
