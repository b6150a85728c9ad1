"""Batches: every token is a target once per epoch, documents are separated, and a batch depends only on its step."""

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rustgpt_jax.data import pipeline
from rustgpt_jax.data.pipeline import Batch, Batches, SequenceReader, iterate_eval_batches
from rustgpt_jax.data.token_store import TokenStream


def stream_of(lengths: list[int], weights: list[bool] | None = None, shard: int = 2**20) -> TokenStream:
    """Documents of these lengths, all tokens of the stream different but for END, which is 0."""
    n_tokens = sum(lengths) + 1
    offsets = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(n_tokens, dtype=np.uint16)
    tokens[[*offsets, -1]] = 0
    learned = np.resize(np.array(weights or [True]), n_tokens).astype(np.uint8)
    return TokenStream(
        token_shards=cut(tokens, shard),
        weight_shards=cut(learned, shard) if weights else (),
        offsets=offsets,
        end_id=0,
        n_targets=int(learned[1:].sum()),
        target_bytes=n_tokens,
    )


def cut(values: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    return tuple(values[start : start + size] for start in range(0, len(values), size))


def assert_equal(first: Batch, second: Batch) -> None:
    for name, left, right in zip(Batch._fields, first, second, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
        assert left.dtype == right.dtype


streams = st.builds(
    stream_of,
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.none() | st.lists(st.booleans(), min_size=1, max_size=9),
    st.integers(1, 30),
)
seq_lens = st.integers(1, 9)


# Sequences.


def naive_sequence(stream: TokenStream, seq_len: int, index: int, rotation: int) -> Batch:
    """Build a sequence token by token, with END as padding."""
    cycle = stream.n_tokens - 1
    tokens, weights = stream.tokens(0, cycle + 1), stream.weights(0, cycle + 1)
    rows = []
    document, place = 1, 0
    for offset in range(index * seq_len, (index + 1) * seq_len):
        at = (offset + rotation) % cycle
        is_real = offset < cycle
        if place and is_real and at in stream.offsets:
            document, place = document + 1, 0
        rows.append((tokens[at], tokens[at + 1], weights[at + 1], document, place) if is_real else (0, 0, 0, 0, place))
        place += 1
    return Batch(*(np.array(values, np.int32) for values in zip(*rows, strict=True)))


def assert_equal_without_padding(window: Batch, expected: Batch) -> None:
    real = expected.segments_BT > 0
    for name, values, wanted in zip(Batch._fields, window, expected, strict=True):
        kept = real if name in ("tokens_BT", "targets_BT") else slice(None)
        np.testing.assert_array_equal(values[kept], wanted[kept], err_msg=name)


@given(stream=streams, seq_len=seq_lens, seed=st.integers(0, 999))
def test_sequences_equal_a_naive_implementation(stream: TokenStream, seq_len: int, seed: int) -> None:
    source = SequenceReader(stream, seq_len)
    indices = np.arange(len(source))[::-1]
    rotations = np.random.default_rng(seed).integers(stream.n_tokens - 1, size=len(indices))
    together = source.read(source.locate(indices, rotations))
    for row, (index, rotation) in enumerate(zip(indices.tolist(), rotations.tolist(), strict=True)):
        assert_equal_without_padding(
            Batch(*(field[row] for field in together)), naive_sequence(stream, seq_len, index, rotation)
        )


def test_dtypes_and_shapes_of_a_batch() -> None:
    batch = Batches(stream_of([9, 9]), 4, 3, 0).batch(0)
    assert [field.shape for field in batch] == [(3, 4)] * 5
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


# Batches.


@given(stream=streams, seq_len=seq_lens, batch_size=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_every_token_is_a_target_once_per_epoch(stream: TokenStream, seq_len: int, batch_size: int, seed: int) -> None:
    source = Batches(stream, seq_len, batch_size, seed)
    # len(SequenceReader) batches are batch_size epochs.
    taken = [source.batch(step) for step in range(len(SequenceReader(stream, seq_len)))]
    targets = Counter(token for b in taken for token in b.targets_BT[b.weights_BT > 0].tolist())
    learned = stream.tokens(1, stream.n_tokens)[stream.weights(1, stream.n_tokens)]
    assert targets == Counter({token: count * batch_size for token, count in Counter(learned.tolist()).items()})


def first_tokens(source: Batches, n_steps: int) -> list[int]:
    return [token for step in range(n_steps) for token in source.batch(step).tokens_BT[:, 0].tolist()]


@pytest.fixture(params=["permuted", "shuffled one by one"])
def shuffling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to an order: in memory for few windows, without for many."""
    if request.param != "permuted":
        monkeypatch.setattr(pipeline, "MAX_PERMUTED", 0)


@pytest.mark.usefixtures("shuffling")
def test_epochs_have_all_sequences_in_different_orders() -> None:
    starts = first_tokens(Batches(stream_of([96]), 4, 8, seed=3), 6)
    first, second = ([(start - epoch[0]) % 96 for start in epoch] for epoch in (starts[:24], starts[24:]))
    assert sorted(first) == sorted(second) == list(range(0, 96, 4))
    assert first != second and first != sorted(first)


def test_epochs_start_at_different_offsets() -> None:
    starts = first_tokens(Batches(stream_of([96]), 32, 3, seed=3), 20)
    assert len({start % 32 for start in starts}) > 10


@pytest.mark.usefixtures("shuffling")
def test_batches_may_span_two_epochs() -> None:
    starts = first_tokens(Batches(stream_of([20]), 4, 3, seed=0), 5)
    for epoch in (starts[:5], starts[5:10], starts[10:]):
        assert sorted((start - epoch[0]) % 20 for start in epoch) == list(range(0, 20, 4))


@pytest.mark.usefixtures("shuffling")
def test_the_order_does_not_depend_on_the_batch_size() -> None:
    one, four = (first_tokens(Batches(stream_of([96]), 4, size, seed=3), 48 // size) for size in (1, 4))
    assert one == four


@pytest.mark.usefixtures("shuffling")
def test_seeds_give_different_orders() -> None:
    stream = stream_of([400])
    orders = {tuple(Batches(stream, 4, 50, seed).batch(0).tokens_BT[:, 0].tolist()) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.usefixtures("shuffling")
def test_epochs_of_different_seeds_differ() -> None:
    stream = stream_of([400])
    firsts = [Batches(stream, 4, 100, seed).batch(0).tokens_BT.tolist() for seed in range(5)]
    seconds = [Batches(stream, 4, 100, seed).batch(1).tokens_BT.tolist() for seed in range(5)]
    assert not [order for order in seconds if order in firsts]


def make() -> Batches:
    return Batches(stream_of([13, 5, 40, 21], [True, True, False]), 5, 4, seed=7)


def test_a_batch_depends_only_on_its_step() -> None:
    in_order = [make().batch(step) for step in range(20)]
    backwards = make()
    for step in reversed(range(20)):
        assert_equal(backwards.batch(step), in_order[step])


@pytest.mark.parametrize("first_step", [0, 1, 17])
def test_iteration_yields_the_batches_of_the_steps(first_step: int) -> None:
    source = make()
    iterator = source.iterate(first_step)
    for step in range(first_step, first_step + 25):
        assert_equal(next(iterator), source.batch(step))
    iterator.close()


def test_first_step_shifts_the_batches() -> None:
    stream = stream_of([50])
    first, later = Batches(stream, 4, 3, 5), Batches(stream, 4, 3, 5, first_step=100)
    assert_equal(first.batch(2), later.batch(102))
    iterator = later.iterate(102)
    assert_equal(first.batch(2), next(iterator))
    iterator.close()


@pytest.mark.parametrize("step", [-1, 99])
def test_steps_before_the_first_are_refused(step: int) -> None:
    source = Batches(stream_of([50]), 4, 3, 5, first_step=100)
    with pytest.raises(IndexError, match=f"Step {step} comes before the first step of this data, 100"):
        source.batch(step)
    with pytest.raises(IndexError, match=f"Step {step} "):
        next(source.iterate(step))


def test_closing_an_iterator_ends_its_thread() -> None:
    before = set(threading.enumerate())
    source = make()
    iterator = source.iterate(0)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not [thread for thread in started if thread.is_alive()]


UNFINISHED = """
from test_pipeline import make
iterator = make().iterate(0)
next(iterator)
"""


def test_an_open_iterator_does_not_block_exit() -> None:
    command = [sys.executable, "-c", UNFINISHED]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Evaluation.


@given(stream=streams, seq_len=seq_lens, batch_size=st.integers(1, 5))
def test_evaluation_reads_all_sequences_in_order(stream: TokenStream, seq_len: int, batch_size: int) -> None:
    taken = list(iterate_eval_batches(stream, seq_len, batch_size, None))
    targets = [token for b in taken for token in b.targets_BT[b.segments_BT > 0].tolist()]
    assert targets == stream.tokens(1, stream.n_tokens).tolist()
    assert sum(b.weights_BT.sum() for b in taken) == stream.n_targets
    assert {b.tokens_BT.shape for b in taken} == {(batch_size, seq_len)}


def test_the_last_evaluation_batch_is_padded() -> None:
    *_, last = iterate_eval_batches(stream_of([22]), 4, 4, None)
    assert last.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert last.segments_BT[2:].tolist() == last.tokens_BT[2:].tolist() == [[0] * 4] * 2


@pytest.mark.parametrize(("limit", "n_batches"), [(None, 3), (2, 2), (9, 3)])
def test_evaluation_limit(limit: int | None, n_batches: int) -> None:
    taken = list(iterate_eval_batches(stream_of([40]), 4, 4, limit))
    assert len(taken) == n_batches
    assert taken[1].tokens_BT[0].tolist() == [16, 17, 18, 19]


def test_an_empty_stream_has_no_batches() -> None:
    empty = TokenStream((), (), np.array([], np.int64), 0, 0, 0)
    assert list(iterate_eval_batches(empty, 4, 4, None)) == []
