"""Rerun: the folder of a run alone gives the same run, bit for bit; and differences are reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as some
from small_runs import ROOT, check_result, copy_code, new_console, output_of, train, train_elsewhere

from rustgpt_jax.errors import UserError
from rustgpt_jax.process_setup import SIGNALS
from rustgpt_jax.reproduce import compare_metrics, step_trace
from rustgpt_jax.reproduce import rerun as rerun_module
from rustgpt_jax.reproduce.compare_metrics import (
    ABSENT,
    FirstDifference,
    compare_checkpoints,
    compare_records,
    compare_samples,
)
from rustgpt_jax.reproduce.snapshot_runner import FinishedProcess, SnapshotCode
from rustgpt_jax.workdir.environment import collect_environment
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rerun(path: Path, to: Path | None = None, is_trusted: bool = False) -> tuple[bool, str]:
    """Rerun a run. Returns whether it is the same, and the output."""
    console = new_console(200)
    status, new, comparison = rerun_module.rerun(path, to, console, is_trusted)
    assert status in (0, 1) and comparison is not None and comparison.is_same == (status == 0)
    result = {"run": path, "rerun": new, "is_same": comparison.is_same, "comparison": comparison.describe()}
    check_result("rerun", result)
    return status == 0, output_of(console)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> tuple[Path, str]:
    """A folder with a run, `run`, and its rerun, `run.rerun`, and the output of the rerun."""
    folder = tmp_path_factory.mktemp("pair")
    train(folder / "run")
    is_same, output = rerun(folder / "run")
    assert is_same, output
    return folder, output


@pytest.fixture
def copies(pair: tuple[Path, str], tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Copies of the run and its rerun that a test may change."""
    for name in ("run", "run.rerun"):
        shutil.copytree(pair[0] / name, tmp_path / name)
    return RunDir(tmp_path / "run"), RunDir(tmp_path / "run.rerun")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing reruns are taken as complete."""
    monkeypatch.setattr(rerun_module, "_train", lambda *_: 0)


# Whole reruns.


def test_rerun_is_bit_identical(pair: tuple[Path, str]) -> None:
    folder, output = pair
    assert "bit-identical for 6 steps: " in output
    first, second = RunDir(folder / "run"), RunDir(folder / "run.rerun")
    assert f"After step 6, {(n := compare_checkpoints(first, second).n_arrays)} of {n} arrays are the same." in output
    assert n > 10
    for name in ("config.json", "tokenizer.json", "data.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    # It ran the saved code, in another process.
    assert load_launches(second)[0].code == load_launches(first)[0].code
    assert load_launches(second)[0].argv[0] not in (load_launches(first)[0].argv[0], str(ROOT / "launch.py"))


@pytest.mark.slow
def test_rerun_needs_only_the_folder(tmp_path: Path) -> None:
    text = tmp_path / "place" / "small.txt"
    text.parent.mkdir()
    text.write_text("To be, or not to be, that is the question:\n" * 40)
    code = copy_code(tmp_path / "code")
    # The run has its own code, and its corpus has a relative path.
    step = code / "rustgpt_jax" / "training" / "train_step.py"
    before = step.read_text()
    step.write_text(before.replace("loss = sums.loss /", "loss = 2 * sums.loss /"))
    assert step.read_text() != before
    corpus = {"data.corpus": "files", "data.paths": ["small.txt"], "data.split": "tail"}
    train_elsewhere(text.parent / "run", code, **corpus, **{"logging.sample_prompts": ["A"], "sampling.max_tokens": 2})
    shutil.rmtree(code)
    os.rename(text.parent / "run", tmp_path / "moved")
    is_same, output = rerun(tmp_path / "moved", tmp_path / "again", is_trusted=True)
    assert is_same and "bit-identical for 6 steps" in output and "2 texts" in output, output
    # A complete rerun is compared, but not trained again.
    before_again = RunDir(tmp_path / "again").metrics_file.read_bytes()
    assert rerun(tmp_path / "moved", tmp_path / "again", is_trusted=True)[0]
    assert RunDir(tmp_path / "again").metrics_file.read_bytes() == before_again


# Comparison of a run and its rerun.


def edit_lines(file: Path, step: int, name: str, value: Any) -> None:
    """Change a value in the lines of a step in a file of JSON lines."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and name in line:
            line[name] = value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_metrics(run: RunDir, new: RunDir) -> None:
    edit_lines(run.metrics_file, 5, "train/loss", 1.5)
    edit_lines(run.metrics_file, 4, "train/gradient_norm", "NaN")


def change_samples(run: RunDir, new: RunDir) -> None:
    for each, text in ((run, "something"), (new, "something else")):
        each.samples_file.write_text(json.dumps({"step": 3, "prompt": "A", "text": text}) + "\n")


def truncate_run(run: RunDir, new: RunDir) -> None:
    """Cut the record off within step 3, whose evaluation was never written."""
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    third = next(index for index, line in enumerate(lines) if json.loads(line)["step"] == 3)
    run.metrics_file.write_text("".join(lines[: third + 1]) + lines[third + 1][:9])
    shutil.rmtree(run.checkpoints)


def change_data(run: RunDir, new: RunDir) -> None:
    stages = json.loads(new.data_file.read_bytes())
    new.data_file.write_text(json.dumps([stage | {"source": "0" * 64, "files": {}} for stage in stages]))


def truncate_record(run: RunDir, new: RunDir) -> None:
    run.metrics_file.write_text("".join(run.metrics_file.read_text().splitlines(keepends=True)[:3]))


def delete_record(run: RunDir, new: RunDir) -> None:
    run.metrics_file.unlink()


def add_launch(run: RunDir, new: RunDir) -> None:
    """Add a launch with other code, and a file that the snapshot of the first left out."""
    run.events_file.write_text(run.events_file.read_text().replace('"left_out": []', '"left_out": ["lab/w.bin"]'))
    event = {**EventLog(run.events_file).events()[0], "code": "0123456789ab"}
    del event["time"]
    EventLog(run.events_file).append_all([event])


CHANGES: dict[str, tuple[Callable[[RunDir, RunDir], None], bool, list[str]]] = {
    "metrics": (
        change_metrics,
        False,
        [
            "bit-identical for 3 steps. Step 4 is the first that differs: train/gradient_norm is nan in the first run",
            *("code: the same", "data: the same", "config: the same"),
        ],
    ),
    "samples": (
        change_samples,
        False,
        [
            "bit-identical for 2 steps. Step 3 is the first that differs: ",
            "the text after 'A' is something in the first run and something else in the second.",
        ],
    ),
    "interrupted run": (truncate_run, True, ["bit-identical for 3 steps"]),
    "data that no step read": (
        change_data,
        False,
        [
            "bit-identical for 6 steps",
            "The data differ, but no step read the changed part:",
            "data:\n  stage train: ",
        ],
    ),
    "truncated record": (truncate_record, False, ["cannot be compared: ", "metrics.jsonl ends at step 3."]),
    "missing record": (delete_record, False, ["cannot be compared: ", "metrics.jsonl is missing."]),
    "launches": (
        add_launch,
        True,
        ["was trained by 2 versions of the code; this is the first, ", "but not in its snapshot: lab/w.bin."],
    ),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", CHANGES)
def test_differences_are_reported(name: str, copies: tuple[RunDir, RunDir]) -> None:
    change, is_expected_same, messages = CHANGES[name]
    change(*copies)
    is_same, output = rerun(copies[0].path)
    assert is_same == is_expected_same and not [text for text in messages if text not in output], output


@pytest.mark.usefixtures("no_training")
def test_differing_array_is_named(copies: tuple[RunDir, RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    read_metadata, changed = compare_metrics.read_metadata, []

    def read_changed(folder: Path, step: int) -> dict[str, Any]:
        stored = read_metadata(folder, step)
        if folder == copies[1].checkpoints:
            changed.append(list(stored["fingerprints"])[3])
            stored["fingerprints"][changed[0]] = "0" * 16
        return stored

    monkeypatch.setattr(compare_metrics, "read_metadata", read_changed)
    is_same, output = rerun(copies[0].path)
    assert not is_same
    assert f"arrays are the same; the first that differs: {changed[0]}." in output
    assert "bit-identical for 6 steps" in output and "environment: the same" in output


@pytest.mark.usefixtures("no_training")
def test_fused_run_is_compared_within_a_tolerance(copies: tuple[RunDir, RunDir]) -> None:
    run, _ = copies
    run.events_file.write_text(run.events_file.read_text().replace('"mode": "solo"', '"mode": "fused"'))
    loss = next(json.loads(line)["train/loss"] for line in run.metrics_file.read_text().splitlines())
    edit_lines(run.metrics_file, 1, "train/loss", loss * 1.0005)
    is_same, output = rerun(run.path)
    assert is_same and "the comparison is not bitwise" in output and "within 0.001 for 6 steps" in output, output
    edit_lines(run.metrics_file, 1, "train/loss", loss * 1.002)
    is_same, output = rerun(run.path)
    assert not is_same and "Step 1 is the first that differs: train/loss" in output


def test_stopped_reruns_and_interrupted_runs_are_reported(
    copies: tuple[RunDir, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = copies
    for number in (signal.SIGUSR1, signal.SIGINT):
        monkeypatch.setattr(SnapshotCode, "run", lambda *_, number=number: FinishedProcess(75, number))
        console = new_console(200)
        assert rerun_module.rerun(run.path, None, console).status == 75
        assert f"Stopped by {number.name}. The same command resumes" in output_of(console)
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(0, None))
    assert "stopped at step" not in rerun(run.path)[1]
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    assert f"{run.path} stopped at step 4 of 6. Its rerun does not stop there" in rerun(run.path)[1]


def test_impossible_reruns_are_errors(copies: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    run, new = copies
    with pytest.raises(UserError, match="There is no run .*gone"):
        rerun(tmp_path / "gone")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for used in (tmp_path / "used", run.path):
        with pytest.raises(UserError, match="is not empty and not a rerun"):
            rerun(run.path, used)
    with pytest.raises(UserError, match="notes.txt is a file"):
        rerun(run.path, tmp_path / "used" / "notes.txt")
    shutil.rmtree(new.path)
    # The config does not belong to the code.
    config = run.config_file.read_text()
    changed = json.loads(config)
    changed["config"]["optimizer"]["name"] = "none such"
    run.config_file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="ended at step 0 with exit status 2"):
        rerun(run.path)
    shutil.rmtree(new.path)
    run.config_file.write_text(config)
    shutil.rmtree(run.code)
    with pytest.raises(UserError, match="does not have the code that it was trained with"):
        rerun(run.path)
    run.events_file.unlink()
    with pytest.raises(UserError, match="no record of its launches"):
        rerun(run.path)
    assert not new.path.exists()


# Signals. The child exits with the number of the first signal that it handles.

CHILD = """
import signal, sys, time
def end(number, frame):
    sys.exit(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, end)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def make_child() -> SnapshotCode:
    return SnapshotCode(ROOT, SimpleNamespace(cwd="/", devices=1, environment=collect_environment()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "status"),
    [(number, number) for number in SIGNALS] + [(signal.SIGHUP, signal.SIGTERM)],
)
def test_stop_signals_end_the_child_only(number: signal.Signals, status: int, tmp_path: Path) -> None:
    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # Under nohup, SIGHUP is ignored, and the code under test would ignore it too.
    inherited = signal.signal(number, signal.SIG_DFL)
    try:
        threading.Thread(target=stop).start()
        assert make_child().run(["-c", CHILD, str(tmp_path / "ready")]) == (status, number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_signal_before_the_start_of_the_child_is_forwarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SnapshotCode._start

    def begin(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    monkeypatch.setattr(SnapshotCode, "_start", begin)
    assert make_child().run(["-c", "import time; time.sleep(5)"]) == (128 + signal.SIGTERM, signal.SIGTERM)


def test_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
        assert make_child().run(["-c", child]) == (0, None)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_trace_leaves_no_files(pair: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(128 + signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        step_trace.trace_steps(RunDir(pair[0] / "run"), 1, 1, False)
    assert list((tmp_path / "temporary").iterdir()) == []


# Resumed reruns, and several devices.

STOPPED = """
import sys
from pathlib import Path
from rich.console import Console
from rustgpt_jax.reproduce.rerun import rerun
sys.exit(rerun(Path(sys.argv[1]), None, Console()).status)
"""


@pytest.mark.slow
@pytest.mark.long
def test_stopped_rerun_resumes(tmp_path: Path) -> None:
    changes = {"training.steps": 2000, "training.steps_per_jit_call": 20, "logging.eval_every": 2000}
    train_elsewhere(tmp_path / "run", **changes, **{"logging.checkpoint_every": 500})
    again = RunDir(tmp_path / "run.rerun")
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not again.metrics_file.exists() or again.metrics_file.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert "Stopped by SIGINT" in output and process.returncode == 130, output
    assert max(int(step.name) for step in again.checkpoints.glob("[0-9]*")) < 2000
    is_same, output = rerun(tmp_path / "run")
    assert is_same and "bit-identical for 2,000 steps" in output, output


ON_TWO_DEVICES = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from rustgpt_jax.sharding.hardware_specs import use_cpu_devices
use_cpu_devices(2)
from small_runs import train
train(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_run_on_several_cpu_devices_is_rerun_on_as_many(tmp_path: Path) -> None:
    """The process sets the number of devices, as workers of a sweep do."""
    path = str(tmp_path / "run")
    for command in (["-c", ON_TWO_DEVICES, path], ["launch.py", "replay", path, "--step=5"]):
        variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert load_launches(RunDir(tmp_path / "run"))[0].devices == 2
    is_same, output = rerun(tmp_path / "run")
    assert is_same and "bit-identical for 6 steps" in output, output
    again = load_launches(RunDir(tmp_path / "run.rerun"))[0]
    assert again.devices == again.environment["devices"]["count"] == 2
    assert again.mesh == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


# Records.

RECORD = some.lists(
    some.fixed_dictionaries(
        {"train/loss": some.floats(0, 9) | some.sampled_from(["NaN", "Infinity"]), "stage": some.just("a")},
        optional={"valid/loss": some.floats(0, 9), "train/tokens_per_second": some.floats(1, 9)},
    ),
    min_size=1,
    max_size=8,
)


def write_record(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    """Write a run folder with metrics only, a line per step."""
    path = folder / name
    path.mkdir()
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(lines, start=1))
    RunDir(path).metrics_file.write_text(text)
    return path


@given(RECORD, some.data())
@hypothesis.settings(max_examples=60)
def test_first_changed_value_is_found(lines: list[dict[str, Any]], data: some.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = [{**line, "train/tokens_per_second": 0.5} for line in lines]
        first = write_record(folder, "first", lines)
        same = compare_records(first, write_record(folder, "same", other))
        assert same.first_difference is None and same.last_step == same.agreed == len(lines)
        indices = data.draw(some.lists(some.integers(0, len(lines) - 1), min_size=1, max_size=3))
        for index in indices:
            other[index] = {**other[index], "train/loss": 77.0}
        found = compare_records(first, write_record(folder, "second", other))
        step = min(indices) + 1
        difference = found.first_difference
        assert difference is not None
        assert (difference.step, difference.name, difference.second) == (step, "train/loss", 77.0)
        assert found.agreed == step - 1
        # 77 is not within the tolerance either.
        assert compare_records(first, folder / "second", 0.5).first_difference is not None


def test_step_that_one_run_lacks_differs(tmp_path: Path) -> None:
    lines = [{"train/loss": float(step)} for step in range(5)]
    first = write_record(tmp_path, "first", lines)
    second = write_record(tmp_path, "second", lines)
    kept = [line for line in RunDir(second).metrics_file.read_text().splitlines() if '"step": 3' not in line]
    RunDir(second).metrics_file.write_text("\n".join(kept) + "\n")
    assert compare_records(first, second).first_difference == FirstDifference(3, "train/loss", 2.0, ABSENT)
    # Steps that the other run has not reached do not.
    shorter = write_record(tmp_path, "shorter", lines[:2])
    assert compare_records(first, shorter)[:1] + compare_records(first, shorter)[3:] == (2, None)


def test_samples_are_compared_in_order(tmp_path: Path) -> None:
    for name, texts in (("a", "xyz"), ("b", "xy"), ("c", "xQz")):
        lines = [json.dumps({"step": step, "prompt": "P", "text": text}) for step, text in enumerate(texts)]
        write_record(tmp_path, name, [])
        RunDir(tmp_path / name).samples_file.write_text("\n".join(lines) + '\n{"half')
    assert compare_samples(tmp_path / "a", tmp_path / "b", 1) == (2, None)
    assert compare_samples(tmp_path / "a", tmp_path / "b", 2)[1] == FirstDifference(
        2, "the text after 'P'", "z", ABSENT
    )
    assert compare_samples(tmp_path / "a", tmp_path / "c", 2)[1] == FirstDifference(1, "the text after 'P'", "y", "Q")


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"step": 1, "prompt": "P"}', b""])
def test_damaged_samples_file_is_named(line: bytes, tmp_path: Path) -> None:
    write_record(tmp_path, "a", [])
    whole = json.dumps({"step": 1, "prompt": "P", "text": "x"}).encode()
    RunDir(tmp_path / "a").samples_file.write_bytes(whole + b"\n" + line + b"\n")
    with pytest.raises(UserError, match="samples.jsonl, line 2 is damaged"):
        compare_samples(tmp_path / "a", tmp_path / "a", 2)
