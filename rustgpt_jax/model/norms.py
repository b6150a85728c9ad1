"""Normalisation over the last axis, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.linear import over_channels


class LayerNorm(nn.Module):
    """Zero mean and unit variance, then a learned scale, and a bias where the model has biases (arXiv 1607.06450)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.config.norm_epsilon)
        y = y * over_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)
        if self.config.bias:
            y = y + over_channels(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Unit root mean square, then a learned scale (arXiv 1910.07467)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        return (y * over_channels(self.param("scale", nn.initializers.ones, x.shape[-1:]), x)).astype(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
