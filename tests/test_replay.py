"""Replay: recomputed steps have the recorded bits, whatever checkpoints there are, and the run folder is unchanged."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from small_runs import check_result, new_console, output_of, train

from rustgpt_jax.config.schema import Stage
from rustgpt_jax.errors import UserError
from rustgpt_jax.pytrees import fingerprint_tree
from rustgpt_jax.reproduce import recorded_run, step_trace
from rustgpt_jax.reproduce.diagnose import find_anomaly
from rustgpt_jax.reproduce.recorded_run import RecordedRun, Rewind, StepTensor, describe_start
from rustgpt_jax.reproduce.replay import ReplayedStep, format_short, is_finite, replay, replay_one_step
from rustgpt_jax.reproduce.step_trace import write_trace
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_codegen")

STEPS, BORDER = 10, 5
CHANGES: dict[str, Any] = {
    "model.n_layers": 2,
    "model.dropout": 0.1,
    "data.corpus": "files",
    "data.split": "tail",
    "training.grad_accum_steps": 2,
    "training.steps_per_jit_call": 3,
    "logging.eval_every": 4,
    "logging.checkpoint_every": 3,
}


def write_text() -> Path:
    """Write the training text."""
    file = Path(os.environ["RUSTGPT_JAX_CACHE"]) / "replayed.txt"
    file.write_text("To be, or not to be, that is the question:\n" * 40)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages with dropout and accumulation. Tests must not change it."""
    path = tmp_path_factory.mktemp("runs") / "done"
    second = {"name": "second", "training": {"steps": STEPS - BORDER}, "optimizer": {"learning_rate": 0.01}}
    stages = ({"name": "first", "training": {"steps": BORDER}}, second)
    train(path, **CHANGES, **{"data.paths": (str(write_text()),), "stages": stages})
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def read_files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def edit_metrics(path: Path, change: Any) -> None:
    """Apply a function to each line of metrics.jsonl; None removes the line."""
    file = RunDir(path).metrics_file
    lines = map(change, map(json.loads, file.read_text().splitlines()))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


# Bits.


def test_every_step_has_its_recorded_bits(finished: Path) -> None:
    before = read_files(finished)
    with RecordedRun(finished, new_console()) as run:
        saved = run.list_saved_steps()
        assert 0 < len(saved) < STEPS
        for step in range(1, STEPS + 1):
            replayed, internals = replay_one_step(run, step, with_intermediates=False)
            assert replayed.record is not None and replayed.unequal == [] and internals is None
            assert {"train/loss", "train/gradient_norm", "train/learning_rate"} <= set(replayed.recorded)
            assert replayed.from_step == max(each for each in saved if each < step)
            assert replayed.stage == ("first" if step <= BORDER else "second")
            assert "are bit-identical" in replayed.verdict
        for step in (0, -1, STEPS + 1):
            with pytest.raises(UserError, match=f"has no step {step}: its steps are 1 to 10"):
                replay_one_step(run, step, with_intermediates=False)
    assert read_files(finished) == before


def test_recomputed_state_equals_the_saved_one(finished: Path) -> None:
    with RecordedRun(finished, new_console()) as run:
        last = run.list_saved_steps()[-1]
        saved = fingerprint_tree(run.compute_state(last))
        run.undo_rewind(Rewind(step=STEPS + 1, to=0, skipped=0, faults=0))
        assert run.list_saved_steps() == [0]
        assert fingerprint_tree(run.compute_state(last)) == saved


def test_damaged_checkpoint_is_skipped(copy: Path) -> None:
    with RecordedRun(copy, new_console()) as run:
        before, nearest = [step for step in run.list_saved_steps() if step < STEPS][-2:]
    for file in (RunDir(copy).checkpoints / str(nearest)).rglob("*"):
        if file.is_file() and file.stat().st_size > 100 and "state" in file.parts:
            file.write_bytes(file.read_bytes()[::-1])
    console = new_console()
    assert replay(copy, STEPS, False, console).replayed.is_same
    assert f"The checkpoint of step {nearest} is damaged" in output_of(console)
    assert f"replayed from {describe_start(before)}\n" in output_of(console)


def test_many_missing_steps_are_announced_and_counted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(RunDir(copy).checkpoints)
    progress: list[int] = []
    for limit, is_announced in ((8, False), (7, True)):
        monkeypatch.setattr(recorded_run, "FAR", limit)
        console = new_console()
        with RecordedRun(copy, console) as run:
            run.compute_state(8)
            if is_announced:
                run.train(run.restore_nearest(0), 8, progress.append)
        assert ("Recomputing 8 earlier steps, from the start." in output_of(console)) == is_announced
    assert progress == [3, 5, 8]


# Comparison with the record.


def test_differing_and_missing_lines_are_reported(copy: Path) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        if line["step"] == 2 and "train/loss" in line:
            line["train/loss"] = math.nextafter(line["train/loss"], 9)
        if line["step"] == 4:
            line.pop("train/gradient_norm", None)
        return None if line["step"] == 3 else line

    edit_metrics(copy, change)
    with RecordedRun(copy, new_console()) as run:
        second, third, fourth = (replay_one_step(run, step, with_intermediates=False)[0] for step in (2, 3, 4))
    assert second.unequal == ["train/loss"] and second.reasons == ()
    assert second.verdict.startswith("Not bit-identical: loss, although the code and")
    assert third.record is None and third.unequal == [] and "has no line of step 3" in third.verdict
    assert "metrics.jsonl lacks values of this step: gradient_norm." in fourth.verdict
    assert not (second.is_same or third.is_same or fourth.is_same)


@pytest.mark.parametrize("n_lines", [None, 0, 5, -1])
def test_missing_or_truncated_record_does_not_match(copy: Path, n_lines: int | None) -> None:
    file, console = RunDir(copy).metrics_file, new_console()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:n_lines])) if n_lines is not None else file.unlink()
    found = replay(copy, STEPS, False, console)
    check_result("replay", {"run": copy, **found.describe()})
    assert not found.replayed.is_same or n_lines == -1
    last = json.loads(lines[n_lines - 1])["step"] if n_lines else 0
    reason = "is missing" if n_lines is None else "is empty" if n_lines == 0 else f"ends at step {last}"
    sentence = f"The step cannot be compared with the record: metrics.jsonl {reason}."
    assert n_lines == -1 or sentence in output_of(console)


def test_step_that_is_not_logged_by_config_matches(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "is_logged", lambda self, step: step % 3 == 0)
    edit_metrics(copy, lambda line: line if line["step"] % 3 == 0 else None)
    console = new_console()
    assert replay(copy, 2, False, console).replayed.is_same
    assert "Step 2 was not logged (config.logging.log_every=1), so it cannot be compared" in output_of(console)


def test_verdict_gives_reasons_and_nan_equals_nan() -> None:
    metrics = {"train/loss": 1.0, "train/gradient_norm": math.nan}
    record = {"step": 3, "train/loss": 1.0, "train/gradient_norm": math.nan, "train/tokens_per_second": 3.0}
    same = ReplayedStep("run", 3, "train", 0, metrics, record, ("it was trained fused with 3 others",))
    assert same.unequal == [] and not is_finite(same.metrics)
    other = ReplayedStep("run", 3, "train", 0, metrics | {"train/loss": 1.1}, record, same.reasons)
    assert other.verdict == "Not bit-identical: loss. Possible reasons: it was trained fused with 3 others."


def test_reasons_come_from_the_event_log(copy: Path) -> None:
    file = RunDir(copy).events_file
    original, code = file.read_text(), load_launches(RunDir(copy))[0].code
    with RecordedRun(copy, new_console()) as run:

        def reasons(step: int) -> tuple[str, ...]:
            return replay_one_step(run, step, with_intermediates=False)[0].reasons

        launch = next(event for event in EventLog(file).events() if event["event"] == "launch")
        EventLog(file).append_all([launch | {"mode": "fused", "width": 4, "step": 2}])
        assert "fused with 3 other runs" in reasons(4)[0] and reasons(2) == ()
        file.write_text(original.replace(f'"code": "{code}"', '"code": "0123456789ab"'))
        assert reasons(2) == (f"the hash of the code was 0123456789ab and is now {code}",)
        file.unlink()
        assert "were not recorded" in reasons(2)[0]


def test_changed_text_is_named_by_its_stage(copy: Path) -> None:
    text = write_text()
    try:
        text.write_text(text.read_text().replace("question", "answer"))
        with pytest.raises(UserError, match="stage 'first' has changed since the run"):
            replay(copy, 2, False, new_console())
    finally:
        write_text()


# Rewinds.


def test_batches_after_rewinds_are_those_that_the_run_read(copy: Path) -> None:
    """The run rewound from step 9 to 8, from 10 to 6, and then from 8 to 7."""
    journal = EventLog(RunDir(copy).events_file)
    for step, to, skipped, faults in ((9, 8, 1, 1), (10, 6, 5, 2), (8, 7, 6, 3)):
        journal.append("rewind", step=step, to=to, skipped=skipped, faults=faults)
    with RecordedRun(copy, new_console()) as run:
        run._last_visible = 6
        source = run.get_stage(7)[0].training_batches()
        known = [source.batch(index).tokens_BT.tobytes() for index in range(6, 26)]

        def indices(first: int, count: int) -> list[int]:
            return [
                6 + known.index(each.tokens_BT.tobytes()) for each in run.load_batches(run.compute_state(first), count)
            ]

        state = run.compute_state(7)
        assert (int(state.loss_stats.skipped), int(state.loss_stats.faults)) == (6, 3)
        # Step 7 reads batch 6 + 5; steps 8 to 10 the batches 7 + 6, 8 + 6, 9 + 6.
        assert indices(6, 4) == [11, 13, 14, 15]
        assert indices(6, 4) == [indices(step, 1)[0] for step in (6, 7, 8, 9)]
        run.undo_rewind(run.rewinds[-1])
        assert indices(6, 4) == [11, 12, 13, 14]
        run.undo_rewind(run.rewinds[0])
        assert int(run.compute_state(7).loss_stats.skipped) == 0 and indices(6, 4) == [6, 7, 8, 9]


STUMBLING = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.layers import Linear

class Stumbling(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, inputs):
        is_bad = jnp.any(inputs.segments_BT > 1)
        return jnp.where(is_bad, jnp.inf, Linear(self.config, self.config.d_model, name="inner")(x_BTD)), {}
"""


@pytest.mark.slow
@pytest.mark.long
def test_run_with_rewinds_and_its_faults_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer fails on batches in which the text starts over."""
    (tmp_path / "stumbling.py").write_text(STUMBLING)
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"model.feedforwards": "stumbling:Stumbling", "model.n_layers": 1, "training.grad_accum_steps": 1}
    changes |= {"faults.nonfinite_policy": "rewind", "training.steps": 60, "data.paths": (str(write_text()),)}
    path = tmp_path / "run"
    train(path, **(CHANGES | changes))
    with RecordedRun(path, new_console()) as run:
        assert len(run.rewinds) >= 2 and run.load_metrics(60) is not None
        for step in (1, *(rewind.to + 1 for rewind in run.rewinds), 60):
            replayed, _ = replay_one_step(run, step, with_intermediates=False)
            assert replayed.unequal == [] and is_finite(replayed.metrics), step
        anomaly = find_anomaly(run, None)
        assert anomaly is not None and anomaly.rewind == run.rewinds[-1] and anomaly.is_fault
        run.undo_rewind(run.rewinds[-1])
        replayed, internals = replay_one_step(run, anomaly.step, with_intermediates=True)
        assert not is_finite(replayed.metrics) and replayed.record is None and internals is not None
        bad = next(tensor for tensor in internals.tensors if tensor.nonfinite)
        assert bad.name == "layers/0/feedforward"


@pytest.mark.slow
@pytest.mark.long
def test_four_devices_measure_the_same_as_one(tmp_path: Path) -> None:
    changes = {"data.paths": (str(write_text()),), "training.grad_accum_steps": 1, "model.n_layers": 1}
    code = f"""
import json, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from small_runs import new_console, train
from rustgpt_jax.reproduce.replay import replay_one_step
from rustgpt_jax.reproduce.recorded_run import RecordedRun
path = Path({str(tmp_path)!r}) / sys.argv[1]
train(path, **{CHANGES | changes!r})
with RecordedRun(path, new_console()) as run:
    replayed, internals = replay_one_step(run, 2, with_intermediates=True)
    assert replayed.unequal == [], replayed
    print(json.dumps([[tensor.name, tensor.norm, tensor.nonfinite, tensor.size] for tensor in internals.tensors]))
"""
    found = []
    for count in (1, 4):
        flags = f"--xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command, root = [sys.executable, "-c", code, str(count)], Path(__file__).parent.parent
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for one, four in zip(*found, strict=True):
        assert (one[0], *one[2:]) == (four[0], *four[2:]) and four[1] == pytest.approx(one[1], rel=1e-3, abs=1e-6)


# Taps, pages and traces.


@pytest.mark.slow
def test_taps_show_every_layer_and_write_a_page(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, console = read_files(copy), new_console(100)
    assert replay(copy, 4, True, console).replayed.is_same
    after = read_files(copy)
    page = after.pop("replay/step_4.html").decode()
    assert after == before
    text = output_of(console)
    assert "bit-identical" in text and "mixer/scores" in text and "replay/step_4.html" in text.replace("\n", "")
    assert all(len(line) <= 100 for line in text.splitlines() if "mixer" in line)
    assert page.count('class="heat') == 8 and "http" not in page
    assert "layers/1/feedforward/down/kernel" in page and "All tensors are finite." in page
    with RecordedRun(copy, new_console()) as run:
        internals = run.measure_step(run.compute_state(3))
        norm = next(tensor for tensor in internals.tensors if tensor.name == "layers/1/mixer/scores").norm
        loss = jax.device_get(internals.metrics.loss)
    assert f"norm {norm:.4g}" in page
    assert loss == pytest.approx(run.load_metrics(4)["train/loss"], rel=1e-5)  # type: ignore[index]
    # If the folder is not writable, the page goes to a temporary one.
    shutil.rmtree(copy / "replay")
    (copy / "replay").write_text("not a folder, even for root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    console = new_console(width=1000)
    assert replay(copy, 4, True, console).replayed.is_same
    (file,) = tmp_path.glob("rustgpt_jax_replay_*/step_4.html")
    assert f"All tensors of the step: {file}" in output_of(console) and file.read_text() == page


@pytest.mark.slow
def test_trace_has_every_array_of_every_step(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = json.loads(json.dumps(write_trace(finished, 5, 7, True, new_console()), allow_nan=False))
    assert [step["step"] for step in steps] == [5, 6, 7]
    for first, second in zip(steps, steps[1:], strict=False):
        assert first["after"] == second["before"] != first["before"]
        assert first["batch"]["tokens_BT"] != second["batch"]["tokens_BT"]
    records = {line["step"]: line for line in read_metrics(finished) if "train/loss" in line}
    for step in steps:
        assert step["loss"] == {"train/loss": repr(records[step["step"]]["train/loss"])}
        names, backward = list(step["activations"]), list(step["gradients"])
        assert names[0] == "embeddings" and names[-1] == "logits" and "layers/1/mixer/query" in names
        assert backward[: len(names)] == names[::-1] and "params/layers/0/mixer/query/kernel" in backward
        assert {"params/embedding/table", "step"} <= set(step["before"])
    with RecordedRun(finished, new_console()) as run:
        assert fingerprint_tree(run.compute_state(7)) == steps[-1]["after"]
    assert write_trace(finished, 6, 6, False, new_console())[0]["activations"] == {}
    # The command writes the same, or an error message.
    out = tmp_path / "out.json"
    monkeypatch.setattr(step_trace, "enable_compilation_cache", lambda: None)
    for last, status in ((11, 2), (6, 0)):
        monkeypatch.setattr(sys, "argv", ["step_trace", str(finished), "6", str(last), str(out), "--intermediates"])
        assert step_trace.main() == status and out.exists() == (status == 0)
    assert capsys.readouterr().err.splitlines()[0] == f"error: {finished} has no step 11: its steps are 1 to 10."
    assert json.loads(out.read_text()) == [steps[1]]


def test_rms_is_of_finite_elements_and_numbers_are_short() -> None:
    tensor = StepTensor("activation", "logits", None, "logits", 6.0, 3.0, nonfinite=1, size=5, fingerprint="")
    assert tensor.rms == 3.0 and tensor._replace(nonfinite=5).rms == 0.0
    assert [format_short(value) for value in (0.1234, 1.2e-7, 54321.0, 0.0)] == ["0.12", "1.2e-7", "5.4e4", "0"]
