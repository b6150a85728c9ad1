"""Feed-forward layers: what a block does to each token by itself."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model.linear import Linear

Activation = Callable[[jax.Array], jax.Array]


class FeedForward(nn.Module):
    """activation(x W_up) W_down, with a hidden width of d_ff or 4 d_model (arXiv 1706.03762)."""

    config: ModelConfig
    activation: Activation

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = self.activation(Linear(self.config, self.config.d_ff or 4 * self.config.d_model, name="up")(x_BTD))
        return Linear(self.config, self.config.d_model, residual=True, name="down")(hidden_BTF)


class GatedFeedForward(nn.Module):
    """(activation(x W_gate) * x W_up) W_down, with a hidden width of d_ff or about 8/3 d_model (arXiv 2002.05202)."""

    config: ModelConfig
    activation: Activation

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = self.config.d_ff or -(-8 * self.config.d_model // 3 // 8) * 8
        gate_BTF = self.activation(Linear(self.config, width, name="gate")(x_BTD))
        up_BTF = Linear(self.config, width, name="up")(x_BTD)
        return Linear(self.config, self.config.d_model, residual=True, name="down")(gate_BTF * up_BTF)


# gelu in its tanh form, as in GPT-2 (arXiv 1606.08415); swiglu as in PaLM and Llama (arXiv 2002.05202).
FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {
    "gelu": partial(FeedForward, activation=jax.nn.gelu),
    "relu": partial(FeedForward, activation=jax.nn.relu),
    "swiglu": partial(GatedFeedForward, activation=jax.nn.silu),
}
