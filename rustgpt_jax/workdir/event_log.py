"""An append-only file of events, one JSON object a line: what happened to a run, or to the trials of a sweep.

Each line has `time` (seconds since 1970, UTC) and `event`, its name; the other values are the event's own.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from rustgpt_jax.errors import UserError

Event = dict[str, Any]


class Journal:
    """Appends to a file of events and reads it. Many processes and threads may do so at once."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def append(self, event: str, **values: Any) -> None:
        """Write one event, which is on the disk on return."""
        self.append_all([{"event": event, **values}])

    def append_all(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Write several events as one. Raises UserError if the file cannot be written."""
        now = time.time()
        text = "".join(json.dumps({"time": now, **event}) + "\n" for event in events).encode()
        try:
            self._write(text)
        except OSError as error:
            raise UserError(f"{self._file} cannot be written: {error.strerror}.") from error

    def _write(self, text: bytes) -> None:
        # Do not follow symbolic links: in an untrusted folder, one may point to a file that must not be modified.
        descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor)
            size = os.fstat(descriptor).st_size
            # A writer that was killed may have left half a line: it stays, alone.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            text = (b"\n" if torn else b"") + text
            if os.write(descriptor, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> list[Event]:
        """All events so far, in the order in which they were written; half a line is none."""
        return self.events_from(0)[0]

    def events_from(self, offset: int) -> tuple[list[Event], int]:
        """Return the events from a byte offset on, the start of a line, and the offset to continue from."""
        if not self._file.exists():
            return [], offset
        with open(self._file, "rb") as file:
            file.seek(offset)
            *whole, _ = file.read().split(b"\n")
        events = [event for line in whole if (event := _parse(line)) is not None]
        return events, offset + sum(len(line) + 1 for line in whole)

    def events_named(self, name: str, values: Mapping[str, type | UnionType]) -> list[Event]:
        """Return all events with a given name.

        Raises:
            UserError: An event lacks a value, or a value has the wrong type.
        """
        found = [event for event in self.events() if event["event"] == name]
        for event in found:
            for value, kind in values.items():
                if value not in event or not isinstance(event[value], kind):
                    wrong = "of another type" if value in event else "missing"
                    raise UserError(f"{self._file} is damaged: in a line of the event {name!r}, {value!r} is {wrong}.")
        return found


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some cluster file systems have no locks; a single write of a few lines is whole there too.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
