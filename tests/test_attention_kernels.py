"""Attention kernels against brute force in float64; their selection, and the check before training."""

import importlib
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import gpt2_124m
from rustgpt_jax.config.schema import ModelConfig, is_enabled, partition, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import intermediates, transformer
from rustgpt_jax.model.flops import inner_programs
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.intermediates import grad_slots
from rustgpt_jax.model.kernels import (
    ANY_DEVICE,
    AttentionInputs,
    AttentionSpec,
    Device,
    attention,
    flash_attention,
    verify,
)
from rustgpt_jax.model.kernels.attention import (
    KERNELS,
    LONG,
    SHORT,
    KernelChoice,
    blockwise,
    reference_attention,
    select_kernel,
    triangular,
)
from rustgpt_jax.model.kernels.flash_attention import cudnn
from rustgpt_jax.model.kernels.verify import check_kernels, select_kernels
from rustgpt_jax.model.kv_cache import attention_mask, causal_mask
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.estimate import count_matmul_flops
from rustgpt_jax.sharding.sharding_plan import make_mesh
from rustgpt_jax.training.config_checks import validate_components
from rustgpt_jax.training.memory_estimate import batch_shapes, state_shapes
from rustgpt_jax.training.train_step import train_step

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROWS, LENGTH, CHANNELS = 2, 13, 8
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed documents": {"packed": True, "n_kv_heads": 2},
    "window": {"window": 4, "packed": True, "n_kv_heads": 1},
    "soft-cap": {"softcap": 1.5, "window": 40},
    "bias, sinks, two widths": {
        "bias": True,
        "sinks": True,
        "value_width": 5,
        "n_kv_heads": 2,
        "packed": True,
    },
}
over_cases = pytest.mark.parametrize("case", list(CASES))


def attention_inputs(
    length: int = LENGTH,
    *,
    n_heads: int = 4,
    n_kv_heads: int = 4,
    value_width: int = CHANNELS,
    window: int | None = None,
    softcap: float = 0.0,
    bias: bool = False,
    sinks: bool = False,
    packed: bool = False,
    dtype: Any = jnp.float32,
) -> AttentionInputs:
    """Random arrays; packed rows have two documents followed by padding."""
    rng = np.random.default_rng(0)
    segments_BT = np.ones((ROWS, length), np.int32)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (ROWS, 1))
    if packed:
        cut, end = length // 3, length - 2
        segments_BT[1, cut:end], segments_BT[1, end:] = 2, 0
        positions_BT[1, cut:] -= cut
    q_BTHC, k_BSKC, v_BSKC = (
        jnp.asarray(rng.standard_normal((ROWS, length, heads, channels)), dtype)
        for heads, channels in ((n_heads, CHANNELS), (n_kv_heads, CHANNELS), (n_kv_heads, value_width))
    )
    return AttentionInputs(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        BlockInputs(jnp.asarray(positions_BT), jnp.asarray(segments_BT)),
        window,
        0.4,
        softcap,
        slopes_times_distance if bias else None,
        jnp.asarray(rng.standard_normal(n_heads), jnp.float32) if sinks else None,
    )


def slopes_times_distance(queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """A bias that is not defined for later keys, which are never visible."""
    distance_BTS = (queries_BT[:, :, None] - keys_BS[:, None, :]).astype(jnp.float32)
    distance_BTS = jnp.where(distance_BTS < 0, jnp.nan, distance_BTS)
    return -jnp.asarray(SLOPES, jnp.float32)[None, :, None, None] * distance_BTS[:, None]


def brute_force(task: AttentionInputs, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in float64, one query of one head at a time: mixed (B, T, H, channels of values)."""
    positions, segments = (np.asarray(x) for x in task.block_inputs[:2])
    n_heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    mixed = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        if task.window is not None:
            seen = [s for s in seen if positions[b, t] - positions[b, s] < task.window]
        scores = np.array([task.scale * (q[b, t, h] @ k[b, s, h // groups]) for s in seen])
        if task.softcap:
            scores = task.softcap * np.tanh(scores / task.softcap)
        if task.bias:
            scores = scores - SLOPES[h] * (positions[b, t] - positions[b, seen])
        total = np.exp(scores).sum() + (math.exp(task.sinks_H[h]) if task.sinks_H is not None else 0.0)
        mixed[b, t, h] = np.exp(scores) / total @ v[b, seen, h // groups]
    assert n_heads == mixed.shape[2]
    return mixed


def check_against_brute_force(
    task: AttentionInputs, tolerance: float, *kernels: Callable[[AttentionInputs], jax.Array]
) -> None:
    """Compares values, and gradients along random directions of the queries, keys and values."""
    rng = np.random.default_rng(1)
    exact = [np.asarray(x, np.float64) for x in task[:3]]
    expected = brute_force(task, *exact)
    is_token = np.asarray(task.block_inputs.segments_BT)[:, :, None, None] > 0
    weights = jnp.asarray(rng.standard_normal(expected.shape) * is_token, task.v_BSKC.dtype)
    directions = [rng.standard_normal(x.shape) for x in exact]
    slopes = []
    for place, direction in enumerate(directions):
        moved = (
            [x + step * direction if index == place else x for index, x in enumerate(exact)] for step in (1e-5, -1e-5)
        )
        ahead, behind = (brute_force(task, *arrays) for arrays in moved)
        slopes.append(((ahead - behind) * np.asarray(weights, np.float64)).sum() / 2e-5)

    @partial(jax.jit, static_argnums=0)
    def both(attend: Callable[[AttentionInputs], jax.Array], *arrays: jax.Array) -> Any:
        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(task._replace(q_BTHC=q, k_BSKC=k, v_BSKC=v)).reshape(expected.shape)

        mixed, pullback = jax.vjp(forward, *arrays)
        return mixed, pullback(weights)

    for attend in kernels:
        mixed, gradients = both(attend, *task[:3])
        assert mixed.dtype == task.v_BSKC.dtype
        values = np.where(is_token, np.asarray(mixed, np.float64), expected)
        np.testing.assert_allclose(values, expected, atol=tolerance, err_msg=str(attend))
        found = [np.sum(np.asarray(each, np.float64) * of) for each, of in zip(gradients, directions, strict=True)]
        sizes = [np.sqrt(np.sum(np.asarray(each, np.float64) ** 2)) for each in gradients]
        # NaN must fail, so no assertion of numpy.testing.
        assert np.all(np.abs(np.subtract(found, slopes)) < tolerance * np.add(1, sizes)), (attend, found, slopes)


@over_cases
def test_kernels_match_brute_force_in_value_and_gradient(case: str) -> None:
    # 13 queries in blocks of 4, 4, 4 and 1.
    check_against_brute_force(
        attention_inputs(**CASES[case]), 2e-5, reference_attention, partial(blockwise, block=4), triangular
    )


@pytest.mark.parametrize("block", [1, 7, 512])
def test_blockwise_is_correct_for_any_block_size(block: int) -> None:
    check_against_brute_force(attention_inputs(packed=True, window=5), 2e-5, partial(blockwise, block=block))


@pytest.mark.parametrize("n_blocks", [1, 2, 5, 13, 20])
def test_triangular_is_correct_for_any_number_of_blocks(n_blocks: int) -> None:
    check_against_brute_force(attention_inputs(packed=True, window=5), 2e-5, partial(triangular, n_blocks=n_blocks))


@pytest.mark.parametrize(("window", "expected"), [(None, 10 / 16), (32, (1 + 3 * (63 / 32)) / 16)])
def test_triangular_skips_the_flops_of_masked_keys(window: int | None, expected: float) -> None:
    task = attention_inputs(128, window=window)

    def flops(attend: Callable[[AttentionInputs], jax.Array]) -> float:
        compiled = jax.jit(lambda q, k, v: attend(task._replace(q_BTHC=q, k_BSKC=k, v_BSKC=v))).lower(*task[:3])
        return count_matmul_flops(hlo.parse_hlo(compiled.compile().as_text()))

    assert flops(triangular) / flops(reference_attention) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_kernels_are_close_to_brute_force() -> None:
    task = attention_inputs(n_kv_heads=2, packed=True, window=5, dtype=jnp.bfloat16)
    check_against_brute_force(task, 0.05, reference_attention, partial(blockwise, block=4), triangular)


def largest_array(function: Callable[..., Any], *arguments: Any) -> int:
    """Number of elements of the largest array in a traced program and its inner programs."""

    def largest(program: Any) -> int:
        sizes = [math.prod(variable.aval.shape) for eqn in program.eqns for variable in eqn.outvars]
        return max([*sizes, *(largest(inner) for eqn in program.eqns for inner in inner_programs(eqn))], default=0)

    return largest(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("window", [None, 8])
def test_blockwise_never_materializes_all_scores(window: int | None) -> None:
    length, block, heads = 128, 16, 4
    task = attention_inputs(length, window=window)

    def gradient(attend: Callable[[AttentionInputs], jax.Array]) -> Callable[..., Any]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(task._replace(q_BTHC=q, k_BSKC=k, v_BSKC=v)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))

    keys = length if window is None else block + window - 1
    scores, arrays = ROWS * heads * block * keys, ROWS * length * heads * CHANNELS
    assert largest_array(gradient(partial(blockwise, block=block)), *task[:3]) <= max(scores, arrays)
    assert largest_array(gradient(reference_attention), *task[:3]) >= ROWS * heads * length**2


def test_blockwise_supports_vmap() -> None:
    task, caps_P = attention_inputs(n_kv_heads=2, packed=True, window=5), jnp.asarray([0.7, 3.0])
    q_PBTHC = jnp.stack([task.q_BTHC, 2 * task.q_BTHC])

    def value_and_gradient(q: jax.Array, cap: jax.Array) -> Any:
        return jax.value_and_grad(lambda q: blockwise(task._replace(q_BTHC=q, softcap=cap), block=4).sum())(q)

    together = jax.jit(jax.vmap(value_and_gradient))(q_PBTHC, caps_P)
    alone = [jax.jit(value_and_gradient)(q, cap) for q, cap in zip(q_PBTHC, caps_P, strict=True)]
    one_by_one = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), together, one_by_one)


# Masks.


@settings(max_examples=50)
@given(st.data())
def test_first_keys_describe_the_mask_of_documents_padding_and_windows(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from((1, 2, 7, 12)))
    rows = []
    for _ in range(2):
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=length))
        tokens = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
        rows.append(np.pad(tokens, (0, length - len(tokens))))
    window = data.draw(st.none() | st.integers(1, length + 1))
    segments_BT = np.stack(rows).astype(np.int32)
    # In a document, positions are consecutive.
    starts_BT = np.stack([[row.tolist().index(segment) for segment in row] for row in segments_BT])
    positions_BT = np.arange(length) - starts_BT
    order_T = np.arange(length)
    expected_BTS = (order_T[:, None] >= order_T) & (segments_BT[:, :, None] == segments_BT[:, None])
    if window is not None:
        expected_BTS &= positions_BT[:, :, None] - positions_BT[:, None] < window
    inputs = BlockInputs(jnp.asarray(positions_BT), jnp.asarray(segments_BT))
    np.testing.assert_array_equal(inputs.first_keys(), starts_BT)
    np.testing.assert_array_equal(causal_mask(inputs, window), expected_BTS)
    one_document_BTS = attention_mask(order_T, order_T, inputs.as_one_document().first_keys(), window)
    is_token_BT1 = segments_BT[..., None] > 0
    expected_TS = attention_mask(order_T, order_T, None, window)
    np.testing.assert_array_equal(one_document_BTS & is_token_BT1, expected_TS & is_token_BT1)


@pytest.mark.parametrize("kernel", ["reference", "triangular", "blockwise"])
def test_no_layer_saves_a_mask_for_the_backward_pass(kernel: str) -> None:
    model = model_config(n_layers=3, dropout=0.0, **{"attention.kernel": kernel, "attention.n_heads": 1})
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    segments_BT = jnp.ones((2, 24), jnp.int32)

    def loss(params: Any) -> jax.Array:
        return transformer.apply(params, tokens(), model, segments_BT=segments_BT)[0].sum()

    saved = jax.eval_shape(lambda params: jax.tree.leaves(jax.vjp(loss, params)[1]), params)
    assert saved and not [leaf for leaf in saved if leaf.dtype == bool and leaf.size >= 24 * 6]


@pytest.mark.parametrize("mixers", [("attention", "local_attention"), ("rg_lru", "latent_attention")])
def test_tokens_see_the_whole_row_without_mask_documents(mixers: tuple[str, ...]) -> None:
    model = model_config(mixers=mixers, **{"attention.local_window": 9})
    params, tokens_BT, index_T = random_params(model), tokens(), np.arange(24)
    alone = np.tile(index_T, (2, 1)), np.ones((2, 24), np.int32)
    packed = alone[0] % 10, np.stack([1 + index_T // 10, np.where(index_T < 20, 1 + index_T // 10, 0)])

    def logits(layout: tuple[np.ndarray, ...], mask_documents: bool) -> jax.Array:
        forward = jax.jit(partial(transformer.apply, model=replace_paths(model, {"mask_documents": mask_documents})))
        return forward(params, tokens_BT, positions_BT=layout[0], segments_BT=layout[1])[0]

    expected, got, apart = logits(alone, True), logits(packed, False), logits(packed, True)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(got[1, :20], expected[1, :20], atol=1e-6)
    assert np.max(np.abs(apart[0, 10:] - got[0, 10:])) > 1e-3


# Kernels of libraries, which are replaced by JAX's own attention here. Like them, the replacements cannot be batched,
# save their inputs and outputs for the backward pass, and are given positions as first keys, windows or a mask.

REAL_ATTENTION = jax.nn.dot_product_attention
FOR_LIBRARIES = {name: case for name, case in CASES.items() if not {"softcap", "bias", "value_width"} & set(case)}


def unbatchable(function: Callable[..., Any]) -> Callable[..., Any]:
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def refuse(*_: object) -> Any:
        raise AssertionError("a library's kernel cannot be batched")

    return call


class Mask(NamedTuple):
    """The mask of tokamax."""

    bool_mask: Any = None
    k_start: Any = None
    is_causal: bool = False


def opaque_attention(q: jax.Array, k: jax.Array, v: jax.Array, limits: dict[str, Any], **named: Any) -> jax.Array:
    """JAX's attention with the limitations of a library's kernel. `limits` are arrays with the rows as first axis."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, limits: dict[str, Any]) -> jax.Array:
        mask = limits.get("mask")
        if "k_start" in limits:
            assert limits["k_start"].shape == (len(q), 1, q.shape[1])
            mask = jnp.arange(q.shape[1])[None, None, None] >= limits["k_start"][..., None]
        return REAL_ATTENTION(q, k, v, mask=mask, implementation="xla", **named)

    def forward(*arrays: Any) -> Any:
        mixed = unbatchable(attend)(*arrays)
        return mixed, (arrays, mixed)

    def backward(saved: Any, cotangent: jax.Array) -> Any:
        (*qkv, limits), mixed = saved
        assert mixed.shape == cotangent.shape
        pull = unbatchable(lambda q, k, v, limits, g: jax.vjp(lambda *qkv: attend(*qkv, limits), q, k, v)[1](g))
        return (*pull(*qkv, limits, cotangent), None)

    call = jax.custom_vjp(unbatchable(attend))
    call.defvjp(forward, backward)
    return call(q, k, v, limits)


def opaque_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Any = None, **named: Any) -> jax.Array:
    assert named.pop("implementation") == "cudnn" and named["is_causal"]
    return opaque_attention(q, k, v, {} if mask is None else {"mask": mask}, **named)


def opaque_tokamax(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, logits_scale: float) -> jax.Array:
    limits = {"mask": mask.bool_mask, "k_start": mask.k_start}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    return opaque_attention(q, k, v, limits, scale=logits_scale, is_causal=mask.is_causal)


def tokamax_on(device: Device, inputs: AttentionInputs) -> jax.Array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "current_device", lambda: device)
        return flash_attention.tokamax(inputs)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes cuDNN and tokamax available on this device."""
    implementations = dict.fromkeys(("mosaic_gpu", "triton", "mosaic_tpu"), opaque_tokamax)
    api = SimpleNamespace(IMPLEMENTATIONS=implementations, base=SimpleNamespace(Mask=Mask))
    monkeypatch.setattr(jax.nn, "dot_product_attention", opaque_cudnn)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention.api", api)  # type: ignore[arg-type]


CPU, TPU, B200, H100, A100, V100 = (
    Device("cpu"),
    Device("tpu"),
    Device("gpu", (10, 0)),
    Device("gpu", (9, 0)),
    Device("gpu", (8, 0)),
    Device("gpu", (7, 0)),
)
LIBRARY_KERNELS = (cudnn, partial(tokamax_on, H100), partial(tokamax_on, TPU))
over_library_kernels = pytest.mark.parametrize("attend", LIBRARY_KERNELS, ids=["cudnn", "tokamax_gpu", "tokamax_tpu"])


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("case", FOR_LIBRARIES)
def test_library_kernels_get_the_right_mask_and_scale(case: str) -> None:
    task = attention_inputs(**FOR_LIBRARIES[case])
    check_against_brute_force(task, 2e-5, *LIBRARY_KERNELS)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("window", [None, 4])
def test_kernels_need_no_documents_where_a_row_is_one(window: int | None) -> None:
    task = attention_inputs(window=window, n_kv_heads=2)._replace(packed=False)
    check_against_brute_force(
        task, 2e-5, reference_attention, partial(blockwise, block=4), triangular, *LIBRARY_KERNELS
    )
    for attend in LIBRARY_KERNELS:
        mixed = jax.vmap(lambda q, attend=attend: attend(task._replace(q_BTHC=q)))(task.q_BTHC[None])
        np.testing.assert_allclose(mixed[0], attend(task), atol=1e-6)


@pytest.mark.usefixtures("libraries")
def test_library_kernels_match_on_a_mesh() -> None:
    task = attention_inputs(n_kv_heads=2, packed=True)
    mesh = make_mesh(small_config().mesh, jax.devices()[:1])
    expected = jax.jit(lambda q: cudnn(task._replace(q_BTHC=q)))(task.q_BTHC)
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda q: cudnn(task._replace(q_BTHC=q))).trace(task.q_BTHC)
        assert any(eqn.primitive.name == "shard_map" for eqn in traced.jaxpr.eqns)
        np.testing.assert_allclose(traced.lower().compile()(task.q_BTHC), expected, atol=1e-6)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("is_rematerialized", [False, True])
@over_library_kernels
def test_library_kernels_are_called_once_for_all_elements_of_a_vmap(
    attend: Callable[[AttentionInputs], jax.Array], is_rematerialized: bool
) -> None:
    """Two nested vmaps around gradients of layers in a scan, on a mesh; keys, values or documents are not batched."""
    task = attention_inputs(n_kv_heads=2, packed=True, window=5)

    def layers(q: jax.Array, k: jax.Array, scale: jax.Array, segments: jax.Array) -> jax.Array:
        inputs = task.block_inputs._replace(segments_BT=segments)

        def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            mixed = attend(task._replace(q_BTHC=scale * q, k_BSKC=k, block_inputs=inputs))
            return q + mixed.reshape(q.shape), None

        layer = jax.checkpoint(layer) if is_rematerialized else layer
        return jnp.sum(jnp.sin(jax.lax.scan(layer, q, None, length=2)[0]))

    gradients = jax.value_and_grad(layers, argnums=(0, 1, 2))
    scales_PR, one = jnp.asarray([[0.5, 1.0, 2.0], [1.5, 0.1, 1.0]]), jnp.ones_like(task.block_inputs.segments_BT)
    segments_P = jnp.stack([task.block_inputs.segments_BT, one])
    together = jax.vmap(jax.vmap(gradients, (None, None, 0, None)), (None, None, 0, 0))
    with jax.set_mesh(make_mesh(small_config().mesh, jax.devices()[:1])):
        found = jax.jit(together)(task.q_BTHC, task.k_BSKC, scales_PR, segments_P)
        for p, r in np.ndindex(2, 3):
            expected = jax.jit(gradients)(task.q_BTHC, task.k_BSKC, scales_PR[p, r], segments_P[p])
            alone = jax.tree.map(lambda leaf, at=(p, r): leaf[at], found)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), alone, expected)


def lowered_for(platform: str, attend: Callable[[AttentionInputs], jax.Array], task: AttentionInputs) -> str:
    """The program of value and gradient, lowered for another platform."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(task._replace(q_BTHC=q, k_BSKC=k, v_BSKC=v)).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*task[:3])
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def cudnn_version(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(inside, "check_cudnn_version"):
        pytest.skip("this JAX looks for cuDNN in another way, and finds none here")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)


def arrays_of_pairs(text: str, length: int) -> set[str]:
    """The types of the arrays in a lowered program that have the axes T x T."""
    return set(re.findall(rf"tensor<[^>]*{length}x{length}x\w+>", text))


@pytest.mark.usefixtures("cudnn_version")
def test_cudnn_is_lowered_forward_and_backward() -> None:
    task = attention_inputs(14, n_kv_heads=2, packed=True, window=4, dtype=jnp.bfloat16)
    text = lowered_for("cuda", cudnn, task)
    # The backward pass draws the mask again, and so repeats the forward pass.
    assert re.findall(r"custom_call @\w*cudnn\$(fmha\w*)\b", text.replace('"', "")) == [
        "fmhaScaleBiasSoftmax",
        "fmhaScaleBiasSoftmax",
        "fmhaScaleBiasSoftmaxBackward",
    ]
    assert f"tensor<{ROWS}x4x14x14xf32>" not in text


def train_step_for_cuda(n_trials: int = 0, **changes: Any) -> str:
    """The training step of gpt2_124m in bfloat16, lowered for CUDA."""
    overrides = {"training.batch_size": 4, "training.grad_accum_steps": 1, "model.vocab_size": 61}
    config = replace_paths(resolve(gpt2_124m.get_config()), overrides | changes)
    static, hparams = partition(config)
    state, batch = state_shapes(config), batch_shapes(config.training.batch_size, config.model.context_length)

    def step(state: Any, batch: Any) -> Any:
        return train_step(static, state, batch, hparams, jnp.zeros((), jnp.int32))

    if n_trials:
        step = jax.vmap(step)
        state, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n_trials, *x.shape), x.dtype), (state, batch))
    return jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


def without_scores(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask, logits_scale: float) -> jax.Array:
    """An arbitrary function of the inputs of tokamax, as its kernels are not needed to see what they are given."""
    assert mask.bool_mask is None and mask.is_causal and mask.k_start.shape == (len(q), 1, q.shape[1])
    return (q + k + v) * mask.k_start[:, 0, :, None, None].astype(q.dtype)


@pytest.mark.usefixtures("cudnn_version")
@pytest.mark.parametrize("n_trials", [0, 3])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_step_on_gpus_has_no_array_of_all_pairs_of_tokens(
    is_packed: bool, n_trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, flash_attention):
        monkeypatch.setattr(module, "current_device", lambda: H100)
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: name)
    api = SimpleNamespace(IMPLEMENTATIONS={"mosaic_gpu": without_scores}, base=SimpleNamespace(Mask=Mask))
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention.api", api)  # type: ignore[arg-type]
    text = train_step_for_cuda(n_trials, **{"model.mask_documents": is_packed})
    calls = re.findall(r"custom_call @\w*cudnn\$(fmha\w*)\b", text.replace('"', ""))
    assert calls == ([] if is_packed else ["fmhaSoftmax", "fmhaSoftmaxBackward"])
    assert not arrays_of_pairs(text, 1024)


def test_tokamax_is_lowered_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    base = "tokamax._src.ops.attention.pallas_mosaic_tpu"
    for module, name in ((base, "PallasMosaicTpuFlashAttention"), (f"{base}_vjp", "PallasMosaicTpuFlashAttentionVjp")):
        monkeypatch.setattr(getattr(importlib.import_module(module), name), "supported_on", lambda *_: True)
    monkeypatch.setattr(flash_attention, "current_device", lambda: TPU)
    task = attention_inputs(256, n_kv_heads=2, dtype=jnp.bfloat16)
    with jax.numpy_rank_promotion("allow"):
        texts = [lowered_for("tpu", flash_attention.tokamax, task._replace(packed=packed)) for packed in (False, True)]
    # With a mask, which is not kept, the backward pass repeats the forward pass.
    assert [text.count("tpu_custom_call") for text in texts] == [2, 3]
    assert not arrays_of_pairs(texts[0], 256)


# Selection.

USUAL = AttentionSpec(
    H100, "bfloat16", 1024, 8, 2, 64, 64, softcap=False, bias=False, sinks=False, dropout=False, cached=False
)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "tokamax"),
        ({"packed": False}, "cudnn"),
        ({"device": B200}, "tokamax"),
        ({"device": A100}, "cudnn"),
        ({"length": 1000}, "cudnn"),
        ({"device": A100, "head_width": 256, "value_width": 256}, "reference"),
        ({"head_width": 256, "value_width": 256}, "cudnn"),
        ({"head_width": 264, "value_width": 264}, "reference"),
        ({"head_width": 60, "value_width": 60}, "reference"),
        ({"head_width": 96}, "reference"),
        ({"device": V100}, "reference"),
        ({"device": Device("rocm")}, "reference"),
        ({"dtype": "float32"}, "reference"),
        ({"dtype": "float32", "length": LONG}, "blockwise"),
        ({"softcap": True, "length": LONG}, "blockwise"),
        ({"bias": True, "length": LONG - 1}, "reference"),
        ({"sinks": True}, "reference"),
        ({"length": 1023}, "reference"),
        ({"length": LONG + 1}, "blockwise"),
        ({"dropout": True, "length": LONG}, "reference"),
        ({"cached": True, "length": LONG}, "reference"),
        ({"device": CPU, "length": SHORT - 1}, "reference"),
        ({"device": CPU, "length": SHORT}, "triangular"),
        ({"device": CPU, "length": LONG - 1}, "triangular"),
        ({"device": CPU, "dropout": True}, "reference"),
        ({"device": CPU, "length": LONG}, "blockwise"),
        ({"device": TPU}, "tokamax"),
        ({"device": TPU, "length": 1000}, "reference"),
        ({"device": TPU, "length": LONG, "dtype": "float32"}, "blockwise"),
    ],
)
def test_kernel_selection(changes: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: name)
    request = USUAL._replace(**changes)
    assert select_kernel("auto", request).kernel == kernel
    assert (
        select_kernel("portable", request).kernel == select_kernel("auto", request._replace(device=ANY_DEVICE)).kernel
    )
    # A named kernel is used or rejected, except for cached keys.
    for name, each in KERNELS.items():
        if request.cached:
            assert select_kernel(name, request).kernel == "reference"
        elif each.unsupported_reason(request) is None:
            assert select_kernel(name, request) == KernelChoice(name, "the config names it")
        else:
            with pytest.raises(UserError, match=f"attention.kernel='{name}' cannot be used here: "):
                select_kernel(name, request)


def test_kernel_choice_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: name)
    assert select_kernel("auto", USUAL) == KernelChoice(
        "tokamax", "rows are packed, and cudnn would need a mask of all pairs of tokens"
    )
    monkeypatch.setattr(flash_attention, "find_spec", lambda name: None)
    requests = [
        USUAL,
        USUAL._replace(softcap=True),
        USUAL._replace(device=ANY_DEVICE),
        USUAL._replace(device=CPU),
        USUAL._replace(device=TPU, length=LONG),
    ]
    assert [select_kernel("auto", request).reason for request in requests] == [
        "this is a gpu",
        "cudnn cannot be used: it does not support a soft-cap of scores",
        "rows have fewer than 2048 tokens",
        "this is a cpu",
        "tokamax cannot be used: it is not installed: pip install 'rustgpt_jax[kernels]'; "
        "rows have 2048 tokens or more",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention.kernel": "cudnn"}, "it computes in bfloat16, not in float32"),
        (
            {"attention.kernel": "cudnn", "precision.mixer_dtype": "bfloat16", "dropout": 0.1},
            "it does not support dropout",
        ),
        ({"attention.kernel": "tokamax", "dtype": "bfloat16"}, "it needs a multiple of 128 tokens, not 32"),
        (
            {"attention.kernel": "cudnn", "dtype": "bfloat16", "mixers": ("rg_lru", "latent_attention")},
            "of the same width",
        ),
        ({"attention.kernel": "blockwise", "dropout": 0.1}, "it does not support dropout"),
    ],
)
def test_config_is_rejected_if_no_device_supports_its_kernel(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate_components(small_config(**{f"model.{name}": value for name, value in changes.items()}))


def test_tracing_rejects_a_kernel_for_another_device() -> None:
    config = small_config(**{"model.attention.kernel": "cudnn", "model.dtype": "bfloat16"})
    validate_components(config)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config.model))
    with pytest.raises(UserError, match="it needs an NVIDIA GPU, and this is a cpu. auto chooses one that can."):
        jax.eval_shape(lambda params, tokens_BT: transformer.apply(params, tokens_BT, config.model), params, tokens())


# Whole models.


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)


def model_config(**changes: Any) -> ModelConfig:
    return small_config(**{f"model.{name}": value for name, value in changes.items()}).model


def test_short_rows_on_cpu_use_the_reference_kernel() -> None:
    auto, named = model_config(**{"attention.kernel": "auto"}), model_config(**{"attention.kernel": "reference"})
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), auto))
    texts = {
        jax.jit(partial(transformer.apply, model=model)).lower(params, tokens()).as_text() for model in (auto, named)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": "local_attention", "attention.local_window": 5, "attention.n_kv_heads": 2, "positions": "alibi"},
        {"mixers": "latent_attention", "attention.sinks": True, "attention.logit_softcap": 2.0},
    ],
)
def test_model_logits_do_not_depend_on_the_kernel(changes: dict[str, Any]) -> None:
    model = model_config(**changes, n_layers=1)
    params, tokens_BT = random_params(model), tokens()
    segments_BT = np.ones_like(tokens_BT)
    segments_BT[1, 9:] = 2

    @partial(jax.jit, static_argnames="model")
    def logits(params: Any, model: ModelConfig) -> jax.Array:
        return transformer.apply(params, tokens_BT, model, segments_BT=jnp.asarray(segments_BT))[0]

    expected, got = (
        logits(params, replace_paths(model, {"attention.kernel": name})) for name in ("reference", "blockwise")
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_cached_keys_are_read_by_the_reference_kernel() -> None:
    model = model_config(mixers=("attention", "latent_attention"), **{"attention.kernel": "blockwise"})
    params = random_params(model)
    cache = transformer.init_cache(model, 2, 30)

    def program(kernel: str) -> str:
        named = replace_paths(model, {"attention.kernel": kernel})
        return jax.jit(partial(transformer.apply, model=named)).lower(params, tokens(), cache=cache).as_text()

    assert program("blockwise") == program("reference")


def test_scores_are_a_hook_point_of_the_reference_kernel_only() -> None:
    def found(kernel: str) -> dict[str, tuple[int, ...]]:
        every = transformer.hook_points(model_config(**{"attention.kernel": kernel}), 2, 24)
        return {point.name: point.shape for point in every}

    reference_sites, blockwise_sites = found("reference"), found("blockwise")
    scores = {name for name in reference_sites if name.endswith("mixer/scores")}
    assert len(scores) == 2 and blockwise_sites == {
        name: reference_sites[name] for name in reference_sites if name not in scores
    }
    model = model_config(**{"attention.kernel": "blockwise"})
    inputs = BlockInputs(jnp.zeros((2, 24), jnp.int32), jnp.ones((2, 24), jnp.int32))
    slots = grad_slots(transformer.hook_points(model, 2, 24))
    _, _, measured = jax.eval_shape(
        lambda params: transformer.apply_with_intermediates(params, tokens(), model, inputs, slots),
        random_params(model),
    )
    assert jax.tree.structure(measured) == jax.tree.structure(slots)
    assert all(leaf.shape[-1] == intermediates.N_STATS for leaf in jax.tree.leaves(measured))


# The check of kernels before training.


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_TOKENS", 24)


MIXED = {
    "mixers": ("local_attention", "attention", "rg_lru"),
    "n_layers": 3,
    "attention.n_kv_heads": 2,
    "attention.local_window": 9,
}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    "changes",
    [
        MIXED,
        {"dtype": "bfloat16"},
        {
            "mixers": "latent_attention",
            "attention.logit_softcap": 2.0,
            "attention.sinks": True,
            "positions": ("alibi", "rope"),
        },
    ],
)
def test_correct_kernels_pass_the_check(changes: dict[str, Any]) -> None:
    model = model_config(**changes, **{"attention.kernel": "blockwise"})
    findings = check_kernels(model, 32)
    assert [finding.mixer for finding in findings] == list(select_kernels(model, ANY_DEVICE, 32))
    for finding in findings:
        assert finding.difference is not None and finding.difference < (
            1e-2 if is_enabled(changes.get("dtype", 0)) else 1e-5
        )
        assert re.fullmatch(
            r"[\w ]+: blockwise, because the config names it \(differs from the reference by \de[+-]\d\d\)",
            finding.message,
        )


def test_checks_are_per_mixer_and_skip_the_reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "largest_difference", None)
    names = [finding.mixer for finding in check_kernels(model_config(**MIXED), 32)]
    assert names == ["local_attention", "attention"]
    patterns = {
        "mixers": ("attention", "attention", "local_attention"),
        "positions": ("rope", "none", "rope"),
        "n_layers": 3,
    }
    names = [finding.mixer for finding in check_kernels(model_config(**patterns), 32)]
    assert names == ["attention with rope", "attention with none", "local_attention"]


def too_large(task: AttentionInputs) -> jax.Array:
    return 1.05 * reference_attention(task)


def of_every_document(task: AttentionInputs) -> jax.Array:
    return reference_attention(
        task._replace(block_inputs=task.block_inputs._replace(segments_BT=jnp.ones_like(task.block_inputs.segments_BT)))
    )


def of_a_wider_window(task: AttentionInputs) -> jax.Array:
    return reference_attention(task._replace(window=None if task.window is None else task.window + 1))


def without_a_number(task: AttentionInputs) -> jax.Array:
    return reference_attention(task) * jnp.nan


@jax.custom_jvp
def _as_it_is(x: jax.Array) -> jax.Array:
    return x


_as_it_is.defjvps(lambda tangent, *_: 1.05 * tangent)


def of_wrong_gradient(task: AttentionInputs) -> jax.Array:
    return reference_attention(task._replace(k_BSKC=_as_it_is(task.k_BSKC)))


def of_other_groups(task: AttentionInputs) -> jax.Array:
    return reference_attention(task._replace(k_BSKC=task.k_BSKC[:, :, ::-1]))


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    ("broken", "dtype"),
    [
        (too_large, "bfloat16"),
        (of_every_document, "float32"),
        (of_a_wider_window, "bfloat16"),
        (without_a_number, "float32"),
        (of_wrong_gradient, "float32"),
        (of_other_groups, "float32"),
    ],
)
def test_wrong_kernels_fail_the_check(
    broken: Callable[[AttentionInputs], jax.Array], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.KERNELS, "blockwise", KERNELS["blockwise"]._replace(attend=broken))
    model = model_config(
        mixers="local_attention", **{"attention.n_kv_heads": 2, "attention.kernel": "blockwise"}, dtype=dtype
    )
    with pytest.raises(
        UserError, match=r"Attention by blockwise \(local_attention\) is wrong on this device: it differs"
    ):
        check_kernels(model, 32)
