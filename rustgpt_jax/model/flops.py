"""What a model costs: parameters, bytes and floating-point operations, counted from shapes alone."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rustgpt_jax.config.schema import ModelConfig, replace_paths
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
def forward_flops_per_token(model: ModelConfig, window: int, loops_once: bool = False) -> float:
    """FLOPs of the matrix products of one forward over a window, divided by its tokens.

    Scores of later tokens, which the causal mask hides, are computed and so counted. A backward pass costs twice this.
    loops_once: as `matmul_flops` has it.
    """
    # In the kernels of libraries no product is to be seen. No device is asked what suits it.
    model = replace_paths(model, {"attention.kernel": "plain", "save_residuals": False})
    tokens = jax.ShapeDtypeStruct((1, window), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(
        parameter_shapes(model), tokens
    )
    return matmul_flops(jaxpr.jaxpr, loops_once) / window


def training_flops_per_token(model: ModelConfig, window: int) -> float:
    """FLOPs of the matrix products of a forward and a backward, by convention without recomputation (remat)."""
    return 3 * forward_flops_per_token(model, window)


def matmul_flops(jaxpr: core.Jaxpr, loops_once: bool = False) -> float:
    """2 m n k for each matrix product of a program, those inside a loop of known length counted that many times.

    loops_once: count them once instead, as XLA does.
    """
    return sum(_product_flops(equation) * (1 if loops_once else times) for equation, times in equations(jaxpr))


def equations(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a program that runs `times` times, and of the programs inside it, and how often each is run."""
    for equation in jaxpr.eqns:
        yield equation, times
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for program in inner_programs(equation):
            yield from equations(program, times * repeats)


def inner_programs(equation: Any) -> list[core.Jaxpr]:
    """The programs that an equation runs: the body of a loop, the branches of a choice."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds))
    programs = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
    return [program for program in programs if isinstance(program, core.Jaxpr)]


def _product_flops(equation: Any) -> float:
    """2 m n k of a matrix product, 0 of any other equation."""
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, product = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)
