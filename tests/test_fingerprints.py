"""Fingerprints depend on every bit and position of an array, but not on its device or sharding."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustgpt_jax.pytrees import fingerprint_tree

TYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.int8, np.uint8]


def one(array: np.ndarray | jax.Array) -> str:
    return fingerprint_tree({"x": array})["x"]


@pytest.mark.parametrize("dtype", TYPES)
@given(st.data())
def test_fingerprint_depends_on_every_bit(dtype: type, data: st.DataObject) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 60 * np.dtype(dtype).itemsize, np.uint8)
    flipped = raw.copy()
    flipped[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert one(raw.view(dtype).reshape(4, 15)) != one(flipped.view(dtype).reshape(4, 15))


@given(st.permutations(range(12)))
def test_fingerprint_depends_on_positions(order: list[int]) -> None:
    values = np.arange(12, dtype=np.float32)
    assert (one(values[order]) == one(values)) == (order == sorted(order))


def test_fingerprint_distinguishes_zeros() -> None:
    arrays = [np.zeros(3, np.float32), np.zeros(4, np.float32), -np.zeros(3, np.float32), np.zeros(0, np.float32)]
    assert len({one(array) for array in arrays}) == len(arrays)


def test_fingerprint_tree_has_paths_and_scalars() -> None:
    found = fingerprint_tree({"a": {"b": jnp.ones((2, 3))}, "step": jnp.int32(7), "on": np.array([True, False])})
    assert list(found) == ["a/b", "on", "step"]
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in found.values())


def test_fingerprint_matches_its_definition() -> None:
    def mixed(word: int) -> int:
        word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return word ^ word >> 16

    values = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    words = values.ravel().view(np.uint32).tolist()
    expected = ""
    for salt in (0x9E3779B9, 0x85EBCA6B):
        total = sum(mixed(word ^ mixed((place + salt) & 0xFFFFFFFF)) for place, word in enumerate(words))
        expected += f"{total & 0xFFFFFFFF:08x}"
    assert one(values) == expected


def test_fingerprint_does_not_depend_on_sharding() -> None:
    code = """
import jax, numpy as np
from rustgpt_jax.pytrees import fingerprint_tree
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
values = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
placed = [jax.device_put(values, jax.NamedSharding(mesh, spec)) for spec in (jax.P(), jax.P("data"))]
print(len({fingerprint_tree({"x": array})["x"] for array in [values, *placed]}))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "1\n"
