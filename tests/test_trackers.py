"""Trackers: they show what metrics.jsonl has, and never slow down or stop training."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import small_tree
from small_runs import SMALL, new_console, run_config

from rustgpt_jax.config.schema import flatten
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce import rerun as rerun_module
from rustgpt_jax.sweeps.sweep import SweepInfo, SweepOptions
from rustgpt_jax.sweeps.sweep_command import SweepArgs, run_sweep
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trials import make_trials
from rustgpt_jax.tracking import trackers
from rustgpt_jax.tracking.console import PlainTextConsole
from rustgpt_jax.tracking.metric_writer import MetricWriter, RunWriter, TrackedRun, read_metrics, select_scalars
from rustgpt_jax.tracking.trackers import check_trackers, open_trackers
from rustgpt_jax.training import run_training, trainer
from rustgpt_jax.workdir.run_dir import load_config

pytestmark = pytest.mark.usefixtures("quick_codegen")

OWN = "test_trackers:Recorder"


class Recorder(MetricWriter):
    """Appends the calls of its methods to a list, by the folder of the run."""

    calls: dict[str, list[tuple[Any, ...]]] = {}
    runs: list[TrackedRun] = []

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.location = run, f"shown as {run.name}"
        self.runs.append(run)
        self.record("open", run.resume_step)

    def record(self, *call: Any) -> None:
        self.calls.setdefault(self.run.name, []).append(call)

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        self.record("scalars", step, dict(scalars))

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        self.record("samples", step, list(samples))

    def write_summary(self, values: Mapping[str, float | str]) -> None:
        self.record("summary", dict(values))

    def write_file(self, file: Path) -> None:
        self.record("file", file.name)

    def rewind(self, step: int) -> None:
        self.record("rewind", step)

    def close(self, status: str) -> None:
        self.record("close", status)


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin without recorded calls."""
    monkeypatch.setattr(Recorder, "calls", {})
    monkeypatch.setattr(Recorder, "runs", [])
    monkeypatch.setattr(trackers, "_timed_out", set())


def scalars(name: str) -> list[tuple[int, dict[str, float]]]:
    """Return the steps and scalars that a run's tracker received, without those that depend on the time."""
    timed = ("train/tokens_per_second", "train/flops_share")
    return [
        (call[1], {name: value for name, value in call[2].items() if name not in timed})
        for call in Recorder.calls[name]
        if call[0] == "scalars"
    ]


def recorded(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the same of a run's metrics.jsonl."""
    timed = ("train/tokens_per_second", "train/flops_share")
    lines = [(line["step"], select_scalars(line)) for line in read_metrics(folder)]
    return [(step, {name: value for name, value in line.items() if name not in timed}) for step, line in lines]


def train(path: Path, **changes: Any) -> str:
    """Train a run of six steps in this process, and return what it printed."""
    console = PlainTextConsole(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        run_training.train(run_config(**changes), path, {}, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def open_one(folder: Path, name: str = OWN, resume_step: int = 0) -> tuple[RunWriter, list[str]]:
    """Return the writer of a run with one tracker, and the list of warnings."""
    warnings: list[str] = []
    folder.mkdir(exist_ok=True)
    opened = open_trackers([name], TrackedRun(folder, resume_step=resume_step), lambda text: None, warnings.append)
    return RunWriter(folder, resume_step, opened), warnings


# A tracker that fails.


class FailsToOpen(Recorder):
    """Fails as a server does that cannot be reached."""

    def __init__(self, run: TrackedRun) -> None:
        raise ConnectionError("no route\nto host")


class FailsToWrite(Recorder):
    """Fails at the third step, by the way that some libraries choose."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        super().write_scalars(step, scalars, wall_time)
        if step == 3:
            raise SystemExit(3)


class FailsToClose(Recorder):
    """Fails at the end."""

    def close(self, status: str) -> None:
        raise RuntimeError("too late")


class Hangs(Recorder):
    """Never answers."""

    def __init__(self, run: TrackedRun) -> None:
        threading.Event().wait()


class IsSlow(Recorder):
    """Writes nothing before it is allowed to."""

    is_allowed = threading.Event()

    def write_scalars(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        self.is_allowed.wait(20)
        super().write_scalars(step, scalars, wall_time)


@pytest.mark.parametrize(
    ("cls", "reason"), [(FailsToOpen, "no route to host"), (FailsToWrite, "3"), (FailsToClose, "too late")]
)
def test_a_failing_tracker_gives_one_warning_and_stops_nothing(tmp_path: Path, cls: type, reason: str) -> None:
    name = f"test_trackers:{cls.__name__}"
    writer, warnings = open_one(tmp_path / "run", name)
    with writer:
        for step in range(1, 6):
            writer.write(step, {"stage": "train", "train/loss": 1.0})
            time.sleep(0.01)
    remark = "gets no more of this run. metrics.jsonl has everything."
    assert warnings == [f"The tracker {name} failed ({reason}), and {remark}"]
    assert len(read_metrics(tmp_path / "run")) == 5
    assert len(scalars("run") if Recorder.calls else []) == {FailsToOpen: 0, FailsToWrite: 3, FailsToClose: 5}[cls]


def test_a_hanging_tracker_delays_neither_steps_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS_AFTER_TIMEOUT", 0.01)
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 50)
    for name, limit in (("first", 0.5), ("second", 0.01)):
        began = time.monotonic()
        writer, warnings = open_one(tmp_path / name, "test_trackers:Hangs")
        with writer:
            for step in range(1, 101):
                writer.write(step, {"stage": "train", "train/loss": 1.0})
            assert time.monotonic() - began < 0.4
            began = time.monotonic()
        assert limit <= time.monotonic() - began < limit + 0.4
        dropping, late = warnings
        assert "is slower than training: with 50 lines waiting, further ones are dropped" in dropping
        assert "is not done after 0.5 seconds, and gets no more of this run" in late
        assert len(read_metrics(tmp_path / name)) == 100


def test_a_slow_tracker_drops_lines_and_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 8)
    monkeypatch.setattr(IsSlow, "is_allowed", threading.Event())
    writer, warnings = open_one(tmp_path / "run", "test_trackers:IsSlow")
    with writer:
        for step in range(1, 101):
            writer.write(step, {"stage": "train", "train/loss": 1.0})
        IsSlow.is_allowed.set()
    n_written = len(scalars("run"))
    assert 8 <= n_written <= 9 and Recorder.calls["run"][-1] == ("close", "finished")
    assert warnings[1:] == [
        f"The tracker test_trackers:IsSlow lacks {100 - n_written} lines of metrics.jsonl, for which it was too slow."
    ]


WRONG = {
    "a typo": ("tensorbord", r"config.logging.trackers: unknown 'tensorbord'. Did you mean 'tensorboard'"),
    "no such class": ("test_trackers:Recoder", r"has no 'Recoder'. Did you mean 'Recorder'"),
    "no class": ("test_trackers:OWN", r"config.logging.trackers='test_trackers:OWN' is not a class of a MetricWriter"),
    "no package": ("wandb", r"needs the package wandb: python -m pip install 'rustgpt_jax\[wandb\]'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_trackers_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, message = WRONG[case]
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **{"logging.trackers": (name,)})
    assert not (tmp_path / "run").exists()
    check_trackers(["tensorboard", OWN])


def test_a_folder_is_not_taken_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("folder_of_wandb") and trackers._is_installed("rich")


# What a tracker receives.


def test_a_tracker_receives_the_whole_run(tmp_path: Path) -> None:
    stages = ({"name": "one", "training": {"steps": 4}}, {"name": "two", "optimizer": {"learning_rate": 0.01}})
    config = {"logging.trackers": (OWN, "tensorboard"), "logging.project": "p", "logging.tags": ("a",)}
    said = train(tmp_path / "run", stages=stages, **config, **{"logging.sample_prompts": ("Why?",)})
    assert f"{OWN}: shown as run" in said
    assert scalars("run") == recorded(tmp_path / "run")
    (run,) = Recorder.runs
    assert (run.name, run.project, run.tags, run.resume_step, run.sweep) == ("run", "p", ("a",), 0, None)
    whole = flatten(load_config(tmp_path / "run"))
    elsewhere = {"logging.trackers", "logging.project", "logging.tags"}
    assert {path: value for path, value in run.params.items() if not path.startswith("stages.")} == {
        path: value for path, value in whole.items() if path not in elsewhere
    }
    assert run.params["stages.two.optimizer.learning_rate"] == 0.01
    other = [call for call in Recorder.calls["run"] if call[0] != "scalars"]
    evaluated = [line for line in read_metrics(tmp_path / "run") if "valid/loss" in line]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [call for call in other if call[0] == "samples"] == [
        ("samples", line["step"], [("Why?", line["text"])]) for line in samples
    ]
    bests = [call[1] for call in other if call[0] == "summary"]
    assert {"best/step": evaluated[0]["step"], "best/loss": evaluated[0]["valid/loss"]}.items() <= bests[0].items()
    assert other[0] == ("open", 0) and other[-1] == ("close", "finished")


def test_lines_have_the_time_and_each_stage_its_hyperparameters(tmp_path: Path) -> None:
    stages = ({"name": "one", "training": {"steps": 3}}, {"name": "two", "optimizer": {"learning_rate": 0.25}})
    began = time.time()
    train(tmp_path / "run", stages=stages, **{"logging.log_every": 2, "optimizer.learning_rate": 0.1})
    lines = read_metrics(tmp_path / "run")
    times = [line["time"] for line in lines]
    assert began - 1 < times[0] and times == sorted(times) and times[-1] < time.time() + 1
    with_hparams = [line for line in lines if "hparams/seed" in line]
    assert [(line["step"], line["hparams/optimizer.learning_rate"]) for line in with_hparams] == [(1, 0.1), (4, 0.25)]
    assert all(isinstance(line["train/learning_rate"], float) for line in lines if "train/loss" in line)


def test_a_resumed_run_continues_without_gaps_or_repetitions(tmp_path: Path) -> None:
    """Killed at step 5 with a checkpoint of step 4, and a tracker that was added to a run of six steps at step 8."""
    writer, _ = open_one(tmp_path / "run")
    lines = {step: {"stage": "train", "train/loss": 1 / step} for step in range(1, 9)}
    for step in range(1, 6):
        writer.write(step, lines[step])
        if step == 4:
            writer.write(step, {"valid/loss": 0.5})
            writer.write_samples(4, [("A", "b")])
    writer.close("failed")
    writer, _ = open_one(tmp_path / "run", resume_step=4)
    for step in range(5, 9):
        writer.write(step, lines[step])
        writer.write_samples(step, [("A", "b")])
    writer.close("stopped")
    assert [step for step, _ in scalars("run")] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [call[1] for call in Recorder.calls["run"] if call[0] == "samples"] == [4, 5, 6, 7, 8]
    assert scalars("run") == recorded(tmp_path / "run")

    class Late(Recorder):
        """Another tracker."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trackers.TRACKERS, "late", Late)
        Recorder.calls.clear()
        writer, _ = open_one(tmp_path / "run", "late", 8)
        writer.write(9, {"stage": "train", "train/loss": 0.0})
        writer.close("finished")
    assert scalars("run") == recorded(tmp_path / "run") and len(scalars("run")) == 10


def test_a_killed_tracker_gets_what_it_had_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The position is stored after a flush, so that what was only buffered is sent again."""
    monkeypatch.setattr(trackers, "FLUSH_SECONDS", 0.0)
    writer, _ = open_one(tmp_path / "run")
    writer.write(1, {"train/loss": 1.0})
    while TrackedRun(tmp_path / "run").load_state(OWN).get("step") != 1:
        time.sleep(0.01)
    monkeypatch.setattr(trackers._Position, "save", lambda self: None)
    for step in (2, 3):
        writer.write(step, {"train/loss": 1 / step})
    writer.close("failed")
    Recorder.calls.clear()
    writer, _ = open_one(tmp_path / "run", resume_step=2)
    writer.write(3, {"train/loss": 1 / 3})
    writer.close("finished")
    assert [step for step, _ in scalars("run")] == [2, 3]


def test_a_rewind_shows_the_repeated_steps(tmp_path: Path) -> None:
    writer, _ = open_one(tmp_path / "run")
    for step in range(1, 5):
        writer.write(step, {"train/loss": 1.0})
    writer.rewind(2)
    for step in (3, 4):
        writer.write(step, {"train/loss": 2.0})
    writer.close("finished")
    assert [(step, line["train/loss"]) for step, line in scalars("run")] == [
        *((step, 1.0) for step in (1, 2, 3, 4)),
        *((step, 2.0) for step in (3, 4)),
    ]
    assert recorded(tmp_path / "run") == [(1, {"train/loss": 1.0}), (2, {"train/loss": 1.0})] + [
        (step, {"train/loss": 2.0}) for step in (3, 4)
    ]


def test_trackers_may_change_and_are_not_part_of_the_run(tmp_path: Path) -> None:
    train(tmp_path / "run", **{"training.steps": 4, "logging.trackers": (), "schedule.name": "constant"})
    assert not (tmp_path / "run" / "tensorboard").exists() and not Recorder.calls
    shown = {"logging.trackers": (OWN,), "logging.tags": ("b",)}
    said = train(tmp_path / "run", **shown, **{"schedule.name": "constant"})
    assert "logging.trackers" not in said
    assert load_config(tmp_path / "run").logging.trackers == (OWN,)
    # The new tracker has the steps before, too.
    assert scalars("run") == recorded(tmp_path / "run")
    assert [call for call in Recorder.calls["run"] if call[0] in ("open", "close")] == [
        ("open", 4),
        ("close", "finished"),
    ]


def test_other_processes_of_a_run_have_no_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "is_process_zero", lambda: False)
    train(tmp_path / "run", **{"logging.trackers": (OWN, "tensorboard")})
    assert not Recorder.calls and not (tmp_path / "run" / "tensorboard").exists()


def test_a_diverged_run_is_marked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diverged"):
        train(tmp_path / "run", **{"logging.trackers": (OWN,), "optimizer.learning_rate": 1e30})
    assert Recorder.calls["run"][-1] == ("close", "diverged")
    assert scalars("run")[-1][0] == read_metrics(tmp_path / "run")[-1]["step"]


# Sweeps.


def sweep(path: Path, mode: str = "exact", **changes: Any) -> str:
    """Run a sweep of two learning rates, and return what it printed."""
    tree = small_tree(**(SMALL | {"logging.trackers": (OWN,), "training.steps": 4} | changes))
    trials = make_trials(tree, [{"optimizer.learning_rate": rate} for rate in (0.01, 0.02)])
    console = new_console()
    args = SweepArgs(SweepInfo("config.py", "sweep", {}), SweepOptions(mode=mode), False, True)
    assert run_sweep(tree, trials and [trial.overrides for trial in trials], trials, {}, path, args, console)[0] == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sweep_has_trials_and_a_result(tmp_path: Path) -> None:
    path = tmp_path / "rates"
    sweep(path)
    states = Ledger(SweepDir(path).ledger_file).states()
    trials = {run.name: run for run in Recorder.runs if not run.is_sweep}
    assert set(trials) == set(states) and {run.sweep for run in trials.values()} == {path}
    assert sorted(run.notes for run in trials.values()) == [f"optimizer.learning_rate={rate}" for rate in (0.01, 0.02)]
    for name in trials:
        assert scalars(name) == recorded(path / "trials" / name)
        assert Recorder.calls[name][-1] == ("close", "finished")
    opened, (_, summary), *files, closed = Recorder.calls["rates"]
    assert (opened, closed) == (("open", 0), ("close", "finished"))
    assert files == [("file", "report.html"), ("file", "results.csv")]
    assert summary["best/setting"] in ("learning rate 0.01", "learning rate 0.02") and summary["trials/finished"] == 2
    # Another tracker trains nothing again.
    before = (path / "ledger.jsonl").read_bytes()
    sweep(path, **{"logging.trackers": ("tensorboard",)})
    assert (path / "ledger.jsonl").read_bytes() == before


def test_a_broken_tracker_gives_one_warning_for_all_trials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path / "rates", **{"logging.trackers": ("test_trackers:FailsToOpen",)})
    assert capfd.readouterr().err.count("failed (no route to host)") == 1


def test_a_rerun_has_only_local_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", **{"logging.trackers": (OWN, "tensorboard"), "training.steps": 2})
    monkeypatch.setattr(rerun_module, "_train", lambda *_: 75)
    monkeypatch.setattr(rerun_module, "load_snapshot_code", lambda *_: nullcontext(SimpleNamespace(note="")))
    assert rerun_module.rerun(tmp_path / "run", tmp_path / "again", new_console()).status == 75
    assert load_config(tmp_path / "run").logging.trackers == (OWN, "tensorboard")
    assert load_config(tmp_path / "again").logging.trackers == ("tensorboard",)
