"""Derivatives of products with weights and of activations, for compilers that lose time with those that JAX derives.

XLA on CPUs computes an array again for each of its readers, exponentials and all, and is slow to multiply a matrix by
another that it has to read down its columns. So here an optimization barrier, through which it does not look, keeps in
memory what a gradient is made from: an activation's slope, and a transposed factor of a product. All that
`config.model.derivatives` may be gives the same gradients, up to rounding. Only `plain` has derivatives forward,
and that only of linear layers in the model's own dtype and of logits in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.dtypes import product_type
from rustgpt_jax.model.kernels.types import device_at_hand

Activation = Callable[[jax.Array], jax.Array]


def gelu_exact(x: jax.Array) -> jax.Array:
    """Exact GELU: x times the normal distribution function of x, computed with erf (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def relu_squared(x: jax.Array) -> jax.Array:
    """Squared ReLU: max(x, 0)^2 (arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# gelu is the tanh approximation.
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": gelu_exact,
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
}
# Activations whose slopes take longer to compute again than to read.
COSTLY = (jax.nn.gelu, gelu_exact, jax.nn.silu)


def are_kept(config: ModelConfig) -> bool:
    """Whether what gradients are made from is kept in memory: as the config says, or as suits the device at hand."""
    return device_at_hand().platform == "cpu" if config.derivatives == "auto" else config.derivatives == "kept"


def activated(activation: Activation, x: jax.Array, config: ModelConfig) -> jax.Array:
    """activation(x), a function of each element by itself."""
    return _with_kept_slope(activation, x) if activation in COSTLY and are_kept(config) else activation(x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_kept_slope(activation: Activation, x: jax.Array) -> jax.Array:
    return activation(x)


def _activated(activation: Activation, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier(jax.jvp(activation, (x,), (jnp.ones_like(x),)))


def _activated_back(activation: Activation, slope: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    del activation
    return (gradient * slope,)


_with_kept_slope.defvjp(_activated, _activated_back)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(x: jax.Array, kernel: jax.Array, operands: Any, is_kept: bool, inputs: int = 0) -> jax.Array:
    """x W with the shape (..., outputs), in the type of x, from x (..., inputs) and a kernel (inputs, outputs).

    operands: the type of what is multiplied, forward and backward; sums are float32 at least. is_kept: a factor of
    the gradient of the kernel is transposed in memory before it is multiplied. inputs: 1 for a kernel that is
    (outputs, inputs).
    """
    return _multiplied(x, kernel, operands, is_kept, inputs)[0]


def _multiplied(
    x: jax.Array, kernel: jax.Array, operands: Any, is_kept: bool, inputs: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    del is_kept
    left = x.astype(operands)
    return _contracted(left, kernel.astype(operands), (x.ndim - 1,), (inputs,), x.dtype), (left, kernel)


def _multiplied_back(
    operands: Any, is_kept: bool, inputs: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left, kernel = kept
    narrow = gradient.astype(operands)
    of_x = _contracted(narrow, kernel.astype(operands), (gradient.ndim - 1,), (1 - inputs,), gradient.dtype)
    of_kernel = (
        _summed_over_tokens(left, narrow, is_kept) if inputs == 0 else _summed_over_tokens(narrow, left, is_kept)
    )
    return of_x, of_kernel.astype(kernel.dtype)


def _summed_over_tokens(left: jax.Array, right: jax.Array, is_kept: bool) -> jax.Array:
    """The sum of the outer products of all rows, (channels of left, channels of right).

    Kept is what makes less to be transposed: the left factor, or the right one and then the result.
    """
    dtype, rows, behind = product_type(left), range(left.ndim - 1), range(1, left.ndim)
    if not is_kept:
        return _contracted(left, right, rows, rows, dtype)
    if left.size <= right.size + left.shape[-1] * right.shape[-1]:
        return _contracted(_transposed(left), right, behind, rows, dtype)
    return jax.lax.optimization_barrier(_contracted(_transposed(right), left, behind, rows, dtype)).T


def _transposed(x: jax.Array) -> jax.Array:
    """(channels, ...) from (..., channels), made from what is in memory, and put there itself."""
    return jax.lax.optimization_barrier(jnp.moveaxis(jax.lax.optimization_barrier(x), -1, 0))


def _contracted(
    left: jax.Array, right: jax.Array, left_axes: Sequence[int], right_axes: Sequence[int], dtype: Any
) -> jax.Array:
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=dtype)


product.defvjp(_multiplied, _multiplied_back)
