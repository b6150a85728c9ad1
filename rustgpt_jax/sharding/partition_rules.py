"""Partition rules: one ordered table of regular expressions on paths, which determines how parameters are sharded.

The path of an optimizer state ends with the path of its parameter, so it is sharded like the parameter.
"""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rustgpt_jax.pytrees import format_path

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


def infer_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
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
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, partition_spec_for(format_path(path), leaf.shape, dict(mesh.shape)).spec
        ),
        tree,
    )
