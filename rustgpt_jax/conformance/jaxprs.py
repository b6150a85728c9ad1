"""Reading a program that JAX has traced: what its loops carry, and where its equations were written."""

from typing import Any

from rustgpt_jax.model.cost import inner_programs

LIBRARIES = ("/jax/", "/flax/", "/jaxlib/")


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


def line_of(equation: Any) -> str:
    """Where an equation was written, outside the libraries: 'mixers.py, line 12, in __call__'."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(library in frame.file_name for library in LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}, line {frame.line_num}, in {frame.function_name}"
    return "an unknown line"
