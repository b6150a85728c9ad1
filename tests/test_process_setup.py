"""The memory allocator's settings, and the cache folder: its size limit, damaged entries, and missing permission."""

import os
import platform
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import pytest
from conftest import small_config

from rustgpt_jax import process_setup
from rustgpt_jax.cache_dir import LIMIT, MAX_BYTES, cache_limit
from rustgpt_jax.data.token_store import build_store
from rustgpt_jax.errors import UserError
from rustgpt_jax.process_setup import SECONDS_TO_WRITE, enable_compilation_cache, evict_entries, keep_freed_memory
from rustgpt_jax.tokenizers import train_tokenizer

COUNT_PAGE_FAULTS = """
import resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from rustgpt_jax.process_setup import keep_freed_memory
is_configured = keep_freed_memory()

def touch():
    np.empty(3_000_000_000, np.uint8)[:100_000_000].fill(1)

def touch_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(touch).result()

touch_in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch_in_a_thread()
print(int(is_configured), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_freed_memory_is_reused_without_page_faults() -> None:
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    done = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    is_configured, n_faults = map(int, done.stdout.split())
    # With huge pages, each touch would otherwise cost at least fifty.
    assert is_configured and n_faults < 100


@pytest.mark.parametrize(("name", "value"), [("RUSTGPT_JAX_MALLOC", "system"), ("MALLOC_TOP_PAD_", "0")])
def test_the_allocator_keeps_a_users_settings(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


# The size limit.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", MAX_BYTES),
        ("0", 0),
        ("123", 123),
        ("4G", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("4GB", 4 * 2**30),
        (" 4 GiB ", 4 * 2**30),
        ("1.5M", 3 * 2**19),
        ("100k", 100 * 2**10),
        ("2T", 2 * 2**40),
        ("7B", 7),
    ],
)
def test_cache_limit_parses_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["plenty", "-1", "4X", "1e9", "4G4", "²", "G"])
def test_cache_limit_rejects_other_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(UserError, match=f"RUSTGPT_JAX_CACHE_BYTES='{text}' is not a size; use a value such as 4G"):
        cache_limit()


# A cache folder without write permission.


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that not even root can write."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "file" / "cache"


def test_an_unwritable_token_store_names_the_setting(unwritable: Path) -> None:
    config = small_config(**{"tokenizer.name": "byte"})
    tokenizer = train_tokenizer(config.tokenizer, iter(()))
    with pytest.raises(UserError, match=r"\(Not a directory\). RUSTGPT_JAX_CACHE=DIR moves the cache"):
        build_store(config.data, tokenizer, unwritable / "stores")


@pytest.mark.parametrize("has_folder", [False, True])
def test_an_unwritable_compilation_cache_warns_once(
    has_folder: bool, unwritable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if has_folder:
        folder = unwritable.parent.with_name("there") / "programs"
        folder.mkdir(parents=True)
        monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(folder.parent))
        monkeypatch.setattr(process_setup.os, "access", lambda *_: False)
    changed: dict[str, object] = {}
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", changed.__setitem__)
        enable_compilation_cache()
    jax.config.update("jax_compilation_cache_dir", before)
    (warning,) = caplog.messages
    assert warning.endswith("so compiled programs are not cached. RUSTGPT_JAX_CACHE=DIR moves the cache.")
    assert ("Permission denied" if has_folder else "Not a directory") in warning
    # Existing entries are read. JAX does not try to write, which would warn for every program.
    assert ("jax_compilation_cache_dir" in changed) == has_folder
    assert changed["jax_persistent_cache_min_compile_time_secs"] == float("inf")


# Entries of the compilation cache.

OLD = 10 * SECONDS_TO_WRITE


def write_entry(folder: Path, name: str, content: bytes, age: float = OLD) -> Path:
    file = folder / f"{name}-cache"
    file.write_bytes(content)
    when = time.time() - age
    os.utime(file, (when, when))
    return file


def entry_names(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix("-cache") for file in folder.glob("*-cache"))


def test_damaged_entries_are_deleted(tmp_path: Path) -> None:
    complete = zlib.compress(os.urandom(5000))
    write_entry(tmp_path, "complete", complete)
    write_entry(tmp_path, "truncated", complete[:-1])
    write_entry(tmp_path, "flipped", complete[:2000] + bytes([complete[2000] ^ 1]) + complete[2001:])
    write_entry(tmp_path, "empty", b"")
    write_entry(tmp_path, "zstd", b"\x28\xb5\x2f\xfd compressed in another way")
    write_entry(tmp_path, "new", complete[:-1], age=0)
    evict_entries(tmp_path, 10**9)
    assert entry_names(tmp_path) == ["complete", "new", "zstd"]


def test_the_least_recently_used_entries_are_evicted(tmp_path: Path) -> None:
    for age in range(10):
        write_entry(tmp_path, str(age), zlib.compress(os.urandom(1000)), OLD + age)
    size = (tmp_path / "0-cache").stat().st_size
    evict_entries(tmp_path, 4 * size + 50)
    assert entry_names(tmp_path) == ["0", "1", "2", "3"]
    evict_entries(tmp_path, 0)
    assert entry_names(tmp_path) == []


def test_other_files_are_kept(tmp_path: Path) -> None:
    evict_entries(tmp_path / "none", 0)
    (tmp_path / "other").write_text("mine")
    evict_entries(tmp_path, 0)
    assert (tmp_path / "other").read_text() == "mine"


COUNT_CACHE_HITS = """
import jax
from rustgpt_jax.process_setup import enable_compilation_cache
enable_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(7.0))), len(hits))
"""


@pytest.mark.slow
def test_programs_are_cached_and_a_damaged_entry_costs_a_compilation(tmp_path: Path) -> None:
    folder = tmp_path / "programs"

    def count_hits() -> int:
        environment = os.environ | {"RUSTGPT_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", COUNT_CACHE_HITS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        value, hits = done.stdout.split()
        assert value == "63.0"
        return int(hits)

    count_hits()
    assert count_hits() > 0
    (folder / ".checked").unlink()
    for file in folder.glob("*-cache"):
        write_entry(folder, file.name.removesuffix("-cache"), file.read_bytes()[:-9])
    assert count_hits() == 0
