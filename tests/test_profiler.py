"""What training tells of its own time: where the seconds before the first step went, and a trace of some steps."""

import gzip
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_loop import assert_same_bits, metrics, stored_state, tiny

from rustgpt_jax.errors import UserError
from rustgpt_jax.tracking.console import StartupTimer
from rustgpt_jax.training import run_training
from rustgpt_jax.training.hooks import parse_span

pytestmark = pytest.mark.usefixtures("quick_compilation")


def train(path: Path, monkeypatch: pytest.MonkeyPatch, profile: str | None) -> str:
    monkeypatch.setattr(run_training, "draw_loss_curves", lambda folder: folder)
    console = Console(file=StringIO(), width=200)
    assert run_training.train(tiny(**{"training.steps": 8}), path, {}, console, profile=profile) == 0
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_trace_has_these_steps_and_changes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = train(tmp_path / "traced", monkeypatch, "3:5")
    assert "Tracing steps 4 to 5." in said and "The trace is in" in said
    (trace,) = (tmp_path / "traced" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    calls = [event for event in events if "train_steps" in str(event.get("name"))]
    assert calls
    train(tmp_path / "plain", monkeypatch, None)
    config = tiny(**{"training.steps": 8})
    assert_same_bits(stored_state(config, tmp_path / "traced"), stored_state(config, tmp_path / "plain"))
    assert metrics(tmp_path / "traced") == metrics(tmp_path / "plain")


def test_a_trace_may_end_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The trace is in" in train(tmp_path / "traced", monkeypatch, "7:8")


def test_the_seconds_before_the_first_step_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = train(tmp_path / "run", monkeypatch, None)
    (told,) = re.findall("The first step began after (.*)", said)
    assert [re.sub(r" [0-9][0-9a-z.]*$", "", part) for part in told.rstrip(".").split(": ", 1)[1].split(", ")] == [
        "Python and packages",
        "the data",
        "the folder",
        "the first state",
        "compiling",
    ]


def test_laps_add_up_and_are_told_once() -> None:
    laps = StartupTimer("first")
    laps.lap("second")
    assert re.fullmatch(r"\S+: first \S+, second \S+, third \S+", laps.finish("third") or "")
    assert laps.finish("fourth") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "give the steps as START:STOP"),
        ("a:b", "give the steps as START:STOP"),
        ("5:5", "START has to be less than STOP"),
        ("5:11", "the run has steps up to 10"),
    ],
)
def test_what_is_no_span_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_span(text, 10)
    assert parse_span("9:10", 10) == (9, 10)
