"""From the parameters of a model to a Hugging Face folder."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError, suggestion
from rustgpt_jax.interop.architectures import ARCHITECTURES, Architecture, architecture_for
from rustgpt_jax.interop.import_hf import CONFIG, INDEX, SINGLE, TOKEN_KEYS
from rustgpt_jax.interop.param_mapping import Slot, Tensor, tensors
from rustgpt_jax.pytrees import by_path
from rustgpt_jax.workdir.params_io import NewTensor, StoredTensor, write_safetensors

TYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
SHARD_BYTES = 5_000_000_000

Tree = Any


def export_model(
    params: Tree,
    model: ModelConfig,
    folder: Path,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    special_tokens: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> Architecture:
    """Write a model as a folder that `transformers` loads, a tensor at a time, and say as which architecture.

    Args:
        params: the tree of parameters: arrays, or the tensors of `open_parameters`, which are read as they are needed.
        model: what the parameters belong to.
        folder: must not exist yet, or be empty; it appears when it is complete, and not at all if anything fails.
        architecture: a name in ARCHITECTURES; None for the first that can say the model.
        dtype: float32, bfloat16 or float16; None for the type that each parameter has.
        special_tokens: bos_token_id, eos_token_id, pad_token_id; null where they are not given.
        shard_bytes: the most bytes of tensors in one file.
        finish: writes what else belongs in the folder, before it appears.

    Raises UserError for a model that no architecture can say, or a folder that cannot be written.
    """
    chosen = architecture_for(model) if architecture is None else _named(architecture, model)
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"There is no type {dtype!r} to export in.{suggestion(dtype, TYPES)}")
    leaves = by_path(params, is_leaf=lambda leaf: isinstance(leaf, StoredTensor))
    new = [_tensor(tensor, leaves, dtype) for tensor in tensors(chosen.rules, model).values()]
    config = chosen.hf_config(model) | dict.fromkeys(TOKEN_KEYS) | dict(special_tokens or {})
    # transformers 4 and 5 both read this name.
    config["torch_dtype"] = dtype or TYPE_NAMES[np.dtype(leaves["embedding/table"].dtype)]
    with atomic_folder(folder) as hidden:
        (hidden / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_folder(hidden, new, shard_bytes)
        if finish is not None:
            finish(hidden)
    return chosen


def _named(name: str, model: ModelConfig) -> Architecture:
    if name not in ARCHITECTURES:
        raise UserError(f"The architecture {name!r} is not known.{suggestion(name, ARCHITECTURES)}")
    for knob, (here, there) in ARCHITECTURES[name].differences(model).items():
        raise UserError(f"{name} cannot say config.model.{knob}={here!r}; it would be read as {there!r}.")
    return ARCHITECTURES[name]


def _tensor(tensor: Tensor, leaves: Mapping[str, Any], dtype: str | None) -> NewTensor:
    """A tensor of the folder, whose numbers are taken from the parameters when they are written."""

    def parts() -> Iterator[np.ndarray]:
        yield tensor.joined([_slot(slot, leaves) for slot in tensor.slots])

    own = np.result_type(*{np.dtype(leaves[slot.path].dtype) for slot in tensor.slots})
    return NewTensor(tensor.name, own if dtype is None else TYPES[dtype], tensor.shape, parts)


def _slot(slot: Slot, leaves: Mapping[str, Any]) -> np.ndarray:
    """A part of a parameter, read from its file, or a view of it where it is in memory."""
    leaf = leaves[slot.path]
    return leaf[slot.place] if isinstance(leaf, StoredTensor) else np.asarray(leaf)[slot.place]


def write_folder(folder: Path, tensors: Sequence[NewTensor], shard_bytes: int) -> None:
    """Write a model as model.safetensors, or, where it is larger than `shard_bytes`, as several files and their index.

    Raises UserError as `write_safetensors` does.
    """
    shards = _shards(tensors, shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, metadata)
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
