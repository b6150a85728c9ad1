"""Causal softmax attention over all earlier tokens or a sliding window."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import AttentionSpec
from rustgpt_jax.model.kernels.attention import attention, attention_spec, get_position_encoding
from rustgpt_jax.model.kv_cache import KVCache
from rustgpt_jax.model.layers import NORMS, Linear
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
