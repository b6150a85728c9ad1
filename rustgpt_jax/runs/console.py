"""The console of every verb, on which any text is shown as it stands."""

from typing import Any

from rich.console import Console
from rich.text import Text

from rustgpt_jax.runs.formatting import printable


class PlainTextConsole(Console):
    """A console that reads no markup and no emoji codes in strings, and shows control characters as U+FFFD.

    Names of runs, prompts, values of knobs and file names may hold any text, so no string is markup. What is to be
    styled is given a `style`, or is a `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as an argument of `print` or a cell of a table, to text."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})
