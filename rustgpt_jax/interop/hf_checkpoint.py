"""From a Hugging Face folder to the parameters of a run."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.interop.architectures import ARCHITECTURES, Architecture, architecture_for, architecture_of
from rustgpt_jax.interop.config_mapping import read_json
from rustgpt_jax.interop.param_mapping import (
    ParamSlice,
    TensorPlan,
    TensorRules,
    TensorSlice,
    plan_tensors,
    shapes_by_path,
    slices_by_param,
)
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.workdir.params_io import (
    CHUNK_BYTES,
    NewTensor,
    StoredTensor,
    open_safetensors,
    write_parameters,
    write_safetensors,
)

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE = "pytorch_model"
HEAD = "lm_head.weight"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

Stored = dict[str, StoredTensor]


class HFModelInfo(NamedTuple):
    """What the config.json of a Hugging Face folder says.

    knobs: values of ModelConfig, all that a model's logits depend on. special_tokens: bos_token_id and the like, as
    they stand there.
    """

    knobs: dict[str, Any]
    architecture: Architecture
    special_tokens: dict[str, Any]


def read_model(source: Path, warn: Callable[[str], object] = lambda text: None) -> HFModelInfo:
    """Read the config.json of a Hugging Face folder, passing warnings about ignored settings to `warn`.

    Raises:
        UserError: A setting is missing, unknown or unsupported; the message names the file and the setting.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder with a Hugging Face model.")
    file = source / CONFIG
    if not file.exists():
        raise UserError(f"{source} is not a folder with a Hugging Face model: it has no {CONFIG}.")
    config = read_json(file)
    architecture = architecture_of(config, file)
    tokens = {key: config[key] for key in TOKEN_KEYS if key in config}
    return HFModelInfo(architecture.knobs(config, file, warn), architecture, tokens)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model in a folder, from one file or from those that an index names.

    Raises UserError for a folder without them, a missing or damaged file, or a tensor that is in two files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a Hugging Face model.")
    if (folder / SINGLE).exists():
        return open_safetensors(folder / SINGLE)
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
        for name, stored in open_safetensors(folder / shard).items():
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


def import_parameters(source: Path, file: Path, model: ModelConfig, architecture: Architecture) -> None:
    """Write the tensors of a Hugging Face folder as our own parameters, each in the type it has there.

    All names, shapes and types are checked before anything is written; a tensor at a time is in memory. Raises
    UserError naming a tensor that is missing, unknown or of another shape, or a damaged file.
    """
    stored = _with_table(read_folder(source), model, architecture)
    plan = matching_tensors(source, stored, model, architecture)
    shapes = shapes_by_path(model)
    filled = slices_by_param(plan.values())
    write_parameters(file, [_parameter(path, shapes[path], filled[path], stored) for path in shapes])


def matching_tensors(
    source: Path, stored: Stored, model: ModelConfig, architecture: Architecture
) -> dict[str, TensorPlan]:
    """The tensors of the model as they are named in this folder. Raises UserError unless they are exactly these."""
    forms = [plan_tensors(rules, model) for rules in _layouts(architecture)]
    wanted = max(forms, key=lambda form: len(form.keys() & stored.keys()))
    for name, tensor in wanted.items():
        if name not in stored:
            raise UserError(f"{source} has no tensor {name}, which {architecture.name} needs.")
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{stored[name].file}: {name} has the shape {stored[name].shape}; {CONFIG} asks for {tensor.shape}."
            )
        _ = stored[name].dtype
    head, table = stored.get(HEAD), _embedding_table(wanted, stored)
    for name in stored:
        if name in wanted or any(re.search(pattern, name) for pattern in architecture.ignored):
            continue
        if stored[name] is head and model.tie_embeddings:
            _check_tied(head, table)
            continue
        raise UserError(
            f"{stored[name].file} has a tensor {name}, which {architecture.name} with this {CONFIG} has not."
            f"{suggest_names(name, wanted)}"
        )
    return wanted


def _with_table(stored: Stored, model: ModelConfig, architecture: Architecture) -> Stored:
    """Return the tensors of a folder. If a tied model stores only its head, use it as the embedding table too."""
    names = {rules["embedding/table"].name for rules in _layouts(architecture)}
    if not model.tie_embeddings or HEAD not in stored or names & stored.keys():
        return stored
    return {architecture.rules["embedding/table"].name: stored[HEAD], **stored}


def _layouts(architecture: Architecture) -> Iterator[TensorRules]:
    """The rules of an architecture, then those of its other forms, each with and without the prefix."""
    for rules in (architecture.rules, *architecture.other_rules):
        yield rules
        yield {path: rule._replace(name=rule.name.removeprefix(architecture.prefix)) for path, rule in rules.items()}


def _embedding_table(wanted: Mapping[str, TensorPlan], stored: Stored) -> StoredTensor:
    name = next(name for name, tensor in wanted.items() if tensor.slots[0].path == "embedding/table")
    return stored[name]


def _check_tied(head: StoredTensor, table: StoredTensor) -> None:
    """A head that is stored although it is the embedding table must be just that."""
    is_same = head.shape == table.shape and head.dtype == table.dtype
    step = max(1, CHUNK_BYTES // (head.shape[-1] * head.dtype.itemsize))
    for start in range(0, head.shape[0], step) if is_same else ():
        stop = min(start + step, head.shape[0])
        one, other = head.read_rows(start, stop), table.read_rows(start, stop)
        is_same = is_same and one.tobytes() == other.tobytes()
    if not is_same:
        raise UserError(
            f"{head.file}: {CONFIG} says tie_word_embeddings, and lm_head.weight is another than the embeddings."
        )


def _parameter(path: str, shape: tuple[int, ...], parts: list[TensorSlice], stored: Stored) -> NewTensor:
    dtype = np.result_type(*{stored[piece.tensor.name].dtype for piece in parts})
    if dtype == np.float64:
        # Models are computed in float32 at most; the values are rounded when they are written.
        dtype = np.dtype(np.float32)
    return NewTensor(path, dtype, shape, lambda: (piece.take(stored[piece.tensor.name].read()) for piece in parts))


# From the parameters of a model to a Hugging Face folder.

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
    chosen = architecture_for(model) if architecture is None else _named_architecture(architecture, model)
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"There is no type {dtype!r} to export in.{suggest_names(dtype, TYPES)}")
    leaves = flatten_paths(params, is_leaf=lambda leaf: isinstance(leaf, StoredTensor))
    new = [_new_tensor(tensor, leaves, dtype) for tensor in plan_tensors(chosen.rules, model).values()]
    config = chosen.hf_config(model) | dict.fromkeys(TOKEN_KEYS) | dict(special_tokens or {})
    # transformers 4 and 5 both read this name.
    config["torch_dtype"] = dtype or TYPE_NAMES[np.dtype(leaves["embedding/table"].dtype)]
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_folder(temporary, new, shard_bytes)
        if finish is not None:
            finish(temporary)
    return chosen


def _named_architecture(name: str, model: ModelConfig) -> Architecture:
    if name not in ARCHITECTURES:
        raise UserError(f"The architecture {name!r} is not known.{suggest_names(name, ARCHITECTURES)}")
    for knob, (here, there) in ARCHITECTURES[name].roundtrip_differences(model).items():
        raise UserError(f"{name} cannot say config.model.{knob}={here!r}; it would be read as {there!r}.")
    return ARCHITECTURES[name]


def _new_tensor(tensor: TensorPlan, leaves: Mapping[str, Any], dtype: str | None) -> NewTensor:
    """A tensor of the folder, whose numbers are taken from the parameters when they are written."""

    def parts() -> Iterator[np.ndarray]:
        yield tensor.to_stored([_read_slice(slot, leaves) for slot in tensor.slots])

    own = np.result_type(*{np.dtype(leaves[slot.path].dtype) for slot in tensor.slots})
    return NewTensor(tensor.name, own if dtype is None else TYPES[dtype], tensor.shape, parts)


def _read_slice(slot: ParamSlice, leaves: Mapping[str, Any]) -> np.ndarray:
    """A part of a parameter, read from its file, or a view of it where it is in memory."""
    leaf = leaves[slot.path]
    return leaf[slot.place] if isinstance(leaf, StoredTensor) else np.asarray(leaf)[slot.place]


def write_folder(folder: Path, plan_tensors: Sequence[NewTensor], shard_bytes: int) -> None:
    """Write a model as model.safetensors, or, where it is larger than `shard_bytes`, as several files and their index.

    Raises UserError as `write_safetensors` does.
    """
    shards = _shards(plan_tensors, shard_bytes)
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
        "metadata": {"total_size": sum(tensor.nbytes for tensor in plan_tensors)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(plan_tensors: Sequence[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in plan_tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
