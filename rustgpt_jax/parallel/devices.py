"""The devices of this process: how a batch is shared among them, and how fast they could be."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rustgpt_jax.cache import cache_folder
from rustgpt_jax.config import TrainingConfig
from rustgpt_jax.errors import UserError

# Peak dense bfloat16 FLOP/s of a chip, from its maker's data sheet.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def keep_compiled_programs() -> None:
    """Keep every compiled program in the user's cache folder, so that the next start need not compile it again."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass(frozen=True)
class Placement:
    """The devices of a run: each has a whole copy of the state and an equal share of every batch.

    On one device nothing is moved: it is the default device of the thread.
    """

    devices: tuple[jax.Device | None, ...]

    def check_batch(self, training: TrainingConfig) -> None:
        """Raises UserError if the devices cannot have equal shares of each part of a batch."""
        part, devices = training.batch_size // training.accumulation, len(self.devices)
        if part % devices:
            least = training.accumulation * devices
            nearest = max(1, round(training.batch_size / least)) * least
            raise UserError(
                f"config.training.batch_size={training.batch_size} in {training.accumulation} parts cannot be shared "
                f"equally by {devices} devices; the nearest batch size that can is {nearest}."
            )

    def share(self, tree: Any, batch_axis: int) -> Any:
        """Arrays with their batch axis cut over the devices."""
        return tree if len(self.devices) == 1 else jax.device_put(tree, self._sharding(*[None] * batch_axis, "data"))

    def replicate(self, tree: Any) -> Any:
        """Arrays with a whole copy on each device."""
        return tree if len(self.devices) == 1 else jax.device_put(tree, self._sharding())

    def _sharding(self, *axes: str | None) -> NamedSharding:
        mesh = jax.make_mesh((len(self.devices),), ("data",), axis_types=(AxisType.Auto,), devices=self.devices)
        return NamedSharding(mesh, PartitionSpec(*axes))

    def peak_flops(self) -> float:
        """FLOP/s that the devices could do at best."""
        return device_peak_flops() * len(self.devices)


def all_devices() -> Placement:
    """A run on all devices of this process."""
    return Placement(tuple(jax.devices()))


@cache
def device_peak_flops() -> float:
    """FLOP/s that one device could do at best: from a data sheet, or else of a float32 matrix product timed once."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in kind.lower():
            return peak
    return _timed_matrix_product()


def _timed_matrix_product(size: int = 1024, repeats: int = 3) -> float:
    product = jax.jit(jnp.dot)
    matrix = np.ones((size, size), np.float32)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
