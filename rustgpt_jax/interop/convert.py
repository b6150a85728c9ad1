"""Conversion between Hugging Face folders and runs, with a comparison of their logits."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.config.config_files import COMMAND_LINE
from rustgpt_jax.config.schema import EPOCHS, ModelConfig, unflatten, uses_epochs
from rustgpt_jax.config.validation import flatten_tree, resolve
from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.data.token_store import hash_tokenizer
from rustgpt_jax.errors import UserError
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
from rustgpt_jax.sharding.hardware_specs import free_memory
from rustgpt_jax.tokenizers import IMPORTED, Tokenizer, load_tokenizer, save_tokenizer
from rustgpt_jax.tracking.console import format_count
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_inputs import load_run_tokenizer, read_import_record
from rustgpt_jax.workdir.params_io import matching_parameters, read_parameters
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config

# The number of tokens for the comparison of logits.
N_COMPARED_TOKENS = 64
# Logits in float32 are sums of thousands of products: differences up to this share of the largest logit are attributed
# to rounding.
TOLERANCE = 1e-3
# Tokens in a training sequence of an imported model by default.
SEQ_LEN = 256

Log = Callable[[str], None]


class LogitComparison(NamedTuple):
    """The result of comparing logits with a reference.

    Attributes:
        difference: The largest absolute difference; None if there was no comparison.
        reason: The reason why there was no comparison.
        largest: The largest absolute value of a reference logit.
    """

    difference: float | None
    reason: str
    largest: float = 0.0


def compare_logits(folder: Path, read: Callable[[], Params], model: ModelConfig) -> LogitComparison:
    """Compare the logits that `transformers` computes for a Hugging Face folder with ours, on random tokens.

    `read` returns our parameters. It is called last, so that only one model at a time is in memory.
    """
    length = min(N_COMPARED_TOKENS, model.context_length)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, transformer.vocab_size(model), (1, length), dtype=np.int32)
    reference_BTV = reference_logits(folder, tokens_BT)
    if isinstance(reference_BTV, str):
        return LogitComparison(None, reference_BTV)
    return compare_with_reference(reference_BTV, tokens_BT, read(), model)


def compare_with_reference(
    reference_BTV: np.ndarray, tokens_BT: np.ndarray, params: Params, model: ModelConfig
) -> LogitComparison:
    """Compare reference logits with those of parameters on the same tokens."""
    logits_BTV = jax.jit(lambda params, tokens_BT: transformer.apply(params, tokens_BT, model)[0])(params, tokens_BT)
    difference = np.max(np.abs(np.asarray(logits_BTV) - reference_BTV))
    return LogitComparison(float(difference), "", float(np.max(np.abs(reference_BTV))))


def reference_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray | str:
    """Compute the logits of the Hugging Face model in a folder with `transformers`, in float32 on the CPU.

    Nothing is downloaded, and neither pickles nor code in the folder are loaded.

    Returns:
        logits_BTV, or the reason why they cannot be computed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"{error.name} is not installed"
    try:
        with _quiet(transformers), torch.no_grad():
            return _logits(transformers, torch, folder, tokens_BT)
    except Exception as error:  # Loading can fail in any way.
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


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Suppress the progress bars and messages of loading a model."""
    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()


def import_run(source: Path, path: Path, tree: Any, origins: Mapping[str, str], log: Log) -> str:
    """Create a run folder with the model and tokenizer of a Hugging Face folder; `tree` holds the other config fields.

    The folder is created atomically.

    Returns:
        The name of the architecture.

    Raises:
        UserError: `source` is not a Hugging Face folder, the model is unsupported, the tensors do not match the config,
            or the logits differ from those of `transformers`.
    """
    info, tokenizer = read_model(source, log), load_hf_tokenizer(source, log)
    overrides = _model_overrides(tree, info.knobs, origins)
    config = resolve(tree, overrides)
    origins = {**origins, **dict.fromkeys(overrides, f"import from {source}")}
    if uses_epochs(config):
        raise UserError(
            f"config.{EPOCHS}: `import` reads no text, so it cannot convert epochs to steps; give them to `train`."
        )
    model, name = fill_vocab_size(config, tokenizer).model, info.architecture.name
    shapes = parameter_shapes(model)
    log(f"{source}: {name}, {format_count(total_size(shapes))} parameters")
    with atomic_folder(path) as temporary:
        run = create_run_dir(temporary, config, origins)
        save_tokenizer(tokenizer, run.tokenizer_file)
        import_parameters(source, run.parameters_file, model, info.architecture)
        record = {"source": str(source.resolve()), "architecture": name, "special_tokens": info.special_tokens}
        record["tokenizer"] = hash_tokenizer(load_tokenizer(run.tokenizer_file))
        run.import_file.write_text(json.dumps(record, indent=2) + "\n")
        log(_check_logits(source, lambda: read_parameters(run.parameters_file, shapes), model))
    log(f"{path}: a run at step 0")
    return name


def export_run(path: Path, folder: Path, which: str, dtype: str | None, log: Log) -> str:
    """Write a run to a folder that `transformers` can load: config, tensors, tokenizer and chat template.

    Args:
        path: The run.
        folder: The folder to create, atomically.
        which: The checkpoint: 'last', 'best' or a step.
        dtype: The dtype; None for the dtype of the imported tensors if the run was not trained, else float32.
        log: Called with messages.

    Returns:
        The name of the architecture.

    Raises:
        UserError: The run has no parameters, no architecture of `transformers` can represent the model, or the logits
            differ.
    """
    run, tokenizer = RunDir(path), load_run_tokenizer(RunDir(path))
    model = fill_vocab_size(load_config(path), tokenizer).model
    shapes, is_dialogue = parameter_shapes(model), False
    if run.is_untrained:
        params: Any = unflatten(matching_parameters(run.parameters_file, shapes), "/")
    else:
        trained = load_model(path, which)
        params, is_dialogue = trained.generator.params, trained.generator.is_dialogue
    record = read_import_record(run)
    is_imported = isinstance(record.get("architecture"), str) and isinstance(record.get("special_tokens"), dict)
    # A warm start records them only if its model and tokenizer are those of an import.
    is_warm_start = "loaded" in record and not {"architecture", "special_tokens"} & record.keys()
    if run.import_file.exists() and not (is_imported or is_warm_start):
        raise UserError(f"{run.import_file} is damaged: it does not name the imported architecture and special tokens.")

    def finish(temporary: Path) -> None:
        save_hf_tokenizer(tokenizer, temporary, model.context_length, is_dialogue)
        read = (lambda: read_parameters(run.parameters_file, shapes)) if run.is_untrained else (lambda: params)
        log(_check_logits(temporary, read, model, dtype))

    architecture = export_model(
        params,
        model,
        folder,
        architecture=record.get("architecture"),
        dtype=dtype,
        special_tokens=_known_tokens(record.get("special_tokens", {}), tokenizer) or special_token_ids(tokenizer),
        finish=finish,
    )
    log(f"{folder}: {architecture.name}")
    return architecture.name


def _known_tokens(special_tokens: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the special tokens of an imported config.json whose ids the tokenizer has."""
    size = tokenizer.get_vocab_size()
    return {
        name: ids
        for name, ids in special_tokens.items()
        if all(index is None or index < size for index in (ids if isinstance(ids, list) else [ids]))
    }


def _check_logits(folder: Path, read: Callable[[], Params], model: ModelConfig, dtype: str | None = None) -> str:
    """Compare logits with `transformers` and return a message about the result.

    The comparison is skipped if `transformers` is not available or a second model does not fit in memory.

    Raises:
        UserError: The logits differ.
    """
    needed = 2 * total_bytes(parameter_shapes(model))
    if needed > free_memory():
        return f"Not compared with transformers: that needs about {needed / 2**30:.1f} GiB of free memory."
    found = compare_logits(folder, read, model)
    if found.difference is None:
        return f"Not compared with transformers: {found.reason}."
    is_rounded = dtype not in (None, "float32")
    if not is_rounded and found.difference > TOLERANCE * max(1.0, found.largest):
        raise UserError(
            f"{folder}: our logits differ by up to {found.difference:.2g} from those of transformers, whose "
            f"largest magnitude is {found.largest:.2g}. Nothing was written."
        )
    why = f", because the parameters are rounded to {dtype}" if is_rounded else ""
    return f"Compared with transformers in float32: logits differ by at most {found.difference:.1e}{why}."


def _model_overrides(tree: Any, knobs: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that an imported model with these knobs replaces in a config, by dotted path."""
    given = dict(flatten_tree(tree))
    overrides = {f"model.{name}": value for name, value in knobs.items()}
    overrides |= {"tokenizer.name": IMPORTED, "tokenizer.vocab_size": None}
    if given.get("data.seq_len") is None:
        overrides["data.seq_len"] = min(SEQ_LEN, knobs["context_length"])
    for path, value in overrides.items():
        if origins.get(path) == COMMAND_LINE and given[path] != value:
            raise UserError(f"config.{path}={given[path]!r} was given, but the imported model has {value!r}.")
    return overrides
