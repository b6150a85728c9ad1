"""Batches from a token stream.

The batch of a step is a pure function of (stream, window, batch size, seed, step).

A window consists of T input tokens and their T targets, shifted by one position. The stream is circular: its last token
equals its first. In each epoch, contiguous windows start at a random offset, so that every token but the first is a
target exactly once, and documents that are split by a window border in one epoch are whole in others. Each epoch has
its own random order, and a batch may span two epochs.
"""

from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import grain
import numpy as np

from rustgpt_jax.data.token_store import TokenStream

# More than any run makes.
MOST_STEPS = 2**62
# So many windows have their order in memory. grain's shuffle, which needs none, searches each of few windows for long:
# of 10 for 1.6 ms.
MOST_PERMUTED = 2**16


class Batch(NamedTuple):
    """B windows of T tokens, as NumPy arrays, or JAX arrays once on a device.

    weights: 1 where the target is to be learned, else 0. segments: 1 for the window's first document, 2 for the next,
    0 for padding. positions: places from the start of the document, or of the window where it began before.
    """

    tokens_BT: Any  # int32
    targets_BT: Any  # int32
    weights_BT: Any  # float32
    segments_BT: Any  # int32
    positions_BT: Any  # int32


class SequenceOffsets(NamedTuple):
    """Where B windows are read: where in the stream each begins, and how many of its T tokens are no padding."""

    starts_B: Any
    real_B: Any


class SequenceReader:
    """The windows of a stream, by random access. The last one is filled up with padding of weight 0."""

    def __init__(self, stream: TokenStream, window: int) -> None:
        self.stream, self.window = stream, window
        self.circle = max(0, stream.n_tokens - 1)
        self._starts_twice_around = np.concatenate([stream.offsets, stream.offsets + self.circle])

    def __len__(self) -> int:
        return -(-self.circle // self.window)

    def places(self, indices_B: np.ndarray, turns_B: np.ndarray) -> SequenceOffsets:
        """Where the windows of these indices are, each with the circle turned so that window 0 begins at its turn.

        An index of `len(self)` or more gives a window of padding.
        """
        offsets_B = np.asarray(indices_B, np.int64) * self.window
        return SequenceOffsets((offsets_B + turns_B) % self.circle, np.clip(self.circle - offsets_B, 0, self.window))

    def read(self, places: SequenceOffsets) -> Batch:
        """The windows at these places as one batch. `resident.read_windows` reads the same on a device."""
        starts_B, real_B = places
        tokens_BS, weights_BS = self._read(starts_B, real_B)
        within_T = np.arange(self.window, dtype=np.int32)
        is_real_BT = within_T < real_B[:, None]
        is_start_BT = self._document_starts(starts_B) & is_real_BT
        # The first document of a window is number 1 whether or not it begins there.
        is_start_BT[:, 0] = True
        segments_BT = np.cumsum(is_start_BT, axis=1, dtype=np.int32) * is_real_BT
        positions_BT = within_T - np.maximum.accumulate(np.where(is_start_BT, within_T, 0), axis=1)
        return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], weights_BS[:, 1:], segments_BT, positions_BT)

    def _read(self, starts_B: np.ndarray, real_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(starts_B), self.window + 1)
        tokens_BS, weights_BS = np.full(shape, self.stream.end_id, np.int32), np.zeros(shape, np.float32)
        for row, (start, real) in enumerate(zip(starts_B.tolist(), real_B.tolist(), strict=True)):
            if real:
                stop = start + real + 1
                tokens_BS[row, : real + 1] = self._around(self.stream.tokens, start, stop)
                weights_BS[row, : real + 1] = self._around(self.stream.weights, start, stop)
        return tokens_BS, weights_BS

    def _around(self, read: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """Return a slice of the circular stream; its last token is also its first, so the second token follows."""
        beyond = stop - self.stream.n_tokens
        return read(start, stop) if beyond <= 0 else np.concatenate([read(start, stop), read(1, 1 + beyond)])

    def _document_starts(self, starts_B: np.ndarray) -> np.ndarray:
        """Whether a document begins at each place of the windows (bool, B x T)."""
        places = self._starts_twice_around
        first_B, last_B = np.searchsorted(places, starts_B), np.searchsorted(places, starts_B + self.window)
        is_start_BT = np.zeros((len(starts_B), self.window), bool)
        for row, (first, last) in enumerate(zip(first_B.tolist(), last_B.tolist(), strict=True)):
            is_start_BT[row, places[first:last] - starts_B[row]] = True
        return is_start_BT


class Batches:
    """The training batches of a run. Made by `batches`."""

    def __init__(self, windows: SequenceReader, batch_size: int, seed: int, first_step: int, rows: np.ndarray) -> None:
        self._windows, self._batch_size, self._seed, self._first_step = windows, batch_size, seed, first_step
        self._rows = rows
        self._shuffled = grain.MapDataset.range(len(windows)).seed(seed).shuffle()

    def places(self, step: int) -> SequenceOffsets:
        """Where the windows of the batch of a step are. Raises IndexError before the first step."""
        if step < self._first_step:
            raise IndexError(f"Step {step} comes before the first step of this data, {self._first_step}.")
        numbers_B = (step - self._first_step) * self._batch_size + self._rows
        epochs_B = numbers_B // len(self._windows)
        turns_B = [_turn(self._seed, epoch, self._windows.circle) for epoch in epochs_B.tolist()]
        return self._windows.places(self._indices(numbers_B, epochs_B), np.array(turns_B))

    def batch(self, step: int) -> Batch:
        """The batch of a step of the run. Raises IndexError before the first step."""
        return self._windows.read(self.places(step))

    def iterate(self, first_step: int) -> Generator[Batch, None, None]:
        """The batches of `first_step` and all after it, read ahead by a thread that ends with the iterator."""
        self.places(first_step)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        steps = grain.MapDataset.range(first_step, first_step + MOST_STEPS)
        reader = iter(steps.map(self.batch).to_iter_dataset(options))
        try:
            yield from reader
        finally:
            reader.close()

    def _indices(self, numbers_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """The windows that come in these places of the orders of all epochs, one after another."""
        length = len(self._windows)
        if length > MOST_PERMUTED:
            return np.array([self._shuffled[number] for number in numbers_B.tolist()])
        orders = [_order(self._seed, epoch, length) for epoch in epochs_B.tolist()]
        return np.array([order[at] for order, at in zip(orders, (numbers_B % length).tolist(), strict=True)])


# A batch may span two epochs, and each lane of a program has its own seed.
@lru_cache(1024)
def _turn(seed: int, epoch: int, circle: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(circle))


@lru_cache(16)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, length)).permutation(length)


def batches(
    stream: TokenStream,
    window: int,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    rows: np.ndarray | None = None,
) -> Batches:
    """The batches of a run whose data begin at `first_step`: B = batch_size, T = window, an order for each epoch.

    The stream must have at least two tokens. `seed` is from 0 to 2**32 - 1. `rows` are the rows of each batch that are
    wanted: the others are not read. None: all.
    """
    return Batches(SequenceReader(stream, window), batch_size, seed, first_step, _chosen(rows, batch_size))


def eval_batches(
    stream: TokenStream, window: int, batch_size: int, limit: int | None, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """All windows in order, or the first `limit` batches of them. Rows of weight 0 fill up the last batch.

    `rows` as in `batches`.
    """
    windows, rows = SequenceReader(stream, window), _chosen(rows, batch_size)
    for index in range(n_eval_batches(stream, window, batch_size, limit)):
        yield windows.read(windows.places(index * batch_size + rows, np.zeros(len(rows), np.int64)))


def n_eval_batches(stream: TokenStream, window: int, batch_size: int, limit: int | None) -> int:
    """Return the number of batches that `eval_batches` yields."""
    n_batches = -(-len(SequenceReader(stream, window)) // batch_size)
    return n_batches if limit is None else min(limit, n_batches)


def _chosen(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    return np.arange(batch_size) if rows is None else rows
