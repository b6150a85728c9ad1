"""Reruns: from the folder of a run alone comes the same run, bit for bit; and what is not the same is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as some
from rich.console import Console
from small_runs import ROOT, copy_code, train, train_elsewhere

from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce import compare_metrics, step_trace
from rustgpt_jax.reproduce import rerun as reruns
from rustgpt_jax.reproduce.compare_metrics import (
    ABSENT,
    FirstDifference,
    compare_checkpoints,
    compare_records,
    compare_samples,
)
from rustgpt_jax.reproduce.snapshot_runner import FinishedProcess, SnapshotCode
from rustgpt_jax.training.preemption import SIGNALS
from rustgpt_jax.workdir.environment import collect_environment
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rerun(path: Path, to: Path | None = None, is_trusted: bool = False) -> tuple[bool, str]:
    """Run again. Whether it is the same, and what was said of it."""
    console = Console(file=StringIO(), width=200)
    status = reruns.rerun(path, to, console, is_trusted)
    assert status in (0, 1)
    return status == 0, console.file.getvalue()


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> tuple[Path, str]:
    """A folder with a run, `run`, its rerun beside it, and what was said of them."""
    folder = tmp_path_factory.mktemp("twice")
    train(folder / "run")
    is_same, said = rerun(folder / "run")
    assert is_same, said
    return folder, said


def copied(twice: tuple[Path, str], folder: Path) -> tuple[RunDir, RunDir]:
    """A copy of both runs, to be changed."""
    for name in ("run", "run.rerun"):
        shutil.copytree(twice[0] / name, folder / name)
    return RunDir(folder / "run"), RunDir(folder / "run.rerun")


# The whole of it.


def test_a_rerun_has_the_bits_of_the_run(twice: tuple[Path, str]) -> None:
    folder, said = twice
    assert "bit-identical for 6 steps: " in said
    first, second = RunDir(folder / "run"), RunDir(folder / "run.rerun")
    assert f"After step 6 {(n := compare_checkpoints(first, second).n_arrays)} of {n} arrays are the same." in said
    assert n > 10
    for name in ("config.json", "tokenizer.json", "data.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    # By its own code, in another process.
    assert load_launches(second)[0].code == load_launches(first)[0].code
    assert load_launches(second)[0].argv[0] not in (load_launches(first)[0].argv[0], str(ROOT / "launch.py"))


def test_a_complete_rerun_is_compared_again_and_not_run_again(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, again = copied(twice, tmp_path)
    before = again.metrics_file.read_bytes()
    assert rerun(run.path)[0]
    assert again.metrics_file.read_bytes() == before


def edited(file: Path, step: int, name: str, value: Any) -> None:
    """Change a value in a file of JSON lines, where it stands with a step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and name in line:
            line[name] = value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rerun that is there is held for complete."""
    monkeypatch.setattr(reruns, "_train", lambda *_: 0)


@pytest.mark.usefixtures("no_training")
def test_the_first_step_that_differs_is_named_and_what_else_does(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = copied(twice, tmp_path)
    edited(run.metrics_file, 5, "train/loss", 1.5)
    edited(run.metrics_file, 4, "train/gradient_norm", "NaN")
    is_same, said = rerun(run.path)
    assert not is_same
    assert "bit-identical for 3 steps. Step 4 is the first that differs: train/gradient_norm is nan and " in said
    assert "code: the same" in said and "data: the same" in said and "config: the same" in said


@pytest.mark.usefixtures("no_training")
def test_a_text_that_differs_is_named(twice: tuple[Path, str], tmp_path: Path) -> None:
    for run, text in zip(copied(twice, tmp_path), ("something", "something else"), strict=True):
        run.samples_file.write_text(json.dumps({"step": 3, "prompt": "A", "text": text}) + "\n")
    is_same, said = rerun(tmp_path / "run")
    assert not is_same
    assert "bit-identical for 2 steps. Step 3 is the first that differs: " in said
    assert "the text after 'A' is something and something else." in said


@pytest.mark.usefixtures("no_training")
def test_an_array_that_differs_is_named(
    twice: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, again = copied(twice, tmp_path)
    read_metadata, paths = compare_metrics.read_metadata, []

    def about(folder: Path, step: int) -> dict[str, Any]:
        stored = read_metadata(folder, step)
        if folder == again.checkpoints:
            paths.append(list(stored["fingerprints"])[3])
            stored["fingerprints"][paths[0]] = "0" * 16
        return stored

    monkeypatch.setattr(compare_metrics, "read_metadata", about)
    is_same, said = rerun(run.path)
    assert not is_same
    assert f"arrays are the same; the first that is not: {paths[0]}." in said
    assert "bit-identical for 6 steps" in said and "environment: the same" in said


@pytest.mark.usefixtures("no_training")
def test_a_run_that_was_cut_off_is_compared_as_far_as_it_went(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = copied(twice, tmp_path)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    third = next(place for place, line in enumerate(lines) if json.loads(line)["step"] == 3)
    # In the middle of a step: its evaluation was never written.
    run.metrics_file.write_text("".join(lines[: third + 1]) + lines[third + 1][:9])
    shutil.rmtree(run.checkpoints)
    is_same, said = rerun(run.path)
    assert is_same and "bit-identical for 3 steps" in said, said


@pytest.mark.usefixtures("no_training")
def test_a_run_that_was_trained_with_others_is_compared_roughly(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = copied(twice, tmp_path)
    run.journal_file.write_text(run.journal_file.read_text().replace('"mode": "solo"', '"mode": "fused"'))
    loss = next(json.loads(line)["train/loss"] for line in run.metrics_file.read_text().splitlines())
    edited(run.metrics_file, 1, "train/loss", loss * 1.0005)
    is_same, said = rerun(run.path)
    assert is_same and "bits are not compared" in said and "within 0.001 for 6 steps" in said, said
    edited(run.metrics_file, 1, "train/loss", loss * 1.002)
    is_same, said = rerun(run.path)
    assert not is_same and "Step 1 is the first that differs: train/loss" in said


@pytest.mark.usefixtures("no_training")
def test_of_several_codes_the_first_is_taken(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = copied(twice, tmp_path)
    event = {**EventLog(run.journal_file).events()[0], "code": "0123456789ab"}
    del event["time"]
    EventLog(run.journal_file).append_all([event])
    _, said = rerun(run.path)
    assert f"was trained by 2 versions of the code; this is the first, {load_launches(run)[0].code}." in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_rerun_ends_as_its_training_did(
    number: signal.Signals, twice: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = copied(twice, tmp_path)
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(75, number))
    console = Console(file=StringIO(), width=200)
    assert reruns.rerun(run.path, None, console) == 75
    assert f"Stopped by {number.name}. The same command resumes the rerun" in console.file.getvalue()


@pytest.mark.usefixtures("no_training")
def test_what_was_not_kept_is_said(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = copied(twice, tmp_path)
    run.journal_file.write_text(run.journal_file.read_text().replace('"left_out": []', '"left_out": ["lab/w.bin"]'))
    _, said = rerun(run.path)
    assert "nor in the rerun: lab/w.bin." in said


def test_a_run_that_ended_early_is_said_to_have(
    twice: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = copied(twice, tmp_path)
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(0, None))
    assert "stopped at step" not in rerun(run.path)[1]
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    said = rerun(run.path)[1]
    assert f"{run.path} stopped at step 4 of 6. Its rerun does not stop there" in said


# Signals, to a child that ends with the number of the first signal that it knows of.

CHILD = """
import signal, sys, time
def ended(number, frame):
    sys.exit(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, ended)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def own_child() -> SnapshotCode:
    return SnapshotCode(ROOT, SimpleNamespace(cwd="/", devices=1, environment=collect_environment()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "status"),
    [(number, number) for number in SIGNALS] + [(signal.SIGHUP, signal.SIGTERM)],
)
def test_every_signal_that_asks_to_stop_ends_the_child_alone(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # Tests that nohup started ignore SIGHUP, and so would the code under test.
    inherited = signal.signal(number, signal.SIG_DFL)
    try:
        threading.Thread(target=stop).start()
        assert own_child().run(["-c", CHILD, str(tmp_path / "ready")]) == (status, number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_signal_before_there_is_a_child_ends_it_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = SnapshotCode._start

    def begin(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    monkeypatch.setattr(SnapshotCode, "_start", begin)
    assert own_child().run(["-c", "import time; time.sleep(5)"]) == (128 + signal.SIGTERM, signal.SIGTERM)


def test_one_who_does_not_mind_the_end_of_a_terminal_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
        assert own_child().run(["-c", child]) == (0, None)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_trace_that_is_stopped_leaves_nothing_behind(
    twice: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(SnapshotCode, "run", lambda *_: FinishedProcess(128 + signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        step_trace.trace_steps(RunDir(twice[0] / "run"), 1, 1, False)
    assert list((tmp_path / "temporary").iterdir()) == []


# What cannot be.


def test_what_cannot_be_run_again_is_said(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, again = copied(twice, tmp_path)
    with pytest.raises(UserError, match="There is no run .*gone"):
        rerun(tmp_path / "gone")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for used in (tmp_path / "used", run.path):
        with pytest.raises(UserError, match="is not empty and not a rerun"):
            rerun(run.path, used)
    with pytest.raises(UserError, match="notes.txt is a file"):
        rerun(run.path, tmp_path / "used" / "notes.txt")
    shutil.rmtree(run.code)
    shutil.rmtree(again.path)
    with pytest.raises(UserError, match="does not have the code that it was trained with"):
        rerun(run.path)
    run.journal_file.unlink()
    with pytest.raises(UserError, match="no record of its launches"):
        rerun(run.path)
    assert not (tmp_path / "run.rerun").exists()


def test_a_rerun_that_fails_says_where(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, again = copied(twice, tmp_path)
    shutil.rmtree(again.path)
    # A folder that was not made by the code that it has.
    about = json.loads(run.config_file.read_text())
    about["config"]["optimizer"]["name"] = "none such"
    run.config_file.write_text(json.dumps(about))
    with pytest.raises(UserError, match="ended at step 0 with exit status 2"):
        rerun(run.path)


STOPPED = """
import sys
from pathlib import Path
from rich.console import Console
from rustgpt_jax.reproduce.rerun import rerun
sys.exit(rerun(Path(sys.argv[1]), None, Console()))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_rerun_that_is_stopped_goes_on(tmp_path: Path) -> None:
    changes = {"training.steps": 2000, "training.steps_per_jit_call": 20, "logging.eval_every": 2000}
    train_elsewhere(tmp_path / "run", **changes, **{"logging.checkpoint_every": 500})
    again = RunDir(tmp_path / "run.rerun")
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not again.metrics_file.exists() or again.metrics_file.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    assert "Stopped by SIGINT" in said and process.returncode == 130, said
    assert max(int(step.name) for step in again.checkpoints.glob("[0-9]*")) < 2000
    is_same, said = rerun(tmp_path / "run")
    assert is_same and "bit-identical for 2,000 steps" in said, said


OVER_TWO_DEVICES = """
import sys
from pathlib import Path
from rich.console import Console
sys.path[:0] = ["tests"]
from rustgpt_jax.workdir.run_dir import RunDir
path = Path(sys.argv[2])
if sys.argv[1] == "train":
    from rustgpt_jax.sharding.hardware_specs import use_cpu_devices
    use_cpu_devices(2)
    from small_runs import train
    train(path)
else:
    from rustgpt_jax.reproduce.snapshot_runner import use_devices_of
    from rustgpt_jax.reproduce.replay import replay
    use_devices_of(RunDir(path))
    sys.exit(not replay(path, 5, False, Console()))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_run_over_several_devices_of_a_cpu_is_made_again_over_as_many(tmp_path: Path) -> None:
    """As trials of a sweep are trained, whose process sets the number itself."""
    for what in ("train", "replay"):
        command = [sys.executable, "-c", OVER_TWO_DEVICES, what, str(tmp_path / "run")]
        variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert load_launches(RunDir(tmp_path / "run"))[0].devices == 2
    is_same, said = rerun(tmp_path / "run")
    assert is_same and "bit-identical for 6 steps" in said, said
    again = load_launches(RunDir(tmp_path / "run.rerun"))[0]
    assert again.devices == again.environment["devices"]["count"] == 2
    assert again.mesh == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


@pytest.mark.slow
def test_a_rerun_needs_nothing_but_the_folder(tmp_path: Path) -> None:
    text = tmp_path / "place" / "small.txt"
    text.parent.mkdir()
    text.write_text("To be, or not to be, that is the question:\n" * 40)
    code = tmp_path / "code"
    copy_code(code)
    # Code of its own, a corpus by a relative path.
    step = code / "rustgpt_jax" / "training" / "train_step.py"
    before = step.read_text()
    step.write_text(before.replace("loss = sums.loss /", "loss = 2 * sums.loss /"))
    assert step.read_text() != before
    corpus = {"data.corpus": "files", "data.paths": ["small.txt"], "data.split": "tail"}
    train_elsewhere(text.parent / "run", code, **corpus, **{"logging.sample_prompts": ["A"], "sampling.max_tokens": 2})
    shutil.rmtree(code)
    os.rename(text.parent / "run", tmp_path / "moved")
    is_same, said = rerun(tmp_path / "moved", tmp_path / "again", is_trusted=True)
    assert is_same and "bit-identical for 6 steps" in said and "2 texts" in said, said
    # Without its text, it cannot be the same.
    text.write_text("To be, or not to be, that is not the question:\n" * 40)
    is_same, said = rerun(tmp_path / "moved", tmp_path / "other", is_trusted=True)
    assert not is_same
    assert "Step 1 is the first that differs" in said
    assert "  stage train: small.txt: " in said, said


# Records.

RECORD = some.lists(
    some.fixed_dictionaries(
        {"train/loss": some.floats(0, 9) | some.sampled_from(["NaN", "Infinity"]), "stage": some.just("a")},
        optional={"valid/loss": some.floats(0, 9), "train/tokens_per_second": some.floats(1, 9)},
    ),
    min_size=1,
    max_size=8,
)


def record(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    """A run folder with nothing but metrics, a line a step."""
    path = folder / name
    path.mkdir()
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(lines, start=1))
    RunDir(path).metrics_file.write_text(text)
    return path


@given(RECORD, some.data())
@hypothesis.settings(max_examples=60)
def test_the_first_value_that_was_changed_is_found(lines: list[dict[str, Any]], data: some.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = [{**line, "train/tokens_per_second": 0.5} for line in lines]
        first = record(folder, "first", lines)
        same = compare_records(first, record(folder, "same", other))
        assert same.first_difference is None and same.last_step == same.agreed == len(lines)
        places = data.draw(some.lists(some.integers(0, len(lines) - 1), min_size=1, max_size=3))
        for place in places:
            other[place] = {**other[place], "train/loss": 77.0}
        found = compare_records(first, record(folder, "second", other))
        step = min(places) + 1
        difference = found.first_difference
        assert difference is not None
        assert (difference.step, difference.name, difference.second) == (step, "train/loss", 77.0)
        assert found.agreed == step - 1
        # However much is the same within a tolerance, 77 is not.
        assert compare_records(first, folder / "second", 0.5).first_difference is not None


def test_a_step_that_only_one_has_differs(tmp_path: Path) -> None:
    lines = [{"train/loss": float(step)} for step in range(5)]
    first = record(tmp_path, "first", lines)
    second = record(tmp_path, "second", lines)
    kept = [line for line in RunDir(second).metrics_file.read_text().splitlines() if '"step": 3' not in line]
    RunDir(second).metrics_file.write_text("\n".join(kept) + "\n")
    assert compare_records(first, second).first_difference == FirstDifference(3, "train/loss", 2.0, ABSENT)
    # What the other has not come to yet does not.
    shorter = record(tmp_path, "shorter", lines[:2])
    assert compare_records(first, shorter)[:1] + compare_records(first, shorter)[3:] == (2, None)


def test_texts_are_compared_in_their_order(tmp_path: Path) -> None:
    for name, texts in (("a", "xyz"), ("b", "xy"), ("c", "xQz")):
        lines = [json.dumps({"step": step, "prompt": "P", "text": text}) for step, text in enumerate(texts)]
        record(tmp_path, name, [])
        RunDir(tmp_path / name).samples_file.write_text("\n".join(lines) + '\n{"half')
    assert compare_samples(tmp_path / "a", tmp_path / "b", 1) == (2, None)
    assert compare_samples(tmp_path / "a", tmp_path / "b", 2)[1] == FirstDifference(
        2, "the text after 'P'", "z", ABSENT
    )
    assert compare_samples(tmp_path / "a", tmp_path / "c", 2)[1] == FirstDifference(1, "the text after 'P'", "y", "Q")


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"step": 1, "prompt": "P"}', b""])
def test_a_damaged_file_of_texts_is_named(line: bytes, tmp_path: Path) -> None:
    record(tmp_path, "a", [])
    whole = json.dumps({"step": 1, "prompt": "P", "text": "x"}).encode()
    RunDir(tmp_path / "a").samples_file.write_bytes(whole + b"\n" + line + b"\n")
    with pytest.raises(UserError, match="samples.jsonl, line 2 is damaged"):
        compare_samples(tmp_path / "a", tmp_path / "a", 2)


@pytest.mark.usefixtures("no_training")
def test_data_that_no_step_read_differently_are_said_to_differ(twice: tuple[Path, str], tmp_path: Path) -> None:
    run, again = copied(twice, tmp_path)
    stages = json.loads(again.data_file.read_bytes())
    again.data_file.write_text(json.dumps([stage | {"source": "0" * 64, "files": {}} for stage in stages]))
    is_same, said = rerun(run.path)
    assert not is_same and "bit-identical for 6 steps" in said
    assert "The data differ, but no step read the difference:" in said and "data:\n  stage train: " in said


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("n_lines", "why"), [(None, "is missing"), (3, "ends at step 3")])
def test_a_run_whose_record_was_cut_is_not_the_same(
    twice: tuple[Path, str], tmp_path: Path, n_lines: int | None, why: str
) -> None:
    run, _ = copied(twice, tmp_path)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:n_lines])) if n_lines else run.metrics_file.unlink()
    is_same, said = rerun(run.path)
    assert not is_same and f"cannot be compared: {run.metrics_file} {why}." in said
