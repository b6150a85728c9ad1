"""Sharding of activations over a mesh, by the letters that name their axes. Without a mesh, arrays are unchanged."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Mesh axes that shard each array axis. A mesh axis shards at most one axis of an array: the first one in this order.
MESH_AXES = {
    "X": ("expert",),
    # Shards of the tokens of a batch, and channels of an embedding where it is stored.
    "R": ("data", "fsdp", "expert", "context"),
    "E": ("fsdp",),
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "K": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def shard_activations(x: jax.Array, letters: str) -> jax.Array:
    """Constrain the sharding of an array with axes `letters` over the mesh set by `jax.set_mesh`, as in MESH_AXES.

    Axes with other letters, such as dots, and axes that the mesh does not divide evenly are not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(letters, x.shape, dict(mesh.shape)))


def partition_spec(letters: str, shape: tuple[int, ...], mesh: dict[str, int]) -> PartitionSpec:
    """Return the sharding of an array with axes `letters` over a mesh, given as the sizes of its axes."""
    lengths = dict(zip(letters, shape, strict=True))
    free = {axis for axis, size in mesh.items() if size > 1}
    spec: dict[str, tuple[str, ...]] = {}
    for letter, mesh_axes in MESH_AXES.items():
        used = tuple(axis for axis in mesh_axes if axis in free)
        if letter in lengths and used and lengths[letter] % math.prod(mesh[axis] for axis in used) == 0:
            spec[letter] = used
            free -= set(used)
    return PartitionSpec(*(spec.get(letter) for letter in letters))


def token_shards(n_rows: int, length: int) -> tuple[int, int]:
    """Return how many shards the rows and columns of tokens_BT have on the mesh set by `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    sharding = NamedSharding(mesh, partition_spec("BT", (n_rows, length), dict(mesh.shape)))
    shard = sharding.shard_shape((n_rows, length))
    return n_rows // shard[0], length // shard[1]
