"""The devices of a run, and how its state and its batches lie on them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rustgpt_jax.config.schema import Config, MeshConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.sharding.hardware_specs import device_peak_flops
from rustgpt_jax.sharding.mesh import axis_sizes, make_mesh
from rustgpt_jax.sharding.partition_rules import shardings

# The letters of the arrays of a batch.
BATCH = "BT"


@dataclass(frozen=True)
class ShardingPlan:
    """The mesh of a run. None is one device, the default one of the thread: nothing is moved, nothing is laid out."""

    mesh: Mesh | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes of the mesh; {} for one device."""
        return dict(self.mesh.shape) if self.mesh else {}

    @property
    def n_devices(self) -> int:
        """The devices of the run, those of other processes among them."""
        return self.mesh.size if self.mesh else 1

    def active(self) -> AbstractContextManager[Any]:
        """A `with` block in which compiled functions lay their arrays out on the mesh."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()

    def like(self, tree: Any) -> Any:
        """The shapes and types of a state, with the places where its arrays lie."""
        if self.mesh is None:
            return tree
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            shardings(tree, self.mesh),
        )

    def place(self, state: Any) -> Any:
        """A state, whole in this process or already on the mesh, with its arrays where they belong."""
        if self.mesh is None:
            # Bound to where they are, as those of a checkpoint: the program of a resumed run is that of its start.
            return jax.tree.map(lambda leaf: jax.device_put(leaf, getattr(leaf, "sharding", None)), state)
        return jax.device_put(state, shardings(state, self.mesh))

    def repeated(self, tree: Any) -> Any:
        """Arrays of the host, whole on every device."""
        return jax.device_put(tree, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec()))

    def rows(self, batch_size: int, window: int) -> np.ndarray:
        """The rows of a batch that lie on devices of this process."""
        if self.mesh is None:
            return np.arange(batch_size)
        shape = batch_size, window
        indices = self.batch_sharding(shape).addressable_devices_indices_map(shape).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index is not None]))

    def share(self, batches: Any, batch_size: int) -> Any:
        """Batches with their rows and their tokens cut over the mesh; any axes before these stay whole.

        `batches` has the rows of this process, which are `rows`; `batch_size` is how many all processes have together.
        Those on devices are those of all processes already.
        """
        if self.mesh is None:
            return batches

        def shared(leaf: np.ndarray | jax.Array) -> jax.Array:
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, self.batch_sharding(leaf.shape))
            *lead, _, window = leaf.shape
            here = self.rows(batch_size, window)
            shape = (*lead, batch_size, window)

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                wanted = np.searchsorted(here, np.arange(batch_size)[index[-2]])
                return leaf[..., wanted, index[-1]]

            return jax.make_array_from_callback(shape, self.batch_sharding(shape), part)

        return jax.tree.map(shared, batches)

    def batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array of batches lies on the mesh."""
        assert self.mesh is not None
        lead = (None,) * (len(shape) - len(BATCH))
        cut = partition_spec(BATCH, shape[len(lead) :], self.sizes)
        return NamedSharding(self.mesh, PartitionSpec(*lead, *cut))

    def peak_flops(self) -> float:
        """FLOP/s that the devices could do at best."""
        return device_peak_flops() * self.n_devices


def all_devices(config: MeshConfig) -> ShardingPlan:
    """A run on all devices of all processes. Raises UserError if its mesh does not hold just these."""
    return on_devices(config, jax.devices())


def over_local_devices() -> ShardingPlan:
    """All devices of this process, each with a part of every array: for reading what one could not hold."""
    return on_devices(MeshConfig(data=1, fsdp=-1, expert=1, context=1, tensor=1), jax.local_devices())


def on_devices(config: MeshConfig, devices: Sequence[jax.Device]) -> ShardingPlan:
    """A run on some devices. Raises UserError if its mesh does not hold just these."""
    axis_sizes(config, len(devices))
    return ShardingPlan(make_mesh(config, devices) if len(devices) > 1 else None)


def check_memories(config: Config) -> None:
    """Raises UserError if the devices cannot reach the memory that the config would use."""
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if config.optimizer.offload_state and "pinned_host" not in kinds:
        raise UserError(
            f"config.optimizer.offload_state=True: {device.device_kind} cannot compute from the host's memory."
        )


def check_shares(config: Config, window: int, n_devices: int) -> None:
    """Raises UserError if so many devices cannot form the mesh, or cannot have equal shares of a batch."""
    sizes, training = axis_sizes(config.mesh, n_devices), config.training
    n_shares = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if training.batch_size // training.grad_accum_steps % n_shares:
        least = training.grad_accum_steps * n_shares
        nearest = max(1, round(training.batch_size / least)) * least
        raise UserError(
            f"config.training.batch_size={training.batch_size} in {training.grad_accum_steps} parts cannot be shared "
            f"equally by {n_shares} devices; the nearest batch size that can is {nearest}."
        )
    if window % sizes["context"]:
        raise UserError(f"config.mesh.context={sizes['context']}: windows of {window} tokens cannot be cut so.")
