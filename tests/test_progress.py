"""Progress: a bar that fits any terminal, sparse plain lines elsewhere, and human-readable numbers."""

import io
import re

import pytest
from rich.console import Console

from rustgpt_jax.tracking import console
from rustgpt_jax.tracking.console import Progress, format_bytes, format_count, format_duration

VALUES = {"train/loss": 2.31407, "train/tokens_per_second": 41200.4, "train/flops_share": 0.123}


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A console that writes to memory."""

    def __init__(self, terminal: bool = False, width: int = 80) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, color_system=None)

    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def last_frame(width: int, values: dict[str, float], stage: str = "pretrain", step: int = 200) -> str:
    """Return the content of a terminal after an update at a step of 2000, at 1 s per step."""
    screen, clock = Screen(terminal=True, width=width), Clock()
    with Progress(screen.console, 2000, clock) as progress:
        progress.update(step - 10, values, stage)
        clock.now = 10.0
        progress.update(step, values, stage)
    frames = re.split(r"\r|\n|\x1b\[[0-9;?]*[a-zA-Z]", screen.file.getvalue())
    return next((frame for frame in reversed(frames) if frame.strip()), "")


def test_plain_line_shows_all_values() -> None:
    screen, clock = Screen(), Clock()
    with Progress(screen.console, 2000, clock) as progress:
        progress.update(190, VALUES, "pretrain")
        clock.now = 10.0
        progress.update(200, VALUES, "pretrain")
    assert screen.lines() == [
        "step  190/2000  pretrain  loss 2.3141  41,200 tokens/s  12% of peak",
        "step  200/2000  pretrain  loss 2.3141  41,200 tokens/s  12% of peak  30m00s left",
    ]


def test_unknown_values_are_omitted() -> None:
    screen = Screen()
    with Progress(screen.console, 20) as progress:
        progress.update(5, {}, "train")
    assert screen.lines() == ["step  5/20  train"]


def test_plain_lines_show_first_last_and_new_stages() -> None:
    screen, clock = Screen(), Clock()
    with Progress(screen.console, 30, clock) as progress:
        for step in range(1, 31):
            clock.now = float(step)
            progress.update(step, {}, "pretrain" if step <= 12 else "instruct")
    shown = [int(re.findall(r"step +(\d+)/30", line)[0]) for line in screen.lines()]
    assert shown == [1, 6, 11, 13, 18, 23, 28, 30]


def test_early_stop_shows_the_last_step() -> None:
    screen, clock = Screen(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress(screen.console, 30, clock) as progress:
        progress.update(1, {}, "train")
        progress.update(2, {}, "train")
        raise KeyboardInterrupt
    assert [line.split()[1] for line in screen.lines()] == ["1/30", "2/30"]


def test_time_left_follows_the_recent_speed() -> None:
    screen, clock = Screen(), Clock()
    with Progress(screen.console, 2000, clock) as progress:
        # Resumed at step 1000, after a minute of compilation: 1 s a step, then 0.1 s a step.
        clock.now = 60.0
        for step in range(1010, 1110, 10):
            progress.update(step, {}, "train")
            clock.now += 10.0
        for step in range(1110, 1710, 10):
            progress.update(step, {}, "train")
            clock.now += 1.0
    assert screen.lines()[1].endswith("16m20s left")
    assert screen.lines()[-1].endswith("30s left")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", ["[red]alarm[/red] :smile: [/]", "https://a.b 'x' 12 " + "long " * 40])
def test_message_is_printed_literally(terminal: bool, text: str) -> None:
    screen = Screen(terminal, width=40)
    with Progress(screen.console, 10) as progress:
        progress.message(text)
    assert text in screen.file.getvalue()


def test_message_has_no_control_characters() -> None:
    screen = Screen()
    with Progress(screen.console, 10) as progress:
        progress.message("a\x1b[31mb\rc\x07\nd\te")
    assert screen.lines() == ["a\ufffd[31mb\ufffdc\ufffd", "d       e"]


def test_wide_terminal_shows_bar_and_all_values() -> None:
    frame = last_frame(140, VALUES)
    assert re.fullmatch(r"━+ +pretrain  200/2000  loss 2.3141  30m00s left  41,200 tokens/s  12% of peak *", frame)


@pytest.mark.parametrize("width", [1, 2, 5, 10, 20, 40, 60, 79, 80, 100, 200])
@pytest.mark.parametrize("stage", ["pretrain", "[bold]odd[/x] \x1b[2J", "a very long name of a stage indeed"])
def test_bar_fits_on_one_line(width: int, stage: str) -> None:
    frame = last_frame(width, VALUES, stage)
    assert len(frame) <= width
    if width >= 60:
        assert "200/2000" in frame and stage.replace("\x1b", "\ufffd") in frame


def test_narrow_terminal_omits_the_least_important_first() -> None:
    assert "12% of peak" in last_frame(100, VALUES) and "━" in last_frame(100, VALUES)
    assert "peak" not in last_frame(60, VALUES) and "left" in last_frame(60, VALUES)
    assert last_frame(40, VALUES).split()[:4] == ["pretrain", "200/2000", "loss", "2.3141"]


def test_show_progress_prints_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out, seconds = io.StringIO(), iter([0.0, 1.0, 5.0, 9.0, 11.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    with console.show_progress(Console(file=out, width=20), "characters encoded") as count_up:
        for done in (10, 1000, 2000, 3000):
            count_up(done, 4000)
    assert out.getvalue() == "characters encoded: 1,000 of 4,000 (25%)\ncharacters encoded: 3,000 of 4,000 (75%)\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (1_234_567, "1.23M"), (999_600, "1M"), (8.03e9, "8.03B"), (5e15, "5e+15")],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (512, "512 B"), (4.5e9, "4.5 GB"), (80e12, "80 TB")])
def test_format_bytes(number: float, text: str) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.42, "0.4s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (123, "2m03s"),
        (3599.7, "1h00m"), (18_420, "5h07m"), (273_600, "3d04h"),
    ],
)  # fmt: skip
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_long_evaluation_shows_its_progress() -> None:
    screen, clock = Screen(), Clock()
    with Progress(screen.console, 10, clock) as shown:
        for done in range(12):
            clock.now = float(done)
            shown.update_evaluation(done, 12)
        shown.update_evaluation(12, 12)
    assert screen.lines() == ["evaluating, batch 5 of 12", "evaluating, batch 10 of 12"]
    screen, clock = Screen(terminal=True), Clock()
    with Progress(screen.console, 10, clock) as shown:
        shown.update(4, {}, "train")
        shown.update_evaluation(3, 12)
    assert "evaluating, batch 3 of 12" in screen.file.getvalue()
    screen = Screen(terminal=True)
    with Progress(screen.console, 10, clock) as shown:
        shown.update_evaluation(3, 12)
        shown.update_evaluation(12, 12)
        shown.update(4, {}, "train")
    assert not screen.lines()[-1].count("evaluating")
