"""Causal softmax attention, over all earlier tokens or over a sliding window of them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig, is_enabled
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.block_inputs import BlockInputs, dropout
from rustgpt_jax.model.intermediates import Probe
from rustgpt_jax.model.kernels.dispatch import KERNELS, device_for, select_kernel
from rustgpt_jax.model.kernels.portable import dot_product_attention, softmax_weights
from rustgpt_jax.model.kernels.types import AttentionInputs, AttentionSpec, Bias, Device
from rustgpt_jax.model.linear import Linear
from rustgpt_jax.model.mixers.kv_cache import AttentionContext, KVCache, update_kv_cache
from rustgpt_jax.model.norms import NORMS
from rustgpt_jax.model.positions import POSITIONS, PositionEncoding
from rustgpt_jax.registry import choose


class Attention(nn.Module):
    """Causal softmax attention (arXiv 1706.03762) with grouped heads (arXiv 2305.13245)."""

    config: ModelConfig

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """The tokens that a token sees, itself included; None for all."""
        del config
        return None

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> KVCache:
        """Room for the keys and values of `length` tokens a row, or of the window where that is less."""
        slots = min(length, cls.window(config) or length)
        empty = jnp.zeros((batch, config.n_kv_heads or config.n_heads, slots, config.head_width), config.dtype)
        return KVCache((empty, empty))

    @classmethod
    def request(cls, config: ModelConfig, length: int, device: Device, dropout: bool) -> AttentionSpec:
        """What a layer asks of a kernel for rows of `length` tokens without a cache."""
        return attention_spec(config, config.n_kv_heads or config.n_heads, config.head_width, length, device, dropout)

    @classmethod
    def task(
        cls, config: ModelConfig, arrays: tuple[jax.Array, ...], context: BlockInputs, sinks_H: jax.Array | None
    ) -> AttentionInputs:
        """What a kernel computes for a layer from queries, keys and values."""
        return attention_inputs(config, arrays, context, cls.window(config), sinks_H)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: BlockInputs, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        n_heads, n_kv_heads, channels = config.n_heads, config.n_kv_heads or config.n_heads, config.head_width
        batch, length = x_BTD.shape[:2]
        scheme = get_position_encoding(config)

        def heads(name: str, count: int) -> jax.Array:
            linear = Linear(config, count * channels, has_bias=config.has_qkv_bias, name=name)
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

        # Every query sees all earlier keys: on a mesh that cuts windows into stretches, each device gets all of them.
        q_BTHC = shard_activations(heads("query", n_heads), "BTHC")
        if config.attention_scale_by_layer:
            layer = 0 if context.layer is None else context.layer
            q_BTHC = q_BTHC / jnp.asarray(layer + 1, q_BTHC.dtype)
        k_BTKC, v_BTKC = (shard_activations(heads(name, n_kv_heads), "B.KC") for name in ("key", "value"))
        sinks_H = self.param("sinks", nn.initializers.zeros, (n_heads,)) if config.attention_sinks else None
        cached = cache is not None or self.is_initializing()
        device = device_for(config.attention_kernel, cached)
        request = self.request(config, length, device, context.dropout_key is not None)
        kernel, _ = select_kernel(config.attention_kernel, request._replace(cached=cached))
        if kernel == "plain":
            by_heads = (jnp.swapaxes(k_BTKC, 1, 2), jnp.swapaxes(v_BTKC, 1, 2))
            seen, cache = update_kv_cache(cache, by_heads, context, self.window(config))
            weights = partial(attention_weights, seen=seen, sinks_H=sinks_H, context=context, config=config)
            k_BKSC, v_BKSC = seen.keys
            mixed_BTKGC = dot_product_attention(q_BTHC, k_BKSC, v_BKSC, attention_scale(config, channels), weights)
        else:
            mixed_BTKGC = KERNELS[kernel].attend(self.task(config, (q_BTHC, k_BTKC, v_BTKC), context, sinks_H))
        output = Linear(config, config.d_model, residual=True, has_bias=config.has_attention_output_bias, name="output")
        return output(mixed_BTKGC.reshape(batch, length, n_heads * channels)), cache


class LocalAttention(Attention):
    """Attention over the last `local_window` tokens (arXiv 2004.05150), with a cache that holds no more than those."""

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """The tokens that a token sees, itself included."""
        return config.local_window


def get_position_encoding(config: ModelConfig) -> PositionEncoding:
    """How the block of `config` learns positions."""
    (name,) = config.positions
    return choose(POSITIONS, name, "config.model.positions")


def attention_weights(
    scores_BHTS: jax.Array, seen: AttentionContext, sinks_H: jax.Array | None, context: BlockInputs, config: ModelConfig
) -> jax.Array:
    """Scaled scores through soft-cap, bias of distance, mask, softmax (with sinks, where there are any) and dropout."""
    scores_BHTS = Probe(name="scores")(scores_BHTS)
    positions = (context.positions_BT, seen.positions_BS)
    att_BHTS = softmax_weights(
        scores_BHTS, seen.visible_BTS, positions, config.attn_logit_softcap, positional_bias(config), sinks_H
    )
    return dropout(att_BHTS, config.dropout, context, site=0)


def positional_bias(config: ModelConfig) -> Bias | None:
    """What the position scheme of the block adds to scores, as a function of the positions of queries and keys."""
    bias = get_position_encoding(config).bias
    return (lambda queries_BT, keys_BS: bias(queries_BT, keys_BS, config)) if bias else None


def attention_scale(config: ModelConfig, channels: int) -> float:
    """What scores of queries and keys of so many channels are multiplied by."""
    return channels**-0.5 if config.attention_scale is None else config.attention_scale


def attention_spec(
    config: ModelConfig, n_kv_heads: int, key_width: int, length: int, device: Device, dropout: bool
) -> AttentionSpec:
    """What a block asks of a kernel, without a cache. `key_width`: the channels of queries and keys."""
    return AttentionSpec(
        device=device,
        dtype=config.dtype,
        length=length,
        n_heads=config.n_heads,
        n_kv_heads=n_kv_heads,
        head_width=key_width,
        value_width=config.head_width,
        softcap=is_enabled(config.attn_logit_softcap),
        bias=get_position_encoding(config).bias is not None,
        sinks=config.attention_sinks,
        dropout=dropout,
        cached=False,
    )


def attention_inputs(
    config: ModelConfig,
    arrays: tuple[jax.Array, ...],
    context: BlockInputs,
    window: int | None,
    sinks_H: jax.Array | None,
) -> AttentionInputs:
    """What a kernel computes for a block from queries, keys and values, each B x T x heads x channels."""
    q_BTHC, k_BSKC, v_BSKC = arrays
    scale = attention_scale(config, q_BTHC.shape[-1])
    return AttentionInputs(
        q_BTHC, k_BSKC, v_BSKC, context, window, scale, config.attn_logit_softcap, positional_bias(config), sinks_H
    )
