"""Stopping politely: the first SIGINT or SIGTERM asks training to save and end, a second SIGINT ends it at once."""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone asked to stop. While its `with` block runs, the signals set `signal_name` instead of killing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name
        # Python runs handlers between its own instructions; only the default action ends a long computation at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signal_name is not None
