"""The mesh of a run's devices, and how its parameters, its state and its batches are sharded over it."""

import dataclasses
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rustgpt_jax.config.schema import Config, MeshConfig
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.pytrees import format_path
from rustgpt_jax.sharding.hardware_specs import device_peak_flops

# Partition rules: one ordered table of regular expressions on paths, which determines how parameters are sharded.
#
# The path of an optimizer state ends with the path of its parameter, so it is sharded like the parameter.

Axes = tuple[str | None, ...]

# (expression, mesh axes of the last array axes); the first match applies. Leading array axes, such as the axis of
# stacked layers, are not sharded. fsdp shards the contracted axis, or else the output axis; tensor shards heads, hidden
# channels and the vocabulary.
RULES: tuple[tuple[str, Axes], ...] = (
    (r"embedding/table$", ("tensor", "fsdp")),
    (r"positions/table$", (None, "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"feedforward/(gate|up)$", ("expert", "fsdp", "tensor")),
    (r"feedforward/down$", ("expert", "tensor", "fsdp")),
    (r"(router|(forget|write|latent|shared_key)/kernel)$", ("fsdp", None)),
    (r"(query|key|value|gate|up|input)/kernel$", ("fsdp", "tensor")),
    (r"(output|down)/kernel$", ("tensor", "fsdp")),
    # Convolutions and decays are per channel.
    (r"convolution/(kernel|bias)$|mixer/(decay_rate|decay_bias|sinks)$", ("tensor",)),
    (r"(query|key|value|gate|up|input)/bias$", ("tensor",)),
    (r"(norm/(scale|bias)|(output|down|latent|shared_key|write)/bias)$", (None,)),
)


class PartitionMatch(NamedTuple):
    """The index of the rule that matches an array, or None, and the partition spec of the array."""

    rule: int | None
    spec: PartitionSpec


def partition_spec_for(path: str, shape: tuple[int, ...], mesh: dict[str, int]) -> PartitionMatch:
    """Return the rule and partition spec of an array.

    A mesh axis that does not divide its array axis is dropped. An array without a rule, such as a parameter of a custom
    layer, is sharded over fsdp along the longest axis that fsdp divides.

    Args:
        path: The path of the array in its tree.
        shape: The shape of the array.
        mesh: The sizes of the mesh axes.
    """
    if not shape:
        return PartitionMatch(None, PartitionSpec())
    for index, (expression, axes) in enumerate(RULES):
        if re.search(expression, path):
            lead: Axes = (None,) * (len(shape) - len(axes))
            return PartitionMatch(index, _divisible((*lead, *axes), shape, mesh))
    by_length = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    longest = next((axis for axis in by_length if shape[axis] % mesh.get("fsdp", 1) == 0), None)
    unknown: Axes = tuple("fsdp" if axis == longest and len(shape) > 1 else None for axis in range(len(shape)))
    return PartitionMatch(None, _divisible(unknown, shape, mesh))


def _divisible(axes: Axes, shape: tuple[int, ...], mesh: dict[str, int]) -> PartitionSpec:
    def is_sharded(axis: str | None, length: int) -> bool:
        return axis is not None and mesh.get(axis, 1) > 1 and length % mesh[axis] == 0

    return PartitionSpec(
        *(axis if is_sharded(axis, length) else None for axis, length in zip(axes, shape, strict=True))
    )


def infer_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the shardings of the arrays or shapes of a tree, such as parameters or a train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, partition_spec_for(format_path(path), leaf.shape, dict(mesh.shape)).spec
        ),
        tree,
    )


def constrain(tree: Any) -> Any:
    """Constrain parameters, gradients or a state to the sharding of the rules, on the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, infer_shardings(tree, mesh))


# Outermost to innermost: neighboring devices, which communicate most, differ in the last axis.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# The axes of the arrays of a batch, in the notation of `partition_spec`.
BATCH_AXES = "BT"


def axis_sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """Return the size of each mesh axis.

    Raises:
        UserError: The axes do not match the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    zero = next((axis for axis, size in sizes.items() if size == 0), None)
    if zero:
        raise UserError(f"config.mesh.{zero}=0: an axis has 1 device or more; -1 takes all remaining devices.")
    flexible = [axis for axis, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size > 0)
    if len(flexible) > 1:
        raise UserError(f"config.mesh: only one axis may be -1, not both {flexible[0]} and {flexible[1]}.")
    described = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "data 1"
    if n_devices % product or (not flexible and n_devices != product):
        remedy = (
            f"the product must divide {n_devices}" if flexible else "config.mesh.data=-1 takes all remaining devices"
        )
        are = "is 1 device" if n_devices == 1 else f"are {n_devices} devices"
        raise UserError(f"config.mesh has {described} = {product} devices, but there {are}; {remedy}.")
    return sizes | dict.fromkeys(flexible, n_devices // product)


def min_devices(config: MeshConfig) -> int:
    """Return the smallest number of devices that a mesh can have."""
    return math.prod(abs(getattr(config, axis)) for axis in AXES)


def is_flexible(config: MeshConfig) -> bool:
    """Return whether an axis of a mesh takes all remaining devices."""
    return any(getattr(config, axis) == -1 for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Create the mesh of some devices.

    Raises:
        UserError: As for `axis_sizes`.
    """
    sizes = axis_sizes(config, len(devices))
    # Not `jax.make_mesh`, which rejects GPUs of several hosts.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    # Axis type Auto: the compiler propagates the sharding of some arrays to all others.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def describe_mesh(mesh: MeshConfig | dict[str, int]) -> str:
    """Format the axes of a mesh that have more than one device: 'fsdp 4 x tensor 2'."""
    sizes = mesh if isinstance(mesh, dict) else dataclasses.asdict(mesh)
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


@dataclass(frozen=True)
class ShardingPlan:
    """The mesh of a run and the shardings of its arrays. Without a mesh, it uses the default device of the thread."""

    mesh: Mesh | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes; {} without a mesh."""
        return dict(self.mesh.shape) if self.mesh else {}

    @property
    def n_devices(self) -> int:
        """The number of devices of all processes."""
        return self.mesh.size if self.mesh else 1

    def use_mesh(self) -> AbstractContextManager[Any]:
        """Return a context manager in which compiled functions shard their arrays over the mesh."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()

    def add_shardings(self, tree: Any) -> Any:
        """Add shardings to the shapes and data types of a state."""
        if self.mesh is None:
            return tree
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            infer_shardings(tree, self.mesh),
        )

    def shard_state(self, state: Any) -> Any:
        """Shard a state that is complete in this process or already on the mesh."""
        if self.mesh is None:
            # Commit the state to its device like a restored one, so that a resumed run compiles the same program.
            return jax.tree.map(lambda leaf: jax.device_put(leaf, getattr(leaf, "sharding", None)), state)
        return jax.device_put(state, infer_shardings(state, self.mesh))

    def replicate(self, tree: Any) -> Any:
        """Copy host arrays to every device."""
        return jax.device_put(tree, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec()))

    def local_rows(self, batch_size: int, seq_len: int) -> np.ndarray:
        """Return the indices of the batch rows that belong to devices of this process."""
        if self.mesh is None:
            return np.arange(batch_size)
        shape = batch_size, seq_len
        indices = self.batch_sharding(shape).addressable_devices_indices_map(shape).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index is not None]))

    def shard_batch(self, batches: Any, batch_size: int) -> Any:
        """Shard the last two axes of batches, rows and tokens, over the mesh.

        Args:
            batches: Host arrays with the rows of this process, `local_rows`, or device arrays with all rows.
            batch_size: The number of rows of all processes.
        """
        if self.mesh is None:
            return batches

        def shard(leaf: np.ndarray | jax.Array) -> jax.Array:
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, self.batch_sharding(leaf.shape))
            *lead, _, seq_len = leaf.shape
            local = self.local_rows(batch_size, seq_len)
            shape = (*lead, batch_size, seq_len)

            def get_part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                rows = np.searchsorted(local, np.arange(batch_size)[index[-2]])
                return leaf[..., rows, index[-1]]

            return jax.make_array_from_callback(shape, self.batch_sharding(shape), get_part)

        return jax.tree.map(shard, batches)

    def batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Return the sharding of an array of a batch."""
        assert self.mesh is not None
        lead = (None,) * (len(shape) - len(BATCH_AXES))
        spec = partition_spec(BATCH_AXES, shape[len(lead) :], self.sizes)
        return NamedSharding(self.mesh, PartitionSpec(*lead, *spec))

    def peak_flops(self) -> float:
        """Return the peak FLOP/s of all devices."""
        return device_peak_flops() * self.n_devices


def plan_for_all_devices(config: MeshConfig) -> ShardingPlan:
    """Return a plan for all devices of all processes. Raises UserError as `axis_sizes` does."""
    return plan_for_devices(config, jax.devices())


def plan_for_local_devices() -> ShardingPlan:
    """Return a plan that shards arrays over all devices of this process, to load what one device could not hold."""
    return plan_for_devices(MeshConfig(data=1, fsdp=-1, expert=1, context=1, tensor=1), jax.local_devices())


def plan_for_devices(config: MeshConfig, devices: Sequence[jax.Device]) -> ShardingPlan:
    """Return a plan for the given devices. Raises UserError as `axis_sizes` does."""
    axis_sizes(config, len(devices))
    return ShardingPlan(make_mesh(config, devices) if len(devices) > 1 else None)


def check_host_offload(config: Config) -> None:
    """Check that the devices can use host memory, if the config offloads the optimizer state.

    Raises:
        UserError: They cannot.
    """
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if config.optimizer.offload_state and "pinned_host" not in kinds:
        raise UserError(f"config.optimizer.offload_state=True: {device.device_kind} has no access to host memory.")


def check_batch_shards(config: Config, seq_len: int, n_devices: int) -> None:
    """Check that the devices form the mesh of a config and get equal shards of a batch.

    Raises:
        UserError: They do not.
    """
    sizes, training = axis_sizes(config.mesh, n_devices), config.training
    n_shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if training.batch_size // training.grad_accum_steps % n_shards:
        least = training.grad_accum_steps * n_shards
        nearest = max(1, round(training.batch_size / least)) * least
        raise UserError(
            f"config.training.batch_size={training.batch_size} in {training.grad_accum_steps} microbatches cannot be "
            f"divided equally among {n_shards} devices; the nearest batch size that can is {nearest}."
        )
    if seq_len % sizes["context"]:
        raise UserError(f"config.mesh.context={sizes['context']} does not divide the sequence length {seq_len}.")
