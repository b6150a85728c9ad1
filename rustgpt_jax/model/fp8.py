"""Products of a tensor and a weight in 8 bits: e4m3 forward, e5m2 for gradients, a scale a tensor (arXiv 2209.05433).

A tensor is divided by a scale that takes its largest absolute value to the largest number of the type; there is no
state. The 8-bit arrays are multiplied themselves, and the product, summed up in float32, is multiplied by both scales:
the form that the GEMM rewriter of XLA makes one float8 product of cuBLASLt of, scales and all, with no guess as to
which conversions belong to it. (It knows the other form too, where arrays are converted back and scaled before they are
multiplied, but other passes may have changed that one before it comes to it.)

What is not finite in a tensor makes its scale, and with it the whole product, not finite.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.model.dtypes import widened

OPERAND, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """A tensor as `values`, in 8 bits, times `scale`."""

    values: jax.Array
    scale: jax.Array


def scaled(x: jax.Array, dtype: Any) -> Scaled:
    """A tensor in an 8-bit type. Its largest absolute value becomes the largest number of the type."""
    x = widened(x)
    # Zeros have a scale too, and one that is a normal number.
    scale = jnp.maximum(jnp.max(jnp.abs(x)) / float(jnp.finfo(dtype).max), jnp.finfo(x.dtype).tiny)
    return Scaled((x / scale).astype(dtype), scale)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W with the shape (..., outputs), in the type of x, from x (..., inputs) and a kernel (inputs, outputs)."""
    return _product(x, widened(kernel))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    left, right = scaled(x, OPERAND), scaled(kernel, OPERAND)
    # XLA lets sums of the default precision go on in fewer bits within the product, which is faster.
    y = _multiply(left, right, ((x.ndim - 1,), (0,)), jax.lax.Precision.DEFAULT)
    return y.astype(x.dtype), (left, right)


def _backward(operands: tuple[Scaled, Scaled], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, right = operands
    rows = tuple(range(gradient.ndim - 1))
    of_y = scaled(gradient, GRADIENT)
    of_x = _multiply(of_y, right, ((gradient.ndim - 1,), (1,)), jax.lax.Precision.HIGHEST)
    of_kernel = _multiply(left, of_y, (rows, rows), jax.lax.Precision.HIGHEST)
    return of_x.astype(gradient.dtype), of_kernel.astype(right.scale.dtype)


def _multiply(
    left: Scaled, right: Scaled, contracted: tuple[tuple[int, ...], tuple[int, ...]], precision: jax.lax.Precision
) -> jax.Array:
    scale = left.scale * right.scale
    product = jax.lax.dot_general(
        left.values, right.values, (contracted, ((), ())), precision=precision, preferred_element_type=scale.dtype
    )
    return product * scale


_product.defvjp(_forward, _backward)
