"""Token mixers: how a block moves information between tokens, in training and from a cache, by one forward."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.errors import choose
from rustgpt_jax.model.context import Context, dropout
from rustgpt_jax.model.linear import Linear
from rustgpt_jax.model.norms import RMSNorm
from rustgpt_jax.model.positions import POSITIONS


class AttentionCache(NamedTuple):
    """Keys and values of the tokens so far, each in the slot of its position."""

    k_BSKC: jax.Array
    v_BSKC: jax.Array

    def write(self, k_BTKC: jax.Array, v_BTKC: jax.Array, context: Context) -> "AttentionCache":
        """The cache with new keys and values in their slots. Padding, and what is beyond the last slot, is dropped."""
        batch, length = self.k_BSKC.shape[:2]
        rows_BT = jnp.arange(batch)[:, None]
        slots_BT = jnp.where(context.segments_BT > 0, context.positions_BT, length)
        return AttentionCache(
            self.k_BSKC.at[rows_BT, slots_BT].set(k_BTKC, mode="drop"),
            self.v_BSKC.at[rows_BT, slots_BT].set(v_BTKC, mode="drop"),
        )


def causal_mask(context: Context) -> jax.Array:
    """visible_BTS: a token sees itself and the earlier tokens of its own document."""
    order_T = jnp.arange(context.segments_BT.shape[1])
    earlier_TS = order_T[:, None] >= order_T[None, :]
    same_BTS = context.segments_BT[:, :, None] == context.segments_BT[:, None, :]
    return earlier_TS[None] & same_BTS


def cached_mask(context: Context, length: int) -> jax.Array:
    """visible_BTS: a token sees the cache's slots up to its own position."""
    return jnp.arange(length)[None, None, :] <= context.positions_BT[:, :, None]


class Attention(nn.Module):
    """Causal softmax attention (arXiv 1706.03762), with grouped heads (arXiv 2305.13245) and QK-norm as options."""

    config: ModelConfig

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> AttentionCache:
        """An empty cache for `batch` rows of at most `length` tokens, in the model's dtype."""
        heads = config.n_kv_heads or config.n_heads
        shape = (batch, length, heads, config.head_dim or config.d_model // config.n_heads)
        return AttentionCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: AttentionCache | None
    ) -> tuple[jax.Array, AttentionCache | None]:
        config = self.config
        n_heads, n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        channels = config.head_dim or config.d_model // config.n_heads
        batch, length = x_BTD.shape[:2]

        def heads(name: str, count: int) -> jax.Array:
            return Linear(config, count * channels, name=name)(x_BTD).reshape(batch, length, count, channels)

        q_BTHC, k_BTKC, v_BTKC = heads("query", n_heads), heads("key", n_kv_heads), heads("value", n_kv_heads)
        if config.qk_norm:
            q_BTHC = RMSNorm(config, name="query_norm")(q_BTHC)
            k_BTKC = RMSNorm(config, name="key_norm")(k_BTKC)
        rotate = choose(POSITIONS, config.position, "config.model.position").rotate
        q_BTHC, k_BTKC = rotate(q_BTHC, context.positions_BT, config), rotate(k_BTKC, context.positions_BT, config)

        if cache is None:
            k_BSKC, v_BSKC, visible_BTS = k_BTKC, v_BTKC, causal_mask(context)
        else:
            cache = cache.write(k_BTKC, v_BTKC, context)
            k_BSKC, v_BSKC, visible_BTS = cache.k_BSKC, cache.v_BSKC, cached_mask(context, cache.k_BSKC.shape[1])

        q_BTKGC = q_BTHC.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, channels)
        scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
        scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * channels**-0.5, -jnp.inf)
        att_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
        att_BKGTS = dropout(att_BKGTS, config.dropout, context, site=0)
        mixed_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", att_BKGTS, v_BSKC)
        y_BTD = Linear(config, config.d_model, residual=True, name="output")(
            mixed_BTKGC.reshape(batch, length, n_heads * channels)
        )
        return y_BTD, cache


MIXERS: dict[str, Any] = {"attention": Attention}
