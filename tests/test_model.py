"""The model against a NumPy reference, and its properties for all components: causality, caches, dropout, cost."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config
from model_forward import CachedReader, forward, logits_of
from scipy import stats

from rustgpt_jax.config.schema import ModelConfig, combine, partition
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import flops, transformer
from rustgpt_jax.model.block import layer_groups
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.kv_cache import KVCache
from rustgpt_jax.model.layers import dropout
from rustgpt_jax.model.mixers import Attention

pytestmark = pytest.mark.usefixtures("quick_codegen")

# Every forward has LENGTH rows of LENGTH tokens, so that each case compiles few programs.
LENGTH = 12
PLACES_T = np.arange(LENGTH, dtype=np.int32)

# A covering set: every option on and off, in combinations that model families use and a few that none uses.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layernorm",
        "positions": ("learned",),
        "feedforwards": ("gelu",),
        "bias": True,
        "scan_layers": False,
    },
    "llama": {
        "attention.n_kv_heads": 2,
        "tie_embeddings": False,
        "rope.theta": 500.0,
        "rope.scaling": "llama3",
        "rope.factor": 3.0,
        "rope.original_context": 40,
    },
    "gemma": {
        "n_layers": 4,
        "mixers": ("local_attention", "local_attention", "attention"),
        "attention.local_window": 4,
        "positions": ("local_rope", "local_rope", "rope"),
        "rope.local_theta": 100.0,
        "rope.scaling": "linear",
        "rope.factor": 4.0,
        "norm": "zero_centered_rmsnorm",
        "norm_placement": "sandwich",
        "feedforwards": ("geglu",),
        "attention.qk_norm": "head",
        "attention.scale": 0.3,
        "attention.logit_softcap": 2.0,
        "final_logit_softcap": 4.0,
        "scale_embeddings": True,
        "embedding_scale": 3.0,
    },
    "mixture": {
        "feedforwards": ("moe", "relu_squared"),
        "moe.n_experts": 4,
        "moe.expert_activation": "gelu_exact",
        "norm_placement": "output",
        "attention.qk_norm": "projection",
        "attention.qkv_bias": True,
        "rope.fraction": 0.75,
        "rope.scaling": "yarn",
        "rope.factor": 8.0,
        "rope.original_context": 200,
        "rope.beta_fast": 16.0,
        "attention.sinks": True,
    },
    "alibi": {
        "positions": ("alibi", "none"),
        "feedforwards": ("moe",),
        "moe.norm_topk_prob": False,
        "attention.n_heads": 2,
    },
    "original": {
        "norm": "layernorm",
        "positions": ("learned",),
        "feedforwards": ("relu",),
        "norm_placement": "post",
        "bias": True,
        "norm_bias": False,
        "attention.output_bias": False,
    },
    "odd": {
        "n_layers": 4,
        "mixers": ("attention", "attention"),
        "attention.n_kv_heads": 1,
        "attention.head_dim": 6,
        "d_ff": 20,
        "bias": True,
        "feedforward_bias": False,
        "attention.scale_by_layer": True,
        "rope.scaling": "longrope",
        "rope.factor": 3.0,
        "rope.original_context": 16,
        "rope.short_factors": (1.0, 1.0, 1.0),
        "rope.long_factors": (1.0, 2.0, 5.0),
        "attention.qk_norm": "head",
        "norm_placement": "post",
        "norm_eps": 0.1,
        "tie_embeddings": False,
    },
    "bfloat16": {
        "dtype": "bfloat16",
        "attention.n_kv_heads": 2,
        "attention.qk_norm": "head",
        "norm": "layernorm",
        "feedforwards": ("gelu",),
    },
}
# Ordered by case, so that tests of a case share compiled programs.
over_cases = pytest.mark.parametrize("case", list(CASES), scope="module")
over_float32_cases = pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"], scope="module")


def model_config(**changes: Any) -> ModelConfig:
    return small_config(**{f"model.{name}": value for name, value in changes.items()}).model


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (LENGTH, LENGTH)).astype(np.int32)


@partial(jax.jit, static_argnums=2)
def pullback(
    params: transformer.Params, tokens_T: np.ndarray, model: ModelConfig, hidden_TD: np.ndarray, logits_TV: np.ndarray
) -> transformer.Params:
    """Gradient of a weighted sum of the hidden states and logits of one text, given the weights."""

    def weighted_sum(params: transformer.Params) -> jax.Array:
        hidden_BTD, _, _ = transformer.hidden_states(params, tokens_T[None], model)
        logits_BTV = transformer.logits(params, hidden_BTD, model)
        return jnp.sum(hidden_BTD[0] * hidden_TD) + jnp.sum(logits_BTV[0] * logits_TV)

    return jax.grad(weighted_sum)(params)


def tolerance(model: ModelConfig) -> dict[str, float]:
    return {"rtol": 5e-5, "atol": 5e-5} if model.dtype == "float32" else {"rtol": 0.05, "atol": 0.1}


# A reference in NumPy, with float64 and loops, written from the papers and the documentation in config/schema.py.


def reference_norm(x: np.ndarray, params: dict[str, np.ndarray], model: ModelConfig) -> np.ndarray:
    if model.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps)
    return x * (params["scale"] + (model.norm == "zero_centered_rmsnorm")) + params.get("bias", 0.0)


def reference_linear(x: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0.0)


def reference_rope(x_TC: np.ndarray, position: str, model: ModelConfig) -> np.ndarray:
    """Rotates channels c and c + C/2 as a complex number by position * theta^(-2c/C), scaled as in the config."""
    length, channels = len(x_TC), int(x_TC.shape[1] * model.rope.fraction)
    half, scaling = channels // 2, model.rope.scaling if position == "rope" else "none"
    speed_C = (model.rope.theta if position == "rope" else model.rope.local_theta) ** (-2 * np.arange(half) / channels)
    share_C, magnitude = np.ones(half), 1.0
    if scaling == "linear":
        share_C = np.zeros(half)
    if scaling == "llama3":
        turns_C = model.rope.original_context / (2 * math.pi / speed_C)
        share_C = (turns_C - model.rope.beta_slow) / (model.rope.beta_fast - model.rope.beta_slow)
    if scaling == "yarn":
        wavelengths = [model.rope.original_context / turns for turns in (model.rope.beta_fast, model.rope.beta_slow)]
        fast, slow = (half * math.log(wave / 2 / math.pi) / math.log(model.rope.theta) for wave in wavelengths)
        fast, slow = (math.floor(fast), math.ceil(slow)) if model.rope.truncate else (fast, slow)
        share_C = 1 - (np.arange(half) - max(fast, 0)) / (slow - max(fast, 0))
        magnitude = 0.1 * math.log(model.rope.factor) + 1
    if scaling == "longrope":
        is_long = model.context_length > model.rope.original_context
        speed_C = speed_C / np.array(model.rope.long_factors if is_long else model.rope.short_factors)
        magnitude = math.sqrt(1 + math.log(model.rope.factor) / math.log(model.rope.original_context))
    share_C = share_C.clip(0, 1)
    speed_C = share_C * speed_C + (1 - share_C) * speed_C / model.rope.factor
    turned = (x_TC[:, :half] + 1j * x_TC[:, half:channels]) * np.exp(1j * np.outer(np.arange(length), speed_C))
    return np.concatenate([magnitude * turned.real, magnitude * turned.imag, x_TC[:, channels:]], axis=1)


def reference_attention(
    x_TD: np.ndarray, params: Any, model: ModelConfig, mixer: str, position: str, layer: int
) -> np.ndarray:
    channels = model.attention.head_dim or model.d_model // model.attention.n_heads
    sharing = model.attention.n_heads // (model.attention.kv_heads)

    def head(name: str, index: int) -> np.ndarray:
        columns = slice(index * channels, (index + 1) * channels)
        x_TC = reference_linear(x_TD, params[name])
        if model.attention.qk_norm == "projection" and name != "value":
            x_TC = reference_norm(x_TC, params[f"{name}_norm"], model)
        x_TC = x_TC[:, columns]
        if model.attention.qk_norm == "head" and name != "value":
            x_TC = reference_norm(x_TC, params[f"{name}_norm"], model)
        return reference_rope(x_TC, position, model) if "rope" in position and name != "value" else x_TC

    mixed = []
    for index in range(model.attention.n_heads):
        q_TC, k_SC, v_SC = head("query", index), head("key", index // sharing), head("value", index // sharing)
        rows = []
        for t in range(len(x_TD)):
            seen = slice(max(0, t + 1 - model.attention.local_window) if mixer == "local_attention" else 0, t + 1)
            scores = k_SC[seen] @ q_TC[t] * (model.attention.scale or channels**-0.5)
            scores = scores / (layer + 1) if model.attention.scale_by_layer else scores
            if model.attention.logit_softcap:
                scores = model.attention.logit_softcap * np.tanh(scores / model.attention.logit_softcap)
            if position == "alibi":
                scores = scores - 2.0 ** (-8 * (index + 1) / model.attention.n_heads) * (t - np.arange(t + 1)[seen])
            weights = np.exp(scores)
            sink = np.exp(params["sinks"][index]) if model.attention.sinks else 0.0
            rows.append(weights / (weights.sum() + sink) @ v_SC[seen])
        mixed.append(np.stack(rows))
    return reference_linear(np.concatenate(mixed, axis=1), params["output"])


def reference_activation(x: np.ndarray, kind: str) -> np.ndarray:
    match kind:
        case "swiglu" | "silu":
            return x / (1 + np.exp(-x))
        case "gelu" | "geglu":
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "gelu_exact" | "geglu_exact":
            return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "relu" | "reglu":
            return np.maximum(x, 0)
        case "relu_squared" | "relu_squared_glu":
            return np.maximum(x, 0) ** 2
    raise AssertionError(kind)


def reference_feedforward(x_TD: np.ndarray, params: Any, kind: str, model: ModelConfig) -> np.ndarray:
    if kind == "moe":
        return np.stack([reference_experts(x_D, params, model) for x_D in x_TD])
    up = reference_linear(x_TD, params["up"])
    if "gate" in params:
        return reference_linear(reference_activation(reference_linear(x_TD, params["gate"]), kind) * up, params["down"])
    return reference_linear(reference_activation(up, kind), params["down"])


def reference_experts(x_D: np.ndarray, params: Any, model: ModelConfig) -> np.ndarray:
    odds_X = np.exp(x_D @ params["router"])
    best = np.argsort(-odds_X)[: model.moe.experts_per_token]
    weights_X = odds_X / (odds_X[best].sum() if model.moe.norm_topk_prob else odds_X.sum())
    outputs = [
        weights_X[x]
        * (
            (reference_activation(x_D @ params["gate"][x], model.moe.expert_activation) * (x_D @ params["up"][x]))
            @ params["down"][x]
        )
        for x in best
    ]
    return np.sum(outputs, axis=0)


def reference(params: Any, tokens_T: np.ndarray, model: ModelConfig) -> np.ndarray:
    """logits_TV in float64."""
    x = params["embedding"]["table"][tokens_T] * (
        (model.embedding_scale or model.d_model**0.5) if model.scale_embeddings else 1
    )
    if "learned" in model.positions:
        x = x + params["positions"]["table"][: len(x)]
    layer_params = {
        layer: jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"][str(key)])
        for key, stack in enumerate(layer_groups(model))
        for index, layer in enumerate(stack.layers)
    }
    for layer in range(model.n_layers):
        p = layer_params[layer]
        mixer, feedforward, position = (
            pattern[layer % len(pattern)] for pattern in (model.mixers, model.feedforwards, model.positions)
        )
        for sublayer in ("mixer", "feedforward"):
            norm = p.get(f"{sublayer}_norm")
            y = reference_norm(x, norm, model) if model.norm_placement in ("pre", "sandwich") else x
            if sublayer == "mixer":
                y = reference_attention(y, p[sublayer], model, mixer, position, layer)
            else:
                y = reference_feedforward(y, p[sublayer], feedforward, model)
            if model.norm_placement in ("output", "sandwich"):
                y = reference_norm(y, p[f"{sublayer}_output_norm"], model)
            x = reference_norm(x + y, norm, model) if model.norm_placement == "post" else x + y
    if model.norm_placement != "post":
        x = reference_norm(x, params["norm"], model)
    logits = x @ (params["embedding"]["table"].T if model.tie_embeddings else params["head"]["kernel"])
    return (
        model.final_logit_softcap * np.tanh(logits / model.final_logit_softcap) if model.final_logit_softcap else logits
    )


def in_float64(params: transformer.Params) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@over_cases
def test_logits_match_the_reference_model(case: str) -> None:
    model = model_config(**CASES[case])
    params, tokens_BT = random_params(model), random_tokens()
    expected = np.stack([reference(in_float64(params), tokens_T, model) for tokens_T in tokens_BT[:3]])
    logits_BTV = logits_of(params, tokens_BT, model)[:3]
    assert logits_BTV.dtype == np.float32
    assert np.abs(expected).mean() > 0.5
    np.testing.assert_allclose(logits_BTV, expected, **tolerance(model))


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"], scope="module")
def test_gradients_match_finite_differences_of_the_reference_model(case: str) -> None:
    model = model_config(**CASES[case])
    params, tokens_T = random_params(model), random_tokens()[0]
    rng = np.random.default_rng(1)
    weights_TV = rng.standard_normal((LENGTH, 61)).astype(np.float32)
    gradient = pullback(params, tokens_T, model, np.zeros((LENGTH, model.d_model), np.float32), weights_TV)

    leaves, tree = jax.tree.flatten(in_float64(params))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for index, (path, found) in enumerate(zip(paths, jax.tree.leaves(jax.device_get(gradient)), strict=True)):
        direction = rng.standard_normal(found.shape)

        def loss(step: float, index: int = index, direction: np.ndarray = direction) -> float:
            moved = [leaf + step * direction if i == index else leaf for i, leaf in enumerate(leaves)]
            return float((reference(jax.tree.unflatten(tree, moved), tokens_T, model) * weights_TV).sum())

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        scale = np.linalg.norm(found) * np.linalg.norm(direction) / found.size**0.5
        assert abs(slope - np.vdot(found, direction)) < 1e-3 * scale + 1e-4, path


# Masks.


@over_float32_cases
def test_logits_are_causal(case: str) -> None:
    model = model_config(**CASES[case])
    params = random_params(model)
    tokens_T = np.random.default_rng(0).permutation(61)[:LENGTH].astype(np.int32)
    weights_D = np.random.default_rng(1).standard_normal(model.d_model).astype(np.float32)
    size_TS = np.empty((LENGTH, LENGTH))
    for t in range(LENGTH):
        hidden_TD = np.where(PLACES_T[:, None] == t, weights_D, 0.0).astype(np.float32)
        gradient = pullback(params, tokens_T, model, hidden_TD, np.zeros((LENGTH, 61), np.float32))
        size_TS[t] = np.abs(np.asarray(gradient["embedding"]["table"])).max(axis=-1)[tokens_T]
    assert (size_TS[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (size_TS[np.tril_indices(LENGTH)] > 0).all()


@over_cases
def test_packed_documents_and_padding_are_isolated(case: str) -> None:
    model = model_config(**CASES[case])
    params = random_params(model)
    segments = np.array([1] * 5 + [2] * 4 + [0] * 3, np.int32)
    positions = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], np.int32)
    tokens, others = random_tokens(1)[:2]
    second_only = np.where(segments == 2, tokens, others)
    first_only = np.where(segments == 1, tokens, others)
    alone = np.concatenate([tokens[5:9], others[:8]])
    alone_segments = np.array([1] * 4 + [0] * 8, np.int32)

    packed, with_second, with_first, separate, *_ = logits_of(
        params,
        np.stack([tokens, second_only, first_only, *[alone] * (LENGTH - 3)]),
        model,
        positions_BT=np.stack([*[positions] * 3, *[PLACES_T] * (LENGTH - 3)]),
        segments_BT=np.stack([*[segments] * 3, *[alone_segments] * (LENGTH - 3)]),
    )
    assert (packed[5:9] == with_second[5:9]).all()
    assert (packed[:5] == with_first[:5]).all()
    assert (packed[:5] != with_second[:5]).any()
    np.testing.assert_allclose(packed[5:9], separate[:4], **tolerance(model))
    assert np.isfinite(packed).all()


# The cache.


@over_cases
def test_cached_logits_match_uncached_for_any_split(case: str) -> None:
    """Row k reads k + 1 tokens at once, then the rest at once or one by one; finished rows read padding."""
    model = model_config(**CASES[case])
    params, tokens_BT = random_params(model), random_tokens(3)
    read = CachedReader(params, tokens_BT, model, **tolerance(model)).read

    lengths_B, ends_B = PLACES_T + 1, np.full(LENGTH, LENGTH, np.int32)
    shapes = jax.eval_shape(lambda: transformer.init_cache(model, LENGTH, LENGTH))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    cache = read(empty, np.zeros_like(lengths_B), lengths_B, LENGTH)
    read(cache, lengths_B, ends_B, LENGTH)
    for step in range(LENGTH - 1):
        cache = read(cache, lengths_B + step, ends_B, 1)


def test_kv_cache_stores_tokens_by_position_without_padding() -> None:
    model = model_config(**{"attention.n_heads": 2}, d_model=4)
    new_BTKC = np.arange(1.0, 17.0, dtype=np.float32).reshape(1, 4, 2, 2)
    new_BKTC = np.swapaxes(new_BTKC, 1, 2)
    inputs = BlockInputs(jnp.array([[2, 0, 1, 3]]), jnp.array([[1, 1, 0, 1]]))
    ring = jax.jit(lambda: Attention.init_cache(model, 1, 4).write((new_BKTC, -new_BKTC), inputs).buffers)()
    k_BKSC, v_BKSC = (np.asarray(kept) for kept in ring)
    expected_BSKC = np.stack([new_BTKC[:, 1], np.zeros((1, 2, 2)), new_BTKC[:, 0], new_BTKC[:, 3]], axis=1)
    np.testing.assert_array_equal(k_BKSC, np.swapaxes(expected_BSKC, 1, 2))
    np.testing.assert_array_equal(v_BKSC, -k_BKSC)


def test_ring_cache_holds_the_last_tokens_and_their_positions() -> None:
    ring = KVCache(np.zeros((2, 3), np.float32))
    positions_BT = np.tile(np.arange(4, 9), (2, 1))
    segments_BT = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    written = jax.jit(KVCache.write)(ring, positions_BT.astype(np.float32), BlockInputs(positions_BT, segments_BT))
    np.testing.assert_array_equal(written.buffers, [[6, 7, 8], [0, 4, 5]])
    # Tokens older than the slots are not written, because the order of two writes to one slot is undefined.
    turned = BlockInputs(positions_BT[:, ::-1], np.ones((2, 5), int))
    again = jax.jit(KVCache.write)(ring, positions_BT[:, ::-1].astype(np.float32), turned)
    np.testing.assert_array_equal(again.buffers, [[6, 7, 8], [6, 7, 8]])
    np.testing.assert_array_equal(written.positions(np.array([8, 5])), [[6, 7, 8], [3, 4, 5]])
    np.testing.assert_array_equal(written.positions(np.array([0, -1])), [[0, -2, -1], [-3, -2, -1]])


# Scan, unrolling and remat.


def loss_and_gradient(model: ModelConfig, params: transformer.Params, tokens_BT: np.ndarray) -> tuple[Any, Any]:
    def loss(params: transformer.Params) -> jax.Array:
        logits_BTV, _ = transformer.apply(params, tokens_BT, model, dropout_key=jax.random.key(1))
        return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - logits_BTV[..., 0])

    return jax.value_and_grad(loss)(params)


compiled_loss_and_gradient = jax.jit(loss_and_gradient, static_argnums=0)


@pytest.mark.parametrize(
    "changes",
    [{"remat": "dots"}, {"remat": "full", "scan_layers": False}],
    ids=str,
)
def test_unrolling_and_remat_preserve_values_and_gradients(changes: dict[str, str]) -> None:
    plain = model_config(dropout=0.1, positions="learned", feedforwards="relu")
    params, tokens_BT = random_params(plain), random_tokens()[:2]
    expected = compiled_loss_and_gradient(plain, params, tokens_BT)
    found = compiled_loss_and_gradient(dataclasses.replace(plain, **changes), params, tokens_BT)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)


def equations(jaxpr: Any) -> list[str]:
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in flops.inner_programs(equation):
            names += equations(inner)
    return names


@pytest.mark.parametrize("feedforward", ["relu", "moe"])
def test_remat_policies_recompute_what_they_name(feedforward: str) -> None:
    counted, exponentials = {}, {}
    for remat in ("none", "dots", "full"):
        model = model_config(remat=remat, feedforwards=feedforward, positions="learned")
        program = jax.make_jaxpr(lambda p, t, model=model: loss_and_gradient(model, p, t))(
            random_params(model), random_tokens()[:2]
        )
        names = equations(program.jaxpr)
        counted[remat], exponentials[remat] = flops.matmul_flops(program.jaxpr), names.count("exp")
    assert counted["none"] == counted["dots"] < counted["full"]
    assert exponentials["none"] < exponentials["dots"] == exponentials["full"]


def test_unrolled_layers_compile_to_no_loop() -> None:
    for scan_layers in (True, False):
        model = model_config(scan_layers=scan_layers)
        program = forward.lower(random_params(model), random_tokens(), model).as_text()
        assert ("stablehlo.while" in program) == scan_layers


def test_traced_hyperparameters_do_not_recompile() -> None:
    tokens_BT = random_tokens()[:1]
    compilations = 0

    @jax.jit
    def run(hparams: dict[str, Any]) -> tuple[transformer.Params, jax.Array]:
        nonlocal compilations
        compilations += 1
        model = combine(static, hparams).model
        params = transformer.init(jax.random.key(0), model)
        return params, transformer.apply(params, tokens_BT, model)[0]

    for init_std, eps, base in ((0.02, 1e-6, 1e4), (0.4, 0.1, 7.0)):
        config = small_config(**{"model.init_std": init_std, "model.norm_eps": eps, "model.rope.theta": base})
        static, hparams = partition(config)
        params, logits_BTV = run({path: np.float32(value) for path, value in hparams.items()})
        assert np.std(params["embedding"]["table"]) == pytest.approx(init_std, rel=0.1)
        expected = reference(in_float64(params), tokens_BT[0], config.model)
        np.testing.assert_allclose(logits_BTV[0], expected, rtol=1e-4, atol=1e-5)
    assert compilations == 1


# Parameters.


def attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels of all queries and of all keys."""
    head = model.attention.head_dim or model.d_model // model.attention.n_heads
    return model.attention.n_heads * head, (model.attention.kv_heads) * head


def feedforward_of(model: ModelConfig, layer: int) -> tuple[str, int, bool]:
    """Kind of a layer's feed-forward, its hidden width, and whether it is gated."""
    kind = model.feedforwards[layer % len(model.feedforwards)]
    gated = kind in ("swiglu", "geglu", "geglu_exact", "reglu", "relu_squared_glu", "moe")
    width = math.ceil(model.d_model * 8 / 3 / 8) * 8 if gated else 4 * model.d_model
    return kind, model.d_ff or width, gated


@over_cases
def test_parameter_count_matches_the_closed_form(case: str) -> None:
    model = model_config(**CASES[case])
    width, bias = model.d_model, int(model.bias)
    output_bias, fed_bias, norm_bias = (
        int(model.bias if given is None else given)
        for given in (model.attention.output_bias, model.feedforward_bias, model.norm_bias)
    )
    queries, keys = attention_widths(model)
    norm = width * (1 + (model.norm == "layernorm" and norm_bias))
    qk_norm = {"none": 0, "head": 2 * (queries // model.attention.n_heads), "projection": queries + keys}[
        model.attention.qk_norm
    ]
    attention = (width + (bias or bool(model.attention.qkv_bias))) * (queries + 2 * keys) + (
        queries + output_bias
    ) * width
    attention += qk_norm + model.attention.n_heads * model.attention.sinks
    expected = 61 * width * (1 if model.tie_embeddings else 2)
    expected += 32 * width if "learned" in model.positions else 0
    expected += norm if model.norm_placement != "post" else 0
    for layer in range(model.n_layers):
        kind, hidden, gated = feedforward_of(model, layer)
        feedforward = (width + fed_bias) * hidden * (1 + gated) + (hidden + fed_bias) * width
        if kind == "moe":
            feedforward = model.moe.n_experts * (feedforward + width)
        expected += attention + feedforward + norm * (4 if model.norm_placement == "sandwich" else 2)
    shapes = flops.parameter_shapes(model)
    assert flops.total_size(shapes) == expected
    assert flops.total_bytes(shapes) == 4 * expected
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


def test_initial_values_have_the_documented_scale_and_independent_keys() -> None:
    model = model_config(
        n_layers=4,
        mixers=("attention", "attention"),
        d_model=64,
        init_std=0.05,
        bias=True,
        norm="layernorm",
        positions="learned",
        tie_embeddings=False,
        **{"attention.qk_norm": "head"},
    )
    params = jax.device_get(jax.jit(transformer.init, static_argnums=1)(jax.random.key(3), model))
    seen: set[float] = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] in ("scale", "bias"):
            assert (leaf == (1 if names[-1] == "scale" else 0)).all(), names
            continue
        std = 0.05 / math.sqrt(8) if names[-2] in ("output", "down") else 0.05
        for array in leaf if names[0] == "blocks" else [leaf]:
            assert abs(array.std() / std - 1) < 5 / math.sqrt(2 * array.size), names
            assert abs(array.mean() / std) < 5 / math.sqrt(array.size), names
            seen.add(float(array.ravel()[0]) / std)
    assert len(seen) == 3 + 4 * 7


# Dropout.


def test_dropout_preserves_the_mean_and_needs_a_key() -> None:
    x = np.full((100, 100), 3.0, np.float32)
    dropped_at = jax.jit(lambda rate, key: dropout(x, rate, BlockInputs(x, x, key), 0))
    assert dropout(x, 0.25, BlockInputs(x, x), 0) is x
    for rate in (0.0, 0.25, 0.9):
        dropped = np.asarray(dropped_at(rate, jax.random.key(0)))
        np.testing.assert_allclose(np.unique(dropped), [0.0, 3 / (1 - rate)] if rate else [3.0], rtol=1e-6)
        assert abs(np.mean(dropped == 0) - rate) < 5 * math.sqrt(rate * (1 - rate) / x.size) + 1e-9


DROPPING = model_config(d_model=128, bias=True, positions="learned", feedforwards="relu", dropout=0.5)


def dropped_hidden(params: transformer.Params, rate: float = 0.5, key: int = 0) -> np.ndarray:
    return np.asarray(compiled_dropped_hidden(params, rate, jax.random.key(key)))


@jax.jit
def compiled_dropped_hidden(params: transformer.Params, rate: Any, key: jax.Array) -> jax.Array:
    model = dataclasses.replace(DROPPING, dropout=rate)
    return transformer.hidden_states(params, random_tokens()[:4], model, dropout_key=key)[0]


def silent_params() -> transformer.Params:
    """Parameters that are all 0 except for the last norm."""
    params = jax.tree.map(np.zeros_like, random_params(DROPPING))
    params["norm"]["scale"][:] = 1
    return params


def test_dropout_is_independent_per_sublayer_and_layer() -> None:
    """With blocks that add 1 in the mixer and 3 in the feed-forward, the sum counts how often each was kept."""
    params = silent_params()
    params["blocks"]["0"]["mixer"]["output"]["bias"][:] = 1
    params["blocks"]["0"]["feedforward"]["down"]["bias"][:] = 3
    hidden_BTD = dropped_hidden(params)
    levels = np.rint(hidden_BTD / np.min(np.where(hidden_BTD > 0, hidden_BTD, np.inf), axis=-1, keepdims=True))
    counts = np.bincount(levels.astype(int).ravel(), minlength=9)
    expected = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).ravel() * hidden_BTD.size
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    assert (dropped_hidden(params) == hidden_BTD).all()
    assert (dropped_hidden(params, key=1) != hidden_BTD).mean() > 0.5
    np.testing.assert_allclose(dropped_hidden(params, rate=0.0), np.ones_like(hidden_BTD), rtol=1e-5)


def test_dropout_is_independent_within_a_block_pattern() -> None:
    model = dataclasses.replace(DROPPING, n_layers=4, mixers=("attention", "attention"))
    params = jax.tree.map(np.zeros_like, random_params(model))
    params["norm"]["scale"][:] = 1
    kept = []
    for layer in range(4):
        repeat, index = divmod(layer, 2)
        bias = params["blocks"][str(index)]["feedforward"]["down"]["bias"]
        bias[repeat] = 1
        hidden_BTD = transformer.hidden_states(params, random_tokens()[:4], model, dropout_key=jax.random.key(0))[0]
        # Before the parameters change: JAX may still be reading them.
        kept.append(np.asarray(hidden_BTD) != 0)
        bias[repeat] = 0
    same = [np.mean(kept[one] == kept[other]) for one in range(4) for other in range(one)]
    assert max(same) < 0.6


def test_dropout_applies_to_embeddings() -> None:
    params = silent_params()
    params["embedding"]["table"][:] = 1
    assert np.mean(dropped_hidden(params) == 0) == pytest.approx(0.5, abs=0.05)


def test_dropout_applies_to_attention_weights() -> None:
    """One layer copies its values. The first token attends only to itself, so each of its heads is dropped or kept."""
    params = silent_params()
    mixer = params["blocks"]["0"]["mixer"]
    mixer["value"]["bias"][0] = 1
    mixer["output"]["kernel"][0] = np.eye(128)
    heads = np.stack([dropped_hidden(params, key=key)[:, 0].reshape(4, 4, 32) for key in range(8)])
    assert np.mean((heads == 0).all(-1)) == pytest.approx(0.5, abs=0.15)


# Cost.


@over_cases
def test_flops_match_the_closed_form(case: str) -> None:
    model = model_config(**CASES[case])
    queries, keys = attention_widths(model)
    expected = 2 * model.d_model * 61
    for layer in range(model.n_layers):
        kind, hidden, gated = feedforward_of(model, layer)
        feedforward = model.d_model * (2 + gated) * hidden
        if kind == "moe":
            feedforward = model.moe.experts_per_token * feedforward + model.moe.n_experts * model.d_model
        expected += 2 * (model.d_model * (2 * queries + 2 * keys) + 2 * LENGTH * queries + feedforward)
    assert flops.forward_flops_per_token(model, LENGTH) == expected
    assert flops.training_flops_per_token(model, LENGTH) == 3 * expected


def test_flops_match_the_compiler_estimate() -> None:
    model = model_config(scan_layers=False, d_model=128, context_length=64, feedforwards="gelu")
    shapes = flops.parameter_shapes(model), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    counted = forward.lower(*shapes, model).compile().cost_analysis()["flops"] / 64
    assert counted == pytest.approx(flops.forward_flops_per_token(model, 64), rel=0.1)


# Names.


@pytest.mark.parametrize(
    ("field", "name", "nearest"),
    [
        ("norm", "rmsnom", "rmsnorm"),
        ("positions", ("ropes",), "rope"),
        ("feedforwards", ("swigelu",), "swiglu"),
        ("mixers", ("attenton",), "attention"),
    ],
)
def test_unknown_component_names_suggest_the_nearest(field: str, name: Any, nearest: str) -> None:
    with pytest.raises(UserError, match=f"config.model.{field}: .*Did you mean '{nearest}'"):
        flops.parameter_shapes(model_config(**{field: name}))
