"""The few compiled programs that all checks of a model share, and what they are run on."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, build, fields_by_path, flatten, get_path
from rustgpt_jax.config.validation import check_model, unknown_key_message, validate_value
from rustgpt_jax.errors import UserError
from rustgpt_jax.model import transformer
from rustgpt_jax.model.interfaces import AUX_LOSS

# The small model that components are checked in: the defaults of the schema except for these knobs.

LENGTH = 12  # tokens in a row
ROWS = 16  # rows in a batch: one for each prefix of a row, and some more
# The checks need a distinct token for every position of LENGTH rows, one spare token, and LENGTH positions.
LEAST = {"vocab_size": LENGTH * LENGTH + 1, "context_length": LENGTH}

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
    # Of order d_model^-1/2, so that the output of a layer is as large as its input, and every weight matters.
    "init_std": 0.2,
}


def small_model(**changes: Any) -> ModelConfig:
    """The small model with some of its knobs changed.

    Raises UserError for a knob that a model does not have, a value that it cannot have, and knobs that cannot go
    together.
    """
    for name in changes:
        if name not in SMALL:
            raise UserError(f"check: {unknown_key_message(f'model.{name}')}")
    values = {
        name: validate_value(f"model.{name}", value, f"config.model.{name}")
        for name, value in {**SMALL, **changes}.items()
    }
    for name, least in LEAST.items():
        if values[name] is None or values[name] < least:
            raise UserError(f"check: config.model.{name} must be at least {least} here, not {values[name]!r}.")
    model = build(ModelConfig, values)
    check_model(model)
    return model


# How a check fails, and the comparisons that make it fail: what broke, where, and by how much.

ROWS_OF_LOGITS = ("row", "token", "logit")
LONGEST_MESSAGE = 240


class Broken(Exception):
    """A part does not do what it must: what broke, where, and by how much."""

    def __init__(self, what: str, where: str, how_much: str) -> None:
        super().__init__(what, where, how_much)
        self.what, self.where, self.how_much = what, where, how_much

    def __str__(self) -> str:
        return f"{self.what}; at {self.where}: {self.how_much}"


def place(index: Sequence[Any], axes: Sequence[str]) -> str:
    """An index in words: 'row 3, token 5'. Axes without a name are numbers in brackets."""
    named = [f"{axis} {int(number)}" for axis, number in zip(axes, index, strict=False)]
    rest = ", ".join(str(int(number)) for number in index[len(axes) :])
    return ", ".join([*named, *([f"index [{rest}]"] if rest else [])]) or "the only element"


def require_same_tree(found: Any, expected: Any, what: str) -> None:
    """Raises Broken if two trees of arrays have not the same structure."""
    there, here = str(jax.tree.structure(found)), str(jax.tree.structure(expected))
    if there != here:
        raise Broken(f"{what} comes back as another tree", "its structure", f"{there} instead of {here}")


def require_same_bits(found: Any, expected: Any, what: str, axes: Sequence[str], where: Any = None) -> None:
    """Raises Broken at the first element (of those where `where` is True) in which two arrays differ at all."""
    found, expected = np.asarray(found), np.asarray(expected)
    differs = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
    if where is not None:
        differs &= np.broadcast_to(
            np.reshape(where, np.shape(where) + (1,) * (found.ndim - np.ndim(where))), found.shape
        )
    if differs.any():
        first = tuple(np.argwhere(differs)[0])
        with np.errstate(invalid="ignore"):
            difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        largest = np.nanmax(np.where(differs, difference, 0))
        raise Broken(
            what,
            place(first, axes),
            f"{found[first]:.9g} and {expected[first]:.9g}, not the same bits; "
            f"{differs.sum()} elements differ, by at most {largest:.2g}",
        )


def require_close(
    found: Any,
    expected: Any,
    tolerance: float,
    what: str,
    axes: Sequence[str],
    where: Any = None,
    least_size: float = 1e-30,
) -> float:
    """The largest difference of two arrays, in units of the root mean square of `expected`, `least_size` at least.

    Raises Broken at the largest difference if it is above the tolerance, or is no number.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = max(float(np.sqrt(np.mean(np.square(expected)))), least_size)
    difference = np.abs(found - expected) / size
    if where is not None:
        mask = np.broadcast_to(np.reshape(where, np.shape(where) + (1,) * (found.ndim - np.ndim(where))), found.shape)
        difference = np.where(mask, difference, 0.0)
    largest = float(np.max(np.nan_to_num(difference, nan=np.inf), initial=0.0))
    if largest > tolerance:
        index = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), difference.shape)
        raise Broken(
            what,
            place(index, axes),
            f"{found[index]:.7g} and {expected[index]:.7g}, a difference of {largest:.2g} root mean squares "
            f"({tolerance:.0e} is allowed)",
        )
    return largest


def require_finite(array: Any, what: str, axes: Sequence[str]) -> None:
    """Raises Broken at the first element that is infinite or no number."""
    array = np.asarray(array).astype(np.float64)
    wrong = ~np.isfinite(array)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        raise Broken(what, place(first, axes), f"{array[first]}; so are {wrong.sum()} of {wrong.size} elements")


def crash(error: BaseException) -> str:
    """Format an exception as one line: the first line of its message and the last frame outside libraries."""
    lines = str(error).strip().splitlines() or ["no message"]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    last = frames[-1] if frames else None
    where = f"; at {last.filename.rsplit('/', 1)[-1]}, line {last.lineno}, in {last.name}" if last else ""
    return f"{type(error).__name__}: {lines[0][:LONGEST_MESSAGE]}{where}"


PLACES_T = np.arange(LENGTH, dtype=np.int32)


class Rows(NamedTuple):
    """What a forward is run on, and the weights of the logits in the sum that gradients are taken of.

    auxiliary: the weight of the model's auxiliary loss in that sum.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    weights_BTV: Any
    auxiliary: Any


class Result(NamedTuple):
    """The weighted sum of the logits, the logits, and the gradient of the sum."""

    total: Any
    logits_BTV: Any
    gradient: Any


@contextmanager
def conditions() -> Iterator[None]:
    """What checks run under: quick compilations, and products of float32 numbers that are float32 on every device."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@cache
def quick_options() -> dict[str, Any]:
    """Options of the compiler that save most of its time, where this version of it has them."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quick_jit(function: Any, **options: Any) -> Any:
    """`jax.jit` with the options of a quick compilation."""
    return jax.jit(function, compiler_options=quick_options(), **options)


def weighted_sum(params: Any, rows: Rows, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The sum of the weighted logits and of the auxiliary loss, and the logits."""
    hidden_BTD, _, layer_metrics = transformer.hidden_states(
        params, rows.tokens_BT, model, positions_BT=rows.positions_BT, segments_BT=rows.segments_BT
    )
    logits_BTV = transformer.logits(params, hidden_BTD, model)
    total = jnp.sum(rows.weights_BTV * logits_BTV)
    if AUX_LOSS in layer_metrics:
        total = total + rows.auxiliary * layer_metrics[AUX_LOSS]
    return total, logits_BTV


def forward_and_backward(params: Any, rows: Rows, model: ModelConfig) -> Result:
    """Logits and gradients of the uncached model: most checks are calls of this one program."""
    (total, logits_BTV), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(params, rows, model)
    return Result(total, logits_BTV, gradient)


@cache
def _compiled() -> Any:
    return quick_jit(forward_and_backward, static_argnames="model")


def run(params: Any, rows: Rows, model: ModelConfig) -> Result:
    """`forward_and_backward`, compiled, with results as NumPy arrays."""
    return jax.device_get(_compiled()(params, rows, model=model))


@cache
def _compiled_forward() -> Any:
    return quick_jit(weighted_sum, static_argnames="model")


def run_forward(params: Any, rows: Rows, model: ModelConfig) -> tuple[Any, np.ndarray]:
    """Return the weighted sum and the logits like `run`, without computing gradients."""
    return jax.device_get(_compiled_forward()(params, rows, model=model))


def numbers_of(config: Any) -> dict[str, Any]:
    """The knobs of a part of a config that a training program takes as arguments, as arrays."""
    return {
        path: np.float32(get_path(config, path))
        for path, field in fields_by_path(type(config)).items()
        if field.metadata["traced"] and not (field.metadata["static_if_zero"] and get_path(config, path) == 0)
    }


@cache
def _compiled_init() -> Any:
    return quick_jit(lambda key, model: transformer.init(key, model), static_argnames="model")


def initial_params(model: ModelConfig, seed: int = 0) -> Any:
    """What `transformer.init` makes."""
    return jax.device_get(_compiled_init()(jax.random.key(seed), model=model))


@cache
def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Initial parameters moved at random, so that all of them matter: those of 0 and 1 too. Do not write to them."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return leaf + (0.5 * noise if not leaf.any() else 0.2 * np.sqrt(np.mean(np.square(leaf))) * noise)

    return jax.tree.map(moved, initial_params(model, seed))


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """ROWS rows of LENGTH tokens."""
    return np.random.default_rng(seed).integers(0, model.vocab_size or 0, (ROWS, LENGTH)).astype(np.int32)


def rows_of(tokens_BT: np.ndarray, model: ModelConfig, positions_BT: Any = None, segments_BT: Any = None) -> Rows:
    """Rows of which each is one document, unless it is said otherwise, with random weights of their logits."""
    weights = np.random.default_rng(7).standard_normal((*tokens_BT.shape, model.vocab_size or 0)).astype(np.float32)
    return Rows(
        tokens_BT,
        np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
        if positions_BT is None
        else positions_BT,
        np.ones_like(tokens_BT) if segments_BT is None else segments_BT,
        weights,
        np.float32(1.0),
    )


@cache
def ordinary(model: ModelConfig) -> Result:
    """What the model makes of random rows of one document each."""
    return run(random_params(model), rows_of(random_tokens(model), model), model)


@cache
def _compiled_cached() -> Any:
    return quick_jit(transformer.apply, static_argnames="model")


def run_cached(params: Any, tokens_BT: Any, model: ModelConfig, cache: Any, positions_BT: Any, segments_BT: Any) -> Any:
    """logits_BTV and the cache after a call with a cache, as NumPy arrays."""
    call = partial(_compiled_cached(), positions_BT=positions_BT, segments_BT=segments_BT, model=model)
    return jax.device_get(call(params, tokens_BT, cache=cache))


def empty_cache(model: ModelConfig) -> Any:
    """A cache for ROWS rows of LENGTH tokens, as NumPy arrays."""
    return jax.device_get(quick_jit(lambda: transformer.init_cache(model, ROWS, LENGTH))())
