"""Parameters for decoding give the same logits, caches and tokens; the error of int8 weights is bounded."""

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config, small_tree
from rich.console import Console
from small_runs import train

from rustgpt_jax.cli.evaluation_report import print_evaluation
from rustgpt_jax.config.schema import ModelConfig, for_inference
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.inference.generate import decode_steps, generate, pad_stop_ids, start_generation
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.inference.text_generator import WeightLayout, select_weight_layout, to_decode_params
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import linear_layers
from rustgpt_jax.model.flops import total_bytes
from rustgpt_jax.model.matmul import (
    PackedWeight,
    RowMajorWeight,
    UpcastWeight,
    quantize_int8,
    round_weights,
    to_row_major,
)
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.training.load_model import load_model

# Families that cover everything in decoding; `pytest -m long` tests the others.
SOME = ("gpt2", "gemma3", "qwen3_moe")

pytestmark = pytest.mark.usefixtures("quick_codegen")

PLAIN = WeightLayout(None, "plain", "cpu")
INT8 = WeightLayout("int8", "plain", "cpu")
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 9))
forward = jax.jit(transformer.apply, static_argnums=2)


def model(**changes: Any) -> ModelConfig:
    return for_inference(small_config(**{f"model.{name}": value for name, value in changes.items()}).model)


def cycle_names(table: dict[str, Any], first: int, count: int) -> tuple[str, ...]:
    names = list(table)
    return tuple(names[(first + place) % len(names)] for place in range(count))


def all_components(first: int) -> ModelConfig:
    """All mixers, with feed-forwards and positions from an index of their tables on, and one remaining layer."""
    parts = {"mixers": MIXERS, "feedforwards": FEEDFORWARDS, "positions": POSITIONS}
    patterns = {
        name: cycle_names(table, first if name != "mixers" else 0, len(MIXERS)) for name, table in parts.items()
    }
    return model(**patterns, n_layers=len(MIXERS) + 1, **{"attention.local_window": 4}, tie_embeddings=first == 0)


def family(name: str) -> ModelConfig:
    tree = small_tree(**{"model.attention.local_window": 4, "model.moe.n_experts": 4})
    tree.model.update_from_flattened_dict(FAMILIES[name])
    tree.model.n_layers = max(2, len(tree.model.mixers))
    return for_inference(resolve(tree).model)


def unstack(cache: Any, model: ModelConfig) -> Any:
    """A stacked cache as lists of layers."""
    return {
        key: [
            jax.tree.map(lambda leaf, row=row: leaf[row], of_stack) for row in range(len(jax.tree.leaves(of_stack)[0]))
        ]
        for key, of_stack in cache.items()
    }


def decode_in_two_calls(params: Any, tokens_BT: jax.Array, model: ModelConfig) -> Any:
    """Logits of a prompt and of a token after it, and the cache."""
    cache = transformer.init_cache(model, 2, 9, unstacked=transformer.is_unrolled(params["blocks"]))
    before, cache = transformer.apply(params, tokens_BT[:, :8], model, cache)
    after, cache = transformer.apply(params, tokens_BT[:, 8:], model, cache, positions_BT=jnp.full((2, 1), 8))
    return before, after, cache


def check_decode_params(config: ModelConfig) -> None:
    params = random_params(config)
    assert not transformer.is_unrolled(params["blocks"])
    decode_params = to_decode_params(params, config, PLAIN)
    assert transformer.is_unrolled(decode_params["blocks"])
    compiled = jax.jit(decode_in_two_calls, static_argnums=2)
    *trained, cache = compiled(params, TOKENS_BT, config)
    *decoded, other_cache = compiled(decode_params, TOKENS_BT, config)
    for expected, found in zip(trained, decoded, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    jax.tree.map(
        lambda e, f: np.testing.assert_allclose(f, e, rtol=1e-5, atol=5e-5), unstack(cache, config), other_cache
    )


# Equivalence.


@pytest.mark.parametrize("first", [0, pytest.param(len(FEEDFORWARDS) - len(MIXERS), marks=pytest.mark.slow)])
def test_every_component_decodes_identically_with_decode_params(first: int) -> None:
    check_decode_params(all_components(first))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.long) for n in FAMILIES])
def test_every_family_decodes_identically_with_decode_params(name: str) -> None:
    check_decode_params(family(name))


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"precision.matmul_dtype": "bfloat16"}, {"precision.mixer_dtype": "bfloat16"}],
)
def test_matrices_have_the_operand_dtype(changes: dict[str, Any]) -> None:
    config = model(**changes)
    decode_params = to_decode_params(random_params(config), config, PLAIN)
    kernels = {name: decode_params["blocks"]["0"][1][name] for name in ("mixer", "feedforward")}
    types = {
        "mixer": kernels["mixer"]["query"]["kernel"],
        "feedforward": kernels["feedforward"]["down"]["kernel"],
        "head": decode_params["head"]["kernel"],
    }
    found = {name: getattr(kernel, "operand_dtype", None) or kernel.dtype for name, kernel in types.items()}
    wanted = dict.fromkeys(types, changes.get("dtype", "float32"))
    if "precision.mixer_dtype" in changes:
        wanted["mixer"] = "bfloat16"
    if "precision.matmul_dtype" in changes:
        wanted["mixer"] = wanted["feedforward"] = "bfloat16"
    assert found == wanted
    assert {leaf.dtype for leaf in jax.tree.leaves(decode_params["blocks"]["0"][0]["mixer_norm"])} == {
        np.dtype("float32")
    }


def test_bfloat16_decode_params_are_as_accurate_as_the_trained_ones() -> None:
    config = model(dtype="bfloat16", tie_embeddings=False)
    params = random_params(config)
    trained, _ = forward(params, TOKENS_BT, config)
    decoded, _ = forward(to_decode_params(params, config, PLAIN), TOKENS_BT, config)
    exact, _ = forward(params, TOKENS_BT, dataclasses.replace(config, dtype="float32"))
    assert np.abs(decoded - exact).max() < 1.5 * np.abs(trained - exact).max()


def test_linear_layers_are_found_by_type_not_by_name() -> None:
    (block,) = {model(mixers=("rg_lru",)).block(0)}
    found = set(linear_layers(block))
    assert "mixer/recurrence_gate/kernel" in found
    # Its channels are convolved separately, in float32.
    assert "mixer/convolution/kernel" not in found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"mixers": ("attention", "rg_lru"), "n_layers": 3},
        pytest.param({"tie_embeddings": False}, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_match_the_trained_params(changes: dict[str, Any]) -> None:
    config = model(**changes)
    params = random_params(config)

    def generate_tokens(params: Any) -> Any:
        prompts = [[1, 2, 3], [7], [5] * 17]
        return generate(params, prompts, config, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=10)

    assert generate_tokens(to_decode_params(params, config, PLAIN)) == generate_tokens(params)


# Compiled programs.


@pytest.mark.parametrize("mixer", ["attention", "local_attention", "latent_attention"])
def test_cpu_caches_are_float32(mixer: str) -> None:
    config = model(dtype="bfloat16", mixers=(mixer,), **{"attention.local_window": 4})
    params = random_params(config)

    def cache_arrays(params: Any) -> list[jax.Array]:
        return jax.tree.leaves(start_generation(params, [[1, 2, 3]], config, 4).cache)

    trained, wide = cache_arrays(params), cache_arrays(to_decode_params(params, config, PLAIN))
    assert {str(each.dtype) for each in trained} == {"bfloat16"} and {str(each.dtype) for each in wide} == {"float32"}
    assert all(np.array_equal(each, np.asarray(each).astype(jnp.bfloat16).astype(np.float32)) for each in wide)


def program(params: Any, config: ModelConfig, rows: int) -> Any:
    """The optimized program of the decoding loop for some rows."""
    generation = start_generation(params, [[1, 2, 3]] * rows, config, 200)
    jax.config.update("jax_disable_most_optimizations", False)
    lowered = decode_steps.lower(
        params, generation, np.int32(3), (Greedy(),), jax.random.key(0), pad_stop_ids([]), model=config
    )
    return lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_loop_copies_neither_caches_nor_weights(rows: int) -> None:
    config = model(context_length=256, scan_layers=True, d_model=64)
    params = random_params(config)
    decode_params = to_decode_params(params, config, PLAIN)
    # Keys of all layers, and of one layer.
    of_stacked, of_layer = f"f32[2,{rows},4,256,16]", f"f32[{rows},4,256,16]"

    def copies(compiled: Any, shape: str) -> list[str]:
        lines = compiled.as_text().splitlines()
        return [line for line in lines if f"= {shape}" in line and (" copy(" in line or " transpose(" in line)]

    decoding = program(decode_params, config, rows)
    assert of_layer in decoding.as_text()
    assert copies(decoding, of_layer) == []
    assert copies(program(params, config, rows), of_stacked) != []
    a_layer = decode_params["blocks"]["0"][0]
    assert decoding.memory_analysis().temp_size_in_bytes < total_bytes(a_layer)


def test_new_lengths_do_not_recompile() -> None:
    config = model()
    decode_params = to_decode_params(random_params(config), config, PLAIN)

    def drawn(prompt: list[int], max_tokens: int) -> None:
        generate(decode_params, [prompt], config, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=max_tokens)

    drawn([1, 2], 6)
    before = decode_steps._cache_size()
    drawn([1, 2, 3, 4], 9)
    assert decode_steps._cache_size() == before


# Narrow weights.


@pytest.mark.parametrize("shape", [(5, 3), (64, 7), (128, 16)])
def test_int8_quantization_error_is_bounded(shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    weights[:, 1] = 0
    values_OI, scales_O = (np.asarray(each) for each in quantize_int8(weights))
    # 127 represents the largest weight of each output.
    expected_O = np.where(np.arange(shape[1]) == 1, 1, np.abs(weights).max(0) / 127)
    np.testing.assert_allclose(scales_O, expected_O, rtol=1e-6)
    assert values_OI.dtype == np.int8
    assert (np.abs(values_OI.T * scales_O[None] - weights) <= 0.5001 * scales_O[None]).all()
    np.testing.assert_array_equal(round_weights(weights, "int8"), (values_OI * scales_O[:, None]).T)


def pack_row_major(weights: Any, dtype: str) -> PackedWeight:
    return to_row_major(weights, dtype, "plain")


def pack_upcast(weights: Any, dtype: str) -> PackedWeight:
    return UpcastWeight(round_weights(weights, dtype), dtype)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("shape", [(64, 7), (50, 33)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", [pack_row_major, pack_upcast])
def test_packed_weight_products_match_rounded_weights(kind: Any, dtype: str, shape: tuple[int, int], rows: int) -> None:
    rng = np.random.default_rng(rows)
    weights, x = (rng.standard_normal(size).astype(np.float32) for size in (shape, (2, rows, shape[0])))
    stored = kind(weights, dtype)
    assert jax.tree.leaves(stored)[0].shape == shape
    by = x.astype(jnp.bfloat16).astype(np.float64) if dtype == "bfloat16" else x.astype(np.float64)
    expected = by @ np.asarray(round_weights(weights, dtype), np.float64)
    np.testing.assert_allclose(stored.matmul(x), expected, rtol=1e-5, atol=1e-5)
    assert stored.matmul(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert stored.matmul(x.astype(jnp.bfloat16), jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("weights", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_narrow_weight_logits_match_rounded_weights(weights: str) -> None:
    config = model(mixers=("attention", "rg_lru"), n_layers=2)
    params = random_params(config)
    layers = {str(index): linear_layers(config.block(index)) for index in (0, 1)}

    def narrowed(path: Any, leaf: Any) -> Any:
        _, index, *names = (str(part.key) for part in path)
        return np.stack([round_weights(row, weights) for row in leaf]) if "/".join(names) in layers[index] else leaf

    blocks = jax.tree_util.tree_map_with_path(narrowed, {"blocks": params["blocks"]})["blocks"]
    head = {"kernel": np.asarray(round_weights(params["embedding"]["table"].T, weights))}
    # In float32, which rounds no activations.
    by_definition, _ = forward(params | {"blocks": blocks, "head": head}, TOKENS_BT, config)
    found, _ = forward(to_decode_params(params, config, WeightLayout(weights, "plain", "cpu")), TOKENS_BT, config)
    exact, _ = forward(params, TOKENS_BT, config)
    lost = np.abs(by_definition - exact).max()
    assert lost > 1e-3
    assert np.abs(found - by_definition).max() < (2e-5 if weights == "int8" else 3 * lost)


@pytest.mark.slow
def test_sharded_params_are_rounded_in_place() -> None:
    config = model()
    params = jax.tree.map(jnp.asarray, random_params(config))
    on_one, _ = forward(to_decode_params(params, config, INT8), TOKENS_BT, config)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))):
        assert to_decode_params(params, config, PLAIN) is params
        narrow = to_decode_params(params, config, INT8)
        assert not transformer.is_unrolled(narrow["blocks"])
        on_mesh, _ = forward(narrow, TOKENS_BT, config)
    np.testing.assert_allclose(on_mesh, on_one, rtol=0, atol=2e-5)


def test_weight_layout_follows_the_config() -> None:
    assert select_weight_layout(small_config().sampling) == PLAIN
    assert select_weight_layout(small_config(**{"sampling.weight_dtype": "int8"}).sampling) == INT8
    decode_params = to_decode_params(random_params(model()), model(), INT8)
    kernel = decode_params["blocks"]["0"][0]["mixer"]["query"]["kernel"]
    assert isinstance(kernel, UpcastWeight)
    assert (kernel.values.dtype, kernel.operand_dtype) == (np.float32, "int8")
    for platform, kept in (("cpu", "native"), ("gpu", "plain")):
        decode_params = to_decode_params(random_params(model()), model(), WeightLayout("int8", kept, platform))
        kernel = decode_params["blocks"]["0"][0]["mixer"]["query"]["kernel"]
        assert isinstance(kernel, RowMajorWeight)
        assert (kernel.values.dtype, kernel.matmul_impl) == (np.int8, kept)


@pytest.mark.slow
@pytest.mark.long
def test_evaluation_shows_the_loss_of_narrow_weights(tmp_path: Path) -> None:
    train(tmp_path / "run", **{"training.steps": 2, "logging.eval_every": 2})
    trained = load_model(tmp_path / "run")

    sampling = dataclasses.replace(trained.config.sampling, weight_dtype="int8")
    shown = Console(file=StringIO(), width=200)
    print_evaluation(trained.with_config(dataclasses.replace(trained.config, sampling=sampling)), shown)
    lines = [line.split() for line in shown.file.getvalue().splitlines()]
    whole, narrow = (line for line in lines if line and line[0].startswith("train"))
    assert whole[0] == "train" and narrow[:4] == ["train,", "weights", "in", "int8"]
    assert float(narrow[4]) == pytest.approx(float(whole[1]), rel=0.01)
