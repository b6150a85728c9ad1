"""Who sees whom: no later token, no other document, no other row and no padding; and what a cache changes: nothing."""

from typing import Any

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.fixtures import (
    LENGTH,
    PLACES_T,
    ROWS,
    ROWS_OF_LOGITS,
    Broken,
    require_close,
    require_finite,
    require_same_bits,
    require_same_tree,
)
from rustgpt_jax.conformance.long_row_checks import (
    KINDS,
    Case,
    Influence,
    Packed,
    Program,
    cached_forward,
    cases_of,
    for_case,
    forward,
    influence,
    long_model,
    packed_rows,
    program_of,
    whole_rows,
)
from rustgpt_jax.conformance.targets import Scope, Subject
from rustgpt_jax.model import transformer
from rustgpt_jax.pytrees import flatten_paths

CLOSE = 1e-4
CLOSE_IN_BFLOAT16 = 0.02
HIDDEN = ("row", "token", "channel")
LENGTH_OF_ROWS = 40
MOST_ROWS = 33
# Batch sizes that are compared with each row alone, and with a cache, with MOST_ROWS rows.
BATCHES = {Scope.SMALL: (2, 17), Scope.QUICK: (2, 17, MOST_ROWS), Scope.EXHAUSTIVE: (1, 2, 3, 17, MOST_ROWS)}
CACHED_BATCHES = {Scope.QUICK: (1,), Scope.EXHAUSTIVE: (2, 1)}
# Of rows that are compared with the beginning of the longest.
LENGTHS = {
    Scope.SMALL: (17, 40),
    Scope.QUICK: (15, 32, 40, 64, 130, 521),
    Scope.EXHAUSTIVE: (*range(1, 41), 63, 64, 65, 127, 128, 129, 255, 256, 257, 521),
}
KINDS_OF_ROWS = {Scope.SMALL: KINDS[:1], Scope.QUICK: KINDS[:3], Scope.EXHAUSTIVE: KINDS}


def causality(subject: Subject) -> str:
    """Check by full Jacobians and bitwise that no output depends on later tokens, and each depends on its own token.

    Covers rows of many lengths with one to five documents, both dtypes, training and evaluation.
    """
    cases, model = cases_of(subject), long_model(subject.small_model)
    seen = np.mean([require_causal(influence(model, case), case) for case in cases])
    return f"0 of later tokens, {seen:.0%} of earlier ones are seen; {len(cases)} whole Jacobians"


def require_causal(found: Influence, case: Case, where: str = "") -> float:
    """Return the share of earlier tokens that each token sees.

    Raises:
        Broken: A token sees a later token, or does not see itself.
    """
    slopes_KBS, changes_KBT = (each[: len(found.places_K)] for each in (found.slopes_KBT, found.changes_KBT))
    places_K11, places_S = found.places_K[:, None, None], np.arange(case.length)
    same_KBS = _same_document(found)
    here = f"{where}, in {case}".removeprefix(", ")
    later = np.argwhere(same_KBS & (places_S > places_K11) & (slopes_KBS != 0))
    if len(later):
        probe, row, place_of_input = later[0]
        raise Broken(
            f"an output depends on a later token, {here}",
            f"row {row}, output token {found.places_K[probe]}, input token {place_of_input}",
            f"a slope of {slopes_KBS[probe, row, place_of_input]:.2g}",
        )
    earlier = np.argwhere(same_KBS & (places_S < places_K11) & changes_KBT)
    if len(earlier):
        probe, row, place_of_output = earlier[0]
        raise Broken(
            f"an output changes with a later token, {here}",
            f"row {row}, output token {place_of_output}, input token {found.places_K[probe]}",
            "not the same bits",
        )
    itself = np.argwhere(same_KBS & (places_S == places_K11) & (slopes_KBS == 0))
    if len(itself):
        _, row, place_of_both = itself[0]
        raise Broken(
            f"an output does not depend on its own token, {here}", f"row {row}, token {place_of_both}", "a slope of 0"
        )
    return float(np.mean(slopes_KBS[same_KBS & (places_S < places_K11)] != 0))


def _same_document(found: Influence) -> np.ndarray:
    """Return whether token (b, t) is in the same document of row b as probe k; padding is in no document."""
    segments_BT = found.packed.segments_BT
    at_KB1 = np.moveaxis(segments_BT[:, found.places_K], 1, 0)[..., None]
    return (at_KB1 == segments_BT[None]) & (at_KB1 > 0)


def isolation(subject: Subject) -> str:
    """Check by full Jacobians and bitwise that packed documents, padding and batch rows are isolated.

    Each document must also give the same outputs as it does alone.
    """
    worst = 0.0
    cases = cases_of(subject)
    for case in cases:
        model = long_model(subject.small_model)
        found = influence(model, case)
        _require_isolated_documents(found, case)
        _require_isolated_rows(found, case)
        if case.dtype == "float32":
            worst = max(worst, _require_documents_alone(program_of(model, case), found, case))
    return f"bit-equal in {len(cases)} batches; documents alone within {worst:.0e}"


def _require_isolated_documents(found: Influence, case: Case) -> None:
    count = len(found.places_K)
    segments_KB1 = np.moveaxis(found.packed.segments_BT[:, found.places_K], 1, 0)[..., None]
    is_token_BT = found.packed.segments_BT > 0
    # Outputs at padding positions are ignored; changes made at padding positions must have no effect.
    for influences_KBT, what, verb in (
        ((found.slopes_KBT[:count] != 0) & (segments_KB1 > 0), "output token {0}, input token {1}", "depends on"),
        (found.changes_KBT[:count] & is_token_BT[None], "output token {1}, input token {0}", "changes with"),
    ):
        other = np.argwhere(influences_KBT & (segments_KB1 != found.packed.segments_BT[None]))
        if len(other):
            probe, row, place = other[0]
            segments_T = found.packed.segments_BT[row]
            here, there = segments_T[found.places_K[probe]], segments_T[place]
            raise Broken(
                f"an output {verb} another document of its row, in {case}",
                f"row {row}, " + what.format(found.places_K[probe], place),
                f"documents {here} and {there} of {segments_T.max()}",
            )


def _require_isolated_rows(found: Influence, case: Case) -> None:
    for influences_BBT in found.slopes_KBT[len(found.places_K) :] != 0, found.changes_KBT[len(found.places_K) :]:
        other = np.argwhere(influences_BBT & ~np.eye(case.batch, dtype=bool)[..., None])
        if len(other):
            row, other_row, place = other[0]
            raise Broken(
                f"a row depends on another row, in {case}", f"row {other_row}, token {place}", f"influence of row {row}"
            )


def _require_documents_alone(program: Program, found: Influence, case: Case) -> float:
    """Check that each document, moved to the start of its own row, gives the same outputs."""
    worst, (x_BTD, positions_BT, segments_BT) = 0.0, found.packed
    documents = [
        (row, np.flatnonzero(segments_BT[row] == segment))
        for row in range(case.batch)
        for segment in range(1, segments_BT[row].max() + 1)
        if segments_BT[row].max() > 1
    ]
    for begin in range(0, len(documents), case.batch):
        several = documents[begin : begin + case.batch]
        alone = Packed(np.zeros_like(x_BTD), np.zeros_like(positions_BT), np.zeros_like(segments_BT))
        expected_BTD = np.zeros_like(found.output_BTD)
        for to, (row, places) in enumerate(several):
            here = slice(0, len(places))
            alone.x_BTD[to, here], alone.positions_BT[to, here] = x_BTD[row, places], np.arange(len(places))
            alone.segments_BT[to, here] = 1
            expected_BTD[to, here] = found.output_BTD[row, places]
        output_BTD, _ = program.run(alone)
        what = f"a document alone is not what it is after or before another, in {case}"
        worst = max(worst, require_close(output_BTD, expected_BTD, CLOSE, what, HIDDEN, alone.segments_BT > 0))
    return worst


def rows(subject: Subject) -> str:
    """Check that a row's outputs do not depend on the batch size, and a prefix's outputs not on the row length.

    Covers both dtypes, training and evaluation, with and without a cache; the small scope only float32 evaluation.
    """
    model, scope = long_model(subject.small_model), subject.scope
    is_long = scope is Scope.EXHAUSTIVE
    params = fixtures.random_params(model)
    worst = 0.0
    for dtype, is_training in KINDS_OF_ROWS[scope]:
        variant = for_case(model, dtype, is_training)
        several = packed_rows(model, MOST_ROWS, LENGTH_OF_ROWS)
        first = [
            forward(params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], several), variant, is_training)
            for row in range(MOST_ROWS)
        ]
        expected = np.concatenate(first)
        is_usual = (dtype, is_training) == KINDS[0]
        for batch in BATCHES[scope] if is_long or is_usual else (MOST_ROWS,):
            case = Case(LENGTH_OF_ROWS, batch, dtype, is_training)
            found = forward(params, jax.tree.map(lambda leaf, batch=batch: leaf[:batch], several), variant, is_training)
            worst = max(worst, _require_rows(found, expected[:batch], several.segments_BT[:batch], case))
        if dtype == "float32" and (is_long or is_usual):
            worst = max(worst, _require_same_at_all_lengths(model, subject, is_training))
    if scope is Scope.SMALL:
        return f"batches of {' and '.join(map(str, BATCHES[scope]))} rows: within {worst:.0e}"
    worst = max(worst, _require_cached_rows(params, model, CACHED_BATCHES[scope]))
    lengths = LENGTHS[scope]
    return f"batches of 1 to {MOST_ROWS} rows, of {lengths[0]} to {lengths[-1]} tokens: within {worst:.0e}"


def _require_same_at_all_lengths(model: ModelConfig, subject: Subject, is_training: bool) -> float:
    """Check in float32 that rows of all lengths have the outputs of the first tokens of the longest."""
    lengths = LENGTHS[Scope.QUICK if is_training else subject.scope]
    # Lengths that causality covers share its compiled programs: in float32, training that drops nothing is evaluation.
    cases = {length: Case(length, 2, is_training=is_training) for length in lengths}
    shared = {case.length: case for case in cases_of(subject) if case.dtype == "float32" and not is_training}
    worst, longest = 0.0, np.zeros(())
    for length in reversed(lengths):
        case = shared.get(length, cases[length])
        packed = whole_rows(model, case.batch, length)
        if length in shared:
            found, _ = program_of(model, case).run(packed)
        else:
            variant = for_case(model, case.dtype, is_training)
            found = forward(fixtures.random_params(model), packed, variant, is_training)
        longest = found if length == lengths[-1] else longest
        count = min(len(found), len(longest))
        what = f"the length of a row changes its outputs: {case}, and the first of {lengths[-1]}"
        worst = max(worst, require_close(found[:count], longest[:count, :length], CLOSE, what, HIDDEN))
    return worst


def _require_rows(found: np.ndarray, expected: np.ndarray, segments_BT: np.ndarray, case: Case) -> float:
    what, is_token_BT = f"a row of a batch is not what it is alone, in {case}", segments_BT > 0
    if case.dtype == "float32":
        return require_close(found, expected, CLOSE, what, HIDDEN, is_token_BT)
    # Rounding can change a few tokens a lot, for example by changing the choice of an expert, but not most of them.
    error_BT = np.sqrt(np.mean(np.square(found - expected), axis=-1)) / np.sqrt(np.mean(np.square(expected)))
    error_B = np.array(
        [np.median(error_T[is_token_T]) for error_T, is_token_T in zip(error_BT, is_token_BT, strict=True)]
    )
    if not error_B.max() <= CLOSE_IN_BFLOAT16:
        shown = f"a relative error of {error_B.max():.2g} in the median token ({CLOSE_IN_BFLOAT16} is allowed)"
        raise Broken(what, f"row {error_B.argmax()}", shown)
    return 0.0


def _require_cached_rows(params: Any, model: ModelConfig, batches: tuple[int, ...]) -> float:
    """Check prefill and one decoding step of the last rows, in batches of several sizes, against MOST_ROWS rows."""
    worst = 0.0
    several = whole_rows(model, MOST_ROWS, LENGTH + 1)
    expected = np.zeros(())
    for batch in (MOST_ROWS, *batches):
        cached = transformer.init_cache(model, batch, LENGTH + 1)
        outputs = []
        for places in slice(0, LENGTH), slice(LENGTH, LENGTH + 1):
            piece = jax.tree.map(lambda leaf, batch=batch, places=places: leaf[-batch:, places], several)
            output, cached = cached_forward(params, piece, cached, model)
            outputs.append(output)
        found = np.concatenate(outputs, axis=1)
        if batch == MOST_ROWS:
            expected = found
        what = f"with a cache, a row of {batch} is not what it is in a batch of {MOST_ROWS}"
        worst = max(worst, require_close(found, expected[-batch:], CLOSE, what, HIDDEN))
    return worst


def padding(subject: Subject) -> str:
    """What padding says does not matter, nor how much of it there is."""
    model = subject.small_model
    params, tokens_BT = fixtures.random_params(model), fixtures.random_tokens(model)
    is_token_BT = PLACES_T[None, :] < 1 + np.arange(ROWS)[:, None] % LENGTH

    def padded(seed: int, weight_of_padding: float) -> fixtures.Result:
        filled_BT = np.where(is_token_BT, tokens_BT, fixtures.random_tokens(model, seed))
        positions_BT = np.where(is_token_BT, PLACES_T[None, :], 0).astype(np.int32)
        rows = fixtures.rows_of(filled_BT, model, positions_BT, is_token_BT.astype(np.int32))
        weights = np.where(is_token_BT[..., None], rows.weights_BTV, np.float32(weight_of_padding))
        return fixtures.run(params, rows._replace(weights_BTV=weights), model)

    first = padded(5, 0.0)
    require_finite(first.logits_BTV, "a logit is not finite where there is padding", ROWS_OF_LOGITS)
    for name, leaf in flatten_paths(first.gradient).items():
        require_finite(leaf, f"the gradient of {name} is not finite where there is padding", ())
    require_same_bits(
        padded(6, 0.0).logits_BTV, first.logits_BTV, "an output changes with padding", ROWS_OF_LOGITS, is_token_BT
    )
    whole = fixtures.ordinary(model).logits_BTV
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
    params, tokens_BT = fixtures.random_params(model), fixtures.random_tokens(model)
    expected_BTV = fixtures.ordinary(model).logits_BTV
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
        logits_BTV, after = fixtures.run_cached(
            params, filled_BT, model, cache, places_BT, is_token_BT.astype(np.int32)
        )
        _require_same_shapes(cache, after)
        _require_unchanged_rows(cache, after, np.asarray(~is_token_BT.any(axis=1)))
        expected = np.take_along_axis(expected_BTV, source_BT[..., None], axis=1)
        what = f"with a cache the logits are others, {doing}"
        worst = max(worst, require_close(logits_BTV, expected, CLOSE, what, ROWS_OF_LOGITS, is_token_BT))
        return after

    empty = fixtures.empty_cache(model)
    zeros_B = np.zeros(ROWS, int)
    cache = read(empty, zeros_B, prefix_B, LENGTH, "when row r reads its first r + 1 tokens")
    read(cache, prefix_B, end_B, LENGTH, "when row r reads the rest after its first r + 1 tokens")
    for step in range(LENGTH - 1):
        doing = f"in step {step} after row r has read r + 1 tokens"
        cache = read(cache, prefix_B + step, end_B, 1, doing)
    return f"largest difference {worst:.0e}"


def _require_same_shapes(before: Any, after: Any) -> None:
    require_same_tree(after, before, "the cache")
    for name, leaf in flatten_paths(before).items():
        back = flatten_paths(after)[name]
        if (leaf.shape, leaf.dtype) != (back.shape, back.dtype):
            raise Broken(
                "the cache comes back with another shape or type",
                name,
                f"{back.dtype}{list(back.shape)} instead of {leaf.dtype}{list(leaf.shape)}",
            )


def _require_unchanged_rows(before: Any, after: Any, is_padding_B: np.ndarray) -> None:
    for name, leaf in flatten_paths(before).items():
        by_row, by_row_after = (np.moveaxis(tree, 1, 0) for tree in (leaf, flatten_paths(after)[name]))
        what = f"padding changes the cache {name}"
        require_same_bits(by_row_after, by_row, what, ("row", "layer"), is_padding_B)


# Check prefill of prompts of many lengths, at once or in pieces, and the decoding that follows.

PREFILL_TOLERANCE = 2e-4
AXES = ("row", "token", "channel")
# Prompts of all lengths up to this one are batched together.
MOST_RAGGED = 40
PIECE = 7
# Numbers of tokens to prefill, first into an empty cache and then into one that holds more than 2,048 tokens.
PREFILL_LENGTHS = (1, 8, 33, 64, 131, 257)
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
    lengths = ALL_LENGTHS if is_exhaustive else PREFILL_LENGTHS
    worst = max(worst, _whole_prompts(model, lengths))
    windowed = replace_paths(model, {"attention.local_window": WINDOW})
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
        worst = max(worst, require_close(found, there, PREFILL_TOLERANCE, what, AXES, is_token_BT))
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
        worst = max(worst, require_close(found, expected[:, places], PREFILL_TOLERANCE, what, AXES))
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
