"""The cache of compiled programs: bounded, and safe against entries that are not whole and against other processes."""

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from rustgpt_jax.sharding.compilation_cache import SECONDS_TO_WRITE, evict_entries

OLD = 10 * SECONDS_TO_WRITE


def entry(folder: Path, name: str, content: bytes, age: float = OLD) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-cache"
    file.write_bytes(content)
    when = time.time() - age
    os.utime(file, (when, when))
    return file


def names(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix("-cache") for file in folder.glob("*-cache"))


def test_what_is_not_whole_is_deleted(tmp_path: Path) -> None:
    whole = zlib.compress(os.urandom(5000))
    entry(tmp_path, "whole", whole)
    entry(tmp_path, "cut", whole[:-1])
    entry(tmp_path, "flipped", whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    entry(tmp_path, "empty", b"")
    entry(tmp_path, "another", b"\x28\xb5\x2f\xfd compressed in another way")
    entry(tmp_path, "begun", whole[:-1], age=0)
    evict_entries(tmp_path, 10**9)
    assert names(tmp_path) == ["another", "begun", "whole"]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for age in range(10):
        entry(tmp_path, str(age), zlib.compress(os.urandom(1000)), OLD + age)
    size = (tmp_path / "0-cache").stat().st_size
    evict_entries(tmp_path, 4 * size + 50)
    assert names(tmp_path) == ["0", "1", "2", "3"]
    evict_entries(tmp_path, 0)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_or_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    evict_entries(tmp_path / "none", 0)
    (tmp_path / "other").write_text("mine")
    evict_entries(tmp_path, 0)
    assert (tmp_path / "other").read_text() == "mine"


PROGRAM = """
import jax, sys
from rustgpt_jax.sharding.compilation_cache import (enable_compilation_cache)
enable_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(7.0))), len(hits))
"""


@pytest.mark.slow
def test_programs_are_found_again_and_damage_costs_a_compilation(tmp_path: Path) -> None:
    folder = tmp_path / "programs"

    def run() -> str:
        environment = os.environ | {"RUSTGPT_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run().split()[0] == "63.0"
    value, hits = run().split()
    assert value == "63.0" and int(hits) > 0
    (folder / ".checked").unlink()
    for file in folder.glob("*-cache"):
        entry(folder, file.name.removesuffix("-cache"), file.read_bytes()[:-9])
    value, hits = run().split()
    assert value == "63.0" and int(hits) == 0
    assert int(run().split()[1]) > 0
