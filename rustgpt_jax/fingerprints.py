"""Fingerprints of arrays: 64-bit hashes that tell arrays apart without storing them.

A fingerprint is a sum modulo 2^32 over all elements, so it does not depend on the device or on the sharding. A change
of a single element always changes it. The hashes are not cryptographic.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.pytrees import flatten_paths

# Arbitrary odd numbers, one for each of the two 32-bit hashes.
SALTS = (0x9E3779B9, 0x85EBCA6B)


def fingerprint_tree(tree: Any) -> dict[str, str]:
    """Return a fingerprint of each array of a tree by its path: {'params/embedding/table': '5d41402abc4b2a76'}."""
    leaves = flatten_paths(tree)
    hashes = jax.device_get(_hash_arrays(list(leaves.values())))
    return {path: format_fingerprint(*pair) for path, pair in zip(leaves, hashes, strict=True)}


def format_fingerprint(first: int, second: int) -> str:
    """Format the two hashes of an array as 16 hex digits."""
    return f"{first:08x}{second:08x}"


@jax.jit
def _hash_arrays(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    # Offloaded arrays are in host memory.
    on_device = (jax.device_put(jnp.asarray(array), jax.memory.Space.Device) for array in arrays)
    return [tuple(jnp.sum(each, dtype=jnp.uint32) for each in hash_elements(array)) for array in on_device]


def hash_elements(array: jax.Array) -> tuple[jax.Array, ...]:
    """Hash each element together with its position, once per salt. A 64-bit element counts as two of 32 bits.

    The fingerprint of the array consists of the sums of these hashes.
    """
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        unsigned = jnp.dtype(f"uint{min(array.dtype.itemsize * 8, 32)}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    positions = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(bits.shape):
        positions = positions * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return tuple(_mix(bits ^ _mix(positions + np.uint32(salt))) for salt in SALTS)


def _mix(bits: jax.Array) -> jax.Array:
    """Mix 32-bit numbers with the finalizer of MurmurHash3, which is one-to-one."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
