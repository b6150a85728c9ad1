"""Rows of many lengths with packed documents, and the influence of tokens on each other in them.

The model runs on activations in place of embeddings, so that the derivative of an output with respect to a token is the
gradient with respect to that token's activations.
"""

import dataclasses
import itertools
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance.components import Component, Scope
from rustgpt_jax.conformance.fixtures import assert_finite, quick_jit, random_params
from rustgpt_jax.model import transformer

MAX_LENGTH = 4096
# A dropout rate that is not zero but drops nothing in float32, so that training must match evaluation.
DROPS_NOTHING = 1e-8
HIDDEN_AXES = ("row", "token", "channel")
# Numbers of documents in the rows of a batch. The last row ends in padding.
DOCUMENTS = (1, 5, 3, 2, 4, 3)
# Above these token counts, only tokens at document borders and at the end are probed.
MAX_GRADIENT_PROBES, MAX_CHANGE_PROBES = 300, 130
STRIDE = 16


class Case(NamedTuple):
    """The shape of a batch, its dtype, and whether it is run as in training."""

    length: int
    batch: int
    dtype: str = "float32"
    is_training: bool = False

    def __str__(self) -> str:
        rows = "1 row" if self.batch == 1 else f"{self.batch} rows"
        mode = "training" if self.is_training else "evaluation"
        return f"{rows} of {self.length} tokens, {self.dtype}, {mode}"


# The first three cases have the same inputs, so that bfloat16 and training can be compared with the first one.
QUICK = (
    Case(33, 6),
    Case(33, 6, "bfloat16"),
    Case(33, 6, is_training=True),
    Case(64, 3, "bfloat16", is_training=True),
    Case(521, 2),
)
SMALL = (Case(33, 3),)
DTYPES_AND_MODES = tuple(itertools.product(("float32", "bfloat16"), (False, True)))
SHORT_LENGTHS, SHORT_BATCHES = (15, 16, 17, 31, 32, 33, 63, 64, 65), (1, 2, 3, 17, 33)
LONG_LENGTHS, LONG_BATCHES = (127, 128, 129, 255, 256, 257, 521), (2, 1, 3)


def _exhaustive_cases() -> tuple[Case, ...]:
    """Return cases of all dtypes and modes at lengths around each power of two, with all batch sizes in turn."""
    dtypes_and_modes = itertools.cycle(DTYPES_AND_MODES)
    cases = list(QUICK)
    for lengths, batches in (SHORT_LENGTHS, SHORT_BATCHES), (LONG_LENGTHS, LONG_BATCHES):
        sizes = itertools.cycle(batches)
        cases += [Case(length, next(sizes), *next(dtypes_and_modes)) for length in lengths for _ in range(2)]
    return tuple(dict.fromkeys(cases))


CASES = {Scope.SMALL: SMALL, Scope.QUICK: QUICK, Scope.EXHAUSTIVE: _exhaustive_cases()}


class PackedRows(NamedTuple):
    """Activations in place of embeddings, with the layout of documents in the rows.

    Attributes:
        x_BTD: The activations.
        positions_BT: The position of each token in its document.
        segments_BT: The number of the document from 1; 0 for padding.
    """

    x_BTD: Any
    positions_BT: Any
    segments_BT: Any


class Influence(NamedTuple):
    """Influence of tokens on each other in a batch.

    A probe is a set of tokens. The first probes are a position each, in all rows at once; the last B probes are a whole
    row each.

    Attributes:
        positions_K: The positions of the first probes, without the last B.
        gradients_KBT: The largest derivative of the outputs at the tokens of probe k with respect to token (b, t).
        changes_KBT: True where the output at (b, t) changes with the tokens of probe k.
    """

    packed: PackedRows
    output_BTD: np.ndarray
    positions_K: np.ndarray
    gradients_KBT: np.ndarray
    changes_KBT: np.ndarray


def model_for_long_rows(component: Component) -> ModelConfig:
    """Return the component's small model with one repeat of its layer pattern and positions for long rows."""
    model = component.small_model
    return dataclasses.replace(
        model,
        n_layers=model.period,
        context_length=max(model.context_length, MAX_LENGTH),
        dtype="float32",
        dropout=0.0,
    )


def for_case(model: ModelConfig, dtype: str, is_training: bool) -> ModelConfig:
    """Return the model with a dtype and, for training, a dropout rate that never drops anything."""
    return dataclasses.replace(model, dtype=dtype, dropout=DROPS_NOTHING if is_training else 0.0)


def activations(model: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Return random x_BTD, whose row b is a prefix of the same longer row for every batch size and length."""
    rows = [np.random.default_rng((seed, row)).standard_normal((length, model.d_model)) for row in range(batch)]
    return 0.5 * np.stack(rows).astype(np.float32)


@cache
def document_layout(length: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions and segments for a row with one to five documents of uneven lengths.

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


def layouts(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions_BT and segments_BT of the first rows of `document_layout`."""
    positions, segments = zip(*(document_layout(length, row) for row in range(batch)), strict=True)
    return np.stack(positions), np.stack(segments)


def packed_rows(model: ModelConfig, batch: int, length: int) -> PackedRows:
    """Return rows of one to five documents each."""
    return PackedRows(activations(model, batch, length), *layouts(batch, length))


def single_document_rows(model: ModelConfig, batch: int, length: int) -> PackedRows:
    """Return rows of one document each."""
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return PackedRows(activations(model, batch, length), positions_BT, np.ones_like(positions_BT))


def _hidden_states(
    params: Any, packed: PackedRows, model: ModelConfig, is_training: bool, cached: Any = None
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
        dropout_key=jax.random.key(1) if is_training else None,
    )
    return hidden_BTD, cached


@partial(quick_jit, static_argnums=(2, 3))
def _forward(params: Any, packed: PackedRows, model: ModelConfig, is_training: bool) -> jax.Array:
    hidden_BTD, _ = _hidden_states(params, packed, model, is_training)
    return hidden_BTD.astype(jnp.promote_types(hidden_BTD.dtype, jnp.float32))


def run_forward(params: Any, packed: PackedRows, model: ModelConfig, is_training: bool = False) -> np.ndarray:
    """Return hidden_BTD, in float32 or wider."""
    return jax.device_get(_forward(params, packed, model, is_training))


@partial(quick_jit, static_argnums=3)
def run_cached_forward(params: Any, packed: PackedRows, cached: Any, model: ModelConfig) -> tuple[jax.Array, Any]:
    """Return hidden_BTD of tokens that follow the cached ones, and the updated cache."""
    return _hidden_states(params, packed, model, False, cached)


@partial(quick_jit, static_argnums=(5, 6))
def _run_probes(
    params: Any, packed: PackedRows, weights_BTD: Any, probes_KBT: Any, count: Any, case: Case, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    model = for_case(model, case.dtype, case.is_training)

    def output(x_BTD: jax.Array) -> jax.Array:
        return _hidden_states(params, packed._replace(x_BTD=x_BTD), model, case.is_training)[0]

    y_BTD, vjp = jax.vjp(output, packed.x_BTD)

    def run_probe(k: Any, gradients_KBT: jax.Array) -> jax.Array:
        (gradient_BTD,) = vjp((weights_BTD * probes_KBT[k][..., None]).astype(y_BTD.dtype))
        return gradients_KBT.at[k].set(jnp.max(jnp.abs(gradient_BTD), axis=-1).astype(jnp.float32))

    gradients_KBT = jax.lax.fori_loop(0, count, run_probe, jnp.zeros(probes_KBT.shape, jnp.float32))
    return y_BTD.astype(jnp.float32), gradients_KBT


def _probe_positions(length: int, limit: int) -> np.ndarray:
    """Return the positions to probe: all, or for long rows some next to multiples of STRIDE and the last two."""
    if length <= limit:
        return np.arange(length)
    borders = np.arange(STRIDE, length, STRIDE)
    return np.unique([*(borders - 1)[::2], *borders[::4], length - 2, length - 1])


def _make_probes(case: Case) -> np.ndarray:
    """Return probes_KBT: one probe for each position, in all rows, and one for each row."""
    positions_K = _probe_positions(case.length, MAX_GRADIENT_PROBES)
    is_position_KBT = np.broadcast_to(
        np.arange(case.length)[None, None, :] == positions_K[:, None, None],
        (len(positions_K), case.batch, case.length),
    )
    is_row_KBT = np.repeat(np.eye(case.batch, dtype=bool)[:, :, None], case.length, axis=2)
    return np.concatenate([is_position_KBT, is_row_KBT])


def run_case(
    model: ModelConfig, case: Case, packed: PackedRows, with_gradients: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return output_BTD of a case, in float32, and gradients_KBT of all probes (zeros unless `with_gradients`)."""
    probes_KBT = _make_probes(case)
    weights_BTD = np.random.default_rng(7).standard_normal(packed.x_BTD.shape).astype(np.float32)
    count = np.int32(len(probes_KBT) if with_gradients else 0)
    arguments = random_params(model), packed, weights_BTD, probes_KBT, count
    return jax.device_get(_run_probes(*arguments, case, model))


@cache
def compute_influence(model: ModelConfig, case: Case) -> Influence:
    """Compute full Jacobians and the effect of changing each token, in all rows at once and in each row alone."""
    packed, others_BTD = packed_rows(model, case.batch, case.length), activations(model, case.batch, case.length, 1)
    output_BTD, gradients_KBT = run_case(model, case, packed, with_gradients=True)
    assert_finite(output_BTD, f"an output is not finite in {case}", ("row", "token"))
    assert_finite(gradients_KBT, f"the Jacobian of the outputs is not finite in {case}", ("output token", "row"))
    positions_K = _probe_positions(case.length, MAX_GRADIENT_PROBES)
    to_change = set(_probe_positions(case.length, MAX_CHANGE_PROBES))
    probes_KBT = _make_probes(case)
    changes_KBT = np.zeros(probes_KBT.shape, bool)
    for probe, is_changed_BT in enumerate(probes_KBT):
        if probe >= len(positions_K) or positions_K[probe] in to_change:
            changed_BTD = np.where(is_changed_BT[..., None], others_BTD, packed.x_BTD)
            found_BTD, _ = run_case(model, case, packed._replace(x_BTD=changed_BTD))
            changes_KBT[probe] = np.any(found_BTD != output_BTD, axis=-1)
    return Influence(packed, output_BTD, positions_K, gradients_KBT, changes_KBT)
