"""Converts Hugging Face folders into runs, and runs into Hugging Face folders."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.config.schema import EPOCHS, ModelConfig, uses_epochs
from rustgpt_jax.config.validation import override, resolve
from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.data.token_store import hash_tokenizer
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.config_mapping import read_json
from rustgpt_jax.interop.hf_checkpoint import (
    export_model,
    import_parameters,
    load_hf_tokenizer,
    read_model,
    save_hf_tokenizer,
    special_token_ids,
)
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size
from rustgpt_jax.model.transformer import Params
from rustgpt_jax.pytrees import unflatten_paths
from rustgpt_jax.sharding.hardware_specs import free_memory
from rustgpt_jax.tokenizers import IMPORTED, Tokenizer, load_tokenizer, save_tokenizer
from rustgpt_jax.tracking.console import format_count
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_inputs import load_run_tokenizer
from rustgpt_jax.workdir.params_io import matching_parameters, read_parameters
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config

# The same tokens through `transformers` and through the model here: how far are the logits apart?

TOKENS = 64


class Comparison(NamedTuple):
    """The largest difference between two logits, or, where there was nothing to compare with, the reason why.

    largest: the largest absolute value of a logit of the other side.
    """

    difference: float | None
    reason: str
    largest: float = 0.0


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """tokens_BT to compare with: one row, of 64 tokens or as many as the context holds."""
    length = min(TOKENS, model.context_length)
    rng = np.random.default_rng(seed)
    return rng.integers(0, transformer.vocab_size(model), (1, length), dtype=np.int32)


def reference_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray | str:
    """logits_BTV of a Hugging Face folder by `transformers`, in float32 on the CPU; or why there are none.

    Nothing is downloaded, and neither pickles nor code of the folder are read.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"{error.name} is not installed"
    try:
        with _quiet(transformers), torch.no_grad():
            return _logits(transformers, torch, folder, tokens_BT)
    except Exception as error:  # Whatever keeps it from loading a folder that is read here.
        return f"it cannot run this folder ({type(error).__name__}: {str(error).splitlines()[0]})"


def _logits(transformers: Any, torch: Any, folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()
    return reference(torch.tensor(tokens_BT, dtype=torch.long), use_cache=False).logits.float().numpy()


def compare_logits(folder: Path, read: Callable[[], transformer.Params], model: ModelConfig) -> Comparison:
    """The largest difference over random tokens between the logits of a folder and of parameters that are the same.

    These are read last: the model is in memory once at a time.
    """
    tokens_BT = random_tokens(model)
    reference_BTV = reference_logits(folder, tokens_BT)
    if isinstance(reference_BTV, str):
        return Comparison(None, reference_BTV)
    return difference(reference_BTV, tokens_BT, read(), model)


def difference(
    reference_BTV: np.ndarray, tokens_BT: np.ndarray, params: transformer.Params, model: ModelConfig
) -> Comparison:
    """The same for logits that are there already."""
    logits_BTV = jax.jit(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(params, tokens_BT)
    found = np.max(np.abs(np.asarray(logits_BTV) - reference_BTV))
    return Comparison(float(found), "", float(np.max(np.abs(reference_BTV))))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Without the progress bars and remarks of loading a model."""
    log = transformers.utils.logging
    before, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if had_bars:
            log.enable_progress_bar()


# Logits in float32 are sums of thousands of products: this share of the largest is rounding, and more is a mistake.
TOLERANCE = 1e-3
# Tokens in a training window of an imported model, unless its recipe says otherwise.
WINDOW = 256

Log = Callable[[str], None]


def import_run(source: Path, path: Path, tree: Any, origins: Mapping[str, str], log: Log) -> None:
    """Make a run of a Hugging Face folder: its model and tokenizer, with the other knobs of a config `tree`.

    The run appears when it is complete. Raises UserError for a folder that is not one, a model that cannot be said
    here, tensors that are not those that its config asks for, and logits that are not those of `transformers`.
    """
    described, codec = read_model(source, log), load_hf_tokenizer(source, log)
    tree, origins = _with_model(tree, described.knobs, dict(origins), f"import from {source}")
    config = resolve(tree)
    if uses_epochs(config):
        raise UserError(f"config.{EPOCHS}: import reads no text to count it; give it to train, with the run's folder.")
    model, name = fill_vocab_size(config, codec).model, described.architecture.name
    shapes = parameter_shapes(model)
    log(f"{source}: {name}, {format_count(total_size(shapes))} parameters")
    with atomic_folder(path) as temporary:
        run = create_run_dir(temporary, config, origins)
        save_tokenizer(codec, run.tokenizer_file)
        import_parameters(source, run.parameters_file, model, described.architecture)
        about = {"source": str(source.resolve()), "architecture": name, "special_tokens": described.special_tokens}
        about["tokenizer"] = hash_tokenizer(load_tokenizer(run.tokenizer_file))
        run.import_file.write_text(json.dumps(about, indent=2) + "\n")
        log(_compared(source, lambda: read_parameters(run.parameters_file, shapes), model))
    log(f"{path}: a run at step 0")


def export_run(path: Path, folder: Path, which: str, dtype: str | None, log: Log) -> None:
    """Write a run as a folder that `transformers` loads: config, tensors, tokenizer, chat template.

    `dtype` None: the type that an imported model came in as long as it is not trained on, then float32. The folder
    appears when it is complete. Raises UserError for a run without parameters, a model that no architecture of
    `transformers` can say, and logits that are not the same there.
    """
    run, codec = RunDir(path), load_run_tokenizer(RunDir(path))
    whole = fill_vocab_size(load_config(path), codec)
    is_dialogue = False
    if run.is_untrained:
        params: Any = unflatten_paths(matching_parameters(run.parameters_file, parameter_shapes(whole.model)))
    else:
        trained = load_model(path, which)
        params, is_dialogue = trained.generator.params, trained.generator.is_dialogue
    about = _import_record(run.import_file) if run.import_file.exists() else {}

    def finish(temporary: Path) -> None:
        save_hf_tokenizer(codec, temporary, whole.model.context_length, is_dialogue)
        shapes = parameter_shapes(whole.model)
        read = (lambda: read_parameters(run.parameters_file, shapes)) if run.is_untrained else (lambda: params)
        log(_compared(temporary, read, whole.model, dtype))

    special_tokens = _known_tokens(about.get("special_tokens", {}), codec) or special_token_ids(codec)
    architecture = export_model(
        params,
        whole.model,
        folder,
        architecture=about.get("architecture"),
        dtype=dtype,
        special_tokens=special_tokens,
        finish=finish,
    )
    log(f"{folder}: {architecture.name}")


def _known_tokens(special_tokens: Mapping[str, Any], codec: Tokenizer) -> dict[str, Any]:
    """Return the special tokens of an imported config.json whose ids the tokenizer has."""
    size = codec.get_vocab_size()
    return {
        name: ids
        for name, ids in special_tokens.items()
        if all(index is None or index < size for index in (ids if isinstance(ids, list) else [ids]))
    }


def _import_record(file: Path) -> dict[str, Any]:
    about = read_json(file)
    if not isinstance(about.get("architecture"), str) or not isinstance(about.get("special_tokens"), dict):
        raise UserError(f"{file} is damaged: it does not say which architecture and special tokens were imported.")
    return about


def _compared(folder: Path, read: Callable[[], Params], model: ModelConfig, dtype: str | None = None) -> str:
    """What a comparison with `transformers` found. Raises UserError if the logits are not the same.

    Nothing is read where nothing can be compared, or the memory does not hold the other side's model as well.
    """
    needed = 2 * total_bytes(parameter_shapes(model))
    if needed > free_memory():
        return f"Not compared with transformers: that needs about {needed / 2**30:.1f} GiB of free memory."
    found = compare_logits(folder, read, model)
    if found.difference is None:
        return f"Not compared with transformers: {found.reason}."
    rounded = dtype not in (None, "float32")
    if not rounded and found.difference > TOLERANCE * max(1.0, found.largest):
        raise UserError(
            f"{folder}: the logits here differ by up to {found.difference:.2g} from those of transformers, whose "
            f"largest is {found.largest:.2g}. Nothing was written."
        )
    why = f", for its parameters are rounded to {dtype}" if rounded else ""
    return f"Compared with transformers in float32: logits differ by at most {found.difference:.1e}{why}."


def _with_model(
    tree: Any, knobs: Mapping[str, Any], origins: dict[str, str], origin: str
) -> tuple[Any, dict[str, str]]:
    """A config with an imported model in it, and where its values came from."""
    values = {f"model.{name}": value for name, value in knobs.items()}
    values |= {"tokenizer.name": IMPORTED, "tokenizer.vocab_size": None}
    if tree["data"]["seq_len"] is None:
        values["data.seq_len"] = min(WINDOW, knobs["context_length"])
    for path, value in values.items():
        given = _value(tree, path)
        if origins.get(path) == "command line" and given != value:
            raise UserError(f"config.{path}={given!r} was given, and the model that is imported has {value!r}.")
        override(tree, {path: value})
        origins[path] = origin
    return tree, origins


def _value(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree
