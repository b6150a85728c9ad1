"""Where the seconds before the first step of a run went."""

import os
import time
from pathlib import Path

from rustgpt_jax.tracking.formatting import duration


class Laps:
    """Names for the stretches of time since this process began."""

    def __init__(self, first: str) -> None:
        self._laps = [(first, _age())]
        self._last = time.perf_counter()
        self._is_over = False

    def lap(self, name: str) -> None:
        """What was done since the last lap."""
        now = time.perf_counter()
        self._laps.append((name, now - self._last))
        self._last = now

    def finish(self, name: str) -> str | None:
        """The last lap, and all of them: '3.1s: Python and packages 1.2s, the data 0.4s'. None from then on."""
        if self._is_over:
            return None
        self._is_over = True
        self.lap(name)
        total = sum(seconds for _, seconds in self._laps)
        return f"{duration(total)}: {', '.join(f'{name} {duration(seconds)}' for name, seconds in self._laps)}"


def _age() -> float:
    """Seconds since this process was started; since now where the system does not tell."""
    try:
        # The name of the program, in parentheses, may have spaces in it.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
