"""Feed-forward layers, which transform each token independently.

A feed-forward is a Flax module made from the config of its block, with the interface `FeedForward` or
`FeedForwardWithMetrics` of interfaces.py.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.layers import Linear, default_glu_width
from rustgpt_jax.model.matmul import ACTIVATIONS, Activation, apply_activation
from rustgpt_jax.model.moe import MixtureOfExperts


class MLP(nn.Module):
    """activation(x W_up) W_down, with a hidden width of d_ff or 4 d_model (arXiv 1706.03762)."""

    config: ModelConfig
    activation: Activation

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Return the hidden width."""
        return config.d_ff or 4 * config.d_model

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = _linear(self.config, self.width(self.config), "up")(x_BTD)
        activation = partial(apply_activation, self.activation, config=self.config)
        return _linear(self.config, self.config.d_model, "down", residual=True)(up_BTF, activation=activation)


class GatedMLP(nn.Module):
    """(activation(x W_gate) * x W_up) W_down, with a hidden width of d_ff or about 8/3 d_model (arXiv 2002.05202)."""

    config: ModelConfig
    activation: Activation

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Return the hidden width."""
        return config.d_ff or default_glu_width(config.d_model)

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = self.width(self.config)
        gate_BTF = _linear(self.config, width, "gate")(x_BTD)
        up_BTF = _linear(self.config, width, "up")(x_BTD)

        def product(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
            return apply_activation(self.activation, gate_BTF, self.config) * up_BTF

        return _linear(self.config, self.config.d_model, "down", residual=True)(gate_BTF, up_BTF, activation=product)


def _linear(config: ModelConfig, features: int, name: str, residual: bool = False) -> Linear:
    return Linear(config, features, residual=residual, has_bias=config.has_feedforward_bias, name=name)


# gelu is the tanh approximation, as in GPT-2 (arXiv 1606.08415); relu_squared from Primer (arXiv 2109.08668); swiglu as
# in PaLM and Llama, geglu as in Gemma, reglu (arXiv 2002.05202); moe as in Mixtral (arXiv 2401.04088).
FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {
    "gelu": partial(MLP, activation=ACTIVATIONS["gelu"]),
    "gelu_exact": partial(MLP, activation=ACTIVATIONS["gelu_exact"]),
    "relu": partial(MLP, activation=ACTIVATIONS["relu"]),
    "relu_squared": partial(MLP, activation=ACTIVATIONS["relu_squared"]),
    "swiglu": partial(GatedMLP, activation=ACTIVATIONS["silu"]),
    "geglu": partial(GatedMLP, activation=ACTIVATIONS["gelu"]),
    "geglu_exact": partial(GatedMLP, activation=ACTIVATIONS["gelu_exact"]),
    "reglu": partial(GatedMLP, activation=ACTIVATIONS["relu"]),
    "relu_squared_glu": partial(GatedMLP, activation=ACTIVATIONS["relu_squared"]),
    "moe": partial(MixtureOfExperts),
}
