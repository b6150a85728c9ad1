"""Sources of training batches: a token stream in device memory if it fits, else files.

Both give identical batches, so the choice does not change the results of a run.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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

# Flags of a token: it counts in the loss as a target, and it is the first one of a document.
LOSS_MASK, DOC_START = np.uint8(1), np.uint8(2)


class DeviceTokenStream(NamedTuple):
    """A token stream in device memory. Batches are gathered from it, so that only offsets are transferred.

    Attributes:
        tokens_N: The N tokens in their stored dtype.
        flags_N: The sum of LOSS_MASK and DOC_START, where they apply.
        end_id: The id of the end-of-document token.
    """

    tokens_N: Any
    flags_N: Any  # uint8
    end_id: Any  # int32


def n_bytes(stream: TokenStream) -> int:
    """Return the size of a stream in device memory, in bytes."""
    return stream.n_tokens * (stream.token_shards[0].itemsize + LOSS_MASK.itemsize)


def make_device_stream(stream: TokenStream) -> DeviceTokenStream:
    """Build a `DeviceTokenStream` in host memory. The stream must have fewer than MAX_TOKENS tokens."""
    flags_N = np.where(stream.weights(0, stream.n_tokens), LOSS_MASK, np.uint8(0))
    flags_N[[*stream.offsets, -1]] |= DOC_START
    return DeviceTokenStream(np.concatenate(stream.token_shards), flags_N, np.int32(stream.end_id))


@partial(jax.jit, static_argnames=("seq_len", "sharding"))
def read_sequences(
    stream: DeviceTokenStream, offsets: SequenceOffsets, *, seq_len: int, sharding: Sharding | None = None
) -> Batch:
    """Read the sequences at some offsets, as `pipeline.SequenceReader.read` does.

    Args:
        stream: The token stream.
        offsets: int32 offsets. They may have more axes before B, which the batch then has too.
        seq_len: The length T of a sequence.
        sharding: The sharding of the batch, if any.
    """
    read = partial(_read_sequence, stream, jnp.arange(seq_len + 1))
    for _ in offsets.starts_B.shape:
        read = jax.vmap(read)
    batch = read(offsets.starts_B, offsets.lengths_B)
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def _read_sequence(stream: DeviceTokenStream, within_S: jax.Array, start: jax.Array, length: jax.Array) -> Batch:
    """Read one sequence, without the axis B. S is T + 1."""
    last = stream.tokens_N.shape[0] - 1
    index_S = start + within_S
    # The stream is cyclic: its last token is also its first, so the second one follows.
    index_S = jnp.where(index_S > last, index_S - last, index_S)
    is_read_S = (within_S <= length) & (length > 0)
    tokens_S = jnp.where(is_read_S, stream.tokens_N[index_S].astype(jnp.int32), stream.end_id)
    flags_S = jnp.where(is_read_S, stream.flags_N[index_S], np.uint8(0))

    within_T = within_S[:-1]
    is_valid_T = within_T < length
    # The first document of a sequence is number 1 whether or not it starts there.
    is_start_T = (within_T == 0) | (is_valid_T & (flags_S[:-1] & DOC_START > 0))
    start_T = jax.lax.cummax(jnp.where(is_start_T, within_T, 0))
    return Batch(
        tokens_BT=tokens_S[:-1],
        targets_BT=tokens_S[1:],
        weights_BT=(flags_S[1:] & LOSS_MASK).astype(jnp.float32),
        segments_BT=jnp.cumsum(is_start_T, dtype=jnp.int32) * is_valid_T,
        positions_BT=within_T - start_T,
    )


# A stream on a device takes at most this fraction of the device's memory, and has at most this many tokens, so that
# twice the length fits into int32.
MAX_MEMORY_SHARE = 1 / 32
MAX_TOKENS = 2**30
# The number of streams to keep on the devices for later runs.
CACHED_STREAMS = 4


class FileBatchSource:
    """Batches read from the token store by a background thread, starting at a given step."""

    def __init__(self, data: StageData, plan: ShardingPlan, step: int) -> None:
        rows = plan.local_rows(data.stage.config.training.batch_size, data.seq_len)
        self._batches = data.training_batches(rows).iterate(step)

    def next_batches(self, count: int, pad_to: int) -> Batch:
        """Return the batches of the next `count` steps in host memory, stacked and padded to `pad_to` steps."""
        return Batch(*_stack([next(self._batches) for _ in range(count)], pad_to))

    def close(self) -> None:
        """Stop the thread."""
        self._batches.close()


class DeviceBatchSource:
    """Batches gathered from a token stream in device memory, starting at a given step."""

    def __init__(self, data: StageData, plan: ShardingPlan, step: int, stream: DeviceTokenStream) -> None:
        self._batches, self._step, self._seq_len = data.training_batches(), step, data.seq_len
        self._plan, self._stream = plan, stream

    def next_batches(self, count: int, pad_to: int) -> Batch:
        """Return the batches of the next `count` steps on the devices, stacked and padded to `pad_to` steps."""
        steps = range(self._step, self._step + count)
        offsets = SequenceOffsets(*_stack([self._batches.locate(step) for step in steps], pad_to))
        self._step += count
        offsets = self._plan.replicate(jax.tree.map(np.int32, offsets))
        shape = (*offsets.starts_B.shape, self._seq_len)
        sharding = None if self._plan.mesh is None else self._plan.batch_sharding(shape)
        return read_sequences(self._stream, offsets, seq_len=self._seq_len, sharding=sharding)

    def close(self) -> None:
        """Do nothing: other runs may use the stream."""


BatchSource = FileBatchSource | DeviceBatchSource


def make_batch_source(data: StageData, plan: ShardingPlan, step: int) -> BatchSource:
    """Return a batch source for one stage that yields this process's rows, starting at a given step."""
    stream = data.store.split("train")
    device = default_device() if plan.mesh is None else plan.mesh.local_devices[0]
    fits = n_bytes(stream) <= MAX_MEMORY_SHARE * free_device_memory(device) and stream.n_tokens < MAX_TOKENS
    if fits and jax.process_count() == 1:
        return DeviceBatchSource(data, plan, step, _load_device_stream(data.store.path, plan, device))
    return FileBatchSource(data, plan, step)


@lru_cache(CACHED_STREAMS)
def _load_device_stream(store: Path, plan: ShardingPlan, device: jax.Device) -> DeviceTokenStream:
    """Load the training stream of a store, whose files never change, to the devices."""
    # Only part of the cache key, because a plan for one device does not name the device.
    del device
    return plan.replicate(make_device_stream(open_store(store).split("train")))


def _stack(parts: list[tuple[np.ndarray, ...]], pad_to: int) -> list[np.ndarray]:
    """Stack arrays by step, and repeat those of the last step, which are never used, up to `pad_to` steps."""
    parts = parts + [parts[-1]] * (pad_to - len(parts))
    return [np.stack(leaves) for leaves in zip(*parts, strict=True)]
