"""Weights that are kept otherwise than as an array of floats, and know how they are multiplied."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rustgpt_jax.model.dtypes import accum_dtype, to_float32
from rustgpt_jax.native import matvec
from rustgpt_jax.pytrees import pytree_dataclass

# The most rows of x for which the native kernel is faster than XLA.
MOST_NATIVE_ROWS = 8
# The largest number of int8 whose negative is one too.
LARGEST_INT8 = 127


class PackedWeight(ABC):
    """A weight matrix (inputs, outputs), a pytree that stands where a model's parameters have an array.

    Its first leaf has the shape of the matrix, which is all that the layers ask of it.
    """

    @abstractmethod
    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """X W with the shape (..., outputs), in `dtype` or else in the type of x (..., inputs)."""


@pytree_dataclass(meta=["kernel"])
@dataclass(frozen=True)
class RowMajorWeight(PackedWeight):
    """A matrix in the order in which a product with few rows reads it: all weights of one output, then of the next.

    values: in this order, in an array of the matrix's shape (inputs, outputs): float32, bfloat16, or int8.
    scales: what the sum of each output is multiplied by, (outputs,), for int8; else None.
    kernel: what multiplies few rows. native: `native.matvec`; plain: XLA, as it multiplies many.

    Sums are float32 at least. With weights in bfloat16, x is rounded to it too.
    """

    values: jax.Array
    scales: jax.Array | None
    kernel: str

    @property
    def values_OI(self) -> jax.Array:
        """The values by outputs."""
        return self.values.reshape(self.values.shape[::-1])

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """X W with the shape (..., outputs), in `dtype` or else in the type of x (..., inputs)."""
        x_BI = x.reshape(-1, x.shape[-1])
        if self.values.dtype == jnp.bfloat16:
            x_BI = x_BI.astype(jnp.bfloat16)
        is_native = self.kernel == "native" and len(x_BI) <= MOST_NATIVE_ROWS
        y_BO = (matvec.matvec if is_native else matrix_product)(x_BI, self.values_OI)
        if self.scales is not None:
            y_BO = y_BO * self.scales[None, :].astype(y_BO.dtype)
        return y_BO.reshape(*x.shape[:-1], y_BO.shape[-1]).astype(dtype or x.dtype)


@pytree_dataclass(meta=["operands"])
@dataclass(frozen=True)
class UpcastWeight(PackedWeight):
    """A matrix with the values of a narrower type, `operands`, in float32, with the results of RowMajorWeight.

    It is for XLA on CPUs, which multiplies few rows by narrow weights many times slower.
    """

    values: jax.Array
    operands: str

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """X W with the shape (..., outputs), in `dtype` or else in the type of x (..., inputs)."""
        operand = x.astype(jnp.bfloat16) if self.operands == "bfloat16" else x
        return (to_float32(operand) @ self.values).astype(dtype or x.dtype)


def matrix_product(x_BI: jax.Array, values_OI: jax.Array) -> jax.Array:
    """X W in float32 at least."""
    return jnp.einsum("BI,OI->BO", x_BI, values_OI.astype(x_BI.dtype), preferred_element_type=accum_dtype(x_BI))


def to_row_major(weights: jax.Array, dtype: Any, kernel: str) -> RowMajorWeight:
    """A float32 matrix (inputs, outputs) in the order of its outputs, as numbers of `dtype`; int8 with scales."""
    values_OI, scales_O = quantize_int8(weights) if dtype == "int8" else (weights.astype(dtype).T, None)
    return RowMajorWeight(values_OI.reshape(weights.shape), scales_O, kernel)


def quantize_int8(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize a matrix (inputs, outputs) symmetrically to int8, with one scale per output.

    The largest weight of each output is exact, and no weight is off by more than half a scale.

    Returns:
        values_OI and scales_O, such that the matrix is about values_OI^T scales_O.
    """
    weights_OI = to_float32(weights).T
    largest_O = jnp.max(jnp.abs(weights_OI), axis=1)
    # What is all zeros has a scale too.
    scales_O = jnp.where(largest_O > 0, largest_O / LARGEST_INT8, 1)
    return jnp.round(weights_OI / scales_O[:, None]).astype(jnp.int8), scales_O


def round_weights(weights: jax.Array, dtype: Any) -> jax.Array:
    """A float32 matrix (inputs, outputs) with the values that `to_row_major` keeps of it."""
    if dtype != "int8":
        return weights.astype(dtype).astype(weights.dtype)
    values_OI, scales_O = quantize_int8(weights)
    return (values_OI * scales_O[:, None]).T
