"""The ledger of a sweep: an append-only file of what was planned, began, ended and failed.

Each line is a JSON object with `time` (seconds since 1970), `trial` and `event`. The last event of a trial, other than
`queued`, is its state. Who runs a trial holds the lock of its run folder, which the operating system lets go of however
a process ends; the ledger says what became of it.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Event = dict[str, Any]

EVENTS = ("planned", "queued", "began", "finished", "diverged", "pruned", "stopped", "failed")
# A trial in one of these states needs no more work; one that failed is tried again by the next launch.
DONE = ("finished", "diverged")


class Ledger:
    """Appends to a ledger and reads it. Many processes and threads may do so at once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_bytes, self._turn = 0, threading.Lock()
        self._events: list[Event] = []

    def append(self, trial: str, event: str, **details: Any) -> None:
        """Write one event, which is on the disk on return."""
        self.append_all([(trial, event, details)])

    def append_all(self, events: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Write several events as one."""
        now = time.time()
        lines = [{"time": now, "trial": trial, "event": event, **details} for trial, event, details in events]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
            size = os.fstat(descriptor).st_size
            # A writer that was killed may have left half a line: it stays, alone.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + text)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> list[Event]:
        """All events so far, in the order in which they were written; half a line is none."""
        with self._turn:
            if self._file.exists():
                with open(self._file, "rb") as file:
                    file.seek(self._read_bytes)
                    *whole, _ = file.read().split(b"\n")
                self._read_bytes += sum(len(line) + 1 for line in whole)
                self._events += [event for line in whole if (event := _parse(line)) is not None]
            return list(self._events)

    def states(self) -> dict[str, Event]:
        """The last event of each trial, in the order in which the trials were planned."""
        states: dict[str, Event] = {}
        for event in self.events():
            if event["event"] != "queued" or event["trial"] not in states:
                states[event["trial"]] = event
        return states

    def is_done(self, trial: str) -> bool:
        """Whether a trial needs no more work."""
        return self.states().get(trial, {}).get("event") in DONE


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "trial", "event"} <= event.keys() else None


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some cluster file systems have no locks; a single write of a few lines is whole there too.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
