"""The linear layer that all parts share, and what gated layers share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.matmul import matmul


def normal_init(std: Any) -> nn.initializers.Initializer:
    """Normal initial values with a standard deviation that may be traced."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return std * jax.random.normal(key, shape, dtype)

    return initialize


def broadcast_channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector shaped to act on the last axis of `x`: broadcasting between ranks is always written out here."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


class Linear(nn.Module):
    """y = x W (+ b), in the model's dtype, from float32 parameters rounded to config.precision.matmul_dtype.

    W has shape (inputs, features). `residual` marks a projection into the residual stream, whose initial values are
    divided by sqrt(2 n_layers), so that the stream does not grow with depth (GPT-2). `has_bias` None: as the model.
    """

    config: ModelConfig
    features: int
    residual: bool = False
    has_bias: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        std = self.config.init_std
        if self.residual:
            std = std / (2 * self.config.n_layers) ** 0.5
        kernel = self.param("kernel", normal_init(std), (x.shape[-1], self.features))
        y = matmul(x, kernel, self.config)
        if self.config.bias if self.has_bias is None else self.has_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + broadcast_channels(bias, y).astype(y.dtype)
        return y


def default_glu_width(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 8: three matrices of this width have as many weights as two of 4 d_model."""
    return -(-8 * d_model // 3 // 8) * 8


def dropout(x: jax.Array, rate: jax.Array | float, context: BlockInputs, site: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the others to keep the mean (arXiv 1207.0580).

    `site` selects the random numbers: each use in a block has its own.
    """
    if context.dropout_key is None:
        return x
    is_kept = jax.random.bernoulli(jax.random.fold_in(context.dropout_key, site), 1.0 - rate, x.shape)
    return jnp.where(is_kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
