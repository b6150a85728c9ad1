"""GGUF export: the files contain every parameter, and llama.cpp, if installed, computes the same logits."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import random_params, small_config
from small_runs import train

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.gguf import GGUF_ARCHITECTURES, export_gguf, gguf_architecture, gguf_vocabulary, write_gguf
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.tokenizers import END, Tokenizer, train_tokenizer
from rustgpt_jax.training.load_model import load_model

gguf = pytest.importorskip("gguf")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

KNOBS = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama2", "attention.n_kv_heads": 2},
    "qwen3": {"family": "qwen3", "attention.n_kv_heads": 2},
}
TEXTS = ["The sky is blue, the sea is blue and the sun is bright.", "The moon turns around the earth."] * 4


def model_of(name: str, **changes: Any) -> ModelConfig:
    knobs = dict(KNOBS[name])
    knobs = (
        FAMILIES[knobs.pop("family")] | knobs | {"vocab_size": 96, "d_model": 64, "attention.n_heads": 4, "d_ff": 96}
    )
    model = small_config(**{f"model.{knob}": value for knob, value in (knobs | changes).items()}).model
    return dataclasses.replace(model, dtype="float32")


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def value(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


def trained_tokenizer(kind: str, size: int | None) -> Tokenizer:
    config = dataclasses.replace(small_config().tokenizer, name=kind, vocab_size=size)
    return train_tokenizer(config, TEXTS)


@pytest.mark.parametrize("name", KNOBS)
def test_every_parameter_is_in_the_file_once(name: str, tmp_path: Path) -> None:
    model, file = model_of(name), tmp_path / "model.gguf"
    params = random_params(model)
    assert write_gguf(params, model, file) == name
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]
    found = tensors_of(file)
    assert sum(tensor.n_elements for tensor in found.values()) == total_size(parameter_shapes(model))
    block = {key: {kind: np.asarray(leaf[1]) for kind, leaf in of.items()} for key, of in _mixer(params).items()}
    np.testing.assert_array_equal(found["token_embd.weight"].data, params["embedding"]["table"])
    np.testing.assert_array_equal(found["blk.1.attn_output.weight"].data, block["output"]["kernel"].T)
    down = np.asarray(params["blocks"]["0"]["feedforward"]["down"]["kernel"][1])
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"].data, down.T)
    if name == "gpt2":
        joined = [block[part]["kernel"] for part in ("query", "key", "value")]
        np.testing.assert_array_equal(found["blk.1.attn_qkv.weight"].data, np.concatenate(joined, axis=1).T)
    elif name == "qwen3":
        np.testing.assert_array_equal(found["blk.1.attn_q.weight"].data, block["query"]["kernel"].T)


def _mixer(params: Any) -> dict[str, Any]:
    parts = params["blocks"]["0"]["mixer"]
    return {key: parts[key] for key in ("query", "key", "value", "output")}


def test_rope_pairs_are_adjacent_in_llama() -> None:
    """Rows i of the first and second half of a head, which RoPE rotates together, are adjacent."""
    from rustgpt_jax.interop.gguf import _interleave_halves

    np.testing.assert_array_equal(
        _interleave_halves(np.arange(12)[:, None], 6)[:, 0], [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_only_matrices_are_rounded_and_only_once(dtype: str, tmp_path: Path) -> None:
    model, file = model_of("gpt2"), tmp_path / "model.gguf"
    params = random_params(model)
    write_gguf(params, model, file, dtype=dtype)
    found, up = tensors_of(file), params["blocks"]["0"]["feedforward"]["up"]
    for name, exact in (("blk.0.ffn_up.bias", up["bias"][0]), ("position_embd.weight", params["positions"]["table"])):
        assert found[name].data.dtype == np.float32
        np.testing.assert_array_equal(found[name].data, exact)
    stored, exact = found["blk.0.ffn_up.weight"], np.asarray(up["kernel"][0]).T
    read = gguf.quants.dequantize(stored.data, stored.tensor_type)
    if dtype == "int8":
        # Half a step of 1/127 of the largest of each block of 32; that step is a float16, off by 2^-11 of itself.
        largest = np.repeat(np.abs(exact.reshape(-1, 32)).max(axis=1), 32).reshape(exact.shape)
        assert np.all(np.abs(read - exact) <= largest / 127 * (0.5 + 127 / 2**11))
        assert stored.n_bytes == exact.size // 32 * 34
    else:
        rounded = exact.astype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype])
        np.testing.assert_array_equal(read, rounded.astype(np.float32))
        assert stored.n_bytes == 2 * exact.size


def test_vocabulary_of_byte_level_bpe(tmp_path: Path) -> None:
    tokenizer, file = trained_tokenizer("bpe", 280), tmp_path / "model.gguf"
    size = tokenizer.get_vocab_size()
    model = model_of("gpt2", vocab_size=size + 8)
    write_gguf(random_params(model), model, file, tokenizer=tokenizer)
    tokens, kinds = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == size + 8
    assert tokens[:size] == [tokenizer.id_to_token(index) for index in range(size)]
    assert kinds[tokenizer.end_id] == gguf.TokenType.CONTROL and kinds[-1] == gguf.TokenType.UNUSED
    assert value(file, "tokenizer.ggml.merges") == gguf_vocabulary(tokenizer).merges
    assert value(file, "tokenizer.ggml.eos_token_id") == tokenizer.token_to_id(END)


@pytest.mark.parametrize("kind", ["word", "char", "byte"])
def test_unsupported_tokenizers_are_omitted(kind: str, tmp_path: Path) -> None:
    tokenizer, file = trained_tokenizer(kind, None if kind != "byte" else 260), tmp_path / "model.gguf"
    with pytest.raises(UserError, match="llama.cpp"):
        gguf_vocabulary(tokenizer)
    model = model_of("gpt2", vocab_size=tokenizer.get_vocab_size())
    write_gguf(random_params(model), model, file, tokenizer=tokenizer)
    assert value(file, "tokenizer.ggml.model") == "no_vocab"
    assert value(file, "gpt2.vocab_size") == model.vocab_size


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"feedforwards": ("relu",)}, "feedforwards"),
        ("llama", {"rope.scaling": "linear", "rope.factor": 2.0}, "rope.scaling"),
        ("llama", {"feedforwards": ("geglu",)}, "feedforwards"),
        ("gpt2", {"mixers": ("deltanet",)}, "mixers"),
    ],
)
def test_unsupported_models_are_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        gguf_architecture(model_of(name, **changes))


def test_failed_exports_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = model_of("gpt2", d_model=48), tmp_path / "model.gguf"
    params = random_params(model)
    with pytest.raises(UserError, match="a multiple of 32 .* blk.0"):
        write_gguf(params, model, file, dtype="int8")
    with pytest.raises(UserError, match="Did you mean 'float32'"):
        write_gguf(params, model, file, dtype="float3")
    (tmp_path / "place").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_gguf(params, model, tmp_path / "place" / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"rustgpt_jax\[bench\]"):
        write_gguf(params, model, file)
    assert [each.name for each in tmp_path.iterdir()] == ["place"]


def test_every_architecture_is_tested() -> None:
    assert {form.name for form in GGUF_ARCHITECTURES.values()} == set(KNOBS)


def test_a_run_is_exported(tmp_path: Path) -> None:
    path, file, said = tmp_path / "run", tmp_path / "run.gguf", list[str]()
    gpt2 = {f"model.{knob}": each for knob, each in FAMILIES["gpt2"].items()}
    train(path, **gpt2, **{"tokenizer.name": "bpe", "training.steps": 2, "schedule.warmup_steps": 0})
    export_gguf(path, file, "last", "bfloat16", said.append)
    assert said == [f"{file}: gpt2"] and value(file, "tokenizer.ggml.model") == "gpt2"
    trained = load_model(path).generator.params["blocks"]["0"]["feedforward"]["down"]["kernel"][0]
    stored = tensors_of(file)["blk.0.ffn_down.weight"]
    read = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(read, np.asarray(trained).T.astype(ml_dtypes.bfloat16).astype(np.float32))
    with pytest.raises(UserError, match="already exists"):
        export_gguf(path, file, "last", None, said.append)


# llama.cpp.


def logits_of(file: Path, tokens: list[int]) -> np.ndarray:
    """logits_TV by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(file), n_ctx=len(tokens), logits_all=True, verbose=False, n_threads=1)
    try:
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)])
    finally:
        llama.close()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", KNOBS)
def test_llama_cpp_computes_the_same_logits(name: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    # Heads that llama.cpp has kernels for.
    model, file = model_of(name, d_model=128, d_ff=128, context_length=64), tmp_path / "model.gguf"
    params = random_params(model)
    write_gguf(params, model, file, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 24).tolist()
    ours = np.asarray(transformer.apply(params, np.array([tokens]), model)[0][0])
    theirs = logits_of(file, tokens)
    assert np.std(ours) > 0.5
    # It keeps keys and values in float16, and reads its GELU from a table of float16.
    tolerance = {"float32": 1e-2, "int8": 5e-2}[dtype]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance * np.abs(ours).max())
    if dtype == "float32":
        np.testing.assert_array_equal(theirs.argmax(-1), ours.argmax(-1))
