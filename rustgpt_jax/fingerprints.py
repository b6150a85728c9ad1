"""Digests of arrays: sums modulo 2^32, whose order cannot matter, so an array has one on any device, sharded or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.pytrees import flatten_paths

# Odd numbers without pattern, for two hashes of each element.
SALTS = (0x9E3779B9, 0x85EBCA6B)


def hash_array(array: jax.Array) -> tuple[jax.Array, ...]:
    """Two numbers of 32 bits: for each salt the sum of a hash of each element with its place.

    A change of one element alone always changes both.
    """
    return tuple(jnp.sum(each, dtype=jnp.uint32) for each in hash_elements(array))


def hash_elements(array: jax.Array) -> tuple[jax.Array, ...]:
    """For each salt the hash of each word of an array (an element is one word, or two where it has 64 bits)."""
    words, places = _words(array), jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        places = places * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return tuple(_mixed(words ^ _mixed(places + np.uint32(salt))) for salt in SALTS)


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


# Fingerprints of arrays: 64 bits for each, by which two arrays are told apart without keeping both.
#
# They are computed where the arrays are: an array has one fingerprint on any device and however it is sharded. A change
# of one element, or of many of them by chance, changes it; who wants to deceive can.


def fingerprint_tree(tree: Any) -> dict[str, str]:
    """16 hex digits for each array of a tree, by its path: {'params/embedding/table': '5d41402abc4b2a76'}."""
    leaves = flatten_paths(tree)
    digests = jax.device_get(_digests(list(leaves.values())))
    return {path: format_fingerprint(*of_array) for path, of_array in zip(leaves, digests, strict=True)}


def format_fingerprint(first: int, second: int) -> str:
    """The two numbers of a digest as 16 hex digits."""
    return f"{first:08x}{second:08x}"


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    # Some may be in the memory of the host.
    return [hash_array(jax.device_put(jnp.asarray(array), jax.memory.Space.Device)) for array in arrays]
