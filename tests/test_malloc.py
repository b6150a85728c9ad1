"""Freed blocks are kept, however large and whatever thread had them: taking as much again costs no page fault."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from rustgpt_jax.malloc import keep_freed_memory
is_kept = keep_freed_memory()

def touch():
    np.empty(3_000_000_000, np.uint8)[:100_000_000].fill(1)

def touch_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(touch).result()

touch_in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch_in_a_thread()
print(int(is_kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    is_kept, count = done.stdout.split()
    return is_kept == "1", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep what is freed")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    is_kept, few = faults()
    # Where the system hands out huge pages, each touch would cost fifty or more.
    assert is_kept and few < 100


def test_it_can_be_turned_off_and_leaves_a_users_own_settings() -> None:
    assert not faults(RUSTGPT_JAX_MALLOC="system")[0]
    assert not faults(MALLOC_TOP_PAD_="0")[0]
