"""Products of activations with weights, in the form that the model asks for, or in that of a weight kept otherwise."""

import jax

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model import derivatives, float8
from rustgpt_jax.model.stored import Stored


def product(x: jax.Array, kernel: jax.Array | Stored, config: ModelConfig) -> jax.Array:
    """x W with the shape (..., outputs), in the model's dtype, from a float32 kernel (inputs, outputs)."""
    x = x.astype(config.dtype)
    if isinstance(kernel, Stored):
        return kernel.product(x)
    if config.matmul == "float8":
        return float8.product(x, kernel)
    operands, is_kept = config.dtype if config.matmul == "plain" else config.matmul, derivatives.are_kept(config)
    if operands == config.dtype and not is_kept:
        return x @ kernel.astype(config.dtype)
    return derivatives.product(x, kernel, operands, is_kept)
