"""The folder of a sweep: its files and its ledger of events."""

import json
import shlex
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rustgpt_jax.atomic_io import publish_folder, read_json, temporary_path, write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.code_snapshot import code_files, code_hash, code_sources, record_code, write_git_state
from rustgpt_jax.workdir.event_log import Event, EventLog
from rustgpt_jax.workdir.run_dir import RunDir


class SweepDir:
    """The paths of a sweep's files, which may not exist.

    Attributes:
        path: The folder.
        info_file: The sweep's name, config file, last launch command, and trials.
        ledger_file: An append-only log of planned, started, ended and failed trials, one JSON object per line.
        trials: The folder of the trials' run folders.
        tokenizers: The folder of the tokenizers that trials share.
        code: The folder of the code snapshots of all launches, named by their hashes.
        study_file: The journal of an Optuna search.
        jobs: The folder of submitit's scripts, logs and results.
        adding_lock: Locked by a launch while it adds trials. (A search holds the lock of a run folder, `.lock`.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info_file, self.ledger_file = path / "sweep.json", path / "ledger.jsonl"
        self.trials, self.tokenizers, self.code, self.jobs = (
            path / name for name in ("trials", "tokenizers", "code", "jobs")
        )
        self.study_file, self.adding_lock = path / "study.journal", path / ".adding.lock"

    def trial(self, name: str) -> RunDir:
        """Return the run folder of a trial."""
        return RunDir(self.trials / name)


def create_sweep_dir(path: Path, info: dict[str, Any]) -> SweepDir:
    """Create or reopen the folder of a sweep.

    Args:
        path: The folder.
        info: The content of sweep.json; at least the sweep's name and config file.

    Raises:
        UserError: The folder contains another sweep, a run, or other files.
    """
    folder = SweepDir(path)
    if folder.info_file.exists():
        stored = read_sweep_info(path)
        for key in ("config_file", "sweep"):
            if stored.get(key) != info[key]:
                raise UserError(
                    f"{path} holds another sweep: its {key} is {stored.get(key)!r}, not {info[key]!r}. "
                    "Choose another --run folder."
                )
        return folder
    if RunDir(path).config_file.exists():
        raise UserError(f"{path} is the folder of a run, not of a sweep; choose another --run folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The sweep's folder {path} cannot be created: {error.strerror}.") from error
    is_used = any(not entry.name.startswith(".") for entry in path.iterdir())
    # Another launch may have created the same sweep in the meantime.
    if is_used and not folder.info_file.exists():
        raise UserError(f"{path} holds files but no sweep (no sweep.json); choose another --run folder.")
    write_sweep_info(folder, info)
    return folder


def read_sweep_info(path: Path) -> dict[str, Any]:
    """Read sweep.json. Raises UserError if the folder is not a sweep."""
    file = SweepDir(path).info_file
    if not file.exists():
        raise UserError(f"{path} is not the folder of a sweep: it has no sweep.json.")
    info = read_json(file)
    if problem := _find_problem(info):
        raise UserError(f"{file} is damaged: {problem}.")
    return dict(info)


def _find_problem(info: Any) -> str | None:
    """Return a description of an invalid value of sweep.json, or None if all required values are valid."""
    if not isinstance(info, dict):
        return "it is not a JSON object"
    for name in ("name", "command", "config_file", "sweep"):
        if name not in info:
            return f"it has no {name!r}"
        if not isinstance(info[name], str):
            return f"its {name!r} is not a string"
    try:
        shlex.split(info["command"])
    except ValueError:
        return "its 'command' has an unclosed quote"
    trials = info.get("trials", [])
    if not isinstance(trials, list) or not all(isinstance(trial, str) for trial in trials):
        return "its 'trials' is not a list of names"
    return None


def write_sweep_info(folder: SweepDir, info: dict[str, Any]) -> None:
    """Write sweep.json. Raises UserError if the file is not writable."""
    write_atomically(folder.info_file, json.dumps(info, indent=2) + "\n")


def save_code_snapshot(folder: SweepDir) -> Path:
    """Copy the running code into the sweep's folder, where queued jobs run it, and return the copy."""
    record_code()
    files = code_files(code_sources())
    copy = folder.code / code_hash(files)
    if not copy.exists():
        partial = temporary_path(copy)
        for name, file in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # The permissions of the copy follow the umask, not the original.
            shutil.copyfile(file, target)
        write_git_state(partial)
        publish_folder(partial, copy)
        shutil.rmtree(partial, ignore_errors=True)
    return copy


# The last event of a trial in the ledger, other than `queued`, is its state. A worker that runs a trial holds the lock
# of its run folder, which the operating system releases however the process ends.
EVENTS = ("planned", "queued", "began", "finished", "diverged", "pruned", "stopped", "failed")
# A finished trial has taken all its steps. A trial that is done is never continued. One that has ended is not running,
# but the next launch retries a failed trial, and an edited sweep may continue a pruned one.
DONE = ("finished", "diverged")
ENDED = (*DONE, "pruned", "failed")
# Maximum nesting of lists and mappings in the value of a knob.
MAX_DEPTH = 8


class Ledger:
    """The event log of a sweep, which many processes and threads may read and append to at once."""

    def __init__(self, file: Path) -> None:
        self._file, self._log = file, EventLog(file)
        self._lock = threading.Lock()
        self._events, self._events_end, self._n_damaged = list[Event](), 0, 0
        self._done, self._done_end = set[str](), 0

    def append(self, trial: str, event: str, **details: Any) -> None:
        """Append an event and flush it to disk."""
        self.append_all([(trial, event, details)])

    def append_all(self, events: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Append several events in one write."""
        self._log.append_all({"trial": trial, "event": event, **details} for trial, event, details in events)

    def events(self) -> list[Event]:
        """Return all events so far, in order. Partial and damaged lines are skipped.

        Raises:
            UserError: The file cannot be read.
        """
        with self._lock:
            new, self._events_end = self._read(self._events_end)
            valid = [event for event in new if _is_valid(event)]
            self._n_damaged += len(new) - len(valid)
            self._events += valid
            return list(self._events)

    def _read(self, offset: int) -> tuple[list[Event], int]:
        try:
            return self._log.events_from(offset)
        except OSError as error:
            raise UserError(f"{self._file} cannot be read: {error.strerror}.") from error

    def n_damaged(self) -> int:
        """Return the number of damaged lines: events without a trial, or with invalid values."""
        self.events()
        return self._n_damaged

    def states(self) -> dict[str, Event]:
        """Return the last event of each trial other than `queued`, in planned order."""
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
        with self._lock:
            new, self._done_end = self._read(self._done_end)
            for event in filter(_is_valid, new):
                if event["event"] in DONE:
                    self._done.add(event["trial"])
                elif event["event"] != "queued":
                    self._done.discard(event["trial"])
            return trial in self._done


def is_done_until(state: Event, until: int | None = None) -> bool:
    """Return whether a trial with this last event is done, or has reached the step `until`.

    A pruned trial counts as done only up to the step at which it was pruned, since an edited sweep may continue it.
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
        # The trial ID is the name of a folder inside the sweep.
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
        and all(_is_plain(item, MAX_DEPTH) for item in value.values())
        and type(value.get("seed", 0)) is int
    )


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in items)
    return not isinstance(value, int) or abs(value) < 2**63
