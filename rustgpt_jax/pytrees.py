"""Dataclasses as pytrees."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


def pytree_dataclass(*, meta: Iterable[str] = ()) -> Callable[[type], Any]:
    """Decorate a dataclass so that it is a pytree: the fields in `meta` belong to its structure, the others are leaves.

    `jax.tree_util.register_dataclass` will not do: structures that it makes are equal where only the classes differ
    (as of JAX 0.12.0). A compiled function that finds its program by the structure of its arguments then runs, for
    some few hashes, the program made for the other class.
    """
    names_of_structure = tuple(meta)

    def register(cls: type) -> type:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in names_of_structure]

        def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names]
            return children, tuple(getattr(value, name) for name in names_of_structure)

        def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in names_of_structure)

        def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Any:
            # Not __init__: children may be anything while JAX looks at a structure.
            value: Any = object.__new__(cls)
            for name, child in (*zip(names_of_structure, structure, strict=True), *zip(names, children, strict=True)):
                object.__setattr__(value, name, child)
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


# Names of the leaves of a tree: 'blocks/0/mixer/query/kernel'.


def format_path(path: Any) -> str:
    """A key path of JAX as one string."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their names, in the order of the tree."""
    return {format_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def unflatten_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dictionaries whose leaves `flatten_paths` gives by these names."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree
