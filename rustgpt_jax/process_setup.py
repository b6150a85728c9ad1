"""Process-wide settings: the C library's memory allocator, and JAX's persistent compilation cache."""

import contextlib
import ctypes
import errno
import math
import os
import platform
import sys
import time
import zlib
from pathlib import Path

from rustgpt_jax.cache_dir import REMEDY, cache_folder, cache_limit

# The value "system" leaves the allocator unchanged.
MALLOC_VARIABLE = "RUSTGPT_JAX_MALLOC"
# Parameters of mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX and M_ARENA_MAX. A threshold of -1 is converted to
# the largest size.
MALLOPT = ((-1, -1), (-2, 64 * 1024**2), (-4, 0), (-8, 1))
# A user who sets one of these has configured the allocator.
USER_MALLOC_VARIABLES = (
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)

# A younger cache entry may be incomplete because it is still being written.
SECONDS_TO_WRITE = 60


def keep_freed_memory() -> bool:
    """Configure glibc's allocator to reuse freed blocks. Call this before the first large allocation.

    By default, glibc returns large blocks to the system when they are freed, and each page of the next block causes a
    page fault. This takes a third of the time of a training step on a CPU. glibc also maps large blocks separately for
    threads with their own arena, such as XLA's, so all threads share one arena here. The process keeps its peak memory
    until it exits.

    Returns:
        True if the allocator was configured; False with another C library, or if the user has configured the allocator.
    """
    if os.environ.get(MALLOC_VARIABLE) == "system" or any(name in os.environ for name in USER_MALLOC_VARIABLES):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    results = [mallopt(parameter, value) for parameter, value in MALLOPT]
    return all(results)


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache. Call this before anything is compiled.

    The cache folder is cleaned up first. JAX recompiles a program whose entry is missing or truncated, so deleting
    entries never changes results. If the folder is not writable, this prints one warning and uses the existing entries.

    Raises:
        UserError: The configured cache size is invalid.
    """
    import jax  # Imported here so that setting up the allocator does not load JAX.

    limit, least_seconds = cache_limit(), 0.0
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder() / "programs"
        reason = _unwritable_reason(folder)
        if reason:
            print(
                f"{folder} is not writable ({reason}), so compiled programs are not cached. {REMEDY}", file=sys.stderr
            )
            # Otherwise JAX would warn for every program.
            least_seconds = math.inf
        if not reason or folder.is_dir():
            jax.config.update("jax_compilation_cache_dir", str(folder))
            evict_entries(folder, limit)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _unwritable_reason(folder: Path) -> str:
    """Return why a folder, which is created if necessary, is not writable, or ''."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def evict_entries(folder: Path, most_bytes: int) -> None:
    """Delete damaged entries, then the least recently used ones, until the rest fits into `most_bytes`.

    Each entry is checked once, at the first call after it was written. Other processes may use the folder meanwhile.
    """
    marker = folder / ".checked"
    now = time.time()
    since = marker.stat().st_mtime if marker.exists() else 0.0
    entries: dict[Path, os.stat_result] = {}
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            entries[file] = file.stat()
            is_new = since - SECONDS_TO_WRITE <= entries[file].st_mtime < now - SECONDS_TO_WRITE
            if is_new and not _is_complete(file):
                del entries[file]
                file.unlink()
    total = sum(stat.st_size for stat in entries.values())
    for file, stat in sorted(entries.items(), key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
        if total <= most_bytes:
            break
        total -= stat.st_size
        with contextlib.suppress(OSError):
            file.unlink()
    # A read-only folder is fine for reading.
    with contextlib.suppress(OSError):
        marker.touch()


def _is_complete(file: Path) -> bool:
    """Return whether an entry is complete. Entries are compressed with zlib if zstandard is not installed."""
    try:
        content = file.read_bytes()
        if content.startswith(b"\x78"):
            zlib.decompress(content)
    except zlib.error:
        return False
    return len(content) > 0
