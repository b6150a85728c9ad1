"""Token mixers: how a block moves information between tokens, in training and from a cache, by one forward.

A mixer is a Flax leaf made from the config of its block. It has

    init_cache(config, batch, length)     an empty cache, any pytree of arrays whose first axis is B
    __call__(x_BTD, context, cache)       y_BTD, and the cache with the new tokens in it (None where there was none)

Without a cache a row may hold several documents (`context.segments_BT`) that do not see each other. With one it holds a
part of one document, after what is in the cache. Padding comes after the tokens of a row, and changes no cache.
"""

from typing import Any

from rustgpt_jax.model.mixers.attention import Attention, LocalAttention
from rustgpt_jax.model.mixers.deltanet import GatedDeltaNet
from rustgpt_jax.model.mixers.mla import LatentAttention
from rustgpt_jax.model.mixers.rg_lru import RecurrentGatedLRU

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "local_attention": LocalAttention,
    "latent_attention": LatentAttention,
    "rg_lru": RecurrentGatedLRU,
    "deltanet": GatedDeltaNet,
}
