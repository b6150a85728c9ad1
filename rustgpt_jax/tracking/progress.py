"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from rustgpt_jax.tracking.formatting import format_duration, replace_control_characters

SECONDS_BETWEEN_LINES = 5.0
# Long enough to average over evaluations, short enough to notice a stage with another speed.
UPDATES_IN_PACE = 50

# What a plain line shows, and what is shown beside the bar, where a narrow terminal cuts off the last.
LINE_ORDER = ("step", "stage", "loss", "speed", "share", "left")
BAR_ORDER = ("stage", "step", "evaluation", "loss", "left", "speed", "share")


@dataclass(frozen=True)
class _Status:
    """The latest update. Replaced as a whole, because the thread that draws reads it."""

    step: int
    stage: str
    values: Mapping[str, float]
    time: float
    seconds_left: float | None


class Progress:
    """Shows the progress of training. Use it in a `with` statement.

    Args:
        console: Where to show it: a bar on a terminal, a line every few seconds elsewhere.
        total_steps: The number of steps of the run.
        clock: Returns seconds since any fixed time.
    """

    def __init__(self, console: Console, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._total_steps = total_steps
        self._clock = clock
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=UPDATES_IN_PACE)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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

    def evaluating(self, done: int, total: int) -> None:
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
        """Print a text without interpreting markup, above the progress bar."""
        self._console.print(Text(replace_control_characters(text)), soft_wrap=True)

    def _seconds_left(self) -> float | None:
        # Count from the first update on: the time before it was mostly compilation.
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
    """Show on a terminal that some work is in progress."""
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
    """Measures what the time before the first step of a run was spent on."""

    def __init__(self, first: str) -> None:
        self._laps = [(first, _age())]
        self._last = time.perf_counter()
        self._is_over = False

    def lap(self, name: str) -> None:
        """Name the time since the last lap."""
        now = time.perf_counter()
        self._laps.append((name, now - self._last))
        self._last = now

    def finish(self, name: str) -> str | None:
        """End the last lap and return all: '3.1s: Python and packages 1.2s, the data 0.4s'; None the second time."""
        if self._is_over:
            return None
        self._is_over = True
        self.lap(name)
        total = sum(seconds for _, seconds in self._laps)
        laps = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in self._laps)
        return f"{format_duration(total)}: {laps}"


def _age() -> float:
    """Return the seconds since this process started, or 0 if they are unknown."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
