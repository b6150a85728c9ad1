"""The real-gated linear recurrent unit (RG-LRU): a recurrent state of fixed size with a learned decay per channel."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.layers import Linear, broadcast_channels, normal_init
from rustgpt_jax.model.matmul import to_float32
from rustgpt_jax.model.mixers.short_conv import ShortConvolution, document_starts

# The constant c of the paper: the exponent of the decay when the recurrence gate is open.
LRU_C = 8.0


class RecurrentCache(NamedTuple):
    """The state after the earlier tokens, and the last inputs of the convolution."""

    state_BR: jax.Array
    history: jax.Array


class RecurrentGatedLRU(nn.Module):
    """Griffin's recurrent block (arXiv 2402.19427): GeLU(x W) * RG-LRU(convolution(x W)), projected back.

    The RG-LRU has R channels, each with

        r_t = sigmoid(W_a x_t),  i_t = sigmoid(W_x x_t),  log a_t = -c softplus(Lambda) r_t
        h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (i_t * x_t)

    where Lambda is the parameter `decay_rate`. h is 0 before a document and unchanged by padding. If
    `scale_first_token` is False, h_0 = i_0 * x_0, as in RecurrentGemma. If `recurrent.blocks` is set, W_a and W_x are
    block diagonal, as in Griffin.
    """

    config: ModelConfig

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Return R, the number of channels of the state."""
        return config.recurrent.width or config.d_model

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> RecurrentCache:
        """Return the initial state, whose size does not depend on `length`."""
        del length
        state_BR = jnp.zeros((batch, cls.width(config)), jnp.promote_types(config.dtype, jnp.float32))
        return RecurrentCache(state_BR, ShortConvolution.init_history(config, batch, cls.width(config)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: BlockInputs, cache: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        config, width = self.config, self.width(self.config)
        gate_BTR = jax.nn.gelu(Linear(config, width, name="gate")(x_BTD))
        state_BR, history = (None, None) if cache is None else cache
        convolution = ShortConvolution(config, width, name="convolution")
        x_BTR, history = convolution(Linear(config, width, name="input")(x_BTD), inputs, history)

        gate = Linear if config.recurrent.blocks is None else BlockDiagonalLinear
        r_BTR = jax.nn.sigmoid(to_float32(gate(config, width, name="recurrence_gate")(x_BTR)))
        i_BTR = jax.nn.sigmoid(to_float32(gate(config, width, name="input_gate")(x_BTR)))
        rate_R = jax.nn.softplus(self.param("decay_rate", initial_decay_rate, (width,)))
        log_a_BTR = -LRU_C * rate_R[None, None] * r_BTR
        # At least the smallest normal number, because the derivative of the square root at 0 is infinite.
        variance_BTR = jnp.maximum(-jnp.expm1(2 * log_a_BTR), jnp.finfo(log_a_BTR.dtype).tiny)
        if not config.recurrent.scale_first_token:
            variance_BTR = jnp.where(inputs.positions_BT[..., None] == 0, 1, variance_BTR)
        new_BTR = jnp.sqrt(variance_BTR) * i_BTR * to_float32(x_BTR)

        is_token_BT1, starts_BT1 = (inputs.segments_BT > 0)[..., None], document_starts(inputs)[..., None]
        kept_BTR = jnp.where(is_token_BT1, jnp.where(starts_BT1, 0, jnp.exp(log_a_BTR)), 1)
        h_BTR = linear_recurrence(kept_BTR, jnp.where(is_token_BT1, new_BTR, 0), state_BR)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(gate_BTR * h_BTR.astype(gate_BTR.dtype))
        return y_BTD, None if history is None else RecurrentCache(h_BTR[:, -1], history)


class BlockDiagonalLinear(nn.Module):
    """y = x W + b with a block-diagonal W of config.recurrent.blocks blocks.

    The blocks are one parameter of shape (blocks, channels per block, channels per block).
    """

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x_BTR: jax.Array) -> jax.Array:
        blocks = self.config.recurrent.blocks
        assert blocks is not None
        channels = self.features // blocks
        kernel_GCE = self.param("kernel", normal_init(self.config.init_std), (blocks, channels, channels))
        x_BTGC = x_BTR.reshape(*x_BTR.shape[:-1], blocks, channels)
        y_BTGE = jnp.einsum("BTGC,GCE->BTGE", x_BTGC, kernel_GCE.astype(x_BTR.dtype))
        y_BTR = y_BTGE.reshape(x_BTR.shape)
        if self.config.bias:
            bias_R = self.param("bias", nn.initializers.zeros, (self.features,))
            y_BTR = y_BTR + broadcast_channels(bias_R, y_BTR).astype(y_BTR.dtype)
        return y_BTR


def linear_recurrence(a_BTR: jax.Array, b_BTR: jax.Array, state_BR: jax.Array | None = None) -> jax.Array:
    """Return h_BTR of h_t = a_t h_(t-1) + b_t in log T parallel steps, from an initial state or else from 0."""
    if state_BR is not None:
        b_BTR = b_BTR.at[:, 0].add(a_BTR[:, 0] * state_BR)

    def compose(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (a_BTR, b_BTR), axis=1)[1]


def initial_decay_rate(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialize Lambda such that a_t is uniform between 0.9 and 0.999 where r_t is 1."""
    decay = jax.random.uniform(key, shape, dtype, 0.9, 0.999)
    return jnp.log(jnp.expm1(-jnp.log(decay) / LRU_C))
