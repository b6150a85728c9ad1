"""Products of activations with weights, in the form that the model asks for, or in that of a weight kept otherwise."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.dtypes import accum_dtype, to_float32
from rustgpt_jax.model.kernels.types import current_device
from rustgpt_jax.model.quantized_weights import PackedWeight

# Products of a tensor and a weight in 8 bits: e4m3 forward, e5m2 for gradients, a scale a tensor (arXiv 2209.05433).
#
# A tensor is divided by a scale that takes its largest absolute value to the largest number of the type; there is no
# state. The 8-bit arrays are multiplied themselves, and the product, summed up in float32, is multiplied by both
# scales: the form that the GEMM rewriter of XLA makes one float8 product of cuBLASLt of, scales and all, with no guess
# as to which conversions belong to it. (It knows the other form too, where arrays are converted back and scaled before
# they are multiplied, but other passes may have changed that one before it comes to it.)
#
# What is not finite in a tensor makes its scale, and with it the whole product, not finite.

OPERAND, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """A tensor as `values`, in 8 bits, times `scale`."""

    values: jax.Array
    scale: jax.Array


def scaled(x: jax.Array, dtype: Any) -> Scaled:
    """A tensor in an 8-bit type. Its largest absolute value becomes the largest number of the type."""
    x = to_float32(x)
    # Zeros have a scale too, and one that is a normal number.
    scale = jnp.maximum(jnp.max(jnp.abs(x)) / float(jnp.finfo(dtype).max), jnp.finfo(x.dtype).tiny)
    return Scaled((x / scale).astype(dtype), scale)


def fp8_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X W with the shape (..., outputs), in the type of x, from x (..., inputs) and a kernel (inputs, outputs)."""
    return _product(x, to_float32(kernel))


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
    fp8_matmul = jax.lax.dot_general(
        left.values, right.values, (contracted, ((), ())), precision=precision, preferred_element_type=scale.dtype
    )
    return fp8_matmul * scale


_product.defvjp(_forward, _backward)


# Derivatives of products with weights and of activations, for compilers that lose time with those that JAX derives.
#
# XLA on CPUs computes an array again for each of its readers, exponentials and all, and is slow to multiply a matrix by
# another that it has to read down its columns. So here an optimization barrier, through which it does not look, keeps
# in memory what a gradient is made from: an activation's slope, and a transposed factor of a product. All that
# values of `config.model.save_residuals` give the same gradients, up to rounding. Only False has derivatives forward,
# and that only of linear layers in the model's own dtype and of logits in float32.

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


def saves_residuals(config: ModelConfig) -> bool:
    """Whether what gradients are made from is kept in memory: as the config says, or as suits the device at hand."""
    return current_device().platform == "cpu" if config.save_residuals is None else config.save_residuals


def apply_activation(activation: Activation, x: jax.Array, config: ModelConfig) -> jax.Array:
    """activation(x), a function of each element by itself."""
    return _activation_with_vjp(activation, x) if activation in COSTLY and saves_residuals(config) else activation(x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activation_with_vjp(activation: Activation, x: jax.Array) -> jax.Array:
    return activation(x)


def _activated(activation: Activation, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier(jax.jvp(activation, (x,), (jnp.ones_like(x),)))


def _activated_back(activation: Activation, slope: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    del activation
    return (gradient * slope,)


_activation_with_vjp.defvjp(_activated, _activated_back)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul_with_custom_vjp(x: jax.Array, kernel: jax.Array, operands: Any, is_kept: bool, inputs: int = 0) -> jax.Array:
    """X W with the shape (..., outputs), in the type of x, from x (..., inputs) and a kernel (inputs, outputs).

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
    dtype, rows, behind = accum_dtype(left), range(left.ndim - 1), range(1, left.ndim)
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


matmul_with_custom_vjp.defvjp(_multiplied, _multiplied_back)


def matmul(x: jax.Array, kernel: jax.Array | PackedWeight, config: ModelConfig) -> jax.Array:
    """X W with the shape (..., outputs), in the model's dtype, from a float32 kernel (inputs, outputs)."""
    x = x.astype(config.dtype)
    if isinstance(kernel, PackedWeight):
        return kernel.matmul(x)
    if config.precision.matmul_dtype == "float8":
        return fp8_matmul(x, kernel)
    operands, is_kept = config.precision.matmul_dtype or config.dtype, saves_residuals(config)
    if operands == config.dtype and not is_kept:
        return x @ kernel.astype(config.dtype)
    return matmul_with_custom_vjp(x, kernel, operands, is_kept)


def unembed(hidden_BTD: jax.Array, weights: jax.Array | PackedWeight, letters: str, config: ModelConfig) -> jax.Array:
    """logits_BTV in float32 at least, from factors in config.precision.logits_dtype, or else in the model's dtype.

    letters: the axes of the weights, "VD" of a float32 table, "DV" of a kernel.
    """
    operands = config.precision.logits_dtype or config.dtype
    if isinstance(weights, PackedWeight):
        hidden_BTD = hidden_BTD.astype(operands)
        return weights.matmul(hidden_BTD, accum_dtype(hidden_BTD))
    wide, weights, axis = (
        jnp.promote_types(operands, jnp.float32),
        shard_activations(weights, letters),
        letters.index("D"),
    )
    hidden_BTD = hidden_BTD.astype(wide)
    if operands == wide:
        return jax.lax.dot_general(hidden_BTD, weights.astype(wide), (((2,), (axis,)), ((), ())))
    return matmul_with_custom_vjp(hidden_BTD, weights, operands, saves_residuals(config), axis)
