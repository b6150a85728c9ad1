"""The console used by all commands, which prints strings literally."""

from typing import Any

from rich.console import Console
from rich.text import Text

from rustgpt_jax.tracking.formatting import printable


class PlainTextConsole(Console):
    """A console that does not interpret markup or emoji codes, and shows control characters as U+FFFD.

    Run names, prompts, knob values and file names may contain arbitrary text, so strings are never parsed as markup. To
    style output, pass `style` or a `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as an argument of `print` or a table cell, to literal text."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})
