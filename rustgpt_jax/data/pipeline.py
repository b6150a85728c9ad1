"""Batches from a token stream.

The batch of a step is a pure function of (stream, seq_len, batch size, seed, step).

A sequence consists of T input tokens and their T targets, shifted by one position. The stream is circular: its last
token equals its first. In each epoch, contiguous sequences start at a random offset, so that every token but the first
is a target exactly once, and documents that are split by a boundary in one epoch are whole in others. Each epoch has
its own random order, and a batch may span two epochs.
"""

from collections.abc import Callable, Generator, Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# A training step imports this module for `Batch`, and needs neither token stores nor tokenizers.
if TYPE_CHECKING:
    from rustgpt_jax.data.token_store import TokenStream

MAX_STEPS = 2**62
# Up to this number of sequences, the order of an epoch is a permutation in memory. For few elements, grain's shuffle,
# which needs no memory, is slow: 1.6 ms per element for 10 elements.
MAX_PERMUTED = 2**16


class Batch(NamedTuple):
    """B sequences of T tokens, as NumPy arrays, or JAX arrays once on a device.

    Attributes:
        tokens_BT: Input tokens (int32).
        targets_BT: The next token at each position (int32).
        weights_BT: 1 where the target contributes to the loss, else 0 (float32).
        segments_BT: 1 for the first document of a sequence, 2 for the second etc.; 0 for padding (int32).
        positions_BT: Position in the document, or in the sequence if the document began before it (int32).
    """

    tokens_BT: Any
    targets_BT: Any
    weights_BT: Any
    segments_BT: Any
    positions_BT: Any


class SequenceOffsets(NamedTuple):
    """The positions of B sequences in a stream, and the number of tokens in each, without padding."""

    starts_B: Any
    lengths_B: Any


class SequenceReader:
    """Random access to the sequences of a stream. The last one is filled with padding of weight 0."""

    def __init__(self, stream: "TokenStream", seq_len: int) -> None:
        self.stream, self.seq_len = stream, seq_len
        # The length of the circular stream, without the copy of its first token.
        self.cycle_length = max(0, stream.n_tokens - 1)
        self._document_starts_of_two_cycles = np.concatenate([stream.offsets, stream.offsets + self.cycle_length])

    def __len__(self) -> int:
        return -(-self.cycle_length // self.seq_len)

    def locate(self, indices_B: np.ndarray, rotations_B: np.ndarray) -> SequenceOffsets:
        """Return the positions of sequences, each in the stream rotated to begin at the token of its rotation.

        An index of `len(self)` or more gives a sequence of padding.
        """
        offsets_B = np.asarray(indices_B, np.int64) * self.seq_len
        lengths_B = np.clip(self.cycle_length - offsets_B, 0, self.seq_len)
        return SequenceOffsets((offsets_B + rotations_B) % self.cycle_length, lengths_B)

    def read(self, offsets: SequenceOffsets) -> Batch:
        """Read sequences. `batch_source.read_sequences` is the equivalent on a device."""
        starts_B, lengths_B = offsets
        tokens_BS, weights_BS = self._read(starts_B, lengths_B)
        indices_T = np.arange(self.seq_len, dtype=np.int32)
        is_real_BT = indices_T < lengths_B[:, None]
        is_start_BT = self._find_document_starts(starts_B) & is_real_BT
        # The first document of a sequence is number 1 whether or not it begins there.
        is_start_BT[:, 0] = True
        segments_BT = np.cumsum(is_start_BT, axis=1, dtype=np.int32) * is_real_BT
        positions_BT = indices_T - np.maximum.accumulate(np.where(is_start_BT, indices_T, 0), axis=1)
        return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], weights_BS[:, 1:], segments_BT, positions_BT)

    def _read(self, starts_B: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(starts_B), self.seq_len + 1)
        tokens_BS, weights_BS = np.full(shape, self.stream.end_id, np.int32), np.zeros(shape, np.float32)
        for row, (start, length) in enumerate(zip(starts_B.tolist(), lengths_B.tolist(), strict=True)):
            if length:
                stop = start + length + 1
                tokens_BS[row, : length + 1] = self._read_cyclic(self.stream.tokens, start, stop)
                weights_BS[row, : length + 1] = self._read_cyclic(self.stream.weights, start, stop)
        return tokens_BS, weights_BS

    def _read_cyclic(self, read: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """Return a slice of the circular stream; its last token is also its first, so the second token follows."""
        beyond = stop - self.stream.n_tokens
        return read(start, stop) if beyond <= 0 else np.concatenate([read(start, stop), read(1, 1 + beyond)])

    def _find_document_starts(self, starts_B: np.ndarray) -> np.ndarray:
        """Return whether a document begins at each token of the sequences (bool, B x T)."""
        found = self._document_starts_of_two_cycles
        first_B, last_B = np.searchsorted(found, starts_B), np.searchsorted(found, starts_B + self.seq_len)
        is_start_BT = np.zeros((len(starts_B), self.seq_len), bool)
        for row, (first, last) in enumerate(zip(first_B.tolist(), last_B.tolist(), strict=True)):
            is_start_BT[row, found[first:last] - starts_B[row]] = True
        return is_start_BT


class Batches:
    """The training batches of a run whose data begin at `first_step`, shuffled in each epoch.

    Args:
        stream: The token stream, of at least two tokens.
        seq_len: The number of tokens T of a sequence.
        batch_size: The number of sequences B of a batch.
        seed: An integer from 0 to 2**32 - 1.
        first_step: The first step of the run that reads these data.
        rows: The rows of each batch to read; None for all.
    """

    def __init__(
        self,
        stream: "TokenStream",
        seq_len: int,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        rows: np.ndarray | None = None,
    ) -> None:
        self._reader = SequenceReader(stream, seq_len)
        self._batch_size, self._seed, self._first_step = batch_size, seed, first_step
        self._rows = np.arange(batch_size) if rows is None else rows

    def locate(self, step: int) -> SequenceOffsets:
        """Return the positions of a step's sequences. Raises IndexError before the first step."""
        if step < self._first_step:
            raise IndexError(f"Step {step} comes before the first step of this data, {self._first_step}.")
        numbers_B = (step - self._first_step) * self._batch_size + self._rows
        epochs_B = numbers_B // len(self._reader)
        rotations_B = [_epoch_rotation(self._seed, epoch, self._reader.cycle_length) for epoch in epochs_B.tolist()]
        return self._reader.locate(self._shuffle(numbers_B, epochs_B), np.array(rotations_B))

    def batch(self, step: int) -> Batch:
        """Return the batch of a step. Raises IndexError before the first step."""
        return self._reader.read(self.locate(step))

    def iterate(self, first_step: int) -> Generator[Batch, None, None]:
        """Iterate over the batches from a step on, prefetched by a thread that ends with the iterator."""
        # Imported where it is used: most runs read their batches from device memory.
        import grain

        self.locate(first_step)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        steps = grain.MapDataset.range(first_step, first_step + MAX_STEPS)
        iterator = iter(steps.map(self.batch).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    @cached_property
    def _shuffled(self) -> Any:
        import grain

        return grain.MapDataset.range(len(self._reader)).seed(self._seed).shuffle()

    def _shuffle(self, numbers_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """Return the indices of sequences, given their positions in the concatenated epoch orders."""
        length = len(self._reader)
        if length > MAX_PERMUTED:
            return np.array([self._shuffled[number] for number in numbers_B.tolist()])
        orders = [_epoch_order(self._seed, epoch, length) for epoch in epochs_B.tolist()]
        return np.array([order[index] for order, index in zip(orders, (numbers_B % length).tolist(), strict=True)])


# A batch may span two epochs, and each run of a population has its own seed.
@lru_cache(1024)
def _epoch_rotation(seed: int, epoch: int, cycle_length: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(cycle_length))


@lru_cache(16)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, length)).permutation(length)


def iterate_eval_batches(
    stream: "TokenStream", seq_len: int, batch_size: int, limit: int | None, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Iterate over all sequences in order, or the first `limit` batches. Rows of weight 0 fill the last batch.

    `rows` as in `Batches`.
    """
    reader, rows = SequenceReader(stream, seq_len), np.arange(batch_size) if rows is None else rows
    for index in range(count_eval_batches(stream, seq_len, batch_size, limit)):
        yield reader.read(reader.locate(index * batch_size + rows, np.zeros(len(rows), np.int64)))


def count_eval_batches(stream: "TokenStream", seq_len: int, batch_size: int, limit: int | None) -> int:
    """Return the number of batches of `iterate_eval_batches`."""
    n_batches = -(-len(SequenceReader(stream, seq_len)) // batch_size)
    return n_batches if limit is None else min(limit, n_batches)
