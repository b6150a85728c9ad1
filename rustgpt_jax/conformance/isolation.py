"""Who sees whom: no later token, no other document, no other row and no padding; and what a cache changes: nothing."""

import dataclasses
from typing import Any

import numpy as np

from rustgpt_jax.config import ModelConfig
from rustgpt_jax.conformance import programs
from rustgpt_jax.conformance.broken import (
    ROWS_OF_LOGITS,
    Broken,
    require_close,
    require_finite,
    require_same_bits,
    require_same_tree,
)
from rustgpt_jax.conformance.programs import PLACES_T
from rustgpt_jax.conformance.small import LENGTH, ROWS
from rustgpt_jax.conformance.subjects import Subject
from rustgpt_jax.model.paths import by_path

CLOSE = 1e-4


def causality(subject: Subject) -> str:
    """By the Jacobian, and bit by bit: no output moves when a later token does, and each moves with its own token."""
    model = dataclasses.replace(subject.small_model, tie_embeddings=False)
    size_TS = _sizes_of_jacobian(model)
    require_finite(size_TS, "the Jacobian of the logits by the input is not finite", ("output token", "input token"))
    later = np.argwhere(np.triu(size_TS, 1) != 0)
    if len(later):
        t, s = later[0]
        raise Broken(
            "an output depends on a later token",
            f"output token {t}, input token {s}",
            f"a slope of {size_TS[t, s]:.2g}",
        )
    itself = np.flatnonzero(np.diagonal(size_TS) == 0)
    if len(itself):
        raise Broken("an output does not depend on its own token", f"token {itself[0]}", "a slope of 0")

    model = subject.small_model
    params, tokens_BT = programs.random_params(model), programs.random_tokens(model, 1)
    is_kept_BT = PLACES_T[None, :] <= np.arange(ROWS)[:, None]
    others_BT = np.where(is_kept_BT, tokens_BT, programs.random_tokens(model, 2))
    first = programs.run(params, programs.rows_of(tokens_BT, model), model).logits_BTV
    second = programs.run(params, programs.rows_of(others_BT, model), model).logits_BTV
    require_same_bits(second, first, "an output changes when later tokens do", ROWS_OF_LOGITS, is_kept_BT)
    earlier = np.count_nonzero(np.tril(size_TS, -1)) / (LENGTH * (LENGTH - 1) / 2)
    return f"0 of later tokens, {earlier:.0%} of earlier ones are seen"


def _sizes_of_jacobian(model: ModelConfig) -> np.ndarray:
    """size_TS: the largest slope of a random mean of the logits at token t by the embedding of token s.

    One call gives it: row b has rows b T, b T + 1, ... of the embedding table as its tokens, of the same values in each
    row, and only the logits at its token b have a weight.
    """
    count = LENGTH * LENGTH
    params = dict(programs.random_params(model))
    table_VD = np.array(params["embedding"]["table"])
    table_VD[:count] = np.tile(table_VD[:LENGTH], (LENGTH, 1))
    params["embedding"] = {"table": table_VD}
    # Rows beyond the first LENGTH have no weight, and tokens of their own.
    tokens_BT = np.full((ROWS, LENGTH), count, np.int32)
    tokens_BT[:LENGTH] = np.arange(count).reshape(LENGTH, LENGTH)
    rows = programs.rows_of(tokens_BT, model)
    is_read_BT = PLACES_T[None, :] == np.arange(ROWS)[:, None]
    rows = rows._replace(weights_BTV=rows.weights_BTV * is_read_BT[..., None], auxiliary=np.float32(0.0))
    slopes_VD = programs.run(params, rows, model).gradient["embedding"]["table"]
    return np.abs(slopes_VD[:count]).max(axis=-1).reshape(LENGTH, LENGTH)


def isolation(subject: Subject) -> str:
    """Documents packed in a row, and rows of a batch, are invisible to one another, bit by bit."""
    model = subject.small_model
    params, tokens_BT, others_BT = (
        programs.random_params(model),
        programs.random_tokens(model, 3),
        programs.random_tokens(model, 4),
    )
    # Row b is cut after b tokens (from 1 to LENGTH - 1), rows that are left in the middle.
    cut_B1 = np.where(np.arange(ROWS) % LENGTH == 0, LENGTH // 2, np.arange(ROWS) % LENGTH)[:, None]
    is_second_BT = PLACES_T[None, :] >= cut_B1
    positions_BT = np.where(is_second_BT, PLACES_T[None, :] - cut_B1, PLACES_T[None, :]).astype(np.int32)
    segments_BT = np.where(is_second_BT, 2, 1).astype(np.int32)

    def logits(tokens_BT: np.ndarray, positions_BT: Any = positions_BT, segments_BT: Any = segments_BT) -> np.ndarray:
        return programs.run(params, programs.rows_of(tokens_BT, model, positions_BT, segments_BT), model).logits_BTV

    packed = logits(tokens_BT)
    changed = tokens_BT.copy()
    changed[0] = others_BT[0]
    is_other_row_BT = np.broadcast_to(np.arange(ROWS)[:, None] != 0, tokens_BT.shape)
    require_same_bits(logits(changed), packed, "a row changes with another row", ROWS_OF_LOGITS, is_other_row_BT)
    require_same_bits(
        logits(np.where(is_second_BT, tokens_BT, others_BT)),
        packed,
        "the second document of a row changes with the first",
        ROWS_OF_LOGITS,
        is_second_BT,
    )
    require_same_bits(
        logits(np.where(is_second_BT, others_BT, tokens_BT)),
        packed,
        "the first document of a row changes with the second",
        ROWS_OF_LOGITS,
        ~is_second_BT,
    )

    # The second document again, at the beginning of a row of its own.
    source_BT = np.minimum(PLACES_T[None, :] + cut_B1, LENGTH - 1)
    is_there_BT = PLACES_T[None, :] < LENGTH - cut_B1
    alone = logits(
        np.take_along_axis(tokens_BT, source_BT, axis=1),
        np.broadcast_to(PLACES_T, tokens_BT.shape),
        is_there_BT.astype(np.int32),
    )
    expected = np.take_along_axis(packed, source_BT[..., None], axis=1)
    largest = require_close(
        alone, expected, CLOSE, "a document alone is not what it is after another", ROWS_OF_LOGITS, is_there_BT
    )
    return f"bit-equal; alone within {largest:.0e}"


def padding(subject: Subject) -> str:
    """What padding says does not matter, nor how much of it there is."""
    model = subject.small_model
    params, tokens_BT = programs.random_params(model), programs.random_tokens(model)
    is_token_BT = PLACES_T[None, :] < 1 + np.arange(ROWS)[:, None] % LENGTH

    def padded(seed: int, weight_of_padding: float) -> programs.Result:
        filled_BT = np.where(is_token_BT, tokens_BT, programs.random_tokens(model, seed))
        positions_BT = np.where(is_token_BT, PLACES_T[None, :], 0).astype(np.int32)
        rows = programs.rows_of(filled_BT, model, positions_BT, is_token_BT.astype(np.int32))
        weights = np.where(is_token_BT[..., None], rows.weights_BTV, np.float32(weight_of_padding))
        return programs.run(params, rows._replace(weights_BTV=weights), model)

    first = padded(5, 0.0)
    require_finite(first.logits_BTV, "a logit is not finite where there is padding", ROWS_OF_LOGITS)
    for name, leaf in by_path(first.gradient).items():
        require_finite(leaf, f"the gradient of {name} is not finite where there is padding", ())
    require_same_bits(
        padded(6, 0.0).logits_BTV, first.logits_BTV, "an output changes with padding", ROWS_OF_LOGITS, is_token_BT
    )
    whole = programs.ordinary(model).logits_BTV
    largest = require_close(
        first.logits_BTV, whole, CLOSE, "a padded row is not what the unpadded one is", ROWS_OF_LOGITS, is_token_BT
    )
    return f"bit-equal; unpadded within {largest:.0e}"


def cached_is_uncached(subject: Subject) -> str:
    """Each prefix of a row, read at once, goes on one token at a time, or at once, as if all had been read at once.

    Row r reads r + 1 tokens first. Rows end at different lengths: those that are through read padding, which must
    leave their caches as they are.
    """
    model = subject.small_model
    params, tokens_BT = programs.random_params(model), programs.random_tokens(model)
    expected_BTV = programs.ordinary(model).logits_BTV
    prefix_B = np.arange(ROWS) % LENGTH + 1
    end_B = np.where(np.arange(ROWS) < LENGTH, LENGTH, np.minimum(prefix_B + 3, LENGTH))
    worst = 0.0

    def read(cache: Any, start_B: np.ndarray, stop_B: np.ndarray, length: int, doing: str) -> Any:
        """The cache after the tokens from start to stop of each row, whose logits are compared."""
        nonlocal worst
        places_BT = (start_B[:, None] + np.arange(length)).astype(np.int32)
        is_token_BT = places_BT < stop_B[:, None]
        source_BT = np.minimum(places_BT, LENGTH - 1)
        filled_BT = np.where(is_token_BT, np.take_along_axis(tokens_BT, source_BT, axis=1), 7).astype(np.int32)
        logits_BTV, after = programs.run_cached(
            params, filled_BT, model, cache, places_BT, is_token_BT.astype(np.int32)
        )
        _require_same_shapes(cache, after)
        _require_unchanged_rows(cache, after, np.asarray(~is_token_BT.any(axis=1)))
        expected = np.take_along_axis(expected_BTV, source_BT[..., None], axis=1)
        what = f"with a cache the logits are others, {doing}"
        worst = max(worst, require_close(logits_BTV, expected, CLOSE, what, ROWS_OF_LOGITS, is_token_BT))
        return after

    empty = programs.empty_cache(model)
    zeros_B = np.zeros(ROWS, int)
    cache = read(empty, zeros_B, prefix_B, LENGTH, "when row r reads its first r + 1 tokens")
    read(cache, prefix_B, end_B, LENGTH, "when row r reads the rest after its first r + 1 tokens")
    for step in range(LENGTH - 1):
        doing = f"in step {step} after row r has read r + 1 tokens"
        cache = read(cache, prefix_B + step, end_B, 1, doing)
    return f"largest difference {worst:.0e}"


def _require_same_shapes(before: Any, after: Any) -> None:
    require_same_tree(after, before, "the cache")
    for name, leaf in by_path(before).items():
        back = by_path(after)[name]
        if (leaf.shape, leaf.dtype) != (back.shape, back.dtype):
            raise Broken(
                "the cache comes back with another shape or type",
                name,
                f"{back.dtype}{list(back.shape)} instead of {leaf.dtype}{list(leaf.shape)}",
            )


def _require_unchanged_rows(before: Any, after: Any, is_padding_B: np.ndarray) -> None:
    for name, leaf in by_path(before).items():
        by_row, by_row_after = (np.moveaxis(tree, 1, 0) for tree in (leaf, by_path(after)[name]))
        what = f"padding changes the cache {name}"
        require_same_bits(by_row_after, by_row, what, ("row", "layer"), is_padding_B)
