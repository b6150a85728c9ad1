"""Rows of many lengths with packed documents, and the influence of tokens on each other in them.

The model runs on activations in place of embeddings, so that the derivative of an output with respect to a token is the
gradient with respect to that token's activations.
"""

import dataclasses
import itertools
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.fixtures import Broken, require_finite
from rustgpt_jax.conformance.targets import Scope, Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes

LONGEST = 4096
# A dropout rate that is not zero but drops nothing in float32, so that training must match evaluation.
NEVER = 1e-8
# Numbers of documents in the rows of a batch. The last row ends in padding.
DOCUMENTS = (1, 5, 3, 2, 4, 3)
# Above these token counts, only tokens at document borders and at the end are probed.
MOST_SLOPES, MOST_CHANGES = 300, 130
STRIDE = 16


class Case(NamedTuple):
    """The shape of a batch and how it is run."""

    length: int
    batch: int
    dtype: str = "float32"
    is_training: bool = False

    def __str__(self) -> str:
        rows = "1 row" if self.batch == 1 else f"{self.batch} rows"
        mode = "training" if self.is_training else "evaluation"
        return f"{rows} of {self.length} tokens, {self.dtype}, {mode}"


QUICK = (
    Case(40, 6),
    Case(33, 3, "bfloat16"),
    Case(64, 3, is_training=True),
    Case(19, 17, "bfloat16", is_training=True),
    Case(521, 2),
)
SMALL = (Case(40, 3),)
KINDS = tuple(itertools.product(("float32", "bfloat16"), (False, True)))
SHORT_LENGTHS, SHORT_BATCHES = (15, 16, 17, 31, 32, 33, 63, 64, 65), (1, 2, 3, 17, 33)
LONG_LENGTHS, LONG_BATCHES = (127, 128, 129, 255, 256, 257, 521), (2, 1, 3)


def _exhaustive() -> tuple[Case, ...]:
    """Return cases for exhaustive checks.

    Both dtypes and modes at each side of every border, two of the four combinations at each other length, and all batch
    sizes in turn.
    """
    kinds = itertools.cycle(KINDS)
    cases = list(QUICK)
    for lengths, batches in (SHORT_LENGTHS, SHORT_BATCHES), (LONG_LENGTHS, LONG_BATCHES):
        sizes = itertools.cycle(batches)
        cases += [Case(length, next(sizes), *next(kinds)) for length in lengths for _ in range(2)]
    return tuple(dict.fromkeys(cases))


EXHAUSTIVE = _exhaustive()
CASES = {Scope.SMALL: SMALL, Scope.QUICK: QUICK, Scope.EXHAUSTIVE: EXHAUSTIVE}


def cases_of(subject: Subject) -> tuple[Case, ...]:
    """Return the batches that a part is run on."""
    return CASES[subject.scope]


class Packed(NamedTuple):
    """Activations in place of embeddings, with the documents they are packed into."""

    x_BTD: Any
    positions_BT: Any
    segments_BT: Any


class Influence(NamedTuple):
    """Influence of tokens on each other in a batch.

    There are K probes: first one per probed position, in every row at once, and then B probes, one per row, of all its
    positions.

    Attributes:
        slopes_KBT: Largest derivative of the outputs at probe k with respect to token (b, t).
        changes_KBT: Whether the output at (b, t) changes with the tokens of probe k.
        places_K: The position of each of the first probes.
    """

    packed: Packed
    output_BTD: np.ndarray
    places_K: np.ndarray
    slopes_KBT: np.ndarray
    changes_KBT: np.ndarray


def long_model(model: ModelConfig) -> ModelConfig:
    """Return the model with one repeat of its layer pattern and positions for long rows."""
    return dataclasses.replace(
        model, n_layers=model.period, context_length=max(model.context_length, LONGEST), dtype="float32", dropout=0.0
    )


def for_case(model: ModelConfig, dtype: str, is_training: bool) -> ModelConfig:
    """Return the model in another dtype; for training, with a dropout rate that never drops anything."""
    return dataclasses.replace(model, dtype=dtype, dropout=NEVER if is_training else 0.0)


def activations(model: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Return x_BTD. Row b is a prefix of the same longer row for every batch size and length."""
    rows = [np.random.default_rng((seed, row)).standard_normal((length, model.d_model)) for row in range(batch)]
    return 0.5 * np.stack(rows).astype(np.float32)


@cache
def layout(length: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions and segments of a row of one to five documents of uneven lengths.

    Some rows end in padding. In every other row one border is at a multiple of STRIDE tokens, unless that would remove
    a document.
    """
    count = min(DOCUMENTS[row % len(DOCUMENTS)], length)
    rng = np.random.default_rng((length, row))
    borders = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False)) if length > 1 else np.array([], int)
    if row % 2 and length > STRIDE:
        moved, middle = borders.copy(), len(borders) // 2
        moved[middle] = np.clip(STRIDE * round(borders[middle] / STRIDE), STRIDE, (length - 1) // STRIDE * STRIDE)
        borders = np.sort(moved) if len(np.unique(moved)) == len(borders) else borders
    segments_T = 1 + np.searchsorted(borders, np.arange(length), side="right")
    starts = np.concatenate([[0], borders])
    positions_T = np.arange(length) - starts[segments_T - 1]
    if row % len(DOCUMENTS) == len(DOCUMENTS) - 1 and len(borders):
        is_padding_T = segments_T == segments_T[-1]
        segments_T, positions_T = np.where(is_padding_T, 0, segments_T), np.where(is_padding_T, 0, positions_T)
    return positions_T.astype(np.int32), segments_T.astype(np.int32)


def packed_rows(model: ModelConfig, batch: int, length: int) -> Packed:
    """Return rows of the layouts, in order."""
    layouts = [layout(length, row) for row in range(batch)]
    positions_BT, segments_BT = (np.stack(each) for each in zip(*layouts, strict=True))
    return Packed(activations(model, batch, length), positions_BT, segments_BT)


def whole_rows(model: ModelConfig, batch: int, length: int) -> Packed:
    """Return rows of one document each."""
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return Packed(activations(model, batch, length), positions_BT, np.ones_like(positions_BT))


def _hidden(
    params: Any, packed: Packed, model: ModelConfig, key: jax.Array | None, cached: Any = None
) -> tuple[jax.Array, Any]:
    """Return the last hidden states (B, T, D) and the cache."""
    batch, length, width = packed.x_BTD.shape
    tokens_BT = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)
    params = {**params, "embedding": {"table": packed.x_BTD.reshape(-1, width)}}
    hidden_BTD, cached, _ = transformer.hidden_states(
        params,
        tokens_BT,
        model,
        cached,
        positions_BT=packed.positions_BT,
        segments_BT=packed.segments_BT,
        dropout_key=key,
    )
    return hidden_BTD, cached


def _key(is_training: bool) -> jax.Array | None:
    return jax.random.key(1) if is_training else None


@cache
def _compiled_forward() -> Any:
    def forward(params: Any, packed: Packed, model: ModelConfig, is_training: bool) -> jax.Array:
        hidden_BTD, _ = _hidden(params, packed, model, _key(is_training))
        return hidden_BTD.astype(jnp.promote_types(hidden_BTD.dtype, jnp.float32))

    return fixtures.quick_jit(forward, static_argnames=("model", "is_training"))


def forward(params: Any, packed: Packed, model: ModelConfig, is_training: bool = False) -> np.ndarray:
    """Return hidden_BTD, in float32 or wider."""
    return jax.device_get(_compiled_forward()(params, packed, model=model, is_training=is_training))


@cache
def _compiled_cached_forward() -> Any:
    def forward(params: Any, packed: Packed, cached: Any, model: ModelConfig) -> tuple[jax.Array, Any]:
        return _hidden(params, packed, model, None, cached)

    return fixtures.quick_jit(forward, static_argnames="model")


def cached_forward(params: Any, packed: Packed, cached: Any, model: ModelConfig) -> tuple[np.ndarray, Any]:
    """Return hidden_BTD of tokens that follow the cached ones, and the updated cache, which stays on the device."""
    hidden_BTD, cached = _compiled_cached_forward()(params, packed, cached, model=model)
    return jax.device_get(hidden_BTD), cached


@cache
def _compiled_slopes() -> Any:
    def slopes(
        params: Any, packed: Packed, weights_BTD: Any, read_KBT: Any, count: Any, model: ModelConfig, is_training: bool
    ) -> tuple[jax.Array, jax.Array]:
        def output(x_BTD: jax.Array) -> jax.Array:
            return _hidden(params, packed._replace(x_BTD=x_BTD), model, _key(is_training))[0]

        y_BTD, pull = jax.vjp(output, packed.x_BTD)

        def probe(k: Any, slopes_KBT: jax.Array) -> jax.Array:
            (slope_BTD,) = pull((weights_BTD * read_KBT[k][..., None]).astype(y_BTD.dtype))
            return slopes_KBT.at[k].set(jnp.max(jnp.abs(slope_BTD), axis=-1).astype(jnp.float32))

        slopes_KBT = jax.lax.fori_loop(0, count, probe, jnp.zeros(read_KBT.shape, jnp.float32))
        return y_BTD.astype(jnp.float32), slopes_KBT

    return fixtures.quick_jit(slopes, static_argnames=("model", "is_training"))


class Program:
    """The compiled program of a case: its outputs and the vector-Jacobian products of a number of probes."""

    def __init__(self, model: ModelConfig, case: Case, read_KBT: np.ndarray) -> None:
        self.params = fixtures.random_params(model)
        self.model, self.case, self.read_KBT = for_case(model, case.dtype, case.is_training), case, read_KBT
        shape = (case.batch, case.length, model.d_model)
        self.weights_BTD = np.random.default_rng(7).standard_normal(shape).astype(np.float32)

    def run(self, packed: Packed, count: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return output_BTD and slopes_KBT of the first `count` probes."""
        arguments = (self.params, packed, self.weights_BTD, self.read_KBT, np.int32(count))
        compiled = _compiled_slopes()
        return jax.device_get(compiled(*arguments, model=self.model, is_training=self.case.is_training))


def _places(length: int, most: int) -> np.ndarray:
    """Return the positions to probe: all, or in long rows those on both sides of borders and the last ones."""
    if length <= most:
        return np.arange(length)
    borders = np.arange(STRIDE, length, STRIDE)
    return np.unique([*(borders - 1)[::2], *borders[::4], length - 2, length - 1])


def program_of(model: ModelConfig, case: Case) -> Program:
    """Return the program of a case with one probe per position and one per row."""
    batch, length = case.batch, case.length
    of_places = np.arange(length)[None, None, :] == _places(length, MOST_SLOPES)[:, None, None]
    of_rows = np.arange(batch)[None, :, None] == np.arange(batch)[:, None, None]
    shape = (batch, length)
    read = [np.broadcast_to(each, (len(each), *shape)) for each in (of_places, of_rows)]
    return Program(model, case, np.concatenate(read))


@cache
def influence(model: ModelConfig, case: Case) -> Influence:
    """Compute full Jacobians and the effect of changing each token, in all rows at once and in each row alone."""
    program = program_of(model, case)
    packed, others_BTD = packed_rows(model, case.batch, case.length), activations(model, case.batch, case.length, 1)
    output_BTD, slopes_KBT = program.run(packed, len(program.read_KBT))
    require_finite(output_BTD, f"an output is not finite in {case}", ("row", "token"))
    require_finite(slopes_KBT, f"the Jacobian of the outputs is not finite in {case}", ("output token", "row"))
    places_K, changed_places = _places(case.length, MOST_SLOPES), set(_places(case.length, MOST_CHANGES))
    changes_KBT = np.zeros(program.read_KBT.shape, bool)
    for probe, is_changed_BT in enumerate(program.read_KBT):
        if probe >= len(places_K) or places_K[probe] in changed_places:
            changed_BTD = np.where(is_changed_BT[..., None], others_BTD, packed.x_BTD)
            found_BTD, _ = program.run(packed._replace(x_BTD=changed_BTD))
            changes_KBT[probe] = np.any(found_BTD != output_BTD, axis=-1)
    return Influence(packed, output_BTD, places_K, slopes_KBT, changes_KBT)


# Check that rounding errors do not grow along long rows.

# Token ranges whose median errors are compared: near the beginning, where bfloat16 represents every position exactly,
# and at the end.
EARLY, LATE = slice(64, 256), slice(LONGEST - 512, LONGEST)
# Largest allowed ratio of the error at the end to the error near the beginning. For attention it is below 1.5.
MOST_GROWTH = 3.0
# Quantile of the output errors. Smaller errors come from single operations; larger ones are wrong at any position.
# Rounding can change a few tokens a lot, for example by changing the choice of an expert, so those are ignored.
COUNTED = 0.95
NOISE = {"bfloat16": 3e-3, "float32": 1e-6}
MOST = {"bfloat16": 0.2, "float32": 1e-3}


def drift(subject: Subject) -> str:
    """Check that over 4,096 tokens, bfloat16 and float32 errors against float64 grow no faster than attention's.

    Uses initial parameters, whose decays are as slow as at the beginning of training.
    """
    model = _with_one_head(long_model(subject.small_model))
    params = fixtures.initial_params(model)
    packed = whole_rows(model, 1, LONGEST)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        exact = Packed(packed.x_BTD.astype(np.float64), *packed[1:])
        expected = forward(double, exact, dataclasses.replace(model, dtype="float64"))
    require_finite(expected, f"in float64 an output is not finite in a row of {LONGEST} tokens", ("row", "token"))
    notes = []
    for dtype in ("float32", "bfloat16"):
        found = forward(params, packed, dataclasses.replace(model, dtype=dtype)).astype(np.float64)
        require_finite(found, f"in {dtype} an output is not finite in a row of {LONGEST} tokens", ("row", "token"))
        error_T = np.sqrt(np.mean(np.square(found - expected), axis=(0, 2)) / np.mean(np.square(expected)))
        early, late = (float(np.median(error_T[places])) for places in (EARLY, LATE))
        most = float(np.quantile(error_T, COUNTED))
        growth = late / max(early, NOISE[dtype])
        if not (growth <= MOST_GROWTH and most <= MOST[dtype]):
            raise Broken(
                f"the error of {dtype} grows along the row",
                f"tokens {LATE.start} to {LATE.stop}",
                f"{late:.2g} of the outputs there and {early:.2g} at tokens {EARLY.start} to {EARLY.stop}, "
                f"{most:.2g} in {COUNTED:.0%} of all ({MOST_GROWTH:.2g} times as much, and {MOST[dtype]:.0e}, may be)",
            )
        notes.append(f"{dtype} {early:.1g} to {late:.1g}")
    return f"error over {LONGEST} tokens: {', '.join(notes)}"


def _with_one_head(model: ModelConfig) -> ModelConfig:
    """Return the model with one head if its parameters can be initialized that way: scores of long rows are large."""
    one = replace_paths(
        model, {"attention.n_heads": 1, "attention.n_kv_heads": 1, "attention.head_dim": model.head_width}
    )
    try:
        parameter_shapes(one)
    except Exception:
        return model
    return one
