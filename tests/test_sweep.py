"""Whole sweeps: kills, stops, concurrent launches and failures do not change the results."""

import dataclasses
import gc
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import SMALL, small_tree
from ml_collections import ConfigDict
from rich.console import Console
from test_loop import assert_same_bits, metrics, stored_state
from test_population import train_alone

from rustgpt_jax.cli.evaluation_report import print_evaluation
from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.process_setup import STOPPED_BY_CLUSTER, STOPPED_BY_USER
from rustgpt_jax.sweeps import product, seeds, values
from rustgpt_jax.sweeps.local_launchers import MAX_DEATHS, Launch, run_in_subprocesses
from rustgpt_jax.sweeps.report import report
from rustgpt_jax.sweeps.sweep import Sweep, SweepInfo, SweepOptions, open_sweep
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.sweeps.trials import Trial, make_trials
from rustgpt_jax.sweeps.worker import Worker
from rustgpt_jax.training import loop
from rustgpt_jax.training.hooks import Evaluate
from rustgpt_jax.training.load_model import load_model
from rustgpt_jax.workdir.run_dir import load_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAUNCH = str(Path(__file__).parent.parent / "launch.py")
SECONDS = 300
TINY = {
    "tokenizer.name": "byte",
    "tokenizer.vocab_size": 300,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.attention.n_heads": 2,
    "training.steps": 12,
    "logging.eval_batches": 2,
    "logging.sample_prompts": (),
}
RATES = values("optimizer.learning_rate", 1e-3, 3e-3, 1e-2)
INFO = SweepInfo("tiny.py", "sweep", {})
# One program serves all tests of this process.
IN_PAIRS = SweepOptions(width=2)


def tiny_tree(**changes: Any) -> ConfigDict:
    return small_tree(**(TINY | changes))


# Sweeps in this process, which has one device.


@contextmanager
def opened(path: Path, options: SweepOptions = IN_PAIRS) -> Iterator[Sweep]:
    """Open a sweep in a folder without terminal output."""
    with open_sweep(path, INFO, options, AssetCache(), Console(file=StringIO())) as sweep:
        yield sweep


def run(path: Path, trials: list[Trial], options: SweepOptions = IN_PAIRS) -> Sweep:
    """Run trials to their ends."""
    with opened(path, options) as sweep:
        sweep.add(trials)
        sweep.run(trials)
    return sweep


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of a sweep, or those of some kinds."""
    found = Ledger(SweepDir(path).ledger_file).events()
    return [event for event in found if not kinds or event["event"] in kinds]


def trial_path(path: Path, trial: Trial) -> Path:
    return SweepDir(path).trial(trial.id).path


def table(path: Path) -> bytes:
    """Write and return results.csv."""
    report(path, Console(file=StringIO()))
    return (path / "results.csv").read_bytes()


def assert_same_runs(trials: Iterable[Trial], path: Path, other: Path) -> None:
    """Assert that trials have the same bits and metrics in two sweeps."""
    for trial in trials:
        ours, theirs = trial_path(path, trial), trial_path(other, trial)
        assert_same_bits(stored_state(trial.config, ours), stored_state(trial.config, theirs))
        assert metrics(ours) == metrics(theirs)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return make_trials(tiny_tree(), RATES)


@pytest.fixture(scope="module")
def straight(trials: list[Trial], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed sweep of `trials`."""
    path = tmp_path_factory.mktemp("sweeps") / "straight"
    assert run(path, trials).failed() == set()
    return path


def test_finished_trial_is_an_ordinary_run(
    trials: list[Trial], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_alone(trials[0].config, tmp_path / "alone", monkeypatch)
    folder = trial_path(straight, trials[0])
    assert_same_bits(stored_state(trials[0].config, folder), stored_state(trials[0].config, tmp_path / "alone"))
    assert metrics(folder) == metrics(tmp_path / "alone")
    assert load_config(folder) == trials[0].config
    shown = Console(file=StringIO(), width=200)
    print_evaluation(load_model(folder, "last"), shown)
    assert "perplexity" in shown.file.getvalue()
    assert run(straight, trials).failed() == set()
    assert Counter(event["event"] for event in events(straight)) == {"planned": 3, "began": 3, "finished": 3}


def test_stopped_sweep_resumes_and_its_trials_resume_alone(
    trials: list[Trial], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_a_call(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        # The signal is for the main thread, which may be late.
        while not sweep.stop:
            time.sleep(0.01)
        return steps(*arguments)

    steps = loop.compiled_population_steps
    stop_after_a_call.lower = steps.lower
    with monkeypatch.context() as patch, opened(tmp_path / "stopped") as sweep:
        patch.setattr(loop, "compiled_population_steps", stop_after_a_call)
        sweep.add(trials)
        sweep.run(trials)
    assert sweep.stop.signal_name == "SIGTERM"
    stopped = events(tmp_path / "stopped", "stopped")
    assert stopped and {event["step"] for event in stopped} == {1}
    alone = next(trial for trial in trials if trial.id == stopped[0]["trial"])
    train_alone(alone.config, trial_path(tmp_path / "stopped", alone), monkeypatch)
    run(tmp_path / "stopped", trials)
    assert table(tmp_path / "stopped") == table(straight)
    assert_same_runs(trials, tmp_path / "stopped", straight)


# Failures.


def faulty(seed: int, step: int) -> Callable[..., bool]:
    """Return an `evaluate` that raises in the trial of a seed from a step on."""

    def evaluate(hook: Evaluate, state: Any, at: int, is_stop_requested: Callable[[], bool]) -> bool:
        if hook.data.stage.config.seed == seed and at >= step:
            raise OSError("no space\nleft")
        return whole(hook, state, at, is_stop_requested)

    whole = Evaluate.evaluate
    return evaluate


def test_failed_trial_does_not_affect_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = make_trials(tiny_tree(), seeds(4))
    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "evaluate", faulty(seed=2, step=8))
        assert run(tmp_path / "faulty", trials).failed() == {trials[2].id}
    (failed,) = events(tmp_path / "faulty", "failed")
    assert (failed["trial"], failed["error"]) == (trials[2].id, "no space left")
    assert failed["traceback"].startswith("Traceback") and "in evaluate" in failed["traceback"]
    run(tmp_path / "well", trials)
    others = [trials[index] for index in (0, 1, 3)]
    assert_same_runs(others, tmp_path / "faulty", tmp_path / "well")
    assert {event["width"] for event in events(tmp_path / "faulty", "began")} == {2}

    so_far = len(events(tmp_path / "faulty"))
    assert run(tmp_path / "faulty", trials).failed() == set()
    again = events(tmp_path / "faulty")[so_far:]
    assert [(event["trial"], event["event"], event["step"]) for event in again] == [
        (trials[2].id, "began", 4),
        (trials[2].id, "finished", 12),
    ]
    assert_same_runs(trials, tmp_path / "faulty", tmp_path / "well")
    assert table(tmp_path / "faulty") == table(tmp_path / "well")


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_damaged_trial_fails_alone(trials: list[Trial], straight: Path, tmp_path: Path, name: str) -> None:
    with opened(tmp_path / "damaged") as sweep:
        sweep.add(trials)
        file = trial_path(tmp_path / "damaged", trials[1]) / name
        file.write_text("{")
        sweep.run(trials)
        assert sweep.failed() == {trials[1].id}
    (failed,) = events(tmp_path / "damaged", "failed")
    assert failed["error"] and failed["traceback"].startswith("Traceback")
    assert_same_runs([trials[0], trials[2]], tmp_path / "damaged", straight)


@pytest.mark.slow
def test_changed_text_fails_a_trial(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question:\n" * 40)
    on_file = {"data.corpus": "files", "data.paths": (str(text),), "data.split": "tail"}
    tree, overrides = tiny_tree(**on_file), values("training.steps", 4, 8)
    first, second = make_trials(tree, overrides)
    run(tmp_path / "sweep", [first])
    # The second trial was started with the old text, too.
    known = trial_path(tmp_path / "sweep", first) / "data.json"
    with opened(tmp_path / "sweep") as sweep:
        sweep.add([second])
    (trial_path(tmp_path / "sweep", second) / "data.json").write_bytes(known.read_bytes())
    text.write_text("Whether 'tis nobler in the mind to suffer\n" * 40)
    assert run(tmp_path / "sweep", [first, second]).failed() == {second.id}
    (failed,) = events(tmp_path / "sweep", "failed")
    assert "is not what the run began with" in failed["error"]


def test_diverged_trial_is_recorded_and_not_rerun(straight: Path, trials: list[Trial], tmp_path: Path) -> None:
    wild = make_trials(tiny_tree(), values("optimizer.learning_rate", 1e-3, 1e30, 1e-2))
    sweep = run(tmp_path / "wild", wild)
    assert sweep.failed() == set()
    (diverged,) = events(tmp_path / "wild", "diverged")
    assert diverged["trial"] == wild[1].id
    last = metrics(trial_path(tmp_path / "wild", wild[1]))[-1]
    assert last["step"] == diverged["step"] and not math.isfinite(last["train/update_norm"])
    rows = [line.split(",") for line in table(tmp_path / "wild").decode().splitlines()]
    assert [row[2] for row in rows] == ["status", "finished", "diverged", "finished"]
    assert rows[2][4:7] == [""] * 3
    assert_same_runs([trials[0], trials[2]], tmp_path / "wild", straight)
    run(tmp_path / "wild", wild)
    assert len(events(tmp_path / "wild", "began")) == 3


# Programs.


def count_objects() -> Counter[str]:
    """Count the live objects of this project by type."""
    gc.collect()
    types = [type(each) for each in gc.get_objects()]
    ours = [each for each in types if str(each.__module__).startswith("rustgpt_jax")]
    return Counter(f"{each.__module__}.{each.__qualname__}" for each in ours)


@pytest.mark.slow
def test_worker_keeps_no_objects_of_finished_trials(tmp_path: Path) -> None:
    trials = make_trials(tiny_tree(), seeds(3))
    with opened(tmp_path / "sweep") as sweep:
        sweep.add(trials)
        assets = AssetCache(sweep.folder.tokenizers)
        worker = Worker(sweep.folder, assets, jax.local_devices(), "code", lambda: False)
        alive = []
        for trial in trials:
            worker.run_chunk(Chunk((trial.id,), "exact", 2))
            alive.append(count_objects())
    assert not alive[2] - alive[1]
    assert len(events(tmp_path / "sweep", "finished")) == 3


@pytest.mark.slow
def test_shape_class_compiles_one_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    structures = values("model.d_ff", 20, 28)
    numbers = values("optimizer.learning_rate", 1e-3, 3e-3, 1e-2)
    trials = make_trials(tiny_tree(**{"training.steps": 4}), product(structures, numbers))
    # `jax.log_compiles()` applies to one thread, but trials run on other threads.
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING):
            run(tmp_path, trials)
    finally:
        jax.config.update("jax_log_compiles", False)
    assert sum("Finished XLA compilation of jit(population_steps)" in line for line in caplog.messages) == 2
    assert len(events(tmp_path, "finished")) == 6


# Launches in subprocesses.

CONFIG = f"""
from configs import base
from rustgpt_jax.sweeps import *

def get_config():
    tree = base.get_config()
    tree.update_from_flattened_dict({SMALL | TINY | {"logging.eval_every": 20}})
    return tree
"""


@dataclasses.dataclass(frozen=True)
class Launched:
    """A launch of a sweep in a subprocess."""

    process: subprocess.Popen[str]
    path: Path

    @property
    def workers(self) -> list[int]:
        """The current worker processes of this launch."""
        return [pid for pid in _processes() if _parent(pid) == self.process.pid]

    def ends(self, status: int = 0) -> str:
        """Wait for the end with this exit status, and return the output."""
        printed = self.process.communicate(timeout=SECONDS)[0]
        assert self.process.returncode == status, printed
        assert "Traceback" not in printed
        return printed

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=SECONDS)


class Launcher:
    """Starts launches of one config file, and kills the remaining processes in the end."""

    def __init__(self, config_file: Path) -> None:
        self._config_file, self._launched = config_file, list[Launched]()

    def __call__(self, path: Path, *flags: str, **environment: str) -> Launched:
        command = [sys.executable, LAUNCH, "sweep", f"--config={self._config_file}", f"--run={path}", *flags]
        process = subprocess.Popen(
            command,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._launched.append(Launched(process, path))
        return self._launched[-1]

    def end(self) -> None:
        for launched in self._launched:
            if launched.process.poll() is None:
                launched.kill()
            launched.process.stdout.close()
        for path in {launched.path for launched in self._launched}:
            for pid in workers_on(path):
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return None


def workers_on(path: Path) -> list[int]:
    """Return the worker processes of all launches of a sweep."""
    found = []
    for pid in _processes():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"rustgpt_jax.sweeps.worker" in words and os.fsencode(path) in words:
                found.append(pid)
    return found


def assert_no_worker_is_left(path: Path) -> None:
    """Wait until the workers of a killed launch have saved and exited."""
    deadline = time.monotonic() + SECONDS
    while workers_on(path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until(condition: Callable[[], bool], launched: Launched) -> None:
    """Wait until a condition holds or the launch has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and launched.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A launcher of a sweep of six short trials."""
    yield from launcher_of(tmp_path_factory.mktemp("config") / "six.py", sweep_of(40, (1e-3, 3e-3, 1e-2)))


@pytest.fixture(scope="module")
def long_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A launcher of a sweep of twelve trials of 80 steps."""
    rates = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
    yield from launcher_of(tmp_path_factory.mktemp("config") / "twelve.py", sweep_of(80, rates))


def sweep_of(steps: int, rates: tuple[float, ...]) -> str:
    """Return the code of a sweep over learning rates with two seeds."""
    return f"""
def sweep():
    return product(values("training.steps", {steps}), values("optimizer.learning_rate", *{rates}), seeds(2))
"""


def launcher_of(file: Path, sweeps: str) -> Iterator[Launcher]:
    """Yield a launcher of a config file with some sweeps, and kill its processes in the end."""
    file.write_text(CONFIG + sweeps)
    launcher = Launcher(file)
    yield launcher
    launcher.end()


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results.csv of an undisturbed launch."""
    path = tmp_path_factory.mktemp("undisturbed") / "sweep"
    launcher(path).ends()
    return (path / "results.csv").read_bytes()


def checkpoints(path: Path) -> dict[str, int]:
    """Return the last checkpoint of each trial."""
    last: dict[str, int] = {}
    for folder in SweepDir(path).trials.glob("*/checkpoints/[0-9]*"):
        if folder.name.isdigit():
            trial = folder.parents[1].name
            last[trial] = max(last.get(trial, 0), int(folder.name))
    return last


def assert_nothing_lost(path: Path, seen: list[tuple[dict[str, int], int]]) -> None:
    """Assert that trials resume from their last checkpoints, and each finishes once.

    `seen` has the checkpoints of trials at some moments, each with the number of events at that time.
    """
    history = events(path)
    for saved, n_events in seen:
        for event in history[n_events:]:
            if event["event"] == "began":
                assert event["step"] >= saved.get(event["trial"], 0), event
    trials = {event["trial"] for event in history}
    assert Counter(event["trial"] for event in events(path, "finished")) == dict.fromkeys(trials, 1)
    assert {event["event"] for event in history} <= {"planned", "began", "finished", "stopped"}


def disturb(launcher: Launcher, path: Path, flags: list[str], n_kills: int, rng: random.Random) -> int:
    """Kill a sweep at random moments up to n_kills times, complete it, and return the number of kills."""
    n, seen = 0, list[tuple[dict[str, int], int]]()
    while n < n_kills:
        launched = launcher(path, *flags)
        n += _kill_at_random(launched, rng, seen)
        if launched.process.returncode == 0:
            break
    else:
        launcher(path, *flags).ends()
    assert_nothing_lost(path, seen)
    assert_no_worker_is_left(path)
    return n


def _kill_at_random(launched: Launched, rng: random.Random, seen: list[tuple[dict[str, int], int]]) -> int:
    """Kill up to two workers of a launch and then the launch, and return the number of kills."""
    n, path = 0, launched.path
    so_far = len(events(path, "began"))
    # Most kills happen during training, the others at any time, including the start.
    if rng.random() < 0.75:
        wait_until(lambda: len(events(path, "began")) > so_far, launched)
    for _ in range(rng.randrange(3)):
        time.sleep(rng.uniform(0, 3))
        for worker in rng.sample(launched.workers, k=min(1, len(launched.workers))):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                n += 1
    time.sleep(rng.uniform(0, 3))
    if launched.process.poll() is None:
        launched.kill()
        n += 1
    else:
        launched.ends()
    seen.append((checkpoints(path), len(events(path))))
    return n


PROCESSES = ["--launcher=processes", "--workers=2"]
# For each launcher; RUSTGPT_JAX_KILLS=15 makes 30 kills, in about ten minutes.
KILLS = int(os.environ.get("RUSTGPT_JAX_KILLS", "3"))


@pytest.mark.slow
def test_killed_sweep_gives_uninterrupted_results(launcher: Launcher, undisturbed: bytes, tmp_path: Path) -> None:
    path, seen = tmp_path / "killed", list[tuple[dict[str, int], int]]()
    launched = launcher(path, *PROCESSES)
    wait_until(lambda: len(checkpoints(path)) >= 2, launched)
    worker = launched.workers[0]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len({event["process"] for event in events(path, "began")}) == 3, launched)
    seen.append((checkpoints(path), len(events(path))))
    launched.kill()
    launcher(path, *PROCESSES).ends()
    assert seen[0][0]
    assert_nothing_lost(path, seen)
    assert_no_worker_is_left(path)
    assert (path / "results.csv").read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [[], PROCESSES], ids=["inline", "processes"])
def test_randomly_killed_sweeps_give_uninterrupted_results(
    long_launcher: Launcher, flags: list[str], tmp_path: Path
) -> None:
    long_launcher(tmp_path / "undisturbed").ends()
    rng, n, sweeps = random.Random(len(flags)), 0, 0
    while n < KILLS:
        path = tmp_path / str(sweeps)
        n += disturb(long_launcher, path, flags, KILLS - n, rng)
        assert (path / "results.csv").read_bytes() == (tmp_path / "undisturbed" / "results.csv").read_bytes()
        sweeps += 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [[], PROCESSES], ids=["inline", "processes"])
def test_two_launches_run_no_trial_twice(
    launcher: Launcher, undisturbed: bytes, flags: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "shared"
    for launched in [launcher(path, *flags), launcher(path, *flags)]:
        launched.ends()
    assert_nothing_lost(path, [])
    assert {event["step"] for event in events(path, "began")} == {0}
    assert len(events(path, "began")) == len(events(path, "finished")) == len(events(path, "planned")) == 6
    assert (path / "results.csv").read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.long
def test_launch_takes_over_from_a_killed_one(long_launcher: Launcher, tmp_path: Path) -> None:
    path = tmp_path / "shared"
    first = long_launcher(path)
    wait_until(lambda: len(checkpoints(path)) >= 2, first)
    second = long_launcher(path)
    wait_until(lambda: len(events(path, "finished")) >= 1, first)
    first.kill()
    seen = [(checkpoints(path), len(events(path)))]
    second.ends()
    assert_nothing_lost(path, seen)
    assert {event["process"] for event in events(path, "began")} == {first.process.pid, second.process.pid}


def stop_and_resume(launcher: Launcher, path: Path, flags: list[str], number: signal.Signals) -> None:
    """Stop a launch during training, and launch it again."""
    launched = launcher(path, *flags)
    wait_until(lambda: len(checkpoints(path)) >= 2, launched)
    launched.process.send_signal(number)
    printed = launched.ends(STOPPED_BY_USER if number == signal.SIGINT else STOPPED_BY_CLUSTER)
    assert f"Stopped by {number.name}; running trials were saved. Run the same command to resume." in " ".join(
        printed.split()
    )
    assert not (path / "results.csv").exists()
    stopped = {event["trial"]: event["step"] for event in events(path, "stopped")}
    assert stopped
    assert stopped.items() <= checkpoints(path).items()
    assert_no_worker_is_left(path)
    n_events = len(events(path))
    launcher(path, *flags).ends()
    later = {event["trial"]: event["step"] for event in events(path, "began")[-6:]}
    assert stopped.items() <= later.items()
    assert_nothing_lost(path, [(stopped, n_events)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "number"),
    [([], signal.SIGINT), ([], signal.SIGTERM), (PROCESSES, signal.SIGINT), (PROCESSES, signal.SIGTERM)],
)
def test_signals_stop_and_the_same_command_resumes(
    launcher: Launcher, undisturbed: bytes, flags: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    stop_and_resume(launcher, tmp_path / "stopped", flags, number)
    assert (tmp_path / "stopped" / "results.csv").read_bytes() == undisturbed


# Worker processes that die, without JAX.

FAKE_WORKER = """
import json, os, sys
from pathlib import Path
path = Path(sys.argv[1])
print("the log of", os.getpid(), file=sys.stderr)
for line in sys.stdin:
    for trial in json.loads(line)["trials"]:
        with open(path / "lives", "a") as lives:
            lives.write(trial + "\\n")
        lived = (path / "lives").read_text().split().count(trial)
        if trial.startswith("bad") or (trial.startswith("weak") and lived < 3):
            os._exit(7)
        with open(path / "ledger.jsonl", "a") as ledger:
            ledger.write(json.dumps({"time": 0, "trial": trial, "event": "finished"}) + "\\n")
    print("done", flush=True)
    if trial.startswith("last"):
        break
"""


def run_fake_workers(path: Path, trials: list[str], pause: float = 0.0) -> Ledger:
    """Run chunks of one trial in one fake worker process at a time, with a pause before each."""
    package = path / "code" / "rustgpt_jax" / "sweeps"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "worker.py").write_text(FAKE_WORKER)
    ledger = Ledger(path / "ledger.jsonl")
    ledger.append_all([(trial, "planned", {"overrides": {}}) for trial in trials])
    launch = Launch(SweepDir(path), AssetCache(), path / "code", 1, {}, lambda: bool(time.sleep(pause)))
    run_in_subprocesses(launch, [Chunk((trial,), "exact", 1) for trial in trials])
    return ledger


def test_trial_fails_after_its_process_died_repeatedly(tmp_path: Path) -> None:
    ledger = run_fake_workers(tmp_path, ["good 1", "bad", "weak", "good 2"])
    states = ledger.states()
    assert {trial: state["event"] for trial, state in states.items()} == {
        "good 1": "finished",
        "bad": "failed",
        "weak": "finished",
        "good 2": "finished",
    }
    assert states["bad"]["error"] == "its process died 3 times, most recently with exit status 7"
    assert "the log of" in states["bad"]["traceback"]
    lives = Counter((tmp_path / "lives").read_text().splitlines())
    assert lives == {"good 1": 1, "bad": MAX_DEATHS, "weak": 3, "good 2": 1}


@pytest.mark.slow
def test_process_that_dies_while_idle_is_restarted(tmp_path: Path) -> None:
    ledger = run_fake_workers(tmp_path, ["last 1", "last 2", "good"], pause=0.3)
    assert {state["event"] for state in ledger.states().values()} == {"finished"}


def test_process_is_replaced_after_a_number_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[run_in_subprocesses.__module__], "TRIALS_PER_PROCESS", 2)
    ledger = run_fake_workers(tmp_path, [f"good {number}" for number in range(5)])
    assert [state["event"] for state in ledger.states().values()] == ["finished"] * 5
    # Each process writes one line.
    assert len((tmp_path / "workers" / "0.log").read_text().splitlines()) == 3
