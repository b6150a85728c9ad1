"""What a model costs: parameters, bytes and floating-point operations, counted from shapes alone."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.model import transformer

Shapes = Any  # a tree of jax.ShapeDtypeStruct


@cache
def parameter_shapes(model: ModelConfig) -> Shapes:
    """The tree of parameters as shapes and types."""
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))


def total_size(tree: Shapes) -> int:
    """Elements in all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def total_bytes(tree: Shapes) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@cache
def forward_flops_per_token(model: ModelConfig, window: int) -> float:
    """FLOPs of the matrix products of one forward over a window, divided by its tokens.

    Scores of later tokens, which the causal mask hides, are computed and so counted. A backward pass costs twice this.
    """
    tokens = jax.ShapeDtypeStruct((1, window), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(
        parameter_shapes(model), tokens
    )
    return matrix_product_flops(jaxpr.jaxpr) / window


def training_flops_per_token(model: ModelConfig, window: int) -> float:
    """FLOPs of the matrix products of a forward and a backward, by convention without recomputation (remat)."""
    return 3 * forward_flops_per_token(model, window)


def matrix_product_flops(jaxpr: core.Jaxpr) -> float:
    """2 m n k for each matrix product of a program, those inside a loop of known length counted that many times."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * sum(matrix_product_flops(inner) for inner in _inner_programs(equation.params))
    return total


def _inner_programs(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    leaves = jax.tree.leaves(
        list(parameters.values()), is_leaf=lambda leaf: isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))
    )
    programs = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
    return [program for program in programs if isinstance(program, core.Jaxpr)]
