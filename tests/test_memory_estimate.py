"""Rematerialization policies, and the estimate of the memory that a train step needs."""

import types
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params, small_config

from rustgpt_jax.config.schema import FIELDS, Config
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.errors import UserError
from rustgpt_jax.evaluation.loss import loss_sums
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_bytes, total_size
from rustgpt_jax.training.memory_estimate import batch_shapes, residual_bytes, state_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH = 4, 32


def saved_bytes(**changes: Any) -> int:
    config = small_config(**{"model.n_layers": 4} | changes)
    return residual_bytes(config, config.model.context_length)


def batch_of() -> Batch:
    """Return sequences of one document each, with loss for every token."""
    tokens = np.random.default_rng(0).integers(0, 61, (ROWS, LENGTH), np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), np.ones_like(tokens), places)


def gradient_of(config: Config) -> Any:
    """Return the gradient of the summed loss as a compiled function of parameters and batch."""

    def loss(params: Any, batch: Batch) -> Any:
        return loss_sums(params, batch, config.model, None, config.training.loss_chunk_size).objective

    return jax.jit(jax.grad(loss))


def test_remat_choices_are_the_policies() -> None:
    assert set(FIELDS["model.remat"].metadata["choices"]) == {"none", *transformer.REMAT_POLICIES}


@pytest.mark.slow
def test_remat_policies_give_the_same_gradients() -> None:
    gradients = {}
    for remat in ("none", "dots_no_batch", "offload"):
        config = small_config(**{"model.remat": remat, "model.d_model": 16, "model.attention.n_heads": 2})
        gradient = gradient_of(config)
        params = random_params(config.model)
        gradients[remat] = gradient(params, batch_of())
        on_gpu = gradient.trace(params, batch_of()).lower(lowering_platforms=("cuda",)).as_text()
        assert ("pinned_host" in on_gpu) == (remat == "offload")
    for remat in ("dots_no_batch", "offload"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[remat], gradients["none"]
        )


def test_remat_offload_requires_pinned_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(platform="abacus", addressable_memories=lambda: memories)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(
        UserError, match=r"remat='offload' needs .* pinned_host memory, and abacus has none; 'dots_no_batch'"
    ):
        transformer.remat_policy("offload")
    assert transformer.remat_policy("dots_no_batch") is transformer.REMAT_POLICIES["dots_no_batch"]


def test_residual_bytes_counts_what_each_policy_saves() -> None:
    policies = [saved_bytes(**{"model.remat": remat}) for remat in ("full", "dots_no_batch", "dots", "none")]
    assert policies == sorted(set(policies))
    assert saved_bytes(**{"model.remat": "offload"}) == saved_bytes(**{"model.remat": "full"})


def test_residual_bytes_counts_the_logits_of_a_chunk() -> None:
    large = {"model.vocab_size": 5000}
    whole, half, eighth = (
        saved_bytes(**large, **{"training.loss_chunk_size": chunk})
        for chunk in (None, ROWS * LENGTH // 2, ROWS * LENGTH // 8)
    )
    logits = ROWS * LENGTH * 5000 * 4
    # The logits and their gradient.
    assert half - eighth == 2 * 3 * logits // 8
    assert eighth < whole - logits / 2
    assert saved_bytes(**large, **{"training.loss_chunk_size": 1000}) == whole


@pytest.mark.parametrize("chunk", [None, 32])
def test_residual_bytes_is_within_a_factor_of_two(chunk: int | None) -> None:
    config = small_config(**{"model.vocab_size": 5000, "model.d_model": 16, "training.loss_chunk_size": chunk})
    program = gradient_of(config).lower(parameter_shapes(config.model), batch_shapes(ROWS, LENGTH)).compile()
    needed = program.memory_analysis()
    assert needed is not None
    assert 0.5 < residual_bytes(config, LENGTH) / needed.temp_size_in_bytes < 2


def test_bfloat16_first_moments_take_half_the_bytes() -> None:
    def moments(state_dtype: str) -> int:
        return total_bytes(state_shapes(small_config(**{"optimizer.state_dtype": state_dtype})).opt_state)

    parameters = total_size(parameter_shapes(small_config().model))
    assert moments("float32") - moments("bfloat16") == 2 * parameters
