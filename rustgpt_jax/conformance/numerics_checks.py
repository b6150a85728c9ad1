"""Checks of numbers: shapes, dtypes, finite values, precision, gradients, long rows, and the initial scale."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance.components import Component, Scope
from rustgpt_jax.conformance.fixtures import (
    LENGTH,
    LOGIT_AXES,
    Batch,
    CheckFailure,
    assert_finite,
    assert_finite_outputs,
    assert_same_shapes,
    assert_shape,
    format_index,
    initial_params,
    make_batch,
    quick_jit,
    random_params,
    random_tokens,
    run_model,
)
from rustgpt_jax.conformance.packed_sequences import (
    CASES,
    MAX_LENGTH,
    PackedRows,
    compute_influence,
    layouts,
    model_for_long_rows,
    run_forward,
    single_document_rows,
)
from rustgpt_jax.conformance.rounding import (
    DATA,
    EXACT,
    Rounding,
    RoundingAnalysis,
    count_roundings_by_line,
    format_line,
)
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import ON_OUTPUT, Block, layer_groups
from rustgpt_jax.model.flops import equations, parameter_shapes
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.mixers import init_mixer_cache
from rustgpt_jax.pytrees import flatten_paths, format_path

# Shapes and dtypes.


def shapes(component: Component) -> str:
    """Check that blocks keep shape and dtype for any batch and length, and parameters and logits are float32."""
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(component.small_model, dtype=dtype)
        params = jax.eval_shape(lambda model=model: transformer.init(jax.random.key(0), model))
        for name, leaf in flatten_paths(params).items():
            assert_shape(leaf, leaf.shape, "float32", f"the parameter {name} of a {dtype} model")
        for batch, length in ((1, 1), (3, LENGTH - 1)):
            where = f"{batch} x {length} tokens of a {dtype} model"
            _assert_block_shapes(model, params["blocks"], batch, length, where)
            tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
            empty = jax.eval_shape(lambda model=model, batch=batch: transformer.init_cache(model, batch, LENGTH))
            for cached in (None, empty):
                logits, after = jax.eval_shape(
                    lambda params, tokens, cached, model=model: transformer.apply(params, tokens, model, cached),
                    params,
                    tokens,
                    cached,
                )
                assert_shape(logits, (batch, length, model.vocab_size or 0), "float32", f"the logits of {where}")
                assert_same_shapes(after, cached, f"the cache of {where}")
    return "float32 and bfloat16, cached and not"


def _assert_block_shapes(model: ModelConfig, blocks: Any, batch: int, length: int, where: str) -> None:
    x = jax.ShapeDtypeStruct((batch, length, model.d_model), model.dtype)
    positions = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    for index, group in enumerate(layer_groups(model)):
        here = f"block {index} with {where}"
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks[str(index)])
        (y, _, layer_metrics), captured = jax.eval_shape(
            lambda params, x, positions, segments, group=group: Block(group.block).apply(
                {"params": params},
                x,
                BlockInputs(positions, segments),
                None,
                capture_intermediates=lambda module, _: module.name in ("mixer", "feedforward"),
                mutable=["intermediates"],
            ),
            params,
            x,
            positions,
            positions,
        )
        # The residual stream has the model's dtype regardless of what is added to it, so check the sublayers' results.
        for name, config in (("mixer", group.block.mixer_config), ("feedforward", group.block.feedforward_config)):
            # Each `__call__` in the class hierarchy captures a result; the subclass comes after `super().__call__`.
            result = captured["intermediates"][name]["__call__"][-1]
            output = result[0] if isinstance(result, tuple) else result
            assert_shape(output, x.shape, config.dtype, f"the output of the {name} of {here}")
        assert_shape(y, x.shape, model.dtype, f"the output of {here}")
        for name, value in layer_metrics.items():
            assert_shape(value, (), "float32", f"the layer metric {name} of {here}")


# Finite values.

LARGE = np.float32(100.0)


def finite(component: Component) -> str:
    """Check that logits and gradients are finite for ordinary, large and zero activations, in both dtypes."""
    worst = 0.0
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(component.small_model, dtype=dtype)
        ordinary = random_params(component.small_model)
        batch = make_batch(random_tokens(model), model)
        large, zero = _scaled(ordinary, ("scale", "table"), LARGE), _scaled(ordinary, ("bias", "table"), np.float32(0))
        for kind, params in ("ordinary", ordinary), ("large", large), ("zero", zero):
            outputs = run_model(params, batch, model)
            assert_finite_outputs(outputs, f"with {kind} activations in {dtype}")
            worst = max(worst, float(np.abs(outputs.logits_BTV).max()))
    return f"largest logit {worst:.2g}"


def _scaled(params: Any, names: tuple[str, ...], factor: np.float32) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factor if path[-1].key in names else leaf, params)


# Rounding to bfloat16.

# The largest relative error of the logits in the median token: several times that of rounding in a few layers.
BFLOAT16_TOLERANCE = 0.05
# Operations that must not be done in bfloat16: exponentials, logarithms, inverse roots, and long sums and products.
SENSITIVE = ("exp", "exp2", "log", "rsqrt", "reduce_sum", "cumsum", "cumprod", "cumlogsumexp", "reduce_prod")
# Row lengths to compare: values that are rounded once per token or chunk are rounded more often in the longer row.
FEW_TOKENS, MANY_TOKENS = 96, 384


def precision(component: Component) -> str:
    """Check that a bfloat16 model computes exponents, roots and long sums in float32, with logits close to float32."""
    model = component.small_model
    low = dataclasses.replace(model, dtype="bfloat16")
    for what, line, dtype in _find_roundings(low):
        raise CheckFailure(what, line, f"{dtype}, where float32 is needed; use `matmul.to_float32`")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), random_params(model))
    batch = make_batch(random_tokens(model), model)
    found, expected = (run_model(params, batch, each).logits_BTV.astype(np.float64) for each in (low, model))
    error_BT = np.sqrt(np.mean(np.square(found - expected), -1) / np.mean(np.square(expected), -1))
    error = float(np.median(error_BT))
    if not error <= BFLOAT16_TOLERANCE:
        worst = np.unravel_index(int(np.argmax(error_BT)), error_BT.shape)
        raise CheckFailure(
            "the logits in bfloat16 differ from those in float32",
            format_index(worst, LOGIT_AXES),
            f"a relative error of {error_BT[worst]:.2g} there and {error:.2g} in the median token "
            f"({BFLOAT16_TOLERANCE:.0e} is allowed)",
        )
    return f"bfloat16 within {error:.1%}"


def _find_roundings(model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Yield operations that should not be done in bfloat16: a description, the source line and the dtype."""
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: transformer.apply(params, tokens, model)[0])(params, tokens)
    for equation, _ in equations(program.jaxpr):
        if equation.primitive.name in SENSITIVE and equation.invars[0].aval.dtype == jnp.bfloat16:
            what = f"`{equation.primitive.name}` is computed in bfloat16"
            yield what, format_line(equation), equation.invars[0].aval.str_short()
    for group, block_params in zip(layer_groups(model), params["blocks"].values(), strict=True):
        yield from _find_repeated_roundings(group.block, block_params, model)


def _find_repeated_roundings(block: ModelConfig, params: Any, model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Yield states and decays of a block that are rounded below float32 once per token, chunk or call."""
    longest_paths = []
    for length in FEW_TOKENS, MANY_TOKENS:
        analysis, outputs = _analyze_block(block, params, model, length)
        for what, equation, array in analysis.found:
            yield what, format_line(equation), array.str_short()
        longest_paths.append(max(outputs, key=lambda output: output.depth))
    few, many = longest_paths
    if many.depth > few.depth:
        what = f"roundings to fewer bits than float32 add up: {few.depth} in succession in "
        more = count_roundings_by_line(many) - count_roundings_by_line(few)
        line = more.most_common(1)[0][0] if more else format_line(many.path[0])
        yield what + f"{FEW_TOKENS} tokens and {many.depth} in {MANY_TOKENS}", line, model.dtype
    cached = jax.eval_shape(lambda: init_mixer_cache(block, 1, FEW_TOKENS))
    for index, name in enumerate(flatten_paths(cached)):
        _, outputs = _analyze_block(block, params, model, 1, cached, index)
        after = outputs[1 + index]
        for suspect in after.suspects:
            what = "a state in the cache is multiplied by a decay that was rounded"
            yield what, format_line(suspect.equation), suspect.rounded.str_short()
        if after.is_state and after.depth > MANY_TOKENS:
            what = f"the cache keeps its state {name} in fewer bits than float32".replace("  ", " ")
            yield what, format_line(after.path[0]), after.path[0].outvars[0].aval.str_short()


def _analyze_block(
    block: ModelConfig, params: Any, model: ModelConfig, length: int, cached: Any = None, followed: int = -1
) -> tuple[RoundingAnalysis, list[Rounding]]:
    """Analyze a block over some tokens; return the analysis, and the roundings of its output and each cache array.

    The cache array with the index `followed` is treated as if it had been rounded MANY_TOKENS times.
    """
    x = jax.ShapeDtypeStruct((1, length, model.d_model), model.dtype)
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    program = jax.make_jaxpr(
        lambda params, cache, x, positions, segments: Block(block).apply(
            {"params": params}, x, BlockInputs(positions, segments), cache
        )[:2]
    )(params, cached, x, positions, positions)
    arrays = [
        Rounding(MANY_TOKENS, is_exact=True, kind=DATA, is_state=True) if index == followed else Rounding(kind=DATA)
        for index in range(len(jax.tree.leaves(cached)))
    ]
    inputs = [Rounding()] * len(jax.tree.leaves(params)) + arrays + [Rounding(is_exact=True, kind=DATA), EXACT, EXACT]
    analysis = RoundingAnalysis()
    return analysis, analysis.follow(program.jaxpr, inputs)


# Gradients.

# Steps of finite differences: a kink or rounding errors may spoil one of them, but hardly all.
STEPS = (1e-5, 1e-4, 1e-6)
# Lengths on both sides of the thresholds at which components switch to chunked computation.
GRADIENT_LENGTHS = {
    Scope.SMALL: (17,),
    Scope.QUICK: (15, 40, 130),
    Scope.EXHAUSTIVE: (LENGTH, 15, 17, 31, 33, 63, 65, 101, 127, 129, 255, 257),
}
# For components that compute each token independently.
TOKENWISE_LENGTHS = (40,)
WITH_MIXERS = ("mixers", "families")
GRADIENT_TOLERANCE = 1e-4
# The largest median of the relative errors of derivatives in bfloat16.
BFLOAT16_GRADIENT_TOLERANCE = 0.2


def gradients(component: Component) -> str:
    """Check gradients against finite differences along a random direction of each parameter, in float64.

    Covers row lengths on both sides of chunk thresholds; one row holds several documents. Also checks that bfloat16
    gradients, which may use custom derivatives, are close to those of float32.
    """
    has_mixers, scope = component.kind in WITH_MIXERS, component.scope
    lengths = TOKENWISE_LENGTHS if scope is Scope.QUICK and not has_mixers else GRADIENT_LENGTHS[scope]
    model = model_for_long_rows(component)
    worst = max(_assert_gradients(model, length) for length in lengths)
    if has_mixers and scope is not Scope.SMALL:
        case = CASES[scope][0]
        found, expected = (
            compute_influence(model, case._replace(dtype=dtype)).gradients_KBT for dtype in ("bfloat16", "float32")
        )
        # Rounding can change a few entries a lot, for example by changing the choice of an expert.
        is_nonzero = expected > 0
        error = float(np.median(np.abs(found - expected)[is_nonzero] / expected[is_nonzero]))
        if not error <= BFLOAT16_GRADIENT_TOLERANCE:
            shown = f"a relative error of {error:.2g} in the median ({BFLOAT16_GRADIENT_TOLERANCE} is allowed)"
            what = "the gradients in bfloat16 differ from those in float32"
            raise CheckFailure(what, f"rows of {case.length} tokens", shown)
    count = len(jax.tree.leaves(random_params(model)))
    return f"{count} parameters, rows of {', '.join(map(str, lengths))} tokens: within {worst:.0e}"


def _assert_gradients(model: ModelConfig, length: int) -> float:
    double = dataclasses.replace(model, dtype="float64")
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size or 0, (2, length)).astype(np.int32)
    batch = make_batch(tokens_BT, model, *layouts(2, length))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), random_params(model))
        batch = batch._replace(weights_BTV=batch.weights_BTV.astype(np.float64), aux_weight=np.float64(1.0))
        gradient = flatten_paths(run_model(params, batch, double).gradient)
        # A lower bound for the scale of errors, since some gradients would be 0 without rounding.
        noise = 1e-6 * max(float(np.linalg.norm(leaf)) for leaf in gradient.values())
        # One wrong derivative makes the gradients of all parameters before it wrong; the worst is reported.
        worst, failure = 0.0, None
        for seed, name in enumerate(gradient):
            direction = np.random.default_rng(seed).standard_normal(gradient[name].shape)
            slope = float(np.vdot(gradient[name], direction))
            # The typical slope along a random direction: this one may be small by chance.
            scale = max(abs(slope), 0.1 * float(np.linalg.norm(gradient[name])))
            error, nearest = np.inf, 0.0
            for step in STEPS:
                ahead, behind = (_total_at(params, name, sign * step * direction, batch, double) for sign in (1, -1))
                difference = (ahead - behind) / (2 * step)
                error_here = abs(difference - slope) / max(scale, abs(difference), noise)
                if error_here < error:
                    error, nearest = error_here, difference
                if error <= GRADIENT_TOLERANCE:
                    break
            if not error <= worst:
                worst = error
                failure = CheckFailure(
                    f"the gradient differs from finite differences, in rows of {length} tokens",
                    f"the parameter {name}",
                    f"{slope:.6g} along a random direction by the gradient and {nearest:.6g} by finite differences, "
                    f"a relative error of {worst:.1g} ({GRADIENT_TOLERANCE:.0e} is allowed)",
                )
    if failure and not worst <= GRADIENT_TOLERANCE:
        raise failure
    return worst


def _total_at(params: Any, name: str, change: np.ndarray, batch: Batch, model: ModelConfig) -> float:
    """Return the weighted sum with one parameter changed, by the same program that computes gradients."""
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + change if format_path(path) == name else leaf, params
    )
    return float(run_model(changed, batch, model).total)


# Rounding errors along long rows.

# Token ranges whose median errors are compared: near the beginning, where bfloat16 represents every position exactly,
# and at the end.
EARLY, LATE = slice(64, 256), slice(MAX_LENGTH - 512, MAX_LENGTH)
# Largest allowed ratio of the error at the end to the error near the beginning. For attention it is below 1.5.
MAX_GROWTH = 3.0
# Quantile of the output errors that may be at most MAX_ERROR. The largest errors are ignored, because rounding can
# change a few tokens a lot, for example by changing the choice of an expert.
QUANTILE = 0.95
MAX_ERROR = {"bfloat16": 0.2, "float32": 1e-3}
# The error of single operations, and thus a lower bound for the error near the beginning.
NOISE = {"bfloat16": 3e-3, "float32": 1e-6}


def drift(component: Component) -> str:
    """Check that over 4,096 tokens, bfloat16 and float32 errors against float64 grow no faster than attention's.

    Uses initial parameters, whose decays are as slow as at the beginning of training.
    """
    model = _with_one_head(model_for_long_rows(component))
    params = initial_params(model)
    packed = single_document_rows(model, 1, MAX_LENGTH)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        exact = PackedRows(packed.x_BTD.astype(np.float64), *packed[1:])
        expected = run_forward(double, exact, dataclasses.replace(model, dtype="float64"))
    assert_finite(expected, f"in float64 an output is not finite in a row of {MAX_LENGTH} tokens", ("row", "token"))
    notes = []
    for dtype in ("float32", "bfloat16"):
        found = run_forward(params, packed, dataclasses.replace(model, dtype=dtype)).astype(np.float64)
        assert_finite(found, f"in {dtype} an output is not finite in a row of {MAX_LENGTH} tokens", ("row", "token"))
        error_T = np.sqrt(np.mean(np.square(found - expected), axis=(0, 2)) / np.mean(np.square(expected)))
        early, late = (float(np.median(error_T[tokens])) for tokens in (EARLY, LATE))
        error = float(np.quantile(error_T, QUANTILE))
        growth = late / max(early, NOISE[dtype])
        if not (growth <= MAX_GROWTH and error <= MAX_ERROR[dtype]):
            raise CheckFailure(
                f"the error of {dtype} grows along the row",
                f"tokens {LATE.start} to {LATE.stop}",
                f"{late:.2g} of the outputs there and {early:.2g} at tokens {EARLY.start} to {EARLY.stop}, {error:.2g} "
                f"in {QUANTILE:.0%} of all ({MAX_GROWTH:.2g} times as much, and {MAX_ERROR[dtype]:.0e}, are allowed)",
            )
        notes.append(f"{dtype} {early:.1g} to {late:.1g}")
    return f"error over {MAX_LENGTH} tokens: {', '.join(notes)}"


def _with_one_head(model: ModelConfig) -> ModelConfig:
    """Return the model with one head, to save memory in long rows, or unchanged if it needs several."""
    heads = {"attention.n_heads": 1, "attention.n_kv_heads": 1, "attention.head_dim": model.head_width}
    one = replace_paths(model, heads)
    try:
        parameter_shapes(one)
    except Exception:
        return model
    return one


# The scale at initialization.

DEPTH = 16
SEEDS = 3
# Limits of the residual stream's root mean square after each of DEPTH layers; it is 1 before the first.
MIN_SCALE, MAX_SCALE = 0.5, 4.0
LOSS_TOLERANCE = 0.1
USUAL_STD = 0.02


@partial(quick_jit, static_argnums=2)
def _profile(key: jax.Array, init_std: Any, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Return the root mean square of the residual stream after each layer, and the loss, with initial parameters."""
    model = dataclasses.replace(model, init_std=init_std)
    init_key, x_key, tokens_key = jax.random.split(key, 3)
    params = transformer.init(init_key, model)
    x_BTD = jax.random.normal(x_key, (4, LENGTH, model.d_model))
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH)[None], (4, LENGTH))
    inputs = BlockInputs(positions_BT, jnp.ones_like(positions_BT))

    def apply_pattern(x_BTD: jax.Array, blocks: Any) -> tuple[jax.Array, jax.Array]:
        scales = []
        for index in range(model.period):
            applied: Any = Block(model.block(index)).apply({"params": blocks[str(index)]}, x_BTD, inputs, None)
            x_BTD = applied[0]
            scales.append(jnp.sqrt(jnp.mean(jnp.square(x_BTD))))
        return x_BTD, jnp.stack(scales)

    _, scales = jax.lax.scan(apply_pattern, x_BTD, params["blocks"])
    tokens_BT = jax.random.randint(tokens_key, (4, LENGTH), 0, model.vocab_size or 0)
    log_probs_BTV = jax.nn.log_softmax(transformer.apply(params, tokens_BT, model)[0])
    log_probs_BT1 = jnp.take_along_axis(log_probs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    return scales.reshape(-1), -jnp.mean(log_probs_BT1)


def initial_scale(component: Component) -> str:
    """Check that initially the residual stream keeps its scale over 16 layers and the loss is ln(vocab_size)."""
    model = component.small_model
    model = dataclasses.replace(model, n_layers=model.period * math.ceil(DEPTH / model.period))
    # Norms on the outputs of sublayers make each of these as large as what they are added to.
    limit = 2 * math.sqrt(1 + 2 * model.n_layers) if model.norm_placement in ON_OUTPUT else MAX_SCALE
    last_scales = []
    for seed in range(SEEDS):
        std = np.float32(model.d_model**-0.5)
        scales, _ = jax.device_get(_profile(jax.random.key(seed), std, model))
        outside = np.flatnonzero(~((scales >= MIN_SCALE) & (scales <= limit)))
        if len(outside):
            raise CheckFailure(
                "the residual stream grows or shrinks over the layers",
                f"layer {outside[0]}, seed {seed}",
                f"a root mean square of {scales[outside[0]]:.3g} there and {scales[-1]:.3g} at the end, from 1 before "
                f"the first layer ({MIN_SCALE} to {limit:.2g} is allowed)",
            )
        last_scales.append(float(scales[-1]))
    _, loss = jax.device_get(_profile(jax.random.key(0), np.float32(USUAL_STD), model))
    expected = math.log(model.vocab_size or 1)
    if not abs(loss - expected) <= LOSS_TOLERANCE:
        raise CheckFailure(
            "the initial loss differs from the loss of a uniform guess",
            f"initial parameters with init_std {USUAL_STD}",
            f"{loss:.3f}, not about ln(vocab_size) = {expected:.3f}",
        )
    return f"{min(last_scales):.2f} to {max(last_scales):.2f} after {model.n_layers} layers, from 1; loss {loss:.2f}"
