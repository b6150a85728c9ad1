"""Fingerprints of compiled programs, their cache keys, and GPU autotuning results."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rustgpt_jax.workdir import environment
from rustgpt_jax.workdir.environment import (
    call_and_fingerprint,
    enable_autotune_cache,
    load_autotuning,
    save_autotune_cache,
)
from rustgpt_jax.workdir.run_dir import RunDir

ROOT = Path(__file__).parent.parent

# The fingerprint of the training program of a small model, lowered but not compiled.
NAME = """
import hashlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import jax
from conftest import small_config
from rustgpt_jax.config.schema import partition
from rustgpt_jax.training import train_step as step
static, hparams = partition(small_config())
types = {"weights_BT": "float32"}
batch = step.Batch(*(jax.ShapeDtypeStruct((4, 32), types.get(name, "int32")) for name in step.Batch._fields))
state = jax.eval_shape(lambda: step.init_state(static, hparams))
lowered = jax.jit(step.train_step, static_argnums=0).lower(static, state, batch, hparams)
print(step.__file__, hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Path]:
    """JAX's persistent cache in a separate folder."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path / "cache"), 0.0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    return jnp.sin(x) * by


@pytest.mark.slow
def test_fingerprint_does_not_depend_on_source_locations(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rustgpt_jax", tmp_path / "elsewhere" / "rustgpt_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "elsewhere" / "configs")
    for file in (tmp_path / "elsewhere").rglob("*.py"):
        if '"""' in (text := file.read_text()):
            file.write_text("# Three\n# more\n# lines.\n" + text)
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", NAME, str(root), str(ROOT / "tests")], stdout=subprocess.PIPE, text=True
        )
        for root in (ROOT, tmp_path / "elsewhere")
    ]
    (first, name), (second, same) = (process.communicate()[0].split() for process in started)
    assert first != second
    assert name == same


def test_fingerprint_depends_on_the_program_not_on_values() -> None:
    function = jax.jit(scaled)
    _, first = call_and_fingerprint(function, np.ones(3), np.float32(2))
    _, other_numbers = call_and_fingerprint(function, np.zeros(3), np.float32(3))
    _, other_shape = call_and_fingerprint(function, np.ones(4), np.float32(2))
    _, other_code = call_and_fingerprint(jax.jit(lambda x, by: jnp.cos(x) * by), np.ones(3), np.float32(2))
    assert first.stablehlo == other_numbers.stablehlo
    assert len({first.stablehlo, other_shape.stablehlo, other_code.stablehlo}) == 3


def test_fingerprinted_function_is_traced_once() -> None:
    traced = []

    def squared(x: jax.Array) -> jax.Array:
        traced.append(1)
        return x * x

    function = jax.jit(squared)
    result, _ = call_and_fingerprint(function, np.float32(3))
    assert result == 9
    assert function(np.float32(4)) == 16
    assert len(traced) == 1


def test_cache_key_names_the_cache_entry(cached: Path) -> None:
    for _ in range(2):
        # A new function is compiled again; the second time it is in the cache.
        _, program = call_and_fingerprint(jax.jit(lambda x: scaled(x, x) + 1), np.ones(7))
        assert program.cache_key is not None
        assert (cached / f"{program.cache_key}-cache").exists()
        jax.clear_caches()
        environment._cache_keys.clear()


def test_without_a_cache_there_is_no_key(cached: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        assert call_and_fingerprint(jax.jit(lambda x: x + 17), np.ones(3))[1].cache_key is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_second_call_has_the_same_key(cached: Path) -> None:
    function = jax.jit(scaled)
    first, second = (call_and_fingerprint(function, np.ones(5), np.float32(2))[1] for _ in range(2))
    assert first == second and first.cache_key is not None


def test_threads_get_their_own_keys(cached: Path) -> None:
    found: dict[int, environment.Program] = {}

    def observe(size: int) -> None:
        found[size] = call_and_fingerprint(jax.jit(scaled), np.ones(size), np.float32(size))[1]

    threads = [threading.Thread(target=observe, args=(size,)) for size in range(20, 26)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {}
    jax.clear_caches()
    environment._cache_keys.clear()
    for size in found:
        alone[size] = call_and_fingerprint(jax.jit(scaled), np.ones(size), np.float32(size))[1]
    assert found == alone and len({program.cache_key for program in found.values()}) == 6


def test_debug_log_is_not_shown_to_the_user(cached: Path) -> None:
    heard: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        call_and_fingerprint(jax.jit(lambda x: x * 19), np.ones(3))
    finally:
        logging.getLogger().removeHandler(handler)
    assert heard == []


# GPU autotuning. No GPU is needed to check XLA's flags.


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run on a machine with an NVIDIA driver."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX\n")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return RunDir(tmp_path / "run")


def flags() -> dict[str, str]:
    return dict(flag.split("=", 1) for flag in os.environ.get("XLA_FLAGS", "").split())


DUMP, LOAD = "--xla_gpu_dump_autotune_results_to", "--xla_gpu_load_autotune_results_from"


def test_autotuning_results_are_reused_by_later_launches(gpu: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    enable_autotune_cache(gpu)
    assert flags().keys() == {"--xla_gpu_autotune_level", DUMP}
    save_autotune_cache(gpu)
    assert not gpu.autotune_file.exists()
    Path(flags()[DUMP]).write_text("version: 3\n")
    save_autotune_cache(gpu)
    assert gpu.autotune_file.read_text().endswith("\nversion: 3\n")
    dumped = flags()[DUMP]

    monkeypatch.setenv("XLA_FLAGS", "")
    enable_autotune_cache(gpu)
    assert flags() == {DUMP: dumped, LOAD: str(gpu.autotune_file)}

    # Recomputing a step reuses the results and writes nothing.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    load_autotuning(gpu)
    assert flags() == {"--xla_gpu_autotune_level": "4", LOAD: str(gpu.autotune_file)}


def test_autotuning_results_of_another_version_are_ignored(gpu: RunDir) -> None:
    gpu.autotune_file.write_text("# jaxlib 0.0.1\nversion: 1\n")
    load_autotuning(gpu)
    enable_autotune_cache(gpu)
    assert LOAD not in flags()


def test_autotuning_flags_of_the_user_are_kept(gpu: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in (f"{DUMP}=a", f"{LOAD}=b"):
        monkeypatch.setenv("XLA_FLAGS", flag)
        enable_autotune_cache(gpu)
        load_autotuning(gpu)
        assert os.environ["XLA_FLAGS"] == flag


def test_autotuning_needs_a_gpu(gpu: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "none")
    enable_autotune_cache(gpu)
    load_autotuning(gpu)
    assert "XLA_FLAGS" not in os.environ
    save_autotune_cache(gpu)
    assert list(gpu.path.iterdir()) == []
