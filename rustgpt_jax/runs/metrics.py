"""The numbers of a run over its steps: metrics.jsonl, which is the record, and TensorBoard files, which are a view.

A line of metrics.jsonl is a JSON object such as {"step": 10, "stage": "train", "train/loss": 2.3}. JSON has no
numbers that are not finite; these are written as the strings "NaN", "Infinity" and "-Infinity", and read as floats.
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rustgpt_jax.errors import UserError
from rustgpt_jax.resolve import LARGEST_COUNT
from rustgpt_jax.runs.folder import RunFolder, Unwritable, write_atomically

if TYPE_CHECKING:
    from tensorboardX import FileWriter

TENSORBOARD_FLUSH_SECONDS = 10
# Enough for some lines of training and one of evaluation.
LAST_BYTES = 8192

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends metrics to a run folder. Use it in a `with` statement.

    `resume_step` is the step of the checkpoint that training goes on from; 0 starts from nothing. What a killed
    run recorded after that checkpoint is dropped first, so that a resumed run leaves the file of an undisturbed one.
    Raises UserError if the metrics that are there cannot be read, and Unwritable where the file was deleted or
    replaced while the run was going on.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._run, self._resume_step = RunFolder(folder), resume_step
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(self._run.metrics_file, resume_step)
        self._file = open(self._run.metrics_file, "a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if "_tensorboard" in vars(self):
            self._tensorboard.close()

    def check(self) -> None:
        """Raises Unwritable if what is written would go nowhere: the file is not in the run's folder any more."""
        opened, there = os.fstat(self._file.fileno()), None
        with suppress(OSError):
            there = os.stat(self._run.metrics_file)
        if there is None or (there.st_dev, there.st_ino) != (opened.st_dev, opened.st_ino):
            what = "was deleted" if there is None else "was replaced"
            lost = self._run.metrics_file if self._run.path.exists() else self._run.path
            raise Unwritable(f"{lost} {what} while the run was being trained.")

    @cached_property
    def _tensorboard(self) -> "FileWriter":
        # Its package imports all of PyTorch where that is installed: a second that the first step need not wait for.
        return _open_tensorboard(self._run.tensorboard, self._resume_step)

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line, which is on its way to the disk on return. Strings, such as the stage, are not plotted."""
        line = {"step": step} | {name: _to_json(value) for name, value in values.items()}
        self.check()
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._write_tensorboard(step, {name: value for name, value in values.items() if not isinstance(value, str)})

    def _write_tensorboard(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
        self._tensorboard.add_summary(summary, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in their order, none if there is no such file.

    A last line that was cut short, as by a kill, is left out. Raises UserError for any other malformed line.
    """
    return [record for _, record in _read_lines(RunFolder(folder).metrics_file)]


def last_metrics(folder: Path) -> dict[str, Any]:
    """The latest values of a run that is being written, whichever lines they stand in; none if there are none yet."""
    file = RunFolder(folder).metrics_file
    if not file.exists():
        return {}
    try:
        with open(file, "rb") as lines:
            lines.seek(0, os.SEEK_END)
            lines.seek(max(0, lines.tell() - LAST_BYTES))
            records = [_parse(line) for line in lines.read().split(b"\n")]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    merged: dict[str, Any] = {}
    for record in filter(None, records):
        merged |= record
    return merged


def keep_until(file: Path, last_step: int) -> None:
    """Drop the lines of a file of JSON objects that were written after `last_step`, or all of them if that is 0."""
    if not file.exists():
        return
    # A run that starts from nothing records its step 0 again.
    kept = [line for line, record in _read_lines(file) if last_step > 0 and record["step"] <= last_step]
    write_atomically(file, b"".join(line + b"\n" for line in kept))


def _read_lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not file.exists():
        return []
    try:
        *whole_lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    result = []
    for number, line in enumerate(whole_lines, start=1):
        record = _parse(line)
        if record is None:
            raise UserError(f"{file}, line {number}: this is not a JSON object with a step. Delete the line.")
        result.append((line, record))
    last = _parse(rest)
    return result if last is None else [*result, (rest, last)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] <= LARGEST_COUNT:
        return None
    return {name: _from_json(value) for name, value in record.items()}


def _to_json(value: float | int | str) -> float | int | str:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


@cache
def _silence_the_view() -> None:
    """Let the thread that writes TensorBoard files end without a word, as on a full disk: the record is what counts."""
    others = threading.excepthook

    def told(news: threading.ExceptHookArgs) -> None:
        if type(news.thread).__module__.split(".")[0] != "tensorboardX":
            others(news)

    threading.excepthook = told


def _open_tensorboard(folder: Path, resume_step: int) -> "FileWriter":
    # Not SummaryWriter.add_scalar: it prints a line for every value that is not finite.
    from tensorboardX import FileWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    _silence_the_view()
    # File names have a resolution of one second; the number keeps a quick restart from overwriting its predecessor.
    number = sum(1 for _ in folder.glob("events.*"))
    writer = FileWriter(folder, flush_secs=TENSORBOARD_FLUSH_SECONDS, filename_suffix=f".{number}")
    first_step = resume_step + 1 if resume_step else 0
    writer.add_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
    return writer
