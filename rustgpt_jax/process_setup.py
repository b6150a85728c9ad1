"""Process-wide settings: the memory allocator, JAX's persistent compilation cache, and signals that request a stop."""

import contextlib
import ctypes
import errno
import logging
import math
import os
import platform
import signal
import threading
import time
import zlib
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rustgpt_jax.cache_dir import REMEDY, cache_folder, cache_limit

logger = logging.getLogger(__name__)

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
            logger.warning("%s is not writable (%s), so compiled programs are not cached. %s", folder, reason, REMEDY)
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


# Graceful stops: training saves and ends after the first signal; a later SIGINT ends the process at once.

# Users send SIGINT; clusters send the others before they preempt a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED_BY_USER = 130
# "Temporary failure": a job script can requeue a job that ends with this status.
STOPPED_BY_CLUSTER = os.EX_TEMPFAIL


class StopRequest:
    """Context manager that handles signals as requests to stop. It is truthy after a signal.

    Python runs signal handlers only between bytecode instructions of the main thread. A background thread waits for a
    second SIGINT, so that it can end the process while the main thread waits for a long computation.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._earlier_writing = signal.set_wakeup_fd(self._writing)
        threading.Thread(target=_watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._earlier_writing)
        os.close(self._writing)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def signal_number(self) -> int:
        """The number of the first signal, 0 for none."""
        return signal.Signals[self.signal_name].value if self.signal_name else 0

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def exit_status(self) -> int:
        """The exit status of the process; 0 without a request to stop."""
        if self.signal_name is None:
            return 0
        return STOPPED_BY_USER if self.signal_name == "SIGINT" else STOPPED_BY_CLUSTER


def _watch(reading: int) -> None:
    """End the process at a SIGINT after the first signal. Returns when the pipe is closed."""
    is_requested = False
    while numbers := os.read(reading, 1):
        if is_requested and numbers[0] == signal.SIGINT:
            os._exit(STOPPED_BY_USER)
        is_requested = is_requested or numbers[0] in SIGNALS
    os.close(reading)
