"""`--profile=START:STOP`: a trace of some steps of a run, as the profiler of JAX writes it."""

from pathlib import Path
from typing import NamedTuple

import jax

from rustgpt_jax.errors import UserError


class Span(NamedTuple):
    """The steps after `start`, up to `stop`."""

    start: int
    stop: int


def parse_span(text: str, total_steps: int) -> Span:
    """START:STOP as a span of a run of so many steps. Raises UserError if it is none."""
    start, colon, stop = text.partition(":")
    if not colon or not (start.isdecimal() and stop.isdecimal()):
        raise UserError(f"--profile={text}: give the steps as START:STOP, such as --profile=10:15.")
    if not int(start) < int(stop) <= total_steps:
        raise UserError(f"--profile={text}: the run has steps up to {total_steps}, and START lies before STOP.")
    return Span(int(start), int(stop))


class Profile:
    """Traces a span of steps into a folder. The device is to be done with the steps before when it is called."""

    def __init__(self, steps: Span, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self._is_on = False

    def begins(self, step: int) -> bool:
        """Start the trace if it begins at this step. Whether it did."""
        if self._is_on or step != self.steps.start:
            return False
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
        self._is_on = True
        return True

    def ends(self, step: int) -> bool:
        """Write the trace if it ends at this step. Whether it did."""
        if not self._is_on or step != self.steps.stop:
            return False
        jax.profiler.stop_trace()
        self._is_on = False
        return True
