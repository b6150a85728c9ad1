"""Where the batches of a run come from: a token stream in the memory of its devices, if it fits, or files.

Both give the same numbers to the same program, so which of them it is changes no bit of a run.
"""

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from rustgpt_jax.data.pipeline import Batch, Places
from rustgpt_jax.data.preprocess import StageData
from rustgpt_jax.data.token_store import open_store
from rustgpt_jax.model.kernels.types import default_device
from rustgpt_jax.sharding.host_resources import device_memory
from rustgpt_jax.sharding.sharding_plan import Placement
from rustgpt_jax.training.device_dataset import ResidentStream, n_bytes, read_windows, resident

# A stream fits that takes no more of the free memory of a device, and whose places are int32 twice around it. So many
# streams stay there for later runs.
SHARE = 1 / 32
MOST_TOKENS = 2**30
KEPT = 4


class Source(Protocol):
    """The batches of a stage of a run, from some step on."""

    def take(self, count: int, slots: int) -> Batch:
        """Those of the next `count` steps, stacked to `slots`; no step reads what fills these up."""

    def close(self) -> None:
        """There is nothing more to take."""


def source(data: StageData, placement: Placement, step: int) -> Source:
    """The batches of a stage from a step on: those rows of each that lie on devices of this process."""
    stream = data.store.split("train")
    device = default_device() if placement.mesh is None else placement.mesh.local_devices[0]
    fits = n_bytes(stream) <= SHARE * device_memory(device) and stream.n_tokens < MOST_TOKENS
    # Each of several processes reads its own rows.
    if fits and jax.process_count() == 1:
        return FromDevices(data, placement, step, _kept(data.store.path, placement, device))
    return FromFiles(data, placement, step)


class FromFiles:
    """Batches read from the token store, ahead of their steps, by a thread."""

    def __init__(self, data: StageData, placement: Placement, step: int) -> None:
        rows = placement.rows(data.stage.config.training.batch_size, data.window)
        self._batches = data.training_batches(rows).iterate(step)

    def take(self, count: int, slots: int) -> Batch:
        """As `Source.take`, in the memory of the host."""
        return Batch(*_stacked([next(self._batches) for _ in range(count)], slots))

    def close(self) -> None:
        """End the thread."""
        self._batches.close()


class FromDevices:
    """Batches read from a stream in the memory of the devices, which are sent where the windows are."""

    def __init__(self, data: StageData, placement: Placement, step: int, stream: ResidentStream) -> None:
        self._batches, self._step, self._window = data.training_batches(), step, data.window
        self._placement, self._stream = placement, stream

    def take(self, count: int, slots: int) -> Batch:
        """As `Source.take`, on the devices."""
        steps = range(self._step, self._step + count)
        places = Places(*_stacked([self._batches.places(step) for step in steps], slots))
        self._step += count
        sent = self._placement.repeated(jax.tree.map(np.int32, places))
        shape = (*places.starts_B.shape, self._window)
        sharding = None if self._placement.mesh is None else self._placement.batch_sharding(shape)
        return read_windows(self._stream, sent, window=self._window, sharding=sharding)

    def close(self) -> None:
        """Others may still read from the stream."""


@lru_cache(KEPT)
def _kept(store: Path, placement: Placement, device: jax.Device) -> ResidentStream:
    """The training stream of a store, on devices. What lies in the folder of a store never changes.

    `device` tells placements on one device apart, which is that of the thread.
    """
    del device
    return placement.repeated(resident(open_store(store).split("train")))


def _stacked(parts: list[tuple[np.ndarray, ...]], slots: int) -> list[np.ndarray]:
    parts = parts + [parts[-1]] * (slots - len(parts))
    return [np.stack(leaves) for leaves in zip(*parts, strict=True)]
