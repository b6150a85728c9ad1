"""Compiling C++ on demand into the user's cache folder, once for each source, compiler and processor."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.ffi

from rustgpt_jax.cache_dir import cache_folder

# Tried in this order, after $CXX.
COMPILERS = ("c++", "g++", "clang++")
PROCESSOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", PROCESSOR, "-ffp-contract=fast", "-fPIC", "-shared")
LIBRARY, DIGEST = "library.so", "sha256"
# A compiler that takes longer is stuck.
MOST_SECONDS = 120


class NotBuilt(Exception):
    """Why there is no library, in words that follow 'because'."""


def built(source: Path) -> Path:
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
                _put(made, place)
    except OSError as error:
        raise NotBuilt(f"{error.filename or source} cannot be used ({error.strerror})") from error
    return place / LIBRARY


def _put(made: Path, place: Path) -> None:
    """Bring a folder to its place, unless another process has been faster."""
    if place.exists() and not _is_sound(place):
        shutil.rmtree(place)
    try:
        made.rename(place)
    except OSError:
        if not _is_sound(place):
            raise


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
        raise NotBuilt(f"there is no C++ compiler ({own or ', '.join(COMPILERS)})")
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
        raise NotBuilt(f"{compiler} took more than {MOST_SECONDS} seconds") from None
    if done.returncode or not library.exists():
        said = next((line for line in done.stderr.splitlines() if "error" in line), "it gives no reason")
        raise NotBuilt(f"{compiler} failed: {said.strip()}")
