"""Layers that all parts of a model share: linear, normalization and dropout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.matmul import ROW_STATISTICS, matmul, recompute, recompute_in_backward, to_float32


def normal_init(std: Any) -> nn.initializers.Initializer:
    """Return an initializer of normal values; `std` may be traced."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return std * jax.random.normal(key, shape, dtype)

    return initialize


def broadcast_channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Add leading axes to a vector so that it broadcasts along the last axis of x (implicit rank promotion is off)."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


class Linear(nn.Module):
    """y = x W (+ b), with float32 parameters, computed in config.precision.matmul_dtype or else the model's dtype.

    An activation before the layer is an argument of its call, so that the backward pass recomputes the activation and
    the cast of W instead of reading them from memory (see `recompute_in_backward`).

    Attributes:
        config: Config of the block.
        features: Number of outputs.
        residual: Whether the layer writes to the residual stream; its initial values are then divided by
            sqrt(2 n_layers), so that the stream does not grow with depth (GPT-2).
        has_bias: None for the model's default.
    """

    config: ModelConfig
    features: int
    residual: bool = False
    has_bias: bool | None = None

    @nn.compact
    def __call__(self, *inputs: jax.Array, activation: Callable[..., jax.Array] | None = None) -> jax.Array:
        """Return activation(*inputs) W (+ b), where the elementwise activation is the identity by default."""
        std = self.config.init_std
        if self.residual:
            std = std / (2 * self.config.n_layers) ** 0.5
        kernel = self.param("kernel", normal_init(std), (inputs[0].shape[-1], self.features))

        def multiply(kernel: Any, *inputs: jax.Array) -> jax.Array:
            return matmul(activation(*inputs) if activation else inputs[0], kernel, self.config)

        y = recompute_in_backward(multiply, self.config)(kernel, *inputs)
        if self.config.bias if self.has_bias is None else self.has_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + broadcast_channels(bias, y).astype(y.dtype)
        return y


def default_glu_width(d_model: int) -> int:
    """Return 8/3 d_model, rounded up to a multiple of 8: three such matrices are as large as two of 4 d_model."""
    return -(-8 * d_model // 3 // 8) * 8


def dropout(x: jax.Array, rate: jax.Array | float, inputs: BlockInputs, site: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the others to keep the mean (arXiv 1207.0580).

    `site` selects the random numbers, and must be different for each call in a block.
    """
    if inputs.dropout_key is None:
        return x
    is_kept = jax.random.bernoulli(jax.random.fold_in(inputs.dropout_key, site), 1.0 - rate, x.shape)
    return jnp.where(is_kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


class LayerNorm(nn.Module):
    """Layer normalization with a learned scale, and with a bias if config.has_norm_bias (arXiv 1607.06450)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]) if self.config.has_norm_bias else None
        return layer_norm(x, scale, bias, self.config.norm_eps)


class RMSNorm(nn.Module):
    """RMS normalization (arXiv 1910.07467) with a learned scale, or with 1 + scale if `zero_centered` (Gemma)."""

    config: ModelConfig
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initializer = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        scale = self.param("scale", initializer, x.shape[-1:])
        return rms_norm(x, 1 + scale if self.zero_centered else scale, self.config.norm_eps)


@recompute
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: Any) -> jax.Array:
    """Normalize the mean and variance along the last axis in float32, and return the result in the dtype of x."""
    wide = to_float32(x)
    centered = wide - checkpoint_name(jnp.mean(wide, axis=-1, keepdims=True), ROW_STATISTICS)
    variance = checkpoint_name(jnp.mean(jnp.square(centered), axis=-1, keepdims=True), ROW_STATISTICS)
    y = centered * jax.lax.rsqrt(variance + eps) * broadcast_channels(scale, x)
    return (y if bias is None else y + broadcast_channels(bias, x)).astype(x.dtype)


@recompute
def rms_norm(x: jax.Array, scale: jax.Array, eps: Any) -> jax.Array:
    """Normalize the mean square along the last axis in float32, and return the result in the dtype of x."""
    wide = to_float32(x)
    mean_square = checkpoint_name(jnp.mean(jnp.square(wide), axis=-1, keepdims=True), ROW_STATISTICS)
    return (wide * jax.lax.rsqrt(mean_square + eps) * broadcast_channels(scale, x)).astype(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "zero_centered_rmsnorm": partial(RMSNorm, zero_centered=True),
}
