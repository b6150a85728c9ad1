"""Mixture of experts against a loop over tokens, its capacity, and its metrics and losses."""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import flops, moe
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kernels import Device
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.moe import route
from rustgpt_jax.planning.estimate import count_matmul_flops
from rustgpt_jax.planning.hlo import parse_hlo

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROWS, LENGTH, EXPERTS, WIDTH, HIDDEN = 3, 10, 4, 8, 6
# The last row has two documents and ends in padding.
SEGMENTS_BT = np.array([[1] * 10, [1] * 7 + [0] * 3, [1] * 4 + [2] * 6], np.int32)


def model_config(**changes: Any) -> ModelConfig:
    knobs = {"d_model": WIDTH, "attention.n_heads": 2, "moe.n_experts": EXPERTS, "moe.d_expert": HIDDEN, **changes}
    return small_config(**{f"model.{name}": value for name, value in knobs.items()}).model


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"router": (WIDTH, EXPERTS), "gate": (EXPERTS, WIDTH, HIDDEN), "up": (EXPERTS, WIDTH, HIDDEN)}
    shapes["down"] = (EXPERTS, HIDDEN, WIDTH)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def inputs(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)


@partial(jax.jit, static_argnames="model")
def feed(params: Any, x_BTD: np.ndarray, model: ModelConfig) -> Any:
    inputs = BlockInputs(np.broadcast_to(np.arange(LENGTH), SEGMENTS_BT.shape), SEGMENTS_BT)
    return FEEDFORWARDS["moe"](model).apply({"params": params}, x_BTD, inputs)


def expert(x_D: np.ndarray, params: Any, index: int) -> np.ndarray:
    gate, up = x_D @ params["gate"][index], x_D @ params["up"][index]
    return (gate / (1 + np.exp(-gate)) * up) @ params["down"][index]


def in_a_loop(params: Any, x_BTD: np.ndarray, model: ModelConfig) -> tuple[np.ndarray, dict[str, float]]:
    """Outputs and layer metrics in float64. Experts take the tokens of a row in order, up to their capacity."""
    params = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    y_BTD = np.zeros(x_BTD.shape)
    chosen, mean, entropy, squares, n_tokens, n_dropped = np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0, 0.0, 0, 0
    for row in range(ROWS):
        n_asked = np.count_nonzero(SEGMENTS_BT[row]) * model.moe.experts_per_token
        free = [
            math.ceil(model.moe.capacity_factor * n_asked / EXPERTS) if model.moe.capacity_factor else LENGTH
        ] * EXPERTS
        for t in range(LENGTH):
            logits = x_BTD[row, t].astype(np.float64) @ params["router"]
            odds = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-odds)[: model.moe.experts_per_token]
            if SEGMENTS_BT[row, t] == 0:
                # The output of padding is not read, and padding uses no capacity.
                y_BTD[row, t] = np.nan
                continue
            n_tokens += 1
            mean += odds
            entropy -= (odds * np.log(odds)).sum()
            squares += np.log(np.exp(logits).sum()) ** 2
            for index in best:
                chosen[index] += 1
                if free[index] == 0:
                    n_dropped += 1
                    continue
                free[index] -= 1
                weight = odds[index] / (odds[best].sum() if model.moe.norm_topk_prob else 1)
                y_BTD[row, t] += weight * expert(x_BTD[row, t], params, index)
    balance = EXPERTS * (chosen / n_tokens * mean / n_tokens).sum()
    return y_BTD, {
        "load_balance_loss": balance,
        "router_entropy": entropy / n_tokens,
        "busiest_expert": chosen.max() / n_tokens / model.moe.experts_per_token,
        "dropped": n_dropped / n_tokens / model.moe.experts_per_token,
        "auxiliary_loss": model.moe.load_balance_loss_weight * balance + model.moe.router_z_loss * squares / n_tokens,
    }


@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0, 10.0])
@pytest.mark.parametrize(("top", "normalize"), [(2, True), (1, False), (3, False)])
def test_outputs_and_metrics_match_a_loop_over_tokens(capacity: float, top: int, normalize: bool) -> None:
    model = model_config(
        **{
            "moe.capacity_factor": capacity,
            "moe.experts_per_token": top,
            "moe.norm_topk_prob": normalize,
            "moe.load_balance_loss_weight": 0.3,
            "moe.router_z_loss": 0.2,
        },
    )
    params, x_BTD = parameters(), inputs()
    expected_BTD, expected = in_a_loop(params, x_BTD, model)
    y_BTD, layer_metrics = feed(params, x_BTD, model)
    is_token_BT = SEGMENTS_BT > 0
    np.testing.assert_allclose(np.asarray(y_BTD)[is_token_BT], expected_BTD[is_token_BT], rtol=1e-4, atol=1e-5)
    assert {name: float(value) for name, value in layer_metrics.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (expected["dropped"] > 0) == (capacity in (0.5, 1.0))


def test_full_capacity_matches_no_capacity() -> None:
    params, x_BTD = parameters(), inputs()
    dropless, _ = feed(params, x_BTD, model_config())
    roomy, _ = feed(params, x_BTD, model_config(**{"moe.capacity_factor": 2.0 * EXPERTS}))
    is_token_BT = SEGMENTS_BT > 0
    np.testing.assert_allclose(np.asarray(roomy)[is_token_BT], np.asarray(dropless)[is_token_BT], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_padding_uses_no_capacity() -> None:
    model, x_BTD = model_config(**{"moe.capacity_factor": 0.5}), inputs()

    def fed(x_BTD: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
        inputs = BlockInputs(np.zeros_like(segments_BT), segments_BT)
        return np.asarray(FEEDFORWARDS["moe"](model).apply({"params": parameters()}, jnp.asarray(x_BTD), inputs)[0])

    padded = fed(x_BTD, np.array([[1] * 6 + [0] * 4] * ROWS))
    np.testing.assert_allclose(padded[:, :6], fed(x_BTD[:, :6], np.ones((ROWS, 6), int)), rtol=1e-5, atol=1e-6)


def test_balanced_load_balance_loss_is_experts_per_token() -> None:
    params = parameters() | {"router": np.zeros((WIDTH, EXPERTS), np.float32)}
    _, layer_metrics = feed(
        params, inputs(), model_config(**{"moe.experts_per_token": EXPERTS, "moe.load_balance_loss_weight": 0.0})
    )
    assert float(layer_metrics["load_balance_loss"]) == pytest.approx(EXPERTS)
    assert float(layer_metrics["router_entropy"]) == pytest.approx(math.log(EXPERTS))
    assert "auxiliary_loss" not in layer_metrics


# Grouped products.

KERNELS = ("blocked", "ragged_dot")
TRIALS = 3


def process_all(params: Any, x_BTD: jax.Array, model: ModelConfig) -> jax.Array:
    """Return the output of the layer when every expert processes every token."""
    hidden_BTXF = jax.nn.silu(jnp.einsum("BTD,XDF->BTXF", x_BTD, params["gate"]))
    hidden_BTXF = hidden_BTXF * jnp.einsum("BTD,XDF->BTXF", x_BTD, params["up"])
    weight_BTX = route(x_BTD @ params["router"], model).weight_BTX
    return jnp.einsum("BTXF,XFD,BTX->BTD", hidden_BTXF, params["down"], weight_BTX)


def gradients(apply: Any, model: ModelConfig) -> Any:
    """Return a function of parameters and inputs that returns an output, and gradients with respect to both."""

    def loss(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BTD = apply(params, x_BTD, model)
        return jnp.sum(jnp.sin(3 * y_BTD)), y_BTD

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


def process_sorted(params: Any, x_BTD: jax.Array, model: ModelConfig) -> jax.Array:
    """Return the output of the layer."""
    segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    return FEEDFORWARDS["moe"](model).apply({"params": params}, x_BTD, BlockInputs(segments_BT, segments_BT))[0]


@pytest.mark.parametrize(("kernel", "shape"), [("blocked", (1, 1)), ("blocked", (2, 300)), ("ragged_dot", (2, 300))])
def test_sorted_tokens_match_all_experts_in_float64(kernel: str, shape: tuple[int, int]) -> None:
    with jax.enable_x64(True):
        model = dataclasses.replace(
            model_config(**{"moe.kernel": kernel, "moe.norm_topk_prob": False}), dtype="float64"
        )
        params = {name: leaf.astype(np.float64) for name, leaf in parameters().items()}
        # Some experts of the last shape have more than a block of tokens, and one has none.
        params["router"][:, 3] = -9 * np.abs(params["router"][:, 3]).max()
        x_BTD = np.abs(np.random.default_rng(2).standard_normal((*shape, WIDTH)))
        (_, y_BTD), found = jax.jit(gradients(process_sorted, model))(params, x_BTD)
        (_, expected_BTD), expected = jax.jit(gradients(process_all, model))(params, x_BTD)
    assert y_BTD.dtype == np.float64
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-9, atol=1e-11)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), found, expected)
    assert not found[0]["gate"][3].any() and found[0]["gate"][:3].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_trials_under_vmap_are_groups_of_one_product(kernel: str) -> None:
    model = model_config(**{"moe.kernel": kernel})
    trials = [parameters(seed) for seed in range(TRIALS)]
    params_P = jax.tree.map(lambda *leaves: np.stack(leaves), *trials)
    compute = gradients(process_sorted, model)
    together = jax.vmap(compute, in_axes=(0, None))
    found = jax.jit(together)(params_P, inputs())
    for trial, params in enumerate(trials):
        alone = jax.jit(compute)(params, inputs())
        one = jax.tree.map(lambda leaf, trial=trial: leaf[trial], found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, alone)
    loops_or_products = {"blocked": ("scan", 2 * 3), "ragged_dot": ("ragged_dot_general", 3 * 3)}
    name, count = loops_or_products[kernel]
    program = jax.make_jaxpr(together)(params_P, inputs())
    used = [equation for equation, _ in flops.equations(program.jaxpr) if equation.primitive.name == name]
    assert len(used) == count
    for equation in used:
        assert all(leaf.aval.shape[0] != TRIALS for leaf in (*equation.invars, *equation.outvars) if leaf.aval.shape)


def traced_gradients(model: ModelConfig, shape: tuple[int, int]) -> Any:
    shapes = {"router": (64, 16), "gate": (16, 64, 96), "up": (16, 64, 96), "down": (16, 96, 64)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    compute = gradients(process_sorted, model)
    return jax.jit(compute).trace(params, jax.ShapeDtypeStruct((*shape, 64), model.dtype))


def test_cost_is_that_of_the_used_experts_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "current_device", lambda: Device("gpu", (9, 0)))
    changes = {"d_model": 64, "moe.n_experts": 16, "moe.d_expert": 96, "dtype": "bfloat16", "save_residuals": False}
    traced = traced_gradients(model_config(**changes), (16, 4096))
    n_tokens = 16 * 4096
    used = 2 * n_tokens * (3 * 2 * 64 * 96 + 64 * 16)
    assert used < flops.matmul_flops(traced.jaxpr.jaxpr) / 3 < 1.3 * used
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" not in text and "custom_call" not in text
    # At most a row for each token and expert of it, and the rows of padding.
    sizes = [math.prod(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<((?:\d+x)+)\w+>", text)]
    assert n_tokens * 2 * 96 < max(sizes) < 1.3 * n_tokens * 2 * 96 < n_tokens * 16 * 96


def test_cost_is_that_of_the_used_experts_in_compiled_programs() -> None:
    changes = {"d_model": 64, "moe.n_experts": 16, "moe.d_expert": 96}
    traced = traced_gradients(model_config(**changes), (4, 256))
    found = count_matmul_flops(parse_hlo(traced.lower().compile().as_text() or ""))
    all_experts = 3 * 3 * 2 * (4 * 256) * 64 * 16 * 96
    assert found < all_experts / 5


def test_tpus_use_ragged_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "current_device", lambda: Device("tpu"))
    model = model_config(**{"d_model": 64, "moe.n_experts": 16, "moe.d_expert": 96})
    text = traced_gradients(model, (4, 256)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count('chlo.ragged_dot"') == 9 and "while" not in text


def test_balance_loss_trains_only_the_router() -> None:
    def loss(params: Any) -> jax.Array:
        return feed(params, inputs(), model_config(**{"moe.load_balance_loss_weight": 1.0}))[1]["auxiliary_loss"]

    gradient = jax.grad(loss)(parameters())
    assert np.abs(gradient["router"]).max() > 1e-4
    assert all(not np.any(gradient[name]) for name in ("gate", "up", "down"))


@pytest.mark.oracle
@pytest.mark.parametrize("top", [1, 2, 3])
def test_load_balance_loss_matches_transformers(top: int) -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    params, x_BTD = parameters(), inputs()
    _, layer_metrics = feed(params, x_BTD, model_config(**{"moe.experts_per_token": top, "moe.norm_topk_prob": False}))
    router_logits = torch.tensor((x_BTD @ params["router"]).reshape(-1, EXPERTS))
    expected = mixtral.load_balancing_loss_func((router_logits,), EXPERTS, top, torch.tensor((SEGMENTS_BT > 0) * 1))
    assert float(layer_metrics["load_balance_loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("top", "normalize"), [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_outputs_train_the_router(top: int, normalize: bool, capacity: float) -> None:
    model = model_config(
        **{"moe.experts_per_token": top, "moe.norm_topk_prob": normalize, "moe.capacity_factor": capacity}
    )
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(feed(params, inputs(), model)[0])))(parameters())
    assert np.abs(gradient["router"]).max() > 1e-2


def test_one_normalized_expert_per_token_is_rejected() -> None:
    knobs = {"feedforwards": ("moe",), "moe.experts_per_token": 1}
    with pytest.raises(UserError, match="--config.model.moe.norm_topk_prob=False"):
        model_config(**knobs)
    assert model_config(**knobs, **{"moe.norm_topk_prob": False}).moe.experts_per_token == 1
