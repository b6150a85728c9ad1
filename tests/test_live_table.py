"""The board of a sweep: what a person sees is what its folder says, on any width of terminal."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tree
from rich.console import Console

from rustgpt_jax.sweeps import live_table as boards
from rustgpt_jax.sweeps.live_table import LiveTable
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trials import Trial, make_trials

STEPS = 100
RATE = "optimizer.learning_rate"


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A sweep folder written by hand: ten trials of 100 steps."""

    def __init__(self, path: Path, n_trials: int = 10) -> None:
        tree = small_tree(**{"training.steps": STEPS})
        overrides = [{RATE: 1e-3 * number, "seed": number} for number in range(1, n_trials + 1)]
        self.trials: list[Trial] = make_trials(tree, overrides)
        self.ids = [trial.id for trial in self.trials]
        self.folder = SweepDir(path)
        self.ledger = Ledger(self.folder.ledger_file)
        self.ledger.append_all([(trial.id, "planned", {"overrides": trial.overrides}) for trial in self.trials])

    def metrics(self, number: int, step: int, loss: float | str, kind: str = "valid/loss") -> None:
        """One more line of a trial's metrics."""
        folder = self.folder.trial(self.ids[number]).path
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "stage": "train", kind: loss}) + "\n")

    def began(self, number: int, step: int = 0) -> None:
        """A trial that runs and has come to a step."""
        self.ledger.append(self.ids[number], "began", step=0)
        if step:
            self.metrics(number, step, 3.0 + number, "train/loss")

    def finished(self, number: int, loss: float | str) -> None:
        """A trial that came to its end with a validation loss."""
        self.metrics(number, STEPS, loss)
        self.ledger.append(self.ids[number], "finished", step=STEPS)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A sweep in which nothing has begun."""
    return Scene(tmp_path)


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The board looks when trials are added and at its end, and at no moment between."""
    monkeypatch.setattr(boards, "POLL_SECONDS", 1000.0)
    yield


def paper(width: int = 200) -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), width=width)


def terminal(width: int) -> Console:
    """A console that is one."""
    return Console(file=io.StringIO(), width=width, height=50, force_terminal=True, color_system=None)


def text(console: Console) -> str:
    """What a console has been told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(board: LiveTable, width: int = 160) -> str:
    """The table as a terminal of a width has it."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(board.table())
    return console.export_text()


# Lines.


def test_each_trial_that_ends_is_told_once(scene: Scene) -> None:
    console = paper()
    with LiveTable(console, scene.folder, Clock()) as board:
        board.add(scene.trials)
        assert text(console) == ""
        scene.began(0, step=10)
        scene.finished(1, 2.5)
        board.add([])
        scene.ledger.append(scene.ids[1], "queued")
        scene.ledger.append(scene.ids[2], "failed", error="no [bold]memory[/bold]", traceback="Traceback ...")
        scene.ledger.append(scene.ids[3], "diverged", step=7)
        scene.ledger.append(scene.ids[4], "pruned", step=50, rung=1)
        scene.ledger.append(scene.ids[5], "stopped", step=20)
    first, *lines = text(console).splitlines()
    assert first.startswith(f"{scene.ids[1]} finished  loss 2.5000  {RATE}=0.002, seed=2  [1/10 done, 1 running")
    assert [line.split("  ")[0] for line in lines] == [
        f"{scene.ids[2]} failed (no [bold]memory[/bold])",
        f"{scene.ids[3]} diverged",
        f"{scene.ids[4]} pruned",
    ]
    assert "[4/10 done, 1 failed, 1 diverged, 1 pruned, 1 running" in lines[-1]


def test_a_line_is_one_line_however_narrow_the_paper(scene: Scene) -> None:
    console = paper(width=40)
    with LiveTable(console, scene.folder, Clock()) as board:
        board.add(scene.trials)
        scene.finished(0, 2.0)
        scene.ledger.append(scene.ids[1], "failed", error="bad \x1b[31mcolours")
    assert text(console).count("\n") == 2
    assert "\x1b" not in text(console)


def test_what_had_ended_before_is_not_told_again_but_counted(scene: Scene) -> None:
    scene.finished(0, 1.25)
    scene.ledger.append(scene.ids[1], "diverged", step=3)
    console = paper()
    with LiveTable(console, scene.folder, Clock()) as board:
        board.add(scene.trials)
        scene.finished(2, 1.5)
    (line,) = text(console).splitlines()
    assert line.startswith(f"{scene.ids[2]} finished") and "[3/10 done, 1 diverged" in line
    # The best of all, not of this launch.
    assert "1.2500" in shown(board) and "1.5000" not in shown(board)


def test_a_trial_that_failed_before_is_told_when_it_ends_anew(scene: Scene) -> None:
    scene.ledger.append(scene.ids[0], "failed", error="no power", traceback="")
    console, clock = paper(), Clock()
    with LiveTable(console, scene.folder, clock) as board:
        board.add(scene.trials)
        clock.now += 3600
        scene.began(0, step=10)
        board.add(scene.trials)
        assert "10/100" in shown(board)
        scene.finished(0, 1.5)
        board.add(scene.trials)
        board.add(scene.trials)
    (line,) = text(console).splitlines()
    assert line.startswith(f"{scene.ids[0]} finished  loss 1.5000")


def test_trials_of_others_are_not_counted(scene: Scene) -> None:
    console = paper()
    with LiveTable(console, scene.folder, Clock()) as board:
        board.add(scene.trials[:4])
        scene.finished(8, 1.0)
        scene.finished(0, 2.0)
    (line,) = text(console).splitlines()
    assert "[1/4 done" in line


def test_a_table_and_no_lines_on_a_terminal(scene: Scene) -> None:
    console = terminal(100)
    with LiveTable(console, scene.folder, Clock()) as board:
        board.add(scene.trials)
        scene.finished(0, 2.0)
        board.message("shape class 1 of 1")
    assert "shape class 1 of 1" in text(console)
    assert f"{scene.ids[0]} finished" not in text(console)
    assert "1/10 done" in text(console)


# Pace.


def test_trials_an_hour_and_the_time_left(scene: Scene) -> None:
    clock = Clock()
    # What was done before this launch says nothing of its pace.
    scene.finished(0, 2.0)
    scene.began(1, step=40)
    with LiveTable(paper(), scene.folder, clock) as board:
        board.add(scene.trials)
        assert "trials/hour" not in shown(board) and "left" not in shown(board)
        clock.now += 600
        scene.metrics(1, 90, 2.5)
        scene.finished(2, 2.1)
    # 50 + 100 steps in 600 s are 15 a minute: 9 trials of 100 steps an hour; 7 trials and 10 steps are left.
    assert "9 trials/hour" in shown(board)
    assert "47m20s left" in shown(board)


def test_a_trial_that_ended_early_leaves_nothing_to_do(scene: Scene) -> None:
    clock = Clock()
    with LiveTable(paper(), scene.folder, clock) as board:
        board.add(scene.trials[:3])
        clock.now += 10
        scene.finished(0, 2.0)
        scene.ledger.append(scene.ids[1], "diverged", step=1)
        scene.ledger.append(scene.ids[2], "failed", error="x", traceback="")
    assert "3/3 done" in shown(board) and "left" not in shown(board)


# The table.


def test_the_best_so_far_has_the_lowest_loss_of_those_that_finished(scene: Scene) -> None:
    with LiveTable(paper(), scene.folder, Clock()) as board:
        board.add(scene.trials)
        for number, loss in enumerate(["NaN", 2.5, 1.5, 1.75]):
            scene.finished(number, loss)
        scene.metrics(5, 50, 0.5)
        scene.ledger.append(scene.ids[5], "diverged", step=60)
        scene.metrics(6, 50, 0.25)
        scene.ledger.append(scene.ids[6], "began", step=0)
    (best,) = [line for line in shown(board).splitlines() if "best so far" in line]
    assert best.split()[0] == scene.ids[2] and "1.5000" in best and f"{STEPS}/{STEPS}" in best


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("n_running", [0, 1, 3, 20])
def test_a_row_is_a_line_at_every_width(width: int, n_running: int, tmp_path: Path) -> None:
    scene, clock = Scene(tmp_path, n_trials=24), Clock()
    with LiveTable(paper(), scene.folder, clock) as board:
        board.add(scene.trials)
        clock.now += 100
        scene.finished(20, 1.5)
        scene.ledger.append(scene.ids[21], "failed", error="x", traceback="")
        scene.ledger.append(scene.ids[22], "diverged", step=1)
        for number in range(n_running):
            scene.began(number, step=50)
    lines = shown(board, width).rstrip("\n").split("\n")
    assert all(len(line) <= width for line in lines)
    running, best = scene.ids[: min(n_running, boards.MAX_ROWS)], scene.ids[20]
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in scene.ids}
    # Ids, steps and losses are never cut; knobs may be.
    assert list(rows) == [*running, best]
    assert all("50/100" in rows[name] and f"{3 + scene.ids.index(name):.4f}" in rows[name] for name in running)
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


def test_a_summary_stands_alone_while_nothing_runs(scene: Scene) -> None:
    with LiveTable(paper(), scene.folder, Clock()) as board:
        board.add(scene.trials)
        for number in range(10):
            scene.ledger.append(scene.ids[number], ("failed", "diverged", "pruned")[number % 3], step=1, error="x")
    lines = [line.rstrip() for line in shown(board, 60).splitlines()]
    assert lines[0] == "10/10 done, 4 failed, 3 diverged, 3 pruned"
    assert [line.split() for line in lines[1:]] == [["trial", "step", "loss", "knobs"]]


def test_a_board_is_read_while_it_is_written(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "POLL_SECONDS", 0.0)
    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    with LiveTable(paper(), scene.folder, Clock()) as board:
        board.add(scene.trials)
        for number in range(10):
            scene.began(number, step=10)
            board.table()
            scene.finished(number, 2.0)
            board.add(scene.trials[:number])
    assert errors == []
    assert "10/10 done" in shown(board)
