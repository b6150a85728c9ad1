"""Names of the leaves of a tree: 'blocks/0/mixer/query/kernel'."""

from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path of JAX as one string."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names, in the order of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
