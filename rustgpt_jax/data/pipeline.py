"""From a token stream to batches. The batch of a step is a pure function of (stream, window, batch size, seed, step).

A window is T inputs and the T tokens that follow them one place later. Windows lie end to end, so in an epoch every
token but the first END is a target exactly once; each epoch takes them in a new order, and a batch may reach over the
border of two epochs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from rustgpt_jax.data.stream import TokenStream


class Batch(NamedTuple):
    """B windows of T tokens. A window alone has no axis B.

    weights: 1 where the target is to be learned, else 0. segments: 1 for the window's first document, 2 for the next,
    0 for padding. positions: places from the start of the document, or of the window where it began before.
    """

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32
    weights_BT: np.ndarray  # float32
    segments_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32


class Windows:
    """The windows of a stream, by random access. The last one is filled up with END of weight 0."""

    def __init__(self, stream: TokenStream, window: int) -> None:
        self.stream, self.window = stream, window
        self._n_tokens = stream.n_tokens

    def __len__(self) -> int:
        return max(0, -(-(self._n_tokens - 1) // self.window))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"Window {index} of {len(self)}.")
        return Batch(*(field[0] for field in self.gather(np.array([index]))))

    def gather(self, indices_B: np.ndarray) -> Batch:
        """The windows of these indices as one batch. An index of `len(self)` or more gives a window of padding."""
        starts_B = np.asarray(indices_B, np.int64) * self.window
        within_T = np.arange(self.window, dtype=np.int32)
        is_real_BT = starts_B[:, None] + within_T < self._n_tokens - 1
        weights_BT = is_real_BT.astype(np.float32)
        if self.stream.weight_shards:
            weights_BT *= self._spans(self.stream.weights, starts_B, 0)[:, 1:]
        tokens_BS = self._spans(self.stream.tokens, starts_B, self.stream.end_id)
        is_start_BT = self._document_starts(starts_B)
        # The first document of a window is number 1 whether or not it begins there.
        is_start_BT[:, 0] = True
        segments_BT = np.cumsum(is_start_BT, axis=1, dtype=np.int32) * is_real_BT
        positions_BT = within_T - np.maximum.accumulate(np.where(is_start_BT, within_T, 0), axis=1)
        return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], weights_BT, segments_BT, positions_BT)

    def _spans(self, read: Callable[[int, int], np.ndarray], starts_B: np.ndarray, filler: int) -> np.ndarray:
        """What `read` gives for the window's inputs and last target, `filler` past the end (int32, B x T+1)."""
        values_BS = np.full((len(starts_B), self.window + 1), filler, np.int32)
        for row, start in enumerate(starts_B.tolist()):
            values = read(start, start + self.window + 1)
            values_BS[row, : len(values)] = values
        return values_BS

    def _document_starts(self, starts_B: np.ndarray) -> np.ndarray:
        """Whether a document begins at each place of the windows (bool, B x T)."""
        offsets = self.stream.offsets
        first_B, last_B = np.searchsorted(offsets, starts_B), np.searchsorted(offsets, starts_B + self.window)
        is_start_BT = np.zeros((len(starts_B), self.window), bool)
        for row, (first, last) in enumerate(zip(first_B.tolist(), last_B.tolist(), strict=True)):
            is_start_BT[row, offsets[first:last] - starts_B[row]] = True
        return is_start_BT


class Batches:
    """The training batches of a run. Made by `batches`."""

    def __init__(self, windows: Windows, batch_size: int, seed: int, first_step: int) -> None:
        self._first_step = first_step
        order = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()
        self._dataset = order.batch(batch_size).map(windows.gather)

    def batch(self, step: int) -> Batch:
        """The batch of a step of the run. Raises IndexError before the first step."""
        return self._dataset[self._place(step)]

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The batches of `first_step` and all after it, read ahead by a thread that ends with the iterator."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        reader = iter(self._dataset[self._place(first_step) :].to_iter_dataset(options))
        try:
            yield from reader
        finally:
            reader.close()

    def _place(self, step: int) -> int:
        if step < self._first_step:
            raise IndexError(f"Step {step} comes before the first step of this data, {self._first_step}.")
        return step - self._first_step


def batches(stream: TokenStream, window: int, batch_size: int, seed: int, first_step: int = 0) -> Batches:
    """The batches of a run whose data begin at `first_step`: B = batch_size, T = window, an order for each epoch.

    The stream must have at least two tokens. `seed` is from 0 to 2**32 - 1.
    """
    return Batches(Windows(stream, window), batch_size, seed, first_step)


def evaluation_batches(stream: TokenStream, window: int, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """All windows in order, or the first `limit` batches of them. Rows of weight 0 fill up the last batch."""
    windows = Windows(stream, window)
    n_batches = -(-len(windows) // batch_size)
    for index in range(n_batches if limit is None else min(limit, n_batches)):
        yield windows.gather(np.arange(index * batch_size, (index + 1) * batch_size))
