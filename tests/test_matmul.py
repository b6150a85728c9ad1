"""Values and gradients of products and activations, with and without saved residuals, against NumPy in float64."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import random_params, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rustgpt_jax.config.schema import ModelConfig, for_inference
from rustgpt_jax.model import matmul as matmul_module
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import inner_programs
from rustgpt_jax.model.kernels import Device
from rustgpt_jax.model.matmul import EXPENSIVE_ACTIVATIONS, apply_activation, gelu_exact, unembed
from rustgpt_jax.model.matmul import matmul as product
from rustgpt_jax.model.transformer import REMAT_POLICIES

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORMS = (False, True)
# This device has no memory to offload to; dots_no_batch saves the same arrays.
POLICIES = ("none", *(name for name in REMAT_POLICIES if name != "offload"))


def model_of(**changes: Any) -> ModelConfig:
    sizes = {"n_layers": 3, "d_model": 16, "attention.n_heads": 2, "context_length": 8, "vocab_size": 31}
    return small_config(**{f"model.{name}": value for name, value in (sizes | changes).items()}).model


def arrays(shape: tuple[int, ...], outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, W, and a gradient of x W."""
    rng = np.random.default_rng(seed)
    three = (shape, (shape[-1], outputs), (*shape[:-1], outputs))
    return tuple(rng.standard_normal(each).astype(np.float32) for each in three)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of a dtype, in float64."""
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


def in_numpy(x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray, dtype: str) -> list[np.ndarray]:
    """x W and the gradients of x and W, from factors rounded to a dtype."""
    x, kernel, gradient = (rounded(each, dtype) for each in (x, kernel, gradient))
    rows_ND, rows_NF = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return [x @ kernel, gradient @ kernel.T, rows_ND.T @ rows_NF]


def in_jax(function: Callable[..., jax.Array], x: Any, kernel: Any, gradient: Any) -> list[Any]:
    y, transpose = jax.vjp(function, x, kernel)
    return [y, *transpose(jnp.asarray(gradient, y.dtype))]


def near(found: Any, exact: Any, share: float) -> None:
    """Asserts that each array is within a share of its largest number."""
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=share * np.max(np.abs(other)))


# Products.


@settings(max_examples=10)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    outputs=st.integers(1, 5),
    form=st.sampled_from(FORMS),
    matmul=st.sampled_from((None, "bfloat16")),
)
def test_matmul_and_gradients_match_numpy(shape: tuple[int, ...], outputs: int, form: bool, matmul: str | None) -> None:
    config = model_of(save_residuals=form, **{"precision.matmul_dtype": matmul})
    x, kernel, gradient = arrays(shape, outputs)
    found = in_jax(lambda x, kernel: product(x, kernel, config), x, kernel, gradient)
    assert {each.dtype for each in found} == {np.dtype(np.float32)}
    near(found, in_numpy(x, kernel, gradient, matmul or "float32"), 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_model_multiplies_in_bfloat16(form: bool) -> None:
    config = model_of(save_residuals=form, dtype="bfloat16")
    x, kernel, gradient = arrays((2, 9, 7), 5)
    found = in_jax(lambda x, kernel: product(x, kernel, config), jnp.bfloat16(x), kernel, gradient)
    assert [str(each.dtype) for each in found] == ["bfloat16", "bfloat16", "float32"]
    near(found, in_numpy(x, kernel, gradient, "bfloat16"), 2**-7)


def test_kernel_gradient_is_accumulated_in_float32() -> None:
    config = model_of(save_residuals=True, dtype="bfloat16")
    x, kernel, gradient = arrays((2, 9, 7), 5)
    _, _, of_kernel = in_jax(lambda x, kernel: product(x, kernel, config), jnp.bfloat16(x), kernel, gradient)
    near([of_kernel], in_numpy(x, kernel, gradient, "bfloat16")[2:], 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_float64_model_multiplies_in_float64(form: bool) -> None:
    config = dataclasses.replace(model_of(save_residuals=form), dtype="float64")
    x, kernel, gradient = (each.astype(np.float64) for each in arrays((2, 3, 7), 5))
    with jax.enable_x64(True):
        found = in_jax(lambda x, kernel: product(x, kernel, config), x, kernel, gradient)
        near(found, in_numpy(x, kernel, gradient, "float64"), 1e-14)


@pytest.mark.parametrize("matmul", [None, "bfloat16"])
def test_custom_vjp_multiplies_in_the_same_dtypes(matmul: str | None) -> None:
    def types(form: bool) -> list[tuple[str, ...]]:
        config, (x, kernel, gradient) = (
            model_of(save_residuals=form, **{"precision.matmul_dtype": matmul}),
            arrays((2, 3, 7), 5),
        )

        def both_ways(*given: Any) -> Any:
            return in_jax(lambda x, kernel: product(x, kernel, config), *given)

        return sorted(types_of_products(jax.make_jaxpr(both_ways)(x, kernel, gradient).jaxpr))

    operands = matmul or "float32"
    assert types(False) == types(True) == 3 * [(operands, operands, "float32")]


@pytest.mark.parametrize("outputs", [3, 40])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("letters", ["DV", "VD"])
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [("float32", None), ("float32", "bfloat16"), ("bfloat16", None), ("bfloat16", "float32")],
)
def test_unembed_and_gradients_match_numpy(
    dtype: str, logits_dtype: str | None, letters: str, form: bool, outputs: int
) -> None:
    config = model_of(save_residuals=form, dtype=dtype, **{"precision.logits_dtype": logits_dtype})
    hidden, kernel_DV, gradient = arrays((2, 9, 7), outputs)
    hidden = np.asarray(rounded(hidden, dtype), np.float32)
    weights = kernel_DV if letters == "DV" else kernel_DV.T
    found = in_jax(lambda *given: unembed(*given, letters, config), jnp.asarray(hidden, dtype), weights, gradient)
    assert [str(each.dtype) for each in found] == ["float32", dtype, "float32"]
    logits, of_hidden, of_weights = in_numpy(hidden, kernel_DV, gradient, logits_dtype or dtype)
    near([found[0], found[2]], [logits, of_weights if letters == "DV" else of_weights.T], 2e-6)
    near([found[1]], [of_hidden], 2e-6 if dtype == "float32" else 2**-8)


def types_of_products(program: Any) -> list[tuple[str, ...]]:
    """Dtypes of the factors and of the result of each matrix product in a program."""
    found = [
        tuple(str(each.aval.dtype) for each in (*equation.invars, *equation.outvars))
        for equation in program.eqns
        if equation.primitive.name == "dot_general"
    ]
    for equation in program.eqns:
        for inner in inner_programs(equation):
            found += types_of_products(inner)
    return found


# Activations.


def in_float64(activation: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative of an activation by textbook formulas."""
    x = x.astype(np.float64)
    if activation is jax.nn.silu:
        gate = 1 / (1 + np.exp(-x))
        return x * gate, gate * (1 + x * (1 - gate))
    if activation is gelu_exact:
        return x * stats.norm.cdf(x), stats.norm.cdf(x) + x * stats.norm.pdf(x)
    inner, scale = x + 0.044715 * x**3, np.sqrt(2 / np.pi)
    tanh = np.tanh(scale * inner)
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x * (1 - tanh**2) * scale * (1 + 3 * 0.044715 * x**2) / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", EXPENSIVE_ACTIVATIONS, ids=lambda each: each.__name__)
def test_activations_and_derivatives_match_textbook_formulas(activation: Any, form: bool) -> None:
    x = np.concatenate([np.linspace(-12, 12, 97), [0.0, -0.0, 1e-20, 50, -50]]).astype(np.float32).reshape(2, -1)
    gradient = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    y, transpose = jax.vjp(lambda x: apply_activation(activation, x, model_of(save_residuals=form)), x)
    exact, slope = in_float64(activation, x)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(transpose(jnp.asarray(gradient))[0], gradient * slope, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("activation", EXPENSIVE_ACTIVATIONS, ids=lambda each: each.__name__)
def test_activations_preserve_dtype(activation: Any) -> None:
    x = jnp.linspace(-3, 3, 50, dtype=jnp.bfloat16)
    y, transpose = jax.vjp(lambda x: apply_activation(activation, x, model_of(save_residuals=True)), x)
    (of_x,) = transpose(jnp.ones_like(y))
    assert y.dtype == of_x.dtype == jnp.bfloat16
    near([y, of_x], in_float64(activation, np.asarray(x, np.float32)), 2**-6)


# A whole model.


def gradients(model: ModelConfig, params: Any = None) -> Any:
    """Gradient of a weighted sum of a model's logits with respect to all parameters."""
    tokens_BT = np.random.default_rng(0).integers(0, 31, (2, 8), np.int32)
    weights_BTV = np.random.default_rng(1).standard_normal((2, 8, 31)).astype(np.float32)

    def total(params: Any) -> jax.Array:
        return jnp.sum(weights_BTV * transformer.apply(params, tokens_BT, model)[0])

    return jax.jit(jax.grad(total))(random_params(model) if params is None else params)


def assert_close(found: Any, expected: Any) -> None:
    noise = 1e-4 * max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=noise), found, expected)


@pytest.mark.slow
def test_feedforward_gradients_match_jax() -> None:
    model = model_of(n_layers=2, feedforwards=("geglu", "moe"), bias=True)
    plain, kept = (gradients(dataclasses.replace(model, save_residuals=form)) for form in FORMS)
    assert_close(kept, plain)


@pytest.mark.parametrize(
    ("remat", "scan_layers"), [*((remat, True) for remat in POLICIES), ("none", False), ("full", False)]
)
def test_remat_preserves_gradients(remat: str, scan_layers: bool) -> None:
    model = model_of(n_layers=2, feedforwards=("gelu",))
    kept = dataclasses.replace(model, save_residuals=True, remat=remat, scan_layers=scan_layers)
    assert_close(gradients(kept), plain_gradients(model))


@cache
def plain_gradients(model: ModelConfig) -> Any:
    return gradients(dataclasses.replace(model, save_residuals=False))


def test_vmapped_models_have_their_own_gradients() -> None:
    model = model_of(save_residuals=True, n_layers=1, feedforwards=("gelu",))
    several = [random_params(model, seed) for seed in range(3)]
    alone = jax.jit(lambda params: gradients(model, params))
    together = jax.jit(jax.vmap(alone))(jax.tree.map(lambda *each: np.stack(each), *several))
    for index, params in enumerate(several):
        assert_close(jax.tree.map(lambda leaf, index=index: leaf[index], together), alone(params))


# The default.


def barriers(model: ModelConfig) -> int:
    """Number of optimization barriers in a training step."""
    params = jax.eval_shape(lambda: random_params(model))
    return str(jax.make_jaxpr(lambda params: gradients(model, params))(params)).count("optimization_barrier")


@pytest.mark.parametrize(("platform", "form"), [("cpu", True), ("gpu", False), ("rocm", False), ("tpu", False)])
def test_residuals_are_saved_by_default_on_cpus_only(
    monkeypatch: pytest.MonkeyPatch, platform: bool, form: bool
) -> None:
    model = model_of(n_layers=1, **{"attention.kernel": "reference"})
    wanted = barriers(dataclasses.replace(model, save_residuals=form))
    monkeypatch.setattr(matmul_module, "current_device", lambda: Device(platform))
    assert barriers(dataclasses.replace(model, save_residuals=None)) == wanted
    # At least two for each of four products of attention and three of the feed-forward, and one for the activation.
    assert wanted >= 15 if form else wanted == 0


def test_forward_program_does_not_depend_on_save_residuals() -> None:
    texts = set()
    for form in FORMS:
        model = for_inference(model_of(save_residuals=form))
        forward = jax.jit(lambda params, model=model: transformer.apply(params, np.zeros((1, 4), np.int32), model)[0])
        texts.add(forward.lower(random_params(model)).as_text())
    assert len(texts) == 1
