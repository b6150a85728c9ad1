"""Attention kernels against brute force in float64; their selection, and the check before training."""

import importlib
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config

from rustgpt_jax.config.schema import ModelConfig, is_enabled, replace_paths
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
from rustgpt_jax.planning import hlo
from rustgpt_jax.planning.estimate import count_matmul_flops
from rustgpt_jax.sharding.sharding_plan import make_mesh
from rustgpt_jax.training.config_checks import validate_components

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
    distance_BTS = (queries_BT[:, :, None] - keys_BS[:, None, :]).astype(jnp.float32)
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


# Kernels of libraries, which are replaced by JAX's own attention here.


def by_xla(*arrays: jax.Array, **named: Any) -> jax.Array:
    return REAL_ATTENTION(*arrays, **named | {"implementation": "xla"})


REAL_ATTENTION = jax.nn.dot_product_attention
FOR_LIBRARIES = {name: case for name, case in CASES.items() if not {"softcap", "bias", "value_width"} & set(case)}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes cuDNN and tokamax available on this device."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=by_xla))  # type: ignore[arg-type]
    monkeypatch.setattr(flash_attention, "IMPLEMENTATIONS", {"cpu": ("xla",), "gpu": ("xla",)})


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("case", FOR_LIBRARIES)
def test_library_kernels_get_the_right_mask_and_scale(case: str) -> None:
    check_against_brute_force(attention_inputs(**FOR_LIBRARIES[case]), 2e-5, cudnn, flash_attention.tokamax)


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
@pytest.mark.parametrize("attend", [cudnn, flash_attention.tokamax])
def test_library_kernels_reject_vmap(attend: Callable[[AttentionInputs], jax.Array]) -> None:
    task = attention_inputs()

    def steps(scale: jax.Array) -> jax.Array:
        def step(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.grad(lambda q: attend(task._replace(q_BTHC=q)).sum())(scale * q), None

        return jax.lax.scan(step, task.q_BTHC, None, length=2)[0]

    assert jax.eval_shape(steps, jnp.ones(())).shape == task.q_BTHC.shape
    with pytest.raises(UserError, match=r"cannot train several runs in one program \(vmap\); portable can"):
        jax.eval_shape(jax.vmap(steps), jnp.ones(3))


def lowered_for(platform: str, attend: Callable[[AttentionInputs], jax.Array], task: AttentionInputs) -> str:
    """The program of value and gradient, lowered for another platform."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(task._replace(q_BTHC=q, k_BSKC=k, v_BSKC=v)).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*task[:3])
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_is_lowered_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(inside, "check_cudnn_version"):
        pytest.skip("this JAX looks for cuDNN in another way, and finds none here")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)
    text = lowered_for("cuda", cudnn, attention_inputs(14, n_kv_heads=2, packed=True, window=4, dtype=jnp.bfloat16))
    assert len(re.findall(r"custom_call @\w*cudnn\$fmha\w*\b", text.replace('"', ""))) == 2, text
    assert "Backward" in text and f"tensor<{ROWS}x4x14x14xf32>" not in text


def test_tokamax_is_lowered_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    base = "tokamax._src.ops.attention.pallas_mosaic_tpu"
    for module, name in ((base, "PallasMosaicTpuFlashAttention"), (f"{base}_vjp", "PallasMosaicTpuFlashAttentionVjp")):
        monkeypatch.setattr(getattr(importlib.import_module(module), name), "supported_on", lambda *_: True)
    monkeypatch.setattr(flash_attention, "current_device", lambda: Device("tpu"))
    with jax.numpy_rank_promotion("allow"):
        text = lowered_for(
            "tpu", flash_attention.tokamax, attention_inputs(256, n_kv_heads=2, packed=True, dtype=jnp.bfloat16)
        )
    assert text.count("tpu_custom_call") == 2


# Selection.

CPU, TPU, H100, A100, V100 = (
    Device("cpu"),
    Device("tpu"),
    Device("gpu", (9, 0)),
    Device("gpu", (8, 0)),
    Device("gpu", (7, 0)),
)
USUAL = AttentionSpec(
    H100, "bfloat16", 1024, 8, 2, 64, 64, softcap=False, bias=False, sinks=False, dropout=False, cached=False
)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "cudnn"),
        ({"device": A100}, "cudnn"),
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
