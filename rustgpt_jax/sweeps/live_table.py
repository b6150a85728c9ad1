"""Progress of a sweep: a live table on a terminal; otherwise, one line per finished trial.

The table is built from the sweep's folder alone, so it does not depend on where the trials run.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rustgpt_jax.config.schema import stages
from rustgpt_jax.sweeps.sweep_dir import ENDED, Event, Ledger, SweepDir
from rustgpt_jax.sweeps.trials import Trial, describe_overrides
from rustgpt_jax.tracking.console import format_duration, print_line, replace_control_characters
from rustgpt_jax.tracking.metric_writer import last_metrics

POLL_SECONDS = 1.0
MAX_ROWS = 12


class LiveTable:
    """A live display of a sweep's trials, for use in a `with` block."""

    def __init__(self, console: Console, folder: SweepDir, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._folder, self._clock = console, folder, clock
        # Shared by the threads that poll, draw and add trials.
        self._ledger, self._lock = Ledger(folder.ledger_file), threading.RLock()
        self._trials: dict[str, Trial] = {}
        # The time of the last reported end of each trial.
        self._reported: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._losses: dict[str, float] = {}
        self._start_time, self._initial_steps = clock(), 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=4) if is_live else None

    def add(self, trials: Sequence[Trial]) -> None:
        """Add trials. Those that have already finished are not reported."""
        with self._lock:
            new = {trial.id: trial for trial in trials if trial.id not in self._trials}
            self._trials |= new
            for name, event in self._states().items():
                if name in new and event["event"] in ENDED:
                    self._read(name, event)
                    self._reported[name] = event["time"]
            self._poll()
            self._initial_steps, self._start_time = sum(self._steps.values()), self._clock()

    def __enter__(self) -> "LiveTable":
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._poll()
        if self._live:
            self._live.stop()

    def message(self, text: str) -> None:
        """Print a message above the table."""
        print_line(self._console, text)

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        """Read the progress of each trial, and report those that have finished since the last call."""
        with self._lock:
            for name, event in self._states().items():
                # A failed trial may be started again.
                if event["event"] == "planned" or self._reported.get(name) == event["time"]:
                    continue
                self._read(name, event)
                if event["event"] in ENDED:
                    self._reported[name] = event["time"]
                    if not self._live:
                        what = event["event"] + (f" ({event['error']})" if "error" in event else "")
                        loss = f"  loss {self._losses[name]:.4f}" if name in self._losses else ""
                        knobs = describe_overrides(self._trials[name].overrides)
                        self.message(f"{name} {what}{loss}  {knobs}  [{self._summary()}]")

    def _read(self, name: str, event: Event) -> None:
        last = last_metrics(self._folder.trial(name).path)
        self._steps[name] = max(int(last.get("step", 0)), int(event.get("step", 0)))
        loss = last.get("valid/loss", last.get("train/loss"))
        if loss is not None:
            self._losses[name] = loss

    def _states(self) -> dict[str, Event]:
        return {name: event for name, event in self._ledger.states().items() if name in self._trials}

    def _summary(self) -> str:
        state_of = {name: event["event"] for name, event in self._states().items()}
        states = list(state_of.values())
        parts = [f"{sum(state in ENDED for state in states)}/{len(self._trials)} done"]
        parts += [f"{states.count(state)} {state}" for state in ("failed", "diverged", "pruned") if state in states]
        running = states.count("began")
        parts += [f"{running} running"] if running else []
        done, elapsed = sum(self._steps.values()) - self._initial_steps, self._clock() - self._start_time
        if done > 0 and elapsed > 0:
            total_steps = {name: stages(trial.config)[-1].end_step for name, trial in self._trials.items()}
            average = sum(total_steps.values()) / len(total_steps)
            parts.append(f"{3600 * done / elapsed / average:,.0f} trials/hour")
            unfinished = [name for name in total_steps if state_of.get(name) not in ENDED]
            if (left := sum(total_steps[name] - self._steps.get(name, 0) for name in unfinished)) > 0:
                parts.append(f"{format_duration(round(left * elapsed / done))} left")
        return ", ".join(parts)

    def table(self) -> RenderableType:
        """Return a table of the running trials, the best one, and the progress of the sweep."""
        with self._lock:
            states = self._states()
            finished = [name for name, event in states.items() if event["event"] == "finished"]
            measured = [name for name in finished if math.isfinite(self._losses.get(name, math.inf))]
            best = min(measured, key=lambda name: self._losses[name], default=None)
            running = [name for name, event in states.items() if event["event"] == "began"]
            table = Table(box=None, pad_edge=False)
            for column in ("trial", "", "step", "loss"):
                table.add_column(column, no_wrap=True)
            # Only this column is truncated on a narrow terminal.
            table.add_column("knobs")
            for name in running[:MAX_ROWS]:
                table.add_row(*self._row(name))
            if len(running) > MAX_ROWS:
                table.add_row(f"and {len(running) - MAX_ROWS} more")
            if best is not None:
                table.add_row(*self._row(best, "best so far"), style="bold green")
            return Group(Text(self._summary(), style="bold"), table)

    def _row(self, name: str, what: str = "") -> tuple[RenderableType, ...]:
        trial, step = self._trials[name], self._steps.get(name, 0)
        total = stages(trial.config)[-1].end_step
        bar = Text(what) if what else ProgressBar(total=total, completed=step, width=16)
        loss = f"{self._losses[name]:.4f}" if name in self._losses else ""
        knobs = Text(replace_control_characters(describe_overrides(trial.overrides)), no_wrap=True, overflow="ellipsis")
        return name, bar, f"{step}/{total}", loss, knobs
