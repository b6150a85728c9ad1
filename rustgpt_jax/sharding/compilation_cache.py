"""JAX's persistent compilation cache in the user's cache folder, limited in size."""

import contextlib
import errno
import math
import os
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax

from rustgpt_jax.cache_dir import REMEDY, cache_folder, cache_limit

# The suffix of JAX's cache entries.
ENTRY = "-cache"
# The first byte of an entry that is compressed with zlib, which JAX uses if zstandard is not installed.
ZLIB = b"\x78"
# A younger entry may be incomplete because it is still being written.
SECONDS_TO_WRITE = 60


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache. Call this before anything is compiled.

    The cache folder is cleaned up first. JAX recompiles a program whose entry is missing or truncated, so deleting
    entries never changes results. If the folder is not writable, this prints one warning and uses the existing entries.

    Raises:
        UserError: The configured cache size is invalid.
    """
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
    entries = dict(_entries(folder))
    for file, stat in list(entries.items()):
        if since - SECONDS_TO_WRITE <= stat.st_mtime < now - SECONDS_TO_WRITE and not _is_whole(file):
            _delete(file)
            del entries[file]
    total = sum(stat.st_size for stat in entries.values())
    for file, stat in sorted(entries.items(), key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
        if total <= most_bytes:
            break
        _delete(file)
        total -= stat.st_size
    # A read-only folder is fine for reading.
    with contextlib.suppress(OSError):
        marker.touch()


def _entries(folder: Path) -> Iterable[tuple[Path, os.stat_result]]:
    for file in folder.glob(f"*{ENTRY}"):
        with contextlib.suppress(OSError):
            yield file, file.stat()


def _is_whole(file: Path) -> bool:
    """Return whether an entry is complete, as far as its compression tells."""
    try:
        content = file.read_bytes()
        if content.startswith(ZLIB):
            zlib.decompress(content)
    except zlib.error:
        return False
    except OSError:
        return True
    return len(content) > 0


def _delete(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
