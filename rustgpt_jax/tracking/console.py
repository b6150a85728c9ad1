"""Console output: number formats, a console without markup, and progress bars."""

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

# Control characters in generated text or file names could send commands to a terminal.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

SECONDS_BETWEEN_LINES = 5.0
# The number of updates to estimate the speed from: enough to average over evaluations, but few enough to adapt to the
# speed of a new stage.
UPDATES_FOR_SPEED = 50

# The parts of a plain line, and of the text next to the bar, whose end a narrow terminal cuts off.
LINE_ORDER = ("step", "stage", "loss", "speed", "share", "left")
BAR_ORDER = ("stage", "step", "evaluation", "loss", "left", "speed", "share")


def format_count(number: float) -> str:
    """Format a count with three significant digits: 999, 1.23M, 8.03B, 2.52e+20."""
    return _format_scaled(number, ("", "K", "M", "B", "T")) if number < 1e15 else f"{number:.3g}"


def format_bytes(number: float) -> str:
    """Format a number of bytes with three significant digits and decimal units: 512 B, 4.5 GB."""
    return _format_scaled(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _format_scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    # Round before comparing: 999,999 is 1M, not 1000K.
    while float(f"{number:.3g}") >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
    return digits + units[power]


def format_duration(seconds: float) -> str:
    """Format a duration with its two largest units: 0.4s, 45s, 2m03s, 5h07m, 3d04h."""
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
    """Replace all control characters but tabs and line breaks by U+FFFD."""
    return _CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)


class PlainTextConsole(Console):
    """The console of all commands: it does not interpret markup or emoji codes, and replaces control characters.

    Run names, prompts, values and file names may contain arbitrary text. To style output, pass `style` or a `Text`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as an argument of `print` or a table cell, to literal text."""
        return super().render_str(replace_control_characters(text), **{**options, "markup": False, "emoji": False})


def print_line(console: Console, text: str) -> None:
    """Print text literally, without wrapping or highlighting."""
    console.print(Text(replace_control_characters(text)), soft_wrap=True)


@dataclass(frozen=True)
class _Status:
    """The latest update. It is immutable because the drawing thread reads it."""

    step: int
    stage: str
    values: Mapping[str, float]
    time: float
    seconds_left: float | None


class Progress:
    """Shows the progress of training. Use it in a `with` statement.

    Args:
        console: The console: on a terminal, progress is shown as a bar; otherwise, as a line every few seconds.
        total_steps: The number of steps of the run.
        clock: A function that returns the time in seconds, since any fixed time.
    """

    def __init__(self, console: Console, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._total_steps = total_steps
        self._clock = clock
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=UPDATES_FOR_SPEED)
        self._status: _Status | None = None
        self._printed: _Status | None = None
        self._evaluation = ""
        self._evaluation_printed: float | None = None
        self._bar: RichProgress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = RichProgress(BarColumn(), _StatusColumn(self._describe), console=console)
            self._task = self._bar.add_task("", total=total_steps)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._status is not self._printed:
            self._print_line()

    def update(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Show that `step` steps of the run are done.

        Args:
            step: The number of steps that are done.
            values: Metrics. 'train/loss', 'train/tokens_per_second' and 'train/flops_share' (0 to 1) are shown.
            stage: The name of the current stage.
        """
        now = self._clock()
        self._recent.append((now, step))
        self._status = _Status(step, stage, values, now, self._seconds_left())
        if self._bar:
            self._bar.update(self._task, completed=step)
        elif self._is_line_due():
            self._print_line()

    def update_evaluation(self, done: int, total: int) -> None:
        """Show that `done` of the `total` batches of an evaluation are done, until all are."""
        now = self._clock()
        if done == total:
            self._evaluation, self._evaluation_printed = "", None
            return
        self._evaluation = f"evaluating, batch {done:,} of {total:,}"
        if self._evaluation_printed is None:
            self._evaluation_printed = now
        elif not self._bar and now - self._evaluation_printed >= SECONDS_BETWEEN_LINES:
            self._evaluation_printed = now
            self.message(self._evaluation)

    def message(self, text: str) -> None:
        """Print text above the progress bar without interpreting markup."""
        print_line(self._console, text)

    def _seconds_left(self) -> float | None:
        # Measure from the first update on, since the time before it was mostly spent on compilation.
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._total_steps - last_step)

    def _is_line_due(self) -> bool:
        status, printed = self._status, self._printed
        if status is None or printed is None or status.stage != printed.stage or status.step >= self._total_steps:
            return True
        return status.time - printed.time >= SECONDS_BETWEEN_LINES

    def _print_line(self) -> None:
        if self._status:
            parts = _parts(self._status, self._status.seconds_left, self._total_steps)
            self.message("step " + "  ".join(parts[name] for name in LINE_ORDER if name in parts))
        self._printed = self._status

    def _describe(self) -> str:
        status = self._status
        if status is None:
            return (
                self._evaluation or f"waiting for the first step, {format_duration(int(self._clock() - self._started))}"
            )
        left = status.seconds_left
        if left is not None:
            left = max(0.0, left - (self._clock() - status.time))
        parts = _parts(status, left, self._total_steps)
        if self._evaluation:
            parts["evaluation"] = self._evaluation
        return "  ".join(parts[name].strip() for name in BAR_ORDER if name in parts)


class _StatusColumn(ProgressColumn):
    """A column on one line whose text is computed each time the bar is drawn."""

    def __init__(self, get_text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._get_text = get_text

    def render(self, task: Task) -> Text:
        return Text(self._get_text(), no_wrap=True, overflow="ellipsis")


def _parts(status: _Status, seconds_left: float | None, total_steps: int) -> dict[str, str]:
    values = status.values
    parts = {
        "step": f"{status.step:>{len(str(total_steps))}}/{total_steps}",
        "stage": replace_control_characters(status.stage),
    }
    if "train/loss" in values:
        parts["loss"] = f"loss {values['train/loss']:.4f}"
    if "train/tokens_per_second" in values:
        parts["speed"] = f"{values['train/tokens_per_second']:,.0f} tokens/s"
    if "train/flops_share" in values:
        parts["share"] = f"{values['train/flops_share']:.0%} of peak"
    if seconds_left is not None and status.step < total_steps:
        parts["left"] = f"{format_duration(round(seconds_left))} left"
    return parts


@contextmanager
def show_spinner(console: Console, what: str) -> Iterator[None]:
    """Show a spinner with text while the `with` block runs, if the output is a terminal."""
    with console.status(Text(what)) if console.is_terminal else nullcontext():
        yield


@contextmanager
def show_progress(console: Console, what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show progress; yields a callback that takes the number of items done and the total.

    On a terminal this is a progress bar. Elsewhere a line is printed every few seconds, and nothing for shorter work.
    """
    if not console.is_terminal:
        yield _Lines(console, what)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with RichProgress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)


class _Lines:
    """Prints progress lines at limited frequency."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what, self._printed = console, what, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            share = f" of {total:,} ({done / total:.0%})" if total else ""
            self._console.print(f"{self._what}: {done:,}{share}", highlight=False, soft_wrap=True)


class StartupTimer:
    """Measures how the time before the first step of a run is spent."""

    def __init__(self, first: str) -> None:
        self._laps = [(first, process_age() or 0.0)]
        self._last = time.perf_counter()
        self._is_finished = False

    def lap(self, name: str) -> None:
        """Record the time since the last lap under a name."""
        now = time.perf_counter()
        self._laps.append((name, now - self._last))
        self._last = now

    def finish(self, name: str) -> str | None:
        """End the last lap. Returns a summary such as '3.1s: the data 0.4s, ...', or None if already finished."""
        if self._is_finished:
            return None
        self._is_finished = True
        self.lap(name)
        total = sum(seconds for _, seconds in self._laps)
        laps = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in self._laps)
        return f"{format_duration(total)}: {laps}"


def process_age(process: int | str = "self") -> float | None:
    """Return the seconds since a process started, by default this one, or None if it does not exist or is unknown."""
    try:
        # The program's name, in parentheses, may contain spaces.
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return None
