"""A step made again has the bits that it had, wherever the checkpoints are, and the run's folder stays as it was."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import small_config
from rich.console import Console

from rustgpt_jax.config.schema import Config, Stage
from rustgpt_jax.errors import UserError
from rustgpt_jax.fingerprints import fingerprint_tree
from rustgpt_jax.reproduce import recorded_run as pasts
from rustgpt_jax.reproduce.anomaly_detection import find_anomaly
from rustgpt_jax.reproduce.recorded_run import RecordedRun, Rewind, StepTensor, describe_start
from rustgpt_jax.reproduce.replay import ReplayedStep, format_short, is_finite, replay, replay_one_step
from rustgpt_jax.reproduce.step_trace import write_trace
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.training import run_training
from rustgpt_jax.workdir.event_log import EventLog, load_launches
from rustgpt_jax.workdir.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, BORDER = 10, 5
TINY: dict[str, Any] = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": 300,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "model.dropout": 0.1,
    "data.corpus": "files",
    "data.split": "tail",
    "training.grad_accum_steps": 2,
    "training.steps_per_jit_call": 3,
    "logging.log_every": 1,
    "logging.eval_every": 4,
    "logging.eval_batches": 1,
    "logging.checkpoint_every": 3,
}


def text_file() -> Path:
    return Path(os.environ["RUSTGPT_JAX_CACHE"]) / "replayed.txt"


def two_stages() -> Config:
    text_file().write_text("To be, or not to be, that is the question:\n" * 40)
    second = {"name": "second", "training": {"steps": STEPS - BORDER}, "optimizer": {"learning_rate": 0.01}}
    stages = ({"name": "first", "training": {"steps": BORDER}}, second)
    return small_config(**TINY, **{"data.paths": (str(text_file()),), "stages": stages})


def quiet() -> Console:
    return Console(file=StringIO(), width=100)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages with dropout and accumulation. It must stay as it is."""
    path = tmp_path_factory.mktemp("runs") / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
        run_training.train(two_stages(), path, {}, quiet())
    return path


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "own"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def rewritten(path: Path, change: Any) -> None:
    """Change the lines of metrics.jsonl."""
    file = RunDir(path).metrics_file
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in map(change, lines) if line))


# The bits.


def test_every_step_has_its_recorded_bits(run: Path) -> None:
    before = contents(run)
    with RecordedRun(run, quiet()) as past:
        saved = past.saved_steps()
        assert 0 < len(saved) < STEPS
        for step in range(1, STEPS + 1):
            again, inside = replay_one_step(past, step, has_taps=False)
            assert again.record is not None and again.unequal == [] and inside is None
            assert {"train/loss", "train/gradient_norm", "train/learning_rate"} <= set(again.recorded)
            assert again.from_step == max(each for each in saved if each < step)
            assert again.stage == ("first" if step <= BORDER else "second")
            assert "the same, bit for bit" in again.verdict
    assert contents(run) == before


def test_a_state_made_again_is_the_one_that_was_saved(run: Path) -> None:
    with RecordedRun(run, quiet()) as past:
        last = past.saved_steps()[-1]
        saved = fingerprint_tree(past.state_at(last))
        past.undo_rewind(Rewind(step=STEPS + 1, to=0, skipped=0, faults=0))
        assert past.saved_steps() == [0]
        assert fingerprint_tree(past.state_at(last)) == saved


def test_a_damaged_checkpoint_is_passed_over(own: Path) -> None:
    console = quiet()
    with RecordedRun(own, console) as past:
        nearest = max(step for step in past.saved_steps() if step < STEPS)
        assert nearest > 0
    for file in (RunDir(own).checkpoints / str(nearest)).rglob("*"):
        if file.is_file() and file.stat().st_size > 100 and "state" in file.parts:
            file.write_bytes(file.read_bytes()[::-1])
        before = max(step for step in past.saved_steps() if step < nearest)
    assert replay(own, STEPS, False, console)
    assert f"The checkpoint of step {nearest} is damaged" in said(console)
    assert f"replayed from {describe_start(before)}\n" in said(console)


def test_many_steps_before_the_one_that_is_wanted_are_announced(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(RunDir(own).checkpoints)
    for far, is_said in ((8, False), (7, True)):
        monkeypatch.setattr(pasts, "FAR", far)
        console = quiet()
        replay(own, 9, False, console)
        assert ("8 steps are recomputed first, from the start on." in said(console)) == is_said
    made: list[int] = []
    with RecordedRun(own, quiet()) as past:
        past.train(past.restore_nearest(0), 8, made.append)
    assert made == [3, 5, 8]


def test_a_record_that_differs_is_named_and_one_that_is_not_there_is_missed(own: Path) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        if line["step"] == 2 and "train/loss" in line:
            line["train/loss"] = math.nextafter(line["train/loss"], 9)
        return None if line["step"] == 3 else line

    rewritten(own, change)
    with RecordedRun(own, quiet()) as past:
        again, _ = replay_one_step(past, 2, has_taps=False)
        assert again.unequal == ["train/loss"] and again.reasons == ()
        assert again.verdict.startswith("Not bit-identical: loss, although the code and")
        again, _ = replay_one_step(past, 3, has_taps=False)
        assert again.record is None and again.unequal == [] and "has no line of step 3" in again.verdict
        assert not again.is_same


@pytest.mark.parametrize("n_lines", [None, 0, 5, -1])
def test_a_record_that_is_missing_or_cut_is_no_equal_one(own: Path, n_lines: int | None) -> None:
    file, console = RunDir(own).metrics_file, quiet()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:n_lines])) if n_lines is not None else file.unlink()
    assert not replay(own, STEPS, False, console) or n_lines == -1
    last = json.loads(lines[n_lines - 1])["step"] if n_lines else 0
    why = "is missing" if n_lines is None else "is empty" if n_lines == 0 else f"ends at step {last}"
    assert n_lines == -1 or f"There is nothing to compare this with: metrics.jsonl {why}." in said(console)


def test_a_line_that_lacks_a_number_is_no_equal_one(own: Path) -> None:
    rewritten(own, lambda line: {name: value for name, value in line.items() if name != "train/gradient_norm"})
    console = quiet()
    assert not replay(own, 2, False, console)
    assert "metrics.jsonl lacks values of this step: gradient_norm." in said(console)


def test_a_step_that_is_not_recorded_by_config_is_said_to_be_so(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "is_logged", lambda self, step: step % 3 == 0)
    rewritten(own, lambda line: line if line["step"] % 3 == 0 else None)
    console = quiet()
    assert replay(own, 2, False, console)
    assert "The run does not record step 2 (config.logging.log_every=1): there is nothing to" in said(console)


def test_why_bits_may_differ_is_taken_from_the_journal() -> None:
    metrics = {"train/loss": 1.0, "train/gradient_norm": math.nan}
    record = {"step": 3, "train/loss": 1.0, "train/gradient_norm": math.nan, "train/tokens_per_second": 3.0}
    same = ReplayedStep("run", 3, "train", 0, metrics, record, ("it was trained fused with 3 others",))
    assert same.unequal == [] and not is_finite(same.metrics)
    other = ReplayedStep("run", 3, "train", 0, metrics | {"train/loss": 1.1}, record, same.reasons)
    assert other.verdict == "Not bit-identical: loss. Possible reasons: it was trained fused with 3 others."


def test_another_code_is_a_reason_and_so_is_that_nothing_is_known(own: Path) -> None:
    file = RunDir(own).journal_file
    code = load_launches(RunDir(own))[0].code
    file.write_text(file.read_text().replace(f'"code": "{code}"', '"code": "0123456789ab"'))
    with RecordedRun(own, quiet()) as past:
        assert replay_one_step(past, 2, has_taps=False)[0].reasons == (f"the code was 0123456789ab and is {code}",)
        file.unlink()
        (reason,) = replay_one_step(past, 2, has_taps=False)[0].reasons
        assert "were not recorded" in reason


def test_a_fused_launch_is_a_reason(own: Path) -> None:
    journal = EventLog(RunDir(own).journal_file)
    launch = next(event for event in journal.events() if event["event"] == "launch")
    journal.append_all([launch | {"mode": "fused", "width": 4, "step": 2}])
    with RecordedRun(own, quiet()) as past:
        assert "fused with 3 others" in replay_one_step(past, 4, has_taps=False)[0].reasons[0]
        assert replay_one_step(past, 2, has_taps=False)[0].reasons == ()


def test_a_run_that_went_back_is_followed_where_it_went(own: Path) -> None:
    """After a rewind from step 8 to step 6 the run reads the batches after step 8's."""
    EventLog(RunDir(own).journal_file).append("rewind", step=8, to=6, skipped=2, faults=1)
    with RecordedRun(own, quiet()) as past:
        (rewind,) = past.rewinds
        past._last_visible = 6
        state = past.state_at(7)
        assert (int(state.loss_stats.skipped), int(state.loss_stats.faults)) == (2, 1)
        (batch,) = past.batches(past.state_at(6), 1)
        assert (batch.tokens_BT == past.stage_of(7)[0].training_batches().batch(8).tokens_BT).all()
        past.undo_rewind(rewind)
        assert int(past.state_at(7).loss_stats.skipped) == 0
        assert (
            past.batches(past.state_at(6), 1)[0].tokens_BT == past.stage_of(7)[0].training_batches().batch(6).tokens_BT
        ).all()


def test_batches_are_those_that_the_run_read_also_over_a_step_to_which_it_came_back(own: Path) -> None:
    """It went back from step 9 to 8, from 10 to 6, and then from 8 to 7."""
    journal = EventLog(RunDir(own).journal_file)
    for step, to, skipped, faults in ((9, 8, 1, 1), (10, 6, 5, 2), (8, 7, 6, 3)):
        journal.append("rewind", step=step, to=to, skipped=skipped, faults=faults)
    with RecordedRun(own, quiet()) as past:
        past._last_visible = 6
        source = past.stage_of(7)[0].training_batches()

        def numbers(first: int, count: int) -> list[int]:
            tokens = [batch.tokens_BT.tobytes() for batch in past.batches(past.state_at(first), count)]
            known = [source.batch(number).tokens_BT.tobytes() for number in range(6, 26)]
            return [6 + known.index(each) for each in tokens]

        # Step 7 reads batch 6 + 5; steps 8 to 10 the batches 7 + 6, 8 + 6, 9 + 6.
        assert numbers(6, 4) == [11, 13, 14, 15]
        one_by_one = [numbers(step, 1)[0] for step in (6, 7, 8, 9)]
        assert numbers(6, 4) == one_by_one
        past.undo_rewind(past.rewinds[-1])
        assert numbers(6, 4) == [11, 12, 13, 14]


STUMBLING = """
import flax.linen as nn
import jax.numpy as jnp
from rustgpt_jax.model.linear import Linear

class Stumbling(nn.Module):
    config: object
    @nn.compact
    def __call__(self, x_BTD, context):
        is_bad = jnp.any(context.segments_BT > 1)
        return jnp.where(is_bad, jnp.inf, Linear(self.config, self.config.d_model, name="inner")(x_BTD)), {}
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_went_back_from_faults_is_made_again_and_so_are_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layer stumbles over batches in which the text begins anew."""
    (tmp_path / "stumbling.py").write_text(STUMBLING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run_training, "draw_loss_curves", lambda folder: folder / "loss.png")
    text_file().write_text("To be, or not to be, that is the question:\n" * 40)
    changes = {"model.feedforwards": "stumbling:Stumbling", "model.n_layers": 1, "training.grad_accum_steps": 1}
    changes |= {"faults.nonfinite_policy": "rewind", "training.steps": 30, "data.paths": (str(text_file()),)}
    path = tmp_path / "run"
    run_training.train(small_config(**(TINY | changes)), path, {}, quiet())
    with RecordedRun(path, quiet()) as past:
        assert len(past.rewinds) >= 2 and past.recorded_metrics(30) is not None
        for step in (1, *(rewind.to + 1 for rewind in past.rewinds), 30):
            again, _ = replay_one_step(past, step, has_taps=False)
            assert again.unequal == [] and is_finite(again.metrics), step
        found = find_anomaly(past, None)
        assert found is not None and found.rewind == past.rewinds[-1] and found.is_fault
        past.undo_rewind(past.rewinds[-1])
        again, inside = replay_one_step(past, found.step, has_taps=True)
        assert not is_finite(again.metrics) and again.record is None and inside is not None
        bad = next(tensor for tensor in inside.tensors if tensor.nonfinite)
        assert bad.name == "layers/0/feedforward"


@pytest.mark.slow
@pytest.mark.long
def test_many_devices_measure_the_same(tmp_path: Path) -> None:
    """On four devices a replay has its bits, and what is measured is what one device measures."""
    text_file().write_text("To be, or not to be, that is the question:\n" * 40)
    code = f"""
import json, sys
from io import StringIO
from pathlib import Path
from rich.console import Console
sys.path[:0] = ["tests"]
from conftest import small_config
from rustgpt_jax.reproduce.replay import replay_one_step
from rustgpt_jax.reproduce.recorded_run import RecordedRun
from rustgpt_jax.training import run_training
run_training.draw_loss_curves = lambda folder: folder
path, console = Path({str(tmp_path)!r}) / sys.argv[1], Console(file=StringIO())
changes = {TINY | {"data.paths": (str(text_file()),), "training.grad_accum_steps": 1, "model.n_layers": 1}!r}
run_training.train(small_config(**changes), path, {{}}, console)
with RecordedRun(path, console) as past:
    again, inside = replay_one_step(past, 2, has_taps=True)
    assert again.unequal == [], again
    print(json.dumps([[tensor.name, tensor.norm, tensor.nonfinite, tensor.size] for tensor in inside.tensors]))
"""
    found = []
    for count in (1, 4):
        flags = f"--xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command, here = [sys.executable, "-c", code, str(count)], Path(__file__).parent.parent
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for one, four in zip(*found, strict=True):
        assert (one[0], *one[2:]) == (four[0], *four[2:]) and four[1] == pytest.approx(one[1], rel=1e-3, abs=1e-6)


# Taps, pages and traces.


def test_taps_show_every_layer_and_write_a_page_beside_the_run(own: Path) -> None:
    before, console = contents(own), quiet()
    assert replay(own, 4, True, console)
    after = contents(own)
    page = after.pop("replay/step_4.html").decode()
    assert after == before
    text = said(console)
    assert "bit for bit" in text and "mixer/scores" in text and "replay/step_4.html" in text.replace("\n", "")
    assert all(len(line) <= 100 for line in text.splitlines() if "mixer" in line)
    assert page.count('class="heat') == 8 and "http" not in page
    assert "layers/1/feedforward/down/kernel" in page and "All tensors are finite." in page
    with RecordedRun(own, quiet()) as past:
        inside = past.step_internals(past.state_at(3))
        norm = next(tensor for tensor in inside.tensors if tensor.name == "layers/1/mixer/scores").norm
        loss = jax.device_get(inside.metrics.loss)
    assert f"norm {norm:.4g}" in page
    assert loss == pytest.approx(past.recorded_metrics(4)["train/loss"], rel=1e-5)  # type: ignore[index]


def test_a_trace_has_every_array_of_every_step(run: Path, tmp_path: Path) -> None:
    steps = json.loads(json.dumps(write_trace(run, 5, 7, True, quiet()), allow_nan=False))
    assert [step["step"] for step in steps] == [5, 6, 7]
    for first, second in zip(steps, steps[1:], strict=False):
        assert first["after"] == second["before"] != first["before"]
        assert first["batch"]["tokens_BT"] != second["batch"]["tokens_BT"]
    records = {line["step"]: line for line in read_metrics(run) if "train/loss" in line}
    for step in steps:
        assert step["loss"] == {"train/loss": repr(records[step["step"]]["train/loss"])}
        sites, backward = list(step["activations"]), list(step["gradients"])
        assert sites[0] == "embeddings" and sites[-1] == "logits" and "layers/1/mixer/query" in sites
        assert backward[: len(sites)] == sites[::-1] and "params/layers/0/mixer/query/kernel" in backward
        assert {"params/embedding/table", "step"} <= set(step["before"])
    with RecordedRun(run, quiet()) as past:
        assert fingerprint_tree(past.state_at(7)) == steps[-1]["after"]
    assert json.loads(json.dumps(write_trace(run, 6, 6, True, quiet()))) == [steps[1]]
    assert write_trace(run, 6, 6, False, quiet())[0]["activations"] == {}


def test_the_command_of_a_trace_answers_mistakes_in_a_sentence(run: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rustgpt_jax.reproduce.step_trace",
        str(run),
        "1",
        "11",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2 and not (tmp_path / "out.json").exists()
    assert done.stderr.splitlines()[-1] == f"error: {run} has no step 11: its steps are 1 to 10."


@pytest.mark.parametrize("step", [0, -1, STEPS + 1])
def test_a_step_that_is_none_is_refused(step: int, run: Path) -> None:
    with pytest.raises(UserError, match=f"has no step {step}: its steps are 1 to 10"):
        replay(run, step, False, quiet())


def test_a_text_that_is_another_is_named_by_its_stage(own: Path) -> None:
    text = text_file().read_text()
    try:
        text_file().write_text(text.replace("question", "answer"))
        with pytest.raises(UserError, match="stage 'first' is not what the run read"):
            replay(own, 2, False, quiet())
    finally:
        text_file().write_text(text)


def test_a_tensor_has_a_root_mean_square_of_what_is_finite_and_numbers_are_short() -> None:
    tensor = StepTensor(
        "activation", "logits", None, "logits", norm=6.0, largest=3.0, nonfinite=1, size=5, fingerprint=""
    )
    assert tensor.rms == 3.0 and tensor._replace(nonfinite=5).rms == 0.0
    assert [format_short(value) for value in (0.1234, 1.2e-7, 54321.0, 0.0)] == ["0.12", "1.2e-7", "5.4e4", "0"]


def test_where_the_folder_of_a_run_cannot_be_written_the_page_is_elsewhere(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "replay").write_text("in the way of a folder, even for root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    console = Console(file=StringIO(), width=1000)
    assert replay(own, 4, True, console)
    (page,) = tmp_path.glob("rustgpt_jax_replay_*/step_4.html")
    assert f"All tensors of the step: {page}" in said(console) and "<html" in page.read_text()
