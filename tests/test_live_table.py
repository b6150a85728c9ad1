"""The live table of a sweep, at all terminal widths, and its plain lines elsewhere."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tree
from rich.console import Console

from rustgpt_jax.sweeps import live_table
from rustgpt_jax.sweeps.live_table import LiveTable
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trials import Trial, make_trials

STEPS = 100
RATE = "optimizer.learning_rate"


class Clock:
    """A clock set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeSweep:
    """A sweep folder with trials of 100 steps, whose progress is written by hand."""

    def __init__(self, path: Path, n_trials: int = 10) -> None:
        tree = small_tree(**{"training.steps": STEPS})
        overrides = [{RATE: 1e-3 * number, "seed": number} for number in range(1, n_trials + 1)]
        self.trials: list[Trial] = make_trials(tree, overrides)
        self.ids = [trial.id for trial in self.trials]
        self.folder = SweepDir(path)
        self.ledger = Ledger(self.folder.ledger_file)
        self.ledger.append_all([(trial.id, "planned", {"overrides": trial.overrides}) for trial in self.trials])

    def metrics(self, number: int, step: int, loss: float | str, kind: str = "valid/loss") -> None:
        """Append a line of metrics."""
        folder = self.folder.trial(self.ids[number]).path
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "stage": "train", kind: loss}) + "\n")

    def began(self, number: int, step: int = 0) -> None:
        """Start a trial, and let it reach a step."""
        self.ledger.append(self.ids[number], "began", step=0)
        if step:
            self.metrics(number, step, 3.0 + number, "train/loss")

    def finished(self, number: int, loss: float | str) -> None:
        """Finish a trial with a validation loss."""
        self.metrics(number, STEPS, loss)
        self.ledger.append(self.ids[number], "finished", step=STEPS)


@pytest.fixture
def sweep(tmp_path: Path) -> FakeSweep:
    """A sweep that has not started."""
    return FakeSweep(tmp_path)


@pytest.fixture(autouse=True)
def no_polling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Poll only when trials are added and at the end."""
    monkeypatch.setattr(live_table, "POLL_SECONDS", 1000.0)
    yield


def plain_console(width: int = 200) -> Console:
    """Make a console that is not a terminal."""
    return Console(file=io.StringIO(), width=width)


def terminal(width: int) -> Console:
    """Make a console that is a terminal."""
    return Console(file=io.StringIO(), width=width, height=50, force_terminal=True, color_system=None)


def text(console: Console) -> str:
    """Return the output of a console."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(table: LiveTable, width: int = 160) -> str:
    """Return the table at a width."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(table.table())
    return console.export_text()


# Lines.


def test_each_ended_trial_is_reported_once(sweep: FakeSweep) -> None:
    console = plain_console()
    with LiveTable(console, sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        assert text(console) == ""
        sweep.began(0, step=10)
        sweep.finished(1, 2.5)
        table.add([])
        sweep.ledger.append(sweep.ids[1], "queued")
        sweep.ledger.append(sweep.ids[2], "failed", error="no [bold]memory[/bold]", traceback="Traceback ...")
        sweep.ledger.append(sweep.ids[3], "diverged", step=7)
        sweep.ledger.append(sweep.ids[4], "pruned", step=50, rung=1)
        sweep.ledger.append(sweep.ids[5], "stopped", step=20)
    first, *lines = text(console).splitlines()
    assert first.startswith(f"{sweep.ids[1]} finished  loss 2.5000  {RATE}=0.002, seed=2  [1/10 done, 1 running")
    assert [line.split("  ")[0] for line in lines] == [
        f"{sweep.ids[2]} failed (no [bold]memory[/bold])",
        f"{sweep.ids[3]} diverged",
        f"{sweep.ids[4]} pruned",
    ]
    assert "[4/10 done, 1 failed, 1 diverged, 1 pruned, 1 running" in lines[-1]


def test_reports_are_single_lines_on_narrow_output(sweep: FakeSweep) -> None:
    console = plain_console(width=40)
    with LiveTable(console, sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        sweep.finished(0, 2.0)
        sweep.ledger.append(sweep.ids[1], "failed", error="bad \x1b[31mcolors")
    assert text(console).count("\n") == 2
    assert "\x1b" not in text(console)


def test_earlier_ends_are_counted_but_not_reported(sweep: FakeSweep) -> None:
    sweep.finished(0, 1.25)
    sweep.ledger.append(sweep.ids[1], "diverged", step=3)
    console = plain_console()
    with LiveTable(console, sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        sweep.finished(2, 1.5)
    (line,) = text(console).splitlines()
    assert line.startswith(f"{sweep.ids[2]} finished") and "[3/10 done, 1 diverged" in line
    # The best of all, not of this launch.
    assert "1.2500" in shown(table) and "1.5000" not in shown(table)


def test_rerun_trial_is_reported_again(sweep: FakeSweep) -> None:
    sweep.ledger.append(sweep.ids[0], "failed", error="no power", traceback="")
    console, clock = plain_console(), Clock()
    with LiveTable(console, sweep.folder, clock) as table:
        table.add(sweep.trials)
        clock.now += 3600
        sweep.began(0, step=10)
        table.add(sweep.trials)
        assert "10/100" in shown(table)
        sweep.finished(0, 1.5)
        table.add(sweep.trials)
        table.add(sweep.trials)
    (line,) = text(console).splitlines()
    assert line.startswith(f"{sweep.ids[0]} finished  loss 1.5000")


def test_terminal_shows_a_table_instead_of_lines(sweep: FakeSweep) -> None:
    console = terminal(100)
    with LiveTable(console, sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        sweep.finished(0, 2.0)
        table.message("shape class 1 of 1")
    assert "shape class 1 of 1" in text(console)
    assert f"{sweep.ids[0]} finished" not in text(console)
    assert "1/10 done" in text(console)


# Pace.


def test_pace_and_remaining_time(sweep: FakeSweep) -> None:
    clock = Clock()
    # Earlier progress does not count for the pace of this launch.
    sweep.finished(0, 2.0)
    sweep.began(1, step=40)
    with LiveTable(plain_console(), sweep.folder, clock) as table:
        table.add(sweep.trials)
        assert "trials/hour" not in shown(table) and "left" not in shown(table)
        clock.now += 600
        sweep.metrics(1, 90, 2.5)
        sweep.finished(2, 2.1)
    # 50 + 100 steps in 600 s are 15 a minute: 9 trials of 100 steps an hour; 7 trials and 10 steps are left.
    assert "9 trials/hour" in shown(table)
    assert "47m20s left" in shown(table)


# The table.


def test_best_trial_has_the_lowest_final_loss(sweep: FakeSweep) -> None:
    with LiveTable(plain_console(), sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        for number, loss in enumerate(["NaN", 2.5, 1.5, 1.75]):
            sweep.finished(number, loss)
        sweep.metrics(5, 50, 0.5)
        sweep.ledger.append(sweep.ids[5], "diverged", step=60)
        sweep.metrics(6, 50, 0.25)
        sweep.ledger.append(sweep.ids[6], "began", step=0)
    (best,) = [line for line in shown(table).splitlines() if "best so far" in line]
    assert best.split()[0] == sweep.ids[2] and "1.5000" in best and f"{STEPS}/{STEPS}" in best


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("n_running", [0, 1, 3, 20])
def test_rows_are_single_lines_at_all_widths(width: int, n_running: int, tmp_path: Path) -> None:
    sweep, clock = FakeSweep(tmp_path, n_trials=24), Clock()
    with LiveTable(plain_console(), sweep.folder, clock) as table:
        table.add(sweep.trials)
        clock.now += 100
        sweep.finished(20, 1.5)
        sweep.ledger.append(sweep.ids[21], "failed", error="x", traceback="")
        sweep.ledger.append(sweep.ids[22], "diverged", step=1)
        for number in range(n_running):
            sweep.began(number, step=50)
    lines = shown(table, width).rstrip("\n").split("\n")
    assert all(len(line) <= width for line in lines)
    running, best = sweep.ids[: min(n_running, live_table.MAX_ROWS)], sweep.ids[20]
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in sweep.ids}
    # Ids, steps and losses are never cut; knobs may be.
    assert list(rows) == [*running, best]
    assert all("50/100" in rows[name] and f"{3 + sweep.ids.index(name):.4f}" in rows[name] for name in running)
    assert "best so far" in rows[best] and "100/100" in rows[best] and "1.5000" in rows[best]
    assert all(f"{RATE}=0.0"[: width - 60 + 4] in row for row in rows.values())
    # One summary, a head, the rows, and how many are not shown.
    more = ["and 8 more"] if n_running == 20 else []
    assert [line.strip() for line in lines if line.startswith("and")] == more
    head = next(number for number, line in enumerate(lines) if line.startswith("trial "))
    assert len(lines) - head - 1 == len(rows) + len(more)
    summary = " ".join(" ".join(lines[:head]).split())
    assert summary.startswith("3/24 done, 1 failed, 1 diverged")
    assert "trials/hour" in summary and summary.endswith("left")
    assert head == (1 if width >= 100 else head) and head <= 2


def test_table_can_be_drawn_during_updates(sweep: FakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_table, "POLL_SECONDS", 0.0)
    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    with LiveTable(plain_console(), sweep.folder, Clock()) as table:
        table.add(sweep.trials)
        for number in range(10):
            sweep.began(number, step=10)
            table.table()
            sweep.finished(number, 2.0)
            table.add(sweep.trials[:number])
    assert errors == []
    assert "10/10 done" in shown(table)
