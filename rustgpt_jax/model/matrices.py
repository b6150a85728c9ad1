"""Which parameters of a block are the matrices of linear layers, whoever made the layers."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model.block import Block
from rustgpt_jax.model.block_inputs import BlockInputs
from rustgpt_jax.model.linear import Linear


@cache
def linear_layers(block: ModelConfig) -> dict[str, ModelConfig]:
    """The paths of the kernels of linear layers in a block, each with the config that its layer sees."""
    found: dict[str, ModelConfig] = {}

    def note(call: Any, given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            found["/".join((*module.path, "kernel"))] = module.config
        return call(*given, **named)

    def forward() -> Any:
        context = BlockInputs(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        x_BTD = jnp.zeros((1, 1, block.d_model), block.dtype)
        return Block(block).init(jax.random.key(0), x_BTD, context, None)

    with nn.intercept_methods(note):
        jax.eval_shape(forward)
    return found
