"""The folder of a sweep: its files and its ledger of events."""

import json
import shlex
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustgpt_jax.atomic_io import publish_folder, temporary_path, write_atomically
from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.code_snapshot import code_files, code_hash, code_sources, record_code, write_git_state
from rustgpt_jax.workdir.event_log import Event, EventLog
from rustgpt_jax.workdir.run_dir import RunDir


@dataclass(frozen=True)
class SweepDir:
    """The names of the files of a sweep. Nothing is read or written by asking for them."""

    path: Path

    @property
    def about_file(self) -> Path:
        """The path of sweep.json: the sweep's name, config file, last launch command, and trials."""
        return self.path / "sweep.json"

    @property
    def ledger_file(self) -> Path:
        """The append-only log of planned, started, ended and failed trials, one JSON object per line."""
        return self.path / "ledger.jsonl"

    @property
    def trials(self) -> Path:
        """The folder of the trials, each an ordinary run folder."""
        return self.path / "trials"

    def trial(self, name: str) -> RunDir:
        """The run folder of a trial."""
        return RunDir(self.trials / name)

    @property
    def tokenizers(self) -> Path:
        """Tokenizers that several trials share."""
        return self.path / "tokenizers"

    @property
    def code(self) -> Path:
        """The code as it was at each launch, in folders named by its hash."""
        return self.path / "code"

    @property
    def study_file(self) -> Path:
        """The journal of a search by Optuna."""
        return self.path / "study.journal"

    @property
    def jobs(self) -> Path:
        """The folder of submitit's scripts, logs and results."""
        return self.path / "jobs"

    @property
    def lock_file(self) -> Path:
        """The lock of the launcher that leads a search."""
        return self.path / ".lock"


def create_sweep_dir(path: Path, about: dict[str, Any]) -> SweepDir:
    """Create or reopen the folder of a sweep. `about` has at least its name and its config file.

    Raises UserError if the folder holds another sweep, a run, or other files.
    """
    folder = SweepDir(path)
    if folder.about_file.exists():
        stored = read_sweep_info(path)
        for key in ("config_file", "sweep"):
            if stored.get(key) != about[key]:
                raise UserError(
                    f"{path} holds another sweep: its {key} is {stored.get(key)!r}, not {about[key]!r}. "
                    "Choose another --run folder."
                )
        return folder
    if RunDir(path).config_file.exists():
        raise UserError(f"{path} is the folder of a run, not of a sweep; choose another --run folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The sweep's folder {path} cannot be made: {error.strerror}.") from error
    used = any(not entry.name.startswith(".") for entry in path.iterdir())
    # Another launch may have begun the same sweep in this moment.
    if used and not folder.about_file.exists():
        raise UserError(f"{path} holds files but no sweep (no sweep.json); choose another --run folder.")
    write_sweep_info(folder, about)
    return folder


def read_sweep_info(path: Path) -> dict[str, Any]:
    """Read sweep.json. Raises UserError if the folder is not a sweep."""
    file = SweepDir(path).about_file
    if not file.exists():
        raise UserError(f"{path} is not the folder of a sweep: it has no sweep.json.")
    try:
        about = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    wrong = _wrong_field(about)
    if wrong:
        raise UserError(f"{file} is damaged: {wrong}.")
    return dict(about)


def _wrong_field(about: Any) -> str | None:
    """Return what is wrong with the content of sweep.json, or None if all required fields are valid."""
    if not isinstance(about, dict):
        return "it is not a JSON object"
    for name in ("name", "command", "config_file", "sweep"):
        if name not in about:
            return f"it has no {name!r}"
        if not isinstance(about[name], str):
            return f"its {name!r} is not a text"
    try:
        shlex.split(about["command"])
    except ValueError:
        return "its 'command' has a quote without an end"
    trials = about.get("trials", [])
    if not isinstance(trials, list) or not all(isinstance(trial, str) for trial in trials):
        return "its 'trials' is not a list of names"
    return None


def write_sweep_info(folder: SweepDir, about: dict[str, Any]) -> None:
    """Record the sweep as of this launch in sweep.json.

    Raises:
        UserError: The file is not writable.
    """
    write_atomically(folder.about_file, json.dumps(about, indent=2) + "\n")


def save_code_snapshot(folder: SweepDir) -> Path:
    """Copy the code that is running into the sweep's folder, unless it is there: jobs that wait run this copy."""
    record_code()
    files = code_files(code_sources())
    copy = folder.code / code_hash(files)
    if not copy.exists():
        partial = temporary_path(copy)
        for name, file in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Without the permissions of the original: those of the copy follow the umask.
            shutil.copyfile(file, target)
        write_git_state(partial)
        publish_folder(partial, copy)
        shutil.rmtree(partial, ignore_errors=True)
    return copy


# The ledger of a sweep: an append-only file of what was planned, began, ended and failed.
#
# It is a journal whose events have a `trial`. The last event of a trial, other than `queued`, is its state. Who runs a
# trial holds the lock of its run folder, which the operating system lets go of however a process ends; the ledger says
# what became of it.

EVENTS = ("planned", "queued", "began", "finished", "diverged", "pruned", "stopped", "failed")
# A trial in one of these states needs no more work; one that failed is tried again by the next launch.
DONE = ("finished", "diverged")
# Knob values have fewer levels of nested lists and mappings than this.
MOST_NESTED = 8


class Ledger:
    """Appends to a ledger and reads it. Many processes and threads may do so at once."""

    def __init__(self, file: Path) -> None:
        self._file, self._journal = file, EventLog(file)
        self._turn = threading.Lock()
        self._events, self._events_end, self._n_damaged = list[Event](), 0, 0
        self._done, self._done_end = set[str](), 0

    def append(self, trial: str, event: str, **details: Any) -> None:
        """Write one event; it is on disk on return."""
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
