"""Causal softmax attention, over all earlier tokens or over a sliding window of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config import ModelConfig, is_on
from rustgpt_jax.model.context import Context, dropout
from rustgpt_jax.model.linear import Linear
from rustgpt_jax.model.mixers.window import Ring, Window, cached_window, own_window
from rustgpt_jax.model.norms import NORMS, norm_parameters
from rustgpt_jax.model.positions import POSITIONS, PositionScheme
from rustgpt_jax.model.precision import product_type, softcap
from rustgpt_jax.model.taps import Tap
from rustgpt_jax.tables import choose


class Attention(nn.Module):
    """Causal softmax attention (arXiv 1706.03762) with grouped heads (arXiv 2305.13245)."""

    config: ModelConfig

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """The tokens that a token sees, itself included; None for all."""
        del config
        return None

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> Ring:
        """Room for the keys and values of `length` tokens a row, or of the window where that is less."""
        slots = min(length, cls.window(config) or length)
        empty = jnp.zeros((batch, slots, config.n_kv_heads or config.n_heads, config.head_width), config.dtype)
        return Ring((empty, empty))

    @staticmethod
    def n_parameters(config: ModelConfig) -> int:
        """The parameters of a layer: the projections, norms of queries and keys, and sinks."""
        width, has_bias = config.n_heads * config.head_width, config.bias or config.qkv_bias
        kv_width = (config.n_kv_heads or config.n_heads) * config.head_width
        projections = (config.d_model + has_bias) * (width + 2 * kv_width) + (width + config.bias) * config.d_model
        normalized = {"none": (), "head": (config.head_width,) * 2, "projection": (width, kv_width)}[config.qk_norm]
        norms = sum(norm_parameters(config, channels) for channels in normalized)
        return projections + norms + config.n_heads * config.attention_sinks

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context, cache: Ring | None) -> tuple[jax.Array, Ring | None]:
        config = self.config
        n_heads, n_kv_heads, channels = config.n_heads, config.n_kv_heads or config.n_heads, config.head_width
        batch, length = x_BTD.shape[:2]
        scheme = position_scheme(config)

        def heads(name: str, count: int) -> jax.Array:
            linear = Linear(config, count * channels, has_bias=config.bias or config.qkv_bias, name=name)
            projected = linear(x_BTD)
            if name != "value":
                projected = normalized(projected, f"{name}_norm", "projection")
            split = projected.reshape(batch, length, count, channels)
            if name == "value":
                return split
            split = normalized(split, f"{name}_norm", "head")
            return scheme.rotate(split, context.positions_BT, config) if scheme.rotate else split

        def normalized(x: jax.Array, name: str, where: str) -> jax.Array:
            if config.qk_norm != where:
                return x
            return choose(NORMS, config.norm, "config.model.norm")(config, name=name)(x)

        q_BTHC, k_BTKC, v_BTKC = heads("query", n_heads), heads("key", n_kv_heads), heads("value", n_kv_heads)
        seen, cache = window_of(cache, (k_BTKC, v_BTKC), context, self.window(config))
        k_BSKC, v_BSKC = seen.keys

        q_BTKGC = q_BTHC.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, channels)
        scores_BKGTS = jnp.einsum(
            "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=product_type(q_BTKGC, k_BSKC)
        )
        scale = channels**-0.5 if config.attention_scale is None else config.attention_scale
        scores_BHTS = scale * scores_BKGTS.reshape(batch, n_heads, *scores_BKGTS.shape[3:])
        sinks_H = self.param("sinks", nn.initializers.zeros, (n_heads,)) if config.attention_sinks else None
        att_BHTS = attention_weights(scores_BHTS, seen, sinks_H, context, config).astype(v_BSKC.dtype)
        mixed_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", att_BHTS.reshape(scores_BKGTS.shape), v_BSKC)
        output = Linear(config, config.d_model, residual=True, name="output")
        return output(mixed_BTKGC.reshape(batch, length, n_heads * channels)), cache


class LocalAttention(Attention):
    """Attention over the last `local_window` tokens (arXiv 2004.05150), with a cache that holds no more than those."""

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """The tokens that a token sees, itself included."""
        return config.local_window


def position_scheme(config: ModelConfig) -> PositionScheme:
    """How the block of `config` learns positions."""
    (name,) = config.positions
    return choose(POSITIONS, name, "config.model.positions")


def window_of(
    cache: Ring | None, new: tuple[jax.Array, ...], context: Context, window: int | None
) -> tuple[Window, Ring | None]:
    """The keys that the tokens of a call see, `new` among them, and the cache after it."""
    return (own_window(new, context, window), None) if cache is None else cached_window(cache, new, context, window)


def attention_weights(
    scores_BHTS: jax.Array, seen: Window, sinks_H: jax.Array | None, context: Context, config: ModelConfig
) -> jax.Array:
    """Scaled scores through soft-cap, bias of distance, mask, softmax (with sinks, where there are any) and dropout."""
    scores_BHTS = Tap(name="scores")(scores_BHTS)
    if is_on(config.attention_softcap):
        scores_BHTS = softcap(scores_BHTS, config.attention_softcap)
    if bias := position_scheme(config).bias:
        scores_BHTS = scores_BHTS + bias(context.positions_BT, seen.positions_BS, config)
    scores_BHTS = jnp.where(seen.visible_BTS[:, None], scores_BHTS, -jnp.inf)
    if sinks_H is not None:
        sinks_BHT1 = jnp.broadcast_to(sinks_H[None, :, None, None], (*scores_BHTS.shape[:3], 1))
        scores_BHTS = jnp.concatenate([scores_BHTS, sinks_BHT1.astype(scores_BHTS.dtype)], axis=-1)
    att_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)[..., : seen.visible_BTS.shape[-1]]
    return dropout(att_BHTS, config.dropout, context, site=0)
