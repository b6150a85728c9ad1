"""Reading in a traced program what is rounded again and again along a row: a state, or the decay that multiplies it.

Each array of the program is followed from where it is made. Its depth is the number of roundings to fewer bits than
float32 has, one on top of another, on the longest way to it. In attention that number does not depend on the length of
the row; in a recurrence whose state is rounded it grows with every token or every chunk.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from rustgpt_jax.model.cost import inner_programs

LIBRARIES = ("/jax/", "/flax/", "/jaxlib/")
# What a number is made of: only of parameters and constants; of those or of activations, through a function that
# bounds it, as decays are; or of activations.
CONSTANT, GATE, DATA = range(3)
# These move or choose numbers, and round nothing.
MOVES = frozenset(
    (
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
        "gather",
        "scatter",
        "concatenate",
        "pad",
        "select_n",
        "squeeze",
        "expand_dims",
        "rev",
        "dynamic_update_slice",
        "copy",
        "stop_gradient",
        "sharding_constraint",
        "optimization_barrier",
        "neg",
        "abs",
        "max",
        "min",
        "sign",
        "reduce_max",
        "reduce_min",
        "convert_element_type",
        "device_put",
        "split",
        "clamp",
    )
)
ROUNDS = frozenset(("reduce_precision", "round", "floor", "ceil"))
BOUNDS = frozenset(("exp", "exp2", "expm1", "logistic", "tanh", "log1p", "pow", "erf"))
# Of a loop whose number of rounds only its own condition knows.
SOME_ROUNDS = 100
POWERS = frozenset(("pow", "cumprod", "reduce_prod"))


class Suspect(NamedTuple):
    """A state that is multiplied by a rounded decay: the equation, and the type of the decay where it was rounded."""

    equation: Any
    numbers: Any


class Traced(NamedTuple):
    """What is known of an array.

    depth: roundings on the longest way. is_exact: few bits hold it exactly. kind: what it is made of. rounded: the
    array that it, a constant or a gate, was when it was rounded. is_state: a state before the row is in it.
    suspects: products of a state and a rounded decay that are in it. path: the last rounding on the longest way, and
    the path to it.
    """

    depth: int = 0
    is_exact: bool = False
    kind: int = CONSTANT
    rounded: Any = None
    is_state: bool = False
    suspects: tuple[Suspect, ...] = ()
    path: Any = None


EXACT = Traced(is_exact=True)


def is_low(array: Any) -> bool:
    """Whether an array has floating-point numbers of fewer bits than float32."""
    dtype = getattr(array, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def roundings_by_line(traced: Traced) -> Counter[str]:
    """How many of the roundings on the longest way to an array were written in each line."""
    lines: Counter[str] = Counter()
    path = traced.path
    while path is not None:
        equation, path = path
        lines[line_of(equation)] += 1
    return lines


class Reading:
    """One reading of a program; `found` are the mistakes that are certain wherever they stand."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any, Any]] = []

    def follow(self, jaxpr: Any, inputs: Sequence[Traced]) -> list[Traced]:
        """What is known of the outputs of a program, from what is known of its inputs."""
        known: dict[Any, Traced] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(variable: Any) -> Traced:
            return EXACT if isinstance(variable, core.Literal) else known.get(variable, Traced())

        for equation in jaxpr.eqns:
            arguments = [value(variable) for variable in equation.invars]
            known.update(zip(equation.outvars, self._outputs(equation, arguments), strict=True))
        return [value(variable) for variable in jaxpr.outvars]

    def _outputs(self, equation: Any, arguments: list[Traced]) -> list[Traced]:
        inner = inner_programs(equation)
        match equation.primitive.name:
            case "scan":
                n_constants, n_carried = equation.params["num_consts"], equation.params["num_carry"]
                length = equation.params["length"]
                return self._loop(inner[0], arguments, n_constants, n_carried, length)
            case "while":
                body, n_constants = equation.params["body_jaxpr"].jaxpr, equation.params["body_nconsts"]
                arguments = arguments[equation.params["cond_nconsts"] :]
                return self._loop(body, arguments, n_constants, len(arguments) - n_constants, SOME_ROUNDS)
            case "cond":
                branches = [self.follow(branch, arguments[1:]) for branch in inner]
                return [_joined(each) for each in zip(*branches, strict=True)]
        if inner and len(inner[0].invars) == len(arguments) and len(inner[0].outvars) == len(equation.outvars):
            return self.follow(inner[0], arguments)
        return [self._result(equation, arguments, output.aval) for output in equation.outvars]

    def _loop(self, body: Any, arguments: list[Traced], n_constants: int, n_carried: int, length: int) -> list[Traced]:
        """What is known after a loop of `length` rounds, from what two of them do to what it carries."""
        constants, others = arguments[:n_constants], arguments[n_constants:]
        carried, rows = others[:n_carried], others[n_carried:]
        carried = [each._replace(is_state=True) for each in carried]
        first = self.follow(body, [*constants, *carried, *rows])
        again = [_joined(pair) for pair in zip(carried, first[:n_carried], strict=True)]
        second = self.follow(body, [*constants, *again, *rows])
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

    def _result(self, equation: Any, arguments: list[Traced], output: Any) -> Traced:
        name = equation.primitive.name
        joined = _joined(arguments[1:] if name == "select_n" else arguments) if arguments else Traced()
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
            or (is_low(output) and name not in MOVES)
            or (name == "convert_element_type" and is_low(output) and not joined.is_exact)
        )
        if is_rounding:
            joined = joined._replace(depth=joined.depth + 1, is_exact=True, path=(equation, joined.path))
            if joined.kind != DATA:
                joined = joined._replace(rounded=output)
        elif name not in MOVES:
            joined = joined._replace(is_exact=False)
        return joined if joined.kind != DATA else joined._replace(rounded=None)

    def _product(self, equation: Any, arguments: list[Traced], joined: Traced) -> Traced:
        for decay, other in (arguments, arguments[::-1]):
            if decay.rounded is None or decay.is_state or decay.kind == DATA:
                continue
            if other.is_state:
                joined = joined._replace(suspects=(*joined.suspects, Suspect(equation, decay.rounded))[:4])
            elif _is_in_an_associative_scan(equation):
                self._add("an associative scan multiplies decays that were rounded", equation, decay.rounded)
        return joined

    def _add(self, what: str, equation: Any, numbers: Any) -> None:
        if all(equation is not other for _, other, _ in self.found):
            self.found.append((what, equation, numbers))


def _joined(values: Sequence[Traced]) -> Traced:
    """What is known of an array that is made of several."""
    return Traced(
        max(each.depth for each in values),
        all(each.is_exact for each in values),
        max(each.kind for each in values),
        next((each.rounded for each in values if each.rounded is not None), None),
        any(each.is_state for each in values),
        tuple({id(suspect.equation): suspect for each in values for suspect in each.suspects}.values())[:4],
        max(values, key=lambda each: each.depth).path,
    )


def _last_rounding(traced: Traced) -> tuple[Any, Any]:
    """The equation, and the type of what it makes."""
    equation, _ = traced.path
    return equation, equation.outvars[0].aval


def _is_in_an_associative_scan(equation: Any) -> bool:
    traceback = equation.source_info.traceback
    return any(frame.function_name == "associative_scan" for frame in (traceback.frames if traceback else ()))


def line_of(equation: Any) -> str:
    """Where an equation was written, outside the libraries: 'mixers.py, line 12, in __call__'."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(library in frame.file_name for library in LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}, line {frame.line_num}, in {frame.function_name}"
    return "an unknown line"
