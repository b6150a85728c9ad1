"""--launcher=slurm on a real Slurm gives the results of one process, even if jobs or the launcher are killed."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rustgpt_jax.data.preprocess import AssetCache
from rustgpt_jax.sweeps.local_launchers import Launch
from rustgpt_jax.sweeps.sweep_dir import EVENTS, Event, Ledger, SweepDir
from rustgpt_jax.sweeps.trial_batching import Chunk

ROOT = Path(__file__).parent.parent
LAUNCHER = importlib.import_module("rustgpt_jax.sweeps.slurm")
# A loaded machine takes minutes.
TIMEOUT_SECONDS = 300.0
Environment = dict[str, str]

CONFIG = """
from ml_collections import ConfigDict
from configs import tiny

def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.model.n_layers, config.model.d_model = 1, 16
    config.training.batch_size, config.training.steps, config.training.steps_per_jit_call = 4, 8, 4
    config.schedule.warmup_steps = 2
    config.logging.log_every, config.logging.eval_every, config.logging.checkpoint_every = 4, 8, 8
    config.logging.eval_batches = 1
    return config

def sweep():
    for d_model in (16, 8):
        for learning_rate in (1e-3, 1e-2):
            yield {"model.d_model": d_model, "optimizer.learning_rate": learning_rate}

def sweep_pair():
    yield from list(sweep())[:2]

LONG = {"training.steps": 2000, "training.steps_per_jit_call": 50, "logging.log_every": 50}
RARELY = {"logging.eval_every": 2000, "logging.checkpoint_every": 2000}

def sweep_long():
    for learning_rate in (1e-3, 1e-2):
        yield {"optimizer.learning_rate": learning_rate, **LONG, **RARELY}

def sweep_one():
    yield {"optimizer.learning_rate": 1e-3, **LONG, **RARELY}
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait until a condition holds, and fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


def command(config: Path, run: Path, *arguments: str, root: Path = ROOT) -> list[str]:
    return [sys.executable, str(root / "launch.py"), "sweep", f"--config={config}", f"--run={run}", *arguments]


def on_slurm(config: Path, run: Path, *arguments: str, root: Path = ROOT) -> list[str]:
    # One trial per job, one core per job, two jobs at a time.
    fixed = ("--launcher=slurm", "--mode=exact", "--width=1", "--workers=2", "--slurm=cpus_per_task=1")
    return command(config, run, *fixed, *arguments, root=root)


def finish(command: Sequence[str], environment: Environment) -> None:
    """Run a command, and assert that it succeeds."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def started(command: Sequence[str], environment: Environment) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in the background of a `with` block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(environment: Environment, *command: str) -> list[str]:
    """Return the output lines of a Slurm command."""
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    return shown.stdout.splitlines()


def events(run: Path, *kinds: str) -> list[Event]:
    return [event for event in Ledger(run / "ledger.jsonl").events() if event["event"] in kinds]


def steps(run: Path) -> list[int]:
    """Return the number of lines of metrics of each trial."""
    return [len(file.read_text().splitlines()) for file in run.glob("trials/*/metrics.jsonl")]


def found(run: Path) -> dict[str, list[str]]:
    """Return the status, steps and losses of each trial in results.csv."""
    _, *rows = (run / "results.csv").read_text().splitlines()
    return {row.split(",")[0]: row.split(",")[-6:] for row in rows}


@pytest.fixture(scope="module")
def cluster(slurm: Environment) -> Environment:
    """The environment of launchers and jobs, with quick compilation."""
    return slurm | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(autouse=True)
def no_jobs_are_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        environment = request.getfixturevalue("cluster")

        def is_empty() -> bool:
            jobs = ask(environment, "squeue", "--noheader", "--format=%A")
            for job in jobs:
                subprocess.run(["scancel", job], env=environment, capture_output=True, timeout=30)
            return not jobs

        wait_for(is_empty, "an empty queue")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def undisturbed(config: Path, cluster: Environment) -> Callable[[str], Path]:
    """Returns the folder of a sweep that ran in one process."""

    def folder(sweep: str) -> Path:
        run = config.with_name(f"inline {sweep}")
        if not run.exists():
            arguments = ("--launcher=inline", "--mode=exact", "--width=1", f"--sweep={sweep}")
            finish(command(config, run, *arguments), cluster)
        return run

    return folder


# Whole sweeps.


@pytest.mark.slow
@pytest.mark.long
def test_job_array_gives_the_results_of_one_process(
    config: Path, tmp_path: Path, cluster: Environment, undisturbed: Callable[[str], Path]
) -> None:
    run = tmp_path / "a sweep"
    finish(on_slurm(config, run), cluster)
    assert [event["job"].partition("_")[2] for event in events(run, "queued")] == ["0", "1", "2", "3"]
    assert len(events(run, "finished")) == 4
    assert (run / "results.csv").read_bytes() == (undisturbed("sweep") / "results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_preempted_jobs_save_and_resume(
    config: Path, tmp_path: Path, cluster: Environment, undisturbed: Callable[[str], Path]
) -> None:
    run = tmp_path / "run"
    with started(on_slurm(config, run, "--sweep=long", "--slurm=partition=low"), cluster) as launcher:
        wait_for(lambda: len(steps(run)) == 2 and min(steps(run)) > 1, "a step of both trials")
        ask(cluster, "sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        printed, _ = launcher.communicate(timeout=TIMEOUT_SECONDS)
        assert launcher.returncode == 0, printed
    stopped = {event["trial"]: event["step"] for event in events(run, "stopped")}
    began = [(event["trial"], event["step"]) for event in events(run, "began")]
    assert len(stopped) == 2 and min(stopped.values()) > 0
    assert Counter(began) == Counter([(trial, 0) for trial in stopped] + list(stopped.items()))
    assert len(events(run, "queued")) == 2
    assert found(run) == found(undisturbed("long"))


@pytest.mark.slow
def test_queued_jobs_run_the_code_snapshot_and_outlive_the_launcher(
    config: Path, tmp_path: Path, cluster: Environment, undisturbed: Callable[[str], Path]
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for name in ("rustgpt_jax", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", copy)
    ask(cluster, "sbatch", "--exclusive", "--job-name=busy", "--output=/dev/null", f"--wrap=sleep {TIMEOUT_SECONDS}")
    wait_for(lambda: ask(cluster, "squeue", "--noheader", "--states=RUNNING"), "a busy node")
    with started(on_slurm(config, run, "--sweep=pair", root=copy), cluster) as launcher:
        wait_for(lambda: len(events(run, "queued")) == 2, "jobs in the queue")
        (copy / "rustgpt_jax" / "training" / "run.py").write_text("raise RuntimeError('changed since')")
        assert not events(run, "began")
        ask(cluster, "scancel", "--name=busy")
        wait_for(lambda: events(run, "began"), "the first job")
        launcher.kill()
    finish(on_slurm(config, run, "--sweep=pair"), cluster)
    assert len(events(run, "queued")) == 2
    assert not events(run, "failed")
    assert len(found(run)) == 2
    assert found(run) == found(undisturbed("pair"))


@pytest.mark.slow
def test_trial_fails_after_repeated_job_failures(config: Path, tmp_path: Path, cluster: Environment) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'SLURM_JOB_ID' in os.environ:\n    sys.stderr.write('no disk')\n    os._exit(3)\n"
    )
    run = tmp_path / "run"
    with started(on_slurm(config, run, "--sweep=one"), cluster | {"PYTHONPATH": str(tmp_path)}) as launcher:
        printed, _ = launcher.communicate(timeout=TIMEOUT_SECONDS)
    assert launcher.returncode > 0 and "Traceback" not in printed
    jobs = [event["job"] for event in events(run, "queued")]
    assert len(jobs) == LAUNCHER.MAX_DEATHS
    (failed,) = events(run, "failed")
    log = run / "jobs" / f"{jobs[-1]}_0_log.err"
    assert failed["error"] == (
        f"its job ended 3 times before the trial was done; the last job, {jobs[-1]}, ended as FAILED; its log is {log}"
    )
    assert "no disk" in failed["traceback"]


@pytest.mark.slow
def test_problems_of_the_cluster_are_one_sentence(config: Path, tmp_path: Path, cluster: Environment) -> None:
    (tmp_path / "submitit.py").write_text("raise ModuleNotFoundError('No module named submitit')")
    silent = tmp_path / "silent" / "squeue"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    cases: dict[str, tuple[list[str], Environment, str]] = {
        "module": ([], {"PYTHONPATH": str(tmp_path)}, "--launcher=slurm needs submitit: python -m pip install"),
        "command": ([], {"PATH": str(tmp_path)}, "--launcher=slurm must run on a machine with Slurm"),
        "silence": ([], {"PATH": f"{silent.parent}:{os.environ['PATH']}"}, "Slurm does not respond: "),
        "partition": (["--slurm=partition=nowhere"], {}, "invalid partition specified: nowhere"),
        "option": (["--slurm=partitoin=low"], {}, "unrecognized option '--partitoin=low'"),
    }
    with ExitStack() as processes:
        running = {
            name: processes.enter_context(started(on_slurm(config, tmp_path / name, *arguments), cluster | changes))
            for name, (arguments, changes, _) in cases.items()
        }
        for name, (_, _, sentence) in cases.items():
            printed, _ = running[name].communicate(timeout=TIMEOUT_SECONDS)
            assert running[name].returncode == 2, printed
            *shown, message = printed.splitlines()
            assert message.startswith("error: ") and sentence in message, printed
            assert [line for line in shown if not line.startswith("shape class")] == []
            assert {event["event"] for event in events(tmp_path / name, *EVENTS)} == {"planned"}


# Job monitoring, with a fake cluster.


class FakeCluster:
    """A cluster whose jobs have the given states and steps at successive polls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, polls: list[tuple[str, int] | None]) -> None:
        self.folder = SweepDir(folder)
        self.ledger = Ledger(self.folder.ledger_file)
        self.ledger.append("one", "planned", overrides={})
        self._polls, self._states, self._is_known = polls, dict[str, str](), True
        monkeypatch.setattr(LAUNCHER, "POLL_SECONDS", 0)
        monkeypatch.setattr(LAUNCHER, "_check_cluster", lambda: None)
        monkeypatch.setattr(LAUNCHER, "_read_queue", self._queue)
        monkeypatch.setattr(LAUNCHER, "_submit_array", self._submitted)

    def _submitted(self, launch: Launch, chunks: Sequence[Chunk]) -> list[str]:
        jobs = [str(len(self._states) + place) for place in range(len(chunks))]
        self._states |= dict.fromkeys(jobs, "RUNNING")
        return jobs

    def _queue(self) -> dict[str, str] | None:
        if not self._states:
            return {}
        poll = self._polls.pop(0)
        if poll is None:
            return None
        state, step = poll
        if state == "FINISHED":
            self.ledger.append("one", "finished", step=step)
            state = "COMPLETED"
        elif step:
            self.ledger.append("one", "stopped", step=step)
        self._states[list(self._states)[-1]] = state
        return {job: state for job, state in self._states.items() if state != "FORGOTTEN"}

    def run(self) -> list[str]:
        """Launch a chunk of one trial, and return the events of the ledger after it was planned."""
        launch = Launch(self.folder, AssetCache(), Path("code"), 1, {}, lambda: False)
        LAUNCHER.run_on_slurm(launch, [Chunk(("one",), "exact", 1)])
        assert self._polls == []
        return [event["event"] for event in self.ledger.events()[1:]]


def test_jobs_with_progress_are_resubmitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    polls: list[tuple[str, int] | None] = [("TIMEOUT", step) for step in range(1, 9)]
    happened = FakeCluster(monkeypatch, tmp_path, [*polls, ("FINISHED", 9)]).run()
    assert happened == ["queued", "stopped"] * 8 + ["queued", "finished"]


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "FORGOTTEN"])
def test_jobs_without_progress_are_given_up(state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = FakeCluster(monkeypatch, tmp_path, [("TIMEOUT", 5), (state, 0), (state, 0)])
    assert cluster.run() == ["queued", "stopped", "queued", "queued", "failed"]


def test_failed_trial_is_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = FakeCluster(monkeypatch, tmp_path, [("FAILED", 0), ("FINISHED", 5)])
    cluster.ledger.append("one", "failed", error="", traceback="")
    assert cluster.run() == ["failed", "queued", "queued", "finished"]


def test_jobs_survive_outages_of_slurm_and_preemption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    polls: list[tuple[str, int] | None] = [None, None, ("PREEMPTED", 3), ("COMPLETING", 0), ("PENDING", 0), None]
    happened = FakeCluster(monkeypatch, tmp_path, [*polls, ("RUNNING", 0), ("FINISHED", 9)]).run()
    assert happened == ["queued", "stopped", "finished"]
