"""The log messages that a command shows: `--verbosity`, and errors that a library logs before it raises them."""

import logging
import threading

from absl import logging as absl_logging
from absl.flags import FLAGS

# The values of --verbosity, which may also be absl's numbers.
LEVELS = {"debug": 1, "info": 0, "warning": -1, "error": -2, "fatal": -3}
# A library raises an error that it has logged, at its next call. After this time the message is shown in any case.
SECONDS_HELD = 30.0


def set_default_verbosity() -> None:
    """Show warnings and errors unless `--verbosity` is given; absl.app would show all messages."""
    if FLAGS["verbosity"].using_default_value:
        absl_logging.set_verbosity(LEVELS["warning"])


class HeldErrors:
    """Holds the log messages with a traceback while a command runs, because libraries also raise most of these errors.

    If the command ends with a sentence about the error, the traceback would only repeat it. The messages are shown if
    the command ends otherwise, or continues for long.
    """

    def __init__(self, handler: logging.Handler, seconds: float = SECONDS_HELD) -> None:
        self._handler = handler
        self._records, self._lock = list[logging.LogRecord](), threading.Lock()
        self._timer = threading.Timer(seconds, self.release)
        self._timer.daemon = True
        handler.addFilter(self._show)

    def _show(self, record: logging.LogRecord) -> bool:
        """Return whether to show a record immediately."""
        if not record.exc_info:
            return True
        with self._lock:
            self._records.append(record)
            if len(self._records) == 1:
                self._timer.start()
        return False

    def release(self) -> None:
        """Show the messages, and do not hold any more."""
        self._timer.cancel()
        self._handler.removeFilter(self._show)
        with self._lock:
            records, self._records = self._records, []
        for record in records:
            self._handler.handle(record)
