"""Fingerprints of arrays: 64 bits for each, by which two arrays are told apart without keeping both.

They are computed where the arrays are, by sums modulo 2^32, whose order cannot matter: an array has one fingerprint on
any device and however it is sharded. A change of one element, or of many of them by chance, changes it; who wants to
deceive can.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.model.paths import by_path

# Odd numbers without pattern, for two hashes of each element.
SALTS = (0x9E3779B9, 0x85EBCA6B)


def fingerprints(tree: Any) -> dict[str, str]:
    """16 hex digits for each array of a tree, by its path: {'params/embedding/table': '5d41402abc4b2a76'}."""
    leaves = by_path(tree)
    digests = jax.device_get(_digests(list(leaves.values())))
    return {path: f"{first:08x}{second:08x}" for path, (first, second) in zip(leaves, digests, strict=True)}


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    return [tuple(_digest(jnp.asarray(array), salt) for salt in SALTS) for array in arrays]


def _digest(array: jax.Array, salt: int) -> jax.Array:
    """The sum of a hash of each element with its place, which a change of that element alone always changes."""
    words, places = _words(array), jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        places = places * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mixed(words ^ _mixed(places + np.uint32(salt))), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as numbers of 32 bits."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize * 8
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(size, 32)}")).astype(jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """A one-to-one scrambling of 32 bits (the finalizer of MurmurHash3)."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
