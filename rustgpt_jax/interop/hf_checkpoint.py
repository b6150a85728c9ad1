"""Import and export of Hugging Face checkpoints: the config, tensors and tokenizer in a folder."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.interop.architectures import ARCHITECTURES, Architecture, architecture_for, architecture_of
from rustgpt_jax.interop.config_mapping import read_json_object
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
from rustgpt_jax.tokenizers import END, SYSTEM, USER, ChatFormat, Tokenizer, load_tokenizer, save_tokenizer
from rustgpt_jax.tokenizers.chat_template import find_turn_end_token
from rustgpt_jax.workdir.params_io import (
    CHUNK_BYTES,
    NewTensor,
    StoredTensor,
    open_safetensors,
    write_parameters,
    write_safetensors,
)

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
PICKLE = "pytorch_model"
HEAD = "lm_head.weight"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

Stored = dict[str, StoredTensor]
Tree = Any


class HFModelInfo(NamedTuple):
    """The content of a config.json.

    Attributes:
        knobs: The values of ModelConfig that affect logits.
        architecture: The architecture.
        special_tokens: bos_token_id, eos_token_id and pad_token_id, as in the file.
    """

    knobs: dict[str, Any]
    architecture: Architecture
    special_tokens: dict[str, Any]


def read_model(source: Path, warn: Callable[[str], object] = lambda text: None) -> HFModelInfo:
    """Read the config.json of a Hugging Face folder, passing warnings about ignored settings to `warn`.

    Raises:
        UserError: A setting is missing, unknown or unsupported; the message names the file and the setting.
    """
    file = source / CONFIG
    if not file.exists():
        missing = f": it has no {CONFIG}" if source.is_dir() else ""
        raise UserError(f"{source} is not a folder with a Hugging Face model{missing}.")
    config = read_json_object(file)
    architecture = architecture_of(config, file)
    tokens = {key: config[key] for key in TOKEN_KEYS if key in config}
    return HFModelInfo(architecture.knobs(config, file, warn), architecture, tokens)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Open the tensors in a folder by name, from one file or from the shards in an index."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a Hugging Face model.")
    if (folder / SINGLE).exists():
        return open_safetensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _missing_tensors_error(folder)
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map.")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise UserError(f"{folder / INDEX} names {shard!r}, which is not a file beside it.")
        # Path.exists raises for a name that is too long.
        if not os.path.exists(folder / shard):
            raise UserError(f"{folder / INDEX} names {shard}, which is missing.")
        for name, stored in open_safetensors(folder / shard).items():
            if name in found:
                raise UserError(f"{name} is both in {found[name].file} and in {stored.file}.")
            found[name] = stored
    for name, shard in weight_map.items():
        if name not in found:
            raise UserError(f"{folder / shard} has no {name}, although {INDEX} lists it there.")
    return found


def _missing_tensors_error(folder: Path) -> UserError:
    if any(folder.glob(f"{PICKLE}*.bin*")):
        return UserError(
            f"{folder} stores its tensors only as pickles ({PICKLE}*.bin), which can run any code and are never read. "
            "If you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        return UserError(f"{folder} has {', '.join(shards[:3])}, but neither {SINGLE} nor {INDEX} that lists them.")
    return UserError(f"{folder} has no {SINGLE}.")


def import_parameters(source: Path, file: Path, model: ModelConfig, architecture: Architecture) -> None:
    """Convert the tensors of a Hugging Face folder to a file of our parameters, one by one, keeping their dtypes.

    All names, shapes and dtypes are checked before anything is written.

    Raises:
        UserError: A tensor is missing, is unknown or has the wrong shape, or a file is damaged.
    """
    stored = _with_embedding_table(read_folder(source), model, architecture)
    plan = _match_tensors(source, stored, model, architecture)
    shapes, slices = shapes_by_path(model), slices_by_param(plan.values())
    write_parameters(file, [_parameter(path, shapes[path], slices[path], stored) for path in shapes])


def _match_tensors(
    source: Path, stored: Stored, model: ModelConfig, architecture: Architecture
) -> dict[str, TensorPlan]:
    """Return the plan of the model's tensors, with their names in this folder. Raises UserError unless they match."""
    layouts = [plan_tensors(rules, model) for rules in _layouts(architecture)]
    plan = max(layouts, key=lambda layout: len(layout.keys() & stored.keys()))
    for name, tensor in plan.items():
        if name not in stored:
            raise UserError(f"{source} has no tensor {name}, which {architecture.name} needs.")
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{stored[name].file}: {name} has the shape {stored[name].shape}; {CONFIG} requires {tensor.shape}."
            )
        _ = stored[name].dtype
    for name in stored:
        if name in plan or any(re.search(pattern, name) for pattern in architecture.ignored):
            continue
        if name == HEAD and model.tie_embeddings:
            table = next(name for name, tensor in plan.items() if tensor.slices[0].path == "embedding/table")
            _check_tied(stored[HEAD], stored[table])
            continue
        raise UserError(
            f"{stored[name].file} has an unknown tensor {name} for {architecture.name} with this {CONFIG}."
            f"{suggest_names(name, plan)}"
        )
    return plan


def _with_embedding_table(stored: Stored, model: ModelConfig, architecture: Architecture) -> Stored:
    """Return the tensors of a folder. If a tied model stores only its head, use it as the embedding table too."""
    names = {rules["embedding/table"].name for rules in _layouts(architecture)}
    if not model.tie_embeddings or HEAD not in stored or names & stored.keys():
        return stored
    return {architecture.rules["embedding/table"].name: stored[HEAD], **stored}


def _layouts(architecture: Architecture) -> Iterator[TensorRules]:
    """Yield the rules of each layout of an architecture, with and without the prefix."""
    for rules in (architecture.rules, *architecture.other_rules):
        yield rules
        yield {path: rule._replace(name=rule.name.removeprefix(architecture.prefix)) for path, rule in rules.items()}


def _check_tied(head: StoredTensor, table: StoredTensor) -> None:
    """Raise UserError if a stored head differs from the embedding table that it is tied to."""
    is_same = head.shape == table.shape and head.dtype == table.dtype
    n_rows = max(1, CHUNK_BYTES // (head.shape[-1] * head.dtype.itemsize))
    for start in range(0, head.shape[0], n_rows) if is_same else ():
        stop = min(start + n_rows, head.shape[0])
        is_same = is_same and head.read_rows(start, stop).tobytes() == table.read_rows(start, stop).tobytes()
    if not is_same:
        raise UserError(f"{head.file}: {CONFIG} has tie_word_embeddings, but {HEAD} differs from the embeddings.")


def _parameter(path: str, shape: tuple[int, ...], parts: list[TensorSlice], stored: Stored) -> NewTensor:
    dtype = np.result_type(*{stored[part.tensor.name].dtype for part in parts})
    if dtype == np.float64:
        # Models use at most float32; the values are rounded when they are written.
        dtype = np.dtype(np.float32)
    return NewTensor(path, dtype, shape, lambda: (part.take(stored[part.tensor.name].read()) for part in parts))


# Export.

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000


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
    """Write a model, one tensor at a time, to a folder that `transformers` can load, and return its architecture.

    Args:
        params: The parameters, as arrays or as tensors of `open_parameters`, which are read when needed.
        model: The model config.
        folder: The folder, which must be absent or empty. It is created atomically.
        architecture: A name in ARCHITECTURES; None for the first that can represent the model.
        dtype: float32, bfloat16 or float16; None for the dtype of each parameter.
        special_tokens: bos_token_id, eos_token_id and pad_token_id; null if not given.
        shard_bytes: The maximum size of the tensors in one file.
        finish: A function that writes other files into the folder before it is renamed.

    Raises:
        UserError: No architecture can represent the model, or the folder cannot be written.
    """
    if architecture is None:
        chosen = architecture_for(model)
    elif architecture in ARCHITECTURES:
        chosen = ARCHITECTURES[architecture]
        for knob, (here, there) in chosen.roundtrip_differences(model).items():
            raise UserError(
                f"{architecture} cannot represent config.model.{knob}={here!r}; it would be read as {there!r}."
            )
    else:
        raise UserError(f"Unknown architecture {architecture!r}.{suggest_names(architecture, ARCHITECTURES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}.{suggest_names(dtype, DTYPES)}")
    leaves = flatten_paths(params, is_leaf=lambda leaf: isinstance(leaf, StoredTensor))
    tensors = [_new_tensor(tensor, leaves, dtype) for tensor in plan_tensors(chosen.rules, model).values()]
    config = chosen.hf_config(model) | dict.fromkeys(TOKEN_KEYS) | dict(special_tokens or {})
    # transformers 4 and 5 both read this name.
    config["torch_dtype"] = dtype or DTYPE_NAMES[np.dtype(leaves["embedding/table"].dtype)]
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write_tensors(temporary, tensors, shard_bytes)
        if finish is not None:
            finish(temporary)
    return chosen


def _new_tensor(tensor: TensorPlan, leaves: Mapping[str, Any], dtype: str | None) -> NewTensor:
    """Return a tensor whose values are taken from the parameters when it is written."""

    def read() -> Iterator[np.ndarray]:
        yield tensor.to_stored([_read_slice(part, leaves) for part in tensor.slices])

    own_dtype = np.result_type(*{np.dtype(leaves[part.path].dtype) for part in tensor.slices})
    return NewTensor(tensor.name, own_dtype if dtype is None else DTYPES[dtype], tensor.shape, read)


def _read_slice(part: ParamSlice, leaves: Mapping[str, Any]) -> np.ndarray:
    leaf = leaves[part.path]
    return leaf[part.indices] if isinstance(leaf, StoredTensor) else np.asarray(leaf)[part.indices]


def _write_tensors(folder: Path, tensors: Sequence[NewTensor], shard_bytes: int) -> None:
    """Write tensors to model.safetensors or, if they exceed `shard_bytes`, to shards with an index."""
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, metadata)
        weight_map |= {tensor.name: name for tensor in shard}
    total_size = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# The tokenizer.

# The format of dialogues with tokenizers trained here.
NATIVE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_hf_tokenizer(source: Path, log: Callable[[str], object] = lambda _: None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder; `log` is called for ids of end tokens that it does not have.

    Raises:
        UserError: The tokenizer or its end token is missing, or a file is damaged or invalid, for example with an end
            token that is not in the vocabulary or a chat template that is not a string.
    """
    file = source / TOKENIZER
    if not file.exists():
        raise UserError(f"{source} has no {TOKENIZER}; `transformers` writes it with AutoTokenizer...save_pretrained.")
    tokenizer = load_tokenizer(file)
    return Tokenizer(tokenizer.backend, _read_chat_format(source, tokenizer, log))


def _read_chat_format(source: Path, tokenizer: Tokenizer, log: Callable[[str], object]) -> ChatFormat:
    names = (SPECIAL_TOKENS, TOKENIZER_CONFIG, CONFIG, GENERATION)
    files = {name: read_json_object(source / name) if (source / name).exists() else {} for name in names}
    stops, unknown = list[str](), list[str]()
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        stops = stops or _end_token(source / name, files[name], tokenizer)
    for name in (CONFIG, GENERATION):
        _add_end_ids(source / name, files[name], tokenizer, stops, unknown)
    if not stops:
        missing = f"{source}: neither {TOKENIZER_CONFIG} nor {CONFIG} names the token that ends a text (eos_token)."
        raise UserError(unknown[0] if unknown else missing)
    for message in unknown:
        log(f"{message} It is ignored.")
    named = _named_tokens(files[SPECIAL_TOKENS]) | _named_tokens(files[TOKENIZER_CONFIG]) | {"eos_token": stops[0]}
    template = _read_template(source, files[TOKENIZER_CONFIG])
    try:
        chat_format = ChatFormat(stops[0], tuple(dict.fromkeys(stops)), template, named)
    except ValueError as error:
        raise UserError(f"{source}: a special token or the chat template is not valid text ({error}).") from None
    # A base model may have this token and not stop at it, but should stop after training on dialogues.
    turn_end = find_turn_end_token(chat_format, tokenizer.special_tokens)
    if turn_end is None or turn_end in chat_format.stop_tokens:
        return chat_format
    return replace(chat_format, stop_tokens=(*chat_format.stop_tokens, turn_end))


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of bos_token, eos_token etc. that are strings or objects with a string `content`."""
    contents = {name: _content(token) for name, token in settings.items() if name.endswith("_token")}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _end_token(file: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Return the value of eos_token, if any."""
    token = settings.get("eos_token")
    if token is None:
        return []
    content = _content(token)
    if not isinstance(content, str) or tokenizer.token_to_id(content) is None:
        raise UserError(f"{file}: eos_token must be a token of {TOKENIZER}, got {token!r}.")
    return [content]


def _add_end_ids(
    file: Path, settings: Mapping[str, Any], tokenizer: Tokenizer, stops: list[str], unknown: list[str]
) -> None:
    """Add the tokens of eos_token_id (an id, a list of ids or null) to `stops`, and a message per unknown id."""
    given = settings.get("eos_token_id")
    size = tokenizer.get_vocab_size()
    for index in given if isinstance(given, list) else [] if given is None else [given]:
        message = f"{file}: eos_token_id must be ids of {TOKENIZER}, below {size}, got {index!r}."
        if type(index) is not int:
            raise UserError(message)
        token = tokenizer.id_to_token(index) if 0 <= index < size else None
        if token is None:
            unknown.append(message)
        else:
            stops.append(token)


def _read_template(source: Path, settings: Mapping[str, Any]) -> str | None:
    """Read the chat template from its file, or from the settings, where it may be a list of named templates."""
    file = source / TEMPLATE
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from None
    template = settings.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if not isinstance(template, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
        for entry in template
    ):
        raise UserError(
            f"{source / TOKENIZER_CONFIG}: chat_template must be a string, or a list of objects with the strings name "
            f"and template, got {template!r}."
        )
    return next((entry["template"] for entry in template if entry["name"] == "default"), None)


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int, is_dialogue: bool) -> None:
    """Write the files from which `transformers` loads the same tokenizer.

    A tokenizer trained here gets a chat template if `is_dialogue`, that is, if the model was trained on dialogues.
    """
    chat_format = tokenizer.chat_format or native_chat_format(is_dialogue)
    backend = tokenizer.backend
    if tokenizer.chat_format is None:
        # Add the token that prompts begin with here.
        backend = HFTokenizer.from_str(backend.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", pair=f"{END} $A $B:1", special_tokens=[(END, tokenizer.end_id)]
        )
    save_tokenizer(Tokenizer(backend), folder / TOKENIZER)
    settings = {
        # The class that loads a tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        **chat_format.special_tokens_map,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    if chat_format.chat_template is not None:
        (folder / TEMPLATE).write_text(chat_format.chat_template, encoding="utf-8")
    stops = tokenizer.stop_ids
    generation = special_token_ids(tokenizer) | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return bos_token_id, eos_token_id and pad_token_id, if the tokenizer has these tokens."""
    named = (tokenizer.chat_format or native_chat_format(False)).special_tokens_map
    tokens = {key: named.get(key.removesuffix("_id")) for key in TOKEN_KEYS}
    ids = {key: tokenizer.token_to_id(token) for key, token in tokens.items() if token is not None}
    return {key: index for key, index in ids.items() if index is not None}


def native_chat_format(is_dialogue: bool) -> ChatFormat:
    """Return the chat format of tokenizers trained here, in the form used for imported ones."""
    named = {"bos_token": END, "eos_token": END, "pad_token": END}
    return ChatFormat(END, (END, USER, SYSTEM), NATIVE_TEMPLATE if is_dialogue else None, named)
