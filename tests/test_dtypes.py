"""Dtypes of matrix products, float8 products against NumPy, and dtypes of optimizer state."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import random_params, small_config

from rustgpt_jax.config.schema import Config, ModelConfig, OptimizerConfig, partition, replace_paths
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation.loss import loss_sums
from rustgpt_jax.model import matmul, transformer
from rustgpt_jax.model.flops import inner_programs, parameter_shapes, total_size
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.training.optimizers import OPTIMIZERS, get_eval_params, make_optimizer
from rustgpt_jax.training.train_step import compiled_init_state, compiled_train_steps

pytestmark = pytest.mark.usefixtures("quick_codegen")

LENGTH = 8


def tiny(**changes: Any) -> Config:
    sizes = {"n_layers": 1, "d_model": 16, "attention.n_heads": 2, "context_length": LENGTH, "vocab_size": 31}
    return small_config(**{f"model.{name}": size for name, size in sizes.items()} | changes)


def tokens_of(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 31, (rows, LENGTH), np.int32)


def batch_of(rows: int = 4) -> Batch:
    """Sequences of one document, all of whose tokens count in the loss."""
    tokens = tokens_of(rows)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), np.ones_like(tokens), places)


# Dtypes of mixers and feed-forwards.


def products(program: Any, scope: str = "") -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Scope of every matrix product of a program, and the dtypes of its operands and result."""
    for equation in program.eqns:
        inside = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            yield inside, tuple(str(each.aval.dtype) for each in (*equation.invars, *equation.outvars))
        for inner in inner_programs(equation):
            yield from products(inner, inside)


def operand_types(model: ModelConfig) -> dict[str, set[str]]:
    """Dtypes in which each part of a model multiplies."""
    shapes = parameter_shapes(model)
    program = jax.make_jaxpr(lambda params: transformer.apply(params, tokens_of(), model)[0])(shapes)
    found: dict[str, set[str]] = {"mixer": set(), "feedforward": set(), "logits": set()}
    for scope, (left, right, _) in products(program.jaxpr):
        part = next((part for part in ("mixer", "feedforward") if f"{part}/" in f"{scope}/"), "logits")
        found[part] |= {left, right}
    return found


@pytest.mark.parametrize("mixer", ["attention", "latent_attention", "rg_lru", "deltanet"])
@pytest.mark.parametrize("part", ["mixer", "feedforward", "logits"])
def test_mixers_and_feedforwards_multiply_in_their_dtypes(part: str, mixer: str) -> None:
    narrow = tiny(**{"model.mixers": (mixer,), f"model.precision.{part}_dtype": "bfloat16"}).model
    types = operand_types(narrow)
    assert "bfloat16" in types.pop(part)
    assert set.union(*types.values()) == {"float32"}
    wide = replace_paths(narrow, {"dtype": "bfloat16", f"precision.{part}_dtype": "float32"})
    assert operand_types(wide)[part] == {"float32"}
    hidden_BTD, _, _ = jax.eval_shape(
        lambda params: transformer.hidden_states(params, tokens_of(), narrow), parameter_shapes(narrow)
    )
    assert hidden_BTD.dtype == np.float32


def test_attention_and_mlps_multiply_only_in_the_model_dtype() -> None:
    types = {"mixer": "bfloat16", "feedforward": "float32", "logits": "bfloat16"}
    model = tiny(**{f"model.precision.{part}_dtype": dtype for part, dtype in types.items()}).model
    assert operand_types(model) == {part: {dtype} for part, dtype in types.items()}


def test_experts_multiply_in_feedforward_dtype_and_routers_in_float32() -> None:
    model = tiny(**{"model.feedforwards": ("moe",), "model.precision.feedforward_dtype": "bfloat16"}).model
    program = jax.make_jaxpr(lambda params: transformer.apply(params, tokens_of(), model)[0])(parameter_shapes(model))
    types = [each for scope, each in products(program.jaxpr) if "feedforward" in scope]
    assert len(types) == 4
    assert [left for left, _, _ in types].count("bfloat16") == 3


def test_parts_without_a_dtype_use_that_of_the_model() -> None:
    def text(**changes: Any) -> str:
        model = tiny(**{"model.dtype": "bfloat16", "model.mixers": ("attention", "rg_lru")}, **changes).model
        shapes = parameter_shapes(model), jax.eval_shape(lambda: transformer.init_cache(model, 2, LENGTH))
        return (
            jax.jit(lambda params, cache: transformer.apply(params, tokens_of(), model, cache)).lower(*shapes).as_text()
        )

    parts = ("precision.mixer_dtype", "precision.feedforward_dtype", "precision.logits_dtype")
    assert text() == text(**{f"model.{part}": "bfloat16" for part in parts})
    for part in parts:
        assert text() != text(**{f"model.{part}": "float32"})


@pytest.mark.parametrize("mixer", ["attention", "rg_lru"])
def test_cache_has_the_mixer_dtype(mixer: str) -> None:
    model = tiny(**{"model.mixers": (mixer,), "model.precision.mixer_dtype": "bfloat16"}).model
    params, tokens_BT = jax.device_put(random_params(model)), tokens_of()
    empty = transformer.init_cache(model, 2, LENGTH)
    narrow = transformer.init_cache(
        replace_paths(model, {"dtype": "bfloat16", "precision.mixer_dtype": None}), 2, LENGTH
    )
    assert jax.tree.map(lambda leaf: leaf.dtype, empty) == jax.tree.map(lambda leaf: leaf.dtype, narrow)
    assert np.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(empty)}

    @jax.jit
    def step(token_B1: Any, cache: Any, position: Any) -> Any:
        return transformer.apply(params, token_B1, model, cache, positions_BT=jnp.broadcast_to(position, (2, 1)))

    logits, cache = [], empty
    for place in range(LENGTH):
        one, cache = step(tokens_BT[:, place : place + 1], cache, place)
        logits.append(one)
    full_BTV = jax.jit(lambda: transformer.apply(params, tokens_BT, model)[0])()
    np.testing.assert_allclose(np.concatenate(logits, 1), full_BTV, atol=0.1)
    assert jax.tree.map(lambda leaf: leaf.dtype, cache) == jax.tree.map(lambda leaf: leaf.dtype, empty)


# Float8.


def rounded(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.float32]:
    """A tensor rounded to 8 bits, as float64, and its scale."""
    scale = np.float32(max(np.max(np.abs(x)) / np.float32(ml_dtypes.finfo(dtype).max), np.finfo(np.float32).tiny))
    return (x / scale).astype(dtype).astype(np.float64), scale


def arrays(shape: tuple[int, ...], size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, W and a gradient of x W, each with elements of similar magnitude and an outlier."""
    rng = np.random.default_rng(len(shape))
    three = [rng.standard_normal(each).astype(np.float32) for each in (shape, (shape[-1], 5), (*shape[:-1], 5))]
    for array in three:
        array.flat[0] = 30
    return three[0] * np.float32(size), three[1], three[2] * np.float32(size)


@pytest.mark.parametrize("size", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (7,)])
def test_fp8_matmul_and_gradients_match_numpy(shape: tuple[int, ...], size: float) -> None:
    x, kernel, gradient = arrays(shape, size)
    y, transpose = jax.vjp(matmul.fp8_matmul, x, kernel)
    of_x, of_kernel = transpose(jnp.asarray(gradient))

    (x8, x_scale), (w8, w_scale) = (rounded(each, ml_dtypes.float8_e4m3fn) for each in (x, kernel))
    g8, g_scale = rounded(gradient, ml_dtypes.float8_e5m2)
    x8_ND, g8_NF = x8.reshape(-1, shape[-1]), g8.reshape(-1, 5)
    wanted = (
        (y, x8 @ w8 * x_scale * np.float64(w_scale)),
        (of_x, g8 @ w8.T * g_scale * np.float64(w_scale)),
        (of_kernel, x8_ND.T @ g8_NF * x_scale * np.float64(g_scale)),
    )
    for found, exact in wanted[: 2 if size != 1 else 3]:
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6 * np.max(np.abs(exact)))
    # Rounding to 3 bits after the first one, of both.
    np.testing.assert_allclose(y, x @ kernel, rtol=0, atol=0.1 * np.max(np.abs(x @ kernel)))


def test_vmapped_trials_have_their_own_fp8_scales() -> None:
    x, kernel, _ = arrays((4, 7))
    sizes = np.array([1.0, 1e-9, 1e9], np.float32)[:, None, None]
    many = jax.jit(
        jax.vmap(jax.grad(lambda x, kernel: jnp.sum(jnp.square(matmul.fp8_matmul(x, kernel))), argnums=(0, 1)))
    )
    found = many(sizes * x[None], kernel[None] / sizes)
    one = jax.grad(lambda x, kernel: jnp.sum(jnp.square(matmul.fp8_matmul(x, kernel))), argnums=(0, 1))(x, kernel)
    for stacked, alone, size in zip(found, one, (1 / sizes, sizes), strict=True):
        np.testing.assert_allclose(stacked / size, np.broadcast_to(alone[None], stacked.shape), rtol=1e-5, atol=1e-2)


def test_fp8_products_of_zeros_are_zero() -> None:
    x, kernel, _ = arrays((4, 7))
    for left, right in ((0 * x, kernel), (x, 0 * kernel), (0 * x, 0 * kernel)):
        y, transpose = jax.vjp(matmul.fp8_matmul, left, right)
        assert not np.any(y)
        assert all(np.all(np.isfinite(each)) for each in transpose(jnp.ones_like(y)))
        assert not any(np.any(each) for each in transpose(jnp.zeros_like(y)))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_fp8_matmul_propagates_nonfinite_values(bad: float) -> None:
    x, kernel, gradient = arrays((4, 7))
    for place in range(3):
        given = [np.array(each) for each in (x, kernel, gradient)]
        given[place].flat[3] = bad
        y, transpose = jax.vjp(matmul.fp8_matmul, *given[:2])
        assert np.any(~np.isfinite(y)) == (place < 2)
        of_x, of_kernel = transpose(jnp.asarray(given[2]))
        assert np.any(~np.isfinite(of_x)) or place == 0
        assert np.any(~np.isfinite(of_kernel)) or place == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_multiply_in_fp8_and_accumulate_in_float32(dtype: str) -> None:
    model = tiny(
        **{"model.precision.matmul_dtype": "float8", "model.dtype": dtype, "model.feedforwards": ("swiglu", "moe")}
    ).model
    model = dataclasses.replace(model, n_layers=2)

    def loss(params: Any) -> Any:
        return loss_sums(params, batch_of(), model).objective

    program = jax.make_jaxpr(jax.grad(loss))(parameter_shapes(model))
    types = [each for _, each in products(program.jaxpr)]
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    # Four products of attention in each of two blocks, and three of swiglu.
    linear = 2 * 4 + 3
    assert types.count((e4m3, e4m3, "float32")) == linear
    assert types.count((e5m2, e4m3, "float32")) + types.count((e4m3, e5m2, "float32")) == 2 * linear
    others = {operand for left, right, _ in types for operand in (left, right)} - {e4m3, e5m2}
    assert others == {"float32", dtype}
    apply = jax.make_jaxpr(lambda params: transformer.logits(params, jnp.zeros((1, 2, 16), dtype), model))
    assert {each for _, each in products(apply(parameter_shapes(model)).jaxpr)} == {(dtype, dtype, "float32")}


@pytest.mark.slow
def test_remat_recomputes_the_same_fp8_scales() -> None:
    def gradients(remat: str) -> Any:
        model = tiny(**{"model.precision.matmul_dtype": "float8", "model.remat": remat}).model
        return jax.jit(jax.grad(lambda params: loss_sums(params, batch_of(), model).objective))(random_params(model))

    anew, kept = gradients("full"), gradients("none")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), anew, kept)


@pytest.mark.slow
def test_fp8_training_lowers_the_loss() -> None:
    config = tiny(**{"model.precision.matmul_dtype": "float8", "optimizer.learning_rate": 1e-2, "training.steps": 40})
    static, arguments = partition(config)
    state = compiled_init_state(static, arguments)
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * 20), batch_of())
    _, metrics = compiled_train_steps(static, state, batches, np.int32(20), arguments, np.int32(0))
    assert np.all(np.isfinite(metrics.loss)) and metrics.loss[-1] < 0.6 * metrics.loss[0]
    assert metrics.faults[-1] == 0


# Optimizer state.


def knobs(**changes: Any) -> OptimizerConfig:
    return dataclasses.replace(small_config().optimizer, **changes)


def stacked_params(seed: int = 0) -> Any:
    """Parameters with the names and axes of a model."""
    rng = np.random.default_rng(seed)
    shapes = {"embedding": {"table": (7, 4)}, "blocks": {"0": {"up": {"kernel": (2, 4, 10), "bias": (2, 10)}}}}
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def types_of(tree: Any) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in flatten_paths(tree).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_first_moments_are_bfloat16(name: str) -> None:
    params = stacked_params()

    def state_after(state_dtype: str, steps: int) -> Any:
        transformation = make_optimizer(knobs(name=name, state_dtype=state_dtype))
        state = jax.eval_shape(transformation.init, params)
        for _ in range(steps):
            _, state = jax.eval_shape(transformation.update, params, state, params)
        return state

    wide, narrow = (state_after(dtype, 0) for dtype in ("float32", "bfloat16"))
    assert types_of(narrow) == types_of(state_after("bfloat16", 2))
    assert jax.tree.map(lambda leaf: leaf.shape, narrow) == jax.tree.map(lambda leaf: leaf.shape, wide)
    assert set(types_of(wide).values()) <= {"float32", "int32"}
    changed = [leaf for leaf in jax.tree.leaves(narrow) if leaf.dtype == jnp.bfloat16]
    assert total_size(changed) == total_size(params)
    assert not [path for path, dtype in types_of(narrow).items() if "nu" in path.split("/") and dtype != "float32"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_optimizer_state_trains_to_nearly_the_same_parameters(name: str) -> None:
    target = stacked_params(1)

    def descend(state_dtype: str) -> tuple[Any, Any]:
        config = knobs(
            name=name, learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.0, state_dtype=state_dtype
        )

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            gradients = jax.tree.map(jnp.subtract, params, target)
            updates, state = make_optimizer(config).update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(np.zeros_like, target)
        state = make_optimizer(config).init(params)
        for _ in range(60):
            params, state = step(params, state)
        return params, get_eval_params(config, params, state)

    for wide, narrow in zip(descend("float32"), descend("bfloat16"), strict=True):
        assert set(types_of(narrow).values()) == {"float32"}
        start, apart, left = (
            float(optax.tree.norm(tree))
            for tree in (target, optax.tree.sub(narrow, wide), optax.tree.sub(narrow, target))
        )
        assert left < 0.9 * start
        assert 0 < apart < 0.05 * start
