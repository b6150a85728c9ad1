"""Which parameter lies where on a mesh: one ordered table of regular expressions on the paths of parameters.

What the optimizer keeps of a parameter has its path too, after names of its own, and lies where the parameter lies.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.pytrees import path_name

Axes = tuple[str | None, ...]

# (expression, an axis of the mesh for each of the last axes of the array); the first one that is found decides. Axes of
# the array before these, such as that of the stacked layers, are never cut. fsdp cuts what is summed over, or else what
# comes out; tensor cuts heads, hidden channels, and the vocabulary.
RULES: tuple[tuple[str, Axes], ...] = (
    (r"embedding/table$", ("tensor", "fsdp")),
    (r"positions/table$", (None, "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"feedforward/(gate|up)$", ("expert", "fsdp", "tensor")),
    (r"feedforward/down$", ("expert", "tensor", "fsdp")),
    (r"(router|(forget|write|latent|shared_key)/kernel)$", ("fsdp", None)),
    (r"(query|key|value|gate|up|input)/kernel$", ("fsdp", "tensor")),
    (r"(output|down)/kernel$", ("tensor", "fsdp")),
    # Each channel is convolved by itself, as those of heads are rotated and mixed.
    (r"convolution/(kernel|bias)$|mixer/(decay_rate|decay_bias|sinks)$", ("tensor",)),
    (r"(query|key|value|gate|up|input)/bias$", ("tensor",)),
    (r"(norm/(scale|bias)|(output|down|latent|shared_key|write)/bias)$", (None,)),
)


class Placed(NamedTuple):
    """Where an array lies: the number of its rule, or None for one that no rule knows; and how it is cut."""

    rule: int | None
    spec: PartitionSpec


def placed(path: str, shape: tuple[int, ...], mesh: dict[str, int]) -> Placed:
    """Where the array of a path lies on a mesh, given as the sizes of its axes.

    An axis that does not divide its length evenly leaves it whole. An array that no rule knows, such as a parameter of
    one's own layer, is cut over fsdp along the longest of its axes that can be.
    """
    if not shape:
        return Placed(None, PartitionSpec())
    for index, (expression, axes) in enumerate(RULES):
        if re.search(expression, path):
            lead: Axes = (None,) * (len(shape) - len(axes))
            return Placed(index, _divisible((*lead, *axes), shape, mesh))
    by_length = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    longest = next((axis for axis in by_length if shape[axis] % mesh.get("fsdp", 1) == 0), None)
    unknown: Axes = tuple("fsdp" if axis == longest and len(shape) > 1 else None for axis in range(len(shape)))
    return Placed(None, _divisible(unknown, shape, mesh))


def _divisible(axes: Axes, shape: tuple[int, ...], mesh: dict[str, int]) -> PartitionSpec:
    def is_cut(axis: str | None, length: int) -> bool:
        return axis is not None and mesh.get(axis, 1) > 1 and length % mesh[axis] == 0

    return PartitionSpec(*(axis if is_cut(axis, length) else None for axis, length in zip(axes, shape, strict=True)))


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Where each array (or shape) of a tree of parameters, or of a whole state, lies on a mesh."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, placed(path_name(path), leaf.shape, dict(mesh.shape)).spec), tree
    )


def constrained(tree: Any) -> Any:
    """Parameters, gradients or a state, made to lie where the rules say on the mesh that `jax.set_mesh` has set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, placed(path_name(path), leaf.shape, dict(mesh.shape)).spec
        ),
        tree,
    )


def share(shape: tuple[int, ...], spec: PartitionSpec, mesh: dict[str, int]) -> float:
    """The part of an array that one device has."""
    cut = [axis for axes in spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)]
    return 1 / math.prod(mesh[axis] for axis in cut)
