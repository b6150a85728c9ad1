"""Warm starts: runs that begin with the matching parameters of another run and initialize the others."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.config.config_files import COMMAND_LINE
from rustgpt_jax.config.schema import FIELDS, Config, ModelConfig, diff, for_inference, partition, stages
from rustgpt_jax.data.preprocess import fill_vocab_size, load_or_train_tokenizer, resolve_epochs_of_text
from rustgpt_jax.data.token_store import hash_tokenizer
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.pytrees import fingerprint_tree, flatten_paths
from rustgpt_jax.tokenizers import IMPORTED, save_tokenizer
from rustgpt_jax.tracking.console import format_count
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_inputs import read_import_record
from rustgpt_jax.training.train_step import compiled_init_state
from rustgpt_jax.workdir.params_io import NewTensor, write_parameters
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config

# Parameters with one row or column per token.
TOKEN_PARAMS = ("embedding/", "head/")
MAX_NAMES = 6
TOKENIZER_KNOBS = tuple(knob for knob in FIELDS if knob.startswith("tokenizer."))

Log = Callable[[str], object]


class WarmStartReport(NamedTuple):
    """The parameters of a warm start by source, with the reasons why some are not loaded.

    Attributes:
        loaded: Parameters that are loaded from the source.
        partially_loaded: The loaded layers of stacked parameters of which only some layers match.
        initialized: Parameters, or a subset of their layers, that are initialized from the seed.
        unused: Parameters of the source, or a subset of their layers, that are not loaded.
    """

    loaded: list[str]
    partially_loaded: dict[str, list[int]]
    initialized: dict[str, str]
    unused: dict[str, str]


class WarmStart(NamedTuple):
    """The config of a run initialized from another run, and where each value comes from."""

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
    run, is_given = RunDir(path), any(origins.get(knob) == COMMAND_LINE for knob in TOKENIZER_KNOBS)
    warm_start = WarmStart(config, dict(origins))
    if run.config_file.exists():
        recorded = read_import_record(run).get("source")
        if recorded is None or _resolve_source(recorded) != _resolve_source(source):
            how = f"with the parameters of {recorded}" if recorded else "without a warm start"
            raise UserError(
                f"{path} was created {how}, not with the parameters of {source}; choose another --run folder."
            )
        return warm_start if is_given else _with_tokenizer_of(load_config(path), config, origins, recorded)
    folder, which = parse_source(source)
    loaded = load_model(folder, which)
    if not is_given:
        warm_start = _with_tokenizer_of(load_config(folder), config, origins, source)
    keeps_tokenizer = not is_given or warm_start.config.tokenizer.name == IMPORTED
    tokenizer = loaded.generator.tokenizer if keeps_tokenizer else load_or_train_tokenizer(warm_start.config)
    resolved = resolve_epochs_of_text(warm_start.config, tokenizer, cache_folder())
    warm_start = WarmStart(resolved.config, {**warm_start.origins, **resolved.origins})
    full_config = fill_vocab_size(warm_start.config, tokenizer)
    static, hparams = partition(stages(full_config)[0].config)
    fresh = flatten_paths(compiled_init_state(static, hparams).params)
    is_same_tokenizer = tokenizer.serialized == loaded.generator.tokenizer.serialized
    source_layers = _unstack(flatten_paths(loaded.generator.params), loaded.config.model)
    layers = _unstack(fresh, full_config.model)
    report = _match_layers(source_layers, layers, is_same_tokenizer)
    if not report.loaded and not report.partially_loaded:
        reasons = _format_reasons(report.initialized)
        raise UserError(f"No parameter of {source} matches the model of this config: {reasons}.")
    params = {name: _initial_array(name, leaf, layers, source_layers, report) for name, leaf in fresh.items()}
    with atomic_folder(path) as temporary:
        new = create_run_dir(temporary, warm_start.config, warm_start.origins)
        save_tokenizer(tokenizer, new.tokenizer_file)
        write_parameters(new.parameters_file, [_new_tensor(name, leaf) for name, leaf in params.items()])
        record = {"source": source, "step": loaded.step, "tokenizer": hash_tokenizer(tokenizer), **report._asdict()}
        names = (*report.loaded, *report.partially_loaded)
        record["fingerprints"] = fingerprint_tree({name: params[name] for name in names})
        if is_same_tokenizer and for_inference(full_config.model) == for_inference(loaded.config.model):
            # An export then writes the same architecture and special tokens as the imported folder has.
            source_record = read_import_record(RunDir(folder))
            record |= {key: source_record[key] for key in ("architecture", "special_tokens") if key in source_record}
        new.import_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for message in (
        *resolved.messages,
        *_describe(report, f"{folder} at step {loaded.step}", params, is_same_tokenizer),
    ):
        log(message)
    return warm_start


def _with_tokenizer_of(source_config: Config, config: Config, origins: Mapping[str, str], source: str) -> WarmStart:
    """Return a config with another config's tokenizer knobs, and its vocabulary size unless the config sets one."""
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=source_config.model.vocab_size)
    result = dataclasses.replace(config, tokenizer=source_config.tokenizer, model=model)
    return WarmStart(result, dict(origins) | dict.fromkeys(diff(config, result), f"init_from {source}"))


def _describe(
    report: WarmStartReport, source: str, params: Mapping[str, Any], is_same_tokenizer: bool
) -> Iterator[str]:
    n_loaded = sum(params[name].size for name in report.loaded)
    n_loaded += sum(params[name][0].size * len(layers) for name, layers in report.partially_loaded.items())
    n_all, n_arrays = sum(leaf.size for leaf in params.values()), len(report.loaded) + len(report.partially_loaded)
    yield (
        f"{source}: loaded {n_arrays} of {len(params)} parameter arrays ({format_count(n_loaded)} of "
        f"{format_count(n_all)} parameters){', and the tokenizer' if is_same_tokenizer else ''}"
    )
    if not is_same_tokenizer:
        yield (
            "The tokenizer differs, as set by config.tokenizer, so the embedding, which has a row for each token, is "
            "initialized from the seed. Without these settings, the run keeps the tokenizer of its source."
        )
    if report.initialized:
        yield f"  initialized from the seed: {_format_reasons(report.initialized)}"
    unused = f"{_format_reasons(report.unused)}; " if report.unused else ""
    yield f"  not loaded: {unused}the optimizer state; the step"


def parse_source(source: str) -> tuple[Path, str]:
    """Parse RUN, RUN@STEP or RUN@best into a folder and a checkpoint. The name of a folder may contain an @."""
    folder, at, which = source.rpartition("@")
    return (Path(folder), which) if at and not Path(source).exists() else (Path(source), "last")


def _resolve_source(source: str) -> tuple[Path, str]:
    """Return the absolute path and the checkpoint of a source."""
    folder, which = parse_source(source)
    return folder.resolve(), which


class Layer(NamedTuple):
    """A parameter of one layer or the whole model: its array, and its position in the stack `name`."""

    name: str
    position: int | None
    array: Any


# Keyed by the parameter name without its stack, and the layer, or None for a parameter of the whole model.
Layers = dict[tuple[str, int | None], Layer]


def _unstack(arrays: Mapping[str, Any], model: ModelConfig) -> Layers:
    """Unstack the parameters of a model by layer, since the stacking depends on the number of layers."""
    result: Layers = {}
    for name, leaf in arrays.items():
        if name.startswith("blocks/"):
            _, stack, key = name.split("/", 2)
            for position, layer in enumerate(layer_groups(model)[int(stack)].layers):
                result[key, layer] = Layer(name, position, leaf[position])
        else:
            result[name, None] = Layer(name, None, leaf)
    return result


def _match_layers(given: Layers, wanted: Layers, is_same_tokenizer: bool) -> WarmStartReport:
    mismatches = {key: _mismatch(layer, given.get(key), is_same_tokenizer) for key, layer in wanted.items()}
    result = WarmStartReport([], {}, {}, {})
    for name, keys in _group_by_stack(wanted).items():
        fitting, reasons = [key for key in keys if not mismatches[key]], [mismatches[key] for key in keys]
        if len(fitting) == len(keys):
            result.loaded.append(name)
            continue
        if fitting:
            result.partially_loaded[name] = [layer for _, layer in fitting if layer is not None]
        result.initialized[name] = _qualify_reason(
            next(filter(None, reasons)), keys, [key for key in keys if mismatches[key]]
        )
    for name, keys in _group_by_stack(given).items():
        unused = [key for key in keys if mismatches.get(key, "absent")]
        if unused:
            result.unused[name] = _qualify_reason(mismatches.get(unused[0], "not in this model"), keys, unused)
    return result


def _mismatch(wanted: Layer, given: Layer | None, is_same_tokenizer: bool) -> str:
    """Return the reason why a parameter cannot be loaded, or ''."""
    if given is None:
        return "not in the source"
    if given.array.shape != wanted.array.shape:
        shapes = (" x ".join(map(str, layer.array.shape)) or "a number" for layer in (given, wanted))
        return "{} in the source and {} here".format(*shapes)
    if wanted.name.startswith(TOKEN_PARAMS) and not is_same_tokenizer:
        return "its tokens belong to another tokenizer"
    return ""


def _group_by_stack(layers: Layers) -> dict[str, list[tuple[str, int | None]]]:
    result: dict[str, list[tuple[str, int | None]]] = {}
    for key, layer in layers.items():
        result.setdefault(layer.name, []).append(key)
    return result


def _qualify_reason(reason: str, keys: Sequence[tuple[str, int | None]], some: Sequence[tuple[str, int | None]]) -> str:
    """Qualify a reason that applies to only some layers of a parameter."""
    if len(some) == len(keys):
        return reason
    return f"layer{'s' if len(some) > 1 else ''} {', '.join(str(layer) for _, layer in some)}: {reason}"


def _initial_array(name: str, fresh: Any, wanted: Layers, given: Layers, report: WarmStartReport) -> Any:
    """Return a freshly initialized array with its matching layers replaced by those of the source."""
    if name not in report.loaded and name not in report.partially_loaded:
        return fresh
    array = np.array(fresh)
    for key, layer in wanted.items():
        if layer.name == name and (layer.position is None or key[1] in report.partially_loaded.get(name, [key[1]])):
            array[... if layer.position is None else layer.position] = given[key].array
    return array


def _format_reasons(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in reasons.items()]
    return ", ".join(shown[:MAX_NAMES]) + (f" and {len(shown) - MAX_NAMES} more" if len(shown) > MAX_NAMES else "")


def _new_tensor(name: str, leaf: Any) -> NewTensor:
    return NewTensor(name, np.dtype(leaf.dtype), tuple(leaf.shape), lambda: [np.asarray(leaf)])
