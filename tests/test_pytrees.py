"""Dataclasses as pytrees: different classes have different tree structures."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rustgpt_jax
from rustgpt_jax.inference.sampling import SAMPLERS, Greedy
from rustgpt_jax.pytrees import pytree_dataclass


@pytree_dataclass(meta=["power"])
@dataclasses.dataclass(frozen=True)
class Scale:
    number: Any
    power: int


@pytree_dataclass(meta=["power"])
@dataclasses.dataclass(frozen=True)
class Shift:
    number: Any
    power: int


def test_structure_includes_class_and_metadata() -> None:
    structures = [jax.tree.structure(value) for value in (Scale(1.0, 1), Shift(1.0, 1), Scale(1.0, 2))]
    assert all(one != other for one, other in itertools.combinations(structures, 2))
    assert jax.tree.structure(Scale(1.0, 1)) == jax.tree.structure(Scale(np.ones(3), 1))


def test_samplers_have_different_structures() -> None:
    samplers = [Greedy(), *(sampler(np.float32(0.5)) for _, sampler in SAMPLERS.values())]
    structures = [jax.tree.structure((sampler,)) for sampler in samplers]
    assert all(one != other for one, other in itertools.combinations(structures, 2))


def test_pytree_dataclass_round_trips() -> None:
    value = Scale({"a": np.arange(3), "b": None}, 2)
    (leaf,), structure = jax.tree.flatten(value)
    assert jax.tree.unflatten(structure, ["anything"]) == Scale({"a": "anything", "b": None}, 2)
    assert leaf is value.number["a"]
    ((path, _),) = jax.tree_util.tree_flatten_with_path(value)[0]
    assert jax.tree_util.keystr(path) == ".number['a']"


def test_register_dataclass_is_not_used() -> None:
    package = Path(rustgpt_jax.__file__).parent
    for file in package.rglob("*.py"):
        if file.name != "pytrees.py":
            assert not re.search(r"register_(dataclass|pytree)", file.read_text(encoding="utf-8")), file
