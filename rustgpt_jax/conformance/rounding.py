"""Analysis of a traced program that finds states and decays which are rounded repeatedly along a row.

Each array of the program is followed from where it is created. Its depth is the largest number of successive roundings
to fewer bits than float32 on any path to it. In attention the depth does not depend on the row length; in a recurrence
with a rounded state it grows with every token or chunk.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from rustgpt_jax.model.flops import inner_programs

LIBRARIES = ("/jax/", "/flax/", "/jaxlib/")
# Provenance of a value: parameters and constants only; a bounded function of them or of activations, such as a decay;
# or activations.
CONSTANT, GATE, DATA = range(3)
# Primitives that move or select values without rounding.
MOVES = frozenset(
    (
        *("reshape", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "scatter", "concatenate"),
        *("pad", "select_n", "squeeze", "expand_dims", "rev", "dynamic_update_slice", "copy", "stop_gradient"),
        *("sharding_constraint", "optimization_barrier", "neg", "abs", "max", "min", "sign", "reduce_max"),
        *("reduce_min", "convert_element_type", "device_put", "split", "clamp"),
    )
)
ROUNDS = frozenset(("reduce_precision", "round", "floor", "ceil"))
BOUNDS = frozenset(("exp", "exp2", "expm1", "logistic", "tanh", "log1p", "pow", "erf"))
# Assumed number of iterations of a loop whose trip count is not known statically.
ASSUMED_ITERATIONS = 100
POWERS = frozenset(("pow", "cumprod", "reduce_prod"))


class Suspect(NamedTuple):
    """A state multiplied by a rounded decay: the equation, and the dtype that the decay was rounded to."""

    equation: Any
    rounded: Any


class Rounding(NamedTuple):
    """Properties of an array in a traced program.

    Attributes:
        depth: Number of roundings on the longest path.
        is_exact: Whether its values are exact in a dtype of few bits.
        kind: Provenance of its values.
        rounded: For a constant or gate that was rounded, the shape and dtype of the rounded array.
        is_state: Whether it depends on a state from before the row.
        suspects: Products of a state and a rounded decay that it depends on.
        path: The last rounding on the longest path, linked to the path before it.
    """

    depth: int = 0
    is_exact: bool = False
    kind: int = CONSTANT
    rounded: Any = None
    is_state: bool = False
    suspects: tuple[Suspect, ...] = ()
    path: Any = None


EXACT = Rounding(is_exact=True)


def _is_low_precision(array: Any) -> bool:
    """Return whether an array has a floating-point dtype of fewer bits than float32."""
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def count_roundings_by_line(traced: Rounding) -> Counter[str]:
    """Count the roundings on the longest path to an array by source line."""
    lines: Counter[str] = Counter()
    path = traced.path
    while path is not None:
        equation, path = path
        lines[format_line(equation)] += 1
    return lines


class RoundingAnalysis:
    """An analysis that follows roundings through a program and collects errors in `found`."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any, Any]] = []

    def follow(self, jaxpr: Any, inputs: Sequence[Rounding]) -> list[Rounding]:
        """Return the properties of a program's outputs, given those of its inputs."""
        known: dict[Any, Rounding] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(variable: Any) -> Rounding:
            return EXACT if isinstance(variable, core.Literal) else known.get(variable, Rounding())

        for equation in jaxpr.eqns:
            arguments = [value(variable) for variable in equation.invars]
            known.update(zip(equation.outvars, self._outputs_of(equation, arguments), strict=True))
        return [value(variable) for variable in jaxpr.outvars]

    def _outputs_of(self, equation: Any, arguments: list[Rounding]) -> list[Rounding]:
        inner = inner_programs(equation)
        match equation.primitive.name:
            case "scan":
                n_constants, n_carried = equation.params["num_consts"], equation.params["num_carry"]
                length = equation.params["length"]
                return self._loop(inner[0], arguments, n_constants, n_carried, length)
            case "while":
                body, n_constants = equation.params["body_jaxpr"].jaxpr, equation.params["body_nconsts"]
                arguments = arguments[equation.params["cond_nconsts"] :]
                return self._loop(body, arguments, n_constants, len(arguments) - n_constants, ASSUMED_ITERATIONS)
            case "cond":
                branches = [self.follow(branch, arguments[1:]) for branch in inner]
                return [_combine(each) for each in zip(*branches, strict=True)]
        if inner and len(inner[0].invars) == len(arguments) and len(inner[0].outvars) == len(equation.outvars):
            return self.follow(inner[0], arguments)
        return [self._result(equation, arguments, output.aval) for output in equation.outvars]

    def _loop(
        self, body: Any, arguments: list[Rounding], n_constants: int, n_carried: int, length: int
    ) -> list[Rounding]:
        """Return the properties after a loop of `length` iterations, extrapolated from two iterations."""
        constants, others = arguments[:n_constants], arguments[n_constants:]
        carried, scanned = others[:n_carried], others[n_carried:]
        carried = [each._replace(is_state=True) for each in carried]
        first = self.follow(body, [*constants, *carried, *scanned])
        again = [_combine(pair) for pair in zip(carried, first[:n_carried], strict=True)]
        second = self.follow(body, [*constants, *again, *scanned])
        results = []
        for index, (before, after) in enumerate(zip(first, second, strict=True)):
            each_round = max(after.depth - before.depth, 0)
            if index < n_carried:
                if each_round:
                    self._add("a loop keeps its state in fewer bits than float32", *_last_rounding(after))
                for suspect in after.suspects:
                    self._add("a loop multiplies its state by a decay that was rounded", *suspect)
            results.append(after._replace(depth=after.depth + each_round * max(length - 2, 0)))
        return results

    def _result(self, equation: Any, arguments: list[Rounding], output: Any) -> Rounding:
        name = equation.primitive.name
        joined = _combine(arguments[1:] if name == "select_n" else arguments) if arguments else Rounding()
        contracts = name == "dot_general" and any(equation.params["dimension_numbers"][0])
        if name in BOUNDS and joined.kind == DATA:
            joined = joined._replace(kind=GATE)
        elif contracts and joined.kind == GATE:
            joined = joined._replace(kind=DATA)
        if name in POWERS and arguments[0].rounded is not None:
            self._add("a rounded decay is raised to a power", equation, arguments[0].rounded)
        if name == "mul" or (name == "dot_general" and not contracts):
            joined = self._product(equation, arguments, joined)
        is_rounding = (
            name in ROUNDS
            or (_is_low_precision(output) and name not in MOVES)
            or (name == "convert_element_type" and _is_low_precision(output) and not joined.is_exact)
        )
        if is_rounding:
            joined = joined._replace(depth=joined.depth + 1, is_exact=True, path=(equation, joined.path))
            if joined.kind != DATA:
                joined = joined._replace(rounded=output)
        elif name not in MOVES:
            joined = joined._replace(is_exact=False)
        return joined if joined.kind != DATA else joined._replace(rounded=None)

    def _product(self, equation: Any, arguments: list[Rounding], joined: Rounding) -> Rounding:
        for decay, other in (arguments, arguments[::-1]):
            if decay.rounded is None or decay.is_state or decay.kind == DATA:
                continue
            if other.is_state:
                joined = joined._replace(suspects=(*joined.suspects, Suspect(equation, decay.rounded))[:4])
            elif _is_in_associative_scan(equation):
                self._add("an associative scan multiplies decays that were rounded", equation, decay.rounded)
        return joined

    def _add(self, what: str, equation: Any, array: Any) -> None:
        if all(equation is not other for _, other, _ in self.found):
            self.found.append((what, equation, array))


def _combine(values: Sequence[Rounding]) -> Rounding:
    """Combine the properties of arrays that are joined into one."""
    return Rounding(
        max(each.depth for each in values),
        all(each.is_exact for each in values),
        max(each.kind for each in values),
        next((each.rounded for each in values if each.rounded is not None), None),
        any(each.is_state for each in values),
        tuple({id(suspect.equation): suspect for each in values for suspect in each.suspects}.values())[:4],
        max(values, key=lambda each: each.depth).path,
    )


def _last_rounding(traced: Rounding) -> tuple[Any, Any]:
    """Return the equation of the last rounding and its output dtype."""
    equation, _ = traced.path
    return equation, equation.outvars[0].aval


def _is_in_associative_scan(equation: Any) -> bool:
    traceback = equation.source_info.traceback
    return any(frame.function_name == "associative_scan" for frame in (traceback.frames if traceback else ()))


def format_line(equation: Any) -> str:
    """Return where user code creates a jaxpr equation, such as 'mixers.py, line 12, in __call__'."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(library in frame.file_name for library in LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}, line {frame.line_num}, in {frame.function_name}"
    return "an unknown line"
