"""Latent attention and the recurrent mixers against NumPy references: isolation, caches, parameters."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config
from model_forward import CachedReader, forward, logits_of

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.model import flops, transformer
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mixers import deltanet as deltanet_mixer
from rustgpt_jax.model.mixers import rg_lru as rg_lru_mixer
from rustgpt_jax.model.mixers.deltanet import CHUNK, gated_delta_rule
from rustgpt_jax.model.mixers.rg_lru import RecurrentGatedLRU
from rustgpt_jax.model.mixers.short_conv import ShortConvolution

pytestmark = pytest.mark.usefixtures("quick_codegen")

# A row reaches into a third chunk of the delta rule.
LENGTH = 70
assert 2 * CHUNK < LENGTH
ROWS = 6

CASES: dict[str, dict[str, Any]] = {
    "latent_attention": {"mixers": "latent_attention"},
    "latent_attention with everything": {
        "mixers": "latent_attention",
        "norm": "layernorm",
        "attention.head_dim": 6,
        "mla.kv_lora_rank": 10,
        "mla.q_lora_rank": 12,
        "mla.qk_rope_head_dim": 2,
        "attention.scale": 0.7,
        "attention.logit_softcap": 3.0,
        "attention.sinks": True,
        "positions": "alibi",
        "attention.qkv_bias": True,
    },
    "rg_lru with biases": {"mixers": "rg_lru", "recurrent.width": 24, "bias": True},
    "rg_lru as in RecurrentGemma": {
        "mixers": "rg_lru",
        "recurrent.width": 24,
        "recurrent.blocks": 3,
        "recurrent.scale_first_token": False,
        "bias": True,
    },
    "deltanet with biases": {
        "mixers": "deltanet",
        "attention.head_dim": 6,
        "attention.n_heads": 3,
        "recurrent.conv_width": 2,
        "bias": True,
    },
}
# Ordered by case, so that tests of a case share compiled programs.
over_cases = pytest.mark.parametrize("case", list(CASES), scope="module")
over_mixers = pytest.mark.parametrize("mixer", ["latent_attention", "rg_lru", "deltanet"], scope="module")


def model_config(**changes: Any) -> ModelConfig:
    values = {"n_layers": 2, "d_model": 16, "d_ff": 16, "attention.n_heads": 2, "context_length": LENGTH} | changes
    return small_config(**{f"model.{name}": value for name, value in values.items()}).model


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (ROWS, LENGTH)).astype(np.int32)


# References in NumPy, with float64 and a loop over the tokens of one document, written from the papers.


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x: np.ndarray, params: Any) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0.0)


def norm(x: np.ndarray, params: Any, model: ModelConfig) -> np.ndarray:
    if model.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps) * params["scale"] + params.get("bias", 0.0)


def convolution(x_TR: np.ndarray, params: Any) -> np.ndarray:
    kernel_WR = params["kernel"]
    y_TR = np.zeros_like(x_TR)
    for t in range(len(x_TR)):
        for back in range(min(len(kernel_WR), t + 1)):
            y_TR[t] += kernel_WR[len(kernel_WR) - 1 - back] * x_TR[t - back]
    return y_TR + params.get("bias", 0.0)


def reference_rope(x_C: np.ndarray, position: int, base: float) -> np.ndarray:
    """Rotates channels c and c + C/2 as a complex number by position * theta^(-2c/C)."""
    half = len(x_C) // 2
    number = (x_C[:half] + 1j * x_C[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([number.real, number.imag])


def latent_attention(x_TD: np.ndarray, params: Any, model: ModelConfig) -> np.ndarray:
    n_heads, width = model.attention.n_heads, model.head_width
    shared = model.mla.qk_rope_head_dim or {8: 4}[width]
    scale = model.attention.scale or 1 / math.sqrt(width + shared)
    turn = (lambda x, t: reference_rope(x, t, model.rope.theta)) if model.positions == ("rope",) else (lambda x, t: x)
    latents = norm(linear(x_TD, params["latent"]), params["latent_norm"], model)
    queries = x_TD
    if model.mla.q_lora_rank:
        queries = norm(linear(x_TD, params["query_latent"]), params["query_latent_norm"], model)
    queries = linear(queries, params["query"])
    shared_keys = [turn(key, t) for t, key in enumerate(linear(x_TD, params["shared_key"]))]
    mixed = np.zeros((len(x_TD), n_heads * width))
    for head in range(n_heads):
        columns = slice(head * width, (head + 1) * width)
        keys, values = latents @ params["key"]["kernel"][:, columns], latents @ params["value"]["kernel"][:, columns]
        for t in range(len(x_TD)):
            query = queries[t, head * (width + shared) : (head + 1) * (width + shared)]
            rotated = turn(query[width:], t)
            scores = np.array([scale * (query[:width] @ keys[s] + rotated @ shared_keys[s]) for s in range(t + 1)])
            if model.attention.logit_softcap:
                scores = model.attention.logit_softcap * np.tanh(scores / model.attention.logit_softcap)
            if model.positions == ("alibi",):
                scores = scores - 2.0 ** (-8 * (head + 1) / n_heads) * (t - np.arange(t + 1))
            sink = np.exp(params["sinks"][head]) if model.attention.sinks else 0.0
            mixed[t, columns] = np.exp(scores) @ values[: t + 1] / (np.exp(scores).sum() + sink)
    return linear(mixed, params["output"])


def rg_lru(x_TD: np.ndarray, params: Any, model: ModelConfig) -> np.ndarray:
    x_TR = convolution(linear(x_TD, params["input"]), params["convolution"])
    state, states = np.zeros(x_TR.shape[1]), []

    def gate(x: np.ndarray, params: Any) -> np.ndarray:
        blocks = params["kernel"]
        if blocks.ndim == 2:
            return sigmoid(linear(x, params))
        y = np.concatenate([part @ block for part, block in zip(np.split(x, len(blocks)), blocks, strict=True)])
        return sigmoid(y + params.get("bias", 0.0))

    for t, x in enumerate(x_TR):
        r, i = gate(x, params["recurrence_gate"]), gate(x, params["input_gate"])
        a = sigmoid(-params["decay_rate"]) ** (8 * r)
        scale = np.sqrt(1 - a**2) if t or model.recurrent.scale_first_token else 1
        state = a * state + scale * (i * x)
        states.append(state)
    return linear(gelu(linear(x_TD, params["gate"])) * np.stack(states), params["output"])


def deltanet(x_TD: np.ndarray, params: Any, model: ModelConfig) -> np.ndarray:
    width = model.head_width
    query, key, value = (
        silu(convolution(linear(x_TD, params[name]), params[f"{name}_convolution"]))
        for name in ("query", "key", "value")
    )
    write = sigmoid(linear(x_TD, params["write"]))
    keep = np.exp(-np.exp(params["decay_rate"]) * softplus(linear(x_TD, params["forget"]) + params["decay_bias"]))
    mixed = np.zeros_like(value)
    for head in range(model.attention.n_heads):
        columns = slice(head * width, (head + 1) * width)
        state = np.zeros((width, width))
        for t in range(len(x_TD)):
            q, k = (x[t, columns] / np.sqrt((x[t, columns] ** 2).sum() + model.norm_eps) for x in (query, key))
            erase = np.eye(width) - write[t, head] * np.outer(k, k)
            state = keep[t, head] * state @ erase + write[t, head] * np.outer(value[t, columns], k)
            mixed[t, columns] = norm(state @ q / math.sqrt(width), params["output_norm"], model)
    return linear(mixed * silu(linear(x_TD, params["gate"])), params["output"])


REFERENCES = {"latent_attention": latent_attention, "rg_lru": rg_lru, "deltanet": deltanet}


def reference(params: Any, tokens_T: np.ndarray, model: ModelConfig) -> np.ndarray:
    """logits_TV of one document in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["embedding"]["table"][tokens_T]
    for layer in range(model.n_layers):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]["0"])
        x = x + REFERENCES[model.mixers[0]](norm(x, p["mixer_norm"], model), p["mixer"], model)
        y, fed = norm(x, p["feedforward_norm"], model), p["feedforward"]
        x = x + linear(silu(linear(y, fed["gate"])) * linear(y, fed["up"]), fed["down"])
    return norm(x, params["norm"], model) @ params["embedding"]["table"].T


@over_cases
def test_logits_match_the_reference_mixers(case: str) -> None:
    model = model_config(**CASES[case])
    params, tokens_BT = random_params(model), random_tokens()
    expected = np.stack([reference(params, tokens_T, model) for tokens_T in tokens_BT[:2]])
    assert np.abs(expected).mean() > 0.5
    np.testing.assert_allclose(logits_of(params, tokens_BT, model)[:2], expected, rtol=1e-5, atol=1e-5 * expected.std())


def test_delta_rule_continues_from_a_state_and_returns_the_last() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, LENGTH, 3, 5)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, g, start = sigmoid(rng.standard_normal((2, LENGTH, 3))), -rng.random((2, LENGTH, 3)), rng.random((2, 3, 5, 5))
    documents = np.stack([np.repeat([0, 1, 2, 3], (4, CHUNK - 4, 5, LENGTH - CHUNK - 5)), np.zeros(LENGTH, int)])
    outputs, states = np.zeros_like(v), np.swapaxes(start, -1, -2).copy()
    for row, t, head in np.ndindex(2, LENGTH, 3):
        if t and documents[row, t] != documents[row, t - 1]:
            states[row, head] = 0
        erase = np.eye(5) - beta[row, t, head] * np.outer(k[row, t, head], k[row, t, head])
        write = beta[row, t, head] * np.outer(v[row, t, head], k[row, t, head])
        states[row, head] = np.exp(g[row, t, head]) * states[row, head] @ erase + write
        outputs[row, t, head] = states[row, head] @ q[row, t, head]
    arrays = [array.astype(np.float32) for array in (q, k, v, beta, g)]
    o_BTHE, state_BHCE = jax.jit(gated_delta_rule)(*arrays, documents, start.astype(np.float32))
    np.testing.assert_allclose(o_BTHE, outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state_BHCE, np.swapaxes(states, -1, -2), rtol=1e-5, atol=1e-5)


# Isolation of documents.


@over_cases
def test_documents_and_padding_are_isolated_bit_for_bit(case: str) -> None:
    model = model_config(**CASES[case])
    params, tokens_T, others_T = random_params(model), *random_tokens(1)[:2]
    sizes = (3, 1, CHUNK, 20, 10, LENGTH - CHUNK - 34)
    segments_T = np.repeat([1, 2, 3, 4, 5, 0], sizes).astype(np.int32)
    positions_T = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    order_T = np.arange(LENGTH, dtype=np.int32)
    for kept in (2, 3, 4, 5):
        mixed_T = np.where(segments_T == kept, tokens_T, others_T)
        size = sizes[kept - 1]
        alone_T = np.concatenate([tokens_T[segments_T == kept], others_T[size:]])
        alone_segments_T = (order_T < size).astype(np.int32)
        first, second, alone, *padding = logits_of(
            params,
            np.stack([tokens_T, mixed_T, alone_T, *[others_T] * (ROWS - 3)]),
            model,
            np.stack([positions_T, positions_T, *[order_T] * (ROWS - 2)]),
            np.stack([segments_T, segments_T, alone_segments_T, *[np.zeros_like(order_T)] * (ROWS - 3)]),
        )
        assert (first[segments_T == kept] == second[segments_T == kept]).all()
        np.testing.assert_allclose(first[segments_T == kept], alone[:size], rtol=1e-5, atol=1e-5 * first.std())
        assert np.isfinite(padding).all()


@pytest.mark.slow
@over_mixers
def test_gradients_are_isolated_per_document_under_vmap_and_remat(mixer: str) -> None:
    model = model_config(mixers=mixer)
    both = [jax.tree.map(lambda leaf: leaf.astype(np.float64), random_params(model, seed)) for seed in (0, 1)]
    model = dataclasses.replace(model, dtype="float64", remat="full")
    length = CHUNK + 16
    tokens_T = np.random.default_rng(2).permutation(61)[:length].astype(np.int32)
    segments_BT = np.stack([np.repeat([1, 2, 3, 0], (20, 1, 17, length - 38)), np.zeros(length)]).astype(np.int32)
    positions_BT = np.broadcast_to([*range(20), 0, *range(17), *[0] * (length - 38)], segments_BT.shape)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _, _ = transformer.hidden_states(
            params, np.stack([tokens_T] * 2), model, positions_BT=positions_BT, segments_BT=segments_BT
        )
        third_BTD = hidden_BTD[:1, 21:38]
        return jnp.sum(jnp.square(third_BTD[..., :3])), transformer.logits(params, third_BTD, model)[0]

    with jax.enable_x64(True):
        gradients, logits_PTV = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(
            jax.tree.map(lambda *leaves: np.stack(leaves), *both)
        )
    gradients, logits_PTV = jax.device_get((gradients, logits_PTV))
    assert logits_PTV.dtype == np.float64
    accuracy = 1e-6 if mixer == "latent_attention" else 1e-10  # RoPE's angles are float32.
    for params, logits_TV in zip(both, logits_PTV, strict=True):
        expected_TV = reference(params, tokens_T[21:38], model)
        np.testing.assert_allclose(logits_TV, expected_TV, rtol=accuracy, atol=accuracy * expected_TV.std())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf, axis=tuple(range(1, leaf.ndim))).all() for leaf in jax.tree.leaves(gradients["blocks"]))
    has_part_PV = (gradients["embedding"]["table"] != 0).any(axis=-1)
    assert (has_part_PV[:, tokens_T] == (segments_BT[:1] == 3)).all()


def test_rg_lru_gradient_is_finite_at_full_retention() -> None:
    mixer = RecurrentGatedLRU(model_config(bias=True).block(0))
    inputs = BlockInputs(jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32))
    x_BTD = np.random.default_rng(0).standard_normal((1, 8, 16)).astype(np.float32)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x_BTD, inputs, None)["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    params["recurrence_gate"]["bias"] -= 1000
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(mixer.apply({"params": params}, x_BTD, inputs, None)[0])))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


# The cache.


@over_cases
def test_cached_logits_match_uncached_for_any_split(case: str) -> None:
    """Each row reads a prefix at once, then pieces, then one token at a time; finished rows read padding."""
    model = model_config(**CASES[case])
    ends = np.array([[1, 2, 4, CHUNK, CHUNK + 1, LENGTH], [2, 40, 39, 37, 69, 70], [45, 43, 62, 70, 70, 70]], np.int32)
    params, tokens_BT = random_params(model), random_tokens(3)
    read = CachedReader(params, tokens_BT, model).read

    cache = transformer.init_cache(model, ROWS, LENGTH)
    other = read(cache, np.zeros_like(ends[0]), ends[0], LENGTH, filler=13)
    cache = read(cache, np.zeros_like(ends[0]), ends[0], LENGTH)
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    cache = read(cache, ends[0], ends[1], LENGTH)
    cache = read(cache, ends[1], ends[2], LENGTH)
    for step in range(4):
        cache = read(cache, ends[2] + step, np.full(ROWS, LENGTH, np.int32), 1)


@over_mixers
def test_recurrent_and_latent_caches_are_small(mixer: str) -> None:
    model = model_config(mixers=mixer, dtype="bfloat16")

    def shapes(name: str, length: int, model: ModelConfig = model) -> Any:
        return jax.eval_shape(lambda: MIXERS[name].init_cache(model, 3, length))

    short, long = shapes(mixer, 10), shapes(mixer, 1000)
    if mixer == "latent_attention":
        wide = model_config(mixers=mixer, d_model=256, **{"attention.n_heads": 16})
        assert flops.total_size(shapes(mixer, 10, wide)) == 3 * 10 * (64 + 8)
        assert flops.total_size(shapes("attention", 10, wide)) == 3 * 10 * 2 * 256
    else:
        assert jax.tree.map(lambda leaf: leaf.shape, short) == jax.tree.map(lambda leaf: leaf.shape, long)
        assert max(leaf.dtype.itemsize for leaf in jax.tree.leaves(short)) == 4


@over_mixers
def test_bfloat16_logits_are_close_and_cached_state_is_float32(mixer: str) -> None:
    wide, narrow = model_config(mixers=mixer), model_config(mixers=mixer, dtype="bfloat16")
    params, tokens_BT = random_params(wide), random_tokens()
    exact = logits_of(params, tokens_BT, wide)
    found_BTV, cache = forward(params, tokens_BT, narrow, transformer.init_cache(narrow, ROWS, LENGTH))
    assert np.abs(np.asarray(found_BTV) - exact).mean() < 0.05 * exact.std()
    shapes = jax.eval_shape(lambda: transformer.init_cache(narrow, ROWS, LENGTH))
    assert jax.tree.map(lambda leaf: leaf.dtype, cache) == jax.tree.map(lambda leaf: leaf.dtype, shapes)


# Parameters.


def n_parameters(model: ModelConfig) -> int:
    d, h, c, b, w = (
        model.d_model,
        model.attention.n_heads,
        model.head_width,
        int(model.bias),
        model.recurrent.conv_width,
    )
    match model.mixers[0]:
        case "latent_attention":
            r, e, q = (
                model.mla.kv_lora_rank or 4 * c,
                model.mla.qk_rope_head_dim or 2 * math.ceil(c / 4),
                model.mla.q_lora_rank,
            )
            b, scales = int(model.bias or bool(model.attention.qkv_bias)), 1 + model.bias * (model.norm == "layernorm")
            queries = (d + b + scales) * q + (q + b) * h * (c + e) if q else (d + b) * h * (c + e)
            keys = (d + b + scales) * r + (d + b) * e + 2 * r * h * c
            return queries + keys + (h * c + model.bias) * d + h * model.attention.sinks
        case "rg_lru":
            r = model.recurrent.width or d
            gates = 2 * (r // (model.recurrent.blocks or 1) + b) * r
            return 2 * (d + b) * r + (w + b) * r + gates + r + (r + b) * d
        case _:
            streams = 3 * (d + b) * h * c + 3 * (w + b) * h * c
            return streams + (d + b) * h + d * h + 2 * h + c + (d + b) * h * c + (h * c + b) * d


@pytest.mark.parametrize("changes", [*CASES.values(), {"mixers": "rg_lru"}, {"mixers": "deltanet"}])
def test_parameter_count_matches_the_closed_form(changes: dict[str, Any]) -> None:
    model = model_config(**changes)
    mixer = flops.parameter_shapes(model)["blocks"]["0"]["mixer"]
    assert flops.total_size(mixer) == model.n_layers * n_parameters(model)
    kernels = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(mixer) if leaf.ndim > 2}
    assert all("kernel" in path for path in kernels)


def test_initial_decays_match_the_papers() -> None:
    key, quarters = jax.random.key(0), np.linspace(0, 1, 5)
    decay = sigmoid(-np.asarray(rg_lru_mixer.initial_decay_rate(key, (4000,)), np.float64)) ** 8
    np.testing.assert_allclose(np.quantile(decay, quarters), np.linspace(0.9, 0.999, 5), atol=4e-3)
    assert decay.min() > 0.9 - 1e-5 and decay.max() < 0.999 + 1e-5
    rate = np.exp(deltanet_mixer.initial_decay_rate(key, (4000,)))
    np.testing.assert_allclose(np.quantile(rate, quarters), np.linspace(1, 16, 5), atol=0.4)
    step = softplus(np.asarray(deltanet_mixer.initial_decay_bias(key, (4000,)), np.float64))
    np.testing.assert_allclose(np.quantile(np.log10(step), quarters), np.linspace(-3, -1, 5), atol=0.06)


@pytest.mark.parametrize("width", [1, 3])
def test_convolution_continues_from_its_history(width: int) -> None:
    module = ShortConvolution(model_config(**{"recurrent.conv_width": width}), 2)
    kernel_WR, x_BTR = (np.random.default_rng(width).standard_normal(shape) for shape in ((width, 2), (2, 9, 2)))
    expected_BTR = np.stack([convolution(x_TR, {"kernel": kernel_WR}) for x_TR in x_BTR])
    history, first = module.init_history(module.config, 2, 2), np.zeros(2, int)
    # Both rows read tokens, then one, none, and the rest.
    for ends in ([1, 3], [1, 6], [1, 6], [9, 9]):
        places_BT = first[:, None] + np.arange(8)
        is_read_BT = places_BT < np.array(ends)[:, None]
        places_BT = np.minimum(places_BT, 8)[..., None]
        y_BTR, history = module.apply(
            {"params": {"kernel": kernel_WR.astype(np.float32)}},
            np.take_along_axis(x_BTR, places_BT, axis=1).astype(np.float32),
            BlockInputs(jnp.zeros((2, 8), jnp.int32), jnp.asarray(is_read_BT, jnp.int32)),
            history,
        )
        expected = np.take_along_axis(expected_BTR, places_BT, axis=1)
        np.testing.assert_allclose(y_BTR[is_read_BT], expected[is_read_BT], rtol=1e-5, atol=1e-5)
        first = np.array(ends)


def test_new_convolution_preserves_the_variance() -> None:
    inputs = BlockInputs(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    convolution = ShortConvolution(model_config(), 4000)
    kernel = jax.jit(convolution.init)(jax.random.key(0), jnp.zeros((1, 1, 4000)), inputs, None)["params"]["kernel"]
    assert kernel.shape == (4, 4000)
    assert abs(np.square(kernel).sum(axis=0).mean() - 1) < 0.05
