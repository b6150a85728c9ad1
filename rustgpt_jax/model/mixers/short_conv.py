"""Parts shared by recurrent mixers: document boundaries and a short causal convolution of each channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.layers import broadcast_channels, normal_init
from rustgpt_jax.model.matmul import to_float32


def document_starts(inputs: BlockInputs) -> jax.Array:
    """Return whether a token begins a document within the row (B, T).

    The first token of a row is not counted, because it may continue a cached document.
    """
    before, now = inputs.segments_BT[:, :-1], inputs.segments_BT[:, 1:]
    return jnp.pad((now != before) & (now > 0), ((0, 0), (1, 0)))


def document_ids(inputs: BlockInputs) -> jax.Array:
    """Return document_BT, the index of each token's document in its row; padding gets that of the tokens before it."""
    return jnp.cumsum(document_starts(inputs), axis=1)


class ShortConvolution(nn.Module):
    """y_t = sum over j < conv_width of kernel_j * x_(t-j), over tokens in the document of t (+ bias).

    The kernel has shape (conv_width, channels), and its last row applies to the token itself. Its initial variance
    preserves that of x.
    """

    config: ModelConfig
    channels: int

    @staticmethod
    def init_history(config: ModelConfig, batch: int, channels: int) -> jax.Array:
        """Return zeros for the conv_width - 1 inputs before the first token."""
        return jnp.zeros((batch, config.recurrent.conv_width - 1, channels), config.dtype)

    @nn.compact
    def __call__(
        self, x_BTR: jax.Array, inputs: BlockInputs, history: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return y_BTR, and the last conv_width - 1 inputs of each row without padding (None without a history)."""
        width, (batch, length, _) = self.config.recurrent.conv_width, x_BTR.shape
        kernel_WR = self.param("kernel", normal_init(width**-0.5), (width, self.channels))
        earlier = self.init_history(self.config, batch, self.channels) if history is None else history
        all_BSR = jnp.concatenate([earlier.astype(x_BTR.dtype), x_BTR], axis=1)
        document_BT = document_ids(inputs)
        document_BS = jnp.pad(document_BT, ((0, 0), (width - 1, 0)))

        def weighted(row: int) -> jax.Array:
            tokens = slice(row, row + length)
            is_same_BT1 = (document_BS[:, tokens] == document_BT)[..., None]
            return jnp.where(is_same_BT1, to_float32(all_BSR[:, tokens]) * kernel_WR[row][None, None], 0)

        y_BTR = sum((weighted(row) for row in range(1, width)), start=weighted(0))
        if self.config.bias:
            y_BTR = y_BTR + broadcast_channels(self.param("bias", nn.initializers.zeros, (self.channels,)), y_BTR)
        if history is not None:
            n_tokens_B = jnp.sum(inputs.segments_BT > 0, axis=1)
            last_BW = n_tokens_B[:, None] + jnp.arange(width - 1)[None]
            history = jnp.take_along_axis(all_BSR, last_BW[..., None], axis=1).astype(history.dtype)
        return y_BTR.astype(x_BTR.dtype), history
