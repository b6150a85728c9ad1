"""Training with several processes: results, signals, resumption, and failures of one process."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_loop import TINY

from rustgpt_jax import distributed
from rustgpt_jax.distributed import (
    EXIT_PEER_LOST,
    EXIT_USER_ERROR,
    LaggedAllReduceMax,
    Watchdog,
    all_agree,
    detect_cluster,
    initialize,
    is_peer_lost,
    local_device_ids,
)
from rustgpt_jax.errors import UserError
from rustgpt_jax.process_setup import STOPPED_BY_CLUSTER, STOPPED_BY_USER
from rustgpt_jax.tracking.metric_writer import read_metrics
from rustgpt_jax.workdir.run_dir import lock_run_dir

LAUNCH = str(Path(__file__).parent.parent / "launch.py")
SECONDS = 300
STEPS = 30
KNOBS = (
    SMALL
    | TINY
    | {
        "model.d_model": 16,
        "model.n_layers": 2,
        "model.dropout": 0.1,
        "training.steps": STEPS,
        "training.batch_size": 8,
        "training.steps_per_jit_call": 2,
        "logging.log_every": 1,
        "logging.eval_every": 10,
        "logging.checkpoint_every": 5,
        "logging.sample_prompts": ("Why?",),
    }
)
CONFIG = f"""
from configs import base

def get_config():
    tree = base.get_config()
    tree.update_from_flattened_dict({KNOBS})
    return tree
"""


class Job:
    """The processes that train one run."""

    def __init__(
        self,
        config: Path,
        run: Path,
        count: int,
        flags: Sequence[str],
        barrier_timeout: int = SECONDS,
        folders: Sequence[Path] = (),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        coordination = [
            f"--coordinator_address={coordinator}",
            f"--num_processes={count}",
            f"--barrier_timeout={barrier_timeout}",
        ]
        command = [sys.executable, LAUNCH, "train", f"--config={config}", f"--run={run}", *flags]
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
        self.run = run
        self.processes = [
            subprocess.Popen(
                [
                    *command,
                    *(f"{flag}" for flag in coordination if count > 1),
                    *([f"--process_id={index}"] if count > 1 else []),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=folders[index] if folders else None,
            )
            for index in range(count)
        ]

    def wait_for_exit(self, *statuses: int) -> list[str]:
        """Wait for all processes, check their exit statuses, and return what each printed."""
        printed = [process.communicate(timeout=SECONDS)[0] for process in self.processes]
        assert [process.returncode for process in self.processes] == list(statuses), printed
        assert not any("Traceback" in text for text in printed), printed
        return printed

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is recorded."""
        until = time.monotonic() + SECONDS
        while not any(line["step"] >= step for line in lines(self.run)):
            for process in self.processes:
                assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)


def lines(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    (tmp_path / "small.py").write_text(CONFIG)
    jobs: list[Job] = []

    def begin(run: Path, count: int, *flags: str, barrier_timeout: int = SECONDS, folders: Sequence[Path] = ()) -> Job:
        jobs.append(Job(tmp_path / "small.py", run, count, flags, barrier_timeout, folders))
        return jobs[-1]

    yield begin
    for process in (process for job in jobs for process in job.processes):
        process.kill()
        process.communicate()


def assert_same_records(run: Path, uninterrupted: Path) -> None:
    """Check that two runs recorded the same steps, losses and samples."""
    ours, theirs = lines(run), lines(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "valid/loss", "train/gradient_norm"):
            assert math.isclose(one.get(name, 0.0), other.get(name, 0.0), abs_tol=1e-5), (name, one, other)
        for name in ("train/learned_tokens", "train/learning_rate"):
            assert one.get(name) == other.get(name)
    steps = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30]


@pytest.mark.slow
@pytest.mark.long
def test_run_resumes_with_another_number_of_processes(train: Callable[..., Job], tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", 1)
    alone.wait_for_exit(0)
    run = tmp_path / "run"
    four = train(run, 4, "--config.mesh.fsdp=2")
    four.wait_for_step(7)
    # A signal to one process stops all of them.
    four.processes[2].send_signal(signal.SIGUSR1)
    printed = four.wait_for_exit(*[STOPPED_BY_CLUSTER] * 4)
    assert "on 4 x cpu (data 2 x fsdp 2)" in printed[0] and "Stopped by SIGUSR1 at step" in printed[0]
    assert "Stopped" not in printed[1]
    two = train(run, 2)
    two.wait_for_step(17)
    two.processes[0].send_signal(signal.SIGINT)
    two.wait_for_exit(STOPPED_BY_USER, STOPPED_BY_USER)
    assert 17 <= lines(run)[-1]["step"] < STEPS
    train(run, 1).wait_for_exit(0)
    train(run, 2).wait_for_exit(0, 0)
    assert_same_records(run, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_killed_process_ends_the_others_and_the_run_resumes(
    train: Callable[..., Job], tmp_path: Path, killed: int
) -> None:
    run = tmp_path / "run"
    two = train(run, 2)
    two.wait_for_step(12)
    two.processes[killed].kill()
    began = time.monotonic()
    other = two.processes[1 - killed]
    printed = other.communicate(timeout=60)[0]
    assert time.monotonic() - began < 60
    if killed == 0 and other.returncode == -signal.SIGABRT:
        # JAX was faster to terminate a process that lost process 0.
        assert "another task died" in printed
    else:
        assert other.returncode == EXIT_PEER_LOST, printed
        assert "Another process of the run is gone" in printed and "continues from the last checkpoint" in printed
    assert "Traceback" not in printed
    train(run, 1).wait_for_exit(0)
    assert lines(run)[-1]["step"] == STEPS


@pytest.mark.slow
@pytest.mark.long
def test_hanging_process_ends_the_others(train: Callable[..., Job], tmp_path: Path) -> None:
    two = train(tmp_path / "run", 2, barrier_timeout=40)
    two.wait_for_step(12)
    two.processes[1].send_signal(signal.SIGSTOP)
    printed = two.processes[0].communicate(timeout=120)[0]
    assert two.processes[0].returncode == EXIT_PEER_LOST, printed
    assert "Another process of the run has been silent for 40 s." in printed


@pytest.mark.slow
def test_user_error_is_reported_by_all_processes(train: Callable[..., Job], tmp_path: Path) -> None:
    printed = train(tmp_path / "run", 2, "--config.mesh.fsdp=3", "--json").wait_for_exit(2, 2)
    # Process 0 writes the document.
    assert ['"schema_version": 1' in text for text in printed] == [True, False]
    assert all("config.mesh has fsdp 3 = 3 devices, but there are 2 devices" in text for text in printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.long
def test_error_in_one_process_ends_all(train: Callable[..., Job], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # Only process 0 locks the folder.
    with lock_run_dir(run):
        printed = train(run, 2, "--config.training.steps=2").wait_for_exit(EXIT_USER_ERROR, EXIT_USER_ERROR)
    assert "error: " in printed[0] and "error in process 0: " in printed[1]
    assert all("is in use" in text for text in printed), printed
    # A text file that only one process finds in its current folder.
    (tmp_path / "here").mkdir()
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "here" / "text.txt").write_text("A text. " * 500)
    files = ("--config.data.corpus=files", "--config.data.paths=('text.txt',)", "--config.data.split=tail")
    two = train(tmp_path / "other", 2, *files, folders=(tmp_path / "here", tmp_path / "nowhere"))
    printed = two.wait_for_exit(EXIT_USER_ERROR, EXIT_USER_ERROR)
    assert "error in process 1: " in printed[0] and all("text.txt" in text for text in printed), printed
    assert not list((tmp_path / "other").glob("checkpoints/*"))


# Without other processes.


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU pod"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_detect_cluster(environment: dict[str, str], cluster: str | None) -> None:
    assert detect_cluster(environment) == cluster


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_single_process_of_a_node_has_all_its_devices(environment: dict[str, str], devices: list[int] | None) -> None:
    assert local_device_ids(environment) == devices


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "message"),
    [
        ("h:1", None, 0, "Give all of --coordinator_address"),
        (None, 2, None, "Give all of --coordinator_address"),
        ("h:1", 2, 2, "--process_id=2: the processes are numbered from 0 to 1."),
    ],
)
def test_incomplete_process_flags_are_rejected(
    coordinator: str | None, count: int | None, index: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        initialize(coordinator, count, index, 10)


def test_single_process_does_not_wait() -> None:
    votes = LaggedAllReduceMax(math.inf)
    assert [votes.update(value) for value in (0.0, 3.0)] == [0.0, 3.0]
    assert all_agree(True) and not all_agree(False)
    with Watchdog(0.01, "") as watchdog:
        time.sleep(0.1)
        watchdog.heartbeat()


def test_watchdog_exits_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "exit_after_peer_loss", lambda what, hint: ended.append(f"{what} {hint}"))
    with Watchdog(0.2, "Again.") as watchdog:
        for _ in range(4):
            time.sleep(0.1)
            watchdog.heartbeat()
        assert not ended
        time.sleep(0.5)
        assert ended[0] == "Another process of the run has been silent for 0 s. Again."


def test_peer_loss_errors_are_recognized() -> None:
    assert is_peer_lost(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert not is_peer_lost(ValueError("shapes do not match"))
    assert not is_peer_lost(UserError("The connection is bad."))
    wrapped = UserError("The checkpoint cannot be written.")
    wrapped.__cause__ = ValueError("UNKNOWN: Gloo AllGather failed")
    assert is_peer_lost(wrapped)
