"""Chunked loss: the same sums and gradients, without all logits in memory."""

import dataclasses
import math
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config

from rustgpt_jax.config.schema import Config, combine, partition
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.evaluation.loss import chunk_size, eval_loss_sums, loss_sums, total_loss
from rustgpt_jax.model.flops import equations, parameter_shapes
from rustgpt_jax.training.memory_estimate import batch_shapes
from rustgpt_jax.training.train_step import gradient

pytestmark = pytest.mark.usefixtures("quick_codegen")

# No other array of a step has as many elements as all logits.
LENGTH, VOCABULARY, ROWS = 12, 251, 4
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model.final_logit_softcap": 5.0},
    "untied": {"model.tie_embeddings": False, "model.dtype": "bfloat16"},
    "moe": {"model.feedforwards": ("moe",), "model.moe.n_experts": 4},
}


def tiny(**changes: Any) -> Config:
    sizes = {"n_layers": 1, "d_model": 16, "attention.n_heads": 2, "context_length": LENGTH, "vocab_size": VOCABULARY}
    return small_config(**{f"model.{name}": size for name, size in sizes.items()} | changes)


def batch_of(rows: int = ROWS) -> Batch:
    """Random tokens, of which a ragged share is learned, with weights of their own; in the first row none."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCABULARY, (2, rows, LENGTH), np.int32)
    weights = rng.random((rows, LENGTH), np.float32) * (rng.random((rows, LENGTH)) < 0.6)
    weights[0] = 0
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, weights.astype(np.float32), np.ones_like(tokens), places)


def loss_of(config: Config, chunk: int | None, params: Any, batch: Batch, softcap: Any = None) -> tuple[Any, Any]:
    """The mean loss with z-loss, and the sums that it is made of."""
    static, hparams = partition(config)
    model = combine(static, hparams | ({} if softcap is None else {"model.final_logit_softcap": softcap})).model
    sums = loss_sums(params, batch, model, None, chunk, z_loss=0.01)
    return total_loss(sums, sums.weight), sums


@cache
def found(name: str, chunk: int | None) -> Any:
    """The gradients and sums of a model."""
    config = tiny(**MODELS[name])
    return jax.jit(jax.grad(lambda params: loss_of(config, chunk, params, batch_of()), has_aux=True))(
        random_params(config.model)
    )


def assert_close(left: Any, right: Any, rtol: float = 2e-5, share: float = 2e-6) -> None:
    """Check that trees are equal except for rounding of each element and of the largest one of its array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=share * float(np.max(np.abs(b)))), left, right
    )


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        pytest.param("tied", 1, marks=pytest.mark.slow),
        ("tied", 5),
        pytest.param("untied", 20, marks=pytest.mark.slow),
        pytest.param("moe", 47, marks=pytest.mark.slow),
    ],
)
def test_chunked_loss_has_the_sums_and_gradients_of_the_whole(name: str, chunk: int) -> None:
    rounding = {"rtol": 0.02, "share": 0.01} if MODELS[name].get("model.dtype") == "bfloat16" else {}
    (gradients, sums), (expected, expected_sums) = found(name, chunk), found(name, None)
    assert_close(gradients, expected, **rounding)
    assert_close(sums, expected_sums)
    assert sums.weight > 1 and sums.loss > sums.weight


def test_chunks_scale_bfloat16_gradients_without_bias() -> None:
    # 1 / 43 is not exact in bfloat16: its rounding would scale the gradients of all layers but the last.
    config = tiny(**{"model.dtype": "bfloat16"})
    batch = batch_of()._replace(weights_BT=(np.arange(ROWS * LENGTH) < 43).astype(np.float32).reshape(ROWS, LENGTH))

    def gradients(chunk: int | None) -> Any:
        function = jax.grad(lambda params: loss_of(config, chunk, params, batch)[0])
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(function)(params)["blocks"])])

    params = random_params(config.model)
    whole, chunked = gradients(None), gradients(5)
    assert abs(chunked @ whole / (whole @ whole) - 1) < 5e-4


@pytest.mark.slow
def test_chunked_loss_supports_vmap_over_hyperparameters() -> None:
    config = tiny(**MODELS["tied"])
    params = [random_params(config.model, seed) for seed in range(2)]
    caps = np.array([0.5, 9.0], np.float32)

    def gradients(chunk: int | None, params: Any, cap: Any) -> Any:
        return jax.grad(lambda params: loss_of(config, chunk, params, batch_of(), cap)[0])(params)

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    many = jax.jit(jax.vmap(lambda params, cap: gradients(5, params, cap)))(stacked, caps)
    one = jax.jit(lambda params, cap: gradients(None, params, cap))
    assert_close(many, jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, params, caps)), rtol=1e-4, share=1e-5)


@pytest.mark.slow
def test_eval_loss_sums_supports_chunks_and_microbatches() -> None:
    model = tiny().model
    params = random_params(model)
    whole = eval_loss_sums(params, batch_of(), model)
    for chunk, n_parts in ((5, 1), (None, 2), (5, 2)):
        assert_close(eval_loss_sums(params, batch_of(), model, chunk, n_parts), whole)

    def temporary_bytes(n_parts: int) -> int:
        analysis = eval_loss_sums.lower(params, batch_of(64), model, None, n_parts).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(1) / 4


# Memory.


def largest(jaxpr: Any) -> int:
    """Return the number of elements of the largest array of a program."""
    return max(math.prod(out.aval.shape) for equation, _ in equations(jaxpr.jaxpr) for out in equation.outvars)


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_never_has_all_logits_in_memory(tied: bool) -> None:
    config = tiny(**{"model.tie_embeddings": tied})
    shapes = parameter_shapes(config.model), batch_shapes(ROWS, LENGTH)

    def largest_of_step(chunk: int | None) -> int:
        return largest(jax.make_jaxpr(jax.grad(lambda *given: loss_of(config, chunk, *given)[0]))(*shapes))

    assert largest_of_step(None) == ROWS * LENGTH * VOCABULARY
    # The logits of a chunk, or the output matrix. Five chunks have 10 of the 48 tokens each.
    assert largest_of_step(11) == max(10 * VOCABULARY, 16 * VOCABULARY)
    assert largest_of_step(24) == 24 * VOCABULARY


def test_logits_of_a_chunk_take_half_a_gibibyte_by_default() -> None:
    for vocabulary, tokens in ((50_304, 2048), (128_256, 1024), (65, 2**20), (2**30, 1)):
        assert chunk_size(None, dataclasses.replace(tiny().model, vocab_size=vocabulary)) == tokens
    assert chunk_size(7, tiny().model) == 7


def test_train_step_uses_chunked_loss() -> None:
    def gradients(chunk: int | None) -> Any:
        config = tiny(**{"training.loss_chunk_size": chunk, "training.grad_accum_steps": 2, "training.z_loss": 0.1})
        static, hparams = partition(config)

        def of(params: Any, batch: Batch) -> Any:
            return gradient(params, batch, combine(static, hparams), jax.random.key(0))[:2]

        assert largest(jax.make_jaxpr(of)(parameter_shapes(config.model), batch_shapes(ROWS, LENGTH))) == max(
            (chunk or ROWS // 2 * LENGTH) * VOCABULARY, 16 * VOCABULARY
        )
        return jax.jit(of)(random_params(config.model), batch_of())

    assert_close(gradients(6), gradients(None))
