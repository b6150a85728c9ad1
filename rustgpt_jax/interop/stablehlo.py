"""Export of a run as StableHLO programs that generate without this package.

The folder holds programs serialized by `jax.export`, the weights as safetensors, the tokenizer, and a manifest that
describes them. There is a prefill program for each length to which `generate` pads prompts, and one for a decode step:

    prefill(weights, tokens_BT, lengths_B) -> logits_BV, cache
    decode(weights, cache, tokens_B, positions_B) -> logits_BV, cache

Weights and the cache are dicts of arrays by path, so that the programs refer to no classes of this package.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from rustgpt_jax.atomic_io import atomic_folder, translate_os_errors
from rustgpt_jax.config.schema import ModelConfig, for_inference
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.inference.generate import round_to_bucket
from rustgpt_jax.inference.text_generator import TextGenerator, WeightLayout, to_decode_params
from rustgpt_jax.interop.hf_checkpoint import save_hf_tokenizer, special_token_ids
from rustgpt_jax.model import transformer
from rustgpt_jax.model.kv_cache import cast_for_decode
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.tokenizers import Tokenizer
from rustgpt_jax.tracking.console import format_bytes
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.workdir.params_io import NewTensor, write_safetensors

SUFFIX = ".stablehlo"
MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights.safetensors", "tokenizer.json"
PROGRAM = "{name}.jax_export"
# Increased when a reader of older manifests would misunderstand a new one.
FORMAT_VERSION = 1
# By the names of `jax.export`.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")
# Arguments after the weights, and after the cache of `decode`.
PREFILL_INPUTS, DECODE_INPUTS = ("tokens", "lengths"), ("tokens", "positions")
# Dtypes that the matrices of linear layers can be converted to.
DTYPES = ("float32", "bfloat16", "int8")


class ExportOptions(NamedTuple):
    """What the exported programs support.

    Attributes:
        batch: Number of rows; None for any number.
        platforms: Platforms for which the programs can be compiled, some of PLATFORMS.
        cache_length: Tokens of a row that the cache has room for; None for the model's context length.
        prefill_lengths: Numbers of tokens for which there is a prefill program; None for those that `generate` uses.
    """

    batch: int | None = None
    platforms: tuple[str, ...] = DEFAULT_PLATFORMS
    cache_length: int | None = None
    prefill_lengths: tuple[int, ...] | None = None


def export_stablehlo(
    path: Path, folder: Path, which: str, dtype: str | None, log: Callable[[str], None], *, options: ExportOptions
) -> None:
    """Write a run to a folder of StableHLO programs, atomically.

    Args:
        path: The run.
        folder: The folder to create.
        which: The checkpoint: 'last', 'best' or a step.
        dtype: Dtype of the matrices of linear layers, one of DTYPES; None for the dtype in which they are multiplied.
        log: Called with a message at the end.
        options: What the programs support.

    Raises:
        UserError: The run has no parameters, an option is not supported, or the folder exists and is not empty.
    """
    _check_names(options.platforms, dtype)
    with atomic_folder(folder) as temporary:
        trained = load_model(path, which)
        manifest = write_stablehlo(trained.generator, temporary, options, dtype)
    n_programs, n_bytes = len(manifest["programs"]), sum(file.stat().st_size for file in folder.iterdir())
    rows = "any batch size" if options.batch is None else f"batch size {options.batch}"
    log(f"{folder}: {n_programs} programs for {', '.join(options.platforms)} and {rows}, {format_bytes(n_bytes)}")


def _check_names(platforms: tuple[str, ...], dtype: str | None) -> None:
    """Check the names of platforms and the dtype. Raises UserError if one is unknown."""
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"--platforms: unknown platform {name!r}.{suggest_names(name, PLATFORMS)}")
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype={dtype} is not for StableHLO programs, which take {', '.join(DTYPES)}.")


def write_stablehlo(
    generator: TextGenerator, folder: Path, options: ExportOptions, dtype: str | None = None
) -> dict[str, Any]:
    """Write a model to an existing folder, and return its manifest.

    Raises:
        UserError: An option is not supported, the model cannot be exported, or the folder cannot be written.
    """
    model, tokenizer = for_inference(generator.model), generator.tokenizer
    options = _fill_in(options, model)
    # Kernels must not be chosen for the device of the machine that exports the model.
    with jax.default_device(_find_cpu()):
        params = to_decode_params(jax.device_get(generator.params), model, _weight_layout(options, dtype))
        programs = _export_programs(params, model, options)
    weights = flatten_paths(params)
    manifest = _describe(programs, weights, model, options) | {"tokens": _describe_tokens(tokenizer)}
    tensors = [NewTensor(path, np.dtype(x.dtype), x.shape, partial(_read_values, x)) for path, x in weights.items()]
    write_safetensors(folder / WEIGHTS, tensors, {"format": "rustgpt_jax.stablehlo"})
    save_hf_tokenizer(tokenizer, folder, model.context_length, generator.is_dialogue)
    with translate_os_errors(folder):
        for name, exported in programs.items():
            (folder / PROGRAM.format(name=name)).write_bytes(exported.serialize())
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _find_cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        message = "StableHLO programs are exported on the CPU, which $JAX_PLATFORMS disables; add cpu to it."
        raise UserError(message) from None


def _fill_in(options: ExportOptions, model: ModelConfig) -> ExportOptions:
    """Return the options with default values for this model. Raises UserError if one is not supported."""
    context_length = model.context_length
    cache_length = options.cache_length or context_length
    if cache_length > context_length:
        raise UserError(f"--cache_length={cache_length}: the model's context has only {context_length} tokens.")
    lengths = options.prefill_lengths or _default_prefill_lengths(cache_length)
    if max(lengths) > cache_length:
        raise UserError(f"--prefill_lengths={max(lengths)}: the cache has room for only {cache_length} tokens.")
    return options._replace(cache_length=cache_length, prefill_lengths=tuple(sorted(set(lengths))))


def _default_prefill_lengths(cache_length: int) -> tuple[int, ...]:
    """Return the lengths to which `generate` pads prompts."""
    lengths = [round_to_bucket(1, cache_length)]
    while lengths[-1] < cache_length:
        lengths.append(round_to_bucket(lengths[-1] + 1, cache_length))
    return tuple(lengths)


def _is_for_cpu(options: ExportOptions) -> bool:
    """Return whether the programs run on CPUs only, for which other dtypes are faster."""
    return options.platforms == ("cpu",)


def _weight_layout(options: ExportOptions, dtype: str | None) -> WeightLayout:
    # The layout for accelerators runs everywhere.
    return WeightLayout(dtype, "plain", "cpu" if _is_for_cpu(options) else "gpu")


# The programs.


class _Structure(NamedTuple):
    """A tree structure with the paths of its leaves, for conversion from a dict of arrays by path."""

    paths: tuple[str, ...]
    treedef: Any

    @classmethod
    def of(cls, tree: Any) -> "_Structure":
        return cls(tuple(flatten_paths(tree)), jax.tree.structure(tree))

    def unflatten(self, arrays: dict[str, jax.Array]) -> Any:
        return jax.tree.unflatten(self.treedef, [arrays[path] for path in self.paths])


class _Structures(NamedTuple):
    """The structures of the parameters and of the cache."""

    weights: _Structure
    cache: _Structure


# An argument that a model does not read remains an argument, as the manifest says.
@partial(jax.jit, static_argnames=("model", "options", "structures"), keep_unused=True)
def prefill(
    weights: dict[str, jax.Array],
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    model: ModelConfig,
    options: ExportOptions,
    structures: _Structures,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Process prompts as `generate` does.

    Args:
        weights: Parameters for decoding by path.
        tokens_BT: Prompts, padded on the right with any tokens.
        lengths_B: Number of tokens of each prompt.
        model: Config of the model.
        options: With the length of the cache.
        structures: Of the parameters and the cache.

    Returns:
        logits_BV of the next token, NaN if the length is not from 1 to T; and the cache by path.
    """
    params, (batch, length) = structures.weights.unflatten(weights), tokens_BT.shape
    is_token_BT = jnp.arange(length)[None, :] < lengths_B[:, None]
    empty, segments_BT = _init_cache(model, batch, options), is_token_BT.astype(jnp.int32)
    hidden_BTD, cache, _ = transformer.hidden_states(params, tokens_BT, model, empty, segments_BT=segments_BT)
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    is_valid_B = (lengths_B >= 1) & (lengths_B <= length)
    logits_BV = transformer.logits(params, last_B1D, model)[:, 0]
    return jnp.where(is_valid_B[:, None], logits_BV, jnp.nan), flatten_paths(cache)


@partial(jax.jit, static_argnames=("model", "options", "structures"), keep_unused=True)
def decode(
    weights: dict[str, jax.Array],
    cache: dict[str, jax.Array],
    tokens_B: jax.Array,
    positions_B: jax.Array,
    *,
    model: ModelConfig,
    options: ExportOptions,
    structures: _Structures,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Process the next token of each row.

    Args:
        weights: Parameters for decoding by path.
        cache: Cache of the earlier tokens by path.
        tokens_B: The token of each row.
        positions_B: Number of earlier tokens of each row.
        model: Config of the model.
        options: With the length of the cache.
        structures: Of the parameters and the cache.

    Returns:
        logits_BV of the next token, NaN if the position is not in the cache, after which the cache of the row is
        not valid; and the new cache by path.
    """
    assert options.cache_length is not None
    params, earlier = structures.weights.unflatten(weights), structures.cache.unflatten(cache)
    is_valid_B = (positions_B >= 0) & (positions_B < options.cache_length)
    logits_B1V, new_cache = transformer.apply(
        params,
        tokens_B[:, None],
        model,
        earlier,
        positions_BT=positions_B[:, None],
    )
    return jnp.where(is_valid_B[:, None], logits_B1V[:, 0], jnp.nan), flatten_paths(new_cache)


def _init_cache(model: ModelConfig, batch: Any, options: ExportOptions) -> transformer.Cache:
    assert options.cache_length is not None
    cache = transformer.init_cache(model, batch, options.cache_length, unstacked=True)
    return cast_for_decode(cache) if _is_for_cpu(options) else cache


def _export_programs(
    params: transformer.Params, model: ModelConfig, options: ExportOptions
) -> dict[str, export.Exported]:
    """Return the programs by name. Raises UserError if JAX cannot export the model."""
    assert options.prefill_lengths is not None
    (batch,) = export.symbolic_shape("batch") if options.batch is None else (options.batch,)

    def integers(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.int32)

    try:
        cache = jax.eval_shape(lambda rows_B: _init_cache(model, rows_B.shape[0], options), integers())
        structures = _Structures(_Structure.of(params), _Structure.of(cache))
        static: Any = {"model": model, "options": options, "structures": structures}
        weights = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flatten_paths(params).items()}
        arguments = (weights, flatten_paths(cache), integers(), integers())
        programs = {"decode": export.export(decode, platforms=options.platforms)(*arguments, **static)}
        for length in options.prefill_lengths:
            exported = export.export(prefill, platforms=options.platforms)
            programs[f"prefill_{length}"] = exported(weights, integers(length), integers(), **static)
    except UserError:
        raise
    # JAX raises errors of many types for what it cannot export, and so may a component that is not ours.
    except Exception as error:
        remedies = ["--batch=1, for one batch size"] if options.batch is None else []
        remedies += ["--platforms=cpu"] if len(options.platforms) > 1 else []
        message = str(error).partition("\n")[0]
        hint = f" Try {' or '.join(remedies)}." if remedies else ""
        raise UserError(f"JAX cannot export this model: {type(error).__name__}: {message}{hint}") from error
    return programs


# The manifest and the weights.


def _describe(
    programs: dict[str, export.Exported], weights: dict[str, Any], model: ModelConfig, options: ExportOptions
) -> dict[str, Any]:
    """Return the manifest without the token ids."""
    assert options.prefill_lengths is not None
    decode = programs["decode"]
    logits_BV, cache = jax.tree.unflatten(decode.out_tree, decode.out_avals)
    arrays = [_describe_array(f"weights/{path}", weights[path]) for path in sorted(weights)]
    caches = [_describe_array(f"cache/{path}", cache[path]) for path in sorted(cache)]
    results = [_describe_array("logits", logits_BV), *caches]

    def describe_inputs(exported: export.Exported, *names: str) -> list[dict[str, Any]]:
        avals = exported.in_avals[-len(names) :]
        return [_describe_array(name, aval) for name, aval in zip(names, avals, strict=True)]

    entries: dict[str, Any] = {"decode": {"arguments": [*arrays, *caches, *describe_inputs(decode, *DECODE_INPUTS)]}}
    for length in options.prefill_lengths:
        name = f"prefill_{length}"
        entries[name] = {"arguments": [*arrays, *describe_inputs(programs[name], *PREFILL_INPUTS)]}
    return {
        "format": "rustgpt_jax.stablehlo",
        "format_version": FORMAT_VERSION,
        "jax_version": jax.__version__,
        "calling_convention_version": decode.calling_convention_version,
        "platforms": list(options.platforms),
        "batch": options.batch,
        "cache_length": options.cache_length,
        "prefill_lengths": list(options.prefill_lengths),
        "vocab_size": transformer.vocab_size(model),
        "weights": WEIGHTS,
        "tokenizer": TOKENIZER,
        "programs": {
            name: {"file": PROGRAM.format(name=name), **entry, "results": results} for name, entry in entries.items()
        },
    }


def _describe_array(name: str, array: Any) -> dict[str, Any]:
    return {"name": name, "shape": [_format_axis(size) for size in array.shape], "dtype": str(array.dtype)}


def _format_axis(size: Any) -> int | str:
    """Return the size of an axis, or the name of one of any size."""
    return str(size) if export.is_symbolic_dim(size) else size


def _describe_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids of special tokens; None for tokens that the tokenizer does not have."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | special_token_ids(tokenizer)
    return ids | {"stop_token_ids": tokenizer.stop_ids, "prefix_token_ids": tokenizer.prefix_and_suffix_ids[0]}


def _read_values(array: jax.Array) -> Iterator[np.ndarray]:
    yield np.asarray(array)
