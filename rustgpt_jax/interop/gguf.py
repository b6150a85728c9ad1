"""Export of model parameters to GGUF files, the format of llama.cpp and related projects.

Files are written by the `gguf` package (the extra `bench`). Matrices are stored in the requested dtype; one-dimensional
tensors and the position table in float32, as llama.cpp requires. The tokenizer and its chat template are included if
llama.cpp supports them; otherwise the exported model takes token ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rustgpt_jax.atomic_io import atomic_file, translate_os_errors
from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.errors import UserError, suggestion
from rustgpt_jax.interop.architectures import architecture_for
from rustgpt_jax.interop.config_mapping import dense_width
from rustgpt_jax.interop.gguf_vocabulary import chat_template_of, token_rows, vocabulary_of
from rustgpt_jax.interop.hf_tokenizer_io import special_ids
from rustgpt_jax.interop.param_mapping import Rule, Rules, Tensor, tensors
from rustgpt_jax.model.transformer import Params, vocab_size
from rustgpt_jax.pytrees import by_path
from rustgpt_jax.tokenizers import Codec
from rustgpt_jax.training.load_model import load
from rustgpt_jax.training.run_inputs import run_tokenizer
from rustgpt_jax.workdir.run_dir import RunDir, load_config

# What a type is called in a file.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
# Rows of 8-bit numbers are cut into blocks with a scale each.
BLOCK = 32
# Read row by row and added, never multiplied.
POSITIONS = "position_embd.weight"

LAYER = "blk.{layer}."


def _linear(path: str, name: str) -> Rules:
    return {f"{path}/kernel": Rule(f"{name}.weight", True), f"{path}/bias": Rule(f"{name}.bias")}


def _norm(path: str, name: str) -> Rules:
    return {f"{path}/scale": Rule(f"{name}.weight"), f"{path}/bias": Rule(f"{name}.bias")}


EVERYWHERE: Rules = {
    "embedding/table": Rule("token_embd.weight"),
    **_norm("norm", "output_norm"),
    "head/kernel": Rule("output.weight", True),
    **_norm("mixer_norm", LAYER + "attn_norm"),
    **_norm("feedforward_norm", LAYER + "ffn_norm"),
    **_linear("mixer/output", LAYER + "attn_output"),
    **_linear("feedforward/up", LAYER + "ffn_up"),
    **_linear("feedforward/down", LAYER + "ffn_down"),
}
# Queries, keys and values come from one product.
GPT2: Rules = {
    **EVERYWHERE,
    "positions/table": Rule(POSITIONS),
    **_linear("mixer/query", LAYER + "attn_qkv"),
    **_linear("mixer/key", LAYER + "attn_qkv"),
    **_linear("mixer/value", LAYER + "attn_qkv"),
}
GATED: Rules = {
    **EVERYWHERE,
    **_linear("mixer/query", LAYER + "attn_q"),
    **_linear("mixer/key", LAYER + "attn_k"),
    **_linear("mixer/value", LAYER + "attn_v"),
    **_norm("mixer/query_norm", LAYER + "attn_q_norm"),
    **_norm("mixer/key_norm", LAYER + "attn_k_norm"),
    **_linear("feedforward/gate", LAYER + "ffn_gate"),
}


@dataclass(frozen=True)
class Form:
    """How one architecture of llama.cpp says a model.

    name: in the file. rules: the tensors. fixed: knobs that must have these values, for nothing in the file says them.
    interleaved: tensors whose outputs RoPE rotates as neighbours in a head, where here they are half a head apart.
    """

    name: str
    rules: Rules
    fixed: Mapping[str, Any]
    interleaved: tuple[str, ...] = ()


UNSTRETCHED = {"rope_scaling": "none", "rope_fraction": 1.0, "feedforwards": ("swiglu",)}
NO_BIASES = dict.fromkeys(("has_qkv_bias", "has_attention_output_bias", "has_feedforward_bias"), False)
# By the architecture of `transformers` that says the same model.
FORMS = {
    "GPT2LMHeadModel": Form("gpt2", GPT2, {"feedforwards": ("gelu",), "attention_scale_by_layer": False}),
    "LlamaForCausalLM": Form("llama", GATED, UNSTRETCHED | NO_BIASES, ("attn_q.", "attn_k.")),
    "Qwen3ForCausalLM": Form("qwen3", GATED, UNSTRETCHED | NO_BIASES),
}


def export_gguf(path: Path, file: Path, which: str, dtype: str | None, says: Callable[[str], None]) -> None:
    """Write a run as a GGUF file, in float32 unless `dtype` says otherwise. The file appears when it is complete.

    Raises UserError for a run without parameters, a file that already exists, and as `write_gguf` does.
    """
    if file.exists():
        raise UserError(f"{file} already exists; choose another name.")
    trained = load(path, which)
    codec = run_tokenizer(RunDir(path))
    model = fill_vocab_size(load_config(path), codec).model
    is_dialogue = trained.writer.is_dialogue
    name = write_gguf(
        trained.writer.params, model, file, dtype=dtype or "float32", tokenizer=codec, is_dialogue=is_dialogue
    )
    says(f"{file}: {name}{_left_out(codec, is_dialogue)}")


def write_gguf(
    params: Params,
    model: ModelConfig,
    file: Path,
    *,
    dtype: str = "float32",
    tokenizer: Codec | None = None,
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
    gguf = _package()
    form = form_of(model)
    if dtype not in TYPES:
        raise UserError(f"There is no type {dtype!r} to export in.{suggestion(dtype, TYPES)}")
    plan, leaves = tensors(form.rules, model), by_path(params)
    kinds = {tensor.name: gguf.GGMLQuantizationType[_type_of(tensor, dtype)] for tensor in plan.values()}
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, form.name)
        for name, argument in _settings(form, model, dtype, gguf).items():
            getattr(writer, f"add_{name}")(argument)
        _add_vocabulary(writer, model, tokenizer, is_dialogue, gguf)
        for tensor in plan.values():
            _announce(writer, tensor, kinds[tensor.name], gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.values():
            writer.write_tensor_data(gguf.quants.quantize(_numbers(tensor, leaves, model, form), kinds[tensor.name]))
        writer.close()
    return form.name


def form_of(model: ModelConfig) -> Form:
    """How llama.cpp says a model. Raises UserError with what it cannot say."""
    architecture = architecture_for(model).name
    if architecture not in FORMS:
        raise UserError(f"GGUF is not written for {architecture} here.{suggestion(architecture, FORMS)}")
    form = FORMS[architecture]
    for knob, there in form.fixed.items():
        here = getattr(model, knob)
        if here != there:
            name = knob.removeprefix("has_")
            raise UserError(f"llama.cpp's {form.name} cannot say config.model.{name}={here!r}; there it is {there!r}.")
    return form


def _left_out(codec: Codec, is_dialogue: bool) -> str:
    """Describe the parts of the tokenizer that the file lacks, and why."""
    try:
        described = vocabulary_of(codec)
    except UserError as error:
        return f", without a tokenizer ({error}): it is to be fed with token ids"
    try:
        chat_template_of(codec, described, is_dialogue)
    except UserError as error:
        return f", without its chat template: {error}"
    return ""


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF is written by the package gguf, which is not installed: python -m pip install 'rustgpt_jax[bench]'"
        ) from None
    return gguf


def _settings(form: Form, model: ModelConfig, dtype: str, gguf: Any) -> dict[str, Any]:
    """What the file says of the model, by the names of the writer's methods."""
    values = {
        "context_length": model.context_length,
        "embedding_length": model.d_model,
        "block_count": model.n_layers,
        "feed_forward_length": dense_width(model),
        "head_count": model.n_heads,
        "vocab_size": vocab_size(model),
        "file_type": gguf.LlamaFileType[{"F32": "ALL_F32"}.get(TYPES[dtype], f"MOSTLY_{TYPES[dtype]}")],
    }
    if form.rules is GPT2:
        return values | {"layer_norm_eps": model.norm_eps}
    width = model.head_width
    return values | {
        "head_count_kv": model.n_kv_heads or model.n_heads,
        "key_length": width,
        "value_length": width,
        "layer_norm_rms_eps": model.norm_eps,
        "rope_dimension_count": width,
        "rope_freq_base": model.rope_theta,
    }


def _add_vocabulary(writer: Any, model: ModelConfig, tokenizer: Codec | None, is_dialogue: bool, gguf: Any) -> None:
    """Add the tokens and the chat template, as far as llama.cpp produces the same tokens for the same text."""
    try:
        described = None if tokenizer is None else vocabulary_of(tokenizer)
    except UserError:
        described = None
    if tokenizer is None or described is None:
        writer.add_tokenizer_model("no_vocab")
        return
    rows = list(token_rows(tokenizer, vocab_size(model), gguf.TokenType))
    writer.add_tokenizer_model(described.model)
    writer.add_tokenizer_pre(described.pre)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    if described.merges:
        writer.add_token_merges(described.merges)
    else:
        least = -float(len(described.scores))
        writer.add_token_scores([described.scores.get(token, least) for token, _ in rows])
        writer.add_add_space_prefix(described.adds_blank)
    # llama.cpp supports three tokens that end a reply.
    ends = list(dict.fromkeys([tokenizer.end_id, *tokenizer.stop_ids]))
    for add, index in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(index)
    writer.add_bos_token_id(described.bos_id)
    if "pad_token_id" in special_ids(tokenizer):
        writer.add_pad_token_id(special_ids(tokenizer)["pad_token_id"])
    writer.add_add_bos_token(described.adds_bos)
    # A prompt must not end with an end token.
    writer.add_add_eos_token(False)
    try:
        template = chat_template_of(tokenizer, described, is_dialogue)
    except UserError:
        return
    if template is not None:
        writer.add_chat_template(template)


def _type_of(tensor: Tensor, dtype: str) -> str:
    if len(tensor.shape) == 1 or tensor.name == POSITIONS:
        return TYPES["float32"]
    if dtype == "int8" and tensor.shape[-1] % BLOCK:
        raise UserError(f"int8 takes rows of multiples of {BLOCK} numbers, and {tensor.name} has {tensor.shape[-1]}.")
    return TYPES[dtype]


def _announce(writer: Any, tensor: Tensor, kind: Any, gguf: Any) -> None:
    """Say what a tensor will be; its numbers follow when all are announced."""
    native = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    if native is not None:
        n_bytes = np.dtype(native).itemsize * int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(native), n_bytes)
        return
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)


def _numbers(tensor: Tensor, leaves: Mapping[str, Any], model: ModelConfig, form: Form) -> np.ndarray:
    """A tensor as llama.cpp wants it: a linear layer has a row for each output."""
    columns = [np.asarray(leaves[slot.path])[slot.place].astype(np.float32) for slot in tensor.slots]
    whole = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
    if tensor.transposed:
        whole = np.swapaxes(whole, -1, -2)
    if any(name in tensor.name for name in form.interleaved):
        whole = _interleaved(whole, model.head_width)
    return np.ascontiguousarray(whole)


def _interleaved(rows: np.ndarray, width: int) -> np.ndarray:
    """The rows of each head, its first half and its second half in turns."""
    halves = rows.reshape(-1, 2, width // 2, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)
