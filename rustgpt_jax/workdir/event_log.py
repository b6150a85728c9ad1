"""Append-only event logs of runs and sweeps in JSON Lines format, and the launches and programs of a run.

Each line has the event's `time` (seconds since 1970, UTC) and its name, `event`; the other values depend on the event.
"""

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    """A file of events, which any number of processes and threads may append to and read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def append(self, event: str, **values: Any) -> None:
        """Write one event and flush it to disk."""
        self.append_all([{"event": event, **values}])

    def append_all(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Write several events in one operation.

        Raises:
            UserError: The file cannot be written.
        """
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
            # A killed writer may have left an incomplete line; end it, so that readers skip it.
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            text = (b"\n" if is_torn else b"") + text
            if os.write(descriptor, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> list[Event]:
        """Return all events in the order in which they were written, without incomplete lines."""
        return self.events_from(0)[0]

    def events_from(self, offset: int) -> tuple[list[Event], int]:
        """Return the events from a byte offset, which must be the start of a line, and the offset to continue from."""
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
                    wrong = "has the wrong type" if value in event else "is missing"
                    raise UserError(f"{self._file} is damaged: in a line of the event {name!r}, {value!r} {wrong}.")
        return found


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None


@contextmanager
def hold_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for other processes that hold it. The file is created if it does not exist."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some cluster file systems have no locks, but a single write of a few lines is atomic there too.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


# The launches of a run: each start or resumption, with its code and environment.


@dataclass(frozen=True)
class Launch:
    """A recorded launch of a run.

    Attributes:
        step: The step from which the launch trained.
        argv: The command line.
        cwd: The current folder.
        code: The hash that names the archive of the code.
        git: The git commit and state of the code, or None outside of a repository.
        environment: The result of `collect_environment`.
        mode: 'solo' for a run that is trained alone, or the mode of the population of runs that it belongs to.
        width: The number of runs of the population.
        devices: The number of devices of the run.
        left_out: Files next to the user's modules that are not in the archive.
        mesh: The sizes of the mesh axes; {} for one device.
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


# Launches with more devices are considered damaged.
MAX_DEVICES = 2**16
ENVIRONMENT_GROUPS = ("machine", "settings", "variables", "devices")

# Required fields of a launch event, with their types.
LAUNCH_FIELDS: dict[str, type | UnionType] = {
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
PROGRAM_FIELDS: dict[str, type | UnionType] = {"stage": str, "stablehlo": str, "cache_key": str | None}


def record_launch(run: RunDir, step: int, mode: str, width: int, devices: int, mesh: Mapping[str, int]) -> list[str]:
    """Record in the event log that this process trains the run from a given step, and save a copy of its code.

    Returns:
        The files next to the code that were not copied.

    Raises:
        UserError: The folder is not writable.
    """
    code = save_code_snapshot(run)
    EventLog(run.events_file).append(
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
    """Record in the event log which compiled program a stage runs from a given step onward."""
    EventLog(run.events_file).append("program", stage=stage, step=step, **program._asdict())


def load_launches(run: RunDir) -> list[Launch]:
    """Load the launches of a run in order; an empty list if it has no event log.

    Raises:
        UserError: A launch is incomplete or invalid.
    """
    events = EventLog(run.events_file).events_named("launch", LAUNCH_FIELDS)
    names = [each.name for each in fields(Launch)]
    found = [Launch(**{name: event[name] for name in names if name in event}) for event in events]
    for launch in found:
        if not _is_environment(launch.environment) or not 1 <= launch.devices <= MAX_DEVICES:
            raise UserError(f"{run.events_file} is damaged: the environment of a launch is invalid.")
        if not isinstance(launch.mesh, dict) or not isinstance(launch.left_out, list):
            raise UserError(f"{run.events_file} is damaged: the mesh or the skipped files of a launch are invalid.")
    return found


def _is_environment(environment: Mapping[str, Any]) -> bool:
    """Return whether a process can be started in a recorded environment."""
    machine, _, variables, _ = groups = [environment.get(name, {}) for name in ENVIRONMENT_GROUPS]
    if not all(isinstance(group, dict) for group in groups):
        return False
    cores = machine.get("cores")
    return type(cores) is int and cores >= 1 and all(isinstance(value, str) for value in variables.values())


def load_first_launch(run: RunDir) -> Launch:
    """Load the first launch of a run. Raises UserError if there is none."""
    every = load_launches(run)
    if not every:
        raise UserError(f"{run.path} has no record of its launches: events.jsonl is missing or lists none.")
    return every[0]


def load_programs(run: RunDir) -> dict[str, Program]:
    """Load the first program of each stage of a run. Raises UserError if a record is incomplete."""
    found: dict[str, Program] = {}
    for event in EventLog(run.events_file).events_named("program", PROGRAM_FIELDS):
        found.setdefault(event["stage"], Program(event["stablehlo"], event["cache_key"]))
    return found


def code_archive(run: RunDir, launch: Launch) -> Path:
    """Return the archive of the code of a launch."""
    return run.code / f"{launch.code}.zip"
