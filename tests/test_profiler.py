"""The profile of a run: the times of startup, and the trace of some steps."""

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

pytestmark = pytest.mark.usefixtures("quick_codegen")


def train(path: Path, profile: str | None = None, n_steps: int = 8) -> str:
    """Train a run and return what it printed."""
    console = Console(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder)
        assert run_training.train(tiny(**{"training.steps": n_steps}), path, {}, console, profile=profile) == 0
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.long
def test_profile_traces_the_given_steps_and_changes_no_result(tmp_path: Path) -> None:
    printed = train(tmp_path / "traced", "3:5")
    assert "Tracing steps 4 to 5." in printed and "The trace is in" in printed
    (trace,) = (tmp_path / "traced" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("train_steps" in str(event.get("name")) for event in events)
    # The startup times of a run without a profile.
    (startup,) = re.findall("The first step began after (.*)", train(tmp_path / "plain"))
    phases = [re.sub(r" [0-9][0-9a-z.]*$", "", part) for part in startup.rstrip(".").split(": ", 1)[1].split(", ")]
    assert phases == ["Python and packages", "the data", "the folder", "the first state", "compiling"]
    config = tiny(**{"training.steps": 8})
    assert_same_bits(stored_state(config, tmp_path / "traced"), stored_state(config, tmp_path / "plain"))
    assert metrics(tmp_path / "traced") == metrics(tmp_path / "plain")


@pytest.mark.long
def test_profile_may_end_with_the_run(tmp_path: Path) -> None:
    assert "The trace is in" in train(tmp_path / "traced", "1:2", n_steps=2)


def test_startup_timer_reports_its_phases_once() -> None:
    timer = StartupTimer("first")
    timer.lap("second")
    assert re.fullmatch(r"\S+: first \S+, second \S+, third \S+", timer.finish("third") or "")
    assert timer.finish("fourth") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "give the steps as START:STOP"),
        ("a:b", "give the steps as START:STOP"),
        ("5:5", "START has to be less than STOP"),
        ("5:11", "the run has 10 steps"),
    ],
)
def test_profile_refuses_invalid_steps(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_training.StepTracer(text, 10, Path())
