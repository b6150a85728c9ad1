"""Checks of what a token may depend on: no later token, other document, other row or padding; and of caches."""

import dataclasses
from typing import Any

import jax
import numpy as np

from rustgpt_jax.config.schema import ModelConfig, replace_paths
from rustgpt_jax.conformance.components import Component, Scope
from rustgpt_jax.conformance.fixtures import (
    LENGTH,
    LOGIT_AXES,
    POSITIONS_T,
    ROWS,
    CheckFailure,
    Outputs,
    apply_model,
    assert_close,
    assert_finite_outputs,
    assert_same_bits,
    assert_same_shapes,
    init_cache,
    make_batch,
    random_params,
    random_tokens,
    reference_outputs,
    run_model,
)
from rustgpt_jax.conformance.packed_sequences import (
    CASES,
    DTYPES_AND_MODES,
    HIDDEN_AXES,
    Case,
    Influence,
    PackedRows,
    compute_influence,
    for_case,
    model_for_long_rows,
    packed_rows,
    run_cached_forward,
    run_case,
    run_forward,
    single_document_rows,
)
from rustgpt_jax.conformance.transform_checks import assert_parameters_used
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.pytrees import flatten_paths

TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.02
# The length of rows and the largest batch in the check of rows.
ROW_LENGTH, MAX_ROWS = 40, 33
# Batch sizes to compare with each row alone, and batch sizes to compare, with a cache, with a batch of MAX_ROWS rows.
BATCHES = {Scope.SMALL: (2, 17), Scope.QUICK: (2, MAX_ROWS), Scope.EXHAUSTIVE: (1, 2, 3, 17, MAX_ROWS)}
CACHED_BATCHES = {Scope.QUICK: (1,), Scope.EXHAUSTIVE: (2, 1)}
# Lengths of rows whose outputs are compared with the beginning of the longest row.
LENGTHS = {
    Scope.SMALL: (17, ROW_LENGTH),
    Scope.QUICK: (15, 32, 33, ROW_LENGTH, 130, 521),
    Scope.EXHAUSTIVE: (*range(1, 41), 63, 64, 65, 127, 128, 129, 255, 256, 257, 521),
}
VARIANTS = {
    Scope.SMALL: DTYPES_AND_MODES[:1],
    Scope.QUICK: (DTYPES_AND_MODES[0], DTYPES_AND_MODES[-1]),
    Scope.EXHAUSTIVE: DTYPES_AND_MODES,
}


def causality(component: Component) -> str:
    """Check, by full Jacobians and bit for bit, that outputs depend on their own token and on no later one.

    Covers rows of many lengths with one to five documents, both dtypes, training and evaluation.
    """
    cases, model = CASES[component.scope], model_for_long_rows(component)
    share = np.mean([_assert_causal(compute_influence(model, case), case) for case in cases])
    return f"no later tokens and {share:.0%} of earlier ones have an influence; {len(cases)} full Jacobians"


def _assert_causal(found: Influence, case: Case) -> float:
    """Return the share of earlier tokens that each token depends on.

    Raises:
        CheckFailure: A token depends on a later token, or not on itself.
    """
    gradients_KBS, changes_KBT = (each[: len(found.positions_K)] for each in (found.gradients_KBT, found.changes_KBT))
    positions_K11, positions_S = found.positions_K[:, None, None], np.arange(case.length)
    at_KB1 = np.moveaxis(found.packed.segments_BT[:, found.positions_K], 1, 0)[..., None]
    same_document_KBS = (at_KB1 == found.packed.segments_BT[None]) & (at_KB1 > 0)
    later = np.argwhere(same_document_KBS & (positions_S > positions_K11) & (gradients_KBS != 0))
    if len(later):
        probe, row, input_position = later[0]
        raise CheckFailure(
            f"an output depends on a later token, in {case}",
            f"row {row}, output token {found.positions_K[probe]}, input token {input_position}",
            f"a derivative of {gradients_KBS[probe, row, input_position]:.2g}",
        )
    earlier = np.argwhere(same_document_KBS & (positions_S < positions_K11) & changes_KBT)
    if len(earlier):
        probe, row, output_position = earlier[0]
        raise CheckFailure(
            f"an output changes with a later token, in {case}",
            f"row {row}, output token {output_position}, input token {found.positions_K[probe]}",
            "not the same bits",
        )
    itself = np.argwhere(same_document_KBS & (positions_S == positions_K11) & (gradients_KBS == 0))
    if len(itself):
        _, row, position = itself[0]
        what = f"an output does not depend on its own token, in {case}"
        raise CheckFailure(what, f"row {row}, token {position}", "a derivative of 0")
    return float(np.mean(gradients_KBS[same_document_KBS & (positions_S < positions_K11)] != 0))


def isolation(component: Component) -> str:
    """Check, by full Jacobians and bit for bit, that packed documents, padding and rows are independent.

    Each document must also give the same outputs as when it is alone in a row.
    """
    worst = 0.0
    cases, model = CASES[component.scope], model_for_long_rows(component)
    for case in cases:
        found = compute_influence(model, case)
        _assert_isolated_documents(found, case)
        _assert_isolated_rows(found, case)
        if case.dtype == "float32":
            worst = max(worst, _assert_documents_alone(model, found, case))
    return f"bit-equal in {len(cases)} batches; documents alone within {worst:.0e}"


def _assert_isolated_documents(found: Influence, case: Case) -> None:
    count = len(found.positions_K)
    segments_KB1 = np.moveaxis(found.packed.segments_BT[:, found.positions_K], 1, 0)[..., None]
    is_token_BT = found.packed.segments_BT > 0
    # Outputs at padding positions are ignored; changes made at padding positions must have no effect.
    for influences_KBT, what, verb in (
        ((found.gradients_KBT[:count] != 0) & (segments_KB1 > 0), "output token {0}, input token {1}", "depends on"),
        (found.changes_KBT[:count] & is_token_BT[None], "output token {1}, input token {0}", "changes with"),
    ):
        other = np.argwhere(influences_KBT & (segments_KB1 != found.packed.segments_BT[None]))
        if len(other):
            probe, row, position = other[0]
            segments_T = found.packed.segments_BT[row]
            here, there = segments_T[found.positions_K[probe]], segments_T[position]
            raise CheckFailure(
                f"an output {verb} another document of its row, in {case}",
                f"row {row}, " + what.format(found.positions_K[probe], position),
                f"documents {here} and {there} of {segments_T.max()}",
            )


def _assert_isolated_rows(found: Influence, case: Case) -> None:
    count = len(found.positions_K)
    for influences_BBT in found.gradients_KBT[count:] != 0, found.changes_KBT[count:]:
        other = np.argwhere(influences_BBT & ~np.eye(case.batch, dtype=bool)[..., None])
        if len(other):
            row, other_row, position = other[0]
            what, where = f"a row depends on another row, in {case}", f"row {other_row}, token {position}"
            raise CheckFailure(what, where, f"influence of row {row}")


def _assert_documents_alone(model: ModelConfig, found: Influence, case: Case) -> float:
    """Check that each document, moved to the start of its own row, gives the same outputs."""
    worst, (x_BTD, positions_BT, segments_BT) = 0.0, found.packed
    documents = [
        (row, np.flatnonzero(segments_BT[row] == segment))
        for row in range(case.batch)
        for segment in range(1, segments_BT[row].max() + 1)
        if segments_BT[row].max() > 1
    ]
    for begin in range(0, len(documents), case.batch):
        alone = PackedRows(np.zeros_like(x_BTD), np.zeros_like(positions_BT), np.zeros_like(segments_BT))
        expected_BTD = np.zeros_like(found.output_BTD)
        for to, (row, positions) in enumerate(documents[begin : begin + case.batch]):
            here = slice(0, len(positions))
            alone.x_BTD[to, here], alone.positions_BT[to, here] = x_BTD[row, positions], np.arange(len(positions))
            alone.segments_BT[to, here] = 1
            expected_BTD[to, here] = found.output_BTD[row, positions]
        output_BTD, _ = run_case(model, case, alone)
        what = f"a document alone differs from the same document packed with others, in {case}"
        worst = max(worst, assert_close(output_BTD, expected_BTD, TOLERANCE, what, HIDDEN_AXES, alone.segments_BT > 0))
    return worst


def rows(component: Component) -> str:
    """Check that outputs depend neither on the batch size nor on the tokens that follow in a longer row.

    Covers both dtypes, training and evaluation, with and without a cache; the small scope covers only float32
    evaluation.
    """
    model, scope = model_for_long_rows(component), component.scope
    is_exhaustive = scope is Scope.EXHAUSTIVE
    params = random_params(model)
    worst = 0.0
    packed = packed_rows(model, MAX_ROWS, ROW_LENGTH)
    for dtype, is_training in VARIANTS[scope]:
        variant = for_case(model, dtype, is_training)
        is_first = (dtype, is_training) == DTYPES_AND_MODES[0]
        batches = BATCHES[scope] if is_exhaustive or is_first else (MAX_ROWS,)
        alone = [
            run_forward(params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], packed), variant, is_training)
            for row in range(max(batches))
        ]
        expected = np.concatenate(alone)
        for batch in batches:
            case = Case(ROW_LENGTH, batch, dtype, is_training)
            some = jax.tree.map(lambda leaf, batch=batch: leaf[:batch], packed)
            found = run_forward(params, some, variant, is_training)
            worst = max(worst, _assert_same_rows(found, expected[:batch], some.segments_BT, case))
        if dtype == "float32" and (is_exhaustive or is_first):
            worst = max(worst, _assert_same_at_all_lengths(model, scope, is_training))
    if scope is Scope.SMALL:
        return f"batches of {' and '.join(map(str, BATCHES[scope]))} rows: within {worst:.0e}"
    worst = max(worst, _assert_same_cached_rows(params, model, CACHED_BATCHES[scope]))
    lengths = LENGTHS[scope]
    return f"batches of 1 to {MAX_ROWS} rows, of {lengths[0]} to {lengths[-1]} tokens: within {worst:.0e}"


def _assert_same_at_all_lengths(model: ModelConfig, scope: Scope, is_training: bool) -> float:
    """Check in float32 that rows of all lengths have the same outputs as the first tokens of the longest row."""
    lengths = LENGTHS[Scope.QUICK if is_training else scope]
    # Lengths that causality covers share its compiled programs.
    shared = {case.length: case for case in CASES[scope] if case[2:] == ("float32", False) and not is_training}
    worst, longest = 0.0, np.zeros(())
    for length in reversed(lengths):
        case = shared.get(length, Case(length, 2, is_training=is_training))
        packed = single_document_rows(model, case.batch, length)
        if length in shared:
            found, _ = run_case(model, case, packed)
        else:
            found = run_forward(random_params(model), packed, for_case(model, case.dtype, is_training), is_training)
        longest = found if length == lengths[-1] else longest
        count = min(len(found), len(longest))
        what = f"the length of a row changes its outputs: {case}, and the first of {lengths[-1]}"
        worst = max(worst, assert_close(found[:count], longest[:count, :length], TOLERANCE, what, HIDDEN_AXES))
    return worst


def _assert_same_rows(found: np.ndarray, expected: np.ndarray, segments_BT: np.ndarray, case: Case) -> float:
    what, is_token_BT = f"a row of a batch differs from the same row alone, in {case}", segments_BT > 0
    if case.dtype == "float32":
        return assert_close(found, expected, TOLERANCE, what, HIDDEN_AXES, is_token_BT)
    # Rounding can change a few tokens a lot, for example by changing the choice of an expert, but not most of them.
    error_BT = np.sqrt(np.mean(np.square(found - expected), axis=-1)) / np.sqrt(np.mean(np.square(expected)))
    error_B = np.array(
        [np.median(error_T[is_token_T]) for error_T, is_token_T in zip(error_BT, is_token_BT, strict=True)]
    )
    if not error_B.max() <= BFLOAT16_TOLERANCE:
        shown = f"a relative error of {error_B.max():.2g} in the median token ({BFLOAT16_TOLERANCE} is allowed)"
        raise CheckFailure(what, f"row {error_B.argmax()}", shown)
    return 0.0


def _assert_same_cached_rows(params: Any, model: ModelConfig, batches: tuple[int, ...]) -> float:
    """Check prefill and one decoding step of the last rows, in batches of several sizes, against MAX_ROWS rows."""
    worst = 0.0
    packed = single_document_rows(model, MAX_ROWS, LENGTH + 1)
    expected = np.zeros(())
    for batch in (MAX_ROWS, *batches):
        cached = init_cache(model, batch, LENGTH + 1)
        outputs = []
        for positions in slice(0, LENGTH), slice(LENGTH, LENGTH + 1):
            piece = jax.tree.map(lambda leaf, batch=batch, positions=positions: leaf[-batch:, positions], packed)
            output, cached = run_cached_forward(params, piece, cached, model)
            outputs.append(output)
        found = np.concatenate(outputs, axis=1)
        expected = found if batch == MAX_ROWS else expected
        what = f"with a cache, a row in a batch of {batch} differs from the same row in a batch of {MAX_ROWS}"
        worst = max(worst, assert_close(found, expected[-batch:], TOLERANCE, what, HIDDEN_AXES))
    return worst


def padding(component: Component) -> str:
    """Check that neither the contents nor the amount of padding changes outputs, and that gradients are finite."""
    model = component.small_model
    params, tokens_BT = random_params(model), random_tokens(model)
    is_token_BT = POSITIONS_T[None, :] < 1 + np.arange(ROWS)[:, None] % LENGTH

    def run_padded(seed: int) -> Outputs:
        filled_BT = np.where(is_token_BT, tokens_BT, random_tokens(model, seed))
        positions_BT = np.where(is_token_BT, POSITIONS_T[None, :], 0).astype(np.int32)
        batch = make_batch(filled_BT, model, positions_BT, is_token_BT.astype(np.int32))
        weights_BTV = np.where(is_token_BT[..., None], batch.weights_BTV, np.float32(0))
        return run_model(params, batch._replace(weights_BTV=weights_BTV), model)

    found, other = run_padded(5), run_padded(6)
    assert_finite_outputs(found, "where there is padding")
    what = "an output changes with the contents of padding"
    assert_same_bits(other.logits_BTV, found.logits_BTV, what, LOGIT_AXES, is_token_BT)
    what, unpadded_BTV = "a padded row differs from the same row without padding", reference_outputs(model).logits_BTV
    largest = assert_close(found.logits_BTV, unpadded_BTV, TOLERANCE, what, LOGIT_AXES, is_token_BT)
    return f"bit-equal; unpadded within {largest:.0e}"


# Checks of the KV cache or recurrent state.

PREFILL_TOLERANCE = 2e-4
# Prompts of all lengths up to this one are batched together.
MAX_RAGGED = 40
PIECE = 7
# Numbers of tokens to prefill, first into an empty cache and then into one that holds more than 2,048 tokens.
PREFILL_LENGTHS = (1, 8, 64, 131, 257)
EXHAUSTIVE_PREFILL_LENGTHS = (*range(1, MAX_RAGGED + 1), 63, 64, 65, 127, 128, 129, 255, 256, 257)
FAR = 2048
SLOTS = 2400
# A sliding window longer than some prompts and shorter than others.
WINDOW = 32


def cache(component: Component) -> str:
    """Check that cached logits equal uncached ones, after each prefix of a row, in one call or token by token.

    Row r reads r + 1 tokens first. Rows end at different lengths: finished rows read padding, which must leave their
    caches unchanged.
    """
    return f"largest difference {assert_cached_equals_uncached(component.small_model):.0e}"


def assert_cached_equals_uncached(model: ModelConfig) -> float:
    """Return the largest relative difference between cached and uncached logits; see `cache`."""
    params, tokens_BT = random_params(model), random_tokens(model)
    expected_BTV = reference_outputs(model).logits_BTV
    prefix_B = np.arange(ROWS) % LENGTH + 1
    end_B = np.where(np.arange(ROWS) < LENGTH, LENGTH, np.minimum(prefix_B + 3, LENGTH))

    def read(cached: Any, start_B: np.ndarray, stop_B: np.ndarray, length: int, when: str) -> tuple[Any, float]:
        """Read the tokens from start to stop of each row; return the cache and the difference between the logits."""
        positions_BT = (start_B[:, None] + np.arange(length)).astype(np.int32)
        is_token_BT = positions_BT < stop_B[:, None]
        source_BT = np.minimum(positions_BT, LENGTH - 1)
        filled_BT = np.where(is_token_BT, np.take_along_axis(tokens_BT, source_BT, axis=1), 7).astype(np.int32)
        segments_BT = is_token_BT.astype(np.int32)
        logits_BTV, after = apply_model(
            params, filled_BT, model=model, cache=cached, positions_BT=positions_BT, segments_BT=segments_BT
        )
        assert_same_shapes(after, cached, "the cache")
        is_finished_B = ~is_token_BT.any(axis=1)
        for name, leaf in flatten_paths(cached).items():
            before, now = (np.moveaxis(np.asarray(array), 1, 0) for array in (leaf, flatten_paths(after)[name]))
            assert_same_bits(now, before, f"padding changes the cache {name}", ("row", "layer"), is_finished_B)
        expected = np.take_along_axis(expected_BTV, source_BT[..., None], axis=1)
        what = f"with a cache the logits differ, {when}"
        return after, assert_close(logits_BTV, expected, TOLERANCE, what, LOGIT_AXES, is_token_BT)

    cached, worst = init_cache(model, ROWS, LENGTH), []
    cached, error = read(cached, np.zeros(ROWS, int), prefix_B, LENGTH, "when row r reads its first r + 1 tokens")
    worst.append(error)
    worst.append(read(cached, prefix_B, end_B, LENGTH, "when row r reads the rest after its first r + 1 tokens")[1])
    for step in range(LENGTH - 1):
        when = f"in step {step} after row r has read r + 1 tokens"
        cached, error = read(cached, prefix_B + step, end_B, 1, when)
        worst.append(error)
    return max(worst)


def prefill(component: Component) -> str:
    """Check that prefill, at once or in pieces, and token-by-token decoding match one call without a cache.

    Covers prompts of any length, positions beyond 2,048, and a ring buffer that is filled more than twice; the small
    scope only prompts of 1 to 40 tokens.
    """
    model = model_for_long_rows(component)
    worst = _assert_ragged_prompts(model)
    if component.scope is Scope.SMALL:
        return f"prompts of 1 to {MAX_RAGGED} tokens, in pieces: within {worst:.0e}"
    is_exhaustive = component.scope is Scope.EXHAUSTIVE
    lengths = EXHAUSTIVE_PREFILL_LENGTHS if is_exhaustive else PREFILL_LENGTHS
    worst = max(worst, _assert_prompts(model, lengths))
    windowed = replace_paths(model, {"attention.local_window": WINDOW})
    if is_exhaustive and _shapes(windowed) != _shapes(model):
        worst = max(worst, _assert_ragged_prompts(windowed), _assert_prompts(windowed, lengths))
    return f"prompts of {lengths[0]} to {lengths[-1]} tokens, positions to {SLOTS}: within {worst:.0e}"


def _shapes(model: ModelConfig) -> list[Any]:
    """Return the shapes of the model's parameters and of its cache."""
    cached = jax.eval_shape(lambda: transformer.init_cache(model, 1, SLOTS))
    return [leaf.shape for leaf in jax.tree.leaves((parameter_shapes(model), cached))]


def _assert_ragged_prompts(model: ModelConfig) -> float:
    """Check rows of 1 to MAX_RAGGED tokens read in pieces of 7, 3 and 1; finished rows read padding."""
    params, batch, length = random_params(model), MAX_RAGGED, MAX_RAGGED + 4 * PIECE
    packed = single_document_rows(model, batch, length)
    expected = run_forward(params, packed, model)
    cached = init_cache(model, batch, length)
    read_B = np.zeros(batch, int)
    worst = 0.0
    pieces = [(MAX_RAGGED, np.arange(batch) + 1)]
    pieces += [(PIECE, np.where(np.arange(batch) % 3 == step, 3, PIECE)) for step in range(2)]
    pieces += [(1, np.arange(batch) % 2), (1, np.ones(batch, int))]
    for size, count_B in pieces:
        positions_BT = (read_B[:, None] + np.arange(size)).astype(np.int32)
        is_token_BT = np.arange(size)[None, :] < count_B[:, None]
        source_BT1 = np.minimum(positions_BT, length - 1)[..., None]
        x_BTD = np.take_along_axis(packed.x_BTD, source_BT1, axis=1)
        piece = PackedRows(x_BTD, positions_BT, is_token_BT.astype(np.int32))
        found, cached = run_cached_forward(params, piece, cached, model)
        what = f"with a cache the outputs differ, when rows that hold r + 1 tokens or more read {size} at a time"
        there = np.take_along_axis(expected, source_BT1, axis=1)
        worst = max(worst, assert_close(found, there, PREFILL_TOLERANCE, what, HIDDEN_AXES, is_token_BT))
        read_B = read_B + count_B
    return worst


def _assert_prompts(model: ModelConfig, lengths: tuple[int, ...]) -> float:
    """Check that outputs with a cache equal those without, and return the largest difference.

    Each prompt starts from an empty cache and is followed by one token and by a short piece. Then one sequence is fed
    in pieces of the largest length up to position FAR, and in pieces of several lengths after it.
    """
    params = random_params(model)
    packed = single_document_rows(model, 2, SLOTS)
    expected = run_forward(params, packed, model)
    worst = []

    def read(cached: Any, begin: int, size: int, where: str) -> Any:
        positions = slice(begin, begin + size)
        piece = jax.tree.map(lambda leaf: leaf[:, positions], packed)
        found, cached = run_cached_forward(params, piece, cached, model)
        what = f"with a cache the outputs differ, {where}"
        worst.append(assert_close(found, expected[:, positions], PREFILL_TOLERANCE, what, HIDDEN_AXES))
        return cached

    empty = init_cache(model, 2, SLOTS)
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
    return max(worst)


def heads(component: Component) -> str:
    """Check that all parameters are used and the cache is correct with one, two and all key-value heads."""
    model = dataclasses.replace(component.small_model, n_layers=component.small_model.period)
    counts = [count for count in (1, 2, model.attention.n_heads) if model.attention.n_heads % count == 0]
    others = {count: replace_paths(model, {"attention.n_kv_heads": count}) for count in counts}
    others = {count: other for count, other in others.items() if _shapes(other) != _shapes(model)}
    for count, other in others.items():
        assert_parameters_used(other, f"with {count} of {model.attention.n_heads} key-value heads")
        assert_cached_equals_uncached(other)
    shown = ", ".join(map(str, others))
    return f"{shown} key-value heads too" if others else "no shape depends on n_kv_heads"
