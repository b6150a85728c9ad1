"""Metrics of a run: metrics.jsonl, which is the record, and the interface of trackers, which receive the same metrics.

A line of metrics.jsonl is a JSON object such as {"step": 10, "time": 1767225600.0, "stage": "train",
"train/loss": 2.3}. `time` is when the line was written, in seconds since 1970 (UTC). The first line of each stage also
has its hyperparameters, such as "hparams/optimizer.learning_rate". Since JSON has no non-finite numbers, they are
written as the strings "NaN", "Infinity" and "-Infinity", and read as floats.

Steps never decrease from line to line. A file may have millions of lines, so readers stream it, read it backwards, or
keep only the columns that they need.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import NotWritableError, write_atomically
from rustgpt_jax.config.validation import MAX_COUNT
from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.run_dir import RunDir

# The number of bytes to read from the end of a file, enough for a few lines of training and one of evaluation.
LAST_BYTES = 8192
# Number of bytes of a file to read and parse at a time. Parsed lines take several times as much memory.
BLOCK_BYTES = 2**18
# Prefixes of metric names, whose values are numbers. Other values may be strings.
METRICS = ("train/", "valid/")
# The prefix of the hyperparameters of a stage, which trackers receive as the config of the run.
HPARAMS = "hparams/"
# Trackers write a table of all samples at each evaluation, with at most this many rows.
MAX_ROWS = 1000

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class TrackedRun:
    """A run, or a sweep, as described to a tracker.

    Attributes:
        folder: Its folder.
        params: The config by dotted path.
        project: `config.logging.project`.
        tags: `config.logging.tags`.
        resume_step: The step that training resumes from; 0 from the start.
        sweep: For a trial, the folder of its sweep.
        notes: A description, such as the knobs of a trial that the sweep changes.
        is_sweep: Whether this is a sweep, which has a summary and files but no steps.
    """

    folder: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    project: str | None = None
    tags: tuple[str, ...] = ()
    resume_step: int = 0
    sweep: Path | None = None
    notes: str = ""
    is_sweep: bool = False

    @property
    def name(self) -> str:
        """The name to show: that of the folder."""
        return self.folder.absolute().name

    def read_samples(self) -> list[tuple[int, str, str]]:
        """Read the step, prompt and text of the samples of a resumed run up to the step it resumes from."""
        file, rows = RunDir(self.folder).samples_file, list[tuple[int, str, str]]()
        if self.resume_step and file.exists():
            # The last line may be being written.
            lines = file.read_bytes().split(b"\n")[:-1]
            rows = [(line["step"], line["prompt"], line["text"]) for line in map(json.loads, lines)]
        return [row for row in rows if row[0] <= self.resume_step][-MAX_ROWS:]

    def load_state(self, tracker: str) -> dict[str, Any]:
        """Load what a tracker stored with `save_state`, such as the ID of the run; empty if there is nothing."""
        try:
            state = json.loads(RunDir(self.folder).trackers_file.read_bytes())[tracker]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return state if isinstance(state, dict) else {}

    def save_state(self, tracker: str, **values: Any) -> None:
        """Add values to those that a tracker stored. A run that is resumed, maybe by another process, loads them."""
        file = RunDir(self.folder).trackers_file
        with self.lock("trackers"):
            try:
                states = json.loads(file.read_bytes())
            except (OSError, ValueError, RecursionError):
                states = {}
            states = states if isinstance(states, dict) else {}
            states[tracker] = self.load_state(tracker) | values
            write_atomically(file, json.dumps(states, indent=2) + "\n")

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclude other threads and processes from blocks with this lock of the folder."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self.folder / f".{name}.lock", flags, 0o666)
        try:
            # Some cluster file systems have no locks.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class MetricWriter:
    """Interface of a tracker, which shows the metrics of a run elsewhere.

    `config.logging.trackers` names a subclass in TRACKERS, or your own by its import path. A writer is constructed with
    a TrackedRun. It is used by a single thread, which is not the one that trains, so its methods may take their time.
    After the first exception it is not called again: training continues, and the user is told once.

    Only `write_scalars` has to be implemented; the other methods do nothing by default.

    Attributes:
        location: Where to find the run, such as a URL, for a message to the user.
        is_durable: Whether everything before a `flush` is kept if the process is killed. If not, everything since the
            last `close` is written again after a kill.
    """

    location: str = ""
    is_durable: bool = True

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Write the scalars of a step, which never decreases except after `rewind`.

        Args:
            step: The step.
            scalars: Numbers by name, such as 'train/loss'. They may be infinite or NaN.
            wall_time: When they were recorded, in seconds since 1970.
        """
        raise NotImplementedError

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Write the prompts and generated texts of an evaluation."""

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        """Write values that describe the whole run so far, such as the best validation loss."""

    def write_file(self, file: Path) -> None:
        """Upload a file, such as a report."""

    def rewind(self, step: int) -> None:
        """Prepare for training to repeat the steps after `step`, with other results."""

    def flush(self) -> None:
        """Write everything that is buffered. Called every few seconds and before `close`."""

    def begin_close(self, status: str) -> None:
        """Begin what `close` waits for. Nothing is written afterward."""

    def close(self, status: str) -> None:
        """Close the run, whose status is 'finished', 'stopped', 'diverged' or 'failed'."""


class RunWriter:
    """Appends metrics to metrics.jsonl in a run folder, and passes them on to trackers. Use it as a context manager.

    Args:
        folder: The folder of the run.
        resume_step: The step of the checkpoint that training resumes from, or 0. Lines that a killed run recorded after
            that checkpoint are dropped, so that a resumed run produces the same file as an uninterrupted one.
        trackers: The trackers.
        clock: Returns the time in seconds since 1970.

    Raises:
        UserError: The existing metrics cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        trackers: Sequence[MetricWriter] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run, self._trackers, self._clock = RunDir(folder), trackers, clock
        folder.mkdir(parents=True, exist_ok=True)
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        truncate_after(self._run.metrics_file, resume_step)
        self._file = open(self._run.metrics_file, "a", encoding="utf-8")

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_close(self, status: str) -> None:
        """Let the trackers begin to close, so that those of several runs close at the same time."""
        for tracker in self._trackers:
            tracker.begin_close(status)

    def close(self, status: str = "finished") -> None:
        """Close metrics.jsonl and the trackers."""
        try:
            self._file.close()
        finally:
            for tracker in self._trackers:
                tracker.close(status)

    def check(self) -> None:
        """Check that the open file is still the one in the run folder.

        Raises:
            NotWritableError: It was deleted or replaced, so anything written would be lost.
        """
        opened, there = os.fstat(self._file.fileno()), None
        with suppress(OSError):
            there = os.stat(self._run.metrics_file)
        if there is None or (there.st_dev, there.st_ino) != (opened.st_dev, opened.st_ino):
            what = "was deleted" if there is None else "was replaced"
            lost = self._run.metrics_file if self._run.path.exists() else self._run.path
            raise NotWritableError(f"{lost} {what} while the run was being trained.")

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line and flush it to the operating system. Strings, such as the stage, are not plotted."""
        now = round(self._clock(), 3)
        line = {"step": step, "time": now} | {name: _to_json(value) for name, value in values.items()}
        self.check()
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._trackers:
            scalars = select_scalars(values)
            for tracker in self._trackers:
                tracker.write_scalars(step, scalars, now)

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Pass texts that are in samples.jsonl on to the trackers."""
        for tracker in self._trackers:
            tracker.write_samples(step, samples)

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        """Pass values that describe the whole run on to the trackers."""
        for tracker in self._trackers:
            tracker.write_summary(values)

    def rewind(self, step: int) -> None:
        """Drop everything after a step, from which training continues with other results."""
        self._file.close()
        self._open(step)
        for tracker in self._trackers:
            tracker.rewind(step)


def select_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a line of metrics.jsonl that change from step to step, for trackers."""
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, str) and not name.startswith(HPARAMS) and name not in ("step", "time")
    }


# Reading.


class Columns(NamedTuple):
    """Some metrics of a run as arrays, in file order.

    Attributes:
        steps: The step of each line.
        stages: The index of each line's stage in `stage_names`.
        values: Arrays by metric name.
    """

    steps: np.ndarray
    stages: np.ndarray
    stage_names: list[str]
    values: dict[str, np.ndarray]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read all lines of a run's metrics.jsonl, in order; an empty list if the file does not exist.

    A truncated last line, as left by a killed process, is ignored.

    Raises:
        UserError: Any other line is malformed.
    """
    return list(iter_metrics(folder))


def iter_metrics(
    folder: Path, containing: bytes = b"", offset: int = 0, end: int | None = None
) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a run's metrics.jsonl like `read_metrics`, without keeping them in memory.

    Args:
        folder: The folder of the run.
        containing: Skip lines that do not contain these bytes, without parsing them.
        offset: The byte offset to start from, which must be the start of a line.
        end: The byte offset to stop at, which must be the end of a line; None for the end of the file.
    """
    for records in _iter_records(RunDir(folder).metrics_file, containing, offset, end):
        yield from records


def read_columns(folder: Path, having: str, others: Sequence[str] = (), absent: float = 0.0) -> Columns:
    """Read some metrics of a run as arrays.

    Args:
        folder: The folder of the run.
        having: The name of a metric; lines without it are skipped.
        others: The names of further metrics.
        absent: The value to use if a line lacks one of the others.

    Raises:
        UserError: A line that has the metric is malformed.
    """
    file, needle = RunDir(folder).metrics_file, json.dumps(having).encode()
    # Allocate each column once: growing them, or joining parts, would take twice the memory.
    n_lines = sum(block.count(needle) for block in _iter_blocks(file))
    columns = {name: np.empty(n_lines, np.float64) for name in (having, *others)}
    steps, stages, stage_names, stop = np.empty(n_lines, np.int32), np.empty(n_lines, np.int32), dict[str, int](), 0
    for records in _iter_records(file, needle):
        # Lines that a running process has appended since they were counted are left out.
        lines = [line for line in records if having in line][: n_lines - stop]
        start, stop = stop, stop + len(lines)
        steps[start:stop] = [line["step"] for line in lines]
        stages[start:stop] = [stage_names.setdefault(line.get("stage", ""), len(stage_names)) for line in lines]
        for name, column in columns.items():
            column[start:stop] = [line.get(name, absent) for line in lines]
    values = {name: column[:stop] for name, column in columns.items()}
    return Columns(steps[:stop], stages[:stop], list(stage_names), values)


def last_step(folder: Path) -> int:
    """Return the step of the last line of a run's metrics.jsonl, or 0 if there is none.

    Raises:
        UserError: As for `read_metrics`.
    """
    file = RunDir(folder).metrics_file
    for _, line, is_whole in _reversed_lines(file):
        record = _parse(line)
        if record is not None:
            return record["step"]
        if is_whole:
            raise _malformed(file, line)
    return 0


def iter_since(folder: Path, step: int, end: int) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a run from the given step on that lie in the first `end` bytes of metrics.jsonl."""
    start = 0
    for offset, line, is_whole in _reversed_lines(RunDir(folder).metrics_file) if step > 0 else ():
        record = _parse(line)
        if record is not None and record["step"] < step:
            start = offset + len(line) + is_whole
            break
    return iter_metrics(folder, offset=start, end=end)


def last_metrics(folder: Path) -> dict[str, Any]:
    """Return the latest value of each metric of a running run; empty if there are none yet."""
    file = RunDir(folder).metrics_file
    if not file.exists():
        return {}
    with _open_for_reading(file) as lines:
        lines.seek(0, os.SEEK_END)
        lines.seek(max(0, lines.tell() - LAST_BYTES))
        records = [_parse(line) for line in lines.read().split(b"\n")]
    merged: dict[str, Any] = {}
    for record in filter(None, records):
        merged |= record
    return merged


def truncate_after(file: Path, last_step: int, keeps_evaluation: bool = True) -> None:
    """Truncate a JSON Lines file after the last line with a step up to `last_step`; empty it if that is 0.

    Args:
        file: The file.
        last_step: The last step to keep.
        keeps_evaluation: Whether to keep the validation loss of that step.

    Raises:
        UserError: A line to be removed is malformed, or the file is not writable.
    """
    if not file.exists():
        return
    end, needs_newline = 0, False
    # A run that starts from scratch records its step 0 again.
    for offset, line, is_whole in _reversed_lines(file) if last_step > 0 else ():
        record = _parse(line)
        if record is None and is_whole:
            raise _malformed(file, line)
        is_dropped = not keeps_evaluation and record is not None and "valid/loss" in record
        if record is not None and record["step"] <= last_step - is_dropped:
            end, needs_newline = offset + len(line), True
            break
    try:
        with open(file, "r+b") as content:
            content.truncate(end)
            content.seek(end)
            content.write(b"\n" if needs_newline else b"")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}.") from error


@contextmanager
def _open_for_reading(file: Path) -> Iterator[BinaryIO]:
    try:
        with open(file, "rb") as content:
            yield content
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error


def _iter_blocks(file: Path, offset: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks of whole lines; only the last block may lack its newline."""
    if not file.exists():
        return
    with _open_for_reading(file) as content:
        content.seek(offset)
        rest = list[bytes]()
        while block := content.read(BLOCK_BYTES if end is None else max(0, min(BLOCK_BYTES, end - content.tell()))):
            stop = block.rfind(b"\n") + 1
            if stop:
                yield b"".join((*rest, block[:stop]))
                rest.clear()
            rest.append(block[stop:])
        if last := b"".join(rest):
            yield last


def _iter_records(
    file: Path, containing: bytes = b"", offset: int = 0, end: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a file in blocks of lines."""
    for block in _iter_blocks(file, offset, end):
        if containing not in block:
            continue
        *lines, rest = block.split(b"\n")
        yield _parse_all(lines, containing, file)
        last = _parse(rest) if rest and containing in rest else None
        if last is not None:
            yield [last]


def _parse_all(lines: list[bytes], containing: bytes, file: Path) -> list[dict[str, Any]]:
    if containing:
        lines = [line for line in lines if containing in line]
    try:
        # One call of the parser is faster than one call per line.
        records = list(map(_validate, json.loads(b"[" + b",".join(lines) + b"]")))
    except (ValueError, RecursionError):
        records = [None]
    if len(records) == len(lines) and None not in records:
        return records  # type: ignore[return-value]
    records = [_parse(line) for line in lines]
    if None in records:
        raise _malformed(file, lines[records.index(None)])
    return records  # type: ignore[return-value]


def _malformed(file: Path, line: bytes) -> UserError:
    with _open_for_reading(file) as content:
        number = next((number for number, each in enumerate(content, start=1) if each.rstrip(b"\n") == line), 0)
    return UserError(
        f"{file}, line {number}: this is not a line of metrics, a JSON object with a step and numbers. Delete the line."
    )


def _reversed_lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield the lines of a file from its end: the offset, the line, and whether a newline follows it."""
    if not file.exists():
        return
    with _open_for_reading(file) as content:
        start = content.seek(0, os.SEEK_END)
        rest, is_whole = b"", False
        while start > 0:
            size = min(BLOCK_BYTES if is_whole else LAST_BYTES, start)
            start -= size
            content.seek(start)
            first, *lines = (content.read(size) + rest).split(b"\n")
            end = start + len(first) + sum(len(line) + 1 for line in lines)
            for line in reversed(lines):
                end -= len(line)
                if line or is_whole:
                    yield end, line, is_whole
                end, is_whole = end - 1, True
            rest = first
        if rest or is_whole:
            yield 0, rest, is_whole


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        return _validate(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _validate(record: Any) -> dict[str, Any] | None:
    """Convert a line of metrics parsed from JSON to the expected types, or return None if it is malformed."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= MAX_COUNT:
        return None
    if not isinstance(record.get("stage", ""), str):
        return None
    for name, value in record.items():
        kind = type(value)
        if kind is float or (kind is int and abs(value) < 2**63):
            continue
        if kind is not str:
            return None
        if value in _NOT_FINITE and name != "stage":
            record[name] = _NOT_FINITE[value]
        elif name.startswith(METRICS):
            return None
    return record


def _to_json(value: float | int | str) -> float | int | str:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
