"""User errors: one sentence that states what is wrong, where, and the nearest valid alternative."""

import difflib
import errno
import os
import reprlib
import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from rustgpt_jax.jax_internals import is_out_of_memory_message

# Maximum length of an error message.
MAX_CHARACTERS = 560
PROGRAM_VARIABLE = "RUSTGPT_JAX_PROGRAM"


class UserError(Exception):
    """A mistake in a config, a command line or a file, shown as one sentence without a traceback.

    The message may quote a damaged file, so control characters are escaped and the middle of a long message is cut.
    """

    def __init__(self, message: str) -> None:
        message = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        if len(message) > MAX_CHARACTERS:
            # The problem is at the beginning of a message, the remedy at its end.
            n_last = MAX_CHARACTERS // 3
            message = f"{message[: MAX_CHARACTERS - n_last]} ... {message[-n_last:]}"
        super().__init__(message)


def program_name() -> str:
    """Return how the command line was started, for messages that suggest a command.

    This is `python launch.py` in a checkout, or `python -m rustgpt_jax`; else `rustgpt`, also in other programs. In a
    child process it is the name in the parent, which sets $RUSTGPT_JAX_PROGRAM.
    """
    if given := os.environ.get(PROGRAM_VARIABLE):
        return given
    *_, folder, name = ("", *PurePath(sys.argv[0]).parts)[-2:] if sys.argv[0] else ("", "")
    if name == "launch.py":
        return "python launch.py"
    return "python -m rustgpt_jax" if (folder, name) == ("rustgpt_jax", "__main__.py") else "rustgpt"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error or its cause is a failed allocation, on the host or on a device."""
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and is_out_of_memory_message(str(error))


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python does not format integers with thousands of digits.
            return "a number with thousands of digits"


def short_repr(value: Any) -> str:
    """Return the `repr` of a value, abbreviated if it is long or deeply nested."""
    return _Repr().repr(value)


def suggest_names(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest valid name, and all valid names if there are few."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid names: {', '.join(valid)}." if 0 < len(valid) <= 12 else ""
    return hint + listed
