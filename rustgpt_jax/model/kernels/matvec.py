"""The C++ kernel of matvec.cc, which multiplies a few rows by a matrix as fast as its weights can be read.

The library is compiled on first use into the user's cache folder, once per source, compiler and processor.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.ffi
import jax.numpy as jnp

from rustgpt_jax.atomic_io import publish_folder
from rustgpt_jax.cache_dir import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("matvec.cc")
# Dtypes of weights that the kernel supports.
DTYPES = ("float32", "bfloat16", "int8")
# Used in this order if $CXX is not set.
COMPILERS = ("c++", "g++", "clang++")
TARGET = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", TARGET, "-ffp-contract=fast", "-fPIC", "-shared")
LIBRARY, CHECKSUM = "library.so", "sha256"
COMPILE_TIMEOUT_SECS = 120


class BuildError(Exception):
    """The library cannot be built. The message is a clause that follows 'because'."""


def build_library(source: Path) -> Path:
    """Return the compiled library of a C++ file, from the cache if possible.

    Several processes may call this at once: the folder of a library appears as a whole or not at all, and a library
    that does not match its checksum is built again.

    Raises:
        BuildError: There is no working compiler, or the cache is not writable.
    """
    compiler = _find_compiler()
    try:
        folder = cache_folder() / "native" / f"{source.stem}_{_cache_key(source, compiler)}"
        if not _is_valid(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                built = Path(temporary) / folder.name
                built.mkdir()
                _compile(compiler, source, built / LIBRARY)
                (built / CHECKSUM).write_text(_sha256(built / LIBRARY))
                publish_folder(built, folder, _is_valid)
    except OSError as error:
        raise BuildError(f"{error.filename or source} cannot be used ({error.strerror})") from error
    return folder / LIBRARY


def _is_valid(folder: Path) -> bool:
    try:
        return (folder / CHECKSUM).read_text() == _sha256(folder / LIBRARY)
    except FileNotFoundError:
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _find_compiler() -> str:
    cxx = os.environ.get("CXX")
    found = next((path for name in ([cxx] if cxx else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"no C++ compiler was found ({cxx or ', '.join(COMPILERS)})")
    return found


def _cache_key(source: Path, compiler: str) -> str:
    """Return a hash, as 16 hex digits, of everything that determines the library."""
    headers = sorted(Path(jax.ffi.include_dir()).rglob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_SECS).stdout
    files = [path.read_bytes() for path in (source, *headers)]
    parts = [*files, version, repr(FLAGS).encode(), _describe_processor().encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@functools.cache
def _describe_processor() -> str:
    """Return the processor's model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))]
    return "\n".join(dict.fromkeys(kept))


def _compile(compiler: str, source: Path, library: Path) -> None:
    command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(library)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_SECS)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} took more than {COMPILE_TIMEOUT_SECS} seconds") from None
    if result.returncode or not library.exists():
        message = next((line for line in result.stderr.splitlines() if "error" in line), "no error message")
        raise BuildError(f"{compiler} failed: {message.strip()}")


@functools.cache
def ffi_target() -> str | None:
    """Return the name of the FFI target of the kernel, which is compiled if necessary.

    If it cannot be compiled, returns None and logs the reason, once per process.
    """
    try:
        library = build_library(SOURCE)
        handler = ctypes.CDLL(str(library)).MatVec
    except (BuildError, OSError, AttributeError) as error:
        logger.warning("The native kernel is not used, because %s.", error)
        return None
    # JAX's compilation cache stores the name of the target, so each version of the kernel needs its own.
    name = f"rustgpt_jax.{library.parent.name}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def matvec(x_BI: jax.Array, weights_OI: jax.Array) -> jax.Array:
    """Return x W^T (B, O) in float32 on a CPU, for weights in one of DTYPES. Requires `ffi_target`."""
    name = ffi_target()
    assert name is not None, "matvec was called without the native kernel"
    shape = jax.ShapeDtypeStruct((x_BI.shape[0], weights_OI.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(x_BI.astype(jnp.float32), weights_OI)
