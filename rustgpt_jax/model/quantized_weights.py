"""Weight matrices in forms that are fast to decode with: int8, bfloat16, or a different memory layout."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.model.dtypes import accum_dtype, to_float32
from rustgpt_jax.native import matvec
from rustgpt_jax.pytrees import pytree_dataclass

# The native kernel is faster than XLA up to this many rows.
MAX_NATIVE_ROWS = 8
# -128 is not used, so that the quantized values are symmetric.
MAX_INT8 = 127


class PackedWeight(ABC):
    """A weight matrix (inputs, outputs) that takes the place of an array in the parameters.

    It is a pytree whose first leaf has the shape of the matrix, which is all that layers read besides `matmul`.
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
        matmul_impl: native (`native.matvec`, for few rows) or plain (XLA).
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
    """A float32 matrix with values of a narrower dtype, `operand_dtype`. Its products equal those of RowMajorWeight.

    XLA on CPUs multiplies few rows by narrow weights many times slower than by float32.
    """

    values: jax.Array
    operand_dtype: str

    def matmul(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Return x W (..., outputs) in `dtype`, by default the dtype of x (..., inputs)."""
        operand = x.astype(jnp.bfloat16) if self.operand_dtype == "bfloat16" else x
        return (to_float32(operand) @ self.values).astype(dtype or x.dtype)


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
