"""What the compiler warns of, such as arrays that it can lay out as asked only by gathering them whole."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

_LOGGED = re.compile(r"^[WEF]\d{4} [\d:.]+\s+\d+ ([\w.]+):\d+\] (.*)$")
# What it says of itself after that.
_APOLOGY = " As the last resort"


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A `with` block whose warnings are in the list afterwards.

    The compiler is not Python and writes to the process's standard error stream, which nobody else hears meanwhile.
    """
    warnings: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield warnings
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            warnings += warnings_in(file.read().decode(errors="replace"))


def warnings_in(log: str) -> list[str]:
    """The warnings and errors in a log, each once, but for those of a slow machine."""
    found = (_LOGGED.match(line) for line in log.splitlines())
    told = (line[2].split(_APOLOGY)[0] for line in found if line and line[1] != "slow_operation_alarm.cc")
    return list(dict.fromkeys(told))
