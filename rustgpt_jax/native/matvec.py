"""The kernel of matvec.cc as a function of JAX: a few rows times a matrix, as fast as its weights come from memory."""

import ctypes
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from rustgpt_jax.native.build import NotBuilt, built

SOURCE = Path(__file__).with_name("matvec.cc")
# Types that weights may have.
TYPES = ("float32", "bfloat16", "int8")


@functools.cache
def target() -> str | None:
    """The name under which XLA finds the kernel in this process, compiled now if need be; None where it cannot be.

    Why it cannot is said once, on standard error.
    """
    try:
        library = built(SOURCE)
        handler = ctypes.CDLL(str(library)).MatVec
    except (NotBuilt, OSError, AttributeError) as error:
        print(f"The native kernel is not used, because {error}.", file=sys.stderr)
        return None
    # Programs in the cache of compiled ones name what they call: another kernel needs another name.
    name = f"rustgpt_jax.{library.parent.name}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def products(x_BI: jax.Array, weights_OI: jax.Array) -> jax.Array:
    """y_BO = x W^T in float32, on a CPU, from weights of one of TYPES, summed in float32. `target` must have a name."""
    name = target()
    assert name is not None, "the native kernel is called only where it is"
    shape = jax.ShapeDtypeStruct((x_BI.shape[0], weights_OI.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(x_BI.astype(jnp.float32), weights_OI)
