"""Fixtures that all checks share: assertions, the small model, its parameters and batches, and compiled programs."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, build, fields_by_path, flatten, get_path
from rustgpt_jax.config.validation import check_model, unknown_key_message, validate_value
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import transformer
from rustgpt_jax.model.interfaces import AUX_LOSS
from rustgpt_jax.pytrees import flatten_paths

# Assertions.

LOGIT_AXES = ("row", "token", "logit")
MAX_MESSAGE_LENGTH = 240


class CheckFailure(Exception):
    """Raised when a component fails a check: what is wrong, where, and by how much."""

    def __init__(self, what: str, where: str, how_much: str) -> None:
        super().__init__(what, where, how_much)
        self.what, self.where, self.how_much = what, where, how_much

    def __str__(self) -> str:
        return f"{self.what}; at {self.where}: {self.how_much}"


def format_index(index: Sequence[Any], axes: Sequence[str]) -> str:
    """Format an array index as 'row 3, token 5'. Axes without a name are shown as numbers in brackets."""
    named = [f"{axis} {int(number)}" for axis, number in zip(axes, index, strict=False)]
    rest = ", ".join(str(int(number)) for number in index[len(axes) :])
    return ", ".join([*named, *([f"index [{rest}]"] if rest else [])]) or "the only element"


def assert_same_shapes(found: Any, expected: Any, what: str) -> None:
    """Raise CheckFailure if two trees of arrays have different structures, shapes or dtypes."""
    there, here = str(jax.tree.structure(found)), str(jax.tree.structure(expected))
    if there != here:
        raise CheckFailure(f"{what} comes back with another tree structure", "its structure", f"{there}, not {here}")
    after = flatten_paths(found)
    for name, leaf in flatten_paths(expected).items():
        assert_shape(after[name], leaf.shape, leaf.dtype, f"{what}: {name or 'it'}")


def assert_shape(array: Any, shape: Sequence[int], dtype: Any, what: str) -> None:
    """Raise CheckFailure if an array has another shape or dtype."""
    if (tuple(array.shape), str(array.dtype)) != (tuple(shape), str(dtype)):
        shown = f"{array.dtype}{list(array.shape)} instead of {dtype}{list(shape)}"
        raise CheckFailure("an array has the wrong shape or dtype", what, shown)


def _broadcast_mask(where: Any, array: np.ndarray) -> np.ndarray:
    """Broadcast a mask over the leading axes of an array to its shape."""
    return np.broadcast_to(np.reshape(where, np.shape(where) + (1,) * (array.ndim - np.ndim(where))), array.shape)


def assert_same_bits(found: Any, expected: Any, what: str, axes: Sequence[str], where: Any = None) -> None:
    """Raise CheckFailure at the first element (where the mask `where` is True) in which two arrays differ."""
    found, expected = np.asarray(found), np.asarray(expected)
    differs = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
    if where is not None:
        differs &= _broadcast_mask(where, found)
    if differs.any():
        first = tuple(np.argwhere(differs)[0])
        with np.errstate(invalid="ignore"):
            difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        largest = np.nanmax(np.where(differs, difference, 0))
        raise CheckFailure(
            what,
            format_index(first, axes),
            f"{found[first]:.9g} and {expected[first]:.9g}, not the same bits; "
            f"{differs.sum()} elements differ, by at most {largest:.2g}",
        )


def assert_close(
    found: Any,
    expected: Any,
    tolerance: float,
    what: str,
    axes: Sequence[str],
    where: Any = None,
    min_scale: float = 1e-30,
) -> float:
    """Return the largest difference between two arrays, relative to the root mean square of `expected`.

    Args:
        found: The computed array.
        expected: The array that it should equal.
        tolerance: The largest allowed relative difference.
        what: The first part of the message.
        axes: Names of the axes, for the message.
        where: A mask, over the leading axes, of the elements to compare; None for all.
        min_scale: A lower bound for the root mean square to divide by.

    Raises:
        CheckFailure: The largest difference is above the tolerance, or NaN.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(float(np.sqrt(np.mean(np.square(expected)))), min_scale)
    difference = np.nan_to_num(np.abs(found - expected) / scale, nan=np.inf)
    if where is not None:
        difference = np.where(_broadcast_mask(where, found), difference, 0.0)
    largest = float(np.max(difference, initial=0.0))
    if largest > tolerance:
        index = np.unravel_index(int(np.argmax(difference)), difference.shape)
        raise CheckFailure(
            what,
            format_index(index, axes),
            f"{found[index]:.7g} and {expected[index]:.7g}, a difference of {largest:.2g} times the root mean square "
            f"({tolerance:.0e} is allowed)",
        )
    return largest


def assert_finite(array: Any, what: str, axes: Sequence[str]) -> None:
    """Raise CheckFailure at the first element that is infinite or NaN."""
    array = np.asarray(array).astype(np.float64)
    wrong = ~np.isfinite(array)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        shown = f"{array[first]}; {wrong.sum()} of {wrong.size} elements are not finite"
        raise CheckFailure(what, format_index(first, axes), shown)


def format_exception(error: BaseException) -> str:
    """Format an exception as one line: the first line of its message and the last frame outside libraries."""
    lines = str(error).strip().splitlines() or ["no message"]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    last = frames[-1] if frames else None
    where = f"; at {last.filename.rsplit('/', 1)[-1]}, line {last.lineno}, in {last.name}" if last else ""
    return f"{type(error).__name__}: {lines[0][:MAX_MESSAGE_LENGTH]}{where}"


def assert_finite_outputs(outputs: "Outputs", where: str) -> None:
    """Raise CheckFailure if a logit or a gradient is infinite or NaN."""
    assert_finite(outputs.logits_BTV, f"a logit is not finite {where}", LOGIT_AXES)
    for name, leaf in flatten_paths(outputs.gradient).items():
        assert_finite(leaf, f"the gradient of {name} is not finite {where}", ())


# Compilation.


@contextmanager
def check_settings() -> Iterator[None]:
    """Set JAX options for checks: fast compilation, and full float32 precision of matmuls on every device."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@cache
def _quick_options() -> dict[str, Any]:
    """Return compiler options that make compilation fast, if this version of XLA has them."""
    options = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Apply `jax.jit` with compiler options for fast compilation, without initializing JAX before the first call."""

    @cache
    def jitted() -> Any:
        return jax.jit(function, compiler_options=_quick_options(), **options)

    return lambda *args, **kwargs: jitted()(*args, **kwargs)


# The small model that components are checked in: the defaults of the schema except for these fields.

LENGTH = 12  # tokens in a row
ROWS = 16  # rows in a batch: one for each prefix of a row, and some more
POSITIONS_T = np.arange(LENGTH, dtype=np.int32)
# The checks need a distinct token for every position of LENGTH rows, one spare token, and LENGTH positions.
MINIMUMS = {"vocab_size": LENGTH * LENGTH + 1, "context_length": LENGTH}

SMALL: dict[str, Any] = flatten(ModelConfig()) | {
    "vocab_size": 151,
    "context_length": 64,
    "n_layers": 2,
    "d_model": 32,
    "attention.n_kv_heads": 2,
    "attention.head_dim": 8,
    "d_ff": 48,
    "norm_eps": 1e-5,
    "bias": True,
    "tie_embeddings": False,
    # Shorter than a row, so that tokens leave the window.
    "attention.local_window": 5,
    "mla.kv_lora_rank": 16,
    "mla.qk_rope_head_dim": 4,
    "recurrent.conv_width": 3,
    "recurrent.width": 24,
    "rope.theta": 100.0,
    "rope.local_theta": 50.0,
    "rope.factor": 2.0,
    "rope.original_context": 32,
    "rope.short_factors": (1.0, 1.5, 2.0, 2.5),
    "rope.long_factors": (1.0, 2.0, 3.0, 4.0),
    "moe.n_experts": 4,
    "moe.d_expert": 24,
    "moe.router_z_loss": 0.001,
    # About d_model^-1/2, so that the output of a layer is as large as its input, and every weight matters.
    "init_std": 0.2,
}


def small_model(**changes: Any) -> ModelConfig:
    """Return the small model with some fields changed.

    Raises:
        UserError: A field is unknown, a value is out of range, or the fields contradict each other.
    """
    for name in changes:
        if name not in SMALL:
            raise UserError(f"check: {unknown_key_message(f'model.{name}')}")
    values = {
        name: validate_value(f"model.{name}", value, f"config.model.{name}")
        for name, value in {**SMALL, **changes}.items()
    }
    for name, minimum in MINIMUMS.items():
        if values[name] is None or values[name] < minimum:
            raise UserError(f"check: config.model.{name} must be at least {minimum} here, got {values[name]!r}.")
    model = build(ModelConfig, values)
    check_model(model)
    return model


def traced_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config that are arguments of a training program, as arrays."""
    return {
        path: np.float32(get_path(config, path))
        for path, field in fields_by_path(type(config)).items()
        if field.metadata["traced"] and not (field.metadata["static_if_zero"] and get_path(config, path) == 0)
    }


# Parameters and batches.


_init = quick_jit(transformer.init, static_argnums=1)


@cache
def initial_params(model: ModelConfig, seed: int = 0) -> Any:
    """Return initial parameters, as NumPy arrays that must not be modified."""
    return jax.device_get(_init(jax.random.key(seed), model))


@cache
def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Return initial parameters plus noise, so that those initialized to 0 or 1 matter too. Do not modify them."""
    rng = np.random.default_rng(seed)

    def add_noise(leaf: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return leaf + (0.5 * noise if not leaf.any() else 0.2 * np.sqrt(np.mean(np.square(leaf))) * noise)

    return jax.tree.map(add_noise, initial_params(model, seed))


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """Return ROWS rows of LENGTH random tokens."""
    return np.random.default_rng(seed).integers(0, model.vocab_size or 0, (ROWS, LENGTH)).astype(np.int32)


class Batch(NamedTuple):
    """Inputs of the model, with the weights of the scalar whose gradient is computed.

    Attributes:
        weights_BTV: The weights of the logits.
        aux_weight: The weight of the model's auxiliary loss.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    weights_BTV: Any
    aux_weight: Any


def make_batch(tokens_BT: np.ndarray, model: ModelConfig, positions_BT: Any = None, segments_BT: Any = None) -> Batch:
    """Return a batch with random weights; by default each row is one document."""
    weights = np.random.default_rng(7).standard_normal((*tokens_BT.shape, model.vocab_size or 0)).astype(np.float32)
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    segments_BT = np.ones_like(tokens_BT) if segments_BT is None else segments_BT
    return Batch(tokens_BT, positions_BT, segments_BT, weights, np.float32(1.0))


class Outputs(NamedTuple):
    """The weighted sum of the logits, the logits, and the gradient of the sum."""

    total: Any
    logits_BTV: Any
    gradient: Any


def _weighted_sum(params: Any, batch: Batch, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the weighted logits and the weighted auxiliary loss, and the logits."""
    hidden_BTD, _, layer_metrics = transformer.hidden_states(
        params, batch.tokens_BT, model, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
    )
    logits_BTV = transformer.logits(params, hidden_BTD, model)
    total = jnp.sum(batch.weights_BTV * logits_BTV)
    if AUX_LOSS in layer_metrics:
        total = total + batch.aux_weight * layer_metrics[AUX_LOSS]
    return total, logits_BTV


def forward_and_backward(params: Any, batch: Batch, model: ModelConfig) -> Outputs:
    """Compute logits and gradients of the model without a cache. Most checks share this program."""
    (total, logits_BTV), gradient = jax.value_and_grad(_weighted_sum, has_aux=True)(params, batch, model)
    return Outputs(total, logits_BTV, gradient)


_forward_and_backward = quick_jit(forward_and_backward, static_argnums=2)


def run_model(params: Any, batch: Batch, model: ModelConfig) -> Outputs:
    """Run the compiled `forward_and_backward` and return NumPy arrays."""
    return jax.device_get(_forward_and_backward(params, batch, model))


@cache
def reference_outputs(model: ModelConfig) -> Outputs:
    """Return the outputs for random rows of one document each."""
    return run_model(random_params(model), make_batch(random_tokens(model), model), model)


apply_model = quick_jit(transformer.apply, static_argnames="model")
init_cache = quick_jit(transformer.init_cache, static_argnums=(0, 1, 2))
