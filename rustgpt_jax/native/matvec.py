"""The kernel of matvec.cc as a function of JAX: a few rows times a matrix, as fast as its weights come from memory."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.ffi
import jax.numpy as jnp

from rustgpt_jax.atomic_io import publish_folder
from rustgpt_jax.cache_dir import cache_folder

# Compiling C++ on demand into the user's cache folder, once for each source, compiler and processor.

# Tried in this order, after $CXX.
COMPILERS = ("c++", "g++", "clang++")
PROCESSOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", PROCESSOR, "-ffp-contract=fast", "-fPIC", "-shared")
LIBRARY, DIGEST = "library.so", "sha256"
# A compiler that takes longer is stuck.
MOST_SECONDS = 120


class BuildError(Exception):
    """Why there is no library, in words that follow 'because'."""


def build_library(source: Path) -> Path:
    """The library of a source file, from the cache or compiled now, in a folder of its own.

    Any number of processes may build it at once: a folder comes whole to its place, or not at all, and a library that
    is not the one that was put there is built again. Raises NotBuilt.
    """
    compiler = _compiler()
    try:
        place = cache_folder() / "native" / f"{source.stem}_{_key(source, compiler)}"
        if not _is_sound(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as folder:
                made = Path(folder) / place.name
                made.mkdir()
                _compile(compiler, source, made / LIBRARY)
                (made / DIGEST).write_text(_digest(made / LIBRARY))
                publish_folder(made, place, _is_sound)
    except OSError as error:
        raise BuildError(f"{error.filename or source} cannot be used ({error.strerror})") from error
    return place / LIBRARY


def _is_sound(place: Path) -> bool:
    try:
        return (place / DIGEST).read_text() == _digest(place / LIBRARY)
    except FileNotFoundError:
        return False


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compiler() -> str:
    own = os.environ.get("CXX")
    found = next((path for name in ([own] if own else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({own or ', '.join(COMPILERS)})")
    return found


def _key(source: Path, compiler: str) -> str:
    """What a library depends on, in 16 hex digits."""
    headers = sorted(Path(jax.ffi.include_dir()).rglob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=MOST_SECONDS).stdout
    parts = [*(path.read_bytes() for path in (source, *headers)), version, repr(FLAGS).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """The processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU")))
    )


def _compile(compiler: str, source: Path, library: Path) -> None:
    command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} took more than {MOST_SECONDS} seconds") from None
    if done.returncode or not library.exists():
        said = next((line for line in done.stderr.splitlines() if "error" in line), "it gives no reason")
        raise BuildError(f"{compiler} failed: {said.strip()}")


SOURCE = Path(__file__).with_name("matvec.cc")
# Types that weights may have.
TYPES = ("float32", "bfloat16", "int8")


@functools.cache
def ffi_target() -> str | None:
    """The name under which XLA finds the kernel in this process, compiled now if need be; None where it cannot be.

    Why it cannot is said once, on standard error.
    """
    try:
        library = build_library(SOURCE)
        handler = ctypes.CDLL(str(library)).MatVec
    except (BuildError, OSError, AttributeError) as error:
        print(f"The native kernel is not used, because {error}.", file=sys.stderr)
        return None
    # Programs in the cache of compiled ones name what they call: another kernel needs another name.
    name = f"rustgpt_jax.{library.parent.name}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def matvec(x_BI: jax.Array, weights_OI: jax.Array) -> jax.Array:
    """y_BO = x W^T in float32 on a CPU, from weights of one of TYPES, summed in float32.

    `ffi_target` must return a name.
    """
    name = ffi_target()
    assert name is not None, "the native kernel is called only where it is"
    shape = jax.ShapeDtypeStruct((x_BI.shape[0], weights_OI.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(x_BI.astype(jnp.float32), weights_OI)
