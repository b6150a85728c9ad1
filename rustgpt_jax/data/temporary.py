"""Folders that a process fills, holds by a lock while it does, and leaves nothing of, even where it is killed."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# In each folder. The operating system lets go of it when the process that holds it ends, however it ends.
LOCK = ".lock"


@contextmanager
def temporary_folder(root: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `root`, which is made too; removed in the end, unless it has got another name by then.

    Hidden folders in `root` that no process holds are leftovers of killed ones, and are removed first.
    """
    for leftover in root.glob(".*"):
        lock = _held(leftover, is_own=False)
        if lock is not None:
            with lock:
                shutil.rmtree(leftover, ignore_errors=True)
    folder, lock = _new_folder(root, name)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(root: Path, name: str) -> tuple[Path, IO[str]]:
    while True:
        folder = root / f".{name}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        lock = _held(folder, is_own=True)
        # Another process may have taken the folder, which nobody held yet, for a leftover.
        if lock is not None:
            return folder, lock


def _held(folder: Path, is_own: bool) -> IO[str] | None:
    """The lock of a folder, or None where another process has it, or has just removed the folder."""
    try:
        lock = open(folder / LOCK, "a", encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        if is_own and folder.exists():
            raise
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        # Some cluster file systems have no locks: leftovers stay there, and building must still be possible.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        if is_own:
            return lock
    lock.close()
    return None
