"""Check prefill of prompts of many lengths, at once or in pieces, and the decoding that follows."""

import dataclasses
from typing import Any

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.assertions import require_close
from rustgpt_jax.conformance.long_row_checks import Packed, cached_forward, forward, long_model, whole_rows
from rustgpt_jax.conformance.targets import Scope, Subject
from rustgpt_jax.model import transformer

CLOSE = 2e-4
AXES = ("row", "token", "channel")
# Prompts of all lengths up to this one are batched together.
MOST_RAGGED = 40
PIECE = 7
# Numbers of tokens to prefill, first into an empty cache and then into one that holds more than 2,048 tokens.
LENGTHS = (1, 8, 33, 64, 131, 257)
ALL_LENGTHS = (*range(1, MOST_RAGGED + 1), 63, 64, 65, 127, 128, 129, 255, 256, 257)
FAR = 2048
SLOTS = 2400
# A sliding window longer than some prompts and shorter than others.
WINDOW = 32


def prefill(subject: Subject) -> str:
    """Check that prefill, at once or in pieces, and token-by-token decoding match one call without a cache.

    Covers prompts of any length, positions beyond 2,048, and a ring buffer that is filled more than twice; the small
    scope only prompts of 1 to 40 tokens.
    """
    model = long_model(subject.small_model)
    worst = _ragged(model)
    if subject.scope is Scope.SMALL:
        return f"prompts of 1 to {MOST_RAGGED} tokens, in pieces: within {worst:.0e}"
    is_exhaustive = subject.scope is Scope.EXHAUSTIVE
    lengths = ALL_LENGTHS if is_exhaustive else LENGTHS
    worst = max(worst, _whole_prompts(model, lengths))
    windowed = dataclasses.replace(model, local_window=WINDOW)
    if is_exhaustive and _cache_shapes(windowed) != _cache_shapes(model):
        worst = max(worst, _ragged(windowed), _whole_prompts(windowed, lengths))
    return f"prompts of {lengths[0]} to {lengths[-1]} tokens, positions to {SLOTS}: within {worst:.0e}"


def _cache_shapes(model: ModelConfig) -> Any:
    cached = jax.eval_shape(lambda: transformer.init_cache(model, 1, SLOTS))
    return [leaf.shape for leaf in jax.tree.leaves(cached)]


def _ragged(model: ModelConfig) -> float:
    """Check rows of 1 to MOST_RAGGED tokens read in pieces of 7, 3 and 1; finished rows read padding."""
    params, batch, length = fixtures.random_params(model), MOST_RAGGED, MOST_RAGGED + 4 * PIECE
    packed = whole_rows(model, batch, length)
    expected = forward(params, packed, model)
    cached: Any = transformer.init_cache(model, batch, length)
    read_B = np.zeros(batch, int)
    worst = 0.0
    pieces = [(MOST_RAGGED, np.arange(batch) + 1)]
    pieces += [(PIECE, np.where(np.arange(batch) % 3 == step, 3, PIECE)) for step in range(2)]
    pieces += [(1, np.arange(batch) % 2), (1, np.ones(batch, int))]
    for size, count_B in pieces:
        places_BT = (read_B[:, None] + np.arange(size)).astype(np.int32)
        is_token_BT = np.arange(size)[None, :] < count_B[:, None]
        source_BT1 = np.minimum(places_BT, length - 1)[..., None]
        piece = Packed(np.take_along_axis(packed.x_BTD, source_BT1, axis=1), places_BT, is_token_BT.astype(np.int32))
        found, cached = cached_forward(params, piece, cached, model)
        what = f"with a cache the outputs are others, when rows that hold r + 1 tokens or more read {size} at a time"
        there = np.take_along_axis(expected, source_BT1, axis=1)
        worst = max(worst, require_close(found, there, CLOSE, what, AXES, is_token_BT))
        read_B = read_B + count_B
    return worst


def _whole_prompts(model: ModelConfig, lengths: tuple[int, ...]) -> float:
    """Check prompts of each length from an empty cache with some tokens after them, then pieces of all lengths."""
    params = fixtures.random_params(model)
    packed = whole_rows(model, 2, SLOTS)
    expected = forward(params, packed, model)
    worst = 0.0

    def read(cached: Any, begin: int, size: int, doing: str) -> Any:
        nonlocal worst
        places = slice(begin, begin + size)
        found, cached = cached_forward(params, jax.tree.map(lambda leaf: leaf[:, places], packed), cached, model)
        what = f"with a cache the outputs are others, {doing}"
        worst = max(worst, require_close(found, expected[:, places], CLOSE, what, AXES))
        return cached

    empty = transformer.init_cache(model, 2, SLOTS)
    for size in lengths:
        cached = read(empty, 0, size, f"in a prompt of {size} tokens")
        cached = read(cached, size, 1, f"one token after a prompt of {size}")
        read(cached, size + 1, lengths[1], f"{lengths[1]} tokens after a prompt of {size} and one more")
    begin, cached = 0, empty
    while begin + lengths[-1] <= FAR:
        cached = read(cached, begin, lengths[-1], f"in pieces of {lengths[-1]} tokens, from position {begin}")
        begin += lengths[-1]
    for size in (*lengths[-2:], *lengths[:4], *[1] * 3):
        cached = read(cached, begin, size, f"in a piece of {size} tokens, from position {begin}")
        begin += size
    return worst
