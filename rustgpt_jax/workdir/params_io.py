"""The parameters of a run in one safetensors file: our own names and stacks, in the types that they came in.

An imported run keeps its parameters so, until training makes float32 checkpoints of them.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import by_path, nested
from rustgpt_jax.workdir.safetensors_files import CHUNK_BYTES, NewTensor, StoredTensor, read_header, write_file

Tree = Any

# Bytes: XLA's own arrays on the CPU begin at a multiple of this.
ALIGNMENT = 64


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A place to write a file at, which appears under its own name once all is written, or not at all."""
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield hidden
        os.replace(hidden, file)
    finally:
        hidden.unlink(missing_ok=True)


def write_tensors(file: Path, tensors: list[NewTensor]) -> None:
    """Write parameters given as tensors with our names. Raises UserError if the file cannot be written."""
    with atomic_file(file) as hidden:
        write_file(hidden, tensors, {"format": "rustgpt_jax"})


def open_parameters(file: Path) -> Tree:
    """The tree of parameters in a file, as tensors that are read when they are asked for.

    Raises UserError if the file is missing or damaged.
    """
    return nested(read_header(file))


def read_parameters(file: Path, shapes: Tree) -> Tree:
    """Parameters in float32, read leaf by leaf into JAX arrays.

    Args:
        file: from `write_parameters`.
        shapes: the tree of shapes of the model, from `parameter_shapes`. Where these have shardings, each device gets
            its part.

    Raises UserError naming a parameter that is missing, too much, or of another shape.
    """
    stored, wanted = matching_parameters(file, shapes), by_path(shapes)
    # The largest first: what is read and not yet given to JAX is then small when the memory is fullest.
    order = sorted(stored, key=lambda path: -np.prod(stored[path].shape))
    given = {path: _given(_float32(stored[path]), wanted[path].sharding) for path in order}
    return nested({path: given[path] for path in stored})


def _given(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def matching_parameters(file: Path, shapes: Tree) -> dict[str, StoredTensor]:
    """The tensors of a file by path, one for each parameter of a model, in their order; `shapes` has the parameters'.

    Raises UserError as `read_parameters` does.
    """
    stored, wanted = read_header(file), by_path(shapes)
    for path in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{file} has no {path}, which the model of this run has.")
    for path in sorted(stored.keys() - wanted.keys()):
        raise UserError(f"{file} has {path}, which the model of this run has not.")
    for path, leaf in wanted.items():
        if stored[path].shape != tuple(leaf.shape):
            raise UserError(f"{file}: {path} has the shape {stored[path].shape}, and the model {tuple(leaf.shape)}.")
        _ = stored[path].dtype
    return {path: stored[path] for path in wanted}


def _float32(stored: StoredTensor) -> np.ndarray:
    """A tensor in float32, of which no more than a few MB are in memory twice."""
    array = _aligned(stored.shape)
    rows = stored.shape[0]
    step = max(1, CHUNK_BYTES * rows // max(array.nbytes, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        with np.errstate(over="ignore"):
            array[start:stop] = stored.rows(start, stop)
    return array


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty array that begins where JAX takes it over on the CPU, instead of copying it."""
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(np.float32).reshape(shape)
