"""Faults, caused for real: kills, signals, full disks, lost permissions, damaged files, long runs.

`pytest` runs them in a small form, `pytest -m faults` in full.
"""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_loop import Interruption, assert_same_bits, metrics, stored_state, tiny, train

from rustgpt_jax.config.schema import partition
from rustgpt_jax.data.preprocess import fill_vocab_size
from rustgpt_jax.errors import UserError
from rustgpt_jax.tokenizers import load_tokenizer
from rustgpt_jax.tracking.metric_writer import RunWriter
from rustgpt_jax.training import hooks
from rustgpt_jax.training.checkpointing import Checkpoints
from rustgpt_jax.training.train_step import TrainState, compiled_init_state
from rustgpt_jax.training.trainer import Trainer
from rustgpt_jax.workdir.run_dir import RunDir, load_config

ROOT = Path(__file__).parent.parent
LAUNCH = str(ROOT / "launch.py")
TINY = f"--config={ROOT}/configs/tiny.py"
# A run that saves until it is stopped.
LONG = (
    TINY,
    "--config.training.steps=100000",
    "--config.logging.checkpoint_every=20",
    "--config.training.steps_per_jit_call=5",
)
IN_FULL = (pytest.mark.slow, pytest.mark.faults)
TIMEOUT = 240.0

pytestmark = pytest.mark.usefixtures("quick_codegen")


def start(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start to train in another process."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [*prefix, sys.executable, LAUNCH, "train", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds or the process ends."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in RunDir(run).checkpoints.glob("*") if path.name.isdigit())


def is_saving(run: Path) -> bool:
    return any(".orbax-checkpoint-tmp" in path.name for path in RunDir(run).checkpoints.glob("*"))


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a process. Returns its exit status, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def saved_state(run: Path, which: str = "last") -> TrainState:
    """The state in a checkpoint of a run of configs/tiny.py."""
    config, tokenizer = load_config(run), load_tokenizer(RunDir(run).tokenizer_file)
    static, hparams = partition(fill_vocab_size(config, tokenizer))
    like = jax.eval_shape(lambda: compiled_init_state(static, hparams))
    with Checkpoints(RunDir(run).checkpoints, config) as checkpoints:
        return checkpoints.restore(like, which)


def assert_is_valid(run: Path) -> None:
    """Check that the last checkpoint can be restored."""
    state = saved_state(run)
    assert int(state.step) == steps_saved(run)[-1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


# Kills.


@pytest.mark.parametrize("n_kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(100, marks=IN_FULL)])
def test_resume_after_kills_is_bit_exact(tmp_path: Path, n_kills: int) -> None:
    often = {
        "training.steps": 600 if n_kills == 100 else 120,
        "logging.checkpoint_every": 4,
        "logging.eval_every": 40,
        "logging.log_every": 1,
    }
    arguments = (TINY, *(f"--config.{knob}={value}" for knob, value in often.items()))
    moments = random.Random(0)
    straight = tmp_path / "straight"
    began = time.monotonic()
    assert end(start(*arguments, f"--run={straight}"))[0] == 0
    seconds = time.monotonic() - began
    expected, n_saving, kills = saved_state(straight), 0, 0
    for number in itertools.count():
        run = tmp_path / f"killed{number}"
        while kills < n_kills:
            process = start(*arguments, f"--run={run}")
            if kills % 2:
                # In the middle of a save, where most could go wrong.
                saving_after = time.monotonic() + moments.uniform(0.2, 0.7) * seconds
                wait_until(lambda run=run, start=saving_after: time.monotonic() > start and is_saving(run), process)
                time.sleep(moments.uniform(0.0, 0.02))
            else:
                moment = time.monotonic() + moments.uniform(0.1, 0.7) * seconds
                wait_until(lambda moment=moment: time.monotonic() > moment, process)
            n_saving += is_saving(run)
            process.kill()
            is_complete = end(process)[0] == 0
            kills += not is_complete
            if is_complete:
                break
        assert end(start(*arguments, f"--run={run}"))[0] == 0
        assert_same_bits(saved_state(run), expected)
        assert_same_bits(saved_state(run, "best"), saved_state(straight, "best"))
        assert metrics(run) == metrics(straight)
        if kills >= n_kills:
            break
    assert n_saving >= n_kills // 4


# Signals.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_preemption_signal_saves_and_asks_to_be_requeued(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = start(*LONG, f"--run={run}")
    wait_until(lambda: bool(steps_saved(run)), process)
    process.send_signal(number)
    began = time.monotonic()
    status, stdout, stderr = end(process)
    assert (status, stderr) == (os.EX_TEMPFAIL, "")
    assert f"Stopped by {number.name} at step {steps_saved(run)[-1]}, saved." in stdout
    assert time.monotonic() - began < 20
    assert_is_valid(run)


@pytest.mark.slow
def test_calls_of_slow_steps_have_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A signal is handled after a call, so calls of slow steps have few steps; results do not change.
    counts: list[int] = []
    trained, speed = hooks.LogMetrics.on_call, hooks.LogMetrics._speed

    def noted(self: Any, pending: Any, seconds: float) -> None:
        counts.append(pending.n_steps)
        trained(self, pending, seconds)

    def slow(self: Any, count: int) -> dict[str, float]:
        values = speed(self, count)
        if values:
            self.seconds_per_step[self._static] = 2.0
        return values

    config = tiny(**{"logging.eval_every": 10, "logging.checkpoint_every": 10})
    monkeypatch.setattr(hooks.LogMetrics, "on_call", noted)
    assert train(config, tmp_path / "quick")[0]
    # Calls have one step until the speed is known.
    assert counts == [1, 1, 1, 3, 3, 1]
    counts.clear()
    monkeypatch.setattr(hooks.LogMetrics, "_speed", slow)
    assert train(config, tmp_path / "slow")[0]
    assert counts == [1, 1, 1, 2, 2, 2, 1]
    assert_same_bits(stored_state(config, tmp_path / "slow"), stored_state(config, tmp_path / "quick"))


# Two trainers.


@pytest.mark.slow
def test_second_process_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(*LONG, f"--run={run}")
    wait_until(lambda: bool(steps_saved(run)), first)
    status, _, stderr = end(start(*LONG, f"--run={run}"))
    assert status == 2
    assert stderr == (
        f"error: {run} is in use: process {first.pid} on {os.uname().nodename} is training in it. "
        "Choose another --run folder or wait.\n"
    )
    before = steps_saved(run)[-1]
    wait_until(lambda: steps_saved(run)[-1] > before, first)
    first.send_signal(signal.SIGTERM)
    assert end(first)[0] == os.EX_TEMPFAIL


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB, if this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("no disk may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    try:
        with open(disk / "ballast", "ab", buffering=0) as ballast:
            while True:
                ballast.write(b"\0" * 4096)
    except OSError:
        pass


@pytest.mark.slow
def test_full_disk_ends_training_and_preserves_the_checkpoint(small_disk: Path) -> None:
    run = small_disk / "run"
    process = start(*LONG, f"--run={run}")
    wait_until(lambda: len(steps_saved(run)) >= 2, process)
    fill(small_disk)
    status, _, stderr = end(process)
    assert status == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert "No space left on device" in stderr and "Training stopped at step" in stderr
    assert f"the checkpoint of step {steps_saved(run)[-1]} is complete" in stderr
    (small_disk / "ballast").unlink()
    assert_is_valid(run)
    # The run can be resumed.
    before = steps_saved(run)[-1]
    process = start(*LONG, f"--run={run}")
    wait_until(lambda: steps_saved(run)[-1] > before, process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == os.EX_TEMPFAIL


@pytest.mark.slow
def test_read_only_disk_is_an_error(small_disk: Path) -> None:
    run = small_disk / "run"
    assert end(start(TINY, "--config.training.steps=20", f"--run={run}"))[0] == 0
    shutil.rmtree(RunDir(run).checkpoints)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in (run, small_disk / "new"):
        status, _, stderr = end(start(TINY, "--config.training.steps=20", f"--run={folder}"))
        assert (status, stderr.count("\n")) == (2, 1) and "Read-only file system" in stderr, stderr


@pytest.mark.slow
def test_lost_permission_ends_training_and_preserves_the_checkpoint(tmp_path: Path) -> None:
    prefix: tuple[str, ...] = ()
    if os.getuid() == 0:
        # Root ignores permissions.
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv here")
        without = "-dac_override,-dac_read_search"
        prefix = ("setpriv", f"--bounding-set={without}", f"--inh-caps={without}")
    run = tmp_path / "run"
    process = start(*LONG, f"--run={run}", prefix=prefix)
    wait_until(lambda: len(steps_saved(run)) >= 2, process)
    RunDir(run).checkpoints.chmod(0o500)
    status, _, stderr = end(process)
    RunDir(run).checkpoints.chmod(0o700)
    assert status == 2 and "Permission denied" in stderr and stderr.count("\n") == 1, stderr
    assert f"the checkpoint of step {steps_saved(run)[-1]} is complete" in stderr
    assert_is_valid(run)


@pytest.mark.slow
def test_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "file").write_text("")
    status, _, stderr = end(start(TINY, f"--run={tmp_path}/file/run"))
    assert (status, stderr.count("\n")) == (2, 1) and "there is a file in its place" in stderr


# Damage.


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "a byte flipped": flip,
    "a file missing": Path.unlink,
    "a folder missing": lambda file: shutil.rmtree(file.parent),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    path = tmp_path_factory.mktemp("straight") / "run"
    assert train(tiny(), path)[0]
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after some steps."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    train(tiny(), path, Interruption(7, is_kill=False))
    return path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run that was stopped."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_run_resumes_from_the_checkpoint_before_a_damaged_one(run: Path, straight: Path, damage: str) -> None:
    last, before = steps_saved(run)[::-1][:2]
    files = (file for file in (RunDir(run).checkpoints / str(last) / "state").rglob("*") if file.is_file())
    DAMAGE[damage](max(files, key=lambda file: file.stat().st_size))
    is_complete, printed = train(tiny(), run)
    assert is_complete
    assert f"The checkpoint of step {last} is damaged" in printed and f"from step {before}" in printed
    assert (RunDir(run).checkpoints / f"{last}.damaged").is_dir()
    assert_same_bits(stored_state(tiny(), run), stored_state(tiny(), straight))
    assert metrics(run) == metrics(straight)


def test_run_with_only_damaged_checkpoints_does_not_start_over(run: Path) -> None:
    for step in steps_saved(run):
        (RunDir(run).checkpoints / str(step) / "sha256.json").unlink()
    before, saved = metrics(run), steps_saved(run)
    with pytest.raises(UserError, match=r"no valid checkpoint \(.*sha256.json cannot be read.*to start over"):
        train(tiny(), run)
    assert (metrics(run), steps_saved(run)) == (before, saved)


def test_copied_checkpoint_is_not_used_for_another_step(run: Path, straight: Path) -> None:
    folder, last = RunDir(run).checkpoints, steps_saved(run)[-1]
    shutil.copytree(folder / str(last), folder / "10")
    is_complete, printed = train(tiny(), run)
    assert is_complete and f"it is the checkpoint of step {last} under another name" in printed
    assert_same_bits(stored_state(tiny(), run), stored_state(tiny(), straight))


# Deletion.


@pytest.mark.parametrize(
    ("name", "moment"), [("", 8), ("", 10), ("metrics.jsonl", 10), ("checkpoints", 8), ("config.json", 10)]
)
def test_deleted_run_files_end_training_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: int
) -> None:
    run, advanced = tmp_path / "run", Trainer.on_steps_dispatched

    def deleted(self: Trainer, count: int, *arguments: Any) -> None:
        advanced(self, count, *arguments)
        if self.step == moment:
            self.checkpoints.wait()
            (run / name).rename(tmp_path / "gone")

    monkeypatch.setattr(Trainer, "on_steps_dispatched", deleted)
    with pytest.raises(UserError, match=f"{run}.*(was deleted|cannot be written: ).* Training stopped at step"):
        train(tiny(), run)


def test_error_waits_for_a_pending_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, the metrics cannot be written while the first checkpoint is being written."""
    write = RunWriter.write

    def full(self: Any, step: int, values: Any) -> None:
        if step > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        write(self, step, values)

    monkeypatch.setattr(RunWriter, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.* the checkpoint of step 3 is complete"):
        train(tiny(**{"logging.sample_prompts": ()}), tmp_path / "run")


# Memory.

GROWTH = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import jax
from rich.console import Console
from test_loop import tiny
from rustgpt_jax.inference.text_generator import generate_text
from rustgpt_jax.training import load_model, run_training
steps, texts, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

class Noting:
    seen = {{}}
    def __init__(self, *_): ...
    def __enter__(self): return self
    def __exit__(self, *_): ...
    def update_evaluation(self, *_): ...

    def message(self, text): ...
    def update(self, step, values, stage): self.seen[step] = resident()

run_training.Progress = Noting
run_training.draw_loss_curves = lambda path: path
every = {{"logging.log_every": 10, "logging.eval_every": 250, "logging.checkpoint_every": 250}}
changes = {{"training.steps": steps, "training.steps_per_jit_call": 10, **every}}
run_training.train(tiny(**changes), path, {{}}, Console(quiet=True))
settled = min(step for step in Noting.seen if step >= steps // 2)
print((Noting.seen[steps] - Noting.seen[settled]) / 2**20)
model = load_model.load_model(path)
for text in range(texts):
    generate_text(model.generator, [model.generator.encode_prompt(f"{{text}}")], model.config.sampling)
    if text == texts // 4:
        before = resident()
print((resident() - before) / 2**20)
"""


@pytest.mark.parametrize(
    ("steps", "texts"), [pytest.param(1000, 80, marks=pytest.mark.long), pytest.param(5000, 500, marks=IN_FULL)]
)
def test_memory_does_not_grow_with_steps_and_texts(tmp_path: Path, steps: int, texts: int) -> None:
    tests = Path(__file__).parent
    code = GROWTH.format(root=str(ROOT), tests=str(tests))
    command = [sys.executable, "-c", code, str(steps), str(texts), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    training, writing = map(float, done.stdout.split())
    # In MiB. A leak of one state a step, or of one cache a text, would be tens of them.
    assert training < 24 and writing < 8, (training, writing)
