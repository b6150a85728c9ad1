"""Human-readable numbers: 1.23M parameters, 4.5 GB, 2m03s."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

_COUNT_UNITS = ("", "K", "M", "B", "T")
_BYTE_UNITS = (" B", " kB", " MB", " GB", " TB", " PB")

# A model may write any byte, and so may a file; none may reach a terminal as a command.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def format_count(number: float) -> str:
    """A number of things in three significant digits: 999, 1.23M (10^6), 8.03B (10^9), 2.52e+20."""
    return _scaled(number, _COUNT_UNITS) if number < 1e15 else f"{number:.3g}"


def format_bytes(number: float) -> str:
    """A number of bytes in three significant digits and decimal units: 512 B, 4.5 GB (10^9 bytes)."""
    return _scaled(number, _BYTE_UNITS)


def format_duration(seconds: float) -> str:
    """A time span by its two largest units: 0.4s, 45s, 2m03s, 5h07m, 3d04h."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def replace_control_characters(text: str) -> str:
    """A text with U+FFFD for each control character but tabs and line breaks."""
    return _CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    # Round before comparing: 999,999 is 1M, not 1000K.
    while float(f"{number:.3g}") >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
    return digits + units[power]


# The console used by all commands, which prints strings literally.


class PlainTextConsole(Console):
    """A console that does not interpret markup or emoji codes, and shows control characters as U+FFFD.

    Run names, prompts, knob values and file names may contain arbitrary text, so strings are never parsed as markup. To
    style output, pass `style` or a `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as an argument of `print` or a table cell, to literal text."""
        return super().render_str(replace_control_characters(text), **{**options, "markup": False, "emoji": False})


def print_line(console: Console, text: str) -> None:
    """Print a text literally, without wrapping or highlighting."""
    console.print(Text(replace_control_characters(text)), soft_wrap=True)
