"""Reading and writing files. Writes are atomic: after a crash, a file or folder is either complete or absent."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError


class NotWritableError(UserError):
    """A file or folder cannot be written: the disk is full, or permission is denied."""


def temporary_path(path: Path) -> Path:
    """Return a new hidden name beside a path.

    Because the name is hidden, a file left behind by a crash does not make a new run folder look used.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the block to a NotWritableError that names `path`."""
    try:
        yield
    except OSError as error:
        raise NotWritableError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file at a temporary path that replaces `path`, flushed to disk, if the block succeeds.

    Yields:
        The path to write to, in the same folder, which must exist. If the block fails, the file is removed.

    Raises:
        NotWritableError: The file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with translate_os_errors(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of a small file; text is encoded as UTF-8.

    Raises:
        NotWritableError: The file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(file: Path) -> Any:
    """Read a value from a JSON file. Raises UserError if the file is unreadable or damaged."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that is renamed to `path` if the block succeeds.

    Args:
        path: The folder, which must not exist or be empty. Its parents are created.

    Yields:
        The folder to write to. If the block fails, the folder is removed.

    Raises:
        UserError: The folder exists and is not empty, or cannot be written.
    """
    target = path.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path} already exists and is not empty; choose another folder.")
    temporary = temporary_path(target)
    try:
        with translate_os_errors(path):
            temporary.mkdir(parents=True)
        yield temporary
        with translate_os_errors(path):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path, is_valid: Callable[[Path], bool] = Path.exists) -> None:
    """Rename a complete folder to `path`, unless another process has already put a valid one there.

    A folder at `path` that is not valid is replaced. If another process was first, the caller has to
    remove `temporary`.

    Raises:
        OSError: The folder cannot be renamed.
    """
    try:
        os.rename(temporary, path)
    except OSError:
        if is_valid(path):
            return
        damaged = temporary_path(path)
        os.rename(path, damaged)
        os.rename(temporary, path)
        shutil.rmtree(damaged, ignore_errors=True)


def is_special(path: Path) -> bool:
    """Return whether a path is a pipe, device or socket, which may block or never reach the end when read."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
