"""Feed-forward layers of which each token uses every weight."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.context import Context, Signals
from rustgpt_jax.model.linear import Linear

Activation = Callable[[jax.Array], jax.Array]


class FeedForward(nn.Module):
    """activation(x W_up) W_down, with a hidden width of d_ff or 4 d_model (arXiv 1706.03762)."""

    config: ModelConfig
    activation: Activation

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Signals]:
        del context
        hidden_BTF = self.activation(Linear(self.config, self.config.d_ff or 4 * self.config.d_model, name="up")(x_BTD))
        return Linear(self.config, self.config.d_model, residual=True, name="down")(hidden_BTF), {}


class GatedFeedForward(nn.Module):
    """(activation(x W_gate) * x W_up) W_down, with a hidden width of d_ff or about 8/3 d_model (arXiv 2002.05202)."""

    config: ModelConfig
    activation: Activation

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Signals]:
        del context
        width = self.config.d_ff or gated_width(self.config.d_model)
        gate_BTF = self.activation(Linear(self.config, width, name="gate")(x_BTD))
        up_BTF = Linear(self.config, width, name="up")(x_BTD)
        return Linear(self.config, self.config.d_model, residual=True, name="down")(gate_BTF * up_BTF), {}


def gated_width(d_model: int) -> int:
    """8/3 d_model, up to a multiple of 8: three matrices of this width have as many weights as two of 4 d_model."""
    return -(-8 * d_model // 3 // 8) * 8


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))
