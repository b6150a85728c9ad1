"""Fingerprints of arrays: 64 bits for each, by which two arrays are told apart without keeping both.

They are computed where the arrays are: an array has one fingerprint on any device and however it is sharded. A change
of one element, or of many of them by chance, changes it; who wants to deceive can.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.fingerprints import digest
from rustgpt_jax.tree_paths import by_path


def fingerprints(tree: Any) -> dict[str, str]:
    """16 hex digits for each array of a tree, by its path: {'params/embedding/table': '5d41402abc4b2a76'}."""
    leaves = by_path(tree)
    digests = jax.device_get(_digests(list(leaves.values())))
    return {path: fingerprint(*of_array) for path, of_array in zip(leaves, digests, strict=True)}


def fingerprint(first: int, second: int) -> str:
    """The two numbers of a digest as 16 hex digits."""
    return f"{first:08x}{second:08x}"


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    # Some may be in the memory of the host.
    return [digest(jax.device_put(jnp.asarray(array), jax.memory.Space.Device)) for array in arrays]
