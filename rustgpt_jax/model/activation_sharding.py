"""How activations lie on a mesh of devices, by the letters of their names. Without a mesh, nothing is done."""

import math

import jax
from jax.sharding import PartitionSpec

# The axes of a mesh that cut a letter. An axis cuts one letter of an array: the letters here choose in their order.
AXES_OF = {
    "X": ("expert",),
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "K": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def shard_activations(x: jax.Array, letters: str) -> jax.Array:
    """An array whose axes are `letters`, cut over the mesh that `jax.set_mesh` has set as AXES_OF says.

    Letters that are not there, such as dots, and what the size of an axis does not divide, stay whole. The values are
    the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(letters, x.shape, dict(mesh.shape)))


def partition_spec(letters: str, shape: tuple[int, ...], mesh: dict[str, int]) -> PartitionSpec:
    """How an array of these letters and lengths is cut over a mesh, given as the sizes of its axes."""
    lengths = dict(zip(letters, shape, strict=True))
    free = {axis for axis, size in mesh.items() if size > 1}
    cut: dict[str, tuple[str, ...]] = {}
    for letter, axes in AXES_OF.items():
        wanted = tuple(axis for axis in axes if axis in free)
        if letter in lengths and wanted and lengths[letter] % math.prod(mesh[axis] for axis in wanted) == 0:
            cut[letter] = wanted
            free -= set(wanted)
    return PartitionSpec(*(cut.get(letter) for letter in letters))
