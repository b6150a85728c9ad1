"""TensorBoard event files: scalars, hyperparameters for the HParams tab, and samples for the Text tab.

The records are protocol buffers of TensorFlow's type Event. Other writers import PyTorch or TensorFlow where they are
installed, which takes seconds.
"""

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from rustgpt_jax.tracking.metric_writer import MetricWriter, TrackedRun
from rustgpt_jax.workdir.run_dir import RunDir


class TensorBoardWriter(MetricWriter):
    """Writes a new event file to the folder `tensorboard` of a run.

    TensorBoard drops events of earlier files after the step that the run resumes from. If the file cannot be written,
    events are lost, but nothing is raised.
    """

    def __init__(self, run: TrackedRun) -> None:
        folder = RunDir(run.folder).tensorboard
        self._file: BinaryIO | None = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # The time has a resolution of one second; the number keeps a quick restart from overwriting its
            # predecessor.
            number = sum(1 for _ in folder.glob("events.*"))
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number}"
            self._file = open(folder / name, "ab")
        self._append(0, _encode(_FILE_VERSION, b"brain.Event:2"))
        self.rewind(run.resume_step)
        if run.params:
            self._append(0, _encode_summary([_encode_hparams(run.params)]))

    def rewind(self, step: int) -> None:
        """Make TensorBoard drop all events after a step."""
        self._append(step + 1 if step else 0, _encode(_SESSION_LOG, _START))

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Append the scalars of a step."""
        with np.errstate(over="ignore"):
            numbers = np.array(list(scalars.values()), "<f4")
        values = [
            _encode(_TAG, name.encode()) + _SIMPLE_VALUE + number.tobytes()
            for name, number in zip(scalars, numbers, strict=True)
        ]
        self._append(step, _encode_summary(values), wall_time)

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Append a table of prompts and texts."""
        rows = "\n".join(f"| {_to_cell(prompt)} | {_to_cell(text)} |" for prompt, text in samples)
        tensor = _encode_varint_field(_DTYPE, _DT_STRING) + _encode(_SHAPE, b"")
        tensor += _encode(_STRING_VAL, f"| prompt | text |\n|---|---|\n{rows}\n".encode())
        value = _encode(_TAG, b"samples") + _encode(_METADATA, _encode(_PLUGIN, _encode(_PLUGIN_NAME, b"text")))
        self._append(step, _encode_summary([value + _encode(_TENSOR, tensor)]))

    def close(self, status: str) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _append(self, step: int, content: bytes, wall_time: float | None = None) -> None:
        if self._file is None:
            return
        now = time.time() if wall_time is None else wall_time
        event = _WALL_TIME + struct.pack("<d", now) + _encode_varint_field(_STEP, step) + content
        length = struct.pack("<Q", len(event))
        # On a full disk, later events may fit again.
        with suppress(OSError):
            self._file.write(length + _checksum(length) + event + _checksum(event))
            self._file.flush()


# The tags of the fields of Event, Summary, Summary.Value, SummaryMetadata, TensorProto and HParamsPluginData, as
# protocol buffers encode them: the number of the field and the type of its value.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = b"\x09", b"\x10", b"\x1a", b"\x2a", b"\x3a"
_VALUE, _TAG, _SIMPLE_VALUE, _TENSOR, _METADATA = b"\x0a", b"\x0a", b"\x15", b"\x42", b"\x4a"
_PLUGIN, _PLUGIN_NAME, _PLUGIN_CONTENT = b"\x0a", b"\x0a", b"\x12"
_DTYPE, _SHAPE, _STRING_VAL = b"\x08", b"\x12", b"\x42"
_SESSION_START_INFO, _HPARAM, _START_TIME = b"\x1a", b"\x0a", b"\x29"
_KEY, _HPARAM_VALUE, _NUMBER, _STRING, _BOOL = b"\x0a", b"\x12", b"\x11", b"\x1a", b"\x20"
# SessionLog with the status START, and the number of TensorFlow's type string.
_START, _DT_STRING = b"\x08\x01", 7


def _encode(field: bytes, content: bytes) -> bytes:
    return field + _encode_varint(len(content)) + content


def _encode_varint_field(field: bytes, number: int) -> bytes:
    return field + _encode_varint(number)


def _encode_varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _encode_varint(high) if high else bytes([low])


def _encode_summary(values: Sequence[bytes]) -> bytes:
    return _encode(_SUMMARY, b"".join(_encode(_VALUE, value) for value in values))


def _encode_hparams(params: Mapping[str, Any]) -> bytes:
    """Encode a config as a value of the HParams plugin."""
    entries = b"".join(
        _encode(_HPARAM, _encode(_KEY, name.encode()) + _encode(_HPARAM_VALUE, _encode_hparam(value)))
        for name, value in params.items()
    )
    content = _encode(_SESSION_START_INFO, entries + _START_TIME + struct.pack("<d", time.time()))
    plugin = _encode(_PLUGIN, _encode(_PLUGIN_NAME, b"hparams") + _encode(_PLUGIN_CONTENT, content))
    return _encode(_TAG, b"_hparams_/session_start_info") + _encode(_METADATA, plugin)


def _encode_hparam(value: Any) -> bytes:
    if isinstance(value, bool):
        return _encode_varint_field(_BOOL, int(value))
    if isinstance(value, (int, float)):
        return _NUMBER + struct.pack("<d", value)
    return _encode(_STRING, (value if isinstance(value, str) else repr(value)).encode())


def _to_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


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
