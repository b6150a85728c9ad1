"""The native kernel: numerics, concurrent builds, and the fallback without a compiler."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, small_config

from rustgpt_jax.config.schema import for_inference
from rustgpt_jax.inference.generate import generate
from rustgpt_jax.inference.sampling import Greedy
from rustgpt_jax.inference.text_generator import WeightLayout, select_weight_layout, to_decode_params
from rustgpt_jax.model.kernels import matvec
from rustgpt_jax.model.kernels.matvec import BuildError, build_library
from rustgpt_jax.model.matmul import MAX_NATIVE_ROWS, to_row_major

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROOT = Path(__file__).parent.parent


def has_compiler() -> bool:
    try:
        matvec._find_compiler()
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, in a process that has not loaded the kernel."""
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    matvec.ffi_target.cache_clear()
    yield tmp_path / "cache"
    matvec.ffi_target.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "native").rglob("*.so"))


# Numerics.


@needs_compiler
@pytest.mark.parametrize("dtype", matvec.DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 19])
def test_matvec_matches_numpy(dtype: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    # Fewer inputs than lanes, a remainder, several chunks; fewer outputs than a tile, and a remainder.
    for inputs, outputs in ((1, 1), (5, 3), (77, 2), (40, 1001), (3072, 50)):
        x_BI = rng.standard_normal((rows, inputs)).astype(np.float32)
        weights_OI = jnp.asarray(rng.integers(-127, 128, (outputs, inputs))).astype(dtype)
        if dtype != "int8":
            weights_OI = weights_OI + jnp.asarray(rng.standard_normal((outputs, inputs))).astype(dtype)
        found = np.asarray(jax.jit(matvec.matvec)(x_BI, weights_OI))
        expected = x_BI.astype(np.float64) @ np.asarray(weights_OI, np.float64).T
        assert found.dtype == np.float32
        bound = 1e-6 * np.abs(x_BI) @ np.abs(np.asarray(weights_OI, np.float32)).T
        assert (np.abs(found - expected) <= bound).all()


@needs_compiler
def test_matvec_by_identity_is_the_matrix() -> None:
    inputs, outputs = 33, 11
    weights_OI = jnp.asarray(np.arange(outputs * inputs).reshape(outputs, inputs) % 251 - 125).astype(jnp.int8)
    found = matvec.matvec(jnp.eye(inputs), weights_OI)
    np.testing.assert_array_equal(found, np.asarray(weights_OI).T)


@needs_compiler
def test_nonfinite_values_stay_in_their_row_and_output() -> None:
    x_BI = np.ones((3, 20), np.float32)
    x_BI[1, 3] = np.nan
    weights_OI = np.ones((5, 20), np.float32)
    weights_OI[4, 19] = np.inf
    found = np.asarray(matvec.matvec(x_BI, weights_OI))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], [[20, 20, 20, 20, np.inf]] * 2)


@needs_compiler
def test_concurrent_calls_in_a_loop_are_deterministic() -> None:
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.standard_normal((256, 256)).astype(np.float32) / 16) for _ in range(4)]

    @jax.jit
    def looped(x_BI: jax.Array) -> jax.Array:
        def step(_: jax.Array, x_BI: jax.Array) -> jax.Array:
            # The calls are independent and may run concurrently.
            return jnp.tanh(sum(matvec.matvec(x_BI, kernel) for kernel in kernels))

        return jax.lax.fori_loop(0, 200, step, x_BI)

    x_BI = rng.standard_normal((2, 256)).astype(np.float32)
    first = np.asarray(looped(x_BI))
    for _ in range(5):
        np.testing.assert_array_equal(looped(x_BI), first)


@needs_compiler
def test_mismatched_weights_are_rejected() -> None:
    call = jax.ffi.ffi_call(matvec.ffi_target() or "", jax.ShapeDtypeStruct((1, 4), jnp.float32))
    with pytest.raises(Exception, match="weights are"):
        jax.block_until_ready(call(jnp.ones((1, 5)), jnp.ones((4, 6))))
    with pytest.raises(Exception, match="weights are"):
        jax.block_until_ready(call(jnp.ones((1, 5)), jnp.ones((4, 5), jnp.float16)))


@needs_compiler
@pytest.mark.parametrize("dtype", matvec.DTYPES)
@pytest.mark.parametrize("rows", [1, MAX_NATIVE_ROWS, MAX_NATIVE_ROWS + 1])
def test_native_and_plain_products_agree(dtype: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    weights, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 30), (rows, 70)))
    native, plain = (to_row_major(weights, dtype, kernel).matmul(x) for kernel in ("native", "plain"))
    np.testing.assert_allclose(native, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("dtype", "weights"), [("float32", "int8"), ("bfloat16", None)])
def test_generated_tokens_match_the_plain_kernel(dtype: str, weights: str | None) -> None:
    model = for_inference(small_config(**{"model.dtype": dtype}).model)
    params = random_params(model)

    def generate_with(kernel: str) -> list[list[int]]:
        decode_params = to_decode_params(params, model, WeightLayout(weights, kernel, "cpu"))
        prompts = [[1, 2, 3], [7]]
        return generate(decode_params, prompts, model, samplers=(Greedy(),), key=jax.random.key(0), max_tokens=10)

    assert generate_with("native") == generate_with("plain")


# Building.


@needs_compiler
def test_library_is_built_once_per_source_and_compiler(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "small.cc"
    source.write_text("int one() { return 1; }\n")
    library = build_library(source)
    before = library.stat().st_mtime_ns
    assert build_library(source) == library
    assert library.stat().st_mtime_ns == before
    source.write_text("int one() { return 2; }\n")
    assert build_library(source) != library
    monkeypatch.setattr(matvec, "FLAGS", (*matvec.FLAGS, "-DOTHER"))
    build_library(source)
    assert len(libraries(empty_cache)) == 3


BUILDER = """
import sys
from pathlib import Path
from rustgpt_jax.model.kernels.matvec import build_library
print(build_library(Path(sys.argv[1])))
"""


@pytest.mark.slow
@needs_compiler
def test_concurrent_builds_give_one_library(empty_cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "small.cc"
    source.write_text('extern "C" int one() { return 1; }\n')
    command = [sys.executable, "-c", BUILDER, str(source)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert [str(path) for path in libraries(empty_cache)] == list(paths)


@needs_compiler
@pytest.mark.parametrize("harm", [lambda data: data[:1000], lambda data: data[:-1] + b"?", lambda data: b""])
def test_damaged_library_is_rebuilt(harm: Any, empty_cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "small.cc"
    source.write_text('extern "C" int one() { return 1; }\n')
    library = build_library(source)
    whole = library.read_bytes()
    library.write_bytes(harm(whole))
    assert build_library(source) == library
    assert library.read_bytes() == whole
    assert libraries(empty_cache) == [library]


# Fallback.


def write_script(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


BROKEN = {
    "missing": ("", "no C++ compiler was found (no-such-compiler)"),
    "failing": ("echo 'x.cc:1: error: no such header' >&2; exit 1", "failed: x.cc:1: error: no such header"),
    "silent": ("exit 1", "failed: no error message"),
    "writing nothing": ("exit 0", "failed: no error message"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_compiler_falls_back_to_plain_with_one_warning(
    name: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script, reason = BROKEN[name]
    monkeypatch.setenv("CXX", write_script(tmp_path / "compiler", script) if script else "no-such-compiler")
    sampling = small_config(**{"sampling.matmul_impl": "native"}).sampling
    assert select_weight_layout(sampling) == select_weight_layout(sampling) == WeightLayout(None, "plain", "cpu")
    (output,) = caplog.messages
    assert output.startswith("The native kernel is not used, because ")
    assert reason in output


@needs_compiler
@pytest.mark.parametrize("is_file", [True, False])
def test_unusable_cache_falls_back_with_a_warning(
    is_file: bool, empty_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if is_file:
        empty_cache.write_text("")
    elif os.name != "posix" or os.geteuid() == 0:
        pytest.skip("this user may write to every folder")
    else:
        empty_cache.mkdir(mode=0o500)
    assert matvec.ffi_target() is None
    assert "cannot be used" in caplog.text


def test_native_kernel_is_built_only_if_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matvec, "ffi_target", lambda: pytest.fail("the kernel was loaded"))
    assert select_weight_layout(small_config().sampling).matmul_impl == "plain"


# JAX's compilation cache.

IN_A_PROCESS = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from rustgpt_jax.model.kernels import matvec
print(float(jax.jit(lambda x, w: matvec.matvec(x, w).sum())(jnp.ones((1, 8)), jnp.ones((4, 8)))))
"""


@pytest.mark.slow
@needs_compiler
def test_cached_program_finds_the_kernel(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert run() == "32.0\n"
    cached = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("-cache"))
    assert run() == "32.0\n"
    assert cached
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")) == cached
