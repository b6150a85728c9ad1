"""Shapes and types; finite values; how much bfloat16 costs; and gradients against finite differences."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.conformance import programs
from rustgpt_jax.conformance.broken import ROWS_OF_LOGITS, Broken, place, require_finite, require_same_tree
from rustgpt_jax.conformance.jaxprs import line_of, loop_state
from rustgpt_jax.conformance.small import LENGTH
from rustgpt_jax.conformance.subjects import Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.model.block import Block
from rustgpt_jax.model.context import Context
from rustgpt_jax.model.cost import equations, inner_programs
from rustgpt_jax.model.paths import by_path, path_name
from rustgpt_jax.model.stacks import stacks

LARGE = 100.0
# Of the logits in bfloat16, in the median token: what rounding costs in a few layers, several times over.
BFLOAT16_ERROR = 0.05
# What is not to be done to numbers of 8 bits: their results are used as exponents, divisors or long sums.
DELICATE = ("exp", "exp2", "log", "rsqrt", "reduce_sum", "cumsum", "cumprod", "cumlogsumexp", "reduce_prod")
# Relative steps of finite differences: a kink or a rounding error spoils one, hardly all.
STEPS = (1e-4, 1e-5, 1e-6)
GRADIENT_ERROR = 1e-4


def shapes(subject: Subject) -> str:
    """Blocks give what they get in shape and type, for any batch and length, and parameters and logits are float32."""
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(subject.small_model, dtype=dtype)
        params = jax.eval_shape(lambda model=model: transformer.init(jax.random.key(0), model))
        for name, leaf in by_path(params).items():
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
    for index, stack in enumerate(stacks(model)):
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks[str(index)])
        (y, _, signals), kept = jax.eval_shape(
            lambda params, x, positions, segments, stack=stack: Block(stack.block).apply(
                {"params": params},
                x,
                Context(positions, segments),
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
        for name, own in (("mixer", stack.block.for_mixer), ("feedforward", stack.block.for_feedforward)):
            # One result for each `__call__` on the way: that of a subclass comes after that of `super().__call__`.
            result, *_ = kept["intermediates"][name]["__call__"][-1]
            _require_type(result, x.shape, own.dtype, f"the output of the {name} of block {index}", where)
        _require_type(y, x.shape, model.dtype, f"the output of block {index}", where)
        for name, signal in signals.items():
            _require_type(signal, (), "float32", f"the signal {name} of block {index}", where)


def _require_type(array: Any, shape: Any, dtype: str, what: str, where: str) -> None:
    if (tuple(array.shape), str(array.dtype)) != (tuple(shape), dtype):
        raise Broken(
            f"{what} has the wrong shape or type",
            where,
            f"{array.dtype}{list(array.shape)} instead of {dtype}{list(shape)}",
        )


def _require_same_tree(before: Any, after: Any, where: str) -> None:
    require_same_tree(after, before, f"the cache of {where}")
    found = by_path(after)
    for name, leaf in by_path(before).items():
        _require_type(found[name], leaf.shape, str(leaf.dtype), f"the cache {name}", where)


def finite(subject: Subject) -> str:
    """Values and gradients are finite for ordinary activations, for large ones and for zeros, in both types."""
    worst = 0.0
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(subject.small_model, dtype=dtype)
        ordinary = programs.random_params(subject.small_model)
        rows = programs.rows_of(programs.random_tokens(model), model)
        for kind, params in ("ordinary", ordinary), ("large", _magnified(ordinary)), ("zero", _with_zeros(ordinary)):
            result = programs.run(params, rows, model)
            where = f"{kind} activations in {dtype}"
            require_finite(result.logits_BTV, f"a logit is not finite with {where}", ROWS_OF_LOGITS)
            for name, leaf in by_path(result.gradient).items():
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
    params = jax.tree.map(lambda leaf: np.asarray(jnp.bfloat16(leaf), np.float32), programs.random_params(model))
    rows = programs.rows_of(programs.random_tokens(model), model)
    for what, equation, numbers in _delicate_in_bfloat16(half):
        shown = f"{numbers.str_short()}, which has 8 bits; `precision.widened` gives float32"
        raise Broken(what, line_of(equation), shown)
    found, expected = (programs.run(params, rows, each).logits_BTV.astype(np.float64) for each in (half, model))
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


def _delicate_in_bfloat16(model: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """What is done to bfloat16 numbers and should not be: in words, the equation, and the type of the numbers."""
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: transformer.apply(params, tokens, model)[0])(params, tokens)
    for equation, _ in equations(program.jaxpr):
        if equation.primitive.name in DELICATE and equation.invars[0].aval.dtype == jnp.bfloat16:
            what = f"`{equation.primitive.name}` is taken of bfloat16 numbers"
            yield what, equation, equation.invars[0].aval
    layers = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan"]
    for body in (body for loop in layers for body in inner_programs(loop)):
        for loop, _ in equations(body):
            for state in loop_state(loop):
                if state.dtype == jnp.bfloat16:
                    yield "a loop inside a layer keeps its state in bfloat16", loop, state


def gradients(subject: Subject) -> str:
    """The slope along a random direction of each parameter, in float64, against differences of the function itself."""
    model = dataclasses.replace(subject.small_model, dtype="float64")
    single = programs.random_params(subject.small_model)
    rows = programs.rows_of(programs.random_tokens(subject.small_model)[:2], subject.small_model)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), single)
        rows = rows._replace(weights_BTV=rows.weights_BTV.astype(np.float64), auxiliary=np.float64(1.0))
        gradient = by_path(programs.run(params, rows, model).gradient)
        # What is smaller is rounding: some gradients would be 0 without it.
        noise = 1e-6 * max(float(np.linalg.norm(leaf)) for leaf in gradient.values())
        # A wrong slope in one place makes all that come before it wrong: the one that is most so is shown.
        worst, shown = 0.0, Broken("", "", "")
        for number, name in enumerate(gradient):
            direction = np.random.default_rng(number).standard_normal(gradient[name].shape)
            slope = float(np.vdot(gradient[name], direction))
            # What a slope is like whose direction is not against the gradient by chance.
            size = max(abs(slope), 0.1 * float(np.linalg.norm(gradient[name])))
            errors = {}
            for step in STEPS:
                ahead, behind = (_total_at(params, name, sign * step * direction, rows, model) for sign in (1, -1))
                difference = (ahead - behind) / (2 * step)
                errors[difference] = abs(difference - slope) / max(size, abs(difference), noise)
            nearest = min(errors, key=lambda difference: errors[difference])
            if not errors[nearest] <= worst:
                worst = errors[nearest]
                shown = Broken(
                    "the gradient is not the slope of the function",
                    f"the parameter {name}",
                    f"a gradient of {slope:.6g} along a random direction and a slope of {nearest:.6g}, a relative "
                    f"error of {worst:.1g} ({GRADIENT_ERROR:.0e} is allowed)",
                )
    if not worst <= GRADIENT_ERROR:
        raise shown
    return f"{len(gradient)} parameters within {worst:.0e}"


def _total_at(params: Any, name: str, moved: np.ndarray, rows: programs.Rows, model: ModelConfig) -> float:
    """The weighted sum with one parameter moved."""
    there = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + moved if path_name(path) == name else leaf, params
    )
    return float(programs.run(there, rows, model).total)
