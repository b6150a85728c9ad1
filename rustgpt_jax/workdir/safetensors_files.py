"""Safetensors files, read and written a tensor at a time.

A file is the length of its header in 8 bytes, the header, a JSON object with the type, the shape and the place of each
tensor, and the tensors one after another (github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rustgpt_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE = "pytorch_model"
LARGEST_HEADER = 100_000_000
CHUNK_BYTES = 16 * 2**20

# The types that are read and written; the bytes of an element of those that are only passed over.
TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
BYTES = {name: dtype.itemsize for name, dtype in TYPES.items()} | {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2},
    **{"U32": 4, "I32": 4, "U64": 8, "I64": 8},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is in memory until it is read."""

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its NumPy type. Raises UserError for one that holds no parameters."""
        if self.type not in TYPES:
            raise UserError(f"{self.file}: {self.name} has the type {self.type}; {', '.join(TYPES)} are read.")
        return TYPES[self.type]

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def read(self) -> np.ndarray:
        """All of it."""
        return self._read(self.offset, self.shape)

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """What stands at an index of the first axes."""
        shape = self.shape[len(index) :]
        place = int(np.ravel_multi_index(index, self.shape[: len(index)])) if index else 0
        return self._read(self.offset + place * math.prod(shape) * self.dtype.itemsize, shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some of it along the first axis."""
        shape = (stop - start, *self.shape[1:])
        return self._read(self.offset + start * math.prod(shape[1:]) * self.dtype.itemsize, shape)

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(math.prod(shape), self.dtype)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(offset)
                count = _read_fully(file, array.view(np.uint8).data)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}.") from error
        if count != array.nbytes:
            raise UserError(f"{self.file} is truncated: {self.name} is not whole.")
        return array.reshape(shape)


def _read_fully(file: Any, into: memoryview) -> int:
    total = 0
    while total < len(into) and (count := file.readinto(into[total:])):
        total += count
    return total


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises UserError naming the file if it is damaged or truncated."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise UserError(f"{file} is truncated, or is no safetensors file: its header is not whole.")
            header = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        entries = json.loads(header)
        found = {name: _entry(file, name, entry, 8 + length) for name, entry in entries.items() if name[:2] != "__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its header is not one of a safetensors file.") from error
    end = 8 + length
    for stored in sorted(found.values(), key=lambda stored: stored.offset):
        if stored.offset != end:
            raise UserError(f"{file} is damaged: {stored.name} does not begin where the tensor before it ends.")
        end += math.prod(stored.shape) * BYTES[stored.type]
    if end > size:
        raise UserError(f"{file} is truncated: it has {size} bytes, and its header speaks of {end}.")
    if end < size:
        raise UserError(f"{file} is damaged: it has {size} bytes, and its header speaks of {end}.")
    return found


def _entry(file: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in BYTES or not all(isinstance(size, int) and size >= 0 for size in (*shape, begin)):
        raise ValueError
    if end - begin != math.prod(shape) * BYTES[entry["dtype"]]:
        raise UserError(f"{file} is damaged: {name} has not as many bytes as its shape says.")
    return StoredTensor(file, name, entry["dtype"], shape, data + begin)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model in a folder, from one file or from those that an index names.

    Raises UserError for a folder without them, a missing or damaged file, or a tensor that is in two files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a Hugging Face model.")
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_tensors(folder)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map.")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise UserError(f"{folder / INDEX} names {shard!r}, which is not a file beside it.")
        # Path.exists raises for a name that is too long.
        if not os.path.exists(folder / shard):
            raise UserError(f"{folder / INDEX} names {shard}, which is missing.")
        for name, stored in read_header(folder / shard).items():
            if name in found:
                raise UserError(f"{name} is both in {found[name].file} and in {stored.file}.")
            found[name] = stored
    for name, shard in places.items():
        if name not in found:
            raise UserError(f"{folder / shard} has no {name}, which {INDEX} places there.")
    return found


def _no_tensors(folder: Path) -> UserError:
    if any(folder.glob(f"{PICKLE}*.bin*")):
        return UserError(
            f"{folder} has its tensors only as pickles ({PICKLE}*.bin), which can run any code and are never read. "
            "Where you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        return UserError(f"{folder} has {', '.join(shards[:3])}, but neither {SINGLE} nor {INDEX} that lists them.")
    return UserError(f"{folder} has no {SINGLE}.")


# Writing.


class NewTensor(NamedTuple):
    """A tensor to be written: its type and shape, and a function that gives its numbers in parts, in order."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(file: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the header, then the tensors, of which no more than a few MB are ever in memory.

    Raises UserError if it cannot be written; what was written then stays, for the caller to remove.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for tensor in tensors:
        end = place + tensor.nbytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                written = 0
                for part in tensor.parts():
                    for chunk in _chunks(part):
                        stream.write(_bytes_of(chunk, tensor.dtype))
                        written += chunk.size
                assert written == math.prod(tensor.shape), f"{tensor.name}: {written} numbers for {tensor.shape}"
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}.") from error


def write_folder(folder: Path, tensors: Sequence[NewTensor], shard_bytes: int) -> None:
    """Write a model as model.safetensors, or, where it is larger than `shard_bytes`, as several files and their index.

    Raises UserError as `write_file` does.
    """
    shards = _shards(tensors, shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, metadata)
        places |= {tensor.name: name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in parts along its first axis, each of a few MB."""
    if array.nbytes <= CHUNK_BYTES or array.ndim < 2:
        yield array
        return
    rows = max(1, CHUNK_BYTES * array.shape[0] // array.nbytes)
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def _bytes_of(array: np.ndarray, dtype: np.dtype[Any]) -> memoryview:
    # Values beyond the range of a narrower dtype become infinite.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError naming the file if it is missing or no JSON object."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object.")
    return values
