"""Normalisation over the last axis, computed in float32 at least."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.linear import broadcast_channels
from rustgpt_jax.model.matmul import to_float32


class LayerNorm(nn.Module):
    """Layer normalization with a learned scale, and a bias if norms have biases (arXiv 1607.06450)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = to_float32(x)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.config.norm_eps)
        y = y * broadcast_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)
        if self.config.has_norm_bias:
            y = y + broadcast_channels(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Unit root mean square, then a learned scale (arXiv 1910.07467); `zero_centered`, 1 + a learned scale (Gemma)."""

    config: ModelConfig
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = to_float32(x)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        start = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        scale = broadcast_channels(self.param("scale", start, x.shape[-1:]), x)
        return (y * (1 + scale if self.zero_centered else scale)).astype(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "zero_centered_rmsnorm": partial(RMSNorm, zero_centered=True),
}
