"""Causal softmax attention over all earlier tokens or a sliding window, with multi-head latent attention."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import AttentionSpec
from rustgpt_jax.model.kernels.attention import (
    attention,
    attention_scale,
    attention_spec,
    attention_weights,
    get_position_encoding,
)
from rustgpt_jax.model.kv_cache import KVCache, update_kv_cache
from rustgpt_jax.model.layers import NORMS, Linear, normal_init
from rustgpt_jax.model.matmul import accum_dtype
from rustgpt_jax.registry import lookup


class Attention(nn.Module):
    """Causal softmax attention (arXiv 1706.03762) with grouped heads (arXiv 2305.13245)."""

    config: ModelConfig

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """Return the number of tokens that a token attends to, itself included; None for all."""
        del config
        return None

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> KVCache:
        """Return an empty cache for `length` tokens per row, or for the window if that is shorter."""
        slots = min(length, cls.window(config) or length)
        empty = jnp.zeros((batch, config.attention.kv_heads, slots, config.head_width), config.dtype)
        return KVCache((empty, empty))

    @classmethod
    def attention_spec(cls, config: ModelConfig, length: int, **call: Any) -> AttentionSpec:
        """Return the spec of a layer for rows of `length` tokens; `call` as in `kernels.attention.attention_spec`."""
        n_kv_heads, window = config.attention.kv_heads, cls.window(config)
        spec = partial(attention_spec, config, n_kv_heads=n_kv_heads, key_width=config.head_width, window=window)
        return spec(length=length, **call)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: BlockInputs, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        n_heads, n_kv_heads, channels = config.attention.n_heads, config.attention.kv_heads, config.head_width
        batch, length = x_BTD.shape[:2]
        rotate = get_position_encoding(config).rotate

        def project(name: str, count: int) -> jax.Array:
            linear = Linear(config, count * channels, has_bias=config.has_qkv_bias, name=name)
            projected = linear(x_BTD)
            if name != "value":
                projected = normalize(projected, f"{name}_norm", "projection")
            split = projected.reshape(batch, length, count, channels)
            if name == "value":
                return split
            split = normalize(split, f"{name}_norm", "head")
            return rotate(split, inputs.positions_BT, config) if rotate else split

        def normalize(x: jax.Array, name: str, where: str) -> jax.Array:
            if config.attention.qk_norm != where:
                return x
            return lookup(NORMS, config.norm, "config.model.norm")(config, name=name)(x)

        # Queries may be sharded along the sequence. Keys and values are not: every query reads all earlier ones.
        q_BTHC = shard_activations(project("query", n_heads), "BTHC")
        if config.attention.scale_by_layer:
            layer = 0 if inputs.layer is None else inputs.layer
            q_BTHC = q_BTHC / jnp.asarray(layer + 1, q_BTHC.dtype)
        k_BTKC, v_BTKC = (shard_activations(project(name, n_kv_heads), "B.KC") for name in ("key", "value"))
        sinks_H = self.param("sinks", nn.initializers.zeros, (n_heads,)) if config.attention.sinks else None
        is_cached = cache is not None or self.is_initializing()
        has_dropout = inputs.dropout_key is not None
        spec = self.attention_spec(config, length, is_cached=is_cached, has_dropout=has_dropout)
        mixed_BTKGC, cache = attention(q_BTHC, k_BTKC, v_BTKC, spec, config, inputs, cache, sinks_H)
        output = Linear(config, config.d_model, residual=True, has_bias=config.has_attention_output_bias, name="output")
        return output(mixed_BTKGC.reshape(batch, length, n_heads * channels)), cache


class LocalAttention(Attention):
    """Sliding-window attention over the last `local_window` tokens (arXiv 2004.05150). Only these are cached."""

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """Return the number of tokens that a token attends to, itself included."""
        return config.attention.local_window


# Multi-head latent attention: keys and values are computed from a cached low-rank latent of each token.


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Each token has a latent l = norm(W_l x) of R channels, and a key p = rotate(W_p x) of E channels, which all heads
    share and which is the only part that depends on the position. The query of a head has two parts, q of C channels
    and rotate(r) of E channels, and

        k_s = W_k l_s,    v_s = W_v l_s,    score_ts = scale (q_t . k_s + rotate(r_t) . p_s)

    The cache contains l and p. With a cache, k and v are not computed: q_t . W_k l_s = W_k^T q_t . l_s, and the
    weighted mean of W_v l_s is W_v times the weighted mean of l_s.
    """

    config: ModelConfig

    @staticmethod
    def widths(config: ModelConfig) -> tuple[int, int]:
        """Return R and E, the channels of the latent and of the shared key."""
        half_to_even = 2 * -(-config.head_width // 4)
        return config.mla.kv_lora_rank or 4 * config.head_width, config.mla.qk_rope_head_dim or half_to_even

    @classmethod
    def init_cache(cls, config: ModelConfig, batch: int, length: int) -> KVCache:
        """Return an empty cache for the latents and shared keys of `length` tokens per row."""
        return KVCache(tuple(jnp.zeros((batch, length, width), config.dtype) for width in cls.widths(config)))

    @classmethod
    def attention_spec(cls, config: ModelConfig, length: int, **call: Any) -> AttentionSpec:
        """Return the spec of a layer for rows of `length` tokens; `call` as in `kernels.attention.attention_spec`."""
        key_width = config.head_width + cls.widths(config)[1]
        spec = partial(attention_spec, config, n_kv_heads=config.attention.n_heads, key_width=key_width, window=None)
        return spec(length=length, **call)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: BlockInputs, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        n_heads, channels = config.attention.n_heads, config.head_width
        kv_lora_rank, shared_width = self.widths(config)
        rotate = get_position_encoding(config).rotate

        def linear(name: str, features: int, x_BTD: jax.Array = x_BTD) -> jax.Array:
            return Linear(config, features, has_bias=config.has_qkv_bias, name=name)(x_BTD)

        def latent(name: str, features: int) -> jax.Array:
            norm = lookup(NORMS, config.norm, "config.model.norm")(config, name=f"{name}_norm")
            return norm(linear(name, features))

        def apply_rope(x_BTHE: jax.Array) -> jax.Array:
            return rotate(x_BTHE, inputs.positions_BT, config) if rotate else x_BTHE

        source_BTD = latent("query_latent", config.mla.q_lora_rank) if config.mla.q_lora_rank else x_BTD
        query = linear("query", n_heads * (channels + shared_width), source_BTD)
        query = query.reshape(*x_BTD.shape[:2], n_heads, channels + shared_width)
        q_BTHC, q_BTHE = query[..., :channels], apply_rope(query[..., channels:])
        shared_BTE = apply_rope(linear("shared_key", shared_width)[:, :, None])[:, :, 0]
        latent_BTR = latent("latent", kv_lora_rank)
        key_RHC = HeadKernel(config, name="key")(kv_lora_rank)
        value_RHC = HeadKernel(config, name="value")(kv_lora_rank)
        sinks_H = self.param("sinks", nn.initializers.zeros, (n_heads,)) if config.attention.sinks else None

        if cache is None:
            shared_BTHE = jnp.broadcast_to(shared_BTE[:, :, None], q_BTHE.shape)
            q_BTHX = jnp.concatenate([q_BTHC, q_BTHE], axis=-1)
            k_BTHX = jnp.concatenate([jnp.einsum("BTR,RHC->BTHC", latent_BTR, key_RHC), shared_BTHE], axis=-1)
            v_BTHC = jnp.einsum("BTR,RHC->BTHC", latent_BTR, value_RHC)
            is_cached, has_dropout = self.is_initializing(), inputs.dropout_key is not None
            spec = self.attention_spec(config, x_BTD.shape[1], is_cached=is_cached, has_dropout=has_dropout)
            mixed, _ = attention(q_BTHX, k_BTHX, v_BTHC, spec, config, inputs, None, sinks_H)
        else:
            # W_k and W_v are applied to the queries and to the weighted mean instead of to the latents.
            attended, cache = update_kv_cache(cache, (latent_BTR, shared_BTE), inputs)
            latent_BSR, shared_BSE = attended.keys
            q_BTHR = jnp.einsum("BTHC,RHC->BTHR", q_BTHC, key_RHC)
            scores_BHTS = _scores("BTHR,BSR->BHTS", q_BTHR, latent_BSR)
            scores_BHTS = scores_BHTS + _scores("BTHE,BSE->BHTS", q_BTHE, shared_BSE)
            scale = attention_scale(config, channels + shared_width)
            att_BHTS = attention_weights(scale * scores_BHTS, attended, sinks_H, inputs, config)
            mixed_BTHR = jnp.einsum("BHTS,BSR->BTHR", att_BHTS.astype(latent_BSR.dtype), latent_BSR)
            mixed = jnp.einsum("BTHR,RHC->BTHC", mixed_BTHR, value_RHC)
        output = Linear(config, config.d_model, residual=True, has_bias=config.has_attention_output_bias, name="output")
        return output(mixed.reshape(*x_BTD.shape[:2], n_heads * channels)), cache


class HeadKernel(nn.Module):
    """The matrix (R, H C) that maps latents to the keys or values of all heads, returned as (R, H, C)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, kv_lora_rank: int) -> jax.Array:
        n_heads, channels = self.config.attention.n_heads, self.config.head_width
        kernel = self.param("kernel", normal_init(self.config.init_std), (kv_lora_rank, n_heads * channels))
        return kernel.astype(self.config.dtype).reshape(kv_lora_rank, n_heads, channels)


def _scores(subscripts: str, queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, queries, keys, preferred_element_type=accum_dtype(queries, keys))
