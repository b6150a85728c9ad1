"""Shapes and types; finite values; how much bfloat16 costs; and gradients against finite differences."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.fixtures import LENGTH, ROWS_OF_LOGITS, Broken, place, require_finite, require_same_tree
from rustgpt_jax.conformance.long_row_checks import Case, influence, layout, long_model
from rustgpt_jax.conformance.rounding_checks import DATA, EXACT, Reading, Traced, line_of, roundings_by_line
from rustgpt_jax.conformance.targets import Scope, Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import Block, layer_groups
from rustgpt_jax.model.flops import equations
from rustgpt_jax.model.interfaces import BlockInputs
from rustgpt_jax.model.mixers import init_mixer_cache
from rustgpt_jax.pytrees import flatten_paths, format_path

LARGE = 100.0
# Of the logits in bfloat16, in the median token: what rounding costs in a few layers, several times over.
BFLOAT16_ERROR = 0.05
# What is not to be done to numbers of 8 bits: their results are used as exponents, divisors or long sums.
DELICATE = ("exp", "exp2", "log", "rsqrt", "reduce_sum", "cumsum", "cumprod", "cumlogsumexp", "reduce_prod")
# Row lengths to compare: values that are rounded once per token or chunk are rounded more often in the longer row.
FEW_TOKENS, MANY_TOKENS = 96, 384
# Relative steps of finite differences: a kink or a rounding error spoils one, hardly all.
STEPS = (1e-5, 1e-4, 1e-6)
# Lengths on both sides of the thresholds at which parts switch to chunked computation.
LENGTHS = {
    Scope.SMALL: (17,),
    Scope.QUICK: (15, 40, 130),
    Scope.EXHAUSTIVE: (LENGTH, 15, 17, 31, 33, 63, 65, 101, 127, 129, 255, 257),
}
# For parts that compute each token by itself.
TOKENWISE_LENGTHS = (40,)
WITH_MIXERS = ("mixers", "families")
GRADIENT_ERROR = 1e-4
# Largest allowed median relative error of bfloat16 derivatives.
SLOPE_ERROR = 0.2


def shapes(subject: Subject) -> str:
    """Blocks give what they get in shape and type, for any batch and length, and parameters and logits are float32."""
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(subject.small_model, dtype=dtype)
        params = jax.eval_shape(lambda model=model: transformer.init(jax.random.key(0), model))
        for name, leaf in flatten_paths(params).items():
            _require_type(leaf, leaf.shape, "float32", f"the parameter {name}", f"a {dtype} model")
        for batch, length in ((1, 1), (3, LENGTH - 1)):
            where = f"{batch} x {length} tokens of a {dtype} model"
            _require_block_shapes(model, params["blocks"], batch, length, where)
            tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
            cache = jax.eval_shape(lambda model=model, batch=batch: transformer.init_cache(model, batch, LENGTH))
            for kept in (None, cache):
                logits, after = jax.eval_shape(
                    lambda params, tokens, kept, model=model: transformer.apply(params, tokens, model, kept),
                    params,
                    tokens,
                    kept,
                )
                _require_type(logits, (batch, length, model.vocab_size), "float32", "the logits", where)
                _require_same_tree(kept, after, where)
    return "float32 and bfloat16, cached and not"


def _require_block_shapes(model: ModelConfig, blocks: Any, batch: int, length: int, where: str) -> None:
    x = jax.ShapeDtypeStruct((batch, length, model.d_model), model.dtype)
    places = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    for index, stack in enumerate(layer_groups(model)):
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks[str(index)])
        (y, _, layer_metrics), kept = jax.eval_shape(
            lambda params, x, positions, segments, stack=stack: Block(stack.block).apply(
                {"params": params},
                x,
                BlockInputs(positions, segments),
                None,
                capture_intermediates=lambda module, _: module.name in ("mixer", "feedforward"),
                mutable=["intermediates"],
            ),
            one,
            x,
            places,
            places,
        )
        # The residual stream has its own type whatever is added to it: the parts' own results are asked for theirs.
        for name, own in (("mixer", stack.block.mixer_config), ("feedforward", stack.block.feedforward_config)):
            # There is one result per `__call__` in the class hierarchy; a subclass's result follows that of
            # `super().__call__`.
            result = kept["intermediates"][name]["__call__"][-1]
            y_part = result[0] if isinstance(result, tuple) else result
            _require_type(y_part, x.shape, own.dtype, f"the output of the {name} of block {index}", where)
        _require_type(y, x.shape, model.dtype, f"the output of block {index}", where)
        for name, value in layer_metrics.items():
            _require_type(value, (), "float32", f"the layer metric {name} of block {index}", where)


def _require_type(array: Any, shape: Any, dtype: str, what: str, where: str) -> None:
    if (tuple(array.shape), str(array.dtype)) != (tuple(shape), dtype):
        raise Broken(
            f"{what} has the wrong shape or type",
            where,
            f"{array.dtype}{list(array.shape)} instead of {dtype}{list(shape)}",
        )


def _require_same_tree(before: Any, after: Any, where: str) -> None:
    require_same_tree(after, before, f"the cache of {where}")
    found = flatten_paths(after)
    for name, leaf in flatten_paths(before).items():
        _require_type(found[name], leaf.shape, str(leaf.dtype), f"the cache {name}", where)


def finite(subject: Subject) -> str:
    """Values and gradients are finite for ordinary activations, for large ones and for zeros, in both types."""
    worst = 0.0
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(subject.small_model, dtype=dtype)
        ordinary = fixtures.random_params(subject.small_model)
        rows = fixtures.rows_of(fixtures.random_tokens(model), model)
        for kind, params in ("ordinary", ordinary), ("large", _magnified(ordinary)), ("zero", _with_zeros(ordinary)):
            result = fixtures.run(params, rows, model)
            where = f"{kind} activations in {dtype}"
            require_finite(result.logits_BTV, f"a logit is not finite with {where}", ROWS_OF_LOGITS)
            for name, leaf in flatten_paths(result.gradient).items():
                require_finite(leaf, f"the gradient of {name} is not finite with {where}", ())
            worst = max(worst, float(np.abs(result.logits_BTV).max()))
    return f"largest logit {worst:.2g}"


def _magnified(params: Any) -> Any:
    """Embeddings and what norms give, times LARGE."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(LARGE) if path[-1].key in ("scale", "table") else leaf, params
    )


def _with_zeros(params: Any) -> Any:
    """Embeddings and biases of 0, so that the first block gets zeros."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(0) if path[-1].key in ("bias", "table") else leaf, params
    )


def precision(subject: Subject) -> str:
    """A bfloat16 model takes exponents, roots and long sums in float32, and its logits are those of float32 closely."""
    model = subject.small_model
    half = dataclasses.replace(model, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: np.asarray(jnp.bfloat16(leaf), np.float32), fixtures.random_params(model))
    rows = fixtures.rows_of(fixtures.random_tokens(model), model)
    for what, line, numbers in _delicate_in_bfloat16(half):
        raise Broken(what, line, f"{numbers}, where float32 is needed; `precision.widened` gives it")
    found = fixtures.run_forward(params, rows, half)[1].astype(np.float64)
    # Shares its compiled program with other checks.
    expected = fixtures.run(params, rows, model).logits_BTV.astype(np.float64)
    error_BT = np.sqrt(np.mean(np.square(found - expected), -1) / np.mean(np.square(expected), -1))
    error = float(np.median(error_BT))
    if not error <= BFLOAT16_ERROR:
        worst = np.unravel_index(int(np.argmax(error_BT)), error_BT.shape)
        raise Broken(
            "in bfloat16 the logits are others",
            place(worst, ROWS_OF_LOGITS),
            f"a relative error of {error_BT[worst]:.2g} there and {error:.2g} in the median token "
            f"({BFLOAT16_ERROR:.0e} is allowed)",
        )
    return f"bfloat16 within {error:.1%}"


def _delicate_in_bfloat16(model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Yield operations that should not be done in bfloat16: a description, the source line and the dtype."""
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: transformer.apply(params, tokens, model)[0])(params, tokens)
    for equation, _ in equations(program.jaxpr):
        if equation.primitive.name in DELICATE and equation.invars[0].aval.dtype == jnp.bfloat16:
            what = f"`{equation.primitive.name}` is taken of bfloat16 numbers"
            yield what, line_of(equation), equation.invars[0].aval.str_short()
    for stack, params_of_block in zip(layer_groups(model), params["blocks"].values(), strict=True):
        yield from _rounded_along_the_row(stack.block, params_of_block, model)


def _rounded_along_the_row(block: ModelConfig, params: Any, model: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """Yield states and decays of a block that are rounded below float32 once per token, chunk or call."""
    depths = []
    for length in FEW_TOKENS, MANY_TOKENS:
        reading, outputs = _read(block, params, model, length, None)
        for what, equation, numbers in reading.found:
            yield what, line_of(equation), numbers.str_short()
        depths.append(max(outputs, key=lambda output: output.depth))
    few, many = depths
    if many.depth > few.depth:
        what = f"roundings to fewer bits than float32 add up: {few.depth}, one on top of another, in "
        more = roundings_by_line(many) - roundings_by_line(few)
        line = more.most_common(1)[0][0] if more else line_of(many.path[0])
        yield what + f"{FEW_TOKENS} tokens and {many.depth} in {MANY_TOKENS}", line, model.dtype
    cached = jax.eval_shape(lambda: init_mixer_cache(block, 1, FEW_TOKENS))
    for index, name in enumerate(flatten_paths(cached)):
        reading, outputs = _read(block, params, model, 1, (cached, index))
        after = outputs[1 + index]
        for suspect in after.suspects:
            what = "a state in the cache is multiplied by a decay that was rounded"
            yield what, line_of(suspect.equation), suspect.numbers.str_short()
        if after.is_state and after.depth > MANY_TOKENS:
            what = f"the cache keeps its state {name} in fewer bits than float32".replace("  ", " ")
            yield what, line_of(after.path[0]), after.path[0].outvars[0].aval.str_short()


def _read(
    block: ModelConfig, params: Any, model: ModelConfig, length: int, cached: tuple[Any, int] | None
) -> tuple[Reading, list[Traced]]:
    """Analyze a block over some tokens; return the analysis of its output and of each cache array.

    Args:
        block: The block.
        params: Its parameters.
        model: The model config.
        length: The number of tokens.
        cached: A cache, and the index of the array in it to follow as if it had been rounded MANY_TOKENS times.
    """
    x = jax.ShapeDtypeStruct((1, length, model.d_model), model.dtype)
    places = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    cache, followed = (None, -1) if cached is None else cached
    program = jax.make_jaxpr(
        lambda params, cache, x, positions, segments: Block(block).apply(
            {"params": params}, x, BlockInputs(positions, segments), cache
        )[:2]
    )(params, cache, x, places, places)
    n_params, n_cached = len(jax.tree.leaves(params)), len(jax.tree.leaves(cache))
    arrays = [
        Traced(MANY_TOKENS, is_exact=True, kind=DATA, is_state=True) if index == followed else Traced(kind=DATA)
        for index in range(n_cached)
    ]
    reading = Reading()
    activations = Traced(is_exact=True, kind=DATA)
    outputs = reading.follow(program.jaxpr, [Traced()] * n_params + arrays + [activations, EXACT, EXACT])
    return reading, outputs


def gradients(subject: Subject) -> str:
    """Check each parameter's derivative along a random direction against finite differences, in float64.

    Covers row lengths on both sides of chunk thresholds; one row holds several documents. Also checks that bfloat16
    gradients, which may use custom derivatives, are close to those of float32.
    """
    has_mixers = subject.kind in WITH_MIXERS
    lengths = LENGTHS[subject.scope] if has_mixers or subject.scope is not Scope.QUICK else TOKENWISE_LENGTHS
    # One repeat of the layers compiles faster than a loop; the check of `layers` compares their gradients.
    small = long_model(subject.small_model)
    worst = max(_require_gradients(small, length) for length in lengths)
    if has_mixers and subject.scope is not Scope.SMALL:
        _require_slopes_of_bfloat16(small)
    count = len(jax.tree.leaves(fixtures.random_params(small)))
    return f"{count} parameters, rows of {', '.join(map(str, lengths))} tokens: within {worst:.0e}"


def _require_slopes_of_bfloat16(model: ModelConfig) -> None:
    found, expected = (influence(model, Case(33, 3, dtype)).slopes_KBT for dtype in ("bfloat16", "float32"))
    is_seen = expected > 0
    # Rounding can change a few entries a lot, for example by changing the choice of an expert.
    error = float(np.median(np.abs(found - expected)[is_seen] / expected[is_seen]))
    if not error <= SLOPE_ERROR:
        shown = f"a relative error of {error:.2g} in the median ({SLOPE_ERROR} is allowed)"
        raise Broken("the slopes of bfloat16 are not those of float32", "rows of 33 tokens", shown)


def _require_gradients(small: ModelConfig, length: int) -> float:
    model = dataclasses.replace(small, dtype="float64")
    tokens_BT = np.random.default_rng(0).integers(0, small.vocab_size or 0, (2, length)).astype(np.int32)
    layouts = [layout(length, row) for row in range(2)]
    positions_BT, segments_BT = (np.stack(each).astype(np.int32) for each in zip(*layouts, strict=True))
    rows = fixtures.rows_of(tokens_BT, small, positions_BT, segments_BT)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), fixtures.random_params(small))
        rows = rows._replace(weights_BTV=rows.weights_BTV.astype(np.float64), auxiliary=np.float64(1.0))
        gradient = flatten_paths(fixtures.run(params, rows, model).gradient)
        # What is smaller is rounding: some gradients would be 0 without it.
        noise = 1e-6 * max(float(np.linalg.norm(leaf)) for leaf in gradient.values())
        # A wrong slope in one place makes all that come before it wrong: the one that is most so is shown.
        worst, shown = 0.0, Broken("", "", "")
        for number, name in enumerate(gradient):
            direction = np.random.default_rng(number).standard_normal(gradient[name].shape)
            slope = float(np.vdot(gradient[name], direction))
            # What a slope is like whose direction is not against the gradient by chance.
            size = max(abs(slope), 0.1 * float(np.linalg.norm(gradient[name])))
            error, nearest = np.inf, 0.0
            for step in STEPS:
                ahead, behind = (_total_at(params, name, sign * step * direction, rows, model) for sign in (1, -1))
                difference = (ahead - behind) / (2 * step)
                error_here = abs(difference - slope) / max(size, abs(difference), noise)
                if error_here < error:
                    error, nearest = error_here, difference
                if error <= GRADIENT_ERROR:
                    break
            if not error <= worst:
                worst = error
                shown = Broken(
                    f"the gradient is not the slope of the function, in rows of {length} tokens",
                    f"the parameter {name}",
                    f"a gradient of {slope:.6g} along a random direction and a slope of {nearest:.6g}, a relative "
                    f"error of {worst:.1g} ({GRADIENT_ERROR:.0e} is allowed)",
                )
    if not worst <= GRADIENT_ERROR:
        raise shown
    return worst


def _total_at(params: Any, name: str, moved: np.ndarray, rows: fixtures.Rows, model: ModelConfig) -> float:
    """Return the weighted sum with one parameter moved; a forward pass alone would be compiled for this only."""
    there = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + moved if format_path(path) == name else leaf, params
    )
    return float(fixtures.run(there, rows, model).total)
