"""Dataclasses as pytrees, and access to the leaves of a tree by path, such as 'blocks/0/mixer/query/kernel'."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


def pytree_dataclass(*, meta: Iterable[str] = ()) -> Callable[[type], Any]:
    """Return a decorator that registers a dataclass as a pytree.

    This replaces `jax.tree_util.register_dataclass`, with which the tree structures of two classes with the same fields
    are equal (as of JAX 0.12.0). A compiled function, which is cached by the structure of its arguments, may then run
    the program of the other class.

    Args:
        meta: The fields that belong to the tree structure. All others are children.
    """
    meta_names = tuple(meta)

    def register(cls: type) -> type:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in meta_names]

        def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names]
            return children, tuple(getattr(value, name) for name in meta_names)

        def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in meta_names)

        def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
            # Bypass __init__, because JAX may pass any objects as children.
            value: Any = object.__new__(cls)
            for name, child in (*zip(meta_names, structure, strict=True), *zip(names, children, strict=True)):
                object.__setattr__(value, name, child)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


def format_path(path: Any) -> str:
    """Format a JAX key path as a string: 'blocks/0/mixer/query/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the order of the tree."""
    return {format_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def unflatten_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dictionary with the given leaves by path: the inverse of `flatten_paths`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree
