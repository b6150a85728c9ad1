"""Parameter counts, bytes and FLOPs of a model, computed from shapes alone."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.model import transformer

Shapes = Any  # A tree of jax.ShapeDtypeStruct.


@cache
def parameter_shapes(model: ModelConfig) -> Shapes:
    """Return the shapes and dtypes of the parameters."""
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))


def total_size(tree: Shapes) -> int:
    """Return the number of elements of all arrays in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def total_bytes(tree: Shapes) -> int:
    """Return the number of bytes of all arrays in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@cache
def forward_flops_per_token(model: ModelConfig, seq_len: int, loops_once: bool = False) -> float:
    """Return the matmul FLOPs of a forward pass over a sequence, divided by its tokens.

    Attention scores of later tokens, which the causal mask hides, are computed and therefore counted. The padding of
    `model.moe.kernel` blocked is counted only if the config names that kernel. `loops_once` is as in `matmul_flops`.
    """
    # Library kernels hide their products, and resolving save_residuals would initialize the device.
    model = replace_paths(model, {"attention.kernel": "reference", "save_residuals": False})
    if model.moe.kernel == "auto":
        model = replace_paths(model, {"moe.kernel": "ragged_dot"})
    tokens = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(
        parameter_shapes(model), tokens
    )
    return matmul_flops(jaxpr.jaxpr, loops_once) / seq_len


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the matmul FLOPs per token of a forward and backward pass, by convention without recomputation (remat)."""
    return 3 * forward_flops_per_token(model, seq_len)


def matmul_flops(jaxpr: core.Jaxpr, loops_once: bool = False) -> float:
    """Return the sum of 2 m n k over the matrix products of a program.

    Products in the body of a scan are counted for each iteration, or with `loops_once` only once, as XLA does.
    """
    return sum(_equation_flops(equation) * (1 if loops_once else times) for equation, times in equations(jaxpr))


def equations(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield the equations of a program, which runs `times` times, and of its inner programs, with their run counts."""
    for equation in jaxpr.eqns:
        yield equation, times
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for program in inner_programs(equation):
            yield from equations(program, times * repeats)


def inner_programs(equation: Any) -> list[core.Jaxpr]:
    """Return the programs inside an equation, such as the body of a loop or the branches of a conditional."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds))
    programs = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
    return [program for program in programs if isinstance(program, core.Jaxpr)]


def _equation_flops(equation: Any) -> float:
    shared: tuple[int, ...] = ()
    if equation.primitive.name == "dot_general":
        dimensions = equation.params["dimension_numbers"]
    elif equation.primitive.name == "ragged_dot_general":
        # Each row of the left is multiplied by the matrix of one group, so the axis of groups adds no products.
        ragged = equation.params["ragged_dot_dimension_numbers"]
        dimensions, shared = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    else:
        return 0.0
    (_, contracted), (_, batch) = dimensions
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    # Each number of the left is multiplied once for each number in these axes of the right.
    outer = [size for axis, size in enumerate(right) if axis not in (*contracted, *batch, *shared)]
    return 2.0 * math.prod(left) * math.prod(outer)
