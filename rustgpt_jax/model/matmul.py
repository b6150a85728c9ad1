"""Products of activations with weights, in the form that the model asks for, or in that of a weight kept otherwise."""

import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model import custom_vjps, fp8
from rustgpt_jax.model.activation_sharding import laid_out
from rustgpt_jax.model.dtypes import product_type
from rustgpt_jax.model.quantized_weights import Stored


def product(x: jax.Array, kernel: jax.Array | Stored, config: ModelConfig) -> jax.Array:
    """x W with the shape (..., outputs), in the model's dtype, from a float32 kernel (inputs, outputs)."""
    x = x.astype(config.dtype)
    if isinstance(kernel, Stored):
        return kernel.product(x)
    if config.matmul == "float8":
        return fp8.product(x, kernel)
    operands, is_kept = config.dtype if config.matmul == "plain" else config.matmul, custom_vjps.are_kept(config)
    if operands == config.dtype and not is_kept:
        return x @ kernel.astype(config.dtype)
    return custom_vjps.product(x, kernel, operands, is_kept)


def readout(hidden_BTD: jax.Array, weights: jax.Array | Stored, letters: str, config: ModelConfig) -> jax.Array:
    """logits_BTV in float32 at least, from factors in config.logits_dtype, or else in the model's dtype.

    letters: the axes of the weights, "VD" of a float32 table, "DV" of a kernel.
    """
    operands = config.logits_dtype or config.dtype
    if isinstance(weights, Stored):
        hidden_BTD = hidden_BTD.astype(operands)
        return weights.product(hidden_BTD, product_type(hidden_BTD))
    wide, weights, axis = jnp.promote_types(operands, jnp.float32), laid_out(weights, letters), letters.index("D")
    hidden_BTD = hidden_BTD.astype(wide)
    if operands == wide:
        return jax.lax.dot_general(hidden_BTD, weights.astype(wide), (((2,), (axis,)), ((), ())))
    return custom_vjps.product(hidden_BTD, weights, operands, custom_vjps.are_kept(config), axis)
