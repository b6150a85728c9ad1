"""A run that begins with parameters of another: what fits is taken, the seed gives the rest, and all of it is said."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.schema import FIELDS, Config, ModelConfig, diff, partition, stages
from rustgpt_jax.data.preprocess import fill_vocab_size, load_or_train_tokenizer, resolve_epochs_of_text
from rustgpt_jax.data.token_store import hash_tokenizer
from rustgpt_jax.errors import UserError
from rustgpt_jax.fingerprints import fingerprint_tree
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.tokenizers import IMPORTED, save_tokenizer
from rustgpt_jax.tracking.console import format_count
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_inputs import read_import_record
from rustgpt_jax.training.train_step import compiled_init_state
from rustgpt_jax.workdir.config_files import COMMAND_LINE
from rustgpt_jax.workdir.params_io import NewTensor, write_parameters
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config

# Their rows, or columns, stand for tokens.
TOKEN_PARAMS = ("embedding/", "head/")
MAX_NAMES = 6
TOKENIZER_KNOBS = tuple(knob for knob in FIELDS if knob.startswith("tokenizer."))

Log = Callable[[str], object]


class WarmStartReport(NamedTuple):
    """Names of parameters that were loaded, initialized from the seed, or left unused, with reasons.

    `partly` has the loaded layers of stacked parameters that were loaded only in part.
    """

    taken: list[str]
    partly: dict[str, list[int]]
    from_seed: dict[str, str]
    left: dict[str, str]


class WarmStart(NamedTuple):
    """The config of a run initialized from another run, and the origin of each of its values."""

    config: Config
    origins: dict[str, str]


def create_warm_started_run(source: str, path: Path, config: Config, origins: Mapping[str, str], log: Log) -> WarmStart:
    """Create a run folder at step 0 with all matching parameters of another run.

    The tokenizer is taken from the source too, unless the command line sets a knob of `config.tokenizer`; then a new
    one is trained on the text of the run. A folder that was already created from the same source is left unchanged.

    Args:
        source: The run to load parameters from: RUN, RUN@STEP or RUN@best.
        path: The folder of the new run.
        config: The config of the new run. If the source's tokenizer is used, its tokenizer knobs are replaced.
        origins: The origin of each value of the config.
        log: Called with messages about what was loaded.

    Raises:
        UserError: The folder was created from something else, the run or step does not exist, or no parameter matches.
    """
    run, is_asked = RunDir(path), any(origins.get(knob) == COMMAND_LINE for knob in TOKENIZER_KNOBS)
    if run.config_file.exists():
        began = read_import_record(run).get("source")
        if began is None or _resolve_source(began) != _resolve_source(source):
            how = f"with the parameters of {began}" if began else "otherwise"
            raise UserError(f"{path} began {how}, not with those of {source}; choose another --run folder.")
        return (
            WarmStart(config, dict(origins))
            if is_asked
            else _with_tokenizer_of(load_config(path), config, origins, began)
        )
    place, which = parse_source(source)
    there = load_model(place, which)
    begun = WarmStart(config, dict(origins))
    if not is_asked:
        begun = _with_tokenizer_of(load_config(place), config, origins, source)
    keeps = not is_asked or begun.config.tokenizer.name == IMPORTED
    own = there.generator.tokenizer if keeps else load_or_train_tokenizer(begun.config)
    resolved = resolve_epochs_of_text(begun.config, own, cache_folder())
    begun = WarmStart(resolved.config, {**begun.origins, **resolved.origins})
    whole = fill_vocab_size(begun.config, own)
    static, hparams = partition(stages(whole)[0].config)
    fresh = flatten_paths(compiled_init_state(static, hparams).params)
    given = flatten_paths(there.generator.params)
    is_same_tokenizer = own.serialized == there.generator.tokenizer.serialized
    source_layers, layers = _layers_of(given, there.config.model), _layers_of(fresh, whole.model)
    chosen = _choose(source_layers, layers, is_same_tokenizer)
    if not chosen.taken and not chosen.partly:
        raise UserError(f"No parameter of {source} fits the model of this config: {_format_reasons(chosen.from_seed)}.")
    params = {name: _initial_array(name, leaf, layers, source_layers, chosen) for name, leaf in fresh.items()}
    with atomic_folder(path) as temporary:
        new = create_run_dir(temporary, begun.config, begun.origins)
        save_tokenizer(own, new.tokenizer_file)
        write_parameters(new.parameters_file, [_tensor(name, leaf) for name, leaf in params.items()])
        about = {"source": source, "step": there.step, "tokenizer": hash_tokenizer(own), **chosen._asdict()}
        about["fingerprints"] = fingerprint_tree({name: params[name] for name in (*chosen.taken, *chosen.partly)})
        new.import_file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for sentence in resolved.messages:
        log(sentence)
    for sentence in _describe(chosen, f"{place} at step {there.step}", params, is_same_tokenizer):
        log(sentence)
    return begun


def _with_tokenizer_of(there: Config, config: Config, origins: Mapping[str, str], source: str) -> WarmStart:
    """Return a config with another config's tokenizer knobs, and its vocabulary size unless the config sets one."""
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=there.model.vocab_size)
    result = dataclasses.replace(config, tokenizer=there.tokenizer, model=model)
    return WarmStart(result, dict(origins) | dict.fromkeys(diff(config, result), f"init_from {source}"))


def _describe(
    chosen: WarmStartReport, source: str, params: Mapping[str, Any], is_same_tokenizer: bool
) -> Iterator[str]:
    n_taken = sum(params[name].size for name in chosen.taken)
    n_taken += sum(params[name][0].size * len(layers) for name, layers in chosen.partly.items())
    n_all, n_arrays = sum(leaf.size for leaf in params.values()), len(chosen.taken) + len(chosen.partly)
    yield (
        f"{source}: took {n_arrays} of {len(params)} arrays of parameters "
        f"({format_count(n_taken)} of {format_count(n_all)})"
        f"{', and the tokenizer' if is_same_tokenizer else ''}"
    )
    if not is_same_tokenizer:
        yield (
            "The tokenizer is another, as config.tokenizer asks: the embedding, which has a row for each token, begins "
            "untrained. Without these knobs the run keeps the tokenizer of its source."
        )
    if chosen.from_seed:
        yield f"  from the seed: {_format_reasons(chosen.from_seed)}"
    left = f"{_format_reasons(chosen.left)}; " if chosen.left else ""
    yield f"  left there: {left}the optimizer's state; the step"


def parse_source(source: str) -> tuple[Path, str]:
    """The folder and the checkpoint that RUN, RUN@STEP or RUN@best names. A folder may have an @ in its own name."""
    place, at, which = source.rpartition("@")
    return (Path(place), which) if at and not Path(source).exists() else (Path(source), "last")


def _resolve_source(source: str) -> tuple[Path, str]:
    """What a source names, however it is written."""
    place, which = parse_source(source)
    return place.resolve(), which


class Layer(NamedTuple):
    """A parameter of one layer or of the whole model: its array, and its index `place` in the stack `name`."""

    name: str
    place: int | None
    array: Any


# Keyed by the parameter name without its stack, and the layer, or None for a parameter of the whole model.
Layers = dict[tuple[str, int | None], Layer]


def _layers_of(arrays: Mapping[str, Any], model: ModelConfig) -> Layers:
    """Unstack the parameters of a model by layer, since the stacking depends on the number of layers."""
    result: Layers = {}
    for name, leaf in arrays.items():
        if name.startswith("blocks/"):
            _, stack, key = name.split("/", 2)
            for place, layer in enumerate(layer_groups(model)[int(stack)].layers):
                result[key, layer] = Layer(name, place, leaf[place])
        else:
            result[name, None] = Layer(name, None, leaf)
    return result


def _choose(given: Layers, wanted: Layers, is_same_tokenizer: bool) -> WarmStartReport:
    hindrances = {key: _mismatch(layer, given.get(key), is_same_tokenizer) for key, layer in wanted.items()}
    result = WarmStartReport([], {}, {}, {})
    for name, keys in _by_stack(wanted).items():
        fitting, reasons = [key for key in keys if not hindrances[key]], [hindrances[key] for key in keys]
        if len(fitting) == len(keys):
            result.taken.append(name)
            continue
        if fitting:
            result.partly[name] = [layer for _, layer in fitting if layer is not None]
        result.from_seed[name] = _of_layers(next(filter(None, reasons)), keys, [key for key in keys if hindrances[key]])
    for name, keys in _by_stack(given).items():
        unused = [key for key in keys if hindrances.get(key, "absent")]
        if unused:
            result.left[name] = _of_layers(hindrances.get(unused[0], "not in this model"), keys, unused)
    return result


def _mismatch(wanted: Layer, given: Layer | None, is_same_tokenizer: bool) -> str:
    """Return the reason why a parameter cannot be loaded, or ''."""
    if given is None:
        return "not there"
    if given.array.shape != wanted.array.shape:
        shapes = (" x ".join(map(str, layer.array.shape)) or "a number" for layer in (given, wanted))
        return "{} there and {} here".format(*shapes)
    if wanted.name.startswith(TOKEN_PARAMS) and not is_same_tokenizer:
        return "its tokens are of another tokenizer"
    return ""


def _by_stack(layers: Layers) -> dict[str, list[tuple[str, int | None]]]:
    result: dict[str, list[tuple[str, int | None]]] = {}
    for key, layer in layers.items():
        result.setdefault(layer.name, []).append(key)
    return result


def _of_layers(reason: str, keys: Sequence[tuple[str, int | None]], some: Sequence[tuple[str, int | None]]) -> str:
    """Qualify a reason that applies to only some layers of a parameter."""
    if len(some) == len(keys):
        return reason
    return f"layer{'s' if len(some) > 1 else ''} {', '.join(str(layer) for _, layer in some)}: {reason}"


def _initial_array(name: str, fresh: Any, wanted: Layers, given: Layers, chosen: WarmStartReport) -> Any:
    """Return the initial array of the new model with the loaded layers replaced."""
    if name not in chosen.taken and name not in chosen.partly:
        return fresh
    array = np.array(fresh)
    for key, layer in wanted.items():
        if layer.name == name and (layer.place is None or key[1] in chosen.partly.get(name, [key[1]])):
            array[... if layer.place is None else layer.place] = given[key].array
    return array


def _format_reasons(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in reasons.items()]
    return ", ".join(shown[:MAX_NAMES]) + (f" and {len(shown) - MAX_NAMES} more" if len(shown) > MAX_NAMES else "")


def _tensor(name: str, leaf: Any) -> NewTensor:
    return NewTensor(name, np.dtype(leaf.dtype), tuple(leaf.shape), lambda: [np.asarray(leaf)])
