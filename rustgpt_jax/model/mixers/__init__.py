"""Token mixers, which move information between tokens; training and decoding share one forward pass.

A mixer is a Flax module made from the config of its block, with the interface `Mixer` or `CachedMixer` of
interfaces.py.

Without a cache, a row may contain several documents (`inputs.segments_BT`) that do not see each other. With a cache,
it contains the part of one document that follows the cached tokens. Padding comes after the tokens of a row and does
not change the cache.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.interfaces import BlockInputs, CachedMixer, module_class
from rustgpt_jax.model.kv_cache import KVCache, last_position
from rustgpt_jax.model.mixers.attention import Attention, LatentAttention, LocalAttention
from rustgpt_jax.model.mixers.deltanet import GatedDeltaNet
from rustgpt_jax.model.mixers.rg_lru import RecurrentGatedLRU
from rustgpt_jax.registry import lookup

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "local_attention": LocalAttention,
    "latent_attention": LatentAttention,
    "rg_lru": RecurrentGatedLRU,
    "deltanet": GatedDeltaNet,
}


def has_cache(name: str) -> bool:
    """Return whether the mixer named `name` has a cache; others are recomputed when decoding."""
    return isinstance(module_class(lookup(MIXERS, name, "config.model.mixers")), CachedMixer)


def init_mixer_cache(config: ModelConfig, batch: int, length: int) -> Any:
    """Return an empty cache of the mixer of a block; for a mixer without one, a cache of the mixer's inputs."""
    (name,) = config.mixers
    if has_cache(name):
        return lookup(MIXERS, name, "config.model.mixers").init_cache(config.mixer_config, batch, length)
    return KVCache(jnp.zeros((batch, length, config.d_model), config.mixer_config.dtype))


def apply_uncached_mixer(
    mixer: nn.Module, x_BTD: jax.Array, inputs: BlockInputs, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """Apply a mixer without a cache, recomputing the whole context if there are cached inputs.

    Args:
        mixer: Bound Flax module with __call__(x_BTD, inputs).
        x_BTD: Inputs of the new tokens.
        inputs: Positions and documents of the new tokens.
        cache: The mixer's inputs at earlier positions; None in training.

    Returns:
        y_BTD of the new tokens, and the cache with their inputs.
    """
    if cache is None:
        return mixer(x_BTD, inputs), None
    cache = cache.write(x_BTD.astype(cache.buffers.dtype), inputs)
    position_S = jnp.arange(cache.slots, dtype=jnp.int32)
    segments_BS = (position_S[None] <= last_position(inputs)[:, None]).astype(jnp.int32)
    positions_BS = jnp.broadcast_to(position_S[None], segments_BS.shape)
    whole = inputs._replace(positions_BT=positions_BS, segments_BT=segments_BS)
    y_BSD = mixer(cache.buffers.astype(x_BTD.dtype), whole)
    return jnp.take_along_axis(y_BSD, inputs.positions_BT[..., None], axis=1, mode="clip"), cache
