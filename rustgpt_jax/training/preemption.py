"""Graceful stops: training saves and ends after the first signal; a later SIGINT ends the process at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Users send SIGINT; clusters send the others before they preempt a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED_BY_USER = 130
# "Temporary failure": a job script can requeue a job that ends with this status.
STOPPED_BY_CLUSTER = os.EX_TEMPFAIL


class StopRequest:
    """Context manager that handles signals as requests to stop. It is truthy after a signal.

    Python runs signal handlers only between bytecode instructions of the main thread. A background thread waits for a
    second SIGINT, so that it can end the process while the main thread waits for a long computation.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._earlier_writing = signal.set_wakeup_fd(self._writing)
        threading.Thread(target=_watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._earlier_writing)
        os.close(self._writing)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def signal_number(self) -> int:
        """The number of the first signal, 0 for none."""
        return signal.Signals[self.signal_name].value if self.signal_name else 0

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def exit_status(self) -> int:
        """The exit status of the process; 0 without a request to stop."""
        if self.signal_name is None:
            return 0
        return STOPPED_BY_USER if self.signal_name == "SIGINT" else STOPPED_BY_CLUSTER


def _watch(reading: int) -> None:
    """End the process at a SIGINT after the first signal. Returns when the pipe is closed."""
    is_requested = False
    while numbers := os.read(reading, 1):
        if is_requested and numbers[0] == signal.SIGINT:
            os._exit(STOPPED_BY_USER)
        is_requested = is_requested or numbers[0] in SIGNALS
    os.close(reading)
