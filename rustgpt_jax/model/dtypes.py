"""The precision of sums and of what is exponentiated: float32 at least; and a bound on it."""

from typing import Any

import jax
import jax.numpy as jnp


def to_float32(x: jax.Array) -> jax.Array:
    """An array in float32, or as it is where it is more precise."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def accum_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The type in which products of these are summed up: float32, or theirs where it is more precise."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def softcap(x: jax.Array, cap: Any) -> jax.Array:
    """x, kept between plus and minus `cap` by tanh (arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)
