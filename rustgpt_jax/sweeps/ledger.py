"""The ledger of a sweep: an append-only file of what was planned, began, ended and failed.

It is a journal whose events have a `trial`. The last event of a trial, other than `queued`, is its state. Who runs a
trial holds the lock of its run folder, which the operating system lets go of however a process ends; the ledger says
what became of it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rustgpt_jax.runs.journal import Event, Journal

EVENTS = ("planned", "queued", "began", "finished", "diverged", "pruned", "stopped", "failed")
# A trial in one of these states needs no more work; one that failed is tried again by the next launch.
DONE = ("finished", "diverged")


class Ledger:
    """Appends to a ledger and reads it. Many processes and threads may do so at once."""

    def __init__(self, file: Path) -> None:
        self._journal = Journal(file)

    def append(self, trial: str, event: str, **details: Any) -> None:
        """Write one event, which is on the disk on return."""
        self.append_all([(trial, event, details)])

    def append_all(self, events: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Write several events as one."""
        self._journal.append_all({"trial": trial, "event": event, **details} for trial, event, details in events)

    def events(self) -> list[Event]:
        """All events so far, in the order in which they were written; half a line is none."""
        return [event for event in self._journal.events() if "trial" in event]

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
