"""Feed-forward layers: what a block does to each token by itself.

A feed-forward is a Flax leaf made from the config of its block. It has

    __call__(x_BTD, context)     y_BTD, and its signals: named numbers to be recorded in training, {} for none

The signal AUXILIARY_LOSS is added to the loss.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.context import Context, Signals
from rustgpt_jax.model.derivatives import Activation, activated
from rustgpt_jax.model.experts import MixtureOfExperts
from rustgpt_jax.model.linear import Linear, gated_width


class FeedForward(nn.Module):
    """activation(x W_up) W_down, with a hidden width of d_ff or 4 d_model (arXiv 1706.03762)."""

    config: ModelConfig
    activation: Activation

    @staticmethod
    def width(config: ModelConfig) -> int:
        """The hidden width."""
        return config.d_ff or 4 * config.d_model

    @classmethod
    def n_parameters(cls, config: ModelConfig) -> int:
        """The parameters of a layer: two matrices, and their biases where the model has biases."""
        width = cls.width(config)
        return 2 * config.d_model * width + config.bias * (width + config.d_model)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Signals]:
        del context
        up_BTF = Linear(self.config, self.width(self.config), name="up")(x_BTD)
        hidden_BTF = activated(self.activation, up_BTF, self.config)
        return Linear(self.config, self.config.d_model, residual=True, name="down")(hidden_BTF), {}


class GatedFeedForward(nn.Module):
    """(activation(x W_gate) * x W_up) W_down, with a hidden width of d_ff or about 8/3 d_model (arXiv 2002.05202)."""

    config: ModelConfig
    activation: Activation

    @staticmethod
    def width(config: ModelConfig) -> int:
        """The hidden width."""
        return config.d_ff or gated_width(config.d_model)

    @classmethod
    def n_parameters(cls, config: ModelConfig) -> int:
        """The parameters of a layer: three matrices, and their biases where the model has biases."""
        width = cls.width(config)
        return 3 * config.d_model * width + config.bias * (2 * width + config.d_model)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Signals]:
        del context
        width = self.width(self.config)
        gate_BTF = activated(self.activation, Linear(self.config, width, name="gate")(x_BTD), self.config)
        up_BTF = Linear(self.config, width, name="up")(x_BTD)
        return Linear(self.config, self.config.d_model, residual=True, name="down")(gate_BTF * up_BTF), {}


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# gelu in its tanh form, as in GPT-2 (arXiv 1606.08415); relu_squared from Primer (arXiv 2109.08668); swiglu as in PaLM
# and Llama, geglu as in Gemma (arXiv 2002.05202); moe as in Mixtral (arXiv 2401.04088).
FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {
    "gelu": partial(FeedForward, activation=jax.nn.gelu),
    "relu": partial(FeedForward, activation=jax.nn.relu),
    "relu_squared": partial(FeedForward, activation=relu_squared),
    "swiglu": partial(GatedFeedForward, activation=jax.nn.silu),
    "geglu": partial(GatedFeedForward, activation=jax.nn.gelu),
    "moe": partial(MixtureOfExperts, activation=jax.nn.silu),
}
