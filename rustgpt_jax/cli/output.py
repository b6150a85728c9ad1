"""The result of a verb: its exit status and, with `--json`, one JSON document on standard output.

With `--json`, everything else that the process, its libraries and its child processes print goes to standard error.
docs/reference/json.md describes the document. The folder schemas has its JSON Schema, document.json, and one file for
the result of each verb.
"""

import fcntl
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA_VERSION = 1
INTERRUPTED = 130
SCHEMAS = Path(__file__).parent / "schemas"


class VerbResult(NamedTuple):
    """What a verb returns.

    Attributes:
        status: The exit status.
        document: The `result` of the JSON document. Its values may be anything that `to_json` converts.
    """

    status: int
    document: dict[str, Any]


def load_schema(verb: str) -> dict[str, Any]:
    """Return the JSON Schema of the document of a verb."""
    schema, result = (json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8")) for name in ("document", verb))
    schema["title"] = f"The document of {verb} --json"
    schema["properties"]["verb"] = {"description": "The verb.", "const": verb}
    schema["$defs"]["result"] = result
    return schema


def to_json(value: Any) -> Any:
    """Convert a value to one that JSON has.

    JSON has no non-finite numbers: as in metrics.jsonl, they become the strings "NaN", "Infinity" and "-Infinity".
    Paths become strings, and arrays of no axes numbers.

    Raises:
        TypeError: JSON cannot represent the value.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if math.isfinite(value):
                return float(value)
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case os.PathLike():
            return os.fsdecode(value)
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
    if getattr(value, "shape", None) == ():
        return to_json(value.item())
    raise TypeError(f"A JSON document cannot hold {value!r}.")


class DocumentWriter:
    """Writes the document of this process, if `--json` asks for one."""

    def __init__(self) -> None:
        self._verb: str | None = None
        self._is_requested = False
        self._descriptor = 1

    def configure(self, verb: str | None, is_requested: bool) -> None:
        """Set the verb, None if it is unknown, and whether the user asked for a document."""
        self._verb, self._is_requested = verb, is_requested

    @property
    def is_requested(self) -> bool:
        """True if a document is to be written."""
        return self._is_requested

    def cancel(self) -> None:
        """Write no document: another process of the run writes it."""
        self._is_requested = False

    def redirect_text(self) -> None:
        """Send text to standard error from here on, if a document is to be written.

        The file descriptor is redirected, so that libraries and child processes follow.
        """
        if self._is_requested and self._descriptor == 1:
            if sys.stdout is None:
                # Standard output is closed, so there is nowhere to write the document.
                raise SystemExit(2)
            sys.stdout.flush()
            # Child processes do not inherit this descriptor, which must not take the place of a closed stream.
            self._descriptor = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
            try:
                os.fstat(2)
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                if null != 2:
                    os.close(null)
            os.dup2(2, 1)
            # A stream that was opened for a file asks for its position, which a terminal or a pipe does not have.
            sys.stdout = open(1, "w", encoding=sys.stdout.encoding, buffering=1, closefd=False)

    def write_result(self, result: VerbResult) -> None:
        """Write the document of a verb that has a result, whatever its exit status."""
        self._write(result.status, result=to_json(result.document))

    def write_error(self, message: str, status: int) -> None:
        """Write the document of a verb that ends without a result."""
        self._write(status, error=message)

    def _write(self, status: int, **content: Any) -> None:
        if not self._is_requested or sys.stdout is None:
            return
        # One document per process, even if an error follows.
        self._is_requested = False
        document = {"schema_version": SCHEMA_VERSION, "verb": self._verb, "status": status, **content}
        line = memoryview(json.dumps(document, allow_nan=False).encode() + b"\n")
        sys.stdout.flush()
        while line:
            line = line[os.write(self._descriptor, line) :]


# The document of this process.
DOCUMENT = DocumentWriter()
