"""Matrix products with weights: precision, float8, packed weights for decoding, and custom VJPs for CPUs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.activation_sharding import shard_activations
from rustgpt_jax.model.kernels import current_device, matvec
from rustgpt_jax.pytrees import pytree_dataclass


def to_float32(x: jax.Array) -> jax.Array:
    """Cast an array to float32, unless it is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def accum_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return the dtype in which products of the arrays are accumulated: float32, or float64 for float64 arrays."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


# The name under which a norm saves the mean and variance of each row.
ROW_STATISTICS = "row_statistics"


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the backward pass recompute all that a function computes from its arguments, except row statistics.

    For elementwise functions and casts, recomputing takes less time than reading the results from memory, and XLA fuses
    it with the backward pass. `prevent_cse` would insert barriers that block this fusion.
    """
    policy = jax.checkpoint_policies.save_only_these_names(ROW_STATISTICS)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def recompute_in_backward(function: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """Apply `recompute`, unless the config selects rematerialization or residuals in memory.

    Within a rematerialized block, weights would be gathered once more from sharded devices.
    """
    return function if config.remat != "none" or saves_residuals(config) else recompute(function)


def softcap(x: jax.Array, cap: Any) -> jax.Array:
    """Bound x between -cap and cap by tanh (arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)


# Float8 products with one scale per tensor: e4m3 forward, e5m2 for gradients (arXiv 2209.05433).
#
# The scale maps the largest magnitude of a tensor to the largest number of the type, and is computed anew in each call.
# The 8-bit arrays are multiplied directly, and the product, accumulated in float32, is multiplied by both scales: XLA's
# GEMM rewriter always turns this form into one float8 product of cuBLASLt. (It also recognizes the form that scales the
# converted operands first, but other passes may change that form before the rewriter runs.)
#
# If a tensor is not finite, neither is its scale, nor the whole product.

FORWARD_FP8, GRADIENT_FP8 = jnp.float8_e4m3fn, jnp.float8_e5m2


class QuantizedTensor(NamedTuple):
    """A tensor as 8-bit `values` times a `scale`."""

    values: jax.Array
    scale: jax.Array


def quantize_fp8(x: jax.Array, dtype: Any) -> QuantizedTensor:
    """Quantize a tensor to an 8-bit type, whose largest number represents the largest magnitude."""
    x = to_float32(x)
    # At least the smallest normal number, for a tensor of zeros.
    scale = jnp.maximum(jnp.max(jnp.abs(x)) / float(jnp.finfo(dtype).max), jnp.finfo(x.dtype).tiny)
    return QuantizedTensor((x / scale).astype(dtype), scale)


def fp8_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x W (..., outputs) in the dtype of x, for x (..., inputs) and a kernel (inputs, outputs)."""
    return _fp8_matmul(x, to_float32(kernel))


@jax.custom_vjp
def _fp8_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _fp8_matmul_fwd(x, kernel)[0]


def _fp8_matmul_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[QuantizedTensor, QuantizedTensor]]:
    left, right = quantize_fp8(x, FORWARD_FP8), quantize_fp8(kernel, FORWARD_FP8)
    # With the default precision, XLA may accumulate in fewer bits within the product, which is faster.
    y = _multiply_quantized(left, right, ((x.ndim - 1,), (0,)), jax.lax.Precision.DEFAULT)
    return y.astype(x.dtype), (left, right)


def _fp8_matmul_bwd(
    residuals: tuple[QuantizedTensor, QuantizedTensor], grad_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left, right = residuals
    rows = tuple(range(grad_y.ndim - 1))
    narrow_grad = quantize_fp8(grad_y, GRADIENT_FP8)
    grad_x = _multiply_quantized(narrow_grad, right, ((grad_y.ndim - 1,), (1,)), jax.lax.Precision.HIGHEST)
    grad_kernel = _multiply_quantized(left, narrow_grad, (rows, rows), jax.lax.Precision.HIGHEST)
    return grad_x.astype(grad_y.dtype), grad_kernel.astype(right.scale.dtype)


def _multiply_quantized(
    left: QuantizedTensor,
    right: QuantizedTensor,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    precision: jax.lax.Precision,
) -> jax.Array:
    scale = left.scale * right.scale
    product = jax.lax.dot_general(
        left.values, right.values, (contracted, ((), ())), precision=precision, preferred_element_type=scale.dtype
    )
    return product * scale


_fp8_matmul.defvjp(_fp8_matmul_fwd, _fp8_matmul_bwd)


# Custom VJPs of products with weights and of activations, which are faster than JAX's own on CPUs.
#
# XLA on CPUs recomputes an array, exponentials included, for each of its readers, and multiplies slowly by a matrix
# that is read along its columns. An optimization barrier, which blocks fusion, keeps the operands of gradients in
# memory: the slope of an activation, and a transposed factor of a product. All values of `save_residuals` give the same
# gradients up to rounding. Forward-mode derivatives exist only with save_residuals=False, and only for linear layers
# in the model's own dtype and for float32 logits.

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
# Activations whose slope is faster to read from memory than to recompute.
EXPENSIVE_ACTIVATIONS = (jax.nn.gelu, gelu_exact, jax.nn.silu)


def saves_residuals(config: ModelConfig) -> bool:
    """Return whether operands of gradients are kept in memory; by default on CPUs only."""
    return current_device().platform == "cpu" if config.save_residuals is None else config.save_residuals


def apply_activation(activation: Activation, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Return activation(x) for an elementwise function, with the VJP that the config selects."""
    if activation in EXPENSIVE_ACTIVATIONS and saves_residuals(config):
        return _activation_saving_slope(activation, x)
    return recompute(activation)(x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activation_saving_slope(activation: Activation, x: jax.Array) -> jax.Array:
    return activation(x)


_activation_saving_slope.defvjp(
    lambda activation, x: jax.lax.optimization_barrier(jax.jvp(activation, (x,), (jnp.ones_like(x),))),
    lambda activation, slope, grad_y: (grad_y * slope,),
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul_with_custom_vjp(
    x: jax.Array, kernel: jax.Array, operand_dtype: Any, transposes: bool, input_axis: int = 0
) -> jax.Array:
    """Return x W (..., outputs) in the dtype of x (..., inputs).

    Args:
        x: Activations.
        kernel: Weights (inputs, outputs), or (outputs, inputs) with `input_axis` 1.
        operand_dtype: Dtype of the factors, forward and backward; sums are accumulated in float32 at least.
        transposes: Whether a factor of the kernel's gradient is transposed in memory before the product.
        input_axis: Axis of the inputs in the kernel.
    """
    return _matmul_fwd(x, kernel, operand_dtype, transposes, input_axis)[0]


def _matmul_fwd(
    x: jax.Array, kernel: jax.Array, operand_dtype: Any, transposes: bool, input_axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    del transposes
    x_operand = x.astype(operand_dtype)
    y = _contract(x_operand, kernel.astype(operand_dtype), (x.ndim - 1,), (input_axis,), x.dtype)
    return y, (x_operand, kernel)


def _matmul_bwd(
    operand_dtype: Any, transposes: bool, input_axis: int, residuals: tuple[jax.Array, jax.Array], grad_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    narrow_grad = grad_y.astype(operand_dtype)
    grad_x = _contract(narrow_grad, kernel.astype(operand_dtype), (grad_y.ndim - 1,), (1 - input_axis,), grad_y.dtype)
    factors = (x, narrow_grad) if input_axis == 0 else (narrow_grad, x)
    return grad_x, _sum_outer_products(*factors, transposes).astype(kernel.dtype)


def _sum_outer_products(left: jax.Array, right: jax.Array, transposes: bool) -> jax.Array:
    """Return the sum over all rows of their outer products (channels of left, channels of right).

    If `transposes`, the cheaper of two transpositions is done in memory: of the left factor, or of the right factor and
    the result.
    """
    dtype, rows, shifted_rows = accum_dtype(left), range(left.ndim - 1), range(1, left.ndim)
    if not transposes:
        return _contract(left, right, rows, rows, dtype)
    if left.size <= right.size + left.shape[-1] * right.shape[-1]:
        return _contract(_transpose_in_memory(left), right, shifted_rows, rows, dtype)
    return jax.lax.optimization_barrier(_contract(_transpose_in_memory(right), left, shifted_rows, rows, dtype)).T


def _transpose_in_memory(x: jax.Array) -> jax.Array:
    """Return x (..., channels) as (channels, ...), read from memory and written to memory."""
    return jax.lax.optimization_barrier(jnp.moveaxis(jax.lax.optimization_barrier(x), -1, 0))


def _contract(
    left: jax.Array, right: jax.Array, left_axes: Sequence[int], right_axes: Sequence[int], dtype: Any
) -> jax.Array:
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=dtype)


matmul_with_custom_vjp.defvjp(_matmul_fwd, _matmul_bwd)


# Packed weights, which replace arrays in the parameters for decoding.

# The native kernel is faster than XLA up to this many rows.
MAX_NATIVE_ROWS = 8
# -128 is not used, so that the quantized values are symmetric.
MAX_INT8 = 127


class PackedWeight(ABC):
    """A weight matrix (inputs, outputs) that replaces an array in the parameters.

    It is a pytree whose first leaf has the shape of the matrix. Layers use only this shape and `matmul`.
    """

    @abstractmethod
    def matmul(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Return x W (..., outputs) in `dtype`, by default the dtype of x (..., inputs)."""


@pytree_dataclass(meta=["matmul_impl"])
@dataclass(frozen=True)
class RowMajorWeight(PackedWeight):
    """A matrix stored by outputs, the order in which a product with few rows reads it.

    Products are accumulated in float32 at least. With bfloat16 weights, x is rounded to bfloat16 too.

    Attributes:
        values: The values by outputs, in an array of the matrix's shape (inputs, outputs): float32, bfloat16 or int8.
        scales: Scale of each output (outputs,) for int8; None for other dtypes.
        matmul_impl: native (`kernels.matvec`, for few rows) or plain (XLA).
    """

    values: jax.Array
    scales: jax.Array | None
    matmul_impl: str

    def matmul(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Return x W (..., outputs) in `dtype`, by default the dtype of x (..., inputs)."""
        x_BI, values_OI = x.reshape(-1, x.shape[-1]), self.values.reshape(self.values.shape[::-1])
        if values_OI.dtype == jnp.bfloat16:
            x_BI = x_BI.astype(jnp.bfloat16)
        if self.matmul_impl == "native" and len(x_BI) <= MAX_NATIVE_ROWS:
            y_BO = matvec.matvec(x_BI, values_OI)
        else:
            accum = accum_dtype(x_BI)
            y_BO = jnp.einsum("BI,OI->BO", x_BI, values_OI.astype(x_BI.dtype), preferred_element_type=accum)
        if self.scales is not None:
            y_BO = y_BO * self.scales[None, :].astype(y_BO.dtype)
        return y_BO.reshape(*x.shape[:-1], y_BO.shape[-1]).astype(dtype or x.dtype)


@pytree_dataclass(meta=["operand_dtype"])
@dataclass(frozen=True)
class UpcastWeight(PackedWeight):
    """A float32 matrix rounded to the narrower `operand_dtype`. Its products equal those of RowMajorWeight.

    XLA on CPUs multiplies few rows by narrow weights many times slower than by float32, and many rows faster.
    """

    values: jax.Array
    operand_dtype: str

    def matmul(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Return x W (..., outputs) in `dtype`, by default the dtype of x (..., inputs)."""
        is_narrow = self.operand_dtype == "bfloat16"
        operand, values = x.astype(jnp.bfloat16) if is_narrow else x, self.values
        if is_narrow and x.size // x.shape[-1] > MAX_NATIVE_ROWS:
            # Many rows, such as a prompt, are multiplied faster in bfloat16.
            values = values.astype(jnp.bfloat16)
        else:
            operand = to_float32(operand)
        y = _contract(operand, values, (x.ndim - 1,), (0,), accum_dtype(operand))
        return y.astype(dtype or x.dtype)


def to_row_major(weights: jax.Array, dtype: Any, matmul_impl: str) -> RowMajorWeight:
    """Convert a float32 matrix (inputs, outputs) to a dtype and store it by outputs."""
    values_OI, scales_O = quantize_int8(weights) if dtype == "int8" else (weights.astype(dtype).T, None)
    return RowMajorWeight(values_OI.reshape(weights.shape), scales_O, matmul_impl)


def quantize_int8(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize a matrix (inputs, outputs) symmetrically to int8, with one scale per output.

    The largest weight of each output is exact, and no weight is off by more than half a scale.

    Returns:
        values_OI and scales_O, such that the matrix is about values_OI^T scales_O.
    """
    weights_OI = to_float32(weights).T
    largest_O = jnp.max(jnp.abs(weights_OI), axis=1)
    scales_O = jnp.where(largest_O > 0, largest_O / MAX_INT8, 1)
    return jnp.round(weights_OI / scales_O[:, None]).astype(jnp.int8), scales_O


def round_weights(weights: jax.Array, dtype: Any) -> jax.Array:
    """Round a float32 matrix (inputs, outputs) to the values that `to_row_major` stores."""
    if dtype != "int8":
        return weights.astype(dtype).astype(weights.dtype)
    values_OI, scales_O = quantize_int8(weights)
    return (values_OI * scales_O[:, None]).T


def matmul(x: jax.Array, kernel: jax.Array | PackedWeight, config: ModelConfig) -> jax.Array:
    """Return x W (..., outputs) in the model's dtype, from a float32 kernel (inputs, outputs)."""
    x = x.astype(config.dtype)
    if isinstance(kernel, PackedWeight):
        return kernel.matmul(x)
    if config.precision.matmul_dtype == "float8":
        return fp8_matmul(x, kernel)
    operand_dtype, transposes = config.precision.matmul_dtype or config.dtype, saves_residuals(config)
    if operand_dtype == config.dtype and not transposes:
        return x @ kernel.astype(config.dtype)
    return matmul_with_custom_vjp(x, kernel, operand_dtype, transposes)


def unembed(hidden_BTD: jax.Array, weights: jax.Array | PackedWeight, axes: str, config: ModelConfig) -> jax.Array:
    """Return logits_BTV in float32 at least, from factors in config.precision.logits_dtype or else the model's dtype.

    `axes` are the axes of the weights: "VD" for an embedding table, "DV" for a kernel.
    """
    operand_dtype = config.precision.logits_dtype or config.dtype
    if isinstance(weights, PackedWeight):
        hidden_BTD = hidden_BTD.astype(operand_dtype)
        return weights.matmul(hidden_BTD, accum_dtype(hidden_BTD))
    wide = jnp.promote_types(operand_dtype, jnp.float32)
    weights, input_axis = shard_activations(weights, axes), axes.index("D")
    hidden_BTD = hidden_BTD.astype(wide)
    if operand_dtype == wide:
        return jax.lax.dot_general(hidden_BTD, weights.astype(wide), (((2,), (input_axis,)), ((), ())))
    return matmul_with_custom_vjp(hidden_BTD, weights, operand_dtype, saves_residuals(config), input_axis)
