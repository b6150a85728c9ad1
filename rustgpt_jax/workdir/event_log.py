"""An append-only file of events, one JSON object a line: what happened to a run, or to the trials of a sweep.

Each line has `time` (seconds since 1970, UTC) and `event`, its name; the other values are the event's own.
"""

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.code_snapshot import save_code_snapshot
from rustgpt_jax.workdir.environment import Program, collect_environment
from rustgpt_jax.workdir.run_dir import RunDir

Event = dict[str, Any]


class EventLog:
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


# The launches of a run: each time that it was begun or gone on with, by which code, in what environment.


@dataclass(frozen=True)
class Launch:
    """A launch as the journal has it. It began at `step`; `code` is the hash by which its archive is named.

    `left_out` are files beside one's own modules that the archive does not have.
    `mode` is how it trained: 'solo', alone on all its `devices`, or in a mode of a population of `width` runs. `mesh`
    has the sizes of the axes that these formed, {} for one.
    """

    step: int
    argv: list[str]
    cwd: str
    code: str
    git: dict[str, Any] | None
    environment: dict[str, Any]
    mode: str
    width: int
    devices: int
    left_out: list[str] = field(default_factory=list)
    mesh: dict[str, int] = field(default_factory=dict)


# A launch that records more devices is damaged.
MOST_DEVICES = 2**16
GROUPS = ("machine", "settings", "variables", "devices")

# Required fields of a launch event, with their types.
RECORDED: dict[str, type | UnionType] = {
    "step": int,
    "argv": list,
    "cwd": str,
    "code": str,
    "git": dict | None,
    "environment": dict,
    "mode": str,
    "width": int,
    "devices": int,
}


# Required fields of a program event.
PROGRAM: dict[str, type | UnionType] = {"stage": str, "stablehlo": str, "cache_key": str | None}


def record_launch(run: RunDir, step: int, mode: str, width: int, devices: int, mesh: Mapping[str, int]) -> list[str]:
    """Record in the journal that this process trains the run from a given step, and save a copy of its code.

    Returns:
        The files next to the code that were not copied.

    Raises:
        UserError: The folder is not writable.
    """
    code = save_code_snapshot(run)
    EventLog(run.journal_file).append(
        "launch",
        step=step,
        argv=sys.argv,
        cwd=os.getcwd(),
        **code,
        environment=collect_environment(),
        mode=mode,
        width=width,
        devices=devices,
        mesh=dict(mesh),
    )
    return list(code["left_out"])


def record_program(run: RunDir, stage: str, program: Program, step: int) -> None:
    """Write into the journal which program a stage runs from a step on."""
    EventLog(run.journal_file).append("program", stage=stage, step=step, **program._asdict())


def load_launches(run: RunDir) -> list[Launch]:
    """The launches of a run in their order; none for a run that has no journal. Raises UserError for half of one."""
    events = EventLog(run.journal_file).events_named("launch", RECORDED)
    names = [each.name for each in fields(Launch)]
    found = [Launch(**{name: event[name] for name in names if name in event}) for event in events]
    for launch in found:
        if not _is_environment(launch.environment) or not 1 <= launch.devices <= MOST_DEVICES:
            raise UserError(f"{run.journal_file} is damaged: a launch does not say on what machine it was.")
        if not isinstance(launch.mesh, dict) or not isinstance(launch.left_out, list):
            raise UserError(f"{run.journal_file} is damaged: the mesh or the skipped files of a launch are invalid.")
    return found


def _is_environment(environment: Mapping[str, Any]) -> bool:
    """Return whether a process can be started in a recorded environment."""
    machine, _, variables, _ = groups = [environment.get(name, {}) for name in GROUPS]
    if not all(isinstance(group, dict) for group in groups):
        return False
    cores = machine.get("cores")
    return type(cores) is int and cores >= 1 and all(isinstance(value, str) for value in variables.values())


def load_first_launch(run: RunDir) -> Launch:
    """The launch that a run began with. Raises UserError for a run that does not have it."""
    every = load_launches(run)
    if not every:
        raise UserError(f"{run.path} has no record of its launches: no journal.jsonl with one.")
    return every[0]


def load_programs(run: RunDir) -> dict[str, Program]:
    """The first program of each stage of a run. Raises UserError for a record that lacks a value."""
    found: dict[str, Program] = {}
    for event in EventLog(run.journal_file).events_named("program", PROGRAM):
        found.setdefault(event["stage"], Program(event["stablehlo"], event["cache_key"]))
    return found


def code_archive(run: RunDir, launch: Launch) -> Path:
    """The archive of the code of a launch."""
    return run.code / f"{launch.code}.zip"
