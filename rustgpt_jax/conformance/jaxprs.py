"""Reading a program that JAX has traced: its equations, where they were written, and what their products cost."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

LIBRARIES = ("/jax/", "/flax/", "/jaxlib/")


def equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Every equation of a program and of the programs inside it, those of a loop once."""
    for equation in jaxpr.eqns:
        yield equation
        for program in inner_programs(equation):
            yield from equations(program)


def inner_programs(equation: Any) -> list[core.Jaxpr]:
    """The programs that an equation runs: the body of a loop, the branches of a choice."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds))
    programs = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
    return [program for program in programs if isinstance(program, core.Jaxpr)]


def loop_state(equation: Any) -> list[Any]:
    """The types of what a `scan` carries from one round to the next; nothing for any other equation."""
    if equation.primitive.name != "scan":
        return []
    (body,) = inner_programs(equation)
    # What is not carried but collected has an axis more outside.
    pairs: list[tuple[Any, Any]] = [
        (outside.aval, inside.aval) for outside, inside in zip(equation.outvars, body.outvars, strict=True)
    ]
    return [outside for outside, inside in pairs if outside.shape == inside.shape]


def product_flops(equation: Any) -> float:
    """2 m n k of a matrix product, 0 of any other equation."""
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, product = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)


def line_of(equation: Any) -> str:
    """Where an equation was written, outside the libraries: 'mixers.py, line 12, in __call__'."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(library in frame.file_name for library in LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}, line {frame.line_num}, in {frame.function_name}"
    return "an unknown line"
