"""Names of the leaves of a tree: 'blocks/0/mixer/query/kernel'."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path of JAX as one string."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their names, in the order of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dictionaries whose leaves `by_path` gives by these names."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree
