"""The mesh of a run: its devices along the axes that the config names."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rustgpt_jax.config.schema import MeshConfig
from rustgpt_jax.errors import UserError

# From the outermost to the innermost: devices next to each other, which talk most, differ in the last axis.
AXES = ("data", "fsdp", "expert", "context", "tensor")


def axis_sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """The size of each axis. Raises UserError if the axes cannot hold all devices and no more."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wrong = next((axis for axis, size in sizes.items() if size == 0), None)
    if wrong:
        raise UserError(f"config.mesh.{wrong}=0: an axis has 1 device or more; -1 stands for all that are left.")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size > 0)
    if len(open_axes) > 1:
        raise UserError(f"config.mesh: only one axis may be -1, not both {open_axes[0]} and {open_axes[1]}.")
    told = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "data 1"
    if n_devices % given or (not open_axes and n_devices != given):
        remedy = f"they must divide {n_devices}" if open_axes else "config.mesh.data=-1 takes all that are left"
        raise UserError(f"config.mesh has {told} = {given} places, and there {_are(n_devices)}; {remedy}.")
    return sizes | dict.fromkeys(open_axes, n_devices // given)


def min_devices(config: MeshConfig) -> int:
    """The fewest devices that a mesh can have: those of its axes that are given."""
    return math.prod(abs(getattr(config, axis)) for axis in AXES)


def is_open(config: MeshConfig) -> bool:
    """Whether a mesh takes as many devices as there are."""
    return any(getattr(config, axis) == -1 for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of some devices. Raises UserError as `axis_sizes` does."""
    sizes = axis_sizes(config, len(devices))
    # Not `jax.make_mesh`, which refuses GPUs of several hosts.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    # Of type Auto: the compiler carries the layout of some arrays on to all others.
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def in_words(mesh: MeshConfig | dict[str, int]) -> str:
    """A mesh as its axes of more than one device: 'fsdp 4 x tensor 2'."""
    sizes = mesh if isinstance(mesh, dict) else dataclasses.asdict(mesh)
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _are(count: int) -> str:
    return "is 1 device" if count == 1 else f"are {count} devices"
