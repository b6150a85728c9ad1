"""Metrics of a run: metrics.jsonl, which is the record, and TensorBoard files, which are derived from it.

A line of metrics.jsonl is a JSON object such as {"step": 10, "stage": "train", "train/loss": 2.3}. Since JSON has no
non-finite numbers, they are written as the strings "NaN", "Infinity" and "-Infinity", and read as floats.

Steps never decrease from line to line. A file may have millions of lines, so readers stream it, read it backwards, or
keep only the columns that they need.
"""

import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rustgpt_jax.atomic_io import NotWritableError
from rustgpt_jax.config.validation import MAX_COUNT
from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.run_dir import RunDir

# The number of bytes to read from the end of a file, enough for a few lines of training and one of evaluation.
LAST_BYTES = 8192
# Number of bytes of a file to read and parse at a time. Parsed lines take several times as much memory.
BLOCK_BYTES = 2**18
# Prefixes of metric names, whose values are numbers. Other values may be strings.
METRICS = ("train/", "valid/")

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends metrics to a run folder. Use it as a context manager.

    Args:
        folder: The folder of the run.
        resume_step: The step of the checkpoint that training resumes from, or 0. Lines that a killed run recorded after
            that checkpoint are dropped, so that a resumed run produces the same file as an uninterrupted one.

    Raises:
        UserError: The existing metrics cannot be read.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._run = RunDir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        truncate_after(self._run.metrics_file, resume_step)
        self._file = open(self._run.metrics_file, "a", encoding="utf-8")
        self._tensorboard: EventFile | None = None
        # metrics.jsonl has everything, so training goes on if TensorBoard's file cannot be written.
        with suppress(OSError):
            self._tensorboard = EventFile(self._run.tensorboard, resume_step + 1 if resume_step else 0)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

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
        line = {"step": step} | {name: _to_json(value) for name, value in values.items()}
        self.check()
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

        scalars = {name: value for name, value in values.items() if not isinstance(value, str)}
        with suppress(OSError):
            if self._tensorboard is not None:
                self._tensorboard.write(step, scalars)


class EventFile:
    """A file of scalars for TensorBoard.

    Its records are protocol buffers of TensorFlow's type Event. Other writers import PyTorch or TensorFlow where they
    are installed, which takes seconds.

    Args:
        folder: The folder of the file.
        first_step: TensorBoard drops events of earlier files from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The time has a resolution of one second; the number keeps a quick restart from overwriting its predecessor.
        number = sum(1 for _ in folder.glob("events.*"))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number}"
        self._file = open(folder / name, "ab")
        self._append(0, _encode_bytes(_FILE_VERSION, b"brain.Event:2"))
        self._append(first_step, _encode_bytes(_SESSION_LOG, _START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of a step. Raises OSError."""
        with np.errstate(over="ignore"):
            numbers = np.array(list(scalars.values()), "<f4")
        values = [
            _encode_bytes(_TAG, name.encode()) + _SIMPLE_VALUE + number.tobytes()
            for name, number in zip(scalars, numbers, strict=True)
        ]
        self._append(step, _encode_bytes(_SUMMARY, b"".join(_encode_bytes(_VALUE, value) for value in values)))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()

    def _append(self, step: int, content: bytes) -> None:
        event = _WALL_TIME + struct.pack("<d", time.time()) + _STEP + _encode_varint(step) + content
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


# The numbers and types of fields of Event, Summary, Summary.Value and SessionLog, as protocol buffers encode them.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = b"\x09", b"\x10", b"\x1a", b"\x2a", b"\x3a"
_VALUE, _TAG, _SIMPLE_VALUE, _START = b"\x0a", b"\x0a", b"\x15", b"\x08\x01"


def _encode_bytes(field: bytes, content: bytes) -> bytes:
    return field + _encode_varint(len(content)) + content


def _encode_varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _encode_varint(high) if high else bytes([low])


def _checksum(content: bytes) -> bytes:
    """Return the CRC-32C of a record, masked as TensorFlow does."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


@cache
def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in table]
    return table


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


def iter_metrics(folder: Path, containing: bytes = b"", offset: int = 0) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a run's metrics.jsonl like `read_metrics`, without keeping them in memory.

    Args:
        folder: The folder of the run.
        containing: Skip lines that do not contain these bytes, without parsing them.
        offset: The byte offset to start from, which must be the start of a line.
    """
    for records in _iter_records(RunDir(folder).metrics_file, containing, offset):
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


def _iter_blocks(file: Path, offset: int = 0) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks of whole lines; only the last block may lack its newline."""
    if not file.exists():
        return
    with _open_for_reading(file) as content:
        content.seek(offset)
        rest = list[bytes]()
        while block := content.read(BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            if end:
                yield b"".join((*rest, block[:end]))
                rest.clear()
            rest.append(block[end:])
        if last := b"".join(rest):
            yield last


def _iter_records(file: Path, containing: bytes = b"", offset: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a file in blocks of lines."""
    for block in _iter_blocks(file, offset):
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
