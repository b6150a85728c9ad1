"""Dataclasses as pytrees, and the leaves of a tree: paths, such as 'blocks/0/mixer/query/kernel', and fingerprints."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pytree_dataclass(*, meta: Iterable[str] = ()) -> Callable[[type], Any]:
    """Return a decorator that registers a dataclass as a pytree.

    This replaces `jax.tree_util.register_dataclass`, with which the tree structures of two classes with the same fields
    are equal (as of JAX 0.12.0). A compiled function, which is cached by the structure of its arguments, may then run
    the program of the other class.

    Args:
        meta: The fields that belong to the tree structure. All others are children.
    """
    meta_names = tuple(meta)

    def register(cls: type) -> type:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in meta_names]

        def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names]
            return children, tuple(getattr(value, name) for name in meta_names)

        def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in meta_names)

        def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
            # Bypass __init__, because JAX may pass any objects as children.
            value: Any = object.__new__(cls)
            for name, child in (*zip(meta_names, structure, strict=True), *zip(names, children, strict=True)):
                object.__setattr__(value, name, child)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


def format_path(path: Any) -> str:
    """Format a JAX key path as a string: 'blocks/0/mixer/query/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the order of the tree."""
    return {format_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


# Fingerprints of arrays: 64-bit hashes that tell arrays apart without storing them.
#
# A fingerprint is a sum modulo 2^32 over all elements, so it does not depend on the device or on the sharding. A change
# of a single element always changes it. The hashes are not cryptographic.

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


# Jitted separately, so that arrays of the same shape share one trace.
@jax.jit
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
