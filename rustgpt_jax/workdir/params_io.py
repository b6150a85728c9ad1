"""Safetensors files, read and written one tensor at a time, including a run's parameters."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rustgpt_jax.atomic_io import atomic_file, translate_os_errors
from rustgpt_jax.config.schema import unflatten
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import flatten_paths

Tree = Any

# The data types of parameters, by their names in safetensors files.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Those that can be written; int8 only with scales, for programs.
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int8): "I8"}
# The number of bytes to convert at a time.
CHUNK_BYTES = 16 * 2**20
# The alignment of XLA's arrays on the CPU, in bytes.
ALIGNMENT = 64


# Reading.


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, which is read on demand."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    handle: Any

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy data type.

        Raises:
            UserError: Parameters cannot have the data type of this tensor.
        """
        if self.dtype_name not in DTYPES:
            raise UserError(
                f"{self.file}: {self.name} has the data type {self.dtype_name}; supported: {', '.join(DTYPES)}."
            )
        return DTYPES[self.dtype_name]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def read(self) -> np.ndarray:
        """Read the whole tensor."""
        return self._read(lambda: self.handle.get_tensor(self.name))

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Read the part of the tensor at an index of its first axes."""
        return self._read(lambda: self.handle.get_slice(self.name)[index])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Read a range along the first axis."""
        return self._read(lambda: self.handle.get_slice(self.name)[start:stop])

    def _read(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        _ = self.dtype
        try:
            return read()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.file} cannot be read: {error}.") from error


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Open a safetensors file; only its header is read.

    Returns:
        The tensors by name.

    Raises:
        UserError: The file is missing, damaged or truncated.
    """
    try:
        # With "pread" a file that is truncated while it is open raises an error; with "mmap" it kills the process.
        handle = safe_open(file, framework="np", backend="pread")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated: {error}.") from error
    # A safe_open handle is not a mapping: it has keys() but cannot be iterated over.
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (see above)
    return {
        name: StoredTensor(file, name, each.get_dtype(), tuple(each.get_shape()), handle)
        for name, each in slices.items()
    }


def open_parameters(file: Path) -> Tree:
    """Open a file of parameters as a tree of tensors, which are read on demand.

    Raises:
        UserError: The file is missing, damaged or truncated.
    """
    return unflatten(open_safetensors(file), "/")


def read_parameters(file: Path, shapes: Tree) -> Tree:
    """Read parameters into float32 JAX arrays, one at a time.

    Args:
        file: The safetensors file of a run.
        shapes: The shapes of the model's parameters, from `parameter_shapes`. If they have shardings, each device gets
            its part.

    Raises:
        UserError: A parameter is missing, unexpected or of another shape, or the file is damaged.
    """
    stored, wanted = matching_parameters(file, shapes), flatten_paths(shapes)
    # Largest first, so that the copy on the host is small when most of the parameters are in memory.
    order = sorted(stored, key=lambda path: -np.prod(stored[path].shape))
    loaded = {path: _to_jax(_read_float32(stored[path]), wanted[path].sharding) for path in order}
    return unflatten({path: loaded[path] for path in stored}, "/")


def matching_parameters(file: Path, shapes: Tree) -> dict[str, StoredTensor]:
    """Open a file of parameters and check that it matches a model.

    Args:
        file: The safetensors file of a run.
        shapes: The shapes of the model's parameters.

    Returns:
        One tensor per parameter, by path, in the order of `shapes`.

    Raises:
        UserError: As for `read_parameters`.
    """
    stored, wanted = open_safetensors(file), flatten_paths(shapes)
    for path in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{file} has no parameter {path}, which the model of this run needs.")
    for path in sorted(stored.keys() - wanted.keys()):
        raise UserError(f"{file} has a parameter {path}, which the model of this run does not have.")
    for path, leaf in wanted.items():
        if stored[path].shape != tuple(leaf.shape):
            raise UserError(f"{file}: {path} has shape {stored[path].shape}; the model expects {tuple(leaf.shape)}.")
        _ = stored[path].dtype
    return {path: stored[path] for path in wanted}


def _read_float32(stored: StoredTensor) -> np.ndarray:
    """Read a tensor as float32, converting a few MB at a time."""
    array = _aligned_empty(stored.shape)
    rows = stored.shape[0]
    step = max(1, CHUNK_BYTES * rows // max(array.nbytes, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        with np.errstate(over="ignore"):
            array[start:stop] = stored.read_rows(start, stop)
    return array


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate a float32 array that JAX can use on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)


def _to_jax(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# Writing.


class NewTensor(NamedTuple):
    """A tensor to be written; `parts` yields its values in order, along the first axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_parameters(file: Path, tensors: Sequence[NewTensor]) -> None:
    """Write the parameters of a run, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_file(file) as temporary:
        write_safetensors(temporary, tensors, {"format": "rustgpt_jax"})


def write_safetensors(file: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with a few MB of its tensors in memory at a time.

    `safetensors.serialize_file` takes pointers to tensors that are all in memory, which a large model does not allow.
    The format is simple: the header's length, the header, and the tensors in the order of the header.

    Raises:
        UserError: The file cannot be written. The caller must remove the incomplete file.
    """
    # As in the library: tensors with wide elements first, so that each is aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with translate_os_errors(file), open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            chunks = (chunk for part in tensor.parts() for chunk in _chunks(part))
            n_written = sum(stream.write(_to_bytes(chunk, tensor.dtype)) for chunk in chunks)
            assert n_written == tensor.nbytes, f"{tensor.name}: {n_written} of {tensor.nbytes} bytes"
        stream.flush()
        os.fsync(stream.fileno())


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Split an array along its first axis into parts of a few MB."""
    if array.nbytes <= CHUNK_BYTES or array.ndim < 2:
        yield array
        return
    rows = max(1, CHUNK_BYTES * array.shape[0] // array.nbytes)
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def _to_bytes(array: np.ndarray, dtype: np.dtype[Any]) -> memoryview:
    # Values beyond the range of a narrower dtype become infinite.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data
