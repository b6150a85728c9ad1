"""Export of model parameters to GGUF files, the format of llama.cpp and related projects.

Files are written by the `gguf` package (the extra `bench`). Matrices are stored in the requested dtype; one-dimensional
tensors and the position table in float32, as llama.cpp requires. The tokenizer and its chat template are included if
llama.cpp supports them; otherwise the exported model takes token ids.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from rustgpt_jax.atomic_io import atomic_file, translate_os_errors
from rustgpt_jax.config.schema import ModelConfig, get_path
from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.interop.architectures import architecture_for
from rustgpt_jax.interop.config_mapping import dense_width
from rustgpt_jax.interop.hf_checkpoint import native_chat_format, special_token_ids
from rustgpt_jax.interop.param_mapping import (
    TensorPlan,
    TensorRule,
    TensorRules,
    linear_rules,
    norm_rules,
    plan_tensors,
)
from rustgpt_jax.model.transformer import Params, vocab_size
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.tokenizers import Message, Tokenizer
from rustgpt_jax.tokenizers.chat_template import apply_chat_template
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.training.run_inputs import load_run_tokenizer
from rustgpt_jax.workdir.run_dir import RunDir, load_config

# Tokenizers. A tokenizer is converted only if llama.cpp produces the same tokens for the same text.

SPACE = "▁"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
# llama.cpp's names of the pre-tokenizer patterns, and whether it first looks up a whole word in the vocabulary before
# merging (`ignore_merges`).
SPLITS: dict[str, dict[str, bool]] = {
    rf"{_LETTERS}|\p{{N}}{{1,3}}|{_WORDS}": {"llama-bpe": True, "dbrx": False},
    rf"{_LETTERS}|\p{{N}}|{_WORDS}": {"qwen2": False},
}
GPT2_SPLIT = {"gpt-2": False}
DIGITS_SPLIT = {"smollm": False}


@dataclass(frozen=True)
class GGUFVocabulary:
    """A tokenizer in terms of GGUF fields.

    Attributes:
        model: 'gpt2' for byte-level BPE, 'llama' for SentencePiece BPE.
        pre: llama.cpp's name of the pre-tokenizer.
        merges: Merges of a 'gpt2' tokenizer, in order of priority.
        scores: Token scores of a 'llama' tokenizer; higher scores are merged first.
        adds_space: Whether a space is prepended to the text.
        adds_bos: Whether the token bos_id is prepended to the text.
    """

    model: str
    pre: str
    merges: list[str]
    scores: Mapping[str, float]
    adds_space: bool
    adds_bos: bool
    bos_id: int


def gguf_vocabulary(tokenizer: Tokenizer) -> GGUFVocabulary:
    """Convert a tokenizer for llama.cpp. Raises UserError if llama.cpp would tokenize differently."""
    settings = json.loads(tokenizer.backend.to_str())
    if settings["model"]["type"] != "BPE" or settings["model"].get("dropout"):
        raise UserError(f"llama.cpp does not support this tokenizer of the kind {settings['model']['type']}")
    prefix, _ = tokenizer.prefix_and_suffix_ids
    if len(prefix) > 1:
        raise UserError("llama.cpp puts at most one token before a text")
    bos_id = prefix[0] if prefix else special_token_ids(tokenizer).get("bos_token_id", tokenizer.end_id)
    is_byte_level = (settings["decoder"] or {}).get("type") == "ByteLevel"
    convert = _convert_byte_level if is_byte_level else _convert_sentencepiece
    return convert(settings, adds_bos=bool(prefix), bos_id=bos_id)


def token_rows(tokenizer: Tokenizer, size: int, kinds: Any) -> Iterator[tuple[str, int]]:
    """Yield each row of the token table and its type, a gguf.TokenType."""
    settings = json.loads(tokenizer.backend.to_str())
    added = {token["content"]: token["special"] for token in settings["added_tokens"]}
    unknown, has_bytes = settings["model"].get("unk_token"), settings["model"].get("byte_fallback")
    vocabulary = tokenizer.backend.get_vocab()
    for index in range(size):
        token = tokenizer.id_to_token(index)
        if token is None:
            name = f"<unused{index}>"
            while name in vocabulary:
                name = f"<{name}>"
            yield name, kinds.UNUSED
        elif token == unknown:
            yield token, kinds.UNKNOWN
        elif token in added:
            yield token, kinds.CONTROL if added[token] else kinds.USER_DEFINED
        else:
            yield token, kinds.BYTE if has_bytes and token in BYTE_TOKENS else kinds.NORMAL


def gguf_chat_template(tokenizer: Tokenizer, vocabulary: GGUFVocabulary, is_dialogue: bool) -> str | None:
    """Return the chat template for llama.cpp, or None if the model has none.

    Raises:
        UserError: llama.cpp would tokenize the template's dialogues differently.
    """
    chat_format = tokenizer.chat_format or native_chat_format(is_dialogue)
    if chat_format.chat_template is None:
        return None
    tokens = tokenizer.backend.get_added_tokens_decoder().values()
    stripping = next((token.content for token in tokens if token.lstrip or token.rstrip), None)
    if stripping is not None:
        raise UserError(f"llama.cpp keeps spaces beside {stripping}, which the tokenizer drops")
    if "bos_token" in chat_format.chat_template and "bos_token" not in chat_format.special_tokens_map:
        raise UserError("the chat template uses bos_token, which the tokenizer does not define")
    bos = tokenizer.id_to_token(vocabulary.bos_id) or ""
    try:
        asked = apply_chat_template(
            chat_format, [Message("user", "?")], add_generation_prompt=True, special_tokens=tokenizer.special_tokens
        )
    except UserError:
        return chat_format.chat_template
    if vocabulary.adds_bos and not asked.startswith(bos):
        raise UserError(f"llama.cpp puts {bos} before every dialogue, but the chat template does not")
    return chat_format.chat_template


# Byte-level BPE.


def _convert_byte_level(settings: Mapping[str, Any], adds_bos: bool, bos_id: int) -> GGUFVocabulary:
    model = settings["model"]
    if settings["normalizer"] is not None:
        raise UserError(f"llama.cpp does not support the normalizer {settings['normalizer']['type']}")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        raise UserError("llama.cpp does not support byte-level BPE with prefixes, suffixes or byte fallback")
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys():
        raise UserError("the tokenizer has no token for some of the 256 bytes")
    for token in settings["added_tokens"]:
        if not token["special"] and any(token[key] for key in ("lstrip", "rstrip", "single_word")):
            raise UserError(f"llama.cpp does not find the token {token['content']} in the same way as the tokenizer")
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if not merges:
        raise UserError("llama.cpp does not support BPE without merges")
    names = _find_split(settings["pre_tokenizer"])
    ignore_merges = bool(model.get("ignore_merges"))
    # Both settings are equivalent if every token can be built by merges from its own characters.
    is_same = _merges_build_every_token(settings, merges)
    pre = next((name for name, value in names.items() if is_same or value == ignore_merges), None)
    if pre is None:
        raise UserError(
            "llama.cpp merges within words that are in the vocabulary, but the tokenizer does not (ignore_merges)"
        )
    return GGUFVocabulary("gpt2", pre, [" ".join(pair) for pair in merges], {}, False, adds_bos, bos_id)


def _find_split(pre_tokenizer: Mapping[str, Any] | None) -> dict[str, bool]:
    """Return the entry of SPLITS that matches a pre-tokenizer. Raises UserError if none matches."""
    parts = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *first, last = [dict(part) for part in parts] or [{}]
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not first:
            return GPT2_SPLIT
        if last["use_regex"] and first == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_SPLIT
        if not last["use_regex"] and len(first) == 1 and first[0]["type"] == "Split":
            split, pattern = first[0], first[0]["pattern"].get("Regex")
            if split["behavior"] == "Isolated" and not split["invert"] and pattern in SPLITS:
                return SPLITS[pattern]
    raise UserError("llama.cpp does not support the way in which the tokenizer splits text before merging")


def _merges_build_every_token(settings: Mapping[str, Any], merges: Sequence[Sequence[str]]) -> bool:
    """Return whether every token can be built by merges from its own characters."""
    vocabulary = settings["model"]["vocab"]
    added = {token["content"] for token in settings["added_tokens"]}
    bare = HFTokenizer(models.BPE(vocabulary, [(left, right) for left, right in merges]))
    tokens = [token for token in vocabulary if token not in added]
    encoded = bare.encode_batch_fast(tokens, add_special_tokens=False)
    return all(each.ids == [vocabulary[token]] for token, each in zip(tokens, encoded, strict=True))


# SentencePiece's BPE.


def _convert_sentencepiece(settings: Mapping[str, Any], adds_bos: bool, bos_id: int) -> GGUFVocabulary:
    model = settings["model"]
    vocabulary = model["vocab"]
    if not model.get("byte_fallback") or not set(BYTE_TOKENS) <= vocabulary.keys():
        raise UserError("llama.cpp does not support BPE of characters without byte fallback")
    if model.get("ignore_merges") or any(not token["special"] for token in settings["added_tokens"]):
        raise UserError(
            "llama.cpp's SentencePiece supports neither ignore_merges nor added tokens that are not special"
        )
    adds_space = _prepends_space(settings)
    groups = [(token, list(pairs)) for token, pairs in groupby(model["merges"], key="".join)]
    scores = {token: float(-rank) for rank, (token, _) in enumerate(groups)}
    merges = {tuple(pair) for _, pairs in groups for pair in pairs}
    added = {token["content"] for token in settings["added_tokens"]}
    if len(scores) < len(groups) or not all(
        (token[:cut], token[cut:]) in merges
        for token in vocabulary.keys() - added
        for cut in range(1, len(token))
        if all(len(part) == 1 or part in vocabulary for part in (token[:cut], token[cut:]))
    ):
        raise UserError("llama.cpp merges two tokens whenever the result is a token, but the tokenizer does not")
    return GGUFVocabulary("llama", "default", [], scores, adds_space, adds_bos, bos_id)


def _prepends_space(settings: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer prepends a space. Raises UserError if it treats spaces unlike SentencePiece."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
    normalizer, pre_tokenizer = settings["normalizer"], settings["pre_tokenizer"]
    if normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}:
        has_space = True
    elif normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}) or pre_tokenizer == metaspace:
        has_space = False
    else:
        has_space = None
    if has_space is None or None not in (normalizer, pre_tokenizer):
        raise UserError("llama.cpp handles spaces differently than the tokenizer")
    return has_space


# Tensors.

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
# The number of 8-bit values with a common scale; rows must be divisible by it.
BLOCK = 32
# The position table is looked up by row, so it is stored in float32.
POSITIONS = "position_embd.weight"

LAYER = "blk.{layer}."
COMMON: TensorRules = {
    "embedding/table": TensorRule("token_embd.weight"),
    **norm_rules("norm", "output_norm"),
    "head/kernel": TensorRule("output.weight", True),
    **norm_rules("mixer_norm", LAYER + "attn_norm"),
    **norm_rules("feedforward_norm", LAYER + "ffn_norm"),
    **linear_rules("mixer/output", LAYER + "attn_output"),
    **linear_rules("feedforward/up", LAYER + "ffn_up"),
    **linear_rules("feedforward/down", LAYER + "ffn_down"),
}
# Queries, keys and values are in one tensor.
GPT2: TensorRules = {
    **COMMON,
    "positions/table": TensorRule(POSITIONS),
    **linear_rules("mixer/query", LAYER + "attn_qkv"),
    **linear_rules("mixer/key", LAYER + "attn_qkv"),
    **linear_rules("mixer/value", LAYER + "attn_qkv"),
}
LLAMA: TensorRules = {
    **COMMON,
    **linear_rules("mixer/query", LAYER + "attn_q"),
    **linear_rules("mixer/key", LAYER + "attn_k"),
    **linear_rules("mixer/value", LAYER + "attn_v"),
    **norm_rules("mixer/query_norm", LAYER + "attn_q_norm"),
    **norm_rules("mixer/key_norm", LAYER + "attn_k_norm"),
    **linear_rules("feedforward/gate", LAYER + "ffn_gate"),
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture of llama.cpp.

    Attributes:
        name: The name in the file.
        rules: The tensors.
        fixed: Knobs that must have these values, because the file has no field for them.
        interleaved: Tensors with RoPE pairs in adjacent rows of a head; here they are half a head apart.
    """

    name: str
    rules: TensorRules
    fixed: Mapping[str, Any]
    interleaved: tuple[str, ...] = ()


UNSCALED = {"rope.scaling": "none", "rope.fraction": 1.0, "feedforwards": ("swiglu",)}
NO_BIASES = dict.fromkeys(("has_qkv_bias", "has_attention_output_bias", "has_feedforward_bias"), False)
# By the architecture of `transformers` for the same model.
GGUF_ARCHITECTURES = {
    "GPT2LMHeadModel": GGUFArchitecture("gpt2", GPT2, {"feedforwards": ("gelu",), "attention.scale_by_layer": False}),
    "LlamaForCausalLM": GGUFArchitecture("llama", LLAMA, UNSCALED | NO_BIASES, ("attn_q.", "attn_k.")),
    "Qwen3ForCausalLM": GGUFArchitecture("qwen3", LLAMA, UNSCALED | NO_BIASES),
}


def export_gguf(path: Path, file: Path, which: str, dtype: str | None, log: Callable[[str], None]) -> str:
    """Write a run as a GGUF file atomically, in float32 by default, and return the name of llama.cpp's architecture.

    Raises:
        UserError: The file already exists.
    """
    if file.exists():
        raise UserError(f"{file} already exists; choose another name.")
    trained = load_model(path, which)
    tokenizer = load_run_tokenizer(RunDir(path))
    model = fill_vocab_size(load_config(path), tokenizer).model
    is_dialogue = trained.generator.is_dialogue
    name = write_gguf(
        trained.generator.params, model, file, dtype=dtype or "float32", tokenizer=tokenizer, is_dialogue=is_dialogue
    )
    log(f"{file}: {name}{_convert_tokenizer(tokenizer, is_dialogue)[2]}")
    return name


def write_gguf(
    params: Params,
    model: ModelConfig,
    file: Path,
    *,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    is_dialogue: bool = False,
) -> str:
    """Write a model as a GGUF file, one tensor at a time.

    Args:
        params: The model parameters.
        model: The model config.
        file: The path to write to.
        dtype: float32, float16, bfloat16 or int8 (blocks of 32 values with one scale each).
        tokenizer: The tokenizer.
        is_dialogue: Whether the model was trained on dialogues; if so, a tokenizer trained here has a chat template.

    Returns:
        The name of the llama.cpp architecture.

    Raises:
        UserError: The `gguf` package is missing, llama.cpp has no matching architecture, or the file is not writable.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF export needs the package gguf, which is not installed: python -m pip install 'rustgpt_jax[bench]'"
        ) from None
    architecture = gguf_architecture(model)
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}.{suggest_names(dtype, DTYPES)}")
    plan, leaves = plan_tensors(architecture.rules, model), flatten_paths(params)
    kinds = {tensor.name: gguf.GGMLQuantizationType[_storage_type(tensor, dtype)] for tensor in plan.values()}
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        for name, argument in _metadata(architecture, model, dtype, gguf).items():
            getattr(writer, f"add_{name}")(argument)
        _add_vocabulary(writer, model, tokenizer, is_dialogue, gguf)
        for tensor in plan.values():
            _add_tensor_info(writer, tensor, kinds[tensor.name], gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.values():
            writer.write_tensor_data(
                gguf.quants.quantize(_values(tensor, leaves, model, architecture), kinds[tensor.name])
            )
        writer.close()
    return architecture.name


def gguf_architecture(model: ModelConfig) -> GGUFArchitecture:
    """Return the llama.cpp architecture of a model. Raises UserError if llama.cpp has none."""
    hf_name = architecture_for(model).name
    if hf_name not in GGUF_ARCHITECTURES:
        raise UserError(f"GGUF export does not support {hf_name}.{suggest_names(hf_name, GGUF_ARCHITECTURES)}")
    architecture = GGUF_ARCHITECTURES[hf_name]
    for knob, there in architecture.fixed.items():
        here = get_path(model, knob)
        if here != there:
            name = knob.removeprefix("has_")
            raise UserError(
                f"llama.cpp's {architecture.name} cannot represent config.model.{name}={here!r}; it uses {there!r}."
            )
    return architecture


def _convert_tokenizer(tokenizer: Tokenizer, is_dialogue: bool) -> tuple[GGUFVocabulary | None, str | None, str]:
    """Return the vocabulary and chat template for llama.cpp if supported, and a note about what is not."""
    try:
        vocabulary = gguf_vocabulary(tokenizer)
    except UserError as error:
        return None, None, f", without a tokenizer ({error}): the exported model takes token ids"
    try:
        return vocabulary, gguf_chat_template(tokenizer, vocabulary, is_dialogue), ""
    except UserError as error:
        return vocabulary, None, f", without its chat template: {error}"


def _metadata(architecture: GGUFArchitecture, model: ModelConfig, dtype: str, gguf: Any) -> dict[str, Any]:
    """Return the metadata of the model by the names of the writer's methods, without their prefix add_."""
    values = {
        "context_length": model.context_length,
        "embedding_length": model.d_model,
        "block_count": model.n_layers,
        "feed_forward_length": dense_width(model),
        "head_count": model.attention.n_heads,
        "vocab_size": vocab_size(model),
        "file_type": gguf.LlamaFileType[{"F32": "ALL_F32"}.get(DTYPES[dtype], f"MOSTLY_{DTYPES[dtype]}")],
    }
    if architecture.rules is GPT2:
        return values | {"layer_norm_eps": model.norm_eps}
    width = model.head_width
    return values | {
        "head_count_kv": model.attention.kv_heads,
        "key_length": width,
        "value_length": width,
        "layer_norm_rms_eps": model.norm_eps,
        "rope_dimension_count": width,
        "rope_freq_base": model.rope.theta,
    }


def _add_vocabulary(writer: Any, model: ModelConfig, tokenizer: Tokenizer | None, is_dialogue: bool, gguf: Any) -> None:
    """Add the tokens and the chat template, if llama.cpp produces the same tokens for the same text."""
    vocabulary, template, _ = (None, None, "") if tokenizer is None else _convert_tokenizer(tokenizer, is_dialogue)
    if tokenizer is None or vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    rows = list(token_rows(tokenizer, vocab_size(model), gguf.TokenType))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        lowest = -float(len(vocabulary.scores))
        writer.add_token_scores([vocabulary.scores.get(token, lowest) for token, _ in rows])
        writer.add_add_space_prefix(vocabulary.adds_space)
    # llama.cpp supports three tokens that end a reply.
    ends = list(dict.fromkeys([tokenizer.end_id, *tokenizer.stop_ids]))
    for add, index in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(index)
    writer.add_bos_token_id(vocabulary.bos_id)
    if "pad_token_id" in special_token_ids(tokenizer):
        writer.add_pad_token_id(special_token_ids(tokenizer)["pad_token_id"])
    writer.add_add_bos_token(vocabulary.adds_bos)
    # A prompt must not end with an end token.
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _storage_type(tensor: TensorPlan, dtype: str) -> str:
    if len(tensor.shape) == 1 or tensor.name == POSITIONS:
        return DTYPES["float32"]
    if dtype == "int8" and tensor.shape[-1] % BLOCK:
        raise UserError(
            f"int8 requires rows of a multiple of {BLOCK} values; those of {tensor.name} have {tensor.shape[-1]}."
        )
    return DTYPES[dtype]


def _add_tensor_info(writer: Any, tensor: TensorPlan, kind: Any, gguf: Any) -> None:
    """Add the header of a tensor. The data are written after all headers."""
    native = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    if native is not None:
        n_bytes = np.dtype(native).itemsize * int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(native), n_bytes)
        return
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)


def _values(
    tensor: TensorPlan, leaves: Mapping[str, Any], model: ModelConfig, architecture: GGUFArchitecture
) -> np.ndarray:
    """Return a tensor in the layout of llama.cpp, whose linear layers have shape (outputs, inputs)."""
    values = tensor.to_stored(
        [np.asarray(leaves[part.path])[part.indices].astype(np.float32) for part in tensor.slices]
    )
    if any(name in tensor.name for name in architecture.interleaved):
        values = _interleave_halves(values, model.head_width)
    return np.ascontiguousarray(values)


def _interleave_halves(rows: np.ndarray, width: int) -> np.ndarray:
    """Interleave the rows of the first and second half of each head."""
    halves = rows.reshape(-1, 2, width // 2, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)
