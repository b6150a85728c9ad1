"""Batches of a run: read from a token stream in device memory if it fits, else from files.

Both sources produce identical batches, so the choice does not change the results of a run.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rustgpt_jax.data.pipeline import Batch, SequenceOffsets
from rustgpt_jax.data.preprocess import StageData
from rustgpt_jax.data.token_store import TokenStream, open_store
from rustgpt_jax.model.kernels import default_device
from rustgpt_jax.sharding.hardware_specs import free_device_memory
from rustgpt_jax.sharding.sharding_plan import ShardingPlan

# Marks of a token: it is a target with loss; a document begins there.
LOSS_MASK, DOC_START = np.uint8(1), np.uint8(2)


class DeviceTokenStream(NamedTuple):
    """A token stream in device memory. Batches are gathered from it, so that only window offsets are transferred.

    Attributes:
        tokens_N: The N tokens in their stored dtype.
        marks_N: LOSS_MASK if the token is a target with loss, plus DOC_START if a document begins there.
        end_id: The id of the end-of-document token.
    """

    tokens_N: Any
    marks_N: Any  # uint8
    end_id: Any  # int32


def n_bytes(stream: TokenStream) -> int:
    """Return the number of bytes that a stream takes in device memory."""
    return stream.n_tokens * (stream.token_shards[0].itemsize + LOSS_MASK.itemsize)


def make_device_stream(stream: TokenStream) -> DeviceTokenStream:
    """Build the device form of a stream, in host memory. It must have fewer than MAX_TOKENS tokens."""
    marks_N = np.where(stream.weights(0, stream.n_tokens), LOSS_MASK, np.uint8(0))
    marks_N[[*stream.offsets, -1]] |= DOC_START
    return DeviceTokenStream(np.concatenate(stream.token_shards), marks_N, np.int32(stream.end_id))


@partial(jax.jit, static_argnames=("window", "sharding"))
def read_sequences(
    stream: DeviceTokenStream, places: SequenceOffsets, *, window: int, sharding: Sharding | None = None
) -> Batch:
    """Read the windows at some offsets, as `pipeline.SequenceReader.read` does.

    Args:
        stream: The token stream.
        places: int32 offsets, with any number of axes before B, which the batch has too.
        window: The number of tokens T of a window.
        sharding: The sharding of the batch, if any.
    """
    read = partial(_read_sequence, stream, jnp.arange(window + 1))
    for _ in places.starts_B.shape:
        read = jax.vmap(read)
    batch = read(places.starts_B, places.lengths_B)
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def _read_sequence(stream: DeviceTokenStream, within_S: jax.Array, start: jax.Array, real: jax.Array) -> Batch:
    """Read one window, without the axis of rows."""
    last = stream.tokens_N.shape[0] - 1
    around_S = start + within_S
    # The last token of the stream is also its first, so its second token follows.
    around_S = jnp.where(around_S > last, around_S - last, around_S)
    is_read_S = (within_S <= real) & (real > 0)
    tokens_S = jnp.where(is_read_S, stream.tokens_N[around_S].astype(jnp.int32), stream.end_id)
    marks_S = jnp.where(is_read_S, stream.marks_N[around_S], np.uint8(0))

    within_T = within_S[:-1]
    is_real_T = within_T < real
    # The first document of a window is number 1 whether or not it begins there.
    is_start_T = (within_T == 0) | (is_real_T & (marks_S[:-1] & DOC_START > 0))
    began_T = jax.lax.cummax(jnp.where(is_start_T, within_T, 0))
    return Batch(
        tokens_BT=tokens_S[:-1],
        targets_BT=tokens_S[1:],
        weights_BT=(marks_S[1:] & LOSS_MASK).astype(jnp.float32),
        segments_BT=jnp.cumsum(is_start_T, dtype=jnp.int32) * is_real_T,
        positions_BT=within_T - began_T,
    )


# Maximum share of device memory and number of tokens (so that twice the length fits int32) of a stream on the device,
# and the number of streams to keep there for later runs.
MAX_MEMORY_SHARE = 1 / 32
MAX_TOKENS = 2**30
CACHED_STREAMS = 4


class BatchSource(Protocol):
    """The batches of a stage of a run, from one step on."""

    def take(self, count: int, slots: int) -> Batch:
        """Return the batches of the next `count` steps, stacked and padded to `slots`; the padding is never used."""

    def close(self) -> None:
        """Release resources."""


def make_batch_source(data: StageData, placement: ShardingPlan, step: int) -> BatchSource:
    """Return the source of the batches of a stage from a step on, with the rows of this process."""
    stream = data.store.split("train")
    device = default_device() if placement.mesh is None else placement.mesh.local_devices[0]
    fits = n_bytes(stream) <= MAX_MEMORY_SHARE * free_device_memory(device) and stream.n_tokens < MAX_TOKENS
    # With several processes, each reads its own rows from files.
    if fits and jax.process_count() == 1:
        return DeviceBatchSource(data, placement, step, _cached_stream(data.store.path, placement, device))
    return FileBatchSource(data, placement, step)


class FileBatchSource:
    """Batches read from the token store by a background thread."""

    def __init__(self, data: StageData, placement: ShardingPlan, step: int) -> None:
        rows = placement.local_rows(data.stage.config.training.batch_size, data.seq_len)
        self._batches = data.training_batches(rows).iterate(step)

    def take(self, count: int, slots: int) -> Batch:
        """As `BatchSource.take`, in host memory."""
        return Batch(*_stacked([next(self._batches) for _ in range(count)], slots))

    def close(self) -> None:
        """Stop the thread."""
        self._batches.close()


class DeviceBatchSource:
    """Batches gathered on the devices from a token stream there."""

    def __init__(self, data: StageData, placement: ShardingPlan, step: int, stream: DeviceTokenStream) -> None:
        self._batches, self._step, self._window = data.training_batches(), step, data.seq_len
        self._placement, self._stream = placement, stream

    def take(self, count: int, slots: int) -> Batch:
        """As `BatchSource.take`, on the devices."""
        steps = range(self._step, self._step + count)
        places = SequenceOffsets(*_stacked([self._batches.locate(step) for step in steps], slots))
        self._step += count
        sent = self._placement.replicate(jax.tree.map(np.int32, places))
        shape = (*places.starts_B.shape, self._window)
        sharding = None if self._placement.mesh is None else self._placement.batch_sharding(shape)
        return read_sequences(self._stream, sent, window=self._window, sharding=sharding)

    def close(self) -> None:
        """Do nothing: the stream may be used by other runs."""


@lru_cache(CACHED_STREAMS)
def _cached_stream(store: Path, placement: ShardingPlan, device: jax.Device) -> DeviceTokenStream:
    """Return the training stream of a store on the devices; the files of a store never change.

    `device` is part of the cache key: plans for one device do not name it.
    """
    del device
    return placement.replicate(make_device_stream(open_store(store).split("train")))


def _stacked(parts: list[tuple[np.ndarray, ...]], slots: int) -> list[np.ndarray]:
    parts = parts + [parts[-1]] * (slots - len(parts))
    return [np.stack(leaves) for leaves in zip(*parts, strict=True)]
