"""Intermediates: the outputs and gradients of every layer are measured, and the program is unchanged without them."""

import itertools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import random_params, small_config
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.config.schema import ModelConfig, partition
from rustgpt_jax.data.pipeline import Batch
from rustgpt_jax.model import block as block_module
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.block import Block, layer_groups
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.intermediates import HookPointInfo, grad_slots
from rustgpt_jax.model.kernels import attention
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.transformer import hook_points
from rustgpt_jax.pytrees import fingerprint_tree, format_fingerprint
from rustgpt_jax.reproduce.recorded_run import (
    ACTIVATION,
    ACTIVATION_GRADIENT,
    KINDS,
    PARAMETER,
    PARAMETER_GRADIENT,
    UPDATE,
    StepTensor,
    list_step_tensors,
)
from rustgpt_jax.training.train_step import (
    StepIntermediates,
    compiled_step_intermediates,
    init_state_from_params,
    step_intermediates,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROWS, LENGTH = 2, 10
SMALL: dict[str, Any] = {
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "model.context_length": 16,
    "model.attention.local_window": 4,
}


def batch(rows: int = ROWS, seed: int = 0, vocab_size: int = 61) -> Batch:
    """Return a batch with two documents per row, some padding, and some targets without loss."""
    rng = np.random.default_rng(seed)
    tokens_BS = rng.integers(0, vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    segments_BT = np.tile(np.repeat([1, 2, 0], [4, LENGTH - 5, 1]).astype(np.int32), (rows, 1))
    positions_BT = np.tile(np.r_[0:4, 0 : LENGTH - 4].astype(np.int32), (rows, 1))
    weights_BT = (rng.random((rows, LENGTH)) < 0.8).astype(np.float32) * (segments_BT > 0)
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], weights_BT, segments_BT, positions_BT)


def context_of(batch: Batch) -> BlockInputs:
    return BlockInputs(jnp.asarray(batch.positions_BT), jnp.asarray(batch.segments_BT))


def scalar(logits_BTV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(logits_BTV))


# Statistics of one tensor.


@given(st.data())
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tensor_stats_match_numpy(dtype: type, data: st.DataObject) -> None:
    ordinary = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    values = data.draw(st.lists(ordinary | st.sampled_from([np.nan, np.inf, -np.inf, 0.0]), min_size=6, max_size=6))
    x = np.array(values, np.float32).reshape(2, 3).astype(dtype)
    read = intermediates.unpack_stats(np.asarray(compiled_measured(x)))
    wide = x.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    assert read.nonfinite == wide.size - finite.size
    np.testing.assert_allclose(read.largest, np.max(np.abs(finite), initial=0), rtol=1e-6)
    np.testing.assert_allclose(read.norm, np.sqrt(np.sum(finite**2)), rtol=1e-5)
    assert format_fingerprint(*map(int, read.digest)) == fingerprint_tree({"x": x})["x"]


compiled_measured = jax.jit(intermediates.tensor_stats)


def test_probe_changes_neither_the_tensor_nor_its_gradient() -> None:
    def loss(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        watched, measured = intermediates.record_stats(x, slot)
        return jnp.sum(watched**3), measured

    x = jnp.linspace(-1.0, 2.0, 5)
    (of_x, of_slot), measured = jax.grad(loss, (0, 1), has_aux=True)(x, jnp.zeros(intermediates.N_STATS))
    np.testing.assert_array_equal(of_x, 3 * x**2)
    np.testing.assert_array_equal(of_slot, intermediates.tensor_stats(3 * x**2))
    np.testing.assert_array_equal(measured, intermediates.tensor_stats(x))


# Every layer, compared with a reference forward pass in which each tensor can be perturbed.


def perturbed(params: Any, moves: dict[str, jax.Array], batch: Batch, model: ModelConfig) -> Any:
    """Return the loss with an array added to each tensor, and the tensors, from a loop over layers in Python."""
    seen: dict[str, jax.Array] = {}

    def at(name: str, x: jax.Array) -> jax.Array:
        seen[name] = x + moves[name]
        return seen[name]

    x_BTD = at("embeddings", params["embedding"]["table"][batch.tokens_BT])
    index_of = {
        layer: (str(key), row) for key, each in enumerate(layer_groups(model)) for row, layer in enumerate(each.layers)
    }
    for layer in range(model.n_layers):
        key, row = index_of[layer]

        def move(call: Any, given: Any, named: Any, context: Any, layer: int = layer) -> Any:
            output = call(*given, **named)
            name = f"layers/{layer}/{'/'.join(context.module.path)}"
            if context.method_name != "__call__" or name not in moves:
                return output
            if isinstance(output, tuple):
                return (at(name, output[0]), *output[1:])
            return at(name, output)

        own = jax.tree.map(lambda leaf, row=row: leaf[row], params["blocks"][key])
        with nn.intercept_methods(move):
            x_BTD, _, _ = Block(model.block(layer)).apply({"params": own}, x_BTD, context_of(batch), None)
    if model.norm_placement != "post":
        x_BTD = NORMS[model.norm](model).apply({"params": params["norm"]}, x_BTD)
    logits_BTV = at("logits", transformer.logits(params, at("hidden", x_BTD), model))
    return scalar(logits_BTV), seen


def check(model: ModelConfig) -> None:
    """Check that all measurements are those of the tensors in `perturbed` and of their gradients."""
    params, read = random_params(model), batch()
    every = hook_points(model, ROWS, LENGTH)

    @jax.jit
    def measure(params: Any, grad_slots: intermediates.GradSlots) -> Any:
        def loss(grad_slots: intermediates.GradSlots) -> Any:
            logits_BTV, _, measured = transformer.apply_with_intermediates(
                params, read.tokens_BT, model, context_of(read), grad_slots
            )
            return scalar(logits_BTV), measured

        return jax.value_and_grad(loss, has_aux=True)(grad_slots)

    moves = {point.name: jnp.zeros(point.shape) for point in every}
    (expected_loss, expected), expected_gradients = jax.jit(
        jax.value_and_grad(lambda moves: perturbed(params, moves, read, model), has_aux=True)
    )(moves)
    (loss, forward), backward = measure(params, grad_slots(every))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    assert list(expected) == [] or set(expected) == set(moves)
    for measurements, arrays in ((forward, expected), (backward, expected_gradients)):
        for point in every:
            read_there = intermediates.unpack_stats(np.asarray(point.select(measurements)))
            array = np.asarray(arrays[point.name], np.float64)
            assert array.shape == point.shape and read_there.nonfinite == 0
            np.testing.assert_allclose(read_there.norm, np.linalg.norm(array), rtol=2e-3, atol=1e-6, err_msg=point.name)
            np.testing.assert_allclose(read_there.largest, np.abs(array).max(), rtol=2e-3, atol=1e-6)
            assert np.linalg.norm(array) > 0


def model_with(**changes: Any) -> ModelConfig:
    return small_config(**(SMALL | {f"model.{name}": value for name, value in changes.items()})).model


@pytest.mark.slow
def test_stacked_and_leftover_layers_are_measured() -> None:
    mixers = ("attention", "local_attention")
    check(
        model_with(n_layers=5, mixers=mixers, **{"attention.qk_norm": "head"}, norm_placement="sandwich", remat="full")
    )


# Pairs of a mixer and a feed-forward, in which all of both occur.
COUPLES = [
    pytest.param(mixer, feedforward, id=f"{mixer}-{feedforward}")
    for _, mixer, feedforward in zip(
        range(max(len(MIXERS), len(FEEDFORWARDS))), itertools.cycle(MIXERS), itertools.cycle(FEEDFORWARDS), strict=False
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "feedforward"), COUPLES)
def test_every_layer_is_measured(mixer: str, feedforward: str) -> None:
    check(model_with(n_layers=1, mixers=mixer, feedforwards=feedforward, **{"moe.n_experts": 4}, norm_placement="post"))


@pytest.mark.parametrize("mixer", MIXERS)
def test_hook_points_are_in_order_of_computation(mixer: str) -> None:
    model = model_with(n_layers=2, mixers=mixer, feedforwards="moe", norm_placement="pre")
    names = [point.name for point in hook_points(model, ROWS, LENGTH)]
    assert len(set(names)) == len(names)
    inside = [name for name in names if name.startswith("layers/0/mixer/")]
    assert len(inside) >= 4 and inside[-1] == "layers/0/mixer/output"
    around = ["embeddings", "layers/0/mixer_norm", inside[0], inside[-1], "layers/0/mixer_sum"]
    around += ["layers/0/feedforward_norm", "layers/0/feedforward", "layers/0/feedforward_sum", "layers/1/mixer_norm"]
    assert [name for name in names if name in around] == around and names[-2:] == ["hidden", "logits"]


CUSTOM_LAYER = """
import flax.linen as nn
import jax, jax.numpy as jnp
from rustgpt_jax.model.layers import Linear
from rustgpt_jax.model.intermediates import HookPoint

class Custom(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, inputs):
        twice = Linear(self.config, self.config.d_model, name="twice")
        x_BTD = twice(jnp.tanh(twice(x_BTD)))
        angle = HookPoint(name="angle")(3 * x_BTD)
        many = nn.vmap(Linear, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        again = nn.remat(Linear)(self.config, self.config.d_model, name="again")
        return jnp.sin(angle) + jnp.sum(many(self.config, 16, name="many")(x_BTD), axis=0) + again(x_BTD), {}
"""


def test_custom_layer_is_measured_without_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_layer.py").write_text(CUSTOM_LAYER)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = model_with(n_layers=2, feedforwards="custom_layer:Custom")
    found = {point.path: point for point in hook_points(model, ROWS, LENGTH) if point.layer == 1}
    inside = [name for name in found if name.startswith("feedforward") and "_" not in name]
    # Linear layers under vmap have many outputs, so only what is computed from them is a hook point.
    kinds = ["twice", "twice:2", "angle", "again"]
    assert inside == [*(f"feedforward/{kind}" for kind in kinds), "feedforward"]
    params, read, every = random_params(model), batch(), hook_points(model, ROWS, LENGTH)
    _, _, measured = transformer.apply_with_intermediates(
        params, read.tokens_BT, model, context_of(read), grad_slots(every)
    )
    norms = {name: intermediates.unpack_stats(np.asarray(point.select(measured))).norm for name, point in found.items()}
    np.testing.assert_allclose(norms["feedforward/angle"], 3 * norms["feedforward/twice:2"], rtol=1e-5)


# Without intermediates.


def lowered(model: ModelConfig) -> str:
    params, read = random_params(model), batch()

    def loss(params: Any) -> jax.Array:
        inputs = context_of(read)._asdict()
        del inputs["dropout_key"], inputs["layer"], inputs["first_key_BT"]
        return scalar(transformer.apply(params, read.tokens_BT, model, **inputs)[0])

    return jax.jit(jax.value_and_grad(loss)).lower(params).as_text()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_without_intermediates_is_unchanged(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(n_layers=3, mixers=("attention", "latent_attention"), feedforwards="moe", remat=remat)
    with_code = lowered(model)
    monkeypatch.setattr(
        intermediates,
        "apply_block",
        lambda block, params, grad_slots, *rest: (block.apply({"params": params}, *rest), {}),
    )
    for module in (attention, block_module):
        monkeypatch.setattr(module, "HookPoint", lambda name: lambda x: x)
    assert lowered(model) == with_code


# A whole step.


def prepare_step(**changes: Any) -> tuple[Any, Any, Batch, Any]:
    """Return the program, a state at step 5, a batch, and the config."""
    config = small_config(**(SMALL | {"model.n_layers": 2, "training.batch_size": 4} | changes))
    program = partition(config)
    params = jax.tree.map(jnp.asarray, random_params(config.model))
    return program, init_state_from_params(*program, params)._replace(step=jnp.int32(5)), batch(4), config


def measure_step(program: Any, state: Any, read: Batch) -> tuple[StepIntermediates, list[StepTensor]]:
    _, report = compiled_step_intermediates(program[0], state, read, program[1])
    return report, list_step_tensors(program, state.params, report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"training.grad_accum_steps": 2},
        pytest.param(
            {
                "model.mixers": ("attention", "deltanet"),
                "model.feedforwards": "moe",
                "model.scan_layers": False,
                "model.n_layers": 3,
                "model.dropout": 0.2,
                "training.z_loss": 0.01,
            },
            marks=(pytest.mark.slow, pytest.mark.long),
        ),
    ],
    ids=["parts", "kinds"],
)
def test_measured_step_is_the_training_step(changes: dict[str, Any]) -> None:
    program, state, read, config = prepare_step(**changes)
    after, metrics = jax.jit(train_step, static_argnums=0)(program[0], state, read, program[1])
    same, _ = compiled_step_intermediates(program[0], state, read, program[1])
    report, found = measure_step(program, state, read)
    np.testing.assert_allclose(same.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(same.gradient_norm, metrics.gradient_norm, rtol=1e-4)
    total = np.sum(np.where(read.weights_BT > 0, report.losses_BT, 0)) / read.weights_BT.sum()
    np.testing.assert_allclose(total, metrics.loss, rtol=1e-5)

    order = [KINDS.index(tensor.kind) for tensor in found]
    assert order == sorted(order)
    of = {kind: [tensor for tensor in found if tensor.kind == kind] for kind in KINDS}
    assert [tensor.name for tensor in of[ACTIVATION_GRADIENT]] == [tensor.name for tensor in of[ACTIVATION]][::-1]
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    for kind in (PARAMETER, PARAMETER_GRADIENT, UPDATE):
        assert sum(tensor.size for tensor in of[kind]) == size
        assert len({tensor.name for tensor in of[kind]}) == len(of[kind])
    change = jax.tree.map(jnp.subtract, after.params, state.params)
    for kind, norm in (
        (PARAMETER, optax.tree.norm(state.params)),
        (PARAMETER_GRADIENT, metrics.gradient_norm),
        (UPDATE, optax.tree.norm(change)),
    ):
        np.testing.assert_allclose(np.sqrt(sum(tensor.norm**2 for tensor in of[kind])), norm, rtol=1e-3)
    named = {tensor.name: tensor for tensor in of[PARAMETER]}
    for index, stack in enumerate(layer_groups(config.model)):
        for row, layer in enumerate(stack.layers):
            array = state.params["blocks"][str(index)]["mixer"]["query"]["kernel"][row]
            tensor = named[f"layers/{layer}/mixer/query/kernel"]
            assert (tensor.fingerprint, tensor.size) == (fingerprint_tree({"x": array})["x"], array.size)


@pytest.mark.slow
def test_microbatches_are_measured_as_one_batch() -> None:
    _, whole = measure_step(*prepare_step()[:3])
    _, halves = measure_step(*prepare_step(**{"training.grad_accum_steps": 2})[:3])
    for one, two in zip(whole, halves, strict=True):
        assert (one.kind, one.name, one.size, one.nonfinite) == (two.kind, two.name, two.size, two.nonfinite)
        np.testing.assert_allclose(two.norm, one.norm, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(two.largest, one.largest, rtol=1e-3, atol=1e-7)


def test_parameters_are_in_order_of_use() -> None:
    program, state, read, _ = prepare_step(**{"model.positions": "learned", "model.tie_embeddings": False})
    _, shapes = jax.eval_shape(lambda: step_intermediates(program[0], state, read, program[1]))
    report = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    names = [each.name for each in list_step_tensors(program, state.params, report) if each.kind == PARAMETER]
    assert names[:2] == ["embedding/table", "positions/table"] and names[-2:] == ["norm/scale", "head/kernel"]
    second = [name.removeprefix("layers/1/") for name in names if name.startswith("layers/1/")]
    mixer = ["mixer_norm/scale", *(f"mixer/{name}/kernel" for name in ("query", "key", "value", "output"))]
    feedforward = ["feedforward_norm/scale", *(f"feedforward/{name}/kernel" for name in ("gate", "up", "down"))]
    assert second == [*mixer, *feedforward]


def test_nonfinite_elements_are_counted_where_they_arise() -> None:
    model = model_with(n_layers=3)
    params = random_params(model)
    params["blocks"]["0"]["mixer"]["key"]["kernel"][1, 0, 0] = np.nan
    read, every = batch(), hook_points(model, ROWS, LENGTH)
    _, _, measured = transformer.apply_with_intermediates(
        params, read.tokens_BT, model, context_of(read), grad_slots(every)
    )
    bad = [point.name for point in every if intermediates.unpack_stats(np.asarray(point.select(measured))).nonfinite]
    assert bad[0] == "layers/1/mixer/key"
    key = next(point for point in every if point.name == bad[0])
    assert intermediates.unpack_stats(np.asarray(key.select(measured))).nonfinite == ROWS * LENGTH
    assert "layers/1/mixer/value" not in bad and bad[-1] == "logits"


def test_hook_points_have_names() -> None:
    point = HookPointInfo("mixer/key", (2, 3), 4, "1", 2)
    assert (point.name, point.size) == ("layers/4/mixer/key", 6)
