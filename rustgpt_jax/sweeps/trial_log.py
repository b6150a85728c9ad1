"""The ledger of a sweep: an append-only file of what was planned, began, ended and failed.

It is a journal whose events have a `trial`. The last event of a trial, other than `queued`, is its state. Who runs a
trial holds the lock of its run folder, which the operating system lets go of however a process ends; the ledger says
what became of it.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.event_log import Event, Journal

EVENTS = ("planned", "queued", "began", "finished", "diverged", "pruned", "stopped", "failed")
# A trial in one of these states needs no more work; one that failed is tried again by the next launch.
DONE = ("finished", "diverged")
# Knob values have fewer levels of nested lists and mappings than this.
MOST_NESTED = 8


class Ledger:
    """Appends to a ledger and reads it. Many processes and threads may do so at once."""

    def __init__(self, file: Path) -> None:
        self._file, self._journal = file, Journal(file)
        self._turn = threading.Lock()
        self._events, self._events_end, self._n_damaged = list[Event](), 0, 0
        self._done, self._done_end = set[str](), 0

    def append(self, trial: str, event: str, **details: Any) -> None:
        """Write one event, which is on the disk on return."""
        self.append_all([(trial, event, details)])

    def append_all(self, events: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Write several events as one."""
        self._journal.append_all({"trial": trial, "event": event, **details} for trial, event, details in events)

    def events(self) -> list[Event]:
        """Return all events so far, in order. Partial and damaged lines are skipped.

        Raises:
            UserError: The file cannot be read.
        """
        with self._turn:
            new, self._events_end = self._read(self._events_end)
            valid = [event for event in new if _is_valid(event)]
            self._n_damaged += len(new) - len(valid)
            self._events += valid
            return list(self._events)

    def _read(self, offset: int) -> tuple[list[Event], int]:
        try:
            return self._journal.events_from(offset)
        except OSError as error:
            raise UserError(f"{self._file} cannot be read: {error.strerror}.") from error

    def n_damaged(self) -> int:
        """Return the number of damaged lines: events without a trial, or with invalid values."""
        self.events()
        return self._n_damaged

    def states(self) -> dict[str, Event]:
        """The last event of each trial, in the order in which the trials were planned."""
        states: dict[str, Event] = {}
        for event in self.events():
            if event["event"] != "queued" or event["trial"] not in states:
                states[event["trial"]] = event
        return states

    def planned(self) -> dict[str, dict[str, Any]]:
        """Return the overrides of each trial, in planned order."""
        return {event["trial"]: event["overrides"] for event in self.events() if event["event"] == "planned"}

    def is_done(self, trial: str) -> bool:
        """Return whether a trial needs no more work, without keeping the ledger's events in memory."""
        with self._turn:
            new, self._done_end = self._read(self._done_end)
            for event in filter(_is_valid, new):
                if event["event"] in DONE:
                    self._done.add(event["trial"])
                elif event["event"] != "queued":
                    self._done.discard(event["trial"])
            return trial in self._done


def is_settled(state: Event, until: int | None = None) -> bool:
    """Return whether a trial with this last event has finished or reached the step `until`.

    A pruned trial is settled only up to the step at which it was pruned, since an edited sweep may continue it.
    """
    if state["event"] in DONE:
        return True
    return until is not None and state["event"] != "failed" and state.get("step", 0) >= until


def _is_valid(event: Event) -> bool:
    """Return whether an event has all required values, with the right types."""
    step, trial = event.get("step", 0), event.get("trial")
    return (
        event["event"] in EVENTS
        and isinstance(trial, str)
        # It must name a folder inside the sweep.
        and trial not in ("", ".", "..")
        and not {"/", "\0"} & set(trial)
        and isinstance(event["time"], (int, float))
        and type(step) is int
        and step >= 0
        and isinstance(event.get("error", ""), str)
        and (event["event"] != "planned" or _are_overrides(event.get("overrides")))
    )


def _are_overrides(value: Any) -> bool:
    """Return whether a value is a valid mapping of overrides: no deep nesting or numbers beyond the float range."""
    return (
        isinstance(value, dict)
        and all(path and (path.count(".") > 1 or not path.startswith("stages.")) for path in value)
        and all(_is_plain(item, MOST_NESTED) for item in value.values())
        and type(value.get("seed", 0)) is int
    )


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, (list, dict)):
        return depth > 0 and all(
            _is_plain(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
        )
    return not isinstance(value, int) or abs(value) < 2**63
