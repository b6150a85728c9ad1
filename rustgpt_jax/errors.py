"""How a user's mistake is answered: one sentence that says what, where, and the nearest right answer."""

import difflib
import errno
import reprlib
from collections.abc import Iterable
from typing import Any

from rustgpt_jax.jax_internals import is_out_of_memory_message

MOST_CHARACTERS = 560


class UserError(Exception):
    """A mistake in a config, a command line or a file. Its text is one clear sentence, shown without a traceback.

    The sentence may cite what stands in a damaged file: it is written on one line, and loses its middle if it is long.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(_shortened(_on_one_line(sentence)))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error or its cause is a failed allocation, on the host or on a device."""
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and is_out_of_memory_message(str(error))


def _on_one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    # What is wrong and where stands at the beginning, the right answer at the end.
    end = MOST_CHARACTERS // 3
    return f"{text[: MOST_CHARACTERS - end]} ... {text[-end:]}"


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python refuses to write out an int of thousands of digits.
            return "a number of thousands of digits"


def short_repr(value: Any) -> str:
    """Any value as it would be written in Python, cut short where it is long or deep."""
    return _Repr().repr(value)


def suggest_names(name: str, valid: Iterable[str]) -> str:
    """What to say after a wrong name: the nearest valid one if there is one, and all of them if they are few."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid names: {', '.join(valid)}." if 0 < len(valid) <= 12 else ""
    return hint + listed
