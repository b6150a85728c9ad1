"""What the forward pass of a layer saves for the backward pass, read from the step lowered for NVIDIA GPUs."""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.mlir import ir

from rustgpt_jax.config.schema import Config, ModelConfig, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.evaluation.loss import loss_sums
from rustgpt_jax.model import matmul
from rustgpt_jax.model.flops import equations, parameter_shapes
from rustgpt_jax.model.kernels import Device, attention
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.training.memory_estimate import batch_shapes

# No other axis of the arrays has this length, so that it marks arrays of one slice per layer.
N_LAYERS, ROWS = 3, 2
ITEM_BYTES = {"bf16": 2, "f32": 4, "i32": 4, "ui32": 4, "i1": 1}


@pytest.fixture
def _nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs be lowered for an H100 without one."""
    monkeypatch.setattr(attention, "current_device", lambda: Device("gpu", (9, 0)))
    monkeypatch.setattr(matmul, "current_device", lambda: Device("gpu", (9, 0)))
    inside = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    if hasattr(inside, "check_cudnn_version"):
        monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)


def recipe(name: str, length: int, **changes: Any) -> Config:
    """Return the config of a recipe with few layers, a small vocabulary and rows of `length` tokens."""
    config = resolve(importlib.import_module(f"configs.{name}").get_config())
    small = {"model.n_layers": N_LAYERS, "model.vocab_size": 512, "model.context_length": length}
    return replace_paths(config, {**small, "model.remat": "none", **changes})


def traced_gradient(config: Config) -> Any:
    """Return the traced gradient of the loss of a batch."""
    model = config.model

    def loss(params: Any, batch: Any) -> jax.Array:
        return loss_sums(params, batch, model, None, config.training.loss_chunk_size).objective

    return jax.jit(jax.grad(loss)).trace(parameter_shapes(model), batch_shapes(ROWS, model.context_length))


def saved_arrays(config: Config) -> list[tuple[tuple[int, ...], str]]:
    """Return the shape, for one layer, and the type of each array that the scan over layers saves."""
    traced = traced_gradient(config)
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    loops = [operation for operation in operations(module.operation) if operation.name == "stablehlo.while"]
    results = [(result, ir.RankedTensorType(result.type)) for loop in loops for result in loop.results]
    return [
        (tuple(kind.shape[1:]), str(kind.element_type))
        for result, kind in results
        if kind.rank and kind.shape[0] == N_LAYERS and any(use.owner.name == "stablehlo.while" for use in result.uses)
    ]


def operations(parent: Any) -> Iterator[Any]:
    for block in (block for region in parent.regions for block in region):
        for operation in block:
            yield operation.operation
            yield from operations(operation.operation)


@pytest.mark.usefixtures("_nvidia_gpu")
@pytest.mark.parametrize(
    ("name", "length", "remat", "largest"),
    [
        ("gpt2_124m", 1024, "none", 26.1),
        ("gpt2_124m", 4096, "none", 26.1),
        ("gpt2_124m", 1024, "dots_no_batch", 18.0),
        ("llama3_8b", 8192, "none", 29.1),
        ("llama3_8b", 8192, "dots_no_batch", 21.0),
    ],
)
def test_bytes_saved_per_token_and_channel(name: str, length: int, remat: str, largest: float) -> None:
    config = recipe(name, length, **{"model.remat": remat})
    tokens, width = ROWS * length, config.model.d_model
    saved = saved_arrays(config)
    size = sum(math.prod(shape) * ITEM_BYTES[kind] for shape, kind in saved) / (tokens * width)
    assert size <= largest <= 34, saved
    for shape, kind in saved:
        assert ROWS in shape and length in shape, f"not activations, so parameters: {shape}"
        assert kind == "bf16" or math.prod(shape) <= tokens * config.model.attention.n_heads, (shape, kind)


@pytest.mark.usefixtures("_nvidia_gpu")
@pytest.mark.parametrize("remat", ["none", "dots_no_batch", "full"])
def test_weights_are_cast_once_in_each_pass(remat: str) -> None:
    # Each cast gathers weights that are sharded over devices.
    config = recipe("gpt2_124m", 1024, **{"model.remat": remat})
    kernel = (config.model.d_model, 4 * config.model.d_model)
    casts = [
        times
        for equation, times in equations(traced_gradient(config).jaxpr.jaxpr)
        if equation.primitive.name == "convert_element_type"
        and (equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype) == (kernel, jnp.bfloat16)
    ]
    assert casts == [N_LAYERS, N_LAYERS]


# Gradients of what is recomputed.


def plain_norm(name: str, x: jax.Array, scale: jax.Array, eps: Any) -> jax.Array:
    """Return a norm without a bias by its textbook formula."""
    centered = x - jnp.mean(x, -1, keepdims=True) if name == "layernorm" else x
    mean_square = jnp.mean(centered**2, -1, keepdims=True)
    return centered / jnp.sqrt(mean_square + eps) * (scale + 1 if name == "zero_centered_rmsnorm" else scale)[None]


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norms_match_their_formulas(name: str) -> None:
    rng = np.random.default_rng(0)
    x, scale, grad_y = rng.normal(3, 2, (4, 7)), rng.normal(1, 1, 7), rng.normal(0, 1, (4, 7))
    with jax.enable_x64(True):

        def apply(x: Any, scale: Any, eps: Any) -> jax.Array:
            norm = NORMS[name](replace_paths(ModelConfig(dtype="float64"), {"norm_eps": eps}))
            return norm.apply({"params": {"scale": scale}}, x)

        def gradients(function: Any) -> Any:
            value, transpose = jax.vjp(function, *map(jnp.asarray, (x, scale, 0.1)))
            return value, *transpose(jnp.asarray(grad_y))

        for found, expected in zip(gradients(apply), gradients(lambda *xs: plain_norm(name, *xs)), strict=True):
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
        # A population has a value of eps for each trial.
        batched = jax.vmap(jax.grad(lambda *xs: jnp.sum(apply(*xs)[0])), (None, None, 0))(
            x, scale, jnp.array([0.1, 2.0])
        )
        alone = [jax.grad(lambda *xs: jnp.sum(apply(*xs)[0]))(x, scale, eps) for eps in (0.1, 2.0)]
        np.testing.assert_allclose(batched, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in FEEDFORWARDS if name != "moe"])
def test_gradients_of_feedforwards_match_central_differences(name: str) -> None:
    rng = np.random.default_rng(0)
    model = ModelConfig(dtype="float64", d_model=5, d_ff=6, bias=True, save_residuals=False)
    with jax.enable_x64(True):
        layer = FEEDFORWARDS[name](model)
        x = jnp.asarray(rng.normal(0, 1, (1, 3, 5)))
        shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x)["params"])
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 1, leaf.shape)), shapes)
        weights = rng.normal(0, 1, (1, 3, 5))

        @jax.jit
        def total(x: jax.Array, params: Any) -> jax.Array:
            return jnp.sum(weights * layer.apply({"params": params}, x))

        gradient = jax.grad(total, (0, 1))(x, params)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 1e-5, leaf.shape)), (x, params))
        ahead, behind = (jax.tree.map(lambda a, b, s=sign: a + s * b, (x, params), direction) for sign in (1, -1))
        slopes = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), (total(*ahead) - total(*behind)) / 2, rtol=1e-7)
